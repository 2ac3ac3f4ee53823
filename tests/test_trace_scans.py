"""Scans over layers, cut into runs: the same numbers, parameters and moments in pieces, a layer per piece."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autopar.core.errors import BadInput
from autopar.core.graph import Phase
from autopar.models import gpt
from autopar.trace import compat, marks
from autopar.trace.flat import dce, flatten, run
from autopar.trace.gradient import differentiate, gradient_equations, value_and_grad
from autopar.trace.graph import trace
from autopar.trace.rules import RuleBook
from autopar.trace.scans import cut_scans, find_layer_scans

RULES = RuleBook()
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
BOTH = pytest.mark.parametrize("vg", [value_and_grad, jax.value_and_grad], ids=["ours", "jax"])


def stack(p, x, unroll=1):
    """A scan over layers whose parameters are p["w"] and p["b"]."""
    body = lambda x, layer: (jnp.tanh(x @ layer["w"] + layer["b"]) + x, x.mean())  # noqa: E731
    return jax.lax.scan(body, x, p, unroll=unroll)


def parameters(layers, width=4):
    w = jax.random.normal(jax.random.key(0), (layers, width, width)) / 2
    return {"w": w, "b": jnp.full((layers, width), 0.1)}


X = jax.random.normal(jax.random.key(1), (3, 4))


def cut(leaves, counts, sizes):
    """Returns the arrays in pieces, as `cut_scans` wants them."""
    bounds = np.cumsum(sizes)[:-1]
    found = []
    for leaf, count in zip(leaves, counts, strict=True):
        found += [leaf] if count == 1 else jnp.split(leaf, bounds * (leaf.shape[0] // sum(sizes)))
    return found


def together(leaves, counts):
    leaves = iter(leaves)
    return [next(leaves) if n == 1 else jnp.concatenate([next(leaves) for _ in range(n)]) for n in counts]


def in_pieces(step, *args, pieces=None, remat=False):
    """Returns the cut step after comparing what it computes with `step` itself."""
    flat = dce(flatten(jax.make_jaxpr(step)(*args)))
    result = cut_scans(flat, RULES, pieces=pieces)
    apart = result.flat
    if gradient_equations(apart):
        build = lambda f: trace(marks.annotate(f), RULES).graph  # noqa: E731
        apart = differentiate(apart, lambda g: g, build, remat)
    apart.check()
    leaves = cut(jax.tree.leaves(args), result.inputs, result.sizes)
    got = together(jax.jit(lambda *x: run(apart, x), compiler_options=FAST)(*leaves), result.outputs)
    want = jax.tree.leaves(jax.jit(step, compiler_options=FAST)(*args))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)
    return result, apart


def layers(flat, phase):
    flat = marks.complete_phases(marks.annotate(flat))
    return list(dict.fromkeys(m.layer for m in flat.marks if m.phase is phase and m.layer))


def scans(flat):
    return [s.length for e in flat.equations if (s := compat.scan_of(e)) is not None]


def adam(loss, vg):
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1))

    def step(state, x):
        p, o = state
        value, g = vg(loss)(p, x)
        updates, o = tx.update(g, o, p)
        return (optax.apply_updates(p, updates), o), value

    return step, lambda p: (p, tx.init(p))


@pytest.mark.parametrize("pieces", [None, (2, 3), (1, 1, 3), (4, 1)])
def test_forward(pieces):
    result, flat = in_pieces(stack, parameters(5), X, pieces=pieces)
    sizes = pieces or (1,) * 5
    assert result.inputs == (len(sizes), len(sizes), 1) and result.outputs == (1, len(sizes))
    assert scans(flat) == [n for n in sizes if n > 1]
    assert len(layers(flat, Phase.FORWARD)) == len(sizes)
    assert not result.notes


@BOTH
@pytest.mark.parametrize("pieces", [None, (1, 2, 1)])
def test_train_step(vg, pieces):
    step, init = adam(lambda p, x: jnp.mean(stack(p, x)[0] ** 2), vg)
    result, flat = in_pieces(step, init(parameters(4)), X, pieces=pieces)
    n = len(result.sizes)
    stacked = tuple(n if leaf.shape[:1] == (4,) else 1 for leaf in jax.tree.leaves(init(parameters(4))))
    assert result.inputs == (*stacked, 1), "parameters and both moments"
    assert result.outputs == (*stacked, 1)
    assert not result.notes
    names = layers(flat, Phase.FORWARD)
    assert names == (
        ["scan[0]", "scan[1]", "scan[2]", "scan[3]"] if n == 4 else ["scan[0]", "scan[1:3]", "scan[3]"]
    )
    assert layers(flat, Phase.BACKWARD) == names[::-1]


@pytest.mark.parametrize(
    "vg, remat",
    [
        (value_and_grad, False),
        (jax.value_and_grad, True),
        pytest.param(value_and_grad, True, marks=pytest.mark.slow),
        pytest.param(jax.value_and_grad, False, marks=pytest.mark.slow),
    ],
)
def test_gpt(vg, remat):
    config = gpt.GPTConfig(
        vocabulary=16, positions=8, layers=3, hidden=8, heads=2, scan_layers=True, dropout=0.2, remat=remat
    )
    p = gpt.init(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 16)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    step = lambda p, b: vg(lambda p: gpt.loss(config, p, b, jax.random.key(5)))(p)  # noqa: E731
    result, flat = in_pieces(step, p, batch)
    assert not scans(flat) and not result.notes
    assert result.inputs.count(3) == len(jax.tree.leaves(p["Blocks"]))
    assert layers(flat, Phase.FORWARD) == ["scan[0]", "scan[1]", "scan[2]"]


def test_remat_of_pieces():
    step, init = adam(lambda p, x: jnp.mean(stack(p, x)[0] ** 2), value_and_grad)
    in_pieces(step, init(parameters(3)), X, remat=True)


def test_casts_before_the_scan_are_cut():
    def loss(p, x):
        coarse = jax.tree.map(lambda w: 2 * w.astype(jnp.bfloat16).astype(x.dtype), p)
        return jnp.mean(stack(coarse, x)[0])

    step, init = adam(loss, value_and_grad)
    result, _ = in_pieces(step, init(parameters(3)), X)
    assert result.inputs.count(3) == 6 and not result.notes


def test_reverse_two_scans_and_skip():
    def loss(p, x):
        x, seen = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, p["w"])
        x, _ = jax.lax.scan(
            lambda x, wy: (jnp.tanh(x + wy[1] @ wy[0]), None), x, (p["w"], seen), reverse=True
        )
        return jnp.mean(x**2)

    _, flat = in_pieces(lambda p, x: value_and_grad(loss)(p, x), parameters(3), X)
    assert layers(flat, Phase.FORWARD)[:3] == ["scan[0]", "scan[1]", "scan[2]"]
    assert not scans(flat)


def test_what_cannot_be_cut_is_put_together_with_a_note():
    def step(p, x):
        y, _ = stack(p, x)
        return y, jnp.sort(p["b"], axis=0), p["w"].mean(), p["w"].max(), p["w"][0]

    result, _ = in_pieces(step, parameters(3), X)
    assert len(result.notes) == 2
    assert any("sort" in n for n in result.notes)
    assert any("test_trace_scans.py:" in n and "slice" in n for n in result.notes)


def test_scans_over_time_are_left_alone():
    def loss(p, xs):
        return jnp.mean(jax.lax.scan(lambda x, row: (jnp.tanh(x @ p["w"][0] + row), None), X, xs)[0])

    flat = dce(
        flatten(
            jax.make_jaxpr(lambda p, xs: jax.value_and_grad(loss)(p, xs))(parameters(3), jnp.ones((3, 3, 4)))
        )
    )
    assert find_layer_scans(flat, RULES, batch_inputs=(2,)) is None
    assert cut_scans(flat, RULES, batch_inputs=(2,)).flat is flat

    def beside(p, xs):
        x, _ = jax.lax.scan(lambda x, row: (jnp.tanh(x + row), None), X, xs)
        return jnp.mean(stack(p, x)[0])

    flat = dce(
        flatten(
            jax.make_jaxpr(lambda p, xs: jax.value_and_grad(beside)(p, xs))(
                parameters(3), jnp.ones((3, 3, 4))
            )
        )
    )
    result = cut_scans(flat, RULES, batch_inputs=(2,))
    assert result.inputs == (3, 3, 1) and scans(result.flat).count(3) == 1


def test_the_longest_work_decides():
    def step(p, q, x):
        return stack(q, stack(p, x)[0])[0]

    flat = dce(flatten(jax.make_jaxpr(step)(parameters(6), parameters(2), X)))
    assert find_layer_scans(flat, RULES) == 6
    assert find_layer_scans(dce(flatten(jax.make_jaxpr(jnp.sin)(X))), RULES) is None


def test_pieces_must_add_up():
    flat = dce(flatten(jax.make_jaxpr(stack)(parameters(5), X)))
    with pytest.raises(BadInput, match="5 layers"):
        cut_scans(flat, RULES, pieces=(2, 2))
