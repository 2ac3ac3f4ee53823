"""The three inner loops of the stage program: prefix bounds, suffix bounds, and labels. numba, arrays only.

Words used throughout. An *arc* is a stage that may be chosen: layers [i, j) on a choice of kind k. A plan is
a path of arcs from layer 0 to layer L. *Position* p counts stages from the end; positions of P and beyond
behave alike (no memory limit tells them apart) and are stored as P. *Prices* lambda[k] are seconds per
device of kind k: charging for devices instead of counting them turns the problem into a shortest path, whose
length minus lambda * available is a lower bound for any lambda >= 0 (Lagrangian relaxation; Handler & Zang,
"A dual algorithm for the constrained shortest path problem", Networks 1980).
"""
# pyright: basic

from __future__ import annotations

import numpy as np
from numba import njit

ROOT = -1
SPARE = 8  # times as many labels as are kept are compared with each other
ROUND_OFF = 1e-12  # of the priced devices; float64 sums of a few hundred terms err by less


@njit(cache=True)
def prefix_bounds(arcs, cost, transfer, prices, positions):
    """Cheapest priced way to run layers 0..i, for every layer i, kind of the next stage, and its position.

    Args:
        arcs: (first [L+1], j, kind, devices, last): arcs leaving layer i are first[i]:first[i+1]; `last` is
            the furthest position at which the arc fits in memory.
        cost: [arcs] seconds. transfer: [L, K, K] seconds. prices: [K] seconds per device.
        positions: P.
    Returns:
        before: [L+1, K, P+1]; before[i, k, p] for a next stage of kind k at position p that starts at i.
        whole: priced length of the cheapest plan. path: its arcs, first stage first.
    """
    first, stop, kind, devices, last = arcs
    layers, kinds = len(first) - 2, len(prices)
    before = np.full((layers + 1, kinds, positions + 1), np.inf)
    inside = np.full(
        (layers + 1, kinds, positions + 1), np.inf
    )  # ends at j with a stage of kind k at position p
    arc_of = np.full((layers + 1, kinds, positions + 1), -1, np.int64)
    kind_of = np.full((layers + 1, kinds, positions + 1), -1, np.int64)
    before[0, :, :] = 0.0
    for i in range(layers):
        if i > 0:
            for k2 in range(kinds):
                for p in range(1, positions + 1):
                    q = min(p + 1, positions)
                    for k1 in range(kinds):
                        value = inside[i, k1, q] + transfer[i, k1, k2]
                        if value < before[i, k2, p]:
                            before[i, k2, p] = value
                            kind_of[i, k2, p] = k1
        for a in range(first[i], first[i + 1]):
            j, k = stop[a], kind[a]
            priced = cost[a] + prices[k] * devices[a]
            for p in range(1, last[a] + 1):
                value = priced + before[i, k, p]
                if value < inside[j, k, p]:
                    inside[j, k, p] = value
                    arc_of[j, k, p] = a
    best = np.argmin(inside[layers, :, 1])
    whole = inside[layers, best, 1]
    path = np.empty(layers, np.int64)
    count = 0
    if whole < np.inf:
        j, k, p = layers, best, 1
        while j > 0:
            a = arc_of[j, k, p]
            path[count] = a
            count += 1
            i = first_layer(first, a)
            if i > 0:
                k = kind_of[i, k, p]
            p = min(p + 1, positions)
            j = i
    return before, whole, path[:count][::-1].copy()


@njit(cache=True)
def first_layer(first, arc):
    """The layer an arc starts at."""
    return np.searchsorted(first, arc, side="right") - 1


@njit(cache=True)
def through_bounds(arcs, cost, transfer, prices, positions, before):
    """For every arc, the priced length of the cheapest plan that uses it: [arcs].

    The suffix half of `prefix_bounds`: after[i, k, p] is the cheapest priced way to run layers i..L whose
    first stage is of kind k at position p.
    """
    first, stop, kind, devices, last = arcs
    layers, kinds = len(first) - 2, len(prices)
    after = np.full((layers + 1, kinds, positions + 1), np.inf)
    follow = np.full(
        (layers + 1, kinds, positions + 1), np.inf
    )  # after a stage of kind k ending at j; q stages left
    follow[layers, :, 0] = 0.0
    through = np.full(len(stop), np.inf)
    for i in range(layers - 1, -1, -1):
        for a in range(first[i], first[i + 1]):
            j, k = stop[a], kind[a]
            priced = cost[a] + prices[k] * devices[a]
            for p in range(1, last[a] + 1):
                value = follow[j, k, p - 1]
                if p == positions:
                    value = min(value, follow[j, k, p])
                value += priced
                after[i, k, p] = min(after[i, k, p], value)
                through[a] = min(through[a], value + before[i, k, p])
        if i > 0:
            for k1 in range(kinds):
                for p in range(1, positions + 1):
                    for k2 in range(kinds):
                        follow[i, k1, p] = min(follow[i, k1, p], transfer[i, k1, k2] + after[i, k2, p])
    return through


@njit(cache=True)
def grow(array, size):
    """A copy of `array` with room for `size` rows."""
    bigger = np.empty((size, *array.shape[1:]), array.dtype)
    bigger[: len(array)] = array
    return bigger


@njit(cache=True)
def undominated(order, value, whole, kind, scan):
    """Which of the labels to keep, in `order` (by cost): those that no earlier kept label is at least as
    good as.

    `value` [n, 3] holds cost, slowest stage and largest fixed cost, `whole` [n, K + 1] devices used per kind
    and the position. Only the first `scan` kept labels of a kind are compared with (a label may be kept in
    vain), plus the label last kept with the same devices, found by hashing.
    """
    size = 1
    while size < 2 * len(order) + 1:
        size *= 2
    table = np.full(size, -1, np.int64)
    link = np.full(len(order), -1, np.int64)
    kept = np.empty(len(order), np.int64)
    count = 0
    width = whole.shape[1]
    for x in order:
        code = np.uint64(kind[x])
        for w in range(width - 1):
            code = (code * np.uint64(1000003)) ^ np.uint64(whole[x, w])
        code = (code * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(20)
        slot = np.int64(code & np.uint64(size - 1))
        keep = True
        y = table[slot]
        while y >= 0 and keep:
            keep = not beats(kept[y], x, value, whole, kind, width)
            y = link[y]
        for y in range(min(count, scan)):
            if not keep:
                break
            keep = not beats(kept[y], x, value, whole, kind, width)
        if keep:
            kept[count] = x
            link[count] = table[slot]
            table[slot] = count
            count += 1
    return kept[:count]


@njit(cache=True)
def beats(x, y, value, whole, kind, width):
    """Whether label x is at least as good as y whatever comes before them."""
    if (
        kind[x] != kind[y]
        or value[x, 0] > value[y, 0]
        or value[x, 1] > value[y, 1]
        or value[x, 2] > value[y, 2]
    ):
        return False
    for w in range(width):  # noqa: SIM110 (numba compiles no generators)
        if whole[x, w] > whole[y, w]:
            return False
    return True


@njit(cache=True)
def in_order(value, column, labels):
    """The labels by their entry in a column of `value`, least first (one sort for all: compiling is slow)."""
    key = np.empty(len(labels))
    for x in range(len(labels)):
        key[x] = value[labels[x], column]
    return labels[np.argsort(key)]


@njit(cache=True)
def best_ranked(keep, value, count):
    """The `count` labels of lowest rank, and the least bound of the others."""
    if len(keep) <= count:
        return keep, np.inf
    ranked = in_order(value, 4, keep)
    return ranked[:count], value[ranked[count:], 3].min()


@njit(cache=True)
def label_pass(
    arcs, seconds, extra, transfer, blocks, available, prices, before, weights, box, cut, cap, scan, finals
):
    """Suffixes of plans (labels), grown from the last layer to the first, best `cap` at each layer.

    A label is a set of stages for layers i..L with its exact cost, slowest stage, largest fixed cost,
    devices used per kind and position. It is dropped if its cost plus a bound on all that can come before it
    (`before`, one table per row of `prices`, the largest counts) reaches `cut`; if another label is at least
    as good in everything; or, and only this loses exactness, if there are more than `cap` at its layer.

    Args:
        arcs, transfer: as in `prefix_bounds`. seconds, extra: [arcs] time and fixed cost.
        blocks: whether a stage's outgoing transfer counts in its share of the slowest-stage term.
        available: [K]. prices: [M, K]; row 0 must be 0. before: [M, L+1, K, P+1].
        weights: [3] of total, slowest, fixed. box: (least slowest, most slowest, least fixed, most fixed).
        cut: labels that can't be below it are dropped. cap, scan: see above and `undominated`.
        finals: how many whole plans to return at most.
    Returns:
        paths: arcs of whole plans, [plans, L], best first, each ended by -1.
        dropped: the least bound among labels lost to `cap` (inf: none was, the pass was exact).
        count: labels kept.
    """
    first, stop, kind, devices, last = arcs
    layers, kinds, rows = len(first) - 2, len(available), len(prices)
    positions = before.shape[3] - 1
    least_slow, most_slow, least_fixed, most_fixed = box
    room = 1024
    value = np.empty((room, 3))
    whole = np.zeros((room, kinds + 1), np.int32)
    parent = np.empty((room, 2), np.int64)  # label that follows, arc
    label_kind = np.zeros(room, np.int64)
    start = np.zeros(layers + 2, np.int64)  # labels that begin at layer i are start[i]:end[i]
    end = np.zeros(layers + 2, np.int64)
    value[0, 0], value[0, 1], value[0, 2] = 0.0, least_slow, least_fixed
    parent[0, 0], parent[0, 1] = ROOT, ROOT
    start[layers], end[layers] = 0, 1
    count = 1
    dropped = np.inf
    owed = np.zeros((room, rows))  # per label and row: cost + prices * (devices used - available)
    for m in range(rows):
        for k in range(kinds):
            owed[0, m] -= prices[m, k] * available[k] * (1 + ROUND_OFF)
    new_room = 4096
    new_value = np.empty((new_room, 5))  # cost, slowest, fixed, bound, rank
    new_whole = np.empty((new_room, kinds + 1), np.int32)
    new_parent = np.empty((new_room, 2), np.int64)
    new_kind = np.empty(new_room, np.int64)
    for i in range(layers - 1, -1, -1):
        fresh = 0
        for a in range(first[i], first[i + 1]):
            j, k = stop[a], kind[a]
            for x in range(start[j], end[j]):
                p = min(whole[x, kinds] + 1, positions)
                if p > last[a] or whole[x, k] + devices[a] > available[k]:
                    continue
                moved = transfer[j, k, label_kind[x]] if j < layers else 0.0
                if moved == np.inf:
                    continue
                slow = max(value[x, 1], seconds[a] + moved if blocks else seconds[a])
                fixed = max(value[x, 2], extra[a])
                if slow > most_slow or fixed > most_fixed:
                    continue
                cost = value[x, 0] + weights[0] * (seconds[a] + moved) if weights[0] > 0 else 0.0
                terms = (cost - value[x, 0]) + weights[1] * slow + weights[2] * fixed
                bound = rank = -np.inf
                for m in range(rows - 1, -1, -1):
                    low = owed[x, m] + terms + prices[m, k] * devices[a] + before[m, i, k, p]
                    bound = max(bound, low)
                    if bound >= cut:
                        break
                    if m > 0:
                        rank = max(rank, low)
                if bound >= cut:
                    continue
                if fresh == new_room:
                    new_room *= 2
                    new_value, new_whole = grow(new_value, new_room), grow(new_whole, new_room)
                    new_parent, new_kind = grow(new_parent, new_room), grow(new_kind, new_room)
                new_value[fresh, 0], new_value[fresh, 1], new_value[fresh, 2] = cost, slow, fixed
                new_value[fresh, 3], new_value[fresh, 4] = bound, rank
                new_whole[fresh] = whole[x]
                new_whole[fresh, k] += devices[a]
                new_whole[fresh, kinds] = p
                new_parent[fresh, 0], new_parent[fresh, 1] = x, a
                new_kind[fresh] = k
                fresh += 1
        if i == 0:
            keep = in_order(new_value, 3, np.arange(fresh))[:finals]
        else:
            order = in_order(new_value, 0, np.arange(fresh))
            keep = undominated(order, new_value, new_whole, new_kind, 0)
            keep, lost = best_ranked(
                keep, new_value, SPARE * cap
            )  # comparing all with all would take too long
            dropped = min(dropped, lost)
            keep = undominated(in_order(new_value, 0, keep), new_value, new_whole, new_kind, scan)
            keep, lost = best_ranked(keep, new_value, cap)
            dropped = min(dropped, lost)
        start[i] = count
        if count + len(keep) > room:
            room = 2 * (count + len(keep))
            value, whole, owed = grow(value, room), grow(whole, room), grow(owed, room)
            parent, label_kind = grow(parent, room), grow(label_kind, room)
        for x in keep:
            value[count] = new_value[x, :3]
            whole[count] = new_whole[x]
            parent[count] = new_parent[x]
            follower, arc = new_parent[x]
            for m in range(rows):
                owed[count, m] = owed[follower, m] + prices[m, kind[arc]] * devices[arc]
                owed[count, m] += new_value[x, 0] - value[follower, 0]
            label_kind[count] = new_kind[x]
            count += 1
        end[i] = count
    paths = np.full((end[0] - start[0], layers + 1), -1, np.int64)
    for row in range(end[0] - start[0]):
        x, column = start[0] + row, 0
        while parent[x, 1] != ROOT:
            paths[row, column] = parent[x, 1]
            x = parent[x, 0]
            column += 1
    return paths, dropped, count
