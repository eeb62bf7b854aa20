"""The manifests for Kubernetes are valid, and agree with each other, the page and ckptfs.

The tests in ``mount/test_namespaces.py`` show that mounts reach containers as these manifests say,
and ``./scripts/image-proof`` runs their containers.
"""

import contextlib
import json
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
import typer
import yaml
from cloudcoil.models.prometheus_operator.v1 import PodMonitor
from conftest import wait_until
from support.manifests import (
    FOLDER,
    OVERLAYS,
    PAGE,
    Object,
    arguments_of,
    blocks_of_page,
    built,
    built_text,
    container_of,
    documents,
    environment_of,
    examples,
    on_node,
    pod_of,
)
from support.serverbase import free_port

from ckptfs._config.load import load_config
from ckptfs._csi import identity, publication, server
from ckptfs._csi.publication import KUBELET, Capability, publication_of
from ckptfs._model.config import Config
from ckptfs._model.named_store import CredentialSource
from ckptfs.cli import app

VERSIONS = ["1.30", kubernetes_validate.latest_version()]
BASE = built("base")
POD = pod_of(BASE["DaemonSet"])
DAEMON, DRIVER, METRICS = (container_of(POD, name) for name in ("ckptfs", "driver", "metrics"))
EXAMPLES = examples()
CLIENT = EXAMPLES["client Pod"]
[MONITOR] = documents(FOLDER / "monitoring.yaml")
KUBELET_FOLDER = "/var/lib/kubelet"


def plugin_socket() -> str:
    """The driver's socket on the node."""
    return f"{KUBELET_FOLDER}/plugins/{BASE['CSIDriver']['metadata']['name']}/csi.sock"


# -- each object by itself


@pytest.mark.parametrize("kubernetes", VERSIONS)
def test_all_objects_are_valid(kubernetes: str) -> None:
    for overlay in OVERLAYS:
        for document in built(overlay).values():
            kubernetes_validate.validate(document, kubernetes, strict=True)
    for document in EXAMPLES.values():
        kubernetes_validate.validate(document, kubernetes, strict=True)


def test_the_monitor_is_valid() -> None:
    def is_known(document: Object) -> bool:
        found = PodMonitor.model_validate(document)
        return found.model_dump(mode="json", by_alias=True, exclude_unset=True) == document

    assert is_known(MONITOR)
    [endpoint] = MONITOR["spec"]["podMetricsEndpoints"]
    misspelt = {**MONITOR["spec"], "podMetricsEndpoints": [{**endpoint, "pathh": "/metrics"}]}
    assert not is_known({**MONITOR, "spec": misspelt})


def test_a_mistake_would_be_found() -> None:
    mistaken: list[tuple[Object, str]] = [(BASE["CSIDriver"], "podInfo"), (CLIENT, "hostUser")]
    for document, field in mistaken:
        wrong = {**document, "spec": {**document["spec"], field: True}}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_images_are_pinned_and_named_without_a_host() -> None:
    [kustomization] = documents(FOLDER / "base" / "kustomization.yaml")
    images = {each["name"]: each for each in kustomization["images"]}
    [daemon_set] = documents(FOLDER / "base" / "node.yaml")
    used = {container["image"] for container in pod_of(daemon_set)["containers"]}
    assert used == set(images)
    assert images["ckptfs"]["newTag"] == version("ckptfs")
    assert CLIENT["spec"]["containers"][0]["image"] == f"ckptfs:{version('ckptfs')}"
    pods = [POD, *(each["spec"] for each in EXAMPLES.values() if each["kind"] == "Pod")]
    for image in (container["image"] for pod in pods for container in pod["containers"]):
        assert re.fullmatch(r"[a-z0-9-]+:v?\d+\.\d+[\w.-]*", image), image


# -- rights


def test_only_what_mounts_is_privileged() -> None:
    privileged = {
        container["name"]
        for container in POD["containers"]
        if container["securityContext"].get("privileged")
    }
    assert privileged == {"ckptfs", "driver"}
    for container in POD["containers"]:
        rights = container["securityContext"]
        assert rights["readOnlyRootFilesystem"]
        if container["name"] not in privileged:
            assert not rights["allowPrivilegeEscalation"]
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert rights["seccompProfile"] == {"type": "RuntimeDefault"}
        assert {"requests", "limits"} <= container["resources"].keys()
    assert METRICS["securityContext"]["runAsNonRoot"]


def test_the_pods_have_no_rights_in_the_api() -> None:
    for overlay in OVERLAYS:
        objects = built(overlay)
        assert not [kind for kind in objects if kind.endswith(("Role", "RoleBinding"))]
        account = objects["ServiceAccount"]
        assert not account["automountServiceAccountToken"]
        pod = pod_of(objects["DaemonSet"])
        assert pod["serviceAccountName"] == account["metadata"]["name"]
        assert not pod["automountServiceAccountToken"]


def test_the_namespace_and_its_quota_admit_the_pods() -> None:
    labels = BASE["Namespace"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "privileged"
    namespaced = [each for each in BASE.values() if each["kind"] not in ("Namespace", "CSIDriver")]
    name = BASE["Namespace"]["metadata"]["name"]
    assert {each["metadata"]["namespace"] for each in namespaced} == {name}
    [scope] = BASE["ResourceQuota"]["spec"]["scopeSelector"]["matchExpressions"]
    assert POD["priorityClassName"] in scope["values"]


# -- the places that containers share


def config_of(overlay: str, folder: Path) -> Config:
    """The daemon's configuration of an overlay."""
    environment = environment_of(DAEMON)
    file = PurePosixPath(environment["CKPTFS_CONFIG"])
    (folder / file.name).write_text(built(overlay)["ConfigMap"]["data"][file.name])
    return load_config({**environment, "CKPTFS_CONFIG": str(folder / file.name)})


def test_the_base_and_the_overlays_have_valid_configurations(tmp_path: Path) -> None:
    for overlay in OVERLAYS:
        config = config_of(overlay, tmp_path)
        assert config.allow_other  # pods run as other users
        assert not config.lend_daemon_rights
        assert config.idle_exit_s == 0
        assert (overlay == "node-credentials") == ("prod" in config.store)
        assert f"proxy_pass http://{config.metrics};" in BASE["ConfigMap"]["data"]["nginx.conf"]


def test_the_nodes_credentials_are_in_a_secret(tmp_path: Path) -> None:
    store = config_of("node-credentials", tmp_path).store["prod"]
    assert store.users == "*"
    credentials = store.credentials
    assert isinstance(credentials, CredentialSource)
    pod = pod_of(built("node-credentials")["DaemonSet"])
    mounts = container_of(pod, "ckptfs")["volumeMounts"]
    mounted = {mount["mountPath"]: mount["name"] for mount in mounts}
    volume = mounted[str(PurePosixPath(credentials.file).parent)]
    [secret] = [each["secret"] for each in pod["volumes"] if each["name"] == volume]
    created = re.search(r"create secret generic (\S+) --from-file=(\w+)=", PAGE.read_text())
    assert created
    assert created.groups() == (secret["secretName"], PurePosixPath(credentials.file).name)
    assert secret["defaultMode"] == 0o400


def test_daemon_driver_and_client_see_the_same_socket_and_mount() -> None:
    for variable in ("CKPTFS_SOCKET", "CKPTFS_MOUNT"):
        path = environment_of(DAEMON)[variable]
        place, propagation = on_node(POD, DAEMON, path)
        assert propagation == "Bidirectional"
        assert environment_of(DRIVER)[variable] == path
        assert on_node(POD, DRIVER, path) == (place, "HostToContainer")
        [container] = CLIENT["spec"]["containers"]
        seen = on_node(CLIENT["spec"], container, environment_of(container)[variable])
        assert seen == (place, "HostToContainer")
        # The directory around both is the volume, which outlives what is in it.
        assert place not in [v.get("hostPath", {}).get("path") for v in POD["volumes"]]
    cache = environment_of(DAEMON)["CKPTFS_CACHE_DIR"]
    assert on_node(POD, DAEMON, cache)[0] == cache


def test_the_kubelet_finds_the_driver_and_its_mounts() -> None:
    driver = arguments_of(DRIVER)
    socket = driver["endpoint"].removeprefix("unix://")
    assert on_node(POD, DRIVER, socket)[0] == plugin_socket()
    assert driver["kubelet-endpoint"] == plugin_socket()
    registry = on_node(POD, DRIVER, driver["registration-dir"])[0]
    assert registry == f"{KUBELET_FOLDER}/plugins_registry"
    # The kubelet names paths of the node, so they are the same in the container.
    target = f"{KUBELET_FOLDER}/pods/uid/volumes/kubernetes.io~csi/checkpoint/mount"
    assert on_node(POD, DRIVER, target) == (target, "Bidirectional")
    assert on_node(POD, DRIVER, driver["state-dir"])[0] == driver["state-dir"]


def test_another_kubelet_directory_needs_one_replacement() -> None:
    page = PAGE.read_text()
    assert f"sed 's,{KUBELET_FOLDER},/var/snap/microk8s/common{KUBELET_FOLDER},g'" in page
    text = built_text("base").replace(KUBELET_FOLDER, "/kubelet")
    pods = [each for each in yaml.safe_load_all(text) if each["kind"] == "DaemonSet"]
    pod = pod_of(pods[0])
    target = "/kubelet/pods/uid/mount"
    assert on_node(pod, container_of(pod, "driver"), target)[0] == target
    path = arguments_of(container_of(pod, "driver"))["kubelet-endpoint"]
    assert on_node(pod, container_of(pod, "driver"), "/csi/csi.sock")[0] == path


# -- commands and ports


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_containers_run_commands_that_exist(overlay: str) -> None:
    group: Any = typer.main.get_command(app)
    pod = pod_of(built(overlay)["DaemonSet"])
    for name in ("ckptfs", "driver"):
        container = container_of(pod, name)
        assert "command" not in container  # the image's entry point is ckptfs
        command, *arguments = container["args"]
        # This raises an error for an unknown flag.
        context = group.commands[command].make_context(command, arguments)
        assert context.params["take_over"]
        if name == "driver":
            given = context.params["node_credentials_namespace"]
            assert (given == ["training"]) == (overlay == "node-credentials")
            assert context.params["driver_name"] == BASE["CSIDriver"]["metadata"]["name"]
    probes = [DAEMON[f"{kind}Probe"]["exec"]["command"] for kind in ("readiness", "liveness")]
    assert probes == [["ckptfs", "status"]] * 2
    known = {parameter.envvar for parameter in group.commands["csi"].params}
    named = {each["name"] for each in DRIVER["env"]}
    assert named <= known | {f"CKPTFS_{each}" for each in ("CONFIG", "SOCKET", "MOUNT")}


def test_two_pods_can_run_on_a_node_at_once() -> None:
    strategy = BASE["DaemonSet"]["spec"]["updateStrategy"]
    assert strategy["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert "hostNetwork" not in POD
    ports = [port for container in POD["containers"] for port in container.get("ports", [])]
    assert not any("hostPort" in port for port in ports)
    numbers = [port["containerPort"] for port in ports]
    assert len(set(numbers)) == len(numbers)
    assert not any("lifecycle" in container for container in POD["containers"])
    # The old pod ends when the new one is ready, so that one must be the mount's owner by then.
    *_, script = DAEMON["startupProbe"]["exec"]["command"]
    assert 'json.loads(status.stdout)["host"] != socket.gethostname()' in script
    compile(script, "node.yaml", "exec")


def test_the_drivers_health_is_its_own_answer() -> None:
    group: Any = typer.main.get_command(app)
    for probe in ("startupProbe", "livenessProbe"):
        program, command, *words = DRIVER[probe]["exec"]["command"]
        assert (program, command) == ("ckptfs", "csi")
        context = group.commands[command].make_context(command, words)
        assert context.params["probe"]
        assert context.params["take_over"] == (probe == "startupProbe")
        assert context.params["endpoint"] == arguments_of(DRIVER)["endpoint"]
        assert DRIVER[probe]["timeoutSeconds"] > server.PROBE_S


def test_monitor_and_policy_find_the_metrics() -> None:
    [endpoint] = MONITOR["spec"]["podMetricsEndpoints"]
    policy = BASE["NetworkPolicy"]["spec"]
    labels = BASE["DaemonSet"]["spec"]["template"]["metadata"]["labels"]
    own = BASE["DaemonSet"]["spec"]["selector"]
    selectors = MONITOR["spec"]["selector"], policy["podSelector"], own
    for selector in selectors:
        assert selector["matchLabels"].items() <= labels.items()
    [port] = METRICS["ports"]
    assert endpoint["port"] == port["name"] == policy["ingress"][0]["ports"][0]["port"]
    assert len(policy["ingress"]) == 1
    assert f"listen {port['containerPort']};" in BASE["ConfigMap"]["data"]["nginx.conf"]
    job = labels[MONITOR["spec"]["jobLabel"]]
    assert f'job="{job}"' in (FOLDER.parent / "grafana" / "alerts.yaml").read_text()


# -- volumes


def volumes() -> list[tuple[str, Object, bool, Object]]:
    """Each volume in the examples and in the page: its name, its CSI part, whether it is inline,
    and the pod."""
    found: list[tuple[str, Object, bool, Object]] = []
    for name, each in EXAMPLES.items():
        if each["kind"] == "PersistentVolume":
            pod = EXAMPLES[f"{name.split()[0]} Pod"]
            found.append((name, each["spec"]["csi"], False, pod))
        for volume in each["spec"].get("volumes", []) if each["kind"] == "Pod" else []:
            if "csi" in volume:
                found.append((name, volume["csi"], True, each))
    for block in blocks_of_page("yaml"):
        for volume in (yaml.safe_load(block) or {}).get("volumes", []):
            found.append(("page", volume["csi"], True, {"metadata": {"namespace": "training"}}))
    return found


def test_the_driver_takes_the_volumes_of_the_examples() -> None:
    found = volumes()
    assert len(found) == 4
    keys = {"AWS_ACCESS_KEY_ID": "KEY", "AWS_SECRET_ACCESS_KEY": "SECRET"}
    assert EXAMPLES["inline Secret"]["stringData"] == keys
    tokens = pod_identity_tokens()
    for name, volume, is_inline, pod in found:
        assert volume["driver"] == BASE["CSIDriver"]["metadata"]["name"]
        attributes: dict[str, str] = volume["volumeAttributes"]
        namespace = pod["metadata"].get("namespace", "default")
        context = attributes | {
            f"{KUBELET}ephemeral": str(is_inline).lower(),
            f"{KUBELET}pod.namespace": namespace,
            f"{KUBELET}pod.name": "pod",
            f"{KUBELET}serviceAccount.name": "trainer",
            publication.TOKENS: tokens if "roleArn" in attributes else "",
        }
        asked = publication_of(
            "volume",
            "/var/lib/kubelet/pods/uid/mount",
            context,
            Capability(is_block=False, mode=1 if is_inline else 3, fs_type="", flags=[], group=""),
            readonly=volume["readOnly"],
        )
        secrets = keys if "nodePublishSecretRef" in volume else {}
        allowed = arguments_of(
            container_of(pod_of(built("node-credentials")["DaemonSet"]), "driver")
        )["node-credentials-namespace"]
        wanted = identity.wanted(asked, context, secrets, [allowed])
        assert wanted.location.uri, name
        assert wanted.volume.lends == ("store" in attributes)


def pod_identity_tokens() -> str:
    """The tokens that the kubelet sends with the overlay pod-identity, as JSON."""
    requests = built("pod-identity")["CSIDriver"]["spec"]["tokenRequests"]
    assert "tokenRequests" not in BASE["CSIDriver"]["spec"]
    token = {"token": "a.b.c", "expirationTimestamp": "2030-01-01T00:00:00Z"}
    return json.dumps({each["audience"]: token for each in requests})


def test_the_driver_object_asks_for_what_the_driver_needs() -> None:
    spec = BASE["CSIDriver"]["spec"]
    assert spec["podInfoOnMount"]
    assert spec["requiresRepublish"]
    assert not spec["attachRequired"]
    assert not spec["seLinuxMount"]
    assert set(spec["volumeLifecycleModes"]) == {"Ephemeral", "Persistent"}
    audiences = {r["audience"] for r in built("pod-identity")["CSIDriver"]["spec"]["tokenRequests"]}
    page = PAGE.read_text()
    for audience in audiences:
        assert f"`{audience}`" in page


def test_the_page_lists_the_attributes() -> None:
    page = PAGE.read_text()
    for name, meaning in publication.ATTRIBUTES.items():
        assert f"| `{name}` | {meaning} |" in page


def test_the_pages_commands_exist() -> None:
    group: Any = typer.main.get_command(app)
    lines = re.findall(r"ckptfs ((?:csi|mount|status|doctor|help)\b[^`\n]*)", PAGE.read_text())
    assert {"csi", "status", "doctor"} <= {line.split()[0] for line in lines}
    for line in lines:
        command, *words = line.split()
        known = {flag for parameter in group.commands[command].params for flag in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_the_pages_commands_name_files_that_exist() -> None:
    text = "\n".join(blocks_of_page("sh"))
    paths = re.findall(r"(scripts/[\w./-]+)", text)
    assert {"scripts/kubernetes/pod-identity", "scripts/kubernetes/node-credentials"} <= set(paths)
    assert all((FOLDER.parents[1] / path).exists() for path in paths), paths


def test_the_scripts_of_the_examples_are_python() -> None:
    for each in EXAMPLES.values():
        if each["kind"] == "Pod":
            [container] = each["spec"]["containers"]
            compile((container.get("args") or container["command"][2:])[0], "example", "exec")
            assert "privileged" not in container["securityContext"]
    assert 'Checkpoint("prod:' in CLIENT["spec"]["containers"][0]["args"][0]
    assert CLIENT["spec"]["securityContext"]["runAsUser"] != 0
    assert not EXAMPLES["user-namespace Pod"]["spec"]["hostUsers"]


# -- the proxy of the metrics


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
    text = BASE["ConfigMap"]["data"]["nginx.conf"]
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
