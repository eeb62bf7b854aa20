"""The proxies and certificates in the caller's environment for a store.

S3 follows boto3: `HTTP_PROXY` and `HTTPS_PROXY` by the endpoint's scheme, `NO_PROXY` by the rules
of Python's urllib. The other kinds follow requests, as the providers' own libraries do: there
`ALL_PROXY` counts as well. An address in `NO_PROXY` may also be a network (10.0.0.0/8).
"""

import ipaddress
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from ckptfs._model.endpoints import Endpoint, parse_endpoint
from ckptfs._model.kinds import Kind
from ckptfs._store.environment.draft import GIVEN, Draft
from ckptfs._store.kinds import CA_FILES
from ckptfs.errors import LocationError

_DEFAULT_HOSTS = {"gcs": "storage.googleapis.com", "hf": "huggingface.co"}


def complete(draft: Draft) -> None:
    """Add the proxy, and the certificates to trust, to a location. Raises LocationError for a proxy
    of another kind, and for a file that cannot be read."""
    endpoint = endpoint_of(draft.kind, draft.path, draft.options)
    if endpoint is None:
        return
    _add_proxy(draft, endpoint)
    _add_certificates(draft, endpoint)


def proxy_url(options: dict[str, object]) -> str:
    """The URL of pyarrow's `proxy_options`; "" without a proxy."""
    host = str(options.get("host") or "")
    if not host:
        return ""
    user = quote(str(options.get("username") or ""), safe="")
    password = quote(str(options.get("password") or ""), safe="")
    login = f"{user}:{password}@" if password else f"{user}@" if user else ""
    port = options.get("port")
    authority = f"[{host}]" if ":" in host and not host.startswith("[") else host
    authority += f":{port}" if isinstance(port, int) and port > 0 else ""
    return f"{options.get('scheme') or 'http'}://{login}{authority}"


def checked_proxy(text: str) -> str:
    """A proxy's URL as botocore completes it. Raises LocationError. Its message does not show the
    URL."""
    url = text if "://" in text else f"http:{text}" if text.startswith("//") else f"http://{text}"
    try:
        parts = urlsplit(url)
        place = parts.hostname, parts.port
    except ValueError:
        place = "", None
    if not place[0]:
        raise LocationError("it is malformed; write it as http://host:port")
    scheme = urlsplit(url).scheme.lower()
    if scheme not in ("http", "https"):
        raise LocationError(f"a proxy of kind {scheme} is not supported; use http or https")
    return url


def endpoint_of(kind: Kind, path: str, options: Mapping[str, object]) -> Endpoint | None:
    """The endpoint of requests, without a bucket in the host's name; None if it is unknown. Raises
    LocationError for a malformed endpoint."""
    scheme = str(options.get("scheme") or options.get("blob_storage_scheme") or "https")
    if named := options.get("endpoint_override") or options.get("endpoint"):
        return parse_endpoint(str(named), scheme)
    if kind == "http":
        return parse_endpoint("/".join(path.split("/")[:3]))
    if kind == "s3":
        region = str(options.get("region") or "us-east-1")
        suffix = ".cn" if region.startswith("cn-") else ""
        return parse_endpoint(f"s3.{region}.amazonaws.com{suffix}", scheme)
    if kind in ("azure", "az"):
        authority = str(options.get("blob_storage_authority") or ".blob.core.windows.net")
        account = options.get("account_name", "")
        return parse_endpoint(f"{account}{authority}" if authority[0] == "." else authority, scheme)
    host = _DEFAULT_HOSTS.get(kind)
    return parse_endpoint(host) if host else None


# -- proxies


def _add_proxy(draft: Draft, endpoint: Endpoint) -> None:
    if given := draft.secrets.get("proxy"):
        try:
            draft.secrets["proxy"] = checked_proxy(given)
        except LocationError as error:
            raise draft.refused(f"{GIVEN} proxy", "", str(error)) from None
    for scheme in (endpoint.scheme, "all"):
        place, value = _variable(draft, scheme)
        if not value:
            continue
        if scheme == "all" and draft.kind == "s3":
            draft.ignored(place, "", "boto3 does not use it for S3; set HTTPS_PROXY instead")
        elif place == "HTTP_PROXY" and "REQUEST_METHOD" in draft.environ:
            draft.ignored(place, "", "a request to a CGI program can set it (CVE-2016-1000110)")
        elif because := _bypassed(draft, endpoint):
            draft.ignored(place, "", f"{because} excludes {endpoint.authority}")
        else:
            try:
                url = checked_proxy(value)
                draft.take("proxy", url, place, url.rpartition("@")[2])
            except LocationError as error:
                raise draft.refused(place, "", str(error)) from None


def _variable(draft: Draft, scheme: str) -> tuple[str, str]:
    """The variable of that name in either case. The one in lower case counts first, even if it is
    empty."""
    lower = f"{scheme}_proxy"
    if lower in draft.environ:
        return lower, draft.environ[lower]
    return lower.upper(), draft.environ.get(lower.upper(), "")


def _bypassed(draft: Draft, endpoint: Endpoint) -> str:
    """The variable that excludes the endpoint from the proxy, or ""."""
    place, value = _variable(draft, "no")
    if not value:
        return ""
    from urllib import request

    bypassed: Any = request.proxy_bypass_environment  # type: ignore[attr-defined]
    if bypassed(endpoint.authority, {"no": value}):
        return place
    try:
        address = ipaddress.ip_address(endpoint.host)
    except ValueError:
        return ""
    return place if any(address in net for net in _networks(value)) else ""


def _networks(text: str) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    found: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
    for part in text.split(","):
        try:
            found.append(ipaddress.ip_network(part.strip().strip("[]"), strict=False))
        except ValueError:
            continue  # a name
    return found


# -- certificates


def _add_certificates(draft: Draft, endpoint: Endpoint) -> None:
    given = {"tls_ca_file_path", "tls_ca_dir_path", "tls_ca_pem"} & (
        draft.options.keys() | draft.secrets.keys()
    )
    if draft.options.get("tls_verify_certificates") is False:
        given.add("tls_verify_certificates")
    for name in CA_FILES:
        path = draft.environ.get(name, "")
        if not path:
            continue
        if endpoint.scheme == "http":
            draft.ignored(name, path, "the endpoint is plain http")
        elif given and not (name == "SSL_CERT_DIR" and given == {"SSL_CERT_FILE"}):
            draft.ignored(name, path, "another setting of certificates has precedence")
        else:
            take_certificates(draft, path, name)
            given.add(name)


def take_certificates(draft: Draft, path: str, place: str) -> None:
    """Trust the certificates in a file or directory. Raises LocationError if it cannot be read."""
    full = os.path.abspath(os.path.expanduser(path))
    option = "tls_ca_dir_path" if os.path.isdir(full) else "tls_ca_file_path"
    if not os.access(full, os.R_OK):
        raise draft.refused(place, path, f"{path!r} cannot be read; name a file of certificates")
    draft.take(option, full, place)
