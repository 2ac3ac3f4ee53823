# pyright: basic, reportUnknownMemberType=false
"""Compiled inner loops: priced node costs, one pass of tree-reweighted message passing, energies.

The loops release the interpreter lock, so that threads run them side by side, and their machine code is
cached.
"""

from typing import NamedTuple

import numpy as np

from autopar_solver.compact import Compact, FloatArray
from autopar_solver.jit import jit
from autopar_solver.problem import IntArray

EPS = 2.0**-52


class Graph(NamedTuple):
    """Compact's nodes and half-edges, as compiled code takes them."""

    off: IntArray
    k: IntArray
    ptr: IntArray
    nbr: IntArray
    rev: IntArray
    coff: IntArray
    ncls: IntArray
    cls: IntArray
    eoff: IntArray
    entry: FloatArray


class Memory(NamedTuple):
    """Compact's usage pieces and caps."""

    iptr: IntArray
    ibeg: IntArray
    iend: IntArray
    ioff: IntArray
    iu: FloatArray
    cap: FloatArray


def graph_of(c: Compact, entry: FloatArray | None = None) -> Graph:
    """Returns the graph of a compact problem, with other matrix entries if given."""
    entry = c.entry if entry is None else entry
    return Graph(c.off, c.k, c.ptr, c.nbr, c.rev, c.coff, c.ncls, c.cls, c.eoff, entry)


def memory_of(c: Compact) -> Memory:
    """Returns the memory part of a compact problem."""
    return Memory(c.iptr, c.ibeg, c.iend, c.ioff, c.iu, c.cap)


@jit
def price_nodes(cost: FloatArray, off: IntArray, mem: Memory, price: FloatArray, out: FloatArray) -> None:
    """Writes cost + price of the memory used into out; price is per segment and unit."""
    total = np.zeros(len(price) + 1)
    for t in range(len(price)):
        total[t + 1] = total[t] + price[t]
    for i in range(len(off) - 1):
        k = off[i + 1] - off[i]
        for s in range(k):
            out[off[i] + s] = cost[off[i] + s]
        for q in range(mem.iptr[i], mem.iptr[i + 1]):
            w = total[mem.iend[q]] - total[mem.ibeg[q]]
            if w != 0.0:
                for s in range(k):
                    out[off[i] + s] += w * mem.iu[mem.ioff[q] + s]


@jit
def chain_weights(g):
    """Returns 1 / max(edges to earlier nodes, edges to later nodes) for every node."""
    n = len(g.k)
    weight = np.empty(n)
    for i in range(n):
        later = 0
        for e in range(g.ptr[i], g.ptr[i + 1]):
            if g.nbr[e] > i:
                later += 1
        weight[i] = 1.0 / max(1, later, g.ptr[i + 1] - g.ptr[i] - later)
    return weight


@jit
def across(g, back, own, other):
    """Fills other[q] with min over r of own[r] + table[q, r], back being the half-edge at q's end; returns
    the least.
    """
    row = g.eoff[back]
    columns = g.ncls[g.rev[back]]
    least = np.inf
    for q in range(g.ncls[back]):
        best = np.inf
        for r in range(columns):
            value = own[r] + g.entry[row + r]
            if value < best:
                best = value
        row += columns
        other[q] = best
        if best < least:
            least = best
    return least


@jit
def message_passes(
    g: Graph, theta: FloatArray, moff: IntArray, msg: FloatArray, rounds: int
) -> tuple[float, float]:
    """Runs rounds of forward and backward passes of TRW-S (Kolmogorov 2006) on the messages in place.

    msg[moff[e]:] is the message into the owner of half-edge e from its other end. Returns (bound, size): a
    lower bound on the energy, valid whatever the messages were, and the sum of sizes of the numbers behind
    it; rounding can make the bound too high by at most EPS * size.
    """
    n = len(g.k)
    widest = 1
    for i in range(n):
        widest = max(widest, g.k[i])
    d = np.empty(widest)
    own = np.empty(widest)
    other = np.empty(widest)
    weight = chain_weights(g)
    bound = 0.0
    size = 0.0
    for step in range(2 * rounds):
        forward = step % 2 == 0
        bound = 0.0
        size = 0.0
        for at in range(n):
            i = at if forward else n - 1 - at
            k = g.k[i]
            for s in range(k):
                d[s] = theta[g.off[i] + s]
            for e in range(g.ptr[i], g.ptr[i + 1]):
                o = moff[e]
                for s in range(k):
                    d[s] += msg[o + s]
            low = d[0]
            big = 0.0
            for s in range(k):
                low = min(low, d[s])
                big = max(big, abs(d[s]))
            bound += low
            size += big * (2 + g.ptr[i + 1] - g.ptr[i])
            for s in range(k):
                d[s] -= low
            for e in range(g.ptr[i], g.ptr[i + 1]):
                j = g.nbr[e]
                if (j < i) == forward:
                    continue
                o = moff[e]
                back = g.rev[e]
                to = moff[back]
                for r in range(g.ncls[e]):
                    own[r] = np.inf
                for s in range(k):
                    r = g.cls[g.coff[e] + s]
                    own[r] = min(own[r], weight[i] * d[s] - msg[o + s])
                least = across(g, back, own, other)
                big = abs(least)
                for t in range(g.k[j]):
                    value = other[g.cls[g.coff[back] + t]]
                    big = max(big, abs(value))
                    msg[to + t] = value - least
                bound += least
                size += 8 * big
    return bound, size


@jit
def pair_cost(g, e, s, t) -> float:
    """Returns the cost of half-edge e if its owner takes s and its other end t."""
    back = g.rev[e]
    row = g.eoff[e] + g.cls[g.coff[e] + s] * g.ncls[back]
    return g.entry[row + g.cls[g.coff[back] + t]]


@jit
def add_row(g, e, t, into, start):
    """Adds to into[start:] what each choice of e's owner pays on e if the other end takes t."""
    back = g.rev[e]
    row = g.eoff[back] + g.cls[g.coff[back] + t] * g.ncls[e]
    for s in range(g.k[g.nbr[back]]):
        into[start + s] += g.entry[row + g.cls[g.coff[e] + s]]


@jit
def round_messages(g: Graph, theta: FloatArray, moff: IntArray, msg: FloatArray, x: IntArray) -> None:
    """Fills x node by node: best given the earlier nodes' choices and the later nodes' messages."""
    widest = 1
    for i in range(len(g.k)):
        widest = max(widest, g.k[i])
    d = np.empty(widest)
    for i in range(len(g.k)):
        k = g.k[i]
        for s in range(k):
            d[s] = theta[g.off[i] + s]
        for e in range(g.ptr[i], g.ptr[i + 1]):
            j = g.nbr[e]
            if j < i:
                add_row(g, e, x[j], d, 0)
            else:
                o = moff[e]
                for s in range(k):
                    d[s] += msg[o + s]
        best = 0
        for s in range(1, k):
            if d[s] < d[best]:
                best = s
        x[i] = best


@jit
def energy(g: Graph, cost: FloatArray, x: IntArray) -> float:
    """Returns the cost of a choice per node."""
    total = 0.0
    for i in range(len(g.k)):
        total += cost[g.off[i] + x[i]]
        for e in range(g.ptr[i], g.ptr[i + 1]):
            j = g.nbr[e]
            if j > i:
                total += pair_cost(g, e, x[i], x[j])
    return total  # pyright: ignore[reportReturnType]


@jit
def usage_of(mem: Memory, x: IntArray) -> FloatArray:
    """Returns the usage per segment of a choice per node."""
    segments = len(mem.cap)
    steps = np.zeros(segments + 1)
    for i in range(len(x)):
        for q in range(mem.iptr[i], mem.iptr[i + 1]):
            used = mem.iu[mem.ioff[q] + x[i]]
            steps[mem.ibeg[q]] += used
            steps[mem.iend[q]] -= used
    for t in range(1, segments + 1):
        steps[t] += steps[t - 1]
    return steps[:segments]
