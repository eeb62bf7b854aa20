"""A run: from rest, through faults, and back to rest."""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING

from chaostest import actions, rest
from chaostest.chaos import Stopped
from ckptfs._model.protocol.requests import Attach

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chaostest.chaos import Chaos
    from chaostest.report import Outcome

SAMPLE_S = 0.5
ACTIONS_PER_UPLOAD = 3
"""The actions of other lanes in the time of an upload."""


def run(
    chaos: Chaos, *, seconds: float, actions_max: int | None, only: Sequence[str] = ()
) -> Outcome:
    """Run for `seconds`, or until each lane has had `actions_max` actions.

    `only` names the actions of the run; all of them if it is empty.
    """
    outcome = chaos.outcome
    begin_s = time.monotonic()
    _begin_at_rest(chaos)
    chaos.start_readers()
    lanes = [
        threading.Thread(target=_lane, args=(chaos, name, names, actions_max), daemon=True)
        for name, names in _lanes(outcome, only).items()
    ]
    for lane in lanes:
        lane.start()
    end_s = begin_s + seconds
    next_sample_s = 0.0
    while time.monotonic() < end_s and any(lane.is_alive() for lane in lanes):
        time.sleep(0.1)
        chaos.look_at_readers()
        if time.monotonic() >= next_sample_s:
            next_sample_s = time.monotonic() + SAMPLE_S
            chaos.sample()
    chaos.stop()
    for lane in lanes:
        lane.join(60)
    chaos.end_readers()
    chaos.backgrounds.end()
    chaos.uploads.end()
    rest.judge(chaos)
    outcome.seconds = time.monotonic() - begin_s
    if chaos.node.disk is not None:
        outcome.disk_failed = chaos.node.disk.failed()
    outcome.requests_met = chaos.proxy.ask({"count": True})["met"]
    return outcome


def _begin_at_rest(chaos: Chaos) -> None:
    if chaos.node.disk is None:
        chaos.outcome.left_out += sorted(actions.DISK)
    if not chaos.long:
        chaos.outcome.left_out += sorted(actions.SLOW)
    chaos.node.start()
    with chaos.node.control() as control:
        for checkpoint in chaos.uris:
            control.ask_once(Attach(location=chaos.location(checkpoint)))
    rest.wait_for_rest(chaos)
    chaos.sample("first")


def _lanes(outcome: Outcome, only: Sequence[str]) -> dict[str, list[str]]:
    """The actions of each lane in this run."""
    every = {name for names in actions.LANES.values() for name in names}
    wanted = (set(only) or every) - set(outcome.left_out)
    found = {
        lane: [name for name in names if name in wanted] for lane, names in actions.LANES.items()
    }
    return {lane: names for lane, names in found.items() if names}


def _lane(chaos: Chaos, name: str, choices: list[str], actions_max: int | None) -> None:
    known = actions.LANES[name]
    if name in actions.UPLOADING and actions_max is not None:
        actions_max = max(1, actions_max // ACTIONS_PER_UPLOAD)
    weights = [known[each][0] for each in choices]
    seed = chaos.outcome.seed
    chance = random.Random(f"{seed} {name}")
    sequence = chaos.outcome.sequence.setdefault(name, [])
    try:
        while actions_max is None or len(sequence) < actions_max:
            chaos.wait(chance.uniform(0.05, 1.0))
            [picked] = chance.choices(choices, weights)
            sequence.append(picked)
            chaos.outcome.actions[picked] += 1
            # A stream of its own, so that an action's use of chance does not change the next one.
            known[picked][1](chaos, random.Random(f"{seed} {name} {len(sequence)}"))
    except Stopped:
        pass
    except Exception as error:
        chaos.breach("bug", f"lane {name}, {sequence[-1:]}: {error!r}")
