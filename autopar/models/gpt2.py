"""GPT-2 (Radford et al. 2019) as published, to be served; `gpt.py` is the one that is trained."""

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
from autopar.models.paged import LayerCache

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
class GPT2Config:
    """Returns the description of a GPT-2.

    Args:
        layers, hidden, heads: depth, width, heads.
        inner: width of the feed-forward; None for 4 · hidden.
        vocabulary, positions: 50257 and 1024 in all published sizes.
        epsilon: of the norms.
        dtype, param_dtype: of activations, and of parameters as kept.
        int8: kernels of the blocks (and an untied head) are kept in int8, as in `int8.py`.
    Raises:
        BadInput: when `heads` does not divide `hidden`.
    """

    layers: int
    hidden: int
    heads: int
    inner: int | None = None
    vocabulary: int = 50257
    positions: int = 1024
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


Config = GPT2Config


def parameter_shapes(config: GPT2Config) -> Params:
    """Returns the parameters as `jax.ShapeDtypeStruct`s; tied embeddings, so the head has none of its own."""
    hidden, kind = config.hidden, config.param_dtype
    inner = config.inner or 4 * hidden
    params: Params = {
        f"Block_{i}": block_shapes(hidden, config.heads, inner, kind) for i in range(config.layers)
    }
    params |= {
        "embedding": jax.ShapeDtypeStruct((config.vocabulary, hidden), kind),
        "position": jax.ShapeDtypeStruct((config.positions, hidden), kind),
        "norm": norm_shapes(hidden, kind),
    }
    return int8_shapes(params) if config.int8 else params


def _embed(config: GPT2Config, params: Params, tokens: Array, positions: Array) -> Array:
    return take(params["embedding"], tokens, config.dtype) + take(params["position"], positions, config.dtype)


def _head(config: GPT2Config, params: Params, x: Array) -> Array:
    return product(params["embedding"], layer_norm(params["norm"], x, config.epsilon))


def _block(
    config: GPT2Config, params: Params, x: Array, positions: Array, mix: Mix
) -> tuple[Array, LayerCache | None]:
    y = layer_norm(params["norm_attention"], x, config.epsilon)
    query = linear(params["query"], mix.asked(y)) * config.head_size**-0.5
    mixed, cache = mix(query, linear(params["key"], y), linear(params["value"], y))
    x = mix.asked(x) + linear(params["out"], mixed, inputs=2)
    y = layer_norm(params["norm_feed_forward"], x, config.epsilon)
    return x + linear(params["down"], jax.nn.gelu(linear(params["up"], y), approximate=True)), cache


DECODER = decoder.Decoder(parameter_shapes, _embed, _block, _head)
init, forward, step, loss = DECODER.init, DECODER.forward, DECODER.step, DECODER.loss
