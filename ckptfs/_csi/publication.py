"""A publication: one volume at one path of one pod, as the kubelet asks for it.

A PersistentVolume can be published to several pods of a node, each with an identity of its own. So
the target path is a part of the key.

The author of a pod chooses the volume's attributes. The keys that begin with `KUBELET` come from
the kubelet, if the CSIDriver object asks for them (``podInfoOnMount``). The kubelet then overwrites
keys of that name which the author has chosen.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from ckptfs._csi.refusals import invalid
from ckptfs._model.manifest import printable
from ckptfs._model.volume import FOLDER

KUBELET = "csi.storage.k8s.io/"
"""The beginning of the kubelet's keys. Later kubelets may have more of them, so unknown ones do not
count."""
TOKENS = f"{KUBELET}serviceAccount.tokens"
"""The key of the service account's tokens, in the attributes or the secrets."""
ATTRIBUTES = {
    "uri": "The checkpoint: `s3://bucket/run/checkpoint`, or its path in the `store`.",
    "store": "A named store of the daemon's configuration. It is read with the node's credentials.",
    "endpoint": "The server, if it is not the provider's: `https://minio.example:9000`.",
    "region": "The bucket's region (S3).",
    "prefetch": "Globs of files to fetch in the background, separated by spaces.",
    "plan": "A plan of `ckptfs plan save`, as JSON, to fetch in the background.",
    "roleArn": "The role to assume with the token of the pod's service account (S3).",
    "stsEndpoint": "The server that the role is assumed at, if it is not Amazon's (S3).",
    "clientId": "The application to act as with the token of the service account (Azure).",
    "tenantId": "The directory of that application (Azure).",
    "workloadProvider": "The provider that takes the token of the service account (Google): "
    "`projects/1/locations/global/workloadIdentityPools/pool/providers/cluster`.",
    "serviceAccount": "The service account of Google to impersonate with it.",
}
"""The attributes of a volume."""
_READ_ONLY_MODES = frozenset([2, 3])
"""SINGLE_NODE_READER_ONLY and MULTI_NODE_READER_ONLY. An inline volume always comes with a mode for
writing, so its flag `readonly` counts."""
_FLAGS = frozenset(["ro", "nosuid", "nodev", "noexec"])
_FS_TYPES = ("", "ckptfs")
_ID_LENGTH_MAX = 1024
_VALUE_LENGTH_MAX = 256 << 10
"""Longest attribute. Kubernetes' objects have 1 MiB or so."""


class Pod(msgspec.Struct, frozen=True):
    """The pod of a publication, from the kubelet; "" for what it does not say."""

    namespace: str
    name: str
    service_account: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Publication(msgspec.Struct, frozen=True):
    """One publication. It has no secrets, so it can be kept in a file.

    Attributes:
        volume_id: The orchestrator's name of the volume.
        target: The path to mount on.
        attributes: The volume's own attributes.
        pod: The pod.
        gid: The group of the files; None for none.
        noexec: Whether programs of the volume cannot be run.
    """

    volume_id: str
    target: str
    attributes: Mapping[str, str]
    pod: Pod
    gid: int | None = None
    noexec: bool = False

    @property
    def key(self) -> str:
        """Text that identifies the publication, and is safe as a name of a file."""
        return key_of(self.volume_id, self.target)

    @property
    def directory(self) -> str:
        """The directory of the publication's volume in the mount, relative to the mount."""
        return f"{FOLDER}/{self.key}"


class Capability(NamedTuple):
    """How the volume is to be used, see ``VolumeCapability`` of the specification."""

    is_block: bool
    mode: int
    fs_type: str
    flags: Sequence[str]
    group: str


def key_of(volume_id: str, target: str) -> str:
    """The `Publication.key`."""
    text = f"{volume_id}\0{target}".encode(errors="surrogatepass")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def checked_id(volume_id: str) -> str:
    """The id of a volume. Raises Refusal for an invalid one."""
    if not volume_id:
        raise invalid("the volume_id is missing")
    if len(volume_id) > _ID_LENGTH_MAX or not volume_id.isprintable():
        raise invalid("the volume_id is too long, or has control characters")
    return volume_id


def checked_target(target: str) -> str:
    """The path of a target. Raises Refusal for an invalid one."""
    if not target:
        raise invalid("the target_path is missing")
    if "\0" in target or os.path.normpath(target) != target or not os.path.isabs(target):
        raise invalid(f"the target_path {printable(target)!r} is not an absolute, plain path")
    if target.count("/") < 2:
        raise invalid(f"the target_path {target} is a directory of the root; name one below it")
    return target


def publication_of(
    volume_id: str,
    target: str,
    attributes: Mapping[str, str],
    capability: Capability,
    *,
    readonly: bool,
) -> Publication:
    """The publication that a request asks for. Raises Refusal, which names each invalid part."""
    checked_id(volume_id)
    checked_target(target)
    _check_capability(capability, attributes, readonly=readonly)
    own = {name: text for name, text in attributes.items() if not name.startswith(KUBELET)}
    if unknown := own.keys() - ATTRIBUTES.keys():
        raise invalid(
            f"unknown volumeAttributes {', '.join(map(printable, sorted(unknown)))}; known ones: "
            f"{', '.join(ATTRIBUTES)}"
        )
    if too_long := sorted(name for name, text in own.items() if len(text) > _VALUE_LENGTH_MAX):
        raise invalid(
            f"volumeAttributes {', '.join(too_long)}: more than {_VALUE_LENGTH_MAX} bytes"
        )
    if not own.get("uri"):
        raise invalid("volumeAttributes lack uri; give the URI of a checkpoint")
    pod = Pod(
        attributes.get(f"{KUBELET}pod.namespace", ""),
        attributes.get(f"{KUBELET}pod.name", ""),
        attributes.get(f"{KUBELET}serviceAccount.name", ""),
    )
    gid = _gid_of(capability.group)
    return Publication(volume_id, target, own, pod, gid, "noexec" in capability.flags)


def _check_capability(
    capability: Capability, attributes: Mapping[str, str], *, readonly: bool
) -> None:
    if capability.is_block:
        raise invalid("a checkpoint cannot be a block volume; set volumeMode: Filesystem")
    if capability.mode not in _READ_ONLY_MODES and not readonly:
        is_inline = attributes.get(f"{KUBELET}ephemeral") == "true"
        remedy = "readOnly: true" if is_inline else "accessModes: [ReadOnlyMany]"
        raise invalid(f"checkpoints are read-only; set {remedy} for the volume")
    if capability.fs_type not in _FS_TYPES:
        raise invalid(f"unknown fsType {printable(capability.fs_type)!r}; leave it out")
    if unknown := sorted(set(capability.flags) - _FLAGS):
        raise invalid(
            f"unknown mountOptions {', '.join(map(printable, unknown))}; known ones: "
            f"{', '.join(sorted(_FLAGS))}"
        )


def _gid_of(group: str) -> int | None:
    if not group:
        return None
    if not (group.isascii() and group.isdigit() and int(group) < (1 << 32) - 1):
        raise invalid(f"the volume_mount_group {printable(group)!r} is not the number of a group")
    return int(group)
