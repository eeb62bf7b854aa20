"""What a daemon reads with rights of its own, and so not for other users unless it is configured.

A daemon has more than the credentials that a location brings: what AWS's chain and its likes find
where it runs, its identity at HDFS, and the rights of its user (often root) on the local disks.
"""

from collections.abc import Callable, Mapping

from ckptfs._model.location import Kind, Location, Option


def lent_for(location: Location) -> str:
    """What of the daemon's own `location` would be read with; "": nothing, it brings all it needs.

    Whatever is not known to bring its own credentials counts as reading with the daemon's.
    """
    options: dict[str, Option] = {**location.options, **location.secrets}
    lends = _LENDS.get(location.kind)
    return lends(options) if lends is not None else "own identity"


def _s3(options: Mapping[str, Option]) -> str:
    if options.get("tls_ca_file_path"):
        return "right to read tls_ca_file_path"
    # As `awskeys.keys_for` decides; a role is assumed with the same keys.
    return "" if options.get("anonymous") or options.get("access_key") else "AWS credentials"


def _gcs(options: Mapping[str, Option]) -> str:
    for name in ("application_credentials", "tls_ca_file_path"):
        if options.get(name):
            return f"right to read {name}"
    # A service account is impersonated by somebody else.
    given = ("anonymous", "access_token", "service_account_key")
    own = any(options.get(name) for name in given)
    alone = own and not options.get("target_service_account")
    return "" if alone else "Google credentials"


def _azure(options: Mapping[str, Option]) -> str:
    for name in ("federated_token_file", "tls_ca_file_path"):
        if options.get(name):
            return f"right to read {name}"
    # As `objectstore` decides; a client_id alone is that of a managed identity.
    client = [options.get(name) for name in ("client_id", "tenant_id", "client_secret")]
    key = options.get("account_key") or options.get("sas_token")
    own = options.get("anonymous") or all(client) or (key and not any(client))
    return "" if own else "Azure credentials"


_LENDS: dict[Kind, Callable[[Mapping[str, Option]], str]] = {
    "s3": _s3,
    "gcs": _gcs,
    "azure": _azure,
    # adlfs completes what it is given from the daemon's environment, so it is never on its own.
    "hf": lambda options: "" if options.get("token") else "Hugging Face token",
    "http": lambda _: "",  # there are no credentials: see `descriptions`
    "hdfs": lambda _: "identity at HDFS",
    "local": lambda _: "rights on local files",
}
