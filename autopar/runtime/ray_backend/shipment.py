"""What a worker is sent once: its stage's nouns, and its segments as portable programs (`jax.export`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.export

from autopar.core.mesh import Mesh
from autopar.core.plan import Plan
from autopar.core.program import Program, Slot, Worker
from autopar.runtime import layout
from autopar.runtime.lower import lower
from autopar.runtime.segments import donations, slots


@dataclass(frozen=True)
class Blob:
    """One exported segment. inputs: (shape, dtype, spec) of each; donated: positions it may overwrite."""

    name: str
    data: bytes
    inputs: tuple[tuple[tuple[int, ...], str, Any], ...]
    donated: tuple[int, ...]


@dataclass(frozen=True)
class Shipment:
    """All a worker needs; it can be pickled without JAX.

    Attributes:
        worker: the stage's instructions. blobs: its segments.
        meshes: of all stages. slots: how values are kept on every stage.
    """

    worker: Worker
    blobs: tuple[Blob, ...]
    meshes: tuple[Mesh, ...]
    slots: tuple[dict[int, Slot], ...]


def shipments(plan: Plan, program: Program, traced: Any, platforms: Sequence[str]) -> list[Shipment]:
    """Returns one shipment per stage; segments are lowered and exported here, so that workers need no
    user code.

    Raises:
        PlanError: a layout that cannot be realised.
    """
    meshes = tuple(stage.mesh for stage in plan.stages)
    kept = tuple(slots(stage, worker) for stage, worker in zip(plan.stages, program, strict=True))
    return [
        Shipment(worker, tuple(_blobs(plan, program, worker, traced, platforms)), meshes, kept)
        for worker in program
    ]


def _blobs(plan: Plan, program: Program, worker: Worker, traced: Any, platforms: Sequence[str]) -> list[Blob]:
    sharding = plan.stages[worker.stage].sharding
    mesh = layout.abstract_mesh(sharding.mesh)
    found: list[Blob] = []
    for name, donated in donations(worker).items():
        lowered = lower(traced, program.segment(name), sharding, mesh)
        fun = jax.jit(
            lambda *inputs, fun=lowered.fun: fun(list(inputs)),
            in_shardings=tuple(x.sharding for x in lowered.inputs),
            out_shardings=[x.sharding for x in lowered.outputs],
        )
        exported = jax.export.export(fun, platforms=list(platforms))(*lowered.inputs)
        specs = [
            sharding.layout.get(v, ((),) * len(x.shape))
            for v, x in zip(program.segment(name).inputs, lowered.inputs)
        ]
        inputs = tuple((x.shape, str(x.dtype), spec) for x, spec in zip(lowered.inputs, specs))
        found.append(Blob(name, bytes(exported.serialize()), inputs, donated))
    return found


def load(blob: Blob, jmesh: jax.sharding.Mesh) -> Any:
    """Returns the blob compiled for these devices (`jax.stages.Compiled`): inputs as separate arguments."""
    exported = jax.export.deserialize(bytearray(blob.data))
    structs = [layout.struct(jmesh, shape, dtype, spec, blob.name) for shape, dtype, spec in blob.inputs]
    call = jax.jit(
        exported.call, in_shardings=tuple(x.sharding for x in structs), donate_argnums=blob.donated
    )
    return call.lower(*structs).compile()
