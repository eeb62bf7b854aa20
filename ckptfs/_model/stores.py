"""Named stores: what the configuration says of each, and the place that a name stands for.

``prod:run7/checkpoint_000100`` is the directory ``run7/checkpoint_000100`` below the URI of the
table ``[store.prod]``. Plain data and pure functions: credentials are read by
``ckptfs._store.credentials``.
"""

import hashlib
import re
from typing import Annotated, Literal

import msgspec

from ckptfs._model.endpoints import Endpoint, parse_endpoint
from ckptfs._model.location import Kind, Location, Option, StoreRef
from ckptfs._model.uriparameters import endpoint_options
from ckptfs._model.uris import INSTEAD, SCHEMES, parse_uri
from ckptfs.errors import ConfigError, LocationError

STORE_NAME = r"[A-Za-z][A-Za-z0-9_-]{0,62}"
_NAMED = re.compile(rf"({STORE_NAME}):(?!//)(.*)", re.DOTALL)
_SCHEMES: dict[str, Kind] = {
    scheme: SCHEMES[scheme] for scheme in ("s3", "gs", "abfss", "hdfs", "file")
}
_RESERVED = frozenset([*SCHEMES, *INSTEAD, "local", "mock"])
"""What begins a URI, so that a misspelt one is not taken for a store, or a store for a URI."""
_DEFAULT: Literal["default"] = "default"


def _about(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class CredentialSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the credentials of a store are: one of these, or `file` with `profile`."""

    file: Annotated[
        str,
        _about(
            "A file of this store's credentials: of AWS (INI, with a `profile` or `default`), or "
            "one JSON object. It is read anew when it changes. A relative path is one in "
            "`$CREDENTIALS_DIRECTORY` (systemd's `LoadCredential=`)."
        ),
    ] = ""
    environment: Annotated[
        str,
        _about(
            "Prefix of environment variables: with `PROD_` these are `PROD_AWS_ACCESS_KEY_ID` and "
            "so on."
        ),
    ] = ""
    profile: Annotated[str, _about("A profile of AWS's own configuration, of whatever kind.")] = ""


Credentials = Literal["default", "anonymous"] | CredentialSource
Who = Literal["*"] | list[str | int]


class StoreTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The table ``[store.NAME]``."""

    uri: Annotated[
        str,
        _about(
            "Where it begins: `s3://bucket/prefix`, `gs://…`, `abfss://container@account.…/…`, "
            "`hdfs://host:port/…` or `file:///…`. Names lead nowhere else."
        ),
    ]
    endpoint: Annotated[
        str, _about("Another server than the provider's, e.g. `https://minio.example:9000`.")
    ] = ""
    region: Annotated[str, _about("Of the bucket (S3).")] = ""
    force_virtual_addressing: Annotated[
        bool, _about("The bucket is a part of the host's name, also at an `endpoint` (S3).")
    ] = False
    requester_pays: Annotated[
        bool, _about("The owner of the credentials pays for the requests (S3).")
    ] = False
    ca_file: Annotated[
        str, _about("Certificates to trust instead of the system's (S3, Google, Azure).")
    ] = ""
    ca_dir: Annotated[
        str, _about("A directory of such certificates, with the names that OpenSSL gives them.")
    ] = ""
    verify_certificates: Annotated[
        bool, _about("Off: the server may have any certificate, and so may an attacker.")
    ] = True
    credentials: Annotated[
        Credentials,
        _about(
            '`"default"`: what the provider\'s own chain finds; `"anonymous"`; or one of '
            '`{ file = "…" }`, `{ environment = "PREFIX_" }`, `{ profile = "…" }`.'
        ),
    ] = _DEFAULT
    users: Annotated[
        Who,
        _about(
            "Who may use it besides root and the daemon's own user: names or numbers, or "
            '`"*"` for everybody. For clients of a daemon with `allow_other`.'
        ),
    ] = []
    groups: Annotated[Who, _about("The same for the members of groups.")] = []

    @property
    def kind(self) -> Kind:
        """The type of filesystem."""
        return _SCHEMES[self.uri.partition("://")[0]]

    @property
    def is_restricted(self) -> bool:
        """Whether it is for root and the daemon's own user only."""
        return not self.users and not self.groups

    def like(self) -> str:
        """Text that is equal for tables that lead to the same place by the same credentials."""
        same = msgspec.structs.replace(self, users=[], groups=[])
        return hashlib.blake2b(msgspec.json.encode(same), digest_size=16).hexdigest()

    def location(self, name: str, below: str) -> Location:
        """The place of the directory `below` in this store, called `name`.

        Raises LocationError for a path that is not one below it.
        """
        root, options = _root_of(self)
        path = f"{root}/{below}" if below else root
        check_below(name, below)
        return Location(self.kind, path, options, {}, StoreRef(name, root))


def split_named(text: str) -> tuple[str, str] | None:
    """Store and path of ``store:path``; None for what is a URI or a path.

    A local path that looks like it is meant with ``./`` in front.
    """
    found = _NAMED.fullmatch(text)
    if found is None or found[1].lower() in _RESERVED:
        return None
    return found[1], found[2].rstrip("/")


def is_uri(text: str) -> bool:
    """Whether it is a URI or the name of something in a store, and not a local path."""
    return "://" in text or split_named(text) is not None


def named_location(name: str, below: str, table: StoreTable | None) -> Location:
    """What is sent to a daemon that is to find the place itself.

    `table`: what the sender's own configuration has under that name. Raises LocationError.
    """
    check_below(name, below)
    options: dict[str, Option] = {"store": name}
    if table is not None:
        options["like"] = table.like()
    return Location("named", below, options)


def check_below(name: str, below: str) -> None:
    """Raise LocationError for a path that does not lead down, from the store `name` on."""
    if not below:
        return
    for part in below.split("/"):
        if part in ("", ".", ".."):
            raise LocationError(
                f"{name}:{_shown(below)} leads out of the store {name!r}; a path in a store has no "
                "empty, '.' or '..' components"
            )
    if any(ord(c) < 32 or ord(c) == 127 for c in below):
        raise LocationError(f"{name}:{_shown(below)}: a path in a store has no control characters")


def _shown(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:200])


# -- checks of a table


def check_table(name: str, table: StoreTable) -> None:
    """Raise ConfigError, with the key, for what cannot be meant."""
    if not re.fullmatch(STORE_NAME, name):
        raise ConfigError(
            f"store.{_shown(name)}: no name of a store; use letters, digits, '-' and '_'"
        )
    if name.lower() in _RESERVED:
        raise ConfigError(f"store.{name}: {name}: begins a URI; use another name")
    kind = _checked_kind(name, table)
    for key, kinds in _KINDS_OF_KEYS.items():
        if getattr(table, key) != _DEFAULTS[key] and kind not in kinds:
            raise ConfigError(f"store.{name}.{key}: there is none for {_scheme(table)}://")
    for key in ("ca_file", "ca_dir"):
        if getattr(table, key) and not getattr(table, key).startswith("/"):
            raise ConfigError(f"store.{name}.{key}: must be an absolute path")
    if kind == "local" and not table.is_restricted:
        # Links in it lead anywhere, and it would be read with the daemon's rights.
        raise ConfigError(
            f"store.{name}: local files are read with the daemon's own rights, and so not lent by "
            "users or groups; remove these"
        )
    _check_credentials(name, table, kind)
    try:
        _endpoint_of(table)
    except LocationError as error:
        raise ConfigError(f"store.{name}.endpoint: {error}") from None
    try:
        _root_of(table)
    except LocationError as error:
        raise ConfigError(f"store.{name}.uri: {error}") from None


_SERVERS: frozenset[Kind] = frozenset(["s3", "gcs", "azure"])
_KINDS_OF_KEYS: dict[str, frozenset[Kind]] = {
    "endpoint": _SERVERS,
    "region": frozenset(["s3"]),
    "force_virtual_addressing": frozenset(["s3"]),
    "requester_pays": frozenset(["s3"]),
    "ca_file": _SERVERS,
    "ca_dir": _SERVERS,
    "verify_certificates": _SERVERS,
}
_DEFAULTS = {f.name: f.default for f in msgspec.structs.fields(StoreTable)}


def _checked_kind(name: str, table: StoreTable) -> Kind:
    kind = _SCHEMES.get(_scheme(table))
    if kind is None:
        known = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
        raise ConfigError(f"store.{name}.uri: must begin with one of {known}")
    return kind


def _scheme(table: StoreTable) -> str:
    return table.uri.partition("://")[0]


def _check_credentials(name: str, table: StoreTable, kind: Kind) -> None:
    source, key = table.credentials, f"store.{name}.credentials"
    if isinstance(source, str):
        if source == "anonymous" and kind not in ("s3", "gcs", "azure"):
            raise ConfigError(f"{key}: there is no anonymous access by {_scheme(table)}://")
        return
    given = {each for each in ("file", "environment", "profile") if getattr(source, each)}
    if given not in ({"file"}, {"environment"}, {"profile"}, {"file", "profile"}):
        raise ConfigError(f"{key}: give one of file, environment and profile")
    if "profile" in given and kind != "s3":
        raise ConfigError(f"{key}: profiles are AWS's, and not for {_scheme(table)}://")
    if kind in ("hdfs", "local"):
        raise ConfigError(f"{key}: {_scheme(table)}:// takes none; leave it out")
    if source.environment and not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", source.environment):
        raise ConfigError(f"{key}.environment: no prefix of a variable's name")


def _root_of(table: StoreTable) -> tuple[str, dict[str, Option]]:
    """Path, without trailing slash, and options of a store. Raises LocationError."""
    if "?" in table.uri:
        raise LocationError("a store's URI has no query; use the other keys of its table")
    if not _SCHEMES.get(_scheme(table)):
        raise LocationError("a store's URI cannot begin like that")
    found = parse_uri(table.uri)
    if found.secrets:
        raise LocationError("a store's URI holds no credentials; use the key credentials")
    path = found.path.rstrip("/")
    check_below("", path.lstrip("/") if found.kind in ("local", "hdfs") else path)
    return path, {**found.options, **_options_of(table, found)}


def _options_of(table: StoreTable, found: Location) -> dict[str, Option]:
    """What the other keys of the table say. Raises LocationError."""
    said: dict[str, Option] = {
        "region": table.region,
        "force_virtual_addressing": table.force_virtual_addressing,
        "requester_pays": table.requester_pays,
        "tls_ca_file_path": table.ca_file,
        "tls_ca_dir_path": table.ca_dir,
        "anonymous": table.credentials == "anonymous",
    }
    options = {name: value for name, value in said.items() if value}
    if not table.verify_certificates:
        options["tls_verify_certificates"] = False
    endpoint = _endpoint_of(table)
    if endpoint is None:
        return options
    if found.kind != "azure":
        return {**endpoint_options(found.kind, endpoint), **options}
    # The account's name follows in each URL, so one that is in the endpoint would be there twice.
    place = endpoint.place.removesuffix(f"/{found.options['account_name']}")
    for service in ("blob", "dfs"):
        options[f"{service}_storage_authority"] = place
        if endpoint.scheme == "http":
            options[f"{service}_storage_scheme"] = "http"
    return options


def _endpoint_of(table: StoreTable) -> Endpoint | None:
    return parse_endpoint(table.endpoint) if table.endpoint else None
