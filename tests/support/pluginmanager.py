"""The kubelet's side of the registration of drivers, as far as a driver can observe it.

The rules are those of kubernetes/kubernetes, pkg/kubelet/pluginmanager. `_scan` and `_watch` have
the file events of ``pluginwatcher/plugin_watcher.go``, `_reconcile` the order of
``reconciler/reconciler.go``, and `_register` the calls of
``operationexecutor/operation_generator.go`` with the handler of pkg/volume/csi/csi_plugin.go. Here
the operations run one after the other, so a second attempt follows a cycle earlier than there.
"""

from __future__ import annotations

import ctypes
import os
import select
import stat
import struct
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc

from ckptfs._csi import messages
from ckptfs._csi.messages import CLASSES

if TYPE_CHECKING:
    from pathlib import Path

CYCLE_S = 1.0
_BACKOFF_S, _BACKOFF_MAX_S = 0.5, 120.0
_MOVED_TO, _CREATE, _DELETE = 0x80, 0x100, 0x200
_EVENT = struct.Struct("iIII")
_libc = ctypes.CDLL(None, use_errno=True)


class Registered(NamedTuple):
    """A plugin of the actual state."""

    seen: int
    name: str
    endpoint: str


class PluginManager:
    """A plugin manager that watches `folder`, a context manager.

    Attributes:
        history: What happened to plugins: "registered", "unregistered" or "refused", and the name.
        drivers: The endpoint of each registered driver, by its name.
        refusal: The error of each registration from now on; "" for none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.history: list[tuple[str, str]] = []
        self.drivers: dict[str, str] = {}
        self.refusal = ""
        self._desired: dict[str, int] = {}
        self._actual: dict[str, Registered] = {}
        self._backoff: dict[str, tuple[float, float]] = {}
        self._count = 0

    def __enter__(self) -> PluginManager:
        self._stopped = threading.Event()
        self._inotify = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        path = os.fsencode(self.folder)
        assert _libc.inotify_add_watch(self._inotify, path, _MOVED_TO | _CREATE | _DELETE) > 0
        for name in os.listdir(self.folder):
            self._scan(name)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        os.close(self._inotify)

    def restart(self) -> None:
        """Forget all, and look through the folder."""
        self.__exit__()
        for state in (self._desired, self._actual, self._backoff, self.drivers, self.history):
            state.clear()
        self.__enter__()

    def _run(self) -> None:
        cycle_s = time.monotonic()
        while not self._stopped.is_set():
            if select.select([self._inotify], [], [], 0.05)[0]:
                self._watch()
            if time.monotonic() >= cycle_s:
                self._reconcile()
                cycle_s = time.monotonic() + CYCLE_S

    def _watch(self) -> None:
        data = os.read(self._inotify, 1 << 16)
        while data:
            _, mask, _, length = _EVENT.unpack_from(data)
            name = data[_EVENT.size : _EVENT.size + length].rstrip(b"\0").decode()
            data = data[_EVENT.size + length :]
            if mask & _DELETE:
                self._desired.pop(str(self.folder / name), None)
            else:
                self._scan(name)

    def _scan(self, name: str) -> None:
        path = str(self.folder / name)
        try:
            is_socket = stat.S_ISSOCK(os.stat(path).st_mode)
        except OSError:
            return
        if is_socket and not name.startswith("."):
            self._count += 1
            self._desired[path] = self._count

    def _reconcile(self) -> None:
        for path, plugin in list(self._actual.items()):
            if self._desired.get(path) != plugin.seen:
                del self._actual[path]
                self.drivers.pop(plugin.name, None)
                self.history.append(("unregistered", plugin.name))
        for path, seen in list(self._desired.items()):
            wait_s, until_s = self._backoff.get(path, (_BACKOFF_S, 0.0))
            if path in self._actual or time.monotonic() < until_s:
                continue
            try:
                self._register(path, seen)
                self._backoff.pop(path, None)
            except grpc.RpcError:
                until_s = time.monotonic() + wait_s
                self._backoff[path] = (min(2 * wait_s, _BACKOFF_MAX_S), until_s)

    def _register(self, path: str, seen: int) -> None:
        info = _call(path, "GetInfo", 1.0)
        assert info.type == "CSIPlugin"
        assert list(info.supported_versions) == ["1.0.0"]
        endpoint = info.endpoint or path
        if info.name in self.drivers:  # of another path
            self._refuse(path, info.name, "another driver with the same name is registered")
            return
        self._actual[path] = Registered(seen, info.name, endpoint)
        if self.refusal:
            self._refuse(path, info.name, self.refusal)
            return
        node = _call(endpoint, "NodeGetInfo", 10.0)
        assert node.node_id
        self.drivers[info.name] = endpoint
        self.history.append(("registered", info.name))
        _call(path, "NotifyRegistrationStatus", 5.0, plugin_registered=True)

    def _refuse(self, path: str, name: str, error: str) -> None:
        self.history.append(("refused", name))
        _call(path, "NotifyRegistrationStatus", 5.0, error=error)


def _call(path: str, method: str, timeout_s: float, **fields: Any) -> Any:
    with grpc.insecure_channel(f"unix:{path}") as channel:
        call = messages.callable_of(channel, method)
        return call(CLASSES[f"{method}Request"](**fields), timeout=timeout_s)
