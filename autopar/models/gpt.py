"""A GPT language model: pre-norm blocks, learned positions, tied embeddings (Radford et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from autopar.models.decoder import check_length
from autopar.models.layers import LayerNorm, cross_entropy
from autopar.models.transformer import Style, TransformerConfig, run_blocks

Array = jax.Array


STYLE = Style()


@dataclass(frozen=True, kw_only=True)
class GPTConfig(TransformerConfig):
    """Returns the description of a GPT.

    Args:
        vocabulary: number of token ids.
        positions: longest sequence.
        The others are as in `TransformerConfig`.
    Raises:
        BadInput: when `heads` does not divide `hidden`.
    """

    vocabulary: int = 256
    positions: int = 128


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
        check_length(c.positions, tokens.shape[1])
        kinds = {
            "dtype": c.dtype,
            "param_dtype": c.param_dtype,
            "embedding_init": nn.initializers.normal(0.02),
        }
        embedding = nn.Embed(c.vocabulary, c.hidden, name="embedding", **kinds)
        position = nn.Embed(c.positions, c.hidden, name="position", **kinds)
        x = embedding(tokens) + position(jnp.arange(tokens.shape[1]))
        x = run_blocks(c, STYLE, x, deterministic)
        x = LayerNorm(dtype=c.dtype, param_dtype=c.param_dtype, name="norm")(x)
        return embedding.attend(x)


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
