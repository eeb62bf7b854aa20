"""The image of scripts/kubernetes, without a container engine: behind scripts/image-proof.

Each stage of the recipe is a copy of a small Debian, in which its steps run with a changed root
directory. Then the containers `ckptfs` and `driver` of the DaemonSet run in the last stage, with
their arguments, variables, places and probes, and a root file system that is read-only. A second
pod replaces the first one, as in an update, while a volume is read. The kubelet is that of the
tests: a plugin manager with which the driver registers, and a client that publishes the volume.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from recipe import Step, base_and_name, context_names, copy_of, steps, variables
from support.kubelet import Kubelet
from support.pluginmanager import PluginManager
from support.s3server import S3Server

PROJECT = Path(__file__).parents[1]
FOLDER = PROJECT / "scripts" / "kubernetes"
CONSTRAINTS = FOLDER / "constraints.txt"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_PASSED_ON = ("PIP_INDEX_URL", "http_proxy", "https_proxy", "no_proxy")
"""How a build reaches packages, if this machine's settings say so."""
_START_S = 60.0
KUBELET = Path("/var/lib/kubelet")
DRIVER = "csi.ckptfs.dev"
SOCKET = KUBELET / "plugins" / DRIVER / "csi.sock"
_ENTER = (
    'mount --make-private "$(findmnt --noheadings --output TARGET --target "$0")"; '
    'mount --bind "$0" "$0"; mount --rbind /dev "$0/dev"; mount --make-rprivate "$0/dev"; '
    'mount -t proc proc "$0/proc"; '
)
"""Shell commands for a root directory of its own. The mounts of the node stay shared."""


def say(text: str) -> None:
    print(f"image-proof: {text}", file=sys.stderr, flush=True)


def command_in(root: Path, folder: str, *command: str, before: str = "", **own: bool) -> list[str]:
    """A command with the root directory `root`, in a mount namespace of its own, after the shell
    commands `before`. `own` are further namespaces, as the flags of unshare(1) name them."""
    enter = f'{_ENTER}{before} exec chroot "$0" sh -c \'cd "$0" && exec "$@"\' "$@"'
    flags = [f"--{name}" for name, is_own in own.items() if is_own]
    unshare = ["unshare", "--mount", "--propagation", "unchanged", "--fork", "--kill-child", *flags]
    return [*unshare, "sh", "-ec", enter, str(root), folder, *command]


class Build:
    """Runs a recipe's steps. `stages` are the root directories so far, by name or number."""

    def __init__(self, base: Path, scratch: Path) -> None:
        self._base = base
        self._scratch = scratch
        self.stages: dict[str, Path] = {}
        self.root = scratch
        self.environment: dict[str, str] = {}
        self.entry = ""
        self._folder = "/"

    def run(self, step: Step) -> None:
        """Raises subprocess.CalledProcessError, OSError, RecipeError."""
        say(str(step))
        getattr(self, f"_{step.instruction.lower()}")(step.text)

    def _from(self, text: str) -> None:
        image, name = base_and_name(text)
        release = (self._base / "etc/debian_version").read_text().strip()
        if not image.startswith(f"debian:{release.partition('.')[0]}."):
            raise SystemExit(
                f"image-proof: the recipe begins with {image}, this is Debian {release}"
            )
        self.root = self._scratch / f"stage-{len(self.stages)}"
        subprocess.run(["cp", "-a", "--reflink=auto", self._base, self.root], check=True)
        shutil.copy("/etc/resolv.conf", self.root / "etc/resolv.conf")
        self.stages[name or str(len(self.stages))] = self.root
        self.environment, self._folder, self.entry = {"PATH": _PATH}, "/", ""

    def _run(self, text: str) -> None:
        given = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        own = self.root / "run" / "certificates.pem"
        if _CERTIFICATES.exists():  # of this machine, which may be behind a proxy
            shutil.copy(_CERTIFICATES, own)
            given["PIP_CERT"] = "/run/certificates.pem"
        given["DEBIAN_FRONTEND"] = "noninteractive"
        subprocess.run(
            command_in(self.root, self._folder, "/bin/sh", "-c", text, pid=True),
            env=self.environment | given,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            check=True,
        )
        own.unlink(missing_ok=True)

    def _workdir(self, text: str) -> None:
        self._folder = text
        (self.root / text.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def _env(self, text: str) -> None:
        self.environment = variables(text, self.environment)

    def _entrypoint(self, text: str) -> None:
        [self.entry] = yaml.safe_load(text)

    def _copy(self, text: str) -> None:
        stage, source, target = copy_of(text)
        to = self.root / os.path.join(self._folder, target).lstrip("/")
        if stage:
            shutil.copytree(self.stages[stage] / source.lstrip("/"), to, symlinks=True)
            return
        if source != ".":
            raise SystemExit(f"image-proof: COPY {text}: only the whole context can be copied")
        skipped = shutil.ignore_patterns("__pycache__", "results")
        for name in context_names(FOLDER / "Containerfile.dockerignore"):
            found = PROJECT / name
            if found.is_dir():
                shutil.copytree(found, to / name, symlinks=True, ignore=skipped)
            else:
                shutil.copy(found, to / name)


def built(base: Path, scratch: Path, *, frozen: bool) -> Build:
    """Build the image, with the versions of CONSTRAINTS, or, unless `frozen`, with the newest."""
    build = Build(base, scratch)
    for step in steps((FOLDER / "Containerfile").read_text()):
        build.run(step)
        if step.instruction == "COPY" and not frozen and step.text == ". .":
            (build.root / "source" / CONSTRAINTS.relative_to(PROJECT)).write_text("")
    return build


def installed(root: Path) -> str:
    """The packages in the image, as lines of a file of constraints."""
    listing = command_in(root, "/", "/opt/ckptfs/bin/pip", "freeze", "--exclude", "ckptfs")
    done = subprocess.run(listing, capture_output=True, text=True, check=True)
    return done.stdout


class Pod:
    """A pod of the DaemonSet, called `name`. Its containers run in the last stage of a build. Pods
    share the node's directories, which are in `node`."""

    def __init__(self, build: Build, node: Path, name: str) -> None:
        self._build = build
        self.node = node
        self._name = name
        documents = yaml.safe_load_all((FOLDER / "base" / "node.yaml").read_text())
        [daemon_set] = [each for each in documents if each["kind"] == "DaemonSet"]
        self._pod = daemon_set["spec"]["template"]["spec"]
        self._volumes = {each["name"]: each for each in self._pod["volumes"]}

    @contextlib.contextmanager
    def running(self, name: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a container, and end it by SIGTERM."""
        container = self._container(name)
        say(f"{self._name}: {self._build.entry} {' '.join(container['args'])}")
        process = subprocess.Popen(
            self.command(container, self._build.entry, *container["args"]),
            env=self._environment(container),
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                [child] = _children(process.pid)
                os.kill(child, signal.SIGTERM)
            if status := process.wait(_START_S):
                raise SystemExit(f"image-proof: {self._name}: {name} ended with status {status}")

    def run(self, name: str, *command: str) -> str:
        """The output of a command in a container. Raises SystemExit if the command fails."""
        done = self._done(name, *command)
        if done.returncode:
            raise SystemExit(f"image-proof: {' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def passes(self, name: str, probe: str) -> bool:
        """Whether the command of a container's probe succeeds."""
        return not self._done(name, *self._container(name)[probe]["exec"]["command"]).returncode

    def _done(self, name: str, *command: str) -> subprocess.CompletedProcess[str]:
        container = self._container(name)
        return subprocess.run(
            self.command(container, *command),
            env=self._environment(container),
            capture_output=True,
            text=True,
            check=False,
        )

    def _container(self, name: str) -> dict[str, Any]:
        [container] = [each for each in self._pod["containers"] if each["name"] == name]
        return container

    def _environment(self, container: dict[str, Any]) -> dict[str, str]:
        given = {each["name"]: each.get("value", "node-1") for each in container.get("env", [])}
        return self._build.environment | given

    def command(self, container: dict[str, Any], *command: str) -> list[str]:
        """A command with the container's root file system, volumes and mount propagation."""
        before = f"hostname {self._name}; "
        for mount in container["volumeMounts"]:
            place = f'"$0{mount["mountPath"]}"'
            source = self._source(self._volumes[mount["name"]])
            (self._build.root / mount["mountPath"].lstrip("/")).mkdir(parents=True, exist_ok=True)
            if source is None:
                before += f"mount -t tmpfs tmpfs {place}; "
                continue
            before += f"mount --rbind {source} {place}; "
            slave = mount.get("mountPropagation", "None") != "Bidirectional"
            before += f"mount --make-{'rslave' if slave else 'rshared'} {place}; "
        readonly = container["securityContext"]["readOnlyRootFilesystem"]
        before += 'mount -o remount,bind,ro "$0"; ' if readonly else ""
        own = {"uts": True, "pid": not self._pod["hostPID"]}
        return command_in(self._build.root, "/", *command, before=before, **own)

    def _source(self, volume: dict[str, Any]) -> Path | None:
        if "configMap" in volume:
            return FOLDER / "base"
        if "hostPath" not in volume:
            return None
        place = self.node / volume["hostPath"]["path"].lstrip("/")
        place.mkdir(parents=True, exist_ok=True)
        return place


def _children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(is_so: Any, process: subprocess.Popen[bytes] | None = None) -> None:
    """Raises SystemExit if the process ends, or after some time."""
    end_s = time.monotonic() + _START_S
    while not is_so():
        if (process is not None and process.poll() is not None) or time.monotonic() > end_s:
            raise SystemExit("image-proof: a container does not start or end; see above")
        time.sleep(0.1)


def prove(build: Build, node: Path) -> None:
    """Replace a pod while a volume is read, as an update does, and end the next one. Raises
    SystemExit."""
    old, new = (Pod(build, node, name) for name in ("old", "new"))
    for command in (["--version"], ["csi", "--help"]):
        print(old.run("ckptfs", build.entry, *command).splitlines()[0])
    content = random.Random(1).randbytes(3 << 20)
    kubelet = Kubelet(KUBELET, SOCKET)
    registry = KUBELET / "plugins_registry"
    registry.mkdir()
    with contextlib.ExitStack() as ends:
        ends.callback(kubelet.close)
        manager = ends.enter_context(PluginManager(registry))
        new_ends = ends.enter_context(contextlib.ExitStack())
        with contextlib.ExitStack() as old_ends:
            start(old, old_ends, manager)
            require(not new.passes("ckptfs", "startupProbe"), "the new pod is ready too soon")
            path = ends.enter_context(published(kubelet, content))  # ends after the pods
            file = ends.enter_context((path / "weights.bin").open("rb"))
            seen = file.read(1 << 20)
            start(new, new_ends, manager)
            seen += file.read(1 << 20)
        seen += file.read()
        require(seen == content, "WRONG BYTES")
        for name in ("ckptfs", "driver"):
            require(new.passes(name, "livenessProbe"), f"the end of the old pod ended {name}")
        require(manager.history == [("registered", DRIVER)], "the driver was registered again")
        file.close()
        kubelet.unpublish("pod")
        require(not os.path.ismount(kubelet.target("pod")), "the driver has left a volume")
        new_ends.close()
        wait_until(lambda: not manager.drivers)
    require(not os.path.ismount(node / "run/ckptfs/mnt"), "the daemon has left its mount")


@contextlib.contextmanager
def published(kubelet: Kubelet, content: bytes) -> Iterator[Path]:
    """The path of a volume of the pod "pod", whose checkpoint at a store has the file weights.bin.
    Serves the store as long as the context."""
    with S3Server() as s3:
        folder = s3.root / "bucket" / "checkpoint"
        folder.mkdir(parents=True)
        (folder / "weights.bin").write_bytes(content)
        secrets = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
        attributes = {"uri": "s3://bucket/checkpoint", "region": s3.region}
        attributes["endpoint"] = f"http://{s3.endpoint}"
        yield Path(kubelet.publish("pod", attributes, secrets=secrets))


def start(pod: Pod, ends: contextlib.ExitStack, manager: PluginManager) -> None:
    """Start the containers of a pod, until their probes succeed and the kubelet knows the driver.
    Raises SystemExit."""
    for name in ("ckptfs", "driver"):
        process = ends.enter_context(pod.running(name))
        wait_until(lambda name=name: pod.passes(name, "startupProbe"), process)
        require(pod.passes(name, "livenessProbe"), f"the container {name} is not alive")
    require(pod.passes("ckptfs", "readinessProbe"), "the pod is not ready")
    wait_until(lambda: manager.drivers == {DRIVER: str(SOCKET)})


def require(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise SystemExit(f"image-proof: {otherwise}")


@contextlib.contextmanager
def node_directory(scratch: Path) -> Iterator[Path]:
    """The node's root, whose mounts reach the containers and come from them. Its KUBELET is also
    that of this process, because the kubelet and the driver name paths of the node."""
    node = scratch / "node"
    node.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "node", node], check=True)
    subprocess.run(["mount", "--make-shared", node], check=True)
    inside = node / KUBELET.relative_to("/")
    inside.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "kubelet", KUBELET.parent], check=True)
    KUBELET.mkdir()
    subprocess.run(["mount", "--bind", inside, KUBELET], check=True)
    try:
        yield node
    finally:
        subprocess.run(["umount", "--recursive", KUBELET.parent], check=True)
        subprocess.run(["umount", "--recursive", node], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("--freeze", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ckptfs-image-") as folder:
        scratch = Path(folder)
        build = built(args.base, scratch, frozen=not args.freeze)
        found = installed(build.root)
        if args.freeze:
            CONSTRAINTS.write_text(found)
        elif found != CONSTRAINTS.read_text():
            raise SystemExit("image-proof: the image has other packages than constraints.txt")
        with node_directory(scratch) as node:
            prove(build, node)
        size = subprocess.run(["du", "-sm", build.root], capture_output=True, text=True, check=True)
        print(f"image-proof: passed; the image has {size.stdout.split()[0]} MB")


if __name__ == "__main__":
    main()
