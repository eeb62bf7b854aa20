"""Requests to a bucket of Google or a container of Azure, over the connections of `client`.

Google's XML API and Azure's Blob service speak the HTTP of S3: the same paths, ranges, conditions,
ETags and error bodies. Only the authorization differs. So their requests are unsigned requests of
the S3 client, and an `Authority` authorizes them.
"""

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from email.utils import formatdate
from http.client import HTTPResponse
from typing import Any
from urllib.parse import parse_qsl, quote

import msgspec

from ckptfs._store.cloud.tokens import TokenSource
from ckptfs._store.s3.client import Asked, S3Client
from ckptfs._store.s3.keys import fixed_keys
from ckptfs._store.s3.options import S3Options
from ckptfs._store.transport.errors import BrokenConnection, S3Error
from ckptfs.errors import LocationError

_REFUSED = frozenset([401, 403])
_NOT_MODIFIED = 304
_SECRET = re.compile(
    r"(?i)\b(sig|signature|x-goog-signature|access_token|authorization)(=|%3d|: *(?:bearer +)?)"
    r"[^&\s\"'<>]+"
)
"""The texts in a server's message that may be secrets."""


class Authority:
    """The authorization of requests. Any thread may use it. This one leaves requests anonymous."""

    @property
    def secrets(self) -> Iterable[str]:
        """The texts that no message may contain."""
        return ()

    def authorize(self, asked: Asked, path: str) -> Asked:
        """The authorized request; `path` is the path as it is sent.

        May ask another server. Raises AccessDenied without credentials, and StoreUnavailable if
        that server does not answer.
        """
        return asked

    def renew(self) -> bool:
        """Whether there are other credentials now, after the service has refused these."""
        return False

    def fault(self) -> str:
        """The fault of the credentials, for the message of a refusal; "" if it is unknown."""
        return ""


class Service(msgspec.Struct, frozen=True):
    """The differences of a service to S3, besides the authorization.

    Attributes:
        headers: The headers of each request; the names are in lower case.
        object_headers: The additional headers of each request for an object.
        mark: The field that the head of each answer about an object has; "" without one.
        codes: The service's names of errors, each with S3's name of the same error.
    """

    headers: Mapping[str, str] = {}
    object_headers: Mapping[str, str] = {}
    mark: str = ""
    codes: Mapping[str, str] = {}


class AuthorizedClient(S3Client):
    """A client for one bucket or container of `service`, whose requests an `Authority` authorizes.
    Raises as `S3Client`."""

    def __init__(
        self,
        bucket: str,
        options: S3Options,
        authority: Authority,
        timeout_s: float,
        service: Service,
    ) -> None:
        super().__init__(bucket, options, fixed_keys(None), timeout_s)
        self._authority = authority
        self._service = service
        self.answers_are_whole = True

    @contextmanager
    def request(self, asked: Asked) -> Generator[HTTPResponse]:
        own = {**self._service.headers, **(self._service.object_headers if asked.key else {})}
        asked = msgspec.structs.replace(asked, headers={**asked.headers, **own})
        try:
            with ExitStack() as stack:
                response = self._begun(stack, asked)
                has_mark = asked.key and asked.method != "DELETE"
                if has_mark and response.status != _NOT_MODIFIED:
                    self._check_mark(response)
                yield response
        except (S3Error, BrokenConnection) as error:
            self._explain(error)
            raise

    def _begun(self, stack: ExitStack, asked: Asked) -> HTTPResponse:
        """The answer, perhaps with renewed credentials. Its context is in `stack`."""
        path, has_renewed = self.address.path(asked.key), False
        while True:
            authorized = self._authority.authorize(asked, path)
            try:
                return stack.enter_context(super().request(authorized))
            except S3Error as error:
                if error.status not in _REFUSED or has_renewed or not self._authority.renew():
                    raise
                has_renewed = True

    def _has_moved(self, *_: Any, **__: Any) -> bool:
        """Never follow to another address, because the authorization is for this host alone."""
        return False

    def _check_mark(self, response: HTTPResponse) -> None:
        """Raise S3Error for an answer that is not from the service, for example a login page."""
        mark = self._service.mark
        if mark and not response.headers.get(mark):
            text = f"the answer has no {mark}, so a proxy or login page seems to answer"
            raise S3Error(response.status, "", f"{text}; check the endpoint")

    def _explain(self, error: S3Error | BrokenConnection) -> None:
        """Give `error` S3's code, the authority's reason, and no secrets."""
        text = str(error)
        shown = scrubbed(text, self._authority.secrets)
        if isinstance(error, S3Error):
            error.code = self._service.codes.get(error.code, error.code)
            error.message = scrubbed(error.message, self._authority.secrets)
            fault = self._authority.fault() if error.status in _REFUSED else ""
            shown += f"; {fault}" if fault else ""
        if shown != text:
            error.args = (shown,)
            error.__cause__ = None  # it may contain the same secrets


def scrubbed(text: str, secrets: Iterable[str]) -> str:
    """`text` without these secrets, encoded or not, and without other texts that look like one."""
    for secret in secrets:
        for form in {secret, quote(secret, safe=""), quote(secret, safe="/")} - {""}:
            text = text.replace(form, "***")
    return _SECRET.sub(r"\1\2***", text)


class Anonymous(Authority):
    """The authority of anonymous requests."""

    def fault(self) -> str:
        return "the request was anonymous"


class Bearer(Authority):
    """The authority that sends OAuth tokens (RFC 6750) of a source."""

    def __init__(self, source: TokenSource) -> None:
        self._source = source

    @property
    def secrets(self) -> Iterable[str]:
        return self._source.known()

    def authorize(self, asked: Asked, path: str) -> Asked:
        more = {"authorization": f"Bearer {self._source.token()}"}
        return msgspec.structs.replace(asked, headers={**asked.headers, **more})

    def renew(self) -> bool:
        return self._source.renew()


class SasToken(Authority):
    """A shared access signature of Azure. Raises LocationError for a malformed one."""

    def __init__(self, text: str) -> None:
        self._fields = dict(parse_qsl(text.strip().lstrip("?"), keep_blank_values=True))
        if not self._fields.get("sig"):
            raise LocationError(
                "the sas_token has no signature; give the part of the SAS URL after the '?'"
            )

    @property
    def secrets(self) -> Iterable[str]:
        return (self._fields["sig"],)

    def authorize(self, asked: Asked, path: str) -> Asked:
        return msgspec.structs.replace(asked, query={**asked.query, **self._fields})

    def fault(self) -> str:
        end = self._fields.get("se", "")
        try:
            moment = datetime.fromisoformat(end.replace("Z", "+00:00"))
        except ValueError:
            return ""
        moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
        if moment > datetime.now(timezone.utc):
            return ""
        return f"the SAS token expired at {moment:%Y-%m-%dT%H:%M:%SZ}; make a new one"


class SharedKey(Authority):
    """The key of a storage account of Azure.

    The rules are those of "Authorize with Shared Key" in Azure's Storage Services REST reference.
    Raises LocationError for a malformed key.
    """

    def __init__(self, account: str, key: str) -> None:
        try:
            self._key = base64.b64decode(key, validate=True)
        except (binascii.Error, ValueError):
            raise LocationError("the account_key is not valid base64; copy it again") from None
        self._account = account
        self._text = key

    @property
    def secrets(self) -> Iterable[str]:
        return (self._text,)

    def authorize(self, asked: Asked, path: str) -> Asked:
        headers = {**asked.headers, "x-ms-date": formatdate(usegmt=True)}
        asked = msgspec.structs.replace(asked, headers=headers)
        text = self._to_sign(asked, path).encode()
        digest = hmac.digest(self._key, text, hashlib.sha256)
        signature = f"SharedKey {self._account}:{base64.b64encode(digest).decode()}"
        return msgspec.structs.replace(asked, headers={**headers, "authorization": signature})

    def _to_sign(self, asked: Asked, path: str) -> str:
        headers = asked.headers
        names = ("content-encoding", "content-language", "length", "content-md5", "content-type")
        conditions = ("date", "if-modified-since", "if-match", "if-none-match")
        last = ("if-unmodified-since", "range")
        standard = {**headers, "length": str(len(asked.body) or "")}
        lines = [asked.method, *(standard.get(n, "") for n in (*names, *conditions, *last))]
        lines += (f"{n}:{headers[n].strip()}" for n in sorted(headers) if n.startswith("x-ms-"))
        lines.append(f"/{self._account}{path}")
        lines += (f"{n.lower()}:{asked.query[n]}" for n in sorted(asked.query, key=str.lower))
        return "\n".join(lines)
