"""The configuration: every setting with its unit, default, reason, and when a change of it counts.
Plain data.

Reading it from the file, the environment and flags is done in ``ckptfs._config``; what
``ckptfs help config`` and ``CONFIGURATION.md`` say of it is made in ``ckptfs._model.settings``.
"""

from typing import Annotated, Literal

import msgspec

from ckptfs._model.stores import StoreTable

Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
Bytes = Annotated[int, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
Share = Annotated[float, msgspec.Meta(ge=0, le=0.95)]

MIB = 1 << 20
STORE_TIMEOUT_S = 3.0
"""Longest silence of a store where nothing is configured; see `Config.store_timeout_s`."""

METRICS = r"^((127(\.[0-9]{1,3}){3}|localhost|\[::1\]):[0-9]{1,5}|unix:/[^\0\n]{1,106})?\Z"
"""A loopback address and its port, or a unix socket: nobody else's machine may look."""

Change = Literal["reload", "mount"]
"""When a change counts: with a reload of a running daemon, or with the next ``ckptfs mount``."""


def _live(text: str) -> msgspec.Meta:
    """A setting that ``ckptfs reload`` changes."""
    return msgspec.Meta(description=text, extra={"change": "reload"})


def _fixed(text: str) -> msgspec.Meta:
    """A setting that a mount has for its whole life."""
    return msgspec.Meta(description=text, extra={"change": "mount"})


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of one daemon and of the clients that use it. Each says what it means itself."""

    socket: Annotated[str, _fixed("Path of the control socket.")]
    node_socket: Annotated[
        str,
        _fixed(
            "Control socket of the node's daemon, which clients prefer where it serves them; none "
            "if `socket` was set on purpose."
        ),
    ] = ""
    mount: Annotated[
        str, _fixed("Directory where the daemon mounts; checkpoints appear inside it.")
    ]
    cache_dir: Annotated[
        str, _fixed("Directory of the cache; one daemon at a time uses it. Its log is there, too.")
    ]
    cache_bytes_max: Annotated[
        Bytes,
        _live("Most bytes that the cache keeps on disk; 0: only the free share limits it."),
    ] = 0
    cache_free_share_min: Annotated[
        Share, _live("Share of the disk that the cache leaves free for others.")
    ] = 0.1
    linger_s: Annotated[
        Seconds,
        _live(
            "How long an attachment that nobody holds stays, so that the next user of the same "
            "checkpoint finds it attached."
        ),
    ] = 10.0
    idle_exit_s: Annotated[
        Seconds,
        _live("How long a daemon with no attachment and no client stays; 0: for ever."),
    ] = 60.0
    read_deadline_s: Annotated[
        Seconds, _live("Longest time that a read waits for new bytes of the store.")
    ] = 60.0
    attach_deadline_s: Annotated[
        Seconds, _live("Longest time that an attach waits for the store's listing.")
    ] = 60.0
    store_timeout_s: Annotated[
        Seconds,
        _live(
            "Longest silence of the store within one request, and longest connect; of what is "
            "attached from then on. A store on S3 whose first bytes take longer gets more time for "
            "them. Two attempts of 3 s, the AWS SDK's default, keep the answer to "
            "an attach below 10 s."
        ),
    ] = STORE_TIMEOUT_S
    connections_max: Annotated[Count, _live("Requests for data that run at the same time.")] = 16
    in_flight_bytes_max: Annotated[
        Bytes, _live("Most bytes that are being fetched at the same time.")
    ] = 128 * MIB
    span_bytes_max: Annotated[
        int,
        msgspec.Meta(ge=1, le=16 * MIB),
        _live(
            "Most bytes of one request. 8 MiB makes the round trip small beside the transfer, and "
            "still spreads a file over several connections. At most 16 MiB, because what the disk "
            "refuses is kept in memory as a whole."
        ),
    ] = 8 * MIB
    window_bytes_max: Annotated[
        Bytes,
        _live(
            "Furthest that readahead runs ahead of one cursor, in files that are opened from "
            "then on."
        ),
    ] = 64 * MIB
    read_ahead_kb: Annotated[
        Bytes,
        _fixed(
            "The kernel's own readahead for the mount, in KiB (needs root). 1024 was measured half "
            "again as fast as the default of 128."
        ),
    ] = 1024
    passthrough: Annotated[
        bool,
        _fixed(
            "Let the kernel itself read files that are complete in the cache, where it can "
            "(Linux ≥ 6.9, root)."
        ),
    ] = True
    restart: Annotated[
        bool,
        _live(
            "Start the daemon anew when it dies or is stuck, where the kernel can repeat what it "
            "was asked (Linux ≥ 6.9); otherwise the mount ends then."
        ),
    ] = True
    spare: Annotated[
        bool,
        _live(
            "Keep a second process of the daemon ready (some 25 MB of memory), so that it takes "
            "over in a moment instead of half a second."
        ),
    ] = True
    restarts_max: Annotated[
        Count,
        _live(
            "Most such restarts in ten minutes, then the mount ends: whatever kills the daemon "
            "will do so again, and readers must not wait for ever."
        ),
    ] = 20
    allow_other: Annotated[
        bool,
        _fixed(
            "Let other users of the node use this daemon (needs root, or `user_allow_other` in "
            "fuse.conf)."
        ),
    ] = False
    lend_daemon_rights: Annotated[
        bool,
        _live(
            "With `allow_other`: whether other users may attach what is read with the daemon's own "
            "rights (its AWS or Google credentials, its identity at HDFS, local files), because "
            "the location brings no credentials. Whoever asks then reads as the daemon does. "
            "Named stores have `users` and `groups` instead."
        ),
    ] = False
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        _fixed(
            "The least that is logged. Libraries log warnings only, because what they say for "
            "debugging can have credentials in it."
        ),
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"],
        _fixed(
            "How standard error, or the log file, has it: as text, or as one JSON object a line. "
            "The journal gets fields of its own in any case."
        ),
    ] = "text"
    metrics: Annotated[
        str,
        msgspec.Meta(pattern=METRICS),
        _fixed(
            "Where Prometheus finds the metrics: `127.0.0.1:9467` (or another port or loopback "
            "address), or `unix:` and the path of a socket, which only this user can connect to. "
            "Every user of the node can look at a loopback address."
        ),
    ] = ""
    files_max: Annotated[int, msgspec.Meta(ge=1), _live("Most objects in one checkpoint.")] = (
        1_000_000
    )
    attachments_max: Annotated[
        Count,
        _live(
            "Most checkpoints that are attached at the same time; a quarter of that for one of the "
            "other users."
        ),
    ] = 1000
    attached_files_max: Annotated[
        int,
        msgspec.Meta(ge=1),
        _live(
            "Most objects in all of them together; a quarter of that for one of the other users. "
            "One takes 0.7 kB of the daemon's memory."
        ),
    ] = 4_000_000
    store: Annotated[dict[str, StoreTable], _live("Named stores; see below.")] = {}
