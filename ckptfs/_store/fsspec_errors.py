"""The meaning of the exceptions of fsspec's packages.

Each package has its own exceptions. The surest sign is an HTTP status, if an exception has one. The
names of the classes tell the others, because the packages need not be installed.
"""

from typing import Any

from ckptfs._model.manifest import printable
from ckptfs._store.versions import retry_after_s
from ckptfs.errors import AccessDenied, CkptfsError, StoreError, StoreTimeout, StoreUnavailable

_HINTS = {
    "GatedRepoError": "accept the repository's conditions at the Hub, and give a token (HF_TOKEN)",
    "RepositoryNotFoundError": "check the name; a private repository needs a token (HF_TOKEN)",
    "RevisionNotFoundError": "check the revision behind the @",
    "OfflineModeIsEnabled": "unset HF_HUB_OFFLINE in the environment of the process that reads",
}
"""The advice for exceptions of huggingface_hub, by the names of their classes."""


def status_of(error: BaseException) -> int:
    """The HTTP status of an exception of aiohttp, requests, httpx, azure or gcsfs; else 0."""
    response = getattr(error, "response", None)
    holders = (
        (error, "status"),
        (error, "status_code"),
        (error, "code"),
        (response, "status_code"),
    )
    for holder, name in holders:
        status = getattr(holder, name, None)
        if isinstance(status, str) and status.isdecimal():
            status = int(status)
        if isinstance(status, int) and 100 <= status <= 599:
            return status
    return 0


def translated(error: BaseException, what: str) -> CkptfsError:
    """The exception of ckptfs for the `error` of an fsspec package about `what`."""
    if isinstance(error, CkptfsError):
        return error
    status, name = status_of(error), type(error).__name__
    cause = printable(str(error).partition("\n")[0]) or name
    if name == "OfflineModeIsEnabled":
        return StoreError(f"{what}: {cause}; {_HINTS[name]}")
    if isinstance(error, PermissionError) or status in (401, 403, 407):
        advice = _HINTS.get(name, "check credentials and permissions")
        return AccessDenied(f"{what}: access denied ({cause}); {advice}")
    if isinstance(error, TimeoutError) or "imeout" in name or status == 408:
        return StoreTimeout(f"{what}: the store did not answer ({cause}); check the endpoint")
    if _can_pass(error, name, status):
        advice = "try again later" if status == 429 else "check the endpoint"
        unavailable = StoreUnavailable(f"{what}: cannot reach the store ({cause}); {advice}")
        headers: Any = getattr(getattr(error, "response", None), "headers", None) or {}
        unavailable.retry_after_s = retry_after_s(str(headers.get("Retry-After", "")))
        return unavailable
    return StoreError(f"{what}: {cause}; {_HINTS.get(name, 'check the store')}")


def _can_pass(error: BaseException, name: str, status: int) -> bool:
    if status:
        return status == 429 or (status >= 500 and status not in (501, 505))
    if isinstance(error, ConnectionError | EOFError):
        return True
    # aiohttp (a cut answer is its ClientPayloadError), azure-core, http.client, httpx, urllib3.
    signs = (
        "Connect",
        "Disconnected",
        "IncompleteRead",
        "NetworkError",
        "Payload",
        "ProtocolError",
        "ReadError",
        "ServiceRe",  # azure's ServiceRequestError, ServiceResponseError
    )
    return any(sign in name for sign in signs)


def raise_disguised(error: FileNotFoundError, what: str) -> None:
    """Raise the real error behind a FileNotFoundError: `info` of http raises that for each failure,
    and huggingface_hub for a repository that the user may not read."""
    cause = error.__cause__
    if not isinstance(cause, Exception) or "NotFound" in type(cause).__name__:
        return
    ours = translated(cause, what)
    if isinstance(ours, AccessDenied | StoreUnavailable):
        raise ours from cause


def hint_for(error: FileNotFoundError) -> str:
    """The advice for something that is missing at Hugging Face, after "; "; else ""."""
    hint = _HINTS.get(type(error.__cause__).__name__, "")
    return f"; {hint}" if hint else ""
