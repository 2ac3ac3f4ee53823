"""What an executable needs from whoever runs the stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from autopar.core.plan import Plan
from autopar.core.program import Buffer, Program
from autopar.core.timeline import Timeline
from autopar.runtime.direct import Direct
from autopar.runtime.fill import Fillers

Array = Any


class Fetch(Protocol):
    """Starts fetching what buffers hold; rows of the first dim that are wanted may be named."""

    def __call__(self, rows: Sequence[int] | None = None, /) -> Callable[[], Sequence[Array]]: ...


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes on one device of a stage.

    Attributes:
        arguments, outputs, temporary: of the compiled segment during which the stage needs most.
        aliased: of its outputs, what reuses the memory of donated arguments.
        beside: what the stage holds meanwhile for others: other micro-batches' activations, gradient sums.
        segment: which one that is.
        peak: arguments + outputs − aliased + temporary + beside.
        predicted: what the plan says the device needs at its worst moment.
        limit: what the plan says the device has.
    """

    arguments: int
    outputs: int
    temporary: int
    aliased: int
    beside: int
    segment: str
    predicted: int
    limit: int

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporary + self.beside


class Session(Protocol):
    """A program that has been placed on devices and can be stepped."""

    @property
    def local(self) -> bool:
        """Whether `fetch` hands out the live `jax.Array`s of this process (else copies, as numpy arrays)."""
        ...

    def load(self, stage: int, arrays: Mapping[Buffer, Array], donate: bool = False) -> None:
        """Puts arrays (numpy or JAX, any layout) into a stage's buffers, as copies unless `donate`."""
        ...

    def make(self, stage: int, fillers: Fillers) -> None:
        """Makes arrays in a stage's buffers where they live: zeros, or each device's slice read there."""
        ...

    def sibling(self, plan: Plan, program: Program, traced: Any, names: Mapping[Buffer, Buffer]) -> Session:
        """Returns a session of another program on the same devices, which shares state with this one.

        What one of them leaves in the shared buffers the other finds there. Closing this one closes both.

        Args:
            plan, program, traced: with the same stages and meshes.
            names: state buffer of the other program → the buffer of this session that it is; both keep it in
                the same layout.
        """
        ...

    def step(self, feeds: Sequence[Mapping[Buffer, Array]]) -> None:
        """Starts one step with these feeds per stage; returns before it has finished."""
        ...

    def measure(self, feeds: Sequence[Mapping[Buffer, Array]]) -> Timeline:
        """Returns the measured timeline of one step, waiting for every instruction's result."""
        ...

    def fetcher(self, stage: int, buffers: Sequence[Buffer]) -> Fetch:
        """Returns a function that starts fetching what these buffers hold, and returns one that waits for it.

        What is fetched is what the steps started so far leave in the buffers, whatever is started later. A
        session that is not `local` gives whole numpy arrays, of a typed PRNG key its key data; only the rows
        that are named, if any are. A local one gives the arrays as they are.
        """
        ...

    def direct(self, traced: Any) -> Direct | None:
        """Returns what runs a step in the trees of its function, arguments that are state taken over.

        None where the program or the backend has no such way. To be asked for before anything is compiled.
        """
        ...

    def compile(self) -> None:
        """Compiles every segment now; a step does it otherwise when it first needs one."""
        ...

    def hlo(self) -> dict[str, str]:
        """Returns the compiled text of every segment by name."""
        ...

    def compiled_memory(self) -> tuple[StageMemory, ...]:
        """Returns what the compiler says each stage's devices need."""
        ...

    def memory(self) -> tuple[int, ...]:
        """Returns the bytes held now on the fullest device of each stage."""
        ...

    def close(self) -> None:
        """Drops every array and stops what was started."""
        ...


class Backend(Protocol):
    """Something that can run the stages of a plan."""

    def start(self, plan: Plan, program: Program, traced: Any) -> Session:
        """Returns a session of a program. Raises BackendError when there are too few devices."""
        ...
