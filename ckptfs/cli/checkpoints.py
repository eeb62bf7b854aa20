"""``attach``, ``detach`` and ``ls``: checkpoints."""

import os
import sys
from collections.abc import Iterator
from typing import Annotated

import msgspec
import typer

from ckptfs import _client, xattrs
from ckptfs._config import load_config
from ckptfs._model import attributes
from ckptfs._model.layout import tensors_of_file
from ckptfs._model.location import Location
from ckptfs._model.manifest import printable
from ckptfs._model.replies import Trace
from ckptfs._model.stores import is_uri
from ckptfs._model.uris import anonymous_uri, parse_place
from ckptfs.cli import completion, output
from ckptfs.errors import NotAttached

UriArgument = Annotated[
    str, typer.Argument(metavar="URI", help="E.g. s3://bucket/run/checkpoint, or store:run/…")
]
PathOrUriArgument = Annotated[
    str,
    typer.Argument(
        metavar="PATH_OR_URI",
        help="A path inside the mount, or a URI.",
        autocompletion=completion.checkpoints,
    ),
]
AnonymousOption = Annotated[
    bool, typer.Option("--anonymous", help="Ask the store of the URI without credentials.")
]


def attach(
    uri: UriArgument, anonymous: AnonymousOption = False, as_json: output.JsonOption = False
) -> None:
    """Attach a checkpoint until it is detached; prints its path and nothing else."""
    with _client.attached(location_of(asked(uri, anonymous)), pinned=True) as (path, reply):
        if as_json:
            output.print_json(
                {
                    "path": path,
                    "uri": reply.uri,
                    "version": reply.version,
                    "files": reply.files,
                    "size": reply.size,
                    "skipped": reply.skipped,
                }
            )
        else:
            print(path)
        for file in reply.lacking:
            print(f"ckptfs: left out {file.name}: {file.reason}", file=sys.stderr)


def detach(
    path_or_uri: PathOrUriArgument,
    force: Annotated[
        bool, typer.Option("--force", help="Also while processes hold it: their reads fail.")
    ] = False,
) -> None:
    """End an attachment. What is cached stays cached."""
    name = name_in_mount(path_or_uri)
    location = None if name else location_of(path_or_uri)
    with _client.connect() as connection:
        connection.detach(name or "", location, force=force)


def ls(
    path_or_uri: Annotated[
        str,
        typer.Argument(
            metavar="PATH_OR_URI",
            help="A path inside the mount, or a URI.",
            autocompletion=completion.checkpoints,
        ),
    ] = "",
    tensors: Annotated[
        bool, typer.Option("--tensors", help="The tensors in safetensors files instead of files.")
    ] = False,
    anonymous: AnonymousOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """List the files of a checkpoint with size, cached share, state and version; alone: the
    attached checkpoints."""
    list_ = _list_tensors if tensors else _list_files
    path_or_uri = asked(path_or_uri, anonymous)
    if not path_or_uri:
        _list_attachments(as_json)
    elif is_uri(path_or_uri):
        with _client.leased(location_of(path_or_uri)) as path:
            list_(path, as_json)
    else:
        list_(path_or_uri, as_json)


def _list_attachments(as_json: bool) -> None:
    with _client.connect() as connection:
        reply = connection.status()
    if as_json:
        output.print_json(reply.attachments)
        return
    rows = [
        [output.size(a.size), output.share(a.cached, a.size), output.state(a.state), a.path]
        for a in reply.attachments
    ]
    output.print_table(["SIZE", "CACHED", "STATE", "PATH"], [*rows], right=(0,))


def _list_files(top: str, as_json: bool) -> None:
    found = sorted(_walk(top))
    rows = [
        (os.path.relpath(path, top) if path != top else os.path.basename(top), path)
        for path in found
    ]
    listed = [
        {
            "path": relative,
            "size": os.stat(path).st_size,
            "cached": int(xattrs.get(path, attributes.CACHED) or 0),
            "state": xattrs.get(path, attributes.STATE) or "",
            "version": xattrs.get(path, attributes.VERSION) or "",
        }
        for relative, path in rows
    ]
    if as_json:
        output.print_json(listed)
        return
    output.print_table(
        ["SIZE", "CACHED", "STATE", "VERSION", "PATH"],
        [
            [
                output.size(int(row["size"])),
                output.share(int(row["cached"]), int(row["size"])),
                output.state(str(row["state"])),
                printable(str(row["version"])),
                printable(str(row["path"])),
            ]
            for row in listed
        ],
        right=(0,),
        spare=(3,),
    )


def _list_tensors(top: str, as_json: bool) -> None:
    found = [
        (os.path.relpath(path, top) if path != top else os.path.basename(top), tensor)
        for path in sorted(_walk(top))
        if path.endswith(".safetensors")
        for tensor in tensors_of_file(path)
    ]
    if as_json:
        plain = [{"path": path, **msgspec.to_builtins(tensor)} for path, tensor in found]
        output.print_json(plain)
        return
    output.print_table(
        ["SIZE", "DTYPE", "SHAPE", "TENSOR", "PATH"],
        [
            [
                output.size(tensor.end - tensor.start),
                printable(tensor.dtype),
                "×".join(map(str, tensor.shape)) or "scalar",
                printable(tensor.name),
                printable(path),
            ]
            for path, tensor in found
        ],
        right=(0,),
    )


def _walk(top: str) -> Iterator[str]:
    xattrs.read_all(top)  # refuses what is not in the mount
    if os.path.isfile(top):
        yield top
    for folder, _, files in os.walk(top):
        yield from (os.path.join(folder, name) for name in files)


def asked(path_or_uri: str, anonymous: bool) -> str:
    """What was named on the command line, with what its options say. Raises LocationError."""
    return anonymous_uri(path_or_uri) if anonymous else path_or_uri


def location_of(uri: str) -> Location:
    """The place that a URI names. Raises LocationError."""
    # Not at the top: `status` and `umount` need no stores. None of these needs pyarrow.
    from ckptfs._store.named import named

    if (location := named(uri)) is not None:
        return location
    from ckptfs._store.ambient import completed

    return completed(parse_place(os.path.expanduser(uri)))


def traced(path_or_uri: str) -> tuple[Trace, str, Location | None]:
    """How a checkpoint was read; its directory in the mount ("": it is attached no more); and the
    place of a URI. Raises NotAttached."""
    name = name_in_mount(path_or_uri)
    location = None if name else location_of(path_or_uri)
    with _client.connect() as connection:
        trace = connection.trace(name or "", location)
        return trace, connection.path_of(trace) if trace.name else "", location


def name_in_mount(path: str) -> str | None:
    """The attachment's directory name that a path inside the mount begins with; None for a URI."""
    if is_uri(path):
        return None
    mount = load_config().mount
    relative = os.path.relpath(os.path.abspath(path), mount)
    name = relative.split(os.sep)[0]
    if name in (os.curdir, os.pardir):
        raise NotAttached(
            f"{path} is not inside the mount {mount}; ckptfs status lists what is attached"
        )
    return name
