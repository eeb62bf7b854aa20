"""A location while the settings of the caller's surroundings are added to it: see `ambient`."""

import os
from collections.abc import Mapping
from typing import Literal, NamedTuple

from ckptfs._model.endpoints import Endpoint, parse_endpoint
from ckptfs._model.location import Kind, Location, Option
from ckptfs._store.kinds import KINDS, NAMESPACE
from ckptfs.errors import AccessDenied, LocationError

GIVEN = "option"
"""Of a URI or a filesystem."""
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
"""Options that name a file of the caller's."""
OF_CALLER = OF_FILES | {"profile", "container_credentials_uri"}
"""Options that lead to something of the caller's, which a daemon of another user leaves alone."""


class Setting(NamedTuple):
    """What the user has said in one place, and what becomes of it.

    Attributes:
        place: A variable, a key of a profile, or `GIVEN` with the name of the option.
        value: "": it is a secret.
        use: Whether it counts.
        why: The reason, where it does not.
    """

    place: str
    value: str
    use: Literal["used", "ignored", "refused"]
    why: str = ""


class Draft:
    """A location while the settings of the caller's surroundings are added to it.

    Attributes:
        kind, path, options, secrets: Of the location, as far as it is known.
        environ: The caller's environment.
        settings: What was said, in the order in which it was looked at.
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
        """Take all options that are there now as given, and not as the environment's."""
        self._given = set(self.options)

    @property
    def location(self) -> Location:
        """The location as it is now."""
        options = self.options
        if OF_FILES & options.keys():
            options = {**options, NAMESPACE: mount_namespace()}
        implied = tuple(sorted(options.keys() - self._given - {NAMESPACE, "account_name"}))
        return Location(self.kind, self.path, options, self.secrets, implied=implied)

    @property
    def endpoint(self) -> Endpoint | None:
        """The endpoint that was named; None: the provider's."""
        text = self.options.get("endpoint_override") or self.options.get("endpoint")
        scheme = str(self.options.get("scheme") or "https")
        return parse_endpoint(str(text), scheme) if text else None

    def first_of(self, variables: tuple[str, ...]) -> tuple[str, str]:
        """The first variable that is set, and its value; two empty texts: none is."""
        return next(((v, self.environ[v]) for v in variables if self.environ.get(v)), ("", ""))

    def take(self, option: str, value: Option, place: str, shown: str = "") -> bool:
        """Use a setting for an option, unless something that comes first has set it.

        `shown` stands for the value of a secret.
        """
        is_secret = option in KINDS[self.kind].secret
        shown = shown if is_secret else str(value)
        if option in self.options or option in self.secrets:
            self.settings.append(
                Setting(place, shown, "ignored", f"{option} is said in a place that comes first")
            )
            return False
        if is_secret:
            self.secrets[option] = str(value)
        else:
            self.options[option] = value
        self.used(place, shown)
        return True

    def used(self, place: str, value: str = "") -> None:
        """Note a setting that counts."""
        self.settings.append(Setting(place, value, "used"))

    def ignored(self, place: str, value: str, why: str) -> None:
        """Note a setting that has no effect."""
        self.settings.append(Setting(place, value, "ignored", why))

    def refused(self, place: str, value: str, why: str) -> LocationError:
        """Note a setting that cannot be used; returns what to raise."""
        self.settings.append(Setting(place, value, "refused", why))
        return LocationError(f"{self._name}: {place}: {why}")

    def denied(self, place: str, value: str, why: str) -> AccessDenied:
        """Like `refused`, of credentials."""
        self.refused(place, value, why)
        return AccessDenied(f"{self._name}: {place}: {why}")

    def take_endpoint(self, text: str, place: str, scheme: str = "https") -> None:
        """Use an endpoint, unless something that comes first has named one."""
        if self.options.get("endpoint_override"):
            self.ignored(place, text, "an endpoint is named in a place that comes first")
            return
        try:
            found = parse_endpoint(text, scheme)
        except LocationError as error:
            raise self.refused(place, "", str(error)) from None
        self.options |= {"endpoint_override": found.place, "scheme": found.scheme}
        self._given -= {"scheme"}  # the default was there
        self.used(place, found.text)


def add_variables(draft: Draft) -> None:
    """Use the variables that stand for options. Secrets count where there are no others."""
    row = KINDS.get(draft.kind)
    if row is None:
        return
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
    """Whether a location brings no credentials, and does not say that it needs none."""
    credentials = draft.secrets.keys() - {"proxy", "tls_ca_pem"}
    anonymous = draft.options.get("anonymous") or draft.options.get("anon")
    return not credentials and not anonymous and not draft.options.get("profile")


def mount_namespace() -> str:
    """The mount namespace of this process. Paths mean the same to processes that share one."""
    return os.readlink("/proc/self/ns/mnt")
