"""Stores on Google and Azure from locations: the server, and the authorization of requests.

The names of the options are pyarrow's. The module opens no connections.
"""

from collections.abc import Mapping

from ckptfs._model.endpoints import parse_endpoint
from ckptfs._model.kinds import Kind
from ckptfs._model.location import Location
from ckptfs._model.uri_parameters import Option
from ckptfs._store.base import Store
from ckptfs._store.cloud import azure, gcs
from ckptfs._store.cloud.requests import (
    Anonymous,
    Authority,
    AuthorizedClient,
    Bearer,
    SasToken,
    SharedKey,
)
from ckptfs._store.cloud.tokens import GivenToken, azure_tokens, google_tokens
from ckptfs._store.s3.options import S3Options, s3_options
from ckptfs._store.transport.tls import NETWORK
from ckptfs.errors import LocationError

KINDS: frozenset[Kind] = frozenset(["azure", "gcs"])
"""The kinds that `open_objects` opens."""
_AZURE_BLOB = ".blob.core.windows.net"


def open_objects(location: Location, timeout_s: float) -> Store:
    """The store at a location of one of `KINDS`. The caller has checked the options. Raises
    LocationError if one is malformed.

    `timeout_s` is the longest connect, and the longest silence within a request.
    """
    opened = _google if location.kind == "gcs" else _azure
    try:
        return opened(location, {**location.options, **location.secrets}, timeout_s)
    except LocationError as error:
        raise LocationError(f"{location.uri}: {error}") from None
    except (OSError, ValueError) as error:
        raise LocationError(f"{location.uri}: {error}; check the options") from None


def _google(location: Location, options: Mapping[str, Option], timeout_s: float) -> Store:
    endpoint = _text(options, "endpoint_override")
    # pyarrow may describe its filesystem for Google's own server with the scheme "http".
    scheme = _text(options, "scheme") or "https" if endpoint else "https"
    server = _server(options, endpoint or gcs.HOST, scheme)
    authority: Authority
    if options.get("anonymous"):
        authority = Anonymous()
    elif token := _text(options, "access_token"):
        authority = Bearer(GivenToken(token))
    else:
        authority = Bearer(google_tokens(options, location.uri, server.proxy))
    bucket, _, prefix = location.path.partition("/")
    client = AuthorizedClient(bucket, server, authority, timeout_s, gcs.SERVICE)
    uploads = AuthorizedClient("upload", server, authority, timeout_s, gcs.UPLOADS)
    return gcs.GoogleStore(client, prefix, location.uri, uploads)


def _azure(location: Location, options: Mapping[str, Option], timeout_s: float) -> Store:
    account = _text(options, "account_name")
    if not account:
        raise LocationError("the account_name is missing; write abfss://container@account.…/path")
    endpoint, scheme = _azure_endpoint(options, account)
    server = _server(options, endpoint, scheme)
    # As pyarrow decides: an identity comes before a key.
    has_identity = any(options.get(name) for name in ("client_id", "client_secret", "tenant_id"))
    authority: Authority
    if options.get("anonymous"):
        authority = Anonymous()
    elif not has_identity and (key := _text(options, "account_key")):
        authority = SharedKey(account, key)
    elif not has_identity and (sas := _text(options, "sas_token")):
        authority = SasToken(sas)
    else:
        authority = Bearer(azure_tokens(options, location.uri, server.proxy))
    container, _, prefix = location.path.partition("/")
    client = AuthorizedClient(container, server, authority, timeout_s, azure.SERVICE)
    return azure.AzureStore(client, prefix, location.uri)


def _azure_endpoint(options: Mapping[str, Option], account: str) -> tuple[str, str]:
    """The endpoint and scheme of the Blob service.

    The account stands before an authority that begins with a dot, and after another one (such as
    Azurite's). An account with a service "dfs" has the service "blob" beside it.
    """
    authority = _text(options, "blob_storage_authority")
    dfs = _text(options, "dfs_storage_authority")
    if dfs and authority in ("", _AZURE_BLOB):
        authority = dfs.replace(".dfs.", ".blob.", 1) if dfs.startswith(".dfs.") else dfs
    scheme = _text(options, "blob_storage_scheme") or _text(options, "dfs_storage_scheme")
    authority = authority or _AZURE_BLOB
    if authority.startswith("."):
        return account + authority, scheme or "https"
    return f"{authority.rstrip('/')}/{account}", scheme or "https"


def _server(options: Mapping[str, Option], endpoint: str, scheme: str) -> S3Options:
    parsed = parse_endpoint(endpoint, scheme)
    network = {name: options[name] for name in NETWORK if name in options}
    where = {"endpoint_override": parsed.place, "scheme": parsed.scheme}
    return s3_options({**network, **where})


def _text(options: Mapping[str, Option], name: str) -> str:
    value = options.get(name, "")
    if not isinstance(value, str):
        raise LocationError(f"{name} must be a text; check the options")
    return value
