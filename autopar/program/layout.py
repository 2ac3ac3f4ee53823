"""Who makes, reads and holds each value of a plan: the facts that `emit` turns into instructions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from autopar.core.dtypes import itemsize
from autopar.core.graph import Combine, Phase
from autopar.core.plan import Plan
from autopar.core.program import Buffer, Role, Segment, Slot
from autopar.core.spec import local_shape, replicated


@dataclass(frozen=True)
class Facts:
    """Look-ups over a plan's segments. A *micro* value exists once per micro-batch, the others once per
    step."""

    plan: Plan

    @cached_property
    def micro(self) -> frozenset[int]:
        """Values that exist once per micro-batch: leaves of the batch and what forward and backward make."""
        made = (v for s in self.plan.segments if s.phase is not Phase.APPLY for v in s.outputs)
        return frozenset(self.plan.batch) | frozenset(made)

    @cached_property
    def makers(self) -> dict[int, tuple[Segment, ...]]:
        """Value → the segments that make it (several when an equation without a layer was copied)."""
        made: dict[int, tuple[Segment, ...]] = {}
        for segment in self.plan.segments:
            for v in segment.outputs:
                made[v] = (*made.get(v, ()), segment)
        return made

    @cached_property
    def readers(self) -> dict[int, tuple[Segment, ...]]:
        """Value → the segments that read it."""
        read: dict[int, tuple[Segment, ...]] = {}
        for segment in self.plan.segments:
            for v in segment.inputs:
                read[v] = (*read.get(v, ()), segment)
        return read

    @cached_property
    def state(self) -> frozenset[int]:
        """Inputs that stay from step to step: every argument that is not the batch, and captured
        constants."""
        return frozenset(self.plan.inputs).difference(self.plan.batch) | frozenset(self.plan.constants)

    @cached_property
    def replaced_by(self) -> dict[int, int]:
        """State value → the value that replaces it when the step ends, where that is another one."""
        pairs: dict[int, int] = {}
        for output, input_ in self.plan.aliases:
            old, new = self.plan.inputs[input_], self.plan.outputs[output]
            if new is None:
                name = self.plan.value[old].name or old
                raise NotImplementedError(
                    f"state {name} is replaced by a literal; return it from a computation"
                )
            if new != old:
                pairs[old] = new
        return pairs

    def made_on(self, value: int, stage: int) -> bool:
        """Returns whether a segment of this stage makes the value."""
        return any(segment.stage == stage for segment in self.makers.get(value, ()))

    def home(self, value: int) -> int:
        """Returns the stage a value is fetched from: the first that makes it, else the first that holds
        it."""
        stages = [s.stage for s in self.makers.get(value, ())] or [
            s.stage for s in self.readers.get(value, ())
        ]
        return min(stages, default=0)

    def holders(self, value: int) -> tuple[int, ...]:
        """Returns the stages that keep a state value: those that read it, or stage 0 if nobody does."""
        return tuple(sorted({s.stage for s in self.readers.get(value, ())})) or (0,)

    def combined(self, value: int) -> bool:
        """Returns whether the value is folded over micro-batches (with a single one there is nothing to
        fold).
        """
        return value in self.micro and self.plan.microbatches > 1

    def summed_where_made(self, value: int) -> bool:
        """Returns whether the one segment that makes a micro-batch's value may add it to the sum right there:
        nobody else wants it by itself."""
        alone = all(r.phase is Phase.APPLY for r in self.readers.get(value, ()))
        return alone and len(self.makers[value]) == 1 and self.combine(value).adds

    def whole(self, value: int) -> Buffer:
        """Returns the buffer that holds a value for the apply phase: its sum, its only micro-batch, or
        itself.
        """
        if value not in self.micro:
            return Buffer(value)
        return Buffer(value, role=Role.SUM) if self.plan.microbatches > 1 else Buffer(value, 0)

    def parts(self, values: Iterable[int], microbatch: int) -> tuple[Buffer, ...]:
        """Returns the buffers of one micro-batch of some values; the values' own where they have none."""
        micro, single = self.micro, self._single
        return tuple([Buffer(v, microbatch) if v in micro else single[v] for v in values])

    def sums(self, values: Iterable[int]) -> tuple[Buffer, ...]:
        """Returns the buffers that micro-batches of some values are folded into."""
        return tuple([self._sum[v] for v in values])

    @cached_property
    def _single(self) -> dict[int, Buffer]:
        return {v: Buffer(v) for v in self.plan.value}

    @cached_property
    def _sum(self) -> dict[int, Buffer]:
        return {v: Buffer(v, role=Role.SUM) for v in self.plan.value}

    def combine(self, value: int) -> Combine:
        """Returns how the value's micro-batches are folded."""
        known = self._combine.get(value)
        assert known is not None, f"value {value} is read after the micro-batches, but not how they combine"
        return known

    @cached_property
    def _combine(self) -> dict[int, Combine]:
        return dict(self.plan.combine)

    def slot(self, value: int, stage: int) -> Slot:
        """Returns how a value is kept on a stage."""
        noun, sharding = self.plan.value[value], self.plan.stages[stage].sharding
        spec = sharding.layout.get(value, replicated(len(noun.shape)))
        dtype = sharding.dtype(noun.dtype)
        size = math.prod(local_shape(noun.shape, spec, sharding.mesh)) * itemsize(dtype)
        return Slot(value, noun.shape, dtype, spec, size)
