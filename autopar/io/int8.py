"""A model's weights as int8, quantised channel by channel while they are read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from autopar.io.huggingface import Checkpoint
from autopar.io.weights import Index, Shapes, WeightSource, by_path
from autopar.models.int8 import quantise


@dataclass(frozen=True)
class Int8Weights:
    """Parameters of another source, kernels as `…/int8` and `…/scale`.

    A channel is read whole to know its scale, so a slice of a kernel's inputs reads all of them.

    Args:
        source: of the parameters in floating point.
        shapes: as in `WeightSource`, of what is made of them.
    """

    source: WeightSource
    shapes: Shapes

    def read(self, path: str, index: Index | None = None, dtype: Any = None) -> np.ndarray:
        kernel, _, part = path.rpartition("/")
        if kernel not in self.source.shapes:
            return self.source.read(path, index, dtype)
        leaf = self.shapes[path]
        index = tuple(slice(None) for _ in leaf.shape) if index is None else index
        outer = len(self.shapes[f"{kernel}/scale"].shape)
        dims = len(self.source.shapes[kernel].shape)
        rows = (*index[:outer], *(slice(None) for _ in range(dims - outer)))
        values, scale = quantise(self.source.read(kernel, rows, np.float32), outer)
        made = scale if part == "scale" else values[(slice(None),) * outer + tuple(index[outer:])]
        return made.astype(leaf.dtype if dtype is None or part == "int8" else dtype)


def quantised(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the same model with its kernels in int8: a quarter of float32's bytes, half of 16 bits'."""
    config = dataclasses.replace(checkpoint.config, int8=True)
    shapes = by_path(checkpoint.module.parameter_shapes(config))
    return dataclasses.replace(checkpoint, config=config, weights=Int8Weights(checkpoint.weights, shapes))
