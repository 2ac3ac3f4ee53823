"""A program: what each worker does in one step, as instructions that a small interpreter can run."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from autopar.core.graph import Phase
from autopar.core.spec import Spec


class Role(enum.StrEnum):
    """What a buffer holds for its value."""

    VALUE = (
        "value"  # the value itself: state, constants, results of the apply phase, one micro-batch's values
    )
    SUM = "sum"  # combined over the micro-batches so far
    NEXT = "next"  # the state that will replace `value` when the step ends


class Buffer(NamedTuple):
    """A name for a tensor on a worker: a value of the graph, of one micro-batch if that is not None.

    A named tuple, unlike the other nouns: big programs have millions, and passes mostly look them up.
    """

    value: int
    microbatch: int | None = None
    role: Role = Role.VALUE

    def __str__(self) -> str:
        mark = {Role.VALUE: "", Role.SUM: "+", Role.NEXT: "'"}[self.role]
        return f"v{self.value}{mark}" + ("" if self.microbatch is None else f".{self.microbatch}")


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the step that one worker runs as one compiled function.

    Attributes:
        name: "forward_0", "apply.1_2" (level 1 on stage 2), or "step".
        stage: who runs it.
        phase: forward and backward run once per micro-batch, apply once per step.
        level: a stage's apply segments run in order of level; a level ends where another stage's result
            is needed.
        equations: indices into the graph's, in order (one without a layer may be in several segments).
        inputs: value ids read; outputs: value ids others need.
        sums: (position among the outputs, scale) of what is summed over micro-batches: the segment is given
            the sums so far after its inputs, and adds to them what it makes, times the scale.
    """

    name: str
    stage: int
    phase: Phase
    level: int
    equations: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    sums: tuple[tuple[int, float], ...] = ()

    @property
    def arguments(self) -> tuple[int, ...]:
        """Value ids of all that the segment's function takes: its inputs, then the values of its sums."""
        return (*self.inputs, *(self.outputs[position] for position, _ in self.sums))


@dataclass(frozen=True, slots=True)
class Run:
    """Run a segment: read `inputs`, write `outputs`; inputs at positions `donated` are dead afterwards."""

    segment: str
    inputs: tuple[Buffer, ...]
    outputs: tuple[Buffer, ...]
    donated: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{_list(self.outputs)} = run {self.segment}({_list(self.inputs)})"


@dataclass(frozen=True, slots=True)
class Send:
    """Send buffers to another stage. Buffered by contract: never waits for the receiver."""

    buffers: tuple[Buffer, ...]
    to: int
    tag: str

    def __str__(self) -> str:
        return f"send {_list(self.buffers)} to {self.to} as {self.tag}"


@dataclass(frozen=True, slots=True)
class Recv:
    """Wait for buffers from another stage; they arrive in this stage's own layout and dtype."""

    buffers: tuple[Buffer, ...]
    source: int
    tag: str

    def __str__(self) -> str:
        return f"{_list(self.buffers)} = recv from {self.source} as {self.tag}"


@dataclass(frozen=True, slots=True)
class Zero:
    """Make sums of nothing, for the first micro-batch to be added to."""

    buffers: tuple[Buffer, ...]

    def __str__(self) -> str:
        return f"{_list(self.buffers)} = zeros"


@dataclass(frozen=True, slots=True)
class Accumulate:
    """Fold one micro-batch's values into their sums: sum = first ? scale·x : sum + scale·x.

    concat: append along dim 0 instead.
    """

    sums: tuple[Buffer, ...]
    buffers: tuple[Buffer, ...]
    first: bool
    scale: float
    concat: bool = False

    def __str__(self) -> str:
        verb = "concat" if self.concat else "accumulate"
        return f"{_list(self.sums)} {'=' if self.first else '+='} {verb} {self.scale:g} {_list(self.buffers)}"


@dataclass(frozen=True, slots=True)
class Rename:
    """Make `new` the only name of the buffer `old`; what `new` held is dropped."""

    old: Buffer
    new: Buffer

    def __str__(self) -> str:
        return f"{self.new} = {self.old}"


@dataclass(frozen=True, slots=True)
class Free:
    """Drop buffers."""

    buffers: tuple[Buffer, ...]

    def __str__(self) -> str:
        return f"free {_list(self.buffers)}"


Instruction: TypeAlias = Run | Send | Recv | Zero | Accumulate | Rename | Free


def _list(buffers: tuple[Buffer, ...]) -> str:
    return " ".join(map(str, buffers)) or "()"


def reads(instruction: Instruction) -> tuple[Buffer, ...]:
    """Returns the buffers an instruction needs."""
    match instruction:
        case Run(inputs=inputs):
            return inputs
        case Send(buffers=buffers) | Free(buffers=buffers):
            return buffers
        case Accumulate(sums=sums, buffers=buffers, first=first):
            return buffers if first else sums + buffers
        case Rename(old=old):
            return (old,)
        case Recv() | Zero():
            return ()


def writes(instruction: Instruction) -> tuple[Buffer, ...]:
    """Returns the buffers an instruction makes."""
    match instruction:
        case Run(outputs=outputs):
            return outputs
        case Recv(buffers=buffers) | Zero(buffers=buffers):
            return buffers
        case Accumulate(sums=sums):
            return sums
        case Rename(new=new):
            return (new,)
        case Send() | Free():
            return ()


@dataclass(frozen=True, slots=True)
class Slot:
    """How one value is kept on one worker: full shape, dtype on that stage, layout, and bytes on one device.

    The slot holds for every buffer of the value (each micro-batch, sum, next) on that worker.
    A combined CONCAT value is `microbatches` times as long in dim 0.
    """

    value: int
    shape: tuple[int, ...]
    dtype: str
    spec: Spec
    nbytes: int


@dataclass(frozen=True)
class Worker:
    """One stage's part of a program.

    Attributes:
        state: buffers there before the first step and after each (parameters, moments, constants).
        feeds: buffers the caller supplies at the start of each step (leaves of the batch, per micro-batch).
        results: (position among the step's outputs, buffer) that the caller may fetch after the step.
        instructions: in order.
        slots: how each value is kept here.
    """

    stage: int
    state: tuple[Buffer, ...]
    feeds: tuple[Buffer, ...]
    results: tuple[tuple[int, Buffer], ...]
    instructions: tuple[Instruction, ...]
    slots: tuple[Slot, ...]

    def slot(self, buffer: Buffer) -> Slot:
        """Returns how this buffer is kept (a linear search: build a dict for many look-ups)."""
        return next(slot for slot in self.slots if slot.value == buffer.value)


@dataclass(frozen=True)
class Program:
    """What every worker does in one step. `segments` are the functions that Run names."""

    workers: tuple[Worker, ...]
    segments: tuple[Segment, ...]
    microbatches: int

    def segment(self, name: str) -> Segment:
        return next(segment for segment in self.segments if segment.name == name)

    def __iter__(self) -> Iterator[Worker]:
        return iter(self.workers)

    def __str__(self) -> str:
        lines: list[str] = []
        for worker in self.workers:
            lines.append(f"worker {worker.stage}: state {_list(worker.state)}; feeds {_list(worker.feeds)}")
            lines += [f"  {instruction}" for instruction in worker.instructions]
            lines.append("  results " + (" ".join(f"{i}:{b}" for i, b in worker.results) or "()"))
        return "\n".join(lines)
