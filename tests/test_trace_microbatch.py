"""Micro-batches: what is accepted equals the full batch in numbers; what mixes examples is refused."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import Literal

from autopar.core.errors import MixedExamples
from autopar.core.graph import Combine, Phase
from autopar.models import gpt, wide_resnet
from autopar.trace import marks
from autopar.trace.batch_tags import SAME, ZERO, Kind, joined, piece, term
from autopar.trace.flat import Flat, dce, flatten, run
from autopar.trace.gradient import differentiate, gradient_equations, value_and_grad
from autopar.trace.graph import trace
from autopar.trace.microbatch import analyse, slice_rng
from autopar.trace.rules import RuleBook

RULES = RuleBook()
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
BOTH = pytest.mark.parametrize("vg", [value_and_grad, jax.value_and_grad], ids=["ours", "jax"])


def flats(step, state, batch, m):
    """Returns the step's traces on the full batch and on a micro-batch, and which inputs are the batch."""
    size = len(jax.tree.leaves(batch)[0])
    part = jax.tree.map(lambda x: x[: size // m], batch)
    full, micro = (dce(flatten(jax.make_jaxpr(step)(state, b))) for b in (batch, part))
    first = len(jax.tree.leaves(state))
    return full, micro, range(first, first + len(jax.tree.leaves(batch)))


def in_microbatches(step, state, batch, m):
    """Returns the results of `step` from m micro-batches, and how each value that left them was combined."""
    full, micro, positions = flats(step, state, batch, m)
    analysis = analyse(full, micro, m, positions, RULES)
    flat = slice_rng(analysis.flat, full, m)
    if gradient_equations(flat):
        flat = differentiate(flat, lambda g: g, lambda f: trace(marks.annotate(f), RULES).graph)
    flat = marks.complete_phases(marks.annotate(flat))
    traced = trace(flat, RULES)
    graph = replace(traced.graph, batch=tuple(traced.graph.inputs[i] for i in positions))
    found = [(traced.values[v], how) for v, how in analysis.combinations(graph, traced.values)]
    return computed(flat, found, state, batch, m, positions), found


def computed(flat, found, state, batch, m, positions):
    split = [m_.phase is Phase.APPLY for m_ in flat.marks]

    def part(of, inputs, outputs):
        kept = [i for i, apply in enumerate(split) if apply == of]
        picked = tuple(flat.equations[i] for i in kept), tuple(flat.marks[i] for i in kept)
        return dce(Flat(tuple(inputs), tuple(outputs), *picked, flat.constants))

    leaving = [v for v, _ in found]
    once = part(False, flat.inputs, leaving)
    leaves = jax.tree.leaves((state, batch))
    forward = jax.jit(lambda *x: run(once, x), compiler_options=FAST)
    size = len(jax.tree.leaves(batch)[0]) // m
    parts = []
    for k in range(m):
        cut = [x[k * size : (k + 1) * size] if i in positions else x for i, x in enumerate(leaves)]
        parts.append(forward(*cut, jnp.int32(k)))
    combined = []
    for (_, how), *values in zip(found, *parts):
        stacked = jnp.stack(values) if how is not Combine.CONCAT else jnp.concatenate(values)
        combined.append(
            {
                Combine.MEAN: lambda x=stacked: x.mean(0),
                Combine.SUM: lambda x=stacked: x.sum(0),
                Combine.LAST: lambda x=stacked: x[-1],
                Combine.CONCAT: lambda x=stacked: x,
            }[how]()
        )
    rest = part(True, [*flat.inputs, *(v for v in leaving if v not in flat.inputs)], flat.outputs)
    known = dict(zip(leaving, combined))
    extra = [known[v] for v in leaving if v not in flat.inputs]
    return run(rest, [*leaves, jnp.int32(0), *extra])


def agrees(step, state, batch, m=4, tolerance=2e-6):
    """Checks that m micro-batches give the step's own results; returns the set of combinations."""
    got, found = in_microbatches(step, state, batch, m)
    want = jax.tree.leaves(jax.jit(step, compiler_options=FAST)(state, batch))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance * 50, atol=tolerance)
    return {how for _, how in found}


def refused(step, state, batch, m=4):
    """Returns the message with which micro-batches are refused."""
    with pytest.raises(MixedExamples) as error:
        in_microbatches(step, state, batch, m)
    message = str(error.value)
    assert "micro_batches=1" in message
    return message


class MLP(nn.Module):
    batch_norm: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(8)(x))
        if self.batch_norm:
            x = nn.BatchNorm(use_running_average=False)(x)
        x = nn.Dropout(self.dropout, deterministic=not self.dropout)(x)
        return nn.Dense(5)(nn.LayerNorm()(x))


KEY = jax.random.key(0)
BATCH = {
    "x": jax.random.normal(KEY, (8, 6)),
    "y": jax.random.randint(KEY, (8,), 0, 5),
    "mask": (jnp.arange(8) % 3 > 0).astype(jnp.float32),
}
MODEL = MLP()
WEIGHTS = MODEL.init(KEY, BATCH["x"])
each = optax.softmax_cross_entropy_with_integer_labels


def logits(p, b):
    return MODEL.apply(p, b["x"])


def losses(p, b):
    return each(logits(p, b), b["y"])


def trained(loss, vg=value_and_grad):
    """Returns a step with an optimizer that is not linear in the gradient."""
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1))

    def step(p, b):
        value, g = vg(loss)(p, b)
        updates, _ = tx.update(g, tx.init(p), p)
        return optax.apply_updates(p, updates), value

    return step


ACCEPTED = {
    "mean": (lambda p, b: losses(p, b).mean(), Combine.MEAN),
    "sum": (lambda p, b: losses(p, b).sum(), Combine.SUM),
    "sum over a constant": (lambda p, b: losses(p, b).sum() / 7, Combine.SUM),
    "mean by hand": (lambda p, b: losses(p, b).sum() / len(b["y"]), Combine.MEAN),
    "weighted mean": (lambda p, b: (losses(p, b) * b["mask"]).mean(), Combine.MEAN),
    "a mask of ones": (
        lambda p, b: (lambda w: (losses(p, b) * w).sum() / w.sum())(jnp.ones(len(b["y"]))),
        Combine.MEAN,
    ),
    "weight decay": (
        lambda p, b: losses(p, b).mean() + sum((w**2).sum() for w in jax.tree.leaves(p)),
        Combine.MEAN,
    ),
    "rows by number": (
        lambda p, b: -jax.nn.log_softmax(logits(p, b))[jnp.arange(len(b["y"])), b["y"]].mean(),
        Combine.MEAN,
    ),
    "one hot": (
        lambda p, b: -(jax.nn.log_softmax(logits(p, b)) * jax.nn.one_hot(b["y"], 5)).mean(),
        Combine.MEAN,
    ),
    "per-example mean": (lambda p, b: (logits(p, b).mean(-1) ** 2).mean(), Combine.MEAN),
    "vmap": (
        lambda p, b: jax.vmap(lambda x, y: each(MODEL.apply(p, x), y))(b["x"], b["y"]).mean(),
        Combine.MEAN,
    ),
    "branch on parameters": (
        lambda p, b: jax.lax.cond(
            jax.tree.leaves(p)[1].sum() > 0, lambda: losses(p, b).mean(), lambda: 2 * losses(p, b).mean()
        ),
        Combine.MEAN,
    ),
    "loop": (
        lambda p, b: jax.lax.scan(lambda c, _: (c + losses(p, b).mean(), None), 0.0, None, length=2)[0],
        Combine.MEAN,
    ),
    "keys per example": (
        lambda p, b: jax.vmap(lambda k, x: MODEL.apply(p, x * jax.random.normal(k, x.shape)).sum())(
            jax.random.split(KEY, len(b["y"])), b["x"]
        ).mean(),
        Combine.MEAN,
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_losses_equal_the_full_batch(name):
    loss, how = ACCEPTED[name]
    assert agrees(trained(loss), WEIGHTS, BATCH) - {Combine.LAST} == {how}


@pytest.mark.parametrize("name", ["sum", "rows by number", "weight decay", "loop"])
def test_accepted_losses_with_plain_jax(name):
    loss, how = ACCEPTED[name]
    assert agrees(trained(loss, jax.value_and_grad), WEIGHTS, BATCH) - {Combine.LAST} == {how}


REFUSED = {
    "masked mean": (lambda p, b: (losses(p, b) * b["mask"]).sum() / b["mask"].sum(), "div"),
    "contrastive": (
        lambda p, b: (lambda h: each(h @ h.T, jnp.arange(len(h))).mean())(logits(p, b)),
        "dot_general",
    ),
    "max": (lambda p, b: losses(p, b).max(), "takes the max over examples"),
    "balance": (lambda p, b: (jax.nn.softmax(logits(p, b)).mean(0) * logits(p, b).mean(0)).sum(), "mul"),
    "root": (lambda p, b: jnp.sqrt(losses(p, b).mean()), "sqrt"),
    "sum and weight decay": (lambda p, b: losses(p, b).sum() + (jax.tree.leaves(p)[1] ** 2).sum(), "add"),
    "unbiased": (lambda p, b: losses(p, b).sum() / (len(b["y"]) - 1), "constant"),
    "position": (lambda p, b: (losses(p, b) * jnp.arange(len(b["y"]))).mean(), "position"),
    "next row": (lambda p, b: logits(p, b)[(jnp.arange(len(b["y"])) + 1) % len(b["y"])].mean(), "position"),
    "flip": (lambda p, b: (losses(p, b) * losses(p, b)[::-1]).mean(), "rev"),
    "half": (lambda p, b: losses(p, b)[: len(b["y"]) // 2].mean(), "slice"),
    "first": (lambda p, b: logits(p, b).at[0].set(0.0).mean(), "scatter"),
    "sorted": (lambda p, b: (jnp.sort(losses(p, b)) * losses(p, b)).mean(), "sort"),
    "running": (
        lambda p, b: jax.lax.scan(lambda c, x: (c + x, c), 0.0, losses(p, b))[1].mean(),
        "one after another",
    ),
    "variance": (lambda p, b: jnp.var(losses(p, b)), ": gt mixes the examples"),
}


@BOTH
@pytest.mark.parametrize("name", REFUSED)
def test_mixed_losses_are_refused(name, vg):
    loss, word = REFUSED[name]
    message = refused(trained(loss, vg), WEIGHTS, BATCH)
    assert word in message and "test_trace_microbatch.py:" in message


@BOTH
def test_batch_norm_names_the_line(vg):
    model = MLP(batch_norm=True)
    p = model.init(KEY, BATCH["x"])

    def loss(w, b):
        out, _ = model.apply({**p, "params": w}, b["x"], mutable=["batch_stats"])
        return each(out, b["y"]).mean()

    message = refused(trained(loss, vg), p["params"], BATCH)
    assert "a sum over examples meets single examples" in message and "test_trace_microbatch.py:" in message


def test_results_per_example_and_metrics():
    def step(p, b):
        def loss(p):
            out = logits(p, b)
            return each(out, b["y"]).mean(), (
                out,
                jnp.float32(3),
                b["mask"].sum(),
                len(b["y"]) * p["params"]["Dense_1"]["bias"],
            )

        (value, aux), g = value_and_grad(loss, has_aux=True)(p)
        right = (aux[0].argmax(-1) == b["y"]).mean()
        return jax.tree.map(jnp.tanh, g), jnp.exp(value), aux, right, b["x"]

    assert agrees(step, WEIGHTS, BATCH) == {Combine.MEAN, Combine.SUM, Combine.CONCAT}


def test_gradient_for_the_batch():
    summed = lambda p, b: value_and_grad(lambda x: logits(p, {"x": x}).sum())(b["x"])  # noqa: E731
    assert Combine.CONCAT in agrees(summed, WEIGHTS, BATCH)
    mean = lambda p, b: value_and_grad(lambda x: logits(p, {"x": x}).mean())(b["x"])  # noqa: E731
    assert "depends on the batch size" in refused(mean, WEIGHTS, BATCH)


def test_inference():
    assert agrees(lambda p, b: (logits(p, b), losses(p, b).mean() ** 2), WEIGHTS, BATCH) == {
        Combine.CONCAT,
        Combine.MEAN,
    }
    refused(lambda p, b: logits(p, b).T, WEIGHTS, BATCH)


def test_new_parameters_on_the_same_batch_are_refused():
    def step(p, b):
        new, _ = trained(lambda p, b: losses(p, b).mean())(p, b)
        return losses(new, b).mean()

    refused(step, WEIGHTS, BATCH)


def test_a_step_that_depends_on_the_batch_size_is_refused():
    def step(p, b):
        scale = 1 if len(b["y"]) > 4 else jnp.tanh(2.0 * p["params"]["Dense_1"]["bias"].sum())
        return losses(p, b).mean() * scale

    assert "depends on the batch size" in refused(step, WEIGHTS, BATCH)


# ---------------------------------------------------------------- models

GPT = gpt.GPTConfig(vocabulary=16, positions=8, layers=2, hidden=8, heads=2)


def language(config, vg):
    def step(p, b):
        key = jax.random.key(5) if config.dropout else None
        return vg(lambda p: gpt.loss(config, p, b, key))(p)

    tokens = jax.random.randint(KEY, (4, 9), 0, config.vocabulary)
    return step, gpt.init(config, KEY), {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


@pytest.mark.parametrize(
    "changes, vg",
    [
        ({"dropout": 0.3, "scan_layers": True}, value_and_grad),
        ({"dropout": 0.3}, jax.value_and_grad),
        *(
            pytest.param(changes, vg, marks=pytest.mark.slow)
            for vg in (value_and_grad, jax.value_and_grad)
            for changes in ({}, {"scan_layers": True}, {"dropout": 0.3, "remat": True})
        ),
    ],
)
def test_gpt(changes, vg):
    assert agrees(*language(replace(GPT, **changes), vg), m=2) == {Combine.MEAN}


@pytest.mark.parametrize("m", [1, 2, 4])
def test_masks_are_those_of_the_full_batch(m):
    def step(p, b):
        x = b["x"] @ p
        masks = [
            jax.random.bernoulli(KEY, 0.5, x.shape),
            jax.random.normal(KEY, (3, *x.shape)).swapaxes(0, 1),
        ]
        masks.append(jax.random.split(KEY, len(x)))
        masks.append(
            jax.lax.scan(lambda c, k: (c, jax.random.uniform(k, x.shape)), 0, jax.random.split(KEY, 2))[1]
        )
        return (*masks[:2], jax.random.key_data(masks[2]), jnp.moveaxis(masks[3], 1, 0))

    p, b = jnp.ones((6, 4)), {"x": BATCH["x"]}
    full, micro, _ = flats(step, p, b, m)
    sliced = slice_rng(micro, full, m)
    sliced.check()
    want = step(p, b)
    size = 8 // m
    parts = [run(sliced, [p, b["x"][k * size :][:size], jnp.int32(k)]) for k in range(m)]
    for i, whole in enumerate(want):
        np.testing.assert_array_equal(np.concatenate([part[i] for part in parts]), whole)


@pytest.mark.slow
def test_wide_resnet_with_group_norm():
    config = wide_resnet.WideResNetConfig()
    p = wide_resnet.init(config, KEY)
    b = {"images": jax.random.normal(KEY, (4, 16, 16, 3)), "labels": jnp.arange(4) % 3}
    step = lambda p, b: value_and_grad(lambda p: wide_resnet.loss(config, p, b))(p)  # noqa: E731
    full, micro, positions = flats(step, p, b, 2)
    analysis = analyse(full, micro, 2, positions, RULES)
    assert {analysis.combine(v) for v in micro.outputs} == {Combine.MEAN}


# ---------------------------------------------------------------- tags


def test_tags():
    assert term(-1).combine(0) is Combine.MEAN and term(0).combine(3) is Combine.SUM
    assert SAME.combine(0) is Combine.LAST and SAME.scaled(1).combine(0) is Combine.SUM
    assert piece(0, 8).combine(8) is Combine.CONCAT
    assert piece(0, 4).combine(8) is None and piece(1, 8).combine(8) is None and term(1).combine(0) is None
    assert joined(ZERO, term(-1)) == term(-1)
    assert joined(SAME, term(-1)) == term(-1) and joined(SAME, term(0)) is None
    assert joined(piece(0, 0), piece(0, 8)) == piece(0, 8) and joined(piece(0, 8), piece(1, 8)) is None


UNARY = (
    jnp.tanh,
    lambda x: x.mean(),
    lambda x: x.sum(0) if x.ndim else x,
    lambda x: x / 3,
    jnp.abs,
    lambda x: x * len(x) if x.ndim else x,
    lambda x: x.reshape(-1),
    jnp.cumsum,
    lambda x: x.mean(-1, keepdims=True) if x.ndim else x,
    lambda x: x.T,
    lambda x: jnp.zeros_like(x),
    lambda x: x.max(0) if x.ndim else x,
    lambda x: x**2,
    lambda x: -x,
)
BINARY = (
    jnp.add,
    jnp.multiply,
    jnp.subtract,
    lambda x, y: x / (2 + y**2),
    jnp.maximum,
    lambda x, y: jnp.where(x > y, x, y),
    lambda x, y: x @ y if x.ndim == y.ndim == 2 and x.shape[1] == y.shape[0] else x + y,
)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)), min_size=2, max_size=9)
)
def test_what_is_accepted_is_true(lines):
    """Random programs: whatever the analysis claims about a result must hold for the numbers."""

    def step(w, b):
        values = [b["x"], w, b["mask"], jnp.float32(2)]
        for which, i, j in lines:
            x, y = values[i % len(values)], values[j % len(values)]
            if which % 2:
                values.append(UNARY[which // 2 % len(UNARY)](x))
                continue
            try:
                jnp.broadcast_shapes(x.shape, y.shape)
            except ValueError:
                continue
            values.append(BINARY[which // 2 % len(BINARY)](x, y))
        return tuple(values[4:])

    batch = {"x": BATCH["x"][:, :3], "mask": BATCH["mask"]}
    w = jnp.arange(9.0).reshape(3, 3) / 9 - 0.3
    full, micro, positions = flats(step, w, batch, 2)
    try:
        analysis = analyse(full, micro, 2, positions, RULES)
    except MixedExamples:
        return  # another trace for another batch size
    parts = [run(micro, [w, batch["mask"][k : k + 4], batch["x"][k : k + 4]]) for k in (0, 4)]
    want = run(full, [w, batch["mask"], batch["x"]])
    for v, whole, *pieces in zip(micro.outputs, want, *parts):
        tag = None if isinstance(v, Literal) else analysis.tags.get(v)
        if tag is None or tag.kind is Kind.MIXED or tag.numbered:
            continue
        scale = 2.0**tag.exponent
        if tag.kind is Kind.TERM:
            claim = scale * sum(pieces)
        elif tag.kind is Kind.SAME:
            claim = scale * pieces[1]
        elif tag.span in (0, whole.shape[tag.dim]):
            claim = scale * np.concatenate(pieces, tag.dim)
        else:
            outer = whole.shape[tag.dim] // tag.span
            cut = [
                np.asarray(x).reshape(*x.shape[: tag.dim], outer, -1, *x.shape[tag.dim + 1 :]) for x in pieces
            ]
            claim = scale * np.concatenate(cut, tag.dim + 1).reshape(whole.shape)
        np.testing.assert_allclose(claim, whole, rtol=1e-4, atol=1e-5)
        if tag.zero:
            assert not np.any(whole)
