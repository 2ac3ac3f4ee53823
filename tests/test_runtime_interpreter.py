"""The interpreter over a hand-written program: two stages of unlike meshes, two micro-batches, one parameter
each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autopar.core.program import (
    Accumulate,
    Buffer,
    Free,
    Program,
    Recv,
    Rename,
    Role,
    Run,
    Send,
    Slot,
    Worker,
)
from autopar.runtime import layout
from autopar.runtime.interpreter import Interpreter
from autopar.runtime.transfer import LocalTransport, own

W0, W1, X, H, Y, G, N = range(7)  # weights, input, hidden, output, new weight of stage 0, unused name
SHARD, WHOLE = (("x",), ()), ((), ())


def part(value, microbatch):
    return Buffer(value, microbatch)


def total(value):
    return Buffer(value, role=Role.SUM)


def slots(shapes, dtypes=None):
    return tuple(
        Slot(v, shape, (dtypes or {}).get(v, "float32"), spec, 0) for v, (shape, spec) in shapes.items()
    )


def program(dtypes=None):
    """h = x·w0 on stage 0; y = h·w1 on stage 1; Σh/2 becomes the new w0; y is concatenated."""
    first: list = []
    second: list = []
    for i in range(2):
        first += [
            Run("forward_0", (part(X, i), Buffer(W0)), (part(H, i),)),
            Send((part(H, i),), 1, f"h.{i}"),
            Accumulate((total(H),), (part(H, i),), i == 0, 0.5),
            Free((part(H, i), part(X, i))),
        ]
        second += [
            Recv((part(H, i),), 0, f"h.{i}"),
            Run("forward_1", (part(H, i), Buffer(W1)), (part(Y, i),)),
            Accumulate((total(Y),), (part(Y, i),), i == 0, 1.0, concat=True),
            Free((part(Y, i), part(H, i))),
        ]
    first += [
        Run("apply_0", (Buffer(W0), total(H)), (Buffer(G),), donated=(0,)),
        Rename(Buffer(G), Buffer(W0)),
    ]
    first.append(Free((total(H),)))
    shapes = {W0: ((4, 4), SHARD), X: ((4, 4), SHARD), H: ((4, 4), SHARD), G: ((4, 4), SHARD)}
    feeds = (part(X, 0), part(X, 1))
    zero = Worker(0, (Buffer(W0),), feeds, ((0, Buffer(W0)),), tuple(first), slots(shapes))
    shapes = {W1: ((4, 4), WHOLE), H: ((4, 4), ((), ("x",))), Y: ((4, 4), SHARD)}
    one = Worker(1, (Buffer(W1),), (), ((1, total(Y)),), tuple(second), slots(shapes, dtypes))
    return Program((zero, one), (), 2)


FUNCTIONS = {
    "forward_0": lambda x, w: [x @ w],
    "forward_1": lambda h, w: [jnp.tanh(h @ w.astype(h.dtype))],
    "apply_0": lambda w, h: [w - 0.1 * h],
}


@pytest.fixture
def workers():
    return build(program())


def build(prog):
    devices = jax.devices()
    auto = (jax.sharding.AxisType.Auto,)
    grids = [np.array(devices[:4]), np.array(devices[4:6])]
    meshes = [jax.sharding.Mesh(grid, ("x",), axis_types=auto) for grid in grids]
    kept = [{slot.value: slot for slot in worker.slots} for worker in prog]

    def where(stage, buffer):
        return layout.slot_sharding(meshes[stage], kept[stage][buffer.value])

    transport = LocalTransport(kept, where)
    compiled = {
        name: jax.jit(f, donate_argnums=0 if name == "apply_0" else ()) for name, f in FUNCTIONS.items()
    }
    made = [
        Interpreter(worker, compiled, transport.post(s), lambda b, s=s: where(s, b))
        for s, worker in enumerate(prog)
    ]
    return made, transport, where


def load(workers, where, w0, w1, x):
    for s, arrays in enumerate([{Buffer(W0): w0, part(X, 0): x[:4], part(X, 1): x[4:]}, {Buffer(W1): w1}]):
        placed = own(list(arrays.values()), [where(s, b) for b in arrays], donate=False)
        workers[s].load(dict(zip(arrays, placed)))


def data():
    w0, w1, x = (
        np.random.default_rng(i).normal(size=shape).astype(np.float32)
        for i, shape in enumerate([(4, 4), (4, 4), (8, 4)])
    )
    return w0, w1, x


def expected(w0, w1, x):
    h = x @ w0
    return w0 - 0.1 * (h[:4] + h[4:]) / 2, np.tanh(h @ w1)


def test_a_worker_stops_where_a_message_is_missing_and_goes_on_when_it_is_there(workers):
    (zero, one), _, where = workers
    load((zero, one), where, *data())
    assert not one.advance() and one.at == 0
    assert zero.advance() and one.advance()
    new, y = expected(*data())
    np.testing.assert_allclose(zero.fetch([Buffer(W0)])[0], new, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one.fetch([total(Y)])[0], y, rtol=1e-5, atol=1e-6)
    assert one.fetch([total(Y)])[0].sharding == where(1, Buffer(Y))


def test_nothing_but_state_and_results_is_held_after_a_step(workers):
    (zero, one), transport, where = workers
    for _ in range(2):
        load((zero, one), where, *data())
        zero.start(), one.start()
        assert zero.advance() and one.advance()
        assert [len(w.live()) for w in (zero, one)] == [1, 2]
    assert transport.take(1, "h.0") is None


def test_the_cut_casts_to_the_receivers_dtype():
    (zero, one), _, where = build(program({H: "bfloat16", Y: "bfloat16"}))
    load((zero, one), where, *data())
    assert zero.advance() and one.advance()
    y = one.fetch([total(Y)])[0]
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float32), expected(*data())[1], atol=0.1)


def test_loading_never_shares_memory_with_the_callers_array():
    devices = jax.devices()
    mesh = jax.sharding.Mesh(np.array(devices), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    places = [layout.named(mesh, WHOLE), layout.named(mesh, SHARD), devices[0]]
    consume = jax.jit(lambda x: x + 1, donate_argnums=0)
    value = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    for source in places:
        for target in places[:2]:
            mine = jax.device_put(value, source)
            theirs = own([mine], [target], donate=False)[0]
            consume(theirs).block_until_ready()
            np.testing.assert_array_equal(np.asarray(mine), value)


def test_an_identity_sum_is_a_copy():
    from autopar.runtime import kernels

    x = jax.device_put(np.ones(8, np.float32), jax.devices()[0])
    (copy,) = kernels.begin(1.0, (x.sharding,), False)([x])
    jax.jit(lambda x: x + 1, donate_argnums=0)(copy).block_until_ready()
    np.testing.assert_array_equal(np.asarray(x), 1)
