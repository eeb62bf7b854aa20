"""The parameters that the URIs of each kind of store may have: how they are read and written.

The names are pyarrow's, and `requester_pays`. A value that is the default is neither kept in a
location nor written. Parameters that have no effect on reading are checked, and not kept.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias
from urllib.parse import quote

from ckptfs._model.endpoints import Endpoint, parse_endpoint
from ckptfs.errors import LocationError

Option: TypeAlias = str | int | float | bool

_FLAGS = {"true": True, "1": True, "false": False, "0": False}
_REGION = re.compile(r"[A-Za-z0-9_-]{1,64}")
_AMAZON = re.compile(r"s3(?:\.([a-z0-9-]+))?\.amazonaws\.com(?:\.cn)?")
"""Amazon's endpoints that a client finds by itself. Those for FIPS and IPv6 are chosen by users."""
_GOOGLE = "storage.googleapis.com"
_VALUE_SAFE = "/:[],"
"""Characters of values that need no encoding. RFC 3986 (3.4) allows slash and colon; brackets are
those of IPv6 addresses."""


class Parameter(NamedTuple):
    """How one parameter is read.

    Attributes:
        read: Raises ValueError with what would be right.
        default: The value that need not be said.
        is_for_writing: The parameter has no effect on reading.
    """

    read: Callable[[str], Option]
    default: Option = ""
    is_for_writing: bool = False


def _text(value: str) -> str:
    if not value or not value.isprintable():
        raise ValueError("needs a value")
    return value


def _flag(value: str) -> bool:
    if value.lower() not in _FLAGS:
        raise ValueError("must be true or false")
    return _FLAGS[value.lower()]


def _seconds(value: str) -> float:
    number = float(value) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", value) else 0.0
    if not 0 < number < math.inf:
        raise ValueError("must be a number of seconds")
    return number


def _whole_seconds(value: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", value) or not int(value):
        raise ValueError("must be a whole number of seconds")
    return int(value)


def _path(value: str) -> str:
    if not value.startswith("/"):
        raise ValueError("must be an absolute path")
    return _text(value)


def _scheme(value: str) -> str:
    if value not in ("http", "https"):
        raise ValueError("must be http or https")
    return value


def _region(value: str) -> str:
    if not _REGION.fullmatch(value):
        raise ValueError("must be like eu-central-1")
    return value


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
"""By kind and name. The option of a location has the same name, but for `enable_tls`, which stands
for two schemes, and `anonymous` of az, which is fsspec's `anon`."""


def read_parameters(kind: str, given: Mapping[str, str]) -> dict[str, Option]:
    """The options that parameters stand for.

    Args:
        kind: Of the store.
        given: Names and decoded values, all of them known.

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
    """The options that name an endpoint of S3 or Google; none of it where the provider's own."""
    region = own_region(kind, endpoint)
    if region is None:
        return {"endpoint_override": endpoint.place, "scheme": endpoint.scheme}
    return {"region": region} if region else {}


def own_region(kind: str, endpoint: Endpoint) -> str | None:
    """The region in the name of an endpoint that is the provider's own; "": it names none; None: it
    is another server."""
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
        # Google's own endpoint is always asked by https.
        return options | ({"scheme": "http"} if scheme == "http" and kind == "s3" else {})
    endpoint = parse_endpoint(text, scheme or "https")
    if scheme and scheme != endpoint.scheme:
        raise LocationError(
            f"parameter scheme says {scheme}, and endpoint_override {endpoint.scheme}; leave "
            "scheme out"
        )
    return {**endpoint_options(kind, endpoint), **options}


def unknown_parameter(kind: str, name: str) -> str:
    """What to say of a parameter that is not known: a similar one, and all that are."""
    known = PARAMETERS[kind]
    similar = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {similar[0]}? " if similar else ""
    names = f"known ones: {', '.join(known)}" if known else "there are none here"
    return f"unknown parameter {name!r}; {hint}{names}"


def endpoint_in(options: Mapping[str, Option]) -> Endpoint | None:
    """The endpoint in the options of S3 or Google, also as older clients wrote it. None: there is
    none, or it is malformed."""
    text = str(options.get("endpoint_override") or "")
    try:
        return parse_endpoint(text, str(options.get("scheme") or "https")) if text else None
    except LocationError:
        return None


def write_parameters(kind: str, options: Mapping[str, Option]) -> str:
    """The query of a URI, with its question mark, that stands for these options; others than
    parameters are left out."""
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
