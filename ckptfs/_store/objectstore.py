"""Location -> Store, of Google and Azure: which server, and what authorizes the requests.

The names of the options are pyarrow's. Nothing here opens a connection.
"""

from collections.abc import Mapping

from ckptfs._model.endpoints import parse_endpoint
from ckptfs._model.location import Kind, Location, Option
from ckptfs._store import gcs
from ckptfs._store.authorized import Anonymous, Authority, Bearer, SasToken, SharedKey
from ckptfs._store.azure import AzureStore
from ckptfs._store.base import Store
from ckptfs._store.gcs import GoogleStore
from ckptfs._store.s3options import S3Options, s3_options
from ckptfs._store.tokens import GivenToken, azure_tokens, google_tokens
from ckptfs.errors import LocationError

KINDS: frozenset[Kind] = frozenset(["azure", "gcs"])
"""What `open_objects` opens."""
_NETWORK = (
    "proxy",
    "tls_ca_dir_path",
    "tls_ca_file_path",
    "tls_ca_pem",
    "tls_verify_certificates",
)
"""Options that say how the server is reached, as of S3."""
_AZURE_BLOB = ".blob.core.windows.net"


def open_objects(location: Location, timeout_s: float) -> Store:
    """The store at a location of one of `KINDS`, whose options have been checked.

    Args:
        location: With all its secrets.
        timeout_s: Longest connect, and longest silence within a request.

    Raises:
        LocationError: An option is malformed.
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
    # pyarrow describes its filesystem for Google's own server with the scheme "http", too.
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
    return GoogleStore(bucket, prefix, location.uri, server, authority, timeout_s)


def _azure(location: Location, options: Mapping[str, Option], timeout_s: float) -> Store:
    account = _text(options, "account_name")
    if not account:
        raise LocationError("there is no account_name; write abfss://container@account.…/path")
    server = _server(options, *_azure_endpoint(options, account))
    # As pyarrow decides: an identity comes before a key.
    has_identity = any(options.get(name) for name in ("client_id", "client_secret", "tenant_id"))
    authority: Authority
    if options.get("anonymous"):
        authority = Anonymous()
    elif has_identity:
        authority = Bearer(azure_tokens(options, location.uri, server.proxy))
    elif key := _text(options, "account_key"):
        authority = SharedKey(account, key)
    elif sas := _text(options, "sas_token"):
        authority = SasToken(sas)
    else:
        authority = Bearer(azure_tokens(options, location.uri, server.proxy))
    container, _, prefix = location.path.partition("/")
    return AzureStore(container, prefix, location.uri, server, authority, timeout_s)


def _azure_endpoint(options: Mapping[str, Option], account: str) -> tuple[str, str]:
    """Endpoint and scheme of the Blob service. An authority that begins with a dot has the account
    before it, another one after it (as of Azurite); the service "dfs" of an account has a sibling
    "blob" beside it."""
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
    network = {name: options[name] for name in _NETWORK if name in options}
    where = {"endpoint_override": parsed.place, "scheme": parsed.scheme}
    return s3_options({**network, **where})


def _text(options: Mapping[str, Option], name: str) -> str:
    value = options.get(name, "")
    if not isinstance(value, str):
        raise LocationError(f"{name} must be a text; check the options")
    return value
