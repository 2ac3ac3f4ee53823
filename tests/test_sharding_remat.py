"""What layers recompute, chosen in the integer program: as if every assignment were planned apart."""

import functools
import itertools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar import value_and_grad
from autopar.core.errors import DoesNotFit
from autopar.core.graph import OpKind, Remat
from autopar.core.mesh import Axis, Device, Mesh
from autopar.sharding import plan as intra
from autopar.sharding import remat
from autopar.sharding.choices.alternatives import layers
from autopar.sharding.limit.restrict import choosing, restrict
from autopar.sharding.options import Options
from autopar.sharding.problem.assemble import assemble
from autopar.sharding.problem.conditional import conditional
from autopar.sharding.problem.setting import prepare
from autopar.sharding.problem.solving import minimise
from autopar.stages import assign
from autopar.trace.capture import capture

EVERY = Remat.NONE, Remat.PRODUCTS, Remat.FULL
DEVICE = Device("test", 1 << 34, 1e12, (("float32", 1e13),), 1e11)
OPTIONS = Options(gap=0.0, seconds=20.0, regather=False)


def mesh(devices):
    return Mesh(DEVICE, (Axis("x", devices, 1e10, 1e-6),))


def loss(params, batch):
    x = batch["x"]
    for i, p in enumerate(params):
        with jax.named_scope(f"Layer_{i}"):
            x = x + jnp.tanh(jnp.exp(-jnp.square(x @ p["up"])) @ p["down"]) * jnp.exp(x)
    return jnp.mean(jnp.square(x - batch["y"]))


def step(params, batch):
    value, gradient = value_and_grad(loss)(params, batch)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), value


def captured(widths, how):
    def shape(*dims):
        return jax.ShapeDtypeStruct(dims, "float32")

    params = [{"up": shape(32, wide), "down": shape(wide, 32)} for wide in widths]
    data = {name: shape(512, 32) for name in "xy"}
    return capture(step, (params, data), assign=assign, remat=how).graph


def everything(graph):
    return range(len(graph.equations))


def each(graph):
    """Returns assignment → the ordinary graph in which it is taken."""
    names = choosing(graph)
    return {w: restrict(graph, dict(zip(names, w))) for w in itertools.product(*names.values())}


def test_taking_an_alternative_gives_the_graph_traced_with_it():
    every = captured((64, 64), EVERY)
    assert choosing(every) == {"Layer_0": EVERY, "Layer_1": EVERY}
    assert any(e.kind is OpKind.EITHER for e in every.equations)
    for taken in ((Remat.FULL, Remat.NONE), (Remat.PRODUCTS, Remat.FULL), (Remat.NONE, Remat.PRODUCTS)):
        one = each(every)[taken]
        one.check()
        alone = captured((64, 64), dict(zip(choosing(every), taken)))
        plans = [intra.plan(g, everything(g), mesh(2), OPTIONS) for g in (one, alone)]
        assert plans[0].objective == pytest.approx(plans[1].objective, rel=1e-9)
        assert plans[0].memory == plans[1].memory


def test_with_an_assignment_fixed_the_program_is_that_of_its_graph():
    """On two devices: what all layouts and moves cost, computed again or not."""
    every = captured((64, 32), EVERY)
    setting = remat.Search(every, mesh(2), OPTIONS).setting
    costs = conditional(
        assemble(setting.model, setting.grid, setting.nbytes, setting.items, 0.0), setting.model
    )
    names = layers(setting.model)
    free = len(costs.nodes) - len(names)
    for taken, graph in each(every).items():
        fixed = [np.where([r is t for r in rs], 0.0, np.inf) for rs, t in zip(names.values(), taken)]
        together = minimise(replace(costs, nodes=(*costs.nodes[:free], *fixed)), None, 20.0, 0.0)
        own = prepare(intra.extract(graph, everything(graph)), mesh(2), OPTIONS)
        apart = minimise(own.costs(0.0), None, 20.0, 0.0)
        assert together.status == apart.status == "optimal"
        assert together.objective == pytest.approx(apart.objective, rel=1e-6), taken


def test_the_best_assignment_under_every_limit_is_that_of_brute_force():
    """On one device an assignment's time and memory are fixed, so that all 27 can be planned apart."""
    every = captured((96, 64, 32), EVERY)
    apart = {w: intra.plan(g, everything(g), mesh(1), OPTIONS) for w, g in each(every).items()}
    peaks = sorted({plan.memory.peak for plan in apart.values()})
    assert len(apart) == 27 and len(peaks) > 5
    search = remat.Search(every, mesh(1), OPTIONS)
    chosen = set()
    middle = peaks[len(peaks) // 2]
    for limit in (*peaks[::2], middle, peaks[0] - 1):
        search.options = options = replace(OPTIONS, limit=limit)
        together = search.joint()
        best = min((p.objective for p in apart.values() if p.memory.peak <= limit), default=math.inf)
        assert together.objective == pytest.approx(best, rel=1e-6), f"{limit} of {peaks}"
        if math.isinf(best):
            assert together.status == "infeasible"
            with pytest.raises(DoesNotFit, match="proven that no choice of layers"):
                remat.choose(every, mesh(1), options)
            continue
        taken = search.taken(together)
        assert apart[taken].memory.peak <= limit
        chosen.add(taken)
        if limit == middle:
            found = remat.choose(every, mesh(1), options)
            assert found.plan.objective == pytest.approx(best, rel=1e-6)
            assert found.bound == pytest.approx(best, rel=1e-6)
    assert len(chosen) > 2, "the limits do not tell assignments apart"


def test_many_layers():
    """More assignments than are gone through: of equal layers, so many compute again as it takes."""
    every = captured((64,) * 5, (Remat.NONE, Remat.FULL))
    ways = {n: {f"Layer_{k}": Remat.FULL if k < n else Remat.NONE for k in range(5)} for n in range(5)}
    graphs = {n: restrict(every, way) for n, way in ways.items()}
    plans = {n: intra.plan(g, everything(g), mesh(1), OPTIONS) for n, g in graphs.items()}
    for n in (1, 3):
        limit = plans[n].memory.peak
        found = remat.choose(every, mesh(1), replace(OPTIONS, limit=limit))
        assert found.plan.memory.peak <= limit
        # nearly equal layers: the first one's input is written anyway
        assert found.plan.objective <= plans[n].objective * 1.01


OPERATIONS = (
    jnp.tanh,
    jnp.exp,
    jnp.square,
    jax.nn.relu,
    jax.nn.softmax,
    lambda x: x / (1 + jnp.exp(x)),
    lambda x: x * jax.lax.rsqrt(1 + jnp.mean(x * x, -1, keepdims=True)),
)


@settings(max_examples=4, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(OPERATIONS), max_size=3), min_size=4, max_size=4),
    st.booleans(),
    st.sampled_from((1, 2)),
)
def test_computing_again_takes_time_whatever_it_saves(operations, residual, devices):
    """So that the plan in which nothing is computed again, were there memory enough, bounds all others."""

    def made(params, batch):
        def deep(params):
            x = batch["x"]
            for i, p in enumerate(params):
                with jax.named_scope(f"Layer_{i}"):
                    y = functools.reduce(lambda y, f: f(y), operations[2 * i], x) @ p["up"]
                    y = functools.reduce(lambda y, f: f(y), operations[2 * i + 1], y) @ p["down"]
                    x = x + y if residual else y
            return jnp.mean(jnp.square(x - batch["y"]))

        value, gradient = value_and_grad(deep)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), value

    params = [{"up": shape(32, 64), "down": shape(64, 32)} for _ in range(2)]
    every = capture(made, (params, {n: shape(512, 32) for n in "xy"}), assign=assign, remat=EVERY).graph
    options = replace(OPTIONS, limit=remat.UNLIMITED)
    seconds = {
        w: intra.plan(g, everything(g), mesh(devices), options).objective for w, g in each(every).items()
    }
    kept = tuple(Remat.NONE if Remat.NONE in remats else remats[0] for remats in choosing(every).values())
    assert min(seconds.values()) >= seconds[kept] * (1 - 1e-6)


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, "float32")
