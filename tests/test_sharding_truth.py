"""What a plan says it communicates is what the compiled program communicates."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from autopar.bench.hlo import read
from autopar.bench.hlo_traffic import traffic
from autopar.bench.plan_cell import step_segment
from autopar.bench.score import price_of
from autopar.core.mesh import Axis, Device, Mesh
from autopar.core.plan import ShardingPlan
from autopar.models import gpt
from autopar.models.step import adamw, train_step
from autopar.runtime.layout import jax_mesh, named
from autopar.runtime.lower import lower
from autopar.sharding.options import Options
from autopar.sharding.pins import data_parallel, zero3
from autopar.sharding.plan import plan
from autopar.sharding.ways.cost import collective
from autopar.sharding.ways.grid import grid_of
from autopar.sharding.ways.resharding import hops, table_for
from autopar.trace.capture import capture

DEVICE = Device("test", 1 << 34, 9e11, (("float32", 1.4e13),), 1e11)
MESH = Mesh(DEVICE, (Axis("x", 2, 1.2e10, 2e-5), Axis("y", 4, 1e11, 5e-6)))


def sent(text: str) -> float:
    """Bytes one device puts on the wire."""
    grid = grid_of(MESH)
    return sum(x.count * price_of(x, grid)[0].wire * x.nbytes for x in traffic(read(text), grid.sizes))


def compiled(fun: Callable[..., Any], ins: Any, outs: Any, shapes: Any) -> str:
    jitted = jax.jit(fun, in_shardings=ins, out_shardings=outs, keep_unused=True)
    options = {"xla_disable_hlo_passes": "cpu-all-reduce-combiner"}
    return jitted.lower(*shapes).compile(compiler_options=options).as_text()


def predicted(found: ShardingPlan) -> float:
    return float(sum(c.nbytes * c.count for c in found.collectives))


def truth(traced: Any, found: ShardingPlan) -> float:
    """Bytes sent by the step, which is one program."""
    low = lower(traced, step_segment(traced.graph), found, jax_mesh(MESH, jax.devices()))
    ins, outs = tuple(x.sharding for x in low.inputs), [x.sharding for x in low.outputs]
    return sent(compiled(lambda *a: low.fun(list(a)), ins, outs, low.inputs))


def test_every_reshard_of_a_matrix_moves_what_its_price_says():
    shape, grid, jmesh = (16, 64), grid_of(MESH), jax_mesh(MESH, jax.devices())
    known = table_for(shape, grid)
    pairs = [(s, t) for s, t in itertools.permutations(known.layouts, 2)]
    for source, target in pairs[:: max(1, len(pairs) // 24)]:
        way = hops(grid.spec(source), grid.spec(target), shape, MESH)

        def move(x: Any, way: Any = way) -> Any:
            for stop in way:
                x = jax.lax.with_sharding_constraint(x, named(jmesh, stop))
            return x

        text = compiled(
            move,
            (named(jmesh, grid.spec(source)),),
            named(jmesh, grid.spec(target)),
            [jax.ShapeDtypeStruct(shape, jnp.float32)],
        )
        price = sum(
            collective(grid, m.kind, m.axes).wire * m.share * 4 * 16 * 64 for m in known.chain(source, target)
        )
        assert sent(text) == pytest.approx(price), (source, target, way)


def mlp_step(state: Any, batch: Any) -> Any:
    def loss(w: Any) -> Any:
        h = jnp.tanh(batch["x"] @ w["a"] + w["b"])
        return jnp.mean((h @ w["c"] - batch["y"]) ** 2)

    value, slope = jax.value_and_grad(loss)(state)
    return jax.tree.map(lambda w, g: w - 0.1 * g, state, slope), value


def shapes(**sizes: tuple[int, ...]) -> dict[str, Any]:
    return {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}


@pytest.mark.parametrize("method", [None, data_parallel, zero3])
def test_a_perceptron_communicates_what_was_predicted(method: Any):
    state = shapes(a=(512, 2048), b=(2048,), c=(2048, 512))
    batch = shapes(x=(128, 512), y=(128, 512))
    traced = capture(mlp_step, (state, batch))
    pins = method(traced.graph, MESH) if method else ()
    found = plan(traced.graph, range(len(traced.graph.equations)), MESH, Options(pinned=pins))
    assert truth(traced, found) == pytest.approx(predicted(found), rel=0.01)


def test_a_small_gpt_communicates_what_was_predicted():
    config = gpt.GPTConfig(vocabulary=512, positions=64, layers=2, hidden=128, heads=8)
    optimizer = adamw()
    params = jax.eval_shape(lambda: gpt.init(config, jax.random.key(0)))
    step = train_step(lambda p, b, k: gpt.loss(config, p, b, k), optimizer)
    from autopar.models.step import TrainState

    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params), None
    )
    tokens = jax.ShapeDtypeStruct((16, 64), jnp.int32)
    traced = capture(step, (state, {"tokens": tokens, "targets": tokens}))
    found = plan(traced.graph, range(len(traced.graph.equations)), MESH)
    assert truth(traced, found) == pytest.approx(predicted(found), rel=0.01)


def test_weights_gathered_again_for_the_backward_are_moved_twice_and_not_held():
    state = shapes(a=(512, 2048), b=(2048,), c=(2048, 512))
    traced = capture(mlp_step, (state, shapes(x=(128, 512), y=(128, 512))))
    pins = zero3(traced.graph, MESH)
    kept, again = (
        plan(traced.graph, range(len(traced.graph.equations)), MESH, Options(pinned=pins, regather=r))
        for r in (False, True)
    )
    assert predicted(again) >= predicted(kept)
    for found in (kept, again):
        assert truth(traced, found) == pytest.approx(predicted(found), rel=0.01)
