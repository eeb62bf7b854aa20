"""Where a checkpoint is: a filesystem's kind and options, and a path on it.

A location is what crosses the control socket instead of a pickled filesystem. What identifies it is
public; credentials travel beside it in `secrets`, live in memory only, and are left out of `repr`,
URIs, digests and everything that is stored.
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Literal
from urllib.parse import quote, unquote

import msgspec

from ckptfs._model.endpoints import parse_endpoint
from ckptfs._model.uriparameters import Option, endpoint_in, own_region, write_parameters
from ckptfs.errors import LocationError

Kind = Literal["s3", "gcs", "azure", "hdfs", "local", "hf", "http", "az", "private", "named"]
"""Types of filesystems. `hf`, `http` and `az` are fsspec's; `private` is one that is not described:
a private daemon has the filesystem itself; `named` is a store that the daemon is to look up."""

# Checked where a location arrives from another process. S3's keys have 1,024 bytes at most, and
# session tokens some thousands.
_Name = Annotated[str, msgspec.Meta(max_length=64)]
_Text = Annotated[str, msgspec.Meta(max_length=16_384)]
_FEW = msgspec.Meta(max_length=32)

AZURE_DOMAINS = {"blob": ".blob.core.windows.net", "dfs": ".dfs.core.windows.net"}
"""The authority of each service, behind the account's name."""
_PATH_SAFE = "/=,"
"""Characters of names that URIs have as they are, besides RFC 3986's unreserved ones. The others
are encoded, because terminals, shells and other programs change or cut URIs at some of them."""
_IN_AUTHORITY = ("account_name", "host", "port")


class StoreRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A named store, by whose credentials a location is read, and its own path."""

    name: str
    root: str


class Location(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True, omit_defaults=True
):
    """A directory on a described filesystem.

    What follows from the fields is computed once: it is asked for with every file.

    Attributes:
        kind: The type of filesystem.
        path: Path on it, without leading scheme or trailing slash, e.g. ``bucket/run/checkpoint``.
        options: Public constructor options of the filesystem (allow-listed where it is built).
        secrets: Credentials among its options. Never printed, hashed or stored.
        store: The named store that it lies in. Only a daemon itself says so, of what it has looked
            up: see ``ckptfs._daemon.stores``.
        implied: Names of options that the caller's environment gave, and not the URI or the
            filesystem. `uri` leaves them out, because the environment gives them again.
    """

    kind: Kind
    path: Annotated[str, msgspec.Meta(max_length=8192)]
    options: Annotated[dict[_Name, _Text | int | float | bool], _FEW] = {}
    secrets: Annotated[dict[_Name, _Text], _FEW] = {}
    store: StoreRef | None = None
    implied: Annotated[tuple[_Name, ...], _FEW] = ()

    def __repr__(self) -> str:
        return f"Location({self.uri!r})"

    @functools.cached_property
    def identity(self) -> str:
        """Text that is equal for two locations exactly when they name the same directory."""
        path = http_url(self.path) if self.kind == "http" else self.path
        return json.dumps([self.kind, _identifying(self.kind, self.options), path], sort_keys=True)

    @functools.cached_property
    def store_identity(self) -> str:
        """Like `identity`, without the path: equal for locations in the same store."""
        return msgspec.structs.replace(self, path="").identity

    @functools.cached_property
    def digest(self) -> str:
        """12 hex digits of the identity's hash; part of the directory name inside the mount."""
        return hashlib.blake2b(self.identity.encode(), digest_size=6).hexdigest()

    @property
    def name(self) -> str:
        """The checkpoint's own name: its last path component, made safe for a file name."""
        last = self.path.rstrip("/").rsplit("/", 1)[-1]
        if self.kind == "http":
            last = unquote(last)
        safe = re.sub(r"[^A-Za-z0-9._+=@-]", "_", last)
        return safe[:100].lstrip(".") or "checkpoint"

    @property
    def directory(self) -> str:
        """Its directory in the mount, for one user: name and digest."""
        return f"{self.name}-{self.digest}"

    def below(self, path: str) -> "Location":
        """The location of a relative path, whose names are decoded, below this one; "": this
        one."""
        if not path:
            return self
        text = quoted(path) if self.kind == "http" else path
        return msgspec.structs.replace(self, path=f"{self.path.rstrip('/')}/{text}")

    @property
    def uri(self) -> str:
        """A URI without secrets, that names this directory and can be attached again."""
        if self.store is not None:
            return f"{self.store.name}:{self.path[len(self.store.root) :].lstrip('/')}"
        if self.kind == "named":
            return f"{self.options.get('store', '')}:{self.path}"
        if self.kind == "http":
            return self.path
        left_out = set(self.implied) - set(_IN_AUTHORITY)
        shown = {name: value for name, value in self.options.items() if name not in left_out}
        if self.kind == "hf":  # as fsspec takes it: there is nothing encoded in it
            return f"hf://{self.path}{write_parameters('hf', shown)}"
        path = quoted(self.path)
        if self.kind == "private":
            return f"private://{path}"
        if self.kind == "azure":
            return _azure_uri(path, shown)
        if self.kind == "az" and self.options.get("account_name"):
            container, _, rest = path.partition("/")
            path = f"{container}@{self.options['account_name']}{AZURE_DOMAINS['dfs']}/{rest}"
        elif self.kind == "hdfs":
            path = _hdfs_place(shown) + path
        scheme = {"gcs": "gs", "local": "file", "hdfs": ""}.get(self.kind, self.kind)
        beginning = f"{scheme}://" if scheme else ""
        return f"{beginning}{path}{write_parameters(self.kind, shown)}"


def quoted(path: str) -> str:
    """A path as URIs have it. Components that other programs would resolve are encoded, too."""
    parts = quote(path, safe=_PATH_SAFE, errors="surrogatepass").split("/")
    return "/".join(part.replace(".", "%2E") if part in (".", "..") else part for part in parts)


def http_url(url: str) -> str:
    """A URL with its host in lower case, and without its scheme's own port; a malformed one as it
    is."""
    scheme, _, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    try:
        return parse_endpoint(authority, scheme).text + slash + path
    except LocationError:
        return url


# -- what identifies a store


def _identifying(kind: Kind, options: Mapping[str, Option]) -> dict[str, Option]:
    """The options that tell one store from another of the same kind, in one spelling. A region or
    anonymous access does not."""
    if kind in ("s3", "gcs"):
        return _identifying_server(kind, options)
    if kind == "azure":
        return {"account_name": options.get("account_name", ""), **_identifying_azure(options)}
    if kind == "hdfs":
        return {"host": _hdfs_host(options), "port": options.get("port", 0)}
    if kind == "hf":
        endpoint = str(options.get("endpoint") or "")
        is_own = http_url(endpoint).rstrip("/") == "https://huggingface.co"
        return {"endpoint": "" if is_own else http_url(endpoint).rstrip("/")}
    names = {"az": "account_name", "named": "store"}
    return {names[kind]: options.get(names[kind], "")} if kind in names else {}


def _identifying_server(kind: str, options: Mapping[str, Option]) -> dict[str, Option]:
    endpoint = endpoint_in(options)
    region = str(options.get("region") or "")
    if endpoint is not None:
        own = own_region(kind, endpoint)
        if own is None:
            return {"endpoint_override": endpoint.place, "scheme": endpoint.scheme}
        return {"endpoint_override": "", "scheme": "https", **_partition(own or region)}
    place = options.get("endpoint_override", "")  # a malformed one, if any
    is_plain = kind == "s3" and options.get("scheme") == "http"
    found: dict[str, Option] = {
        "endpoint_override": place,
        "scheme": "http" if is_plain else "https",
    }
    return found if place or kind == "gcs" else found | _partition(region)


def _partition(region: str) -> dict[str, Option]:
    """The part of Amazon that a region is in, in which names of buckets are unique; nothing for the
    one that is not China's or a government's."""
    found = re.match("cn-|us-gov-|us-iso[a-z]?-|eu-isoe-", region)
    return {"partition": found[0]} if found else {}


def _identifying_azure(options: Mapping[str, Option]) -> dict[str, Option]:
    """Listings and reads go to the blob service."""
    text = str(options.get("blob_storage_authority") or AZURE_DOMAINS["blob"]).lower()
    scheme = str(options.get("blob_storage_scheme") or "https")
    if not text.startswith("."):
        try:
            return {"blob_storage_authority": parse_endpoint(text, scheme).text}
        except LocationError:
            pass
    return {"blob_storage_authority": text}


# -- URIs of kinds whose authority holds options


def _hdfs_host(options: Mapping[str, Option]) -> str:
    return str(options.get("host") or "default").lower().removeprefix("hdfs://")


def _hdfs_place(options: Mapping[str, Option]) -> str:
    host = _hdfs_host(options)
    place = host if "://" in host else f"hdfs://{'' if host == 'default' else host}"
    port = options.get("port")
    return f"{place}:{port}" if port and host != "default" else place


def _azure_uri(path: str, options: Mapping[str, Option]) -> str:
    """The endpoint is in the authority, as pyarrow has it, if that can say it."""
    container, _, rest = path.partition("/")
    account = options.get("account_name", "")
    blob, dfs = (
        str(options.get(f"{name}_storage_authority") or AZURE_DOMAINS[name]).lower()
        for name in ("blob", "dfs")
    )
    plain = dict(options)
    beginning = f"abfss://{container}@{account}{AZURE_DOMAINS['dfs']}"
    if dfs == blob and (place := _azure_place(blob, options)):
        beginning = f"abfss://{quote(str(account), safe='')}@{place}/{container}"
        del plain["blob_storage_authority"], plain["dfs_storage_authority"]
    elif dfs.startswith(".") and "dfs" in dfs.split(".") and blob == blob_authority(dfs):
        beginning = f"abfss://{container}@{account}{dfs}"
        plain.pop("blob_storage_authority", None)
        plain.pop("dfs_storage_authority", None)
    return f"{beginning}{'/' if rest else ''}{rest}{write_parameters('azure', plain)}"


def blob_authority(dfs: str) -> str:
    """The authority of the blob service beside that of the other one."""
    return dfs.replace("dfs.", "blob.", 1)


def _azure_place(authority: str, options: Mapping[str, Option]) -> str:
    """Host and port of a server whose URLs have the account in their path; "": a URI's authority
    cannot say it."""
    schemes = {options.get(f"{name}_storage_scheme", "https") for name in ("blob", "dfs")}
    scheme = str(schemes.pop())
    if schemes or authority.startswith("."):
        return ""
    try:
        endpoint = parse_endpoint(authority, scheme)
    except LocationError:
        return ""
    if endpoint.path or {"dfs", "blob"} & set(endpoint.host.split(".")[1:]):
        return ""
    if endpoint.port is None and "." not in endpoint.host:  # else it would be a container's name
        return f"{endpoint.authority}:{443 if scheme == 'https' else 80}"
    return endpoint.authority
