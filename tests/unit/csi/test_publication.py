"""A publish is taken apart, and each part that the driver cannot honour is refused by name."""

import re
from importlib.resources import files
from typing import Any

import pytest

from ckptfs._csi.publication import ATTRIBUTES, KUBELET, TOKENS, Capability, Pod, publication_of
from ckptfs._csi.refusals import Refusal

URI = "s3://bucket/run"
TARGET = "/var/lib/kubelet/pods/1/volumes/v/mount"
OF_POD = {
    f"{KUBELET}pod.name": "trainer-0",
    f"{KUBELET}pod.namespace": "team",
    f"{KUBELET}pod.uid": "1",
    f"{KUBELET}serviceAccount.name": "account",
    f"{KUBELET}ephemeral": "true",
    TOKENS: '{"": {"token": "T0K3N"}}',
}
CAPABILITY = Capability(is_block=False, mode=1, fs_type="", flags=(), group="")


def publication(
    more: dict[str, str] | None = None, *, readonly: bool = True, **changes: Any
) -> Any:
    target, volume_id = changes.pop("target", TARGET), changes.pop("volume_id", "v")
    capability = CAPABILITY._replace(**changes)
    attributes = {"uri": URI, **OF_POD, **(more or {})}
    return publication_of(volume_id, target, attributes, capability, readonly=readonly)


def test_publication_has_the_pod_and_no_token() -> None:
    later = {f"{KUBELET}of.a.later.kubelet": "x"}
    found = publication({"prefetch": "*", **later}, group="4711", flags=("ro", "noexec"))
    assert found.attributes == {"uri": URI, "prefetch": "*"}
    assert found.pod == Pod("team", "trainer-0", "account")
    assert (found.gid, found.noexec) == (4711, True)
    assert "T0K3N" not in repr(found)


def test_publications_of_one_volume_at_two_paths_differ() -> None:
    keys = {publication(target=f"/pods/{n}/mount").key for n in "12"}
    keys |= {publication(volume_id=volume_id).key for volume_id in ("v", "w")}
    assert len(keys) == 4
    assert all(key.isalnum() for key in keys)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"volume_id": ""}, "volume_id is missing"),
        ({"volume_id": "a\nb"}, "control characters"),
        ({"volume_id": "v" * 1025}, "too long"),
        ({"target": ""}, "target_path is missing"),
        ({"target": "pods/mount"}, "not an absolute, plain path"),
        ({"target": "/pods/../etc/mount"}, "not an absolute, plain path"),
        ({"target": "/pods//mount"}, "not an absolute, plain path"),
        ({"target": "/etc"}, "directory of the root"),
        ({"is_block": True}, "volumeMode: Filesystem"),
        ({"fs_type": "ext4"}, "unknown fsType 'ext4'"),
        ({"flags": ("ro", "suid", "dev")}, "unknown mountOptions dev, suid; known ones: nodev,"),
        ({"group": "users"}, "'users' is not the number of a group"),
        ({"group": "4294967295"}, "not the number of a group"),
        ({"readonly": False}, "set readOnly: true"),
        ({"more": {f"{KUBELET}ephemeral": "false"}, "readonly": False}, r"\[ReadOnlyMany\]"),
        ({"more": {"uri": ""}}, "lack uri"),
        ({"more": {"rolearn": "x", "Uri": "y"}}, "unknown volumeAttributes Uri, rolearn; known"),
        ({"more": {"plan": " " * (257 << 10)}}, "plan: more than"),
    ],
)
def test_what_the_driver_cannot_honour_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(Refusal, match=said) as caught:
        publication(**changes)
    assert caught.value.status == "INVALID_ARGUMENT"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("mode", "is_fine"), [(0, False), (1, False), (2, True), (3, True)])
def test_modes_for_reading_need_no_flag(mode: int, is_fine: bool) -> None:
    if is_fine:
        publication(mode=mode, readonly=False)
    else:
        with pytest.raises(Refusal):
            publication(mode=mode, readonly=False)


def test_the_page_has_the_attributes() -> None:
    page = files("ckptfs").joinpath("KUBERNETES.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE)
    shown = {name: meaning for name, meaning in rows if name in ATTRIBUTES}
    assert shown == ATTRIBUTES
