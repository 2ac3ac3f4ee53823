"""Runs one worker's instructions over its buffers; the same code in every backend.

An instruction is matched once, when the program is loaded, and becomes a closure over positions in a list of
registers. A step then costs one call per instruction and no dictionary look-ups.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    Zero,
    reads,
    writes,
)
from autopar.core.timeline import Event
from autopar.runtime import kernels
from autopar.runtime.picks import getter, putter

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
        self._absorbed, self._made = set[int](), dict[int, Sequence[Buffer]]()
        self.operations = [self._bind(i) for i in range(len(worker.instructions))]

    # -- buffers

    def load(self, arrays: Mapping[Buffer, Array]) -> None:
        """Puts arrays, already in the worker's layout, into buffers."""
        for buffer, array in arrays.items():
            self._registers[self._index[buffer]] = array

    def fetch(self, buffers: Iterable[Buffer]) -> list[Array]:
        """Returns what buffers hold now (None: nothing)."""
        return [self._registers[self._index[buffer]] for buffer in buffers]

    def getter(self, buffers: Sequence[Buffer]) -> Callable[[], Sequence[Array]]:
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
            jax.block_until_ready(self.fetch(self._made.get(at) or writes(instruction)))
            if not isinstance(instruction, Free | Rename):
                stop = time.perf_counter()
                events.append(_event(self.worker.stage, instruction, begun - start, stop - start))
        return events

    # -- binding

    def _get(self, buffers: Sequence[Buffer]) -> Callable[[Registers], Sequence[Array]]:
        return getter([self._index[buffer] for buffer in buffers])

    def _put(self, buffers: Sequence[Buffer]) -> Callable[[Registers, Sequence[Array]], None]:
        return putter([self._index[buffer] for buffer in buffers])

    def _bind(self, position: int) -> Operation:
        match instruction := self.worker.instructions[position]:
            case Run():
                return self._run(position, instruction)
            case Send():
                return self._send(instruction)
            case Recv():
                return self._recv(instruction)
            case Zero():
                return self._zero(instruction)
            case Accumulate(concat=True):
                return self._append(instruction, final=position in self._last_piece)
            case Accumulate():
                return self._accumulate(instruction, donate=position in self._dies)
            case _ if position in self._absorbed:
                return _nothing
            case Rename():
                return self._renames(position)
            case Free(buffers=buffers):
                return self._drop([self._index[buffer] for buffer in buffers])

    def _run(self, position: int, run: Run) -> Operation:
        """A Run, its results put where the Renames after it would put them."""
        names, freed = self._absorb(position, run)
        self._made[position] = names
        function, get, put = self._functions[run.segment], self._get(run.inputs), self._put(names)
        gone = dict.fromkeys([*(run.inputs[k] for k in run.donated), *freed])
        dead = [self._index[buffer] for buffer in gone.keys() - {*names}]

        def operation(registers: Registers) -> None:
            put(registers, function(*get(registers)))
            for i in dead:
                registers[i] = None

        return operation

    def _absorb(self, position: int, run: Run) -> tuple[list[Buffer], list[Buffer]]:
        """Returns what a Run's outputs are called, and what is free, after the Frees and Renames behind it.

        As far as those only give its outputs other names: they have nothing left to do then.
        """
        names, freed = {buffer: buffer for buffer in run.outputs}, list[Buffer]()
        for at in range(position + 1, len(self.worker.instructions)):
            match self.worker.instructions[at]:
                case Free(buffers=buffers) if not {*buffers} & {*names.values()}:
                    freed.extend(buffers)
                case Rename(old=old, new=new) if names.get(old) == old and self._lies_alike(old, new):
                    names[old] = new
                case _:
                    break
            self._absorbed.add(at)
        return list(names.values()), freed

    def _lies_alike(self, a: Buffer, b: Buffer) -> bool:
        return self._sharding(a) == self._sharding(b)

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

    def _zero(self, zero: Zero) -> Operation:
        kept = {slot.value: slot for slot in self.worker.slots}
        slots = [kept[buffer.value] for buffer in zero.buffers]
        shapes, dtypes = tuple(slot.shape for slot in slots), tuple(slot.dtype for slot in slots)
        make = kernels.zeros(shapes, dtypes, tuple(map(self._sharding, zero.buffers)))
        put = self._put(zero.buffers)
        return lambda registers: put(registers, make())

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
        """All Renames in a row from this position on; those after the first have nothing left to do.

        State that was made or read in another layout before it takes its name is moved to its own.
        """
        pairs: list[tuple[int, int, Any]] = []
        for at, rename in enumerate(self.worker.instructions[first:], first):
            if not isinstance(rename, Rename):
                break
            same = self._lies_alike(rename.old, rename.new)
            place = None if same else kernels.begin(1.0, (self._sharding(rename.new),), True)
            pairs.append((self._index[rename.old], self._index[rename.new], place))
            self._absorbed.add(at)

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
