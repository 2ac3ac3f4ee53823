"""A small paged decoder for tests of serving: two products of attention and one layer of ReLU, no norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@dataclass(frozen=True)
class Config:
    """layers × hidden = heads × size; `positions` limits sequences, `dtype` is of parameters and cache."""

    layers: int = 4
    hidden: int = 32
    heads: int = 4
    vocabulary: int = 64
    positions: int = 128
    dtype: Any = jnp.float32


class LayerCache(NamedTuple):
    key: Any
    value: Any


def parameter_shapes(config: Config) -> dict[str, Any]:
    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, config.dtype)

    size = config.hidden // config.heads
    block = {
        "qkv": leaf(config.hidden, 3, config.heads, size),
        "out": leaf(config.heads, size, config.hidden),
        "up": leaf(config.hidden, 4 * config.hidden),
        "down": leaf(4 * config.hidden, config.hidden),
    }
    params: dict[str, Any] = {f"Block_{i}": dict(block) for i in range(config.layers)}
    table = leaf(config.vocabulary, config.hidden)
    return params | {"embedding": table, "position": leaf(config.positions, config.hidden)}


def weights(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Random parameters by path ("Block_0/up"), float32."""
    rng, found = np.random.default_rng(seed), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameter_shapes(config)):
        scale = 1.0 if len(path) == 1 else leaf.shape[0] ** -0.5
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[name] = (scale * rng.standard_normal(leaf.shape)).astype(np.float32)
    return found


@dataclass(frozen=True)
class Weights:
    """The random parameters as a source that is read by slices, in any process."""

    config: Config
    seed: int = 0

    def read(self, path: str, index: Any = None, dtype: Any = None) -> np.ndarray:
        whole = weights(self.config, self.seed)[path]
        return whole[... if index is None else index].astype(dtype or whole.dtype)


def cache_shapes(config: Config, blocks: int, block_size: int, dtype: Any) -> tuple[LayerCache, ...]:
    shape = (blocks, config.heads, block_size, config.hidden // config.heads)
    leaf = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    return tuple(LayerCache(leaf, leaf) for _ in range(config.layers))


def step(config, params, cache, tokens, positions, lengths, tables, every=False):
    new, size = tokens.shape[1], cache[0].key.shape[2]
    offsets = jnp.arange(new, dtype=jnp.int32)[None]
    at, real = positions[:, None] + offsets, offsets < lengths[:, None]
    place = jnp.minimum(at // size, tables.shape[1] - 1)
    where = jnp.where(real, jnp.take_along_axis(tables, place, axis=1), 0), at % size
    x = params["embedding"][tokens] + params["position"][jnp.where(real, at, 0)]
    layers = []
    for i, layer in enumerate(cache):
        with jax.named_scope(f"Block_{i}"):
            block = params[f"Block_{i}"]
            y, layer = _attend(block, x, at, layer, where, tables)
            x = x + y
            x = x + jax.nn.relu(x @ block["up"]) @ block["down"]
            x = x * 0.5
        layers.append(layer)
    if not every:
        x = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    return (x @ params["embedding"].T).astype(jnp.float32), tuple(layers)


def _attend(block, x, at, cache, where, tables):
    query, key, value = jnp.moveaxis(jnp.einsum("btd,dchs->btchs", x, block["qkv"]), 2, 0)
    blocks, offset = where
    keys = cache.key.at[blocks, :, offset].set(key.astype(cache.key.dtype))
    values = cache.value.at[blocks, :, offset].set(value.astype(cache.value.dtype))
    near, size = keys[tables], keys.shape[2]
    scores = jnp.einsum("bths,bnhks->bhtnk", query, near).astype(jnp.float32) * query.shape[-1] ** -0.5
    columns = jnp.arange(tables.shape[1] * size).reshape(1, 1, 1, -1, size)
    scores = jnp.where(columns <= at[:, None, :, None, None], scores, -1e9)
    weight = jax.nn.softmax(scores, axis=(-2, -1)).astype(x.dtype)
    mixed = jnp.einsum("bhtnk,bnhks->bths", weight, values[tables])
    return jnp.einsum("bths,hsd->btd", mixed, block["out"]), LayerCache(keys, values)


def reference(config: Config, named: dict[str, np.ndarray], prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of a single device, the whole sequence computed anew for each (no paging is involved)."""
    params = jax.tree_util.tree_map_with_path(
        lambda path, _: named[jax.tree_util.keystr(path, simple=True, separator="/")],
        parameter_shapes(config),
    )
    blocks = -(-(len(prompt) + count) // 16)
    cache = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), cache_shapes(config, blocks + 1, 16, "float32")
    )
    tokens = list(prompt)
    width = blocks * 16
    run = jax.jit(step, static_argnums=(0, 7))
    for _ in range(count):
        row = np.zeros((1, width), np.int32)
        row[0, : len(tokens)] = tokens
        table = np.arange(1, blocks + 1, dtype=np.int32)[None]
        zero, length = np.zeros(1, np.int32), np.array([len(tokens)], np.int32)
        logits, _ = run(config, params, cache, row, zero, length, table, False)
        tokens.append(int(logits[0].argmax()))
    return tokens[len(prompt) :]
