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
from autopar.runtime.segments import Compiled, donations, heirs, restorer, slots


@dataclass(frozen=True)
class Blob:
    """One exported segment.

    Attributes:
        data: what `jax.export` made of it.
        inputs: (shape, dtype, spec) of each. donated: positions of those whose memory it may take.
        order: which output of the segment each result is: those that replace donated inputs come first.
    """

    name: str
    data: bytes
    inputs: tuple[tuple[tuple[int, ...], str, Spec], ...]
    donated: tuple[int, ...]
    order: tuple[int, ...]


class Received:
    """A blob compiled for a worker's devices: takes inputs and gives outputs in the segment's order.

    Args:
        executable: the compiled program (`jax.stages.Compiled`). order: in which its results come.
    """

    def __init__(self, executable: Any, order: Sequence[int]):
        self.executable, self._restore = executable, restorer(order)

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        results = self.executable(*inputs)
        return results if self._restore is None else self._restore(results)


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
    replaced = heirs(worker)
    for name, donated in donations(worker).items():
        segment = program.segment(name)
        compiled = Compiled(lower(traced, segment, sharding, mesh), donated, replaced[name])
        lowered, fun = compiled.lowered, compiled.jitted
        exported = jax.export.export(fun, platforms=platforms)(*lowered.inputs)  # type: ignore[arg-type]
        specs = [
            sharding.layout.get(v, replicated(len(x.shape)))
            for v, x in zip(segment.arguments, lowered.inputs, strict=True)
        ]
        inputs = tuple((x.shape, str(x.dtype), spec) for x, spec in zip(lowered.inputs, specs))
        yield Blob(name, bytes(exported.serialize()), inputs, donated, tuple(compiled.order))


def load(blob: Blob, jmesh: jax.sharding.Mesh) -> Received:
    """Returns the blob compiled for these devices; it takes its inputs as separate arguments.

    An export forgets donations, so they are given again; its results come in the order of what they replace.
    """
    exported = jax.export.deserialize(bytearray(blob.data))
    structs = [layout.struct(jmesh, shape, dtype, spec, blob.name) for shape, dtype, spec in blob.inputs]
    shardings = tuple(x.sharding for x in structs)
    call = jax.jit(exported.call, in_shardings=shardings, donate_argnums=blob.donated)
    return Received(call.lower(*structs).compile(), blob.order)
