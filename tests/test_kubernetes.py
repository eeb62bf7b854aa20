"""The manifests for Kubernetes are valid, and agree with each other and with ckptfs.

That mounts reach containers as these manifests say is shown in ``mount/test_namespaces.py``.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any

import kubernetes_validate
import pytest
import yaml

from ckptfs._config import load_config
from ckptfs.cli import app

FOLDER = Path(__file__).parents[1] / "scripts" / "kubernetes"
VERSIONS = ["1.30", kubernetes_validate.latest_version()]


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


NODE = {document["kind"]: document for document in documents("node.yaml")}
DAEMON = NODE["DaemonSet"]["spec"]["template"]["spec"]
[TRAINING] = documents("training.yaml")


def environment_of(pod: dict[str, Any]) -> dict[str, str]:
    [container] = pod["containers"]
    return {each["name"]: each["value"] for each in container["env"]}


def host_path_of(pod: dict[str, Any], path: str) -> tuple[str, str]:
    """Where on the node a path of the pod's container is, and how mounts are propagated there."""
    [container] = pod["containers"]
    volumes = {each["name"]: each for each in pod["volumes"]}
    for mount in container["volumeMounts"]:
        if PurePosixPath(path).is_relative_to(mount["mountPath"]):
            on_node = PurePosixPath(volumes[mount["name"]]["hostPath"]["path"])
            below = PurePosixPath(path).relative_to(mount["mountPath"])
            return str(on_node / below), mount.get("mountPropagation", "None")
    raise AssertionError(f"{path} is in no volume")


def test_all_are_there() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {"node.yaml", "training.yaml"}
    assert set(NODE) == {"ConfigMap", "DaemonSet"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["node.yaml", "training.yaml"])
def test_they_are_valid(name: str, version: str) -> None:
    for document in documents(name):
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
    [container] = DAEMON["containers"]
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    secret = mounted[str(PurePosixPath(store.credentials.file).parent)]
    assert [v for v in DAEMON["volumes"] if v["name"] == secret and "secret" in v]
    assert config.idle_exit_s == 0
    assert TRAINING["spec"]["securityContext"]["runAsUser"] != 0
    [container] = DAEMON["containers"]
    places = [PurePosixPath(mount["mountPath"]) for mount in container["volumeMounts"]]
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
    [container] = DAEMON["containers"]
    assert container["args"][0].rstrip().endswith("\nexec ckptfs mount --foreground")
    assert container["securityContext"]["privileged"]
    assert DAEMON["terminationGracePeriodSeconds"] >= 30


def test_commands_of_probes_and_hooks_exist() -> None:
    [container] = DAEMON["containers"]
    probes = [container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")]
    commands = [probe["exec"]["command"] for probe in [*probes, container["lifecycle"]["preStop"]]]
    known = {command.name for command in app.registered_commands}
    assert {command[1] for command in commands} <= known
    assert {command[0] for command in commands} == {"ckptfs"}


def test_the_training_script_is_python() -> None:
    [container] = TRAINING["spec"]["containers"]
    script = re.search(r"<<'PYTHON'\n(.*)\nPYTHON\n", container["args"][0], re.DOTALL)
    assert script
    compile(script[1], "training.yaml", "exec")
    assert "privileged" not in container["securityContext"]
