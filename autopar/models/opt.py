"""OPT, the open pre-trained decoder (Zhang et al. 2022)."""

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

POSITION_OFFSET = 2
"""OPT's position table has two unused rows in front, inherited from a padding convention."""


@dataclass(frozen=True)
class OPTConfig:
    """Returns the description of an OPT.

    Args:
        layers, hidden, heads: as in `GPTConfig`.
        embedding: width of the embedding; when it is not `hidden`, projections lie between them (350m).
        post_norm: norms after each residual sum and none before the head (350m), else before each half.
        vocabulary, positions: 50272 and 2048 in all published sizes.
        inner: width of the feed-forward; None for 4 · hidden.
        dtype: dtype of activations and products.
        param_dtype: dtype in which parameters are kept.
        int8: kernels of the blocks are kept in int8, as in `int8.py`.
    Raises:
        BadInput: when `heads` does not divide `hidden`.
    """

    layers: int
    hidden: int
    heads: int
    embedding: int | None = None
    post_norm: bool = False
    vocabulary: int = 50272
    positions: int = 2048
    inner: int | None = None
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

    @property
    def projected(self) -> bool:
        return self.embedding is not None and self.embedding != self.hidden


Config = OPTConfig


def parameter_shapes(config: OPTConfig) -> Params:
    """Returns the parameters as `jax.ShapeDtypeStruct`s; tied embeddings, so the head has none of its own."""
    hidden, kind = config.hidden, config.param_dtype
    width, inner = config.embedding or hidden, config.inner or 4 * hidden

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind)

    params: Params = {
        f"Block_{i}": block_shapes(hidden, config.heads, inner, kind) for i in range(config.layers)
    }
    params["embedding"] = leaf(config.vocabulary, width)
    params["position"] = leaf(config.positions + POSITION_OFFSET, hidden)
    if config.projected:
        params |= {"project_in": leaf(hidden, width), "project_out": leaf(width, hidden)}
    if not config.post_norm:
        params["norm"] = norm_shapes(hidden, kind)
    return int8_shapes(params) if config.int8 else params


def _embed(config: OPTConfig, params: Params, tokens: Array, positions: Array) -> Array:
    x = take(params["embedding"], tokens, config.dtype)
    if config.projected:
        x = product(params["project_in"], x)
    return x + take(params["position"], positions + POSITION_OFFSET, config.dtype)


def _head(config: OPTConfig, params: Params, x: Array) -> Array:
    if not config.post_norm:
        x = layer_norm(params["norm"], x)
    if config.projected:
        x = product(params["project_out"], x)
    return product(params["embedding"], x)


def _block(
    config: OPTConfig, params: Params, x: Array, positions: Array, mix: Mix
) -> tuple[Array, LayerCache | None]:
    y = x if config.post_norm else layer_norm(params["norm_attention"], x)
    query = linear(params["query"], mix.asked(y)) * config.head_size**-0.5
    mixed, cache = mix(query, linear(params["key"], y), linear(params["value"], y))
    x = mix.asked(x) + linear(params["out"], mixed, inputs=2)
    if config.post_norm:
        x = layer_norm(params["norm_attention"], x)
    y = x if config.post_norm else layer_norm(params["norm_feed_forward"], x)
    x = x + linear(params["down"], jax.nn.relu(linear(params["up"], y)))
    if config.post_norm:
        x = layer_norm(params["norm_feed_forward"], x)
    return x, cache


DECODER = decoder.Decoder(parameter_shapes, _embed, _block, _head)
init, forward, step, loss = DECODER.init, DECODER.forward, DECODER.step, DECODER.loss
