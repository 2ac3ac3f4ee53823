"""Large-neighbourhood search under memory prices: a walker that cools down over its share of the time."""

import math
import time

import numpy as np

from autopar_solver.compact import Compact, FloatArray
from autopar_solver.kernels import Graph, energy, graph_of, memory_of, usage_of
from autopar_solver.problem import IntArray
from autopar_solver.search_kernels import search

CHUNK_SECONDS = 0.4
LARGEST_TREE, TREE_WORK = 400.0, 1e6
FIRST_WEIGHT, HEAVIER, LONG = 1.0, 1.5, 20


def penalised(c: Compact) -> Graph:
    """Returns the graph with forbidden entries replaced by a cost no feasible choice can make up for."""
    if np.isfinite(c.entry).all():
        return graph_of(c)
    low = np.minimum.reduceat(c.cost, c.off[:-1]).sum() + _edge_sums(c, np.inf, np.minimum)
    high = np.maximum.reduceat(c.cost, c.off[:-1]).sum() + _edge_sums(c, -np.inf, np.maximum)
    return graph_of(c, np.where(np.isfinite(c.entry), c.entry, min(2.0**50, 1.0 + high - low)))


def _edge_sums(c: Compact, fill: float, pick: np.ufunc) -> float:
    """The sum over edges of the smallest (or largest) entry that isn't forbidden."""
    if not len(c.eoff):
        return 0.0
    entries = np.where(np.isfinite(c.entry), c.entry, fill)
    return float(pick.reduceat(entries, c.eoff).sum() / 2)


def largest_tree(c: Compact) -> float:
    """Returns how many nodes a tree may have: fewer where tables are large, so that moves stay many."""
    table = (c.ncls * c.ncls[c.rev]).mean() if len(c.nbr) else 1.0
    return float(np.clip(TREE_WORK / table, 12.0, LARGEST_TREE))


class Walker:
    """One search trajectory. `chunk` makes moves for a moment; the best feasible choice met is kept in
    best_x.
    """

    def __init__(self, c: Compact, graph: Graph, x: IntArray, seed: int) -> None:
        self.c, self.g, self.mem = c, graph, memory_of(c)
        self.seed, self.chunks, self.moves, self.total_moves = seed, 0, 200, 0
        self.best, self.best_x = math.inf, x.copy()
        self.largest_tree = largest_tree(c)
        self.penalty = float(graph.entry[~np.isfinite(c.entry)].min(initial=math.inf))
        self.weight = FIRST_WEIGHT * float(c.cost.max()) / max(1.0, float(c.iu.max(initial=1.0)))
        self.move_to(x)

    def move_to(self, x: IntArray) -> None:
        """Continues from another choice."""
        self.x = x.copy()
        self.used = usage_of(self.mem, self.x)
        self.value = energy(self.g, self.c.cost, self.x)
        self.over = float(np.maximum(self.used - self.c.cap, 0.0).sum())
        self._keep(self.value if self.over <= 0 else math.inf, self.x)

    def restart(self, x: IntArray) -> None:
        """Starts again from a choice, feasible or not, as if nothing had been found before."""
        self.best, self.best_x = math.inf, x.copy()
        self.move_to(x)

    def chunk(self, price: FloatArray, temperature: float, moves: int | None = None) -> float:
        """Makes moves, as many as given or for about CHUNK_SECONDS; returns the best cost met so far."""
        began = time.perf_counter()
        seed = (self.seed * 1_000_003 + self.chunks) % 2**31
        self.value, self.over, best, best_x = search(
            self.g, self.c.cost, self.mem, price, self.x, self.used, self.value, self.over,
            moves or self.moves, self.largest_tree, seed, temperature, self._weigh(),
        )  # fmt: skip
        self._keep(best, best_x)
        self.chunks += 1
        self.total_moves += self.moves
        took = time.perf_counter() - began
        self.moves = int(
            np.clip(self.moves * np.clip(CHUNK_SECONDS / max(took, 1e-3), 0.3, 3.0), 50, 200_000)
        )
        return self.best

    def _weigh(self) -> float:
        """Returns what a unit of overuse costs in the next chunk; 0 keeps memory apart from cost.

        It is priced where memory can be kept only with forbidden pairs, or isn't for long: the price rises
        while memory is overused and falls while only forbidden pairs are left.
        """
        stuck = self.best >= self.penalty if math.isfinite(self.best) else self.chunks > LONG
        if not stuck:
            return 0.0
        self.weight *= HEAVIER if self.over > 0 else 1 / HEAVIER
        return self.weight

    def _keep(self, value: float, x: IntArray) -> None:
        if value < self.best:
            self.best, self.best_x = value, x.copy()
