"""Deep models: like layers measured on few of them, and a memory limit met by some of them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from autopar import value_and_grad
from autopar.core.graph import Remat
from autopar.core.mesh import Axis, Device, Mesh
from autopar.models import catalog
from autopar.sharding import plan as intra
from autopar.sharding.limit.mixing import LEAN, Mixer, layers_of
from autopar.sharding.limit.shallow import layer_kinds, shallow
from autopar.sharding.options import Options
from autopar.sharding.problem.alike import share
from autopar.sharding.problem.assemble import uneven
from autopar.sharding.problem.setting import prepare
from autopar.sharding.problem.solving import minimise
from autopar.sharding.region import extract
from autopar.stages import assign
from autopar.trace.capture import capture

MESH = Mesh(Device("test", 1 << 34, 1e12, (("float32", 1e13),), 1e11), (Axis("x", 2, 1e10, 1e-6),))
OPTIONS = Options(gap=0.0, seconds=20.0, regather=False, share=False)


def captured(widths, remat=False, tapped=False, normal=False):
    def loss(params, batch):
        x, taps = batch["x"], 0.0
        for i, p in enumerate(params):
            with jax.named_scope(f"Layer_{i}"):
                read = x * jax.lax.rsqrt(1 + jnp.mean(x * x, -1, keepdims=True)) if normal else x
                x = x + jnp.tanh(read @ p["up"]) @ p["down"]
                taps = taps + x
        return jnp.mean(jnp.square((taps if tapped else x) - batch["y"]))

    def step(params, batch):
        value, gradient = value_and_grad(loss)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), value

    def shape(*dims):
        return jax.ShapeDtypeStruct(dims, "float32")

    params = [{"up": shape(32, wide), "down": shape(wide, 32)} for wide in widths]
    return capture(step, (params, {k: shape(512, 32) for k in "xy"}), assign=assign, remat=remat).graph


def planned(graph):
    return intra.plan(graph, range(len(graph.equations)), MESH, OPTIONS)


@pytest.mark.parametrize("remat", [False, Remat.FULL])
def test_it_is_planned_like_a_model_of_fewer_layers(remat):
    deep = captured((64,) * 7, remat)
    few = shallow(deep, layer_kinds(deep))
    plans = planned(few), planned(captured((64,) * 5, remat))  # the first and last do more
    assert plans[0].objective == pytest.approx(plans[1].objective, rel=1e-9)
    assert plans[0].memory == plans[1].memory


def test_layers_of_another_shape_are_another_kind():
    deep = captured((64, 64, 64, 64, 64, 48, 64))
    kinds = layer_kinds(deep)
    assert kinds[1] == kinds[2] == kinds[4] != kinds[5]
    few = shallow(deep, kinds)
    assert {e.layer for e in few.equations} - {None} == {0, 1, 2, 4, 5, 6}


def test_layers_that_others_than_the_next_one_read_are_all_kept():
    deep = captured((64,) * 6, tapped=True)
    few = shallow(deep, layer_kinds(deep))
    plans = planned(few), planned(captured((64,) * 5, tapped=True))
    assert few is deep or plans[0].objective == pytest.approx(plans[1].objective, rel=1e-9)


# -- some layers fast, others lean

DEEP = Options(gap=0.0, seconds=20.0, regather=False)


@pytest.fixture(scope="module")
def setting():
    graph = captured((4096,) * 5)
    mesh = replace(MESH, axes=(Axis("x", 4, 1e9, 1e-6),))
    return prepare(extract(graph, range(len(graph.equations))), mesh, DEEP)


def peak(setting, solved):
    return setting.memory(solved.chosen).peak


def test_every_node_of_a_layer_is_known_to_be_its(setting):
    layers = layers_of(setting.model)
    assert {*layers} - {None} == {*range(5)}
    for step in setting.model.steps:
        assert step.equation.layer is None or layers[step.node] is not None


def test_a_mixture_of_plans_fits_and_is_near_the_optimum_of_all_layers(setting):
    plain, free = setting.plain(0.0), setting.free(0.0)
    merged = share(plain)
    assert len(merged.nodes) < len(plain.nodes)

    def solve(costs):
        return minimise(costs, None, 20.0, 0.0)

    most, least = peak(setting, free), peak(setting, solve(setting.plain(LEAN)))
    assert least < most
    limit = round(least + 0.4 * (most - least))
    mixer = Mixer.of(setting, merged, plain, limit, solve)
    found = mixer.run(free.chosen)
    assert found.chosen is not None and peak(setting, found) <= limit
    exact = minimise(setting.plain(0.0, cautious=False), limit, 20.0, 1e-2)
    alike = minimise(merged, limit, 20.0, 1e-2)
    assert found.bound <= exact.objective * (1 + 1e-6)
    assert exact.bound * (1 - 1e-6) <= found.objective <= 1.02 * exact.objective
    assert found.objective < 0.93 * alike.objective, "nothing is gained here"


def test_more_like_layers_do_not_grow_the_problem_though_each_reads_more_of_the_residual_stream():
    counts = []
    for depth in (8, 10):
        model = catalog.get("gpt-2.6b", batch=8, layers=depth, value_and_grad=value_and_grad)
        graph = capture(model.step, model.args, assign=assign).graph
        found = prepare(extract(graph, range(len(graph.equations))), MESH, DEEP)
        costs, (nodes, edges) = found.plain(0.0), uneven(found.model, found.grid, found.nbytes)
        kinds = [share(costs, nodes, edges), share(costs, nodes), share(costs, None, edges)]
        counts.append([len(kind.nodes) for kind in kinds])
    few, *others = zip(*counts, strict=True)
    assert few[0] == few[1], counts
    assert all(few[0] < other[0] < other[1] for other in others), counts
