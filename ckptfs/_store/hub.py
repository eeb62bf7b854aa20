# huggingface_hub is optional, and its client has no type stubs that pyright finds.
# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportPrivateUsage=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
"""Hugging Face: one commit for all reads of a checkpoint, and the network as the caller has it."""

import ssl
import threading
from collections.abc import Mapping
from typing import Any

NETWORK = frozenset(
    ["proxy", "tls_ca_dir_path", "tls_ca_file_path", "tls_ca_pem", "tls_verify_certificates"]
)
"""Options of a location that `use_network` keeps."""

_lock = threading.Lock()  # guards _network
_network: list[Mapping[str, Any]] = []


def use_network(options: Mapping[str, Any]) -> None:
    """Let huggingface_hub use these options of `NETWORK`. It has one client in a process.

    Raises ValueError: Another store of this process uses others; OSError: There are no such
    certificates.
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

    tls = ssl.create_default_context(
        cafile=options.get("tls_ca_file_path") or None,
        capath=options.get("tls_ca_dir_path") or None,
        cadata=options.get("tls_ca_pem") or None,
    )
    if options.get("tls_verify_certificates") is False:
        tls.check_hostname = False
        tls.verify_mode = ssl.CERT_NONE
    kind = type(hub.default_client_factory())
    hooks = {"request": [hub.hf_request_event_hook]}
    proxy = options.get("proxy") or None

    def client() -> Any:
        return kind(event_hooks=hooks, follow_redirects=True, timeout=None, verify=tls, proxy=proxy)

    huggingface_hub.set_client_factory(client)


def pinned(filesystem: Any, root: str) -> str:
    """`root` on an HfFileSystem, with the commit that its branch or tag names now. Raises what the
    filesystem raises."""
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
