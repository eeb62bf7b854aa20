"""Pictures of a report. Needs matplotlib."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from benchmark.results import Panel, Report

OWN_COLOR, OTHER_COLOR = "tab:orange", "tab:gray"


def draw(report: Report, folder: Path) -> None:
    """One PNG for each case: bars of medians, with a dot for each round."""
    cases = list(dict.fromkeys(panel.case for panel in report.panels))
    for case in cases:
        panels = [p for p in report.panels if p.case == case and any(p.series.values())]
        if not panels:
            continue
        rows = [max(len(panel.series), 2) for panel in panels]
        figure, axes = plt.subplots(
            len(panels),
            figsize=(8, 0.8 + sum(rows) * 0.45),
            squeeze=False,
            gridspec_kw={"height_ratios": rows},
            layout="constrained",
        )
        for panel, axis in zip(panels, axes[:, 0], strict=True):
            _bars(panel, axis)
        figure.savefig(folder / f"{case}.png", dpi=120)
        plt.close(figure)


def _bars(panel: Panel, axis: Axes) -> None:
    names = [name for name, values in panel.series.items() if values]
    for row, name in enumerate(names):
        values = panel.series[name]
        color = OWN_COLOR if name.startswith("ckptfs") else OTHER_COLOR
        axis.barh(row, statistics.median(values), color=color, alpha=0.7)
        axis.plot(values, [row] * len(values), "k.", markersize=4)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel(panel.unit)
    axis.set_title(panel.title, loc="left", fontsize=10)
