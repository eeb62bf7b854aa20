# botocore has no type hints; nothing of it leaves this module.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""Where the keys for S3 come from: the location, or AWS's chain, which botocore knows.

The chain is that of every AWS tool: environment, profile (also with a role, web identity or single
sign-on), container, instance. Keys that expire are renewed when they are asked for. botocore takes
a quarter of a second to import, so it is imported for the chain only.
"""

import functools
from collections.abc import Callable
from typing import Any

from ckptfs._store.s3options import S3Options
from ckptfs._store.sigv4 import Keys
from ckptfs.errors import AccessDenied

Chain = Callable[[], Keys | None]
"""The keys to sign with now; None: requests are not signed. May ask another server, and block.

Raises AccessDenied where there are no keys.
"""


def keys_for(options: S3Options, name: str) -> Chain:
    """What gives the keys for a location with these options; `name` is for messages."""
    if options.anonymous:
        return lambda: None
    if options.access_key and not options.role_arn:
        keys = Keys(options.access_key, options.secret_key, options.session_token)
        return lambda: keys
    # Found when they are first asked for, which may take time.
    found = functools.cache(lambda: _credentials(options))

    return lambda: _renewed(found, name)[0]


def source_of(options: S3Options, name: str) -> str:
    """botocore's name for the link of the chain that has keys now, e.g. shared-credentials-file.

    Raises AccessDenied where there are none.
    """
    return _renewed(lambda: _credentials(options), name)[1]


def _renewed(found: Callable[[], Any], name: str) -> tuple[Keys, str]:
    """The keys of botocore's credentials as they are valid now, and how these were found."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        credentials = found()
        frozen = credentials.get_frozen_credentials() if credentials else None
    except (BotoCoreError, ClientError, RuntimeError) as error:  # the last: expired when renewed
        raise AccessDenied(
            f"{name}: no AWS credentials ({error}); check the profile or role"
        ) from None
    if frozen is None:
        raise AccessDenied(
            f"{name}: there are no AWS credentials; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or a profile or role where the ckptfs daemon runs"
        )
    return Keys(frozen.access_key, frozen.secret_key, frozen.token or ""), credentials.method


def _credentials(options: S3Options) -> Any:
    """botocore's credentials: of the chain, or of the role that is to be assumed with those."""
    from botocore.credentials import (
        AssumeRoleCredentialFetcher,
        Credentials,
        DeferredRefreshableCredentials,
    )
    from botocore.session import Session

    session = Session()
    if options.access_key:  # the chain is not asked then: it may wait for an instance that is none
        source = Credentials(options.access_key, options.secret_key, options.session_token or None)
    else:
        source = session.get_credentials()
    if not options.role_arn or source is None:
        return source
    extra: dict[str, str | int] = {"DurationSeconds": options.load_frequency}
    if options.session_name:
        extra["RoleSessionName"] = options.session_name
    if options.external_id:
        extra["ExternalId"] = options.external_id
    if options.region:
        session.set_config_variable("region", options.region)
    fetcher = AssumeRoleCredentialFetcher(
        session.create_client, source, options.role_arn, extra_args=extra
    )
    return DeferredRefreshableCredentials(fetcher.fetch_credentials, "assume-role")
