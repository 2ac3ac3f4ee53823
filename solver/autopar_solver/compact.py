"""What presolve leaves, as flat arrays for the bounds, the search and HiGHS."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from autopar_solver.network import Network, distinct_rows
from autopar_solver.presolve_kernels import BLOCKED
from autopar_solver.problem import IntArray

FloatArray = npt.NDArray[np.float64]
SMALL_TABLE = 30


@dataclass(frozen=True, eq=False)
class Compact:
    """A reduced problem over nodes 0..n-1, each with at least two choices; inf marks what is forbidden.

    Rows of an edge matrix that are equal up to a constant are one class, columns likewise, and the constants
    are moved to the nodes: an edge costs table[class of one end's choice, class of the other's]. Matrices of
    real problems have few distinct rows, and all that walks over tables gains by it.

    Attributes:
        network: what it came from, to restore choices.
        nodes: (n,) the node of the problem each one stands for.
        const: cost already decided.
        k: (n,) choices per node. off: (n+1,) where they start in cost.
        cost: node costs.
        ptr: (n+1,) node i's half-edges are ptr[i]:ptr[i+1].
        nbr: per half-edge, the node at the other end. rev: the opposite half-edge.
        coff: per half-edge, where the classes of its owner's choices start in cls; ncls: how many classes.
        eoff: per half-edge, where its table (own classes x other's classes) starts in entry.
        entry: tables, every one stored in both directions.
        iptr: (n+1,) node i's usage pieces are iptr[i]:iptr[i+1]: segments ibeg:iend (disjoint within a node),
            usage per choice from iu[ioff].
        iu: usages. cap: (segments,) the limit left per segment.
    """

    network: Network
    nodes: IntArray
    const: int
    k: IntArray
    off: IntArray
    cost: FloatArray
    ptr: IntArray
    nbr: IntArray
    rev: IntArray
    coff: IntArray
    ncls: IntArray
    cls: IntArray
    eoff: IntArray
    entry: FloatArray
    iptr: IntArray
    ibeg: IntArray
    iend: IntArray
    ioff: IntArray
    iu: FloatArray
    cap: FloatArray

    @property
    def n(self) -> int:
        """The number of nodes."""
        return len(self.nodes)

    @property
    def segments(self) -> int:
        """The number of time segments whose limit can bind."""
        return len(self.cap)

    @cached_property
    def half_edge_node(self) -> IntArray:
        """The node every half-edge belongs to."""
        return np.repeat(np.arange(self.n), np.diff(self.ptr))

    @cached_property
    def edges(self) -> IntArray:
        """One half-edge of every edge, the one whose owner comes first."""
        return np.flatnonzero(self.half_edge_node < self.nbr)

    @cached_property
    def item_node(self) -> IntArray:
        """The node every usage piece belongs to."""
        return np.repeat(np.arange(self.n), np.diff(self.iptr))

    def table(self, e: int) -> FloatArray:
        """Returns the table of a half-edge, (own classes, other's classes)."""
        rows, columns = int(self.ncls[e]), int(self.ncls[self.rev[e]])
        return self.entry[self.eoff[e] : self.eoff[e] + rows * columns].reshape(rows, columns)

    def classes(self, e: int) -> IntArray:
        """Returns the class of each choice of a half-edge's owner."""
        return self.cls[self.coff[e] : self.coff[e] + self.k[self.half_edge_node[e]]]

    def usage(self, x: IntArray) -> FloatArray:
        """Returns the usage per segment of a choice per node."""
        used = self.iu[self.ioff + x[self.item_node]] if len(self.ioff) else self.iu
        steps = np.zeros(self.segments + 1)
        np.add.at(steps, self.ibeg, used)
        np.subtract.at(steps, self.iend, used)
        return np.cumsum(steps)[:-1]

    def restore(self, x: IntArray) -> IntArray:
        """Returns the choice of every node of the problem."""
        full = np.zeros(len(self.network.cost), np.int64)
        for i, node in enumerate(self.nodes):
            full[node] = self.network.label[node][x[i]]
        return self.network.restore(full)


@dataclass(frozen=True, eq=False)
class Classed:
    """m = row[:, None] + column[None, :] + table[row_class][:, column_class]."""

    table: FloatArray
    row_class: IntArray
    column_class: IntArray
    row: FloatArray
    column: FloatArray


def classed(m: FloatArray) -> Classed:
    """Returns a matrix by its row and column classes; small ones are left as they are."""
    rows, columns = int(m.shape[0]), int(m.shape[1])
    if m.size <= SMALL_TABLE:
        return Classed(m, np.arange(rows), np.arange(columns), np.zeros(rows), np.zeros(columns))
    row = m.min(axis=1)
    rest = m - row[:, None]
    column = rest.min(axis=0)
    rest = rest - column[None, :]
    first, row_class = distinct_rows(rest + 0.0)
    again, column_class = distinct_rows(rest[first].T + 0.0)
    return Classed(np.ascontiguousarray(rest[first][:, again]), row_class, column_class, row, column)


def compact(net: Network) -> Compact:
    """Returns the flat arrays of what is left of a network."""
    nodes = np.flatnonzero(net.alive).astype(np.int64)
    position = np.full(len(net.cost), -1, np.int64)
    position[nodes] = np.arange(len(nodes))
    cost = [net.cost[i].astype(np.float64) for i in nodes]
    known: dict[tuple[int, bytes], Classed] = {}
    sides: dict[tuple[int, int], tuple[FloatArray, IntArray]] = {}
    for a, i in enumerate(nodes):
        for j, matrix in net.adj[i].items():
            b = int(position[j])
            if b < a:
                continue
            m = np.where(matrix.m >= BLOCKED, np.inf, matrix.m.astype(np.float64))
            key = (m.shape[0], m.tobytes())
            edge = known[key] if key in known else known.setdefault(key, classed(m))
            cost[a] = cost[a] + edge.row
            cost[b] = cost[b] + edge.column
            sides[a, b] = edge.table, edge.row_class
            sides[b, a] = np.ascontiguousarray(edge.table.T), edge.column_class
    ends = np.array(sorted(sides), np.int64).reshape(-1, 2)
    halves = [sides[a, b] for a, b in ends.tolist()]
    rev = np.zeros(len(ends), np.int64)
    # Sorted by (owner, neighbour), half-edges read by (neighbour, owner) pair up with themselves in order.
    rev[np.lexsort((ends[:, 0], ends[:, 1]))] = np.arange(len(ends))
    items = [(i, *item) for i in nodes for item in net.items[i]]
    return Compact(
        network=net,
        nodes=nodes,
        const=net.const,
        k=np.array([len(c) for c in cost], np.int64),
        off=_starts([len(c) for c in cost]),
        cost=np.concatenate(cost) if cost else np.zeros(0),
        ptr=np.searchsorted(ends[:, 0], np.arange(len(nodes) + 1)),
        nbr=ends[:, 1].copy(),
        rev=rev,
        coff=_starts([len(kinds) for _, kinds in halves])[:-1],
        ncls=np.array([len(table) for table, _ in halves], np.int64),
        cls=np.concatenate([kinds for _, kinds in halves]) if halves else np.zeros(0, np.int64),
        eoff=_starts([table.size for table, _ in halves])[:-1],
        entry=np.concatenate([table.ravel() for table, _ in halves]) if halves else np.zeros(0),
        iptr=_starts([len(net.items[i]) for i in nodes]),
        ibeg=np.array([s for _, s, _, _ in items], np.int64),
        iend=np.array([e for _, _, e, _ in items], np.int64),
        ioff=_starts([len(u) for _, _, _, u in items])[:-1],
        iu=np.concatenate([u for _, _, _, u in items]).astype(np.float64) if items else np.zeros(0),
        cap=np.zeros(0) if net.cap is None else net.cap.astype(np.float64),
    )


def _starts(sizes: list[int]) -> IntArray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
