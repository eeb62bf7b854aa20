"""The command: `scripts/simulate`; see `--help`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, fields, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulation import calibration
from simulation.ways import GB, Result, Scenario, broadcast, copy, mount, plan

if TYPE_CHECKING:
    from collections.abc import Callable

WAYS = {"copy": copy, "mount": mount, "plan": plan, "broadcast": broadcast}
NODES = [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
OPTIONS = {  # what it sets, the unit it is given in, and what it is
    "gb": ("size", GB, "size of the checkpoint in GB"),
    "files": ("files", 1, "of the same size, that it consists of"),
    "rate": ("connection", 1e6, "MB/s of a connection to the store"),
    "latency": ("latency_s", 1e-3, "ms until the first byte of a request"),
    "store": ("store", GB, "GB/s of the whole store"),
    "requests": ("requests", 1, "per second that the store takes"),
    "link": ("link", GB / 8, "Gbit/s of a node's network, each way"),
    "disk": ("disk", GB, "GB/s of a node's disk"),
    "cpus": ("cpus", 1, "of a node"),
    "readers": ("readers", 1, "processes of a node that read at the same time"),
    "object-store": ("object_store", GB, "GB of a node's object store of Ray"),
    "calls": ("calls", 1, "of actors per second by the driver of a broadcast"),
    "import": ("import_s", 1, "seconds that a program takes before it can read"),
    "spread": ("spread", 1, "standard deviation of connections and starts, as a share"),
}
MAY_BE_0 = ("latency", "import", "spread")


def main() -> int:
    given = parse()
    if given.check:
        return check(as_json=given.json)
    scenario = Scenario(
        nodes=0, **{name: getattr(given, name) * unit for name, unit, _ in OPTIONS.values()}
    )
    results = {nodes: simulate(scenario, nodes, given.seed) for nodes in given.nodes}
    if given.json:
        found = {nodes: {way: asdict(r) for way, r in of.items()} for nodes, of in results.items()}
        print(json.dumps({"scenario": asdict(scenario), "nodes": found}, indent=1))
    else:
        show(scenario, results)
    if given.plot:
        from simulation.picture import draw  # needs matplotlib

        draw(scenario, results, given.plot)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/simulate",
        description="Predicts the time until the last node has restored a checkpoint, and the "
        "bytes that the store sends, if every node copies (Ray's way), mounts, mounts with a plan, "
        "or takes part in a broadcast. Every node reads the whole checkpoint.",
        epilog="scripts/simulation/ describes the model; --check compares it with real runs.",
    )
    parser.add_argument("--nodes", type=number(int), nargs="+", default=NODES, metavar="N")
    defaults: dict[str, Any] = {field.name: field.default for field in fields(Scenario)}
    for option, (name, unit, text) in OPTIONS.items():
        default = defaults[name] if unit == 1 else defaults[name] / unit
        parser.add_argument(
            f"--{option}",
            type=number(type(default), may_be_0=option in MAY_BE_0),
            default=default,
            dest=name,
            metavar="N",
            help=f"{text} (%(default)g)",
        )
    parser.add_argument("--seed", type=int, default=0, help="of the differences between nodes")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the results (PNG)")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.add_argument(
        "--check", action="store_true", help="compare the model with tests/bench/cluster.json"
    )
    return parser.parse_args()


def number(kind: type[int | float], *, may_be_0: bool = False) -> Callable[[str], int | float]:
    """A parser of one number of the command line."""

    def parsed(text: str) -> int | float:
        value = kind(text)
        if not (0 < value < inf or (may_be_0 and value == 0)):
            raise ValueError
        return value

    parsed.__name__ = "number"  # which argparse says to be invalid
    return parsed


def simulate(scenario: Scenario, nodes: int, seed: int) -> dict[str, Result]:
    """All ways, with so many nodes."""
    costs = calibration.of_real_nodes()
    return {way: model(replace(scenario, nodes=nodes), costs, seed) for way, model in WAYS.items()}


def show(scenario: Scenario, results: dict[int, dict[str, Result]]) -> None:
    print(f"{scenario.size / GB:g} GB: until the last node has read it, and TB from the store")
    print("nodes " + "".join(f"{way:>20}" for way in WAYS))
    for nodes, of in results.items():
        cells = [f"{r.read_s:9.0f} s {r.sent * scenario.size / 1e12:6.1f} TB" for r in of.values()]
        print(f"{nodes:5} " + "".join(f"{cell:>20}" for cell in cells))


def check(*, as_json: bool) -> int:
    """Compare with the real runs; 1 if one is not met."""
    figures = calibration.check()
    if as_json:
        rows = [
            {"nodes": f.run.nodes, "connection_bytes_per_s": f.run.connection_bytes_per_s}
            | {name: getattr(f, name) for name in ("way", "name", "predicted", "measured", "error")}
            for f in figures
        ]
        print(json.dumps(rows, indent=1))
    else:
        print("nodes  MB/s  way        figure  predicted  measured")
        for f in figures:
            rate = f.run.connection_bytes_per_s / 1e6
            row = f"{f.run.nodes:5}  {rate:4g}  {f.way:9}  {f.name:6}  {f.predicted:9.2f}  "
            judged = ("" if f.is_good else "  TOO FAR") if f.is_foretold else "  costs come from it"
            print(row + f"{f.measured:8.2f}  {f.error:+.0%}" + judged)
    return int(not all(figure.is_good for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
