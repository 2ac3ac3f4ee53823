# pyright: basic, reportUnknownMemberType=false
"""Compiled loops of presolve: what it asks of one matrix, and which choices of one node dominate which.

Arrays are int64 and C-contiguous, so that every loop is compiled once.
"""

import numpy as np
import numpy.typing as npt

from autopar_solver.jit import jit
from autopar_solver.problem import IntArray

BoolArray = npt.NDArray[np.bool_]

INF = 2**61
BLOCKED = 2**60


@jit
def row_facts(m: IntArray) -> tuple[BoolArray, IntArray, int]:
    """Returns (which rows have an entry that isn't forbidden, the column of it, number of such entries).

    The columns are an empty array if some row has none or several.
    """
    rows, columns = m.shape
    ok = np.zeros(rows, np.bool_)
    only = np.empty(rows, np.int64)
    finite = 0
    function = True
    for r in range(rows):
        found = 0
        for c in range(columns):
            if m[r, c] < BLOCKED:
                found += 1
                only[r] = c
        ok[r] = found > 0
        finite += found
        function &= found == 1
    return ok, only if function else only[:0], finite


@jit
def splits(m: IntArray) -> bool:
    """Whether m[s, t] = a[s] + b[t] for some a and b, nothing being forbidden."""
    rows, columns = m.shape
    for c in range(columns):
        if m[0, c] >= BLOCKED:
            return False
    for r in range(rows):
        step = m[r, 0] - m[0, 0]
        for c in range(columns):
            if m[r, c] >= BLOCKED or m[r, c] != step + m[0, c]:
                return False
    return True


@jit
def kinds_of_rows(m: IntArray) -> tuple[IntArray, IntArray]:
    """Returns (first row of each kind, kind of every row); equal rows are of one kind."""
    rows, columns = m.shape
    buckets = 4
    while buckets < 2 * rows:
        buckets *= 2
    table = np.full(buckets, -1, np.int64)
    first = np.empty(rows, np.int64)
    kind = np.empty(rows, np.int64)
    found = 0
    for r in range(rows):
        h = np.uint64(1469598103934665603)
        for c in range(columns):
            h = (h ^ np.uint64(m[r, c])) * np.uint64(0x9E3779B97F4A7C15)
            h ^= h >> np.uint64(29)
        at = np.int64(h & np.uint64(buckets - 1))
        while True:
            q = table[at]
            if q < 0:
                table[at] = found
                first[found] = r
                kind[r] = found
                found += 1
                break
            same = True
            for c in range(columns):
                if m[first[q], c] != m[r, c]:
                    same = False
                    break
            if same:
                kind[r] = q
                break
            at = (at + 1) & (buckets - 1)
    return first[:found].copy(), kind


@jit
def gains(m: IntArray) -> IntArray:
    """Returns [s, r]: the least that moving the row end from s to r saves, whatever the column is; -INF if it
    may break.

    Rows that are equal up to a constant are looked at once, equal columns too.
    """
    rows, columns = m.shape
    level = np.empty(rows, np.int64)
    rest = np.empty((rows, columns), np.int64)
    for s in range(rows):
        level[s] = m[s].min()
        for c in range(columns):
            rest[s, c] = m[s, c] - level[s] if m[s, c] < BLOCKED else INF
        level[s] = min(level[s], BLOCKED)
    first, kind = kinds_of_rows(rest)
    few = np.empty((columns, len(first)), np.int64)
    for q in range(len(first)):
        for c in range(columns):
            few[c, q] = rest[first[q], c]
    column, _ = kinds_of_rows(few)
    least = np.empty((len(first), len(first)), np.int64)
    for s in range(len(first)):
        for r in range(len(first)):
            low = INF
            for c in column:
                if few[c, s] < BLOCKED:
                    low = min(low, few[c, s] - few[c, r])
                    if low < -BLOCKED:
                        low = -INF
                        break
            least[s, r] = low
    out = np.empty((rows, rows), np.int64)
    for s in range(rows):
        for r in range(rows):
            low = least[kind[s], kind[r]]
            out[s, r] = -INF if low == -INF else low + level[s] - level[r]
    return out


@jit
def start_dominance(cost: IntArray, usage: IntArray) -> tuple[BoolArray, IntArray, bool]:
    """Returns (better, saves, any): may r stand in for s by memory alone, and what it saves at the node."""
    k = len(cost)
    better = np.ones((k, k), np.bool_)
    saves = np.empty((k, k), np.int64)
    some = False
    for s in range(k):
        for r in range(k):
            saves[s, r] = cost[s] - cost[r]
            ok = s != r
            for q in range(len(usage)):
                if usage[q, s] < usage[q, r]:
                    ok = False
                    break
            better[s, r] = ok
            some |= ok
    return better, saves, some


@jit
def narrow_dominance(better: BoolArray, saves: IntArray, gain: IntArray) -> bool:
    """Adds what an edge saves, and drops the pairs it may break; returns whether a pair is left."""
    k = len(better)
    some = False
    for s in range(k):
        for r in range(k):
            if better[s, r]:
                saves[s, r] = max(saves[s, r] + gain[s, r], -INF)
                better[s, r] = saves[s, r] > -BLOCKED
                some |= better[s, r]
    return some


@jit
def undominated(better: BoolArray, saves: IntArray) -> tuple[BoolArray, int]:
    """Drops pairs that cost; returns (keep, how many are dropped).

    One of those that dominate each other is kept.
    """
    k = len(better)
    keep = np.ones(k, np.bool_)
    dropped = 0
    for s in range(k):
        for r in range(k):
            better[s, r] &= saves[s, r] >= 0
    for s in range(k):
        for r in range(k):
            if better[s, r] and keep[r]:
                keep[s] = False
                dropped += 1
                break
    return keep, dropped
