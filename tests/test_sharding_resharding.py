"""Chains of moves between layouts: legal, cheapest, priced as listed."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.core.mesh import Axis, Device, Mesh
from autopar.sharding.ways.cost import ALL_REDUCE, REDUCE_SCATTER, SLICE, collective
from autopar.sharding.ways.grid import Layout, grid_of
from autopar.sharding.ways.resharding import NOMINAL, Move, hops, moves, passes, table_for

DEVICE = Device("test", 1 << 34, 1e12, (("float32", 1e13),), 1e11)
MESH = Mesh(DEVICE, (Axis("x", 2, 1.2e10, 2e-5), Axis("y", 4, 1e11, 5e-6)))
GRID = grid_of(MESH)


def test_layouts_are_every_divisible_one():
    # two axes on three dims: none, either or both on any dim, both orders on one dim
    assert len(table_for((8, 8, 8), GRID).layouts) == 16 + 3
    assert len(table_for((8, 3), GRID).layouts) == 5
    assert table_for((3, 5), GRID).layouts == (((), ()),)
    assert table_for((0, 8), GRID).layouts[0] == ((), ())


def test_chains_are_as_cheap_as_relaxing_every_edge_to_the_end():
    known = table_for((16, 16), GRID)
    count = len(known.layouts)
    best = np.full((count, count), np.inf)
    np.fill_diagonal(best, 0)
    for i, layout in enumerate(known.layouts):
        for kind, axes, after in moves(layout, 2):
            share = max(1 / GRID.shards(layout), 1 / GRID.shards(after))
            cost = collective(GRID, kind, axes).seconds(NOMINAL * share)
            cost += passes(layout, Move(kind, axes, after, share)) * NOMINAL * share / GRID.memory
            best[i, known.index[after]] = min(best[i, known.index[after]], cost)
    for k in range(count):  # Floyd-Warshall
        best = np.minimum(best, best[:, k : k + 1] + best[k : k + 1])
    fixed, per_byte, *_ = known.prices(known.layouts, known.layouts)
    assert np.allclose(fixed + per_byte * NOMINAL, best, rtol=1e-9, atol=1e-12)


layouts = st.sampled_from(table_for((8, 16, 8), GRID).layouts)


@settings(max_examples=200, deadline=None)
@given(layouts, layouts)
def test_hops_lead_there_and_each_is_one_kind_of_move(source: Layout, target: Layout):
    way = hops(GRID.spec(source), GRID.spec(target), (8, 16, 8), MESH)
    assert (way[-1] == GRID.spec(target)) if source != target else way == ()
    chain = table_for((8, 16, 8), GRID).chain(source, target)
    here = source
    for move in chain:
        assert (move.kind, move.axes, move.after) in list(moves(here, 2))
        here = move.after
    assert len(way) <= len(chain)
    assert sum(m.kind != SLICE for m in chain) <= len(way)


def test_a_new_minor_axis_is_a_free_slice_and_a_new_major_one_is_not():
    price = table_for((8, 8), GRID).prices([((1,), ())], [((1, 0), ()), ((0, 1), ())])
    assert not price[:, 0, 0].any() and price[1, 0, 1] > 0 and price[4, 0, 1] >= 1


def test_a_collective_over_two_axes_costs_what_nested_ones_do():
    for kind in (ALL_REDUCE, REDUCE_SCATTER):
        both = collective(GRID, kind, (0, 1)).seconds(1e6)
        fast, slow = collective(GRID, kind, (1,)).seconds(1e6), collective(GRID, kind, (0,)).seconds(1e6 / 4)
        assert np.isclose(both, fast + slow)


def test_all_reduce_is_reduce_scatter_and_all_gather():
    for axes in itertools.chain([(0,), (1,)], [(0, 1)]):
        assert np.isclose(
            collective(GRID, ALL_REDUCE, axes).seconds(1e6),
            2 * collective(GRID, REDUCE_SCATTER, axes).seconds(1e6),
        )
    assert collective(GRID, ALL_REDUCE, (0,)).wire == 2 * (2 - 1) / 2
