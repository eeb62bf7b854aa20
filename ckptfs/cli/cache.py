"""``cache``: what of which checkpoints is on this node, and taking it out.

Asks the daemon; where none runs, the same is done to the directory itself.
"""

import os
import time
from typing import Annotated, Any

import msgspec
import typer

from ckptfs import _client, xattrs
from ckptfs._config import load_config
from ckptfs._model.manifest import printable
from ckptfs._model.replies import CachedCheckpoint, CachedFile, CacheNews, DamagedFile
from ckptfs._model.requests import CacheRequest, ClearCache, CollectCache, ListCache, VerifyCache
from ckptfs._model.units import age_text, parse_age, parse_rate, parse_size
from ckptfs.cli import completion, output
from ckptfs.cli.checkpoints import location_of
from ckptfs.errors import Busy, CacheError, DaemonError, NoDaemon, NotAttached

app = typer.Typer(
    help="Show, check and empty the node's cache.", no_args_is_help=True, rich_markup_mode=None
)
CheckpointArgument = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A path inside the mount, a URI, or a name that ckptfs cache ls lists.",
        show_default="all",
        autocompletion=completion.checkpoints,
    ),
]


@app.command()
def ls(checkpoint: CheckpointArgument = "", as_json: output.JsonOption = False) -> None:
    """What is in the cache of which checkpoints, attached or not; or of which files of one."""
    result = _Result(ListCache(checkpoint=_name_of(checkpoint)))
    if checkpoint:
        _print_files(result.files, as_json)
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
    print(f"{output.size(sum(each.bytes for each in found))} in {files} files")


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


@app.command()
def gc(
    free: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Free so much, e.g. 20G.", show_default=False),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Leave so much in the cache.", show_default=False),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(metavar="AGE", help="Not used for so long, e.g. 7d.", show_default=False),
    ] = None,
    as_json: output.JsonOption = False,
) -> None:
    """Take out of the cache what was used least recently and nobody has open.

    Without an option: down to the limits of the configuration.
    """
    if sum(each is not None for each in (free, keep, older_than)) > 1:
        raise CacheError("--free, --keep and --older-than exclude each other; give one")
    size, left = (None if each is None else parse_size(each) for each in (free, keep))
    age_s = None if older_than is None else parse_age(older_than)
    result = _Result(CollectCache(free=size, keep=left, older_s=age_s))
    _print_freed(result, as_json)
    last = result.last
    if size is not None and last.freed < size:
        raise CacheError(
            f"only {output.size(last.freed)} of {output.size(size)} could be freed: {_in_use(last)}"
        )


@app.command()
def clear(checkpoint: CheckpointArgument = "", as_json: output.JsonOption = False) -> None:
    """Take all out of the cache, or all of one checkpoint.

    What is open stays, and the status is 1 then: its readers would fetch it again.
    """
    result = _Result(ClearCache(checkpoint=_name_of(checkpoint)))
    _print_freed(result, as_json)
    if result.last.open_files:
        raise Busy(f"not all is taken out: {_in_use(result.last)}; ckptfs status says by whom")


def _in_use(last: CacheNews) -> str:
    if not last.open_files:
        return "there is no more"
    files = "1 file is" if last.open_files == 1 else f"{last.open_files} files are"
    return f"{files} in use, with {output.size(last.open_bytes)}"


def _print_freed(result: "_Result", as_json: bool) -> None:
    last = result.last
    if as_json:
        checkpoints = [
            {"name": c.name, "uri": c.uri, "uid": c.uid, "files": c.files, "bytes": c.bytes}
            for c in result.checkpoints
        ]
        output.print_json(
            {
                "freed": last.freed,
                "files": last.files,
                "open_files": last.open_files,
                "open_bytes": last.open_bytes,
                "checkpoints": checkpoints,
            }
        )
        return
    for each in result.checkpoints:
        print(f"{output.size(each.bytes)} in {each.files} files of {_title(each.uri)}")
    print(f"{output.size(last.freed)} freed, {last.files} files")


@app.command()
def verify(
    checkpoint: CheckpointArgument = "",
    limit_rate: Annotated[
        str | None,
        typer.Option(
            metavar="RATE", help="Bytes per second at most: 500k, 50M, 64MiB.", show_default=False
        ),
    ] = None,
    as_json: output.JsonOption = False,
) -> None:
    """Check all that is in the cache against its checksums, and take out what is damaged.

    It is read from the disk, whatever is in memory. The status is 1 if something was damaged; that
    is fetched anew when it is read next.
    """
    rate = 0 if limit_rate is None else parse_rate(limit_rate)
    request = VerifyCache(checkpoint=_name_of(checkpoint), rate=rate)
    result = _Result(request, "checking the cache")
    last = result.last
    if as_json:
        output.print_json(
            {
                "files": last.files,
                "checked": last.done,
                "freed": last.freed,
                "removed_at_start": last.removed_at_start,
                "damaged": [msgspec.to_builtins(each) for each in result.damaged],
            }
        )
    else:
        for each in result.damaged:
            what = f"{each.blocks} blocks" if each.blocks else "all of it"
            path = f"{printable(each.path)} of " if each.path else ""
            print(f"damaged: {path}{_title(each.uri)}: {what} ({printable(each.reason)})")
        print(f"{output.size(last.done)} checked, {last.files} files")
    if result.damaged:
        raise CacheError(
            f"{len(result.damaged)} of {last.files} files were damaged; what was damaged is taken "
            "out, and is fetched anew when it is read"
        )


class _Result:
    """What a command has found; `last`: its last news."""

    def __init__(self, request: CacheRequest, progress_text: str = "") -> None:
        self.checkpoints: list[CachedCheckpoint] = []
        self.files: list[CachedFile] = []
        self.damaged: list[DamagedFile] = []
        self.last = CacheNews(ended=True)
        try:
            self._carry_out(request, progress_text)
        except KeyboardInterrupt:
            raise typer.Exit(output.INTERRUPTED) from None

    def _carry_out(self, request: CacheRequest, progress_text: str) -> None:
        if not progress_text:
            _carry_out(request, self._take)
            return
        from ckptfs._progress import progress_bar  # rich.progress is slow to import

        with progress_bar(progress_text) as progress:

            def take(news: CacheNews) -> None:
                self._take(news)
                progress(news.done, news.all)

            _carry_out(request, take)

    def _take(self, news: CacheNews) -> None:
        self.checkpoints += news.checkpoints
        self.files += news.cached_files
        self.damaged += news.damaged
        self.last = news


def _carry_out(request: CacheRequest, tell: Any) -> None:
    config = load_config()
    try:
        connection = _client.connect(config)
    except NoDaemon as no_daemon:
        try:
            from ckptfs._daemon import cachealone
        except ImportError:  # only a client is installed here
            raise DaemonError(f"{no_daemon}, or pip install 'ckptfs[daemon]'") from None
        cachealone.carry_out(config, request, tell)
        return
    with connection:
        connection.cache(request, tell)


def _name_of(checkpoint: str) -> str:
    """The name of a checkpoint in the cache, that a path inside the mount, a URI or a name says."""
    if not checkpoint:
        return ""
    if "://" in checkpoint:
        return location_of(checkpoint).directory
    try:
        return os.path.basename(xattrs.root_of(checkpoint))
    except (NotAttached, FileNotFoundError):
        pass
    # It may have been attached there.
    within = os.path.relpath(os.path.abspath(checkpoint), load_config().mount).split(os.sep)[0]
    if within not in (os.curdir, os.pardir):
        return within
    if os.sep in checkpoint:
        raise NotAttached(f"{checkpoint} is not in the mount; give a URI, or a name of the list")
    return checkpoint


def _title(uri: str) -> str:
    return printable(uri.partition("?")[0]) or "an object of which nothing is known"
