"""The mutable form of a choice problem that presolve works on: nodes, matrices in both directions, usage,
undo steps.

All costs are exact int64. INF marks what is forbidden; adding two entries never overflows, and BLOCKED lies
far enough below INF that a forbidden entry stays at or above it whatever negative costs are added to it.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from autopar_solver.problem import FORBIDDEN, ChoiceProblem, IntArray

INF = 2**61
BLOCKED = 2**60
Item = tuple[int, int, IntArray]


class InfeasibleProblem(Exception):
    """Raised inside presolve when it proves that no choice is feasible."""


class Matrix:
    """An immutable edge matrix with everything presolve asks about it, computed once.

    Edges with equal entries share one Matrix, so a question is answered once for all of them.
    """

    def __init__(self, m: IntArray) -> None:
        self.m = m

    @cached_property
    def flip(self) -> "Matrix":
        """The same edge seen from its other end."""
        other = Matrix(self.m.T)
        other.__dict__["flip"] = self
        return other

    @cached_property
    def row_ok(self) -> npt.NDArray[np.bool_]:
        """Which rows have an entry that isn't forbidden."""
        return self.m.min(axis=1) < BLOCKED

    @cached_property
    def function(self) -> IntArray | None:
        """The column each row determines, if every row has exactly one entry that isn't forbidden."""
        finite = self.m < BLOCKED
        return finite.argmax(axis=1) if (finite.sum(axis=1) == 1).all() else None

    @cached_property
    def split(self) -> tuple[IntArray, IntArray] | None:
        """(a, b) with m[s, t] = a[s] + b[t], if there is such a pair."""
        if self.m.max() >= BLOCKED:
            return None
        a = self.m[:, 0] - self.m[0, 0]
        return (a, self.m[0]) if (self.m == a[:, None] + self.m[:1]).all() else None

    def finite_share(self) -> float:
        """The share of entries that aren't forbidden; few say most, so they are asked first."""
        return self._finite_share

    @cached_property
    def _finite_share(self) -> float:
        return float((self.m < BLOCKED).mean())

    @cached_property
    def gain(self) -> IntArray:
        """[s, r]: the least that moving this end from s to r saves, whatever the other end is; -INF if it
        may break.

        Rows that are equal up to a constant are looked at once, equal columns too.
        """
        level = self.m.min(axis=1)
        rest = np.where(self.m < BLOCKED, self.m - level[:, None], INF)
        first, kind = distinct_rows(rest)
        rows = rest[first]
        if rows.shape[1] > 8:
            rows = rows[:, distinct_rows(rows.T)[0]]
        least = np.empty((len(rows), len(rows)), np.int64)
        for s in range(len(rows)):
            relevant = rows[:, rows[s] < BLOCKED]
            least[s] = (relevant[s] - relevant).min(axis=1, initial=INF)
        out = least[np.ix_(kind, kind)]
        return np.where(
            out < -BLOCKED, -INF, out + np.minimum(level, BLOCKED)[:, None] - np.minimum(level, BLOCKED)
        )

    def take(self, keep: npt.NDArray[np.bool_] | IntArray) -> "Matrix":
        """Returns the matrix with only these rows."""
        taken = Matrix(self.m[keep])
        if "gain" in self.__dict__:
            taken.__dict__["gain"] = self.gain[keep][:, keep]
        return taken

    def plus(self, other: "Matrix") -> "Matrix":
        """Returns the sum of two parallel edges."""
        return Matrix(np.minimum(self.m + other.m, INF))


def distinct_rows(m: npt.NDArray[np.generic]) -> tuple[IntArray, IntArray]:
    """Returns (index of one row of each kind, kind of every row); rows are compared byte by byte."""
    if m.shape[1] == 0:
        return np.zeros(1, np.int64), np.zeros(len(m), np.int64)
    whole = np.ascontiguousarray(m).view(np.dtype((np.void, m.shape[1] * m.itemsize))).ravel()
    _, first, kind = np.unique(whole, return_index=True, return_inverse=True)
    return first.astype(np.int64), kind.astype(np.int64).ravel()


@dataclass(frozen=True)
class Undo:
    """How a removed node's choice follows from its parents': value[pos(parent choices)].

    labels[p] lists the choices (numbered as in the problem) parent p still had then, ascending.
    """

    node: int
    parents: tuple[int, ...]
    labels: tuple[IntArray, ...]
    value: IntArray

    def apply(self, x: IntArray) -> None:
        """Sets the node's choice in x from its parents'."""
        own = [int(np.searchsorted(labels, int(x[p]))) for p, labels in zip(self.parents, self.labels)]
        at = tuple(own)
        x[self.node] = self.value[at]


@dataclass
class Network:
    """A choice problem being reduced. cap is the limit left per time segment (None: no limit at all)."""

    cost: list[IntArray]
    label: list[IntArray]
    adj: list[dict[int, Matrix]]
    items: list[list[Item]]
    cap: IntArray | None
    alive: npt.NDArray[np.bool_]
    const: int = 0
    undo: list[Undo] = field(default_factory=list[Undo])
    counts: dict[str, int] = field(default_factory=dict[str, int])

    def count(self, what: str, by: int = 1) -> None:
        """Counts a reduction, for the log."""
        self.counts[what] = self.counts.get(what, 0) + by

    def connect(self, a: int, b: int, matrix: Matrix) -> None:
        """Adds an edge, summing it with one already there."""
        if b in self.adj[a]:
            matrix = self.adj[a][b].plus(matrix)
            self.count("parallel edges merged")
        self.adj[a][b] = matrix
        self.adj[b][a] = matrix.flip

    def disconnect(self, a: int, b: int) -> None:
        """Drops the edge between two nodes."""
        del self.adj[a][b]
        del self.adj[b][a]

    def restrict(self, i: int, keep: npt.NDArray[np.bool_]) -> None:
        """Drops choices of a node."""
        if not keep.any():
            raise InfeasibleProblem(f"no choice of node {i} is left")
        self.cost[i] = self.cost[i][keep]
        self.label[i] = self.label[i][keep]
        self.items[i] = [(s, e, u[keep]) for s, e, u in self.items[i]]
        for j, matrix in self.adj[i].items():
            kept = matrix.take(keep)
            self.adj[i][j] = kept
            self.adj[j][i] = kept.flip

    def remove(self, i: int, parents: tuple[int, ...], value: IntArray) -> None:
        """Takes out a node whose choice is value[choices of its parents] (in today's numbering)."""
        self.undo.append(Undo(i, parents, tuple(self.label[p] for p in parents), self.label[i][value]))
        self.alive[i] = False
        self.adj[i] = {}
        self.items[i] = []

    def restore(self, x: IntArray) -> IntArray:
        """Returns the choice of every node of the problem, given x with the choices of the nodes still
        alive.
        """
        full = x.copy()
        for step in reversed(self.undo):
            step.apply(full)
        return full


def network_of(p: ChoiceProblem) -> Network:
    """Returns the network of a problem, before any reduction. Raises InfeasibleProblem if that is seen at a
    glance.
    """
    why = p.infeasible_at_once()
    if why:
        raise InfeasibleProblem(why)
    n = p.num_nodes
    cost = [
        np.minimum(c, INF)
        for c in np.split(np.where(p.node_cost >= FORBIDDEN, INF, p.node_cost), p.node_start[1:-1])
    ]
    items: list[list[Item]] = [list[Item]() for _ in range(n)]
    if len(p.limit):
        usages: list[IntArray] = np.split(p.item_usage, p.item_start[1:-1])
        for r, i in enumerate(p.item_node.tolist()):
            s, e = p.item_interval[r].tolist()
            if e > s:
                items[int(i)] += [(int(s), int(e), usages[r])]
    net = Network(
        cost if n else [],
        [np.arange(int(k), dtype=np.int64) for k in p.num_choices],
        [{} for _ in range(n)],
        items,
        p.limit.copy() if len(p.limit) else None,
        np.ones(n, np.bool_),
    )
    _add_edges(net, p)
    return net


def _add_edges(net: Network, p: ChoiceProblem) -> None:
    shared: dict[tuple[int, bytes], Matrix] = {}
    entries = np.where(p.edge_cost >= FORBIDDEN, INF, p.edge_cost)
    start, k = [int(v) for v in p.edge_start], [int(v) for v in p.num_choices]
    for e, ends in enumerate(p.edge_ends.tolist()):
        a, b = int(ends[0]), int(ends[1])
        flat = entries[start[e] : start[e + 1]]
        if a == b:
            net.cost[a] = np.minimum(net.cost[a] + flat.reshape(k[a], k[a]).diagonal(), INF)
            continue
        key = (k[a], flat.tobytes())
        matrix = shared.get(key)
        if matrix is None:
            matrix = shared[key] = Matrix(flat.reshape(k[a], k[b]))
        net.connect(a, b, matrix)
