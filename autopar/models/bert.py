"""BERT with its masked-language head: post-norm blocks that see both ways (Devlin et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from autopar.models.decoder import check_length
from autopar.models.layers import LayerNorm, cross_entropy, exact_gelu
from autopar.models.transformer import Style, TransformerConfig, run_blocks

Array = jax.Array

STYLE = Style(causal=False, post_norm=True, exact_gelu=True, epsilon=1e-12)


@dataclass(frozen=True, kw_only=True)
class BERTConfig(TransformerConfig):
    """Returns the description of a BERT.

    Args:
        vocabulary: number of token ids. positions: longest sequence. segments: kinds of segment.
        mask_token: the id that hides a token.
        masked: share of the tokens that a random batch hides, the same number in every sequence.
        The others are as in `TransformerConfig`.
    Raises:
        BadInput: when `heads` does not divide `hidden`.
    """

    vocabulary: int = 256
    positions: int = 128
    segments: int = 2
    mask_token: int = 103
    masked: float = 0.15


class BERT(nn.Module):
    """Returns logits of what the tokens were before some were hidden; the head is the embedding transposed.

    Call: `tokens, segments [batch, time] integers → logits [batch, time, vocabulary]` in `config.dtype`; with
    `where [batch, n]` integers, of these n positions of each sequence only: `[batch, n, vocabulary]`.
    """

    config: BERTConfig

    @nn.compact
    def __call__(
        self, tokens: Array, segments: Array, where: Array | None = None, deterministic: bool = True
    ) -> Array:
        c = self.config
        check_length(c.positions, tokens.shape[1])
        table: Any = {**c.kinds, "embedding_init": nn.initializers.normal(0.02)}
        embedding = nn.Embed(c.vocabulary, c.hidden, name="embedding", **table)
        position = nn.Embed(c.positions, c.hidden, name="position", **table)
        segment = nn.Embed(c.segments, c.hidden, name="segment", **table)
        x = embedding(tokens) + position(jnp.arange(tokens.shape[1])) + segment(segments)
        x = LayerNorm(name="norm", epsilon=STYLE.epsilon, **c.kinds)(x)
        x = nn.Dropout(c.dropout)(x, deterministic=deterministic)
        x = run_blocks(c, STYLE, x, deterministic)
        if where is not None:
            x = jnp.take_along_axis(x, where[..., None], axis=1, mode="clip")
        x = exact_gelu(nn.Dense(c.hidden, name="head", **c.kinds)(x))
        x = LayerNorm(name="norm_head", epsilon=STYLE.epsilon, **c.kinds)(x)
        bias = self.param("bias", nn.initializers.zeros, (c.vocabulary,), c.param_dtype)
        return embedding.attend(x) + bias.astype(c.dtype)


def init(config: BERTConfig, key: Array) -> Any:
    """Returns random parameters for `BERT(config)`."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return BERT(config).lazy_init(key, tokens, tokens)["params"]


def forward(config: BERTConfig, params: Any, tokens: Array, segments: Array | None = None) -> Array:
    """Returns the logits of all positions, `[batch, time, vocabulary]` in `config.dtype`.

    Args:
        tokens: `[batch, time]` integers. segments: likewise; None for the first segment throughout.
    """
    segments = jnp.zeros_like(tokens) if segments is None else segments
    return BERT(config).apply({"params": params}, tokens, segments)  # type: ignore[return-value]


def loss(config: BERTConfig, params: Any, batch: dict[str, Array], key: Array | None = None) -> Array:
    """Returns the mean cross-entropy of the hidden tokens, a float32 scalar (nats).

    Every sequence hides equally many, so the mean over equal micro-batches is the loss of the whole batch.

    Args:
        params: as `init` returns them.
        batch: `tokens [batch, time]` with some hidden, `segments [batch, time]`, `where [batch, n]`, the
            positions of the hidden ones, and `targets [batch, n]`, what they were. All integers.
        key: a PRNG key for dropout; None turns dropout off.
    """
    rngs = None if key is None else {"dropout": key}
    inputs = batch["tokens"], batch["segments"], batch["where"]
    logits = BERT(config).apply({"params": params}, *inputs, deterministic=key is None, rngs=rngs)
    return cross_entropy(logits, batch["targets"])  # type: ignore[arg-type]


def hide(config: BERTConfig, tokens: Array, key: Array) -> tuple[Array, Array, Array]:
    """Returns tokens with a share of them hidden at random, where those are, and what they were.

    Args:
        tokens: `[batch, time]` integers.
    Returns:
        `[batch, time]`, `[batch, n]` (rising), `[batch, n]`; n is the share of time, at least 1.
    """
    count = max(1, round(config.masked * tokens.shape[1]))
    order = jnp.argsort(jax.random.uniform(key, tokens.shape), axis=1)
    where = jnp.sort(order[:, :count], axis=1).astype(jnp.int32)
    rows = jnp.arange(tokens.shape[0])[:, None]
    return tokens.at[rows, where].set(config.mask_token), where, tokens[rows, where]
