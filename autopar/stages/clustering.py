"""Layers by cost, for code without names: balanced contiguous groups with few bytes between them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from autopar.core.graph import Phase
from autopar.stages.draft import Draft
from autopar.stages.forward import HEAVY, is_real

MOST = 16
SLACK = (1.25, 1.5, 2.0, 4.0, float("inf"))
"""How far above the mean a group's cost may lie; the first that allows a cut is used (Alpa uses 1.5)."""


def cluster_layers(draft: Draft, layers: int | None, least: int = 1) -> tuple[str, ...]:
    """Sets the layer of the forward's equations that mix examples and parameters; returns the layers' names.

    The equations in order are cut at the cheapest place between two neighbouring contractions: into so many
    groups that each costs at most a bounded multiple of the mean and the bytes crossing the cuts are least,
    and among equals with the least squared cost. This is Alpa's operator clustering (Zheng et al., OSDI
    2022, Sec. 5.2).

    Args:
        draft: phases are complete.
        layers: how many groups; None: one per two contractions, at most 16, at least `least`.
    """
    real = [i for i in draft.of_phase(Phase.FORWARD) if is_real(draft, i) and _varies(draft, i)]
    if not real:
        return ()
    heavy = [k for k, i in enumerate(real) if draft.graph.equations[i].kind in HEAVY]
    wanted = layers or max(least, min(MOST, len(heavy) // 2))
    crossing, places = _crossing(draft, real), _places(len(real), heavy)
    cuts = [0, *(min(place, key=lambda p: (crossing[p], -p)) for place in places), len(real)]
    costs = np.add.reduceat([_cost(draft, i) for i in real], cuts[:-1])
    groups = partition(costs, np.array([crossing[p] for p in cuts[:-1]], float), min(wanted, len(costs)))
    for layer, (a, b) in enumerate(pairwise(groups)):
        for i in real[cuts[a] : cuts[b]]:
            draft.layer[i] = layer
    return tuple(f"layer {k}" for k in range(len(groups) - 1))


def _varies(draft: Draft, i: int) -> bool:
    return any(v in draft.varies for v in draft.graph.equations[i].outputs)


def _cost(draft: Draft, i: int) -> float:
    """Returns FLOPs, plus the elements written, so that graphs without contractions balance too."""
    equation = draft.graph.equations[i]
    return max(equation.flops, 0.0) + sum(draft.graph.values[v].size for v in equation.outputs)


def _places(count: int, heavy: list[int]) -> list[range]:
    """Returns the positions between neighbouring heavy equations; without any, every position by itself."""
    if len(heavy) < 2:
        return [range(p, p + 1) for p in range(1, count)]
    return [range(a + 1, b + 1) for a, b in pairwise(heavy)]


def _crossing(draft: Draft, real: list[int]) -> list[int]:
    """Returns for every position the bytes made before it and read at or after it."""
    place = {i: k for k, i in enumerate(real)}
    change = [0] * (len(real) + 2)
    for i, k in place.items():
        for v in draft.graph.equations[i].outputs:
            last = max((place[j] for j in draft.users.get(v, ()) if j in place), default=k)
            change[k + 1] += draft.graph.values[v].nbytes
            change[last + 1] -= draft.graph.values[v].nbytes
    return np.cumsum(change).tolist()


def partition(costs: NDArray[np.float64], before: NDArray[np.float64], groups: int) -> list[int]:
    """Returns cut positions 0 = c0 < c1 < … < cn = len(costs) of `groups` contiguous groups, none empty.

    The largest group is bounded by the tightest multiple of the mean in `SLACK` that can be met; within it
    the sum of `before[c]` over the inner cuts is least, and among equals the sum of squared costs.
    """
    mean = costs.sum() / groups
    before = np.where(np.arange(len(costs)) > 0, before, 0.0)  # the first group begins at no cut
    for slack in SLACK:
        found = _partition(costs, before, groups, max(slack * mean, costs.max()))
        if found is not None:
            return found
    raise AssertionError("an unbounded partition always exists")


def _partition(
    costs: NDArray[np.float64], before: NDArray[np.float64], groups: int, cap: float
) -> list[int] | None:
    n, prefix = len(costs), np.concatenate([[0.0], np.cumsum(costs)])
    best = np.full((groups + 1, n + 1), np.inf)
    square = np.full((groups + 1, n + 1), np.inf)
    back = np.zeros((groups + 1, n + 1), int)
    best[0, 0] = square[0, 0] = 0.0
    for g in range(1, groups + 1):
        for j in range(g, n + 1):
            size = prefix[j] - prefix[:j]
            total = np.where(size <= cap * (1 + 1e-9), best[g - 1, :j] + before[:j], np.inf)
            least = total.min()
            if not np.isfinite(least):
                continue
            squares = np.where(total <= least * (1 + 1e-12), square[g - 1, :j] + size**2, np.inf)
            i = int(squares.argmin())
            best[g, j], square[g, j], back[g, j] = least, squares[i], i
    if not np.isfinite(best[groups, n]):
        return None
    cuts = [n]
    for g in range(groups, 0, -1):
        cuts.append(int(back[g, cuts[-1]]))
    return cuts[::-1]
