"""The identity with which a volume is read, and its location with the credentials.

There are three, and a volume has one of them:

1. The keys in the volume's secret (``nodePublishSecretRef``).
2. The web identity of the pod: a token of its service account, with which the daemon assumes the
   role (S3), acts as the application (Azure) or asks the provider (Google) that the attributes
   name. The token stays in memory.
3. The node's own credentials, for the pods of the namespaces that the driver's operator has listed.

The author of a pod chooses the location, so it may name no files of the node.
"""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, cast

import msgspec

from ckptfs._csi.publication import TOKENS, Pod, Publication
from ckptfs._csi.refusals import Refusal, invalid
from ckptfs._model.endpoints import parse_endpoint
from ckptfs._model.kinds import KINDS
from ckptfs._model.location import Location
from ckptfs._model.named_store import named_location, split_named
from ckptfs._model.plans import plan
from ckptfs._model.plans.plan import Plan
from ckptfs._model.uri_parameters import Option
from ckptfs._model.uris import parse_uri, with_parameters
from ckptfs._model.volume import Volume
from ckptfs._store.credentials import given_secrets
from ckptfs._store.environment.draft import OF_CALLER
from ckptfs._store.kinds import daemon_rights_for
from ckptfs.errors import PlanError

_ROLE = {"s3": ("roleArn",), "azure": ("clientId", "tenantId"), "gcs": ("workloadProvider",)}
"""The attributes of web identity. Further ones may refine it (`_MORE`)."""
_MORE = {"stsEndpoint": "roleArn", "serviceAccount": "workloadProvider"}
_ENDPOINT_KEY = "endpoint"
_SESSION_NAME_LENGTH_MAX = 64  # of AssumeRoleWithWebIdentity
EVERY_NAMESPACE = "*"


class Wanted(NamedTuple):
    """A publication with all that the daemon needs for it.

    Attributes:
        location: The checkpoint, with credentials.
        volume: The daemon's volume.
        prefetch: Globs of files to fetch.
        plan: Ranges to fetch.
    """

    publication: Publication
    location: Location
    volume: Volume
    prefetch: list[str]
    plan: Plan | None


def wanted(
    publication: Publication,
    context: Mapping[str, str],
    secrets: Mapping[str, str],
    namespaces: Collection[str],
) -> Wanted:
    """The publication with its location and identity.

    Args:
        publication: The checked request.
        context: The request's attributes, of which the kubelet's have the tokens.
        secrets: The request's secrets.
        namespaces: The namespaces whose pods may use the node's own credentials.

    Raises:
        Refusal: The attributes contradict each other, or the pod may not use the node's
            credentials.
        LocationError, PlanError, AccessDenied: See `parse_uri`, `plan.decode` and `given_secrets`.
    """
    attributes = publication.attributes
    location = _place(attributes)
    tokens = _tokens(secrets.get(TOKENS) or context.get(TOKENS, ""))
    keys = {name: text for name, text in secrets.items() if name != TOKENS}
    location = _with_identity(location, attributes, keys, tokens, publication.pod)
    lends = _is_nodes(location)
    if lends:
        _check_namespace(location, publication.pod, namespaces)
    volume = Volume(publication.key, publication.gid, lends, publication.pod.namespace)
    return Wanted(
        publication, location, volume, attributes.get("prefetch", "").split(), _plan(attributes)
    )


def _place(attributes: Mapping[str, str]) -> Location:
    """The location without credentials."""
    uri, store = attributes["uri"], attributes.get("store", "")
    if store:
        if extra := sorted(attributes.keys() & {"endpoint", "region"}):
            raise invalid(f"the store {store!r} has its own {', '.join(extra)}; leave that out")
        if "://" in uri:
            raise invalid("with the attribute store, uri is a path in that store")
        return named_location(store, uri.strip("/"), None)
    if (found := split_named(uri)) is not None:
        raise invalid(f"write store: {found[0]} and uri: {found[1]} as two attributes")
    if region := attributes.get("region"):
        if not uri.startswith("s3://"):
            raise invalid("region is for s3:// only; leave it out")
        uri = with_parameters(uri, region=region)
    location = parse_uri(uri)
    if location.secrets:
        raise invalid(
            "uri has credentials; put them into a Secret, and name it in nodePublishSecretRef"
        )
    if endpoint := attributes.get("endpoint"):
        location = _at_endpoint(location, endpoint)
    if location.kind in ("local", "private"):
        raise invalid("a volume cannot be a directory of the node; give the URI of a store")
    if named := sorted(OF_CALLER & location.options.keys()):
        raise invalid(f"uri names {', '.join(named)} of the node; leave that out")
    return location


def _at_endpoint(location: Location, endpoint: str) -> Location:
    table = KINDS[location.kind].table
    if table is None or _ENDPOINT_KEY not in table.keys:
        raise invalid(f"{location.uri}: this store has no endpoint; leave it out")
    more = table.endpoint(parse_endpoint(endpoint), location.options)
    if more.keys() & location.options.keys():
        raise invalid(f"{location.uri}: the URI and the attribute both name an endpoint")
    options: dict[str, Option] = {**location.options, **more}
    return msgspec.structs.replace(location, options=options)


def _with_identity(
    location: Location,
    attributes: Mapping[str, str],
    keys: Mapping[str, str],
    tokens: Mapping[str, str],
    pod: Pod,
) -> Location:
    """The location with the identity that the volume names, if it names one."""
    given = [name for names in _ROLE.values() for name in names if attributes.get(name)]
    for name, needed in _MORE.items():
        if attributes.get(name) and needed not in given:
            raise invalid(f"{name} needs {needed}")
    if keys and given:
        raise invalid(f"give either a Secret or {', '.join(given)}, not both")
    if (keys or given) and location.kind == "named":
        raise invalid("a named store has its own credentials; leave the others out")
    if keys:
        secrets = given_secrets(keys, location.kind, "the Secret of nodePublishSecretRef")
        return msgspec.structs.replace(location, secrets=secrets)
    if not given:
        return location
    of_kind = _ROLE.get(location.kind, ())
    if other := [name for name in given if name not in of_kind]:
        raise invalid(f"{location.uri}: {', '.join(other)} is not for this store; leave it out")
    if len(given) < len(of_kind):
        raise invalid(f"web identity needs {' and '.join(of_kind)}")
    return _WEB_IDENTITY[location.kind](location, attributes, tokens, pod)


def _of_aws(
    location: Location, attributes: Mapping[str, str], tokens: Mapping[str, str], pod: Pod
) -> Location:
    token = _token_for("sts.amazonaws.com", tokens)
    options: dict[str, Option] = {
        "role_arn": attributes["roleArn"],
        "session_name": _session_name(pod),
    }
    if endpoint := attributes.get("stsEndpoint"):
        options["sts_endpoint_url"] = parse_endpoint(endpoint).text
    return _with(location, options, {"web_identity_token": token})


def _of_azure(
    location: Location, attributes: Mapping[str, str], tokens: Mapping[str, str], _: Pod
) -> Location:
    token = _token_for("api://AzureADTokenExchange", tokens)
    options = {"client_id": attributes["clientId"], "tenant_id": attributes["tenantId"]}
    return _with(location, options, {"federated_token": token})


def _of_google(
    location: Location, attributes: Mapping[str, str], tokens: Mapping[str, str], _: Pod
) -> Location:
    provider = attributes["workloadProvider"]
    token = _token_for(f"//iam.googleapis.com/{provider}", tokens)
    options: dict[str, Option] = {"workload_provider": provider}
    if account := attributes.get("serviceAccount"):
        options["target_service_account"] = account
    return _with(location, options, {"federated_token": token})


_WEB_IDENTITY = {"s3": _of_aws, "azure": _of_azure, "gcs": _of_google}
"""The function that adds the web identity of a pod, for each kind of store in `_ROLE`."""


def _with(location: Location, options: Mapping[str, Option], secrets: dict[str, str]) -> Location:
    if twice := sorted(options.keys() & location.options.keys()):
        raise invalid(f"{location.uri} has the parameter {', '.join(twice)} already; leave it out")
    both: dict[str, Option] = {**location.options, **options}
    implied = (*location.implied, *options)
    return msgspec.structs.replace(location, options=both, secrets=secrets, implied=implied)


def _session_name(pod: Pod) -> str:
    """The name of the session in the audit log of AWS."""
    text = f"ckptfs-{pod.namespace}-{pod.service_account}-{pod.name}"
    return re.sub(r"[^A-Za-z0-9+=,.@_-]", "-", text)[:_SESSION_NAME_LENGTH_MAX]


def _is_nodes(location: Location) -> bool:
    """Whether the location is read with rights of the node. A web server may trust the node for
    its address alone."""
    return location.kind in ("named", "http") or bool(daemon_rights_for(location))


def _check_namespace(location: Location, pod: Pod, namespaces: Collection[str]) -> None:
    if EVERY_NAMESPACE in namespaces or (pod.namespace and pod.namespace in namespaces):
        return
    if not pod.namespace:
        raise Refusal(
            "PERMISSION_DENIED",
            f"{location.uri} would be read with the node's own credentials, and the kubelet does "
            "not say for which pod; set podInfoOnMount: true in the CSIDriver object",
        )
    role = _ROLE.get(location.kind)
    web = f" or {' and '.join(role)}" if role else ""
    raise Refusal(
        "PERMISSION_DENIED",
        f"{location.uri} would be read with the node's own credentials, which are not for the "
        f"namespace {pod.namespace}; give the volume nodePublishSecretRef{web}, or start ckptfs "
        f"csi with --node-credentials-namespace {pod.namespace}",
    )


# -- tokens, of which no text goes into a message


def _tokens(text: str) -> dict[str, str]:
    """The tokens of the kubelet by audience."""
    if not text:
        return {}
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise invalid(f"{TOKENS} is not a JSON object; set tokenRequests in the CSIDriver object")
    entries = cast("dict[str, Any]", found)
    return {
        audience: entry["token"]
        for audience, entry in entries.items()
        if isinstance(entry, dict) and isinstance(cast("Any", entry).get("token"), str)
    }


def _token_for(audience: str, tokens: Mapping[str, str]) -> str:
    """The token for an audience, or the only one, whose audience the operator has chosen."""
    token = tokens.get(audience, "")
    if not token and len(tokens) == 1:
        [token] = tokens.values()
    if not token:
        there = f"only for {', '.join(sorted(tokens))}" if tokens else "none"
        raise Refusal(
            "FAILED_PRECONDITION",
            f"web identity needs a token of the pod's service account for {audience}, and there is "
            f"{there}; add it to tokenRequests in the CSIDriver object",
        )
    return token


def _plan(attributes: Mapping[str, str]) -> Plan | None:
    text = attributes.get("plan", "")
    if not text:
        return None
    try:
        return plan.decode(text)
    except PlanError as error:
        raise PlanError(f"the attribute plan: {error}") from None
