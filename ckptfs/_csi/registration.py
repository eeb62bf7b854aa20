"""How the driver makes itself known to the kubelet, without a registrar beside it.

The kubelet watches its directory ``plugins_registry``. For each name there that is a socket, it
calls GetInfo of the service Registration, and then NodeGetInfo at the driver's endpoint. The driver
serves Registration on the socket of CSI. The name in the directory is a symbolic link to it.

**Takeover.** An update replaces the socket, which is in another directory, and leaves the link. So
the kubelet sees no event, and the driver stays registered. A new socket or link in the watched
directory would be an event, after which the kubelet unregisters the driver by its name, and
registers it again. The removal of a name is an event, too. Therefore a driver removes the link
only if no other driver waits to serve. A driver that has not taken over from a running one makes
the link anew, because the kubelet may have given the driver up.

**Restart of the kubelet.** It looks through the directory, and follows links. If it does so in the
second in which no driver listens, kubelets with a monitor of connections find the driver later.
Others register it when its link is made anew.

**Refusal.** After NodeGetInfo or the update of the CSINode has failed, the kubelet says so by
NotifyRegistrationStatus, and does not try again. The driver logs the reason, serves on, and makes
the link anew after a pause.

Sources, in kubernetes/kubernetes: ``pluginwatcher/plugin_watcher.go`` and ``monitor.go`` (events;
names with a dot are ignored; stat(2) decides what is a socket), ``reconciler/reconciler.go``
(unregisters what has another time than the registered plugin), ``operationexecutor`` (the calls; an
empty endpoint is the name in the directory) in pkg/kubelet/pluginmanager, and
pkg/volume/csi/csi_plugin.go (two names in the directory cannot register one driver).
"""

import contextlib
import logging
import os
import socket
import stat
import time
from typing import Any

from ckptfs._csi.messages import CLASSES
from ckptfs.errors import ConfigError, PlaceUnusable

log = logging.getLogger(__name__)

_VERSION = "1.0.0"
"""The version of CSI that the kubelet compares. It accepts each 1.x."""
RETRY_S = 10.0
"""Pause before the driver registers again after a refusal, such as a failed call of the kubelet to
the API server."""
_SILENCE_S = 60.0
"""Time after which the log says that the kubelet has not come. Its own pause is 1 s, and longer
after failed calls."""


class Registration:
    """The link in the kubelet's directory, and the methods of the service Registration.

    `keep` and the other methods in small letters belong to the thread that serves. The calls of the
    kubelet come in others, and only set attributes.
    """

    def __init__(self, driver_name: str, directory: str, endpoint: str) -> None:
        """`directory` is the kubelet's ``plugins_registry``, as this process sees it. `endpoint` is
        the path at which the kubelet finds the driver's socket. Raises ConfigError."""
        if "/" in driver_name or driver_name.startswith("."):
            raise ConfigError(f"driver name {driver_name!r} is not a file name; write it without /")
        if not endpoint.startswith("/"):
            raise ConfigError(
                f"kubelet endpoint {endpoint!r} is not an absolute path; give the path of the "
                "driver's socket on the node"
            )
        self._driver_name = driver_name
        self._endpoint = endpoint
        self._directory = directory
        self._link = os.path.join(directory, f"{driver_name}-reg.sock")
        self._temporary = os.path.join(directory, f".{driver_name}-reg.sock")
        self._again_s: float | None = None
        self._silent_until_s: float | None = None
        self._trouble = ""

    # -- calls of the kubelet

    def GetInfo(self, request: Any, left_s: float) -> Any:
        return CLASSES["GetInfoResponse"](
            type="CSIPlugin",
            name=self._driver_name,
            endpoint=self._endpoint,
            supported_versions=[_VERSION],
        )

    def NotifyRegistrationStatus(self, request: Any, left_s: float) -> Any:
        self._silent_until_s = None
        if request.plugin_registered:
            self._again_s = None
            log.info("the kubelet has registered %s", self._driver_name)
        else:
            reason = " ".join(request.error.split())
            log.error(
                "the kubelet does not register %s: %s; trying again in %d s",
                self._driver_name,
                reason,
                RETRY_S,
            )
            self._again_s = time.monotonic() + RETRY_S
        return CLASSES["NotifyRegistrationStatusResponse"]()

    # -- the link

    def check(self) -> None:
        """Raises PlaceUnusable if the link cannot be made because of the directory, or because of
        what has the link's name."""
        try:
            with os.scandir(self._directory):  # a path to a file fails here
                pass
            info = os.lstat(self._link)
        except FileNotFoundError as error:
            if error.filename == self._directory:
                raise self._unusable(error) from None
            return
        except OSError as error:
            raise self._unusable(error) from None
        if stat.S_ISSOCK(info.st_mode):
            if _has_listener(self._link):
                raise PlaceUnusable(
                    f"{self._link}: another process registers {self._driver_name}; end it, or give "
                    "another --driver-name"
                )
        elif not stat.S_ISLNK(info.st_mode):
            raise PlaceUnusable(f"{self._link} is not a socket or a link; remove it")

    def start(self, *, taken_over: bool) -> None:
        """Register the driver, which serves by now. `taken_over` says whether a driver has served
        until now. Raises PlaceUnusable."""
        if not (taken_over and self._is_made()):
            self._make()

    def keep(self) -> None:
        """Make the link again if it is gone, or if a refusal is some time ago. Log what hinders
        it."""
        again_s = self._again_s
        if (again_s is None or time.monotonic() < again_s) and self._is_made():
            self._complain()
            return
        self._again_s = None
        try:
            self._make()
        except PlaceUnusable as error:
            if again_s is not None:  # the old link is there, and the kubelet has refused it
                self._again_s = time.monotonic() + RETRY_S
            if str(error) != self._trouble:
                self._trouble = str(error)
                log.error("cannot register the driver: %s", error)

    def end(self) -> None:
        """Remove the link, if it is this driver's. The kubelet then unregisters the driver."""
        if self._is_made():
            try:
                os.unlink(self._link)
            except OSError as error:
                log.error("cannot unregister the driver: %s: %s", self._link, error.strerror)

    def _is_made(self) -> bool:
        try:
            return os.readlink(self._link) == self._endpoint
        except OSError:
            return False

    def _make(self) -> None:
        """Make the link at once complete, as one event. Raises PlaceUnusable."""
        self.check()
        self._silent_until_s = time.monotonic() + _SILENCE_S  # before the kubelet can answer
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)  # of a driver that was killed
            os.symlink(self._endpoint, self._temporary)
            os.rename(self._temporary, self._link)
        except OSError as error:
            raise self._unusable(error) from None
        self._trouble = ""
        log.info("asking the kubelet to register %s", self._driver_name)

    def _unusable(self, error: OSError) -> PlaceUnusable:
        return PlaceUnusable(
            f"{self._directory}: {error.strerror}; give the kubelet's plugins_registry, "
            "writable, as --registration-dir"
        )

    def _complain(self) -> None:
        until_s = self._silent_until_s
        if until_s is not None and time.monotonic() > until_s:
            self._silent_until_s = None
            log.warning(
                "the kubelet has not registered %s for %d s; check that %s is the driver's socket "
                "on the node, and %s the kubelet's plugins_registry",
                self._driver_name,
                _SILENCE_S,
                self._endpoint,
                self._directory,
            )


def _has_listener(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as connection:
        try:
            connection.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # a full queue, or no permission
            return True
        return True
