"""``meta``: the metadata of a checkpoint.

The daemon reads and writes the metadata of a mounted checkpoint, with its own credentials. A URI or
a local directory needs no daemon.
"""

import contextlib
import functools
import json
import sys
from collections.abc import Generator, Iterator, MutableMapping
from typing import Annotated, Any, cast

import typer

from ckptfs import xattrs
from ckptfs._client import client
from ckptfs._model.manifest import printable
from ckptfs._model.named_store import is_uri, split_named
from ckptfs._model.uris import shown_uri
from ckptfs._store.named import own_table
from ckptfs.cli import completion, output
from ckptfs.cli.checkpoints import AnonymousOption, asked
from ckptfs.cli.help_text import command, group
from ckptfs.cli.target import local_path, location_of
from ckptfs.errors import LocationError, MetadataError, MetadataNotDict, NotAttached

app = group("Show and change the metadata of a checkpoint.")
_URI = "s3://bucket/run7/checkpoint_000100"
TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="PATH_OR_URI",
        help="A path inside the mount, a local directory, or a URI. It need not be attached.",
        autocompletion=completion.checkpoints,
    ),
]
KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="A key of the metadata.")]


@command(app, "list", f"ckptfs meta list {_URI}", "ckptfs meta list --json .")
def list_(
    target: TargetArgument, anonymous: AnonymousOption = False, as_json: output.JsonOption = False
) -> None:
    """Show all keys and values.

    Numbers that JSON does not have appear as strings: "NaN", "Infinity", "-Infinity".
    """
    with metadata_of(asked(target, anonymous)) as metadata:
        found = dict(metadata)
    if as_json:
        output.print_json(found)
        return
    rows = [[printable(key), printable(output.json_text(value))] for key, value in found.items()]
    output.print_table(["KEY", "VALUE"], rows)


@command(app, "get", f"ckptfs meta get {_URI} val_loss")
def get(target: TargetArgument, key: KeyArgument, anonymous: AnonymousOption = False) -> None:
    """Show the value of a key, as JSON."""
    with metadata_of(asked(target, anonymous)) as metadata:
        print(output.json_text(metadata[key]))


@command(
    app,
    "set",
    f"ckptfs meta set {_URI} val_loss 0.25",
    f"""ckptfs meta set {_URI} tags '["best", "v2"]'""",
)
def set_(
    target: TargetArgument,
    key: KeyArgument,
    value: Annotated[
        str, typer.Argument(metavar="VALUE", help="JSON. Other text becomes a string.")
    ],
) -> None:
    """Set one key, and keep the others."""
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        parsed = value
    with metadata_of(target) as metadata:
        metadata[key] = parsed


@command(
    app,
    "update",
    f"""ckptfs meta update {_URI} '{{"step": 100, "val_loss": 0.25}}'""",
    f"ckptfs meta update {_URI} - < metrics.json",
)
def update(
    target: TargetArgument,
    values: Annotated[
        str, typer.Argument(metavar="JSON", help="A JSON object; - reads it from standard input.")
    ],
) -> None:
    """Set all keys of a JSON object, and keep the others."""
    try:
        changes: Any = json.loads(sys.stdin.read() if values == "-" else values)
    except (ValueError, RecursionError) as error:
        raise MetadataError(
            f"not JSON: {error}; give an object, e.g. '{{\"step\": 100}}'"
        ) from None
    if not isinstance(changes, dict):
        raise MetadataNotDict("not a JSON object; give e.g. '{\"step\": 100}'")
    with metadata_of(target) as metadata:
        metadata.update(cast("dict[str, Any]", changes))


@command(app, "rm", f"ckptfs meta rm {_URI} tags")
def rm(target: TargetArgument, key: KeyArgument) -> None:
    """Remove a key, and keep the others."""
    with metadata_of(target) as metadata:
        del metadata[key]


@contextlib.contextmanager
def metadata_of(target: str) -> Generator[MutableMapping[str, Any]]:
    """The metadata of a checkpoint. Raises LocationError, and MetadataError for a missing key."""
    named = split_named(target)
    try:
        if named is None or own_table(named[0]) is not None:
            yield _mounted_or_stored(target)
        else:  # only the daemon may know this store
            with client.leased(location_of(target)) as path:
                yield xattrs.metadata(path)
    except KeyError as error:
        raise MetadataError(
            f"{shown_uri(target)} has no metadata {printable(error.args[0])!r}; "
            "ckptfs meta list shows the keys"
        ) from None


def _mounted_or_stored(target: str) -> MutableMapping[str, Any]:
    if not is_uri(target):
        target = local_path(target)
        try:
            return xattrs.metadata(target)
        except NotAttached:
            pass
        except FileNotFoundError:
            raise LocationError(f"{target} does not exist; check the path") from None
    return _Stored(target)


class _Stored(MutableMapping[str, Any]):
    """The metadata in a store or a local directory."""

    def __init__(self, uri: str) -> None:
        # Not at the top, because a mounted path needs no pyarrow.
        from ckptfs._store import metadata
        from ckptfs._store.describe import describe
        from ckptfs._store.filesystems import filesystem_of
        from ckptfs._store.in_process import ask

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
        client.tell_metadata_changed(self._location)

    def update(self, changes: Any = (), /, **more: Any) -> None:
        """Set several keys by one write."""
        self._ask(self._metadata.update, dict(changes, **more))
        client.tell_metadata_changed(self._location)
