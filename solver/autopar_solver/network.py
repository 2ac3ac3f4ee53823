"""The mutable form of a choice problem that presolve works on: nodes, matrices in both directions, usage,
undo steps.

All costs are exact int64. INF marks what is forbidden; adding two entries never overflows, and BLOCKED lies
far enough below INF that a forbidden entry stays at or above it whatever negative costs are added to it.
"""

import weakref
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from autopar_solver.presolve_kernels import INF, gains, kinds_of_rows, row_facts, splits
from autopar_solver.problem import FORBIDDEN, ChoiceProblem, IntArray

Item = tuple[int, int, IntArray]


class InfeasibleProblem(Exception):
    """Raised inside presolve when it proves that no choice is feasible."""


class Matrix:
    """An immutable edge matrix with everything presolve asks about it, computed once.

    Edges with equal entries share one Matrix, so a question is answered once for all of them.
    """

    def __init__(self, m: IntArray, flipped: "weakref.ref[Matrix] | None" = None) -> None:
        self.m = m
        self._made_of = flipped  # weak: in a cycle, both would stay until the collector comes
        self._flip: Matrix | None = None

    @property
    def flip(self) -> "Matrix":
        """The same edge seen from its other end."""
        other = self._flip if self._made_of is None else self._made_of() or self._flip
        if other is None:
            other = self._flip = Matrix(np.ascontiguousarray(self.m.T), weakref.ref(self))
        return other

    @cached_property
    def _facts(self) -> tuple[npt.NDArray[np.bool_], IntArray, int]:
        return row_facts(self.m)

    @property
    def row_ok(self) -> npt.NDArray[np.bool_]:
        """Which rows have an entry that isn't forbidden."""
        return self._facts[0]

    @cached_property
    def all_ok(self) -> bool:
        """Whether every row has an entry that isn't forbidden."""
        return bool(self.row_ok.all())

    @property
    def function(self) -> IntArray | None:
        """The column each row determines, if every row has exactly one entry that isn't forbidden."""
        only = self._facts[1]
        return only if len(only) else None

    @cached_property
    def split(self) -> tuple[IntArray, IntArray] | None:
        """(a, b) with m[s, t] = a[s] + b[t], if there is such a pair."""
        return (self.m[:, 0] - self.m[0, 0], self.m[0]) if splits(self.m) else None

    def finite_share(self) -> float:
        """The share of entries that aren't forbidden; few say most, so they are asked first."""
        return self._facts[2] / self.m.size

    @cached_property
    def gain(self) -> IntArray:
        """[s, r]: the least that moving this end from s to r saves, whatever the other end is; -INF if it
        may break.
        """
        return gains(self.m)

    @cached_property
    def identity(self) -> bool:
        """Whether every row determines the column of its own number."""
        only = self._facts[1]
        return len(only) == self.m.shape[1] and bool((only == np.arange(len(only))).all())

    @cached_property
    def function_cost(self) -> IntArray:
        """What each row costs with the column it determines."""
        assert self.function is not None
        return self.m[np.arange(len(self.m)), self.function]

    def take(self, rows: IntArray) -> "Matrix":
        """Returns the matrix with these rows; the same one if asked again."""
        key = rows.tobytes()
        taken = self._taken.get(key)
        if taken is None:
            taken = self._taken[key] = Matrix(self.m[rows])
            if "gain" in self.__dict__:
                taken.__dict__["gain"] = np.ascontiguousarray(self.gain[rows][:, rows])
        return taken

    @cached_property
    def _taken(self) -> dict[bytes, "Matrix"]:
        return {}

    def plus(self, other: "Matrix") -> "Matrix":
        """Returns the sum of two parallel edges; the same one if asked again."""
        known = self._sums.get(id(other))
        if known is None:
            known = self._sums[id(other)] = (other, Matrix(np.minimum(self.m + other.m, INF)))
        return known[1]

    @cached_property
    def _sums(self) -> dict[int, tuple["Matrix", "Matrix"]]:
        return {}  # the summand is kept, so that its id isn't given to another


def distinct_rows(m: npt.NDArray[np.generic]) -> tuple[IntArray, IntArray]:
    """Returns (index of one row of each kind, kind of every row); rows are compared bit by bit."""
    return kinds_of_rows(np.ascontiguousarray(m).view(np.int64))


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
    """A choice problem being reduced.

    Attributes:
        cap: the limit left per time segment (None: no limit at all).
        current: a feasible choice per node that every reduction keeps representable, so that what is left can
            start from one no worse; None if there is none to keep.
    """

    cost: list[IntArray]
    label: list[IntArray]
    adj: list[dict[int, Matrix]]
    items: list[list[Item]]
    cap: IntArray | None
    alive: npt.NDArray[np.bool_]
    const: int = 0
    undo: list[Undo] = field(default_factory=list[Undo])
    counts: dict[str, int] = field(default_factory=dict[str, int])
    current: IntArray | None = None

    def follow(self, i: int, better: npt.NDArray[np.bool_], keep: npt.NDArray[np.bool_]) -> None:
        """Moves a node's current choice, if it is dropped, to one that stands in for it (better[s, r])."""
        if self.current is not None:
            s = int(np.searchsorted(self.label[i], int(self.current[i])))
            if not keep[s]:
                stands_in: IntArray = np.flatnonzero(better[s] & keep)
                self.current[i] = self.label[i][stands_in[0]]

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
        rows = np.flatnonzero(keep)
        for j, matrix in self.adj[i].items():
            kept = matrix.take(rows)
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
