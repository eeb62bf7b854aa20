"""``csi``: the driver of Kubernetes' container storage interface."""

import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from ckptfs._config.load import load_config
from ckptfs._model.wording import INSTALL_CSI
from ckptfs._mount import logs
from ckptfs.errors import CannotMount, ConfigError

_NAME = "csi.ckptfs.dev"


def csi(
    endpoint: Annotated[
        str,
        typer.Option(
            "--endpoint",
            metavar="URL",
            envvar="CSI_ENDPOINT",
            help="The socket of the driver, as unix:///csi/csi.sock.",
        ),
    ],
    driver_name: Annotated[
        str, typer.Option("--driver-name", metavar="NAME", help="The name of the CSIDriver object.")
    ] = _NAME,
    node_id: Annotated[
        str,
        typer.Option(
            "--node-id",
            metavar="NAME",
            envvar="KUBE_NODE_NAME",
            help="The name of this node. Default: its host name.",
            show_default=False,
        ),
    ] = "",
    state_dir: Annotated[
        Path, typer.Option("--state-dir", metavar="DIR", help="The directory of the records.")
    ] = Path("/var/lib/ckptfs/csi"),
    node_credentials_namespace: Annotated[
        list[str] | None,
        typer.Option(
            "--node-credentials-namespace",
            metavar="NAMESPACE",
            help="A namespace whose pods may read with the node's own credentials; '*' for all; "
            "may be given again. Default: none.",
        ),
    ] = None,
    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over",
            help="Take over from a driver that runs with this flag, and hand over to the next one.",
        ),
    ] = False,
    registration_dir: Annotated[
        Path | None,
        typer.Option(
            "--registration-dir",
            metavar="DIR",
            help="The kubelet's directory plugins_registry, in which the driver registers itself.",
        ),
    ] = None,
    kubelet_endpoint: Annotated[
        str | None,
        typer.Option(
            "--kubelet-endpoint",
            metavar="PATH",
            help="The path of the driver's socket on the node, for --registration-dir.",
        ),
    ] = None,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            help="Only ask the driver at --endpoint whether it can serve; with --take-over, also "
            "whether it is the driver of this pod.",
        ),
    ] = False,
) -> None:
    """Serve volumes of pods to the kubelet, until SIGTERM.

    The command needs root and the node's daemon, with allow_other. A volume of a pod shows one
    checkpoint, read-only, and is read with the pod's identity. Volumes stay published when the
    command ends. ckptfs help kubernetes explains it.
    """
    try:
        from ckptfs._csi import records, server, succession  # they bring grpc
        from ckptfs._csi.publishing import Publishing
        from ckptfs._csi.registration import Registration
    except ModuleNotFoundError as error:
        if error.name not in ("grpc", "google", "google.protobuf"):
            raise
        raise CannotMount(f"ckptfs csi: {error.name} is not installed; {INSTALL_CSI}") from None
    if probe:
        server.probe(endpoint, own=take_over)
        return
    if (registration_dir is None) != (kubelet_endpoint is None):
        raise ConfigError("--registration-dir and --kubelet-endpoint need each other; give both")
    limiter = logs.configure(load_config())
    stopped = threading.Event()

    def stop(number: int, _: object) -> None:
        stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    registration = None
    if registration_dir is not None and kubelet_endpoint is not None:
        registration = Registration(driver_name, str(registration_dir), kubelet_endpoint)
        registration.check()
    settings = server.Settings(
        endpoint,
        driver_name,
        node_id or socket.gethostname(),
        node_credentials_namespace or [],
        registration,
    )
    server.socket_path(endpoint)
    if take_over:
        succession.serve_in_turn(settings, state_dir)
        limiter.flush()
        sys.exit(0)
    with records.opened(state_dir) as found:
        publishing = Publishing(found)
        publishing.reconcile()
        server.serve(settings, publishing, stopped)
    limiter.flush()
    sys.exit(0)
