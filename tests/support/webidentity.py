"""AWS with identities: a security token service, and S3 whose keys read one prefix each.

The S3 behind it (moto) accepts all keys, so this server decides who may read what. Its threads
share the test's interpreter: never touch an mmap of the mount while it serves.
"""

from __future__ import annotations

import http.client
import http.server
import re
import secrets
import threading
from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_ANSWER = """<AssumeRoleWithWebIdentityResponse
 xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleWithWebIdentityResult>
<SubjectFromWebIdentityToken>x</SubjectFromWebIdentityToken>
<AssumedRoleUser><AssumedRoleId>r:s</AssumedRoleId><Arn>{role}</Arn></AssumedRoleUser>
<Credentials><AccessKeyId>{key}</AccessKeyId><SecretAccessKey>secret</SecretAccessKey>
<SessionToken>session</SessionToken><Expiration>{end}</Expiration></Credentials>
</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"""


class WebIdentityAws:
    """As a context manager.

    Args:
        upstream: "host:port" of S3.

    Attributes:
        roles: For each token the role that it may assume.
        prefixes: For each role "/bucket/prefix", below which its keys may read.
        list_only: Roles that may list their prefix, and read no object.
        sessions: The names of the sessions.
        keys: The keys that were given out and are valid, with their roles.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.roles: dict[str, str] = {}
        self.prefixes: dict[str, str] = {}
        self.list_only: set[str] = set()
        self.sessions: list[str] = []
        self.keys: dict[str, str] = {}

    def __enter__(self) -> WebIdentityAws:
        aws = self

        class Handler(_Handler):
            owner = aws

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def issue(self, role: str, prefix: str) -> str:
        """A new token for a role that may read below "/bucket/prefix"."""
        token = f"T0K3N-{secrets.token_hex(8)}"
        self.roles[token] = role
        self.prefixes[role] = prefix
        return token

    def expire(self, token: str) -> None:
        """End a token, and all keys of its role so far."""
        role = self.roles.pop(token)
        self.keys = {key: of for key, of in self.keys.items() if of != role}


class _Handler(http.server.BaseHTTPRequestHandler):
    owner: WebIdentityAws
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as its base
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        asked = {name: values[0] for name, values in parse_qs(body).items()}
        assert asked["Action"] == "AssumeRoleWithWebIdentity"
        role = asked["RoleArn"]
        if self.owner.roles.get(asked["WebIdentityToken"]) != role:
            self._refuse(403, "AccessDenied")
            return
        key = f"ASIA{secrets.token_hex(8).upper()}"
        self.owner.keys[key] = role
        self.owner.sessions.append(asked["RoleSessionName"])
        end = (datetime.now(timezone.utc) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._answer(200, {}, _ANSWER.format(role=role, key=key, end=end).encode())

    def do_GET(self) -> None:
        found = re.search(r"Credential=([^/]+)/", self.headers.get("authorization", ""))
        role = self.owner.keys.get(found[1] if found else "")
        if role is None:
            self._refuse(400, "ExpiredToken")
            return
        url = urlsplit(self.path)
        asked = parse_qs(url.query)
        path = unquote(url.path)
        if "prefix" in asked:
            path = f"{path.rstrip('/')}/{asked['prefix'][0]}"
        is_object = "list-type" not in asked
        is_below = f"{path}/".startswith(f"{self.owner.prefixes[role]}/")
        if not is_below or (is_object and role in self.owner.list_only):
            self._refuse(403, "AccessDenied")
            return
        upstream = http.client.HTTPConnection(self.owner.upstream, timeout=60)
        try:
            upstream.request(self.command, self.path, headers=dict(self.headers.items()))
            answer = upstream.getresponse()
            data = answer.read()
        finally:
            upstream.close()
        headers = {
            name: value
            for name, value in answer.getheaders()
            if name.lower() not in ("connection", "date", "server", "transfer-encoding")
        }
        self._answer(answer.status, headers, data)

    do_HEAD = do_GET

    def _refuse(self, status: int, code: str) -> None:
        error = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"
        body = f"<ErrorResponse>{error}</ErrorResponse>" if self.command == "POST" else error
        self._answer(status, {"content-type": "application/xml"}, body.encode())

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("content-length", str(len(body)))
        elif "content-length" not in {name.lower() for name in headers}:
            self.send_header("content-length", "0")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
