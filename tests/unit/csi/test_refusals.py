"""Each error of ckptfs has a status code of gRPC."""

import grpc
import pytest

from ckptfs import errors
from ckptfs._csi.refusals import STATUS, Refusal, status_of


@pytest.mark.parametrize("kind", errors.BY_CODE.values(), ids=lambda kind: kind.code)
def test_each_error_has_a_status(kind: type[errors.CkptfsError]) -> None:
    assert status_of(kind("x")) in grpc.StatusCode.__members__


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.CheckpointNotFound("x"), "NOT_FOUND"),
        (errors.RightsNotLent("x"), "PERMISSION_DENIED"),
        (errors.UnknownStore("x"), "INVALID_ARGUMENT"),
        (errors.StoreTimeout("x"), "UNAVAILABLE"),
        (errors.StoreError("x"), "INTERNAL"),
        (errors.NoDaemon("x"), "UNAVAILABLE"),
        (errors.PlaceUnusable("x"), "FAILED_PRECONDITION"),
        (errors.LimitExceeded("x"), "RESOURCE_EXHAUSTED"),
        (OSError(28, "No space left on device"), "INTERNAL"),
        (Refusal("ABORTED", "x"), "ABORTED"),
        (ZeroDivisionError(), ""),
    ],
)
def test_statuses(error: Exception, status: str) -> None:
    assert status_of(error) == status
    assert set(STATUS.values()) <= set(grpc.StatusCode.__members__)
