# botocore has no type hints; nothing of it leaves this module.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
"""The sources of keys for S3: the location, a named store, or AWS's chain (by botocore).

The chain is that of every AWS tool: environment, profile (also with a role, web identity or single
sign-on), container, instance. A location can name the caller's profile, web identity or container
(see ``environment.aws``), which then count instead of the daemon's. A request renews keys that have
expired. If the server refuses keys, the chain is searched once more, because their file may have
been rewritten. Only the chain imports botocore, because that takes a quarter of a second.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

from ckptfs._model.named_store import Credentials
from ckptfs._store.credentials import SecretFile, environment_secrets
from ckptfs._store.s3.options import S3Options
from ckptfs._store.s3.sigv4 import Keys
from ckptfs.errors import AccessDenied

_RENEW_PAUSE_S = 5.0
"""The time between two searches of the chain after a refusal. Each takes some tenths of a second of
the processor, and the server may refuse the keys for ever."""


class KeySource:
    """A source of keys, which `find` finds. Any thread may use it. It may ask another server, and
    block."""

    def __init__(self, find: Callable[[], Keys | None]) -> None:
        self._find = find

    def keys(self) -> Keys | None:
        """The keys to sign with now; None to send requests unsigned. Raises AccessDenied if the
        source has no keys."""
        return self._find()

    def renew(self, refused: Keys | None) -> bool:
        """Whether the source has other keys now, after the server has refused these."""
        return self.keys() != refused


def keys_for(options: S3Options, name: str, credentials: Credentials = "default") -> KeySource:
    """The source of the keys for a location. Keys in its options come first.

    `name` is the location, for messages. `credentials` are those of its named store, if it has one.
    Raises AccessDenied if the store's file or variables cannot be used.
    """
    if options.anonymous:
        return fixed_keys(None)
    if options.access_key and not options.role_arn:
        return fixed_keys(Keys(options.access_key, options.secret_key, options.session_token))
    if isinstance(credentials, str):
        return _Chain(options, name)
    if credentials.file:
        file = SecretFile(credentials.file, credentials.profile, "s3")
        file.current()  # it must be usable now
        return KeySource(lambda: _keys_of(file.current()))
    if credentials.environment:
        return fixed_keys(_keys_of(environment_secrets(credentials, "s3")))
    return _Chain(options, name, credentials.profile)


def fixed_keys(keys: Keys | None) -> KeySource:
    """The source of keys that never change."""
    return KeySource(lambda: keys)


class _Chain(KeySource):
    """Keys of AWS's chain. The first request searches the chain, which may take time."""

    def __init__(self, options: S3Options, name: str, profile: str = "") -> None:
        super().__init__(self._current)
        self._options = options
        self._name = name
        self._profile = profile
        self._lock = threading.Lock()  # guards the two below; held while the chain is asked
        self._found: Any = None
        self._renewed_s = -math.inf

    def _current(self) -> Keys:
        with self._lock:
            if self._found is None:
                self._look()
            return self._frozen()

    def renew(self, refused: Keys | None) -> bool:
        with self._lock:
            if self._frozen() != refused:  # another thread has renewed them
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
    Raises AccessDenied if the chain has no keys."""
    with _translated(name):
        found = _credentials(options, "")
    return _now(found, name)[1]


def _now(credentials: Any, name: str) -> tuple[Keys, str]:
    """The current keys of botocore's credentials, and the link of the chain that found them."""
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

    logger = logging.getLogger("botocore.credentials")
    if logger.level == logging.NOTSET:  # it logs each failure with a traceback besides raising it
        logger.setLevel(logging.ERROR)
    try:
        yield
    # botocore raises RuntimeError for keys not renewed in time, and OSError for a token's file.
    except (BotoCoreError, ClientError, RuntimeError, OSError) as error:
        raise AccessDenied(
            f"{name}: cannot get AWS credentials ({error}); check the profile or role"
        ) from None


def _keys_of(secrets: dict[str, str]) -> Keys:
    return Keys(secrets["access_key"], secrets["secret_key"], secrets.get("session_token", ""))


def _credentials(options: S3Options, profile: str) -> Any:
    """botocore's credentials: those of the chain, or of the role that is assumed with them."""
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
    if options.web_identity_token_file or options.web_identity_token:
        load_token: Callable[[], str] = partial(str, options.web_identity_token)
        if options.web_identity_token_file:
            load_token = FileWebIdentityTokenLoader(options.web_identity_token_file)
        fetcher: Any = AssumeRoleWithWebIdentityCredentialFetcher(
            session.create_client, load_token, options.role_arn, extra_args=extra
        )
        return DeferredRefreshableCredentials(fetcher.fetch_credentials, "web-identity")
    if options.access_key:  # skips the chain, which may wait for the metadata of an instance
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
    """A botocore session with the caller's files, proxy and endpoint."""
    from botocore.config import Config
    from botocore.session import Session

    class CallersSession(Session):
        def create_client(self, service_name: str, *args: Any, **more: Any) -> Any:
            if service_name == "sts" and options.sts_endpoint_url:
                more["endpoint_url"] = options.sts_endpoint_url
            return super().create_client(service_name, *args, **more)

    session = CallersSession(profile=profile or None)
    # Certificates for the user's own server are not those of Amazon.
    ca_file = "" if options.endpoint_override else options.tls_ca_file_path
    # A token that the caller sends is for any region, and the daemon's region need not be set.
    region = options.region or ("us-east-1" if options.web_identity_token else "")
    for name, value in (
        ("config_file", options.config_file),
        ("credentials_file", options.credentials_file),
        ("region", region),
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
