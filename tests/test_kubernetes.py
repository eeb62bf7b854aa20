"""The manifests for Kubernetes are valid, and agree with each other, the image and ckptfs.

The tests in ``mount/test_namespaces.py`` show that mounts reach containers as these manifests say.
"""

import contextlib
import os
import re
import subprocess
import threading
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import kubernetes_validate
import pytest
import yaml
from conftest import wait_until
from support.serverbase import free_port

from ckptfs._config.load import load_config
from ckptfs._model.named_store import CredentialSource
from ckptfs.cli import app

FOLDER = Path(__file__).parents[1] / "scripts" / "kubernetes"
VERSIONS = ["1.30", kubernetes_validate.latest_version()]


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


NODE = {document["kind"]: document for document in documents("node.yaml")}
DAEMON = NODE["DaemonSet"]["spec"]["template"]["spec"]
CONTAINER, METRICS = DAEMON["containers"]
[TRAINING] = documents("training.yaml")
MONITOR, POLICY = documents("monitoring.yaml")
DOCKERFILE = (FOLDER / "Dockerfile").read_text()


def environment_of(pod: dict[str, Any]) -> dict[str, str]:
    container = pod["containers"][0]
    return {each["name"]: each["value"] for each in container["env"]}


def host_path_of(pod: dict[str, Any], path: str) -> tuple[str, str]:
    """Where on the node a path of the pod's container is, and how mounts are propagated there."""
    container = pod["containers"][0]
    volumes = {each["name"]: each for each in pod["volumes"]}
    for mount in container["volumeMounts"]:
        if PurePosixPath(path).is_relative_to(mount["mountPath"]):
            on_node = PurePosixPath(volumes[mount["name"]]["hostPath"]["path"])
            below = PurePosixPath(path).relative_to(mount["mountPath"])
            return str(on_node / below), mount.get("mountPropagation", "None")
    raise AssertionError(f"{path} is in no volume")


def test_all_are_there() -> None:
    files = {"node.yaml", "training.yaml", "monitoring.yaml", "kustomization.yaml"}
    assert {path.name for path in FOLDER.iterdir()} == {
        *files,
        "Dockerfile",
        "Dockerfile.dockerignore",
    }
    assert set(NODE) == {"Namespace", "ConfigMap", "DaemonSet"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["node.yaml", "training.yaml", "monitoring.yaml"])
def test_they_are_valid(name: str, version: str) -> None:
    for document in documents(name):
        if "monitoring.coreos.com" in document["apiVersion"]:
            continue  # a custom resource, which Kubernetes itself does not know
        kubernetes_validate.validate(document, version, strict=True)


def test_a_mistake_would_be_found() -> None:
    [document] = documents("training.yaml")
    document["spec"]["containers"][0]["volumeMounts"][0]["mountPropagate"] = "HostToContainer"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)


def test_the_daemons_configuration_is_one(tmp_path: Path) -> None:
    environment = environment_of(DAEMON)
    file = PurePosixPath(environment["CKPTFS_CONFIG"])
    (tmp_path / file.name).write_text(NODE["ConfigMap"]["data"][file.name])
    config = load_config({**environment, "CKPTFS_CONFIG": str(tmp_path / file.name)})
    assert config.allow_other  # the training pod runs as another user
    assert not config.lend_daemon_rights
    store = config.store["prod"]
    assert store.users == "*"
    assert 'Checkpoint("prod:' in TRAINING["spec"]["containers"][0]["args"][0]
    mounted = {mount["mountPath"]: mount["name"] for mount in CONTAINER["volumeMounts"]}
    assert isinstance(store.credentials, CredentialSource)
    secret = mounted[str(PurePosixPath(store.credentials.file).parent)]
    assert [v for v in DAEMON["volumes"] if v["name"] == secret and "secret" in v]
    assert config.idle_exit_s == 0
    assert TRAINING["spec"]["securityContext"]["runAsUser"] != 0
    places = [PurePosixPath(mount["mountPath"]) for mount in CONTAINER["volumeMounts"]]
    assert all(
        any(PurePosixPath(v).is_relative_to(p) for p in places) for v in environment.values()
    )


def test_both_see_the_same_socket_and_mount() -> None:
    daemon, client = environment_of(DAEMON), environment_of(TRAINING["spec"])
    for variable in ("CKPTFS_SOCKET", "CKPTFS_MOUNT"):
        on_node, propagation = host_path_of(DAEMON, daemon[variable])
        assert propagation == "Bidirectional"
        seen = host_path_of(TRAINING["spec"], client[variable])
        assert seen == (on_node, "HostToContainer")
        # The directory around both is the volume, which outlives what is in it.
        assert on_node not in [v.get("hostPath", {}).get("path") for v in DAEMON["volumes"]]


def test_the_daemon_is_the_process_that_is_told_to_end() -> None:
    assert 'ENTRYPOINT ["ckptfs"]' in DOCKERFILE
    assert "command" not in CONTAINER
    assert CONTAINER["args"] == ["mount", "--foreground"]
    assert CONTAINER["securityContext"]["privileged"]
    assert DAEMON["terminationGracePeriodSeconds"] >= 30


def test_commands_of_probes_and_hooks_exist() -> None:
    probes = [CONTAINER[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")]
    commands = [probe["exec"]["command"] for probe in [*probes, CONTAINER["lifecycle"]["preStop"]]]
    known = {command.name for command in app.registered_commands}
    assert {command[1] for command in commands} <= known
    assert {command[0] for command in commands} == {"ckptfs"}


def test_an_update_waits_for_the_operator() -> None:
    assert NODE["DaemonSet"]["spec"]["updateStrategy"] == {"type": "OnDelete"}


def test_the_namespace_admits_the_pod() -> None:
    labels = NODE["Namespace"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "privileged"
    names = {each["metadata"]["namespace"] for each in (NODE["ConfigMap"], NODE["DaemonSet"])}
    assert names == {NODE["Namespace"]["metadata"]["name"]}


def test_versions_are_pinned() -> None:
    [image] = documents("kustomization.yaml")[0]["images"]
    assert image["name"] == CONTAINER["image"]
    assert f":{image['newTag']} ." in DOCKERFILE
    assert TRAINING["spec"]["containers"][0]["image"] == f"{image['name']}:{image['newTag']}"
    assert image["newTag"] == version("ckptfs")
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert len(set(bases)) == 1
    assert all(re.search(r":\d+\.\d+", base) for base in [*bases, METRICS["image"]])


def test_the_image_gets_all_that_the_package_is_built_of() -> None:
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "*"
    root = FOLDER.parents[1]
    copied = {name.removeprefix("!") for name in ignored[1:]}
    assert all((root / name).exists() for name in copied)
    assert {"ckptfs", "pyproject.toml", "README.md", "LICENSE"} <= copied


def test_the_monitor_finds_the_metrics() -> None:
    [endpoint] = MONITOR["spec"]["podMetricsEndpoints"]
    labels = NODE["DaemonSet"]["spec"]["template"]["metadata"]["labels"]
    for selector in (MONITOR["spec"]["selector"], POLICY["spec"]["podSelector"]):
        assert selector["matchLabels"].items() <= labels.items()
    [port] = METRICS["ports"]
    assert endpoint["port"] == port["name"] == POLICY["spec"]["ingress"][0]["ports"][0]["port"]
    assert f"listen {port['containerPort']};" in NODE["ConfigMap"]["data"]["nginx.conf"]
    job = labels[MONITOR["spec"]["jobLabel"]]
    assert f'job="{job}"' in (FOLDER.parent / "grafana" / "alerts.yaml").read_text()


class _Upstream(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"of {self.path}".encode())

    def log_message(self, *_: object, **__: object) -> None:
        pass


@pytest.mark.skipif(not os.path.exists("/usr/sbin/nginx"), reason="nginx is missing here")
def test_the_proxy_shows_the_metrics_and_nothing_else(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Upstream)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = free_port()
    text = NODE["ConfigMap"]["data"]["nginx.conf"]
    text = text.replace("127.0.0.1:9467", f"127.0.0.1:{server.server_address[1]}")
    text = text.replace("listen 9468", f"listen 127.0.0.1:{port}").replace("/tmp/", f"{tmp_path}/")
    (tmp_path / "nginx.conf").write_text(f"user root;\n{text}")
    nginx = subprocess.Popen(
        ["/usr/sbin/nginx", "-c", tmp_path / "nginx.conf", "-g", "daemon off;"],
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: _status("GET", port, "/metrics") == 200)
        assert _status("POST", port, "/metrics") == 403
        assert _status("GET", port, "/") == _status("GET", port, "/metrics/x") == 404
    finally:
        nginx.terminate()
        nginx.wait(30)
        server.shutdown()
        server.server_close()


def _status(method: str, port: int, path: str) -> int:
    """The status of nginx's answer; 0 while it does not listen."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        try:
            connection.request(method, path)
        except ConnectionRefusedError:
            return 0
        return connection.getresponse().status


def test_the_training_script_is_python() -> None:
    [container] = TRAINING["spec"]["containers"]
    compile(container["args"][0], "training.yaml", "exec")
    assert "privileged" not in container["securityContext"]
