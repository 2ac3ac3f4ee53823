"""Evaluating captured equations: one by one, loops around a body, other dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from autopar.core.graph import OpKind
from autopar.trace import dtypes
from autopar.trace.capture import capture
from autopar.trace.evaluate import bind, bind_loop, run

BF16 = {"bfloat16": "float32"}
FP16 = {"bfloat16": "float16"}


def rand(*shape: int, dtype: Any = jnp.float32, seed: int = 0) -> Any:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def step(w: Any, x: Any) -> Any:
    def loss(w: Any) -> Any:
        h = jax.nn.gelu(x @ w["a"])
        keep = jax.random.bernoulli(jax.random.key(1), 0.9, h.shape)
        h = jnp.where(keep, h, jnp.zeros_like(h))
        table = jnp.take(w["t"], jnp.arange(8) % 4, axis=0)
        return (jax.nn.log_softmax((h + table) @ w["b"]).astype(jnp.float32) ** 2).mean()

    value, g = jax.value_and_grad(loss)(w)
    return jax.tree.map(lambda p, g: p - 0.1 * g.astype(p.dtype), w, g), value


def weights(dtype: Any) -> Any:
    return {
        "a": rand(6, 16, dtype=dtype),
        "b": rand(16, 5, dtype=dtype, seed=1),
        "t": rand(4, 16, dtype=dtype),
    }


def test_equations_can_be_bound_one_by_one() -> None:
    w, x = weights(jnp.float32), rand(8, 6)
    traced = capture(step, (w, x))
    known = dict(zip(traced.graph.inputs, jax.tree.leaves((w, x))))
    known |= traced.constants

    def whole(known: Any) -> Any:
        known = dict(known)
        for i, e in enumerate(traced.graph.equations):
            known.update(zip(e.outputs, bind(traced, i, [known[v] for v in e.operands])))
        return [known[v] for v in traced.graph.outputs if v is not None]

    for a, b in zip(jax.jit(whole)(known), jax.tree.leaves(jax.jit(step)(w, x)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_value_can_be_constrained() -> None:
    """What runtime does: shardings on operands and results while it evaluates, with the same numbers."""
    mesh = Mesh(np.array(jax.devices()), ("x",))
    w, x = weights(jnp.float32), rand(8, 6)
    traced = capture(step, (w, x))

    def constrained(*xs: Any) -> Any:
        known = dict(zip(traced.graph.inputs, xs)) | traced.constants
        for i, e in enumerate(traced.graph.equations):
            results = bind(traced, i, [known[v] for v in e.operands])
            for v, r in zip(e.outputs, results):
                dims = ["x" if n % 8 == 0 and d == 0 else None for d, n in enumerate(r.shape)]
                known[v] = lax.with_sharding_constraint(r, NamedSharding(mesh, PartitionSpec(*dims)))
        return [known[v] for v in traced.graph.outputs if v is not None]

    got = jax.jit(constrained)(*jax.tree.leaves((w, x)))
    for a, b in zip(got, jax.tree.leaves(step(w, x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_loop_is_rebuilt_around_any_body(reverse: bool) -> None:
    def f(bias: Any, c: Any, xs: Any) -> Any:
        def body(c: Any, x: Any) -> Any:
            return jnp.tanh(c @ x + bias), (c.sum(), 1.0)

        return lax.scan(body, c, xs, reverse=reverse, unroll=2)

    args = (rand(3), rand(2, 3), rand(5, 3, 3))
    traced = capture(f, args, layer_scans=False)
    (index,) = [i for i, e in enumerate(traced.graph.equations) if e.kind is OpKind.LOOP]
    inside = traced.bodies[index]
    seen = []

    def body(xs: Sequence[Any]) -> Sequence[Any]:
        seen.append([x.shape for x in xs])
        return run(inside, [lax.optimization_barrier(x) for x in xs])

    known = dict(zip(traced.graph.inputs, args))
    node = traced.graph.equations[index]
    results = bind_loop(traced, index, [known[v] for v in node.operands], body)
    known.update(zip(node.outputs, results))
    want = jax.tree.leaves(f(*args))
    for a, b in zip([known[v] for v in traced.graph.outputs if v is not None], want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert seen[0] == [(3,), (2, 3), (3, 3)]


# ---------------------------------------------------------------- dtypes


def upcast(tree: Any) -> list[Any]:
    return [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("products", [{}, FP16])
def test_a_step_without_bfloat16(products: dict[str, str]) -> None:
    args = (weights(jnp.bfloat16), rand(8, 6, dtype=jnp.bfloat16))
    traced = capture(step, args)

    def without(*xs: Any) -> Any:
        return run(traced, xs, dtypes=BF16, products=products)

    text = str(jax.make_jaxpr(without)(*upcast(args)))
    assert ("f16[" in text.replace("bf16[", "")) == bool(products)
    got = jax.jit(without)(*upcast(args))
    exact = jax.tree.leaves(
        jax.jit(step)(jax.tree.map(lambda a: a.astype(jnp.float32), args[0]), upcast(args)[-1])
    )
    assert {str(x.dtype) for x in got} == {"float32"}
    # closer to float32 than bfloat16's own rounding would be (its bits of the random mask are its own)
    for a, b in zip(got, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=0.05, atol=0.02)


def test_only_random_bits_are_left_in_bfloat16() -> None:
    args = (weights(jnp.bfloat16), rand(8, 6, dtype=jnp.bfloat16))
    traced = capture(step, args)
    left = [
        e.primitive.name
        for e in traced.equations
        if dtypes.mentions(e, BF16) and dtypes.substituted(e, BF16) is None
    ]
    assert set(left) <= {"bitcast_convert_type"}


def test_an_equation_that_means_the_bits_is_computed_in_them() -> None:
    x = rand(4, dtype=jnp.bfloat16)
    traced = capture(lambda x: lax.bitcast_convert_type(x * 2, jnp.uint16), (x,))
    (got,) = run(traced, [x.astype(jnp.float32)], dtypes=BF16)
    np.testing.assert_array_equal(got, lax.bitcast_convert_type(x * 2, jnp.uint16))


def test_loops_and_branches_are_rewritten_inside() -> None:
    def f(x: Any, xs: Any) -> Any:
        c, ys = lax.scan(lambda c, x: (jnp.tanh(c * x), c + x), x, xs)
        return lax.cond(c.sum() > 0, lambda c: c * 2, lambda c: c - 1, c), ys, x.at[1].add(3)

    args = (rand(4, dtype=jnp.bfloat16), rand(3, 4, dtype=jnp.bfloat16))
    traced = capture(f, args, layer_scans=False)

    def without(*xs: Any) -> Any:
        return run(traced, xs, dtypes=BF16)

    assert "bf16" not in str(jax.make_jaxpr(without)(*upcast(args)))
    want = jax.tree.leaves(f(*upcast(args)))
    for a, b in zip(without(*upcast(args)), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("magnitude", [1e-12, 1.0, 1e12])
def test_scaled_products_have_the_precision_of_float16_at_any_magnitude(magnitude: float) -> None:
    a, b = rand(16, 32) * magnitude, rand(32, 8, seed=1)
    traced = capture(jnp.dot, (a, b))
    (got,) = jax.jit(lambda *xs: run(traced, xs, products={"float32": "float16"}))(a, b)
    error = np.abs(got - a @ b).max() / np.abs(a @ b).max()
    assert 1e-6 < error < 2e-3  # rounded to 11 bits, and neither overflowed nor flushed


def test_a_convolution_in_float16() -> None:
    x, w = rand(2, 8, 8, 3), rand(3, 3, 3, 4, seed=1)

    def conv(x: Any, w: Any) -> Any:
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    (got,) = run(capture(conv, (x, w)), [x, w], products={"float32": "float16"})
    np.testing.assert_allclose(got, conv(x, w), rtol=2e-2, atol=2e-2)


def test_scales_are_powers_of_two_and_leave_room() -> None:
    for x in (0.0, 1e-30, 3e-5, 1.0, 7.0, 1e30):
        s = float(dtypes.scale(jnp.asarray([x, -x]), "float16"))
        assert np.log2(s) == round(np.log2(s))
        assert abs(x) / s <= 256
