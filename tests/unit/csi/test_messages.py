"""The messages have the bytes that the specification's own classes make and read."""

import pytest

from ckptfs._csi.messages import CLASSES, METHODS, service_name

PUBLISH = (
    "0a017612010a1a022f7322022f742a10120a0a01661202726f1a01371a02080330013a060a016112016242"
    "0f0a03757269120873333a2f2f622f63"
)
"""Of a volume v at /t, with a staging path, which this driver does not read."""


def test_a_publish_is_read_as_the_kubelet_writes_it() -> None:
    data = bytes.fromhex(PUBLISH.replace("12010a", ""))
    found = CLASSES["NodePublishVolumeRequest"].FromString(data)
    assert (found.volume_id, found.target_path, found.readonly) == ("v", "/t", True)
    assert dict(found.secrets) == {"a": "b"}
    assert dict(found.volume_context) == {"uri": "s3://b/c"}
    capability = found.volume_capability
    assert capability.HasField("mount")
    assert not capability.HasField("block")
    mount = capability.mount
    assert (mount.fs_type, list(mount.mount_flags), mount.volume_mount_group) == ("f", ["ro"], "7")
    assert capability.access_mode.mode == 3


@pytest.mark.parametrize(
    ("name", "fields", "data"),
    [
        ("ProbeResponse", {"ready": {"value": True}}, "0a020801"),
        ("NodeGetInfoResponse", {"node_id": "n"}, "0a016e"),
        ("GetPluginInfoResponse", {"name": "n", "vendor_version": "v"}, "0a016e120176"),
        (
            "GetInfoResponse",
            {"type": "t", "name": "n", "endpoint": "e", "supported_versions": ["1"]},
            "0a017412016e1a0165220131",
        ),
        (
            "NodeGetVolumeStatsResponse",
            {
                "usage": [{"total": 5, "used": 5, "unit": 1}],
                "volume_condition": {"abnormal": True, "message": "m"},
            },
            "0a061005180520011205080112016d",
        ),
        (
            "NodeGetCapabilitiesResponse",
            {"capabilities": [{"rpc": {"type": kind}} for kind in (2, 4, 6)]},
            "0a040a0208020a040a0208040a040a020806",
        ),
    ],
)
def test_replies_are_as_the_kubelet_reads_them(
    name: str, fields: dict[str, object], data: str
) -> None:
    assert CLASSES[name](**fields).SerializeToString().hex() == data


def test_the_kubelets_answer_to_a_registration_is_read() -> None:
    """The bytes and the service's name are those of api.proto of pluginregistration/v1."""
    status = CLASSES["NotifyRegistrationStatusRequest"].FromString(bytes.fromhex("0801120165"))
    assert (status.plugin_registered, status.error) == (True, "e")
    assert service_name("Registration") == "pluginregistration.Registration"
    assert service_name("Node") == "csi.v1.Node"


def test_each_method_has_its_messages() -> None:
    names = {name for methods in METHODS.values() for name in methods}
    assert {f"{name}{end}" for name in names for end in ("Request", "Response")} <= set(CLASSES)
