"""An accepted upload, as the daemon has it in memory."""

from dataclasses import dataclass, field

from ckptfs._daemon.uploads.attempts import Attempts
from ckptfs._daemon.uploads.sender import Sender
from ckptfs._model.location import Location
from ckptfs._model.uploads import Record, State, UploadStatus


@dataclass(eq=False)
class Upload:
    """An accepted upload.

    Attributes:
        record: What the disk has of it.
        asked: The target with credentials, as the client names it; None if these are lost.
        attempts: See `Attempts`.
        sent: The bytes at the store.
        sender: The process that sends it now.
        not_before_s: The earliest time of the next attempt.
        has_files: Whether its files are on the disk.
        is_dropped: Whether it ends without a result.
        is_recorded: Whether the disk has `record`.
        holders: The connections that are about to attach its files.
    """

    record: Record
    asked: Location | None
    attempts: Attempts = field(default_factory=Attempts)
    sent: int = 0
    sender: Sender | None = None
    not_before_s: float = 0.0
    has_files: bool = True
    is_dropped: bool = False
    is_recorded: bool = True
    holders: int = 0

    def again(self, record: Record, asked: Location | None) -> "Upload":
        """Wait for another try after a failure."""
        self.record, self.asked = record, asked
        self.attempts, self.sent, self.not_before_s = Attempts(), 0, 0.0
        self.is_recorded = True
        return self

    @property
    def state(self) -> State:
        """The state, for users."""
        return "running" if self.sender is not None else self.record.state

    @property
    def goes_on(self) -> bool:
        """Whether it waits or runs."""
        return self.record.state == "waiting"

    def status(self) -> UploadStatus:
        """The state, for a reply."""
        record = self.record
        return UploadStatus(
            id=record.id,
            uri=record.location.uri,
            uid=record.uid,
            state=self.state,
            files=record.files,
            bytes=record.bytes,
            sent=self.sent,
            begun=record.accepted,
            attempts=self.attempts.count,
            code=record.code,
            message=record.message,
            cached=record.sent.cached_bytes if record.sent else 0,
            cache_error=record.sent.cache_error if record.sent else "",
        )
