"""Runs one worker's instructions over its buffers; the same code in every backend.

An instruction is matched once, when the program is loaded, and becomes a closure over positions in a list of
registers. A step then costs one call per instruction and no dictionary look-ups.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Protocol

import jax

from autopar.core.program import (
    Accumulate,
    Buffer,
    Free,
    Instruction,
    Recv,
    Rename,
    Run,
    Send,
    Worker,
    reads,
    writes,
)
from autopar.core.timeline import Event
from autopar.runtime import kernels

Array = Any
Registers = list[Any]
Operation = Callable[[Registers], "bool | None"]
"""Changes registers; False: a message is not there yet, nothing was changed."""


class Transport(Protocol):
    """Moves buffers between workers. Sends are buffered: they never wait for the receiver."""

    def send(self, instruction: Send, arrays: Sequence[Array]) -> Any:
        """Returns what to wait for when the transfer is to be measured (arrays, or None)."""
        ...

    def recv(self, instruction: Recv) -> Sequence[Array] | None:
        """Returns the arrays in the receiver's layout and dtype, or None if they are not there yet."""
        ...


class Interpreter:
    """Holds one worker's buffers and runs its instructions.

    Args:
        worker: the instructions.
        functions: segment name → compiled function of its inputs in order, giving its outputs in order.
        transport: carries Send and Recv.
        sharding: where a buffer lies on this worker.
    """

    def __init__(
        self,
        worker: Worker,
        functions: Mapping[str, Callable[..., Sequence[Array]]],
        transport: Transport,
        sharding: Callable[[Buffer], jax.sharding.Sharding],
    ):
        self.worker, self.at = worker, 0
        self._functions, self._transport, self._sharding = functions, transport, sharding
        self._index = {buffer: i for i, buffer in enumerate(dict.fromkeys(buffers_of(worker)))}
        self._registers: Registers = [None] * len(self._index)
        self._last_piece = _last_pieces(worker.instructions)
        self._dies = _dies_next(worker.instructions)
        self.operations = [self._bind(i) for i in range(len(worker.instructions))]

    # -- buffers

    def load(self, arrays: Mapping[Buffer, Array]) -> None:
        """Puts arrays, already in the worker's layout, into buffers."""
        for buffer, array in arrays.items():
            self._registers[self._index[buffer]] = array

    def fetch(self, buffers: Iterable[Buffer]) -> list[Array]:
        """Returns what buffers hold now (None: nothing)."""
        return [self._registers[self._index[buffer]] for buffer in buffers]

    def getter(self, buffers: Sequence[Buffer]) -> Callable[[], tuple[Array, ...]]:
        """Returns a function that fetches these buffers, for callers that fetch them every step."""
        get = self._get(buffers)
        return lambda: get(self._registers)

    def place(self, buffer: Buffer) -> int:
        """Returns the register of a buffer."""
        return self._index[buffer]

    def take(self, place: int, other: Interpreter, source: int) -> None:
        """Moves what another interpreter of this worker has in a register into one of this one."""
        self._registers[place], other._registers[source] = other._registers[source], None

    def live(self) -> list[Array]:
        """Returns every array held."""
        return [x for x in jax.tree.leaves(self._registers) if x is not None]

    def clear(self) -> None:
        """Drops everything held (after a failed step)."""
        self._registers[:] = [None] * len(self._registers)
        self.at = 0

    # -- running

    def start(self) -> None:
        """Goes back to the first instruction."""
        self.at = 0

    def advance(self) -> bool:
        """Runs until the end (True) or until a message is missing (False)."""
        registers, operations = self._registers, self.operations
        while self.at < len(operations):
            if operations[self.at](registers) is False:
                return False
            self.at += 1
        return True

    def bound(self, position: int) -> Callable[[], bool | None] | None:
        """Returns one instruction as a function, for a caller that orders several workers itself.

        None: an earlier instruction does it already.
        """
        if self.operations[position] is _nothing:
            return None
        return functools.partial(self.operations[position], self._registers)

    def measure(self, start: float) -> list[Event]:
        """Runs the whole step, waiting for each instruction's result, over a transport that waits.

        Args:
            start: `time.perf_counter()` at which the step began.
        Returns:
            One event per instruction that computes or moves data, in seconds since `start`.
        """
        events: list[Event] = []
        for at, instruction in enumerate(self.worker.instructions):
            self.at = at
            begun = time.perf_counter()
            done = self.operations[at](self._registers)
            assert done is not False, "measured steps need a transport that waits"
            jax.block_until_ready(self.fetch(writes(instruction)))
            if not isinstance(instruction, Free | Rename):
                stop = time.perf_counter()
                events.append(_event(self.worker.stage, instruction, begun - start, stop - start))
        return events

    # -- binding

    def _get(self, buffers: Sequence[Buffer]) -> Callable[[Registers], tuple[Array, ...]]:
        index = [self._index[buffer] for buffer in buffers]
        if len(index) == 1:
            only = index[0]
            return lambda registers: (registers[only],)
        return itemgetter(*index) if index else lambda registers: ()

    def _put(self, buffers: Sequence[Buffer]) -> Callable[[Registers, Iterable[Array]], None]:
        index = [self._index[buffer] for buffer in buffers]
        if index and index == list(range(index[0], index[0] + len(index))):
            place = slice(index[0], index[0] + len(index))

            def put_side_by_side(registers: Registers, arrays: Iterable[Array]) -> None:
                registers[place] = arrays

            return put_side_by_side

        def put(registers: Registers, arrays: Iterable[Array]) -> None:
            for i, array in zip(index, arrays, strict=True):
                registers[i] = array

        return put

    def _bind(self, position: int) -> Operation:
        match instruction := self.worker.instructions[position]:
            case Run():
                return self._run(instruction)
            case Send():
                return self._send(instruction)
            case Recv():
                return self._recv(instruction)
            case Accumulate(concat=True):
                return self._append(instruction, final=position in self._last_piece)
            case Accumulate():
                return self._accumulate(instruction, donate=position in self._dies)
            case Rename():
                follows = position > 0 and isinstance(self.worker.instructions[position - 1], Rename)
                return _nothing if follows else self._renames(position)
            case Free(buffers=buffers):
                return self._drop([self._index[buffer] for buffer in buffers])

    def _run(self, run: Run) -> Operation:
        function, get, put = self._functions[run.segment], self._get(run.inputs), self._put(run.outputs)
        dead = [self._index[run.inputs[k]] for k in run.donated]

        def operation(registers: Registers) -> None:
            outputs = function(*get(registers))
            for i in dead:  # before the outputs: one of them may take a dead buffer's name
                registers[i] = None
            put(registers, outputs)

        return operation

    def _send(self, send: Send) -> Operation:
        get, transport = self._get(send.buffers), self._transport

        def operation(registers: Registers) -> None:
            transport.send(send, get(registers))

        return operation

    def _recv(self, recv: Recv) -> Operation:
        put, transport = self._put(recv.buffers), self._transport

        def operation(registers: Registers) -> bool:
            arrays = transport.recv(recv)
            if arrays is None:
                return False
            put(registers, arrays)
            return True

        return operation

    def _accumulate(self, fold: Accumulate, donate: bool) -> Operation:
        get, put = self._get(fold.buffers), self._put(fold.sums)
        shardings = tuple(self._sharding(buffer) for buffer in fold.sums)
        if fold.first:
            begin = kernels.begin(fold.scale, shardings, donate)
            return lambda registers: put(registers, begin(get(registers)))
        sums, add = self._get(fold.sums), kernels.add(fold.scale, shardings)
        return lambda registers: put(registers, add(sums(registers), get(registers)))

    def _append(self, fold: Accumulate, final: bool) -> Operation:
        """The pieces wait side by side and are joined once: appending one by one would copy them m times."""
        get, index = self._get(fold.buffers), [self._index[buffer] for buffer in fold.sums]
        places = [buffer.microbatch for buffer in fold.buffers]
        join = kernels.join(tuple(self._sharding(buffer) for buffer in fold.sums))

        def operation(registers: Registers) -> None:
            for i, place, array in zip(index, places, get(registers)):
                if fold.first:
                    registers[i] = {}
                registers[i][place] = array
            if final:
                pieces = [[registers[i][place] for place in sorted(registers[i])] for i in index]
                for i, whole in zip(index, join(pieces)):
                    registers[i] = whole

        return operation

    def _renames(self, first: int) -> Operation:
        """All Renames from this position on; those after the first have nothing left to do.

        State that was made or read in another layout before it takes its name is moved to its own.
        """
        pairs: list[tuple[int, int, Any]] = []
        for rename in itertools.takewhile(lambda i: isinstance(i, Rename), self.worker.instructions[first:]):
            assert isinstance(rename, Rename)
            layouts = self._sharding(rename.old), self._sharding(rename.new)
            place = None if layouts[0] == layouts[1] else kernels.begin(1.0, layouts[1:], True)
            pairs.append((self._index[rename.old], self._index[rename.new], place))

        def operation(registers: Registers) -> None:
            for source, target, place in pairs:
                x = registers[source]
                registers[source] = None
                registers[target] = place([x])[0] if place else x

        return operation

    def _drop(self, index: list[int]) -> Operation:
        def operation(registers: Registers) -> None:
            for i in index:
                registers[i] = None

        return operation


def _nothing(registers: Registers) -> None:
    """What is left of an instruction that an earlier one has done already."""


def buffers_of(worker: Worker) -> Iterable[Buffer]:
    """Returns every buffer a worker ever holds, repeats included."""
    yield from worker.state
    yield from worker.feeds
    for instruction in worker.instructions:
        yield from reads(instruction)
        yield from writes(instruction)
    yield from (buffer for _, buffer in worker.results)


def _last_pieces(instructions: Sequence[Instruction]) -> set[int]:
    """Positions of the Accumulates after which a concatenated value is complete."""
    last: dict[tuple[Buffer, ...], int] = {}
    for position, instruction in enumerate(instructions):
        if isinstance(instruction, Accumulate) and instruction.concat:
            last[instruction.sums] = position
    return set(last.values())


def _dies_next(instructions: Sequence[Instruction]) -> set[int]:
    """Positions of Accumulates whose operands are freed right after: a first sum may take their place."""
    dying: set[int] = set()
    for position, (instruction, following) in enumerate(itertools.pairwise(instructions)):
        if isinstance(instruction, Accumulate) and isinstance(following, Free):
            dying.update([position] if set(instruction.buffers) <= set(following.buffers) else [])
    return dying


def _event(stage: int, instruction: Instruction, start: float, stop: float) -> Event:
    touched = writes(instruction) or reads(instruction)
    microbatch = next((buffer.microbatch for buffer in (*touched, *reads(instruction))), None)
    name = getattr(instruction, "segment", getattr(instruction, "tag", "accumulate"))
    return Event(stage, name, type(instruction).__name__.lower(), start, stop, microbatch)
