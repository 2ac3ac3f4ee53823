"""The definition, written as plainly as possible: what tests compare everything else with."""

import itertools
from collections.abc import Sequence

import numpy as np

from autopar_solver.problem import FORBIDDEN, ChoiceProblem, IntArray


def naive_cost(p: ChoiceProblem, x: Sequence[int]) -> int | None:
    """Returns the cost of a choice per node by the definition, or None if it is not feasible."""
    parts = [int(p.costs(i)[s]) for i, s in enumerate(x)]
    parts += [int(p.matrix(e)[x[a], x[b]]) for e, (a, b) in enumerate(p.edge_ends.tolist())]
    if any(part >= FORBIDDEN for part in parts):
        return None
    for t in range(len(p.limit)):
        used = 0
        for r, i in enumerate(p.item_node.tolist()):
            if p.item_interval[r, 0] <= t < p.item_interval[r, 1]:
                used += int(p.item_usage[p.item_start[r] + x[i]])
        if used > p.limit[t]:
            return None
    return sum(parts)


def brute_force(p: ChoiceProblem) -> int | None:
    """Returns the least cost over every choice, or None if none is feasible; for a few nodes only."""
    costs = (naive_cost(p, x) for x in itertools.product(*(range(k) for k in p.num_choices.tolist())))
    return min((c for c in costs if c is not None), default=None)


def tiny_problem(seed: int) -> ChoiceProblem:
    """Returns a random problem of up to six nodes and four choices: negative costs, forbidden entries,
    parallel edges and self-loops, dependent ends, sums, several usage items a node, limits that bind or
    can't be met.
    """
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 7))
    k = [int(size) for size in rng.integers(1, 5, n)]
    costs: list[IntArray] = [rng.integers(-5, 20, size) for size in k]
    for cost in costs:
        cost[rng.random(len(cost)) < 0.05] = FORBIDDEN
    edges = [(int(a), int(b)) for a, b in rng.integers(0, n, (int(rng.integers(0, 10)), 2)).tolist()]
    matrices = [tiny_matrix(rng, k[a], k[b]) for a, b in edges]
    usage = [[_item(rng, size) for _ in range(rng.integers(0, 3))] for size in k]
    limit = [None, 4, 7, 10, 14, 25][int(rng.integers(0, 6))]
    varies = limit is not None and rng.random() < 0.5
    return ChoiceProblem.build(
        costs, edges, matrices, usage, rng.integers(limit, limit + 5, 9) if varies and limit else limit
    )


def _item(rng: np.random.Generator, size: int) -> tuple[int, int, IntArray]:
    start, stop = sorted(int(v) for v in rng.integers(0, 9, 2))
    return start, stop, rng.integers(0, 6, size)


def tiny_matrix(rng: np.random.Generator, rows: int, columns: int) -> IntArray:
    """Returns a random edge matrix of one of the kinds presolve looks for."""
    m = rng.integers(-3, 20, (rows, columns))
    kind = rng.integers(0, 5)
    if kind == 0:
        return m
    if kind == 1:
        return np.where(np.arange(rows)[:, None] % columns == np.arange(columns), m, FORBIDDEN)
    if kind == 2:
        return np.where(rng.random(m.shape) < 0.3, FORBIDDEN, m)
    if kind == 3:
        return rng.integers(0, 9, (rows, 1)) + rng.integers(0, 9, (1, columns))
    function = np.full_like(m, FORBIDDEN)
    function[np.arange(rows), rng.integers(0, columns, rows)] = 3
    return function
