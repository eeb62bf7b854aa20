"""Errors as gRPC shows them: a status code and one line.

The kubelet tries a call again in any case. After UNAVAILABLE, DEADLINE_EXCEEDED, ABORTED and
RESOURCE_EXHAUSTED it assumes that the call may have had an effect, and unpublishes before it gives
up.
"""

from ckptfs import errors

STATUS: dict[type[Exception], str] = {
    errors.LocationError: "INVALID_ARGUMENT",
    errors.PlanError: "INVALID_ARGUMENT",
    errors.CheckpointIsFile: "INVALID_ARGUMENT",
    errors.CheckpointNotFound: "NOT_FOUND",
    errors.AccessDenied: "PERMISSION_DENIED",
    errors.StoreUnavailable: "UNAVAILABLE",
    errors.ObjectChanged: "ABORTED",
    errors.Busy: "ABORTED",
    errors.LimitExceeded: "RESOURCE_EXHAUSTED",
    errors.CannotMount: "FAILED_PRECONDITION",
    errors.ConfigError: "FAILED_PRECONDITION",
    errors.ProtocolError: "INTERNAL",
    errors.DaemonError: "UNAVAILABLE",
    errors.CkptfsError: "INTERNAL",
    OSError: "INTERNAL",
}
"""The status code of each error and its subclasses. No other module has such a table."""


class Refusal(Exception):
    """A call that the driver itself refuses, with the name of a status code."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


def invalid(message: str) -> Refusal:
    """The refusal of a request that no retry can help."""
    return Refusal("INVALID_ARGUMENT", message)


def status_of(error: Exception) -> str:
    """The status code for an error; "" for a bug."""
    if isinstance(error, Refusal):
        return error.status
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), "")
