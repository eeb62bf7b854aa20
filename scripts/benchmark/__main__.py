"""The command: `scripts/bench [--quick] [CASE…]`; see `--help`."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import textwrap
import time
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from support.s3server import S3Server

from benchmark import attaching, cold, link, loads, results, uploads, warm, weed
from benchmark.ceiling import ceiling
from benchmark.contenders import CKPTFS
from benchmark.cursors import cursors
from benchmark.host import ROOT, begin_report
from benchmark.planned import plan
from benchmark.report import show_case, update_pages
from benchmark.run import FAILURES, Run
from benchmark.scale import scale
from benchmark.starting import raw_threads, start_others
from benchmark.stores import BUCKET, MIB, Store, counted, make_objects, warm_up

CASES = {
    "sequential": cold.sequential,
    "sequential-tls": cold.sequential_tls,
    "load": loads.load,
    "load-tls": loads.load_tls,
    "tensor": cold.tensor,
    "tensor-tls": cold.tensor_tls,
    "capped": loads.capped,
    "capped-tls": loads.capped_tls,
    "link": link.link,
    "seaweedfs": weed.seaweedfs,
    "eight": cold.eight,
    "cursors": cursors,
    "warm": warm.warm,
    "warm-plain": warm.warm_plain,
    "random": warm.random,
    "ceiling": ceiling,
    "scale": scale,
    "tree": attaching.tree,
    "attach": attaching.attach,
    "small": cold.small,
    "small-tls": cold.small_tls,
    "prefetch": attaching.prefetch,
    "plan": plan,
    "upload": uploads.upload,
    "upload-tls": uploads.upload_tls,
    "upload-seaweedfs": uploads.upload_seaweedfs,
}
RESULTS = ROOT / "scripts" / "results"
ROUNDS, QUICK_ROUNDS = 5, 2
BUDGET_S, QUICK_BUDGET_S = 40.0, 10.0
LARGE_BYTES, QUICK_LARGE_BYTES = 1024 * MIB, 256 * MIB

console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)


def main() -> int:
    options = parse()
    if options.tables:
        update_pages(results.read(results.REFERENCE))
        return 0
    # Ended by a signal, it cleans up as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    report = measure(options.cases or list(CASES), quick=options.quick)
    folder = RESULTS / report.date.replace(":", "")
    results.write(report, folder / "result.json")
    from benchmark.plots import draw  # slow to import, and not needed for --tables

    draw(report, folder)
    console.print(f"bench: all figures and pictures are in {folder.relative_to(ROOT)}")
    if options.reference:
        results.write(report, results.REFERENCE)
        update_pages(report)
        console.print(f"bench: wrote {results.REFERENCE.relative_to(ROOT)} and its tables")
    return 1 if any(name.startswith(CKPTFS.name) for name in report.absent) else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description=__doc__,
        epilog=describe_cases(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="only these; without: all")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, objects of 256 MiB")
    parser.add_argument(
        "--reference",
        action="store_true",
        help="keep the result as the one that RESULTS.md and the README show",
    )
    parser.add_argument(
        "--tables", action="store_true", help="only write the tables of the kept result again"
    )
    options = parser.parse_args()
    if unknown := [name for name in options.cases if name not in CASES]:
        parser.error(f"unknown case {unknown[0]!r}; there are {', '.join(CASES)}")
    if options.reference and options.cases:
        parser.error("--reference takes all cases")
    return options


def describe_cases() -> str:
    """A line for each case: its name, and the beginning of its docstring."""
    width = max(map(len, CASES))
    lines = (
        f"  {name:{width}}  {textwrap.shorten(case.__doc__ or '', 200)}"
        for name, case in CASES.items()
    )
    return "\n".join(["cases:", *lines])


def measure(names: list[str], *, quick: bool) -> results.Report:
    """Make the stores and their objects, and run the cases."""
    report = begin_report(quick=quick)
    for name, why in report.absent.items():
        console.print(f"bench: absent: {name}: {why}")
    with ExitStack() as stack:
        temp = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ckb-")))
        server = stack.enter_context(S3Server())
        console.print("bench: making the objects")
        size = QUICK_LARGE_BYTES if quick else LARGE_BYTES
        objects = make_objects(server.bucket_dir(BUCKET), size)
        store = Store("open", server.endpoint)
        warm_up(store)
        others = start_others(stack, temp, server, names, report)
        threads = raw_threads(store, others)
        report.note("sequential", f"readers of raw, by store: {threads}")
        run = Run(
            temp=temp,
            objects=objects,
            store=store,
            tls=others.get("tls"),
            capped=others.get("capped"),
            capped_tls=others.get("capped_tls"),
            link=others.get("link"),
            counted=stack.enter_context(counted(server)),
            rounds=QUICK_ROUNDS if quick else ROUNDS,
            budget_s=QUICK_BUDGET_S if quick else BUDGET_S,
            raw_threads=threads,
            report=report,
        )
        for name in names:
            start_s = time.monotonic()
            try:
                CASES[name](run)
            except FAILURES as error:
                report.absent[f"{CKPTFS.name} in {name}, all of it"] = " ".join(str(error).split())
            show_case(report, name, console)
            console.print(f"bench: {name} took {time.monotonic() - start_s:.0f} s\n")
    for name, why in report.absent.items():
        console.print(f"bench: absent: {name}: {why}", soft_wrap=True)
    return report


if __name__ == "__main__":
    sys.exit(main())
