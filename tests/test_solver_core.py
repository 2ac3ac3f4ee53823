"""Smaller problems presolved once more: starts survive, costs never rise, wide cores hold the optimum."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autopar_solver import ChoiceProblem
from autopar_solver.bounds import Dual
from autopar_solver.compact import Compact, compact
from autopar_solver.core import CoreSearch, excess_costs
from autopar_solver.generate import dense_core
from autopar_solver.network import InfeasibleProblem, network_of
from autopar_solver.presolve import presolve, reduce_network
from autopar_solver.presolve_kernels import BLOCKED, INF, gains, kinds_of_rows, row_facts, splits
from autopar_solver.reference import brute_force, tiny_problem
from autopar_solver.represolve import network_of_compact, solve_presolved, start_of
from autopar_solver.search import Walker, penalised
from autopar_solver.submilp import cost_of

SMALL_PROBLEMS = st.builds(tiny_problem, st.integers(0, 2**48))
EXAMPLES = settings(max_examples=150, deadline=None)
MATRICES = st.builds(
    lambda rows, columns, seed: (
        np.random.default_rng(seed).choice([0, 1, 2, 5, INF], (rows, columns), p=[0.3, 0.2, 0.2, 0.1, 0.2])
        + np.random.default_rng(seed + 1).integers(0, 3, (rows, 1))
    ),
    st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32),
)  # fmt: skip


def a_choice(p: ChoiceProblem) -> tuple[Compact, np.ndarray]:
    """A problem that wasn't reduced, and a feasible choice of it; other problems are passed over."""
    try:
        c = compact(network_of(p))
    except InfeasibleProblem:
        assume(False)
        raise AssertionError from None
    assume(c.n > 0)
    walker = Walker(c, penalised(c), np.zeros(c.n, np.int64), 0)
    walker.chunk(np.zeros(c.segments), 0.0, 200)
    assume(math.isfinite(walker.best) and cost_of(c, walker.best_x) < BLOCKED)
    return c, walker.best_x


@given(SMALL_PROBLEMS)
@EXAMPLES
def test_reductions_keep_a_start_no_worse(p: ChoiceProblem):
    c, x = a_choice(p)
    small = compact(reduce_network(network_of_compact(c, x)))
    kept = small.restore(start_of(small) if small.n else small.nodes)
    assert cost_of(c, kept) <= cost_of(c, x) and (c.usage(kept) <= c.cap).all()


@given(SMALL_PROBLEMS)
@EXAMPLES
def test_a_problem_presolved_once_more_gives_the_optimum(p: ChoiceProblem):
    c, x = a_choice(p)
    answer = solve_presolved(c, x, 20, 0, 10**6)
    assert answer.optimal and answer.x is not None
    assert cost_of(c, answer.x) == brute_force(p) and (c.usage(answer.x) <= c.cap).all()


@given(SMALL_PROBLEMS)
@EXAMPLES
def test_a_core_as_wide_as_the_gap_holds_the_optimum(p: ChoiceProblem):
    c, x = a_choice(p)
    best = brute_force(p)
    assert best is not None
    dual = Dual(c)
    dual.evaluate(3)
    cores = CoreSearch(c, excess_costs(dual), 0)
    for _ in range(12):
        cores.reach = max(cores.reach, 1.0)
        better = cores.improve(x, max(1.0, cost_of(c, x) - dual.bound), 20)
        if better is not None:
            assert cost_of(c, better) < cost_of(c, x) and (c.usage(better) <= c.cap).all()
            x = better
    cores.excess[:] = 0.0
    cores.proven = 0.0
    found = cores.improve(x, 1.0, 20)
    assert cost_of(c, x if found is None else found) == best


def test_cores_improve_a_large_problem():
    c = compact(presolve(dense_core(200, seed=3)))
    dual = Dual(c)
    for _ in range(60):
        dual.climb(math.inf)
    dual.price = dual.best_price
    dual.evaluate(5)
    walker = Walker(c, penalised(c), dual.x, 0)
    walker.chunk(dual.best_price, 0.0, 3000)
    assert math.isfinite(walker.best)
    cores, x = CoreSearch(c, excess_costs(dual), 0), walker.best_x
    for _ in range(6):
        better = cores.improve(x, cost_of(c, x) - dual.bound, 5)
        x = x if better is None else better
    assert (c.usage(x) <= c.cap).all() and dual.bound <= cost_of(c, x) <= cost_of(c, walker.best_x)
    assert cores.tried > 0 and cores.columns > 0


@given(MATRICES)
@settings(max_examples=300, deadline=None)
def test_compiled_facts_follow_their_definition(m: np.ndarray):
    finite = m < BLOCKED
    ok, only, count = row_facts(m)
    assert (ok == finite.any(axis=1)).all() and count == finite.sum()
    assert (len(only) > 0) == bool((finite.sum(axis=1) == 1).all())
    assert not len(only) or (only == finite.argmax(axis=1)).all()
    additive = finite.all() and (m == m[:, :1] + m[:1] - m[0, 0]).all()
    assert splits(m) == additive
    first, kind = kinds_of_rows(m)
    assert (m[first][kind] == m).all() and len(first) == len(np.unique(m, axis=0))


@given(MATRICES)
@settings(max_examples=300, deadline=None)
def test_gains_follow_their_definition(m: np.ndarray):
    finite = m < BLOCKED
    got = gains(m)
    for s in range(len(m)):
        for r in range(len(m)):
            where = finite[s]
            if not where.any():
                continue  # s itself may not be taken: nothing is asked of it
            if not finite[r][where].all():
                assert got[s, r] == -INF
            else:
                assert got[s, r] == (m[s] - m[r])[where].min()


@pytest.mark.parametrize("seconds", [5])
def test_too_many_columns_are_left_alone(seconds: float):
    c = compact(presolve(dense_core(60, seed=1)))
    walker = Walker(c, penalised(c), np.zeros(c.n, np.int64), 0)
    walker.chunk(np.zeros(c.segments), 0.0, 2000)
    answer = solve_presolved(c, walker.best_x, seconds, 0, 1)
    assert answer.x is None and not answer.optimal and answer.columns > 1
