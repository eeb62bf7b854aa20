"""A picture of results. Needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

from simulation.ways import GB

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from simulation.ways import Result, Scenario

STYLES = {
    "copy": ("everyone copies (Ray's way)", "tab:gray", "o"),
    "mount": ("everyone mounts", "tab:orange", "s"),
    "plan": ("mounts with a plan", "tab:green", "^"),
    "broadcast": ("broadcast", "tab:blue", "D"),
}
MARKS_S = {10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h", 36000: "10 h"}


def draw(scenario: Scenario, results: dict[int, dict[str, Result]], file: Path) -> None:
    """Time and bytes of the store against the number of nodes."""
    figure, (times, bytes_) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    nodes = list(results)
    for way, (label, color, marker) in STYLES.items():
        style = {"color": color, "marker": marker, "markersize": 5, "label": label}
        times.plot(nodes, [results[n][way].read_s for n in nodes], **style)
        sent = [results[n][way].sent * scenario.size / 1e12 for n in nodes]
        bytes_.plot(nodes, sent, **style)
    _axis(times, nodes, "until the last node has read all of it")
    times.set_yticks(list(MARKS_S), list(MARKS_S.values()))
    times.legend(loc="upper left", frameon=False)
    _axis(bytes_, nodes, "TB that the store sends")
    bytes_.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    figure.suptitle(
        f"Simulated: {scenario.size / GB:g} GB; a store with {scenario.store / GB:g} GB/s, "
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
