"""``cache``: list, check and empty the node's cache.

The daemon carries the commands out. If none is running, this process does so.
"""

import os
import time
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import typer

from ckptfs._client import client
from ckptfs._config.load import load_config
from ckptfs._model.manifest import printable
from ckptfs._model.named_store import is_uri
from ckptfs._model.protocol import requests
from ckptfs._model.protocol.replies import CachedCheckpoint, CachedFile, CacheResults
from ckptfs._model.units import age_text, parse_age, parse_rate, parse_size
from ckptfs._model.uris import shown_uri
from ckptfs._model.wording import INSTALL_DAEMON, counted
from ckptfs.cli import completion, output
from ckptfs.cli.help_text import command, group
from ckptfs.cli.prefetch import RateOption
from ckptfs.cli.target import target_of
from ckptfs.errors import Busy, CacheError, DaemonError, NoDaemon

app = group("Show, check and empty the node's cache.")
_URI = "s3://bucket/run7/checkpoint_000100"
CheckpointArgument = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A path inside the mount, a URI, or a name from ckptfs cache ls. Default: all "
        "checkpoints.",
        autocompletion=completion.checkpoints,
    ),
]


@command(app, "ls", "ckptfs cache ls", f"ckptfs cache ls {_URI}")
def ls(checkpoint: CheckpointArgument = "", as_json: output.JsonOption = False) -> None:
    """List the cached checkpoints, or the cached files of one checkpoint.

    The list also has checkpoints that are no longer attached.
    """
    result = _carry_out(requests.ListCache(checkpoint=_name_of(checkpoint)))
    if checkpoint:
        _print_files(result.cached_files, as_json)
        _warn_of_nothing(checkpoint, result.cached_files)
    else:
        _print_checkpoints(result.checkpoints, as_json)


def _print_checkpoints(found: list[CachedCheckpoint], as_json: bool) -> None:
    if as_json:
        output.print_json(found)
        return
    rows: list[list[Any]] = [
        [
            output.size(each.bytes),
            output.share(min(each.cached, each.size), each.size),
            str(each.files),
            age_text(time.time() - each.used),
            "pinned" if each.pinned else "attached" if each.attached else "",
            printable(each.name),
            printable(each.uri.partition("?")[0]),
        ]
        for each in found
    ]
    columns = ["ON DISK", "CACHED", "FILES", "LAST USE", "STATE", "NAME", "URI"]
    output.print_table(columns, rows, right=(0, 2, 3), spare=(5,))
    files = sum(each.files for each in found)
    print(f"{output.size(sum(each.bytes for each in found))} in {counted(files, 'file')}")


def _print_files(found: list[CachedFile], as_json: bool) -> None:
    found.sort(key=lambda each: each.path)
    if as_json:
        output.print_json(found)
        return
    rows: list[list[Any]] = [
        [
            output.size(each.bytes),
            output.share(each.cached, each.size),
            output.size(each.size),
            age_text(time.time() - each.used),
            "open" if each.open else "",
            printable(each.path),
        ]
        for each in found
    ]
    columns = ["ON DISK", "CACHED", "SIZE", "LAST USE", "STATE", "PATH"]
    output.print_table(columns, rows, right=(0, 2, 3), spare=(3,))


@command(
    app,
    "gc",
    "ckptfs cache gc --free 20G",
    "ckptfs cache gc --keep 500GiB",
    "ckptfs cache gc --older-than 7d",
)
def gc(
    free: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Free this many bytes, e.g. 20G.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Keep at most this many bytes, e.g. 500G.")
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(
            metavar="AGE", help="Remove files unused for this long, e.g. 90m, 12h, 7d, 2w."
        ),
    ] = None,
    as_json: output.JsonOption = False,
) -> None:
    """Remove the least recently used files from the cache.

    Open files stay. Without an option, the cache shrinks to the limits of the configuration.
    """
    if sum(each is not None for each in (free, keep, older_than)) > 1:
        raise CacheError("--free, --keep and --older-than exclude each other; give one")
    size = None if free is None else parse_size(free)
    request = requests.CollectCache(
        free=size,
        keep=None if keep is None else parse_size(keep),
        older_s=None if older_than is None else parse_age(older_than),
    )
    result = _carry_out(request)
    _print_freed(result, as_json)
    if size is not None and result.freed < size:
        freed = f"only {output.size(result.freed)} of {output.size(size)} could be freed"
        raise CacheError(f"{freed}: {_in_use(result)}")


@command(app, "clear", f"ckptfs cache clear {_URI}", "ckptfs cache clear")
def clear(checkpoint: CheckpointArgument = "", as_json: output.JsonOption = False) -> None:
    """Remove all files from the cache, or all files of one checkpoint.

    Open files stay, because their readers would fetch them again. If any stay, the exit status is
    1.
    """
    result = _carry_out(requests.ClearCache(checkpoint=_name_of(checkpoint)))
    _print_freed(result, as_json)
    if checkpoint:
        _warn_of_nothing(checkpoint, result.files or result.open_files)
    if result.open_files:
        raise Busy(f"the cache is not empty: {_in_use(result)}; ckptfs status shows by whom")


def _warn_of_nothing(checkpoint: str, found: object) -> None:
    if not found:
        output.warn(f"nothing of {shown_uri(checkpoint)} is in the cache")


def _in_use(result: CacheResults) -> str:
    if not result.open_files:
        return "the cache has no more"
    files = "1 file is" if result.open_files == 1 else f"{result.open_files} files are"
    return f"{files} in use, with {output.size(result.open_bytes)}"


def _print_freed(result: CacheResults, as_json: bool) -> None:
    if as_json:
        checkpoints = [
            {"name": c.name, "uri": c.uri, "uid": c.uid, "files": c.files, "bytes": c.bytes}
            for c in result.checkpoints
        ]
        output.print_json(
            {
                "freed": result.freed,
                "files": result.files,
                "open_files": result.open_files,
                "open_bytes": result.open_bytes,
                "checkpoints": checkpoints,
            }
        )
        return
    for each in result.checkpoints:
        print(f"{output.size(each.bytes)} in {counted(each.files, 'file')} of {_title(each.uri)}")
    print(f"{output.size(result.freed)} freed, {counted(result.files, 'file')}")


@command(app, "verify", "ckptfs cache verify", f"ckptfs cache verify --limit-rate 100M {_URI}")
def verify(
    checkpoint: CheckpointArgument = "",
    limit_rate: RateOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Check the cache against its checksums, and remove damaged bytes.

    The command reads the disk, even if the kernel has the bytes in memory. If bytes are damaged,
    the exit status is 1, and their next read fetches them again.
    """
    rate = 0 if limit_rate is None else parse_rate(limit_rate)
    request = requests.VerifyCache(checkpoint=_name_of(checkpoint), rate=rate)
    from ckptfs._os.progress_bar import progress_bar  # rich.progress is slow to import

    with progress_bar("checking the cache") as progress:
        result = _carry_out(request, progress)
    if as_json:
        output.print_json(
            {
                "files": result.files,
                "checked": result.done,
                "freed": result.freed,
                "removed_at_start": result.removed_at_start,
                "damaged": result.damaged,
            }
        )
    else:
        for each in result.damaged:
            what = f"{each.blocks} blocks" if each.blocks else "all of it"
            path = f"{printable(each.path)} of " if each.path else ""
            print(f"damaged: {path}{_title(each.uri)}: {what} ({printable(each.reason)})")
        print(f"{output.size(result.done)} checked, {counted(result.files, 'file')}")
    if checkpoint:
        _warn_of_nothing(checkpoint, result.files)
    if result.damaged:
        raise CacheError(
            f"{len(result.damaged)} of {counted(result.files, 'file')} were damaged; ckptfs has "
            "removed the damaged bytes, and fetches them again when they are read"
        )


def _carry_out(
    request: requests.CacheRequest, progress: Callable[[int, int], None] | None = None
) -> CacheResults:
    """Run a command on the cache. Return the totals of its last message, and the items of all."""
    whole = CacheResults(ended=False)

    def take(news: CacheResults) -> None:
        nonlocal whole
        whole = msgspec.structs.replace(
            news,
            checkpoints=whole.checkpoints + news.checkpoints,
            cached_files=whole.cached_files + news.cached_files,
            damaged=whole.damaged + news.damaged,
        )
        if progress is not None:
            progress(news.done, news.all)

    config = load_config()
    try:
        connection = client.connect(config)
    except NoDaemon as no_daemon:
        try:
            from ckptfs._daemon import offline_cache
        except ImportError:  # only a client is installed here
            raise DaemonError(f"{no_daemon}, or {INSTALL_DAEMON}") from None
        offline_cache.carry_out(config, request, take)
    else:
        with connection:
            connection.cache(request, take)
    return whole


def _name_of(checkpoint: str) -> str:
    """The name of a checkpoint in the cache. Only the daemon knows the place of a named store, so
    its URI stays as it is."""
    if not checkpoint:
        return ""
    # A name looks like a file in this directory.
    if is_uri(checkpoint) or os.sep in checkpoint or os.path.exists(checkpoint):
        target = target_of(checkpoint)
        if target.place is None:
            return target.name
        return target.place.uri if target.place.kind == "named" else target.place.directory
    return checkpoint


def _title(uri: str) -> str:
    return printable(uri.partition("?")[0]) or "an unknown object"
