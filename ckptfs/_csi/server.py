"""The gRPC server of the driver: CSI's services Identity and Node, and the kubelet's Registration.

Each call runs in a thread. No log line has a message's fields, because they can be secrets and
tokens. The kubelet alone may connect, since the socket is root's.
"""

import contextlib
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Collection, Generator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version as version_of
from typing import Any, NamedTuple, NoReturn

import grpc

from ckptfs._csi import messages
from ckptfs._csi.identity import wanted
from ckptfs._csi.messages import CLASSES, METHODS
from ckptfs._csi.publication import Capability, publication_of
from ckptfs._csi.publishing import Publishing, is_serving
from ckptfs._csi.refusals import invalid, status_of
from ckptfs._csi.registration import Registration
from ckptfs._os.takeover import name_of_container
from ckptfs.errors import ConfigError, NoDaemon, PlaceUnusable

log = logging.getLogger(__name__)

_SCHEME = "unix://"
_THREADS = 128
"""Calls at the same time, of which most wait for stores. The kubelet makes few, except after a
node's start."""
_CALL_S = 110.0
"""The deadline of a call without one, and the longest. The kubelet's is 120 s."""
_MESSAGE_BYTES_MAX = 4 << 20
_GRACE_S = 10.0
"""Longest wait for running calls at the end. The next driver undoes what is left."""
_FINISH_S = 5.0
"""Time between two tries to detach volumes of a daemon that did not answer."""
LOOK_S = 0.5
"""Longest time until the driver notices a signal, or that its registration is gone."""
HOST = "host"
"""The key of the manifest of GetPluginInfo that names the driver's pod or machine."""
PROBE_S = 9.0
"""Longest wait of a probe, s. The manifest gives the command 10 s."""


class Settings(NamedTuple):
    """What the operator has chosen.

    Attributes:
        endpoint: The socket, as ``unix:///csi/csi.sock``.
        driver_name: The name of the CSIDriver object.
        node_id: The name of this node.
        namespaces: The namespaces whose pods may use the node's own credentials.
        registration: How the driver registers with the kubelet, or None if a registrar does it.
    """

    endpoint: str
    driver_name: str
    node_id: str
    namespaces: Collection[str]
    registration: Registration | None = None


class Driver:
    """The methods of both services. Each takes a message and the seconds until the deadline."""

    def __init__(self, settings: Settings, publishing: Publishing) -> None:
        self._settings = settings
        self._publishing = publishing

    # -- Identity

    def GetPluginInfo(self, request: Any, left_s: float) -> Any:
        return CLASSES["GetPluginInfoResponse"](
            name=self._settings.driver_name,
            vendor_version=version_of("ckptfs"),
            manifest={HOST: name_of_container()},
        )

    def GetPluginCapabilities(self, request: Any, left_s: float) -> Any:
        return CLASSES["GetPluginCapabilitiesResponse"]()

    def Probe(self, request: Any, left_s: float) -> Any:
        is_serving()
        return CLASSES["ProbeResponse"](ready=CLASSES["BoolValue"](value=True))

    # -- Node

    def NodePublishVolume(self, request: Any, left_s: float) -> Any:
        deadline_s = time.monotonic() + left_s
        context = dict(request.volume_context)
        capability = request.volume_capability
        if not request.HasField("volume_capability"):
            raise invalid("the volume_capability is missing")
        publication = publication_of(
            request.volume_id,
            request.target_path,
            context,
            Capability(
                is_block=capability.HasField("block"),
                mode=capability.access_mode.mode,
                fs_type=capability.mount.fs_type,
                flags=list(capability.mount.mount_flags),
                group=capability.mount.volume_mount_group,
            ),
            readonly=request.readonly,
        )
        found = wanted(publication, context, dict(request.secrets), self._settings.namespaces)
        self._publishing.publish(found, deadline_s)
        return CLASSES["NodePublishVolumeResponse"]()

    def NodeUnpublishVolume(self, request: Any, left_s: float) -> Any:
        self._publishing.unpublish(request.volume_id, request.target_path)
        return CLASSES["NodeUnpublishVolumeResponse"]()

    def NodeGetVolumeStats(self, request: Any, left_s: float) -> Any:
        stats = self._publishing.stats(request.volume_id, request.volume_path)
        usage = CLASSES["VolumeUsage"]
        units = ((stats.size, messages.BYTES), (stats.files, messages.INODES))
        return CLASSES["NodeGetVolumeStatsResponse"](
            usage=[usage(total=count, used=count, unit=unit) for count, unit in units],
            volume_condition=CLASSES["VolumeCondition"](
                abnormal=bool(stats.trouble), message=stats.trouble or "in order"
            ),
        )

    def NodeGetCapabilities(self, request: Any, left_s: float) -> Any:
        capability, rpc = CLASSES["NodeServiceCapability"], CLASSES["RPC"]
        kinds = (
            messages.GET_VOLUME_STATS,
            messages.VOLUME_CONDITION,
            messages.VOLUME_MOUNT_GROUP,
        )
        return CLASSES["NodeGetCapabilitiesResponse"](
            capabilities=[capability(rpc=rpc(type=kind)) for kind in kinds]
        )

    def NodeGetInfo(self, request: Any, left_s: float) -> Any:
        return CLASSES["NodeGetInfoResponse"](node_id=self._settings.node_id)


def socket_path(endpoint: str) -> str:
    """The path of the driver's socket. Raises ConfigError, PlaceUnusable."""
    path = endpoint.removeprefix(_SCHEME)
    if path == endpoint or not path.startswith("/"):
        raise ConfigError(f"endpoint {endpoint!r} is not a socket; write unix:///csi/csi.sock")
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return path
    except OSError as error:
        raise PlaceUnusable(f"{path}: {error.strerror}; give another --endpoint") from None
    if not stat.S_ISSOCK(info.st_mode):
        raise PlaceUnusable(f"{path} is not a socket; remove it, or give another --endpoint")
    return path


def serve(
    settings: Settings,
    publishing: Publishing,
    stopped: threading.Event,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until `stopped` is set. Calls `ready` when the socket is there. Raises ConfigError,
    PlaceUnusable."""
    registration = settings.registration
    upkeep = Upkeep(registration, publishing)
    with running(settings, publishing):
        if registration:
            registration.start(taken_over=False)
        ready()
        while not stopped.wait(LOOK_S):
            upkeep.run()
        if registration:
            registration.end()


class Upkeep:
    """The work of a driver beside its calls: it stays registered, and detaches volumes of a daemon
    that did not answer before."""

    def __init__(self, registration: Registration | None, publishing: Publishing) -> None:
        self._registration = registration
        self._publishing = publishing
        self._finish_s = time.monotonic()

    def run(self) -> None:
        """Do what is due; to be called every `LOOK_S`. The log has what fails."""
        if self._registration:
            self._registration.keep()
        if time.monotonic() > self._finish_s:
            try:
                self._publishing.finish()
            except OSError as error:
                log.error("cannot finish ended volumes: %s", error)
            self._finish_s = time.monotonic() + _FINISH_S


@contextlib.contextmanager
def running(settings: Settings, publishing: Publishing) -> Generator[None]:
    """Serve as long as the context. Its end waits a moment for running calls. Raises ConfigError,
    PlaceUnusable."""
    path = socket_path(settings.endpoint)
    driver = Driver(settings, publishing)
    server = grpc.server(
        ThreadPoolExecutor(_THREADS, thread_name_prefix="ckptfs-csi"),
        options=[("grpc.max_receive_message_length", _MESSAGE_BYTES_MAX)],
    )
    owners: dict[str, Any] = {"Identity": driver, "Node": driver}
    if settings.registration:
        owners["Registration"] = settings.registration
    for service, owner in owners.items():
        name = messages.service_name(service)
        handlers = {method: _handler(owner, method) for method in METHODS[service]}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    _listen(server, path)
    server.start()
    try:
        log.info("serving on %s", path)
        yield
    finally:
        server.stop(_GRACE_S).wait()


def _listen(server: Any, path: str) -> None:
    before = os.umask(0o177)  # the socket is for this user only
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError:
        raise PlaceUnusable(
            f"{path}: cannot listen; check that its directory exists and that its path is shorter "
            "than 107 bytes"
        ) from None
    finally:
        os.umask(before)


def probe(endpoint: str, *, own: bool) -> None:
    """Ask the driver at `endpoint` whether it can serve. With `own`, also check that it is the
    driver of this pod or machine. Raises NoDaemon, ConfigError, PlaceUnusable."""
    path = socket_path(endpoint)
    with grpc.insecure_channel(f"unix:{path}") as channel:

        def ask(method: str) -> Any:
            ask_it = messages.callable_of(channel, method)
            return ask_it(CLASSES[f"{method}Request"](), timeout=PROBE_S / 2)

        try:
            host = ask("GetPluginInfo").manifest[HOST]
            ask("Probe")
        except grpc.RpcError as error:
            status: Any = error
            why = " ".join(str(status.details()).split())
            raise NoDaemon(f"the driver at {path} cannot serve: {why}; see its log") from None
    if own and host != name_of_container():
        raise NoDaemon(f"the driver of {host!r} serves at {path}; see the log of this one")


def _handler(owner: Any, method: str) -> Any:
    run = getattr(owner, method)

    def call(request: Any, context: Any) -> Any:
        left_s = context.time_remaining()
        try:
            return run(request, _CALL_S if left_s is None else min(left_s, _CALL_S))
        except Exception as error:
            _fail(context, method, error)

    return grpc.unary_unary_rpc_method_handler(
        call,
        request_deserializer=CLASSES[f"{method}Request"].FromString,
        response_serializer=CLASSES[f"{method}Response"].SerializeToString,
    )


def _fail(context: Any, method: str, error: Exception) -> NoReturn:
    status = status_of(error)
    if not status:
        log.error("unexpected error in %s", method, exc_info=error)
        context.abort(grpc.StatusCode.INTERNAL, "internal error of ckptfs csi; see its log")
    log.info("%s refused with %s: %s", method, status, error)
    context.abort(grpc.StatusCode[status], str(error))
    raise AssertionError  # abort has raised
