"""A location while the settings of the caller's environment are added to it: see `resolve`."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

from ckptfs._model.endpoints import Endpoint, parse_endpoint
from ckptfs._model.location import Location
from ckptfs._model.uri_parameters import Option
from ckptfs._store.builders import NAMESPACE
from ckptfs._store.kinds import KINDS
from ckptfs.errors import AccessDenied, LocationError

if TYPE_CHECKING:
    from ckptfs._model.kinds import Kind

GIVEN = "option"
"""The place of settings in a URI or a filesystem."""
OF_FILES = frozenset(
    [
        "tls_ca_file_path",
        "tls_ca_dir_path",
        "config_file",
        "credentials_file",
        "web_identity_token_file",
        "container_token_file",
        "application_credentials",
        "federated_token_file",
    ]
)
"""The options that name a file of the caller."""
OF_CALLER = OF_FILES | {"profile", "container_credentials_uri"}
"""The options that lead to files or services of the caller. A daemon of another user does not
follow them."""


class Setting(NamedTuple):
    """One setting of the user, and its use.

    Attributes:
        place: A variable, a key of a profile, or `GIVEN` with the name of the option.
        value: The value; "" for a secret.
        use: Whether ckptfs uses, ignores or refuses it.
        why: The reason if it is not used.
    """

    place: str
    value: str
    use: Literal["used", "ignored", "refused"]
    why: str = ""


class Draft:
    """A location while the settings of the caller's environment are added to it.

    Attributes:
        kind, path, options, secrets: The location as far as it is known.
        environ: The caller's environment.
        settings: The settings in the order in which they were read.
    """

    def __init__(self, location: Location, environ: Mapping[str, str]) -> None:
        self.kind: Kind = location.kind
        self.path = location.path
        self.options: dict[str, Option] = dict(location.options)
        self.secrets: dict[str, str] = dict(location.secrets)
        self.environ = environ
        self.settings = [
            Setting(f"{GIVEN} {name}", "" if name in self.secrets else str(value), "used")
            for name, value in {**self.options, **self.secrets}.items()
        ]
        self._given = set(location.options)
        self._name = location.uri

    def settle(self) -> None:
        """Count all current options as given, and not as from the environment."""
        self._given = set(self.options)

    @property
    def location(self) -> Location:
        """The current location."""
        options = self.options
        if OF_FILES & options.keys():
            options = {**options, NAMESPACE: mount_namespace()}
        implied = tuple(sorted(options.keys() - self._given - {NAMESPACE, "account_name"}))
        return Location(self.kind, self.path, options, self.secrets, implied=implied)

    @property
    def endpoint(self) -> Endpoint | None:
        """The endpoint; None for the provider's own."""
        text = self.options.get("endpoint_override") or self.options.get("endpoint")
        scheme = str(self.options.get("scheme") or "https")
        return parse_endpoint(str(text), scheme) if text else None

    def first_of(self, variables: tuple[str, ...]) -> tuple[str, str]:
        """The first variable that is set, and its value; two empty texts if none is set."""
        return next(((v, self.environ[v]) for v in variables if self.environ.get(v)), ("", ""))

    def take(self, option: str, value: Option, place: str, shown: str = "") -> bool:
        """Use a setting for an option, unless a setting with precedence has set it.

        `shown` replaces the value of a secret in messages.
        """
        is_secret = option in KINDS[self.kind].secret
        shown = shown if is_secret else str(value)
        if option in self.options or option in self.secrets:
            self.settings.append(
                Setting(place, shown, "ignored", f"another setting of {option} has precedence")
            )
            return False
        if is_secret:
            self.secrets[option] = str(value)
        else:
            self.options[option] = value
        self.used(place, shown)
        return True

    def used(self, place: str, value: str = "") -> None:
        """Note a setting that is used."""
        self.settings.append(Setting(place, value, "used"))

    def ignored(self, place: str, value: str, why: str) -> None:
        """Note a setting that has no effect."""
        self.settings.append(Setting(place, value, "ignored", why))

    def refused(self, place: str, value: str, why: str) -> LocationError:
        """Note a setting that ckptfs cannot use. Returns the exception to raise."""
        self.settings.append(Setting(place, value, "refused", why))
        return LocationError(f"{self._name}: {place}: {why}")

    def denied(self, place: str, value: str, why: str) -> AccessDenied:
        """As `refused`, for credentials."""
        self.refused(place, value, why)
        return AccessDenied(f"{self._name}: {place}: {why}")

    def take_endpoint(self, text: str, place: str, scheme: str = "https") -> None:
        """Use an endpoint, unless a setting with precedence has named one."""
        if self.options.get("endpoint_override"):
            self.ignored(place, text, "another setting of the endpoint has precedence")
            return
        try:
            found = parse_endpoint(text, scheme)
        except LocationError as error:
            raise self.refused(place, "", str(error)) from None
        self.options |= {"endpoint_override": found.place, "scheme": found.scheme}
        self._given -= {"scheme"}  # the default was there
        self.used(place, found.text)


def canonise_endpoint(draft: Draft) -> None:
    """Give an endpoint the same text in all its spellings."""
    endpoint = draft.endpoint
    if endpoint is not None:
        draft.options |= {"endpoint_override": endpoint.place, "scheme": endpoint.scheme}
    elif draft.kind == "gcs" or draft.options.get("scheme") == "https":
        # pyarrow gives each anonymous filesystem for Google the scheme "http".
        draft.options.pop("scheme", None)


def add_variables(draft: Draft) -> None:
    """Use the variables that stand for options. Secrets count only if the location has none."""
    row = KINDS[draft.kind]
    bare = is_bare(draft)
    for option, variables in row.variables.items():
        place, value = draft.first_of(variables)
        if not value:
            continue
        if option in row.secret and not bare:
            draft.ignored(place, "", "other credentials are given")
        else:
            draft.take(option, value, place)


def is_bare(draft: Draft) -> bool:
    """Whether a location has no credentials and is not anonymous."""
    credentials = draft.secrets.keys() - {"proxy", "tls_ca_pem"}
    anonymous = draft.options.get("anonymous") or draft.options.get("anon")
    return not credentials and not anonymous and not draft.options.get("profile")


def mount_namespace() -> str:
    """The mount namespace of this process. Paths mean the same to processes that share one."""
    return os.readlink("/proc/self/ns/mnt")
