"""`BackgroundUpload`: an upload that the node's daemon does while the program goes on."""

import contextlib
import time
from typing import TYPE_CHECKING, NoReturn

from ckptfs import errors
from ckptfs._client import background
from ckptfs._model.protocol.uploads import DropUpload

if TYPE_CHECKING:
    from ckptfs._model.uploads import UploadStatus
    from ckptfs.checkpoint import Checkpoint

_POLL_S = 5.0
"""Longest time until the daemon answers the question whether an upload has ended."""


class BackgroundUpload:
    """An upload in the background. `ckptfs.upload` makes it with ``wait=False``.

        >>> upload = ckptfs.upload("./checkpoint_000100", "s3://bucket/run7/100", wait=False)
        >>> upload.done()
        False
        >>> upload.wait()
        Checkpoint(filesystem=s3, path=bucket/run7/100)

    The daemon has the files, so the upload needs neither the directory nor this object. It goes on
    when the program has ended. ``ckptfs uploads`` lists it.

    Attributes:
        id: The upload's id for ``ckptfs uploads``.
        checkpoint: The checkpoint at the target, which is complete when the upload is done.
    """

    def __init__(self, accepted: background.Accepted, checkpoint: "Checkpoint") -> None:
        self.id = accepted.id
        self.checkpoint = checkpoint
        self._accepted = accepted
        self._end: UploadStatus | None = None

    @property
    def socket(self) -> str:
        """The control socket of the daemon that uploads."""
        return self._accepted.socket

    def __repr__(self) -> str:
        return f"<ckptfs.BackgroundUpload {self.id} to {self.checkpoint}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a BackgroundUpload cannot be pickled, because it belongs to its node; pass its id on, "
            "or ask it here"
        )

    def wait(self, timeout: float | None = None) -> "Checkpoint":
        """Wait until the store has the whole checkpoint.

        Args:
            timeout: Longest wait in seconds; None for no limit.

        Returns:
            The checkpoint.

        Raises:
            TimeoutError: The upload has not ended within `timeout`. It goes on.
            NoUpload: It was cancelled, or has ended more than a week ago.
            CannotUpload, TargetExists, AccessDenied, StoreError, LocationError: The upload has
                failed. The daemon keeps the files for ``ckptfs uploads --retry``.
            DaemonError: No daemon answers, or the process that sends was killed again and again.
            CacheError: The daemon cannot use its cache's directory, and so does not know the
                upload. It goes on with a daemon that can.
        """
        deadline_s = None if timeout is None else time.monotonic() + timeout
        while True:
            left_s = _POLL_S if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            state = self._state(min(left_s, _POLL_S))
            if state.state == "done":
                return self.checkpoint
            if state.state == "failed":
                raise errors.BY_CODE.get(state.code, errors.CkptfsError)(state.message)
            if left_s <= 0:
                raise TimeoutError(
                    f"{state.uri} is not at the store after {timeout:g} s; the upload goes on"
                )

    def done(self) -> bool:
        """Whether the upload has ended, also by an error, which `wait` then raises.

        Raises:
            NoUpload: As in `wait`.
            DaemonError: No daemon answers.
        """
        return self._state(0.0).state in ("done", "failed")

    def progress(self) -> tuple[int, int]:
        """Ask how far the upload has come.

        Returns:
            The bytes at the store, and the bytes of all files.

        Raises:
            NoUpload: As in `wait`.
            DaemonError: No daemon answers.
        """
        state = self._state(0.0)
        return state.sent, state.bytes

    def cancel(self) -> None:
        """End the upload, and remove the files that the daemon keeps for it.

        Objects that are complete stay at the store, without the checkpoint's ``.metadata.json``.
        If the upload is done, or was cancelled before, this has no effect.

        Raises:
            DaemonError: No daemon answers.
            CacheError: The daemon's disk refuses to remove the files.
        """
        if self._end is not None and self._end.state == "done":
            return
        with (
            contextlib.suppress(errors.NoUpload),
            background.to_daemon_of(self._accepted) as connection,
        ):
            connection.ask(DropUpload(id=self.id))

    def _state(self, seconds: float) -> "UploadStatus":
        """The state when the upload has ended, or after `seconds`. Only a retry changes an
        error."""
        if self._end is None:
            state = background.state_of(self._accepted, seconds)
            if state.state != "done":
                return state
            self._end = state
        return self._end
