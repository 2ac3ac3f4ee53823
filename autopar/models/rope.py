"""Rotary position embedding (Su et al. 2021) and the ways in which long-context models stretch it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@dataclass(frozen=True)
class Linear:
    """Positions are divided by `factor` (Chen et al. 2023)."""

    factor: float


@dataclass(frozen=True)
class Llama3:
    """Frequencies slower than `low` turns in `original` positions are divided by `factor`, those faster than
    `high` are kept, and between the two lies a ramp (Llama 3.1, Grattafiori et al. 2024).
    """

    factor: float
    low: float
    high: float
    original: int


@dataclass(frozen=True)
class Yarn:
    """As `Llama3` with a ramp over dims, from `fast` to `slow` turns in `original` positions; queries and
    keys grow by `attention` (YaRN, Peng et al. 2023).
    """

    factor: float
    fast: float
    slow: float
    original: int
    attention: float


Scaling = Linear | Llama3 | Yarn | None


@dataclass(frozen=True)
class Rope:
    """A rotary embedding: its base and how it is stretched."""

    theta: float = 10000.0
    scaling: Scaling = None


def frequencies(rope: Rope, size: int) -> np.ndarray:
    """Returns the angle per position of each pair of dims, radians, float32 `[size / 2]`."""
    plain = rope.theta ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    match rope.scaling:
        case None:
            made = plain
        case Linear(factor):
            made = plain / factor
        case Llama3(factor, low, high, original):
            turns = original * plain / (2 * math.pi)
            kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
            made = kept * plain + (1 - kept) * plain / factor
        case Yarn(factor, fast, slow, original, _):
            # The dim whose pair turns so many times within the original positions.
            dims = [
                size * math.log(original / (t * 2 * math.pi)) / (2 * math.log(rope.theta))
                for t in (fast, slow)
            ]
            first, last = max(math.floor(dims[0]), 0), min(math.ceil(dims[1]), size - 1)
            ramp = np.clip((np.arange(size // 2) - first) / max(last - first, 1e-3), 0.0, 1.0)
            made = (1 - ramp) * plain + ramp * plain / factor
    return made.astype(np.float32)


def rotate(rope: Rope, x: Array, positions: Array) -> Array:
    """Returns x turned by its positions; dims i and i + size / 2 are a pair.

    Args:
        x: `[rows, new, heads, size]`.
        positions: int32 `[rows, new]`.
    """
    angles = positions[..., None].astype(jnp.float32) * frequencies(rope, x.shape[-1])
    scale = rope.scaling.attention if isinstance(rope.scaling, Yarn) else 1.0
    cos, sin = (scale * f(angles)[:, :, None] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
