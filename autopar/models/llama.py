"""Llama (Touvron et al. 2023) and what is built like it: SmolLM2, TinyLlama, Mistral, Qwen2.

Rotary positions, grouped keys and values (Ainslie et al. 2023), RMS norms, a gated feed-forward (SwiGLU,
Shazeer 2020), no biases unless said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from autopar.core.errors import BadInput
from autopar.models import decoder
from autopar.models.decoder import Mix, Params, linear, product, rms_norm, take
from autopar.models.int8 import int8_shapes
from autopar.models.paged import LayerCache
from autopar.models.rope import Rope, rotate

__all__ = [
    "DECODER",
    "Config",
    "forward",
    "init",
    "loss",
    "parameter_shapes",
    "step",
]

Array = jax.Array
PLAIN = Rope()


@dataclass(frozen=True)
class LlamaConfig:
    """Returns the description of a Llama-like model.

    Args:
        layers, hidden, heads: depth, width, heads of the queries.
        kv_heads: heads of keys and values; must divide `heads`.
        inner: width of the feed-forward.
        head_size: None for hidden / heads.
        vocabulary, positions: ids, and the longest sequence.
        epsilon: of the norms.
        rope: base and stretching of the rotary embedding.
        tied: the head uses the embedding's table.
        qkv_bias, out_bias, feed_forward_bias: where products have a bias (Qwen2: the first).
        dtype, param_dtype: of activations, and of parameters as kept.
        int8: kernels of the blocks (and an untied head) are kept in int8, as in `int8.py`.
        scan_layers: one `lax.scan` over stacked parameters instead of `layers` blocks; for training only.
    Raises:
        BadInput: when head counts do not divide.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    head_size: int = 0
    vocabulary: int = 32000
    positions: int = 2048
    epsilon: float = 1e-5
    rope: Rope = PLAIN
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    feed_forward_bias: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    int8: bool = False
    scan_layers: bool = False

    def __post_init__(self) -> None:
        if not self.head_size:
            decoder.check_heads(self.hidden, self.heads)
            object.__setattr__(self, "head_size", self.hidden // self.heads)
        if self.heads % self.kv_heads:
            raise BadInput(f"kv_heads={self.kv_heads} must divide heads={self.heads}; choose another of them")


Config = LlamaConfig


def parameter_shapes(config: LlamaConfig) -> Params:
    """Returns the parameters as `jax.ShapeDtypeStruct`s; kernels are `[out, in]`, heads and size apart."""
    hidden, heads, kv_heads, size = config.hidden, config.heads, config.kv_heads, config.head_size

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, config.param_dtype)

    def affine(*kernel: int, out: int, bias: bool) -> Params:
        made = {"kernel": leaf(*kernel)}
        return made | {"bias": leaf(*kernel[:out])} if bias else made

    def block() -> Params:
        qkv, rest = config.qkv_bias, config.feed_forward_bias
        return {
            "norm_attention": {"scale": leaf(hidden)},
            "query": affine(heads, size, hidden, out=2, bias=qkv),
            "key": affine(kv_heads, size, hidden, out=2, bias=qkv),
            "value": affine(kv_heads, size, hidden, out=2, bias=qkv),
            "out": affine(hidden, heads, size, out=1, bias=config.out_bias),
            "norm_feed_forward": {"scale": leaf(hidden)},
            "gate": affine(config.inner, hidden, out=1, bias=rest),
            "up": affine(config.inner, hidden, out=1, bias=rest),
            "down": affine(hidden, config.inner, out=1, bias=rest),
        }

    params: Params = {f"Block_{i}": block() for i in range(config.layers)}
    params["embedding"] = leaf(config.vocabulary, hidden)
    params["norm"] = {"scale": leaf(hidden)}
    if not config.tied:
        params["head"] = leaf(config.vocabulary, hidden)
    params = int8_shapes(params) if config.int8 else params
    return decoder.stacked(params, config.layers) if config.scan_layers else params


def _embed(config: LlamaConfig, params: Params, tokens: Array, positions: Array) -> Array:
    return take(params["embedding"], tokens, config.dtype)


def _head(config: LlamaConfig, params: Params, x: Array) -> Array:
    x = rms_norm(params["norm"], x, config.epsilon)
    return product(params["embedding" if config.tied else "head"], x)


def _block(
    config: LlamaConfig, params: Params, x: Array, positions: Array, mix: Mix
) -> tuple[Array, LayerCache | None]:
    y = rms_norm(params["norm_attention"], x, config.epsilon)
    query = rotate(config.rope, linear(params["query"], mix.asked(y)), mix.asked(positions))
    query = query * config.head_size**-0.5
    key = rotate(config.rope, linear(params["key"], y), positions)
    mixed, cache = mix(query, key, linear(params["value"], y))
    x = mix.asked(x) + linear(params["out"], mixed, inputs=2)
    y = rms_norm(params["norm_feed_forward"], x, config.epsilon)
    gated = jax.nn.silu(linear(params["gate"], y)) * linear(params["up"], y)
    return x + linear(params["down"], gated), cache


DECODER = decoder.Decoder(parameter_shapes, _embed, _block, _head)
init, forward, step, loss = DECODER.init, DECODER.forward, DECODER.step, DECODER.loss
