"""``plan``: the reads of a restore, kept for the next checkpoint of the job."""

import os
from pathlib import Path
from typing import Annotated

import typer

from ckptfs import xattrs
from ckptfs._client import client, plans
from ckptfs._model.manifest import printable
from ckptfs._model.named_store import is_uri
from ckptfs._model.plans.plan import Plan, Step, Wanted, encode
from ckptfs.cli import output, prefetch
from ckptfs.cli.checkpoints import PathOrUriArgument
from ckptfs.cli.help_text import command, group
from ckptfs.cli.meta import metadata_of
from ckptfs.cli.target import Target, location_of, target_of, traced
from ckptfs.errors import NotAttached, PlanError

app = group("Keep a plan of what a restore reads, and fetch it ahead of the next restore.")
_URI = "s3://bucket/run7/checkpoint_000100"
_Source = Annotated[
    str,
    typer.Option(
        "--plan",
        metavar="FILE_OR_URI",
        help="A file, or a URI with a plan in its metadata. Default: the job's plan in your cache.",
    ),
]


@command(app, "save", f"ckptfs plan save {_URI}", f"ckptfs plan save -o plan.json {_URI}")
def save(
    path_or_uri: PathOrUriArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The file to write. Default: the job's plan in your cache.",
        ),
    ] = None,
    metadata: Annotated[
        bool, typer.Option("--metadata", help="Save it in the checkpoint's metadata instead.")
    ] = False,
) -> None:
    """Save a plan of what processes have read of a checkpoint. Prints the plan's path.

    The checkpoint must be attached, or must have been. Checkpoints in the same directory belong to
    the same job, and have one plan.
    """
    trace, top, location = traced(path_or_uri)
    if top:
        plan = plans.of_trace(trace, top)
    else:
        assert location is not None  # the checkpoint of a path is attached
        with client.leased(location) as top:
            if xattrs.read(top).version != trace.version:
                raise NotAttached(
                    f"{trace.uri} has another version now than when it was read; restore it, and "
                    "save again"
                )
            plan = plans.of_trace(trace, top)
    if metadata:
        with metadata_of(path_or_uri) as found:
            found[plans.METADATA_KEY] = encode(plan).decode()
        print(trace.uri)
        return
    place = out or plans.path_of(location or location_of(trace.uri))
    plans.write(place, plan)
    print(place)


@command(app, "show", f"ckptfs plan show {_URI}", "ckptfs plan show plan.json")
def show(
    source: Annotated[
        str, typer.Argument(metavar="FILE_OR_URI", help="A plan, or a checkpoint of its job.")
    ],
    as_json: output.JsonOption = False,
) -> None:
    """Show the reads of a plan in their order, and which ranks read what."""
    plan = None
    if is_uri(source) or os.path.isdir(source):
        target = target_of(source)
        if target.place is None:
            source = xattrs.read(target.path).uri
        elif not is_uri(source):
            source = target.place.uri
        plan = plans.kept(target.place or location_of(source))
    plan = plan or plans.read(source)
    if as_json:
        output.print_json(plan)
        return
    print(f"made of {printable(plan.uri)}, version {printable(plan.version)}")
    if not plan.steps:
        print("the plan is empty, because nothing was read")
        return
    rows = [
        [_bytes(step), _ranks(step.ranks), printable(step.tensor), printable(plan.files[step.file])]
        for step in plan.steps
    ]
    output.print_table(["BYTES", "RANKS", "TENSOR", "FILE"], rows)


def _bytes(step: Step) -> str:
    return f"{step.start}–{step.stop}" if step.stop else "all"


def _ranks(ranks: tuple[int, ...]) -> str:
    """E.g. ``0-3, 6``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


@command(
    app,
    "apply",
    "ckptfs plan apply s3://bucket/run7/checkpoint_000200 --rank 3",
    "ckptfs plan apply --plan plan.json s3://bucket/run8/checkpoint_000100",
)
def apply(
    path_or_uri: PathOrUriArgument,
    source: _Source = "",
    rank: Annotated[
        int,
        typer.Option(metavar="N", min=-1, help="Only the reads of this rank. Default: all (-1)."),
    ] = -1,
    limit_rate: prefetch.RateOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Fetch the files and tensors of a plan into the node's cache, and wait for them.

    They come in the order in which the processes of the last restore read them.
    """
    target = target_of(path_or_uri)
    uri = target.text if target.place else xattrs.read(target.path).uri
    plan = plans.read(source) if source else plans.kept(target.place or location_of(uri))
    if plan is None:
        raise PlanError(
            f"there is no plan for {target.shown}; ckptfs plan save makes one, or give --plan"
        )
    wanted = Wanted(plan=plan, rank=rank)
    state = prefetch.fetch(target, wanted, limit_rate, as_json)
    prefetch.raise_failures(state, target)
    if not state.files:
        raise PlanError(_why_nothing(plan, rank, target))


def _why_nothing(plan: Plan, rank: int, target: Target) -> str:
    if not plan.steps:
        return f"the plan for {target.shown} is empty; restore a checkpoint, and save a plan again"
    if rank >= 0 and not plan.of_ranks([rank]).steps:
        ranks = _ranks(tuple(plan.ranks()))
        return f"the plan for {target.shown} has nothing for rank {rank}; it has ranks {ranks}"
    return f"{target.shown} has no file that the plan names; ckptfs plan show shows their names"
