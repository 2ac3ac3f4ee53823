"""Layers × mesh: equal layers are drawn once, and what they send adds up to what the plan sends."""

from __future__ import annotations

import math
from typing import Any

import autopar as ap
from autopar.models import catalog
from autopar.report.layers import LANES, MOMENTS, PARAMETERS, layers_of
from autopar.trace.gradient import value_and_grad


def test_layers_are_folded_and_nothing_sent_is_lost(tmp_path):
    sizes: Any = {"layers": 5, "hidden": 128, "vocabulary": 1024, "batch": 16, "sequence": 64}
    model = catalog.get("gpt-tiny", value_and_grad=value_and_grad, **sizes)
    step = ap.parallelize(model.step, method=ap.ShardParallel(mesh=(2, 4)), cluster="8xV100-16GB")
    plan, graph = step.plan(*model.args), step.trace(*model.args).graph
    rows = layers_of(plan, 0, graph)
    names = [name for row in rows for name in row.names if name in graph.layers]
    assert names == list(graph.layers)
    assert max(len(row.names) for row in rows) >= 2 and "×" in max(rows, key=lambda row: len(row.names)).title
    collectives = plan.stages[0].sharding.collectives
    sent = sum(len(row.names) * s.nbytes for row in rows for s in row.sent)
    took = sum(len(row.names) * s.seconds for row in rows for s in row.sent)
    assert sent == sum(c.nbytes * c.count for c in collectives) > 0
    assert math.isclose(took, sum(c.seconds * c.count for c in collectives), rel_tol=1e-6)
    held = {
        lane: sum(len(r.names) * t.nbytes for r in rows for t in r.tensors if t.lane == lane)
        for lane in LANES
    }
    assert held[MOMENTS] == 2 * held[PARAMETERS]  # Adam's two
    assert held[PARAMETERS] == 4 * model.parameters
    for row in rows:
        for lane in LANES:
            shares = [row.share(lane, axis.name) for axis in plan.stages[0].mesh.axes]
            assert all(share is None or 0 <= share <= 1 for share in shares)
    plan.picture(tmp_path / "plan.svg")
    text = (tmp_path / "plan.svg").read_text()
    assert "<svg" in text and len(text) > 20_000
