"""What layers compute again: as asked for, or where memory is short; the numbers stay those of one device."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autopar as ap
from autopar.api.tracing import Tracer
from autopar.core.errors import BadInput, DoesNotFit, UnknownName
from autopar.core.graph import OpKind, Remat
from autopar.sharding.limit.restrict import choosing
from autopar.stages.forward import END
from tests.steps import EIGHT, alone, assert_equal, case, run


def planned(name, cluster=EIGHT, **options):
    of = case(name)
    step = ap.parallelize(of.step, cluster=cluster, method=ap.ShardParallel(mesh=(2, 4), **options))
    return step, step.plan(of.state, of.batches[0])


def limited(limit):
    nodes = (replace(node, device=replace(node.device, memory=limit)) for node in EIGHT.nodes)
    return replace(EIGHT, nodes=tuple(nodes))


@pytest.mark.parametrize(
    ("name", "remat", "again"),
    [
        ("gpt", {"Block_0": "full", "Block_[12]": "products"}, {Remat.FULL: 1, Remat.PRODUCTS: 2}),
        ("mlp", "products", {Remat.PRODUCTS: 1}),
        pytest.param("wresnet", "full", {Remat.FULL: 3}, marks=pytest.mark.slow),
        pytest.param("wresnet", "products", {Remat.PRODUCTS: 3}, marks=pytest.mark.slow),
        pytest.param("gpt scan", True, {Remat.FULL: 3}, marks=pytest.mark.slow),
    ],
)
def test_as_asked_for(name, remat, again, tmp_path):
    step, plan = planned(name, remat=remat)
    assert {r: sum(x is r for _, x in plan.remat) for r in again} == again
    assert "computed again in the backward pass" in str(plan)
    assert_equal(run(step, case(name)), alone(name))
    plan.save(tmp_path / "plan.json")
    assert ap.Plan.load(tmp_path / "plan.json").remat == plan.remat
    step.close()


def headed(params, batch):
    """A layer before a head that is as much wider."""

    def loss(params):
        x = batch
        for i, p in enumerate(params[:-1]):
            with jax.named_scope(f"Layer_{i}"):
                x = x + jnp.tanh(jnp.exp(-jnp.square(x @ p)) @ p.T)
        return jnp.mean(jnp.square(jnp.exp(x @ params[-1])))

    value, gradient = ap.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), value


@pytest.mark.parametrize(("width", "apart"), [(96, True), (16, False)])
def test_a_wide_head_is_a_layer_of_its_own(width, apart):
    shapes = [(32, 64), (32, 64), (32, width)]
    args = [jax.ShapeDtypeStruct(s, "float32") for s in shapes], jax.ShapeDtypeStruct((256, 32), "float32")
    tracer = Tracer(headed, args, {}, ending=True)
    graph = tracer(1, {END: (Remat.NONE, Remat.FULL), "*": tuple(Remat)}).graph
    assert graph.layers == ("Layer_0", "Layer_1", *([END] if apart else []))
    assert choosing(graph).get(END) == ((Remat.NONE, Remat.FULL) if apart else None)
    wide = [
        e
        for e in graph.equations
        if e.kind is OpKind.CONTRACTION and width in graph.values[e.outputs[0]].shape
    ]
    assert {graph.layers[e.layer] for e in wide} == {END if apart else "Layer_1"}
    tracer.ending = False
    assert tracer(1, tuple(Remat)).graph.layers == ("Layer_0", "Layer_1")


def wide_layers(params, batch):
    """Two layers whose activations take far more than their weights."""

    def loss(params):
        x = batch
        for i, p in enumerate(params):
            with jax.named_scope(f"Layer_{i}"):
                x = x + jnp.tanh(jnp.exp(-jnp.square(x @ p["up"])) @ p["down"])
        return jnp.mean(jnp.square(x))

    value, gradient = ap.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), value


def test_chosen_where_memory_is_short():
    keys = np.random.default_rng(0)
    params = [{n: keys.normal(size=(16, 16)).astype("f4") / 4 for n in ("up", "down")} for _ in range(2)]
    batch = keys.normal(size=(8192, 16)).astype("f4")

    def made(cluster):
        step = ap.parallelize(wide_layers, cluster=cluster, method=ap.ShardParallel(mesh=(2, 4)))
        return step, step.plan(params, batch)

    _, free = made(EIGHT)
    assert free.remat == ()
    limit = int(0.6 * free.stages[0].memory.peak)
    step, plan = made(limited(limit))
    assert plan.remat and plan.stages[0].memory.peak <= limit
    assert any("memory is short; recomputed" in note and "ms)" in note for note in plan.notes)
    state, loss = step(params, batch)
    other, alike = jax.jit(wide_layers)(params, batch)
    np.testing.assert_allclose(loss, alike, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    step.close()


def test_a_saved_plan_recomputes_the_same():
    of = case("mlp")
    _, plan = planned("mlp", remat="full")
    step = ap.parallelize(of.step, cluster=EIGHT, method=ap.Manual(plan))
    assert step.plan(of.state, of.batches[0]).remat == plan.remat


def test_nothing_fits():
    of = case("mlp")
    with pytest.raises(
        DoesNotFit, match=r"nothing fits into .*no choice of layers.*Biggest per device.*add dev"
    ):
        planned("mlp", limited(1500))
    with pytest.raises(DoesNotFit):
        method = ap.ShardParallel(mesh=(2, 4), remat=False)
        ap.parallelize(of.step, cluster=limited(1500), method=method).plan(of.state, of.batches[0])


def test_bad_input():
    with pytest.raises(UnknownName, match="kind of remat"):
        ap.ShardParallel(remat="some")
    with pytest.raises(UnknownName, match="kind of remat"):
        ap.Auto(remat={"Block_0": "some"})
    with pytest.raises(BadInput, match="remat takes True, False"):
        ap.ShardParallel(remat=3)  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="layer to recompute"):
        planned("mlp", remat={"Block_7": "full"})
