"""Where parameters come from: sources that give a slice of a leaf and read no more than that."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from autopar.core.errors import BadInput

Index = tuple[slice, ...]
Shapes = Mapping[str, jax.ShapeDtypeStruct]
CHUNK = 1 << 16
"""Elements of a leaf that one stream of random numbers makes."""


class WeightSource(Protocol):
    """A model's parameters, not read yet; can be pickled, so that each worker reads what it holds.

    Attributes:
        shapes: shape and dtype of each leaf by its path, such as `Block_0/query/kernel`.
    """

    @property
    def shapes(self) -> Shapes: ...

    def read(self, path: str, index: Index | None = None, dtype: Any = None) -> np.ndarray:
        """Returns a slice of a leaf.

        Args:
            path: a key of `shapes`.
            index: a slice per dim, without steps; None for the whole leaf.
            dtype: what to cast to; None for the leaf's dtype.
        """
        ...


def by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree of dictionaries by their paths, keys joined by "/"."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {"/".join(str(k.key) for k in path): leaf for path, leaf in leaves}


def read_all(source: WeightSource, tree: Any, dtype: Any = None) -> Any:
    """Returns `tree` with each leaf read whole, as numpy arrays.

    Args:
        tree: a tree of dictionaries with the source's paths, of shapes say.
        dtype: what to cast to; None for the leaves' own.
    """
    paths = iter(by_path(tree))
    return jax.tree.map(lambda _: source.read(next(paths), dtype=dtype), tree)


def bounds(index: Index | None, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Returns start and stop per dim.

    Raises:
        BadInput: when the index has steps or is of another number of dims.
    """
    index = tuple(slice(None) for _ in shape) if index is None else tuple(index)
    if len(index) != len(shape) or any(s.step not in (None, 1) for s in index):
        raise BadInput(f"expected a slice without steps for each dim of {tuple(shape)}, but got {index}")
    spans = [s.indices(n)[:2] for s, n in zip(index, shape)]
    return tuple((start, max(start, stop)) for start, stop in spans)


@dataclass(frozen=True)
class RandomWeights:
    """Random parameters, a function of the seed and a leaf's path and shape, however they are sliced.

    Norms' scales are one, biases zero, the rest uniform with a standard deviation of 0.02.

    Args:
        shapes: as in `WeightSource`.
        seed: any integer.
    """

    shapes: Shapes
    seed: int = 0

    def read(self, path: str, index: Index | None = None, dtype: Any = None) -> np.ndarray:
        leaf = self.shapes[path]
        dtype = np.dtype(leaf.dtype if dtype is None else dtype)
        spans = bounds(index, leaf.shape)
        name = path.rsplit("/", 1)[-1]
        if name in ("scale", "bias"):
            return np.full([b - a for a, b in spans], float(name == "scale"), dtype)
        width = math.prod(leaf.shape[1:])
        rows = max(1, CHUNK // max(width, 1))
        (first, last), rest = spans[0], tuple(slice(a, b) for a, b in spans[1:])
        made = np.empty([b - a for a, b in spans], dtype)
        for chunk in range(first // rows, -(-last // rows)):
            at = chunk * rows
            drawn = self._draw(path, chunk, rows * width).reshape(rows, *leaf.shape[1:])
            low, high = max(first, at), min(last, at + rows)
            made[low - first : high - first] = drawn[low - at : high - at][(slice(None), *rest)]
        return made

    def _draw(self, path: str, chunk: int, count: int) -> np.ndarray:
        """Returns float32 of mean 0 and deviation 0.02; the stream is told by its key and counter."""
        digest = hashlib.blake2b(f"{self.seed}/{path}".encode(), digest_size=16).digest()
        # The counter's high word leaves each chunk 2^192 draws of its own.
        bits = np.random.Philox(key=int.from_bytes(digest, "little"), counter=chunk << 192)
        return (np.random.Generator(bits).random(count, np.float32) - 0.5) * np.float32(0.02 * math.sqrt(12))
