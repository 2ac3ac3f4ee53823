"""A GPT language model: pre-norm blocks, learned positions, tied embeddings (Radford et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from autopar.core.errors import BadInput
from autopar.models.layers import CausalAttention, FeedForward, LayerNorm, cross_entropy

Array = jax.Array


@dataclass(frozen=True)
class GPTConfig:
    """Returns the description of a GPT.

    Args:
        vocabulary: number of token ids.
        positions: longest sequence.
        layers: number of blocks.
        hidden: width of the residual stream.
        heads: attention heads; must divide `hidden`.
        dtype: dtype of activations and products.
        param_dtype: dtype in which parameters are kept.
        dropout: rate on attention weights and on what each half of a block adds.
        scan_layers: one `lax.scan` over stacked parameters instead of `layers` separate blocks.
        remat: recompute each block in the backward pass instead of keeping what is inside it.
    Raises:
        BadInput: when `heads` does not divide `hidden`.
    """

    vocabulary: int = 256
    positions: int = 128
    layers: int = 4
    hidden: int = 64
    heads: int = 4
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    dropout: float = 0.0
    scan_layers: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise BadInput(f"heads={self.heads} must divide hidden={self.hidden}; choose another of the two")


class Block(nn.Module):
    """Returns x + attention(norm(x)), then + feed_forward(norm(x)).

    Call: `x [batch, time, hidden]` → the same shape.
    """

    config: GPTConfig

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        c = self.config
        kinds = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        y = LayerNorm(name="norm_attention", **kinds)(x)
        y = CausalAttention(c.heads, dropout=c.dropout, name="attention", **kinds)(y, deterministic)
        x = x + nn.Dropout(c.dropout)(y, deterministic=deterministic)
        y = LayerNorm(name="norm_feed_forward", **kinds)(x)
        y = FeedForward(4 * c.hidden, name="feed_forward", **kinds)(y)
        return x + nn.Dropout(c.dropout)(y, deterministic=deterministic)


class GPT(nn.Module):
    """Returns next-token logits.

    Blocks are named `Block_0`, `Block_1`, … in the name stack (`Blocks` when scanned); embedding and head lie
    outside of them. The head is the token embedding transposed.

    Call: `tokens [batch, time] integers → logits [batch, time, vocabulary]` in `config.dtype`. With
    `deterministic=False` it needs `rngs={"dropout": key}`.
    """

    config: GPTConfig

    @nn.compact
    def __call__(self, tokens: Array, deterministic: bool = True) -> Array:
        c = self.config
        if tokens.shape[1] > c.positions:
            raise BadInput(f"{tokens.shape[1]} tokens, but the model has {c.positions} positions")
        kinds = {
            "dtype": c.dtype,
            "param_dtype": c.param_dtype,
            "embedding_init": nn.initializers.normal(0.02),
        }
        embedding = nn.Embed(c.vocabulary, c.hidden, name="embedding", **kinds)
        position = nn.Embed(c.positions, c.hidden, name="position", **kinds)
        x = embedding(tokens) + position(jnp.arange(tokens.shape[1]))
        x = run_blocks(c, x, deterministic)
        x = LayerNorm(dtype=c.dtype, param_dtype=c.param_dtype, name="norm")(x)
        return embedding.attend(x)


def run_blocks(config: GPTConfig, x: Array, deterministic: bool) -> Array:
    """Returns `x` after all blocks; creates their modules in the module that is being called."""
    block = (
        nn.remat(Block, static_argnums=(2,), prevent_cse=not config.scan_layers) if config.remat else Block
    )
    if not config.scan_layers:
        for i in range(config.layers):
            x = block(config, name=f"Block_{i}")(x, deterministic)
        return x
    scanned = nn.scan(
        lambda module, carry, _: (module(carry, deterministic), None),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        length=config.layers,
    )
    return scanned(block(config, name="Blocks"), x, None)[0]


def init(config: GPTConfig, key: Array) -> Any:
    """Returns random parameters for `GPT(config)`."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return GPT(config).lazy_init(key, tokens)["params"]


def forward(config: GPTConfig, params: Any, tokens: Array) -> Array:
    """Returns the logits of `tokens [batch, time]`, `[batch, time, vocabulary]` in `config.dtype`."""
    return GPT(config).apply({"params": params}, tokens)  # type: ignore[return-value]


def loss(config: GPTConfig, params: Any, batch: dict[str, Array], key: Array | None = None) -> Array:
    """Returns the mean next-token cross-entropy, a float32 scalar (nats).

    Args:
        params: as `init` returns them.
        batch: `tokens` and `targets`, `[batch, time]` integers; the targets are the tokens one to the right.
        key: a PRNG key for dropout; None turns dropout off.
    """
    rngs = None if key is None else {"dropout": key}
    logits = GPT(config).apply({"params": params}, batch["tokens"], deterministic=key is None, rngs=rngs)
    return cross_entropy(logits, batch["targets"])  # type: ignore[arg-type]


def stack_blocks(params: dict[str, Any]) -> dict[str, Any]:
    """Returns parameters of the unrolled model (`Block_0`, …) as the scanned one has them (`Blocks`)."""
    count = sum(name.startswith("Block_") for name in params)
    blocks = [params[f"Block_{i}"] for i in range(count)]
    rest = {name: value for name, value in params.items() if not name.startswith("Block_")}
    return rest | {"Blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}
