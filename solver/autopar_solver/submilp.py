"""Sub-MILP neighbourhoods: some nodes are freed, the rest fixed, and HiGHS finds the best for all of them at
once.

Tightly coupled nodes with many choices under a tight limit cannot be improved one tree at a time: several
must trade memory among themselves. Which nodes are freed alternates between a connected patch of the graph
and nodes that are alive at one tight moment (neighbourhoods in the sense of Rothberg 2007 and Danna et al.
2005, chosen by structure).
"""

import math
import threading
from dataclasses import replace

import numpy as np

from autopar_solver.compact import Compact, FloatArray
from autopar_solver.problem import IntArray
from autopar_solver.represolve import solve_presolved

LARGEST, FEWEST = 4000.0, 5
SPREAD = 30.0
FIRST_BUDGET, BUDGETS = 5_000.0, (200.0, 1e8)
GROW, SHRINK = 1.2, 0.8
IMPATIENT, MOST_PATIENCE = 20, 6.0


def restricted(c: Compact, free: IntArray, x: IntArray) -> Compact:
    """Returns the problem of the nodes in `free` (ascending) alone, all others fixed at x; const is left at
    0.
    """
    place = np.full(c.n, -1, np.int64)
    place[free] = np.arange(len(free))
    cost = [c.cost[c.off[i] : c.off[i + 1]].copy() for i in free]
    kept: list[int] = []
    for a, i in enumerate(free.tolist()):
        for e in range(int(c.ptr[i]), int(c.ptr[i + 1])):
            j = int(c.nbr[e])
            if place[j] >= 0:
                kept.append(e)
            else:
                column = c.classes(int(c.rev[e]))[x[j]]
                cost[a] = cost[a] + c.table(e)[c.classes(e), column]
    half = np.array(kept, np.int64)
    new_half = np.full(len(c.nbr), -1, np.int64)
    new_half[half] = np.arange(len(half))
    pieces = np.flatnonzero(place[c.item_node] >= 0) if len(c.ioff) else np.zeros(0, np.int64)
    fixed = x.copy()
    used = c.usage(fixed)
    own = c.iu[c.ioff[pieces] + x[c.item_node[pieces]]]
    steps = np.zeros(c.segments + 1)
    np.add.at(steps, c.ibeg[pieces], own)
    np.subtract.at(steps, c.iend[pieces], own)
    owner = place[c.half_edge_node[half]]
    return replace(
        c,
        nodes=c.nodes[free],
        const=0,
        k=c.k[free],
        off=np.concatenate([[0], np.cumsum(c.k[free])]).astype(np.int64),
        cost=np.concatenate(cost),
        ptr=np.searchsorted(owner, np.arange(len(free) + 1)),
        nbr=place[c.nbr[half]],
        rev=new_half[c.rev[half]],
        coff=c.coff[half],
        ncls=c.ncls[half],
        eoff=c.eoff[half],
        iptr=np.searchsorted(place[c.item_node[pieces]], np.arange(len(free) + 1)),
        ibeg=c.ibeg[pieces],
        iend=c.iend[pieces],
        ioff=c.ioff[pieces],
        cap=c.cap - used + np.cumsum(steps)[:-1],
    )


def thinned(c: Compact, keep: list[IntArray]) -> Compact:
    """Returns the problem with only the choices keep[i] (ascending) of every node i."""
    k = np.array([len(chosen) for chosen in keep], np.int64)
    start = np.concatenate([[0], np.cumsum(k[c.half_edge_node])]).astype(np.int64)
    cls = [c.classes(e)[keep[i]] for e, i in enumerate(c.half_edge_node.tolist())]
    width = (
        np.concatenate([[0], np.cumsum(k[c.item_node])]).astype(np.int64)
        if len(c.ioff)
        else np.zeros(1, np.int64)
    )
    usage = [c.iu[o + keep[i]] for o, i in zip(c.ioff.tolist(), c.item_node.tolist())]
    return replace(
        c,
        k=k,
        off=np.concatenate([[0], np.cumsum(k)]).astype(np.int64),
        cost=np.concatenate([c.cost[c.off[i] + chosen] for i, chosen in enumerate(keep)]),
        coff=start[:-1],
        cls=np.concatenate(cls) if cls else np.zeros(0, np.int64),
        ioff=width[:-1],
        iu=np.concatenate(usage) if usage else np.zeros(0),
    )


def likely_choices(
    c: Compact, x: IntArray, price: FloatArray, most: int, rng: np.random.Generator
) -> list[IntArray]:
    """Returns per node at most about `most` choices: x's, the cheapest beside x's neighbours, and the
    leanest.

    Cheapest counts memory at a price; half are ranked at up to the whole of it and half at up to nine times.
    A neighbour counts by its present choice and by its best answer, in random parts: it may move as well, and
    the same neighbourhood looks different the next time.
    """
    low, high, stay = 9.0 ** -rng.random(), 9.0 ** rng.random(), rng.random()
    total = np.concatenate([[0.0], np.cumsum(price)])
    out: list[IntArray] = []
    for i in range(c.n):
        k, cost = int(c.k[i]), c.cost[c.off[i] : c.off[i + 1]].copy()
        paid, amount = np.zeros(k), np.zeros(k)
        for e in range(int(c.ptr[i]), int(c.ptr[i + 1])):
            column = c.classes(int(c.rev[e]))[x[c.nbr[e]]]
            table = c.table(e)
            cost += (stay * table[:, column] + (1 - stay) * table.min(axis=1))[c.classes(e)]
        for q in range(int(c.iptr[i]), int(c.iptr[i + 1])):
            usage = c.iu[c.ioff[q] : c.ioff[q] + k]
            paid += (total[c.iend[q]] - total[c.ibeg[q]]) * usage
            amount += usage * float(c.iend[q] - c.ibeg[q])
        half = max(1, most // 2)
        picked = [np.argsort(cost + low * paid)[:half], np.argsort(cost + high * paid)[:half]]
        lean = np.lexsort((cost, amount))[: max(1, most // 8)]
        out.append(np.unique(np.concatenate([*picked, lean, x[i : i + 1]])))
    return out


def patch(c: Compact, rng: np.random.Generator, size: int, root: int | None = None) -> IntArray:
    """Returns up to `size` nodes around one (a random one if none is given), nearer ones first."""
    root = int(rng.integers(c.n)) if root is None else root
    taken, order = {root}, [root]
    for i in order:
        around = c.nbr[c.ptr[i] : c.ptr[i + 1]].tolist()
        rng.shuffle(around)
        for j in around:
            if j not in taken and len(order) < size:
                taken.add(j)
                order.append(j)
    return np.array(sorted(order), np.int64)


def rivals(c: Compact, rng: np.random.Generator, size: int, used: FloatArray) -> IntArray:
    """Returns up to `size` nodes alive at one of the tightest moments, half of them with a neighbour."""
    if not len(c.ioff):
        return patch(c, rng, size)
    slack = (c.cap - used) / np.maximum(c.cap, 1.0)
    tight = np.argsort(slack)[: max(1, len(slack) // 10)]
    t = int(rng.choice(tight))
    alive = np.unique(c.item_node[(c.ibeg <= t) & (c.iend > t)])
    if not len(alive):
        return patch(c, rng, size)
    picked = rng.permutation(alive)[: max(2, size * 2 // 3)].tolist()
    for i in list(picked):
        around = c.nbr[c.ptr[i] : c.ptr[i + 1]]
        if len(around) and len(picked) < size:
            picked.append(int(rng.choice(around)))
    return np.unique(np.array(picked, np.int64))


class SubMilp:
    """Tries neighbourhoods one after another; their size follows how fast HiGHS proves them."""

    def __init__(self, c: Compact, seed: int, most_columns: int = 60_000) -> None:
        self.c, self.seed, self.most_columns = c, seed, most_columns
        self.rng = np.random.default_rng(seed)
        self.budget, self.tried, self.improved, self.failed = FIRST_BUDGET, 0, 0, 0

    @property
    def patience(self) -> float:
        """Factor on the seconds of a try: more when many in a row were of no use."""
        return min(MOST_PATIENCE, 1 + self.failed / IMPATIENT)

    def improve(
        self, x: IntArray, price: FloatArray, seconds: float, stop: threading.Event | None = None
    ) -> IntArray | None:
        """Returns a better choice near x, which keeps the memory limit, or None; takes about `seconds`.

        If x takes forbidden pairs, a neighbourhood of one is freed, and better is to take none there.
        """
        size, most = self._shape()
        free = self._neighbourhood(x, size)
        whole = restricted(self.c, free, x)
        keep = likely_choices(whole, x[free], price, most, self.rng)
        part = thinned(whole, keep)
        old = np.array([np.searchsorted(chosen, x[i]) for chosen, i in zip(keep, free.tolist())], np.int64)
        self.tried += 1
        self.failed += 1
        start = old if math.isfinite(cost_of(part, old)) else None
        answer = solve_presolved(part, start, seconds, self.seed + self.tried, self.most_columns, stop)
        self.budget = float(np.clip(self.budget * (GROW if answer.optimal else SHRINK), *BUDGETS))
        if answer.x is None or not lower(part, answer.x, old):
            return None
        self.improved += 1
        self.failed = 0
        better = x.copy()
        better[free] = [chosen[s] for chosen, s in zip(keep, answer.x.tolist())]
        return better

    def _shape(self) -> tuple[int, int]:
        """Returns how many nodes to free and about how many choices to leave each.

        From few nodes with all their choices to many with the likeliest, all within the budget of columns.
        """
        pairs = len(self.c.nbr) / (2 * max(1, self.c.n))
        most = min(LARGEST, self.c.n, self.budget / (FEWEST + pairs * FEWEST**2))
        nodes = max(1, int(most * SPREAD ** -self.rng.random()))
        each = self.budget / nodes
        choices = (math.sqrt(1 + 4 * pairs * each) - 1) / (2 * pairs) if pairs else each
        return nodes, max(FEWEST, int(choices))

    def _neighbourhood(self, x: IntArray, size: int) -> IntArray:
        broken = forbidden_ends(self.c, x)
        if len(broken):
            return patch(self.c, self.rng, size, int(self.rng.choice(broken)))
        if self.rng.random() < 0.5 and self.c.segments > 0:
            return rivals(self.c, self.rng, size, self.c.usage(x))
        return patch(self.c, self.rng, size)


def lower(c: Compact, new: IntArray, old: IntArray) -> bool:
    """Whether a feasible choice costs less than another."""
    return cost_of(c, new) < cost_of(c, old) and bool((c.usage(new) <= c.cap).all())


def pair_costs(c: Compact, x: IntArray) -> FloatArray:
    """Returns the cost of a choice on every edge of c.edges, inf where it is forbidden."""
    e = c.edges
    own = c.cls[c.coff[e] + x[c.half_edge_node[e]]]
    other = c.cls[c.coff[c.rev[e]] + x[c.nbr[e]]]
    return c.entry[c.eoff[e] + own * c.ncls[c.rev[e]] + other]


def forbidden_ends(c: Compact, x: IntArray) -> IntArray:
    """Returns the nodes at the ends of forbidden pairs."""
    broken = c.edges[np.isinf(pair_costs(c, x))]
    return np.unique(np.concatenate([c.half_edge_node[broken], c.nbr[broken]]))


def cost_of(c: Compact, x: IntArray) -> float:
    """Returns the cost of a choice per node, inf if it takes a forbidden pair."""
    return float(c.cost[c.off[:-1] + x].sum() + pair_costs(c, x).sum()) + float(c.const)
