"""The case of reads that are sequential only when one knows how to look at them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from benchmark.contenders import CKPTFS
from benchmark.results import ratio
from benchmark.run import working
from benchmark.stores import MIB, PAGE_WORDS

if TYPE_CHECKING:
    from typing import Any

    from benchmark.run import Run

GB = 1e9
PLACES = 4
"""Where one process reads in turn, in one file: as when tensors of several layers are zipped."""

PROCESSES = 8
"""Which read one inherited descriptor, as the workers of a data loader do after a fork."""

STRIDE_BYTES = MIB + MIB // 8
"""1 MiB is read of each. The skips are smaller than a block, so no store can leave them out, and
the rate of what is useful is at best 8/9 of the sequential one."""

WIDE_STRIDE_BYTES = 2 * MIB
"""The same with skips that could be left out. Without a goal: at best half, if they are not."""


def cursors(run: Run) -> None:
    """Several cursors in a file, a shared descriptor, and strides, cold, against one reader."""
    case, size = "cursors", run.objects.large_bytes

    def rate(task: str, **job: Any) -> float:
        """GB/s of the bytes that the task has use for."""
        stride = job.get("stride_bytes", MIB)
        useful = sum(min(MIB, size - start) for start in range(0, size, stride))
        check = strided_check(run, stride) if stride > MIB else run.objects.large_check
        with (
            CKPTFS.cold(run.store, run.temp) as ready,
            working(ready, run.large() | {"task": task} | job) as worker,
        ):
            result = worker.go(check)
            return useful / (result["seconds"] - result["path_s"]) / GB

    one = "in sequence, one reader"
    others = {
        f"{PLACES} cursors in turn": lambda: rate("interleaved", places=PLACES),
        f"{PROCESSES} processes, one descriptor": lambda: rate("shared", processes=PROCESSES),
        "1 MiB, 128 KiB left out": lambda: rate("strided", stride_bytes=STRIDE_BYTES),
    }
    wide = {"1 MiB, 1 MiB left out": lambda: rate("strided", stride_bytes=WIDE_STRIDE_BYTES)}
    taken = run.alternate(case, {one: lambda: rate("sequential")} | others | wide)
    run.add_panel(case, f"read {size >> 20} MiB cold, useful bytes", taken, "GB/s")
    run.report.goals += [
        ratio(case, f"{name} / {one}", taken.get(name), taken.get(one), at_least=0.8)
        for name in others
    ]


def strided_check(run: Run, stride_bytes: int) -> int:
    """Sum of the first word of each page of the first MiB of each stride."""
    words = np.memmap(run.objects.folder / "large" / "data.bin", np.int64, "r")
    starts = range(0, len(words), stride_bytes // 8)
    return sum(int(words[start : start + MIB // 8 : PAGE_WORDS].sum()) for start in starts)
