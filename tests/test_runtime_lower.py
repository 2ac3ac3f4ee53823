"""Lowering: whatever layouts a plan gives the values, the results are the function's."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autopar.core.errors import PlanError
from autopar.core.graph import Phase
from autopar.core.mesh import Axis, Device, Mesh
from autopar.core.plan import LoopLayouts, Memory, ShardingPlan
from autopar.core.program import Segment
from autopar.runtime import layout
from autopar.runtime.lower import lower
from autopar.sharding.ways.grid import grid_of
from autopar.sharding.ways.resharding import table_for
from autopar.trace.capture import capture

DEVICE = Device("test", 1 << 30, 1e11, (("float32", 1e12),), 1e10)
MESH = Mesh(DEVICE, (Axis("y", 2, 1e9, 1e-5), Axis("x", 2, 1e10, 1e-5)))


def plan_of(scope, **more):
    zero = Memory(0, 0, 1, 0, 1 << 30)
    return ShardingPlan(
        MESH, *scope[:3], 0.0, 0.0, 0.0, zero, (), 0.0, 0.0, "feasible", loops=scope[3], **more
    )


def random_scope(graph, rng):
    """Random layouts for every value, and other random layouts where equations read and make some of them."""
    grid = grid_of(MESH)

    def pick(v):
        return grid.spec(rng.choice(table_for(graph.values[v].shape, grid).layouts))

    kept = {v: pick(v) for v, value in enumerate(graph.values) if value.shape}
    uses, partials, loops = [], [], []
    for e, equation in enumerate(graph.equations):
        uses += [(e, k, pick(v)) for k, v in enumerate(equation.inputs) if v in kept and rng.random() < 0.3]
        if equation.loop is None:
            partials += [
                (e, k, pick(v)) for k, v in enumerate(equation.outputs) if v in kept and rng.random() < 0.3
            ]
        else:
            loops.append(LoopLayouts(e, *random_scope(equation.loop.body, rng)))
            for k, v in enumerate(equation.outputs[equation.loop.carries :], equation.loop.carries):
                partials.append((e, k, ((), *kept[v][1:])))
    return tuple(kept.items()), tuple(uses), tuple(partials), tuple(loops)


def run(fun, args, sharding):
    traced = capture(fun, args)
    graph = traced.graph
    assert not graph.constants
    segment = Segment(
        "step", 0, Phase.FORWARD, 0, tuple(range(len(graph.equations))), graph.inputs, graph.outputs
    )
    jmesh = layout.jax_mesh(MESH, jax.devices()[:4])
    lowered = lower(traced, segment, sharding(graph), jmesh)
    placed = jax.device_put(list(args), [x.sharding for x in lowered.inputs])
    results = jax.jit(lowered.fun, out_shardings=[x.sharding for x in lowered.outputs])(placed)
    return results, lowered


def check(fun, args, sharding, **tolerance):
    results, lowered = run(fun, args, sharding)
    for got, want, struct in zip(results, jax.jit(fun)(*args), lowered.outputs, strict=True):
        assert got.shape == struct.shape and got.dtype == struct.dtype
        np.testing.assert_allclose(np.asarray(got, np.float32), want, **tolerance)


def perceptron(w, v, x):
    def loss(w, v):
        return jnp.mean(jnp.square(jnp.tanh(x @ w) @ v))

    value, (a, b) = jax.value_and_grad(loss, (0, 1))(w, v)
    return w - 0.1 * a, v - 0.1 * b, value


def recurrence(w, x):
    def trip(h, row):
        h = jnp.tanh(h @ w + row)
        return h, (h * 2, jnp.sum(h))

    h, (rows, sums) = jax.lax.scan(trip, jnp.zeros_like(x[0]), x)
    return h, rows, sums


def arrays(*shapes):
    return [np.random.default_rng(i).normal(size=s).astype(np.float32) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("seed", range(3))
def test_random_layouts_of_a_gradient_step(seed):
    args = arrays((8, 16), (16, 4), (12, 8))
    check(perceptron, args, lambda g: plan_of(random_scope(g, random.Random(seed))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_random_layouts_inside_a_loop(seed):
    args = arrays((8, 8), (4, 4, 8))
    check(recurrence, args, lambda g: plan_of(random_scope(g, random.Random(seed))), rtol=1e-4, atol=1e-5)


def test_layouts_are_pinned_on_both_sides():
    def sharding(graph):
        specs = {
            v: (("x",), ("y",)) for v in (*graph.inputs, *graph.outputs) if len(graph.values[v].shape) == 2
        }
        return plan_of((tuple(specs.items()), (), (), ()))

    results, lowered = run(perceptron, arrays((8, 16), (16, 4), (12, 8)), sharding)
    assert results[0].sharding.spec == jax.sharding.PartitionSpec("x", "y")
    assert [x.sharding.spec for x in lowered.inputs] == [jax.sharding.PartitionSpec("x", "y")] * 3


def test_a_move_is_shared_by_its_readers():
    """Two readers of one value in one other layout cost one all-gather, not two."""

    def fun(x):
        return jnp.sin(x) @ jnp.ones((8, 4)), jnp.sin(x) @ jnp.full((8, 4), 2.0)

    def sharding(graph):
        kept = {graph.inputs[0]: ((("x",)), ())}
        first = [(e, 0) for e, q in enumerate(graph.equations) if graph.inputs[0] in q.operands]
        rest = {v: ((), ()) for q in graph.equations for v in q.outputs if len(graph.values[v].shape) == 2}
        return plan_of((tuple((kept | rest).items()), tuple((e, k, ((), ())) for e, k in first), (), ()))

    traced = capture(fun, arrays((8, 8)))
    graph = traced.graph
    segment = Segment(
        "step", 0, Phase.FORWARD, 0, tuple(range(len(graph.equations))), graph.inputs, graph.outputs
    )
    lowered = lower(traced, segment, sharding(graph), layout.abstract_mesh(MESH))
    readers = sum(graph.inputs[0] in q.operands for q in graph.equations)
    moved = str(jax.make_jaxpr(lowered.fun)(list(lowered.inputs))).count("sharding_constraint[")
    others = sum(len(graph.values[v].shape) == 2 for q in graph.equations for v in q.outputs)
    assert readers == 2 and moved == others + 1


def test_a_carry_leaves_every_trip_in_the_layout_it_entered_in():
    traced = capture(recurrence, arrays((8, 8), (4, 4, 8)))
    graph = traced.graph
    (e,) = [e for e, equation in enumerate(graph.equations) if equation.loop is not None]
    body = graph.equations[e].loop.body
    carry = body.inputs[graph.equations[e].loop.consts]
    inner = LoopLayouts(e, ((carry, (("y",), ())), (body.outputs[0], ((), ("x",)))), (), ())
    segment = Segment(
        "step", 0, Phase.FORWARD, 0, tuple(range(len(graph.equations))), graph.inputs, graph.outputs
    )
    lowered = lower(traced, segment, plan_of(((), (), (), (inner,))), layout.abstract_mesh(MESH))
    equations = jax.make_jaxpr(lowered.fun)(list(lowered.inputs)).eqns
    trip = next(q for q in equations if q.primitive.name == "scan").params["jaxpr"].jaxpr
    last = next(q for q in trip.eqns if trip.outvars[0] in q.outvars)
    assert last.primitive.name == "sharding_constraint"
    assert last.params["sharding"].spec == jax.sharding.PartitionSpec("y", None)


def test_a_device_without_a_dtype_keeps_another_one():
    def fun(w, x):
        h = jnp.tanh(x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16))
        return h, h.astype(jnp.float32).sum(0)

    def sharding(graph):
        return plan_of(((), (), (), ()), dtypes=(("bfloat16", "float32"),))

    results, lowered = run(fun, arrays((8, 16), (12, 8)), sharding)
    assert [x.dtype for x in lowered.outputs] == [jnp.float32, jnp.float32]
    want = np.tanh(arrays((8, 16), (12, 8))[1] @ arrays((8, 16), (12, 8))[0])
    np.testing.assert_allclose(np.asarray(results[0]), want, atol=0.05)


def test_a_layout_that_does_not_divide_is_refused_by_name():
    def sharding(graph):
        return plan_of((((graph.inputs[0], (("y", "x"), ())),), (), (), ()))

    with pytest.raises(PlanError, match=r"w .*dim 0 of size 6 cannot be kept in 4 equal parts"):
        run(lambda w: (w * 2,), arrays((6, 2)), sharding)
