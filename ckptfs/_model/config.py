"""The settings as plain data: the unit, default and reason of each, and when a change counts.

``ckptfs._config.load`` reads them from the file, the environment and flags. A test compares the
tables of ``CONFIGURATION.md``, which ``ckptfs help config`` shows, with the descriptions here.
"""

from typing import Annotated, Literal, get_type_hints

import msgspec

from ckptfs._model.named_store import StoreTable

Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
Bytes = Annotated[int, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
Threads = Annotated[int, msgspec.Meta(ge=0, le=64)] | Literal["auto"]
Processes = Annotated[int, msgspec.Meta(ge=0, le=32)] | Literal["auto"]
Share = Annotated[float, msgspec.Meta(ge=0, le=0.95)]

MIB = 1 << 20
NODE_IDLE_MEMORY_BYTES = 64 * MIB
"""Default of `Config.idle_memory_bytes` with `allow_other`. An idle daemon then takes 110 MB."""
STORE_TIMEOUT_S = 3.0
"""Default of `Config.store_timeout_s`."""

METRICS = r"^((127(\.[0-9]{1,3}){3}|localhost|\[::1\]):[0-9]{1,5}|unix:/[^\0\n]{1,106})?\Z"
"""A loopback address with a port, or a unix socket, so that only this machine can scrape."""

Change = Literal["reload", "mount"]
"""The moment when a change counts: a reload of the daemon, or the next ``ckptfs mount``."""


def _live(text: str) -> msgspec.Meta:
    """A setting that ``ckptfs reload`` changes."""
    return msgspec.Meta(description=" ".join(text.split()), extra={"change": "reload"})


def _fixed(text: str) -> msgspec.Meta:
    """A setting that a mount keeps until it ends."""
    return msgspec.Meta(description=" ".join(text.split()), extra={"change": "mount"})


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of one daemon and of the clients that use it, each with its description."""

    socket: Annotated[str, _fixed("Path of the control socket.")]
    node_socket: Annotated[
        str,
        _fixed("""Control socket of the node's daemon. Clients prefer that daemon if it serves them.
        None if `socket` is configured."""),
    ] = ""
    mount: Annotated[str, _fixed("The mount point. Checkpoints appear as directories inside it.")]
    cache_dir: Annotated[
        str,
        _fixed("""Directory of the cache and the log. One daemon at a time uses it. `ckptfs help
        containers` lists the directories that ckptfs uses if the default is unusable."""),
    ]
    cache_bytes_max: Annotated[
        Bytes,
        _live("Maximum size of the cache on disk. With 0, only the free share limits the cache."),
    ] = 0
    cache_free_share_min: Annotated[
        Share, _live("Share of the disk that the cache leaves free for others.")
    ] = 0.1
    upload_bytes_max: Annotated[
        Bytes,
        _live("""Maximum size of the files that wait in `cache_dir` for an upload in the background.
        Over it `ckptfs.upload(wait=False)` waits. With 0, only the free share limits them."""),
    ] = 0
    linger_s: Annotated[
        Seconds,
        _live("""Time for which an attachment stays after its last user, so that the next user of
        the checkpoint finds it attached."""),
    ] = 10.0
    idle_exit_s: Annotated[
        Seconds, _live("Time after which a daemon without attachments and clients ends. 0: never.")
    ] = 60.0
    read_deadline_s: Annotated[
        Seconds, _live("Longest time that a read waits for new bytes from the store.")
    ] = 60.0
    attach_deadline_s: Annotated[
        Seconds, _live("Longest time that an attach waits for the store's listing.")
    ] = 60.0
    store_timeout_s: Annotated[
        Seconds,
        _live("""Longest silence of a store in one request, and longest connect. A change counts
        for later attaches. If the first bytes of a store on S3 take longer, ckptfs allows more
        time for them. Two attempts of 3 s, the AWS SDK's default, keep the answer to an attach
        below 10 s."""),
    ] = STORE_TIMEOUT_S
    connections_max: Annotated[
        Count | Literal["auto"],
        _live("""Maximum number of concurrent requests for data. S3 gives one connection some 90
        MB/s, whatever the link. With `"auto"`, 2 for each core, but 32 at least and 128 at
        most."""),
    ] = "auto"
    fetch_processes: Annotated[
        Processes,
        _live("""Maximum number of processes that read stores beside the daemon under a sustained
        load, because one process receives some 2 GB/s over HTTPS at most. Each takes about 35 MB
        of memory, and together they hold the bytes in flight a second time. With `"auto"`, one for
        each 4 cores, 8 at most, and none while less than 400 MB/s come."""),
    ] = "auto"
    in_flight_bytes_max: Annotated[
        Bytes | Literal["auto"],
        _live("""Maximum number of bytes in flight, in all requests together. With `"auto"`, 4 MiB
        for each connection, but 128 MiB at least, and from there on at most 1/32 of the memory that
        ckptfs may use."""),
    ] = "auto"
    idle_memory_bytes: Annotated[
        Bytes | Literal["auto"],
        _fixed("""Maximum number of bytes of that memory that the daemon keeps while no file is
        open. Memory that is kept saves the first read the time in which the machine finds it: up
        to 0.1 s for 64 MiB on a virtual machine. With `"auto"`, 64 MiB for a node's daemon
        (`allow_other`), and 0 for a user's."""),
    ] = "auto"
    span_bytes_max: Annotated[
        int,
        msgspec.Meta(ge=1, le=16 * MIB),
        _live("""Maximum number of bytes in one request. With 8 MiB the round trip is short compared
        to the transfer, and a file still spreads over several connections. The upper limit is 16
        MiB, because the daemon keeps a whole span in memory if the disk fails."""),
    ] = 8 * MIB
    window_bytes_max: Annotated[
        Bytes | Literal["auto"],
        _live("""Longest distance of readahead ahead of one cursor. A change counts for files that
        are opened later. With `"auto"`, half of the bytes in flight, but 64 MiB at least and 256
        MiB at most."""),
    ] = "auto"
    read_ahead_kb: Annotated[
        Bytes,
        _fixed("""The kernel's own readahead for the mount, in KiB (needs root). In measurements,
        reads were 1.5 times as fast with 1024 as with the kernel's default of 128."""),
    ] = 1024
    reply_threads: Annotated[
        Threads,
        _fixed("""Number of threads that copy the bytes of long reads to the kernel. With 0, the
        daemon's main thread copies them. With `"auto"`, none on fewer than 4 cores, and otherwise 1
        and one more for each 8 cores, 4 at most."""),
    ] = "auto"
    passthrough: Annotated[
        bool,
        _fixed("""Let the kernel itself read files that are complete in the cache (needs Linux ≥ 6.9
        and root)."""),
    ] = True
    restart: Annotated[
        bool,
        _live("""Start a new daemon if the old one dies or hangs. This needs a kernel that repeats
        requests (Linux ≥ 6.9). Otherwise the mount ends with the daemon."""),
    ] = True
    spare: Annotated[
        bool,
        _live("""Keep a second process of the daemon ready, which takes about 25 MB of memory, so
        that a restart is immediate instead of taking half a second."""),
    ] = True
    restarts_max: Annotated[
        Count,
        _live("""Maximum number of such restarts in ten minutes. After more, the mount ends, because
        the cause probably persists and readers must not wait for ever."""),
    ] = 20
    allow_other: Annotated[
        bool,
        _fixed("""Let other users of the node use this daemon (needs root, or `user_allow_other` in
        fuse.conf)."""),
    ] = False
    lend_daemon_rights: Annotated[
        bool,
        _live("""With `allow_other`, let other users attach locations without credentials. The
        daemon reads these with its own rights (its AWS or Google credentials, its identity at HDFS,
        local files), so other users can read all that the daemon can read. For named stores, use
        `users` and `groups` instead."""),
    ] = False
    leave_job: Annotated[
        bool,
        _fixed("""Let a daemon that is started on demand leave the cgroup of its first job or
        session, if the system allows it, so that it keeps serving others when that job ends."""),
    ] = True
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        _fixed("""Lowest level of logged messages. ckptfs logs only warnings and errors of
        libraries, because their other messages can contain credentials."""),
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"],
        _fixed("""Format of the log on standard error or in the file: text, or one JSON object per
        line. The journal always gets fields of its own."""),
    ] = "text"
    metrics: Annotated[
        str,
        msgspec.Meta(pattern=METRICS),
        _fixed("""Address of the metrics for Prometheus: `127.0.0.1:9467` (or another port or
        loopback address), or `unix:` and the path of a socket. Every user of the node can read the
        metrics at a loopback address. Only this user can connect to the socket."""),
    ] = ""
    files_max: Annotated[
        int, msgspec.Meta(ge=1), _live("Maximum number of objects in one checkpoint.")
    ] = 1_000_000
    attachments_max: Annotated[
        Count,
        _live("""Maximum number of attached checkpoints. Each of the other users gets at most a
        quarter of it."""),
    ] = 1000
    attached_files_max: Annotated[
        int,
        msgspec.Meta(ge=1),
        _live("""Maximum number of objects in all attached checkpoints together. Each of the other
        users gets at most a quarter of it. One object takes 0.7 kB of the daemon's memory."""),
    ] = 4_000_000
    store: Annotated[dict[str, StoreTable], _live("Named stores; see below.")] = {}


def descriptions(kind: type[msgspec.Struct]) -> dict[str, msgspec.Meta]:
    """The declared description of each setting of `Config`, or of each key of a table."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        name: next(each for each in hint.__metadata__ if each.description)
        for name, hint in hints.items()
    }


def changes() -> dict[str, Change]:
    """The moment when a change of each setting counts."""
    found = descriptions(Config).items()
    return {name: meta.extra["change"] for name, meta in found if meta.extra}
