"""The choice problem as a cvxpy model, readable on its own, for any mixed-integer solver cvxpy knows.

It is built from the problem as given, without presolve, so it also checks the fast routes.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp  # pyright: ignore[reportMissingTypeStubs]

from autopar_solver.choice import Choice, relative_gap
from autopar_solver.errors import ProblemError
from autopar_solver.problem import FORBIDDEN, ChoiceProblem, IntArray


def options_of(solver: str, seconds: float) -> dict[str, Any]:
    """Returns the options that set a time limit and ask for a proof, where a solver's own names for them are
    known.
    """
    known: dict[str, dict[str, Any]] = {
        "HIGHS": {"time_limit": seconds, "mip_rel_gap": 0.0, "threads": 1},
        "CBC": {"maximumSeconds": seconds},
        "GUROBI": {"TimeLimit": seconds, "MIPGap": 0.0},
        "SCIP": {"scip_params": {"limits/time": seconds}},
    }
    return known.get(solver, {})


@dataclass(frozen=True, eq=False)
class CvxpyModel:
    """The cvxpy problem and its variable x, one boolean per choice of every node, laid out as node_cost."""

    problem: Any
    x: Any
    scale: float


def cvxpy_model(p: ChoiceProblem) -> CvxpyModel:
    """Returns min c.x + d.y over x[i,s] in {0,1}, y[e,s,t] >= 0, as written in the comments below.

    Raises:
        ProblemError: cvxpy isn't installed.
    """
    cp = _cvxpy()
    scale = max(1.0, float(p.node_cost[p.node_cost < FORBIDDEN].max(initial=1)) / 1e4)
    x = cp.Variable(max(1, len(p.node_cost)), boolean=True)
    owner = np.repeat(np.arange(p.num_nodes), p.num_choices)
    # Every node takes one choice, none that is forbidden.
    constraints = [_rows(owner, np.arange(len(owner)), 1.0, (p.num_nodes, x.size)) @ x == 1]
    blocked = np.flatnonzero(p.node_cost >= FORBIDDEN)
    if len(blocked):
        constraints.append(x[blocked] == 0)
    cost = np.where(p.node_cost >= FORBIDDEN, 0, p.node_cost) / scale
    objective = cost @ x
    e, s, t, pair_cost = _pairs(p)
    y = cp.Variable(max(1, len(pair_cost)), nonneg=True)
    if p.num_edges:
        objective = objective + (pair_cost / scale) @ y[: len(pair_cost)]
        for end, choice in ((0, s), (1, t)):
            # For every edge and every choice of this end: the pairs with it weigh as much as the choice
            # itself.
            node = p.edge_ends[:, end]
            first = np.concatenate([[0], np.cumsum(p.num_choices[node])])
            rows, columns = int(first[-1]), len(pair_cost)
            weight = _rows(first[e] + choice, np.arange(columns), 1.0, (rows, y.size))
            local = np.arange(rows) - np.repeat(first[:-1], p.num_choices[node])
            taken = _rows(
                np.arange(rows),
                np.repeat(p.node_start[node], p.num_choices[node]) + local,
                1.0,
                (rows, x.size),
            )
            constraints.append(weight @ y == taken @ x)
    if len(p.limit):
        # At every time step where something starts, what is alive fits.
        unit = max(1.0, float(p.limit.max()))
        usage, limit = _usage_rows(p, x.size)
        constraints.append((usage / unit) @ x <= limit / unit)
    return CvxpyModel(cp.Problem(cp.Minimize(objective), constraints), x, scale)


def solve_with_cvxpy(p: ChoiceProblem, seconds: float, solver: str = "HIGHS") -> Choice:
    """Returns the choice a mixed-integer solver finds through cvxpy; bound is proven only if it says
    "optimal".

    Args:
        p: the problem.
        seconds: time limit, passed on to solvers whose option for it is known (HiGHS, CBC, Gurobi, SCIP).
        solver: a name from cvxpy.installed_solvers().

    Raises:
        ProblemError: cvxpy or the solver isn't installed.
    """
    cp, began = _cvxpy(), time.monotonic()
    why = p.infeasible_at_once()
    if why:
        return Choice(None, None, None, math.inf, "infeasible", 0.0, (f"infeasible: {why}",))
    if solver not in cp.installed_solvers():
        raise ProblemError(f"cvxpy has no solver {solver!r} here; it has {', '.join(cp.installed_solvers())}")
    model = cvxpy_model(p)
    try:
        model.problem.solve(solver=solver, **options_of(solver, seconds))
    except cp.error.SolverError as error:
        return Choice(
            None, None, None, math.inf, "unknown", time.monotonic() - began, (f"{solver}: {error}",)
        )
    took, status = time.monotonic() - began, model.problem.status
    if status in ("infeasible", "infeasible_inaccurate"):
        return Choice(None, None, None, math.inf, "infeasible", took, (f"infeasible: {solver} proved it",))
    if model.x.value is None:
        return Choice(None, None, None, math.inf, "unknown", took, (f"{solver}: {status}",))
    index = np.array(
        [v.argmax() for v in np.split(model.x.value[: len(p.node_cost)], p.node_start[1:-1])], np.int64
    )
    if p.check(index):
        return Choice(None, None, None, math.inf, "unknown", took, (f"{solver}: {p.check(index)[0]}",))
    cost = p.cost(index)
    bound = cost if status == "optimal" else None
    state = "optimal" if status == "optimal" else "feasible"
    return Choice(index, cost, bound, relative_gap(cost, bound), state, took, (f"{solver}: {status}",))


def _cvxpy() -> Any:
    try:
        import cvxpy
    except ImportError:
        raise ProblemError('solver="cvxpy" needs cvxpy: pip install "autopar[cvxpy]"') from None
    return cvxpy


def _rows(row: IntArray, column: IntArray, value: float, shape: tuple[int, int]) -> Any:
    return sp.csr_matrix((np.full(len(row), value), (row, column)), shape=shape)


def _pairs(p: ChoiceProblem) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """(edge, choice of its first end, choice of its second end, cost) of every pair that isn't forbidden."""
    e = np.repeat(np.arange(p.num_edges), np.diff(p.edge_start))
    local = np.arange(len(p.edge_cost)) - p.edge_start[e]
    columns = p.num_choices[p.edge_ends[:, 1]][e]
    keep = p.edge_cost < FORBIDDEN
    return e[keep], (local // columns)[keep], (local % columns)[keep], p.edge_cost[keep]


def _usage_rows(p: ChoiceProblem, width: int) -> tuple[Any, IntArray]:
    """The usage at every time step where an item starts or stops, as rows over x, and the limits."""
    starts, stops = p.item_interval[:, 0], p.item_interval[:, 1]
    events = np.unique(np.concatenate([[0], starts, stops]))
    events = events[events < p.horizon]
    rows: list[IntArray] = []
    columns: list[IntArray] = []
    values: list[IntArray] = []
    for r, i in enumerate(p.item_node.tolist()):
        alive = np.flatnonzero((events >= starts[r]) & (events < stops[r]))
        k = int(p.num_choices[i])
        rows.append(np.repeat(alive, k))
        columns.append(np.tile(p.node_start[i] + np.arange(k), len(alive)))
        values.append(np.tile(p.item_usage[p.item_start[r] : p.item_start[r + 1]], len(alive)))
    each = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    limits = np.minimum.reduceat(p.limit, events) if len(events) else p.limit
    return sp.csr_matrix(each, shape=(len(events), width)), limits
