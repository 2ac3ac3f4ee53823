"""Programs held to the order of their equations: where they are joined, and the memory that this frees."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from autopar.bench.plan_cell import step_segment
from autopar.bench.score import peak_bytes
from autopar.core.graph import Equation, Graph, OpKind, Phase, Value
from autopar.core.mesh import Axis, Device, Mesh
from autopar.models import catalog
from autopar.runtime.layout import jax_mesh
from autopar.runtime.lower import lower
from autopar.runtime.order import KEEPING_ORDER, joins
from autopar.runtime.segments import Compiled
from autopar.sharding.options import Options
from autopar.sharding.plan import plan
from autopar.trace.capture import capture
from autopar.trace.gradient import value_and_grad

ONE = Mesh(Device("test", 1 << 34, 9e11, (("float32", 1.4e13),), 1e11), (Axis("x", 1, 1e11, 5e-6),))


def graph_of(*steps: tuple[OpKind, tuple[int, ...], int]) -> Graph:
    """Values 0 and 1 are inputs, the last is an output; all equations are the backward's."""
    equations = tuple(
        Equation(kind.value, inputs, (out,), kind=kind, phase=Phase.BACKWARD) for kind, inputs, out in steps
    )
    count = 2 + len(steps)
    values = tuple(Value((8, 8), "float32") for _ in range(count))
    return Graph(values, equations, (0, 1), (count - 1,))


DOT, VIEW, FUSED = OpKind.CONTRACTION, OpKind.VIEW, OpKind.FUSED


def test_gradients_are_joined_with_the_cotangent_that_goes_on():
    chain = graph_of((DOT, (0, 1), 2), (VIEW, (2,), 3), (DOT, (0, 1), 4), (FUSED, (4,), 5), (DOT, (5, 1), 6))
    # 2 is a gradient, seen through a view; 4 goes on; 6 is a gradient and the end
    assert joins(chain, range(5)) == {2: (2, 4)}


def test_nothing_is_written_for_a_barrier_s_sake():
    fused = graph_of((DOT, (0, 1), 2), (FUSED, (0,), 3), (DOT, (3, 1), 4), (DOT, (4, 1), 5))
    # after the first product nothing goes on; 3 alone is computed in its reader, so the join is after 4
    assert joins(fused, range(4)) == {2: (2, 4)}
    shared = graph_of((FUSED, (0,), 2), (DOT, (2, 1), 3), (DOT, (2, 1), 4), (DOT, (4, 1), 5))
    assert joins(shared, range(4)) == {1: (3, 2)}


def test_what_is_computed_again_waits_for_its_cotangents():
    again = graph_of((DOT, (0, 1), 2), (VIEW, (0,), 3), (FUSED, (3,), 4), (DOT, (4, 2), 5), (DOT, (5, 1), 6))
    assert joins(again, range(5), fences={1}) == {1: (2, 3)}


def test_the_value_of_a_loss_is_not_left_to_the_end():
    chain = graph_of((FUSED, (0,), 2), (FUSED, (0,), 3), (DOT, (2, 1), 4), (DOT, (4, 1), 5), (DOT, (5, 1), 6))
    forward = tuple(replace(e, phase=Phase.FORWARD) for e in chain.equations[:2])
    step = replace(chain, equations=(*forward, *chain.equations[2:]), outputs=(3, 6))
    assert joins(step, range(5)) == {2: (3, 4)}  # 2 is read by the backward, 3 only by the caller


@pytest.fixture(scope="module")
def perceptron():
    sizes = {"inputs": 64, "hidden": 256, "outputs": 64}
    of = catalog.get("mlp", batch=512, value_and_grad=value_and_grad, **sizes)
    traced = capture(of.step, of.args)
    return traced, plan(traced.graph, range(len(traced.graph.equations)), ONE, Options())


def compiled(perceptron, ordered):
    traced, found = perceptron
    low = lower(traced, step_segment(traced.graph), found, jax_mesh(ONE, jax.devices()[:1]), ordered=ordered)
    donated = tuple(sorted({i for _, i in traced.graph.aliases}))
    return low, Compiled(low, donated).jitted.lower(*low.inputs)


def test_what_is_freed_in_order_is_freed_in_the_compiled_program(perceptron):
    options = dict(KEEPING_ORDER)
    low, ordered = compiled(perceptron, True)
    assert low.options == options
    free, plain = compiled(perceptron, False)
    assert free.options is None
    peaks = [peak_bytes(x.compile(compiler_options=options)) for x in (ordered, plain)]
    assert peaks[0] < peaks[1]
    predicted = perceptron[1].memory.peak
    assert abs(predicted / peaks[0] - 1) < 0.1


def test_numbers_are_the_same(perceptron):
    keys = np.random.default_rng(0)
    (low, ordered), (_, plain) = compiled(perceptron, True), compiled(perceptron, False)
    arrays = [keys.normal(size=x.shape).astype(x.dtype) ** 2 for x in low.inputs]
    given = [[jax.device_put(a, x.sharding) for a, x in zip(arrays, low.inputs)] for _ in range(2)]
    first = ordered.compile(compiler_options=dict(low.options))(*given[0])
    second = plain.compile()(*given[1])
    for a, b in zip(first, second):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
