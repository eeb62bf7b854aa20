"""The configuration: every setting with its unit, default and reason. Plain data.

Reading it from the file and the environment is done in ``ckptfs._config``.
"""

from typing import Annotated, Literal

import msgspec

Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
Bytes = Annotated[int, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
Share = Annotated[float, msgspec.Meta(ge=0, le=0.95)]

MIB = 1 << 20
STORE_TIMEOUT_S = 3.0
"""Longest silence of a store where nothing is configured; see `Config.store_timeout_s`."""

METRICS = r"^((127(\.[0-9]{1,3}){3}|localhost|\[::1\]):[0-9]{1,5}|unix:/[^\0\n]{1,106})?\Z"
"""A loopback address and its port, or a unix socket: nobody else's machine may look."""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of one daemon and of the clients that use it.

    Attributes:
        socket: Path of the control socket.
        node_socket: Control socket of the node's daemon, which clients prefer where it serves them;
            "" if `socket` was set on purpose.
        mount: Directory where the daemon mounts; checkpoints appear inside it.
        cache_dir: Directory of the cache; one daemon at a time uses it.
        cache_bytes_max: Most bytes that the cache keeps on disk; 0: only the free share limits it.
        cache_free_share_min: Share of the disk that the cache leaves free for others.
        linger_s: How long an attachment that nobody holds stays, so that the next user of the same
            checkpoint finds it attached.
        idle_exit_s: How long a daemon with no attachment and no client stays; 0: for ever.
        read_deadline_s: Longest time that a read waits for the store.
        attach_deadline_s: Longest time that an attach waits for the store's listing.
        store_timeout_s: Longest silence of the store within one request, and longest connect. Two
            attempts of 3 s, the AWS SDK's default, keep the answer to an attach below 10 s.
        connections_max: Requests for data that run at the same time.
        in_flight_bytes_max: Most bytes that are being fetched at the same time.
        span_bytes_max: Most bytes of one request. 8 MiB makes the round trip small beside the
            transfer, and still spreads a file over several connections. At most 16 MiB, because
            what the disk refuses is kept in memory as a whole.
        window_bytes_max: Furthest that readahead runs ahead of one cursor.
        read_ahead_kb: The kernel's own readahead for the mount, in KiB (needs root). 1024 was
            measured half again as fast as the default of 128.
        passthrough: Let the kernel itself read files that are complete in the cache, where it can.
        restart: Start the daemon anew when it dies or is stuck, where the kernel can repeat what it
            was asked (Linux >= 6.9); otherwise the mount ends then.
        spare: Keep a second process of the daemon ready (some 25 MB of memory), so that it takes
            over in a moment instead of half a second.
        restarts_max: Most such restarts in ten minutes, then the mount ends: whatever kills the
            daemon will do so again, and readers must not wait for ever.
        allow_other: Let other users of the node use this daemon (needs root, or
            ``user_allow_other`` in fuse.conf).
        lend_daemon_rights: With `allow_other`: whether other users may attach what is read with the
            daemon's own rights (its AWS or Google credentials, its identity at HDFS, local files),
            because the location brings no credentials. Whoever asks then reads as the daemon does.
        log_level: The least that is logged. Libraries log warnings only, because what they say for
            debugging can have credentials in it.
        log_format: How standard error, or the log file, has it: as text, or as one JSON object a
            line. The journal gets fields of its own in any case.
        metrics: Where Prometheus finds the metrics: ``127.0.0.1:9467`` (or another port or loopback
            address), or ``unix:`` and the path of a socket, which only this user can connect to;
            "": nowhere. Every user of the node can look at a loopback address.
        files_max: Most objects in one checkpoint.
        attachments_max: Most checkpoints that are attached at the same time; a quarter of that for
            one of the other users.
        attached_files_max: Most objects in all of them together; a quarter of that for one of the
            other users. One takes 0.7 kB of the daemon's memory.
    """

    socket: str
    node_socket: str = ""
    mount: str
    cache_dir: str
    cache_bytes_max: Bytes = 0
    cache_free_share_min: Share = 0.1
    linger_s: Seconds = 10.0
    idle_exit_s: Seconds = 60.0
    read_deadline_s: Seconds = 60.0
    attach_deadline_s: Seconds = 60.0
    store_timeout_s: Seconds = STORE_TIMEOUT_S
    connections_max: Count = 16
    in_flight_bytes_max: Bytes = 128 * MIB
    span_bytes_max: Annotated[int, msgspec.Meta(ge=1, le=16 * MIB)] = 8 * MIB
    window_bytes_max: Bytes = 64 * MIB
    read_ahead_kb: Bytes = 1024
    passthrough: bool = True
    restart: bool = True
    spare: bool = True
    restarts_max: Count = 20
    allow_other: bool = False
    lend_daemon_rights: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    metrics: Annotated[str, msgspec.Meta(pattern=METRICS)] = ""
    files_max: Annotated[int, msgspec.Meta(ge=1)] = 1_000_000
    attachments_max: Count = 1000
    attached_files_max: Annotated[int, msgspec.Meta(ge=1)] = 4_000_000
