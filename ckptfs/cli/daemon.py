"""``mount``, ``umount``, ``restart`` and ``status``: the daemon."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Annotated

import typer

from ckptfs._client import client
from ckptfs._config.load import flags_variable, load_config
from ckptfs._model.attributes import OTHER_CONTAINERS
from ckptfs._model.config import Config
from ckptfs._model.manifest import printable
from ckptfs._model.protocol.replies import AttachmentStatus, StatusReply
from ckptfs._model.protocol.requests import Restart
from ckptfs._model.wording import counted
from ckptfs.cli import config as flags
from ckptfs.cli import output, uploads
from ckptfs.errors import ConfigError, DaemonError, NoDaemon

_END_WAIT_S = 20.0
_PAUSE_S = 0.05
_NAME_WIDTH = len("passthrough")


def mount(
    foreground: Annotated[
        bool, typer.Option("--foreground", "-f", help="Stay in the foreground, and log to stderr.")
    ] = False,
    file: flags.ConfigFlag = "",
    socket: flags.SocketFlag = "",
    mount: flags.MountFlag = "",
    cache_dir: flags.CacheDirFlag = "",
    cache_size: flags.CacheSizeFlag = "",
    allow_other: flags.AllowOtherFlag = None,
    others: flags.SetFlag = None,
    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over",
            help="With --foreground: take the mount over from a keeper that runs with this flag, "
            "and hand it over to the next one. Readers see a pause.",
        ),
    ] = False,
) -> None:
    """Start the daemon and its mount. Prints the mount point.

    If the daemon is already running, the command does nothing. Other commands start the daemon when
    they need it. A flag overrides a variable of the environment, and a variable overrides the file.
    ckptfs help config explains all settings.
    """
    given = flags.flags_of(file, socket, mount, cache_dir, cache_size, allow_other, others)
    config = load_config(flags=given)
    if foreground:
        os.chdir("/")
        os.environ.update(flags_variable(given))
        command = [sys.executable, "-m", "ckptfs._keeper.keeper"]
        os.execv(sys.executable, [*command, *(["--take-over"] if take_over else [])])
    if take_over:
        raise ConfigError("--take-over is for a mount in the foreground; add --foreground")
    if given.values.keys() - {"socket"}:
        _refuse_if_running(config)
    client.connect_or_start(config, flags=given).close()
    print(config.mount)


def _refuse_if_running(config: Config) -> None:
    """Raise DaemonError if a daemon is running, because the flags would have no effect on it."""
    with contextlib.suppress(NoDaemon), client.connect(config):
        raise DaemonError(
            f"a ckptfs daemon is already running at {config.socket}; ckptfs umount ends it, and "
            "ckptfs reload makes it read its file again"
        )


def umount(
    force: Annotated[
        bool,
        typer.Option("--force", help="Unmount even if checkpoints are in use. Their reads fail."),
    ] = False,
) -> None:
    """End the daemon and its mount.

    Cached bytes stay in the cache. If checkpoints are in use, the command fails and names them.
    """
    config = load_config()
    with client.connect(config) as connection:
        log = client.log_of(config)
        connection.stop(force=force)
    if not client.wait_ended(config, _END_WAIT_S):
        raise DaemonError(f"the daemon has not ended within {_END_WAIT_S:g} s; see {log}")


def restart() -> None:
    """Replace the daemon, e.g. after an upgrade, without an error for readers.

    Checkpoints stay attached. Processes that read wait for a moment.
    """
    config = load_config()
    with client.connect(config) as connection:
        before = connection.status()
        with contextlib.suppress(ConnectionResetError):  # it can end before it answers
            connection.ask_once(Restart())
    deadline_s = time.monotonic() + _END_WAIT_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(ConnectionError), client.connect(config) as connection:
            if connection.status().pid != before.pid:
                return
        time.sleep(_PAUSE_S)
    raise DaemonError(f"the next daemon does not answer within {_END_WAIT_S:g} s; see {before.log}")


def status(as_json: output.JsonOption = False) -> None:
    """Show the daemon, its cache, and the attached checkpoints.

    The STATE of a checkpoint is lazy (the cache has a part of it), fetching, cached (the cache has
    all of it), changed (the store now has another version) or failing (the last fetch failed).
    Below the table is the path of each checkpoint, with the processes that hold it. Uploads in the
    background come last, without those that are done.
    """
    with client.connect() as connection:
        reply = connection.status()
    if as_json:
        output.print_json(reply)
        return
    for name, value in _facts(reply):
        print(f"{name:{_NAME_WIDTH}}  {value}")
    print()
    if reply.attachments:
        _print_attachments(reply)
    else:
        print("no checkpoint is attached; ckptfs attach URI attaches one")
    if reply.uploads:
        print()
        uploads.print_uploads(reply.uploads, reply.uploads_left_out)


def _print_attachments(reply: StatusReply) -> None:
    rows = [
        [
            output.state(attachment.state),
            output.share(attachment.cached, attachment.size),
            output.size(attachment.size),
            str(attachment.files),
            printable(attachment.uri.partition("?")[0]),
        ]
        for attachment in reply.attachments
    ]
    output.print_table(["STATE", "CACHED", "SIZE", "FILES", "CHECKPOINT"], rows, right=(2, 3))
    for attachment in reply.attachments:
        print(f"\n{attachment.path}")
        for line in _details(attachment):
            print(f"  {line}")
    if reply.left_out:
        print(f"\nand {counted(reply.left_out, 'more checkpoint')}, too many for one reply")


def _facts(reply: StatusReply) -> Iterator[tuple[str, str]]:
    restarts = f", restarted {counted(reply.restarts, 'time')}" if reply.restarts else ""
    yield "daemon", f"ckptfs {reply.version}, pid {reply.pid}{restarts}"
    yield "mount", reply.mount
    if reply.taken_over_s:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(reply.taken_over_s))
        yield "taken over", f"at {at} by {printable(reply.host)}"
    limit = f" of at most {output.size(reply.cache_bytes_max)}" if reply.cache_bytes_max else ""
    yield "cache", f"{output.size(reply.cache_bytes)}{limit} in {reply.cache_dir}"
    requests = counted(reply.fetched_spans, "request")
    yield "fetched", f"{output.size(reply.fetched_bytes)} in {requests}"
    if reply.taken_bytes or reply.given_bytes:
        taken, given = output.size(reply.taken_bytes), output.size(reply.given_bytes)
        yield "nodes", f"{taken} taken from other nodes and uploads, {given} given to nodes"
    if reply.workers:
        memory = output.size(reply.worker_bytes)
        processes = counted(reply.workers, "process")
        yield (
            "workers",
            f"{processes} that read{'s' if reply.workers == 1 else ''} stores, {memory} of memory",
        )
    yield "passthrough", reply.passthrough
    yield "log", reply.log


def _details(attachment: AttachmentStatus) -> Iterator[str]:
    yield from _holders(attachment)
    if attachment.read_bytes_per_s or attachment.fetched_bytes_per_s:
        read = output.size(int(attachment.read_bytes_per_s))
        fetched = output.size(int(attachment.fetched_bytes_per_s))
        yield f"now: {attachment.reads_per_s:.0f} reads/s, {read}/s; from the store {fetched}/s"
    if attachment.error:
        yield f"last error: {printable(attachment.error)}"
    for skipped in attachment.skipped:
        yield f"left out: {skipped.name}: {skipped.reason}"
    if attachment.skipped_count > len(attachment.skipped):
        yield f"left out: {attachment.skipped_count - len(attachment.skipped)} more"


def _holders(attachment: AttachmentStatus) -> list[str]:
    lines = [
        (f"held by pid {holder.pid}" if holder.pid else f"held by {OTHER_CONTAINERS}")
        + (f" ({printable(holder.command)})" if holder.command else "")
        + (f", {holder.open_files} open" if holder.open_files else "")
        for holder in attachment.processes
    ]
    named = {holder.pid for holder in attachment.processes}
    if more := sum(pid not in named for pid in attachment.holders):
        lines.append(f"held by {counted(more, 'more process')}")
    if not lines and attachment.open_files:
        lines.append(f"held by {counted(attachment.open_files, 'open file')}")
    if attachment.volume:
        lines.append("a volume of a pod: it stays until the kubelet unpublishes it")
    elif attachment.pinned:
        lines.append("pinned: it stays until ckptfs detach")
    return lines or ["held by no process, so it ends in a moment"]
