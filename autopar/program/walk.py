"""One symbolic run of a program: the engine under the checker and the simulator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from autopar.core.errors import ProgramError
from autopar.core.program import (
    Buffer,
    Free,
    Instruction,
    Program,
    Recv,
    Rename,
    Run,
    Send,
    Worker,
    reads,
    writes,
)


@dataclass(frozen=True, slots=True)
class Step:
    """One executed instruction: index in its worker's list, seconds of start and stop."""

    worker: int
    index: int
    instruction: Instruction
    start: float
    stop: float


@dataclass
class Walk:
    """The state of a symbolic run.

    Attributes:
        errors: for the engineer. steps: what was executed, in an order in which one thread could.
        peak: most bytes of buffers on a device of each worker.
        beside: for each worker, segment → most bytes of buffers that it holds while the segment runs, other
            than those that the segment reads and makes.
    """

    program: Program
    seconds: Callable[[int, Instruction], float] = lambda worker, instruction: 0.0
    wire: Callable[[int, Send], float] = lambda worker, send: 0.0
    buffered: bool = True
    steps: list[Step] = field(default_factory=list[Step])
    errors: list[str] = field(default_factory=list[str])
    peak: list[int] = field(default_factory=list[int])
    beside: list[dict[str, int]] = field(default_factory=list[dict[str, int]])

    def run(self) -> Walk:
        """Runs until no worker can go on; what is then left over is an error."""
        workers = self.program.workers
        self._next = [0] * len(workers)
        self._now = [0.0] * len(workers)
        self._size = [_sizes(worker, self.program.microbatches) for worker in workers]
        self._live = [{b: self._size[s](b) for b in (*w.state, *w.feeds)} for s, w in enumerate(workers)]
        self._read: list[set[Buffer]] = [set() for _ in workers]
        self._bytes = [sum(live.values()) for live in self._live]
        self.peak = list(self._bytes)
        self.beside = [{} for _ in workers]
        self._added = [Counter[Buffer]() for _ in workers]
        self._mail: dict[str, tuple[float, int, tuple[Buffer, ...]]] = {}
        self._link: dict[tuple[int, int], float] = {}
        while (worker := next(self._ready(), None)) is not None:
            self._execute(worker)
        self._leftovers()
        return self

    def refuse(self, others: Sequence[str] = ()) -> None:
        """Raises ProgramError with the first few errors of the run and those that its reader found."""
        errors = [*self.errors, *others]
        if errors:
            more = f" (and {len(errors) - 3} more)" if len(errors) > 3 else ""
            raise ProgramError("; ".join(errors[:3]) + more)

    def _ready(self) -> Iterator[int]:
        """Workers that can execute their next instruction, the one furthest behind in time first."""
        for w in sorted(range(len(self._now)), key=lambda w: self._now[w]):
            instruction = self._peek(w)
            match instruction:
                case None:
                    continue
                case Recv(tag=tag) if tag not in self._mail:
                    continue
                case Send(to=to, tag=tag) if not self.buffered and not self._awaits(to, tag):
                    continue
                case _:
                    yield w

    def _peek(self, worker: int) -> Instruction | None:
        instructions = self.program.workers[worker].instructions
        return instructions[self._next[worker]] if self._next[worker] < len(instructions) else None

    def _awaits(self, worker: int, tag: str) -> bool:
        other = self._peek(worker)
        return isinstance(other, Recv) and other.tag == tag

    def _execute(self, w: int) -> None:
        instruction, index = self._peek(w), self._next[w]
        assert instruction is not None
        for buffer in reads(instruction):
            if buffer not in self._live[w]:
                self.errors.append(
                    f"worker {w} #{index} {instruction}: {buffer} is not there (freed or never made)"
                )
            elif not isinstance(instruction, Free):
                self._read[w].add(buffer)
        start = self._now[w]
        stop = start + self.seconds(w, instruction)
        match instruction:
            case Send(buffers=buffers, to=to, tag=tag):
                if tag in self._mail:
                    self.errors.append(f"worker {w} #{index}: tag {tag} is sent twice")
                leave = max(stop, self._link.get((w, to), 0.0))
                self._link[w, to] = leave + self.wire(w, instruction)
                self._mail[tag] = (self._link[w, to], w, buffers)
            case Recv(buffers=buffers, source=source, tag=tag):
                arrived, sender, sent = self._mail.pop(tag)
                stop = max(stop, arrived)
                if sender != source or sent != buffers:
                    self.errors.append(f"worker {w} #{index}: tag {tag} brings other buffers than expected")
            case _:
                pass
        self._store(w, instruction)
        self.steps.append(Step(w, index, instruction, start, stop))
        self._next[w], self._now[w] = index + 1, stop

    def _store(self, w: int, instruction: Instruction) -> None:
        live = self._live[w]
        match instruction:
            case Free(buffers=buffers):
                for buffer in buffers:
                    self._bytes[w] -= live.pop(buffer, 0)
                    if buffer not in self._read[w]:
                        self.errors.append(f"worker {w} frees {buffer}, which nothing has read")
            case Rename(old=old, new=new):
                self._bytes[w] -= live.pop(new, 0)
                live[new] = live.pop(old, 0)
            case Run(segment=name, inputs=inputs, outputs=outputs, donated=donated):
                self._added[w].update({*inputs} & {*outputs})
                others = self._bytes[w] - sum(live.get(b, 0) for b in {*inputs})
                self.beside[w][name] = max(others, self.beside[w].get(name, 0))
                for k in donated:
                    self._bytes[w] -= live.pop(inputs[k], 0)
                self._write(w, instruction)
            case _:
                self._write(w, instruction)
        self.peak[w] = max(self.peak[w], self._bytes[w])

    def _write(self, w: int, instruction: Instruction) -> None:
        for buffer in writes(instruction):
            if buffer not in self._live[w]:
                self._live[w][buffer] = self._size[w](buffer)
                self._bytes[w] += self._live[w][buffer]

    def _leftovers(self) -> None:
        for w, worker in enumerate(self.program.workers):
            if (stuck := self._peek(w)) is not None:
                self.errors.append(f"deadlock: worker {w} waits forever at #{self._next[w]}: {stuck}")
                continue
            for total, times in sorted(self._added[w].items()):
                if times != self.program.microbatches:
                    self.errors.append(f"worker {w} adds {times} micro-batches to {total}")
            kept = {*worker.state, *(b for _, b in worker.results)}
            if missing := sorted(kept.difference(self._live[w])):
                self.errors.append(f"worker {w} ends without {', '.join(map(str, missing))}")
            if extra := [b for b in self._live[w] if b not in kept]:
                self.errors.append(f"worker {w} never frees {', '.join(map(str, extra))}")
        self.errors += [f"tag {tag} is sent but never received" for tag in self._mail]


def _sizes(worker: Worker, microbatches: int) -> Callable[[Buffer], int]:
    known = {slot.value: slot.nbytes for slot in worker.slots}
    return lambda buffer: known[buffer.value]
