"""``plan``: what a restore reads, kept for the next checkpoint of the job."""

from pathlib import Path
from typing import Annotated

import typer

from ckptfs import _client, _plans, xattrs
from ckptfs._model import plan as plans
from ckptfs._model.manifest import printable
from ckptfs._model.plan import Wanted
from ckptfs._model.stores import is_uri
from ckptfs.cli import output, prefetch
from ckptfs.cli.checkpoints import PathOrUriArgument, location_of, traced
from ckptfs.cli.meta import metadata_of
from ckptfs.errors import NotAttached, PlanError

app = typer.Typer(
    help="What a restore reads, for the next checkpoint of the job.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
_Source = Annotated[
    str,
    typer.Option(
        "--plan",
        metavar="FILE_OR_URI",
        help="The plan; of a URI, the one that is in its metadata.",
        show_default="the job's",
    ),
]


@app.command()
def save(
    path_or_uri: PathOrUriArgument,
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", show_default="the job's, in your cache"),
    ] = None,
    metadata: Annotated[
        bool, typer.Option("--metadata", help="Beside the checkpoint, in its metadata.")
    ] = False,
) -> None:
    """Make a plan of what was read of a checkpoint that is attached, or was. Prints where it is."""
    trace, top, location = traced(path_or_uri)
    if top:
        plan = _plans.of_trace(trace, top)
    else:
        assert location is not None  # of a path, it would be attached
        with _client.leased(location) as top:
            if xattrs.read(top).version != trace.version:
                raise NotAttached(
                    f"{trace.uri} is another version than the one that was read; restore it, and "
                    "save again"
                )
            plan = _plans.of_trace(trace, top)
    if metadata:
        metadata_of(path_or_uri)[_plans.METADATA_KEY] = plans.encode(plan).decode()
        print(trace.uri)
        return
    place = out or _plans.path_of(location or location_of(trace.uri))
    _plans.write(place, plan)
    print(place)


@app.command()
def show(
    source: Annotated[
        str, typer.Argument(metavar="FILE_OR_URI", help="A plan, or a checkpoint of the job.")
    ],
    as_json: output.JsonOption = False,
) -> None:
    """Show a plan: what is read, in this order, by which ranks."""
    plan = _plans.kept(location_of(source)) if is_uri(source) else None
    plan = plan or _plans.read(source)
    if as_json:
        output.print_json(plan)
        return
    print(f"made of {printable(plan.uri)}, version {printable(plan.version)}")
    rows: list[list[str]] = [
        [_bytes(step), _ranks(step.ranks), printable(step.tensor), printable(plan.files[step.file])]
        for step in plan.steps
    ]
    output.print_table(["BYTES", "RANKS", "TENSOR", "FILE"], [[*row] for row in rows])


def _bytes(step: plans.Step) -> str:
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


@app.command()
def apply(
    path_or_uri: PathOrUriArgument,
    source: _Source = "",
    rank: Annotated[
        int, typer.Option(metavar="N", min=-1, help="Only what that rank reads; -1: all.")
    ] = -1,
    limit_rate: prefetch.RateOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Fetch what a plan names into the node's cache, in its order, and wait for it."""
    uri = path_or_uri if is_uri(path_or_uri) else xattrs.read(path_or_uri).uri
    plan = _plans.read(source) if source else _plans.kept(location_of(uri))
    if plan is None:
        raise PlanError(f"there is no plan for {uri}; ckptfs plan save makes one, or give --plan")
    wanted = Wanted(plan=plan, rank=rank)
    prefetch.raise_failures(prefetch.fetch(path_or_uri, wanted, limit_rate, as_json))
