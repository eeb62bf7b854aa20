"""URIs, and the locations that they name.

ckptfs attaches exactly the location that the user has typed, or an error says how to write it.

- A percent sign and two hex digits stand for a byte. Another percent sign stands for itself.
- A question mark begins parameters, all of which must be known. In a name, write it as %3F.
- All other characters of a name stand for themselves, also ``#``, spaces and empty components.
  ckptfs never normalises Unicode.
- Control characters, and the components ``.`` and ``..``, have to be encoded in names.
- The texts after ``hf://`` and ``http(s)://`` are those of fsspec, in which nothing is decoded.

`Location.uri` is the reverse.
"""

import re
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes

from ckptfs._model.endpoints import parse_endpoint
from ckptfs._model.kinds import AZURE_DOMAINS, KINDS, SCHEMES, Kind, blob_authority, http_url
from ckptfs._model.location import Location
from ckptfs._model.manifest import printable
from ckptfs._model.uri_parameters import PARAMETERS, Option, read_parameters, unknown_parameter
from ckptfs.errors import LocationError

INSTEAD = {
    "s3a": "s3://bucket/path",
    "s3n": "s3://bucket/path",
    "wasb": "abfss://container@account.dfs.core.windows.net/path",
    "wasbs": "abfss://container@account.dfs.core.windows.net/path",
    "adl": "abfss://container@account.dfs.core.windows.net/path",
}
"""The schemes of other programs for the same stores, and the URIs of ckptfs."""
_KNOWN = "s3://, gs://, abfss://, hdfs://, file://, hf://, az:// or https://"
_AZURE = f"abfss://container@account{AZURE_DOMAINS['dfs']}/path"
_NAME = re.compile(r"(?:[A-Za-z0-9._$-]|%[0-9A-Fa-f]{2})+")
"""The name of a bucket or container."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_CREDENTIALS = "percent-encode credentials in a URI (a slash is %2F, a question mark %3F)"


class _Parts(NamedTuple):
    """The parts of a URI, not decoded. `tail` is empty or begins with a slash."""

    scheme: str
    user: str
    password: str
    host: str
    tail: str
    parameters: dict[str, str]


def parse_uri(text: str) -> Location:
    """The location that a URI names. Credentials in the URI become secrets of the location.

    Raises:
        LocationError: The URI is malformed, or has an unknown parameter. The message is one line
            without credentials.
    """
    try:
        return _parsed(text)
    except LocationError as error:
        raise LocationError(f"{shown_uri(text)}: {error}") from None


def parse_place(text: str) -> Location:
    """The location that a URI or an absolute path names. Raises LocationError."""
    if scheme_of(text):
        return parse_uri(text)
    if not text.startswith("/"):
        raise LocationError(f"{text!r} is a relative path; use an absolute path or a URI")
    if "\0" in text or text != text.encode(errors="replace").decode():
        raise LocationError(f"{text!r} is not UTF-8; rename it")
    return Location("local", text.rstrip("/") or "/")


def with_parameters(uri: str, **more: str) -> str:
    """A URI with more parameters. Raises LocationError for a parameter that is given twice."""
    if not more:
        return uri
    query = "&".join(f"{name}={quote(value, safe='/:[]')}" for name, value in more.items())
    text = f"{uri}{'&' if _query_of(uri) else '?'}{query}"
    parse_uri(text)
    return text


def anonymous_uri(text: str) -> str:
    """A URI with anonymous access. Raises LocationError for a kind of store without it."""
    kind = SCHEMES.get(scheme_of(text), "private")
    if "anonymous" not in PARAMETERS.get(kind, ()):
        raise LocationError(
            f"{shown_uri(text)}: anonymous access is for s3://, gs://, abfss:// and az:// only; "
            'the table of a named store has credentials = "anonymous"'
        )
    if parse_uri(text).options.keys() & {"anonymous", "anon"}:
        return text
    return with_parameters(text, anonymous="true")


def scheme_of(text: str) -> str:
    """The scheme of a URI; "" for another text."""
    scheme, separator, _ = text.partition("://")
    found = _SCHEME.match(text)
    if separator:
        return scheme
    return found[1] if found and found[1].lower() in {*SCHEMES, *INSTEAD} else ""


def shown_uri(text: str) -> str:
    """A URI for messages, without parameters and without texts that may be credentials."""
    scheme, separator, rest = text.partition("://")
    authority = re.split("[/?]", rest, maxsplit=1)[0]
    kind = SCHEMES.get(scheme.lower())
    row = None if kind is None else KINDS[kind]
    if "@" in rest and ":" in authority:
        rest = f"***@{rest.rpartition('@')[2]}"  # the last: a secret may hold any character
    elif "@" in authority and (row is None or not row.shows_user):
        rest = f"***@{rest.partition('@')[2]}"
    elif ":" in authority and (row is None or row.has_bucket):
        rest = f"***{rest[len(authority) :]}"
    if kind == "http":
        rest = rest.removeprefix("***@")
    return printable(f"{scheme}{separator}{rest.partition('?')[0]}")


def _parsed(text: str) -> Location:
    scheme = scheme_of(text)
    kind = _kind_of(scheme)
    if scheme == "file" and not text.startswith("file://"):  # RFC 8089 has both
        text = text.replace("file:", "file://", 1)
    if not text.startswith(f"{scheme}://"):
        raise LocationError(f"write two slashes after the scheme: {scheme}://…")
    if found := re.search(r"[\x00-\x1f\x7f]", text):
        raise LocationError(
            f"it has a control character; check the URI, or write it as %{ord(found[0]):02X}"
        )
    return _PARSERS[kind](text)


def _kind_of(scheme: str) -> Kind:
    if scheme in SCHEMES:
        return SCHEMES[scheme]
    low = scheme.lower()
    if low in SCHEMES:
        raise LocationError(f"schemes are in lower case; write {low}://…")
    if low in INSTEAD:
        raise LocationError(f"ckptfs does not support {low}://; write {INSTEAD[low]}")
    raise LocationError(f"unknown scheme; use {_KNOWN}, or give a filesystem")


# -- cutting and decoding


def _query_of(text: str) -> str:
    if scheme_of(text) == "hf":
        return text[_hf_end(text) :]
    return text.partition("?")[2]


def _cut(text: str, kind: Kind) -> _Parts:
    scheme, _, rest = text.partition("://")
    before, mark, query = rest.partition("?")
    authority, slash, path = before.partition("/")
    userinfo, at, host = authority.rpartition("@")
    if authority.startswith("arn:"):
        raise LocationError(
            "ARNs are not supported; write the alias of the access point (…-s3alias) as bucket"
        )
    if kind in ("s3", "gcs") and ":" in authority and not at:
        raise LocationError(f"its bucket has a colon; {_CREDENTIALS}")
    user, _, password = userinfo.partition(":")
    parameters = _parameters(kind, query) if mark else {}
    return _Parts(scheme, user, password, host, slash + path, parameters)


def _parameters(kind: Kind, query: str) -> dict[str, str]:
    """The names and decoded values of a query. Raises LocationError, which says how to write a
    question mark."""
    found: dict[str, str] = {}
    allowed = {*PARAMETERS[kind], *_MORE_PARAMETERS.get(kind, ())}
    for each in query.split("&"):
        name, equals, value = each.partition("=")
        if name not in allowed or not equals:
            said = "no known parameter follows"
            if name in allowed:
                said = f"parameter {name} has no value"
            elif re.fullmatch("[A-Za-z_]{1,64}", name):  # others may be a part of credentials
                said = unknown_parameter(kind, name)
            raise LocationError(
                f"'?' begins parameters ({said}); percent-encode it as %3F where it is part of a "
                "name, and check the URI"
            )
        if name in found:
            raise LocationError(f"parameter {name} is given twice; leave one out")
        found[name] = _decoded(value)
    return found


_MORE_PARAMETERS: dict[Kind, tuple[str, ...]] = {"azure": ("client_secret", "credential_kind")}
"""The parameters of pyarrow that a location has as secrets, or under another name."""


def _decoded(text: str) -> str:
    try:
        found = unquote_to_bytes(text.encode()).decode()
    except UnicodeError:
        raise LocationError("it is not UTF-8; check the URI") from None
    if "\0" in found:
        raise LocationError("it has a NUL character; check the URI")
    return found


def _bucket(text: str, what: str = "bucket") -> str:
    if not text:
        raise LocationError(f"it names no {what}; check the URI")
    name = _decoded(text)
    if not _NAME.fullmatch(text) or "/" in name or not name.isprintable():
        raise LocationError(f"{printable(text)!r} is not the name of a {what}; check the URI")
    return name


def _below(tail: str) -> str:
    """A path on an object store, decoded: "", or with a slash in front and none at the end."""
    if {".", ".."} & set(tail.split("/")):
        raise LocationError(
            "it has a '.' or '..' between slashes; write the path without, or percent-encode the "
            "dots as %2E if they are really the name"
        )
    if tail.endswith("//"):
        raise LocationError("it ends with two slashes; write it with one, or none")
    found = _decoded(tail.removesuffix("/"))
    if found.endswith("/"):
        raise LocationError("it ends with an encoded slash; leave that out")
    return found


# -- the kinds


def _s3(text: str) -> Location:
    parts = _cut(text, "s3")
    secrets: dict[str, str] = {}
    if parts.user or parts.password:
        if not (parts.user and parts.password):
            raise LocationError(f"write credentials as s3://key:secret@bucket; {_CREDENTIALS}")
        secrets = {"access_key": _decoded(parts.user), "secret_key": _decoded(parts.password)}
    path = _bucket(parts.host) + _below(parts.tail)
    return Location("s3", path, read_parameters("s3", parts.parameters), secrets)


def _gcs(text: str) -> Location:
    parts = _cut(text, "gcs")
    options = read_parameters("gcs", parts.parameters)
    if parts.user == "anonymous" and not parts.password:  # as pyarrow has it
        options["anonymous"] = True
    elif parts.user or parts.password:
        raise LocationError(
            "gs:// takes no credentials; give GOOGLE_APPLICATION_CREDENTIALS, or anonymous=true"
        )
    return Location("gcs", _bucket(parts.host) + _below(parts.tail), options)


def _azure(text: str) -> Location:
    parts = _cut(text, "azure")
    path, place_options, account, secrets = _azure_account(parts)
    given = parts.parameters
    if client_secret := given.pop("client_secret", ""):
        secrets["client_secret"] = client_secret
    how = given.pop("credential_kind", "default")
    if how not in ("default", "anonymous"):
        raise LocationError(
            f"credential_kind={printable(how)} is not supported; leave it out, because ckptfs "
            "finds the credentials in the environment"
        )
    if how == "anonymous":
        given["anonymous"] = "true"
    options = {"account_name": account, **place_options, **read_parameters("azure", given)}
    return Location("azure", path, options, secrets)


def _az(text: str) -> Location:
    parts = _cut(text, "az")
    options = read_parameters("az", parts.parameters)
    if not (parts.user or parts.password):
        return Location("az", _bucket(parts.host, "container") + _below(parts.tail), options)
    path, place_options, account, secrets = _azure_account(parts)
    if place_options:
        raise LocationError(f"az:// has no endpoints; write {_AZURE}")
    return Location("az", path, {"account_name": account, **options}, secrets)


def _azure_account(parts: _Parts) -> tuple[str, dict[str, Option], str, dict[str, str]]:
    """The path, the authorities unless they are Azure's, the account, and the secrets."""
    place, place_options, account = _azure_place(parts)
    container, _, rest = place.partition("/")
    path = _bucket(container, "container") + _below(f"/{rest}" if rest else "")
    secrets = {"account_key": _decoded(parts.password)} if parts.password else {}
    return path, place_options, account, secrets


def _azure_place(parts: _Parts) -> tuple[str, dict[str, Option], str]:
    """Container and path, not decoded; the authorities, unless they are Azure's; the account."""
    host = parts.host.lower()
    account, dot, domain = host.partition(".")
    service = next((label for label in domain.split(".") if label in ("dfs", "blob")), "")
    if dot and account and service:
        dfs = f".{domain}" if service == "dfs" else f".{domain.replace('blob.', 'dfs.', 1)}"
        place = f"{parts.user}{parts.tail}" if parts.user else parts.tail.removeprefix("/")
        if dfs == AZURE_DOMAINS["dfs"]:
            return place, {}, account
        both = {"dfs_storage_authority": dfs, "blob_storage_authority": blob_authority(dfs)}
        return place, {**both}, account
    account = _decoded(parts.user)
    if not account or not host:
        raise LocationError(f"it names no account; it must be like {_AZURE}")
    if "." not in host and ":" not in host:
        return parts.host + parts.tail, {}, account
    tls = parts.parameters.get("enable_tls", "true").lower() in ("true", "1")
    authority = parse_endpoint(parts.host, "https" if tls else "http").place
    both = {"dfs_storage_authority": authority, "blob_storage_authority": authority}
    return parts.tail.removeprefix("/"), {**both}, account


def _hdfs(text: str) -> Location:
    parts = _cut(text, "hdfs")
    if parts.user or parts.password:
        raise LocationError("write the user as a parameter: user=…")
    found = re.fullmatch(r"([A-Za-z0-9._-]*)(?::([0-9]{1,5}))?", parts.host)
    if found is None:
        raise LocationError("it must be like hdfs://host:port/path")
    host, port = found[1].lower() or "default", int(found[2] or 0)
    if parts.scheme == "viewfs":
        host = f"viewfs://{host}"
    path = _decoded(parts.tail)
    if {".", ".."} & set(path.split("/")):
        raise LocationError("it has a '.' or '..' between slashes; write the path without")
    options = {"host": host, "port": port, **read_parameters("hdfs", parts.parameters)}
    return Location("hdfs", path.rstrip("/") or "/", options)


def _local(text: str) -> Location:
    parts = _cut(text, "local")
    if parts.host or parts.user or parts.password or not parts.tail:
        raise LocationError("it must be like file:///path; check the URI")
    return Location("local", _decoded(parts.tail).rstrip("/") or "/")


def _hf_end(text: str) -> int:
    """The position where the parameters of an hf:// URI begin. Other question marks are names."""
    found = re.search(r"\?endpoint=[^?]*$", text)
    return found.start() if found else len(text)


def _hf(text: str) -> Location:
    end = _hf_end(text)
    options = {}
    if end < len(text):
        options = read_parameters("hf", {"endpoint": _decoded(text[end:].partition("=")[2])})
    path = text[:end].partition("://")[2].rstrip("/")
    if not path:
        raise LocationError("it names no repository; check the URI")
    return Location("hf", path, options)


def _http(text: str) -> Location:
    authority, _, path = text.partition("://")[2].partition("/")
    if "@" in authority or "?" in text:
        raise LocationError(
            "ckptfs cannot mount a URL with credentials or a query; give an fsspec HTTPFileSystem "
            "with client_kwargs instead"
        )
    parse_endpoint(authority, text.partition("://")[0])
    if "#" in text:
        raise LocationError("'#' begins a fragment of a URL; percent-encode it as %23")
    if {".", ".."} & set(path.split("/")):
        raise LocationError("it has a '.' or '..' between slashes; write the URL without")
    return Location("http", http_url(text).rstrip("/"))


_PARSERS: dict[Kind, Callable[[str], Location]] = {
    "s3": _s3,
    "gcs": _gcs,
    "azure": _azure,
    "az": _az,
    "hdfs": _hdfs,
    "local": _local,
    "hf": _hf,
    "http": _http,
}
