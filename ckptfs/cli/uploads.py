"""``uploads``: the uploads in the background, their state, and what becomes of failed ones."""

import time
from collections.abc import Sequence
from typing import Annotated

import typer

from ckptfs._client import background
from ckptfs._client.connection import Connection
from ckptfs._model.manifest import printable
from ckptfs._model.protocol.uploads import AwaitUpload, DropUpload, ListUploads, RetryUpload
from ckptfs._model.uploads import UploadStatus
from ckptfs._model.wording import counted
from ckptfs.cli import output
from ckptfs.cli.target import local_path
from ckptfs.errors import CannotUpload, NoDaemon, NoUpload

_POLL_S = 5.0
"""Longest wait of the daemon for the end of an upload."""


def uploads(
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until all uploads have ended.")
    ] = False,
    retry: Annotated[
        str,
        typer.Option(
            "--retry", metavar="ID", help="Send a failed upload again, with your credentials."
        ),
    ] = "",
    target: Annotated[
        str,
        typer.Option(
            metavar="URI", help="With --retry: the target, if its URI has credentials of its own."
        ),
    ] = "",
    drop: Annotated[
        str, typer.Option("--drop", metavar="ID", help="End an upload, and remove its files.")
    ] = "",
    as_json: output.JsonOption = False,
) -> None:
    """List the uploads in the background, the newest first.

    The STATE of an upload is staging (the daemon takes the files over), waiting, running, failed
    (its files stay for --retry) or done. With --wait, the exit status is 1 if an upload has failed.
    """
    if sum((wait, bool(retry), bool(drop))) > 1:
        raise typer.BadParameter("give one of --wait, --retry and --drop")
    try:
        # A daemon that starts continues what another one has left.
        connection = background.connect(starts=background.has_left())
    except NoDaemon:
        if drop or retry:
            raise
        _print([], as_json)
        return
    with connection:
        if drop:
            connection.ask(DropUpload(id=drop))
        elif retry:
            _retry(connection, retry, target)
        elif wait:
            _wait(connection)
        reply = connection.ask(ListUploads())
    if not drop and not retry:
        _print(reply.uploads, as_json, reply.left_out)
    failed = [each for each in reply.uploads if each.state == "failed"]
    if wait and failed:
        raise CannotUpload(f"{failed[0].uri} was not uploaded: {failed[0].message}")


def _retry(connection: Connection, upload: str, uri: str) -> None:
    # Not at the top, because these imports bring pyarrow.
    from ckptfs._local_directory import filesystem_behind
    from ckptfs._store.describe import describe
    from ckptfs.checkpoint import Checkpoint

    known = [each for each in connection.ask(ListUploads()).uploads if each.id == upload]
    if not known:
        raise NoUpload(f"there is no upload {printable(upload)}; ckptfs uploads lists them")
    target = Checkpoint(local_path(uri or known[0].uri))
    location = describe(filesystem_behind(target), target.path)
    connection.ask(RetryUpload(id=upload, location=location))


def _wait(connection: Connection) -> None:
    """Wait until no upload arrives, waits or runs."""
    while True:
        found = connection.ask(ListUploads()).uploads
        left = [each for each in found if each.state not in ("done", "failed")]
        if not left:
            return
        if left[-1].state == "staging":
            time.sleep(_POLL_S / 10)
        else:
            connection.ask(AwaitUpload(id=left[-1].id, seconds=_POLL_S))


def _print(uploads: Sequence[UploadStatus], as_json: bool, left_out: int = 0) -> None:
    if as_json:
        output.print_json(list(uploads))
        return
    if not uploads:
        print("there are no uploads; ckptfs upload --background begins one")
        return
    print_uploads(uploads, left_out)


def print_uploads(uploads: Sequence[UploadStatus], left_out: int) -> None:
    """Print a table of uploads, and the errors of those that have failed or are tried again."""
    rows = [
        [
            each.id,
            output.state(each.state),
            output.share(each.sent, each.bytes),
            output.size(each.bytes),
            str(each.files),
            printable(each.uri.partition("?")[0]),
        ]
        for each in uploads
    ]
    output.print_table(["UPLOAD", "STATE", "SENT", "SIZE", "FILES", "TARGET"], rows, right=(3, 4))
    for each in uploads:
        if each.state == "failed":
            print(f"\n{each.id} failed: {printable(each.message)}")
            print(f"  ckptfs uploads --retry {each.id} sends it again, --drop {each.id} removes it")
        elif each.message and each.state != "done":
            print(f"\n{each.id} is tried again: {printable(each.message)}")
    if left_out:
        print(f"\nand {counted(left_out, 'more upload')}, too many for one reply")
