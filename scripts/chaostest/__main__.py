"""The command: `scripts/chaos [--minutes M] [--seed N]`; see `--help`.

Readers in several processes verify every byte of a real mount while the store, the network, the
disk, the daemon and its keeper fail in many ways, by chance. It prints the actions and operations,
and the observations that SEMANTICS.md rules out, then the same as one line of JSON on standard
output. Exit status 1 means that there were such observations.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from chaostest.actions import LANES
from chaostest.board import SLOTS
from chaostest.chaos import Chaos
from chaostest.report import as_json, show
from chaostest.run import run

LONG_FROM_MINUTES = 1.0
"""Length from which a run also has the actions that take long, such as a store that is away for
longer than the read deadline."""


def main() -> int:
    options = parse()
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        print("chaos: /dev/fuse is missing, or you may not use it; run as root", file=sys.stderr)
        return 2
    # A program that a signal ends cleans up as well.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    console = Console(highlight=False, stderr=True, width=None if sys.stderr.isatty() else 100)
    console.print(f"chaos: seed {options.seed}")
    logs = Path(tempfile.mkdtemp(prefix="ckc-logs-"))
    is_long = options.actions is None and options.minutes >= LONG_FROM_MINUTES
    keep = True
    try:
        settings = {"readers": options.readers, "long": is_long, "tls": options.tls}
        limits = {"seconds": options.minutes * 60, "actions_max": options.actions}
        with Chaos(options.seed, logs=logs, **settings) as chaos:
            outcome = run(chaos, only=options.only, **limits)
        (logs / "result.json").write_text(json.dumps(as_json(outcome), indent=1))
        show(outcome, console)
        print(json.dumps(as_json(outcome)), flush=True)
        keep = bool(outcome.breaches) or options.keep_logs
        return 1 if outcome.breaches else 0
    except KeyboardInterrupt:
        keep = False
        return 128 + signal.SIGINT
    finally:
        if keep:
            console.print(f"chaos: again with --seed {options.seed}; its logs are in {logs}")
        else:
            shutil.rmtree(logs)


def parse() -> argparse.Namespace:
    names = {name for lane in LANES.values() for name in lane}
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long (default: 5)")
    parser.add_argument("--seed", type=int, default=None, help="what happens, and in which order")
    parser.add_argument("--readers", type=int, default=4, help="processes that read (default: 4)")
    parser.add_argument("--actions", type=int, help="end after so many of each lane")
    parser.add_argument(
        *("--only",),
        type=lambda text: text.split(","),
        metavar="ACTION,…",
        default=[],
        help=f"of all actions only these: {', '.join(sorted(names))}",
    )
    parser.add_argument("--tls", action="store_true", default=None, help="not only by chance")
    parser.add_argument("--keep-logs", action="store_true", help="also where nothing was wrong")
    options = parser.parse_args()
    if not 1 <= options.readers < SLOTS:
        parser.error(f"--readers takes 1 to {SLOTS - 1}")
    if unknown := set(options.only) - names:
        parser.error(f"--only: no such action: {', '.join(sorted(unknown))}")
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1 << 31)
    return options


if __name__ == "__main__":
    sys.exit(main())
