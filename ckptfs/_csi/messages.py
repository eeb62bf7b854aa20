# protobuf has no usable type hints for messages that are made at run time.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
"""The messages of CSI 1.x that the driver needs, and their methods.

The numbers are those of the specification (csi.proto of container-storage-interface/spec, package
``csi.v1``). Those of the service Registration are the kubelet's (api.proto of
k8s.io/kubelet/pkg/apis/pluginregistration/v1, package ``pluginregistration``). Fields and messages
without a use are left out, because protobuf ignores unknown ones. The classes are made from
`MESSAGES` at the import, so they fit every version of protobuf.
"""

from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "csi.v1"


class Field(NamedTuple):
    """A field: its number, its type, whether it is a list, and whether it is a map of strings."""

    number: int
    kind: str = "string"
    repeated: bool = False
    is_map: bool = False


def _map(number: int) -> Field:
    return Field(number, is_map=True)


MESSAGES: dict[str, dict[str, Field]] = {
    "GetPluginInfoRequest": {},
    "GetPluginInfoResponse": {"name": Field(1), "vendor_version": Field(2), "manifest": _map(3)},
    "GetPluginCapabilitiesRequest": {},
    "GetPluginCapabilitiesResponse": {},
    "ProbeRequest": {},
    "BoolValue": {"value": Field(1, "bool")},  # of google.protobuf, with the same bytes
    "ProbeResponse": {"ready": Field(1, "BoolValue")},
    "BlockVolume": {},
    "MountVolume": {
        "fs_type": Field(1),
        "mount_flags": Field(2, repeated=True),
        "volume_mount_group": Field(3),
    },
    "AccessMode": {"mode": Field(1, "int32")},  # an enumeration, with the same bytes
    "VolumeCapability": {
        "block": Field(1, "BlockVolume"),
        "mount": Field(2, "MountVolume"),
        "access_mode": Field(3, "AccessMode"),
    },
    "NodePublishVolumeRequest": {
        "volume_id": Field(1),
        "target_path": Field(4),
        "volume_capability": Field(5, "VolumeCapability"),
        "readonly": Field(6, "bool"),
        "secrets": _map(7),
        "volume_context": _map(8),
    },
    "NodePublishVolumeResponse": {},
    "NodeUnpublishVolumeRequest": {"volume_id": Field(1), "target_path": Field(2)},
    "NodeUnpublishVolumeResponse": {},
    "NodeGetVolumeStatsRequest": {"volume_id": Field(1), "volume_path": Field(2)},
    "VolumeUsage": {
        "total": Field(2, "int64"),
        "used": Field(3, "int64"),
        "unit": Field(4, "int32"),
    },
    "VolumeCondition": {"abnormal": Field(1, "bool"), "message": Field(2)},
    "NodeGetVolumeStatsResponse": {
        "usage": Field(1, "VolumeUsage", repeated=True),
        "volume_condition": Field(2, "VolumeCondition"),
    },
    "NodeGetCapabilitiesRequest": {},
    "RPC": {"type": Field(1, "int32")},
    "NodeServiceCapability": {"rpc": Field(1, "RPC")},
    "NodeGetCapabilitiesResponse": {
        "capabilities": Field(1, "NodeServiceCapability", repeated=True)
    },
    "NodeGetInfoRequest": {},
    "NodeGetInfoResponse": {"node_id": Field(1)},
    "GetInfoRequest": {},
    "GetInfoResponse": {
        "type": Field(1),
        "name": Field(2),
        "endpoint": Field(3),
        "supported_versions": Field(4, repeated=True),
    },
    "NotifyRegistrationStatusRequest": {"plugin_registered": Field(1, "bool"), "error": Field(2)},
    "NotifyRegistrationStatusResponse": {},
}
"""The fields of each message. A message that the specification nests has its short name. The last
four are the kubelet's InfoRequest, PluginInfo, RegistrationStatus and RegistrationStatusResponse.
Their bytes do not depend on a message's name."""
METHODS = {
    "Identity": ("GetPluginInfo", "GetPluginCapabilities", "Probe"),
    "Node": (
        "NodePublishVolume",
        "NodeUnpublishVolume",
        "NodeGetVolumeStats",
        "NodeGetCapabilities",
        "NodeGetInfo",
    ),
    "Registration": ("GetInfo", "NotifyRegistrationStatus"),
}
"""The methods of each service. The names of their messages end with Request and Response."""
GET_VOLUME_STATS, VOLUME_CONDITION, VOLUME_MOUNT_GROUP = 2, 4, 6
"""Capabilities of a node (``NodeServiceCapability.RPC.Type``)."""
BYTES, INODES = 1, 2
"""Units of a usage (``VolumeUsage.Unit``)."""


def service_name(service: str) -> str:
    """The full name of a service."""
    package = "pluginregistration" if service == "Registration" else _PACKAGE
    return f"{package}.{service}"


def callable_of(channel: Any, method: str) -> Any:
    """The `grpc.UnaryUnaryMultiCallable` of a method on a channel."""
    [service] = [name for name, methods in METHODS.items() if method in methods]
    return channel.unary_unary(
        f"/{service_name(service)}/{method}",
        request_serializer=CLASSES[f"{method}Request"].SerializeToString,
        response_deserializer=CLASSES[f"{method}Response"].FromString,
    )


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="ckptfs/csi.proto", package=_PACKAGE, syntax="proto3"
    )
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field_name, field in fields.items():
            _add(message, name, field_name, field)
    pool = descriptor_pool.DescriptorPool()  # of its own, beside another program's csi.v1
    pool.AddSerializedFile(file.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
        for name in MESSAGES
    }


def _add(message: Any, message_name: str, name: str, field: Field) -> None:
    proto = descriptor_pb2.FieldDescriptorProto
    is_list = field.repeated or field.is_map
    label = proto.LABEL_REPEATED if is_list else proto.LABEL_OPTIONAL
    added = message.field.add(name=name, number=field.number, label=label)
    kind = field.kind
    if field.is_map:
        kind = "".join(part.capitalize() for part in name.split("_")) + "Entry"
        entry = message.nested_type.add(name=kind)
        entry.options.map_entry = True
        for key, number in (("key", 1), ("value", 2)):
            _add(entry, kind, key, Field(number))
        kind = f"{message_name}.{kind}"
    scalar = getattr(proto, f"TYPE_{kind.upper()}", None)
    if scalar is None:
        added.type, added.type_name = proto.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
    else:
        added.type = scalar


CLASSES = _classes()
"""The class of each message."""
