"""Arrays that go from mesh to mesh over a mailbox stay the same, in the receiver's layout and dtype."""

import contextlib
import secrets
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.core.program import Buffer, Recv, Send, Slot
from autopar.runtime import layout
from autopar.runtime.ray_backend.mailbox import Mailbox, PeerFailed
from autopar.runtime.ray_backend.transport import TileTransport
from tests.test_runtime_tiles import SIZES, layouts, mesh

SECONDS = 10.0
STEPS = count()


@pytest.fixture(scope="module")
def ends():
    """A function from two ends (mesh, slots by value) to their transports."""
    secret = secrets.token_bytes(32)
    boxes = [Mailbox("127.0.0.1", f"stage {s}", secret) for s in range(2)]

    def make(*sides):
        meshes, slots = [on for on, _ in sides], [kept for _, kept in sides]
        made = []
        for s, (on, _) in enumerate(sides):
            devices = jax.devices()[:: -1 if s else 1][: on.size]
            jmesh = layout.jax_mesh(on, devices)
            made.append(TileTransport(s, meshes, slots, jmesh, boxes[s], SECONDS))
            made[-1].addresses, made[-1].jmesh = [box.address for box in boxes], jmesh
        for each, step in zip(made, [next(STEPS)] * 2):
            each.step = step
        return made

    with contextlib.ExitStack() as stack:
        for box in boxes:
            stack.callback(box.close)
        yield make


def carry(ends, arrays, source, target, specs, dtypes=None):
    """Returns arrays sent between meshes; each lies by the first of its specs here, by the second there."""
    slots = [
        {
            v: Slot(v, x.shape, (dtypes or {}).get((s, v), layout_name(x)), specs[v][s], 0)
            for v, x in enumerate(arrays)
        }
        for s in range(2)
    ]
    a, b = ends((source, slots[0]), (target, slots[1]))
    buffers = tuple(Buffer(v) for v in range(len(arrays)))
    placed = [jax.device_put(x, layout.named(a.jmesh, specs[v][0])) for v, x in enumerate(arrays)]
    a.send(Send(buffers, 1, "t"), placed)
    found = b.recv(Recv(buffers, 0, "t"))
    for v, (x, y) in enumerate(zip(arrays, found, strict=True)):
        assert y.sharding == layout.named(b.jmesh, specs[v][1]) and y.shape == x.shape
    return found


def layout_name(x):
    return str(x.dtype)


@given(st.data(), SIZES)
@settings(max_examples=40, deadline=None)
def test_any_layout_to_any_other(ends, data, sizes):
    (source, before), (target, after) = (data.draw(layouts(sizes)) for _ in range(2))
    x = np.arange(np.prod([8 * size for size in sizes], dtype=int), dtype=np.float32)
    x = x.reshape([8 * size for size in sizes])
    (y,) = carry(ends, [x], source, target, [(before, after)])
    np.testing.assert_array_equal(np.asarray(y), x)


@pytest.mark.parametrize(
    "dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")]
)
def test_the_receivers_dtype(ends, dtypes):
    x = jnp.linspace(-3, 3, 64).reshape(8, 8).astype(dtypes[0])
    kept = {(s, 0): dtype for s, dtype in enumerate(dtypes)}
    (y,) = carry(ends, [x], mesh(4), mesh(2), [((("x",), ()), ((), ("x",)))], kept)
    assert y.dtype == dtypes[1]
    np.testing.assert_array_equal(np.asarray(y), np.asarray(x.astype(dtypes[1])))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_typed_keys_in_any_layout(ends, impl):
    one, many = jax.random.key(7, impl=impl), jax.random.split(jax.random.key(3, impl=impl), 8)
    specs = [((), ()), ((("x",),), (("x",),))]
    found = carry(ends, [one, many], mesh(4), mesh(2), specs)
    for x, y in zip((one, many), found, strict=True):
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(jax.random.key_data(y), jax.random.key_data(x))


def test_several_buffers_share_a_message(ends):
    arrays = [np.float32(3), np.zeros((0, 4), np.int32), np.arange(8) % 3 == 0]
    specs = [((), ()), (((), ()), ((), ())), ((("x",),), ((),))]
    for x, y in zip(arrays, carry(ends, arrays, mesh(4), mesh(2), specs), strict=True):
        np.testing.assert_array_equal(np.asarray(y), x)


def test_appended_micro_batches_are_longer_than_their_slot(ends):
    slots = [{0: Slot(0, (4, 2), "float32", spec, 0)} for spec in ((("x",), ()), ((), ("x",)))]
    a, b = ends((mesh(4), slots[0]), (mesh(2), slots[1]))
    x = np.arange(32, dtype=np.float32).reshape(16, 2)
    a.send(Send((Buffer(0),), 1, "t"), [jax.device_put(x, layout.named(a.jmesh, (("x",), ())))])
    (y,) = b.recv(Recv((Buffer(0),), 0, "t"))
    np.testing.assert_array_equal(np.asarray(y), x)


def test_a_received_array_may_be_donated(ends):
    """Copies of one tile on several devices, which the message holds once, do not overwrite each other."""
    x = np.arange(1024, dtype=np.float32)
    (y,) = carry(ends, [x], mesh(2), mesh(4), [((("x",),), ((),))])
    twice = jax.jit(lambda v: v * 2, donate_argnums=0)
    first, *others = [shard.data for shard in y.addressable_shards]
    np.testing.assert_array_equal(np.asarray(twice(first)), 2 * x)
    for other in others:
        np.testing.assert_array_equal(np.asarray(other), x)


def test_messages_of_other_steps_are_not_taken(ends):
    slots = [{0: Slot(0, (), "float32", (), 0)}] * 2
    a, b = ends((mesh(1), slots[0]), (mesh(1), slots[1]))
    a.send(Send((Buffer(0),), 1, "t"), [jnp.float32(1)])
    b.step, b._seconds = next(STEPS), 0.1
    with pytest.raises(PeerFailed, match="from stage 0"):
        b.recv(Recv((Buffer(0),), 0, "t"))
