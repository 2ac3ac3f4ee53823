"""Where layers are narrow, and what their backward passes hold when each part is computed again by itself."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autopar as ap
from autopar.core.graph import OpKind, Phase, Remat
from autopar.trace.capture import capture
from autopar.trace.waists import parts

X = jax.ShapeDtypeStruct((4, 8), "float32")
WIDE = jax.ShapeDtypeStruct((8, 32), "float32")


def block(x, up, down):
    return x + jnp.tanh(x @ up) @ down.T


def numbers(function, *shapes):
    jaxpr = jax.make_jaxpr(function)(*shapes).jaxpr
    found = parts(jaxpr.eqns, jaxpr.outvars)
    products = [part for e, part in zip(jaxpr.eqns, found) if e.primitive.name == "dot_general"]
    return found, products


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (lambda x, a, b: block(x, a, b), [0, 0]),  # what it adds to is still to be read inside
        (lambda x, a, b, c, d: block(block(x, a, b), c, d), [0, 0, 1, 1]),
        (lambda x, a, b, c, d: block(block(x, a, b), c, d) + x, [0, 0, 0, 0]),
        (lambda x, a, b: jnp.tanh(x @ a) @ b.T, [0, 0]),
        (lambda x, a, b, c: jnp.tanh(jnp.tanh(x @ a) @ b.T) @ c, [0, 1, 2]),  # its result is as wide
        (lambda x, a, b: jnp.tanh(block(x, a, b)), [0, 0]),  # nothing to multiply in what follows
        (lambda x, a, b: block(block(x, a, b), a, b), [0, 0, 0, 0]),  # the weights pass, too
        (lambda x: x, []),
    ],
)
def test_a_part_ends_where_no_more_passes_than_the_layer_leaves(function, products):
    count = function.__code__.co_argcount
    found, own = numbers(function, X, *[WIDE] * (count - 1))
    assert own == products
    assert found == sorted(found)


def loss(params, x):
    with jax.named_scope("Layer_0"):
        for up, down in params:
            x = block(x, up, down)
    return jnp.mean(jnp.square(x))


def traced(remat, count=2):
    params = [(WIDE, WIDE)] * count
    ending = {"square", "integer_pow", "reduce_sum", "div", "mul"}

    def assign(graph):
        layers = (replace(e, layer=int(e.op in ending)) for e in graph.equations)
        return replace(graph, equations=tuple(layers), layers=("Layer_0", "loss"))

    return capture(ap.value_and_grad(loss), (params, X), remat=remat, assign=assign)


def test_a_part_is_computed_again_when_the_backward_gets_there():
    """What is computed again of the first part comes after the products that only the second one needs."""
    again = {}
    for remat in (Remat.FULL, Remat.PARTS):
        backward = [e for e in traced(remat).graph.equations if e.phase is Phase.BACKWARD]
        again[remat] = [e.op for e in backward if e.op == "tanh" or e.kind is OpKind.CONTRACTION]
    product = "dot_general"  # of the gradients: two of weights, and of what they multiply, but for the input
    assert again[Remat.FULL] == [product, "tanh", product, product, "tanh", *[product] * 7]
    assert again[Remat.PARTS] == [product, "tanh", *[product] * 4, product, "tanh", *[product] * 3]


@pytest.mark.parametrize("remat", [Remat.PARTS, (Remat.NONE, Remat.PARTS)])
def test_the_only_part_of_a_layer_is_everything(remat):
    several = remat if isinstance(remat, tuple) else (remat,)
    with_parts, without = (
        traced(r, count=1) for r in (remat, tuple(Remat.FULL if r is Remat.PARTS else r for r in several))
    )
    assert [e.op for e in with_parts.graph.equations] == [e.op for e in without.graph.equations]
    assert {e.when for e in with_parts.graph.equations} == {e.when for e in without.graph.equations}


def two_layers(params, x):
    for k in range(2):
        with jax.named_scope(f"Layer_{k}"):
            for up, down in params[k]:
                x = block(x, up, down)
    return jnp.mean(jnp.square(x))


def test_the_numbers_are_the_same():
    keys = np.random.default_rng(0)
    one = lambda: keys.normal(size=(8, 32)).astype("f4") / 4  # noqa: E731
    params, x = [[(one(), one()) for _ in range(2)] for _ in range(2)], keys.normal(size=(16, 8)).astype("f4")
    method = ap.ShardParallel(mesh=(2, 4), remat="parts")
    step = ap.parallelize(ap.value_and_grad(two_layers), method=method)
    assert step.plan(params, x).remat == (("Layer_0", Remat.PARTS), ("Layer_1", Remat.PARTS))
    value, gradient = step(params, x)
    other, alike = jax.jit(jax.value_and_grad(two_layers))(params, x)
    np.testing.assert_allclose(value, other, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(alike)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    step.close()
