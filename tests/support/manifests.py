"""The objects of scripts/kubernetes: as files, built by kustomize, and in the pages."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

FOLDER = Path(__file__).parents[2] / "scripts" / "kubernetes"
PAGE = Path(__file__).parents[2] / "ckptfs" / "KUBERNETES.md"
OVERLAYS = ("base", "pod-identity", "node-credentials")

Object = dict[str, Any]


@cache
def built_text(overlay: str) -> str:
    """The objects of an overlay, as ``kubectl apply -k`` sends them."""
    kubectl = Path(sys.executable).with_name("kubectl")
    command = [str(kubectl), "kustomize", str(FOLDER / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr  # a warning
    return done.stdout


def built(overlay: str) -> dict[str, Object]:
    """The objects of an overlay, by kind."""
    documents = list(yaml.safe_load_all(built_text(overlay)))
    found = {document["kind"]: document for document in documents}
    assert len(found) == len(documents)
    return found


def documents(path: Path) -> list[Object]:
    """The objects of a file."""
    return list(yaml.safe_load_all(path.read_text()))


def examples() -> dict[str, Object]:
    """All objects of the examples, by file and kind."""
    files = sorted((FOLDER / "examples").glob("*.yaml"))
    return {f"{file.stem} {each['kind']}": each for file in files for each in documents(file)}


def blocks_of_page(language: str) -> list[str]:
    """The blocks of code in the page for operators."""
    return re.findall(
        rf"^ *```{language}\n(.*?)^ *```$", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )


def pod_of(daemon_set: Object) -> Object:
    return daemon_set["spec"]["template"]["spec"]


def container_of(pod: Object, name: str) -> Object:
    [container] = [each for each in pod["containers"] if each["name"] == name]
    return container


def environment_of(container: Object) -> dict[str, str]:
    """The variables of a container that have a value in the manifest."""
    return {each["name"]: each["value"] for each in container["env"] if "value" in each}


def on_node(pod: Object, container: Object, path: str) -> tuple[str, str]:
    """Where on the node a path of a container is, and how mounts are propagated there."""
    volumes = {each["name"]: each for each in pod["volumes"]}
    for mount in container["volumeMounts"]:
        if PurePosixPath(path).is_relative_to(mount["mountPath"]):
            assert "hostPath" in volumes[mount["name"]], f"{path} does not outlive its pod"
            place = PurePosixPath(volumes[mount["name"]]["hostPath"]["path"])
            below = PurePosixPath(path).relative_to(mount["mountPath"])
            return str(place / below), mount.get("mountPropagation", "None")
    raise AssertionError(f"{path} is in no volume")


def arguments_of(container: Object) -> dict[str, str]:
    """The flags of a container, without their dashes."""
    flags = [each for each in container["args"] if each.startswith("--")]
    return {name: value for name, _, value in (flag[2:].partition("=") for flag in flags)}
