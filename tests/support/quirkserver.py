"""An S3 server in threads of the test that differs from Amazon's as it is told.

Each irregularity is a switch: a name of `LISTINGS`, `ANSWERS_OF_OBJECTS` or `ERRORS`. All of them
are those of servers, gateways and proxies that people have. Times, ETags and bytes are right where
no switch says otherwise.
"""

from __future__ import annotations

import gzip
import re
import threading
import time
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, quote_plus, unquote, urlsplit
from xml.sax.saxutils import escape

from support.faultserver import Answer, FaultServer, Object

if TYPE_CHECKING:
    from collections.abc import Callable

LISTINGS = (
    "V1 only",
    "no token",
    "token ignored",
    "token and start-after ignored",
    "the same token again",
    "pages without names",
    "a token at the end",
    "flag True",
    "flag TRUE with spaces",
    "flag 1",
    "no flag but a token",
    "no flag but a marker",
    "no flag but a full page",
    "no sign of more",
    "no sign of more, and start-after ignored",
    "flag false with a token",
    "fewer than counted",
    "start-after inclusive",
    "encoding ignored",
    "encoding not said",
    "encoding said and not done",
    "spaces as %20",
    "empty Contents",
    "a delimiter of its own",
    "names out of order",
    "a namespace",
    "ETags without quotes",
    "times with an offset",
    "times in microseconds",
    "times in whole seconds",
    "no times in listings",
    "no ETags in listings",
    "sizes with spaces",
)
"""Irregular listings, all of which are whole."""

OBJECTS = (
    "weak ETags",
    "weak ETags in listings",
    "other ETags in listings",
    "other ETags in HEAD",
    "no ETags but in listings",
    "no ETags",
    "no ETags in GET",
    "If-Match is never met",
    "conditions are 501",
    "no Last-Modified",
    "no times",
    "Last-Modified rounded up",
    "Last-Modified of another zone",
    "HEAD without a length",
    "HEAD is 405",
    "HEAD is 403",
    "size unknown in ranges",
    "odd Content-Range",
    "200 with Content-Range",
    "chunked ranges",
    "longer ranges",
    "gzip stored",
    "403 for what is missing",
    "PUT wants a checksum",
    "PUT without ETag",
)
"""Irregular answers of objects, which are all the same right."""

ERRORS = {
    "the same page for ever": ("list", "listing is incomplete"),
    "new tokens for ever": ("list", "listing is incomplete"),
    "names of elsewhere": ("list", "not below 'run 1/'"),
    "a name twice": ("list", "twice, as two different objects"),
    "an object without a name": ("list", "without a name"),
    "listing is HTML": ("list", "<html> instead of a listing"),
    "listing is empty": ("list", "not valid XML"),
    "listing is cut": ("list", "not valid XML"),
    "listing is another XML": ("list", "<Error> instead of a listing"),
    "ranges ignored": ("part", "the answer is the whole object"),
    "another range": ("read", "other bytes than were asked for"),
    "multipart ranges": ("read", "a part that it does not name (multipart/byteranges"),
    "gzip on the way": ("read", "compressed (gzip)"),
    "objects are HTML": ("all", "web page"),
    "another size in ranges": ("read", "contradicts itself"),
    "416 for ranges": ("read", "contradicts itself"),
    "PUT is HTML": ("put", "web page"),
    "PUT does nothing": ("put", "does not have the object"),
}
"""The quirks that make an operation fail, each with the operation and the words of its error."""

_HTML = b"<!DOCTYPE html><html><body>Please log in.</body></html>"
_TIME_FORMATS = {
    "times with an offset": ".000+00:00",
    "times in microseconds": ".000000Z",
    "times in whole seconds": "Z",
}


class QuirkServer(FaultServer):
    """A context manager. `quirks`: which; `page_names`: names in a page.

    Attributes:
        requests: Method, target and headers of each.
        archived: Storage classes of objects, by bucket and key.
        codes: The status and code that GET and PUT of these are answered with, by bucket and key.
        first_page_s: How long the first byte of a listing takes.
    """

    def __init__(self, *quirks: str, page_names: int = 1000) -> None:
        super().__init__()
        unknown = set(quirks) - {*LISTINGS, *OBJECTS, *ERRORS}
        assert not unknown, unknown
        self.quirks = set(quirks)
        self.page_names = page_names
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.archived: dict[str, str] = {}
        self.restored: set[str] = set()
        self.codes: dict[str, tuple[int, str, str]] = {}
        self.first_page_s = 0.0
        self._cursor = 0
        self._counter = 0
        self._counting = threading.Lock()

    def _has(self, *names: str) -> bool:
        return any(name in self.quirks for name in names)

    def _answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        self.requests.append((method, target, headers))
        url = urlsplit(target)
        bucket, _, key = unquote(url.path, errors="surrogateescape").lstrip("/").partition("/")
        query = {
            name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()
        }
        if not key:
            time.sleep(self.first_page_s)
            return _sent(
                200, {"Content-Type": "application/xml"}, self._page(bucket, query, headers)
            )
        refusal = self._refused(method, f"{bucket}/{key}", headers)
        if refusal is not None:
            return refusal
        if self._has("If-Match is never met") and "if-match" in headers:
            return _refusal(412, "PreconditionFailed", method)
        if self._has("conditions are 501") and {"if-match", "if-none-match"} & headers.keys():
            return _refusal(501, "NotImplemented", method)
        if self._has("no ETags", "no ETags but in listings", "weak ETags", "other ETags in HEAD"):
            # Conditions are looked at with another ETag than the one that was asked with, or none.
            headers = {n: v for n, v in headers.items() if n not in ("if-match", "if-none-match")}
        if self._has("ranges ignored", "objects are HTML", "gzip on the way"):
            headers = {name: value for name, value in headers.items() if name != "range"}
        if method == "PUT" and self._has("PUT does nothing", "PUT is HTML"):
            is_html = self._has("PUT is HTML")
            return _sent(200, {"Content-Type": "text/html"} if is_html else {}, _HTML * is_html)
        right = super()._answer(method, target, headers, body)
        return self._changed(method, right) if right.status < 400 else self._error(method, right)

    def _refused(self, method: str, name: str, headers: dict[str, str]) -> Answer | None:
        if name in self.codes:
            return _refusal(*self.codes[name][:2], method, self.codes[name][2])
        if method == "PUT" and self._has("PUT wants a checksum") and "content-md5" not in headers:
            return _refusal(400, "InvalidRequest", method, "Content-MD5 is required")
        if method == "HEAD" and self._has("HEAD is 405", "HEAD is 403"):
            status = 405 if self._has("HEAD is 405") else 403
            return _refusal(status, "MethodNotAllowed", method)
        if name in self.archived and name not in self.restored and method == "GET":
            return _refusal(403, "InvalidObjectState", method)
        if self._has("416 for ranges") and "range" in headers:
            return _refusal(416, "InvalidRange", method)
        return None

    def _error(self, method: str, right: Answer) -> Answer:
        if right.status == 404 and self._has("403 for what is missing"):
            return _refusal(403, "AccessDenied", method)
        return right

    # -- objects

    def _changed(self, method: str, right: Answer) -> Answer:
        headers, body, status = dict(right.headers), right.body, right.status
        self._change_version(method, headers)
        if self._has("HEAD without a length") and method == "HEAD":
            headers.pop("Content-Length", None)
        if self._has("gzip stored"):
            headers["Content-Encoding"] = "gzip"
        if self._has("objects are HTML") and method != "PUT":
            headers = {
                "Content-Type": "text/html; charset=utf-8",
                "Content-Length": str(len(_HTML)),
            }
            body, status = _HTML, 200
        if self._has("gzip on the way") and method == "GET":
            body = gzip.compress(body)
            headers["Content-Encoding"] = "gzip"
            headers["Content-Length"] = str(len(body))
        if "Content-Range" in headers:
            status, body = self._change_range(status, headers, body)
        return Answer(status, headers, body, right.has_body)

    def _change_version(self, method: str, headers: dict[str, str]) -> None:
        etag = headers.get("ETag", "")
        if etag and self._has("weak ETags"):
            headers["ETag"] = f"W/{etag}"
        if etag and self._has("other ETags in HEAD") and method == "HEAD":
            headers["ETag"] = etag.replace('"', '"head-', 1)
        if (
            self._has("no ETags", "no ETags but in listings")
            or (self._has("no ETags in GET") and method == "GET")
            or (self._has("PUT without ETag") and method == "PUT")
        ):
            headers.pop("ETag", None)
        found = headers.get("Last-Modified", "")
        if self._has("no Last-Modified", "no times"):
            headers.pop("Last-Modified", None)
        elif found and self._has("Last-Modified rounded up"):
            headers["Last-Modified"] = found.replace(":00 GMT", ":01 GMT")
        elif found and self._has("Last-Modified of another zone"):
            headers["Last-Modified"] = re.sub(r"(\d\d):(\d\d:\d\d) GMT", r"03:\2 GMT", found)

    def _change_range(self, status: int, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        where = headers["Content-Range"]
        if self._has("size unknown in ranges"):
            headers["Content-Range"] = where.partition("/")[0] + "/*"
        if self._has("odd Content-Range"):
            headers["Content-Range"] = where.replace("bytes ", "Bytes=")
        if self._has("another size in ranges"):
            headers["Content-Range"] = where.partition("/")[0] + "/999999"
        if self._has("another range"):
            headers["Content-Range"] = re.sub(r"(\d+)-(\d+)", r"1\1-1\2", where)
        if self._has("multipart ranges"):
            del headers["Content-Range"]
            headers["Content-Type"] = "multipart/byteranges; boundary=x"
        if self._has("200 with Content-Range"):
            status = 200
        if self._has("longer ranges"):
            body += b"more"
            headers["Content-Length"] = str(len(body))
        if self._has("chunked ranges"):
            del headers["Content-Length"]
            headers["Transfer-Encoding"] = "chunked"
            body = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
        return status, body

    # -- listings

    def _page(self, bucket: str, query: dict[str, str], headers: dict[str, str]) -> bytes:
        for name, page in (
            ("listing is HTML", b"<html><body>Please log in.</body></html>"),
            ("listing is empty", b""),
            ("listing is another XML", b"<Error><Code>Odd</Code></Error>"),
        ):
            if self._has(name):
                return page
        prefix = query.get("prefix", "")
        names = sorted(name[len(bucket) + 1 :] for name in self.objects)
        names = [name for name in names if name.startswith(prefix)]
        inner: list[str] = []
        if self._has("a delimiter of its own"):
            inner = sorted(
                {
                    prefix + n[len(prefix) :].partition("/")[0] + "/"
                    for n in names
                    if "/" in n[len(prefix) :]
                }
            )
            names = [name for name in names if "/" not in name[len(prefix) :]]
        is_v2 = query.get("list-type") == "2" and not self._has("V1 only")
        shown, rest, token = self._cut(names, query, is_v2)
        shows_v1 = not is_v2 or self._has("no flag but a marker")
        return self._xml(bucket, query, headers, shown, rest, "" if shows_v1 else token, inner)

    def _cut(
        self, names: list[str], query: dict[str, str], is_v2: bool
    ) -> tuple[list[str], bool, str]:
        """The names of a page, whether there are more, and the token of the next one."""
        most = min(int(query.get("max-keys") or self.page_names), self.page_names)
        token = query.get("continuation-token", "") if is_v2 else ""
        if self._has("token ignored", "token and start-after ignored", "the same page for ever"):
            token = ""
        after = token[1:] or query.get("start-after" if is_v2 else "marker", "")
        if is_v2 and self._has(
            "token and start-after ignored", "no sign of more, and start-after ignored"
        ):
            after = ""
        if self._has("the same page for ever"):
            after = ""
        if self._has("the same token again"):
            self._cursor = 0 if not token else self._cursor + most
            return self._with_token(names[self._cursor :], most, "=again")
        if self._has("new tokens for ever"):
            with self._counting:
                self._counter += 1
            return [], True, f"={self._counter}"
        if self._has("start-after inclusive"):
            left = [name for name in names if name >= after]
        else:
            left = [name for name in names if name > after]
        if self._has("pages without names") and not token.startswith("-"):
            return [], bool(left), f"-{after}"
        return self._with_token(left, most, "")

    @staticmethod
    def _with_token(left: list[str], most: int, token: str) -> tuple[list[str], bool, str]:
        shown = left[:most]
        has_more = len(left) > most
        return shown, has_more, (token or f"={shown[-1]}") if has_more else ""

    def _xml(
        self,
        bucket: str,
        query: dict[str, str],
        headers: dict[str, str],
        shown: list[str],
        has_more: bool,
        token: str,
        inner: list[str],
    ) -> bytes:
        show = self._encoder(query)
        text = self._flag(has_more, bool(token))
        hides = self._has("no token", "no flag but a full page", "start-after inclusive")
        hides = hides or self._has_no_sign()
        if token and not hides:
            text += f"<NextContinuationToken>{escape(token)}</NextContinuationToken>"
        elif self._has("a token at the end", "flag false with a token") and not token:
            text += f"<NextContinuationToken>={escape(shown[-1] if shown else '')}"
            text += "</NextContinuationToken>"
        if has_more and self._has("no flag but a marker"):
            text += f"<NextMarker>{escape(show(shown[-1]))}</NextMarker>"
        if "encoding-type" in query and not self._has("encoding ignored", "encoding not said"):
            text += "<EncodingType>url</EncodingType>"
        text += f"<Prefix>{escape(show(query.get('prefix', '')))}</Prefix>"
        count = len(shown) + (1 if self._has("fewer than counted") else 0)
        if not self._has_no_sign():
            text += f"<MaxKeys>{self.page_names}</MaxKeys><KeyCount>{count}</KeyCount>"
        if self._has("empty Contents"):
            text += "<Contents/>"
        if self._has("an object without a name"):
            text += "<Contents><Size>5</Size></Contents>"
        if self._has("names out of order"):
            shown = shown[::-1]
        if self._has("names of elsewhere"):
            shown = ["elsewhere/x", *shown]
        items = [self._item(bucket, name, show, headers) for name in shown]
        if self._has("a name twice") and items:
            items.append(re.sub("<Size>[0-9]+", "<Size>77", items[0]))
        text += "".join(items)
        text += "".join(
            f"<CommonPrefixes><Prefix>{escape(show(name))}</Prefix></CommonPrefixes>"
            for name in inner
        )
        space = (
            ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"' if self._has("a namespace") else ""
        )
        whole = f"<ListBucketResult{space}>{text}</ListBucketResult>".encode()
        return whole[: len(whole) * 2 // 3] if self._has("listing is cut") else whole

    def _has_no_sign(self) -> bool:
        return self._has("no sign of more", "no sign of more, and start-after ignored")

    def _flag(self, has_more: bool, has_token: bool) -> str:
        if self._has("no flag but a token", "no flag but a marker", "no flag but a full page"):
            return ""
        if self._has_no_sign():
            return ""
        said = str(has_more).lower()
        for name, yes in (
            ("flag True", "True"),
            ("flag TRUE with spaces", "\n TRUE "),
            ("flag 1", "1"),
            ("flag false with a token", "false"),
        ):
            if self._has(name):
                said = yes if has_more else "False"
        return f"<IsTruncated>{said}</IsTruncated>"

    def _encoder(self, query: dict[str, str]) -> Callable[[str], str]:
        if "encoding-type" not in query or self._has(
            "encoding ignored", "encoding said and not done"
        ):
            return str
        if self._has("spaces as %20"):
            return lambda name: quote(name, safe="/+()", errors="surrogateescape")
        return lambda name: quote_plus(name, safe="/", errors="surrogateescape")

    def _item(
        self, bucket: str, name: str, show: Callable[[str], str], headers: dict[str, str]
    ) -> str:
        found = self.objects.get(f"{bucket}/{name}") or Object(b"", 1_500_000_000)
        text = f"<Key>{escape(show(name))}</Key>"
        size = f"\n {len(found.data)} " if self._has("sizes with spaces") else str(len(found.data))
        text += f"<Size>{size}</Size>"
        if not self._has("no times", "no times in listings"):
            ending = next((e for n, e in _TIME_FORMATS.items() if self._has(n)), ".670Z")
            moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(found.mtime_s))
            text += f"<LastModified>{moment}{ending}</LastModified>"
        if not self._has("no ETags", "no ETags in listings"):
            etag = found.etag
            if self._has("other ETags in listings", "other ETags in HEAD"):
                etag = etag.replace('"', '"list-', 1)
            etag = f"W/{etag}" if self._has("weak ETags", "weak ETags in listings") else etag
            etag = etag.strip('"') if self._has("ETags without quotes") else etag
            text += f"<ETag>{escape(etag)}</ETag>"
        kind = self.archived.get(f"{bucket}/{name}", "STANDARD")
        text += f"<StorageClass>{kind}</StorageClass>"
        asked = headers.get("x-amz-optional-object-attributes", "")
        if asked == "RestoreStatus" and f"{bucket}/{name}" in self.restored:
            text += (
                "<RestoreStatus><IsRestoreInProgress>false</IsRestoreInProgress>"
                "<RestoreExpiryDate>2030-01-01T00:00:00Z</RestoreExpiryDate></RestoreStatus>"
            )
        return f"<Contents>{text}</Contents>"


def _sent(status: int, headers: dict[str, str], body: bytes) -> Answer:
    return Answer(status, {**headers, "Content-Length": str(len(body))}, body, True)


def _refusal(status: int, code: str, method: str, message: str = "planned") -> Answer:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    return _sent(status, {}, body)._replace(has_body=method != "HEAD")
