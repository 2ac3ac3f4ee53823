"""Wide-ResNet with bottleneck blocks (He et al. 2016; Zagoruyko & Komodakis 2016), normalised per example.

A block is 1×1 to `channels`, 3×3 to `channels · width`, 1×1 to `4 · channels`. Only the inner convolution is
widened, so parameters grow linearly with `width`: this is what gives the ladder of Alpa's paper its names
(250M … 13B are 0.25 … 12.6 billion parameters).

The norm is group norm by default, because batch norm mixes examples: with it a micro-batched step is another
function than the full-batch step. Whoever wants that passes `norm=batch_norm`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from autopar.models.layers import GROUP_NORM_32, cross_entropy

Array = jax.Array

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
"""Blocks of each of the four groups, by the number of layers in the network's name."""


class BatchStatisticsNorm(nn.Module):
    """Returns `x [batch, height, width, channels]` normalised by the batch's own statistics."""

    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=(0, 1, 2))
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=(0, 1, 2)) + 1e-5)
        return (x * scale + bias).astype(self.dtype)


def batch_norm(*, dtype: Any, param_dtype: Any, name: str) -> nn.Module:
    """Returns a batch norm for training (Ioffe & Szegedy 2015). It mixes the examples of a batch."""
    return BatchStatisticsNorm(dtype, param_dtype, name=name)


@dataclass(frozen=True)
class WideResNetConfig:
    """Returns the description of a Wide-ResNet.

    Args:
        blocks: bottleneck blocks in each group; every group after the first halves the image.
        channels: base channels; group i has `channels · 2^i`.
        width: factor on the channels of the 3×3 convolutions.
        classes: outputs. 1024 rather than ImageNet's 1000, so that any mesh divides it.
        image: side of the (square) images, in pixels.
        norm: makes a norm module from `dtype`, `param_dtype` and `name`.
        dtype, param_dtype: as in `GPTConfig`.
    """

    blocks: tuple[int, ...] = (1, 1, 1, 1)
    channels: int = 32
    width: int = 2
    classes: int = 1024
    image: int = 224
    norm: Callable[..., nn.Module] = GROUP_NORM_32
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32


class Block(nn.Module):
    """Returns relu(shortcut(x) + bottleneck(x)).

    Call: `x [batch, height, width, channels in] → [batch, height / stride, width / stride, 4 · channels]`.
    """

    config: WideResNetConfig
    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        kinds = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        conv = functools.partial(nn.Conv, use_bias=False, **kinds)
        strides = (self.stride, self.stride)
        y = nn.relu(c.norm(name="norm_in", **kinds)(conv(self.channels, (1, 1), name="in")(x)))
        y = conv(self.channels * c.width, (3, 3), strides, name="wide")(y)
        y = nn.relu(c.norm(name="norm_wide", **kinds)(y))
        y = c.norm(name="norm_out", **kinds)(conv(4 * self.channels, (1, 1), name="out")(y))
        if x.shape != y.shape:
            x = conv(4 * self.channels, (1, 1), strides, name="shortcut")(x)
            x = c.norm(name="norm_shortcut", **kinds)(x)
        return nn.relu(x + y)


class WideResNet(nn.Module):
    """Returns class logits. Blocks are named `Block_0`, `Block_1`, … through all groups.

    Call: `images [batch, height, width, 3] → logits [batch, classes]`.
    """

    config: WideResNetConfig

    @nn.compact
    def __call__(self, images: Array) -> Array:
        c = self.config
        kinds = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        x = nn.Conv(c.channels, (7, 7), (2, 2), use_bias=False, name="stem", **kinds)(images)
        x = nn.relu(c.norm(name="norm_stem", **kinds)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        index = 0
        for group, count in enumerate(c.blocks):
            for i in range(count):
                stride = 2 if group > 0 and i == 0 else 1
                x = Block(c, c.channels * 2**group, stride, name=f"Block_{index}")(x)
                index += 1
        return nn.Dense(c.classes, name="head", **kinds)(jnp.mean(x, axis=(1, 2)))


def init(config: WideResNetConfig, key: Array) -> Any:
    """Returns random parameters for `WideResNet(config)`."""
    images = jax.ShapeDtypeStruct((1, config.image, config.image, 3), jnp.float32)
    return WideResNet(config).lazy_init(key, images)["params"]


def forward(config: WideResNetConfig, params: Any, images: Array) -> Array:
    """Returns the logits of `images [batch, height, width, 3]`, `[batch, classes]` in `config.dtype`."""
    return WideResNet(config).apply({"params": params}, images)  # type: ignore[return-value]


def loss(config: WideResNetConfig, params: Any, batch: dict[str, Array], key: Array | None = None) -> Array:
    """Returns the mean cross-entropy of the labels, a float32 scalar (nats).

    Args:
        params: as `init` returns them.
        batch: `images [batch, height, width, 3]` floats and `labels [batch]` integers.
        key: unused, there is no dropout.
    """
    return cross_entropy(forward(config, params, batch["images"]), batch["labels"])
