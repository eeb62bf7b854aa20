"""The id of what somebody has asked the daemon for.

The client makes it, sends it with its request, and names it in errors whose cause is in the
daemon's log. The daemon logs it with each line that belongs to the request, and sends it to the
store (in ``User-Agent``, which S3's access logs have).

It is a context variable: trio hands it on to tasks and threads.
"""

import secrets
from contextvars import ContextVar

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request that this task or thread works for; "": for none."""


def new_request_id() -> str:
    """One that nobody else has."""
    return secrets.token_hex(8)
