"""A device kind, and a mesh of devices of one kind with a bandwidth and a latency on every axis."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from autopar.core.errors import BadInput


@dataclass(frozen=True)
class Device:
    """One kind of device, with the rates a program really reaches (not the peak on the box).

    Attributes:
        name: e.g. "V100-16GB".
        memory: usable bytes.
        bandwidth: effective bytes/s of its memory.
        flops: (dtype name, effective FLOP/s) pairs; a dtype that is missing is not supported in hardware.
        link: bytes/s of one device's link to its node's other devices.
        link_latency: seconds to start a collective step inside a node.
    """

    name: str
    memory: int
    bandwidth: float
    flops: tuple[tuple[str, float], ...]
    link: float
    link_latency: float = 5e-6

    def __post_init__(self) -> None:
        rates = {"memory": self.memory, "bandwidth": self.bandwidth, "link": self.link, **dict(self.flops)}
        for name, rate in rates.items():
            if not (rate > 0 and math.isfinite(rate)):
                raise BadInput(f"device {self.name}: {name} must be a positive finite number, got {rate}")
        if not self.flops:
            raise BadInput(f"device {self.name}: flops must name at least one dtype")
        if not (self.link_latency >= 0 and math.isfinite(self.link_latency)):
            raise BadInput(f"device {self.name}: link_latency must be seconds ≥ 0, got {self.link_latency}")

    def supports(self, dtype: str) -> bool:
        """Returns whether matrix products of this dtype run at a hardware rate."""
        return any(name == dtype for name, _ in self.flops)

    def rate(self, dtype: str) -> float:
        """Returns FLOP/s for `dtype`; an unsupported type runs at the float32 rate."""
        rates = dict(self.flops)
        return rates.get(dtype, rates.get("float32", min(rates.values())))

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Axis:
    """One axis of a mesh: bytes/s that each device has on it, and seconds to start a collective step."""

    name: str
    size: int
    bandwidth: float
    latency: float

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"axis {self.name!r}: expected a size of at least 1, got {self.size}")


@dataclass(frozen=True)
class Mesh:
    """Devices of one kind, arranged on named axes, slowest links first (major axis = between nodes)."""

    device: Device
    axes: tuple[Axis, ...]

    def __post_init__(self) -> None:
        if len({axis.name for axis in self.axes}) != len(self.axes):
            raise ValueError(f"axis names must differ, got {[axis.name for axis in self.axes]}")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(axis.name for axis in self.axes)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def axis(self, name: str) -> Axis:
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise KeyError(f"no axis {name!r} in mesh {self}")

    def ways(self, names: Iterable[str]) -> int:
        """Returns how many parts a dim is cut into when it is sharded over these axes."""
        return math.prod(self.axis(name).size for name in names)

    def __str__(self) -> str:
        return f"{self.device.name} {'×'.join(map(str, self.shape)) or '1'}"
