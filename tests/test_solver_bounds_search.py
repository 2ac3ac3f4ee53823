"""Bounds are never above the optimum, the search never lies about what it found, sub-MILPs stay feasible."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar_solver import ChoiceProblem
from autopar_solver.bounds import Dual, on_grid
from autopar_solver.choice import Progress
from autopar_solver.compact import Compact, classed, compact
from autopar_solver.generate import dense_core, large_choices, random_sharding, small_core
from autopar_solver.large import large_route
from autopar_solver.milp import Exact
from autopar_solver.network import InfeasibleProblem, network_of
from autopar_solver.presolve import presolve
from autopar_solver.reference import brute_force, tiny_problem
from autopar_solver.run import Run
from autopar_solver.search import Walker, penalised
from autopar_solver.submilp import SubMilp, cost_of

SMALL_PROBLEMS = st.builds(tiny_problem, st.integers(0, 2**48))


def bare(p: ChoiceProblem) -> Compact | None:
    """The problem with only its inconsistent choices dropped, so that bounds and search have something to
    do.
    """
    from autopar_solver.presolve import drop_inconsistent
    from autopar_solver.timeline import compress_time

    class Todo:
        def push_neighbours(self, i: int) -> None:
            del i

    try:
        net = network_of(p)
        for _ in range(8):
            for i in range(p.num_nodes):
                drop_inconsistent(net, i, Todo())  # pyright: ignore[reportArgumentType]
        compress_time(net)
        for i in range(p.num_nodes):
            drop_inconsistent(net, i, Todo())  # pyright: ignore[reportArgumentType]
    except InfeasibleProblem:
        return None
    return compact(net)


@given(SMALL_PROBLEMS, st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_price_bounds_are_never_above_the_optimum(p: ChoiceProblem, steps: int):
    best, c = brute_force(p), bare(p)
    if best is None or c is None:
        return
    dual = Dual(c)
    for _ in range(steps):
        dual.climb(float(best), passes=1)
        assert dual.bound <= best


@given(SMALL_PROBLEMS, st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_the_walker_reports_true_costs_and_feasible_choices(p: ChoiceProblem, seed: int):
    best, c = brute_force(p), bare(p)
    if c is None:
        return
    walker = Walker(c, penalised(c), np.zeros(c.n, np.int64), seed)
    walker.chunk(np.ones(c.segments), 1.0, moves=60)
    full = c.restore(walker.best_x)
    if np.isfinite(walker.best):
        assert not any("more than the limit" in wrong for wrong in p.check(full))
    if np.isfinite(walker.best) and p.check(full) == []:
        assert best is not None and p.cost(full) == walker.best + c.const >= best
    if best is None:
        assert not np.isfinite(walker.best) or p.check(full) != []


@given(st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_classes_rebuild_the_matrix(seed: int):
    rng = np.random.default_rng(seed)
    m = rng.integers(0, 4, (rng.integers(1, 9), rng.integers(1, 9))).astype(float)
    m[rng.random(m.shape) < 0.1] = np.inf
    m = m[np.isfinite(m).any(axis=1)][:, np.isfinite(m[np.isfinite(m).any(axis=1)]).any(axis=0)]
    if m.size:
        e = classed(m)
        again = e.row[:, None] + e.column[None, :] + e.table[np.ix_(e.row_class, e.column_class)]
        assert np.array_equal(again, m)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_prices_on_the_grid_sum_exactly(prices: list[float]):
    grid = on_grid(np.array(prices))
    forward, backward = np.cumsum(grid)[-1], np.cumsum(grid[::-1])[-1]
    assert forward == backward and np.allclose(grid, prices, rtol=0, atol=1e-9 * max(1.0, sum(prices)))


@pytest.mark.parametrize("make, nodes", [(small_core, 400), (dense_core, 60), (large_choices, 15)])
def test_large_and_exact_routes_agree(make, nodes):
    p = make(nodes, seed=3)
    c = compact(presolve(p))
    exact = Exact(c, 60).run()
    assert exact.optimal and exact.x is not None
    best = p.cost(c.restore(exact.x))
    run = Run(p, 0.0, 0.0, 0, 0.0, 2, None)
    ticks = iter(range(10**9))
    run.seconds, run.elapsed = 300.0, lambda: float(next(ticks))  # a clock that ticks when it is read
    large_route(run, c)
    assert run.objective is not None and run.bound is not None and run.bound <= best <= run.objective
    assert run.index is not None and p.check(run.index) == [] and p.cost(run.index) == run.objective
    assert run.objective <= best * 1.02


def test_sub_milp_improves_a_poor_choice_and_stays_feasible():
    p = random_sharding(60, seed=5, mesh=(4, 2), resident=0.5, tightness=1.05, extra_edges=1.0)
    c = compact(presolve(p))
    walker = Walker(c, penalised(c), np.array([0] * c.n), 0)
    walker.chunk(np.full(c.segments, 1.0), 0.0, moves=200)
    assert np.isfinite(walker.best)
    patches, x = SubMilp(c, 0), walker.best_x
    before = cost_of(c, x)
    for _ in range(30):
        better = patches.improve(x, np.zeros(c.segments), 5.0, threading.Event())
        if better is not None:
            assert cost_of(c, better) < cost_of(c, x) and p.check(c.restore(better)) == []
            x = better
    exact = Exact(c, 60).run()
    assert exact.x is not None
    assert cost_of(c, exact.x) <= cost_of(c, x) <= before
    assert cost_of(c, x) <= cost_of(c, exact.x) * 1.05


def test_progress_gap():
    assert Progress(1.0, 100, 90, "x").gap == 0.1 and Progress(1.0, None, 90, "x").gap == float("inf")
