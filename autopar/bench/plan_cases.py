"""The models and meshes that plans are compared on: small enough to compile in seconds, each of its kind."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autopar import cluster as room
from autopar.bench.expert_cuts import CHANNELS, DECODER, PERCEPTRON, TRANSFORMER, UNET, Cuts
from autopar.core.errors import BadInput, UnknownName
from autopar.core.mesh import Device, Mesh
from autopar.models import catalog, layers
from autopar.models.step import ModelStep
from autopar.trace.gradient import value_and_grad


@dataclass(frozen=True)
class Case:
    """A model at a size that a number of devices divides, and what a person who shards it by hand knows.

    Attributes:
        cuts: which dims of its parameters tensor parallelism cuts.
        hidden: width of the residual stream, if any.
        mixture: it has experts. images: its activations are images, which can be cut by rows.
    """

    name: str
    step: ModelStep
    cuts: Cuts = TRANSFORMER
    hidden: int | None = None
    mixture: bool = False
    images: bool = False


@dataclass(frozen=True)
class Unit:
    """What sizes are multiples of. width: 8, or 6 if the devices have a factor of three. batch: devices."""

    width: int
    batch: int


def _mlp(u: Unit) -> Case:
    wide = 512 * u.width
    sizes = {"inputs": wide // 4, "hidden": wide, "outputs": wide // 4}
    return Case("mlp", _train("mlp", batch=32 * u.batch, **sizes), PERCEPTRON)


def _text(u: Unit) -> dict[str, int]:
    """The sizes of a model of text."""
    return {
        "layers": 2,
        "hidden": 64 * u.width,
        "heads": u.width,
        "vocabulary": 1024 * u.width,
        "sequence": 32 * u.width,
        "batch": 2 * u.batch,
    }


def _gpt(u: Unit, scan: bool = False) -> Case:
    step = _train("gpt-tiny", scan_layers=scan, **_text(u))
    return Case("gpt-scan" if scan else "gpt", step, hidden=64 * u.width)


def _bert(u: Unit) -> Case:
    return Case("bert", _train("bert-tiny", positions=32 * u.width, **_text(u)), hidden=64 * u.width)


def _vit(u: Unit) -> Case:
    sizes = {"layers": 2, "hidden": 64 * u.width, "heads": u.width}
    image = {"image": 8 * u.width, "patch": 4, "classes": 125 * u.width}
    return Case("vit", _train("vit-tiny", batch=2 * u.batch, **image, **sizes), hidden=64 * u.width)


def _llama(u: Unit) -> Case:
    sizes = {"kv_heads": u.width // 2, "inner": 176 * u.width, "positions": 32 * u.width}
    # head_size 0: that of the new widths
    more = {"head_size": 0, "tied": False, "scan_layers": True}
    return Case("llama", _train("llama-tiny", **_text(u), **sizes, **more), DECODER, hidden=64 * u.width)


def _moe(u: Unit) -> Case:
    step = _train("moe-tiny", experts=u.width, expansion=4, **_text(u))
    return Case("moe", step, hidden=64 * u.width, mixture=True)


def _wide_resnet(u: Unit) -> Case:
    norm = functools.partial(layers.group_norm, u.width)
    sizes = {
        "channels": 8 * u.width,
        "blocks": (1, 1, 1),
        "image": 32,
        "classes": 128 * u.width,
        "norm": norm,
    }
    return Case("wresnet", _train("wresnet-tiny", batch=8 * u.batch, **sizes), CHANNELS, images=True)


def _unet(u: Unit) -> Case:
    norm = functools.partial(layers.group_norm, 4 * u.width)
    sizes = {"channels": 16 * u.width, "image": 4 * u.width, "attention": (2 * u.width,), "norm": norm}
    return Case("unet", _train("unet-tiny", batch=2 * u.batch, **sizes), UNET, images=True)


def _decode(u: Unit) -> Case:
    sizes = _text(u) | {"positions": 64 * u.width, "length": 64 * u.width}
    del sizes["sequence"]
    return Case("opt-decode", catalog.get_decode("opt-tiny", dtype="float32", **sizes), DECODER)


def _train(name: str, **sizes: Any) -> ModelStep:
    return catalog.get(name, value_and_grad=value_and_grad, **sizes)


CASES: dict[str, Callable[[Unit], Case]] = {
    "mlp": _mlp,
    "gpt": _gpt,
    "gpt-scan": functools.partial(_gpt, scan=True),
    "bert": _bert,
    "vit": _vit,
    "moe": _moe,
    "wresnet": _wide_resnet,
    "unet": _unet,
    "llama": _llama,
    "opt-decode": _decode,
}


def case(name: str, devices: int) -> Case:
    """Returns a model sized for so many devices. Raises UnknownName."""
    if name not in CASES:
        raise UnknownName("model of the plan benchmark", name, CASES)
    return CASES[name](Unit(6 if devices % 3 == 0 else 8, devices))


def mesh_of(text: str, device: str, network: float) -> Mesh:
    """Returns the mesh of a shape such as "2x4": the first of several axes runs between nodes.

    Args:
        device: a name of the device database. network: bytes/s of a node's card, shared by its devices.

    Raises:
        BadInput: not numbers of at least 1 joined by "x".
    """
    cluster, shape = cluster_of(text, room.device(device), network)
    return room.shaped(cluster, shape).mesh


def cluster_of(text: str, kind: Device, network: float) -> tuple[room.Cluster, tuple[int, ...]]:
    """Returns the nodes behind a mesh, and its shape. Arguments and errors as in `mesh_of`."""
    try:
        shape = tuple(int(n) for n in text.lower().replace("×", "x").split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise BadInput(f"a mesh is written like 2x4 (numbers of at least 1 joined by x), got {text!r}")
    while len(shape) > 1 and shape[0] == 1:  # 1x8 is one node of eight
        shape = shape[1:]
    nodes = shape[0] if len(shape) > 1 else 1
    each = tuple(room.Node(f"n{i}", kind, math.prod(shape) // nodes) for i in range(nodes))
    return room.Cluster(each, network=network), shape
