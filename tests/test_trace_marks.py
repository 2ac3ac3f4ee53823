"""Flat jaxprs, layer and phase marks, layer boundaries, the user's lines."""

from __future__ import annotations

from collections import Counter
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from autopar.core.graph import Phase
from autopar.trace import boundary, compat, marks
from autopar.trace.boundary import layer_boundary
from autopar.trace.flat import Builder, Flat, dce, flatten, inline, run, to_jaxpr

X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3)


def flat_of(fun: Any, *args: Any) -> Flat:
    flat = dce(flatten(jax.make_jaxpr(fun)(*args)))
    flat.check()
    return flat


def layers_of(fun: Any, *args: Any) -> dict[str | None, int]:
    return dict(Counter(m.layer for m in marks.annotate(flat_of(fun, *args)).marks))


# ---------------------------------------------------------------- flat


def busy(x: Any) -> Any:
    y, stacked = lax.scan(lambda c, s: (c * s, c + s), x, jnp.ones((4, 8, 3)))
    z = jax.checkpoint(lambda x: jnp.sin(jax.nn.relu(x)))(y)
    a = lax.cond(x.sum() > 0, jnp.cos, lambda x: -x, z)
    b = lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 2), (0, x))[1]
    return jax.jit(jax.nn.logsumexp)(a + b), stacked, jax.random.bernoulli(jax.random.key(0), 0.5, (3,))


def test_flat_equations_compute_what_the_function_computes() -> None:
    flat = flat_of(busy, X)
    for a, b in zip(jax.jit(lambda x: run(flat, [x]))(X), jax.tree.leaves(busy(X)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    names = {e.primitive.name for e in flat.equations}
    assert {"scan", "while", "cond"} <= names
    assert not names & {"jit", "pjit", "custom_jvp_call", "remat2", "checkpoint", "closed_call"}


def test_what_is_to_be_differentiated_keeps_its_custom_derivatives() -> None:
    closed = jax.make_jaxpr(lambda x: jax.checkpoint(jax.nn.relu)(x) + jax.nn.relu(x))(X)
    kept = flatten(closed, keep=compat.DIFFERENTIABLE)
    assert Counter(e.primitive.name for e in kept.equations)["custom_jvp_call"] == 1
    gradient = jax.grad(lambda x: sum(y.sum() for y in run(kept, [x])))(jnp.zeros(X.shape))
    np.testing.assert_array_equal(gradient, 0.0)  # relu's own derivative at 0; that of max would be 1/2


def test_every_captured_array_is_one_constant() -> None:
    table = jnp.ones((3, 3))
    flat = flat_of(jax.jit(lambda x: jax.jit(lambda y: y @ table)(x @ table)), X)
    assert len(flat.constants) == 1


def test_dce_keeps_effects_and_drops_the_rest() -> None:
    def f(x: Any) -> Any:
        jnp.sin(x)
        jax.debug.print("{}", x.sum())
        return x * 2

    assert [e.primitive.name for e in flat_of(f, X).equations] == ["reduce_sum", "debug_print", "mul"] or [
        e.primitive.name for e in flat_of(f, X).equations
    ] == ["reduce_sum", "debug_callback", "mul"]


def test_recomputation_is_kept_apart_by_barriers() -> None:
    flat = flat_of(jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)))(x).sum()), X)
    names = Counter(e.primitive.name for e in flat.equations)
    assert names["optimization_barrier"] >= 1


def test_inline_applies_a_function_within_another() -> None:
    inner = jax.make_jaxpr(lambda x: jnp.tanh(x) + 1)(X)
    builder = Builder()
    v = compat.variable(jax.typeof(jnp.asarray(X)))
    (once,) = inline(builder, inner, [v])
    (twice,) = inline(builder, inner, [once])
    flat = builder.flat([v], [twice])
    flat.check()
    np.testing.assert_allclose(run(flat, [X])[0], np.tanh(np.tanh(X) + 1) + 1, rtol=1e-5)
    assert len(to_jaxpr(flat).jaxpr.eqns) == 4


def test_check_sees_a_variable_read_before_it_is_made() -> None:
    flat = flat_of(lambda x: jnp.sin(jnp.cos(x)), X)
    wrong = Flat(flat.inputs, flat.outputs, flat.equations[::-1], flat.marks)
    with pytest.raises(AssertionError, match="reads"):
        wrong.check()


# ---------------------------------------------------------------- layers by name


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x + nn.Dense(3)(nn.relu(nn.Dense(12)(x)))


class Stack(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        block = nn.remat(Block) if self.remat else Block
        x = nn.Dense(3, name="inlet")(x)
        for i in range(4):
            x = block(name=f"Block_{i}")(x)
        return nn.Dense(2, name="head")(x)


@pytest.mark.parametrize("remat", [False, True])
def test_blocks_are_layers_forward_and_backward(remat: bool) -> None:
    model = Stack(remat)
    params = jax.eval_shape(model.init, jax.random.key(0), X)
    flat = marks.annotate(flat_of(jax.grad(lambda p: (model.apply(p, X) ** 2).mean()), params))
    names = [f"Block_{i}" for i in range(4)]
    assert marks.order(flat) == tuple(names)
    for name in names:
        products = [
            m.phase
            for m, e in zip(flat.marks, flat.equations)
            if m.layer == name and e.primitive.name == "dot_general"
        ]
        assert products.count(Phase.FORWARD) == 2 and products.count(Phase.BACKWARD) >= 4
    assert None in {m.layer for m in flat.marks}


def test_phases_are_completed_by_what_they_feed() -> None:
    def step(w: Any, x: Any) -> Any:
        x = x * 2  # feeds the forward
        g = jax.grad(lambda w: jnp.tanh(x @ w).sum())(w)
        return w - 0.1 * g

    flat = marks.complete_phases(marks.annotate(flat_of(step, np.ones((3, 3), np.float32), X)))
    phases = [m.phase for m in flat.marks]
    assert phases[0] is Phase.FORWARD and phases[-1] is Phase.APPLY and Phase.BACKWARD in phases
    assert phases == sorted(phases, key=[Phase.FORWARD, Phase.BACKWARD, Phase.APPLY].index)


def test_a_function_without_gradients_is_all_forward() -> None:
    flat = marks.complete_phases(marks.annotate(flat_of(jnp.tanh, X)))
    assert {m.phase for m in flat.marks} == {Phase.FORWARD}


def scoped(*names: str) -> Any:
    def f(x: Any) -> Any:
        w = jnp.ones((3, 3))
        for name in names:
            with jax.named_scope(name):
                x = jnp.tanh(x @ w)
        return x

    return f


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        (("layer3", "layer7"), {"layer3": 2, "layer7": 2}),
        (("h/0", "h/1", "h/2"), {"h/0": 2, "h/1": 2, "h/2": 2}),
        (("net/layers_3/mlp", "net/layers_4/mlp"), {"layers_3": 2, "layers_4": 2}),
        (("Bottleneck_7.scan", "Bottleneck_8"), {"Bottleneck_7": 2, "Bottleneck_8": 2}),
        (("encoder_0", "encoder_1", "decoder_0", "decoder_1"), dict.fromkeys(
            ("encoder_0", "encoder_1", "decoder_0", "decoder_1"), 2)),
        (("encoder/layer_0", "encoder/layer_1", "decoder/layer_0", "decoder/layer_1"), dict.fromkeys(
            ("encoder/layer_0", "encoder/layer_1", "decoder/layer_0", "decoder/layer_1"), 2)),
        (("Block_0/Dense_0", "Block_0/Dense_1", "Block_1/Dense_0"), {"Block_0": 4, "Block_1": 2}),
        (("stem", "head"), {None: 4}),
        (("layer_1", "body", "body", "layer_2"), {None: 8}),  # they hold no more than half of the products
        (("only_0",), {None: 2}),
    ],
)  # fmt: skip
def test_families_of_numbered_names(names: tuple[str, ...], layers: dict[str | None, int]) -> None:
    found = layers_of(scoped(*names), X)
    found = {k: v for k, v in found.items() if k is not None or None in layers}
    if None in layers:
        assert set(found) == {None}
    else:
        assert found == layers


# ---------------------------------------------------------------- boundaries


def bounded(w: Any, x: Any) -> Any:
    x = jnp.tanh(x @ w)
    x = layer_boundary(x)
    x = jnp.tanh(x @ w)
    x, y = layer_boundary((x, x * 2))
    return (jnp.tanh(x @ w) + y).sum()


W = np.ones((3, 3), np.float32)


def test_boundaries_are_identities() -> None:
    plain = jax.make_jaxpr(jax.vmap(lambda x: layer_boundary({"a": x, "b": 1})["a"]))(X)
    np.testing.assert_array_equal(jax.jit(layer_boundary)(X), X)
    flat = boundary.remove(dce(flatten(plain)))
    assert flat.equations == () and flat.outputs == flat.inputs


def test_layers_are_the_regions_between_boundaries() -> None:
    flat = boundary.remove(marks.annotate(flat_of(bounded, W, X)))
    flat.check()
    assert [m.layer for m, e in zip(flat.marks, flat.equations) if e.primitive.name == "dot_general"] == [
        "layer_0", "layer_1", "layer_2"
    ]  # fmt: skip


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_boundaries_survive_differentiation(wrap: Any) -> None:
    flat = marks.annotate(flat_of(lambda w: w - jax.grad(wrap(bounded))(w, X), W))
    flat = boundary.remove(flat)
    flat.check()
    products = [
        (m.phase, m.layer) for m, e in zip(flat.marks, flat.equations) if e.primitive.name == "dot_general"
    ]
    # with the whole loss in one checkpoint nothing of the forward is needed but what the backward recomputes
    for phase in (Phase.BACKWARD,) if wrap is jax.checkpoint else (Phase.FORWARD, Phase.BACKWARD):
        assert {layer for p, layer in products if p is phase} == {"layer_0", "layer_1", "layer_2"}
    assert flat.marks[-1].layer is None  # the update
    np.testing.assert_allclose(run(flat, [W])[0], W - jax.grad(bounded)(W, X), rtol=1e-6)


def test_recomputed_regions_are_those_of_the_forward() -> None:
    """Two blocks in one checkpoint: the backward recomputes layers 1, 2 before it differentiates 2, 1."""

    def pair(x: Any, w: Any) -> Any:
        return jnp.tanh(layer_boundary(jnp.tanh(x @ w)) @ w)

    def loss(w: Any) -> Any:
        x = layer_boundary(jnp.tanh(X @ w))
        return layer_boundary(jax.checkpoint(pair)(x, w)).sum()

    flat = boundary.remove(marks.annotate(flat_of(lambda w: w - jax.grad(loss)(w), W)))
    products = [
        (m.phase, m.layer, compat.is_recomputed(e))
        for m, e in zip(flat.marks, flat.equations)
        if e.primitive.name == "dot_general" and m.phase is Phase.BACKWARD
    ]
    again = [layer for _, layer, recomputed in products if recomputed]
    rest = [layer for _, layer, recomputed in products if not recomputed]
    assert again == ["layer_1", "layer_2"][: len(again)] and again
    assert rest == sorted(rest, reverse=True) and set(rest) == {"layer_0", "layer_1", "layer_2"}


def test_boundaries_override_names() -> None:
    def f(x: Any) -> Any:
        return layer_boundary(scoped("layer_0", "layer_1")(x)) * 2

    assert marks.order(marks.annotate(flat_of(f, X))) == ("layer_0", "layer_1")
    first = marks.annotate(flat_of(f, X)).marks[0]
    last = marks.annotate(flat_of(f, X)).marks[-1]
    assert (first.layer, last.layer) == ("layer_0", "layer_1")


# ---------------------------------------------------------------- lines


def test_lines_are_the_users() -> None:
    flat = flat_of(lambda x: jax.nn.softmax(x), X)
    lines = {str(compat.line_of(e)) for e in flat.equations}
    assert lines == {f"test_trace_marks.py:{test_lines_are_the_users.__code__.co_firstlineno + 1}"}
