"""Each fault of the network × each request of an upload: a whole checkpoint, or an error that says
where, nothing half visible, and nothing that the next upload does not end.

A cell is one upload under one fault and the next one without it. The cells of a fault run beside
each other, each with a server of its own.
"""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import pytest
from support.uploadserver import FAULTS, SILENT, Fault, UploadServer
from support.uploadservices import METADATA, S3, SECRET, Azure, CloudService, Google
from unit.daemon.cache.test_disk_faults import ALL

from ckptfs._store import directory_upload, retrying, wrappers
from ckptfs._store.cloud import azure_uploads, gcs_uploads
from ckptfs._store.directory_upload import Uploaded, Wanted, upload_directory
from ckptfs._store.resolve import open_store
from ckptfs._store.s3 import retry, uploads
from ckptfs._store.uploads import HasUploads
from ckptfs.errors import (
    AccessDenied,
    CheckpointIsFile,
    CheckpointNotFound,
    StoreError,
    StoreUnavailable,
    TargetExists,
)

if TYPE_CHECKING:
    from pathlib import Path

PART_BYTES = 32 << 10
TIMEOUT_S = 20.0
"""The patience with a server that answers."""
SILENCE_S = 0.4
"""The patience with a server that does not."""
REQUESTS_MAX = 150
"""An upload of these files has some 15 requests, and tries each of them five times at most."""
CELL_S = 100.0
SERVICES: dict[str, type[CloudService]] = {kind.name: kind for kind in (S3, Google, Azure)}


def content(name: str, size: int) -> bytes:
    return random.Random(name).randbytes(size)


NEW = {
    "large.bin": content("large", 2 * PART_BYTES + 5),
    "a/small.bin": content("small", 1000),
    "empty": b"",
    METADATA: b'{"step": 2}',
}
OLD = NEW | {
    "large.bin": content("old", 2 * PART_BYTES + 5),
    METADATA: b'{"step": 1}',
}
ONLY_METADATA = {METADATA: NEW[METADATA]}
"""The target before an upload that is to read its metadata."""
FOREIGN = "foreign.bin"
"""An object whose upload another program has begun."""


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("checkpoint")
    for name, data in NEW.items():
        (top / name).parent.mkdir(exist_ok=True)
        (top / name).write_bytes(data)
    return top


class Clock:
    """In place of the module `time` where tries pause: it only notes the pauses."""

    def __init__(self) -> None:
        self.pauses_s: list[float] = []

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        self.pauses_s.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retrying, "time", clock)
    monkeypatch.setattr(retry, "time", clock)
    return clock


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    for module in (uploads, gcs_uploads, azure_uploads):
        monkeypatch.setattr(module, "PART_BYTES", PART_BYTES)
    for module in (uploads, azure_uploads):  # in whole MiB else
        monkeypatch.setattr(module, "part_bytes_for", lambda size, least, parts_max: least)
    monkeypatch.setattr(directory_upload, "_THREADS", 3)


def be_impatient(patch: pytest.MonkeyPatch) -> None:
    """Have requests to a silent server end soon."""
    for module in (uploads, gcs_uploads, azure_uploads):
        patch.setattr(module, "_PATIENCE_S", SILENCE_S)
    patch.setattr(uploads, "_FINISH_PATIENCE_S", SILENCE_S)
    for name in ("LISTING_S", "ANSWER_S"):
        patch.setattr(wrappers, name, 2 * SILENCE_S)
    patch.setattr(directory_upload, "_ABORT_S", SILENCE_S)
    patch.setattr(retrying, "_TRIES", 2)


class Cell(NamedTuple):
    """An upload whose requests `operation` meet a fault. If it `fails`, the store denies its parts,
    too, so that the upload has to remove them."""

    service: str
    operation: str
    kind: str
    once: bool
    fails: bool = False

    def __str__(self) -> str:
        how = f"{' once' * self.once}{' after a failure' * self.fails}"
        return f"{self.service}: {self.kind} × {self.operation}{how}"


class Outcome(NamedTuple):
    """How an upload has ended."""

    uploaded: Uploaded | None
    error: Exception | None


SHARE = 5
"""A run of the suite takes every fifth cell, others for each fault. CKPTFS_FAULTS=all takes all."""


def cells_of(kind: str, once: bool) -> list[Cell]:
    """The cells of a fault."""
    cells: list[Cell] = []
    for name, service in SERVICES.items():
        cells += [Cell(name, operation, kind, once) for operation in service.operations]
        if "abort" in service.operations:
            cells.append(Cell(name, "abort", kind, once, fails=True))
    # Google removes unfinished uploads itself, so an upload looks for none.
    cells = [cell for cell in cells if cell != Cell("google", "abort", kind, once)]
    return cells if ALL else cells[(2 * FAULTS.index(kind) + once) % SHARE :: SHARE]


def prepared(service: CloudService, operation: str) -> bool:
    """Make the target such that an upload has a request `operation`. Returns whether it is to
    overwrite."""
    if isinstance(service, S3) and service.shows_unfinished:
        service.begin(FOREIGN)
        if operation == "abort":
            service.begin("large.bin")
    if operation == "remove":
        for name, data in OLD.items():
            service.put(name, data)
    elif operation == "get":
        service.put(METADATA, ONLY_METADATA[METADATA])
    elif operation == "head":
        service.has_plain_etags = True
        service.put("a/small.bin", NEW["a/small.bin"])
    elif operation == "read":
        service.has_plain_etags = True
        for name in ("large.bin", "a/small.bin"):
            service.put(name, NEW[name])
    return operation == "remove"


def upload(top: Path, server: UploadServer, timeout_s: float, *, overwrite: bool) -> Outcome:
    store = open_store(server.service.location(server.endpoint), timeout_s)
    try:
        assert isinstance(store, HasUploads)
        ways = store.uploads()
        assert ways is not None
        wanted = Wanted(overwrite=overwrite)
        return Outcome(upload_directory(str(top), store, ways, wanted)[0], None)
    except Exception as error:
        return Outcome(None, error)
    finally:
        store.close()  # type: ignore[attr-defined]


# -- the oracle


def half_visible(found: dict[str, bytes]) -> str:
    """The fault of a target that is seen at any time; "" for none."""
    for name, data in found.items():
        if data not in (NEW.get(name), OLD.get(name)):
            return f"{name} has other content"
    if METADATA in found and found not in (NEW, OLD, ONLY_METADATA):
        return f"{sorted(found)} has metadata, and is incomplete or a mixture"
    return ""


PASSING = (
    *("500", "503", "503, again in 7 s", "reset", "reset in the request", "no HTTP"),
    *("lost", "cut in the head", "cut in the body", "flipped bit"),
)
"""Faults that another try overcomes."""
OTHER_ANSWERS = ("login page", "200 with an error", "half a body", "no body")
SAID_SO = {"get": TargetExists, "look": CheckpointIsFile}
"""The errors by which an upload believes such an answer. It reads as one of a file, or of other
metadata."""


def can_pass(cell: Cell) -> bool:
    """Whether an upload has to overcome the fault if it is met once."""
    if cell.fails:
        return False
    if cell.kind == "flipped bit" and cell.service == "google":
        return False  # it only verifies whole objects
    is_late = cell.kind == "200 with an error" and cell.operation == "complete"
    return is_late or cell.kind in PASSING


def fault_of_outcome(cell: Cell, outcome: Outcome, server: UploadServer) -> str:
    """The fault of an upload that has met a fault of the network; "" for none."""
    error = outcome.error
    if not server.met[cell.operation]:
        return "no request has met the fault"
    if len(server.asked) > REQUESTS_MAX:
        return f"{len(server.asked)} requests: {Counter(server.asked)}"
    found = server.service.contents()
    if wrong := half_visible(found):
        return wrong
    if error is None:
        return "" if found == NEW else f"it has succeeded with {sorted(found)}"
    if not isinstance(error, (StoreError, AccessDenied, CheckpointNotFound)) and not (
        isinstance(error, SAID_SO.get(cell.operation, ())) and cell.kind in OTHER_ANSWERS
    ):
        return f"{error!r}"
    if "\n" in str(error) or SECRET in str(error):
        return f"it says {error}"
    if not re.search(r"(s3|gs|abfss)://", str(error)):
        return f"it does not say where: {error}"
    if cell.kind in SILENT and not isinstance(error, StoreUnavailable) and not cell.fails:
        return f"{error!r}"
    if cell.once and can_pass(cell):
        return f"another try would have helped: {error!r}"
    return ""


def fault_of_next(cell: Cell, outcome: Outcome, server: UploadServer) -> str:
    """The fault of the upload after that one; "" for none."""
    if outcome.error is not None:
        return f"the next upload: {outcome.error!r}"
    if server.service.contents() != NEW:
        return f"the next upload leaves {sorted(server.service.contents())}"
    left = sorted(server.service.unfinished.values())
    if server.service.shows_unfinished and left != [FOREIGN]:
        return f"unfinished uploads are left: {left}"
    return ""


def problem(cell: Cell, top: Path, timeout_s: float) -> str:
    """Do one cell, and return what was wrong."""
    service = SERVICES[cell.service]()
    overwrite = prepared(service, cell.operation)
    with UploadServer(service) as server:
        server.faults = [Fault(cell.kind, cell.operation, cell.once)]
        if cell.fails:
            server.faults.append(Fault("403", "part"))
        outcome = upload(top, server, timeout_s, overwrite=overwrite)
        wrong = fault_of_outcome(cell, outcome, server)
        server.heal()
        if not wrong:
            again = upload(top, server, TIMEOUT_S, overwrite=overwrite)
            wrong = fault_of_next(cell, again, server)
    return f"{cell}: {wrong}" if wrong else ""


def problems(cells: list[Cell], top: Path, timeout_s: float = TIMEOUT_S) -> list[str]:
    with ThreadPoolExecutor(len(cells)) as pool:
        done = [pool.submit(problem, cell, top, timeout_s) for cell in cells]
        return [wrong for each in done if (wrong := each.result(CELL_S))]


@pytest.mark.parametrize("once", [False, True], ids=["always", "once"])
@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_of_the_network_in_each_request_of_an_upload(
    kind: str, once: bool, top: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeout_s = TIMEOUT_S
    if kind in SILENT:
        be_impatient(monkeypatch)
        timeout_s = SILENCE_S
    if found := problems(cells_of(kind, once), top, timeout_s):
        pytest.fail("\n".join(found))
    if kind == "503, again in 7 s":
        assert max(clock.pauses_s) >= 7
