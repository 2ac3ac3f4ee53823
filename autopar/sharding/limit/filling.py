"""What is left of the memory after whole layers have been given to a fast plan goes to parts of others.

A mixture of two plans leaves up to one layer's bytes unused. The parts in which the two plans differ (a
weight with its moments and its held copy, say) are taken one by one instead, those first that save most
seconds per byte, as long as they fit at every moment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import DisjointSet

from autopar.sharding.problem.assemble import Costs, Floats, Pair

Choice = tuple[int, ...]
Near = Mapping[int, Sequence[tuple[int, Floats]]]
"""Node → (neighbour, seconds by own choice and the neighbour's)."""


def neighbours(edges: Mapping[Pair, Floats]) -> dict[int, list[tuple[int, Floats]]]:
    """Returns node → (neighbour, seconds by own choice and the neighbour's)."""
    found: dict[int, list[tuple[int, Floats]]] = {}
    for (a, b), matrix in edges.items():
        found.setdefault(a, []).append((b, matrix))
        found.setdefault(b, []).append((a, matrix.T))
    return found


def parts(lean: Choice, fast: Choice, near: Near, free: Mapping[int, object]) -> list[list[int]]:
    """Returns the connected parts in which two choices differ. free: nodes that adapt to the others."""
    differ = [i for i, (a, b) in enumerate(zip(lean, fast, strict=True)) if a != b and i not in free]
    joined = DisjointSet(differ)
    for i in differ:
        for j, matrix in near.get(i, ()):
            if j in joined and matrix.any():
                joined.merge(i, j)
    return [sorted(part) for part in joined.subsets()]


def saved(part: Sequence[int], now: Choice, fast: Choice, costs: Costs, near: Near, free: Near) -> float:
    """Returns seconds that a choice saves when a part of it changes to that of another, where nodes that are
    free adapt."""
    inside, adapting = {*part}, {j for i in part for j, _ in near.get(i, ()) if j in free}

    def at(i: int, changed: bool) -> int:
        return fast[i] if changed and i in inside else now[i]

    def seconds(changed: bool) -> float:
        total = 0.0
        for i in part:
            total += float(costs.nodes[i][at(i, changed)])
            for j, matrix in near.get(i, ()):
                if j not in adapting and (j not in inside or i < j):
                    total += float(matrix[at(i, changed), at(j, changed)])
        for k in adapting:
            own = costs.nodes[k].copy()
            for j, matrix in free[k]:
                own = own + matrix[:, at(j, changed)]
            total += float(own.min())
        return total

    return seconds(False) - seconds(True)


def filled(
    now: Choice,
    gains: Sequence[tuple[float, Sequence[int]]],
    fast: Choice,
    steps: Callable[[Choice, Sequence[int]], npt.NDArray[np.int64]],
    room: npt.NDArray[np.int64],
) -> list[Choice]:
    """Returns ever faster choices, each with one part more like `fast`, as far as bytes fit.

    Args:
        gains: (seconds saved, nodes) of every part. steps: gives the bytes over time of some nodes of a
            choice. room: bytes that are left over time.
    """
    worth: list[tuple[float, int]] = []
    more = [steps(fast, part) - steps(now, part) for _, part in gains]
    for k, (seconds, _) in enumerate(gains):
        if seconds > 0:
            worth.append((seconds / max(1.0, float(more[k].max())), k))
    found = [now]
    for _, k in sorted(worth, reverse=True):
        if (more[k] <= room).all():
            room = room - more[k]
            chosen = list(found[-1])
            for i in gains[k][1]:
                chosen[i] = fast[i]
            found.append(tuple(chosen))
    return found
