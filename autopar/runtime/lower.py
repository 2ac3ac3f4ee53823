"""A segment as one function in which every value is constrained to the layout that the plan gave it.

The partitioner does what was priced only if it is told everything: with every value constrained, a model's
compiled communication agrees with the plan's; with layouts on arguments and results alone it was several
times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from autopar.core.plan import ShardingPlan
from autopar.core.program import Segment
from autopar.core.spec import Spec, replicated
from autopar.runtime.layout import JaxMesh, named, struct
from autopar.sharding.resharding import hops
from autopar.trace import evaluate

Array = Any


@dataclass(frozen=True)
class Lowered:
    """A segment ready to be compiled.

    Attributes:
        name: of the segment.
        fun: list of inputs → list of outputs, pure.
        inputs, outputs: shape, dtype and layout of each.
    """

    name: str
    fun: Callable[[Sequence[Array]], list[Array]]
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]


def lower(traced: Any, segment: Segment, sharding: ShardingPlan, jmesh: JaxMesh) -> Lowered:
    """Returns the function of a segment on a mesh.

    Args:
        traced: the step (`autopar.trace.traced.Traced`).
        segment: which equations.
        sharding: the plan of the segment's stage.
        jmesh: the stage's mesh; an `AbstractMesh` will do for lowering and export.

    Raises:
        PlanError: an input or output whose layout does not divide its shape.
    """
    values = traced.graph.values

    def boundary(v: int) -> jax.ShapeDtypeStruct:
        spec = sharding.layout.get(v, replicated(len(values[v].shape)))
        name = values[v].name or f"value {v} of {segment.name}"
        return struct(jmesh, values[v].shape, sharding.dtype(values[v].dtype), spec, name)

    def fun(arrays: Sequence[Array]) -> list[Array]:
        run = _Evaluation(traced, sharding, jmesh)
        return run(segment.equations, dict(zip(segment.inputs, arrays, strict=True)), segment.outputs)

    return Lowered(
        segment.name, fun, tuple(map(boundary, segment.inputs)), tuple(map(boundary, segment.outputs))
    )


class _Evaluation:
    """One evaluation of equations under a sharding plan. Moves are kept, so that equal readers share one."""

    def __init__(self, traced: Any, sharding: ShardingPlan, jmesh: JaxMesh):
        self._traced, self._plan, self._jmesh = traced, sharding, jmesh
        self._moved: dict[tuple[int, Spec], Array] = {}

    def __call__(
        self, equations: Sequence[int], env: dict[int, Array], outputs: Sequence[int]
    ) -> list[Array]:
        for e in equations:
            equation = self._traced.graph.equations[e]
            operands = [self._read(e, k, v, env[v]) for k, v in enumerate(equation.inputs) if v is not None]
            results = evaluate.bind(self._traced, e, operands)
            for k, (v, x) in enumerate(zip(equation.outputs, results, strict=True)):
                env[v] = self._keep(e, k, v, x)
        return [env[v] for v in outputs]

    def _read(self, e: int, k: int, v: int, x: Array) -> Array:
        """An operand in the layout its equation reads it in, reached in the steps that were priced."""
        wanted, kept = self._plan.reads.get((e, k)), self._plan.layout.get(v)
        if wanted is None or kept is None or wanted == kept:
            return x
        if (v, wanted) not in self._moved:
            for stop in hops(kept, wanted, x.shape, self._plan.mesh):
                x = self._constrain(x, stop)
            self._moved[v, wanted] = x
        return self._moved[v, wanted]

    def _keep(self, e: int, k: int, v: int, x: Array) -> Array:
        """A result reduced first, then scattered: XLA makes a reduce-scatter only of two constraints."""
        made, kept = self._plan.made.get((e, k)), self._plan.layout.get(v)
        if made is not None and kept is not None:
            x = self._constrain(x, made)
            for stop in hops(made, kept, x.shape, self._plan.mesh):
                x = self._constrain(x, stop)
            return x
        return x if kept is None else self._constrain(x, kept)

    def _constrain(self, x: Array, spec: Spec) -> Array:
        return jax.lax.with_sharding_constraint(x, named(self._jmesh, spec)) if spec else x
