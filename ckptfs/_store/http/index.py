"""Index pages of HTTP servers: the files and directories that they link to.

nginx, Apache, Python's http.server, Caddy, ``rclone serve http`` and others write such pages. All
of them have links (<a href>) to URLs below the page's own.
"""

from html.parser import HTMLParser
from typing import NamedTuple
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

_SIGNS = ("index of", "directory listing", "listing of", "parent directory")
"""The words in titles and links of index pages of Apache, nginx, Python and rclone, in lower
case."""


class Entry(NamedTuple):
    """A link. `name` is decoded, with surrogates (PEP 383) for bytes that are not UTF-8."""

    name: str
    is_directory: bool


class IndexPage(HTMLParser):
    """The parser of a page.

    Attributes:
        has_begun: Whether the page has a start tag that needs an end tag.
        has_end: Whether the page has that end tag, so it is not cut.
        has_password_field: Whether the page asks for a password.
        is_index: Whether the page says that it lists a directory.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self._base = url
        self._below = urlsplit(url).path.rstrip("/") + "/"
        self._hosts = {urlsplit(url).netloc}
        self._hrefs: dict[str, None] = {}  # in their order
        self._is_title = False
        self.has_begun = False
        self.has_end = False
        self.has_password_field = False
        self.is_index = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.has_begun |= tag in ("html", "body")
        self._is_title = tag in ("title", "h1", "h2", "a")
        if tag == "base" and (href := given.get("href")):
            self._base = urljoin(self._base, href)
        elif tag == "a" and (href := given.get("href")):
            self._hrefs[href.strip()] = None
            self.is_index |= href.strip() in ("../", "..")
        elif tag == "input" and given.get("type") == "password":
            self.has_password_field = True

    def handle_endtag(self, tag: str) -> None:
        self._is_title = False
        self.has_end |= tag in ("html", "body")

    def handle_data(self, data: str) -> None:
        if self._is_title:
            text = data.lower()
            self.is_index |= any(sign in text for sign in _SIGNS)

    def entries(self) -> list[Entry]:
        """The names directly below the page, each once."""
        found = (self._entry_of(href) for href in self._hrefs)
        return list(dict.fromkeys(entry for entry in found if entry is not None))

    def _entry_of(self, href: str) -> Entry | None:
        if "?" in href or "#" in href:  # links that sort the page, or lead to a part of it
            return None
        try:
            target = urlsplit(urljoin(self._base, href))
        except ValueError:
            return None
        if target.scheme not in ("http", "https") or target.netloc not in self._hosts:
            return None
        if not target.path.startswith(self._below):
            return None
        rest = target.path[len(self._below) :]
        component = rest.removesuffix("/")
        if not component or "/" in component:
            return None
        name = unquote_to_bytes(component.encode("utf-8", "surrogateescape"))
        return Entry(name.decode("utf-8", "surrogateescape"), rest.endswith("/"))
