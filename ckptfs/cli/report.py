"""``report``: write a page about the reads of a checkpoint."""

import contextlib
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from ckptfs._client import client
from ckptfs._model.formats import headers
from ckptfs._model.formats.tensors import tensors_of_file
from ckptfs._model.manifest import printable
from ckptfs._model.protocol.replies import Trace
from ckptfs._model.units import size_text
from ckptfs.cli import output
from ckptfs.cli.checkpoints import PathOrUriArgument
from ckptfs.cli.target import traced

_REPORTED_FILES_MAX = 500
"""Maximum number of files whose headers are read for the names of tensors."""


def report(
    path_or_uri: PathOrUriArgument,
    out: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The file to write. Default: report.html."
        ),
    ] = Path("report.html"),
    as_json: output.JsonOption = False,
) -> None:
    """Write a page that shows how a checkpoint was read, and why it was slow. Prints its path.

    The page covers the time since the attach. It shows the reads of each process, the fetches for
    them, the bytes that were fetched and never read, and the slowest requests. It is one HTML file
    without scripts. The daemon keeps these data for a while after the job has ended.
    """
    from ckptfs._report import analysis, page

    trace, top, _ = traced(path_or_uri)
    if as_json:
        output.print_json(trace)
        return
    files = {file.index: (file.path, file.size) for file in trace.files}
    summary = analysis.summarise(files, trace.accesses, trace.fetches, trace.passthrough)
    tensors = [
        found
        for use in summary.files[:_REPORTED_FILES_MAX]
        if top and use.path.endswith(".safetensors") and use.read
        for found in analysis.tensor_uses(use, _tensors(os.path.join(top, use.path)))
    ]
    tensors.sort(key=lambda found: found.first_s)
    about = page.About(
        uri=printable(trace.uri),
        version=trace.version,
        began=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(trace.attached)),
        size=trace.size,
        file_count=trace.file_count,
        notes=[*_notes(trace), *_notes_of_uploads(trace.uri)],
        commands={process.pid: process.command for process in trace.processes},
    )
    out.write_text(page.render(about, summary, tensors), encoding="utf-8", errors="replace")
    print(out)


def _tensors(path: str) -> list[headers.Tensor]:
    with contextlib.suppress(OSError):
        return tensors_of_file(path)
    return []


def _notes(trace: Trace) -> list[str]:
    notes: list[str] = []
    if trace.passthrough:
        notes.append(
            f"{len(trace.passthrough)} of the files were complete in the cache when they were "
            "opened. The kernel then read them itself, and these reads are not shown."
        )
    if trace.left_out:
        notes.append(
            f"{trace.left_out} later reads and fetches are not shown, because they were too many."
        )
    if trace.restarts and not trace.accesses:
        notes.append("The daemon was replaced meanwhile, so earlier reads are not shown.")
    if not trace.accesses and not trace.fetches:
        notes.append("Nothing was read yet.")
    return notes


def _notes_of_uploads(uri: str) -> list[str]:
    """Notes on uploads in the background that are not done, because the checkpoint may change at
    the store when one of them goes on."""
    with client.connect() as connection:
        uploads = [each for each in connection.status().uploads if each.uri == uri]
    return [
        f"The upload {upload.id} to this place is {upload.state}: {size_text(upload.sent)} of "
        f"{size_text(upload.bytes)} are at the store. {upload.message}"
        for upload in uploads
    ]
