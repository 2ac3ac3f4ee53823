"""Plans within a memory limit: against every choice there is; what is proven of the least that any takes."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from autopar import value_and_grad
from autopar.core.errors import DoesNotFit
from autopar.core.mesh import Axis, Device, Mesh
from autopar.sharding import plan as intra
from autopar.sharding.limit.lowered import attempts, bounded, expected
from autopar.sharding.limit.moments import moments_of
from autopar.sharding.limit.squeeze import squeeze
from autopar.sharding.options import Options
from autopar.sharding.problem.setting import canonical, prepare
from autopar.sharding.region import extract
from autopar.stages import assign
from autopar.trace.capture import capture

MESH = Mesh(Device("test", 1 << 34, 1e12, (("float32", 1e13),), 1e11), (Axis("x", 2, 1e10, 1e-6),))


def loss(params, batch):
    x = batch
    for p in params:
        x = jnp.tanh(x @ p)
    return jnp.mean(jnp.square(x))


def step(params, batch):
    value, gradient = value_and_grad(loss)(params, batch)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), value


def setting_of(widths, batch):
    shapes = [jax.ShapeDtypeStruct(pair, "float32") for pair in itertools.pairwise(widths)]
    graph = capture(step, (shapes, jax.ShapeDtypeStruct((batch, widths[0]), "float32")), assign=assign).graph
    region = extract(graph, range(len(graph.equations)))
    options = Options(regather=False, seconds=20.0, gap=0.0, share=False)
    return graph, prepare(region, MESH, canonical(options, region))


@pytest.fixture(scope="module")
def every():
    """Every choice of a small program: seconds and true peak."""
    _, setting = setting_of((64, 32), 128)
    costs = setting.costs(0.0, cautious=False)
    counts = [len(c) for c in costs.nodes]
    assert 500 < math.prod(counts) < 5000
    found = []
    for chosen in itertools.product(*map(range, counts)):
        seconds = sum(c[k] for c, k in zip(costs.nodes, chosen, strict=True))
        seconds += sum(m[chosen[a], chosen[b]] for (a, b), m in costs.edges.items())
        if math.isfinite(seconds):
            found.append((float(seconds), chosen))
    return setting, found


def test_every_choice_of_a_small_program(every):
    setting, found = every
    judged = [(seconds, setting.memory(chosen).peak) for seconds, chosen in found]
    moments = moments_of(setting)
    for seconds, chosen in found[::10]:  # what is priced is what is there
        seen = moments.see(chosen)
        assert seen.seconds == pytest.approx(seconds)
        for near in (chosen, found[0][1], found[-1][1]):  # whichever readers are asked
            certain = moments.usage(chosen, moments.certain(near)).max()
            assert certain <= seen.peak and certain <= seen.usage.max()
    peaks = sorted({peak for _, peak in judged})
    assert squeeze(replace(setting, known={}), peaks[0] // 2, 20.0).seconds == math.inf
    for limit in peaks[:: max(1, len(peaks) // 6)]:
        best_of = squeeze(replace(setting, known={}), limit, 20.0)
        best = min(s for s, peak in judged if peak <= limit)
        assert best_of.seconds <= best * (1 + 1e-6)
        assert best_of.least <= min(peak for _, peak in judged)
        if best_of.fastest is not None:
            assert best_of.fastest.peak <= limit and best_of.fastest.seconds >= best_of.seconds * (1 - 1e-6)


def test_the_integer_program_bounds_every_choice_and_finds_good_ones(every):
    setting, found = every
    setting = replace(setting, known={})
    moments = moments_of(setting)
    judged = [(seconds, setting.memory(chosen).peak) for seconds, chosen in found]
    for _, chosen in found[::25]:
        assert sum(moments.timelines(chosen)).max() == setting.memory(chosen).peak
    peaks = sorted({peak for _, peak in judged})
    assert bounded(setting, peaks[0] // 2) == expected(setting, peaks[0] // 2) == math.inf
    near = 0
    for limit in peaks[:: max(1, len(peaks) // 6)]:
        best = min(seconds for seconds, peak in judged if peak <= limit)
        assert bounded(setting, limit) <= best * (1 + 1e-6)
        seen = [moments.see(x) for x in attempts(moments, limit, moments.timelines(found[0][1])[0] * 0)]
        near += any(s.peak <= limit and s.seconds <= 1.02 * best for s in seen)
    assert near >= 3


def test_what_is_proven_not_to_fit_does_not():
    graph, setting = setting_of((64, 128, 64), 256)
    free = intra.plan(graph, range(len(graph.equations)), MESH, setting.options)
    found = squeeze(setting, free.memory.peak // 8, 20.0)
    assert found.fastest is None and found.seconds == math.inf
    least, leanest = found.least, found.leanest.peak
    assert free.memory.peak // 8 < least <= leanest
    with pytest.raises(DoesNotFit, match=r"at least .* are missing") as refused:
        limited = replace(setting.options, limit=int(least) - 1)
        intra.plan(graph, range(len(graph.equations)), MESH, limited)
    assert refused.value.least is not None and refused.value.leanest <= 1.05 * leanest
    fits = intra.plan(graph, range(len(graph.equations)), MESH, replace(setting.options, limit=leanest))
    assert fits.memory.peak <= leanest


def test_a_tighter_limit_is_never_faster():
    graph, setting = setting_of((64, 256, 64), 512)
    every = range(len(graph.equations))
    free = intra.plan(graph, every, MESH, setting.options)
    times = []
    for share in (0.6, 0.7, 0.8, 0.9, 1.0):
        try:
            limit = int(share * free.memory.peak)
            times.append(intra.plan(graph, every, MESH, replace(setting.options, limit=limit)).objective)
        except DoesNotFit:
            assert not times, "what fits fits under looser limits, too"
    assert len(times) > 2 and times == sorted(times, reverse=True)
    assert times[-1] == pytest.approx(free.objective)
