"""What a plan says about one tensor: the alternatives cost what planning them costs, and no less alone."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from autopar.core.errors import BadInput
from autopar.core.mesh import Axis, Device, Mesh
from autopar.sharding.explain import explain, find
from autopar.sharding.options import Options
from autopar.sharding.plan import plan
from autopar.trace.capture import capture

MESH = Mesh(
    Device("test", 1 << 34, 9e11, (("float32", 1.4e13),), 1e11),
    (Axis("x", 2, 1.2e10, 2e-5), Axis("y", 4, 1e11, 5e-6)),
)


def step(state: Any, batch: Any) -> Any:
    def loss(w: Any) -> Any:
        return jnp.mean((jnp.tanh(batch["x"] @ w["up"]) @ w["down"] - batch["y"]) ** 2)

    value, slope = jax.value_and_grad(loss)(state)
    return jax.tree.map(lambda w, g: w - 0.1 * g, state, slope), value


@functools.cache
def traced() -> Any:
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    state = {"up": shape((512, 2048)), "down": shape((2048, 512))}
    return capture(step, (state, {name: shape((128, 512)) for name in "xy"}))


def test_an_alternative_costs_what_planning_it_costs():
    graph = traced().graph
    every = range(len(graph.equations))
    found = plan(graph, every, MESH, Options(gap=0.0))
    v = find(graph, "up")
    told = explain(graph, every, found, v, replan=20)
    assert told.spec == found.layout[v] and told.name.endswith("['up']")
    assert len(told.alternatives) > 5
    for other in told.alternatives:
        pinned = plan(graph, every, MESH, Options(gap=0.0, pinned=((v, other.spec),)))
        assert other.replanned == pytest.approx(pinned.objective - found.objective, rel=1e-2, abs=1e-8)
        assert -1e-8 <= (other.replanned or 0.0) <= other.alone + 1e-8
    shown = str(told)
    assert "dot_general at test_sharding_explain.py" in shown and "planned anew" in shown


def test_an_edited_plan_is_explained_as_it_is():
    graph = traced().graph
    every = range(len(graph.equations))
    v = find(graph, "up")
    edited = plan(graph, every, MESH, Options(pinned=((v, ((), ())),)))
    told = explain(graph, every, edited, v, replan=1)
    assert told.spec == ((), ()) and told.nbytes == 4 * 512 * 2048


def test_names_may_be_spelled_in_several_ways():
    graph = traced().graph
    v = find(graph, "up")
    assert find(graph, graph.values[v].name) == v
    assert find(graph, graph.values[v].name.replace("['", "/").replace("']", "")) == v
    with pytest.raises(BadInput, match=r"did you mean .*up"):
        find(graph, "upp")


def test_what_has_no_layout_is_refused():
    graph = traced().graph
    found = plan(graph, range(len(graph.equations)), MESH)
    number = next(v for v, value in enumerate(graph.values) if not value.shape)
    with pytest.raises(BadInput, match="no layout of its own"):
        explain(graph, range(len(graph.equations)), found, number)
