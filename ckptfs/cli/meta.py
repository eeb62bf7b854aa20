"""``meta``: a checkpoint's own metadata, wherever the checkpoint is.

One mapping stands for all of them: of a mounted checkpoint (through the daemon, with its
credentials), or of a URI or local directory (no daemon needed).
"""

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, MutableMapping
from typing import Annotated, Any, TypeVar, cast

import typer

from ckptfs import _client, xattrs
from ckptfs._model.manifest import printable
from ckptfs._model.stores import is_uri, split_named
from ckptfs._model.uris import shown_uri
from ckptfs._store.named import own_table
from ckptfs.cli import completion, output
from ckptfs.cli.checkpoints import AnonymousOption, asked, location_of
from ckptfs.errors import LocationError, MetadataError, MetadataNotDict, NotAttached

T = TypeVar("T")

app = typer.Typer(
    help="Show and change a checkpoint's own metadata.", no_args_is_help=True, rich_markup_mode=None
)
TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="PATH_OR_URI",
        help="A path inside the mount, a directory, a URI.",
        autocompletion=completion.checkpoints,
    ),
]
KeyArgument = Annotated[str, typer.Argument(metavar="KEY")]


@app.command("list")
def list_(
    target: TargetArgument,
    anonymous: AnonymousOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """All keys and values."""
    found = dict(metadata_of(asked(target, anonymous)))
    if as_json:
        output.print_json(found)
        return
    rows: list[list[Any]] = [[printable(k), printable(json.dumps(v))] for k, v in found.items()]
    output.print_table(["KEY", "VALUE"], rows)


@app.command()
def get(target: TargetArgument, key: KeyArgument, anonymous: AnonymousOption = False) -> None:
    """The value of a key, as JSON."""
    try:
        print(json.dumps(metadata_of(asked(target, anonymous))[key]))
    except KeyError:
        raise _no_such_key(target, key) from None


@app.command("set")
def set_(
    target: TargetArgument,
    key: KeyArgument,
    value: Annotated[str, typer.Argument(metavar="VALUE", help="JSON; other text is a string.")],
) -> None:
    """Set a key; the others stay."""
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        parsed = value
    metadata_of(target)[key] = parsed


@app.command()
def update(
    target: TargetArgument,
    values: Annotated[
        str, typer.Argument(metavar="JSON", help="An object; - reads it from stdin.")
    ],
) -> None:
    """Set all keys of a JSON object; the others stay."""
    try:
        changes: Any = json.loads(sys.stdin.read() if values == "-" else values)
    except (ValueError, RecursionError) as error:
        raise MetadataError(
            f"not JSON: {error}; give an object, e.g. '{{\"step\": 100}}'"
        ) from None
    if not isinstance(changes, dict):
        raise MetadataNotDict("not a JSON object; give e.g. '{\"step\": 100}'")
    metadata_of(target).update(cast("dict[str, Any]", changes))


@app.command()
def rm(target: TargetArgument, key: KeyArgument) -> None:
    """Remove a key."""
    try:
        del metadata_of(target)[key]
    except KeyError:
        raise _no_such_key(target, key) from None


def _no_such_key(target: str, key: str) -> MetadataError:
    return MetadataError(
        f"{shown_uri(target)} has no metadata {printable(key)!r}; ckptfs meta list shows the keys"
    )


def metadata_of(target: str) -> MutableMapping[str, Any]:
    named = split_named(target)
    if named is not None and own_table(named[0]) is None:
        return _Lent(target)
    if not is_uri(target):
        try:
            return xattrs.metadata(target)
        except NotAttached:
            target = os.path.abspath(target)
        except FileNotFoundError:
            raise LocationError(f"{target} does not exist; check the path") from None
    return _Stored(target)


class _Lent(MutableMapping[str, Any]):
    """The metadata of a checkpoint in a store that only the daemon may know: it is attached for
    each look and change."""

    def __init__(self, target: str) -> None:
        self._location = location_of(target)

    def _do(self, what: Callable[[MutableMapping[str, Any]], T]) -> T:
        with _client.leased(self._location) as path:
            return what(xattrs.metadata(path))

    def __getitem__(self, key: str) -> Any:
        return self._do(lambda metadata: metadata[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._do(list))

    def __len__(self) -> int:
        return self._do(len)

    def __setitem__(self, key: str, value: Any) -> None:
        self._do(lambda metadata: metadata.__setitem__(key, value))

    def __delitem__(self, key: str) -> None:
        self._do(lambda metadata: metadata.__delitem__(key))

    def update(self, changes: Any = (), /, **more: Any) -> None:
        """Set several keys by one attachment."""
        self._do(lambda metadata: metadata.update(changes, **more))


class _Stored(MutableMapping[str, Any]):
    """The metadata of a checkpoint that need not be mounted."""

    def __init__(self, uri: str) -> None:
        # Not at the top: a mounted path needs no pyarrow.
        from ckptfs._store import metadata
        from ckptfs._store.caller import ask
        from ckptfs._store.describe import describe
        from ckptfs._store.filesystems import filesystem_of

        filesystem, path = filesystem_of(uri)
        self._location = describe(filesystem, path)
        self._ask = functools.partial(ask, filesystem, path)
        self._metadata = metadata

    def _stored(self) -> dict[str, Any]:
        return self._ask(self._metadata.read_dict)

    def __getitem__(self, key: str) -> Any:
        return self._stored()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored())

    def __len__(self) -> int:
        return len(self._stored())

    def __setitem__(self, key: str, value: Any) -> None:
        self.update({key: value})

    def __delitem__(self, key: str) -> None:
        def without(stored: dict[str, Any]) -> dict[str, Any]:
            del stored[key]
            return stored

        self._ask(self._metadata.change, without)
        _client.tell_metadata_changed(self._location)

    def update(self, changes: Any = (), /, **more: Any) -> None:
        """Set several keys by one write."""
        self._ask(self._metadata.update, dict(changes, **more))
        _client.tell_metadata_changed(self._location)
