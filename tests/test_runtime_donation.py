"""New state takes the old one's memory, array for array: nothing of it is copied."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autopar as ap
from autopar.runtime import layout
from autopar.runtime.ray_backend.shipment import load, shipments


def step(state: Any, batch: Any) -> Any:
    """Three arrays of one shape, made in another order than they are kept in."""
    grown = {name: state[name] * k + batch["x"].sum() for k, name in enumerate("cab", start=2)}
    return batch["x"].mean(), dict(grown)


def test_a_step_copies_no_state_and_recognises_its_own():
    state = {name: jnp.full((64, 64), float(k)) for k, name in enumerate("abc")}
    data = {"x": np.ones((8, 64), np.float32)}
    run = ap.parallelize(step, method=ap.ShardParallel(mesh=(1,)), cluster=ap.Cluster.parse("1xV100-16GB"))
    (text,) = run.compile(state, data).hlo().values()
    entry = text[text.index("ENTRY") :]
    assert not re.findall(r"f32\[64,64\]\S* copy\(", entry)
    assert entry.count("parameter(") - 1 == text.splitlines()[0].count("-alias)"), "all but the batch"
    for _ in range(3):
        want = jax.jit(step)(jax.tree.map(np.asarray, state), data)
        loss, state = run(state, data)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), (loss, state), want)


@pytest.mark.parametrize("devices", [1, 4])
def test_what_is_shipped_copies_no_state_either(devices):
    """An export forgets donations: a worker gives them again, and pairs them as it is done in one process."""
    state = {name: jnp.full((64, 64), float(k)) for k, name in enumerate("abc")}
    data = {"x": np.ones((8, 64), np.float32)}
    run = ap.parallelize(step, method=ap.ShardParallel(mesh=(devices,)), cluster=f"{devices}xV100-16GB")
    plan = run.plan(state, data)
    (sent,) = shipments(plan, plan.program(), run.trace(state, data), ["cpu"])
    (blob,) = sent.blobs
    received = load(blob, layout.jax_mesh(plan.stages[0].mesh, jax.devices()[:devices]))
    text = received.executable.as_text()
    assert not re.findall(r" copy\(", text[text.index("ENTRY") :])
    assert text.splitlines()[0].count("-alias)") == len(blob.donated) == len(state)
    assert received.executable.memory_analysis().alias_size_in_bytes == 4 * 64 * 64 * len(state) / devices
    want = jax.jit(step)(state, data)
    inputs = [np.asarray(x) for x in jax.tree.leaves((state, data))]
    results = received(*inputs)
    found = dict(zip(plan.segments[0].outputs, results, strict=True))
    for v, x in zip(plan.outputs, jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(found[v]), x, rtol=1e-6)


def test_another_batch_shape_is_planned_anew():
    run = ap.parallelize(step, method=ap.ShardParallel(mesh=(1,)), cluster=ap.Cluster.parse("1xV100-16GB"))
    state = {name: jnp.ones((64, 64)) for name in "abc"}
    _, state = run(state, {"x": np.ones((8, 64), np.float32)})
    loss, state = run(state, {"x": 2 * np.ones((4, 64), np.float32)})
    assert float(loss) == 2.0
