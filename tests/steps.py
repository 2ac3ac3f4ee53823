"""What the end-to-end tests share: tiny models as users write them, emulated clusters, and the comparison.

Optimizer: SGD with momentum after clipping by the global norm. Adam would turn a gradient that is truly
zero (the key bias of attention, which softmax does not see) into an update of order one, made of rounding.
The perceptron has no such gradient; it is tested with AdamW too.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import autopar as ap
from autopar import cluster
from autopar.models import bert, families, gpt, layers, llama, mlp, moe, unet, vit, wide_resnet
from autopar.models.step import adamw, init_state, train_step

BATCH, STEPS = 8, 3
OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9))


Result = tuple[list[float], Any]
"""Losses, and the last state."""


@dataclass(frozen=True)
class Case:
    """A train step `(state, batch) → (state, loss)`, its first state and its batches."""

    step: Callable[..., Any]
    state: Any
    batches: tuple[Any, ...]


# -- models

TEXT: Any = {"vocabulary": 32, "positions": 8, "hidden": 16, "heads": 2}
LAYERS = 3
PLAIN = gpt.GPTConfig(layers=LAYERS, **TEXT)
CONFIGS = {
    "gpt": (families.GPT, replace(PLAIN, dropout=0.1)),
    "gpt scan": (families.GPT, replace(PLAIN, scan_layers=True)),
    "gpt scan dropout": (families.GPT, replace(PLAIN, scan_layers=True, dropout=0.1)),
    "moe": (families.MOE, moe.MoEConfig(layers=LAYERS, experts=4, expansion=2, balance_weight=0.01, **TEXT)),
    "wresnet": (
        families.WIDE_RESNET,
        wide_resnet.WideResNetConfig(
            blocks=(1, 1, 1),
            channels=8,
            classes=8,
            image=8,
            norm=functools.partial(layers.group_norm, 4),
        ),
    ),
    "bert": (families.BERT, bert.BERTConfig(layers=2, mask_token=3, dropout=0.1, **TEXT)),
    "vit": (families.VIT, vit.ViTConfig(image=8, patch=4, classes=8, layers=2, hidden=16, heads=2)),
    "unet": (
        families.UNET,
        unet.UNetConfig(
            image=8,
            channels=8,
            attention=(4,),
            norm=functools.partial(layers.group_norm, 4),
        ),
    ),
    "llama": (families.LLAMA, llama.Config(LAYERS, 16, 4, 2, 32, vocabulary=32, positions=8)),
    "llama scan": (
        families.LLAMA,
        llama.Config(LAYERS, 16, 4, 2, 32, vocabulary=32, positions=8, scan_layers=True),
    ),
    "mlp": (families.MLP, mlp.MLPConfig(inputs=16, hidden=32, outputs=8, layers=3)),
    "mlp adamw": (families.MLP, mlp.MLPConfig(inputs=16, hidden=32, outputs=8, layers=3)),
}


@functools.cache
def case(name: str) -> Case:
    """Returns a model's train step; "… jax.grad" is differentiated by JAX, all others by autopar."""
    if name == "gpt anonymous":
        return _case(_anonymous_loss, _anonymous_init, functools.partial(_batch, families.GPT, PLAIN))
    base = name.removesuffix(" jax.grad")
    family, config = CONFIGS[base]
    return _case(
        functools.partial(family.loss, config),
        functools.partial(family.init, config),
        functools.partial(_batch, family, config),
        jax.value_and_grad if base != name else ap.value_and_grad,
        getattr(config, "dropout", 0) > 0,
        adamw() if name.endswith("adamw") else OPTIMIZER,
    )


def _case(
    loss: Any,
    init: Any,
    batch: Any,
    value_and_grad: Any = ap.value_and_grad,
    dropout: bool = False,
    optimizer: optax.GradientTransformation = OPTIMIZER,
) -> Case:
    step = train_step(loss, optimizer, value_and_grad)
    shapes = jax.eval_shape(init, jax.random.key(0))
    state = init_state(lambda key: _random(shapes), optimizer, jax.random.key(0), dropout)
    return Case(step, state, tuple(batch(jax.random.key(i)) for i in range(STEPS)))


def _random(shapes: Any) -> Any:
    """Returns parameters of these shapes: products keep the scale, and no bias is zero, no scale one."""
    rng = np.random.default_rng(0)

    def leaf(path: Any, x: Any) -> jax.Array:
        noise, name = jnp.asarray(rng.normal(size=x.shape), jnp.float32), str(path[-1])
        if "scale" in name:
            return 1 + noise / 10
        return noise * (0.1 if "bias" in name else max(x.shape[-2:]) ** -0.5)

    return jax.tree.map_with_path(leaf, shapes)


def _batch(family: families.Family, config: Any, key: jax.Array) -> Any:
    sequence = getattr(config, "positions", None)
    return jax.tree.map(np.asarray, family.make_batch(config, key, batch=BATCH, sequence=sequence))


# -- a GPT of plain functions: no module, no scope, nothing by which layers could be named


def _anonymous_init(key: jax.Array) -> Any:
    d = PLAIN.hidden
    shapes = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d), "scale": (2, d)}
    blocks = [{name: jnp.zeros(shape) for name, shape in shapes.items()} for _ in range(PLAIN.layers)]
    return {"embedding": jnp.zeros((PLAIN.vocabulary, d)), "blocks": blocks}


def _anonymous_loss(params: Any, batch: Any, key: None = None) -> jax.Array:
    x = params["embedding"][batch["tokens"]]
    for block in params["blocks"]:
        x = x + _attention(block, _normalised(x) * block["scale"][0])
        x = x + jax.nn.gelu((_normalised(x) * block["scale"][1]) @ block["up"]) @ block["down"]
    logits = jax.nn.log_softmax(_normalised(x) @ params["embedding"].T)
    return -jnp.mean(jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1))


def _normalised(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5)


def _attention(block: Any, x: jax.Array) -> jax.Array:
    b, t, d = x.shape
    q, k, v = ((x @ block["qkv"]).reshape(b, t, 3, PLAIN.heads, d // PLAIN.heads)[:, :, i] for i in range(3))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (d // PLAIN.heads) ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(b, t, d) @ block["out"]


# -- clusters


def slowed(found: cluster.Cluster, factor: float = 1e-4) -> cluster.Cluster:
    """Returns the cluster with devices so slow that sharding even these small models pays."""

    def slow(d: Any) -> Any:
        rates = tuple((name, rate * factor) for name, rate in d.flops)
        return replace(d, bandwidth=d.bandwidth * factor, flops=rates, link_latency=1e-9)

    nodes = tuple(replace(node, device=slow(node.device)) for node in found.nodes)
    return replace(found, nodes=nodes, latency=1e-9)


MIXED = slowed(cluster.load(str(Path(__file__).parents[1] / "examples" / "mixed.yaml")))
EIGHT = slowed(cluster.parse("8xV100-16GB"))


# -- the comparison


@functools.cache
def alone(name: str) -> Result:
    """Returns the losses and the last state of one device."""
    base = name.removesuffix(" jax.grad")
    return alone(base) if base != name else run(jax.jit(case(name).step), case(name))


def run(step: Any, of: Case) -> Result:
    """Returns the losses and the last state after all batches, on the host."""
    state, losses = of.state, []
    for batch in of.batches:
        state, loss = step(state, batch)
        losses.append(float(loss))
    return losses, jax.tree.map(np.asarray, state)


def errors(got: Any, want: Any) -> dict[str, float]:
    """Returns per leaf ‖got − want‖ / ‖want‖.

    A leaf whose entries are more than 1000 times smaller than those of its whole tree on average (the
    momentum of a gradient that is truly zero) holds rounding only; its error is relative to that average.
    """
    leaves, tree = jax.tree.flatten_with_path(want)
    assert tree == jax.tree.structure(got), "another structure"
    floats = [np.asarray(x, np.float64) for _, x in leaves if np.issubdtype(x.dtype, np.floating)]
    average = np.sqrt(sum((x**2).sum() for x in floats) / sum(x.size for x in floats))
    found = {}
    for (path, b), a in zip(leaves, jax.tree.leaves(got), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, jax.tree_util.keystr(path)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        norm, usual = np.linalg.norm(b), average * np.sqrt(b.size)
        scale = usual if norm < usual / 1000 else norm
        found[jax.tree_util.keystr(path)] = float(np.linalg.norm(a - b) / scale)
    return found


def assert_equal(
    got: tuple[list[float], Any], want: tuple[list[float], Any], tolerance: float = 1e-5
) -> None:
    """Raises AssertionError unless losses, parameters and optimizer state agree."""
    np.testing.assert_allclose(got[0], want[0], rtol=tolerance)
    for part in ("step", "params", "optimizer", "dropout"):
        mine, theirs = getattr(got[1], part), getattr(want[1], part)
        if theirs is None or not any(np.issubdtype(x.dtype, np.floating) for x in jax.tree.leaves(theirs)):
            jax.tree.map(np.testing.assert_array_equal, mine, theirs)
            continue
        off = errors(mine, theirs)
        worst = max(off, key=lambda path: off[path])
        assert off[worst] < tolerance, f"{part}{worst} is off by {off[worst]:.1e} relative"
