"""The exceptions of ckptfs.

Each message is one line that says what happened, to which checkpoint or file, and what to do. Where
Python has a fitting builtin exception, ours is also one of those, so that code written for local
files keeps working. No exception knows an errno: the one table that translates is in
``ckptfs._daemon.fuse``.
"""

from typing import ClassVar


class CkptfsError(Exception):
    """Base class of all exceptions that ckptfs raises on purpose.

    Attributes:
        code: The stable name of this kind of error on the control socket and in ``--json`` output.
    """

    code: ClassVar[str] = "error"


class LocationError(CkptfsError, ValueError):
    """A URI or filesystem that ckptfs cannot understand, e.g. an unknown scheme."""

    code = "location"


class UnknownStore(LocationError):
    """No store of that name is configured where it was looked for."""

    code = "unknown-store"


class CheckpointNotFound(CkptfsError, FileNotFoundError):
    """There is no such bucket, container or directory."""

    code = "not-found"


class CheckpointIsFile(CkptfsError, NotADirectoryError):
    """The location is a single object, where a directory was expected."""

    code = "is-file"


class AccessDenied(CkptfsError, PermissionError):
    """The store refused the credentials, or the daemon refused the user."""

    code = "access-denied"


class RightsNotLent(AccessDenied):
    """The daemon would have to read the location with rights of its own, or files of the caller's.

    A client then sends contents in place of paths, where it has some.
    """

    code = "rights-not-lent"


class StoreNotAllowed(AccessDenied):
    """The daemon's named store is not for this user."""

    code = "store-not-allowed"


class StoreError(CkptfsError, OSError):
    """The store answered with something that ckptfs cannot use."""

    code = "store"


class StoreUnavailable(StoreError):
    """The store cannot be reached, or is overloaded. Trying again later can help.

    Attributes:
        retry_after_s: How long the store asks to be left alone; 0: it did not say.
    """

    code = "store-unavailable"
    retry_after_s: float = 0.0


class StoreTimeout(StoreUnavailable, TimeoutError):
    """The store did not answer before the deadline."""

    code = "store-timeout"


class ObjectChanged(CkptfsError):
    """An object is no longer the version that was pinned when its checkpoint was attached."""

    code = "object-changed"


class CacheError(CkptfsError, OSError):
    """The cache or its disk could not do what was asked for, or not all of it, or it is damaged."""

    code = "cache"


class MetadataError(CkptfsError, ValueError):
    """What is stored as a checkpoint's metadata is not JSON."""

    code = "metadata"


class MetadataNotDict(MetadataError, TypeError):
    """What is stored as a checkpoint's metadata is JSON, but no object: it has no keys."""

    code = "metadata-not-dict"


class ExpressionError(CkptfsError, ValueError):
    """An expression of ``ckptfs find`` that is not in its language."""

    code = "expression"


class RateError(CkptfsError, ValueError):
    """A bandwidth limit that is no number of bytes per second."""

    code = "rate"


class SizeError(CkptfsError, ValueError):
    """A limit that is no number of bytes."""

    code = "size"


class PrefetchFailed(CkptfsError):
    """Some of the files that were to be fetched could not be."""

    code = "prefetch-failed"


class AgeError(CkptfsError, ValueError):
    """An age that is none."""

    code = "age"


class ConfigError(CkptfsError, ValueError):
    """A configuration file, environment variable or directory that cannot be used."""

    code = "config"


class DaemonError(CkptfsError):
    """The daemon could not be reached or started, or ended while it was needed."""

    code = "daemon"


class NoDaemon(DaemonError):
    """No daemon is running, and this command does not start one."""

    code = "no-daemon"


class CannotMount(DaemonError):
    """This machine does not let us mount (no /dev/fuse, no permission, a missing package)."""

    code = "cannot-mount"


class ProtocolError(DaemonError):
    """A message on the control socket was malformed, too large, or of another version."""

    code = "protocol"


class NotAttached(CkptfsError, LookupError):
    """The named path or URI is not an attached checkpoint."""

    code = "not-attached"


class PlanError(CkptfsError, ValueError):
    """What should be a plan is none, or there is none."""

    code = "plan"


class Busy(CkptfsError):
    """Something is still in use, so it cannot be ended."""

    code = "busy"


class LimitExceeded(CkptfsError):
    """A configured limit was reached; the message names it."""

    code = "limit"


def _tree(root: type[CkptfsError]) -> list[type[CkptfsError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]


BY_CODE: dict[str, type[CkptfsError]] = {cls.code: cls for cls in _tree(CkptfsError)}
"""Exception class of each code, to raise in a client what the daemon reported."""
