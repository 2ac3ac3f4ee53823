"""Plans looked for near others: against every choice of a small program."""

import itertools
import math
import time
from dataclasses import replace

import numpy as np
import pytest

from autopar.sharding.limit.explicit import explicit
from autopar.sharding.limit.moments import moments_of
from autopar.sharding.limit.vicinity import Vicinity
from autopar.sharding.problem.setting import alike, prepare
from tests.test_sharding_squeeze import MESH, setting_of


@pytest.fixture(scope="module")
def every():
    """Every choice of a small program."""
    _, setting = setting_of((64, 32), 128)
    moments = moments_of(setting)
    counts = [len(c) for c in moments.costs.nodes]
    seen = map(moments.see, itertools.product(*map(range, counts)))
    return moments, [each for each in seen if math.isfinite(each.seconds)]


def completed(costs, chosen):
    """The choice of every node that goes with one of a region's own, and what all cost."""
    full = list(chosen)
    for node in range(len(chosen), len(costs.nodes)):
        cost = costs.nodes[node].copy()
        for (a, b), matrix in costs.edges.items():
            if node in (a, b):
                cost += matrix[full[a]] if node == b else matrix[:, full[b]]
        assert np.isfinite(cost).sum() >= 1 and np.ptp(cost[np.isfinite(cost)]) == 0
        full.append(int(np.argmin(cost)))
    seconds = sum(c[k] for c, k in zip(costs.nodes, full, strict=True))
    return full, seconds + sum(m[full[a], full[b]] for (a, b), m in costs.edges.items())


def test_second_layouts_as_nodes_take_what_they_take(every):
    moments, found = every
    setting, costs = moments.setting, explicit(moments)
    assert len(costs.nodes) > len(moments.costs.nodes)
    offers = {read.target.node for read in setting.model.reads if read.copy}
    same = 0
    for seen in found[::7]:
        full, seconds = completed(costs, seen.chosen)
        assert seconds == pytest.approx(seen.seconds)
        of_copies = [read for read in setting.model.reads if read.source.node in offers]
        layouts = [
            (read.source.layouts[full[read.source.node]], read.target.layouts[full[read.target.node]])
            for read in of_copies
        ]
        steps = np.zeros(moments.ticks + 2)
        for item in costs.items:
            steps[item.start] += item.nbytes[full[item.node]]
            steps[item.stop] -= item.nbytes[full[item.node]]
        used, (single, _) = np.cumsum(steps)[:-1], moments.timelines(seen.chosen)
        for held in setting.held(seen.chosen):
            single[held.start : held.stop] += max(0, held.nbytes)  # but for parts of elementwise results
        if all(offered == wanted for offered, wanted in layouts):
            np.testing.assert_array_equal(used, single)
            same += 1
    assert same > 10


def test_what_is_found_is_better_and_the_best_after_all(every):
    moments, found = every
    peaks = sorted({seen.peak for seen in found})
    near = tried = 0
    for limit in peaks[:: max(1, len(peaks) // 3)]:
        best = min(seen.seconds for seen in found if seen.peak <= limit)
        around = Vicinity(moments, limit)
        price = max(seen.seconds for seen in found) / limit
        for start in (found[0], found[-1]):
            last, fits = start, start.peak <= limit
            for seen in around.search(start, price, time.process_time() + 5):
                assert seen.peak <= limit or not fits  # once a plan fits, all do
                assert not fits or seen.seconds < last.seconds
                last, fits = seen, seen.peak <= limit
            assert not fits or last.seconds >= best * (1 - 1e-9)
            near += fits and last.seconds <= 1.01 * best
            tried += 1
    assert near > tried / 3


@pytest.mark.parametrize("widths", [(64, 32), (64, 32, 16)])
def test_settings_are_alike_where_no_weight_is_read_by_both_passes(widths):
    _, setting = setting_of(
        widths, 128
    )  # nothing is the gradient of the batch: the first weight is read once
    again = prepare(setting.region, MESH, replace(setting.options, regather=True))
    assert alike(setting, again) is (len(widths) == 2)
