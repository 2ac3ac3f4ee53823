"""How much memory arrays take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax


def fullest(arrays: Sequence[jax.Array]) -> int:
    """Returns the bytes of these arrays on the device of this process that has most of them."""
    held = Counter[Any]()
    for x in arrays:
        for shard in x.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return max(held.values(), default=0)
