"""Sizes of the element types, by the names numpy and JAX share."""

from __future__ import annotations

import functools
import re

_BITS = re.compile(r"(?:bool|[a-z]+?(\d+))(?:_.*)?$")


@functools.cache
def itemsize(dtype: str) -> int:
    """Returns the bytes of one element of `dtype` ("float32", "bfloat16", "float8_e4m3fn", "key<fry>", …).

    Sub-byte types (int4, float4…) count one byte; a typed PRNG key ("key<…>") counts eight.
    """
    if dtype.startswith("key<"):
        return 8
    match = _BITS.match(dtype)
    if match is None:
        raise ValueError(f"expected the name of an element type such as 'float32', got {dtype!r}")
    return max(1, int(match[1]) // 8) if match[1] else 1


def is_inexact(dtype: str) -> bool:
    """Returns whether `dtype` is a floating or complex type."""
    return dtype.startswith(("float", "bfloat", "complex"))
