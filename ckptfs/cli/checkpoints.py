"""``attach``, ``detach`` and ``ls``: checkpoints."""

import contextlib
import os
from typing import Annotated

import msgspec
import typer

from ckptfs import xattrs
from ckptfs._client import background, client
from ckptfs._model import attributes
from ckptfs._model.formats.tensors import tensors_of_file
from ckptfs._model.manifest import printable
from ckptfs._model.protocol.requests import Detach
from ckptfs._model.uris import anonymous_uri
from ckptfs.cli import completion, output
from ckptfs.cli.target import target_of
from ckptfs.errors import LocationError

UriArgument = Annotated[
    str,
    typer.Argument(
        metavar="URI",
        help="A checkpoint: s3://bucket/run/checkpoint, store:run/checkpoint of a named store, or "
        "a local directory.",
    ),
]
PathOrUriArgument = Annotated[
    str,
    typer.Argument(
        metavar="PATH_OR_URI",
        help="A path inside the mount, or a URI or local directory as for ckptfs attach.",
        autocompletion=completion.checkpoints,
    ),
]
AnonymousOption = Annotated[
    bool, typer.Option("--anonymous", help="Access the store of the URI without credentials.")
]


def attach(
    uri: UriArgument,
    anonymous: AnonymousOption = False,
    pending: Annotated[
        bool,
        typer.Option(
            "--pending",
            help="Show the files of this node's last upload to URI in the background, if it is not "
            "done.",
        ),
    ] = False,
    as_json: output.JsonOption = False,
) -> None:
    """Attach a checkpoint until it is detached. Prints only its path.

    This reads only names and sizes. The daemon fetches the bytes of a file when a process reads
    them. If no daemon is running, the command starts one.
    """
    target = target_of(uri, anonymous)
    if target.place is None:
        raise LocationError(
            f"{target.shown} is inside the mount, so its checkpoint is attached already; give the "
            "URI of a checkpoint"
        )
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(background.staged(target.place)) if pending else None
        place, to = (target.place, None) if found is None else found
        path, reply = stack.enter_context(client.attached(place, pinned=True, to=to))
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
            output.warn(f"left out {file.name}: {file.reason}")


def detach(
    path_or_uri: PathOrUriArgument,
    force: Annotated[
        bool, typer.Option("--force", help="Detach it even if processes hold it. Their reads fail.")
    ] = False,
    anonymous: AnonymousOption = False,
) -> None:
    """End an attachment. Cached bytes stay in the cache.

    Name the checkpoint as for ckptfs attach, or by a path inside the mount. If processes hold it,
    the command removes only its pin, and the attachment ends with the last of them.
    """
    target = target_of(path_or_uri, anonymous)
    with client.connect() as connection:
        connection.ask(Detach(name=target.name, location=target.place, force=force))


def ls(
    path_or_uri: Annotated[
        str,
        typer.Argument(
            metavar="PATH_OR_URI",
            help="As for ckptfs attach, or a path inside the mount. Default: list the attached "
            "checkpoints.",
            autocompletion=completion.checkpoints,
        ),
    ] = "",
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List the tensors in safetensors files instead.")
    ] = False,
    anonymous: AnonymousOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """List the files of a checkpoint, or the attached checkpoints.

    The list shows size, cached share, state and version of each file. If the checkpoint is not
    attached, the command attaches it for its duration.
    """
    if not path_or_uri:
        _list_attachments(as_json)
        return
    with target_of(path_or_uri, anonymous).mounted() as path:
        show = _list_tensors if tensors else _list_files
        show(path, as_json)


def _list_attachments(as_json: bool) -> None:
    with client.connect() as connection:
        reply = connection.status()
    if as_json:
        output.print_json(reply.attachments)
        return
    rows = [
        [output.size(a.size), output.share(a.cached, a.size), output.state(a.state), a.path]
        for a in reply.attachments
    ]
    output.print_table(["SIZE", "CACHED", "STATE", "PATH"], rows, right=(0,))


def _list_files(top: str, as_json: bool) -> None:
    names = "path", "size", "cached", "state", "version"
    listed = [
        (
            relative,
            os.stat(path).st_size,
            int(xattrs.get(path, attributes.CACHED) or 0),
            xattrs.get(path, attributes.STATE) or "",
            xattrs.get(path, attributes.VERSION) or "",
        )
        for relative, path in _files_in(top)
    ]
    if as_json:
        output.print_json([dict(zip(names, file, strict=True)) for file in listed])
        return
    rows = [
        [
            output.size(size),
            output.share(cached, size),
            output.state(state),
            printable(version),
            printable(path),
        ]
        for path, size, cached, state, version in listed
    ]
    output.print_table(["SIZE", "CACHED", "STATE", "VERSION", "PATH"], rows, (0,), spare=(3,))


def _list_tensors(top: str, as_json: bool) -> None:
    found = [
        (relative, tensor)
        for relative, path in _files_in(top)
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


def _files_in(top: str) -> list[tuple[str, str]]:
    """The relative and the absolute path of each file."""
    xattrs.root_of(top)  # raises an error outside of the mount
    if os.path.isfile(top):
        return [(os.path.basename(top), top)]
    found = sorted(
        os.path.join(folder, name) for folder, _, names in os.walk(top) for name in names
    )
    return [(os.path.relpath(path, top), path) for path in found]


def asked(path_or_uri: str, anonymous: bool) -> str:
    """A URI from the command line, with the effect of its options. Raises LocationError."""
    return anonymous_uri(path_or_uri) if anonymous else path_or_uri
