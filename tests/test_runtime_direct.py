"""Steps called in their own trees: what they give, what they refuse, and when there is no such way."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autopar
from autopar.core.errors import BadInput


def step(state: Any, batch: Any) -> Any:
    loss = jnp.sum((batch["x"] @ state["w"] - batch["y"]) ** 2) + state["b"].sum()
    grads = jax.grad(lambda s: jnp.sum((batch["x"] @ s["w"] - batch["y"]) ** 2) + s["b"].sum())(state)
    return jax.tree.map(lambda p, g: p - 0.01 * g, state, grads), loss


def made() -> tuple[Any, Any]:
    state = {"w": jnp.arange(12.0).reshape(4, 3) / 10, "b": jnp.ones(3)}
    return state, {"x": jnp.ones((8, 4)), "y": jnp.zeros((8, 3))}


def spread(function: Any = step, devices: int = 1, **options: Any) -> Any:
    cluster = autopar.Cluster.parse(f"{devices}xA100-40GB")
    return autopar.parallelize(function, method=autopar.ShardParallel(), cluster=cluster, **options)


def hops(running: Any) -> bool:
    return running._last[1]._direct is not None


@pytest.mark.parametrize("devices", [1, 4])
def test_three_steps_equal_one_device_and_take_over_what_is_passed(devices: int):
    run, (state, batch) = spread(devices=devices, donate=True), made()
    wanted, _ = made()
    for _ in range(3):
        before = state
        state, loss = run(state, batch)
        wanted, expected = jax.jit(step)(wanted, batch)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state, wanted)
    assert hops(run) and before["w"].is_deleted() and not batch["x"].is_deleted()
    assert run._last[1].steps == 3
    assert run._last[1].held()[0] >= 15 * 4 // devices


def test_state_that_a_step_has_consumed_is_named():
    run, (state, batch) = spread(donate=True), made()
    first, _ = run(state, batch)
    run(first, batch)
    with pytest.raises(BadInput, match=r"w.*consumed|consumed.*w"):
        run(first, batch)


def test_other_arguments_go_the_long_way_and_come_back():
    run, (state, batch) = spread(donate=True), made()
    state, _ = run(state, batch)
    state, _ = run(jax.tree.map(np.asarray, state), jax.tree.map(np.asarray, batch))
    longer = {"x": jnp.ones((16, 4)), "y": jnp.zeros((16, 3))}
    state, loss = run(state, longer)
    state, again = run(state, batch)
    one, _ = made()
    for fed in (batch, batch, longer):
        one, expected = jax.jit(step)(one, fed)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(again, jax.jit(step)(one, batch)[1], rtol=1e-5)


def test_a_wrong_shape_is_told_as_ever():
    run, (state, batch) = spread(donate=True), made()
    compiled = run.compile(state, batch)
    with pytest.raises(BadInput, match="expected float32"):
        compiled(state, {"x": jnp.ones((8, 5)), "y": batch["y"]})


def test_measuring_goes_on_from_where_the_steps_are():
    run, (state, batch) = spread(donate=True), made()
    for _ in range(2):
        state, _ = run(state, batch)
    state, loss = run._last[1].measure(state, batch)
    one, _ = made()
    for _ in range(3):
        one, expected = jax.jit(step)(one, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert run._last[1].timeline().events


def test_state_that_would_be_compiled_into_other_memory_goes_the_long_way():
    def crossed(state: Any, batch: Any) -> Any:
        return (state[1] * 2.0, state[0] + batch.sum()), batch.mean()

    run = spread(crossed, donate=True)
    state, batch = (jnp.zeros(4), jnp.ones(4)), jnp.ones(8)
    for _ in range(3):
        state, _ = run(state, batch)
    np.testing.assert_allclose(state[0], jax.jit(lambda: _three(crossed, batch))()[0])


def _three(function: Any, batch: Any) -> Any:
    state = (jnp.zeros(4), jnp.ones(4))
    for _ in range(3):
        state, _ = function(state, batch)
    return state


@pytest.mark.parametrize("donate", [False, True])
def test_without_leave_nothing_is_taken_over(donate: bool):
    run, (state, batch) = spread(donate=donate), made()
    run(state, batch)
    assert hops(run) == donate
    assert state["w"].is_deleted() == donate


def test_keyword_arguments_go_the_long_way():
    run, (state, batch) = spread(donate=True), made()
    state, _ = run(state, batch=batch)
    _, loss = run(state, batch=batch)
    one, _ = jax.jit(step)(made()[0], batch)
    np.testing.assert_allclose(loss, jax.jit(step)(one, batch)[1], rtol=1e-5)
