"""What a plan says it communicates is what the compiled program communicates."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from autopar.core.graph import Phase
from autopar.core.mesh import Axis, Device, Mesh
from autopar.core.plan import ShardingPlan
from autopar.core.program import Segment
from autopar.models import gpt
from autopar.models.step import adamw, train_step
from autopar.runtime.layout import jax_mesh, named
from autopar.runtime.lower import lower
from autopar.sharding.cost import collective
from autopar.sharding.grid import grid_of
from autopar.sharding.options import Options
from autopar.sharding.pins import data_parallel, zero3
from autopar.sharding.plan import plan
from autopar.sharding.resharding import hops, table_for
from autopar.trace.capture import capture

DEVICE = Device("test", 1 << 34, 9e11, (("float32", 1.4e13),), 1e11)
MESH = Mesh(DEVICE, (Axis("x", 2, 1.2e10, 2e-5), Axis("y", 4, 1e11, 5e-6)))

BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "bf16": 2}
KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def group_size(line: str) -> int:
    """The devices that take part in one group of a collective, in the three ways XLA writes it."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", match[1])}
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match[1].split(","))
    return 8


def sent(text: str) -> float:
    """Bytes one device puts on the wire; an all-reduce only read through slices counts as a reduce-scatter.

    CPU has no reduce-scatter. Sizes are of a bandwidth-optimal collective over a whole group, which for two
    axes is what the hierarchical one sends.
    """
    total = 0.0
    lines = text.splitlines()
    for line in lines:
        match = re.match(rf"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ({KINDS})\(", line)
        if not match:
            continue
        arrays = re.findall(r"\b(f32|s32|u32|pred|bf16)\[([\d,]*)\]", match[2])
        size = sum(BYTES[t] * math.prod([int(n) for n in dims.split(",") if n]) for t, dims in arrays)
        n = group_size(line)
        users = [
            u for u in lines if re.search(r"[(, ]%?" + re.escape(match[1]) + r"[,)]", u.split(" = ", 1)[-1])
        ]
        sliced = users and all("dynamic-slice" in u or ("partition-id" in u and "fusion" in u) for u in users)
        factor = 1.0 if match[3] == "collective-permute" else (n - 1) / n
        if match[3] == "all-reduce" and not sliced:
            factor *= 2
        total += size * factor
    return total


def compiled(fun: Callable[..., Any], ins: Any, outs: Any, shapes: Any) -> str:
    jitted = jax.jit(fun, in_shardings=ins, out_shardings=outs, keep_unused=True)
    options = {"xla_disable_hlo_passes": "cpu-all-reduce-combiner"}
    return jitted.lower(*shapes).compile(compiler_options=options).as_text()


def predicted(found: ShardingPlan) -> float:
    return float(sum(c.nbytes * c.count for c in found.collectives))


def truth(traced: Any, found: ShardingPlan) -> float:
    """Bytes sent by the forward, the backward and the apply program together."""
    return sum(sent(program(traced, found, phase)) for phase in Phase)


def program(traced: Any, found: ShardingPlan, phase: Phase) -> str:
    graph = traced.graph
    every = tuple(i for i, e in enumerate(graph.equations) if e.phase is phase)
    made = {v for i in every for v in graph.equations[i].outputs}
    reads = {v for i in every for v in graph.equations[i].operands}
    elsewhere = {v for i, e in enumerate(graph.equations) if i not in every for v in e.operands}
    results = {v for v in graph.outputs if v is not None}
    inputs, outputs = tuple(sorted(reads - made)), tuple(sorted(made & (elsewhere | results)))
    segment = Segment("step", 0, phase, 0, every, inputs, outputs)
    low = lower(traced, segment, found, jax_mesh(MESH, jax.devices()))
    ins, outs = tuple(x.sharding for x in low.inputs), [x.sharding for x in low.outputs]
    return compiled(lambda *a: low.fun(list(a)), ins, outs, low.inputs)


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
    assert truth(traced, found) == pytest.approx(predicted(found), rel=0.03)


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
    assert truth(traced, found) == pytest.approx(predicted(found), rel=0.03)
