"""A segment as one function in which every value is constrained to the layout that the plan gave it.

The partitioner does what was priced only if it is told everything: with every value constrained, a model's
compiled communication agrees with the plan's; with layouts on arguments and results alone it was several
times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from autopar.core.graph import Equation, Graph, Phase
from autopar.core.plan import LoopLayouts, ShardingPlan
from autopar.core.program import Segment
from autopar.core.spec import Spec, replicated
from autopar.runtime import matvec, skinny
from autopar.runtime.kernels import scaled
from autopar.runtime.layout import JaxMesh, named, on_host, struct
from autopar.runtime.order import KEEPING_ORDER, joins
from autopar.sharding.ways.resharding import hops
from autopar.trace import evaluate

Array = Any
NO_JOINS: Mapping[int, Sequence[int]] = {}


@dataclass(frozen=True)
class Lowered:
    """A segment ready to be compiled.

    Attributes:
        name: of the segment.
        fun: list of inputs → list of outputs, pure.
        inputs, outputs: shape, dtype and layout of each.
        options: for the compiler.
    """

    name: str
    fun: Callable[[Sequence[Array]], list[Array]]
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    options: Mapping[str, str] | None = None


def lower(
    traced: Any, segment: Segment, sharding: ShardingPlan, jmesh: JaxMesh, ordered: bool | None = None
) -> Lowered:
    """Returns the function of a segment on a mesh.

    Args:
        traced: the step (`autopar.trace.traced.Traced`).
        segment: which equations.
        sharding: the plan of the segment's stage.
        jmesh: the stage's mesh; an `AbstractMesh` will do for lowering and export.
        ordered: hold the program to the order of the equations where memory depends on it
            (`autopar.runtime.order`); None: if the plan is short of memory, since gradients then are summed
            before the backward goes on, which a compiler could overlap otherwise.

    Raises:
        PlanError: an input or output whose layout does not divide its shape.
    """
    values = traced.graph.values
    after = (
        joins(traced.graph, segment.equations, evaluate.fences(traced))
        if ordered or (ordered is None and sharding.memory.tight)
        else {}
    )

    def boundary(v: int) -> jax.ShapeDtypeStruct:
        spec = sharding.layout.get(v, replicated(len(values[v].shape)))
        name = values[v].name or f"value {v} of {segment.name}"
        return struct(jmesh, values[v].shape, sharding.dtype(values[v].dtype), spec, name)

    def fun(arrays: Sequence[Array]) -> list[Array]:
        run = _Evaluation(traced, _Layouts.of(sharding), _Target(sharding, jmesh, bool(after)), after)
        results = run(segment.equations, dict(zip(segment.inputs, arrays)), segment.outputs)
        for (position, scale), total in zip(segment.sums, arrays[len(segment.inputs) :], strict=True):
            results[position] = total + scaled(results[position], scale)
        return results

    return Lowered(
        segment.name,
        fun,
        tuple(map(boundary, segment.arguments)),
        tuple(map(boundary, segment.outputs)),
        KEEPING_ORDER if after and on_host(jmesh) else None,
    )


@dataclass(frozen=True)
class _Layouts:
    """The layouts of one scope: of a stage's region, or of a loop's body. Fields as in `ShardingPlan`, as
    look-ups."""

    kept: dict[int, Spec]
    reads: dict[tuple[int, int], Spec]
    made: dict[tuple[int, int], Spec]
    loops: dict[int, LoopLayouts]
    held: dict[int, tuple[int, Spec]]

    @classmethod
    def of(cls, plan: ShardingPlan | LoopLayouts) -> _Layouts:
        return cls(
            kept=dict(plan.specs),
            reads={(e, k): spec for e, k, spec in plan.uses},
            made={(e, k): spec for e, k, spec in plan.partials},
            loops={loop.equation: loop for loop in plan.loops},
            held=_held(plan) if isinstance(plan, ShardingPlan) else {},
        )


def _held(plan: ShardingPlan) -> dict[int, tuple[int, Spec]]:
    """Returns value → (the one taken for it, the layout in which that is held); both passes go by there."""
    return {v: (of, at) for again, of, at in plan.held for v in (again, of)}


class _Target:
    """What a segment is lowered to: a mesh, and the element types of its devices."""

    def __init__(self, sharding: ShardingPlan, jmesh: JaxMesh, ordered: bool):
        self.jmesh, self.mesh, self.ordered = jmesh, sharding.mesh, ordered
        self.dtypes, self.products = dict(sharding.dtypes), dict(sharding.products)
        self.regather = sharding.regather
        self.one_host = on_host(jmesh) and jmesh.size == 1

    def constrain(self, x: Array, spec: Spec) -> Array:
        return jax.lax.with_sharding_constraint(x, named(self.jmesh, spec)) if spec else x

    def move(self, x: Array, source: Spec | None, target: Spec) -> Array:
        """Returns x, constrained to every layout on the way that was priced.

        A value without a layout of its own (source None) is made in that of its reader.
        """
        for stop in (target,) if source is None else hops(source, target, x.shape, self.mesh):
            x = self.constrain(x, stop)
        return x

    def bind(self, traced: Any, e: int, operands: Sequence[Array]) -> Sequence[Array]:
        numbers = evaluate.product_of(traced, e) if self.one_host else None
        if numbers is not None and len(operands) == 2:
            lhs, rhs = operands
            spread = matvec.product(lhs, rhs, numbers)
            if spread is None:
                spread = skinny.product(lhs, rhs, numbers, _given(traced.graph, e))
            if spread is not None:
                return [spread]
        return evaluate.bind(traced, e, operands, dtypes=self.dtypes, products=self.products)

    def constant(self, x: Array) -> Array:
        wanted = self.dtypes.get(str(x.dtype))
        return x if wanted is None else x.astype(wanted)


def _given(graph: Graph, e: int) -> tuple[bool, ...]:
    """Returns of each operand whether it is state that came with the step."""
    operands = [v for v in graph.equations[e].inputs if v is not None]
    return tuple(v in graph.inputs and v not in graph.batch for v in operands)


class _Evaluation:
    """One evaluation of equations under their layouts. Moves are kept, so that equal readers share one."""

    def __init__(
        self, traced: Any, layouts: _Layouts, target: _Target, joins: Mapping[int, Sequence[int]] = NO_JOINS
    ):
        self.traced, self.layouts, self.target, self.joins = traced, layouts, target, joins
        self._moved: dict[tuple[int, Spec, bool], Array] = {}

    def fresh(self) -> _Evaluation:
        """Returns another evaluation of the same, without the values of this one."""
        return _Evaluation(self.traced, self.layouts, self.target)

    def __call__(
        self, equations: Sequence[int], env: dict[int, Array], outputs: Sequence[int | None]
    ) -> list[Array]:
        """Returns the outputs' arrays, given those of all inputs in `env`."""
        for e in equations:
            equation = self.traced.graph.equations[e]
            operands = [self._read(e, k, v, env) for k, v in enumerate(equation.inputs) if v is not None]
            results = self._bind(e, equation, operands)
            for k, (v, x) in enumerate(zip(equation.outputs, results, strict=True)):
                env[v] = self._keep(e, k, v, x)
            self._join(self.joins.get(e, ()), env)
        assert None not in outputs, "segments and loop bodies return no literals"
        return [env[v] for v in outputs if v is not None]

    def _join(self, values: Sequence[int], env: dict[int, Array]) -> None:
        """Lets nobody read one of these values before all of them have been computed."""
        if not values:
            return
        moved = [key for key in self._moved if key[0] in values]
        arrays = [*(env[v] for v in values), *(self._moved[key] for key in moved)]
        joined = jax.lax.optimization_barrier(arrays)
        # said once more: what a barrier returns would be laid out as its readers like it
        layouts = [*(self.layouts.kept.get(v) for v in values), *(wanted for _, wanted, _ in moved)]
        joined = [
            x if spec is None else self.target.constrain(x, spec)
            for x, spec in zip(joined, layouts, strict=True)
        ]
        env.update(zip(values, joined))
        self._moved.update(zip(moved, joined[len(values) :], strict=True))

    def _bind(self, e: int, equation: Equation, operands: list[Array]) -> Sequence[Array]:
        if equation.loop is None or e not in self.layouts.loops:
            return self.target.bind(self.traced, e, operands)
        return evaluate.bind_loop(self.traced, e, operands, _Body(self, e, equation))

    def _read(self, e: int, k: int, v: int, env: Mapping[int, Array]) -> Array:
        """An operand in the layout its equation reads it in, reached in the steps that were priced."""
        wanted, kept = self.layouts.reads.get((e, k)), self.layouts.kept.get(v)
        if wanted is None or wanted == kept:
            return env[v]
        again = self._again(e, v)
        if (v, wanted, again) not in self._moved:
            # behind a barrier, or the compiler would merge it with the forward's move and keep the result
            source = jax.lax.optimization_barrier(env[v]) if again else env[v]
            if v in self.layouts.held:
                source, kept = self._held(v, *self.layouts.held[v], env)
            self._moved[v, wanted, again] = self.target.move(source, kept, wanted)
        return self._moved[v, wanted, again]

    def _held(self, v: int, of: int, at: Spec, env: Mapping[int, Array]) -> tuple[Array, Spec]:
        """Returns what is held for both passes, and where; for the backward behind a barrier, or the compiler
        would keep what the forward makes of it."""
        if (of, at, False) not in self._moved:
            self._moved[of, at, False] = self.target.move(env[of], self.layouts.kept.get(of), at)
        held = self._moved[of, at, False]
        return held if v == of else self.target.constrain(jax.lax.optimization_barrier(held), at), at

    def _again(self, e: int, v: int) -> bool:
        """Whether this is a read of state in the backward, for which it is moved again."""
        graph = self.traced.graph
        backward = self.target.regather and graph.equations[e].phase is Phase.BACKWARD
        return backward and (v in graph.inputs or v in graph.constants) and v not in graph.batch

    def _keep(self, e: int, k: int, v: int, x: Array) -> Array:
        """A result reduced first, then scattered: XLA makes a reduce-scatter only of two constraints."""
        made, kept = self.layouts.made.get((e, k)), self.layouts.kept.get(v)
        if kept is None or made is None:
            return x if kept is None else self.target.constrain(x, kept)
        x = self.target.move(self.target.constrain(x, made), made, kept)
        # or every reader would cut its part out of the whole sum, which would be kept for them
        return self.target.constrain(jax.lax.optimization_barrier(x), kept) if self.target.ordered else x


class _Body:
    """A loop's body as a function of one trip's inputs, its values constrained too.

    Carries leave every trip in the layout in which they entered it, or every trip would move them.
    """

    def __init__(self, around: _Evaluation, e: int, equation: Equation):
        assert equation.loop is not None
        self._loop, self._traced = equation.loop, around.traced.bodies[e]
        layouts = _Layouts.of(around.layouts.loops[e])
        self._run = _Evaluation(self._traced, layouts, around.target)
        self._stacked = [
            around.layouts.made.get((e, k), around.layouts.kept.get(v))
            for k, v in enumerate(equation.outputs)
        ]

    def __call__(self, inputs: Sequence[Array]) -> list[Array]:
        """Returns carries, then slices of stacked results; takes constants, carries, slices."""
        body, run = self._loop.body, self._run.fresh()
        env = dict(zip(body.inputs, inputs, strict=True))
        env |= {v: run.target.constant(x) for v, x in self._traced.constants.items()}
        for v in body.inputs:
            if v in run.layouts.kept:
                env[v] = run.target.constrain(env[v], run.layouts.kept[v])
        outputs = run(range(len(body.equations)), env, body.outputs)
        return [self._leave(run, k, v, x) for k, (v, x) in enumerate(zip(body.outputs, outputs))]

    def _leave(self, run: _Evaluation, k: int, v: int | None, x: Array) -> Array:
        if k < self._loop.carries:
            target = run.layouts.kept.get(self._loop.body.inputs[self._loop.consts + k])
        else:
            stacked = self._stacked[k]
            target = None if stacked is None else stacked[1:]
        if target is None:
            return x
        assert v is not None
        kept = run.layouts.kept.get(v, target)
        return run.target.move(x, kept, target)
