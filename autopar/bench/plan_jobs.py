"""Cells of the plan benchmark in processes of their own, each with the host devices that it needs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from autopar.bench.plan_cell import Cell, Row
from autopar.bench.score import Score
from autopar.core.errors import AutoparError, BadInput
from autopar_solver.json_form import write_whole


@dataclass(frozen=True)
class Job:
    """A cell to be judged.

    Attributes:
        model, mesh, device: by name. network: bytes/s of a node's card.
        steps: to time on host devices. near: as in `autopar.bench.plan_cell.Bench`; None for every expert.
    """

    model: str
    mesh: str
    device: str
    network: float
    steps: int = 0
    near: float | None = None

    def __str__(self) -> str:
        return f"{self.model} on {self.mesh} {self.device}"


@dataclass(frozen=True)
class Done:
    """A job's cell, or why there is none."""

    job: Job
    cell: Cell | None = None
    error: str = ""


class Kept:
    """Cells that are judged, in a file if one is given."""

    @property
    def programs(self) -> Path | None:
        """The folder beside the file in which compiled programs are kept."""
        return None if self.path is None else self.path.resolve().with_suffix(".programs")

    def __init__(self, path: Path | None) -> None:
        self.path, self.lock = path, threading.Lock()
        self.found: dict[Job, Done] = {}
        if path is not None and path.exists():
            try:
                for data in json.loads(path.read_text()):
                    job = Job(**data["job"])
                    self.found[job] = Done(job, cell_of(data["cell"]))
            except (ValueError, TypeError, KeyError) as error:
                raise BadInput(f"{path} doesn't hold judged cells ({error}); delete it") from None

    def add(self, done: Done) -> None:
        """Keeps a cell that could be judged; the file is replaced as a whole."""
        with self.lock:
            if done.cell is not None:
                self.found[done.job] = done
            if self.path is not None:
                every = [
                    {"job": asdict(d.job), "cell": asdict(d.cell)} for d in self.found.values() if d.cell
                ]
                write_whole(str(self.path), json.dumps(every, indent=1).encode())


def run(jobs: Sequence[Job], kept: Kept, at_once: int, start: Callable[[Job], None]) -> Iterator[Done]:
    """Yields every job's cell, the kept ones first, the others as they are done.

    Args:
        at_once: processes. start: is called when a job's process begins.
    """
    yield from (kept.found[job] for job in jobs if job in kept.found)
    ready: SimpleQueue[Done | None] = SimpleQueue()

    def judge(alike: Sequence[Job]) -> None:
        start(alike[0])
        try:
            for done in apart(alike, kept.programs):
                kept.add(done)
                ready.put(done)
        finally:
            ready.put(None)

    with ThreadPoolExecutor(at_once) as pool:
        waiting = [pool.submit(judge, g) for g in groups([job for job in jobs if job not in kept.found])]
        try:
            left = len(waiting)
            while left:
                done = ready.get()
                left -= done is None
                if done is not None:
                    yield done
            for future in waiting:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def groups(jobs: Sequence[Job]) -> list[tuple[Job, ...]]:
    """Returns the jobs that differ in their device only together: they share a trace and a process."""
    found: dict[Job, list[Job]] = {}
    for job in jobs:
        found.setdefault(replace(job, device=""), []).append(job)
    return [tuple(each) for each in found.values()]


def apart(jobs: Sequence[Job], programs: Path | None) -> Iterator[Done]:
    """Yields the cells of jobs that differ in their device only, judged in a process of their own."""
    asked = json.dumps({"jobs": [asdict(job) for job in jobs], "programs": programs and str(programs)})
    command = [sys.executable, "-m", "autopar.bench.plan_jobs", asked]
    left = list(jobs)
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                job, said = left.pop(0), json.loads(line)
                yield Done(job, error=said["error"]) if "error" in said else Done(job, cell_of(said))
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [f"exit status {process.returncode}"])[-1]
    yield from (Done(job, error=last) for job in left)


def cell_of(data: dict[str, Any]) -> Cell:
    """Returns the cell that `asdict` turned into plain data."""

    def row(data: dict[str, Any]) -> Row:
        rest = {name: x for name, x in data.items() if name != "score"}
        return Row(score=Score(**data["score"]), **rest)

    experts, failed = map(row, data["experts"]), [(name, why) for name, why in data["failed"]]
    model, mesh, device = (str(data[name]) for name in ("model", "mesh", "device"))
    made = {name: str(data.get(name, "")) for name in ("plan", "version")}
    return Cell(model, mesh, device, row(data["automatic"]), tuple(experts), tuple(failed), **made)


def main(text: str) -> None:
    """Judges jobs that differ in their device only; prints a line of JSON for each, its cell or an error."""
    import autopar
    from autopar.bench.plan_cases import case, mesh_of
    from autopar.bench.plan_cell import Bench, cell

    asked = json.loads(text)
    jobs = [Job(**each) for each in asked["jobs"]]
    first, meshes = jobs[0], [mesh_of(job.mesh, job.device, job.network) for job in jobs]
    autopar.emulate(meshes[0].size)
    try:
        near = {} if first.near is None else {"near": first.near}
        bench = Bench.of(case(first.model, meshes[0].size), meshes[0], first.steps, **near)
    except AutoparError as error:
        sys.exit(f"{type(error).__name__}: {error}".replace("\n", " "))
    bench.programs.folder = asked["programs"] and Path(asked["programs"])
    for mesh in meshes:
        try:
            print(json.dumps(asdict(cell(bench.on(mesh), first.mesh))), flush=True)
        except AutoparError as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}".replace("\n", " ")}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
