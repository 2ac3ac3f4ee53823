"""Follow and CreateState of a pipeline: an evaluation step, and a state made, along another step's stages."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autopar as ap
from autopar.core.errors import BadInput

LAYERS, WIDTH = 4, 64
CLUSTER = "2xA100-40GB,4xV100-16GB"


def init(key: Any) -> Any:
    keys = jax.random.split(key, LAYERS)
    params = [
        {"kernel": jax.random.normal(k, (WIDTH, WIDTH)) / 8, "bias": jnp.full(WIDTH, 0.1)} for k in keys
    ]
    return {"params": params, "momentum": jax.tree.map(jnp.zeros_like, params), "step": 0}


def loss(params: Any, data: Any) -> Any:
    x = data["x"]
    for k, each in enumerate(params):
        x = jnp.tanh((ap.layer_boundary(x) if k else x) @ each["kernel"] + each["bias"])
    return jnp.mean((x - data["y"]) ** 2)


def train(state: Any, data: Any) -> Any:
    value, grads = ap.value_and_grad(loss)(state["params"], data)
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state["momentum"], grads)
    params = jax.tree.map(lambda p, m: p - 0.1 * m, state["params"], momentum)
    return {"params": params, "momentum": momentum, "step": state["step"] + 1}, value


def data() -> Any:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(16, WIDTH)).astype(np.float32) for name in "xy"}


@pytest.fixture(scope="module")
def step():
    step = ap.parallelize(train, method=ap.Auto(stages=2, micro_batches=2), cluster=CLUSTER)
    plan = step.plan(jax.eval_shape(init, jax.random.key(0)), data())
    assert len(plan.stages) == 2
    yield step
    step.close()


def devices_of(x: Any) -> set[int]:
    return {d.id for d in x.sharding.device_set}


def test_a_state_is_made_stage_by_stage_where_the_step_keeps_it(step):
    key = jax.random.key(3)
    make = ap.parallelize(init, method=ap.CreateState(step))
    state, want = make(key), jax.jit(init)(key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, want)
    theirs, mine = step.plan(state, data()), make.plan(key)
    assert [s.devices for s in mine.stages] == [s.devices for s in theirs.stages]
    whole = sum(x.nbytes for x in jax.tree.leaves(want))
    for stage in make.compile(key).memory():
        assert stage.outputs < 0.6 * whole, "no device ever holds the state whole"
    after, _ = step(state, data())
    for name in ("params", "momentum"):
        for made, kept in zip(jax.tree.leaves(state[name]), jax.tree.leaves(after[name]), strict=True):
            assert made.sharding == kept.sharding, "made where the step keeps it"
    first, last = state["params"][0]["kernel"], state["params"][-1]["kernel"]
    assert not devices_of(first) & devices_of(last)
    np.testing.assert_allclose(
        after["params"][0]["bias"], jax.jit(train)(want, data())[0]["params"][0]["bias"], rtol=1e-5
    )


def test_an_evaluation_step_runs_along_the_stages(step):
    state = init(jax.random.key(1))
    evaluate = ap.parallelize(loss, method=ap.Follow(step))
    state, _ = step(state, data())
    want = jax.jit(loss)(jax.tree.map(np.asarray, state["params"]), data())
    np.testing.assert_allclose(evaluate(state["params"], data()), want, rtol=1e-5)
    theirs, mine = step.plan(state, data()), evaluate.plan(state["params"], data())
    assert [s.devices for s in mine.stages] == [s.devices for s in theirs.stages]
    assert [(s.start, s.stop) for s in mine.stages] == [(s.start, s.stop) for s in theirs.stages]
    assert mine.microbatches == theirs.microbatches
    step(state, data())  # the state was not consumed
    odd = jax.tree.map(lambda x: x[:15], data())
    assert evaluate.plan(state["params"], odd).microbatches == 1, "15 examples do not halve"


def test_an_evaluation_step_of_another_model_is_refused(step):
    def shorter(params: Any, data: Any) -> Any:
        return loss(params[:1], data)

    evaluate = ap.parallelize(shorter, method=ap.Follow(step))
    with pytest.raises(BadInput, match="Follow: the other step has the layers"):
        evaluate.plan(jax.eval_shape(init, jax.random.key(0))["params"], data())
