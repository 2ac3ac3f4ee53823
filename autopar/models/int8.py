"""Weight-only int8, a scale per output channel (LLM.int8's vector-wise scheme, Dettmers et al. 2022).

A kernel is then `{"int8": [out…, in…], "scale": [out…]}`, a weight being int8 · scale. Activations are not
quantised: a product is of the activations' dtype, summed in float32 and scaled afterwards.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, Any]
INPUTS = {"out": 2}
"""Dims in of the kernels that have more than one."""


def int8_shapes(params: Params) -> Params:
    """Returns a model's parameter shapes with the kernels of its blocks, and an untied head, as int8."""
    made = dict(params)
    for name, block in params.items():
        if name.startswith("Block_"):
            made[name] = {
                part: leaves | {"kernel": _int8(leaves["kernel"], INPUTS.get(part, 1))}
                if "kernel" in leaves
                else leaves
                for part, leaves in block.items()
            }
    if "head" in params:
        made["head"] = _int8(params["head"], 1)
    return made


def quantise(weight: np.ndarray, outer: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns int8 values and float32 scales: the largest weight of a channel becomes 127.

    Args:
        weight: float32, `outer` dims out and then those in.
    """
    inner = tuple(range(outer, weight.ndim))
    largest = np.max(np.abs(weight), axis=inner, initial=0.0)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    values = np.rint(weight / np.expand_dims(scale, inner))
    return values.astype(np.int8), scale


def _int8(kernel: jax.ShapeDtypeStruct, inputs: int) -> Params:
    outer = kernel.shape[: len(kernel.shape) - inputs]
    return {
        "int8": jax.ShapeDtypeStruct(kernel.shape, jnp.int8),
        "scale": jax.ShapeDtypeStruct(outer, jnp.float32),
    }
