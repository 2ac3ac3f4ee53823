# pyright: basic, reportUnknownMemberType=false
"""Compiled large-neighbourhood search: a random tree of nodes is set to its best by dynamic programming.

The tree is induced (no two of its nodes share an edge outside it), so that with everything else fixed the
best choice of all its nodes is found exactly by one pass over it, the memory priced. A move is taken if it
keeps the memory limit and doesn't cost more, or costs little enough for the temperature (Kirkpatrick et al.
1983).
"""

import numpy as np

from autopar_solver.compact import FloatArray
from autopar_solver.jit import jit
from autopar_solver.kernels import Graph, Memory, across, add_row, pair_cost
from autopar_solver.problem import IntArray


@jit
def grow_tree(g, root, most, tree, parent, place, seen, frontier):
    """Grows an induced tree from root in random order; returns its size.

    tree: its nodes, parents first; parent: positions in tree; place[node]: position or -1; seen[node]: how
        many of
    its neighbours are in the tree (a second one would close a cycle).
    """
    size = 0
    waiting = 0
    node = root
    up = -1
    while True:
        tree[size] = node
        parent[size] = up
        place[node] = size
        size += 1
        for e in range(g.ptr[node], g.ptr[node + 1]):
            j = g.nbr[e]
            seen[j] += 1
            if place[j] < 0 and seen[j] == 1 and waiting < len(frontier):
                frontier[waiting] = j
                waiting += 1
        if size >= most:
            return size
        node = -1
        while waiting > 0:
            pick = np.random.randint(waiting)
            j = frontier[pick]
            waiting -= 1
            frontier[pick] = frontier[waiting]
            if place[j] < 0 and seen[j] == 1:
                node = j
                break
        if node < 0:
            return size
        for e in range(g.ptr[node], g.ptr[node + 1]):
            if place[g.nbr[e]] >= 0:
                up = place[g.nbr[e]]
                break


@jit
def forget_tree(g, size, tree, place, seen):
    """Undoes grow_tree's marks."""
    for b in range(size):
        i = tree[b]
        place[i] = -1
        for e in range(g.ptr[i], g.ptr[i + 1]):
            seen[g.nbr[e]] = 0


@jit
def edge_to(g, i, j):
    """Returns the half-edge from i to its neighbour j."""
    for e in range(g.ptr[i], g.ptr[i + 1]):
        if g.nbr[e] == j:
            return e
    return -1


@jit
def best_on_tree(g, cost, mem, total, share, x, size, tree, parent, place, work, own, other, new):
    """Fills new[node] for the tree's nodes with their best choices, the rest of x fixed; memory priced at
    share.
    """
    for b in range(size):
        i = tree[b]
        o = g.off[i]
        k = g.k[i]
        for s in range(k):
            work[o + s] = cost[o + s]
        if share > 0.0:
            for q in range(mem.iptr[i], mem.iptr[i + 1]):
                w = share * (total[mem.iend[q]] - total[mem.ibeg[q]])
                if w != 0.0:
                    for s in range(k):
                        work[o + s] += w * mem.iu[mem.ioff[q] + s]
        for e in range(g.ptr[i], g.ptr[i + 1]):
            j = g.nbr[e]
            if place[j] < 0:
                add_row(g, e, x[j], work, o)
    for b in range(size - 1, 0, -1):
        i = tree[b]
        up = tree[parent[b]]
        e = edge_to(g, i, up)
        for r in range(g.ncls[e]):
            own[r] = np.inf
        for s in range(g.k[i]):
            r = g.cls[g.coff[e] + s]
            own[r] = min(own[r], work[g.off[i] + s])
        back = g.rev[e]
        across(g, back, own, other)
        for t in range(g.k[up]):
            work[g.off[up] + t] += other[g.cls[g.coff[back] + t]]
    for b in range(size):
        i = tree[b]
        if b > 0:
            up = tree[parent[b]]
            add_row(g, edge_to(g, i, up), new[up], work, g.off[i])
        best = np.inf
        pick = 0
        for s in range(g.k[i]):
            value = work[g.off[i] + s]
            if value < best or (value == best and np.random.random() < 0.5):
                best = value
                pick = s
        new[i] = pick


@jit
def change_in_cost(g, cost, x, new, size, tree, place):
    """Returns the change in cost if the tree's nodes move from x to new."""
    change = 0.0
    for b in range(size):
        i = tree[b]
        change += cost[g.off[i] + new[i]] - cost[g.off[i] + x[i]]
        for e in range(g.ptr[i], g.ptr[i + 1]):
            j = g.nbr[e]
            if place[j] >= 0 and j < i:
                continue
            change += pair_cost(g, e, new[i], new[j] if place[j] >= 0 else x[j]) - pair_cost(g, e, x[i], x[j])
    return change


@jit
def move_usage(mem, used, x, new, size, tree, sign):
    """Adds sign * (usage of new - usage of x) of the tree's nodes to used; returns the change in total
    overuse.
    """
    change = 0.0
    for b in range(size):
        i = tree[b]
        if new[i] == x[i]:
            continue
        for q in range(mem.iptr[i], mem.iptr[i + 1]):
            by = mem.iu[mem.ioff[q] + new[i]] - mem.iu[mem.ioff[q] + x[i]]
            if by != 0.0:
                by *= sign
                for t in range(mem.ibeg[q], mem.iend[q]):
                    before = used[t] - mem.cap[t]
                    used[t] += by
                    change += max(before + by, 0.0) - max(before, 0.0)
    return change


@jit
def add_up(price, total):
    """Fills total[t] with the sum of the prices before t."""
    for t in range(len(price)):
        total[t + 1] = total[t] + price[t]


@jit
def price_share(over):
    """Returns the random factor on the memory prices for one move: none, about one, or anything."""
    if over > 0:
        return np.exp(np.random.random() * 6 - 1)
    r = np.random.random()
    if r < 0.25:
        return 0.0
    return np.exp(np.random.randn() * (0.5 if r < 0.85 else 2.0))


@jit
def search(
    g: Graph,
    cost: FloatArray,
    mem: Memory,
    price: FloatArray,
    x: IntArray,
    used: FloatArray,
    value: float,
    over: float,
    moves: int,
    most: float,
    seed: int,
    temperature: float,
    weight: float,
) -> tuple[float, float, float, IntArray]:
    """Makes moves from x (changed in place with used); returns (value, over, best value, best x).

    value, over: cost and total overuse of x. With a weight of 0, moves lower the overuse while there is any,
    and keep the limit after that. With a weight, overuse costs that much a unit where it is, and moves may
    trade it for cost (strategic oscillation, Glover 1989). best value is inf if memory was never kept.
    """
    np.random.seed(seed)
    n = len(g.k)
    tree = np.empty(n + 1, np.int64)
    parent = np.empty(n + 1, np.int64)
    place = np.full(n, -1, np.int64)
    seen = np.zeros(n, np.int64)
    frontier = np.empty(4 * n + 64, np.int64)
    work = np.empty(g.off[n])
    widest = 1
    for i in range(n):
        widest = max(widest, g.k[i])
    own = np.empty(widest)
    other = np.empty(widest)
    total = np.zeros(len(price) + 1)
    add_up(price, total)
    new = x.copy()
    best_x = x.copy()
    best = value if over <= 0 else np.inf
    for _ in range(moves):
        if weight > 0 and over > 0:
            add_up(np.where(used > mem.cap, price + weight, price), total)
        limit = 1 + int(np.exp(np.random.random() * np.log(most)))
        size = grow_tree(g, np.random.randint(n), limit, tree, parent, place, seen, frontier)
        best_on_tree(
            g, cost, mem, total, price_share(over), x, size, tree, parent, place, work, own, other, new
        )
        changed = False
        for b in range(size):
            if new[tree[b]] != x[tree[b]]:
                changed = True
                break
        if changed:
            change = change_in_cost(g, cost, x, new, size, tree, place)
            take = (
                over > 0
                or weight > 0
                or change <= 0
                or (temperature > 0 and np.random.random() < np.exp(-change / temperature))
            )
            if take:
                more = move_usage(mem, used, x, new, size, tree, 1.0)
                if weight > 0:
                    worse = change + weight * more
                    take = worse <= 0 or (
                        temperature > 0 and np.random.random() < np.exp(-worse / temperature)
                    )
                elif over <= 0:
                    take = more <= 0.0
                else:
                    take = more < 0.0 or (more <= 0.0 and change <= 0)
                if take:
                    value += change
                    over = max(0.0, over + more)
                    for b in range(size):
                        x[tree[b]] = new[tree[b]]
                    if over <= 0 and value < best:
                        best = value
                        best_x[:] = x
                else:
                    move_usage(mem, used, x, new, size, tree, -1.0)
            if not take:
                for b in range(size):
                    new[tree[b]] = x[tree[b]]
        forget_tree(g, size, tree, place, seen)
    return value, over, best, best_x
