"""The driver's end: workers started, shipped to, stepped and watched."""

from __future__ import annotations

import atexit
import contextlib
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from autopar.core.errors import BackendError, StageFailed
from autopar.core.plan import Plan
from autopar.core.program import Buffer, Program
from autopar.core.timeline import Timeline
from autopar.runtime.backend import StageMemory
from autopar.runtime.inprocess import stage_name
from autopar.runtime.ray_backend.nodes import Nodes, resource
from autopar.runtime.ray_backend.shipment import shipments
from autopar.runtime.ray_backend.worker import Answer, Setting, StageWorker

Array = Any
GRACE = 10.0
"""Seconds in which all workers have said why they stopped, once one has failed."""

START = 120.0
"""Seconds in which all workers have started."""

AHEAD = 8
"""Steps that may be under way before a new one waits for the oldest."""


class RaySession:
    """A program on worker processes; see `backend.Session`."""

    local = False

    def __init__(
        self,
        plan: Plan,
        program: Program,
        traced: Any,
        nodes: Nodes,
        platform: str,
        host: str,
        timeout: float,
    ):
        self.plan, self.program, self._nodes, self._ray = plan, program, nodes, nodes.ray
        self._cache = tempfile.mkdtemp(prefix="autopar-")
        self._workers: list[Any] = []
        self._steps, self._pending = 0, list[list[Any]]()
        self._failure: StageFailed | None = None
        atexit.register(self.close)
        try:
            self._start(platform, host, timeout)
            self._ship(traced, platform)
        except BaseException:
            self.close()
            raise

    def _start(self, platform: str, host: str, timeout: float) -> None:
        secret, actor = secrets.token_bytes(32), self._ray.remote(StageWorker)
        for s, stage in enumerate(self.plan.stages):
            setting = Setting(s, stage.mesh.size, platform, secret, host, timeout, self._cache)
            gpus = stage.mesh.size if platform == "cuda" else 0
            options = {
                "num_cpus": 0,
                "num_gpus": gpus,
                "resources": {resource(stage.mesh.device.name): stage.mesh.size},
            }
            self._workers.append(actor.options(max_restarts=0, **options).remote(setting))
        answers = self._get([w.address.remote() for w in self._workers], START)
        self._addresses = [(host_, port) for host_, port, _, _ in answers]
        self.pids = [pid for *_, pid in answers]
        for s, (*_, devices, _) in enumerate(answers):
            if devices < self.plan.stages[s].mesh.size:
                raise BackendError(
                    f"stage {s} needs {self.plan.stages[s].mesh.size} devices, its worker has {devices}"
                )

    def _ship(self, traced: Any, platform: str) -> None:
        found = shipments(self.plan, self.program, traced, [platform])
        calls = [w.setup.remote(each, self._addresses) for w, each in zip(self._workers, found, strict=True)]
        self.compile_seconds = self._get(calls, None)

    # the session protocol

    def load(self, stage: int, arrays: Mapping[Buffer, Array], donate: bool = False) -> None:
        self._check()
        self._get([self._workers[stage].load.remote({b: _host(x) for b, x in arrays.items()})], None)

    def step(self, feeds: Sequence[Mapping[Buffer, Array]]) -> None:
        self._check()
        self._steps += 1
        calls = [
            w.step.remote(self._steps, {b: _host(x) for b, x in feed.items()})
            for w, feed in zip(self._workers, feeds, strict=True)
        ]
        self._pending.append(calls)
        if len(self._pending) > AHEAD:
            self._settle(self._pending.pop(0))

    def measure(self, feeds: Sequence[Mapping[Buffer, Array]]) -> Timeline:
        self._finish()
        self._steps += 1
        calls = [
            w.step.remote(self._steps, {b: _host(x) for b, x in feed.items()}, True)
            for w, feed in zip(self._workers, feeds, strict=True)
        ]
        events = [event for answer in self._settle(calls) for event in answer.events]
        events.sort(key=lambda event: event.start)
        return Timeline(tuple(events), tuple(map(stage_name, range(len(self._workers)), self.plan.stages)))

    def fetcher(self, stage: int, buffers: Sequence[Buffer]) -> Callable[[], Callable[[], Sequence[Array]]]:
        wanted = list(buffers)
        if not wanted:
            return lambda: list

        def start() -> Callable[[], Sequence[Array]]:
            call = self._workers[stage].fetch.remote(wanted)

            def wait() -> Sequence[Array]:
                answer = self._one(call)
                if isinstance(answer, Answer):
                    self._finish()
                    raise self._blame({stage: answer})
                return answer

            return wait

        return start

    def compile(self) -> None:
        """Nothing to do: workers compile when they are shipped to."""

    def hlo(self) -> dict[str, str]:
        self._finish()
        return {
            name: text
            for each in self._get([w.hlo.remote() for w in self._workers], None)
            for name, text in each.items()
        }

    def compiled_memory(self) -> tuple[StageMemory, ...]:
        self._finish()
        rows: list[StageMemory] = []
        for stage, found in zip(
            self.plan.stages, self._get([w.compiled.remote() for w in self._workers], None)
        ):
            memory = stage.memory
            each = [StageMemory(*sizes, name, memory.peak, memory.limit) for name, sizes in found.items()]
            rows.append(
                max(
                    each,
                    key=lambda row: row.peak,
                    default=StageMemory(0, 0, 0, 0, "", memory.peak, memory.limit),
                )
            )
        return tuple(rows)

    def memory(self) -> tuple[int, ...]:
        self._finish()
        return tuple(held for held, _ in self._get([w.memory.remote() for w in self._workers], None))

    def resident(self) -> tuple[int, ...]:
        """Returns the resident bytes of every worker process."""
        self._finish()
        return tuple(size for _, size in self._get([w.memory.remote() for w in self._workers], None))

    def close(self) -> None:
        atexit.unregister(self.close)
        with contextlib.suppress(Exception):
            self._ray.get([w.close.remote() for w in self._workers], timeout=2)
        for worker in self._workers:
            with contextlib.suppress(Exception):
                self._ray.kill(worker)
        self._workers = []
        self._nodes.close()
        shutil.rmtree(self._cache, ignore_errors=True)

    # failures

    def _get(self, calls: Sequence[Any], seconds: float | None) -> list[Any]:
        """The results of calls that don't step; a worker that dies in one is a failed stage."""
        try:
            return self._ray.get(list(calls), timeout=seconds)
        except self._ray.exceptions.GetTimeoutError:
            raise BackendError(
                f"the workers did not start within {seconds:g} s; is the cluster busy? It offers "
                f"{self._ray.available_resources()}"
            ) from None
        except self._ray.exceptions.RayActorError:
            answers = {s: self._answer(call, GRACE) for s, call in enumerate(calls)}
            raise self._blame({s: a for s, a in answers.items() if isinstance(a, Answer)}) from None

    def _one(self, call: Any) -> Any:
        return self._answer(call, None)

    def _answer(self, call: Any, seconds: float | None) -> Any:
        """The result of one call; a dead or silent worker is an Answer that says so."""
        try:
            return self._ray.get(call, timeout=seconds)
        except self._ray.exceptions.RayActorError as error:
            return Answer(f"its process died ({_first_line(error)})")
        except self._ray.exceptions.GetTimeoutError:
            return Answer(f"it did not answer within {seconds:g} s", peer=True)

    def _settle(self, calls: list[Any]) -> list[Answer]:
        """Waits for one step of all workers. Raises StageFailed, naming the stage that failed first."""
        answers: dict[int, Answer] = {}
        left, seconds = {call: s for s, call in enumerate(calls)}, None
        while left:
            done, _ = self._ray.wait(list(left), num_returns=1, timeout=seconds)
            if not done:
                answers |= {
                    s: Answer(f"it did not answer within {GRACE:g} s", peer=True) for s in left.values()
                }
                break
            stage = left.pop(done[0])
            answers[stage] = self._answer(done[0], None)
            if answers[stage].error is not None:
                seconds = GRACE
        if any(a.error is not None for a in answers.values()):
            self._pending.clear()
            raise self._blame(answers)
        return [answers[s] for s in range(len(calls))]

    def _blame(self, answers: Mapping[int, Answer]) -> StageFailed:
        """The failure of the stage that failed by itself, not because a peer had."""
        failed = {s: a for s, a in answers.items() if a.error is not None}
        own = {s: a for s, a in failed.items() if not a.peer} or failed
        stage, answer = next(iter(own.items()))
        node = ", ".join(self.plan.stages[stage].nodes)
        self._failure = StageFailed(stage, node, answer.error or "for an unknown reason")
        return self._failure

    def _check(self) -> None:
        if self._failure is not None:
            raise StageFailed(
                self._failure.stage, self._failure.node, f"{self._failure.cause}, in an earlier step"
            )

    def _finish(self) -> None:
        """Waits for every step under way."""
        self._check()
        while self._pending:
            self._settle(self._pending.pop(0))


def _host(x: Array) -> Array:
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(x))
    return np.asarray(x)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
