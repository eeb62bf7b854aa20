"""An HTTP server of files in memory, with the oddities of real ones as switches.

Its clock moves only when a test moves it. Its thread shares the test's interpreter: never touch an
mmap of the mount while it serves.
"""

from __future__ import annotations

import gzip
import html
import http.server
import socket
import threading
from email.utils import formatdate
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit


class Stored(NamedTuple):
    """A file: its bytes, and when it was written, seconds since the epoch."""

    data: bytes
    mtime_s: int


LOGIN = b"<html><h1>Welcome</h1><a href='help'>help</a><input type=password name=p></html>"


class HttpServer:
    """As a context manager.

    Attributes:
        files: By path ("/run/a"), as it is when decoded.
        oddities: Switches, see `_Handler`.
        statuses: Answers to "METHOD" or "METHOD path" that are a status and no more, in their
            order; the last one stays.
        redirects: From path to URL.
        cuts: So many answers with a body are cut in their middle.
        requests: "METHOD target" of each request, as it came.
        seen: The headers of each request.
        now_s: The server's clock.
        during: Called in the middle of each body.
    """

    def __init__(self, *oddities: str) -> None:
        self.files: dict[str, Stored] = {}
        self.oddities = set(oddities)
        self.statuses: dict[str, list[int]] = {}
        self.redirects: dict[str, str] = {}
        self.cuts = 0
        self.requests: list[str] = []
        self.seen: list[dict[str, str]] = []
        self.now_s = 1_800_000_000
        self.during = lambda: None
        self.url = ""

    def put(self, path: str, data: bytes, mtime_s: int = 1_700_000_000) -> None:
        """Store a file."""
        self.files[path] = Stored(data, mtime_s)

    def __enter__(self) -> HttpServer:
        told = self

        class Handler(_Handler):
            server_told = told

        self._listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._listening.daemon_threads = True
        self._thread = threading.Thread(target=self._listening.serve_forever, args=[0.01])
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._listening.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown()
        self._listening.server_close()
        self._thread.join()

    def index(self, below: str) -> bytes | None:
        """The index page of a directory ("/run/"); None: there is none."""
        names: dict[str, None] = {}
        for path in sorted(self.files):
            if path.startswith(below):
                first, slash, _ = path[len(below) :].partition("/")
                names[first + slash] = None
        if not names and below != "/empty/":
            return None
        links = "".join(f'<a href="{quote(n)}">{html.escape(n)}</a>\n' for n in names)
        title = "" if "pages without a title" in self.oddities else "<title>Index of x</title>"
        return f"<html>{title}<a href='?C=N'>Name</a>{links}</html>".encode()


class _Handler(http.server.BaseHTTPRequestHandler):
    """Oddities, each by the name that it has in `HttpServer.oddities`.

    - "no ETags", "no times", "weak ETags": of all answers.
    - "weak in the first second": as Apache's ETags are.
    - "ETags of second and size": as nginx's are.
    - "GET has other ETags": than HEAD, as of a gateway.
    - "HEAD without a length", "HEAD of no body": the latter says 0.
    - "no ranges": each answer is the whole.
    - "a range as 200", "another range", "no Content-Range", "total unknown", "small parts",
      "416 for all": wrong, or unusual, answers to ranges.
    - "chunked": bodies have no length.
    - "gzip": whatever was asked for.
    - "elsewhere": files are behind a redirect; "login": everything is.
    - "login page": everything is one.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer in parts takes 40 ms
    server_told: HttpServer

    def log_message(self, *_: object, **__: object) -> None:
        pass

    def do_GET(self) -> None:
        told = self.server_told
        told.requests.append(f"{self.command} {self.path}")
        told.seen.append({name.lower(): value for name, value in self.headers.items()})
        if self.path.startswith("http://"):  # as a proxy is asked
            self.path = urlsplit(self.path).path
        path = unquote(self.path.partition("?")[0], errors="surrogateescape")
        for key in (f"{self.command} {path}", self.command):
            if statuses := told.statuses.get(key):
                return self._send(statuses.pop(0) if len(statuses) > 1 else statuses[0])
        if target := told.redirects.get(path):
            return self._send(302, Location=target)
        if "login" in told.oddities and path != "/login":
            return self._send(302, Location="/login")
        if path == "/login" or "login page" in told.oddities:
            return self._send(200, LOGIN, Content_Type="text/html")
        if "elsewhere" in told.oddities and not path.startswith("/other") and path in told.files:
            return self._send(302, Location=f"/other{self.path}?signature=S3CR3T")
        path = path.removeprefix("/other")
        if path in told.files:
            return self._file(told.files[path])
        if (page := told.index(path)) is not None and path.endswith("/"):
            return self._send(200, page, Content_Type="text/html; charset=utf-8")
        if told.index(f"{path}/") is not None:
            return self._send(301, Location=quote(f"{path}/"))
        return self._send(404, b"<html>no such page</html>", Content_Type="text/html")

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        told = self.server_told
        told.requests.append(f"PUT {self.path}")
        if statuses := told.statuses.get("PUT"):
            return self._send(statuses[0])
        told.put(unquote(self.path), data, told.now_s)
        return self._send(201)

    def _file(self, stored: Stored) -> None:
        odd, data = self.server_told.oddities, stored.data
        about = self._version(stored)
        asked = self.headers.get("Range")
        if "gzip" in odd:
            packed = gzip.compress(data)
            return self._send(200, packed, chunked=True, Content_Encoding="gzip", **about)
        if asked is None or "no ranges" in odd:
            return self._send(200, data, chunked="chunked" in odd, **about)
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        if first >= len(data) or "416 for all" in odd:
            return self._send(416, Content_Range=f"bytes */{len(data)}")
        if "small parts" in odd:
            last = min(last, first + 999)
        if "another range" in odd:
            first, last = 0, last - first
        part = data[first : last + 1]
        if "a range as 200" in odd:
            return self._send(200, part, chunked=False, **about)
        total = "*" if "total unknown" in odd else len(data)
        if "no Content-Range" not in odd:
            about["Content_Range"] = f"bytes {first}-{first + len(part) - 1}/{total}"
        return self._send(206, part, chunked="chunked" in odd, **about)

    def _version(self, stored: Stored) -> dict[str, str]:
        odd, about = self.server_told.oddities, {}
        if "no times" not in odd:
            about["Last_Modified"] = formatdate(stored.mtime_s, usegmt=True)
        if "no ETags" not in odd:
            tag = f'"{hash(stored.data) & 0xFFFF_FFFF:x}"'
            if "ETags of second and size" in odd:
                tag = f'"{stored.mtime_s:x}-{len(stored.data):x}"'
            if "GET has other ETags" in odd and self.command == "GET":
                tag = tag[:-1] + '-gzip"'
            is_young = self.server_told.now_s - stored.mtime_s < 1
            if "weak ETags" in odd or ("weak in the first second" in odd and is_young):
                tag = "W/" + tag
            about["ETag"] = tag
        return about

    def _send(
        self, status: int, body: bytes = b"", *, chunked: bool = False, **headers: str
    ) -> None:
        told = self.server_told
        is_head = self.command == "HEAD"
        self.send_response_only(status)
        self.send_header("Date", formatdate(told.now_s, usegmt=True))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif not (is_head and "HEAD without a length" in told.oddities):
            length = 0 if is_head and "HEAD of no body" in told.oddities else len(body)
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if is_head or (not body and not chunked):
            return
        self._body(body, chunked=chunked)

    def _body(self, body: bytes, *, chunked: bool) -> None:
        told = self.server_told
        half = len(body) // 2
        for number, part in enumerate((body[:half], body[half:])):
            framed = b"%x\r\n%b\r\n" % (len(part), part) if part and chunked else part
            try:
                self.wfile.write(framed)
            except OSError:  # the client has seen enough
                self.close_connection = True
                return
            if number == 0 and told.cuts:
                told.cuts -= 1
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            told.during()
        if chunked:
            self.wfile.write(b"0\r\n\r\n")
