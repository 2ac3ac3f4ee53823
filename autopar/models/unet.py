"""The U-Net of a diffusion model: what noise was added to an image? (DDPM: Ho, Jain, Abbeel 2020)

Blocks of two convolutions go down to coarser images and up again; on the way up each reads, beside what comes
from below, what a block on the way down left at its size. A few sizes have attention over all pixels.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from autopar.core.errors import BadInput
from autopar.models.layers import GROUP_NORM_32, attention_weights

Array = jax.Array
ZERO = nn.initializers.zeros
"""What ends a residual branch begins at zero, so that a new block changes nothing."""


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Returns the description of a U-Net.

    Args:
        image: side of the (square) images, in pixels; each size after the first halves it.
        colours: channels of the images.
        channels: base channels; size i has `channels · multipliers[i]`.
        blocks: residual blocks of each size on the way down; one more on the way up.
        attention: sides of the images that have attention after every block; the middle always has.
        steps: of the diffusion; noise grows linearly from a variance of 1e-4 to one of 0.02 a step.
        norm: makes a norm module from `dtype`, `param_dtype` and `name`.
        dtype, param_dtype: of activations and products, and of parameters as kept.
        dropout: rate within residual blocks.
    Raises:
        BadInput: when the image cannot be halved so often.
    """

    image: int = 16
    colours: int = 3
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 1
    attention: tuple[int, ...] = (8,)
    steps: int = 1000
    norm: Callable[..., nn.Module] = GROUP_NORM_32
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.image % 2 ** (len(self.multipliers) - 1):
            halved = len(self.multipliers) - 1
            raise BadInput(f"image={self.image} is halved {halved} times; choose a multiple of {2**halved}")

    @property
    def kinds(self) -> dict[str, Any]:
        """The two dtypes, as modules take them."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    @property
    def convolution(self) -> Callable[..., nn.Module]:
        """A 3×3 convolution from its `features`, perhaps `strides`, and `name`."""
        return functools.partial(nn.Conv, kernel_size=(3, 3), **self.kinds)


class Time(nn.Module):
    """Returns what every block reads of the diffusion's step.

    Call: `times [batch] integers → [batch, 4 · channels]`.
    """

    config: UNetConfig

    @nn.compact
    def __call__(self, times: Array) -> Array:
        c = self.config
        half = c.channels // 2
        speeds = np.exp(-np.log(10000.0) * np.arange(half) / (half - 1)).astype(np.float32)
        angles = times[:, None].astype(jnp.float32) * speeds
        x = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1).astype(c.dtype)
        x = nn.swish(nn.Dense(4 * c.channels, name="up", **c.kinds)(x))
        return nn.Dense(4 * c.channels, name="out", **c.kinds)(x)


class PixelAttention(nn.Module):
    """Returns x + attention of every pixel over all, with one head.

    Call: `x [batch, height, width, channels]` → the same shape.
    """

    config: UNetConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, (batch, height, width, channels) = self.config, x.shape
        dense = functools.partial(nn.Dense, channels, **c.kinds)
        y = c.norm(name="norm", **c.kinds)(x).reshape(batch, height * width, channels)
        query, key, value = (dense(name=name)(y) for name in ("query", "key", "value"))
        weights = attention_weights(query[:, :, None], key[:, :, None], None)[:, 0].astype(c.dtype)
        y = dense(name="out", kernel_init=ZERO)(jnp.einsum("bqk,bkc->bqc", weights, value))
        return x + y.reshape(x.shape)


class Block(nn.Module):
    """Returns shortcut(x) + two convolutions of x, between which the time is added; then attention, perhaps.

    Call: `x [batch, height, width, channels in], time [batch, n] → [batch, height, width, channels]`.
    """

    config: UNetConfig
    channels: int
    attends: bool

    @nn.compact
    def __call__(self, x: Array, time: Array, deterministic: bool) -> Array:
        c = self.config
        y = nn.swish(c.norm(name="norm_in", **c.kinds)(x))
        y = c.convolution(self.channels, name="in")(y)
        y = y + nn.Dense(self.channels, name="time", **c.kinds)(nn.swish(time))[:, None, None]
        y = nn.swish(c.norm(name="norm_out", **c.kinds)(y))
        y = nn.Dropout(c.dropout)(y, deterministic=deterministic)
        y = c.convolution(self.channels, kernel_init=ZERO, name="out")(y)
        if x.shape[-1] != self.channels:
            x = nn.Conv(self.channels, (1, 1), name="shortcut", **c.kinds)(x)
        return PixelAttention(c, name="attention")(x + y) if self.attends else x + y


class UNet(nn.Module):
    """Returns the noise that is thought to be in the images.

    Blocks are named `Block_0`, `Block_1`, … in the order in which they run.

    Call: `images [batch, height, width, colours], times [batch] → [batch, height, width, colours]`.
    """

    config: UNetConfig

    @nn.compact
    def __call__(self, images: Array, times: Array, deterministic: bool = True) -> Array:
        c = self.config
        time, count = Time(c, name="time")(times), itertools.count()
        widths = [c.channels * m for m in c.multipliers]

        def block(x: Array, width: int, attends: bool) -> Array:
            return Block(c, width, attends, name=f"Block_{next(count)}")(x, time, deterministic)

        x = c.convolution(c.channels, name="stem")(images.astype(c.dtype))
        skips = [x]
        for size, width in enumerate(widths):
            if size:
                x = c.convolution(widths[size - 1], strides=(2, 2), name=f"down_{size}")(x)
                skips.append(x)
            for _ in range(c.blocks):
                x = block(x, width, x.shape[1] in c.attention)
                skips.append(x)
        x = block(block(x, widths[-1], True), widths[-1], False)
        for size, width in reversed([*enumerate(widths)]):
            for _ in range(c.blocks + 1):
                x = block(jnp.concatenate([x, skips.pop()], axis=-1), width, x.shape[1] in c.attention)
            if size:
                x = c.convolution(width, name=f"up_{size}")(doubled(x))
        x = nn.swish(c.norm(name="norm", **c.kinds)(x))
        return c.convolution(c.colours, kernel_init=ZERO, name="head")(x)


def doubled(x: Array) -> Array:
    """Returns images at twice the size, every pixel four times: `[batch, 2 · height, 2 · width, …]`."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def init(config: UNetConfig, key: Array) -> Any:
    """Returns random parameters for `UNet(config)`."""
    images = jax.ShapeDtypeStruct((1, config.image, config.image, config.colours), jnp.float32)
    return UNet(config).lazy_init(key, images, jax.ShapeDtypeStruct((1,), jnp.int32))["params"]


def forward(config: UNetConfig, params: Any, inputs: dict[str, Array]) -> Array:
    """Returns the noise that is thought to be in images, of their shape, in `config.dtype`.

    Args:
        inputs: `images [batch, height, width, colours]` floats, and `times [batch]`, integers below
            `config.steps`: after how many steps of noise each of them is.
    """
    return UNet(config).apply({"params": params}, inputs["images"], inputs["times"])  # type: ignore[return-value]


def loss(config: UNetConfig, params: Any, batch: dict[str, Any], key: Array | None = None) -> Array:
    """Returns the mean square of what the noise is mistaken by, a float32 scalar.

    Args:
        params: as `init` returns them.
        batch: `inputs` as in `forward`, but with clean images, and `noise`, normal, of the images' shape.
        key: a PRNG key for dropout; None turns dropout off.
    """
    times, noise = batch["inputs"]["times"], batch["noise"]
    images = diffuse(config, batch["inputs"]["images"], noise, times)
    rngs = None if key is None else {"dropout": key}
    found = UNet(config).apply({"params": params}, images, times, deterministic=key is None, rngs=rngs)
    return jnp.mean(jnp.square(found.astype(jnp.float32) - noise))  # type: ignore[union-attr]


def diffuse(config: UNetConfig, images: Array, noise: Array, times: Array) -> Array:
    """Returns images after some steps of noise: √ā · images + √(1 − ā) · noise, ā = ∏ (1 − variance).

    Args:
        images, noise: `[batch, height, width, colours]`. times: `[batch]` integers, the last step of each.
    """
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, config.steps))
    left = jnp.take(jnp.asarray(kept, jnp.float32), times, mode="clip")[:, None, None, None]
    return jnp.sqrt(left) * images + jnp.sqrt(1 - left) * noise
