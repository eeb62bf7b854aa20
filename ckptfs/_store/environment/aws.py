# botocore has no type hints; nothing of it leaves this module.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
"""The settings of AWS's standard variables and of the caller's profile for a location on S3.

botocore reads the files, and is imported only if there are files. This module does not search for
keys. A location names the profile, its files, the web identity or the container's endpoint, and
``s3.keys`` lets botocore find and renew the keys there.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from ckptfs._store.environment.draft import Draft, add_variables, canonise_endpoint, is_bare
from ckptfs._store.environment.networks import take_certificates
from ckptfs._store.kinds import KINDS

_PROFILE = "AWS_DEFAULT_PROFILE", "AWS_PROFILE"
"""The variables of profiles, in the order in which botocore reads them."""
_ENDPOINT = "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"
_CONFIG = "AWS_CONFIG_FILE"
_CREDENTIALS = "AWS_SHARED_CREDENTIALS_FILE"
_WEB_IDENTITY = "AWS_WEB_IDENTITY_TOKEN_FILE"
_CONTAINER = "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"
_OF_KEYS = frozenset(
    [
        "aws_access_key_id",
        "aws_secret_access_key",
        "aws_session_token",
        "aws_security_token",
        "credential_process",
        "credential_source",
        "duration_seconds",
        "external_id",
        "login_session",
        "role_arn",
        "role_session_name",
        "source_profile",
        "sso_account_id",
        "sso_region",
        "sso_role_name",
        "sso_session",
        "sso_start_url",
        "web_identity_token_file",
    ]
)
"""The keys of a profile that tell botocore where the credentials are."""
_NO_EFFECT = "it has no effect on reading"
_OF_COMMANDS = "it is for the command line of AWS"
_IGNORED = {
    "output": _OF_COMMANDS,
    "cli_pager": _OF_COMMANDS,
    "payload_signing_enabled": "ckptfs signs the metadata that it writes",
    "multipart_threshold": _OF_COMMANDS,
    "multipart_chunksize": _OF_COMMANDS,
    "max_concurrent_requests": "connections_max says how many requests ckptfs makes",
    "max_queue_size": _OF_COMMANDS,
    "max_bandwidth": _OF_COMMANDS,
    "us_east_1_regional_endpoint": "ckptfs always uses the region's own endpoint",
}


class _Profile(NamedTuple):
    """A profile: the place that names it, its name, its keys, and the services of the files."""

    place: str
    name: str
    keys: Mapping[str, Any]
    services: Mapping[str, Any]

    def at(self, key: str) -> str:
        """The name of a key of the profile, for messages."""
        return f"profile {self.name}: {key}"

    def text(self, key: str) -> str:
        """The value of a key; "" without one."""
        return str(self.keys.get(key) or "")

    @property
    def of_s3(self) -> Mapping[str, Any]:
        """The keys of the section for S3."""
        found = self.keys.get("s3")
        return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


_NO_PROFILE = _Profile("", "", {}, {})


def complete(draft: Draft) -> None:
    """Add the settings of variables and the profile. Raises LocationError for a setting that ckptfs
    cannot use, and AccessDenied for a profile or a file that does not exist."""
    canonise_endpoint(draft)
    _refuse_half_a_key(draft)
    anonymous = bool(draft.options.get("anonymous"))
    explicit = bool(draft.options.get("profile"))
    profile = _profile_of(draft)
    add_variables(draft)
    _add_endpoint(draft, profile)
    _add_keys_of(draft, profile)
    _add_kind_of_endpoint(draft, profile)
    add_ca_bundle(draft, profile)
    if not anonymous and (explicit or is_bare(draft)):
        _add_credentials(draft, profile)
        _add_sts_endpoint(draft)
    elif draft.options.get("role_arn"):
        _add_sts_endpoint(draft)
    else:
        _ignore_credentials(draft, profile)


def _refuse_half_a_key(draft: Draft) -> None:
    environ = draft.environ
    if draft.secrets or draft.options.get("anonymous") or draft.options.get("profile"):
        return
    key, secret = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"
    if environ.get(key) and not environ.get(secret):
        raise draft.denied(key, "", f"{secret} is not set; set both, or none")


# -- the profile


def _profile_of(draft: Draft) -> _Profile:
    """The caller's profile, or `_NO_PROFILE`. Raises AccessDenied for a profile that is missing."""
    place, name = draft.first_of(_PROFILE)
    if given := draft.options.get("profile"):
        place, name = "profile", str(given)
    files = _files(draft)
    for variable in (_CONFIG, _CREDENTIALS):
        if value := draft.environ.get(variable):
            if os.path.exists(os.path.expanduser(value)):
                draft.used(variable, value)
            else:
                draft.ignored(variable, value, "there is no such file")
    has_files = any(os.path.isfile(file) for file in files)
    full: dict[str, Any] = _parsed(draft, files) if has_files else {"profiles": {}}
    keys = full["profiles"].get(name or "default")
    if keys is None:
        if name:
            missing = f"there is no profile {name!r} in {files[0]} or {files[1]}"
            raise draft.denied(place, name, f"{missing}; add it, or name another one")
        return _NO_PROFILE
    if name and place != "profile":
        draft.used(place, name)
    return _Profile(place, name or "default", keys, full.get("services", {}))


def _files(draft: Draft) -> tuple[str, str]:
    """The files of configuration and credentials, as absolute paths."""
    home = draft.environ.get("HOME") or os.path.expanduser("~")
    found = (
        draft.environ.get(_CONFIG) or os.path.join(home, ".aws/config"),
        draft.environ.get(_CREDENTIALS) or os.path.join(home, ".aws/credentials"),
    )
    config, credentials = (os.path.abspath(os.path.expanduser(path)) for path in found)
    return config, credentials


def _parsed(draft: Draft, files: tuple[str, str]) -> dict[str, Any]:
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    session = Session()
    session.set_config_variable("config_file", files[0])
    session.set_config_variable("credentials_file", files[1])
    try:
        return cast("dict[str, Any]", session.full_config)
    except (BotoCoreError, OSError, UnicodeDecodeError) as error:
        raise draft.denied("AWS configuration", "", str(error).partition("\n")[0]) from None


# -- the settings of the profile


def _add_endpoint(draft: Draft, profile: _Profile) -> None:
    ignoring = _flag(draft, profile, "ignore_configured_endpoint_urls")
    named = [draft.first_of((name,)) for name in _ENDPOINT]
    if section := profile.text("services"):
        if section not in profile.services:
            raise draft.refused(
                profile.at("services"), section, f"there is no section [services {section}]"
            )
        of_s3 = profile.services[section].get("s3", {})
        named.append((profile.at("services: s3: endpoint_url"), of_s3.get("endpoint_url", "")))
    named.append((profile.at("endpoint_url"), profile.text("endpoint_url")))
    for place, value in named:
        if value and ignoring:
            draft.ignored(place, value, f"{ignoring} says so")
        elif value:
            draft.take_endpoint(value, place)


def _flag(draft: Draft, profile: _Profile, key: str) -> str:
    """The place that has set a flag to true, or ""."""
    variable = "AWS_" + key.upper()
    if variable in draft.environ:
        return variable if draft.environ[variable].lower() == "true" else ""
    return profile.at(key) if profile.text(key).lower() == "true" else ""


def _add_keys_of(draft: Draft, profile: _Profile) -> None:
    """The keys that are not about credentials or an endpoint."""
    if region := profile.text("region"):
        draft.take("region", region, profile.at("region"))
    for key, value in profile.of_s3.items():
        _add_key_of_s3(draft, profile, key, str(value))
    handled = {
        *("region", "s3", "services", "endpoint_url", "ca_bundle", "mfa_serial"),
        *("ignore_configured_endpoint_urls", "use_dualstack_endpoint", "use_fips_endpoint"),
    }
    for key in profile.keys:
        if key not in handled | _OF_KEYS and not key.startswith("__"):
            draft.ignored(profile.at(key), "", _why_ignored(key))


def _add_key_of_s3(draft: Draft, profile: _Profile, key: str, value: str) -> None:
    place = profile.at(f"s3: {key}")
    if key == "addressing_style":
        if value == "virtual":
            draft.take("force_virtual_addressing", True, place)
        elif value == "path" and not draft.options.get("endpoint_override"):
            draft.ignored(place, value, "Amazon answers both styles alike")
        else:
            draft.used(place, value)
    elif key in ("use_accelerate_endpoint", "use_dualstack_endpoint"):
        pass  # see _add_kind_of_endpoint
    else:
        draft.ignored(place, value, _why_ignored(key))


def _why_ignored(key: str) -> str:
    return _IGNORED.get(key) or KINDS["s3"].ignored.get(f"AWS_{key.upper()}", _NO_EFFECT)


def _add_kind_of_endpoint(draft: Draft, profile: _Profile) -> None:
    """Amazon's other endpoints, by the names in the guide of S3, "Amazon S3 endpoints". botocore
    would take half a second for them."""
    places = {
        "fips": _flag(draft, profile, "use_fips_endpoint"),
        "dualstack": _flag(draft, profile, "use_dualstack_endpoint"),
        "accelerate": "",
    }
    for name in ("dualstack", "accelerate"):
        if str(profile.of_s3.get(f"use_{name}_endpoint")).lower() == "true":
            places[name] = places[name] or profile.at(f"s3: use_{name}_endpoint")
    wanted = {name: place for name, place in places.items() if place}
    if not wanted:
        return
    first = next(iter(wanted.values()))
    region = str(draft.options.get("region") or "")
    if draft.options.get("endpoint_override"):
        for place in wanted.values():
            draft.ignored(place, "true", "another endpoint is named")
        return
    if "accelerate" in wanted and "fips" in wanted:
        raise draft.refused(first, "true", "Amazon has no accelerated endpoint of that kind")
    if not region:
        raise draft.refused(first, "true", "it needs the bucket's region; set AWS_REGION")
    dual = ".dualstack" if "dualstack" in wanted else ""
    suffix = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    if "accelerate" in wanted:
        host = f"s3-accelerate{dual}.{suffix}"
    else:
        host = f"s3{'-fips' if 'fips' in wanted else ''}{dual}.{region}.{suffix}"
    draft.take_endpoint(f"https://{host}", " and ".join(wanted.values()))
    draft.options["force_virtual_addressing"] = True


def add_ca_bundle(draft: Draft, profile: _Profile = _NO_PROFILE) -> None:
    """Trust the certificates that AWS's variable or the profile names."""
    of_profile = profile.at("ca_bundle"), profile.text("ca_bundle")
    for place, value in (draft.first_of(("AWS_CA_BUNDLE",)), of_profile):
        if not value:
            continue
        if draft.options.get("scheme") == "http":
            draft.ignored(place, value, "the endpoint is plain http")
        elif draft.options.get("tls_verify_certificates") is False:
            draft.ignored(place, value, "the server's certificate is not checked")
        elif {"tls_ca_file_path", "tls_ca_dir_path"} & draft.options.keys():
            draft.ignored(place, value, "another setting of certificates has precedence")
        else:
            take_certificates(draft, value, place)


# -- credentials


def _add_credentials(draft: Draft, profile: _Profile) -> None:
    """The source of the keys, in the order of botocore's chain.

    A role of the profile comes first, then a web identity of the environment, then the profile's
    other sources, then the container's.
    """
    token = draft.environ.get(_WEB_IDENTITY, "")
    explicit = bool(draft.options.get("profile"))
    assumes = bool({"source_profile", "credential_source"} & profile.keys.keys())
    if token and not explicit and not assumes:
        _add_web_identity(draft, token)
    elif explicit or profile.place or _OF_KEYS & profile.keys.keys():
        _use_profile(draft, profile)
    else:
        _add_container(draft)


def _use_profile(draft: Draft, profile: _Profile) -> None:
    if "mfa_serial" in profile.keys:
        raise draft.denied(
            profile.at("mfa_serial"),
            "",
            "a daemon cannot ask for a code; put keys of a session into the environment (aws sts "
            "get-session-token)",
        )
    config, credentials = _files(draft)
    draft.options |= {"profile": profile.name, "config_file": config}
    draft.options["credentials_file"] = credentials
    for key in sorted(_OF_KEYS & profile.keys.keys()):
        draft.used(profile.at(key))


def _add_web_identity(draft: Draft, token: str) -> None:
    role = draft.environ.get("AWS_ROLE_ARN", "")
    if not role:
        raise draft.denied(_WEB_IDENTITY, token, "AWS_ROLE_ARN is not set; set it as well")
    if not os.access(token, os.R_OK):
        raise draft.denied(_WEB_IDENTITY, token, f"{token!r} cannot be read")
    if "role_arn" in draft.options:
        draft.ignored(_WEB_IDENTITY, token, "the filesystem names a role to assume with keys")
        return
    draft.take("web_identity_token_file", os.path.abspath(token), _WEB_IDENTITY)
    draft.take("role_arn", role, "AWS_ROLE_ARN")
    if session := draft.environ.get("AWS_ROLE_SESSION_NAME"):
        draft.take("session_name", session, "AWS_ROLE_SESSION_NAME")


def _add_container(draft: Draft) -> None:
    place, uri = draft.first_of(_CONTAINER)
    if not uri:
        return
    draft.take("container_credentials_uri", uri, place)
    for option, name in (
        ("container_token_file", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"),
        ("container_token", "AWS_CONTAINER_AUTHORIZATION_TOKEN"),
    ):
        if value := draft.environ.get(name):
            draft.take(option, value, name)


def _add_sts_endpoint(draft: Draft) -> None:
    """Use the variable for the endpoint of all services also for the service that gives keys."""
    place, value = draft.first_of(("AWS_ENDPOINT_URL_STS", "AWS_ENDPOINT_URL"))
    if value and not _flag(draft, _NO_PROFILE, "ignore_configured_endpoint_urls"):
        draft.options["sts_endpoint_url"] = value
        if place != "AWS_ENDPOINT_URL":
            draft.used(place, value)


def _ignore_credentials(draft: Draft, profile: _Profile) -> None:
    why = "other keys count first, or none are needed"
    for name in (_WEB_IDENTITY, "AWS_ROLE_ARN", "AWS_ROLE_SESSION_NAME", *_CONTAINER):
        if value := draft.environ.get(name):
            draft.ignored(name, value, why)
    for key in sorted(_OF_KEYS & profile.keys.keys()):
        draft.ignored(profile.at(key), "", why)
