"""A multi-layer perceptron over a plain list of dictionaries; no names, so layers are found by cost alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclass(frozen=True)
class MLPConfig:
    """Returns the description of a perceptron: `layers` matrices, inputs → hidden → … → outputs, and tanh.

    Args:
        dtype: dtype of activations and products.
        param_dtype: dtype in which parameters are kept.
    """

    inputs: int = 64
    hidden: int = 128
    outputs: int = 16
    layers: int = 4
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.inputs, *[self.hidden] * (self.layers - 1), self.outputs)


def init(config: MLPConfig, key: Array) -> list[dict[str, Array]]:
    """Returns random parameters, per layer `kernel [in, out]` of variance 1/in and `bias [out]`, zero."""
    widths, keys = config.widths, jax.random.split(key, config.layers)
    return [
        {
            "kernel": jax.random.normal(k, (n, m), config.param_dtype) * n**-0.5,
            "bias": jnp.zeros(m, config.param_dtype),
        }
        for k, n, m in zip(keys, widths, widths[1:])
    ]


def forward(config: MLPConfig, params: list[dict[str, Array]], x: Array) -> Array:
    """Returns the outputs `[batch, outputs]` for inputs `[batch, inputs]`, in `config.dtype`."""
    x = x.astype(config.dtype)
    for i, layer in enumerate(params):
        x = jnp.tanh(x) if i > 0 else x
        x = x @ layer["kernel"].astype(config.dtype) + layer["bias"].astype(config.dtype)
    return x


def loss(
    config: MLPConfig, params: list[dict[str, Array]], batch: dict[str, Array], key: Array | None = None
) -> Array:
    """Returns the mean squared error, a float32 scalar.

    Args:
        batch: `inputs [batch, inputs]` and `targets [batch, outputs]`.
        key: unused, there is no dropout.
    """
    error = forward(config, params, batch["inputs"]).astype(jnp.float32) - batch["targets"]
    return jnp.mean(jnp.square(error))
