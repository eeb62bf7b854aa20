# huggingface_hub is optional, and its client has no type stubs that pyright finds.
# pyright: reportPrivateUsage=false
"""Hugging Face: one commit for all reads of a checkpoint, and the caller's proxy and
certificates."""

import threading
from collections.abc import Mapping
from typing import Any

import msgspec

from ckptfs._store.transport.tls import Network

_lock = threading.Lock()  # guards _network
_network: list[Mapping[str, Any]] = []


def use_network(options: Mapping[str, Any]) -> None:
    """Let huggingface_hub use these options of `Network`. A process has one client of it.

    Raises ValueError if another store of this process uses other options, and OSError if the
    certificates cannot be read.
    """
    with _lock:
        if _network and _network[0] != options:
            raise ValueError("another store of Hugging Face uses another proxy or certificates")
        if not _network and options:
            _set_client(options)
        if not _network:
            _network.append(dict(options))


def _set_client(options: Mapping[str, Any]) -> None:
    import huggingface_hub
    from huggingface_hub.utils import _http as hub

    network = msgspec.convert(options, Network)
    kind = type(hub.default_client_factory())
    hooks = {"request": [hub.hf_request_event_hook]}
    tls, proxy = network.context(), network.proxy or None

    def client() -> Any:
        return kind(event_hooks=hooks, follow_redirects=True, timeout=None, verify=tls, proxy=proxy)

    huggingface_hub.set_client_factory(client)


def pinned(filesystem: Any, root: str) -> str:
    """`root` on an HfFileSystem with the current commit of its branch or tag. Raises the errors of
    the filesystem."""
    resolved = filesystem.resolve_path(root)
    commit_of = getattr(resolved, "revision", None)
    if commit_of is None:  # a bucket, which has no commits
        return root
    about = filesystem._api.repo_info(
        resolved.repo_id, repo_type=resolved.repo_type, revision=commit_of
    )
    whole = type(resolved)(
        resolved.repo_type, resolved.repo_id, about.sha, resolved.path_in_repo
    ).unresolve()
    return str(whole)
