"""The counts of this process's workers. `COUNTS` is global, like `REQUESTS`."""

from typing import TYPE_CHECKING, get_args

from ckptfs._workers.process import Reason

if TYPE_CHECKING:
    from collections.abc import Callable


class Counts:
    """The counts. The pool changes them, with its lock held.

    Attributes:
        starts: The number of started workers.
        ends: The number of ended workers, by reason.
        memory_bytes: A function that returns the memory of each running worker, in bytes.
    """

    def __init__(self) -> None:
        self.starts = 0
        self.ends: dict[str, int] = dict.fromkeys(get_args(Reason), 0)
        self.memory_bytes: Callable[[], list[int]] = list


COUNTS = Counts()
