"""Random programs on random meshes give what one device gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax

import autopar as ap
from autopar import cluster as room
from autopar.core.mesh import Device

SLOW = Device("slow", 1 << 34, 1e6, (("float32", 1e6),), 1e9, 1e-9)
MESHES = ((8,), (2, 4), (2, 2, 2), (6,), (2, 3), (4, 2))
SIZES = (1, 3, 4, 6, 8, 12, 16)
Array = Any


def unary(draw: Callable[..., Any], x: Array) -> Array:
    return draw(st.sampled_from([jnp.tanh, jnp.abs, lambda y: y * 0.5 - 1, lambda y: jnp.exp(-(y**2))]))(x)


def transposed(draw: Callable[..., Any], x: Array) -> Array:
    return jnp.transpose(x, draw(st.permutations(range(x.ndim))))


def summed(draw: Callable[..., Any], x: Array) -> Array:
    axis = draw(st.integers(0, x.ndim - 1))
    fun = draw(st.sampled_from([jnp.mean, jnp.max, jnp.sum]))
    return fun(x, axis=axis, keepdims=draw(st.booleans())) / (
        1 if fun is jnp.max else math.sqrt(x.shape[axis])
    )


def merged(draw: Callable[..., Any], x: Array) -> Array:
    return x.reshape(-1, x.shape[-1]) if x.ndim > 2 else x.reshape(-1)


def sliced(draw: Callable[..., Any], x: Array) -> Array:
    axis = draw(st.integers(0, x.ndim - 1))
    start = draw(st.integers(0, x.shape[axis] - 1))
    return lax.slice_in_dim(x, start, x.shape[axis], axis=axis)


def ordered(draw: Callable[..., Any], x: Array) -> Array:
    axis = draw(st.integers(0, x.ndim - 1))
    return draw(st.sampled_from([jnp.sort, jnp.cumsum, jnp.flip]))(x, axis=axis) / x.shape[axis]


def gathered(draw: Callable[..., Any], x: Array) -> Array:
    return x[np.array(draw(st.lists(st.integers(0, x.shape[0] - 1), min_size=1, max_size=8)))]


def product(draw: Callable[..., Any], x: Array) -> Array:
    width = draw(st.sampled_from(SIZES))
    weight = np.linspace(-1, 1, x.shape[-1] * width, dtype=np.float32).reshape(x.shape[-1], width)
    return x @ weight / math.sqrt(x.shape[-1])


def gram(draw: Callable[..., Any], x: Array) -> Array:
    return jnp.einsum("...i,...j->...ij" if x.ndim == 1 else "...ki,...kj->...ij", x, x) / x.shape[0]


def looped(draw: Callable[..., Any], x: Array) -> Array:
    return lax.scan(lambda c, row: (jnp.tanh(c + row), c * row), x[0], x)[1]


OPERATIONS = (unary, transposed, summed, merged, sliced, ordered, gathered, product, gram, looped)


def replay(choices: list[Any]) -> Callable[..., Any]:
    """Returns what draws these choices again, in order."""
    rest = iter(choices)
    return lambda _: next(rest)


@st.composite
def programs(draw: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...]]:
    """(function, shape of its argument, mesh); the choices of every operation are drawn beforehand."""
    shape = tuple(draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=3)))
    mesh = draw(st.sampled_from(MESHES))
    values = [jnp.zeros(shape)]
    plan: list[tuple[Callable[..., Any], int, list[Any]]] = []
    for _ in range(draw(st.integers(1, 8))):
        source = draw(st.integers(0, len(values) - 1))
        if values[source].ndim == 0 or values[source].size > 4096:
            continue
        operation, choices = draw(st.sampled_from(OPERATIONS)), list[Any]()

        def keep(strategy: Any, choices: list[Any] = choices) -> Any:
            choices.append(draw(strategy))
            return choices[-1]

        values.append(operation(keep, values[source]))
        plan.append((operation, source, choices))

    def program(x: Array) -> tuple[Array, ...]:
        made = [x]
        for operation, source, choices in plan:
            made.append(operation(replay(choices), made[source]))
        alike = [a + made[i] for i, a in enumerate(made[:-1]) if a.shape == made[-1].shape]
        return (*made[-2:], *alike)

    return program, shape, mesh


def check(case: tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...]]) -> None:
    program, shape, mesh = case
    cluster = room.Cluster((room.Node("n", SLOW, math.prod(mesh)),))
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    run = ap.parallelize(program, method=ap.ShardParallel(mesh=mesh), cluster=cluster)
    got, want = run(x), jax.jit(program)(x)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = max(1.0, float(np.abs(np.asarray(b)).max(initial=0)))
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, atol=1e-5)


SETTINGS: dict[str, Any] = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}


@hypothesis.settings(max_examples=15, derandomize=True, **SETTINGS)
@hypothesis.given(programs())
def test_random_programs_equal_one_device(case: Any):
    check(case)


@pytest.mark.slow
@hypothesis.settings(max_examples=200, **SETTINGS)
@hypothesis.given(programs())
def test_many_random_programs_equal_one_device(case: Any):
    check(case)
