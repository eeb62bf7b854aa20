"""The exceptions of ckptfs.

Each message is one line that says what happened, to which checkpoint or file, and what to do. If
Python has a fitting builtin exception, the class here derives from it, too, so that code for local
files keeps working.
"""

# The exceptions have no errno. The table of errnos is in ckptfs._daemon.fuse.operations.

from typing import ClassVar

__all__: list[str] = ["AccessDenied", "AgeError", "Busy", "CacheError", "CannotCopy"]
__all__ += ["CannotMount", "CannotUpload", "CheckpointIsFile", "CheckpointNotFound"]
__all__ += ["CkptfsError", "ConfigError", "DaemonError", "ExpressionError", "LimitExceeded"]
__all__ += ["LocationError", "MetadataError", "MetadataNotDict", "NoDaemon", "NoUpload"]
__all__ += ["NotAttached", "ObjectChanged", "PlaceUnusable", "PlanError", "PrefetchFailed"]
__all__ += ["ProtocolError", "RateError", "RightsNotLent", "SizeError", "StoreError"]
__all__ += ["StoreNotAllowed", "StoreTimeout", "StoreUnavailable", "TargetExists"]
__all__ += ["UnknownStore"]


class CkptfsError(Exception):
    """Base class of all exceptions that ckptfs raises on purpose.

    Attributes:
        code: The stable name of this kind of error on the control socket and in ``--json`` output.
    """

    code: ClassVar[str] = "error"

    def __init_subclass__(cls, *, code: str = "") -> None:
        super().__init_subclass__()
        if code:
            cls.code = code
            BY_CODE[code] = cls


BY_CODE: dict[str, type[CkptfsError]] = {CkptfsError.code: CkptfsError}
"""Exception class of each code, with which a client raises the daemon's error."""


class LocationError(CkptfsError, ValueError, code="location"):
    """An invalid URI or an unsupported filesystem, e.g. an unknown scheme."""


class UnknownStore(LocationError, code="unknown-store"):
    """The name of a store that is not in the configuration."""


class CheckpointNotFound(CkptfsError, FileNotFoundError, code="not-found"):
    """The bucket, container or directory does not exist."""


class CheckpointIsFile(CkptfsError, NotADirectoryError, code="is-file"):
    """The location is a single object instead of a directory."""


class AccessDenied(CkptfsError, PermissionError, code="access-denied"):
    """The store refused the credentials, or the daemon refused the user."""


class RightsNotLent(AccessDenied, code="rights-not-lent"):
    """The daemon would need its own rights to read the location, or to read files of the caller.

    A client then sends the contents of its files instead of their paths, if it has any.
    """


class StoreNotAllowed(AccessDenied, code="store-not-allowed"):
    """This user may not use the daemon's named store."""


class StoreError(CkptfsError, OSError, code="store"):
    """The store sent a response that ckptfs cannot use."""


class CannotCopy(StoreError, code="cannot-copy"):
    """The local disk cannot hold a copy, because it is full, read-only or another user's."""


class CannotUpload(CkptfsError, OSError, code="cannot-upload"):
    """The local directory cannot be uploaded. For example, a file changed meanwhile, its disk
    failed, or the store cannot hold its name."""


class TargetExists(CannotUpload, FileExistsError, code="target-exists"):
    """The target of an upload has other content, and the caller did not ask to overwrite it."""


class NoUpload(CkptfsError, LookupError, code="no-upload"):
    """The daemon has no upload of that id. The upload was cancelled, or ended long ago."""


class StoreUnavailable(StoreError, code="store-unavailable"):
    """The store is unreachable or overloaded. A later attempt can succeed.

    Attributes:
        retry_after_s: Seconds that the store asks clients to wait; 0 if it does not say.
    """

    retry_after_s: float = 0.0


class StoreTimeout(StoreUnavailable, TimeoutError, code="store-timeout"):
    """The store did not answer before the deadline."""


class ObjectChanged(CkptfsError, code="object-changed"):
    """The store no longer has the version of an object that the attach pinned."""


class CacheError(CkptfsError, OSError, code="cache"):
    """The cache's disk failed or is full, or a block in the cache is damaged."""


class MetadataError(CkptfsError, ValueError, code="metadata"):
    """The stored metadata of a checkpoint is not JSON."""


class MetadataNotDict(MetadataError, TypeError, code="metadata-not-dict"):
    """The stored metadata of a checkpoint is JSON, but not an object with keys."""


class ExpressionError(CkptfsError, ValueError, code="expression"):
    """An invalid expression of ``ckptfs find``."""


class RateError(CkptfsError, ValueError, code="rate"):
    """An invalid limit in bytes per second. A valid one is ``50M``."""


class SizeError(CkptfsError, ValueError, code="size"):
    """An invalid number of bytes. A valid one is ``500G``."""


class PrefetchFailed(CkptfsError, code="prefetch-failed"):
    """The prefetch of some files failed."""


class AgeError(CkptfsError, ValueError, code="age"):
    """An invalid age or duration, e.g. one without a unit."""


class ConfigError(CkptfsError, ValueError, code="config"):
    """An invalid configuration file or environment variable, or an unusable directory."""


class DaemonError(CkptfsError, code="daemon"):
    """The daemon is unreachable, did not start, or ended during a request."""


class NoDaemon(DaemonError, code="no-daemon"):
    """No daemon is running, and this command does not start a daemon."""


class CannotMount(DaemonError, code="cannot-mount"):
    """This machine cannot mount (no /dev/fuse, no permission, or a missing package)."""


class PlaceUnusable(CannotMount, ConfigError, code="place"):
    """A directory for a daemon's socket, mount or cache is unusable. It is in use, read-only, full,
    missing or another user's, or its path is too long."""


class ProtocolError(DaemonError, code="protocol"):
    """A message on the control socket is malformed, too large, or of another version."""


class NotAttached(CkptfsError, LookupError, code="not-attached"):
    """The named path or URI is not an attached checkpoint."""


class PlanError(CkptfsError, ValueError, code="plan"):
    """The plan is missing or invalid."""


class Busy(CkptfsError, code="busy"):
    """A process still uses the checkpoint or the mount that a command should end."""


class LimitExceeded(CkptfsError, code="limit"):
    """The request exceeds a configured limit, which the message names."""
