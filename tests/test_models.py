"""The built-in models: sizes, numerics against plain numpy, names and exact micro-batches."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autopar import models
from autopar.core.errors import BadInput, UnknownName
from autopar.models import bert, families, gpt, layers, mlp, moe, opt, unet, vit, wide_resnet

SIZED = re.compile(r"(gpt|moe|wresnet|opt|llama|smollm2)-[\d.]+[mb]$")
LADDER = [name for name in models.names() if SIZED.search(name)]
TINY = [name for name in models.names() if name.endswith("-tiny") or name == "mlp"]
SMALL_GPT = gpt.GPTConfig(vocabulary=31, positions=12, layers=3, hidden=16, heads=2)
SMALL_OPT = opt.OPTConfig(3, 16, 2, vocabulary=31, positions=12)
POST_NORM_OPT = opt.OPTConfig(3, 16, 2, embedding=8, post_norm=True, vocabulary=31, positions=12)


# These tests compile much and run little.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def randomised(params, seed=0):
    """Parameters of order one, biases and scales too, so that a missing piece shows."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(rng.normal(0.3, 0.5, x.shape), x.dtype) for x in leaves])


def some_tokens(shape, vocabulary=31, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocabulary, shape), jnp.int32)


def jitted(forward, config):
    return quick_jit(lambda params, tokens: forward(config, params, tokens))


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


# ---- the catalogue


@pytest.mark.parametrize("name", LADDER)
def test_parameter_count_is_near_the_name(name):
    number, unit = re.search(r"([\d.]+)([mb])$", name).groups()
    want = float(number) * {"m": 1e6, "b": 1e9}[unit]
    have = models.get(name).parameters
    # The 350m is called so, but has 331 M parameters, as published.
    assert have == pytest.approx(want, rel=0.06 if name == "opt-350m" else 0.04)


@pytest.mark.parametrize(
    "name, count", [("opt-125m", 125_239_296), ("opt-350m", 331_196_416), ("opt-1.3b", 1_315_758_080)]
)
def test_opt_has_exactly_the_published_parameters(name, count):
    assert models.get(name).parameters == count


def test_wide_resnet_parameters_in_closed_form():
    f, width, classes = 160, 2, 1024
    count = 3 * 49 * f + 2 * f  # stem and its norm
    for group, blocks in enumerate((3, 4, 6, 3)):
        c = f * 2**group
        entry = f if group == 0 else 2 * c
        for first in [True] + [False] * (blocks - 1):
            into = entry if first else 4 * c
            count += into * c + 9 * c * c * width + c * width * 4 * c + 2 * (c + c * width + 4 * c)
            count += into * 4 * c + 2 * 4 * c if first else 0
    count += 4 * 8 * f * classes + classes
    assert models.get("wresnet-250m").parameters == count


@pytest.mark.parametrize("name", ["gpt-39b", "opt-175b"])
def test_the_largest_are_shapes_only(name):
    def live():
        return sum(x.nbytes for x in jax.live_arrays())

    before = live()
    step = models.get(name)
    out = jax.eval_shape(step.step, *step.args)
    assert live() - before < 1_000_000
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(step.args))
    if name == "opt-175b":
        assert out.shape == (8, 512, 50272) and out.dtype == jnp.float16
        assert {x.dtype for x in jax.tree.leaves(step.args[0])} == {jnp.dtype("float16")}
    else:
        state, loss = out
        same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, step.args[0])
        assert jax.tree.all(same) and loss.shape == () and loss.dtype == jnp.float32


def test_training_state_is_float32_and_products_are_not():
    step = models.get("gpt-350m", dtype=jnp.bfloat16)
    kinds = {x.dtype for x in jax.tree.leaves(step.args[0].params)}
    assert kinds == {jnp.dtype("float32")}
    dots = [
        e for e in equations(jax.make_jaxpr(step.step)(*step.args).jaxpr) if str(e.primitive) == "dot_general"
    ]
    assert {v.aval.dtype for e in dots for v in e.invars} == {jnp.dtype("bfloat16")}


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.mark.parametrize("name", TINY)
def test_forward_gives_logits(name):
    step = models.get(name, batch=2, training=False)
    logits = jax.eval_shape(step.step, *step.args)
    odd = {"wresnet-tiny": (2, 16), "mlp": (2, 16), "vit-tiny": (2, 16), "unet-tiny": (2, 16, 16, 3)}
    assert logits.shape == odd.get(name, (2, 32, 256)) and logits.dtype == jnp.float32
    assert shapes_of(step.make_batch(jax.random.key(0))) == step.args[1]


@pytest.mark.parametrize("name", TINY)
def test_training_decreases_the_loss(name):
    step = models.get(name, training=True)
    state, batch = quick_jit(step.init)(jax.random.key(0)), step.make_batch(jax.random.key(1))
    assert shapes_of((state, batch)) == step.args
    run, losses = quick_jit(step.step), []
    for _ in range(30):
        state, loss = run(state, batch)
        losses.append(float(loss))
    assert int(state.step) == 30
    assert losses[-1] < 0.8 * losses[0] and np.all(np.isfinite(losses))


def test_half_precision_step_runs():
    step = models.get("gpt-tiny", dtype=jnp.bfloat16, layers=1)
    state, loss = quick_jit(step.step)(step.init(jax.random.key(0)), step.make_batch(jax.random.key(1)))
    assert np.isfinite(loss) and state.params["norm"]["scale"].dtype == jnp.float32


def test_another_value_and_grad_is_used():
    seen = []

    def spy(fun):
        seen.append(fun)
        return jax.value_and_grad(fun)

    step = models.get("mlp", value_and_grad=spy)
    jax.eval_shape(step.step, *step.args)
    assert len(seen) == 1


def test_changes_reach_the_config():
    step = models.get("gpt-tiny", layers=6, sequence=256)
    assert "Block_5" in step.args[0].params and "Block_6" not in step.args[0].params
    assert step.args[0].params["position"]["embedding"].shape == (256, 64)
    assert step.args[1]["tokens"].shape == (8, 256)


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: models.get("gpt-3b"), UnknownName, "gpt-39b|gpt-1.3b"),
        (lambda: models.get("mlp", sequence=4), BadInput, "no sequence"),
        (lambda: models.get("gpt-tiny", batch=0), BadInput, "at least 1"),
        (lambda: models.get("gpt-tiny", experts=4), BadInput, "vocabulary"),
        (lambda: models.get("gpt-tiny", heads=5), BadInput, "must divide"),
        (lambda: models.get("opt-125m", sequence=4096), BadInput, "2048 positions"),
        (lambda: models.get_decode("gpt-tiny"), BadInput, "opt-175b"),
        (lambda: models.get("moe-tiny", experts_per_token=3), BadInput, "1 .Switch. or 2"),
    ],
)
def test_bad_requests_say_what_to_do(call, error, says):
    with pytest.raises(error, match=says):
        call()


# ---- numerics against numpy


def np_gelu(y):
    return 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))


def np_softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def np_norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def np_attention(p, x):
    """Parameters as in `gpt.py`: kernels `[in…, out…]`."""
    q, k, v = (
        np.einsum("td,dhs->hts", x, p[n]["kernel"]) + p[n]["bias"][:, None] for n in ("query", "key", "value")
    )
    y = np.zeros_like(np.swapaxes(q, 0, 1))
    for head in range(q.shape[0]):
        for t in range(len(x)):
            scores = k[head, : t + 1] @ q[head, t] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            y[t, head] = weights / weights.sum() @ v[head, : t + 1]
    return np.einsum("ths,hsd->td", y, p["out"]["kernel"]) + p["out"]["bias"]


def np_block(p, x, activation, post_norm):
    def half(x, norm, f):
        return np_norm(p[norm], x + f(x)) if post_norm else x + f(np_norm(p[norm], x))

    def feed_forward(y):
        return activation(y @ p["up"]["kernel"] + p["up"]["bias"]) @ p["down"]["kernel"] + p["down"]["bias"]

    x = half(x, "norm_attention", lambda y: np_attention(p, y))
    return half(x, "norm_feed_forward", feed_forward)


def as_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def in_out(block):
    """Kernels `[in…, out…]` of kernels `[out…, in…]`."""
    order = {"query": (2, 0, 1), "key": (2, 0, 1), "value": (2, 0, 1), "out": (1, 2, 0)}
    turned = {
        n: p | {"kernel": p["kernel"].transpose(order.get(n))} for n, p in block.items() if "kernel" in p
    }
    return block | turned


def np_opt(config, params, tokens):
    params = as_float64(params)
    x = params["embedding"][tokens]
    x = x @ params["project_in"].T if config.projected else x
    x = x + params["position"][2 : 2 + len(tokens)]
    for i in range(config.layers):
        x = np_block(in_out(params[f"Block_{i}"]), x, lambda y: np.maximum(y, 0), config.post_norm)
    x = x if config.post_norm else np_norm(params["norm"], x)
    x = x @ params["project_out"].T if config.projected else x
    return x @ params["embedding"].T


def np_gpt(config, params, tokens):
    params = as_float64(params)
    x = params["embedding"]["embedding"][tokens] + params["position"]["embedding"][: len(tokens)]
    for i in range(config.layers):
        block = params[f"Block_{i}"]
        x = np_block(block | block["attention"] | block["feed_forward"], x, np_gelu, False)
    return np_norm(params["norm"], x) @ params["embedding"]["embedding"].T


@pytest.mark.parametrize("config", [SMALL_OPT, POST_NORM_OPT])
def test_opt_equals_numpy(config):
    params = randomised(opt.parameter_shapes(config))
    tokens = some_tokens((2, 9))
    logits = jitted(opt.forward, config)(params, tokens)
    for example in range(2):
        want = np_opt(config, params, np.asarray(tokens[example]))
        np.testing.assert_allclose(logits[example], want, rtol=2e-4, atol=2e-4)


def test_gpt_equals_numpy():
    params = randomised(jax.eval_shape(lambda key: gpt.init(SMALL_GPT, key), jax.random.key(0)))
    tokens = some_tokens((2, 9))
    logits = jitted(gpt.forward, SMALL_GPT)(params, tokens)
    for example in range(2):
        want = np_gpt(SMALL_GPT, params, np.asarray(tokens[example]))
        np.testing.assert_allclose(logits[example], want, rtol=2e-4, atol=2e-4)


def test_cross_entropy_equals_numpy():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 30, (3, 5, 7)), rng.integers(0, 7, (3, 5))
    exact = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    want = np.mean(exact - np.take_along_axis(logits, targets[..., None], -1)[..., 0])
    have = layers.cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(targets))
    assert float(have) == pytest.approx(want, rel=1e-6)


def test_mlp_equals_numpy():
    config = mlp.MLPConfig(inputs=3, hidden=5, outputs=2, layers=3)
    params = randomised(mlp.init(config, jax.random.key(0)))
    x = np.random.default_rng(1).normal(size=(4, 3))
    (a, b, c) = as_float64(params)
    want = np.tanh(np.tanh(x @ a["kernel"] + a["bias"]) @ b["kernel"] + b["bias"]) @ c["kernel"] + c["bias"]
    np.testing.assert_allclose(
        mlp.forward(config, params, jnp.asarray(x, jnp.float32)), want, rtol=1e-5, atol=1e-6
    )


# ---- OPT


def test_init_gives_the_declared_shapes():
    for config in (SMALL_OPT, POST_NORM_OPT):
        made = jax.eval_shape(lambda key, c=config: opt.init(c, key), jax.random.key(0))
        assert made == opt.parameter_shapes(config)


def test_opt_350m_is_projected_and_has_no_last_norm():
    small, odd = models.get("opt-125m").args[0], models.get("opt-350m").args[0]
    assert "norm" in small and "project_in" not in small and "norm" not in odd
    assert odd["embedding"].shape == (50272, 512) and odd["position"].shape == (2050, 1024)
    assert odd["project_in"].shape == (1024, 512) and odd["project_out"].shape == (512, 1024)


def test_decode_step_by_name():
    step = models.get_decode("opt-tiny", batch=2, length=16)
    inputs = step.make_batch(jax.random.key(1))
    assert shapes_of(inputs) == step.args[1]
    logits, cache = jax.eval_shape(step.step, *step.args)
    assert logits.shape == (2, 256) and cache[0].key.shape == (3, 4, 16, 16)
    assert cache == step.args[1].cache


# ---- what planning relies on


@pytest.mark.parametrize(
    "name", ["gpt-tiny", "moe-tiny", "wresnet-tiny", "opt-tiny", "bert-tiny", "vit-tiny", "llama-tiny"]
)
@pytest.mark.parametrize("way", ["jvp(", "transpose(jvp("])
def test_blocks_are_named_forward_and_backward(name, way):
    step = models.get(name, training=True)
    jaxpr = jax.make_jaxpr(step.step)(*step.args).jaxpr
    stacks = {str(e.source_info.name_stack) for e in equations(jaxpr)}
    blocks = {s for stack in stacks if stack.startswith(way) for s in re.findall(r"Block_\d+", stack)}
    assert blocks == {f"Block_{i}" for i in range(4)}


def test_embedding_head_and_optimizer_lie_outside_of_blocks():
    step = models.get("gpt-tiny")
    jaxpr = jax.make_jaxpr(step.step)(*step.args).jaxpr
    dots = [str(e.source_info.name_stack) for e in equations(jaxpr) if str(e.primitive) == "dot_general"]
    outside = [stack for stack in dots if not stack.startswith("Block") and "/Block" not in stack]
    assert len(outside) == 3 and all("embedding.attend" in stack for stack in outside)
    roots = [str(e.source_info.name_stack) for e in equations(jaxpr) if str(e.primitive) == "sqrt"]
    assert roots and all("Block_" not in stack for stack in roots)


def test_perceptron_has_no_names():
    step = models.get("mlp")
    jaxpr = jax.make_jaxpr(step.step)(*step.args).jaxpr
    stacks = {str(e.source_info.name_stack) for e in equations(jaxpr)}
    assert stacks <= {"", "jvp()", "transpose(jvp())"}


@functools.cache
def unrolled_gradient():
    config = dataclasses.replace(SMALL_GPT, layers=2)
    params = randomised(jax.eval_shape(lambda key: gpt.init(config, key), jax.random.key(0)))
    batch = a_batch("gpt", config)
    return config, params, batch, *quick_jit(jax.value_and_grad(lambda p: gpt.loss(config, p, batch)))(params)


@pytest.mark.parametrize("scan, remat", [(True, False), (True, True), (False, True)])
def test_scan_and_remat_change_nothing(scan, remat):
    config, params, batch, loss, gradient = unrolled_gradient()
    config = dataclasses.replace(config, scan_layers=scan, remat=remat)
    if scan:
        params, gradient = gpt.stack_blocks(params), gpt.stack_blocks(gradient)
    assert shapes_of(params) == jax.eval_shape(lambda key: gpt.init(config, key), jax.random.key(0))
    have = quick_jit(jax.value_and_grad(lambda p: gpt.loss(config, p, batch)))(params)
    assert float(loss) == pytest.approx(float(have[0]), rel=1e-6)
    close(gradient, have[1])


def test_remat_keeps_the_names():
    step = models.get("gpt-tiny", layers=2, remat=True)
    stacks = {str(e.source_info.name_stack) for e in equations(jax.make_jaxpr(step.step)(*step.args).jaxpr)}
    assert {"rematted_computation/Block_0/attention", "rematted_computation/Block_1/attention"} <= stacks


def test_dropout_is_a_function_of_the_state():
    step = models.get("gpt-tiny", layers=1, dropout=0.5)
    state, batch = step.init(jax.random.key(0)), step.make_batch(jax.random.key(1))
    run = quick_jit(lambda state, batch: step.step(state, batch)[1])
    loss, again, other = run(state, batch), run(state, batch), run(state._replace(step=jnp.int32(5)), batch)
    assert float(loss) == float(again) != float(other)
    assert models.get("gpt-tiny").args[0].dropout is None


def close(a, b, scale=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=scale * max(1.0, float(jnp.max(jnp.abs(y)))))


FAMILIES = {
    "gpt": (gpt, dataclasses.replace(SMALL_GPT, layers=1)),
    "moe": (moe, moe.MoEConfig(31, 12, layers=2, hidden=16, heads=2, balance_weight=0.5)),
    "wide_resnet": (wide_resnet, wide_resnet.WideResNetConfig((1,), 32, 2, 31, 16)),
    "opt": (opt, dataclasses.replace(SMALL_OPT, layers=1)),
    "mlp": (mlp, mlp.MLPConfig()),
    "bert": (bert, bert.BERTConfig(vocabulary=31, positions=12, layers=1, hidden=16, heads=2, mask_token=3)),
    "vit": (vit, vit.ViTConfig(image=8, patch=4, classes=5, layers=1, hidden=16, heads=2)),
    "unet": (unet, unet.UNetConfig(image=8, channels=16, norm=functools.partial(layers.group_norm, 8))),
}


MADE = {"bert": families.BERT, "vit": families.VIT, "unet": families.UNET}


def halves_gap(family, config, batch):
    """Largest relative difference between the full batch's gradient and the mean of its halves' gradients."""
    params = randomised(jax.eval_shape(lambda key: family.init(config, key), jax.random.key(0)))
    params = jax.tree.map(lambda x: 0.3 * x, params)
    gradient = quick_jit(jax.grad(lambda p, b: family.loss(config, p, b)))
    # Each half is taken twice, so that one compiled shape serves all; mean and statistics stay the same.
    halves = [
        jax.tree.map(lambda x, h=h: jnp.tile(jnp.split(x, 2)[h], [2] + [1] * (x.ndim - 1)), batch)
        for h in (0, 1)
    ]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *(gradient(params, half) for half in halves))
    full = gradient(params, batch)
    biggest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(full))
    return max(
        float(jnp.max(jnp.abs(x - y))) / biggest for x, y in zip(jax.tree.leaves(full), jax.tree.leaves(mean))
    )


def a_batch(kind, config):
    if kind == "mlp":
        return models.get("mlp", batch=4).make_batch(jax.random.key(1))
    if kind == "wide_resnet":
        images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
        return {"images": images, "labels": jnp.arange(4)}
    if kind in MADE:
        return MADE[kind].make_batch(config, jax.random.key(1), batch=4, sequence=8)
    return {"tokens": some_tokens((4, 8)), "targets": some_tokens((4, 8), seed=1)}


@pytest.mark.parametrize("kind", FAMILIES)
def test_micro_batches_equal_the_full_batch(kind):
    family, config = FAMILIES[kind]
    assert halves_gap(family, config, a_batch(kind, config)) < 1e-5


def test_batch_norm_mixes_examples():
    config = dataclasses.replace(FAMILIES["wide_resnet"][1], norm=wide_resnet.batch_norm)
    assert halves_gap(wide_resnet, config, a_batch("wide_resnet", config)) > 1e-2


# ---- mixture of experts


def np_route(logits, experts_per_token, capacity):
    """GShard's routing, token by token."""
    groups, tokens, experts = logits.shape
    combine = np.zeros((groups, tokens, experts, capacity))
    for g in range(groups):
        gates = np.exp(logits[g]) / np.exp(logits[g]).sum(-1, keepdims=True)
        order = np.argsort(-gates, axis=-1)[:, :experts_per_token]
        seated = np.zeros(experts, int)
        for choice in range(experts_per_token):
            for t in range(tokens):
                expert = order[t, choice]
                total = gates[t, order[t]].sum() if experts_per_token == 2 else 1.0
                if seated[expert] < capacity:
                    combine[g, t, expert, seated[expert]] = gates[t, expert] / total
                seated[expert] += 1
    return combine


@pytest.mark.parametrize("experts_per_token", [1, 2])
@pytest.mark.parametrize("capacity", [1, 3, 40])
def test_routing_equals_token_by_token(experts_per_token, capacity):
    logits = np.random.default_rng(capacity).normal(size=(3, 17, 5))
    have = moe.route(jnp.asarray(logits, jnp.float32), experts_per_token, capacity)
    np.testing.assert_allclose(have.combine, np_route(logits, experts_per_token, capacity), atol=1e-6)


def test_balance_is_one_when_even_and_more_when_not():
    even = 50.0 * jnp.eye(4)[None].repeat(3, 0)
    assert np.allclose(moe.route(even, 2, 4).balance, 1.0)
    crowded = even.at[:, :, 0].set(100.0)
    assert np.allclose(moe.route(crowded, 2, 4).balance, 4.0)


def test_experts_equal_calling_them_one_by_one():
    config = moe.MoEConfig(hidden=8, heads=2, experts=3, expansion=2, capacity_factor=3.0)
    layer = moe.Experts(config)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 8)), jnp.float32)
    params = randomised(jax.eval_shape(layer.init, jax.random.key(0), x)["params"])
    y, _ = quick_jit(layer.apply)({"params": params}, x)
    x, params = np.asarray(x), as_float64(params)
    for b in range(2):
        for t in range(6):
            gates = np_softmax(x[b, t] @ params["router"]["kernel"])
            best = np.argsort(-gates)[:2]
            answers = [np_gelu(x[b, t] @ params["up"][e]) @ params["down"][e] for e in best]
            want = sum(g * a for g, a in zip(gates[best] / gates[best].sum(), answers))
            np.testing.assert_allclose(y[b, t], want, rtol=1e-4, atol=1e-4)


def test_groups_stay_within_an_example():
    x = jnp.arange(2 * 6 * 1.0).reshape(2, 6, 1)
    assert moe.split_groups(x, 8).shape == (2, 6, 1)
    assert moe.split_groups(x, 3)[..., 0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    with pytest.raises(BadInput, match="multiple of the routing group"):
        moe.split_groups(x, 4)


# ---- other options


def test_a_later_token_changes_no_earlier_logit():
    tokens = some_tokens((1, 8))
    changed = tokens.at[0, 5].set((tokens[0, 5] + 1) % 31)
    for forward, config, init in [(gpt.forward, SMALL_GPT, gpt.init), (opt.forward, SMALL_OPT, opt.init)]:
        params = randomised(jax.eval_shape(lambda key, i=init, c=config: i(c, key), jax.random.key(0)))
        run = jitted(forward, config)
        a, b = run(params, tokens), run(params, changed)
        np.testing.assert_array_equal(a[:, :5], b[:, :5])
        assert float(jnp.max(jnp.abs(a[:, 5:] - b[:, 5:]))) > 1e-3


@pytest.mark.parametrize(
    "forward, config, init", [(gpt.forward, SMALL_GPT, gpt.init), (opt.forward, SMALL_OPT, opt.init)]
)
def test_too_long_a_sequence_is_refused(forward, config, init):
    with pytest.raises(BadInput, match="12 positions"):
        params = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
        jax.eval_shape(lambda p: forward(config, p, some_tokens((1, 13))), params)
