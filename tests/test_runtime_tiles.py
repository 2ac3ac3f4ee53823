"""What travels between meshes: every element once to every tile that wants it, from one that holds it."""

import math

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.core.mesh import Axis, Device, Mesh
from autopar.runtime import layout
from autopar.runtime.ray_backend.places import boxes
from autopar.runtime.ray_backend.tiles import extent, inside, meet, route, size

DEVICE = Device("d", 1, 1.0, (("float32", 1.0),), 1.0)


def mesh(*sizes):
    return Mesh(DEVICE, tuple(Axis(name, size, 1.0, 0.0) for name, size in zip("xyz", sizes)))


@st.composite
def layouts(draw, sizes):
    """A spec of a mesh with at most 8 devices, and the ways each dim is cut."""
    on = mesh(*draw(st.sampled_from([(1,), (2,), (4,), (8,), (2, 2), (2, 4), (4, 2), (2, 2, 2)])))
    left, spec = list(draw(st.permutations(on.names))), []
    for _ in sizes:
        count = draw(st.integers(0, len(left)))
        spec.append(tuple(left[:count]))
        left = left[count:]
    return on, tuple(spec)


SIZES = st.lists(st.integers(0, 3), max_size=3)
"""Of a dim, in units of 8: every mesh divides it."""


@given(st.data(), SIZES)
@settings(max_examples=150, deadline=None)
def test_places_are_jax_s_own(data, sizes):
    shape = tuple(8 * size for size in sizes)
    on, spec = data.draw(layouts(sizes))
    sharding = layout.named(layout.jax_mesh(on, jax.devices()[: on.size]), spec)
    theirs = sharding.devices_indices_map(shape)
    want = [
        tuple(s.indices(n)[:2] for s, n in zip(theirs[device], shape)) for device in jax.devices()[: on.size]
    ]
    assert list(boxes(shape, spec, on)) == want


def carried(shape, source, target):
    """What every destination device holds after the route, and what each source device sent."""
    whole = np.arange(math.prod(shape)).reshape(shape)
    held = [whole[tuple(slice(*side) for side in box)] for box in source]
    way = route(source, target)
    tiles = [np.full(extent(box), -1) for box in way.targets]
    sent = [0] * len(source)
    for piece in way.pieces:
        assert piece.tile == source[piece.source]
        part = held[piece.source][inside(piece.box, piece.tile)]
        slot = tiles[piece.target][(*inside(piece.box, way.targets[piece.target]), ...)]
        assert (slot == -1).all(), "an element travels twice"
        slot[...] = part
        sent[piece.source] += part.size
    placed = {p: tiles[t] for t, holders in enumerate(way.holders) for p in holders}
    for position, box in enumerate(target):
        np.testing.assert_array_equal(placed[position], whole[tuple(slice(*side) for side in box)])
    return way, sent


@given(st.data(), SIZES)
@settings(max_examples=150, deadline=None)
def test_every_tile_arrives_whole(data, sizes):
    shape = tuple(8 * size for size in sizes)
    ends = [boxes(shape, spec, on) for on, spec in (data.draw(layouts(sizes)) for _ in range(2))]
    way, sent = carried(shape, *ends)
    assert sum(sent) == sum(size(box) for box in set(ends[1]))
    assert all(size(piece.box) for piece in way.pieces)


def uneven(n, parts):
    """A dim in rounded-up parts: the last are shorter, or empty."""
    step = -(-n // parts)
    return [(min(i * step, n), min((i + 1) * step, n)) for i in range(parts)]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_uneven_tiles_arrive_whole(dims):
    ends = []
    for cut in ((ways for _, ways, _ in dims), (ways for _, _, ways in dims)):
        tiles = [()]
        for (n, _, _), ways in zip(dims, cut):
            tiles = [(*tile, side) for tile in tiles for side in uneven(n, ways)]
        ends.append(tiles)
    carried(tuple(n for n, _, _ in dims), *ends)


def test_holders_of_the_same_tile_share_the_work():
    on, shape = mesh(4), (8, 8)
    source, target = boxes(shape, ((), ()), on), boxes(shape, (("x",), ()), on)
    _, sent = carried(shape, source, target)
    assert sent == [16, 16, 16, 16]


def test_a_replicated_destination_gets_one_copy():
    on, shape = mesh(4), (8,)
    way, sent = carried(shape, boxes(shape, (("x",),), on), boxes(shape, ((),), on))
    assert len(way.targets) == 1 and way.holders == ((0, 1, 2, 3),)
    assert sent == [2, 2, 2, 2]


def test_boxes_that_do_not_meet():
    assert size(meet(((0, 2), (0, 2)), ((2, 4), (0, 2)))) == 0
    assert size(()) == 1  # a scalar is one element
