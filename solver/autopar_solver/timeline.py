"""Memory over time: usage profiles of a node, and the few time segments where a limit can bind."""

import numpy as np
import numpy.typing as npt

from autopar_solver.network import InfeasibleProblem, Item, Network
from autopar_solver.presolve_kernels import INF
from autopar_solver.problem import IntArray


def profile(items: list[Item]) -> tuple[IntArray, IntArray, IntArray]:
    """Returns a node's usage as disjoint pieces (start, stop, usage (pieces, choices)), whatever its items
    overlap.
    """
    if len(items) == 1:
        s, e, u = items[0]
        return np.array([s]), np.array([e]), u[None, :]
    starts = np.array([s for s, _, _ in items])
    stops = np.array([e for _, e, _ in items])
    usage = np.stack([u for _, _, u in items])
    times = np.unique(np.concatenate([starts, stops]))
    steps = np.zeros((len(times), usage.shape[1]), np.int64)
    np.add.at(steps, np.searchsorted(times, starts), usage)
    np.subtract.at(steps, np.searchsorted(times, stops), usage)
    pieces = np.cumsum(steps, axis=0)[:-1]
    new = np.ones(len(pieces), np.bool_)
    new[1:] = (pieces[1:] != pieces[:-1]).any(axis=1)
    begin, end = times[:-1][new], np.append(times[:-1][new][1:], times[-1])
    used = pieces[new]
    kept = used.any(axis=1)
    return begin[kept], end[kept], used[kept]


def compress_time(net: Network) -> list[int]:
    """Keeps only time segments where the limit can bind, moves constant usage into the caps, drops choices
    that don't fit alone; returns the nodes whose usage or choices this changed.

    Raises:
        InfeasibleProblem: the least possible usage is above a cap.
    """
    if net.cap is None:
        return []
    nodes = [i for i, items in enumerate(net.items) if items]
    before = [flatten_items(net, i) for i in nodes]
    pieces = [piece for i in nodes for piece in net.items[i]]
    starts = np.array([s for s, _, _ in pieces], np.int64)
    stops = np.array([e for _, e, _ in pieces], np.int64)
    first = np.cumsum([0] + [len(u) for _, _, u in pieces])
    usage = np.concatenate([u for _, _, u in pieces]) if pieces else np.zeros(0, np.int64)
    least = np.minimum.reduceat(usage, first[:-1]) if pieces else usage
    usage = usage - np.repeat(least, np.diff(first))
    most = np.maximum.reduceat(usage, first[:-1]) if pieces else usage
    cap = net.cap - spread(starts, stops, least, len(net.cap))
    if len(cap) and cap.min() < 0:
        raise InfeasibleProblem(f"memory: the least possible usage is {-int(cap.min())} above the limit")
    position, net.cap = binding_segments(starts[most > 0], stops[most > 0], most[most > 0], cap)
    starts, stops = position[starts], position[stops]
    kept = (most > 0) & (stops > starts)
    low = range_minima(net.cap, starts, stops)
    owner = np.repeat(np.array(nodes, np.int64), [len(net.items[i]) for i in nodes])
    for i in nodes:
        net.items[i] = []
    at, begin, end, node = first.tolist(), starts.tolist(), stops.tolist(), owner.tolist()
    for q in np.flatnonzero(kept).tolist():
        net.items[node[q]].append((begin[q], end[q], usage[at[q] : at[q + 1]]))
    changed = [i for i, count in zip(nodes, before) if len(net.items[i]) < count]
    return changed + _drop_too_big(net, owner, kept & (most > low), low, usage, first)


def flatten_items(net: Network, i: int) -> int:
    """Makes a node's usage disjoint pieces; returns how many items it had."""
    count = len(net.items[i])
    if count > 1:
        begin, end, used = profile(net.items[i])
        net.items[i] = list(zip(begin.tolist(), end.tolist(), used))
    return count


def _drop_too_big(
    net: Network,
    owner: IntArray,
    where: npt.NDArray[np.bool_],
    low: IntArray,
    usage: IntArray,
    first: IntArray,
) -> list[int]:
    """Drops the choices that don't fit alone, looking at the pieces `where`; returns the nodes to look at
    again.
    """
    fits: dict[int, npt.NDArray[np.bool_]] = {}
    for q in np.flatnonzero(where).tolist():
        i, ok = int(owner[q]), usage[first[q] : first[q + 1]] <= low[q]
        fits[i] = fits[i] & ok if i in fits else ok
    changed: list[int] = []
    for i, ok in fits.items():
        net.count("choices too big", int((~ok).sum()))
        net.restrict(i, ok)
        changed.extend([i, *net.adj[i]])
    return changed


def spread(starts: IntArray, stops: IntArray, amount: IntArray, horizon: int) -> IntArray:
    """Returns, per time step, the sum of the amounts alive there."""
    steps = np.zeros(horizon + 1, np.int64)
    np.add.at(steps, starts, amount)
    np.subtract.at(steps, stops, amount)
    return np.cumsum(steps)[:-1]


def binding_segments(
    starts: IntArray, stops: IntArray, most: IntArray, cap: IntArray
) -> tuple[IntArray, IntArray]:
    """Returns (position, caps): the number of kept segments before every time step, and their caps.

    A segment is dropped if everything alive there fits at its most, or if a neighbour holds all of its items
    and has no larger cap.
    """
    horizon = len(cap)
    edges = np.unique(np.concatenate([[0], starts, stops]))
    edges = edges[edges < horizon]
    if not len(edges) or not len(starts):
        return np.zeros(horizon + 1, np.int64), np.zeros(0, np.int64)
    caps = np.minimum.reduceat(cap, edges)
    first, last = np.searchsorted(edges, starts), np.searchsorted(edges, stops)
    keep = spread(first, last, most, len(edges)) > caps
    while True:
        kept = np.flatnonzero(keep)
        drop = _covered(np.searchsorted(kept, first), np.searchsorted(kept, last), caps[kept])
        if not drop.any():
            break
        keep[kept[drop]] = False
    before = np.concatenate([[0], np.cumsum(keep)])
    segment = np.searchsorted(edges, np.arange(horizon + 1), side="right") - 1
    # A time step inside a segment maps to that segment's own position; items start and stop at edges only.
    position = before[np.where(np.arange(horizon + 1) >= horizon, len(edges), segment)]
    return position, caps[keep]


def _covered(first: IntArray, last: IntArray, caps: IntArray) -> npt.NDArray[np.bool_]:
    """Which segments have a neighbour (itself kept) that holds all their items under no larger a cap."""
    k = len(caps)
    alive = last > first
    starts_at, stops_at = np.zeros(k + 1, np.bool_), np.zeros(k + 1, np.bool_)
    starts_at[first[alive]] = True
    stops_at[last[alive]] = True
    drop = np.zeros(k, np.bool_)
    if k < 2:
        return drop
    drop[:-1] = ~stops_at[1:k] & (caps[:-1] >= caps[1:])
    left = np.zeros(k, np.bool_)
    left[1:] = ~starts_at[1:k] & (caps[1:] >= caps[:-1])
    left &= ~drop
    left[1:] &= ~drop[:-1] & ~left[:-1]
    return drop | left


def range_minima(values: IntArray, starts: IntArray, stops: IntArray) -> IntArray:
    """Returns min(values[s:e]) for every pair, INF where it is empty; constant time each (a sparse table)."""
    table = [values]
    while 2 ** len(table) <= len(values):
        half, prev = 2 ** (len(table) - 1), table[-1]
        table.append(np.minimum(prev[:-half], prev[half:]))
    out = np.full(len(starts), INF, np.int64)
    length = stops - starts
    for level, row in enumerate(table):
        here = (length >= 2**level) & (length < 2 ** (level + 1))
        out[here] = np.minimum(row[starts[here]], row[stops[here] - 2**level])
    return out
