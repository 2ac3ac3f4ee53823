"""One measure for all plans, of the compiled program: α–β over its replica groups, plus a roofline."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

from autopar.bench.hlo import read
from autopar.bench.hlo_traffic import Sent, traffic
from autopar.bench.hlo_work import kernels
from autopar.core.mesh import Mesh
from autopar.core.plan import ShardingPlan
from autopar.sharding.ways.cost import Price, collective, legs
from autopar.sharding.ways.grid import Grid, grid_of

TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "f64": "float64"}


@dataclass(frozen=True)
class Score:
    """What one step of a compiled program does on one device.

    Attributes:
        communication, computation: seconds in the model.
        wire: axis name → bytes one device sends on it. kinds: "kind@axes" → bytes sent.
        flops: of matrix products and convolutions.
        peak: bytes of arguments, results and temporaries at once.
    """

    communication: float
    computation: float
    wire: dict[str, float] = field(default_factory=dict)
    kinds: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0
    peak: int = 0

    @property
    def seconds(self) -> float:
        return self.communication + self.computation

    @property
    def sent(self) -> float:
        return sum(self.wire.values())


def score(text: str, peak: int, mesh: Mesh) -> Score:
    """Returns what a compiled program costs on a mesh.

    Args:
        text: its scheduled HLO for as many devices, numbered row-major over the mesh. peak: its bytes.
    """
    module, grid = read(text), grid_of(mesh)
    seconds = 0.0
    wire: defaultdict[str, float] = defaultdict(float)
    kinds: defaultdict[str, float] = defaultdict(float)
    for sent in traffic(module, grid.sizes):
        price, parts = price_of(sent, grid)
        seconds += sent.count * price.seconds(sent.nbytes)
        kinds[f"{sent.kind}@{''.join(grid.names[a] for a in sent.axes)}"] += (
            sent.count * price.wire * sent.nbytes
        )
        for axis, share in parts.items():
            wire[axis] += sent.count * share * sent.nbytes
    flops = computation = 0.0
    for kernel in kernels(module):
        rate = mesh.device.rate(TYPES.get(kernel.dtype, "float32"))
        flops += kernel.count * kernel.flops
        computation += kernel.count * max(kernel.flops / rate, kernel.nbytes / mesh.device.bandwidth)
    return Score(seconds, computation, dict(wire), dict(kinds), flops, peak)


def price_of(sent: Sent, grid: Grid) -> tuple[Price, dict[str, float]]:
    """Returns the price of a collective, and the bytes sent on every axis per byte of its buffer.

    A group that spans only a part of an axis is priced as an axis of that size.
    """
    spans = dict(sent.sizes)
    local = replace(grid, sizes=tuple(spans.get(a, n) for a, n in enumerate(grid.sizes)))
    parts = {grid.names[leg.axis]: leg.wire for leg in legs(local, sent.kind, sent.axes)}
    return collective(local, sent.kind, sent.axes), parts


def peak_bytes(compiled: Any) -> int:
    """Returns arguments + results + temporaries of one device, memory shared by donation counted once."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def predicted_wire(plan: ShardingPlan) -> dict[str, float]:
    """Returns axis name → bytes that a plan says one device sends on it in one step."""
    grid = grid_of(plan.mesh)
    wire: defaultdict[str, float] = defaultdict(float)
    for c in plan.collectives:
        parts = list(legs(grid, c.kind, tuple(grid.names.index(axis) for axis in c.axes)))
        whole = sum(leg.wire for leg in parts) or 1.0
        for leg in parts:
            wire[grid.names[leg.axis]] += c.count * c.nbytes * leg.wire / whole
    return dict(wire)


def geometric_mean(ratios: list[float]) -> float:
    """Returns the geometric mean of positive numbers; 1 for none."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 1.0
