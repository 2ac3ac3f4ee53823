"""Attention over keys and values that lie in blocks of a pool shared by all sequences.

PagedAttention (Kwon et al. 2023): a row's table names its blocks in order; new keys and values are scattered
to their places in them, and attention gathers the row's blocks and masks by absolute position. What is
padding is written to block `SCRATCH`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

SCRATCH = 0
"""The block that belongs to no sequence."""


class Sizes(Protocol):
    """What is asked here of a model's config."""

    @property
    def layers(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_size(self) -> int: ...


class LayerCache(NamedTuple):
    """Keys and values of one layer, `[blocks, kv_heads, block_size, head_size]` each."""

    key: Array
    value: Array


Cache = tuple[LayerCache, ...]


class Windowed(NamedTuple):
    """A layer's cache, and beside it what the rows of a step hold, as a cache that has one block per row.

    Decode steps of the same rows follow each other. A window is read as it lies, where the blocks of a pool
    are gathered anew at every step, which is three times the memory traffic. What is new goes to both.

    Attributes:
        pool: of all sequences.
        window: `[rows, kv_heads, time, head_size]` each, zero where nothing was written.
    """

    pool: LayerCache
    window: LayerCache


class Slots(NamedTuple):
    """Where a step's new tokens are; the same for all layers.

    Attributes:
        positions: int32 `[rows, new]`, index of each new token in its sequence.
        blocks, offsets: int32 `[rows, new]`, the place of its key and value; `SCRATCH` for padding.
        tables: int32 `[rows, blocks]`, the blocks of a row in order.
        last: int32 `[rows]`, index in `new` of a row's last real token; 0 for a row without any.
        ends: int32 `[rows]`, tokens a row's sequence has with the new ones.
    """

    positions: Array
    blocks: Array
    offsets: Array
    tables: Array
    last: Array
    ends: Array


def cache_shapes(config: Sizes, blocks: int, block_size: int, dtype: Any) -> Cache:
    """Returns the pool of KV blocks of each layer as `jax.ShapeDtypeStruct`s.

    Args:
        blocks: how many there are, `SCRATCH` among them.
        block_size: tokens in a block.
        dtype: of keys and values.
    """
    shape: Any = jax.ShapeDtypeStruct((blocks, config.kv_heads, block_size, config.head_size), dtype)
    return tuple(LayerCache(shape, shape) for _ in range(config.layers))


def copy_blocks(cache: Cache, source: Array, target: Array) -> Cache:
    """Returns the cache after block `target[i]` became what block `source[i]` was, in all layers.

    Args:
        source, target: int32 `[n]`; pad with `SCRATCH` in both.
    """
    return jax.tree.map(lambda pool: pool.at[target].set(pool.at[source].get(mode="clip")), cache)


def rows_of(cache: Cache, tables: Array, held: Array) -> Cache:
    """Returns the window of rows, `[rows, kv_heads, blocks · block_size, head_size]` a leaf.

    Args:
        tables: as in `Slots`. held: int32 `[rows]`, tokens whose keys and values the blocks hold.
    """

    def window(pool: Array) -> Array:
        return _until(_read(pool, tables), held)

    return jax.tree.map(window, cache)


def slots(
    cache: Cache | tuple[Windowed, ...], tokens: Array, positions: Array, lengths: Array, tables: Array
) -> Slots:
    """Returns where the new tokens of a step are; arguments as in `step` of each model."""
    pool = cache[0].pool if isinstance(cache[0], Windowed) else cache[0]
    block_size = pool.key.shape[2]
    index = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
    at = positions[:, None] + index
    entry = jnp.minimum(at // block_size, tables.shape[1] - 1)
    blocks = jnp.take_along_axis(tables, entry, axis=1, mode="clip")
    blocks = jnp.where(index < lengths[:, None], blocks, SCRATCH)
    last = jnp.maximum(lengths - 1, 0)
    return Slots(at, blocks, at % block_size, tables, last, positions + lengths)


def last_tokens(x: Array, where: Slots) -> Array:
    """Returns `[rows, 1, …]` of `[rows, new, …]`: each row's last real token."""
    if x.shape[1] == 1:
        return x
    last = where.last.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.take_along_axis(x, last, axis=1, mode="clip")


def attention(
    cache: LayerCache | Windowed,
    where: Slots,
    query: Array,
    key: Array,
    value: Array,
    slopes: np.ndarray | None = None,
) -> tuple[Array, LayerCache | Windowed]:
    """Returns what the new tokens gather from their sequences, and the cache with them in it.

    Args:
        query: `[rows, new, heads, head_size]`, already scaled; `heads` a multiple of `kv_heads`. Or of each
            row's last token only, `[rows, 1, heads, head_size]`.
        key, value: `[rows, new, kv_heads, head_size]`.
        slopes: float `[heads]`, ALiBi: added to a score is slope · position of the key (Press et al. 2022).
    Returns:
        What the query has the shape and dtype of, and the new cache.
    """
    narrow = query.shape[1] < where.positions.shape[1]
    positions = last_tokens(where.positions, where) if narrow else where.positions
    if isinstance(cache, Windowed):
        pool, window = cache
        pool = LayerCache(_write(pool.key, where, key), _write(pool.value, where, value))
        window = LayerCache(_write_row(window.key, where, key), _write_row(window.value, where, value))
        return attend(query, *window, positions, slopes), Windowed(pool, window)
    cache = LayerCache(_write(cache.key, where, key), _write(cache.value, where, value))
    keys, values = _read(cache.key, where.tables), _read(cache.value, where.tables)
    # A weight of zero does not hide a NaN: what blocks hold from other sequences must not be multiplied.
    return attend(query, keys, _until(values, where.ends), positions, slopes), cache


def attend(
    query: Array, keys: Array, values: Array, positions: Array, slopes: np.ndarray | None = None
) -> Array:
    """Returns softmax(query · keys) · values, a query seeing the keys up to its own position.

    Args:
        query: `[rows, new, heads, head_size]`, already scaled; `heads` a multiple of `kv_heads`.
        keys, values: `[rows, kv_heads, time, head_size]`.
        positions: int32 `[rows, new]`, position of each query in `time`.
        slopes: as in `attention`.
    """
    rows, new, heads, size = query.shape
    kv_heads, time = keys.shape[1:3]
    query = query.reshape(rows, new, kv_heads, heads // kv_heads, size)
    scores = jnp.einsum("rnkgs,rkts->rkgnt", query, keys.astype(query.dtype)).astype(jnp.float32)
    column = jax.lax.broadcasted_iota(jnp.int32, (rows, new, time), 2)
    if slopes is not None:
        by_head = jnp.asarray(slopes, jnp.float32).reshape(1, kv_heads, heads // kv_heads, 1, 1)
        scores = scores + by_head * column[:, None, None].astype(jnp.float32)
    seen = column <= positions[:, :, None]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e9), axis=-1).astype(query.dtype)
    return _mixed(weights, values.astype(query.dtype)).reshape(rows, new, heads, size)


def _mixed(weights: Array, values: Array) -> Array:
    """Returns weights `[rows, kv_heads, group, new, time]` · values, `[rows, new, kv_heads, group, size]`."""
    rows, kv_heads, group, new, time = weights.shape
    if new == 1 < rows:
        return jnp.einsum("rkgnt,rkts->rnkgs", weights, values)
    # The values on the right are read as they lie; on the left they would be transposed first.
    flat = weights.reshape(rows, kv_heads, group * new, time)
    mixed = jax.lax.dot_general(flat, values, (((3,), (2,)), ((0, 1), (0, 1))))
    return mixed.reshape(rows, kv_heads, group, new, -1).transpose(0, 3, 1, 2, 4)


def _write(pool: Array, where: Slots, new: Array) -> Array:
    return pool.at[where.blocks, :, where.offsets].set(new.astype(pool.dtype))


def _write_row(window: Array, where: Slots, new: Array) -> Array:
    rows = jax.lax.broadcasted_iota(jnp.int32, where.positions.shape, 0)
    return window.at[rows, :, where.positions].set(new.astype(window.dtype))


def _until(rows: Array, ends: Array) -> Array:
    """Returns the keys or values of rows with zeros from each row's end on."""
    time = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 2)
    return jnp.where(time < ends[:, None, None, None], rows, 0)


def _read(pool: Array, tables: Array) -> Array:
    """Returns the keys or values of all rows, `[rows, kv_heads, blocks · block_size, head_size]`."""
    rows, blocks = tables.shape
    _, heads, block_size, size = pool.shape
    gathered = pool.at[tables].get(mode="clip").swapaxes(1, 2)
    return gathered.reshape(rows, heads, blocks * block_size, size)


def causal(query: Array, key: Array, value: Array, slopes: np.ndarray | None = None) -> Array:
    """Returns `attend` of whole sequences with themselves; arguments `[rows, time, heads, head_size]`."""
    positions = jax.lax.broadcasted_iota(jnp.int32, query.shape[:2], 1)
    return attend(query, key.swapaxes(1, 2), value.swapaxes(1, 2), positions, slopes)


def alibi_slopes(heads: int) -> np.ndarray:
    """Returns float32 `[heads]`: 2^(-8 i / n) for a power of two n, the odd ones of 2 n beyond it."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return np.asarray(slopes, np.float32)
