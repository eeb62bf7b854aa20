# google-auth and azure-identity have no usable type hints; nothing of them leaves this module.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
"""OAuth tokens for Google and Azure, which are given or found by the providers' own libraries.

The chains are those of every tool of Google and Azure: google-auth and azure-identity search the
environment, files, instance metadata, workload identities and command line tools. Only a search
imports them, because that takes tenths of a second.

A look-up may hang, for example because it waits for a metadata server on a machine without one. It
runs in a thread of its own for `LOOK_UP_S` at most, and not after the caller's deadline.
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timezone
from functools import partial
from typing import Any, NamedTuple, cast

from ckptfs._model.manifest import printable
from ckptfs._store.request_context import left_s
from ckptfs._store.wrappers import within
from ckptfs.errors import AccessDenied, CkptfsError, LocationError, StoreTimeout, StoreUnavailable

LOOK_UP_S = 30.0
"""The longest look-up. google-auth tries a metadata server three times for 3 s each, and Azure's
command line tool takes some seconds."""
_EARLY_S = 240.0
"""The time before a token's end when it is replaced. Google's and Azure's are valid for an hour."""
_PAUSE_S = 5.0
"""The time between two look-ups that fail, or that follow a refusal of the service."""
_GOOGLE_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_GOOGLE_SCOPE_OF_ALL = "https://www.googleapis.com/auth/cloud-platform"
"""The scope that impersonation needs."""
_GOOGLE_TOKEN_URL = "https://sts.googleapis.com/v1/token"
_KEY_BYTES_MAX = 64 << 10
_AZURE_SCOPE = "https://storage.azure.com/.default"
_TOKEN = re.compile(r"[\x21-\x7e]+")
_GOOGLE_VARIABLE = "GOOGLE_APPLICATION_CREDENTIALS"
_OWN_KINDS = frozenset(["service_account", "authorized_user"])
"""The types of Google's JSON keys that are complete in themselves. The others name files, programs
and servers, which a location must not choose."""


class Token(NamedTuple):
    """A token, and its end by `time.time`; infinity if that is unknown."""

    text: str
    end_s: float

    def __repr__(self) -> str:
        return "Token(…)"


class TokenSource:
    """The tokens of one identity, renewed in time. Any thread may use it.

    `look_up` gets a new token, and raises AccessDenied or StoreUnavailable. `name` is the location,
    for messages.
    """

    def __init__(self, look_up: Callable[[], Token], name: str) -> None:
        self._look_up = look_up
        self._name = name
        self._turn = threading.Lock()  # held by the one thread that looks up
        self._lock = threading.Lock()  # guards the rest; never held during IO
        self._token: Token | None = None
        self._error: CkptfsError | None = None
        self._asked_s = -_PAUSE_S  # of time.monotonic

    def token(self) -> str:
        """The current token. Raises AccessDenied, StoreUnavailable, StoreTimeout."""
        if token := self._current():
            return token.text
        if not self._turn.acquire(timeout=max(0.0, min(LOOK_UP_S, left_s()))):
            raise StoreTimeout(f"{self._name}: no token came in time; check the credentials")
        try:
            token = self._current() or within(LOOK_UP_S, self._name, self._ask)
        finally:
            self._turn.release()
        return token.text

    def renew(self) -> bool:
        """Whether there is another token, after the service has refused this one."""
        with self._lock:
            if time.monotonic() - self._asked_s < _PAUSE_S:
                return False
            self._token = None
            return True

    def known(self) -> Iterable[str]:
        """The tokens that messages must not contain."""
        token = self._token
        return () if token is None else (token.text,)

    def _current(self) -> Token | None:
        """A token that is valid. Raises the error of a look-up that failed just now."""
        with self._lock:
            if self._token is not None and time.time() < self._token.end_s - _EARLY_S:
                return self._token
            if self._error is not None and time.monotonic() - self._asked_s < _PAUSE_S:
                raise self._error
        return None

    def _ask(self) -> Token:
        token, error = None, None
        try:
            token = self._look_up()
            if not _TOKEN.fullmatch(token.text):
                raise AccessDenied(f"{self._name}: the token is malformed; check the credentials")
            return token
        except CkptfsError as caught:
            token, error = None, caught
            raise
        finally:
            with self._lock:
                self._token, self._error, self._asked_s = token, error, time.monotonic()


class GivenToken(TokenSource):
    """The one token of a location."""

    def __init__(self, text: str) -> None:
        if not _TOKEN.fullmatch(text):
            raise LocationError("the access_token is malformed; copy it again")
        super().__init__(lambda: Token(text, float("inf")), "access_token")

    def renew(self) -> bool:
        return False


# -- Google


def google_tokens(options: Mapping[str, Any], name: str, proxy: str) -> TokenSource:
    """The tokens for a location on Google. Raises LocationError if its key is malformed.

    The options have a `service_account_key` (JSON), `application_credentials` (a path), a
    `federated_token` (the text of a token that the caller renews) with its `workload_provider`, or
    nothing, for the credentials of Google's chain. `target_service_account` is impersonated with
    these.
    `name` is the location, for messages. `proxy` is on the way to Google's token server, or "".
    """
    text = str(options.get("service_account_key", ""))
    key = _own_key(text, "the service_account_key") if text else None
    federated = str(options.get("workload_provider", "")), str(options.get("federated_token", ""))
    path = str(options.get("application_credentials", ""))
    target = str(options.get("target_service_account", ""))
    found: list[Any] = []  # the credentials, from the first look-up on

    def look_up() -> Token:
        import google.auth.exceptions

        try:
            transport = _google_transport(proxy)
            if not found:
                found.append(_google_credentials(key, path, federated, target, transport))
            found[0].refresh(transport)
        except google.auth.exceptions.DefaultCredentialsError as error:
            raise AccessDenied(
                f"{name}: no Google credentials were found ({_line(error)}); set "
                f"{_GOOGLE_VARIABLE}, run 'gcloud auth application-default login', or "
                "add ?anonymous=true for a public bucket"
            ) from None
        except google.auth.exceptions.TransportError as error:
            raise _no_answer("Google", name, error) from None
        except google.auth.exceptions.GoogleAuthError as error:
            if error.retryable:
                raise _no_answer("Google", name, error) from None
            raise AccessDenied(
                f"{name}: Google gives no token for the credentials ({_line(error)}); check them"
            ) from None
        except (OSError, ValueError) as error:
            what = path or "Google credentials"
            raise AccessDenied(f"{name}: {what}: {_line(error)}; check the credentials") from None
        expiry = found[0].expiry  # a datetime in UTC that does not say so
        end_s = expiry.replace(tzinfo=timezone.utc).timestamp() if expiry else float("inf")
        return Token(found[0].token or "", end_s)

    return TokenSource(look_up, name)


def _own_key(text: str | bytes, what: str) -> dict[str, Any]:
    """A key of Google in JSON. Raises LocationError for another text."""
    try:
        found: Any = json.loads(text)
    except ValueError:
        raise LocationError(f"{what} is not JSON; give a key as Google has it") from None
    kind = cast("dict[str, Any]", found).get("type") if isinstance(found, dict) else None
    if kind not in _OWN_KINDS:
        known = " or ".join(sorted(_OWN_KINDS))
        raise LocationError(
            f"{what} is not of type {known}; set {_GOOGLE_VARIABLE} in the environment of the "
            "daemon to use a key of another type"
        )
    return cast("dict[str, Any]", found)


def _google_credentials(
    key: dict[str, Any] | None,
    path: str,
    federated: tuple[str, str],
    target: str,
    transport: Any,
) -> Any:
    import google.auth
    from google.auth import impersonated_credentials
    from google.oauth2 import credentials, service_account

    # Of the reader's own environment, all types of keys are trusted.
    if path and path != os.path.abspath(os.environ.get(_GOOGLE_VARIABLE, "")):
        with open(path, "rb") as file:
            key = _own_key(file.read(_KEY_BYTES_MAX), path)
    scopes = [_GOOGLE_SCOPE] if not target else [_GOOGLE_SCOPE_OF_ALL]
    if federated[1]:
        found = _google_federated(*federated, scopes)
    elif key is None:
        found, _ = google.auth.default(scopes=scopes, request=transport)
    elif key["type"] == "service_account":
        found = service_account.Credentials.from_service_account_info(key, scopes=scopes)
    else:
        found = credentials.Credentials.from_authorized_user_info(key, scopes=scopes)
    if target:
        return impersonated_credentials.Credentials(found, target, [_GOOGLE_SCOPE])
    return found


def _google_federated(provider: str, token: str, scopes: list[str]) -> Any:
    """Credentials of workload identity federation for a token that the caller has sent."""
    from google.auth import identity_pool

    class Supplier(identity_pool.SubjectTokenSupplier):
        def get_subject_token(self, context: Any, request: Any) -> str:
            return token

    return identity_pool.Credentials(
        audience=f"//iam.googleapis.com/{provider}",
        subject_token_type="urn:ietf:params:oauth:token-type:jwt",
        token_url=_GOOGLE_TOKEN_URL,
        subject_token_supplier=Supplier(),
        scopes=scopes,
    )


def _google_transport(proxy: str) -> Any:
    import urllib3
    from google.auth.transport.urllib3 import Request

    if proxy:
        return Request(urllib3.ProxyManager(proxy, retries=False))
    return Request(urllib3.PoolManager(retries=False))


# -- Azure


def azure_tokens(options: Mapping[str, Any], name: str, proxy: str) -> TokenSource:
    """The tokens for a location on Azure; for `name` and `proxy` see `google_tokens`.

    The options have `tenant_id` and `client_id` with `client_secret`, `federated_token_file` or
    `federated_token` (the token itself, of a caller who renews it); or a `client_id` alone, of a
    managed identity; or none, for the credentials of Azure's chain.
    `authority_host` names another token server than that of the public cloud.
    """
    found: list[Any] = []

    def look_up() -> Token:
        from azure.core.exceptions import AzureError, ClientAuthenticationError

        try:
            if not found:
                found.append(_azure_credential(options, proxy))
            token = found[0].get_token(_AZURE_SCOPE)
        except ClientAuthenticationError as error:  # also if it found no credentials
            raise AccessDenied(
                f"{name}: cannot get a token for Azure ({_line(error)}); set AZURE_CLIENT_ID, "
                "AZURE_TENANT_ID and AZURE_CLIENT_SECRET, run 'az login', or give an account_key "
                "or a sas_token"
            ) from None
        except (AzureError, OSError) as error:
            raise _no_answer("Azure", name, error) from None
        except ValueError as error:
            raise AccessDenied(f"{name}: {_line(error)}; check the credentials") from None
        return Token(token.token, float(token.expires_on))

    return TokenSource(look_up, name)


def _azure_credential(options: Mapping[str, Any], proxy: str) -> Any:
    from azure import identity

    logger = logging.getLogger("azure.identity")
    if logger.level == logging.NOTSET:  # a failed look-up logs twenty lines of warnings
        logger.setLevel(logging.ERROR)
    more: dict[str, Any] = {"retry_total": 1, "connection_timeout": 5, "read_timeout": 10}
    if options.get("authority_host"):
        more["authority"] = options["authority_host"]
    if proxy:
        more["proxies"] = {"https": proxy, "http": proxy}
    tenant, client = options.get("tenant_id"), options.get("client_id")
    if tenant and client and options.get("client_secret"):
        return identity.ClientSecretCredential(tenant, client, options["client_secret"], **more)
    if tenant and client and options.get("federated_token"):
        token = partial(str, options["federated_token"])
        return identity.ClientAssertionCredential(tenant, client, token, **more)
    if tenant and client and options.get("federated_token_file"):
        file = options["federated_token_file"]
        return identity.WorkloadIdentityCredential(
            tenant_id=tenant, client_id=client, token_file_path=file, **more
        )
    if client:
        return identity.ManagedIdentityCredential(client_id=client, **more)
    return identity.DefaultAzureCredential(
        exclude_broker_credential=True,
        exclude_developer_cli_credential=True,
        exclude_powershell_credential=True,
        exclude_shared_token_cache_credential=True,
        exclude_visual_studio_code_credential=True,
        **more,
    )


def _no_answer(whose: str, name: str, error: BaseException) -> StoreUnavailable:
    return StoreUnavailable(
        f"{name}: the token server of {whose} does not answer ({_line(error)}); try again later"
    )


def _line(error: BaseException) -> str:
    """The first line of a library's text."""
    return printable(str(error).partition("\n")[0].rstrip(".")) or type(error).__name__
