"""Presolve: exact reductions to a fixpoint, with an exact inverse.

Every reduction keeps at least one optimal choice, and `Network.restore` turns a choice of what is left into
a choice of the problem with the same cost and a usage no larger where it matters. Sources: arc consistency
(Mackworth 1977), dead-end elimination (Goldstein 1994) restricted to choices that use no more memory, bucket
elimination (Dechter 1999).
"""

import gc
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np

from autopar_solver.network import InfeasibleProblem, Matrix, Network, network_of
from autopar_solver.presolve_kernels import BLOCKED, INF, narrow_dominance, start_dominance, undominated
from autopar_solver.problem import ChoiceProblem, IntArray
from autopar_solver.timeline import compress_time, profile

MANY_NEIGHBOURS = 40
DOMINANCE_WORK = 40_000_000
ELIMINATION_WORK = 2_000_000


def presolve(problem: ChoiceProblem, rounds: int = 20) -> Network:
    """Returns the network left when no reduction applies any more.

    Args:
        problem: the problem; it isn't changed.
        rounds: how often the memory segments are compressed and the graph reduced again, at most.

    Raises:
        InfeasibleProblem: presolve proved that there is no feasible choice; the message says why.
    """
    with collector_paused():
        return reduce_network(network_of(problem), rounds)


@contextmanager
def collector_paused() -> Generator[None, None, None]:
    """Keeps Python from looking for cycles again and again among the many small objects made meanwhile."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def reduce_network(net: Network, rounds: int = 20) -> Network:
    """Returns the network, reduced in place until no reduction applies; see presolve for the rest."""
    todo = _Queue(net)
    compress_time(
        net
    )  # before contraction cuts usage into pieces, most segments are seen to lie within others
    while todo:  # without dominance first: most nodes go by cheaper means
        reduce_node(net, todo.pop(), todo, cheaply=True)
    todo.push_all()
    for _ in range(rounds):
        changed = compress_time(net)
        for i in changed:
            todo.push(i)
        if not todo:
            break
        while todo:
            reduce_node(net, todo.pop(), todo)
    return net


class _Queue:
    """Nodes to look at again; those with many neighbours wait until the cheap ones are done."""

    def __init__(self, net: Network) -> None:
        self.net = net
        self.near: deque[int] = deque(range(len(net.cost)))
        self.far: deque[int] = deque()
        self.queued = np.ones(len(net.cost), np.bool_)

    def push(self, i: int) -> None:
        if self.net.alive[i] and not self.queued[i]:
            self.queued[i] = True
            (self.far if len(self.net.adj[i]) > MANY_NEIGHBOURS else self.near).append(i)

    def push_all(self) -> None:
        for i in np.flatnonzero(self.net.alive).tolist():
            self.push(i)

    def push_neighbours(self, i: int) -> None:
        for j in self.net.adj[i]:
            self.push(j)

    def pop(self) -> int:
        i = (self.near or self.far).popleft()
        self.queued[i] = False
        return i

    def __bool__(self) -> bool:
        return bool(self.near or self.far)


def reduce_node(net: Network, i: int, todo: _Queue, cheaply: bool = False) -> None:
    """Applies to one node every reduction that fits, and queues the nodes this may have opened up.

    cheaply: leaves out dominance and elimination.
    """
    if not net.alive[i]:
        return
    drop_inconsistent(net, i, todo)
    split_edges(net, i, todo)
    if len(net.cost[i]) == 1:
        fold(net, i, todo)
        return
    absorb_dependents(net, i, todo)
    if cheaply or todo.queued[i]:  # it absorbed something: look at it again from the start
        return
    drop_dominated(net, i, todo)
    if not net.items[i] and len(net.adj[i]) <= 2:
        eliminate(net, i, todo)


def drop_inconsistent(net: Network, i: int, todo: _Queue) -> None:
    """Drops choices that are forbidden or compatible with no choice of some neighbour."""
    partly = [matrix.row_ok for matrix in net.adj[i].values() if not matrix.all_ok]
    if not partly and net.cost[i].max() < BLOCKED:
        return
    ok = net.cost[i] < BLOCKED
    for row_ok in partly:
        ok = ok & row_ok
    if not ok.all():
        net.count("choices inconsistent", int((~ok).sum()))
        net.restrict(i, ok)
        todo.push_neighbours(i)


def split_edges(net: Network, i: int, todo: _Queue) -> None:
    """Replaces an edge whose matrix is a sum of a row term and a column term by node costs."""
    for j in list(net.adj[i]):
        split = net.adj[i][j].split
        if split is not None:
            net.cost[i] = np.minimum(net.cost[i] + split[0], INF)
            net.cost[j] = np.minimum(net.cost[j] + split[1], INF)
            net.disconnect(i, j)
            net.count("edges split")
            todo.push(j)


def fold(net: Network, i: int, todo: _Queue) -> None:
    """Takes out a node with one choice: its costs become constant or its neighbours', its usage lowers the
    caps.
    """
    for j, matrix in list(net.adj[i].items()):
        net.cost[j] = np.minimum(net.cost[j] + matrix.m[0], INF)
        net.disconnect(i, j)
        todo.push(j)
    if net.items[i]:
        assert net.cap is not None
        for s, e, u in net.items[i]:
            net.cap[s:e] -= u[0]
    net.const += int(net.cost[i][0])
    net.count("nodes folded")
    net.remove(i, (), np.array(0))


def absorb_dependents(net: Network, i: int, todo: _Queue) -> None:
    """Merges into i every neighbour whose choice is a function of i's (all other pairs are forbidden)."""
    for j in list(net.adj[i]):
        if j not in net.adj[i]:
            continue
        matrix = net.adj[i][j]
        f = matrix.function
        if f is None:
            continue
        if matrix.flip.function is not None and len(net.adj[j]) > len(net.adj[i]):
            todo.push(j)  # each determines the other: the one with more neighbours absorbs
            continue
        same = matrix.identity
        cost = net.cost[j] if same else net.cost[j][f]
        net.cost[i] = np.minimum(net.cost[i] + cost + matrix.function_cost, INF)
        net.items[i] = net.items[i] + (net.items[j] if same else [(s, e, u[f]) for s, e, u in net.items[j]])
        net.disconnect(i, j)
        for h, other in list(net.adj[j].items()):
            net.disconnect(j, h)
            net.connect(i, h, other if same else other.take(f))
            todo.push(h)
        net.count("nodes contracted")
        net.remove(j, (i,), f)
        todo.push(i)


def drop_dominated(net: Network, i: int, todo: _Queue) -> None:
    """Drops a choice if another never costs more, whatever the neighbours take, and never uses more
    memory.
    """
    k = len(net.cost[i])
    work = k * k * (1 + sum(min(m.m.shape[1], 256) for m in net.adj[i].values()))
    if k == 1 or work > DOMINANCE_WORK:
        return
    usage = profile(net.items[i])[2] if net.items[i] else np.zeros((0, k), np.int64)
    better, saves, some = start_dominance(net.cost[i], usage)
    for matrix in sorted(net.adj[i].values(), key=Matrix.finite_share):
        if not some:
            return
        some = narrow_dominance(better, saves, matrix.gain)
    keep, dropped = undominated(better, saves)
    if not dropped:
        return
    net.count("choices dominated", dropped)
    net.follow(i, better, keep)
    net.restrict(i, keep)
    todo.push(i)
    todo.push_neighbours(i)


def eliminate(net: Network, i: int, todo: _Queue) -> None:
    """Takes out a node without memory and with at most two neighbours: their edge carries its best cost."""
    others = tuple(net.adj[i])
    if len(others) == 0:
        net.const += int(net.cost[i].min())
        net.remove(i, (), np.array(net.cost[i].argmin()))
    elif len(others) == 1:
        (j,) = others
        table = np.minimum(net.cost[i][:, None] + net.adj[i][j].m, INF)
        net.disconnect(i, j)
        net.cost[j] = np.minimum(net.cost[j] + table.min(axis=0), INF)
        net.remove(i, others, table.argmin(axis=0))
        todo.push(j)
    else:
        j, h = others
        ki, kj, kh = len(net.cost[i]), len(net.cost[j]), len(net.cost[h])
        if ki * kj * kh > ELIMINATION_WORK or (kj * kh > 2 * ki * (kj + kh) and h not in net.adj[j]):
            return
        best, arg = best_between(net.cost[i], net.adj[i][j].m, net.adj[i][h].m)
        net.disconnect(i, j)
        net.disconnect(i, h)
        net.remove(i, others, arg)
        net.connect(j, h, Matrix(best))
        todo.push(j)
        todo.push(h)
    net.count("nodes eliminated")


def best_between(cost: IntArray, left: IntArray, right: IntArray) -> tuple[IntArray, IntArray]:
    """Returns (min, argmin) over s of cost[s] + left[s, a] + right[s, b] for every pair (a, b)."""
    first = np.minimum(cost[:, None] + left, INF)
    best = np.full((left.shape[1], right.shape[1]), INF, np.int64)
    arg = np.zeros(best.shape, np.int64)
    for s in range(len(cost)):
        here = first[s][:, None] + right[s][None, :]
        better = here < best
        np.copyto(best, here, where=better)
        arg[better] = s
    return best, arg


__all__ = ["InfeasibleProblem", "presolve", "reduce_network"]
