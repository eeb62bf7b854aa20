"""The kubelet's part: a gRPC client of the driver, the driver's process, and pods.

A pod is a process with mount, PID and user namespaces of its own, another user, and no
capabilities on the node. It sees a volume by a bind mount, as a container runtime makes one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
from conftest import Node, wait_until
from support import usernamespace

from ckptfs._csi import messages
from ckptfs._csi.messages import CLASSES
from ckptfs._csi.publication import KUBELET, TOKENS
from ckptfs._os.mountinfo import mount_table

CALL_S = 60.0
RWO, ROX = 1, 3
"""Access modes: SINGLE_NODE_WRITER, with which inline volumes come, and MULTI_NODE_READER_ONLY."""
POD_UID = 100_000


class Kubelet:
    """A kubelet whose pods live in `folder`, and whose driver listens on `socket`, which is
    ``<folder>/csi.sock`` by default."""

    def __init__(self, folder: Path, socket: Path | None = None) -> None:
        self.folder = folder
        self.socket = socket or folder / "csi.sock"
        self._channel = grpc.insecure_channel(f"unix:{self.socket}")

    def close(self) -> None:
        self._channel.close()

    def call(self, method: str, timeout_s: float = CALL_S, **fields: Any) -> Any:
        """Call a method. Raises grpc.RpcError."""
        request = CLASSES[f"{method}Request"](**fields)
        call = messages.callable_of(self._channel, method)
        return call(request, timeout=timeout_s, wait_for_ready=True)

    def refusal(self, method: str, **fields: Any) -> tuple[str, str]:
        """The status code and the message of a call that is refused."""
        try:
            self.call(method, **fields)
        except grpc.RpcError as error:
            return error.code().name, error.details() or ""
        raise AssertionError(f"{method} was not refused")

    def target(self, pod: str, volume: str = "vol") -> str:
        """The target path of a pod's volume."""
        return str(self.folder / "pods" / pod / "volumes" / volume / "mount")

    def request(
        self,
        pod: str,
        attributes: dict[str, str],
        *,
        namespace: str = "default",
        token: str = "",
        volume_id: str = "",
        **more: Any,
    ) -> dict[str, Any]:
        """The fields of a publish of an inline volume. `more` are further fields, or others."""
        context = attributes | {
            f"{KUBELET}pod.name": pod,
            f"{KUBELET}pod.namespace": namespace,
            f"{KUBELET}pod.uid": f"uid-of-{pod}",
            f"{KUBELET}serviceAccount.name": "trainer",
            f"{KUBELET}ephemeral": "true",
        }
        if token:
            end = "2030-01-01T00:00:00Z"
            tokens = {"sts.amazonaws.com": {"token": token, "expirationTimestamp": end}}
            context[TOKENS] = json.dumps(tokens)
        return {
            "volume_id": volume_id or f"csi-{pod}",
            "target_path": self.target(pod),
            "volume_capability": capability(),
            "readonly": True,
            "volume_context": context,
        } | more

    def publish(self, pod: str, attributes: dict[str, str], **more: Any) -> str:
        """Publish an inline volume, and return its path. See `request`."""
        fields = self.request(pod, attributes, **more)
        Path(fields["target_path"]).parent.mkdir(parents=True, exist_ok=True)
        self.call("NodePublishVolume", **fields)
        return fields["target_path"]

    def unpublish(self, pod: str, volume_id: str = "") -> None:
        """Unpublish the volume of a pod."""
        self.call(
            "NodeUnpublishVolume",
            volume_id=volume_id or f"csi-{pod}",
            target_path=self.target(pod),
        )

    def is_busy(self, pod: str) -> bool:
        """Whether a call for a pod's volume is running."""
        try:
            self.unpublish(pod)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.ABORTED:
                raise
            return True
        return False

    def stats(self, pod: str) -> Any:
        """The stats of a pod's volume."""
        return self.call("NodeGetVolumeStats", volume_id=f"csi-{pod}", volume_path=self.target(pod))


def capability(mode: int = RWO, group: str = "", flags: tuple[str, ...] = (), **more: Any) -> Any:
    """A VolumeCapability. `more` are further fields of it, or others."""
    mount = CLASSES["MountVolume"](volume_mount_group=group, mount_flags=flags)
    fields = {"mount": mount, "access_mode": CLASSES["AccessMode"](mode=mode)} | more
    return CLASSES["VolumeCapability"](**fields)


def volumes_at(kubelet: Kubelet) -> list[str]:
    """The mounts of the kubelet's pods."""
    return [line.path for line in mount_table() if line.path.startswith(str(kubelet.folder))]


class DriverProcess:
    """``ckptfs csi`` as a process of its own, a context manager."""

    def __init__(self, node: Node, kubelet: Kubelet, *flags: str) -> None:
        self.state = node.folder / "csi"
        self._log = node.folder / "csi.log"
        self._kubelet = kubelet
        self._command = [
            *(sys.executable, "-m", "ckptfs", "csi"),
            *("--endpoint", f"unix://{kubelet.socket}"),
            *("--state-dir", str(self.state), "--node-id", "node-1", *flags),
        ]

    def __enter__(self) -> DriverProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self.end() == 0, self.log()

    def end(self) -> int:
        """End it by SIGTERM, and return its status."""
        self._process.terminate()
        return self._process.wait(CALL_S)

    def start(self) -> None:
        with self._log.open("ab") as log_file:
            self._process = subprocess.Popen(self._command, stderr=log_file, cwd="/")
        wait_until(lambda: self._kubelet.socket.exists() or self._process.poll() is not None)

    def kill(self, *, is_alone: bool = True) -> None:
        """End it by SIGKILL. `is_alone` says that the socket is not another driver's."""
        self._process.kill()
        self._process.wait()
        if is_alone:
            self._kubelet.socket.unlink(missing_ok=True)

    def log(self) -> str:
        return self._log.read_text()


def in_pod(
    volume: str, script: str, *, uid: int = POD_UID, groups: str = "", users: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a shell script in a pod, with the volume as its working directory.

    `users` says whether the pod has a user namespace (``hostUsers: false``), `groups` are its
    supplementary groups.
    """
    seen = f"{os.path.dirname(volume)}/seen"
    setup = f'mkdir -p {seen}; mount --bind {volume} {seen}; cd {seen}; exec "$@"'
    own_groups = f"--groups={groups}" if groups else "--clear-groups"
    become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", own_groups]
    become += ["--bounding-set=-all", "--inh-caps=-all"]
    own_users = ["unshare", "--user"] if users else []
    done = subprocess.run(
        [
            *("unshare", "--mount", "--pid", "--fork", "--propagation", "private"),
            *("sh", "-ec", setup, "sh", *become, *own_users, "sh", "-ec", script),
        ],
        capture_output=True,
        text=True,
        timeout=CALL_S,
        check=False,
    )
    Path(seen).rmdir()
    return done


def in_own_users(
    volume: str, script: str, *, readonly: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a shell script as root of a pod with ``hostUsers: false``, with the volume as its working
    directory. See `usernamespace`."""
    seen = f"{os.path.dirname(volume)}/seen"
    os.mkdir(seen)
    done = subprocess.run(
        [
            *(sys.executable, usernamespace.__file__),
            *(volume, seen, "yes" if readonly else "no", script),
        ],
        capture_output=True,
        text=True,
        timeout=CALL_S,
        check=False,
    )
    os.rmdir(seen)
    return done
