"""The pieces that several flax models share: attention, a feed-forward pair, norms, a token loss."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

Array = jax.Array

# Two-pass variance: the one-pass form (mean of squares minus square of mean) needs a guard against negative
# values, whose derivative alone adds a dozen equations to every layer norm.
LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)


def group_norm(groups: int, *, dtype: Any, param_dtype: Any, name: str) -> nn.Module:
    """Returns a group norm over `groups` groups of channels (Wu & He 2018), each example by itself."""
    return nn.GroupNorm(
        groups, epsilon=1e-5, dtype=dtype, param_dtype=param_dtype, use_fast_variance=False, name=name
    )


GROUP_NORM_32 = functools.partial(group_norm, 32)


class Attention(nn.Module):
    """Returns multi-head self-attention; with `causal` a position sees only itself and those before it.

    Queries, keys and values have a kernel `[hidden, heads, head_size]` each: a fused one would have to be
    permuted to be split by heads. Scores and their softmax are float32 whatever `dtype` is.

    Call: `x [batch, time, hidden] → [batch, time, hidden]`; `deterministic=True` turns dropout off.
    """

    heads: int
    dtype: Any
    param_dtype: Any
    dropout: float
    causal: bool = True

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        hidden = x.shape[-1]
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        split = functools.partial(nn.DenseGeneral, features=(self.heads, hidden // self.heads), **kinds)
        query, key, value = split(name="query")(x), split(name="key")(x), split(name="value")(x)
        mask = causal_mask(x.shape[1]) if self.causal else None
        weights = attention_weights(query, key, mask).astype(self.dtype)
        weights = nn.Dropout(self.dropout)(weights, deterministic=deterministic)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return nn.DenseGeneral(hidden, axis=(-2, -1), name="out", **kinds)(mixed)


class FeedForward(nn.Module):
    """Returns GELU(x · up) · down with an inner width of `width`. Call: `[…, hidden] → […, hidden]`.

    `exact`: the GELU of the error function rather than its tanh approximation.
    """

    width: int
    dtype: Any
    param_dtype: Any
    exact: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = functools.partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        inner = dense(self.width, name="up")(x)
        return dense(x.shape[-1], name="down")(exact_gelu(inner) if self.exact else nn.gelu(inner))


def exact_gelu(x: Array) -> Array:
    """Returns x · Φ(x), Φ of the normal distribution (Hendrycks & Gimpel 2016), in the dtype of `x`.

    By erf, not by its complement as in `jax.nn.gelu`: XLA makes the complement of an exponential that the
    backward pass needs as well, and keeps it from one to the other, a third more of what a block holds.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def causal_mask(time: int) -> Array:
    """Returns `[time, time]` bool, true where a query (row) may look at a key (column)."""
    row = jax.lax.broadcasted_iota(jnp.int32, (time, time), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (time, time), 1)
    return row >= column


def attention_weights(query: Array, key: Array, mask: Array | None) -> Array:
    """Returns softmax(query · key / √head_size) in float32, zero where `mask` is false.

    Args:
        query: `[batch, queries, heads, head_size]`.
        key: `[batch, keys, heads, head_size]`.
        mask: bool, broadcastable to `[batch, heads, queries, keys]`; None where every query sees every key.
    Returns:
        `[batch, heads, queries, keys]` float32; each row sums to one.
    """
    # Scaling the query first keeps float16 scores of wide heads in range.
    query = query * query.shape[-1] ** -0.5
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32)
    return jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, -1e9), axis=-1)


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Returns the mean over all targets of −log softmax(logits)[target], a float32 scalar (nats).

    A plain mean over equally many targets per example, so the mean over equal micro-batches of this loss is
    the loss of the whole batch. The target's logit is picked by comparison rather than by a gather: a
    comparison can be split along the classes, with one all-reduce of a scalar per target.

    Args:
        logits: `[…, classes]`, any float dtype (read as float32).
        targets: `[…]` integer classes.
    """
    logits = logits.astype(jnp.float32)
    classes = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    picked = jnp.sum(jnp.where(classes == targets[..., None], logits, 0.0), axis=-1)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)
