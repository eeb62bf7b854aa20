"""``find``: checkpoints by their metadata."""

import json
import os
import sys
from contextlib import closing
from typing import Annotated, Any

import typer

from ckptfs._config import load_config
from ckptfs._model.stores import is_uri
from ckptfs._model.where import Expression
from ckptfs._store.search import Found, search
from ckptfs.cli import output
from ckptfs.cli.checkpoints import AnonymousOption, asked, location_of


def find(
    uri: Annotated[
        str, typer.Argument(metavar="URI", help="The directory of a run, or of many; or a path.")
    ],
    where: Annotated[
        str | None,
        typer.Option(
            metavar="EXPRESSION", help="Only those for which it is true.", show_default=False
        ),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Smallest value first; those without a value are last.",
            show_default=False,
        ),
    ] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="Largest value first.")] = False,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only the first N.", show_default=False)
    ] = None,
    anonymous: AnonymousOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Find the checkpoints below URI by their metadata; prints one URI per line.

    A checkpoint is a directory, at any depth, that holds a .metadata.json. In an EXPRESSION, as in
    Python, a name is a key of that file:

    \b
      val_loss < 0.3 and step > 1000        optim.lr in [0.1, 0.01]
      0.1 < losses[-1] <= 0.3               matches(name, "run-*")
      meta["eval/loss"] < 2 * train_loss    not exists(parent)

    Where a key is missing, or values cannot be compared, a comparison and its opposite are both
    not true. KEY is such an expression, too.
    """
    condition = None if where is None else Expression(where)
    order = None if sort is None else Expression(sort)
    found = _search(asked(uri, anonymous), condition)
    if order is not None:
        found = _sorted(found, order, reverse)
    elif reverse:
        found.reverse()
    found = found[:limit]
    if as_json:
        # In ASCII: a string from a store can hold what is no character (half of a pair).
        print(json.dumps([checkpoint._asdict() for checkpoint in found], indent=2))
    else:
        for checkpoint in found:
            print(checkpoint.uri)


def _search(uri: str, condition: Expression | None) -> list[Found]:
    # Not at the top: rich.progress is slow to import, and `status` and `umount` need no pyarrow.
    from ckptfs._progress import progress_bar
    from ckptfs._store.named import open_place
    from ckptfs._store.timed import TimedStore

    if not is_uri(uri):
        uri = os.path.abspath(os.path.expanduser(uri))
    location, store = open_place(location_of(uri), load_config().store_timeout_s)
    notes: list[str] = []
    found: list[Found] = []
    searched = 0
    keys: set[str] = set()
    with closing(store), progress_bar("reading metadata", of_bytes=False) as progress:
        results = search(TimedStore(store), location, warn=notes.append, progress=progress)
        for checkpoint in results:
            searched += 1
            keys.update(checkpoint.metadata)
            if condition is None or condition.holds(checkpoint.metadata):
                found.append(checkpoint)
    if not searched:
        notes.append(f"there is no checkpoint with metadata in {location.uri}")
    elif condition is not None and not found:
        # A misspelt key is the likely reason.
        notes += [f"no metadata has the key {key!r}" for key in sorted(condition.keys - keys)]
    for note in notes:
        print(f"ckptfs: {note}", file=sys.stderr)
    return found


def _sorted(found: list[Found], order: Expression, reverse: bool) -> list[Found]:
    """Numbers come before strings; all else, NaN and the unknown are last, also in reverse."""
    sortable: list[tuple[bool, Any, Found]] = []
    rest: list[Found] = []
    for checkpoint in found:
        value = order.value(checkpoint.metadata)
        if isinstance(value, int | float | str) and value == value:
            sortable.append((isinstance(value, str), value, checkpoint))
        else:
            rest.append(checkpoint)
    sortable.sort(key=lambda item: item[:2], reverse=reverse)
    return [checkpoint for *_, checkpoint in sortable] + rest
