"""Steps as a user would write them: pure functions of (state, batch), and the shapes they take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array
Tree = Any


class TrainState(NamedTuple):
    """What a train step takes and gives back.

    Attributes:
        step: int32 scalar, steps done.
        params: the model's parameters.
        optimizer: optax state (Adam's two moments in the parameters' dtype).
        dropout: uint32 key data from which each step's dropout key is folded; None when there is no dropout.
    """

    step: Array
    params: Tree
    optimizer: Tree
    dropout: Array | None = None


@dataclass(frozen=True)
class ModelStep:
    """Returns a step and all one needs to plan and run it.

    Attributes:
        name: as in the catalogue.
        step: pure function of two trees. Training: `(state, batch) → (state, loss)`; forward:
            `(params, inputs) → logits`; decode: `(params, DecodeInput) → (logits, cache)`.
        args: shapes of those two trees, as `jax.ShapeDtypeStruct`s.
        init: `init(key)` makes the first tree for real, leaf by leaf: leaves of one shape share a compiled
            generator, so depth costs no compilation. It may be jitted (with `out_shardings`, say).
        make_batch: `make_batch(key)` makes the second for real, of random data.
        batch: examples per step.
        parameters: number of parameters.
        description: one line.
    """

    name: str
    step: Callable[..., Any]
    args: tuple[Tree, ...]
    init: Callable[[Array], Tree]
    make_batch: Callable[[Array], Tree]
    batch: int
    parameters: int
    description: str

    def __str__(self) -> str:
        return f"{self.name}: {self.description}"


def adamw(learning_rate: float = 1e-3) -> optax.GradientTransformation:
    """Returns AdamW after clipping to a global norm of 1 (Loshchilov & Hutter 2019; Pascanu et al. 2013)."""
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, b1=0.9, b2=0.95, weight_decay=0.01)
    )


def train_step(
    loss: Callable[..., Array],
    optimizer: optax.GradientTransformation,
    value_and_grad: Callable[..., Any] = jax.value_and_grad,
) -> Callable[[TrainState, Tree], tuple[TrainState, Array]]:
    """Returns `step(state, batch) → (state, loss)`: one optimizer step on the gradient of `loss`.

    Args:
        loss: `loss(params, batch, key) → scalar`; key is None when `state.dropout` is.
        optimizer: any optax transformation.
        value_and_grad: `jax.value_and_grad` or a drop-in for it.
    """

    def step(state: TrainState, batch: Tree) -> tuple[TrainState, Array]:
        key = None
        if state.dropout is not None:
            key = jax.random.fold_in(jax.random.wrap_key_data(state.dropout), state.step)
        value, gradient = value_and_grad(loss)(state.params, batch, key)
        updates, moments = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, moments, state.dropout), value

    return step


def init_state(
    init: Callable[[Array], Tree], optimizer: optax.GradientTransformation, key: Array, dropout: bool
) -> TrainState:
    """Returns the state before the first step. `init(key)` makes parameters; `dropout` adds a key for it."""
    params_key, dropout_key = jax.random.split(key)
    params = init(params_key)
    data = jax.random.key_data(dropout_key) if dropout else None
    return TrainState(jnp.int32(0), params, optimizer.init(params), data)


def count_parameters(params: Tree) -> int:
    """Returns the number of elements in all leaves (arrays or shapes)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
