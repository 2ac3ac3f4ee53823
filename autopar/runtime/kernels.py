"""The small compiled functions between segments: fold micro-batches into sums, append them, cast at a cut."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Array = Any
Shardings = tuple[jax.sharding.Sharding, ...]


def scaled(x: Array, scale: float) -> Array:
    """Returns x times a number, in the dtype of x."""
    if scale == 1:
        return x
    return (x * jnp.asarray(scale, jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)


@functools.cache
def zeros(
    shapes: tuple[tuple[int, ...], ...], dtypes: tuple[str, ...], shardings: Shardings
) -> Callable[[], list[Array]]:
    """Returns a function that makes arrays of zeros."""
    kinds = tuple(zip(shapes, dtypes))
    return jax.jit(lambda: [jnp.zeros(shape, dtype) for shape, dtype in kinds], out_shardings=list(shardings))


@functools.cache
def begin(scale: float, shardings: Shardings, donate: bool) -> Callable[[Sequence[Array]], list[Array]]:
    """Returns a function xs → [scale·x]: the sums so far. donate: it may take the memory of xs."""

    def start(xs: Sequence[Array]) -> list[Array]:
        return [scaled(x, scale) for x in xs]

    return jax.jit(start, out_shardings=list(shardings), donate_argnums=0 if donate else ())


@functools.cache
def add(scale: float, shardings: Shardings) -> Callable[[Sequence[Array], Sequence[Array]], list[Array]]:
    """Returns a function (sums, xs) → [sum + scale·x] that reuses the memory of the sums."""

    def fold(sums: Sequence[Array], xs: Sequence[Array]) -> list[Array]:
        return [total + scaled(x, scale) for total, x in zip(sums, xs)]

    return jax.jit(fold, out_shardings=list(shardings), donate_argnums=0)


@functools.cache
def join(shardings: Shardings) -> Callable[[Sequence[Sequence[Array]]], list[Array]]:
    """Returns a function that concatenates each list of arrays along dim 0."""

    def concatenate(pieces: Sequence[Sequence[Array]]) -> list[Array]:
        return [jnp.concatenate(parts) for parts in pieces]

    return jax.jit(concatenate, out_shardings=list(shardings))


@functools.cache
def cast(dtypes: tuple[str, ...], shardings: Shardings) -> Callable[[Sequence[Array]], list[Array]]:
    """Returns a function that casts each array to the dtype at its position, where it lies."""
    return jax.jit(
        lambda xs: [x.astype(dtype) for x, dtype in zip(xs, dtypes)], out_shardings=list(shardings)
    )
