"""Azure's standard settings, connection strings among them.

A location of adlfs (kind "az") becomes one of kind "azure" here, because both name an account, a
container and a path. So the same account gives the same location in both spellings.
"""

from typing import NamedTuple

from ckptfs._model.endpoints import Endpoint, parse_endpoint
from ckptfs._store.environment.draft import GIVEN, Draft, is_bare
from ckptfs._store.kinds import AZURE_VARIABLES
from ckptfs.errors import LocationError

_ACCOUNT = "AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT"
_STRING = "AZURE_STORAGE_CONNECTION_STRING"
_SUFFIX = "core.windows.net"
_DEFAULTS = {
    "blob_storage_authority": f".blob.{_SUFFIX}",
    "dfs_storage_authority": f".dfs.{_SUFFIX}",
    "blob_storage_scheme": "https",
    "dfs_storage_scheme": "https",
}
_SERVICES = "blob", "dfs"
_EMULATOR = {
    "AccountName": "devstoreaccount1",
    # Public, and the same for every emulator: learn.microsoft.com, "Use the Azurite emulator".
    "AccountKey": "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/"
    "K1SZFPTOtr/KBHBeksoGMGw==",
    "BlobEndpoint": "http://127.0.0.1:10000/devstoreaccount1",
}
"""The connection string that ``UseDevelopmentStorage=true`` stands for."""


class Account(NamedTuple):
    """The account of a connection string, its credentials, and other options."""

    name: str
    secrets: dict[str, str]
    options: dict[str, str]


def complete(draft: Draft) -> None:
    """Add the account and its credentials to a location, which becomes one of kind "azure". Raises
    LocationError without an account, or if a connection string is malformed."""
    for name, value in _DEFAULTS.items():
        if draft.options.get(name) == value:
            del draft.options[name]
    if draft.options.pop("anon", False):
        draft.options["anonymous"] = True
    if text := draft.secrets.pop("connection_string", ""):
        _use(draft, _account_of(draft, text, f"{GIVEN} connection_string"))
    draft.kind = "azure"
    draft.settle()
    if text := draft.environ.get(_STRING):
        found = _account_of(draft, text, _STRING)
        if not is_bare(draft):
            draft.ignored(_STRING, "", "other credentials are given, or none are needed")
        elif draft.options.get("account_name") not in (None, "", found.name):
            draft.ignored(_STRING, "", f"it is for the account {found.name}")
        else:
            _use(draft, found)
            draft.used(_STRING)
    place, name = draft.first_of(_ACCOUNT)
    if name and name != draft.options.get("account_name"):
        draft.take("account_name", name, place)
    if not draft.options.get("account_name"):
        raise draft.refused(
            _ACCOUNT[0], "", "no storage account is named; set it, or use abfss://container@account"
        )
    if not name or name == draft.options["account_name"]:
        _add_credentials(draft)
    else:
        for variable, _ in _by_option(draft).values():
            draft.ignored(variable, "", f"it is for the account {name}")


def _add_credentials(draft: Draft) -> None:
    """Use the first group of variables that is complete."""
    found = _by_option(draft)
    groups = (
        ("account_key",),
        ("sas_token",),
        ("client_id", "tenant_id", "client_secret"),
        ("client_id", "tenant_id", "federated_token_file"),
        ("client_id",),  # of a managed identity
    )
    is_open = is_bare(draft) and not draft.options.get("client_id")
    group = next((g for g in groups if is_open and all(each in found for each in g)), ())
    for option, (place, value) in found.items():
        if option in group or (option == "authority_host" and "tenant_id" in group):
            draft.take(option, value.removeprefix("?") if option == "sas_token" else value, place)
        else:
            draft.ignored(place, "", "other credentials count first, or it needs more variables")


def _by_option(draft: Draft) -> dict[str, tuple[str, str]]:
    pairs = {option: draft.first_of(names) for option, names in AZURE_VARIABLES.items()}
    return {option: pair for option, pair in pairs.items() if pair[0]}


# -- connection strings


def _account_of(draft: Draft, text: str, place: str) -> Account:
    try:
        return parse_connection_string(text)
    except LocationError as error:
        raise draft.refused(place, "", str(error)) from None


def _use(draft: Draft, account: Account) -> None:
    given = draft.options.get("account_name")
    if given and given != account.name:
        raise draft.refused(
            _STRING, "", f"it is for the account {account.name}, and not for {given}"
        )
    draft.options |= {"account_name": account.name, **account.options}
    draft.secrets |= account.secrets


def parse_connection_string(text: str) -> Account:
    """The fields of a connection string, by the names of the filesystem's options. Raises
    LocationError. Its message shows nothing of the string."""
    parts = dict(part.split("=", 1) for part in text.split(";") if "=" in part)
    values = {name.strip().lower(): value.strip() for name, value in parts.items()}
    if values.get("usedevelopmentstorage", "").lower() == "true":
        values = {name.lower(): value for name, value in _EMULATOR.items()}
    secrets: dict[str, str] = {}
    if key := values.get("accountkey"):
        secrets["account_key"] = key
    elif sas := values.get("sharedaccesssignature"):
        secrets["sas_token"] = sas.removeprefix("?")
    scheme = values.get("defaultendpointsprotocol") or "https"
    name = values.get("accountname", "")
    if blob := values.get("blobendpoint"):
        name, options = _of_endpoint(parse_endpoint(blob, scheme), name)
    else:
        options = _of_suffix(values.get("endpointsuffix") or _SUFFIX, scheme)
    if not name:
        raise LocationError("a connection string needs AccountName or BlobEndpoint")
    return Account(name, secrets, {k: v for k, v in options.items() if v != _DEFAULTS[k]})


def _of_suffix(suffix: str, scheme: str) -> dict[str, str]:
    options = {f"{service}_storage_authority": f".{service}.{suffix}" for service in _SERVICES}
    return options | {f"{service}_storage_scheme": scheme for service in _SERVICES}


def _of_endpoint(endpoint: Endpoint, name: str) -> tuple[str, dict[str, str]]:
    """The account's name and options of a BlobEndpoint, which has the account in host or path."""
    label, _, rest = endpoint.authority.partition(".")
    if not endpoint.path and rest.startswith("blob.") and name in ("", label):
        return label, _of_suffix(rest.removeprefix("blob."), endpoint.scheme)
    account = endpoint.path.strip("/")
    if not account or "/" in account or name not in ("", account):
        raise LocationError(
            "its BlobEndpoint has the account neither in the host nor in the path; name the "
            "account's own endpoint"
        )
    options = {f"{service}_storage_authority": endpoint.authority for service in _SERVICES}
    options |= {f"{service}_storage_scheme": endpoint.scheme for service in _SERVICES}
    return account, options
