"""The kinds of stores as a location, its URI and the table of a named store show them.

There is one row for each kind. A new kind is a row here, a row in ``ckptfs._store.kinds``, which
says how the store is described and opened, a parser of its URIs in ``uris``, and the module that
reads the store.
"""

import contextlib
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, TypeAlias
from urllib.parse import quote

import msgspec

from ckptfs._model.endpoints import Endpoint, parse_endpoint
from ckptfs._model.uri_parameters import (
    Option,
    endpoint_in,
    endpoint_options,
    own_region,
    write_parameters,
)
from ckptfs.errors import LocationError

Kind = Literal["s3", "gcs", "azure", "hdfs", "local", "hf", "http", "az", "private", "named"]
"""Types of filesystems. `hf`, `http` and `az` are those of fsspec. A private daemon has the
filesystem of a `private` location itself. The daemon looks a `named` store up."""
Options: TypeAlias = Mapping[str, Option]

AZURE_DOMAINS = {"blob": ".blob.core.windows.net", "dfs": ".dfs.core.windows.net"}
"""The authority of each service, behind the account's name."""
_PATH_SAFE = "/=,"
"""Characters of names that URIs have as they are, besides RFC 3986's unreserved ones. The others
are encoded, because terminals, shells and other programs change or cut URIs at some of them."""
_HUGGING_FACE = "https://huggingface.co"


class TableRules(msgspec.Struct, frozen=True):
    """The keys that the table of a named store may have, besides `uri`, `users` and `groups`.

    Attributes:
        keys: The other keys of the table, without `credentials`.
        credentials: The forms of `credentials`: "anonymous", "file", "environment", "profile".
        endpoint: The options for the table's endpoint; its second argument are those of the URI.
    """

    keys: frozenset[str] = frozenset()
    credentials: frozenset[str] = frozenset()
    endpoint: Callable[[Endpoint, Options], Options] = lambda endpoint, options: {}


class KindRow(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of store.

    Attributes:
        uri: The URI for a path and options.
        identity: The options that tell one store from another of the same kind, in one spelling.
            A region or anonymous access does not.
        schemes: The schemes of its URIs. The first is that of named stores.
        has_bucket: Whether the authority of its URIs names a bucket or container.
        shows_user: Whether text before an "@" in its authority is not a credential.
        table: The rules for a named store; None if a named store cannot be of this kind.
    """

    uri: Callable[[str, Options], str]
    identity: Callable[[Options], Options] = lambda options: {}
    schemes: tuple[str, ...] = ()
    has_bucket: bool = False
    shows_user: bool = False
    table: TableRules | None = None


def quoted(path: str) -> str:
    """A path as URIs have it. Components that other programs would resolve are encoded, too."""
    parts = quote(path, safe=_PATH_SAFE, errors="surrogatepass").split("/")
    return "/".join(part.replace(".", "%2E") if part in (".", "..") else part for part in parts)


def http_url(url: str) -> str:
    """A URL with its host in lower case, and without the default port of its scheme. A malformed
    URL stays as it is."""
    scheme, _, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    try:
        return parse_endpoint(authority, scheme).text + slash + path
    except LocationError:
        return url


def _plain_uri(scheme: str, kind: str, path: str, options: Options) -> str:
    return f"{scheme}://{quoted(path)}{write_parameters(kind, options)}"


# -- S3 and Google


def _identity_of_server(kind: str, options: Options) -> dict[str, Option]:
    endpoint = endpoint_in(options)
    region = str(options.get("region") or "")
    if endpoint is not None:
        own = own_region(kind, endpoint)
        if own is None:
            return {"endpoint_override": endpoint.place, "scheme": endpoint.scheme}
        return {"endpoint_override": "", "scheme": "https", **_partition(own or region)}
    place = options.get("endpoint_override", "")  # a malformed one, if any
    scheme = "http" if kind == "s3" and options.get("scheme") == "http" else "https"
    found: dict[str, Option] = {"endpoint_override": place, "scheme": scheme}
    return found if place or kind == "gcs" else found | _partition(region)


def _partition(region: str) -> dict[str, Option]:
    """The part of Amazon that a region is in, because names of buckets are unique within a part.
    Nothing for the part that is not China's or a government's."""
    found = re.match("cn-|us-gov-|us-iso[a-z]?-|eu-isoe-", region)
    return {"partition": found[0]} if found else {}


# -- Azure


def _azure_identity(options: Options) -> dict[str, Option]:
    """Listings and reads go to the blob service, so its authority counts."""
    text = str(options.get("blob_storage_authority") or AZURE_DOMAINS["blob"]).lower()
    scheme = str(options.get("blob_storage_scheme") or "https")
    if not text.startswith("."):
        with contextlib.suppress(LocationError):
            text = parse_endpoint(text, scheme).text
    return {"account_name": options.get("account_name", ""), "blob_storage_authority": text}


def _azure_uri(path: str, options: Options) -> str:
    """The URI, with the endpoint in its authority as in pyarrow's if it fits there."""
    path = quoted(path)
    container, _, rest = path.partition("/")
    account = options.get("account_name", "")
    blob, dfs = (
        str(options.get(f"{name}_storage_authority") or AZURE_DOMAINS[name]).lower()
        for name in ("blob", "dfs")
    )
    beginning, shown = f"abfss://{container}@{account}{AZURE_DOMAINS['dfs']}", options
    others = {name: v for name, v in options.items() if not name.endswith("_storage_authority")}
    if dfs == blob and (place := _azure_place(blob, options)):
        beginning, shown = f"abfss://{quote(str(account), safe='')}@{place}/{container}", others
    elif dfs.startswith(".") and "dfs" in dfs.split(".") and blob == blob_authority(dfs):
        beginning, shown = f"abfss://{container}@{account}{dfs}", others
    return f"{beginning}{'/' if rest else ''}{rest}{write_parameters('azure', shown)}"


def blob_authority(dfs: str) -> str:
    """The authority of the blob service beside that of the other service."""
    return dfs.replace("dfs.", "blob.", 1)


def _azure_place(authority: str, options: Options) -> str:
    """Host and port of a server whose URLs have the account in their path; "" if the authority of a
    URI cannot say it."""
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


def _azure_endpoint(endpoint: Endpoint, found: Options) -> dict[str, Option]:
    # The account's name follows in each URL, so one that is in the endpoint would be there twice.
    place = endpoint.place.removesuffix(f"/{found['account_name']}")
    options: dict[str, Option] = {}
    for service in ("blob", "dfs"):
        options[f"{service}_storage_authority"] = place
        if endpoint.scheme == "http":
            options[f"{service}_storage_scheme"] = "http"
    return options


def _az_uri(path: str, options: Options) -> str:
    path = quoted(path)
    if account := options.get("account_name"):
        container, _, rest = path.partition("/")
        path = f"{container}@{account}{AZURE_DOMAINS['dfs']}/{rest}"
    return f"az://{path}{write_parameters('az', options)}"


# -- the others


def _hdfs_host(options: Options) -> str:
    return str(options.get("host") or "default").lower().removeprefix("hdfs://")


def _hdfs_uri(path: str, options: Options) -> str:
    host = _hdfs_host(options)
    place = host if "://" in host else f"hdfs://{'' if host == 'default' else host}"
    port = options.get("port")
    place = f"{place}:{port}" if port and host != "default" else place
    return f"{place}{quoted(path)}{write_parameters('hdfs', options)}"


def _hf_identity(options: Options) -> dict[str, Option]:
    endpoint = http_url(str(options.get("endpoint") or "")).rstrip("/")
    return {"endpoint": "" if endpoint == _HUGGING_FACE else endpoint}


_SERVER_KEYS = frozenset(["endpoint", "ca_file", "ca_dir", "verify_certificates"])
_SERVER_CREDENTIALS = frozenset(["anonymous", "file", "environment"])
KINDS: dict[Kind, KindRow] = {
    "s3": KindRow(
        uri=partial(_plain_uri, "s3", "s3"),
        identity=partial(_identity_of_server, "s3"),
        schemes=("s3",),
        has_bucket=True,
        table=TableRules(
            keys=_SERVER_KEYS | {"region", "force_virtual_addressing", "requester_pays"},
            credentials=_SERVER_CREDENTIALS | {"profile"},
            endpoint=lambda endpoint, _: endpoint_options("s3", endpoint),
        ),
    ),
    "gcs": KindRow(
        uri=partial(_plain_uri, "gs", "gcs"),
        identity=partial(_identity_of_server, "gcs"),
        schemes=("gs", "gcs"),
        has_bucket=True,
        shows_user=True,
        table=TableRules(
            keys=_SERVER_KEYS,
            credentials=_SERVER_CREDENTIALS,
            endpoint=lambda endpoint, _: endpoint_options("gcs", endpoint),
        ),
    ),
    "azure": KindRow(
        uri=_azure_uri,
        identity=_azure_identity,
        schemes=("abfss", "abfs"),
        has_bucket=True,
        shows_user=True,
        table=TableRules(_SERVER_KEYS, _SERVER_CREDENTIALS, _azure_endpoint),
    ),
    "az": KindRow(
        uri=_az_uri,
        identity=lambda options: {"account_name": options.get("account_name", "")},
        schemes=("az",),
        has_bucket=True,
        shows_user=True,
    ),
    "hdfs": KindRow(
        uri=_hdfs_uri,
        identity=lambda options: {"host": _hdfs_host(options), "port": options.get("port", 0)},
        schemes=("hdfs", "viewfs"),
        table=TableRules(),
    ),
    "local": KindRow(
        uri=partial(_plain_uri, "file", "local"), schemes=("file",), table=TableRules()
    ),
    "hf": KindRow(
        # fsspec decodes nothing in the path.
        uri=lambda path, options: f"hf://{path}{write_parameters('hf', options)}",
        identity=_hf_identity,
        schemes=("hf",),
    ),
    "http": KindRow(uri=lambda path, _: path, schemes=("http", "https")),
    "private": KindRow(uri=lambda path, _: f"private://{quoted(path)}"),
    "named": KindRow(
        uri=lambda path, options: f"{options.get('store', '')}:{path}",
        identity=lambda options: {"store": options.get("store", "")},
    ),
}
SCHEMES: dict[str, Kind] = {scheme: kind for kind, row in KINDS.items() for scheme in row.schemes}
"""The kind of each scheme of URIs."""
