"""How a leaf lies in a tensor of a file: a pattern of factors, read by ranges.

A pattern names the factors of each dim of the file's tensor and then those of the leaf, as einops does:
`(h s) d -> h s d` splits rows into heads; `d (1/3 h s) -> h s d` takes the second of three parts of the
columns and transposes; `(h 2/3 s) d -> h s d` takes the last of three parts within each head.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Span = tuple[int, int]


@dataclass(frozen=True)
class View:
    """A tensor of a file as a leaf.

    Args:
        tensor: its name in the file.
        pattern: as above; "" when both are the same.
    """

    tensor: str
    pattern: str = ""

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape that the file's tensor must have for a leaf of `shape`."""
        return tuple(math.prod(size for size, _ in dim) for dim in self._factors(shape, _whole(shape)))

    def read(self, stored: Any, shape: Sequence[int], spans: Sequence[Span]) -> np.ndarray:
        """Returns part of the leaf, reading only what lies in it.

        Args:
            stored: gives numpy arrays when indexed by slices (safetensors' slice, or an array).
            shape: of the whole leaf.
            spans: start and stop per dim of the leaf.
        """
        factors = self._factors(shape, spans)
        array = _read_ranges(stored, [_ranges(dim) for dim in factors])
        names, target = self._names(shape)
        kept = [n for dim in names for n in dim if "/" not in n]
        sizes = [b - a for dim, of in zip(names, factors) for n, (_, (a, b)) in zip(dim, of) if "/" not in n]
        return array.reshape(sizes).transpose([kept.index(n) for n in target])

    def _names(self, shape: Sequence[int]) -> tuple[list[list[str]], list[str]]:
        """Returns the factors' names per stored dim, and in the leaf's order."""
        pattern = self.pattern or "{0} -> {0}".format(" ".join(f"d{i}" for i in range(len(shape))))
        left, right = pattern.split("->")
        dims = [(a or b).split() for a, b in re.findall(r"\(([^)]*)\)|(\S+)", left)]
        return dims, right.split()

    def _factors(self, shape: Sequence[int], spans: Sequence[Span]) -> list[list[tuple[int, Span]]]:
        """Returns size and span of each factor of each stored dim."""
        dims, target = self._names(shape)
        assert len(target) == len(shape), (self, shape)
        known = {name: (size, span) for name, size, span in zip(target, shape, spans)}

        def factor(name: str) -> tuple[int, Span]:
            if "/" not in name:
                return known[name]
            part, parts = map(int, name.split("/"))
            return parts, (part, part + 1)

        return [[factor(name) for name in dim] for dim in dims]


def _whole(shape: Sequence[int]) -> list[Span]:
    return [(0, size) for size in shape]


def _ranges(factors: Sequence[tuple[int, Span]]) -> list[Span]:
    """Returns what of a dim is wanted, as ranges in ascending order."""
    if not factors:
        return [(0, 1)]
    (_, (start, stop)), *rest = factors
    inner, width = _ranges(rest), math.prod(size for size, _ in rest)
    if inner == [(0, width)]:
        return [(start * width, stop * width)]
    return [(i * width + a, i * width + b) for i in range(start, stop) for a, b in inner]


def _read_ranges(stored: Any, ranges: list[list[Span]]) -> np.ndarray:
    """Returns the wanted ranges of each dim side by side."""
    if all(len(dim) == 1 for dim in ranges):
        return np.asarray(stored[tuple(slice(a, b) for ((a, b),) in ranges)])
    made: np.ndarray | None = None
    starts = [list(itertools.accumulate((b - a for a, b in dim), initial=0)) for dim in ranges]
    for piece in itertools.product(*(range(len(dim)) for dim in ranges)):
        part = np.asarray(stored[tuple(slice(*ranges[d][i]) for d, i in enumerate(piece))])
        if made is None:
            made = np.empty([at[-1] for at in starts], part.dtype)
        made[tuple(slice(starts[d][i], starts[d][i + 1]) for d, i in enumerate(piece))] = part
    assert made is not None, "a slice of nothing"
    return made
