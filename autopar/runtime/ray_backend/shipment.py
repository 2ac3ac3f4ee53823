"""What a worker is sent once: its stage's nouns, and its segments as portable programs (`jax.export`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.export

from autopar.core.mesh import Mesh
from autopar.core.plan import Plan
from autopar.core.program import Program, Slot, Worker
from autopar.core.spec import Spec, replicated
from autopar.runtime import layout
from autopar.runtime.lower import lower
from autopar.runtime.segments import Compiled, donations, slots


@dataclass(frozen=True)
class Blob:
    """One exported segment.

    Attributes:
        data: what `jax.export` made of it.
        inputs: (shape, dtype, spec) of each. donated: positions of those whose memory it may take.
    """

    name: str
    data: bytes
    inputs: tuple[tuple[tuple[int, ...], str, Spec], ...]
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


def shipments(plan: Plan, program: Program, traced: Any, platforms: Sequence[str]) -> Iterator[Shipment]:
    """Yields one shipment per stage, lowered and exported here, so that workers need no user code.

    Raises:
        PlanError: a layout that cannot be realised.
    """
    meshes = tuple(stage.mesh for stage in plan.stages)
    kept = tuple(slots(stage, worker) for stage, worker in zip(plan.stages, program, strict=True))
    for worker in program:
        yield Shipment(worker, tuple(_blobs(plan, program, worker, traced, platforms)), meshes, kept)


def _blobs(
    plan: Plan, program: Program, worker: Worker, traced: Any, platforms: Sequence[str]
) -> Iterator[Blob]:
    sharding = plan.stages[worker.stage].sharding
    mesh = layout.abstract_mesh(sharding.mesh)
    for name, donated in donations(worker).items():
        segment = program.segment(name)
        compiled = Compiled(lower(traced, segment, sharding, mesh), donated=())  # an export drops donations
        lowered, fun = compiled.lowered, compiled.jitted
        exported = jax.export.export(fun, platforms=platforms)(*lowered.inputs)  # type: ignore[arg-type]
        specs = [
            sharding.layout.get(v, replicated(len(x.shape))) for v, x in zip(segment.inputs, lowered.inputs)
        ]
        inputs = tuple((x.shape, str(x.dtype), spec) for x, spec in zip(lowered.inputs, specs))
        yield Blob(name, bytes(exported.serialize()), inputs, donated)


def load(blob: Blob, jmesh: jax.sharding.Mesh) -> jax.stages.Compiled:
    """Returns the blob compiled for these devices; it takes its inputs as separate arguments."""
    exported = jax.export.deserialize(bytearray(blob.data))
    structs = [layout.struct(jmesh, shape, dtype, spec, blob.name) for shape, dtype, spec in blob.inputs]
    shardings = tuple(x.sharding for x in structs)
    call = jax.jit(exported.call, in_shardings=shardings, donate_argnums=blob.donated)
    return call.lower(*structs).compile()
