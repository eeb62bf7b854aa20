"""Tokens for Google and Azure, from token servers of the test and from the providers' libraries."""

from __future__ import annotations

import json
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import pytest

from ckptfs._store.cloud import tokens
from ckptfs._store.cloud.tokens import GivenToken, Token, TokenSource, azure_tokens, google_tokens
from ckptfs._store.request_context import ends_in
from ckptfs.errors import AccessDenied, LocationError, StoreTimeout, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = "gs://bucket/run"
SECRET = "S3CR3T"


class TokenServer:
    """Answers each request with `status` and `answer`.

    Attributes:
        asked: The fields of the requests' bodies, or of their queries.
    """

    def __init__(self) -> None:
        self.status = 200
        self.answer: dict[str, Any] = {"access_token": "ya29.1", "expires_in": 3600}
        self.asked: list[dict[str, list[str]]] = []
        self.url = ""


@contextmanager
def token_server() -> Iterator[TokenServer]:
    state = TokenServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", "0"))).decode()
            state.asked.append(parse_qs(body or self.path.partition("?")[2]))
            data = json.dumps(state.answer).encode()
            self.send_response(state.status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST

        def log_message(self, *_: object, **__: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}/token"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[TokenServer]:
    with token_server() as server:
        # Keys of users do not name their token server.
        endpoint = "google.oauth2.credentials._GOOGLE_OAUTH2_TOKEN_ENDPOINT"
        monkeypatch.setattr(endpoint, server.url)
        yield server


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the machine is found."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "AZURE_CLIENT_ID", "IDENTITY_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


# -- the source


def test_a_token_is_asked_for_once_and_renewed_before_its_end() -> None:
    ends_s = [time.time() + 3600, time.time() + 10, time.time() + 3600]
    asked: list[float] = []

    def look_up() -> Token:
        asked.append(ends_s[len(asked)])
        return Token(f"t{len(asked)}", asked[-1])

    source = TokenSource(look_up, NAME)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: source.token(), range(20))) == {"t1"}
    assert not source.renew()  # it came just now
    source._asked_s -= 60  # type: ignore[attr-defined]
    assert source.renew()
    assert source.token() == "t2"
    assert source.token() == "t3"  # the second one is about to end
    assert list(source.known()) == ["t3"]
    assert "t3" not in repr(Token("t3", 0))


def test_a_look_up_that_failed_is_not_repeated_at_once() -> None:
    asked: list[int] = []

    def look_up() -> Token:
        asked.append(1)
        raise AccessDenied("no")

    source = TokenSource(look_up, NAME)
    for _ in range(5):
        with pytest.raises(AccessDenied):
            source.token()
    assert len(asked) == 1
    source._asked_s -= 60  # type: ignore[attr-defined]
    with pytest.raises(AccessDenied):
        source.token()
    assert len(asked) == 2


def test_a_look_up_that_hangs_ends_at_the_deadline_for_all_callers() -> None:
    ends = threading.Event()

    def look_up() -> Token:
        ends.wait(30)
        return Token("late", time.time() + 3600)

    source = TokenSource(look_up, NAME)

    def ask(_: int) -> str:
        with ends_in(0.2):
            return source.token()

    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(ask, i) for i in range(3)]
        for future in futures:
            with pytest.raises(StoreTimeout):
                future.result(20)
    ends.set()
    deadline_s = time.monotonic() + 20
    while not source.known():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert source.token() == "late"  # what came too late is used by the next caller


@pytest.mark.parametrize("text", ["", "a b", "a\r\nb", "é"])
def test_a_malformed_token_is_refused(text: str) -> None:
    with pytest.raises(LocationError):
        GivenToken(text)
    with pytest.raises(AccessDenied, match="malformed"):
        TokenSource(lambda: Token(text, time.time() + 3600), NAME).token()


# -- Google


def authorized_user(_: TokenServer) -> str:
    return json.dumps(
        {
            "type": "authorized_user",
            "client_id": "id",
            "client_secret": SECRET,
            "refresh_token": f"{SECRET}-refresh",
        }
    )


def service_account(server: TokenServer) -> str:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()
    return json.dumps(
        {
            "type": "service_account",
            "client_email": "me@example.com",
            "private_key": pem,
            "private_key_id": "1",
            "token_uri": server.url,
        }
    )


@pytest.mark.parametrize("make", [authorized_user, service_account])
def test_google_keys(server: TokenServer, make: Any, tmp_path: Path) -> None:
    text = make(server)
    source = google_tokens({"service_account_key": text}, NAME, "")
    assert source.token() == "ya29.1"
    assert source.token() == "ya29.1"
    assert len(server.asked) == 1
    file = tmp_path / "key.json"
    file.write_text(text)
    assert google_tokens({"application_credentials": str(file)}, NAME, "").token() == "ya29.1"


def test_googles_chain(
    server: TokenServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AccessDenied, match="set GOOGLE_APPLICATION_CREDENTIALS"):
        google_tokens({}, NAME, "").token()
    file = tmp_path / "key.json"
    file.write_text(authorized_user(server))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    assert google_tokens({}, NAME, "").token() == "ya29.1"


def test_google_refuses_or_does_not_answer(
    server: TokenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"service_account_key": authorized_user(server)}
    server.status, server.answer = 400, {"error": "invalid_grant"}
    with pytest.raises(AccessDenied, match="invalid_grant") as refused:
        google_tokens(options, NAME, "").token()
    assert SECRET not in "".join(traceback.format_exception(refused.value))
    gone = "http://127.0.0.1:1/token"
    monkeypatch.setattr("google.oauth2.credentials._GOOGLE_OAUTH2_TOKEN_ENDPOINT", gone)
    with pytest.raises(StoreUnavailable, match="does not answer") as unavailable:
        google_tokens(options, NAME, "").token()
    assert SECRET not in "".join(traceback.format_exception(unavailable.value))


def test_an_error_of_google_that_can_pass(
    server: TokenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from google.auth.exceptions import RefreshError

    def refresh(*_: object) -> None:
        raise RefreshError("busy", retryable=True)

    monkeypatch.setattr("google.oauth2.credentials.Credentials.refresh", refresh)
    with pytest.raises(StoreUnavailable, match="busy"):
        google_tokens({"service_account_key": authorized_user(server)}, NAME, "").token()


def test_a_missing_or_malformed_file_of_google(tmp_path: Path) -> None:
    file = tmp_path / "key.json"
    for text in (None, SECRET, "{}", '{"type": "authorized_user"}'):
        if text is not None:
            file.write_text(text)
        with pytest.raises(AccessDenied) as caught:
            google_tokens({"application_credentials": str(file)}, NAME, "").token()
        assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_key_that_names_others_to_ask_is_the_environments_only(
    server: TokenServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "subject").write_text("a token of somewhere else")
    file = tmp_path / "key.json"
    key = {
        "type": "external_account",
        "audience": "here",
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
        "token_url": server.url,
        "credential_source": {"file": str(tmp_path / "subject")},
    }
    file.write_text(json.dumps(key))
    source = google_tokens({"application_credentials": str(file)}, NAME, "")
    with pytest.raises(AccessDenied, match="not of type"):
        source.token()
    assert not server.asked
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    source = google_tokens({"application_credentials": str(file)}, NAME, "")
    assert source.token() == "ya29.1"


def test_a_token_of_the_caller_is_exchanged_at_google(
    server: TokenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_GOOGLE_TOKEN_URL", server.url)
    server.answer |= {
        "issued_token_type": "urn:ietf:params:oauth:token-type:access_token",
        "token_type": "Bearer",
    }
    given = {"workload_provider": "projects/1/providers/cluster", "federated_token": SECRET}
    assert google_tokens(given, NAME, "").token() == "ya29.1"
    [asked] = server.asked
    assert asked["subject_token"] == [SECRET]
    assert asked["audience"] == ["//iam.googleapis.com/projects/1/providers/cluster"]
    server.status, server.answer = 400, {"error": "invalid_grant", "error_description": "expired"}
    with pytest.raises(AccessDenied, match="gives no token") as caught:
        google_tokens(given, NAME, "").token()
    assert SECRET not in str(caught.value)


# -- Azure


def test_a_managed_identity_of_azure(server: TokenServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDENTITY_ENDPOINT", server.url)
    monkeypatch.setenv("IDENTITY_HEADER", "header")
    server.answer = {
        "access_token": "eyJ",
        "expires_on": str(int(time.time()) + 3600),
        "resource": "https://storage.azure.com",
        "token_type": "Bearer",
    }
    source = azure_tokens({"client_id": "me"}, NAME, "")
    assert source.token() == "eyJ"
    assert server.asked[0]["client_id"] == ["me"]
    assert azure_tokens({}, NAME, "").token() == "eyJ"  # the chain finds it, too


def test_no_credentials_of_azure(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_of_them(*_: object) -> Any:
        from azure.core.exceptions import ClientAuthenticationError

        raise ClientAuthenticationError("no credential of the chain has a token.\nmore")

    monkeypatch.setattr("azure.identity.DefaultAzureCredential.get_token", none_of_them)
    with pytest.raises(AccessDenied, match=r"has a token\); set AZURE_CLIENT_ID"):
        azure_tokens({}, NAME, "").token()


def test_which_credential_of_azure_is_meant(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("jwt")
    who = {"tenant_id": "t", "client_id": "c"}
    kinds = {
        "ClientSecretCredential": {**who, "client_secret": SECRET},
        "ClientAssertionCredential": {**who, "federated_token": SECRET},
        "WorkloadIdentityCredential": {**who, "federated_token_file": str(file)},
        "ManagedIdentityCredential": {"client_id": "c"},
        "DefaultAzureCredential": {},
    }
    for kind, options in kinds.items():
        made = tokens._azure_credential(options, "")  # type: ignore[attr-defined]
        assert type(made).__name__ == kind
