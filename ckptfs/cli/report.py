"""``report``: a page that shows how a checkpoint was read."""

import contextlib
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from ckptfs._model import formats
from ckptfs._model.layout import tensors_of_file
from ckptfs._model.manifest import printable
from ckptfs._model.replies import Trace
from ckptfs.cli import output
from ckptfs.cli.checkpoints import PathOrUriArgument, traced

_REPORTED_FILES_MAX = 500
"""Files whose headers are looked at for the names of tensors."""


def report(
    path_or_uri: PathOrUriArgument,
    out: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the page.")
    ] = Path("report.html"),
    as_json: output.JsonOption = False,
) -> None:
    """Show how a checkpoint was read since it was attached: when, by whom, what for, how long it
    took and what was fetched in vain. Writes one HTML file, and prints its path."""
    from ckptfs._report import analysis, page

    trace, top, _ = traced(path_or_uri)
    if as_json:
        output.print_json(trace)
        return
    files = {file.index: (file.path, file.size) for file in trace.files}
    summary = analysis.summarise(files, trace.accesses, trace.fetches, trace.lent)
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
        notes=_notes(trace),
        commands={process.pid: process.command for process in trace.processes},
    )
    out.write_text(page.render(about, summary, tensors), encoding="utf-8", errors="replace")
    print(out)


def _tensors(path: str) -> list[formats.Tensor]:
    with contextlib.suppress(OSError):
        return tensors_of_file(path)
    return []


def _notes(trace: Trace) -> list[str]:
    notes: list[str] = []
    if trace.lent:
        notes.append(
            f"{len(trace.lent)} of the files were complete in the cache when they were opened: the "
            "kernel has read these by itself then, unseen."
        )
    if trace.left_out:
        notes.append(
            f"{trace.left_out} later reads and fetches are not shown: there were too many."
        )
    if trace.restarts and not trace.accesses:
        notes.append("The daemon was replaced meanwhile; what was before that is not known.")
    if not trace.accesses and not trace.fetches:
        notes.append("Nothing was read yet.")
    return notes
