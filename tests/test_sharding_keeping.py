"""What plans that keep products could reach is bounded without planning what they compute again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autopar.core.graph import Phase, Remat
from autopar.core.mesh import Axis, Device, Mesh
from autopar.sharding.limit import mixing
from autopar.sharding.limit.moments import moments_of
from autopar.sharding.options import Options
from autopar.sharding.problem.setting import prepare
from autopar.sharding.problem.solving import minimise
from autopar.sharding.region import extract
from autopar.stages import assign
from autopar.trace.capture import capture
from autopar.trace.gradient import value_and_grad

OPTIONS = Options(gap=0.0, seconds=20.0, regather=False, share=False)
MESH = Mesh(
    Device("test", 1 << 34, 1e12, (("float32", 1e13),), 1e11),
    (Axis("x", 2, 3e9, 1e-5), Axis("y", 2, 1e11, 1e-6)),
)


def prepared(remat, rows):
    def loss(params, batch):
        x = batch["x"]
        for i, p in enumerate(params):
            with jax.named_scope(f"Layer_{i}"):
                read = x * jax.lax.rsqrt(1 + jnp.mean(x * x, -1, keepdims=True))
                x = x + jnp.tanh(read @ p["up"]) @ p["down"]
        return jnp.mean(jnp.square(x - batch["y"]))

    def step(params, batch):
        value, gradient = value_and_grad(loss)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), value

    def shape(*dims):
        return jax.ShapeDtypeStruct(dims, "float32")

    params = [{"up": shape(256, 1024), "down": shape(1024, 256)} for _ in range(2)]
    batch = {k: shape(rows, 256) for k in "xy"}
    graph = capture(step, (params, batch), assign=assign, remat=remat).graph
    return prepare(extract(graph, range(len(graph.equations))), MESH, OPTIONS)


@pytest.fixture(scope="module")
def settings():
    return {remat: prepared(remat, 64) for remat in (Remat.NONE, Remat.PRODUCTS)}


def proven(setting, price, limit):
    """What a price of all bytes at the turn from forward to backward proves of plans within a limit."""
    moments = moments_of(setting)
    prices = np.zeros(moments.ticks)
    prices[min(step.tick for step in setting.model.steps if step.phase is Phase.BACKWARD)] = price
    costs = moments.priced(prices, 1.0, moments.likely)
    return minimise(costs, None, 20.0, 0.0).objective - price * limit


@pytest.mark.parametrize("price", [1e-13, 1e-12, 1e-11, 1e-10])
def test_no_plan_that_keeps_products_is_faster_than_the_bound(settings, price, monkeypatch):
    monkeypatch.setattr(mixing, "BOUNDS", 1)
    limit = round(0.6 * settings[Remat.NONE].memory(settings[Remat.NONE].free(0.0).chosen).peak)
    bound = mixing.keeping_products(settings[Remat.NONE], price, limit)
    known = min(max(proven(s, price, limit), s.free(0.0).bound) for s in settings.values())
    assert 0.6 * (known + price * limit) <= bound + price * limit <= known + price * limit


def test_the_best_of_several_prices_counts(settings):
    kept = settings[Remat.NONE]
    free = kept.free(0.0)
    limit = round(0.35 * kept.memory(free.chosen).peak)
    bounds = [mixing.keeping_products(kept, price, limit) for price in (1e-13, 1e-12, 1e-11, 1e-10)]
    assert max(bounds) > 1.02 * free.objective, "memory has a price"
    best = minimise(kept.plain(0.0, cautious=False), limit, 20.0, 0.01)
    assert max(bounds) <= best.bound * 1.01
