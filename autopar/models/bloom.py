"""BLOOM (BigScience 2022): no position table but ALiBi, a norm after the embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from autopar.models import decoder
from autopar.models.decoder import (
    Mix,
    Params,
    block_shapes,
    layer_norm,
    linear,
    norm_shapes,
    product,
    take,
)
from autopar.models.int8 import int8_shapes
from autopar.models.paged import LayerCache, alibi_slopes

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


@dataclass(frozen=True)
class BloomConfig:
    """Returns the description of a BLOOM.

    Args:
        layers, hidden, heads: depth, width, heads.
        vocabulary: 250880 in all published sizes.
        positions: the longest sequence; ALiBi sets no limit, 2048 is what BLOOM was trained on.
        epsilon: of the norms.
        dtype, param_dtype: of activations, and of parameters as kept.
        int8: kernels of the blocks (and an untied head) are kept in int8, as in `int8.py`.
    Raises:
        BadInput: when `heads` does not divide `hidden`.
    """

    layers: int
    hidden: int
    heads: int
    vocabulary: int = 250880
    positions: int = 2048
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    int8: bool = False

    def __post_init__(self) -> None:
        decoder.check_heads(self.hidden, self.heads)

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def kv_heads(self) -> int:
        return self.heads


Config = BloomConfig


def parameter_shapes(config: BloomConfig) -> Params:
    """Returns the parameters as `jax.ShapeDtypeStruct`s; tied embeddings, so the head has none of its own."""
    hidden, inner, kind = config.hidden, 4 * config.hidden, config.param_dtype
    params: Params = {
        f"Block_{i}": block_shapes(hidden, config.heads, inner, kind) for i in range(config.layers)
    }
    params |= {
        "embedding": jax.ShapeDtypeStruct((config.vocabulary, hidden), kind),
        "norm_embedding": norm_shapes(hidden, kind),
        "norm": norm_shapes(hidden, kind),
    }
    return int8_shapes(params) if config.int8 else params


def _embed(config: BloomConfig, params: Params, tokens: Array, positions: Array) -> Array:
    x = take(params["embedding"], tokens, config.dtype)
    return layer_norm(params["norm_embedding"], x, config.epsilon)


def _head(config: BloomConfig, params: Params, x: Array) -> Array:
    return product(params["embedding"], layer_norm(params["norm"], x, config.epsilon))


def _block(
    config: BloomConfig, params: Params, x: Array, positions: Array, mix: Mix
) -> tuple[Array, LayerCache | None]:
    y = layer_norm(params["norm_attention"], x, config.epsilon)
    query = linear(params["query"], mix.asked(y)) * config.head_size**-0.5
    mixed, cache = mix(
        query, linear(params["key"], y), linear(params["value"], y), alibi_slopes(config.heads)
    )
    x = mix.asked(x) + linear(params["out"], mixed, inputs=2)
    y = layer_norm(params["norm_feed_forward"], x, config.epsilon)
    return x + linear(params["down"], jax.nn.gelu(linear(params["up"], y), approximate=True)), cache


DECODER = decoder.Decoder(parameter_shapes, _embed, _block, _head)
init, forward, step, loss = DECODER.init, DECODER.forward, DECODER.step, DECODER.loss
