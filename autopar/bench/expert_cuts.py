"""Which dims tensor parallelism cuts: Megatron's choice (Shoeybi et al. 2019), by a parameter's path.

First products of a pair are cut along what comes out, second ones along what goes in, tables of tokens by
rows. The first pattern that is found in a path decides; a parameter without one stays whole.
"""

from __future__ import annotations

from typing import TypeAlias

Cuts: TypeAlias = tuple[tuple[str, int], ...]
"""(regular expression on a path such as `.params['Block_0']['up']['kernel']`, the dim from the end)."""

TRANSFORMER: Cuts = (
    (r"attention.*'(query|key|value)'", -2),  # kernels [hidden, heads, size], biases [heads, size]
    (r"attention.*'out'.*'kernel'", -3),
    (r"'up'(\]\['(kernel|bias)')?\]$", -1),
    (r"'down'(\]\['kernel')?\]$", -2),
    (r"'embedding'\]\['embedding'", -2),
    (r"\w\['bias'\]$", -1),  # of the logits
)

DECODER: Cuts = (
    (r"'(query|key|value)'.*'kernel'", -3),  # [heads, size, hidden]
    (r"'(query|key|value)'.*'bias'", -2),
    (r"'out'.*'kernel'", -2),  # [hidden, heads, size]
    (r"'(gate|up)'.*'kernel'", -2),  # [inner, hidden]
    (r"'(gate|up)'.*'bias'", -1),
    (r"'down'.*'kernel'", -1),
    (r"'(embedding|head)'\]$", -2),
)
"""Kernels as `autopar.models.decoder` keeps them, `[out, in]`."""

CHANNELS: Cuts = ((r"'wide'.*'kernel'", -1), (r"norm_wide", -1), (r"'Block_\d+'\]\['out'.*'kernel'", -2))

UNET: Cuts = (
    (r"'Block_\d+'\]\['(in|time|norm_out)'", -1),
    (r"'Block_\d+'\]\['out'\]\['kernel'", -2),
)

PERCEPTRON: Cuts = (
    (r"\[\d*[02468]\]\['(kernel|bias)'\]", -1),
    (r"\[\d*[13579]\]\['kernel'\]", -2),
)

EXPERT_PARALLEL = r"'experts'\]\['(up|down)'"
"""`[experts, …]`."""

CACHE = r"cache"
"""Keys and values `[blocks, heads, …]` of earlier tokens."""

STACKED = r"\['Blocks'\]"
"""Parameters of all blocks at once, `[layers, …]`."""
