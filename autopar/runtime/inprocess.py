"""The in-process backend: every stage in this process, on disjoint sub-meshes of its devices.

One thread dispatches all stages' instructions; JAX runs them asynchronously, so stages overlap on their own
devices.
"""

from __future__ import annotations

import functools
import textwrap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from autopar.core.errors import BackendError
from autopar.core.plan import Plan, Stage
from autopar.core.program import Buffer, Instruction, Program, Slot, Worker
from autopar.core.timeline import Event, Timeline
from autopar.program import check
from autopar.program.check import beside
from autopar.program.walk import Walk
from autopar.runtime import layout
from autopar.runtime.backend import Fetch, StageMemory
from autopar.runtime.direct import Direct
from autopar.runtime.fill import Arena, Fillers, fill
from autopar.runtime.held import fullest
from autopar.runtime.interpreter import Interpreter
from autopar.runtime.layout import JaxDevice
from autopar.runtime.lower import lower
from autopar.runtime.pool import Pool
from autopar.runtime.segments import Compiled, consumed, donations, heirs, read_once, slots
from autopar.runtime.transfer import LocalTransport, own, share
from autopar.runtime.trees import trees

Array = Any
Sizes = tuple[int, int, int, int]
"""Bytes of a compiled segment's arguments, outputs, temporaries and outputs that reuse arguments."""

PATIENCE = 600.0
"""Seconds a stage of a measured step waits for a message; only a broken program gets there."""


@dataclass(frozen=True)
class InProcess:
    """A backend that runs all stages on this process's devices (`jax.devices()` by default), in order."""

    devices: tuple[JaxDevice, ...] | None = None

    def start(self, plan: Plan, program: Program, traced: Any) -> InProcessSession:
        """Returns a session. Raises BackendError when the plan needs more devices than there are."""
        devices = tuple(jax.devices()) if self.devices is None else tuple(self.devices)
        if len(devices) < plan.devices:
            raise BackendError(
                f"the plan needs {plan.devices} devices, this process has {len(devices)}; to emulate them on "
                f"a CPU set XLA_FLAGS=--xla_force_host_platform_device_count={plan.devices} "
                "before importing jax"
            )
        return InProcessSession(plan, program, traced, devices)


class InProcessSession:
    """A program on sub-meshes of this process's devices; see `backend.Session`."""

    local = True

    def __init__(self, plan: Plan, program: Program, traced: Any, devices: Sequence[JaxDevice]):
        self.plan, self.program, self._devices = plan, program, devices
        self.meshes = _split(plan.stages, devices)
        self._slots = [slots(stage, worker) for stage, worker in zip(plan.stages, program)]
        self.segments = self._lower(traced)
        self._consumed = [consumed(worker) for worker in program]
        self._read_once = [read_once(worker) for worker in program]
        self.transport = LocalTransport(self._slots, self.sharding)
        self.interpreters = [
            Interpreter(worker, self.segments, self.transport.post(s), lambda b, s=s: self.sharding(s, b))
            for s, worker in enumerate(program)
        ]
        self._seen: list[dict[Buffer, Any]] = [{} for _ in program]
        self._pools = [Pool(interpreter) for interpreter in self.interpreters]

    def sibling(
        self, plan: Plan, program: Program, traced: Any, names: Mapping[Buffer, Buffer]
    ) -> InProcessSession:
        other = InProcessSession(plan, program, traced, self._devices)
        for pool, interpreter in zip(self._pools, other.interpreters, strict=True):
            pool.join(interpreter, names)
        other._pools = self._pools
        for s, worker in enumerate(program):  # another thread may be stepping this one: nothing is taken
            held = constants(worker, traced)
            placed = share(list(held.values()), [other.sharding(s, buffer) for buffer in held])
            other.interpreters[s].load(dict(zip(held, placed)))
        return other

    def _take(self) -> None:
        for pool, interpreter in zip(self._pools, self.interpreters):
            pool.take(interpreter)

    def _lower(self, traced: Any) -> dict[str, Compiled]:
        lowered: dict[str, Compiled] = {}
        for s, worker in enumerate(self.program):
            sharding = self.plan.stages[s].sharding
            replaced = heirs(worker)
            for name, donated in donations(worker).items():
                segment = self.program.segment(name)
                low = lower(traced, segment, sharding, self.meshes[s])
                lowered[name] = Compiled(low, donated, replaced[name])
        return lowered

    def sharding(self, stage: int, buffer: Buffer) -> jax.sharding.NamedSharding:
        """Returns where a buffer of a stage lies."""
        return layout.slot_sharding(self.meshes[stage], self.slot(stage, buffer))

    def slot(self, stage: int, buffer: Buffer) -> Slot:
        return self._slots[stage][buffer.value]

    # -- the session protocol

    def load(self, stage: int, arrays: Mapping[Buffer, Array], donate: bool = False) -> None:
        self._take()
        mine = {b: x for b, x in arrays.items() if b in self._consumed[stage] or not isinstance(x, jax.Array)}
        shared = {b: x for b, x in arrays.items() if b not in mine}
        for part, place in ((mine, functools.partial(own, donate=donate)), (shared, share)):
            shardings = [self.sharding(stage, buffer) for buffer in part]
            kept = [layout.as_dtype(self.slot(stage, buffer).dtype) for buffer in part]
            cast = [x if x.dtype == dtype else x.astype(dtype) for x, dtype in zip(part.values(), kept)]
            self.interpreters[stage].load(dict(zip(part, place(cast, shardings))))

    def make(self, stage: int, fillers: Fillers) -> None:
        self._take()
        arena = Arena()
        for buffer, read in fillers.items():
            made = fill(self.slot(stage, buffer), self.sharding(stage, buffer), read, arena)
            self.interpreters[stage].load({buffer: made})

    def drop(self, stage: int, buffers: Sequence[Buffer]) -> None:
        """Lets go of what buffers of this program alone hold; they must be loaded again before a step."""
        self.interpreters[stage].load(dict.fromkeys(buffers))

    def step(self, feeds: Sequence[Mapping[Buffer, Array]]) -> None:
        self._take()
        self._feed(feeds)
        done = 0
        try:
            for operation, _ in self._operations:
                operation()
                done += 1
        except Exception as error:
            error.add_note(f"in the instruction {textwrap.shorten(str(self._operations[done][1]), 200)}")
            self._clear()
            raise

    def measure(self, feeds: Sequence[Mapping[Buffer, Array]]) -> Timeline:
        self._take()
        self._feed(feeds)
        jax.block_until_ready([interpreter.live() for interpreter in self.interpreters])
        self.transport.patience = PATIENCE
        try:
            events = _in_threads([interpreter.measure for interpreter in self.interpreters], self.transport)
        except Exception:
            self._clear()
            raise
        finally:
            self.transport.patience = None
        events.sort(key=lambda event: event.start)
        return Timeline(tuple(events), tuple(map(stage_name, range(len(self.meshes)), self.plan.stages)))

    def fetcher(self, stage: int, buffers: Sequence[Buffer]) -> Fetch:
        get = self.interpreters[stage].getter(buffers)

        def fetch(rows: Sequence[int] | None = None) -> Callable[[], Sequence[Array]]:
            self._take()
            arrays = get()
            return lambda: arrays

        return fetch

    def direct(self, traced: Any) -> Direct | None:
        if len(self.segments) != 1:
            return None
        (segment,) = self.segments.values()
        segment.trees = trees(traced, self.program, self.plan.outputs, segment.lowered)
        return None if segment.trees is None else Direct(segment)

    def compile(self) -> None:
        for segment in self.segments.values():
            _ = segment.executable

    def hlo(self) -> dict[str, str]:
        return {name: segment.text for name, segment in self.segments.items()}

    def compiled_memory(self) -> tuple[StageMemory, ...]:
        found: list[dict[str, Sizes]] = [{} for _ in self.plan.stages]
        for segment in self.program.segments:
            found[segment.stage][segment.name] = sizes(self.segments[segment.name].executable)
        return tuple(map(stage_memory, self.plan.stages, found, beside(self.program)))

    def memory(self) -> tuple[int, ...]:
        return tuple(fullest(interpreter.live()) for interpreter in self.interpreters)

    def close(self) -> None:
        self._clear()
        self.segments.clear()

    # -- inside

    def _clear(self) -> None:
        for interpreter in self.interpreters:
            interpreter.clear()
        self.transport.clear()

    def _feed(self, feeds: Sequence[Mapping[Buffer, Array]]) -> None:
        for stage, feed in enumerate(feeds):
            once, moving = self._read_once[stage], dict[Buffer, Array]()
            for buffer, x in feed.items():
                local = isinstance(x, jax.Array) and self._local(stage, buffer, x)
                if not local and not (buffer in once and not isinstance(x, jax.Array)):
                    moving[buffer] = x
            if moving:
                placed = jax.device_put(list(moving.values()), [self._fed[stage][b] for b in moving])
                feed = {**feed, **dict(zip(moving, placed))}
            self.interpreters[stage].load(feed)

    def _local(self, stage: int, buffer: Buffer, x: jax.Array) -> bool:
        """Whether a feed lies where it should: at once if it lies as the last one did that was looked at."""
        lies, seen = x.sharding, self._seen[stage]
        if seen.get(buffer) is not lies:
            place = self._fed[stage][buffer]
            if not (lies == place or lies.is_equivalent_to(place, x.ndim)):
                return False
            seen[buffer] = lies
        return True

    @cached_property
    def _fed(self) -> list[dict[Buffer, jax.sharding.NamedSharding]]:
        """Where the feeds of each stage lie."""
        return [{b: self.sharding(s, b) for b in worker.feeds} for s, worker in enumerate(self.program)]

    @cached_property
    def _operations(self) -> list[tuple[Callable[[], Any], Instruction]]:
        operations: list[tuple[Callable[[], Any], Instruction]] = []
        for stage, position in dispatch_order(self.program):
            operation = self.interpreters[stage].bound(position)
            if operation is not None:
                operations.append((operation, self.program.workers[stage].instructions[position]))
        return operations


def dispatch_order(program: Program) -> list[tuple[int, int]]:
    """Returns (stage, position) of every instruction in an order in which no receive comes before its send.

    Stages take turns, one instruction each, so that none waits long for its first work.

    Raises:
        ProgramError: a program that is broken, e.g. stages that wait for each other.
    """
    check(program)
    return [(step.worker, step.index) for step in Walk(program, seconds=lambda w, i: 1.0).run().steps]


def constants(worker: Worker, traced: Any) -> dict[Buffer, Array]:
    """Returns the captured constants that a worker holds."""
    return {b: traced.constants[b.value] for b in worker.state if b.value in traced.constants}


def _split(stages: Sequence[Stage], devices: Sequence[JaxDevice]) -> list[jax.sharding.Mesh]:
    meshes, start = list[jax.sharding.Mesh](), 0
    for stage in stages:
        meshes.append(layout.jax_mesh(stage.mesh, devices[start : start + stage.mesh.size]))
        start += stage.mesh.size
    return meshes


def stage_name(index: int, stage: Stage) -> str:
    """Returns what to call a stage before people: "stage 0 · A100-40GB 1×4"."""
    return f"stage {index} · {stage.mesh}"


def sizes(executable: Any) -> Sizes:
    """Returns the compiler's bytes on one device of a `jax.stages.Compiled`."""
    found = executable.memory_analysis()
    return (
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.temp_size_in_bytes,
        found.alias_size_in_bytes,
    )


def stage_memory(stage: Stage, segments: Mapping[str, Sizes], others: Mapping[str, int]) -> StageMemory:
    """Returns what the compiler says of a stage at its worst moment, and what the plan says.

    Args:
        segments: bytes of each. others: what the stage holds beside each (`program.check.beside`).
    """
    predicted, limit = stage.memory.peak, stage.memory.limit
    rows = [
        StageMemory(arguments, outputs, temporary, aliased, others.get(name, 0), name, predicted, limit)
        for name, (arguments, outputs, temporary, aliased) in segments.items()
    ]
    return max(rows, key=lambda row: row.peak, default=StageMemory(0, 0, 0, 0, 0, "", predicted, limit))


def _in_threads(workers: Sequence[Callable[[float], list[Event]]], transport: LocalTransport) -> list[Event]:
    """Runs each stage in a thread of its own; returns all events, or raises the first failure."""
    start, events, failures = time.perf_counter(), list[Event](), list[BaseException]()

    def run(worker: Callable[[float], list[Event]]) -> None:
        try:
            events.extend(worker(start))
        except BaseException as error:
            failures.append(error)
            transport.fail()

    threads = [threading.Thread(target=run, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return events
