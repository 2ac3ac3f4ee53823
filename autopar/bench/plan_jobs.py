"""Cells of the plan benchmark in processes of their own, each with the host devices that it needs."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
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

    def judge(job: Job) -> Done:
        start(job)
        done = apart(job)
        kept.add(done)
        return done

    with ThreadPoolExecutor(at_once) as pool:
        waiting = [pool.submit(judge, job) for job in jobs if job not in kept.found]
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def apart(job: Job) -> Done:
    """Returns a job's cell, judged in a process of its own."""
    command = [sys.executable, "-m", "autopar.bench.plan_jobs", json.dumps(asdict(job))]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        return Done(job, error=(ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[-1])
    return Done(job, cell_of(json.loads(ran.stdout.splitlines()[-1])))


def cell_of(data: dict[str, Any]) -> Cell:
    """Returns the cell that `asdict` turned into plain data."""

    def row(data: dict[str, Any]) -> Row:
        rest = {name: x for name, x in data.items() if name != "score"}
        return Row(score=Score(**data["score"]), **rest)

    experts, failed = map(row, data["experts"]), [(name, why) for name, why in data["failed"]]
    model, mesh, device = (str(data[name]) for name in ("model", "mesh", "device"))
    return Cell(model, mesh, device, row(data["automatic"]), tuple(experts), tuple(failed))


def main(text: str) -> None:
    """Judges a job and prints its cell as JSON, on the last line."""
    import autopar
    from autopar.bench.plan_cases import case, mesh_of
    from autopar.bench.plan_cell import Bench, cell

    job = Job(**json.loads(text))
    try:
        mesh = mesh_of(job.mesh, job.device, job.network)
        autopar.emulate(mesh.size)
        near = {} if job.near is None else {"near": job.near}
        found = cell(Bench.of(case(job.model, mesh.size), mesh, job.steps, **near), job.mesh)
    except AutoparError as error:
        sys.exit(f"{type(error).__name__}: {error}".replace("\n", " "))
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main(sys.argv[1])
