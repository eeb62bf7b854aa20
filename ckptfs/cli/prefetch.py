"""``prefetch``: fetch files into the node's cache, and show how far it is."""

import contextlib
import glob
import os
import time
from collections.abc import Generator, Sequence
from typing import Annotated

import msgspec
import typer

from ckptfs import _client, xattrs
from ckptfs._connection import Connection
from ckptfs._model.manifest import printable
from ckptfs._model.plan import Wanted
from ckptfs._model.replies import Prefetching
from ckptfs._model.stores import is_uri
from ckptfs._model.units import parse_rate
from ckptfs._model.uris import shown_uri
from ckptfs.cli import output
from ckptfs.cli.checkpoints import AnonymousOption, PathOrUriArgument, asked, location_of
from ckptfs.errors import BY_CODE, CkptfsError, LocationError, PrefetchFailed

RateOption = Annotated[
    str | None,
    typer.Option(
        metavar="RATE", help="Bytes per second at most: 500k, 50M, 64MiB.", show_default=False
    ),
]

_SHOWN_MAX = 3
"""Files that a message names; the attributes of each say what happened to it."""


def prefetch(
    path_or_uri: PathOrUriArgument,
    globs: Annotated[
        list[str] | None,
        typer.Argument(metavar="GLOB", help="Which files, and in which order.", show_default="all"),
    ] = None,
    limit_rate: RateOption = None,
    anonymous: AnonymousOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Fetch files of a checkpoint into the node's cache, and wait for them.

    What is read meanwhile goes first. Without a GLOB, all files are fetched, or those below a PATH
    inside the mount; a GLOB is on paths relative to it, and * also matches /. What was fetched
    stays in the cache when the command has ended.
    """
    path_or_uri = asked(path_or_uri, anonymous)
    state = fetch(path_or_uri, Wanted(globs or []), limit_rate, as_json)
    if globs and not state.files and not state.early_code:
        raise PrefetchFailed(
            f"no file in {shown_uri(path_or_uri)} matches {printable(' '.join(globs))}; "
            "ckptfs ls lists them"
        )
    raise_failures(state)


def fetch(path_or_uri: str, wanted: Wanted, limit_rate: str | None, as_json: bool) -> Prefetching:
    """Fetch what is wanted of a checkpoint, with a bar, and say what that was. Globs count from a
    PATH in the checkpoint. What failed is in the result."""
    if limit_rate is not None:
        wanted = msgspec.structs.replace(wanted, rate=parse_rate(limit_rate))
    begun_s = time.monotonic()
    try:
        state = _run(path_or_uri, wanted)
    except KeyboardInterrupt:
        raise typer.Exit(output.INTERRUPTED) from None
    seconds = time.monotonic() - begun_s
    if as_json:
        _print_json(state, seconds)
    else:
        print(
            f"{state.files} files, {output.size(state.bytes)}: "
            f"{output.size(state.fetched)} fetched in {seconds:.1f} s, "
            f"{output.size(state.cached)} were cached"
        )
    return state


def _run(path_or_uri: str, wanted: Wanted) -> Prefetching:
    from ckptfs._progress import progress_bar  # rich.progress is slow to import

    with (
        _found(path_or_uri, wanted.globs) as (connection, name, globs),
        progress_bar(f"fetching {name}") as progress,
    ):
        if wanted.plan is None:
            wanted = msgspec.structs.replace(wanted, globs=list(globs))
        return connection.prefetch(name, wanted, progress)


@contextlib.contextmanager
def _found(
    path_or_uri: str, globs: Sequence[str]
) -> Generator[tuple[Connection, str, Sequence[str]]]:
    """A connection to the daemon that has the checkpoint, its name there, and the globs as seen
    from its root. A URI is attached as long as the context lasts."""
    if is_uri(path_or_uri):
        with (
            _client.attached(location_of(path_or_uri)) as (_, reply),
            _client.connect() as connection,
        ):
            yield connection, reply.name, globs or ["*"]
        return
    top = xattrs.root_of(path_or_uri)
    below = glob.escape(os.path.relpath(os.path.realpath(path_or_uri), top))
    if os.path.isdir(path_or_uri):
        prefix = "" if below == os.curdir else f"{below}/"
        below_root = [f"{prefix}{each}" for each in globs or ["*"]]
    elif globs:
        raise LocationError(f"{path_or_uri} is a file; give globs with its directory")
    else:
        below_root = [below]
    with _client.connect() as connection:
        yield connection, os.path.basename(top), below_root


def _print_json(state: Prefetching, seconds: float) -> None:
    errors = [
        {"path": error.path, "code": error.code, "message": error.message} for error in state.errors
    ]
    if state.early_code:  # not of one file
        errors.append({"path": "", "code": state.early_code, "message": state.early_message})
    output.print_json(
        {
            "files": state.files,
            "bytes": state.bytes,
            "fetched": state.fetched,
            "cached": state.cached,
            "seconds": round(seconds, 3),
            "errors": errors,
        }
    )


def raise_failures(state: Prefetching) -> None:
    """One line for all that went wrong."""
    said: list[str] = []
    if state.early_code:
        said.append(f"the prefetch ended early: {state.early_message}")
    if state.error_count:
        shown = [error.message for error in state.errors[:_SHOWN_MAX]]
        if state.error_count > len(shown):
            shown.append(f"and {state.error_count - len(shown)} more (--json lists them)")
        said.append(
            f"{state.error_count} of {state.files} files could not be fetched: {'; '.join(shown)}"
        )
    if said:
        kind = BY_CODE.get(state.early_code, CkptfsError) if state.early_code else PrefetchFailed
        raise kind("; ".join(said))
