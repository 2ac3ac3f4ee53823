"""The driver's end: workers started, shipped to, stepped and watched."""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from autopar.core.errors import BackendError, StageFailed
from autopar.core.plan import Plan
from autopar.core.program import Buffer, Program
from autopar.core.timeline import Timeline
from autopar.program.check import beside
from autopar.runtime import layout
from autopar.runtime.backend import Fetch, StageMemory
from autopar.runtime.fill import Fillers
from autopar.runtime.inprocess import constants, stage_memory, stage_name
from autopar.runtime.ray_backend.nodes import START, Nodes, demand
from autopar.runtime.ray_backend.shipment import Shipment, shipments
from autopar.runtime.ray_backend.worker import Answer, Setting, StageWorker

Array = Any
Call = Any
"""A `ray.ObjectRef`: a call on a worker, perhaps still under way."""

GRACE = 5.0
"""Seconds in which all workers have said why they stopped, once one has failed."""

LOADING = 3600.0
"""Seconds in which a worker has read its part of the weights."""

AHEAD = 8
"""Steps that may be under way before a new one waits for the oldest."""


class RaySession:
    """A program on worker processes; see `backend.Session`.

    Attributes:
        pids: process ids of the workers. compile_seconds: that each took.
    """

    local = False

    def __init__(
        self,
        plan: Plan,
        program: Program,
        traced: Any,
        nodes: Nodes,
        platform: str,
        timeout: float,
        cache: str | None,
    ):
        self.plan, self.program, self._nodes, self._ray = plan, program, nodes, nodes.ray
        self._timeout, self._temporary = timeout, None if cache or not nodes.emulated else _folder()
        self._workers: list[Any] = []
        self.pids: list[int] = []
        self._steps, self._pending = 0, list[list[Call]]()
        self._platform, self._siblings = platform, 0
        self._failure: StageFailed | None = None
        self._closed = False
        atexit.register(self.close)
        try:
            self._start(traced, platform, cache or self._temporary)
        except BaseException:
            self.close()
            raise

    # starting: nodes start while segments are exported, and workers compile while others' are

    def _start(self, traced: Any, platform: str, cache: str | None) -> None:
        ready = list[Shipment]()
        calls = self._ship(ready, platform, cache) if self._nodes.ready() else []
        for shipment in shipments(self.plan, self.program, traced, [platform]):
            ready.append(shipment)
            if self._workers or self._nodes.ready():
                calls += self._ship(ready, platform, cache)
        calls += self._ship(ready, platform, cache)
        answers = [self._started(s, w.address.remote()) for s, w in enumerate(self._workers)]
        self.pids = [pid for _, pid in answers]
        addresses = [address for address, _ in answers]
        self.compile_seconds: list[float] = self._settle(calls, None)
        self._all([w.connect.remote(addresses) for w in self._workers])

    def _ship(self, ready: list[Shipment], platform: str, cache: str | None) -> list[Call]:
        if not self._workers:
            self._nodes.connect()
            self._create(platform, cache)
        calls = [self._workers[shipment.worker.stage].setup.remote(shipment) for shipment in ready]
        ready.clear()
        return calls

    def _create(self, platform: str, cache: str | None) -> None:
        secret, actor = secrets.token_bytes(32), self._ray.remote(StageWorker)
        gpus = platform == "cuda"
        places = self._nodes.reserve(self.plan, gpus)
        for s, (stage, place) in enumerate(zip(self.plan.stages, places, strict=True)):
            wanted = demand(stage.mesh, gpus)
            taken = {"num_gpus": wanted.pop("GPU", 0), "resources": wanted}
            options = actor.options(max_restarts=0, num_cpus=0, scheduling_strategy=place, **taken)
            setting = Setting(s, stage.mesh.size, platform, secret, self._timeout, cache)
            self._workers.append(options.remote(setting))

    def _started(self, stage: int, call: Call) -> tuple[tuple[str, int], int]:
        errors = self._ray.exceptions
        try:
            return self._ray.get(call, timeout=START)
        except errors.GetTimeoutError:
            raise BackendError(
                f"the worker of stage {stage} did not start within {START:g} s, though its devices were "
                "free; Ray's logs on its node say why"
            ) from None
        except errors.RayError as error:
            raise BackendError(f"the worker of stage {stage} did not start: {_brief(error)}") from None

    # the session protocol

    def load(
        self, stage: int, arrays: Mapping[Buffer, Array], donate: bool = False, program: int = 0
    ) -> None:
        self._check()
        held = {b: _host(x) for b, x in arrays.items()}
        if held:
            self._watch(stage, self._workers[stage].load.remote(held, program))

    def make(self, stage: int, fillers: Fillers, program: int = 0) -> None:
        self._check()
        self._watch(stage, self._workers[stage].make.remote(dict(fillers), program), LOADING)

    def sibling(self, plan: Plan, program: Program, traced: Any, names: Mapping[Buffer, Buffer]) -> Sibling:
        self._finish()
        self._siblings += 1
        calls: list[Call] = []
        for shipment in shipments(plan, program, traced, [self._platform]):
            worker = shipment.worker
            held = {b: _host(x) for b, x in constants(worker, traced).items()}
            setup = self._workers[worker.stage].setup
            calls.append(setup.remote(shipment, self._siblings, dict(names), held))
        self._settle(calls, None)
        return Sibling(self, self._siblings, plan, program)

    def step(self, feeds: Sequence[Mapping[Buffer, Array]], program: int = 0) -> None:
        self._check()
        self._pending.append(self._call_step(feeds, program=program))
        if len(self._pending) > AHEAD:
            self._all(self._pending.pop(0))

    def measure(self, feeds: Sequence[Mapping[Buffer, Array]], program: int = 0) -> Timeline:
        self._finish()
        answers = self._all(self._call_step(feeds, time.time(), program))
        events = sorted((event for found in answers for event in found), key=lambda event: event.start)
        return Timeline(tuple(events), tuple(map(stage_name, range(len(answers)), self.plan.stages)))

    def fetcher(self, stage: int, buffers: Sequence[Buffer], program: int = 0) -> Fetch:
        wanted = list(buffers)
        if not wanted:
            return lambda rows=None: list

        def start(rows: Sequence[int] | None = None) -> Callable[[], Sequence[Array]]:
            self._check()
            call = self._workers[stage].fetch.remote(wanted, program, rows)
            return lambda: self._watch(stage, call)

        return start

    def direct(self, traced: Any) -> None:
        """Returns None: every step goes through the workers."""

    def compile(self) -> None:
        """Nothing to do: workers compile when they are shipped to."""

    def hlo(self, program: int = 0) -> dict[str, str]:
        texts = self._ask(lambda worker: worker.hlo, program)
        return {name: text for each in texts for name, text in each.items()}

    def compiled_memory(self) -> tuple[StageMemory, ...]:
        return self.memory_of(self.program, 0)

    def memory_of(self, program: Program, number: int) -> tuple[StageMemory, ...]:
        """Returns `compiled_memory` of one of the programs that share the workers."""
        found = self._ask(lambda worker: worker.sizes, number)
        return tuple(map(stage_memory, self.plan.stages, found, beside(program)))

    def memory(self) -> tuple[int, ...]:
        return tuple(held for held, _, _ in self._ask(lambda worker: worker.memory))

    def resident(self) -> tuple[int, ...]:
        """Returns the resident bytes of every worker process."""
        return tuple(size for _, size, _ in self._ask(lambda worker: worker.memory))

    def most_resident(self) -> tuple[int, ...]:
        """Returns the most bytes that were ever resident in every worker process."""
        return tuple(most for _, _, most in self._ask(lambda worker: worker.memory))

    def close(self) -> None:
        atexit.unregister(self.close)
        workers, self._workers = self._workers, []
        if workers and self._ray.is_initialized():  # else Ray would start a cluster to ask
            with contextlib.suppress(Exception):
                self._ray.get([worker.close.remote() for worker in workers], timeout=2)
            for worker in workers:
                with contextlib.suppress(Exception):
                    self._ray.kill(worker)
        if self._nodes.emulated:
            for pid in self.pids:  # one that hangs does not hear Ray
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        self._nodes.close()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
        self._closed = True

    # calls

    def _call_step(
        self, feeds: Sequence[Mapping[Buffer, Array]], start: float | None = None, program: int = 0
    ) -> list[Call]:
        self._steps += 1
        return [
            worker.step.remote(self._steps, {b: _host(x) for b, x in feed.items()}, start, program)
            for worker, feed in zip(self._workers, feeds, strict=True)
        ]

    def _ask(self, method: Callable[[Any], Any], *args: Any) -> list[Any]:
        """What a method of every worker gives, once no step is under way."""
        self._finish()
        return self._all([method(worker).remote(*args) for worker in self._workers])

    def _all(self, calls: Sequence[Call]) -> list[Any]:
        return self._settle(calls, self._timeout + GRACE)

    def _watch(self, stage: int, call: Call, seconds: float | None = None) -> Any:
        """What one call gives. It waits for the steps before it too: one of their failures comes first."""
        patience = (seconds or self._timeout) + GRACE
        self._check()
        watched = [step for calls in self._pending for step in calls]
        while True:
            done, _ = self._ray.wait([call, *watched], timeout=patience)
            if call in done or not done:
                answer = self._answer(call) if done else _silent(patience)
                if answer.error is None:
                    return answer.value
                self._finish()
                raise self._blame({stage: answer})
            watched.remove(done[0])
            if self._answer(done[0]).error is not None:
                self._finish()

    def _settle(self, calls: Sequence[Call], seconds: float | None) -> list[Any]:
        """What one call on every worker gives.

        Args:
            seconds: how long none of them may finish; None: any time.

        Raises:
            StageFailed: names the stage that failed first.
        """
        left, answers = {call: s for s, call in enumerate(calls)}, dict[int, Answer]()
        while left:
            done, _ = self._ray.wait(list(left), timeout=seconds)
            if not done:
                answers |= {s: _silent(seconds) for s in left.values()}
                break
            stage = left.pop(done[0])
            answers[stage] = self._answer(done[0])
            if answers[stage].error is not None:
                seconds = GRACE
        if any(answer.error is not None for answer in answers.values()):
            raise self._blame(answers)
        return [answers[s].value for s in range(len(calls))]

    def _answer(self, call: Call) -> Answer:
        """What became of a finished call."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(call)
        except errors.RayActorError as error:
            return Answer(error=f"its process died ({_brief(error).partition(' … ')[0]})")
        except errors.RayError as error:
            return Answer(error=_brief(error))

    def _finish(self) -> None:
        """Waits for every step under way."""
        self._check()
        while self._pending:
            self._all(self._pending.pop(0))

    # failures

    def _blame(self, answers: Mapping[int, Answer]) -> StageFailed:
        """The failure of the stage that failed by itself, or fell silent, not because a peer had."""
        failed = {s: answer for s, answer in answers.items() if answer.error is not None}
        stage = min(failed, key=lambda s: (failed[s].peer, not failed[s].silent, s))
        self._failure = StageFailed(stage, self._node(stage), failed[stage].error or "")
        self._pending.clear()
        return self._failure

    def _node(self, stage: int) -> str:
        return ", ".join(self.plan.stages[stage].nodes)

    def _check(self) -> None:
        if self._closed or not self._ray.is_initialized():
            raise BackendError("the session is closed; what it held is gone")
        if self._failure is not None:
            cause = f"{self._failure.cause}, in an earlier step; close it, and start again from a checkpoint"
            raise StageFailed(self._failure.stage, self._failure.node, cause)


class Sibling:
    """Another program on the workers of a session; see `backend.Session`.

    Args:
        base: the session. number: what its workers call the program.
    """

    local = False

    def __init__(self, base: RaySession, number: int, plan: Plan, program: Program):
        self._base, self._number, self.plan, self.program = base, number, plan, program

    def load(self, stage: int, arrays: Mapping[Buffer, Array], donate: bool = False) -> None:
        self._base.load(stage, arrays, donate, self._number)

    def make(self, stage: int, fillers: Fillers) -> None:
        self._base.make(stage, fillers, self._number)

    def sibling(self, plan: Plan, program: Program, traced: Any, names: Mapping[Buffer, Buffer]) -> Sibling:
        raise NotImplementedError("ask the first session for siblings: it is their buffers that names name")

    def step(self, feeds: Sequence[Mapping[Buffer, Array]]) -> None:
        self._base.step(feeds, self._number)

    def measure(self, feeds: Sequence[Mapping[Buffer, Array]]) -> Timeline:
        return self._base.measure(feeds, self._number)

    def fetcher(self, stage: int, buffers: Sequence[Buffer]) -> Fetch:
        return self._base.fetcher(stage, buffers, self._number)

    def direct(self, traced: Any) -> None:
        """Returns None: every step goes through the workers."""

    def compile(self) -> None:
        """Nothing to do: workers compile when they are shipped to."""

    def hlo(self) -> dict[str, str]:
        return self._base.hlo(self._number)

    def compiled_memory(self) -> tuple[StageMemory, ...]:
        return self._base.memory_of(self.program, self._number)

    def memory(self) -> tuple[int, ...]:
        return self._base.memory()

    def close(self) -> None:
        self._base.close()


def _folder() -> str:
    return tempfile.mkdtemp(prefix="autopar-")


def _silent(seconds: float | None) -> Answer:
    return Answer(error=f"it did not answer within {seconds:g} s", peer=True, silent=True)


def _host(x: Array) -> Array:
    """The array as numpy keeps it; of a typed PRNG key its data."""
    if isinstance(x, jax.Array) and layout.is_key(x.dtype):
        return np.asarray(jax.random.key_data(x))
    return np.asarray(x)


def _brief(error: Exception) -> str:
    """The first line and, of a traceback, the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " … ".join(dict.fromkeys((lines[0][:200], lines[-1][:200])))
