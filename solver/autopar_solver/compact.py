"""What presolve leaves, as flat arrays for the bounds, the search and HiGHS."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from autopar_solver.network import BLOCKED, Network
from autopar_solver.problem import IntArray

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Compact:
    """A reduced problem over nodes 0..n-1, each with at least two choices; inf marks what is forbidden.

    Attributes:
        nodes: (n,) the node of the problem each one stands for.
        const: cost already decided.
        k: (n,) choices per node. off: (n+1,) where they start in cost.
        cost: node costs.
        ptr: (n+1,) node i's half-edges are ptr[i]:ptr[i+1]; nbr: the node at the other end; rev: the opposite
            half-edge; eoff: where the half-edge's matrix (own choices x other's) starts in entry.
        entry: matrices, every one stored in both directions.
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
    def item_node(self) -> IntArray:
        """The node every usage piece belongs to."""
        return np.repeat(np.arange(self.n), np.diff(self.iptr))

    def matrix(self, e: int) -> FloatArray:
        """Returns the matrix of a half-edge, (own choices, other's choices)."""
        ki, kj = int(self.k[self.half_edge_node[e]]), int(self.k[self.nbr[e]])
        return self.entry[self.eoff[e] : self.eoff[e] + ki * kj].reshape(ki, kj)

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


def compact(net: Network) -> Compact:
    """Returns the flat arrays of what is left of a network."""
    nodes = np.flatnonzero(net.alive)
    position = np.full(len(net.cost), -1, np.int64)
    position[nodes] = np.arange(len(nodes))
    k = np.array([len(net.cost[i]) for i in nodes], np.int64)
    ptr, nbr, mats = [0], [], []
    for i in nodes:
        for j in sorted(net.adj[i]):
            nbr.append(position[j])
            mats.append(net.adj[i][j].m.ravel())
        ptr.append(len(nbr))
    owner = np.repeat(np.arange(len(nodes)), np.diff(ptr))
    neighbour = np.array(nbr, np.int64)
    rev = np.zeros(len(nbr), np.int64)
    # Sorted by (owner, neighbour), half-edges read by (neighbour, owner) pair up with themselves in order.
    rev[np.lexsort((owner, neighbour))] = np.arange(len(nbr))
    entry = np.concatenate(mats) if mats else np.zeros(0, np.int64)
    items = [(i, *item) for i in nodes for item in net.items[i]]
    return Compact(
        network=net,
        nodes=nodes,
        const=net.const,
        k=k,
        off=_starts([len(net.cost[i]) for i in nodes]),
        cost=np.concatenate([net.cost[i] for i in nodes]).astype(np.float64) if len(nodes) else np.zeros(0),
        ptr=np.array(ptr, np.int64),
        nbr=neighbour,
        rev=rev,
        eoff=_starts([m.size for m in mats])[:-1],
        entry=np.where(entry >= BLOCKED, np.inf, entry.astype(np.float64)),
        iptr=_starts([len(net.items[i]) for i in nodes]),
        ibeg=np.array([s for _, s, _, _ in items], np.int64),
        iend=np.array([e for _, _, e, _ in items], np.int64),
        ioff=_starts([len(u) for _, _, _, u in items])[:-1],
        iu=np.concatenate([u for _, _, _, u in items]).astype(np.float64) if items else np.zeros(0),
        cap=np.zeros(0) if net.cap is None else net.cap.astype(np.float64),
    )


def _starts(sizes: list[int]) -> IntArray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
