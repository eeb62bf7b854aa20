"""A volume: an attachment that one pod has for itself, as a container orchestrator asked for it.

The mount shows volumes in the directory `FOLDER`, which only root and the daemon's own user can
enter. The orchestrator's driver binds a volume's directory to a path of the pod.
"""

from typing import Annotated

import msgspec

FOLDER = ".volumes"
"""The directory of the mount with the volumes. The mount does not list it."""


class Volume(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One volume.

    Attributes:
        id: The volume's id, which is also the name of its directory.
        gid: The group that owns the files and alone may read them; None if all users of the pod may
            read them.
        lends: Whether the volume may use the daemon's own rights and named stores.
        owner: The namespace of the pod, or another name. Volumes of one owner share the limits of a
            user.
    """

    id: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")]
    gid: Annotated[int, msgspec.Meta(ge=0, lt=(1 << 32) - 1)] | None = None
    lends: bool = False
    owner: Annotated[str, msgspec.Meta(max_length=253)] = ""

    @property
    def name(self) -> str:
        """The path of its directory in the mount."""
        return f"{FOLDER}/{self.id}"
