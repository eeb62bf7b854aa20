"""How long an attachment stays: as long as a process, a client or the pin keeps it, and a while
after that (``control.registry``)."""


class Leases:
    """The reasons why one attachment stays.

    Attributes:
        directories: Open handles of its root directory, with the process that opened each. The
            process may open files later.
        open_handles: Number of other open handles.
        clients: Number of control connections that use the attachment.
        pinned: Whether the attachment stays until a user detaches it.
        idle_since_s: When the last reason ended (event loop time).
    """

    def __init__(self) -> None:
        self.directories: dict[int, int] = {}
        self.open_handles = 0
        self.clients = 0
        self.pinned = False
        self.idle_since_s = 0.0

    @property
    def in_use(self) -> bool:
        """Whether a process or a client uses the attachment now."""
        return bool(self.directories or self.open_handles or self.clients)

    @property
    def stays(self) -> bool:
        """Whether the attachment has to stay now."""
        return self.in_use or self.pinned

    @property
    def holders(self) -> list[int]:
        """The processes that have the root directory open."""
        return sorted(set(self.directories.values()))
