"""``find``: search checkpoints by their metadata."""

from contextlib import closing
from typing import Annotated, Any

import typer

from ckptfs._config.load import load_config
from ckptfs._model.expressions import Expression
from ckptfs._model.manifest import printable
from ckptfs._store.search import Found, search
from ckptfs.cli import output
from ckptfs.cli.checkpoints import AnonymousOption, asked
from ckptfs.cli.target import location_of


def find(
    uri: Annotated[
        str,
        typer.Argument(
            metavar="URI", help="The directory of one or more runs: a URI or a local path."
        ),
    ],
    where: Annotated[
        str | None, typer.Option(metavar="EXPRESSION", help="Only where it is true.")
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Smallest value first, those without a value last."),
    ] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="Largest value first.")] = False,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Only the first N.")] = None,
    anonymous: AnonymousOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Find checkpoints by their metadata. Prints one URI per line.

    A checkpoint is a directory with a .metadata.json, at any depth below URI. An EXPRESSION is
    written as in Python, and its names are the keys of that file:

    \b
      val_loss < 0.3 and step > 1000        optim.lr in [0.1, 0.01]
      0.1 < losses[-1] <= 0.3               matches(name, "run-*")
      meta["eval/loss"] < 2 * train_loss    not exists(parent)

    If a key is missing, or if values cannot be compared, neither a comparison nor its opposite is
    true. KEY can also be such an expression.
    """
    condition = None if where is None else Expression(where)
    order = None if sort is None else Expression(sort)
    found = _search(asked(uri, anonymous), condition, order)
    if order is not None:
        found = _sorted(found, order, reverse)
    elif reverse:
        found.reverse()
    found = found[:limit]
    if as_json:
        output.print_json([checkpoint._asdict() for checkpoint in found])
    else:
        for checkpoint in found:
            print(checkpoint.uri)


def _search(uri: str, condition: Expression | None, order: Expression | None) -> list[Found]:
    # Not at the top, because these are slow to import, and `status` and `umount` do not need them.
    from ckptfs._os.progress_bar import progress_bar
    from ckptfs._store.named import open_place
    from ckptfs._store.wrappers import TimedStore

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
        notes.append(f"no checkpoint below {location.uri} has metadata")
    else:
        # A misspelt key is the likely reason.
        asked_for = condition.keys if condition is not None and not found else frozenset[str]()
        asked_for |= order.keys if order is not None else frozenset()
        texts = frozenset[str]() if condition is None else condition.texts
        notes += [_no_such_key(key, keys, key in texts) for key in sorted(asked_for - keys)]
    for note in notes:
        output.warn(note)
    return found


def _no_such_key(key: str, keys: set[str], is_text: bool) -> str:
    import difflib

    near = difflib.get_close_matches(key, keys, 1)
    hint = f"; did you mean {printable(near[0])!r}?" if near else ""
    if is_text and not near:
        hint = f"; write text in quotes: {printable(key)!r}"
    return f"no metadata has the key {printable(key)!r}{hint}"


def _sorted(found: list[Found], order: Expression, reverse: bool) -> list[Found]:
    """Sort numbers before strings. All other values come last, also in reverse order."""
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
