"""`mount`: a checkpoint that stays a local directory for longer than a ``with`` block."""

import contextlib
import os
import warnings
import weakref
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, Concatenate, NoReturn, ParamSpec

from ckptfs.checkpoint import Checkpoint

P = ParamSpec("P")


class MountedCheckpoint:
    """A checkpoint that is a local directory until it is closed. `ckptfs.mount` makes it.

    Use it if a ``with`` block does not fit, for example in the cells of a notebook:

        >>> step_100 = ckptfs.mount("s3://bucket/run7/checkpoint_000100")
        >>> os.listdir(step_100)
        ['config.json', 'model.safetensors']
        >>> step_100.close()

    It is also a path (``open(step_100.path + "/config.json")``, ``Path(step_100)``) and a context
    manager. It closes when the process ends, however that happens. It also closes with its last
    reference. ``python -X dev`` then shows a ResourceWarning, as for an open file.

    A forked child keeps the directory until it closes the object or ends. The object cannot be
    pickled, so pass the path or the checkpoint to other processes.
    """

    def __init__(self, checkpoint: Any, directory: contextlib.AbstractContextManager[str]) -> None:
        stack = contextlib.ExitStack()
        self._checkpoint = checkpoint
        self._path = stack.enter_context(directory)
        self._end = weakref.finalize(self, stack.close)

    @property
    def path(self) -> str:
        """The directory.

        Raises:
            ValueError: The object is closed, and the directory may have gone.
        """
        if not self._end.alive:
            raise ValueError(
                f"{self._checkpoint} was closed, so it has no path; mount it again with "
                "ckptfs.mount"
            )
        return self._path

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._end.alive

    def close(self) -> None:
        """Release the checkpoint. Fetched bytes stay in the node's cache.

        Open and mapped files stay readable. A second call does nothing.
        """
        self._end()

    def __enter__(self) -> "MountedCheckpoint":
        self.path  # noqa: B018 - raises if it is closed
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __fspath__(self) -> str:
        return self.path

    def __repr__(self) -> str:
        state = "closed" if self.closed else repr(self._path)
        return f"<ckptfs.MountedCheckpoint {state} of {self._checkpoint}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a MountedCheckpoint cannot be pickled, because it belongs to its process; pickle the "
            "Checkpoint and mount that there, or pass the path on"
        )

    def __del__(self) -> None:
        # The attribute is missing after a failed constructor. At the end of the process it is dead.
        end = self.__dict__.get("_end")
        if end is not None and end.alive:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            end()


def _with_options_of(
    method: Callable[Concatenate[Checkpoint, P], contextlib.AbstractContextManager[str]],
) -> Callable[
    [Callable[..., MountedCheckpoint]],
    Callable[Concatenate[Checkpoint | str | os.PathLike[str], P], MountedCheckpoint],
]:
    """Give a function the options of a method, for type checkers as for ``help()``."""

    def with_options(function: Callable[..., MountedCheckpoint]) -> Any:
        own = signature(function)
        options = list(signature(method).parameters.values())[1:]
        kept = [each for each in own.parameters.values() if each.kind is not Parameter.VAR_KEYWORD]
        vars(function)["__signature__"] = own.replace(parameters=[*kept, *options])
        return function

    return with_options


@_with_options_of(Checkpoint.as_directory)
def mount(checkpoint: Checkpoint | str | os.PathLike[str], /, **options: Any) -> MountedCheckpoint:
    """Make a checkpoint a local directory until the returned object is closed.

    `Checkpoint.as_directory` does the same for the length of a ``with`` block, and explains the
    options.

        >>> step_100 = ckptfs.mount("s3://bucket/run7/checkpoint_000100", prefetch=["*.json"])
        >>> step_100.path
        '/run/ckptfs/mnt/checkpoint_000100-6f1d0c2a9b3e'

    Args:
        checkpoint: A `Checkpoint`, one of Ray's, or an argument for `Checkpoint`: a URI, a path in
            a named store, or an absolute local path.
        options: The options of `Checkpoint.as_directory`.

    Raises:
        LocationError: The URI's scheme is unknown, or the path is relative.
        CkptfsError: As in `Checkpoint.as_directory`.
    """
    # A checkpoint of Ray has another class, and its own `as_directory` would copy.
    known: Any = checkpoint if hasattr(checkpoint, "as_directory") else Checkpoint(checkpoint)
    return MountedCheckpoint(known, Checkpoint.as_directory(known, **options))
