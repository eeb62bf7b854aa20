"""A picture of results. Needs matplotlib."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

from simulation.ways import GB, chunk_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from simulation.ways import Result, Scenario

STYLES = {  # label, color, marker, width: those below are wider, as lines lie on each other
    "copy": ("everyone copies (Ray's way)", "tab:gray", "o", 7),
    "mount": ("everyone mounts", "tab:orange", "s", 4),
    "plan": ("everyone mounts, with a plan", "tab:green", "^", 1.5),
    "broadcast": ("broadcast", "tab:blue", "D", 1.5),
}
MARKS_S = {10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h", 36000: "10 h"}


def draw(scenario: Scenario, results: dict[int, dict[str, Result]], file: Path) -> None:
    """Time and bytes of the store against the number of nodes."""
    figure, (times, traffic) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    nodes = list(results)
    for way, (label, color, marker, width) in STYLES.items():
        style = {"color": color, "marker": marker, "label": label, "linewidth": width}
        style |= {"markersize": 4 + width, "alpha": 0.45 if width > 2 else 1}
        times.plot(nodes, [results[n][way].read_s for n in nodes], **style)
        traffic.plot(nodes, [results[n][way].sent * scenario.size / 1e12 for n in nodes], **style)
    sending_s = [n * scenario.size / scenario.store for n in nodes]
    note = f"all that the store can send: {scenario.store / GB:g} GB/s"
    times.plot(nodes, sending_s, "k:", linewidth=1.2, label=note)
    chunks = [scenario.size / chunk_bytes(replace(scenario, nodes=n)) for n in nodes]
    calling_s = [n * count / scenario.calls for n, count in zip(nodes, chunks, strict=True)]
    note = f"all that the driver can do: {scenario.calls:,g} calls/s"
    times.plot(nodes, calling_s, ":", color="tab:blue", linewidth=1.2, label=note)
    _axis(times, nodes, "until the last node has read all of it")
    shown = [result.read_s for of in results.values() for result in of.values()]
    times.set_ylim(min(shown) / 2, max(shown) * 2)
    marks = {s: text for s, text in MARKS_S.items() if min(shown) / 2 <= s <= max(shown) * 2}
    times.set_yticks(list(marks), list(marks.values()))
    times.legend(loc="upper left", frameon=False)
    _axis(traffic, nodes, "TB that the store sends")
    traffic.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    figure.suptitle(
        f"Simulated: {scenario.size / GB:g} GB, {scenario.import_s:g} s of imports; a store with "
        f"{scenario.connection / 1e6:g} MB/s per connection, {scenario.latency_s * 1000:g} ms, "
        f"{scenario.requests:,g} requests/s; nodes with {scenario.link * 8 / GB:g} Gbit/s",
        fontsize=10,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _axis(axis: Axes, nodes: list[int], title: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(nodes, [f"{n:,}" for n in nodes])
    axis.minorticks_off()
    axis.set_xlabel("nodes")
    axis.set_title(title, loc="left", fontsize=10)
    axis.grid(alpha=0.3)
