"""Publishing and unpublishing, step by step, so that a driver may be killed between any two steps.

**Publish**: record "publishing"; attach, held by the connection only; make the target and bind the
volume to it; pin the attachment; record "published". If a step fails, the driver undoes the ones
before. A later publish of the same volume only renews its credentials, and replaces the mount if
the mount's daemon has ended. If that fails, the volume keeps its former credentials.

**Unpublish**: record "unpublishing"; unmount and remove the target; detach; remove the record. If
the daemon does not answer, the pod's part is done nevertheless, and `finish` detaches later.

**After a crash**: `reconcile` undoes what is recorded as "publishing", because the kubelet has no
answer yet and tries again, and finishes what is recorded as "unpublishing". It ends publications
whose pod is gone from the disk, and volumes of the daemon that have neither a record nor a mount.

Calls for one publication exclude each other (ABORTED), and calls for different ones run side by
side.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Generator
from typing import NamedTuple

from ckptfs._client import client
from ckptfs._csi import bind_mounts
from ckptfs._csi.identity import Wanted
from ckptfs._csi.publication import Publication, checked_id, checked_target, key_of
from ckptfs._csi.records import Record, Records
from ckptfs._csi.refusals import Refusal
from ckptfs._model.manifest import printable
from ckptfs._model.protocol.replies import Attached, AttachmentStatus
from ckptfs._model.protocol.requests import Detach, Status
from ckptfs._model.volume import FOLDER
from ckptfs._os.mountinfo import FSTYPE, MountLine, mount_table
from ckptfs._store.wrappers import within
from ckptfs.errors import CannotMount, CkptfsError, DaemonError, NotAttached

log = logging.getLogger(__name__)

_ASK_S = 10.0
"""Longest wait for the daemon's answer to a question without a store."""
_LOOK_S = 10.0
"""Longest look at a directory of the mount. A daemon that dies is replaced within this time."""
_PAUSE_S = 0.05
_TARGET_MODE = 0o750  # as the kubelet's


class Stats(NamedTuple):
    """A volume's size, and its condition: "" if it is in order, or what is wrong."""

    size: int
    files: int
    trouble: str


class Publishing:
    """The publications of a driver. Any thread may use it."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._lock = threading.Lock()  # guards the next; never held during IO
        self._busy: set[str] = set()

    # -- publish

    def publish(self, wanted: Wanted, deadline_s: float) -> None:
        """Publish a volume, or renew its credentials, until `deadline_s` of `time.monotonic`.

        Raises Refusal, OSError, and what an attach raises. Then a volume that was not published
        before leaves nothing.
        """
        publication = wanted.publication
        with self._alone(publication.key, publication.volume_id):
            known = self._records.get(publication.key)
            if known is not None and known.state != "published":
                if not self._end(known.publication):  # of a call that failed or was killed
                    raise Refusal(
                        "UNAVAILABLE",
                        f"volume {printable(publication.volume_id)} waits for the ckptfs daemon, "
                        "which does not answer; see its log",
                    )
                known = None
            if known is not None and known.publication != publication:
                raise Refusal(
                    "ALREADY_EXISTS",
                    f"volume {printable(publication.volume_id)} is published at "
                    f"{publication.target} with other attributes; unpublish it first",
                )
            if known is not None:
                self._renew(wanted, deadline_s)
                return
            self._records.put(Record(publication, "publishing"))
            try:
                self._publish_first(wanted, deadline_s)
            except Exception:
                self._undo(publication)
                raise

    def _publish_first(self, wanted: Wanted, deadline_s: float) -> None:
        publication = wanted.publication
        with _attached(wanted, deadline_s) as (path, reply):
            self._bind(publication, path, reply, keeps=False)
            _pin(wanted, deadline_s)
            self._records.put(Record(publication, "published", reply.files, reply.size))
        log.info("published %s for pod %s", reply.uri, publication.pod)
        for file in reply.lacking:
            log.warning("%s lacks %s: %s", reply.uri, file.name, file.reason)

    def _renew(self, wanted: Wanted, deadline_s: float) -> None:
        again = wanted._replace(prefetch=[], plan=None)
        with _attached(again, deadline_s) as (path, reply):
            self._bind(wanted.publication, path, reply, keeps=True)
            _pin(again, deadline_s)

    def _bind(self, publication: Publication, path: str, reply: Attached, *, keeps: bool) -> None:
        """Bind the volume at `path` to the target. `keeps` says whether a mount that shows it may
        stay."""
        _require_allow_other(path)
        target = publication.target
        line = bind_mounts.at(target)
        if keeps and line is not None and _shows(line, target, path):
            return
        self._clear(target)
        os.makedirs(os.path.dirname(target), _TARGET_MODE, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(target, _TARGET_MODE)
        if os.path.islink(target):
            raise Refusal("FAILED_PRECONDITION", f"{target} is a link; remove it")
        bind_mounts.bind(path, target, noexec=publication.noexec)
        if line is not None:
            log.warning("%s: replaced the mount at %s, which had ended", reply.uri, target)

    # -- unpublish

    def unpublish(self, volume_id: str, target: str) -> None:
        """End a publication. Does nothing for an unknown one. Raises Refusal, OSError."""
        key = key_of(checked_id(volume_id), checked_target(target))
        with self._alone(key, volume_id):
            known = self._records.get(key)
            if known is not None:
                self._end(known.publication)
                return
            self._remove_target(target)  # the records may be lost
            with contextlib.suppress(DaemonError):
                _detach(key)

    def _end(self, publication: Publication) -> bool:
        """End a publication. Returns whether the daemon has detached it, too."""
        try:
            self._records.put(Record(publication, "unpublishing"))
        except OSError as error:  # a full disk must not keep a pod from its end
            log.warning("%s is ended without a record of that: %s", publication.directory, error)
        self._remove_target(publication.target)
        try:
            _detach(publication.key)
        except DaemonError as error:
            log.warning("%s is detached later: %s", publication.directory, error)
            return False
        self._records.remove(publication.key)
        log.info("unpublished %s of pod %s", publication.attributes["uri"], publication.pod)
        return True

    def _undo(self, publication: Publication) -> None:
        """End a publication that has failed. An error here must not hide that one."""
        try:
            self._end(publication)
        except (Refusal, CkptfsError, OSError) as error:
            log.error("%s: cannot be cleaned up now: %s", publication.target, error)

    def _remove_target(self, target: str) -> None:
        self._clear(target)
        try:
            os.rmdir(target)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise Refusal(
                "FAILED_PRECONDITION", f"cannot remove {target}: {error.strerror}; remove it"
            ) from None

    def _clear(self, target: str) -> None:
        """Unmount all mounts of volumes from a target. Raises Refusal for another mount."""
        while (line := bind_mounts.at(target)) is not None:
            if not bind_mounts.is_volume(line):
                raise Refusal(
                    "FAILED_PRECONDITION",
                    f"{target} is a mount of {line.kind}, and not of ckptfs; unmount it",
                )
            if not bind_mounts.unmount(target):
                log.warning("%s was in use; its mount ends with its last user", target)

    # -- stats

    def stats(self, volume_id: str, target: str) -> Stats:
        """The size and the condition of a published volume. Touches no mount. Raises Refusal for an
        unknown one, OSError."""
        record = self._records.get(key_of(checked_id(volume_id), checked_target(target)))
        if record is None:
            name = printable(volume_id)
            raise Refusal("NOT_FOUND", f"volume {name} is not published at {target}")
        publication = record.publication
        try:
            with client.connect(timeout_s=_ASK_S) as connection:
                reply = connection.ask(Status(name=publication.directory))
        except CkptfsError as error:
            return Stats(record.size, record.files, str(error))
        found = [a for a in reply.attachments if a.volume == publication.key]
        trouble = _trouble(found, bind_mounts.at(target), reply.mount)
        if not found:
            return Stats(record.size, record.files, trouble)
        return Stats(found[0].size, found[0].files, trouble)

    # -- after a crash

    def reconcile(self) -> None:
        """Undo and finish the calls of a driver that was killed. Raises OSError."""
        for record in self._records.all():
            target = record.publication.target
            is_gone = bind_mounts.at(target) is None and not os.path.lexists(target)
            if record.state != "published" or is_gone:
                self._undo(record.publication)
        known = {record.publication.key for record in self._records.all()}
        with contextlib.suppress(DaemonError):  # without a daemon there are no volumes
            with client.connect(timeout_s=_ASK_S) as connection:
                reply = connection.status()
            bound = bind_mounts.bound_volumes()
            for attachment in reply.attachments:
                is_known = not attachment.volume or attachment.volume in known
                if not is_known and attachment.name not in bound:
                    log.warning("detaching %s, which no pod has", attachment.name)
                    _detach(attachment.volume)

    def finish(self) -> None:
        """Detach what could not be detached before, once the daemon answers. Raises OSError."""
        ended = [each.publication for each in self._records.all() if each.state == "unpublishing"]
        if not ended:
            return
        try:
            is_serving()
        except DaemonError:
            return
        for publication in ended:
            with contextlib.suppress(Refusal), self._alone(publication.key, ""):
                now = self._records.get(publication.key)
                if now is not None and now.state == "unpublishing":
                    self._undo(publication)

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no call is running. Returns whether that is so."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            with self._lock:
                if not self._busy:
                    return True
            if time.monotonic() > deadline_s:
                return False
            time.sleep(_PAUSE_S)

    @contextlib.contextmanager
    def _alone(self, key: str, volume_id: str) -> Generator[None]:
        with self._lock:
            if key in self._busy:
                name = printable(volume_id)
                raise Refusal("ABORTED", f"another call for volume {name} is running; try again")
            self._busy.add(key)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(key)


def is_serving() -> None:
    """Raise DaemonError unless the node's daemon answers."""
    with client.connect(timeout_s=_ASK_S) as connection:
        connection.ask(Status(name=FOLDER))  # of no attachment, so the answer is short


# -- the daemon


@contextlib.contextmanager
def _attached(wanted: Wanted, deadline_s: float) -> Generator[tuple[str, Attached]]:
    """Attach, for the length of the context. Raises Refusal after the deadline."""
    with _ending_at(deadline_s, wanted.location.uri) as left_s:
        attaching = client.attached(
            wanted.location,
            volume=wanted.volume,
            prefetch=wanted.prefetch,
            plan=wanted.plan,
            timeout_s=left_s,
            to=client.connect,
        )
        found = attaching.__enter__()
    with contextlib.ExitStack() as stack:
        stack.push(attaching)
        yield found


def _pin(wanted: Wanted, deadline_s: float) -> None:
    """Pin the volume, which another connection holds meanwhile."""
    with _ending_at(deadline_s, wanted.location.uri) as left_s:
        pinning = client.attached(
            wanted.location,
            volume=wanted.volume,
            pinned=True,
            timeout_s=left_s,
            to=client.connect,
        )
        with pinning:
            pass


@contextlib.contextmanager
def _ending_at(deadline_s: float, uri: str) -> Generator[float]:
    """Yields the seconds that are left. Raises Refusal if the deadline is over."""
    left_s = deadline_s - time.monotonic()
    late = Refusal("DEADLINE_EXCEEDED", f"{uri}: not attached before the deadline of the call")
    if left_s <= 0:
        raise late
    try:
        yield left_s
    except DaemonError:
        if time.monotonic() >= deadline_s:
            raise late from None
        raise


def _detach(key: str) -> None:
    """Detach a volume, if the daemon has it. Raises DaemonError."""
    with contextlib.suppress(NotAttached), client.connect(timeout_s=_ASK_S) as connection:
        connection.ask(Detach(name=f"{FOLDER}/{key}", force=True))


# -- mounts


def _require_allow_other(path: str) -> None:
    """Raise CannotMount if the mount of the volume at `path` lets no other user in."""
    mount = bind_mounts.real(os.path.dirname(os.path.dirname(path)))
    lines = [line for line in mount_table() if line.path == mount and line.kind == FSTYPE]
    if lines and "allow_other" not in lines[-1].options.split(","):
        raise CannotMount(
            f"the mount {mount} is for its own user only, and pods have other users; set "
            "allow_other = true in the configuration of the ckptfs daemon, and start it again"
        )


def _shows(line: MountLine, target: str, path: str) -> bool:
    """Whether a target's mount shows the attachment at `path`, which the daemon has just shown."""

    def is_same() -> bool:
        if (shown := os.stat(path)).st_dev != _device_of(line):
            return False  # the target is not touched, because its daemon has ended
        return shown.st_ino == os.stat(target).st_ino

    try:
        return within(_LOOK_S, target, is_same)
    except OSError:
        return False


def _device_of(line: MountLine) -> int:
    major, minor = map(int, line.device.split(":"))
    return os.makedev(major, minor)


def _trouble(found: list[AttachmentStatus], line: MountLine | None, mount: str) -> str:
    """What is wrong with a volume, from the daemon's status and the mount of its target."""
    if not found:
        return "the daemon has lost the attachment; the next publish makes a new one"
    if line is None or not bind_mounts.is_volume(line):
        return "the volume is not mounted at its path; the next publish mounts it"
    mounts = [each for each in mount_table() if each.path == bind_mounts.real(mount)]
    if mounts and mounts[-1].device != line.device:
        return "the volume's mount belongs to a daemon that has ended; start the pod again"
    [attachment] = found
    if attachment.state in ("changed", "failing"):
        return f"the checkpoint is {attachment.state}: {printable(attachment.error)}"
    for skipped in attachment.skipped:
        if skipped.is_lacking:
            return f"the checkpoint lacks {skipped.name}: {skipped.reason}"
    return ""
