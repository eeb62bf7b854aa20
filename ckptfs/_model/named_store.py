"""Named stores: their tables in the configuration, and the locations that names stand for.

``prod:run7/checkpoint_000100`` is the directory ``run7/checkpoint_000100`` below the URI of the
table ``[store.prod]``. The module has plain data and pure functions. ``ckptfs._store.credentials``
reads the credentials.
"""

import hashlib
import re
from typing import Annotated, Literal

import msgspec

from ckptfs._model.endpoints import Endpoint, parse_endpoint
from ckptfs._model.kinds import KINDS, SCHEMES, Kind, TableRules
from ckptfs._model.location import Location, StoreRef
from ckptfs._model.manifest import printable
from ckptfs._model.uri_parameters import Option
from ckptfs._model.uris import INSTEAD, parse_uri
from ckptfs.errors import ConfigError, LocationError

STORE_NAME = r"[A-Za-z][A-Za-z0-9_-]{0,62}"
_NAMED = re.compile(rf"({STORE_NAME}):(?!//)(.*)", re.DOTALL)
_SCHEMES: dict[str, Kind] = {
    row.schemes[0]: kind for kind, row in KINDS.items() if row.table is not None
}
_RESERVED = frozenset([*SCHEMES, *INSTEAD, "local", "mock"])
"""The beginnings of URIs, which cannot be names of stores. So a misspelt URI is not taken for a
store, or a store for a URI."""
_DEFAULT: Literal["default"] = "default"


def _about(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=" ".join(text.split()))


class CredentialSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The source of a store's credentials: one of these, or `file` with `profile`."""

    file: Annotated[
        str,
        _about("""A file of this store's credentials: of AWS (INI, with a `profile` or `default`),
        or one JSON object. ckptfs reads it again when it changes. A relative path is below
        `$CREDENTIALS_DIRECTORY` (systemd's `LoadCredential=`)."""),
    ] = ""
    environment: Annotated[
        str,
        _about("""The prefix of environment variables. With `PROD_` these are
        `PROD_AWS_ACCESS_KEY_ID` and so on."""),
    ] = ""
    profile: Annotated[str, _about("A profile of AWS's own configuration, of any kind.")] = ""


Credentials = Literal["default", "anonymous"] | CredentialSource
Who = Literal["*"] | list[str | int]


class StoreTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The table ``[store.NAME]``."""

    uri: Annotated[
        str,
        _about("""The store's root: `s3://bucket/prefix`, `gs://…`, `abfss://container@account.…/…`,
        `hdfs://host:port/…` or `file:///…`. Names lead only below it."""),
    ]
    endpoint: Annotated[
        str, _about("The server, if it is not the provider's: `https://minio.example:9000`.")
    ] = ""
    region: Annotated[str, _about("The bucket's region (S3).")] = ""
    force_virtual_addressing: Annotated[
        bool, _about("Whether the bucket is a part of the host's name at an `endpoint` (S3).")
    ] = False
    requester_pays: Annotated[
        bool, _about("Whether the owner of the credentials pays for the requests (S3).")
    ] = False
    ca_file: Annotated[
        str, _about("Certificates to trust instead of the system's (S3, Google, Azure).")
    ] = ""
    ca_dir: Annotated[
        str, _about("A directory of such certificates, with the names that OpenSSL gives them.")
    ] = ""
    verify_certificates: Annotated[
        bool, _about("Whether to check the server's certificate. If not, others can pose as it.")
    ] = True
    credentials: Annotated[
        Credentials,
        _about("""`"default"` for the provider's own chain, `"anonymous"`, or one of `{ file = "…"
        }`, `{ environment = "PREFIX_" }`, `{ profile = "…" }`."""),
    ] = _DEFAULT
    users: Annotated[
        Who,
        _about("""The users that may use it besides root and the daemon's own user: names or
        numbers, or `"*"` for all. For clients of a daemon with `allow_other`."""),
    ] = []
    groups: Annotated[Who, _about("The same for the members of groups.")] = []

    @property
    def kind(self) -> Kind:
        """The type of filesystem."""
        return _SCHEMES[self.uri.partition("://")[0]]

    def like(self) -> str:
        """Text that is equal for tables with the same location and the same credentials."""
        same = msgspec.structs.replace(self, users=[], groups=[])
        return hashlib.blake2b(msgspec.json.encode(same), digest_size=16).hexdigest()

    def location(self, name: str, below: str) -> Location:
        """The location of the directory `below` in this store, called `name`.

        Raises LocationError for a path that leads out of the store.
        """
        root, options = _root_of(self)
        path = f"{root}/{below}" if below else root
        check_below(name, below)
        return Location(self.kind, path, options, {}, StoreRef(name, root))


def split_named(text: str) -> tuple[str, str] | None:
    """The store and the path of ``store:path``; None for a URI or a path.

    A local path that looks like it needs ``./`` in front.
    """
    found = _NAMED.fullmatch(text)
    if found is None or found[1].lower() in _RESERVED:
        return None
    return found[1], found[2].rstrip("/")


def is_uri(text: str) -> bool:
    """Whether the text is a URI or ``store:path``, and not a local path."""
    return "://" in text or split_named(text) is not None


def named_location(name: str, below: str, table: StoreTable | None) -> Location:
    """The location to send to a daemon that looks the store up itself. Raises LocationError.

    `table` is the sender's own table of that name, if any.
    """
    check_below(name, below)
    options: dict[str, Option] = {"store": name}
    if table is not None:
        options["like"] = table.like()
    return Location("named", below, options)


def check_below(name: str, below: str) -> None:
    """Raise LocationError for a path that leads out of the store `name`."""
    if not below:
        return
    for part in below.split("/"):
        if part in ("", ".", ".."):
            raise LocationError(
                f"{name}:{printable(below)} leads out of the store {name!r}; a path in a store has "
                "no empty, '.' or '..' components"
            )
    if any(ord(c) < 32 or ord(c) == 127 for c in below):
        raise LocationError(
            f"{name}:{printable(below)}: a path in a store has no control characters"
        )


# -- checks of a table


def check_table(name: str, table: StoreTable) -> None:
    """Raise ConfigError, with the key, for an invalid table."""
    if not re.fullmatch(STORE_NAME, name):
        raise ConfigError(
            f"store.{printable(name)}: not the name of a store; use letters, digits, '-' and '_'"
        )
    if name.lower() in _RESERVED:
        raise ConfigError(f"store.{name}: {name}: is the beginning of URIs; use another name")
    kind = _SCHEMES.get(_scheme(table))
    if kind is None:
        known = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
        raise ConfigError(f"store.{name}.uri: must begin with one of {known}")
    for key in _KEYS_OF_KINDS:
        if getattr(table, key) != _DEFAULTS[key] and key not in _rules(kind).keys:
            raise ConfigError(
                f"store.{name}.{key}: a store at {_scheme(table)}:// has no such key; leave it out"
            )
    for key in ("ca_file", "ca_dir"):
        if getattr(table, key) and not getattr(table, key).startswith("/"):
            raise ConfigError(f"store.{name}.{key}: must be an absolute path")
    if kind == "local" and (table.users or table.groups):
        # Links in it lead anywhere, and it would be read with the daemon's rights.
        raise ConfigError(
            f"store.{name}: the daemon reads local files with its own rights, so other users may "
            "not use this store; remove users and groups"
        )
    _check_credentials(name, table, kind)
    for key, check in (("endpoint", _endpoint_of), ("uri", _root_of)):
        try:
            check(table)
        except LocationError as error:
            raise ConfigError(f"store.{name}.{key}: {error}") from None


def _rules(kind: Kind) -> TableRules:
    return KINDS[kind].table or TableRules()


_DEFAULTS = {f.name: f.default for f in msgspec.structs.fields(StoreTable)}
_KEYS_OF_KINDS = [name for name in _DEFAULTS if any(name in _rules(kind).keys for kind in KINDS)]


def _scheme(table: StoreTable) -> str:
    return table.uri.partition("://")[0]


def _check_credentials(name: str, table: StoreTable, kind: Kind) -> None:
    source, key = table.credentials, f"store.{name}.credentials"
    if isinstance(source, str):
        if source == "anonymous" and "anonymous" not in _rules(kind).credentials:
            raise ConfigError(f"{key}: {_scheme(table)}:// has no anonymous access; leave it out")
        return
    given = {each for each in ("file", "environment", "profile") if getattr(source, each)}
    if given not in ({"file"}, {"environment"}, {"profile"}, {"file", "profile"}):
        raise ConfigError(f"{key}: give one of file, environment and profile")
    if "profile" in given and "profile" not in _rules(kind).credentials:
        raise ConfigError(f"{key}: only s3:// has profiles, and not {_scheme(table)}://")
    if not given <= _rules(kind).credentials:
        raise ConfigError(f"{key}: {_scheme(table)}:// takes no credentials; leave it out")
    if source.environment and not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", source.environment):
        raise ConfigError(
            f"{key}.environment: not the prefix of a variable's name; use letters, digits and '_'"
        )


def _root_of(table: StoreTable) -> tuple[str, dict[str, Option]]:
    """The path, without trailing slash, and the options of a store. Raises LocationError."""
    if "?" in table.uri:
        raise LocationError("a store's URI has no query; use the other keys of its table")
    if not _SCHEMES.get(_scheme(table)):
        raise LocationError("a store's URI cannot have this scheme")
    found = parse_uri(table.uri)
    if found.secrets:
        raise LocationError("a store's URI holds no credentials; use the key credentials")
    path = found.path.rstrip("/")
    check_below("", path.lstrip("/") if found.kind in ("local", "hdfs") else path)
    return path, {**found.options, **_options_of(table, found)}


def _options_of(table: StoreTable, found: Location) -> dict[str, Option]:
    """The options for the other keys of the table. Raises LocationError."""
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
    return {**_rules(found.kind).endpoint(endpoint, found.options), **options}


def _endpoint_of(table: StoreTable) -> Endpoint | None:
    return parse_endpoint(table.endpoint) if table.endpoint else None
