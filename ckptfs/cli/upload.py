"""``upload``: a local directory becomes a checkpoint in a store, with a progress bar."""

import contextlib
import logging
import signal
import time
from collections.abc import Generator
from typing import Annotated, NoReturn

import msgspec
import typer

from ckptfs._model.units import parse_rate
from ckptfs._model.wording import counted
from ckptfs.cli import output
from ckptfs.cli.prefetch import RateOption
from ckptfs.cli.target import local_path


def upload(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A local directory.")],
    uri: Annotated[
        str,
        typer.Argument(
            metavar="URI",
            help="The target: s3://bucket/run/checkpoint, store:run/checkpoint of a named store, "
            "or a local directory.",
        ),
    ],
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include",
            metavar="GLOB",
            help="Files to upload, e.g. '*.json'; may be given again. Default: all files.",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace other content at the target. Files of other names stay."
        ),
    ] = False,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge",
            help="Let files of other names stay, which other programs may upload at the same time.",
        ),
    ] = False,
    limit_rate: RateOption = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Leave the cache of this node as it is.")
    ] = False,
    in_background: Annotated[
        bool,
        typer.Option(
            "--background",
            help="Return when the daemon has the files on its disk, and print the upload's id.",
        ),
    ] = False,
    as_json: output.JsonOption = False,
) -> None:
    """Upload a local directory as a checkpoint.

    Files are uploaded in parallel and verified by checksums. .metadata.json comes last. If the
    command fails or is interrupted, the next one uploads only what is missing. A target with other
    content is refused. The cache of this node gets the files, too. With --background, the daemon
    uploads, and ckptfs uploads shows how far it has come.
    """
    # Not at the top, because these imports bring pyarrow.
    from ckptfs._os.progress_bar import progress_bar
    from ckptfs._upload import Options, begin_upload, run_upload
    from ckptfs.checkpoint import Checkpoint

    rate = 0 if limit_rate is None else parse_rate(limit_rate)
    target = Checkpoint(local_path(uri))
    options = Options(None, include or [], overwrite, rate, cache=not no_cache, merge=merge)
    if in_background:
        with progress_bar(f"taking over {directory}") as told:
            begun = begin_upload(directory, target, options, told)
        if as_json:
            output.print_json({"id": begun.id, "socket": begun.socket})
        else:
            print(begun.id)
        return
    begun_s = time.monotonic()
    bar = progress_bar(f"uploading {directory}")
    with _ended_by_sigterm(), _warnings_shown(), bar as told:
        done = run_upload(directory, target, options, told)
    seconds = time.monotonic() - begun_s
    uploaded = done.uploaded
    if done.cache_error:
        output.warn(f"the cache of this node does not have all of it: {done.cache_error}")
    if as_json:
        cache = {"cached_bytes": done.cached_bytes, "cache_error": done.cache_error}
        told = {**msgspec.structs.asdict(uploaded), **cache, "seconds": round(seconds, 3)}
        output.print_json(told)
        return
    sent = output.size(uploaded.bytes - uploaded.skipped_bytes)
    print(
        f"{counted(uploaded.files, 'file')}, {output.size(uploaded.bytes)}: {sent} uploaded in "
        f"{seconds:.1f} s, {output.size(uploaded.skipped_bytes)} were there, "
        f"{output.size(done.cached_bytes)} are in the cache of this node"
    )


class _Warnings(logging.Handler):
    """Prints warnings as the command's own."""

    def emit(self, record: logging.LogRecord) -> None:
        output.warn(record.getMessage())


@contextlib.contextmanager
def _warnings_shown() -> Generator[None]:
    """Print the warnings of ckptfs in the context."""
    logger, handler = logging.getLogger("ckptfs"), _Warnings(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def _ended_by_sigterm() -> Generator[None]:
    """Let SIGTERM end the context by an exception, so that the upload removes its unfinished
    objects."""

    def end(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
