"""Smaller problems, presolved once more, to HiGHS: what sub-MILPs and core problems have in common.

With most nodes fixed or most choices left out, presolve starts again: matrices that were dense become
functions or sums, and most limits can't bind any more.
"""

import threading
from dataclasses import dataclass

import numpy as np

from autopar_solver.compact import Compact, FloatArray, compact
from autopar_solver.milp import Exact
from autopar_solver.network import InfeasibleProblem, Item, Matrix, Network
from autopar_solver.presolve import reduce_network
from autopar_solver.presolve_kernels import INF
from autopar_solver.problem import IntArray


def network_of_compact(c: Compact, x: IntArray | None = None) -> Network:
    """Returns a network of the same problem over nodes 0..n-1, without the constant.

    Costs above 2**53 were rounded on the way, so what comes of it must be judged by the problem itself.
    x: a feasible choice to keep representable.
    """
    items: list[list[Item]] = [list[Item]() for _ in range(c.n)]
    for q in range(len(c.item_node)):
        i = int(c.item_node[q])
        usage: IntArray = c.iu[c.ioff[q] : c.ioff[q] + c.k[i]].astype(np.int64)
        items[i] += [(int(c.ibeg[q]), int(c.iend[q]), usage)]
    net = Network(
        np.split(whole(c.cost), c.off[1:-1]),
        [np.arange(k, dtype=np.int64) for k in c.k.tolist()],
        [{} for _ in range(c.n)],
        items,
        c.cap.astype(np.int64) if c.segments else None,
        np.ones(c.n, np.bool_),
        current=None if x is None else x.copy(),
    )
    shared: dict[tuple[int, bytes], Matrix] = {}
    for e in c.edges.tolist():
        m = whole(c.table(e)[c.classes(e)][:, c.classes(int(c.rev[e]))])
        key = (len(m), m.tobytes())
        matrix = shared[key] if key in shared else shared.setdefault(key, Matrix(m))
        net.connect(int(c.half_edge_node[e]), int(c.nbr[e]), matrix)
    return net


def whole(costs: FloatArray) -> IntArray:
    """Returns costs as exact integers, INF where they are inf."""
    finite = np.isfinite(costs)
    return np.where(finite, np.rint(np.where(finite, costs, 0.0)).astype(np.int64), INF)


@dataclass(frozen=True)
class Answer:
    """What a smaller problem gave: a choice per node (None: nothing better than where it started), whether it
    was solved to the end, and how many columns it had after presolve."""

    x: IntArray | None
    optimal: bool
    columns: int


def solve_presolved(
    c: Compact,
    x: IntArray | None,
    seconds: float,
    seed: int,
    most_columns: int,
    stop: threading.Event | None = None,
) -> Answer:
    """Returns the best choice HiGHS finds for a small problem after presolve, starting from x, if given.

    Nothing is tried if presolve leaves more than most_columns.
    """
    try:
        small = compact(reduce_network(network_of_compact(c, x)))
    except InfeasibleProblem:
        return Answer(None, True, 0)
    if small.n == 0:
        return Answer(small.restore(small.nodes), True, 0)
    columns = size_of(small)
    if columns > most_columns:
        return Answer(None, False, columns)
    exact = Exact(small, seconds, seed, 1e-6)
    if stop is not None:
        exact.stopped = stop
    outcome = exact.run(None if x is None else start_of(small))
    found = None if outcome.x is None else small.restore(outcome.x)
    return Answer(found, outcome.optimal or outcome.infeasible, columns)


def start_of(small: Compact) -> IntArray:
    """Returns the current choice of a reduced network as an index per node left."""
    current = small.network.current
    assert current is not None
    start = np.zeros(small.n, np.int64)
    for a, i in enumerate(small.nodes.tolist()):
        label = small.network.label[int(i)]
        start[a] = np.searchsorted(label, current[int(i)])
        assert label[start[a]] == current[int(i)]
    return start


def size_of(c: Compact) -> int:
    """Returns how many columns the integer program of a problem has, at most."""
    return len(c.cost) + int((c.ncls * c.ncls[c.rev]).sum()) // 2
