"""The models and meshes that plans are compared on: small enough to compile in seconds, each of its kind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autopar import cluster as room
from autopar.core.errors import BadInput, UnknownName
from autopar.core.mesh import Mesh
from autopar.models import catalog, layers
from autopar.models.step import ModelStep
from autopar.trace.gradient import value_and_grad


@dataclass(frozen=True)
class Case:
    """A model at a size that a number of devices divides. hidden: width of the residual stream, if any."""

    name: str
    step: ModelStep
    hidden: int | None = None
    mixture: bool = False


def _unit(devices: int) -> int:
    """The factor of all sizes: 8, or 6 where the devices have a factor of three."""
    return 6 if devices % 3 == 0 else 8


def _mlp(unit: int) -> Case:
    wide = 512 * unit
    return Case("mlp", _train("mlp", batch=32 * unit, inputs=wide // 4, hidden=wide, outputs=wide // 4))


def _gpt(unit: int, scan: bool = False) -> Case:
    sizes = {"layers": 2, "hidden": 64 * unit, "heads": unit, "vocabulary": 1024 * unit}
    step = _train("gpt-tiny", batch=2 * unit, sequence=32 * unit, scan_layers=scan, **sizes)
    return Case("gpt-scan" if scan else "gpt", step, 64 * unit)


def _moe(unit: int) -> Case:
    sizes = {"layers": 2, "hidden": 64 * unit, "heads": unit, "vocabulary": 1024 * unit, "experts": unit}
    step = _train("moe-tiny", batch=2 * unit, sequence=32 * unit, expansion=4, **sizes)
    return Case("moe", step, 64 * unit, mixture=True)


def _wide_resnet(unit: int) -> Case:
    norm = functools.partial(layers.group_norm, unit)
    sizes = {"channels": 8 * unit, "blocks": (1, 1, 1), "image": 32, "classes": 128 * unit, "norm": norm}
    return Case("wresnet", _train("wresnet-tiny", batch=8 * unit, **sizes))


def _decode(unit: int) -> Case:
    sizes = {
        "layers": 2,
        "hidden": 64 * unit,
        "heads": unit,
        "vocabulary": 1024 * unit,
        "positions": 64 * unit,
    }
    return Case(
        "opt-decode",
        catalog.get_decode("opt-tiny", batch=2 * unit, length=64 * unit, dtype="float32", **sizes),
    )


def _train(name: str, **sizes: Any) -> ModelStep:
    return catalog.get(name, value_and_grad=value_and_grad, **sizes)


CASES: dict[str, Callable[[int], Case]] = {
    "mlp": _mlp,
    "gpt": _gpt,
    "moe": _moe,
    "wresnet": _wide_resnet,
    "gpt-scan": functools.partial(_gpt, scan=True),
    "opt-decode": _decode,
}


def case(name: str, devices: int) -> Case:
    """Returns a model sized for so many devices. Raises UnknownName."""
    if name not in CASES:
        raise UnknownName("model of the plan benchmark", name, CASES)
    return CASES[name](_unit(devices))


def mesh_of(text: str, device: str, network: float) -> Mesh:
    """Returns the mesh of a shape such as "2x4": the first of several axes runs between nodes.

    Args:
        device: a name of the device database. network: bytes/s of a node's card, shared by its devices.

    Raises:
        BadInput: not numbers of at least 1 joined by "x".
    """
    try:
        shape = tuple(int(n) for n in text.lower().replace("×", "x").split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise BadInput(f"a mesh is written like 2x4 (numbers of at least 1 joined by x), got {text!r}")
    while len(shape) > 1 and shape[0] == 1:  # 1x8 is one node of eight
        shape = shape[1:]
    nodes = shape[0] if len(shape) > 1 else 1
    size = 1
    for n in shape:
        size *= n
    kind = room.device(device)
    found = room.Cluster(
        tuple(room.Node(f"n{i}", kind, size // nodes) for i in range(nodes)), network=network
    )
    return room.shaped(found, shape).mesh
