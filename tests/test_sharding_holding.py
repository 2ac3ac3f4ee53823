"""What the forward gathered is held for the layers that compute it again, as far as there is memory."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autopar as ap
from autopar.cluster import Cluster, Node, device
from autopar.core.graph import Phase
from autopar.core.mesh import Axis, Device, Mesh
from autopar.sharding.options import Options
from autopar.sharding.pins import zero3
from autopar.sharding.plan import _finish, plan, relabel
from autopar.sharding.problem.setting import canonical, prepare
from autopar.sharding.region import extract
from autopar.sharding.result import Reader
from autopar.trace.capture import capture
from tests.test_sharding_truth import predicted, truth

DEVICE = Device("test", 1 << 34, 9e11, (("float32", 1.4e13), ("float16", 1.4e13)), 1e11)
MESH = Mesh(DEVICE, (Axis("x", 2, 1.2e9, 1e-8), Axis("y", 4, 1e11, 1e-9)))
DEPTH, WIDTH = 3, 256


def step(params, batch):
    """Layers whose weights are cast, each computed again in the backward."""

    def loss(params):
        x = batch.astype("float16")
        for i, p in enumerate(params):
            with jax.named_scope(f"Layer_{i}"):
                h = jnp.tanh(x @ p["up"].astype("float16"))
                x = x + jnp.tanh(h @ p["down"].astype("float16"))
        return jnp.mean(jnp.square(x.astype("float32")))

    value, gradient = ap.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), value


def shapes(rows=512):
    params = [{n: jax.ShapeDtypeStruct((WIDTH, WIDTH), "float32") for n in ("up", "down")}] * DEPTH
    return params, jax.ShapeDtypeStruct((rows, WIDTH), "float32")


@cache
def traced():
    return capture(step, shapes(), remat=True)


def setting():
    graph = traced().graph
    region = extract(graph, range(len(graph.equations)))
    return prepare(region, MESH, canonical(Options(pinned=zero3(graph, MESH)), region))


def test_where_there_is_memory_all_gathered_weights_are_held():
    graph = traced().graph
    found = plan(graph, range(len(graph.equations)), MESH, Options(pinned=zero3(graph, MESH)))
    assert len(found.held) == 2 * DEPTH
    values = graph.values
    for again, ahead, _ in found.held:
        assert values[again] == values[ahead] and values[again].shape == (WIDTH, WIDTH)
    assert truth(traced(), found) == pytest.approx(predicted(found), rel=0.01)


def plan_of(model, solved, price=0.0):
    return relabel(_finish(model, solved, price), model.region)


def test_where_memory_is_dear_weights_are_gathered_again():
    model = setting()
    few, most = (plan_of(model, model.free(price), price) for price in (1e-6, 0.0))
    assert len(most.held) == 2 * DEPTH > len(few.held) == 0
    assert few.memory.activations < most.memory.activations
    assert truth(traced(), few) == pytest.approx(predicted(few), rel=0.01)


def test_what_is_held_may_be_less_than_what_is_read():
    """Gathered over the slow axis once, and over the fast one for each pass."""
    of = setting()
    found = plan_of(of, of.free(1e-10))
    uses = {(e, k): spec for e, k, spec in found.uses}
    assert len(found.held) == 2 * DEPTH
    equations, further = traced().graph.equations, 0
    for again, _, at in found.held:
        readers = [(i, e.inputs.index(again)) for i, e in enumerate(equations) if again in e.inputs]
        further += {uses[site] for site in readers} == {((), ())}
        assert [axis for axes in at for axis in axes] == ["y"]
    moved = [c.axes for c in found.collectives if c.kind == "all-gather" and c.phase is Phase.BACKWARD]
    assert 0 < further <= moved.count(("y",)) and {*moved} == {("y",)}
    assert truth(traced(), found) == pytest.approx(predicted(found), rel=0.01)


def test_weights_that_are_gathered_again_are_moved_twice():
    model = setting()
    known = model.free(0.0)
    halves = {each.node: len(each.home.layouts) // 2 for each in model.model.holdings}
    anew = tuple(k - halves.get(node, 0) for node, k in enumerate(known.chosen or ()))
    held, moved = (plan_of(model, replace(known, chosen=x)) for x in (known.chosen, anew))
    assert not moved.held and predicted(moved) > 1.2 * predicted(held)
    for found in (held, moved):
        assert truth(traced(), found) == pytest.approx(predicted(found), rel=0.01)


def test_each_held_weight_saves_its_gather_and_takes_its_bytes():
    of = setting()
    model, costs, region = of.model, of.costs(0.0), of.region
    held = of.free(0.0).chosen
    assert held is not None and len(model.holdings) == 2 * DEPTH

    def priced(chosen):
        own = sum(cost[k] for cost, k in zip(costs.nodes, chosen, strict=True))
        return own + sum(m[chosen[a], chosen[b]] for (a, b), m in costs.edges.items())

    def read(chosen):
        out = Reader(region, model, of.grid, of.nbytes, chosen, regather=False).read()
        return sum(out.seconds.values()), len(out.held), of.memory(chosen)

    whole, count, memory = read(held)
    for each in model.holdings:
        k = held[each.node]
        assert each.held(k)
        anew = (*held[: each.node], k - len(each.home.layouts) // 2, *held[each.node + 1 :])
        seconds, fewer, less = read(anew)
        assert fewer == count - 1
        assert seconds - whole == pytest.approx(priced(anew) - priced(held), rel=1e-3)
        assert seconds - whole > 2 * WIDTH * WIDTH / 2 / MESH.axes[0].bandwidth / 4
        parts = of.grid.shards(each.home.layouts[k])
        assert memory.activations - less.activations == 2 * WIDTH * WIDTH // parts


def test_numbers_are_those_of_one_device():
    nodes = (Node(f"n{i}", device("A100-40GB"), 4) for i in range(2))
    cluster = Cluster(tuple(nodes), network=1e9)
    key = np.random.default_rng(0)
    params, batch = jax.tree.map(lambda x: key.normal(size=x.shape).astype(x.dtype) / 16, shapes())
    made = ap.parallelize(step, cluster=cluster, method=ap.Zero3(mesh=(2, 4), remat="full"))
    sharding = made.plan(params, batch).stages[0].sharding
    assert len(sharding.held) == 2 * DEPTH
    state, loss = made(params, batch)
    other, alike = jax.jit(step)(params, batch)
    np.testing.assert_allclose(loss, alike, rtol=1e-3)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    made.close()
