"""The parameters of URIs, for each kind of store: their parsing and writing.

The names are pyarrow's, except `requester_pays`. A default value is neither part of a location nor
written. Parameters without effect on reading are checked, and then dropped.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias
from urllib.parse import quote

from ckptfs._model.endpoints import Endpoint, parse_endpoint
from ckptfs.errors import LocationError

Option: TypeAlias = str | int | float | bool

_AMAZON = re.compile(r"s3(?:\.([a-z0-9-]+))?\.amazonaws\.com(?:\.cn)?")
"""Amazon's endpoints that a client finds by itself. Users choose those for FIPS and IPv6."""
_GOOGLE = "storage.googleapis.com"
_VALUE_SAFE = "/:[],"
"""The characters of values that need no encoding. RFC 3986 (3.4) allows slash and colon. IPv6
addresses have brackets."""


class Parameter(NamedTuple):
    """One parameter.

    Attributes:
        read: The function that parses it. Its ValueError says which values are valid.
        default: The default value.
        is_for_writing: Whether the parameter has an effect on writing only.
    """

    read: Callable[[str], Option]
    default: Option = ""
    is_for_writing: bool = False


def _text(value: str) -> str:
    if not value or not value.isprintable():
        raise ValueError("needs a value")
    return value


def _path(value: str) -> str:
    if not value.startswith("/"):
        raise ValueError("must be an absolute path")
    return _text(value)


def _matching(
    pattern: str, description: str, convert: Callable[[str], Option] = str
) -> Callable[[str], Option]:
    """A function that converts a value that matches the pattern."""

    def read(value: str) -> Option:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"must be {description}")
        return convert(value)

    return read


_flag = _matching(
    "(?i:true|false|1|0)", "true or false", lambda text: text.lower() in ("true", "1")
)
_seconds = _matching(r"(?=.*[1-9])[0-9]{1,300}(\.[0-9]{1,9})?", "a number of seconds", float)
_whole_seconds = _matching("(?=.*[1-9])[0-9]{1,9}", "a whole number of seconds", int)
_scheme = _matching("https?", "http or https")
_region = _matching("[A-Za-z0-9_-]{1,64}", "like eu-central-1")
_ENDPOINT = {"endpoint_override": Parameter(_text), "scheme": Parameter(_scheme)}
_TLS = {
    "tls_ca_file_path": Parameter(_path),
    "tls_ca_dir_path": Parameter(_path),
    "tls_verify_certificates": Parameter(_flag, True),
}
_ANONYMOUS = {"anonymous": Parameter(_flag, False)}
PARAMETERS: dict[str, dict[str, Parameter]] = {
    "s3": {
        **_ENDPOINT,
        "region": Parameter(_region),
        **_ANONYMOUS,
        "force_virtual_addressing": Parameter(_flag, False),
        "requester_pays": Parameter(_flag, False),
        **_TLS,
        "role_arn": Parameter(_text),
        "session_name": Parameter(_text),
        "external_id": Parameter(_text),
        "load_frequency": Parameter(_whole_seconds, 900),
        "request_timeout": Parameter(_seconds),
        "connect_timeout": Parameter(_seconds),
        "allow_bucket_creation": Parameter(_flag, is_for_writing=True),
        "allow_bucket_deletion": Parameter(_flag, is_for_writing=True),
    },
    "gcs": {
        **_ENDPOINT,
        **_ANONYMOUS,
        "project_id": Parameter(_text),
        "target_service_account": Parameter(_text),
        **_TLS,
    },
    "azure": {
        "enable_tls": Parameter(_flag, True),
        "blob_storage_authority": Parameter(_text),
        "blob_storage_scheme": Parameter(_scheme, "https"),
        "dfs_storage_authority": Parameter(_text),
        "dfs_storage_scheme": Parameter(_scheme, "https"),
        **_ANONYMOUS,
        "client_id": Parameter(_text),
        "tenant_id": Parameter(_text),
        **_TLS,
    },
    "az": {"anonymous": Parameter(_flag, False)},
    "hdfs": {"user": Parameter(_text)},
    "hf": {"endpoint": Parameter(_text)},
    "local": {},
}
"""The parameters by kind and name. The option of a location has the same name, except `enable_tls`,
which stands for two schemes, and `anonymous` of az, which is fsspec's `anon`."""


def read_parameters(kind: str, given: Mapping[str, str]) -> dict[str, Option]:
    """The options that parameters stand for.

    Args:
        kind: The kind of store.
        given: The names, all of them known, and the decoded values.

    Raises:
        LocationError: A value is malformed. The message does not begin with the URI.
    """
    known = PARAMETERS[kind]
    options: dict[str, Option] = {}
    for name, text in given.items():
        try:
            value = known[name].read(text)
        except ValueError as error:
            raise LocationError(f"parameter {name}: {error}") from None
        if value != known[name].default and not known[name].is_for_writing:
            options[name] = value
    if "scheme" in known:
        return _with_endpoint(kind, options)
    if "enable_tls" in options:
        del options["enable_tls"]
        options = {"blob_storage_scheme": "http", "dfs_storage_scheme": "http", **options}
    if kind == "az" and options.pop("anonymous", False):
        options["anon"] = True
    if "endpoint" in options:
        options["endpoint"] = parse_endpoint(str(options["endpoint"])).text
    return options


def endpoint_options(kind: str, endpoint: Endpoint) -> dict[str, Option]:
    """The options that name an endpoint of S3 or Google; without one for the provider's own."""
    region = own_region(kind, endpoint)
    if region is None:
        return {"endpoint_override": endpoint.place, "scheme": endpoint.scheme}
    return {"region": region} if region else {}


def own_region(kind: str, endpoint: Endpoint) -> str | None:
    """The region in the name of the provider's own endpoint; "" if it names none; None for another
    server."""
    if endpoint.scheme != "https":
        return None
    if kind == "gcs":
        return "" if endpoint.place == _GOOGLE else None
    found = _AMAZON.fullmatch(endpoint.place)
    return None if found is None else found[1] or ""


def _with_endpoint(kind: str, options: dict[str, Option]) -> dict[str, Option]:
    """The options with the endpoint as a location has it. Raises LocationError."""
    text = str(options.pop("endpoint_override", ""))
    scheme = str(options.pop("scheme", ""))
    if not text:
        # Requests to Google's own endpoint always use https.
        return options | ({"scheme": "http"} if scheme == "http" and kind == "s3" else {})
    endpoint = parse_endpoint(text, scheme or "https")
    if scheme and scheme != endpoint.scheme:
        raise LocationError(
            f"parameter scheme says {scheme}, and endpoint_override {endpoint.scheme}; leave "
            "scheme out"
        )
    return {**endpoint_options(kind, endpoint), **options}


def unknown_parameter(kind: str, name: str) -> str:
    """The message about an unknown parameter, with a similar one and all known ones."""
    known = PARAMETERS[kind]
    similar = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {similar[0]}? " if similar else ""
    names = f"known ones: {', '.join(known)}" if known else "this scheme has no parameters"
    return f"unknown parameter {name!r}; {hint}{names}"


def endpoint_in(options: Mapping[str, Option]) -> Endpoint | None:
    """The endpoint in the options of S3 or Google, also in the spelling of older clients; None if
    it is missing or malformed."""
    text = str(options.get("endpoint_override") or "")
    try:
        return parse_endpoint(text, str(options.get("scheme") or "https")) if text else None
    except LocationError:
        return None


def write_parameters(kind: str, options: Mapping[str, Option]) -> str:
    """The query of a URI for these options, with its question mark. Options that are not parameters
    are left out."""
    written = dict(options)
    if "scheme" in PARAMETERS[kind]:
        endpoint = endpoint_in(options)
        if endpoint is not None and (region := own_region(kind, endpoint)) is not None:
            del written["endpoint_override"]
            written = {**({"region": region} if region else {}), **written}
        elif endpoint is not None:
            written["endpoint_override"] = endpoint.text
        if endpoint is not None or kind == "gcs" or written.get("scheme") != "http":
            written.pop("scheme", None)
    if kind == "az" and options.get("anon"):
        written["anonymous"] = True
    if kind == "azure" and all(
        options.get(f"{service}_storage_scheme") == "http" for service in ("blob", "dfs")
    ):
        written["enable_tls"] = False
        del written["blob_storage_scheme"], written["dfs_storage_scheme"]
    pairs = [
        f"{name}={_value(written[name])}"
        for name, parameter in PARAMETERS[kind].items()
        if written.get(name) not in (None, "", parameter.default)
    ]
    return "?" + "&".join(pairs) if pairs else ""


def _value(value: Option) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return quote(text, safe=_VALUE_SAFE, errors="surrogatepass")
