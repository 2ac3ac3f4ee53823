"""OPT, the open pre-trained decoder (Zhang et al. 2022), in plain functions over a dictionary of parameters.

Layers are unrolled, each with its own weights: a scan copies weight slices and the cache at every step. Keys
and values are cached as `[batch, heads, time, head_size]`, a pair per layer, passed in and out as a tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from autopar.core.errors import BadInput
from autopar.models.layers import cross_entropy

Array = jax.Array
Params = dict[str, Any]

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
        dtype: dtype of activations and products.
        param_dtype: dtype in which parameters are kept.
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
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise BadInput(f"heads={self.heads} must divide hidden={self.hidden}; choose another of the two")

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def projected(self) -> bool:
        return self.embedding is not None and self.embedding != self.hidden


class LayerCache(NamedTuple):
    """Keys and values of one layer, `[batch, heads, length, head_size]` each."""

    key: Array
    value: Array


Cache = tuple[LayerCache, ...]


def init(config: OPTConfig, key: Array) -> Params:
    """Returns random parameters (normal, standard deviation 0.02), named as in `parameter_shapes`."""
    shapes = parameter_shapes(config)
    leaves, tree = jax.tree.flatten_with_path(shapes)
    keys = jax.random.split(key, len(leaves))
    made = []
    for (path, leaf), leaf_key in zip(leaves, keys):
        name = path[-1].key
        if name in ("scale", "bias"):
            made.append(jnp.full(leaf.shape, float(name == "scale"), leaf.dtype))
        else:
            made.append(0.02 * jax.random.normal(leaf_key, leaf.shape, leaf.dtype))
    return jax.tree.unflatten(tree, made)


def parameter_shapes(config: OPTConfig) -> Params:
    """Returns the parameters as `jax.ShapeDtypeStruct`s; tied embeddings, so the head has none of its own."""
    hidden, heads, size = config.hidden, config.heads, config.head_size
    width = config.embedding or hidden

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, config.param_dtype)

    def affine(*kernel: int, bias: tuple[int, ...]) -> Params:
        return {"kernel": leaf(*kernel), "bias": leaf(*bias)}

    def norm() -> Params:
        return {"scale": leaf(hidden), "bias": leaf(hidden)}

    def block() -> Params:
        return {
            "norm_attention": norm(),
            "query": affine(hidden, heads, size, bias=(heads, size)),
            "key": affine(hidden, heads, size, bias=(heads, size)),
            "value": affine(hidden, heads, size, bias=(heads, size)),
            "out": affine(heads, size, hidden, bias=(hidden,)),
            "norm_feed_forward": norm(),
            "up": affine(hidden, 4 * hidden, bias=(4 * hidden,)),
            "down": affine(4 * hidden, hidden, bias=(hidden,)),
        }

    params: Params = {f"Block_{i}": block() for i in range(config.layers)}
    params["embedding"] = leaf(config.vocabulary, width)
    params["position"] = leaf(config.positions + POSITION_OFFSET, hidden)
    if config.projected:
        params |= {"project_in": leaf(width, hidden), "project_out": leaf(hidden, width)}
    if not config.post_norm:
        params["norm"] = norm()
    return params


def init_cache(config: OPTConfig, batch: int, length: int) -> Cache:
    """Returns an empty cache for `batch` sequences of up to `length` tokens (zeros, in `config.dtype`)."""
    shape = (batch, config.heads, length, config.head_size)
    return tuple(
        LayerCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
        for _ in range(config.layers)
    )


def forward(config: OPTConfig, params: Params, tokens: Array) -> Array:
    """Returns the logits of every position, `[batch, time, vocabulary]` in `config.dtype`.

    Args:
        tokens: `[batch, time]` integers, time at most `config.positions`.
    """
    _check_length(config, tokens.shape[1])
    x = _embed(config, params, tokens, jnp.int32(0))
    for i in range(config.layers):
        with jax.named_scope(f"Block_{i}"):
            x, _ = _block(config, params[f"Block_{i}"], x, jnp.int32(0), None)
    return _head(config, params, x)


def decode(
    config: OPTConfig, params: Params, cache: Cache, tokens: Array, position: Array
) -> tuple[Array, Cache]:
    """Returns the logits of new tokens and the cache with them in it.

    One token a sequence is a decode step; a whole prompt at position 0 is a prefill.

    Args:
        cache: holds the tokens before `position`; what it holds from there on is ignored.
        tokens: `[batch, new]` integers.
        position: int32 scalar, index of the first new token, the same for all sequences. `position + new`
            must not exceed the cache's length (a traced value can't be checked; XLA would clamp it).
    Returns:
        logits `[batch, new, vocabulary]` and the new cache, of the same shapes as the old one.
    """
    _check_length(config, cache[0].key.shape[2])
    x = _embed(config, params, tokens, position)
    layers = []
    for i, layer in enumerate(cache):
        with jax.named_scope(f"Block_{i}"):
            x, layer = _block(config, params[f"Block_{i}"], x, position, layer)
        layers.append(layer)
    return _head(config, params, x), tuple(layers)


def loss(config: OPTConfig, params: Params, batch: dict[str, Array], key: Array | None = None) -> Array:
    """Returns the mean next-token cross-entropy (nats); `batch` as in `gpt.loss`, `key` is unused."""
    return cross_entropy(forward(config, params, batch["tokens"]), batch["targets"])


def _check_length(config: OPTConfig, length: int) -> None:
    if length > config.positions:
        raise BadInput(f"a length of {length} tokens, but the model has {config.positions} positions")


def _embed(config: OPTConfig, params: Params, tokens: Array, position: Array) -> Array:
    with jax.named_scope("embedding"):
        x = jnp.take(params["embedding"], tokens, axis=0).astype(config.dtype)
        if config.projected:
            x = x @ params["project_in"].astype(config.dtype)
        new = tokens.shape[1]
        rows = jax.lax.dynamic_slice_in_dim(params["position"], position + POSITION_OFFSET, new, axis=0)
        return x + rows.astype(config.dtype)


def _head(config: OPTConfig, params: Params, x: Array) -> Array:
    with jax.named_scope("head"):
        if not config.post_norm:
            x = _norm(params["norm"], x)
        if config.projected:
            x = x @ params["project_out"].astype(config.dtype)
        return jnp.einsum("btd,vd->btv", x, params["embedding"].astype(config.dtype))


def _block(
    config: OPTConfig, params: Params, x: Array, position: Array, cache: LayerCache | None
) -> tuple[Array, LayerCache | None]:
    y = x if config.post_norm else _norm(params["norm_attention"], x)
    y, cache = _attention(params, y, position, cache)
    x = x + y
    if config.post_norm:
        x = _norm(params["norm_attention"], x)
    y = x if config.post_norm else _norm(params["norm_feed_forward"], x)
    x = x + _affine(params["down"], jax.nn.relu(_affine(params["up"], y, "btd,df->btf")), "btf,fd->btd")
    if config.post_norm:
        x = _norm(params["norm_feed_forward"], x)
    return x, cache


def _attention(
    params: Params, x: Array, position: Array, cache: LayerCache | None
) -> tuple[Array, LayerCache | None]:
    query = _affine(params["query"], x, "btd,dhs->bths") * params["query"]["kernel"].shape[-1] ** -0.5
    key = _affine(params["key"], x, "btd,dhs->bths").swapaxes(1, 2)
    value = _affine(params["value"], x, "btd,dhs->bths").swapaxes(1, 2)
    if cache is not None:
        key = jax.lax.dynamic_update_slice_in_dim(cache.key, key, position, axis=2)
        value = jax.lax.dynamic_update_slice_in_dim(cache.value, value, position, axis=2)
        cache = LayerCache(key, value)
    scores = jnp.einsum("bqhs,bhks->bhqk", query, key).astype(jnp.float32)
    row = jax.lax.broadcasted_iota(jnp.int32, scores.shape[2:], 0) + position
    column = jax.lax.broadcasted_iota(jnp.int32, scores.shape[2:], 1)
    weights = jax.nn.softmax(jnp.where(row >= column, scores, -1e9), axis=-1).astype(x.dtype)
    mixed = jnp.einsum("bhqk,bhks->bqhs", weights, value)
    return _affine(params["out"], mixed, "bths,hsd->btd"), cache


def _affine(params: Params, x: Array, product: str) -> Array:
    return jnp.einsum(product, x, params["kernel"].astype(x.dtype)) + params["bias"].astype(x.dtype)


def _norm(params: Params, x: Array) -> Array:
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-5)
    return (wide * params["scale"] + params["bias"]).astype(x.dtype)
