"""The integer program of a limit: a bound, and plans near the limit.

It sees what single choices keep alive, not what depends on two of them (a value held in a second layout). As
it is, it bounds every plan. What its plans hold beside, it is told: at the ticks at which a plan exceeds the
limit, there is as much less to use the next time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from autopar.sharding.limit.moments import Chosen, Floats, Moments, moments_of, remember
from autopar.sharding.memory.alive import PASSING, Item
from autopar.sharding.problem.assemble import Costs
from autopar.sharding.problem.solving import minimise

if TYPE_CHECKING:
    from autopar.sharding.problem.setting import Setting

GLANCE, TRY = 0.25, 0.5
"""Seconds for a bound, and for each plan."""

ROUGH = 0.01
"""How near the best is near enough."""

TRIES = 3
"""Plans that are looked for one after another."""

SMALL = 500
"""Programs of more nodes are not solved, nor branched on, without merging like parts."""

PRICED = 0.5
"""Share of a price that pays for bytes which the limit does not see: for some it is lowered as well."""


def bounded(setting: Setting, limit: int) -> float:
    """Returns seconds that no plan within a limit takes less than, minus infinity if none are known; infinite
    if it is proven that none fits."""
    return _glance(setting, limit, certain=True)


def expected(setting: Setting, limit: int) -> float:
    """Returns seconds that hardly a plan within a limit takes less than: elementwise results are there as a
    whole. Infinite where hardly any fits."""
    return max(_glance(setting, limit, certain=False), bounded(setting, limit))


def _glance(setting: Setting, limit: int, certain: bool) -> float:
    key = "glance", limit, certain
    if len(setting.model.nodes) > SMALL:
        return -math.inf
    if key not in setting.known:
        moments = moments_of(setting)
        costs = replace(moments.costs, items=moments.whole) if certain else moments.costs
        solved = minimise(costs, limit, GLANCE, ROUGH)
        if solved.chosen is not None:
            remember(setting, solved.chosen)
        known = solved.chosen is not None or solved.status == "infeasible"
        setting.known[key] = solved.bound if known else -math.inf
    return setting.known[key]


def attempts(moments: Moments, limit: int, prices: Floats) -> Iterator[Chosen]:
    """Yields choices which the integer program takes for good ones; not all of them keep within the limit.

    Args:
        prices: seconds per byte and tick, for bytes that depend on two choices.
    """
    pairs = [term for term in moments.likely if term.b is not None]
    costs = replace(moments.priced(PRICED * prices, 1.0, pairs), items=moments.costs.items)
    taken = np.zeros(moments.ticks + 1)
    for _ in range(TRIES):
        solved = minimise(_lowered(costs, taken), limit, TRY, ROUGH)
        if solved.chosen is None:
            return
        chosen = solved.chosen[:-1]
        yield chosen
        single, beside = moments.timelines(chosen)
        over = single + beside > limit
        if not over.any():
            return
        taken = np.where(over, np.maximum(taken, beside), taken)


def _lowered(costs: Costs, taken: Floats) -> Costs:
    """Returns the costs with one more node, which has no choice but to take so many bytes at every tick."""
    ends = np.flatnonzero(np.diff(taken, prepend=0.0, append=0.0))
    node = len(costs.nodes)
    items = [
        Item(node, int(a), int(b), np.array([int(taken[a])]), PASSING, ((), 0))
        for a, b in itertools.pairwise(ends)
        if taken[a] > 0
    ]
    return Costs(
        (*costs.nodes, np.zeros(1)),
        costs.edges,
        (*costs.items, *items),
        (*costs.likes, None),
        tuple(range(node + 1)),
    )
