"""``prefetch``: fetch files into the node's cache, with a progress bar."""

import contextlib
import glob
import os
import time
from collections.abc import Generator, Sequence
from typing import Annotated

import msgspec
import typer

from ckptfs import xattrs
from ckptfs._client import client
from ckptfs._client.connection import Connection
from ckptfs._client.waiting import failure_of
from ckptfs._model.plans.plan import Wanted
from ckptfs._model.protocol.replies import Prefetching
from ckptfs._model.units import parse_rate
from ckptfs._model.wording import counted
from ckptfs.cli import output
from ckptfs.cli.checkpoints import AnonymousOption, PathOrUriArgument
from ckptfs.cli.target import Target, target_of
from ckptfs.errors import LocationError

RateOption = Annotated[
    str | None,
    typer.Option(
        metavar="RATE", help="Most bytes per second, e.g. 500k, 50M, 64MiB. Default: no limit."
    ),
]


def prefetch(
    path_or_uri: PathOrUriArgument,
    globs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="GLOB", help="Files to fetch, in this order, e.g. '*.json'. Default: all files."
        ),
    ] = None,
    limit_rate: RateOption = None,
    anonymous: AnonymousOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Fetch files of a checkpoint into the node's cache, and wait for them.

    Reads of programs have priority. A GLOB matches paths relative to the URI or PATH, and its *
    also matches /. Fetched bytes stay in the cache, even if the command is interrupted. If a file
    cannot be fetched, or a GLOB matches no file, the exit status is 1.
    """
    target = target_of(path_or_uri, anonymous)
    state = fetch(target, Wanted(globs or []), limit_rate, as_json)
    raise_failures(state, target)


def fetch(target: Target, wanted: Wanted, limit_rate: str | None, as_json: bool) -> Prefetching:
    """Fetch files or ranges of a checkpoint with a progress bar, and print the result. Globs are
    relative to the target's path. The returned state has the failures."""
    if limit_rate is not None:
        wanted = msgspec.structs.replace(wanted, rate=parse_rate(limit_rate))
    begun_s = time.monotonic()
    state = _run(target, wanted)
    seconds = time.monotonic() - begun_s
    if as_json:
        _print_json(state, seconds)
    elif state.files or not state.early_code:
        files = counted(state.files, "file")
        print(
            f"{files}, {output.size(state.bytes)}: "
            f"{output.size(state.fetched)} fetched in {seconds:.1f} s, "
            f"{output.size(state.cached)} were cached"
        )
    return state


def _run(target: Target, wanted: Wanted) -> Prefetching:
    from ckptfs._os.progress_bar import progress_bar  # rich.progress is slow to import

    with (
        _found(target, wanted.globs) as (connection, name, prefix),
        progress_bar(f"fetching {name}") as progress,
    ):
        if wanted.plan is not None:
            return connection.prefetch(name, wanted, progress)
        # A prefix that is not a directory is the path of a file.
        is_file = prefix and not prefix.endswith("/")
        globs = [prefix] if is_file else [prefix + each for each in wanted.globs or ["*"]]
        wanted = msgspec.structs.replace(wanted, globs=globs)
        state = connection.prefetch(name, wanted, progress)
        unmatched = [each.removeprefix(prefix) for each in state.unmatched]
        return msgspec.structs.replace(state, unmatched=unmatched)


@contextlib.contextmanager
def _found(target: Target, globs: Sequence[str]) -> Generator[tuple[Connection, str, str]]:
    """Yield a connection to the daemon, the checkpoint's name there, and a prefix for each glob,
    which is the target's path in the checkpoint. The context keeps a place attached."""
    if target.place is not None:
        with client.attached(target.place) as (_, reply), client.connect() as connection:
            yield connection, reply.name, ""
        return
    top = xattrs.root_of(target.path)
    prefix = glob.escape(os.path.relpath(os.path.realpath(target.path), top))
    if os.path.isdir(target.path):
        prefix = "" if prefix == os.curdir else f"{prefix}/"
    elif globs:
        raise LocationError(f"{target.path} is a file; give its directory with globs")
    with client.connect() as connection:
        yield connection, target.name, prefix


def _print_json(state: Prefetching, seconds: float) -> None:
    errors = [msgspec.structs.asdict(error) for error in state.errors]
    if state.early_code:  # the cause is not a single file
        errors.append({"path": "", "code": state.early_code, "message": state.early_message})
    output.print_json(
        {
            "files": state.files,
            "bytes": state.bytes,
            "fetched": state.fetched,
            "cached": state.cached,
            "seconds": round(seconds, 3),
            "errors": errors,
            "unmatched": state.unmatched,
        }
    )


def raise_failures(state: Prefetching, target: Target) -> None:
    """Raise one error for all failures."""
    if (error := failure_of(state, target.shown)) is not None:
        raise error
