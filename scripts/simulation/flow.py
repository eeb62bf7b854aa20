"""How long stages take that share what there is: a fluid simulation, event by event. No IO.

All nodes go through the same *stages*, one after the other: so many bytes (or seconds of waiting)
each, at most so fast, and each byte costs something of what all nodes share. Between two events,
the ends of a node's stages, all rates are constant, and max-min fair: all are raised alike until
one reaches its own limit or something shared is used up. It is exact but for `_RESOLUTION`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

_RESOLUTION = 0.001
"""Events that are closer than this share of the time so far are one: thousands of nodes that are
nearly alike would else be as many steps."""
_RATE_MAX = 1e15
"""Instead of no limit at all."""


@dataclass(frozen=True)
class Stage:
    """A stage of a node's work.

    Attributes:
        amount: Bytes, or another quantity, of which `limit` is a rate.
        limit: Most of it in a second by the node's own resources.
        costs: The part of each shared resource that one unit takes.
        spread: Standard deviation of the limit between nodes, as a share of it.
    """

    amount: float
    limit: float
    costs: Mapping[str, float] = field(default_factory=dict)
    spread: float = 0.0


def wait(seconds: float, cpu_s: float = 0.0, spread: float = 0.0) -> Stage:
    """A stage that takes so long, and `cpu_s` of the CPUs that are shared meanwhile."""
    return Stage(1.0, 1 / max(seconds, 1e-6), {"cpu": cpu_s}, spread)


def run(
    stages: Sequence[Stage], nodes: int, shared: Mapping[str, float], seed: int
) -> NDArray[np.float64]:
    """The end of each stage on each node.

    Args:
        shared: The shared resources of all nodes in a second, by name. Others have no limit.
        seed: Seed of the differences between nodes.

    Returns:
        Seconds, of shape (stages, nodes).
    """
    drawn = np.random.default_rng(seed).standard_normal((len(stages), nodes))
    spreads = np.array([stage.spread for stage in stages])[:, None]
    limits = np.array([stage.limit for stage in stages])[:, None] * np.exp(
        spreads * drawn - spreads**2 / 2  # lognormal, with a mean of 1
    )
    limits = np.minimum(limits, _RATE_MAX)
    amounts = np.array([stage.amount for stage in stages])
    costs = np.array([[stage.costs.get(name, 0.0) for stage in stages] for name in shared])
    costs = costs.reshape(len(shared), len(stages))
    room = np.array(list(shared.values()))
    ends = np.zeros((len(stages), nodes))
    at, left, now_s = np.zeros(nodes, int), np.full(nodes, amounts[0]), 0.0
    while (active := np.flatnonzero(at < len(stages))).size:
        stage = at[active]
        rates = fair(limits[stage, active], costs[:, stage], room)
        needed_s = left[active] / rates
        step_s = needed_s.min()
        now_s += step_s
        left[active] -= rates * step_s
        done = active[needed_s <= step_s + now_s * _RESOLUTION]
        ends[at[done], done] = now_s
        at[done] += 1
        going = done[at[done] < len(stages)]
        left[going] = amounts[at[going]]
    return ends


def fair(
    limits: NDArray[np.float64], costs: NDArray[np.float64], room: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The max-min fair rates.

    Args:
        limits: Of n nodes, of shape (n,); positive.
        costs: Of one byte per second of each, of shape (r, n), for r things that are shared.
        room: What there is of these, of shape (r,).
    """
    rates = np.zeros_like(limits)
    is_open = np.ones(len(limits), bool)
    room = room.astype(float)
    while is_open.any():
        asked = costs[:, is_open].sum(axis=1)
        levels = np.divide(room, asked, out=np.full(len(room), np.inf), where=asked > 0)
        level = levels.min(initial=np.inf)
        settled = is_open & (limits <= level)
        if settled.any():
            rates[settled] = limits[settled]
        else:
            settled = is_open & (costs[levels.argmin()] > 0)
            rates[settled] = level
        room = np.maximum(0.0, room - costs[:, settled] @ rates[settled])
        is_open &= ~settled
    return rates
