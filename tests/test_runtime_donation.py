"""New state takes the old one's memory, array for array: nothing of it is copied."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import autopar as ap


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


def test_another_batch_shape_is_planned_anew():
    run = ap.parallelize(step, method=ap.ShardParallel(mesh=(1,)), cluster=ap.Cluster.parse("1xV100-16GB"))
    state = {name: jnp.ones((64, 64)) for name in "abc"}
    _, state = run(state, {"x": np.ones((8, 64), np.float32)})
    loss, state = run(state, {"x": 2 * np.ones((4, 64), np.float32)})
    assert float(loss) == 2.0
