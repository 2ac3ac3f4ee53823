"""BERT, ViT, U-Net and scanned Llamas: published sizes, and the numbers of other implementations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autopar import models
from autopar.core.errors import BadInput
from autopar.models import bert, layers, llama, unet, vit

BERT = bert.BERTConfig(vocabulary=31, positions=12, layers=2, hidden=16, heads=2, mask_token=3)
VIT = vit.ViTConfig(image=8, patch=4, classes=5, layers=2, hidden=16, heads=2)
UNET = unet.UNetConfig(
    image=8, channels=8, multipliers=(1, 2), attention=(4,), norm=functools.partial(layers.group_norm, 4)
)
LLAMA = llama.Config(3, 16, 4, 2, 24, vocabulary=31, positions=12)
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def parameters(module, config):
    """Parameters of order one, biases and scales too, so that a missing piece shows."""
    shapes = jax.eval_shape(functools.partial(module.init, config), jax.random.key(0))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [jnp.asarray(rng.normal(0.2, 0.3, x.shape), x.dtype) for x in leaves])


def run(module, config, *inputs):
    return quick_jit(functools.partial(module.forward, config))(parameters(module, config), *inputs)


def normal(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(got, want, tolerance=1e-4):
    """Within a share of the largest entry."""
    want = np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


# ---- sizes

PUBLISHED = {
    "bert-base": 109_514_298,
    "bert-large": 335_174_458,
    "vit-b16": 86_567_656,
    "vit-l16": 304_326_632,
    "unet-ddpm-32": 35_746_307,
    "unet-ddpm-256": 113_673_219,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-70b": 68_976_648_192,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "smollm2-135m": 134_515_008,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_exactly_their_parameters(name):
    assert models.get(name).parameters == PUBLISHED[name]


def test_a_scanned_llama_has_as_many():
    assert models.get("llama-7b", scan_layers=True).parameters == PUBLISHED["llama-7b"]


# ---- BERT


def test_bert_sees_both_ways_and_knows_places_by_their_table_alone():
    params = parameters(bert, BERT)
    order = np.random.default_rng(0).permutation(9)
    tokens = np.arange(9)[None] + 4
    forward = quick_jit(functools.partial(bert.forward, BERT))
    flat = params | {"position": {"embedding": jnp.zeros((12, 16))}}
    close(forward(flat, tokens[:, order]), forward(flat, tokens)[:, order])
    changed = tokens.copy()
    changed[0, 7] = 30
    apart = np.abs(forward(params, changed) - forward(params, tokens)).max(-1)[0]
    assert (apart > 1e-4).all(), "a later token changes what is said of an earlier one"


def test_bert_is_judged_where_tokens_are_hidden():
    tokens = jnp.asarray(np.random.default_rng(0).integers(4, 31, (3, 12)), jnp.int32)
    hidden, where, targets = bert.hide(BERT, tokens, jax.random.key(0))
    assert where.shape == (3, 2) and (np.diff(where) > 0).all()
    rows = np.arange(3)[:, None]
    assert (hidden[rows, where] == BERT.mask_token).all() and (targets == tokens[rows, where]).all()
    assert int((hidden != tokens).sum()) == where.size
    batch = {"tokens": hidden, "segments": jnp.zeros_like(hidden), "where": where, "targets": targets}
    have = quick_jit(functools.partial(bert.loss, BERT))(parameters(bert, BERT), batch)
    logits = np.asarray(run(bert, BERT, hidden))[rows, where]
    assert float(have) == pytest.approx(float(layers.cross_entropy(jnp.asarray(logits), targets)), rel=1e-5)


def test_bert_equals_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=12,
        )
    ).eval()  # fmt: skip
    p = parameters(bert, BERT)
    top = "cls.predictions."
    weights = {
        "bert.embeddings.word_embeddings.weight": p["embedding"]["embedding"],
        top + "decoder.weight": p["embedding"]["embedding"],
        "bert.embeddings.position_embeddings.weight": p["position"]["embedding"],
        "bert.embeddings.token_type_embeddings.weight": p["segment"]["embedding"],
        **norm("bert.embeddings.LayerNorm", p["norm"]),
        **dense(top + "transform.dense", p["head"]),
        **norm(top + "transform.LayerNorm", p["norm_head"]),
        top + "bias": p["bias"],
        top + "decoder.bias": p["bias"],
    }
    for i in range(2):
        name, own = f"bert.encoder.layer.{i}.", p[f"Block_{i}"]
        weights |= block(name, own, "self")
        weights |= norm(name + "attention.output.LayerNorm", own["norm_attention"])
        weights |= norm(name + "output.LayerNorm", own["norm_feed_forward"])
    load(torch, model, weights)
    tokens = np.random.default_rng(0).integers(0, 31, (2, 9))
    segments = np.arange(9)[None] >= np.array([[4], [6]])
    with torch.no_grad():
        want = model(torch.tensor(tokens), token_type_ids=torch.tensor(segments).long()).logits
    close(run(bert, BERT, tokens, segments.astype(np.int32)), want)


def load(torch, model, weights):
    state = {name: torch.tensor(np.asarray(x)) for name, x in weights.items()}
    missing, unknown = model.load_state_dict(state, strict=False)
    assert not unknown and all("position_ids" in name for name in missing), (missing, unknown)


def norm(name, p):
    return {f"{name}.weight": p["scale"], f"{name}.bias": p["bias"]}


def dense(name, p, outputs=1):
    """A kernel `[in…, out…]` as `[out, in]`."""
    size = int(np.prod(p["kernel"].shape[-outputs:]))
    return {f"{name}.weight": p["kernel"].reshape(-1, size).T, f"{name}.bias": p["bias"].reshape(size)}


def block(name, p, inner):
    """A block's products; `inner`: what its attention's module is called."""
    found = dense(f"{name}attention.output.dense", p["attention"]["out"])
    for part in ("query", "key", "value"):
        found |= dense(f"{name}attention.{inner}.{part}", p["attention"][part], outputs=2)
    found |= dense(f"{name}intermediate.dense", p["feed_forward"]["up"])
    return found | dense(f"{name}output.dense", p["feed_forward"]["down"])


# ---- ViT


def test_vit_knows_places_by_their_table_alone():
    params, images = parameters(vit, VIT), normal(2, 8, 8, 3)
    forward = quick_jit(functools.partial(vit.forward, VIT))
    flat = params | {"position": jnp.zeros((5, 16))}
    turned = np.concatenate([images[:, 4:], images[:, :4]], axis=1)  # upper and lower patches change places
    close(forward(flat, turned), forward(flat, images))
    assert np.abs(forward(params, turned) - forward(params, images)).max() > 1e-3


def test_vit_equals_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=8,
            patch_size=4, num_labels=5, layer_norm_eps=1e-6,
        )
    ).eval()  # fmt: skip
    p = parameters(vit, VIT)
    weights = {
        "vit.embeddings.cls_token": p["class"][None, None],
        "vit.embeddings.position_embeddings": p["position"][None],
        "vit.embeddings.patch_embeddings.projection.weight": p["patches"]["kernel"].transpose(3, 2, 0, 1),
        "vit.embeddings.patch_embeddings.projection.bias": p["patches"]["bias"],
        **norm("vit.layernorm", p["norm"]),
        **dense("classifier", p["head"]),
    }
    for i in range(2):
        name, own = f"vit.encoder.layer.{i}.", p[f"Block_{i}"]
        weights |= block(name, own, "attention")
        weights |= norm(name + "layernorm_before", own["norm_attention"])
        weights |= norm(name + "layernorm_after", own["norm_feed_forward"])
    load(torch, model, weights)
    images = normal(2, 8, 8, 3)
    with torch.no_grad():
        want = model(torch.tensor(images.transpose(0, 3, 1, 2))).logits
    close(run(vit, VIT, images), want)


# ---- U-Net


def test_noise_is_added_as_the_schedule_says():
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    images, noise, times = normal(3, 2, 2, 3), normal(3, 2, 2, 3, seed=2), np.array([0, 500, 999])
    a = np.sqrt(kept[times])[:, None, None, None]
    close(unet.diffuse(UNET, images, noise, jnp.asarray(times)), a * images + np.sqrt(1 - a**2) * noise, 1e-5)


def test_a_fresh_unet_says_there_is_no_noise():
    params = unet.init(UNET, jax.random.key(0))
    inputs = {"images": normal(2, 8, 8, 3), "times": jnp.asarray([3, 999])}
    batch = {"inputs": inputs, "noise": normal(2, 8, 8, 3, seed=2)}
    have = quick_jit(functools.partial(unet.loss, UNET))(params, batch)
    assert float(have) == pytest.approx(float((batch["noise"] ** 2).mean()), rel=1e-6)


def test_an_image_that_cannot_be_halved_is_refused():
    with pytest.raises(BadInput, match="multiple of 4"):
        unet.UNetConfig(image=10, multipliers=(1, 2, 2))


def test_unet_equals_torch():
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    p = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), parameters(unet, UNET))

    def conv(p, x, **more):
        return F.conv2d(x, p["kernel"].permute(3, 2, 0, 1), p["bias"], **more)

    def linear(p, x):
        return x @ p["kernel"] + p["bias"]

    def norm(p, x):
        return F.group_norm(x, 4, p["scale"], p["bias"])

    def attend(p, x):
        y = norm(p["norm"], x).flatten(2).transpose(1, 2)
        q, k, v = (linear(p[name], y) for name in ("query", "key", "value"))
        y = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1) @ v
        return x + linear(p["out"], y).transpose(1, 2).reshape(x.shape)

    def block(p, x, time):
        y = conv(p["in"], F.silu(norm(p["norm_in"], x)), padding=1)
        y = y + linear(p["time"], F.silu(time))[:, :, None, None]
        y = conv(p["out"], F.silu(norm(p["norm_out"], y)), padding=1)
        y = y + (conv(p["shortcut"], x) if "shortcut" in p else x)
        return attend(p["attention"], y) if "attention" in p else y

    def forward(images, times):
        speeds = torch.exp(-np.log(10000.0) * torch.arange(4) / 3)
        angles = times[:, None] * speeds
        time = linear(p["time"]["up"], torch.cat([angles.sin(), angles.cos()], 1))
        time = linear(p["time"]["out"], F.silu(time))
        stem = conv(p["stem"], images, padding=1)
        fine = block(p["Block_0"], stem, time)
        down = conv(p["down_1"], F.pad(fine, (0, 1, 0, 1)), stride=2)
        coarse = block(p["Block_1"], down, time)
        x = block(p["Block_3"], block(p["Block_2"], coarse, time), time)
        x = block(p["Block_4"], torch.cat([x, coarse], 1), time)
        x = block(p["Block_5"], torch.cat([x, down], 1), time)
        x = conv(p["up_1"], F.interpolate(x, scale_factor=2, mode="nearest"), padding=1)
        x = block(p["Block_6"], torch.cat([x, fine], 1), time)
        x = block(p["Block_7"], torch.cat([x, stem], 1), time)
        return conv(p["head"], F.silu(norm(p["norm"], x)), padding=1).permute(0, 2, 3, 1)

    images, times = normal(2, 8, 8, 3), np.array([7, 900])
    want = forward(torch.tensor(images.transpose(0, 3, 1, 2)), torch.tensor(times).float())
    close(run(unet, UNET, {"images": images, "times": times}), want)


# ---- Llama


def test_a_scanned_llama_trains_as_the_unrolled_one():
    scanned, params = dataclasses.replace(LLAMA, scan_layers=True), parameters(llama, LLAMA)
    blocks = [params[f"Block_{i}"] for i in range(3)]
    stack = {name: x for name, x in params.items() if not name.startswith("Block_")}
    stack["Blocks"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    assert jax.tree.map(lambda x: x.shape, stack) == jax.tree.map(
        lambda x: x.shape, llama.parameter_shapes(scanned)
    )
    tokens = np.random.default_rng(0).integers(0, 31, (2, 10)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    want, gradient = quick_jit(jax.value_and_grad(lambda p: llama.loss(LLAMA, p, batch)))(params)
    have, stacked = quick_jit(jax.value_and_grad(lambda p: llama.loss(scanned, p, batch)))(stack)
    assert float(have) == pytest.approx(float(want), rel=1e-6)
    for i in range(3):
        jax.tree.map(close, jax.tree.map(lambda x, i=i: x[i], stacked["Blocks"]), gradient[f"Block_{i}"])


def test_a_scanned_llama_is_not_served():
    config = dataclasses.replace(LLAMA, scan_layers=True)
    with pytest.raises(BadInput, match="scan_layers=False"):
        llama.step(config, llama.parameter_shapes(config), (), *[np.zeros(1, np.int32)] * 4)
