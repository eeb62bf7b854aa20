"""Plans of jobs, which are made of traces and kept for the next restore.

The user's cache directory has a plan for each directory with checkpoints. A plan can also be in any
file, or in a checkpoint's metadata ``ckptfs.plan``.
"""

import contextlib
import functools
import hashlib
import os
import uuid
import warnings
from pathlib import Path

from ckptfs._client import client
from ckptfs._config.paths import kept_place, make_folder
from ckptfs._model.formats.headers import Tensor
from ckptfs._model.formats.tensors import tensors_beside, tensors_of_file
from ckptfs._model.location import Location
from ckptfs._model.named_store import is_uri
from ckptfs._model.plans.plan import Plan, decode, encode, make_plan
from ckptfs._model.protocol.replies import Trace
from ckptfs._model.protocol.requests import GetTrace
from ckptfs._model.uris import shown_uri
from ckptfs._store import metadata
from ckptfs.errors import CkptfsError, PlanError

METADATA_KEY = "ckptfs.plan"


def read(source: "str | os.PathLike[str]") -> Plan:
    """Read the plan in a file, or in the metadata of the checkpoint with this URI.

    Raises:
        PlanError: The file or checkpoint does not exist or has no plan.
        AccessDenied, StoreError: The store's answer.
    """
    source = os.fspath(source)
    shown = shown_uri(source)
    try:
        if not is_uri(source):
            return decode(Path(source).read_bytes())
        from ckptfs._store.filesystems import filesystem_of
        from ckptfs._store.in_process import ask  # not at the top, because it imports pyarrow

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
    """The plan in the user's cache for checkpoints beside this one, or None. Raises PlanError if it
    is damaged."""
    path = path_of(location)
    return read(path) if path.exists() else None


def path_of(location: Location) -> Path:
    """The path in the user's cache of the plan for the checkpoints beside this one."""
    job = f"{location.store_identity}\n{location.path.rstrip('/').rpartition('/')[0]}"
    digest = hashlib.blake2b(job.encode(), digest_size=12).hexdigest()
    return kept_place(os.environ) / "plans" / f"{digest}.json"


def write(path: Path, plan: Plan) -> None:
    """Write a plan atomically. Raises OSError, LimitExceeded."""
    data = encode(plan)
    make_folder(path.parent)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def remember(location: Location) -> None:
    """Keep a plan of the reads of this attached checkpoint, for the next one of its job. Warn if
    that fails."""
    try:
        with client.connect() as connection:
            trace = connection.ask(GetTrace(location=location))
            top = connection.path_of(trace)
        if trace.accesses:
            write(path_of(location), of_trace(trace, top))
    except (CkptfsError, OSError) as error:
        warnings.warn(f"ckptfs keeps no plan of this restore: {error}", stacklevel=4)


def of_trace(trace: Trace, top: str) -> Plan:
    """Make a plan of the trace of the checkpoint that is mounted at `top`.

    Raises:
        PlanError: The trace has no reads.
        LimitExceeded: It has too many reads.
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
