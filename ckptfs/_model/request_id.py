"""The id of a request to the daemon.

The client makes it, sends it with its request, and names it in errors whose cause is in the
daemon's log. The daemon logs it with each line that belongs to the request, and sends it to the
store (in ``User-Agent``, which S3's access logs have). trio hands the context variable on to tasks
and threads.
"""

import secrets
from contextvars import ContextVar

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the request that this task or thread works for; "" for none."""


def new_request_id() -> str:
    """A random id, which no other request has."""
    return secrets.token_hex(8)
