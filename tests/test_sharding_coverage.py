"""Operations beyond matrix products: each gives on eight devices what it gives on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import autopar as ap
from autopar import cluster as room
from autopar.core.mesh import Device

SLOW = Device("slow", 1 << 34, 1e6, (("bfloat16", 1e6), ("float32", 1e6)), 1e9, 1e-9)
CLUSTER = room.Cluster((room.Node("n", SLOW, 8),))
"""Devices so slow that cutting even these small arrays pays."""

X = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
IMAGE = np.random.default_rng(1).normal(size=(8, 16, 16, 8)).astype(np.float32)
KERNEL = np.random.default_rng(2).normal(size=(3, 3, 8, 16)).astype(np.float32)
INDICES = np.random.default_rng(3).integers(0, 16, size=(24,)).astype(np.int32)
Step = Callable[..., Any]


@jax.custom_vjp
def clipped(x: jax.Array) -> jax.Array:
    return x * 2.0


clipped.defvjp(lambda x: (x * 2.0, x), lambda x, g: (jnp.clip(g, -0.1, 0.1) * jnp.sign(x),))


def scanned(x: jax.Array) -> Any:
    def body(carry: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        carry = jnp.tanh(carry @ (x.T @ x) / 100 + row)
        return carry, carry.sum()

    return lax.scan(body, jnp.ones((4, 32)), x)


def whiled(x: jax.Array) -> Any:
    return lax.while_loop(lambda s: s[0] < 5, lambda s: (s[0] + 1, s[1] @ s[1].T @ s[1] / 99), (0, x))


def pooled(image: jax.Array) -> jax.Array:
    return lax.reduce_window(image, -np.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def dropout(x: jax.Array) -> jax.Array:
    return jnp.where(jax.random.bernoulli(jax.random.key(7), 0.5, x.shape), x @ x.T @ x, 0.0)


def convolve(image: jax.Array, kernel: jax.Array) -> jax.Array:
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(image, kernel, (2, 2), "SAME", dimension_numbers=dims)


CASES: dict[str, tuple[Step, tuple[Any, ...]]] = {
    "while": (whiled, (X,)),
    "fori": (lambda x: lax.fori_loop(0, 4, lambda i, y: jnp.sin(y) + x, x), (X,)),
    "cond": (lambda x: lax.cond(x.sum() > 0, lambda y: y @ y.T, lambda y: -(y @ y.T), x), (X,)),
    "switch": (lambda x: lax.switch(2, [jnp.sin, jnp.cos, jnp.tanh], x @ x.T), (X,)),
    "scan": (scanned, (X,)),
    "custom_vjp": (jax.grad(lambda x: clipped(x @ x.T).sum()), (X,)),
    "sort": (lambda x: jnp.sort(x @ x.T, axis=-1), (X,)),
    "argsort": (lambda x: jnp.argsort(x, axis=0), (X,)),
    "top_k": (lambda x: lax.top_k(x @ x.T, 3), (X,)),
    "argmax": (lambda x: jnp.argmax(x @ x.T, axis=-1), (X,)),
    "cumsum": (lambda x: jnp.cumsum(x @ x.T, axis=1), (X,)),
    "cumprod_reverse": (lambda x: lax.cumprod(x, axis=0, reverse=True), (X,)),
    "fft": (lambda x: jnp.fft.fft(x @ x.T), (X,)),
    "complex": (lambda x: (x + 1j * x) @ (x.T - 2j * x.T), (X,)),
    "convolution": (convolve, (IMAGE, KERNEL)),
    "convolution_gradient": (jax.grad(lambda i, k: convolve(i, k).sum(), (0, 1)), (IMAGE, KERNEL)),
    "pooling": (pooled, (IMAGE,)),
    "gather": (lambda x, i: x[i] @ x.T, (X, INDICES)),
    "embedding_gradient": (jax.grad(lambda x, i: jnp.sin(x[i]).sum()), (X, INDICES)),
    "scatter": (lambda x, i: jnp.zeros((16, 32)).at[i].add(x[i] * 2), (X, INDICES)),
    "dynamic_update_slice": (lambda x, u: lax.dynamic_update_slice(x @ x.T @ x, u, (3, 0)), (X, X[:2])),
    "dynamic_slice": (lambda x, i: lax.dynamic_slice(x @ x.T, (i, 0), (4, 16)), (X, np.int32(5))),
    "concatenate": (lambda x: jnp.concatenate([x @ x.T, x], axis=1), (X,)),
    "pad": (lambda x: jnp.pad(x @ x.T, ((1, 2), (0, 3))), (X,)),
    "reverse": (lambda x: (x @ x.T)[::-1, ::2], (X,)),
    "dropout": (dropout, (X,)),
    "random_normal": (lambda x: x + jax.random.normal(jax.random.key(1), x.shape), (X,)),
    "logsumexp_gradient": (jax.grad(lambda x: jax.nn.logsumexp(x @ x.T, axis=-1).sum()), (X,)),
    "remat": (jax.grad(jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ x.T) @ x).sum())), (X,)),
    "float8": (lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.float32) @ x.T, (X,)),
    "bfloat16": (lambda x: (x.astype(jnp.bfloat16) * 2).astype(jnp.float32), (X,)),
    "zero_size": (lambda x, y: (jnp.concatenate([x, y]), y.sum(), y), (X, np.zeros((0, 32), np.float32))),
    "scalars": (lambda x, y: (x * y, y + 1, jnp.float32(3)), (X, np.float32(2))),
    "cholesky": (lambda x: jnp.linalg.cholesky(x @ x.T + 99 * jnp.eye(16)), (X,)),
    "vmap": (jax.vmap(lambda row: jnp.outer(row, row).sum(0)), (X,)),
    "einsum": (lambda x: jnp.einsum("ij,kj,ik->ik", x, x, x @ x.T), (X,)),
    "uneven": (lambda x: jnp.tanh(x[:13] @ x[:13].T), (X,)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_operation_equals_one_devices(name: str):
    fun, args = CASES[name]

    def step(*xs: Any) -> Any:  # named, so that messages and plans say which
        return fun(*xs)

    run = ap.parallelize(step, method=ap.ShardParallel(mesh=(2, 4)), cluster=CLUSTER)
    got, want = run(*args), jax.jit(fun)(*args)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = max(1.0, float(np.abs(np.asarray(b)).max())) if b.size else 1.0
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, atol=2e-6)


def test_what_cannot_be_cut_is_listed_with_its_line_and_its_cost():
    fun, args = CASES["while"]
    run = ap.parallelize(lambda x: fun(x), method=ap.ShardParallel(mesh=(2, 4)), cluster=CLUSTER)
    (note,) = run.plan(*args).stages[0].sharding.notes
    assert note.startswith("while at test_sharding_coverage.py:") and "whole on every device" in note
    assert " ms each time" in note
