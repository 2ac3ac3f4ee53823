"""A mixture-of-experts language model with einsum dispatch (GShard: Lepikhin et al. 2020).

Every second block has experts and each token goes to its two best ones (with `experts_per_token=1` to its
best: Switch, Fedus et al. 2021). The feed-forward width is 8 × hidden, in experts and in dense blocks alike.
With tied embeddings the 380M … 70B ladder of Alpa's paper then has 384M … 70.4B parameters.

Tokens are routed in groups, and a group never leaves its example: a sequence no longer than `group` is one
group by itself, a longer one is cut into groups. So a micro-batch routes exactly as the full batch does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from autopar.core.errors import BadInput
from autopar.models.layers import Attention, FeedForward, LayerNorm, cross_entropy

Array = jax.Array


@dataclass(frozen=True)
class MoEConfig:
    """Returns the description of a mixture-of-experts language model.

    Args:
        vocabulary, positions, layers, hidden, heads, dtype, param_dtype, dropout: as in `GPTConfig`.
        experts: experts in every second block.
        experts_per_token: 2 (GShard) or 1 (Switch).
        group: most tokens that are routed together. A sequence longer than this must be a multiple of it.
        capacity_factor: an expert takes at most experts_per_token · group / experts · capacity_factor tokens
            of a group (rounded up); what comes later passes by on the residual.
        expansion: feed-forward width over hidden.
        balance_weight: weight of GShard's balance loss; at 0 it is not computed. It is a product of two means
            over tokens, so a balance loss over a whole batch mixes its examples and micro-batches change it.
            Ours is taken per group, as in GShard, and a group lies within one example: it stays exact.
    Raises:
        BadInput: when `heads` does not divide `hidden`, or `experts_per_token` is neither 1 nor 2.
    """

    vocabulary: int = 256
    positions: int = 128
    layers: int = 4
    hidden: int = 64
    heads: int = 4
    experts: int = 4
    experts_per_token: int = 2
    group: int = 2048
    capacity_factor: float = 1.0
    expansion: int = 8
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    dropout: float = 0.0
    balance_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise BadInput(f"heads={self.heads} must divide hidden={self.hidden}; choose another of the two")
        if self.experts_per_token not in (1, 2):
            raise BadInput(
                f"experts_per_token must be 1 (Switch) or 2 (GShard), but got {self.experts_per_token}"
            )


class Routing(NamedTuple):
    """Where the tokens of each group go.

    Attributes:
        combine: `[groups, tokens, experts, capacity]` float32, the weight of the answer from that seat.
        balance: `[groups]` float32, GShard's balance loss (1 when perfectly even).
    """

    combine: Array
    balance: Array


def route(logits: Array, experts_per_token: int, capacity: int) -> Routing:
    """Returns the routing of each token to its one or two best experts (GShard, Algorithm 1, not randomised).

    First choices of all tokens of a group are seated before any second choice, each in order of position.

    Args:
        logits: `[groups, tokens, experts]`.
        experts_per_token: 1 or 2.
        capacity: seats per expert and group.
    """
    gates = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    experts = logits.shape[-1]
    first = jax.nn.one_hot(jnp.argmax(gates, axis=-1), experts)
    balance = experts * jnp.sum(jnp.mean(gates, axis=1) * jnp.mean(first, axis=1), axis=-1)
    choices = [first]
    if experts_per_token == 2:
        choices.append(jax.nn.one_hot(jnp.argmax(gates * (1 - first), axis=-1), experts))
    # Switch weighs by the gate itself, else its router gets no gradient; GShard makes the two sum to one.
    weights = [jnp.sum(gates * choice, axis=-1) for choice in choices]
    total = weights[0] + weights[1] if experts_per_token == 2 else 1.0
    taken = jnp.zeros_like(first[:, :1])
    combine = 0.0
    for choice, weight in zip(choices, weights):
        seat = taken + jnp.cumsum(choice, axis=1) - choice  # how many came before, per expert
        seat_of_token = jnp.sum(seat * choice, axis=-1).astype(jnp.int32)
        one_seat = jax.nn.one_hot(seat_of_token, capacity)  # all zero when the expert is full
        combine = combine + jnp.einsum("gs,gse,gsc->gsec", weight / total, choice, one_seat)
        taken = taken + jnp.sum(choice, axis=1, keepdims=True)
    return Routing(combine, balance)  # type: ignore[arg-type]


class Experts(nn.Module):
    """Returns what each token's experts answer, and the balance loss of each group.

    Call: `x [batch, time, hidden] → ([batch, time, hidden], [groups])`.
    """

    config: MoEConfig

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        c = self.config
        groups = split_groups(x, c.group)
        capacity = math.ceil(c.experts_per_token * groups.shape[1] * c.capacity_factor / c.experts)
        # The router stays float32: its rounding decides where tokens go.
        router = nn.Dense(
            c.experts, use_bias=False, dtype=jnp.float32, param_dtype=c.param_dtype, name="router"
        )
        routing = route(router(groups), c.experts_per_token, capacity)
        combine = routing.combine.astype(c.dtype)
        dispatch = (routing.combine > 0).astype(c.dtype)
        fan = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0,))
        width = c.expansion * c.hidden
        up = self.param("up", fan, (c.experts, c.hidden, width), c.param_dtype).astype(c.dtype)
        down = self.param("down", fan, (c.experts, width, c.hidden), c.param_dtype).astype(c.dtype)
        seated = jnp.einsum("gsec,gsm->egcm", dispatch, groups)
        inner = nn.gelu(jnp.einsum("egcm,emf->egcf", seated, up))
        answers = jnp.einsum("egcf,efm->egcm", inner, down)
        y = jnp.einsum("gsec,egcm->gsm", combine, answers)
        return y.reshape(x.shape), routing.balance


def split_groups(x: Array, group: int) -> Array:
    """Returns `x [batch, time, hidden]` as `[groups, tokens, hidden]`, each group within one example.

    Raises:
        BadInput: when time is more than `group` but no multiple of it.
    """
    batch, time, hidden = x.shape
    if time <= group:
        return x
    if time % group:
        raise BadInput(f"a sequence of {time} tokens must be a multiple of the routing group, {group}")
    return x.reshape(batch * (time // group), group, hidden)


class Block(nn.Module):
    """Returns a pre-norm block whose second half is experts or a dense feed-forward, and its balance loss.

    Call: `[batch, time, hidden]` → the same and `[groups]` (None when dense).
    """

    config: MoEConfig
    sparse: bool

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> tuple[Array, Array | None]:
        c = self.config
        kinds = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        y = LayerNorm(name="norm_attention", **kinds)(x)
        y = Attention(c.heads, dropout=c.dropout, name="attention", **kinds)(y, deterministic)
        x = x + nn.Dropout(c.dropout)(y, deterministic=deterministic)
        y, balance = LayerNorm(name="norm_feed_forward", **kinds)(x), None
        if self.sparse:
            y, balance = Experts(c, name="experts")(y)
        else:
            y = FeedForward(c.expansion * c.hidden, name="feed_forward", **kinds)(y)
        return x + nn.Dropout(c.dropout)(y, deterministic=deterministic), balance


class MoE(nn.Module):
    """Returns next-token logits and the balance losses of the sparse blocks (`Block_1`, `Block_3`, …).

    Call: `tokens [batch, time] → (logits [batch, time, vocabulary], tuple of [groups])`.
    """

    config: MoEConfig

    @nn.compact
    def __call__(self, tokens: Array, deterministic: bool = True) -> tuple[Array, tuple[Array, ...]]:
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
        balances = []
        for i in range(c.layers):
            x, balance = Block(c, sparse=i % 2 == 1, name=f"Block_{i}")(x, deterministic)
            balances += [] if balance is None else [balance]
        x = LayerNorm(dtype=c.dtype, param_dtype=c.param_dtype, name="norm")(x)
        return embedding.attend(x), tuple(balances)


def init(config: MoEConfig, key: Array) -> Any:
    """Returns random parameters for `MoE(config)`."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return MoE(config).lazy_init(key, tokens)["params"]


def forward(config: MoEConfig, params: Any, tokens: Array) -> Array:
    """Returns the logits of `tokens [batch, time]`, `[batch, time, vocabulary]` in `config.dtype`."""
    return MoE(config).apply({"params": params}, tokens)[0]  # type: ignore[index]


def loss(config: MoEConfig, params: Any, batch: dict[str, Array], key: Array | None = None) -> Array:
    """Returns the mean next-token cross-entropy plus the weighted balance loss, a float32 scalar (nats).

    Args:
        params, batch, key: as in `gpt.loss`.
    """
    rngs = None if key is None else {"dropout": key}
    variables = {"params": params}
    logits, balances = MoE(config).apply(variables, batch["tokens"], deterministic=key is None, rngs=rngs)
    value = cross_entropy(logits, batch["targets"])
    if config.balance_weight and balances:
        value = value + config.balance_weight * jnp.mean(jnp.stack(balances))  # type: ignore[arg-type]
    return value
