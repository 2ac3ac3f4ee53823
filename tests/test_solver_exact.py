"""Small random choice problems against brute force: optimum, infeasibility, bounds, presolve's inverse."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar_solver import ChoiceProblem, solve
from autopar_solver.network import InfeasibleProblem, Network
from autopar_solver.presolve import presolve
from autopar_solver.presolve_kernels import BLOCKED
from autopar_solver.reference import brute_force, naive_cost, tiny_problem
from autopar_solver.timeline import binding_segments, spread

EXAMPLES = settings(max_examples=300, deadline=None)


SMALL_PROBLEMS = st.builds(tiny_problem, st.integers(0, 2**48))


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


@given(SMALL_PROBLEMS)
@EXAMPLES
def test_solve_finds_the_optimum_or_proves_there_is_none(p: ChoiceProblem):
    best = brute_force(p)
    got = solve(p, seconds=20)
    if best is None:
        assert got.status == "infeasible" and got.index is None
    else:
        assert got.status == "optimal" and got.objective == best == got.bound
        assert got.index is not None and naive_cost(p, tuple(got.index)) == best and p.check(got.index) == []


@given(SMALL_PROBLEMS)
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


@given(SMALL_PROBLEMS, st.integers(0, 2**32))
@EXAMPLES
def test_cost_usage_and_check_follow_the_definition(p: ChoiceProblem, seed: int):
    x = np.random.default_rng(seed).integers(0, p.num_choices)
    expected = naive_cost(p, tuple(x))
    assert (p.check(x) == []) == (expected is not None)
    if expected is not None:
        assert p.cost(x) == expected


@given(st.integers(0, 2**48))
@settings(max_examples=500, deadline=None)
def test_kept_segments_decide_what_all_time_steps_decide(seed: int):
    rng = np.random.default_rng(seed)
    horizon, q = int(rng.integers(1, 12)), int(rng.integers(1, 8))
    span = np.sort(rng.integers(0, horizon + 1, (q, 2)), axis=1)
    most, cap = rng.integers(1, 9, q), rng.integers(0, 20, horizon)
    position, caps = binding_segments(span[:, 0], span[:, 1], most, cap)
    for _ in range(20):
        amount = rng.integers(0, most + 1)
        fits = bool((spread(span[:, 0], span[:, 1], amount, horizon) <= cap).all())
        first, last = position[span[:, 0]], position[span[:, 1]]
        assert fits == bool((spread(first, last, amount, len(caps)) <= caps).all())
