"""``mount``, ``umount``, ``restart`` and ``status``: the daemon itself."""

import contextlib
import os
import sys
import time
from typing import Annotated

import typer

from ckptfs import _client
from ckptfs._config import flags_variable, load_config
from ckptfs._model.attributes import OTHER_CONTAINERS
from ckptfs._model.config import Config
from ckptfs._model.manifest import printable
from ckptfs._model.replies import AttachmentStatus
from ckptfs.cli import config as flags
from ckptfs.cli import output
from ckptfs.errors import DaemonError, NoDaemon

_END_WAIT_S = 20.0
_PAUSE_S = 0.05


def mount(
    foreground: Annotated[
        bool, typer.Option("--foreground", "-f", help="Stay in the foreground, log to stderr.")
    ] = False,
    file: flags.ConfigFlag = "",
    socket: flags.SocketFlag = "",
    mount: flags.MountFlag = "",
    cache_dir: flags.CacheDirFlag = "",
    cache_size: flags.CacheSizeFlag = "",
    allow_other: flags.AllowOtherFlag = None,
    others: flags.SetFlag = None,
) -> None:
    """Start the daemon and its mount, where it is not running yet; prints the mount point.

    Flags win over the environment, and that over the file. ckptfs help config explains all
    settings.
    """
    given = flags.flags_of(file, socket, mount, cache_dir, cache_size, allow_other, others)
    config = load_config(flags=given)
    if foreground:
        os.chdir("/")
        os.environ.update(flags_variable(given))
        os.execv(sys.executable, [sys.executable, "-m", "ckptfs._daemon.keeper"])
    if given.values.keys() - {"socket"}:
        _refuse_if_running(config)
    _client.connect_or_start(config, flags=given).close()
    print(config.mount)


def _refuse_if_running(config: Config) -> None:
    """The flags would have no effect."""
    with contextlib.suppress(NoDaemon), _client.connect(config):
        raise DaemonError(
            f"a ckptfs daemon is already running at {config.socket}; ckptfs umount ends it, and "
            "ckptfs reload has it read its file anew"
        )


def umount(
    force: Annotated[
        bool, typer.Option("--force", help="Also while checkpoints are in use: their reads fail.")
    ] = False,
) -> None:
    """End the daemon and its mount."""
    config = load_config()
    with _client.connect(config) as connection:
        log = _client.log_of(config)
        connection.stop(force=force)
    if not _client.wait_ended(config, _END_WAIT_S):
        raise DaemonError(f"the daemon has not ended within {_END_WAIT_S:g} s; see {log}")


def restart() -> None:
    """Replace the daemon, perhaps by an upgraded one; who reads notices a pause only."""
    config = load_config()
    with _client.connect(config) as connection:
        before = connection.status()
        connection.restart()
    deadline_s = time.monotonic() + _END_WAIT_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(ConnectionError), _client.connect(config) as connection:
            if connection.status().pid != before.pid:
                return
        time.sleep(_PAUSE_S)
    raise DaemonError(f"the next daemon does not answer within {_END_WAIT_S:g} s; see {before.log}")


def status(as_json: output.JsonOption = False) -> None:
    """Show the daemon and the attached checkpoints."""
    with _client.connect() as connection:
        reply = connection.status()
    if as_json:
        output.print_json(reply)
        return
    limit = f" of at most {output.size(reply.cache_bytes_max)}" if reply.cache_bytes_max else ""
    restarts = f", restarted {reply.restarts} times" if reply.restarts else ""
    print(f"ckptfs {reply.version}, pid {reply.pid}{restarts}, mounted on {reply.mount}")
    print(f"cache {reply.cache_dir}: {output.size(reply.cache_bytes)}{limit}")
    print(f"fetched {output.size(reply.fetched_bytes)} in {reply.fetched_spans} requests")
    if reply.taken_bytes or reply.given_bytes:
        taken, given = output.size(reply.taken_bytes), output.size(reply.given_bytes)
        print(f"{taken} came from other nodes, {given} were given to them")
    if reply.workers:
        memory = output.size(reply.worker_bytes)
        print(f"{reply.workers} processes with libraries of stores, {memory} of memory")
    print(f"passthrough {reply.passthrough}")
    print(f"log {reply.log}")
    if not reply.attachments:
        print("no checkpoint is attached")
        return
    print()
    columns = ["CHECKPOINT", "STATE", "CACHED", "SIZE", "FILES"]
    rows = [
        [
            attachment.uri.partition("?")[0],
            output.state(attachment.state),
            output.share(attachment.cached, attachment.size),
            output.size(attachment.size),
            str(attachment.files),
        ]
        for attachment in reply.attachments
    ]
    output.print_table(columns, rows, right=(3, 4))
    for attachment in reply.attachments:
        print(f"\n{attachment.path}")
        for line in _holders(attachment):
            print(f"  held by {line}")
        if attachment.read_bytes_per_s or attachment.fetched_bytes_per_s:
            read = output.size(int(attachment.read_bytes_per_s))
            fetched = output.size(int(attachment.fetched_bytes_per_s))
            reads = attachment.reads_per_s
            print(f"  now: {reads:.0f} reads/s, {read}/s; from the store {fetched}/s")
        if attachment.error:
            print(f"  last error: {printable(attachment.error)}")
        for skipped in attachment.skipped:
            print(f"  left out: {skipped.name}: {skipped.reason}")
        if attachment.skipped_count > len(attachment.skipped):
            print(f"  left out: {attachment.skipped_count - len(attachment.skipped)} more")
    if reply.left_out:
        print(f"\nand {reply.left_out} more checkpoints, for which a status has no room")


def _holders(attachment: AttachmentStatus) -> list[str]:
    """Who holds it, one a line."""
    lines = [
        (f"pid {holder.pid}" if holder.pid else OTHER_CONTAINERS)
        + (f" ({printable(holder.command)})" if holder.command else "")
        + (f", {holder.open_files} open" if holder.open_files else "")
        for holder in attachment.processes
    ]
    named = {holder.pid for holder in attachment.processes}
    if more := sum(pid not in named for pid in attachment.holders):
        lines.append(f"{more} more processes")
    if not lines and attachment.open_files:
        lines.append(f"{attachment.open_files} open files")
    if attachment.pinned:
        lines.append("its pin: ckptfs detach takes it away")
    return lines or ["nobody: it will be detached"]
