# botocore has no type hints; nothing of it leaves this module.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""Where the keys for S3 come from: the location, a store's own, or AWS's chain (by botocore).

The chain is that of every AWS tool: environment, profile (also with a role, web identity or single
sign-on), container, instance. A location can name the caller's profile, web identity or container
(see `awsprofile`), which then count instead of the daemon's. Keys that expire are renewed when they
are asked for; keys that the server refuses are looked for once more, because a file of them may
have been rewritten. botocore takes a quarter of a second to import, so it is imported for the chain
only.
"""

import math
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Protocol

from ckptfs._model.stores import Credentials
from ckptfs._store.credentials import SecretFile, environment_secrets
from ckptfs._store.s3options import S3Options
from ckptfs._store.sigv4 import Keys
from ckptfs.errors import AccessDenied

_RENEW_PAUSE_S = 5.0
"""Time between two looks for other keys of a chain that the server has refused: each takes some
tenths of a second of the processor, and what is refused may be so for good."""


class KeySource(Protocol):
    """What has the keys. May be used from any thread, ask another server, and block."""

    def keys(self) -> Keys | None:
        """Those to sign with now; None: requests are not signed. Raises AccessDenied where there
        are none."""
        ...

    def renew(self, refused: Keys | None) -> bool:
        """The server has refused these: whether there are others by now."""
        ...


def keys_for(options: S3Options, name: str, credentials: Credentials = "default") -> KeySource:
    """What gives the keys for a location.

    Args:
        options: Of the location; keys in them come first.
        name: For messages.
        credentials: Of its named store, if it has one.

    Raises:
        AccessDenied: The store's file or variables cannot be used.
    """
    if options.anonymous:
        return FixedKeys(None)
    if options.access_key and not options.role_arn:
        return FixedKeys(Keys(options.access_key, options.secret_key, options.session_token))
    if isinstance(credentials, str):
        return _Chain(options, name)
    if credentials.file:
        return _OfFile(SecretFile(credentials.file, credentials.profile, "s3"))
    if credentials.environment:
        return FixedKeys(_keys_of(environment_secrets(credentials, "s3")))
    return _Chain(options, name, credentials.profile)


class FixedKeys:
    """Keys that stay what they are."""

    def __init__(self, keys: Keys | None) -> None:
        self._keys = keys

    def keys(self) -> Keys | None:
        return self._keys

    def renew(self, refused: Keys | None) -> bool:
        del refused
        return False


class _OfFile:
    """Keys of a file that may change."""

    def __init__(self, file: SecretFile) -> None:
        self._file = file
        file.current()

    def keys(self) -> Keys | None:
        return _keys_of(self._file.current())

    def renew(self, refused: Keys | None) -> bool:
        return self.keys() != refused


class _Chain:
    """Keys of AWS's chain, found when they are first asked for, which may take time."""

    def __init__(self, options: S3Options, name: str, profile: str = "") -> None:
        self._options = options
        self._name = name
        self._profile = profile
        self._lock = threading.Lock()  # guards the two below; held while the chain is asked
        self._found: Any = None
        self._renewed_s = -math.inf

    def keys(self) -> Keys | None:
        with self._lock:
            if self._found is None:
                self._look()
            return self._frozen()

    def renew(self, refused: Keys | None) -> bool:
        with self._lock:
            if self._frozen() != refused:  # somebody else has been here
                return True
            if time.monotonic() - self._renewed_s < _RENEW_PAUSE_S:
                return False
            self._renewed_s = time.monotonic()
            self._look()
            return self._frozen() != refused

    def _look(self) -> None:
        with _translated(self._name):
            self._found = _credentials(self._options, self._profile)

    def _frozen(self) -> Keys:
        return _now(self._found, self._name)[0]


def source_of(options: S3Options, name: str) -> str:
    """botocore's name for the link of the chain that has keys now, e.g. shared-credentials-file.

    Raises AccessDenied where there are none.
    """
    with _translated(name):
        found = _credentials(options, "")
    return _now(found, name)[1]


def _now(credentials: Any, name: str) -> tuple[Keys, str]:
    """The keys of botocore's credentials as they are valid now, and how these were found."""
    with _translated(name):
        frozen = credentials.get_frozen_credentials() if credentials else None
    if frozen is None:
        raise AccessDenied(
            f"{name}: there are no AWS credentials; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or a profile or role where the ckptfs daemon runs"
        )
    return Keys(frozen.access_key, frozen.secret_key, frozen.token or ""), credentials.method


@contextmanager
def _translated(name: str) -> Generator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    # A RuntimeError is one of keys that were not renewed in time, an OSError one of a token's file.
    except (BotoCoreError, ClientError, RuntimeError, OSError) as error:
        raise AccessDenied(
            f"{name}: no AWS credentials ({error}); check the profile or role"
        ) from None


def _keys_of(secrets: dict[str, str]) -> Keys:
    return Keys(secrets["access_key"], secrets["secret_key"], secrets.get("session_token", ""))


def _credentials(options: S3Options, profile: str) -> Any:
    """botocore's credentials: of the chain, or of the role that is to be assumed with those."""
    from botocore.credentials import (
        AssumeRoleCredentialFetcher,
        AssumeRoleWithWebIdentityCredentialFetcher,
        Credentials,
        DeferredRefreshableCredentials,
    )
    from botocore.utils import FileWebIdentityTokenLoader

    session = _session(options, profile or options.profile)
    extra: dict[str, str | int] = {}
    if options.session_name:
        extra["RoleSessionName"] = options.session_name
    if options.web_identity_token_file:
        fetcher: Any = AssumeRoleWithWebIdentityCredentialFetcher(
            session.create_client,
            FileWebIdentityTokenLoader(options.web_identity_token_file),
            options.role_arn,
            extra_args=extra,
        )
        return DeferredRefreshableCredentials(fetcher.fetch_credentials, "web-identity")
    if options.access_key:  # the chain is not asked then: it may wait for an instance that is none
        source = Credentials(options.access_key, options.secret_key, options.session_token or None)
    elif options.container_credentials_uri:
        source = _of_container(options)
    else:
        source = session.get_credentials()
    if not options.role_arn or source is None:
        return source
    extra["DurationSeconds"] = options.load_frequency
    if options.external_id:
        extra["ExternalId"] = options.external_id
    fetcher = AssumeRoleCredentialFetcher(
        session.create_client, source, options.role_arn, extra_args=extra
    )
    return DeferredRefreshableCredentials(fetcher.fetch_credentials, "assume-role")


def _session(options: S3Options, profile: str) -> Any:
    """botocore's session as the caller would have it: by the caller's files, proxy and endpoint."""
    from botocore.config import Config
    from botocore.session import Session

    class CallersSession(Session):
        def create_client(self, service_name: str, *args: Any, **more: Any) -> Any:
            if service_name == "sts" and options.sts_endpoint_url:
                more["endpoint_url"] = options.sts_endpoint_url
            return super().create_client(service_name, *args, **more)

    session = CallersSession(profile=profile or None)
    # Certificates for a server of one's own are not those of Amazon.
    ca_file = "" if options.endpoint_override else options.tls_ca_file_path
    for name, value in (
        ("config_file", options.config_file),
        ("credentials_file", options.credentials_file),
        ("region", options.region),
        ("ca_bundle", ca_file),
    ):
        if value:
            session.set_config_variable(name, value)
    if options.proxy:
        proxies = {"http": options.proxy, "https": options.proxy}
        session.set_default_client_config(Config(proxies=proxies))
    return session


def _of_container(options: S3Options) -> Any:
    from botocore.credentials import ContainerProvider

    uri = options.container_credentials_uri
    kind = "RELATIVE" if uri.startswith("/") else "FULL"
    environ = {f"AWS_CONTAINER_CREDENTIALS_{kind}_URI": uri}
    if options.container_token_file:
        environ["AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"] = options.container_token_file
    elif options.container_token:
        environ["AWS_CONTAINER_AUTHORIZATION_TOKEN"] = options.container_token
    return ContainerProvider(environ).load()
