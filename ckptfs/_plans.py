"""Plans of jobs: made of traces, and kept where the next restore finds them.

One is kept for each directory that checkpoints are in, in the user's cache directory; or anywhere
as a file; or beside a checkpoint, as its metadata ``ckptfs.plan``.
"""

import contextlib
import functools
import hashlib
import os
import uuid
import warnings
from pathlib import Path

from ckptfs import _client
from ckptfs._model.formats import Tensor
from ckptfs._model.layout import tensors_beside, tensors_of_file
from ckptfs._model.location import Location
from ckptfs._model.plan import Plan, decode, encode, make_plan
from ckptfs._model.replies import Trace
from ckptfs._model.stores import is_uri
from ckptfs._model.uris import shown_uri
from ckptfs._store import metadata
from ckptfs.errors import CkptfsError, PlanError

METADATA_KEY = "ckptfs.plan"


def read(source: "str | os.PathLike[str]") -> Plan:
    """The plan in a file, or in the metadata of the checkpoint with that URI.

    Raises:
        PlanError: There is none.
        AccessDenied, StoreError: The store's answer.
    """
    source = os.fspath(source)
    shown = shown_uri(source)
    try:
        if not is_uri(source):
            return decode(Path(source).read_bytes())
        from ckptfs._store.caller import ask  # not at the top: commands start without pyarrow
        from ckptfs._store.filesystems import filesystem_of

        found = ask(*filesystem_of(source), metadata.read_dict).get(METADATA_KEY)
        if isinstance(found, str):
            return decode(found)
    except FileNotFoundError:
        raise PlanError(f"{shown} does not exist; ckptfs plan save makes a plan") from None
    except OSError as error:
        raise PlanError(f"{shown}: {error.strerror}") from None
    except PlanError as error:
        raise PlanError(f"{shown}: {error}") from None
    raise PlanError(f"{shown} has no plan; ckptfs plan save --metadata {shown} adds one")


def kept(location: Location) -> Plan | None:
    """The plan in the user's cache for checkpoints beside that one; None: there is none.

    Raises PlanError for one that is damaged.
    """
    path = path_of(location)
    return read(path) if path.exists() else None


def path_of(location: Location) -> Path:
    """Where the plan is kept of the job whose checkpoints are beside that one."""
    import platformdirs

    job = f"{location.store_identity}\n{location.path.rstrip('/').rpartition('/')[0]}"
    digest = hashlib.blake2b(job.encode(), digest_size=12).hexdigest()
    return platformdirs.user_cache_path("ckptfs") / "plans" / f"{digest}.json"


def write(path: Path, plan: Plan) -> None:
    """Keep a plan, as a whole or not at all. Raises OSError, LimitExceeded."""
    data = encode(plan)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def remember(location: Location) -> None:
    """Keep what was read of that checkpoint, which is still attached, for the next one of its job.
    Only warns if that fails."""
    try:
        with _client.connect() as connection:
            trace = connection.trace("", location)
            top = connection.path_of(trace)
        if trace.accesses:
            write(path_of(location), of_trace(trace, top))
    except (CkptfsError, OSError) as error:
        warnings.warn(f"ckptfs keeps no plan of this restore: {error}", stacklevel=4)


def of_trace(trace: Trace, top: str) -> Plan:
    """What was read. Raises PlanError if that is nothing, LimitExceeded if it is too much.

    Args:
        trace: Of a checkpoint.
        top: Its directory in the mount.
    """
    if not trace.accesses:
        raise PlanError(f"{trace.uri}: nothing was read yet; restore it first")

    sizes = {file.path.encode(): file.size for file in trace.files}

    @functools.cache
    def beside(folder: str) -> dict[bytes, list[Tensor]]:
        with contextlib.suppress(OSError):
            return tensors_beside(
                os.path.join(top, folder), lambda name: sizes.get(folder.encode() + name, -1)
            )
        return {}

    def tensors_of(path: str) -> list[Tensor]:
        folder, _, name = path.rpartition("/")
        if sharded := beside(folder and f"{folder}/").get(name.encode()):
            return sharded
        with contextlib.suppress(OSError):
            return tensors_of_file(os.path.join(top, path))
        return []

    return make_plan(
        trace.uri,
        trace.version,
        {file.index: (file.path, file.size) for file in trace.files},
        trace.accesses,
        {process.pid: process.rank for process in trace.processes},
        tensors_of,
    )
