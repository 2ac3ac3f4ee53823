"""Small random choice problems against brute force: optimum, infeasibility, bounds, presolve's inverse."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar_solver import FORBIDDEN, ChoiceProblem, solve
from autopar_solver.network import BLOCKED, InfeasibleProblem, Network
from autopar_solver.presolve import presolve

EXAMPLES = settings(max_examples=300, deadline=None)


@st.composite
def small_problems(draw: st.DrawFn) -> ChoiceProblem:
    """Up to six nodes with up to four choices; forbidden entries, dependent ends, sums, memory that binds."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n = draw(st.integers(1, 6))
    k = [draw(st.integers(1, 4)) for _ in range(n)]
    costs = [rng.integers(-5, 20, size) for size in k]
    for cost in costs:
        cost[rng.random(len(cost)) < 0.08] = 0
        cost[rng.random(len(cost)) < 0.05] = FORBIDDEN
    edges, matrices = [], []
    for _ in range(draw(st.integers(0, 9))):
        a, b = (int(v) for v in rng.integers(0, n, 2))
        edges.append((a, b))
        matrices.append(
            random_matrix(
                rng, k[a], k[b], draw(st.sampled_from(["plain", "equal", "holes", "sum", "function"]))
            )
        )
    usage = [
        [
            (*sorted(int(v) for v in rng.integers(0, 9, 2)), rng.integers(0, 6, size))
            for _ in range(rng.integers(0, 3))
        ]
        for size in k
    ]
    limit = draw(st.sampled_from([None, 4, 7, 10, 14, 25]))
    if limit is not None and draw(st.booleans()):
        limit = rng.integers(limit, limit + 5, 9)
    return ChoiceProblem.build(costs, edges, matrices, usage, limit)


def random_matrix(rng: np.random.Generator, rows: int, columns: int, kind: str) -> np.ndarray:
    m = rng.integers(-3, 20, (rows, columns))
    if kind == "equal":
        m = np.where(np.arange(rows)[:, None] % columns == np.arange(columns), m, FORBIDDEN)
    elif kind == "holes":
        m[rng.random(m.shape) < 0.3] = FORBIDDEN
    elif kind == "sum":
        m = rng.integers(0, 9, (rows, 1)) + rng.integers(0, 9, (1, columns))
    elif kind == "function":
        m = np.full_like(m, FORBIDDEN)
        m[np.arange(rows), rng.integers(0, columns, rows)] = 3
    return m


def naive_cost(p: ChoiceProblem, x: tuple[int, ...]) -> int | None:
    """The cost by the definition, or None where x is not feasible."""
    parts = [int(p.costs(i)[s]) for i, s in enumerate(x)]
    parts += [int(p.matrix(e)[x[a], x[b]]) for e, (a, b) in enumerate(p.edge_ends)]
    if any(part >= FORBIDDEN for part in parts):
        return None
    for t in range(len(p.limit)):
        alive = [
            int(p.item_usage[p.item_start[r] + x[i]])
            for r, i in enumerate(p.item_node)
            if p.item_interval[r, 0] <= t < p.item_interval[r, 1]
        ]
        if sum(alive) > p.limit[t]:
            return None
    return sum(parts)


def brute_force(p: ChoiceProblem) -> int | None:
    costs = (naive_cost(p, x) for x in itertools.product(*(range(k) for k in p.num_choices)))
    return min((c for c in costs if c is not None), default=None)


def left_over(net: Network) -> list[tuple[np.ndarray, int]]:
    """Every choice of what presolve left, restored, with the cost the network gives it."""
    alive = np.flatnonzero(net.alive)
    found = []
    for picks in itertools.product(*(range(len(net.cost[i])) for i in alive)):
        chosen = dict(zip(alive.tolist(), picks))
        cost = net.const + sum(int(net.cost[i][s]) for i, s in chosen.items())
        edges = [int(m.m[s, chosen[j]]) for i, s in chosen.items() for j, m in net.adj[i].items() if i < j]
        if all(e < BLOCKED for e in edges):
            x = np.zeros(len(net.cost), np.int64)
            for i, s in chosen.items():
                x[i] = net.label[i][s]
            found.append((net.restore(x), cost + sum(edges)))
    return found


@given(small_problems())
@EXAMPLES
def test_solve_finds_the_optimum_or_proves_there_is_none(p: ChoiceProblem):
    best = brute_force(p)
    got = solve(p, seconds=20)
    if best is None:
        assert got.status == "infeasible" and got.index is None
    else:
        assert got.status == "optimal" and got.objective == best == got.bound
        assert got.index is not None and naive_cost(p, tuple(got.index)) == best and p.check(got.index) == []


@given(small_problems())
@EXAMPLES
def test_presolve_keeps_an_optimum_and_restores_costs_exactly(p: ChoiceProblem):
    best = brute_force(p)
    try:
        net = presolve(p)
    except InfeasibleProblem:
        assert best is None
        return
    restored = [naive_cost(p, tuple(x)) for x, cost in left_over(net) if p.cost(x) == cost]
    assert len(restored) == len(left_over(net))
    assert min((c for c in restored if c is not None), default=None) == best


@given(small_problems(), st.integers(0, 2**32))
@EXAMPLES
def test_cost_usage_and_check_follow_the_definition(p: ChoiceProblem, seed: int):
    x = np.random.default_rng(seed).integers(0, p.num_choices)
    expected = naive_cost(p, tuple(x))
    assert (p.check(x) == []) == (expected is not None)
    if expected is not None:
        assert p.cost(x) == expected
