"""Pipeline schedules as data: GPipe (Huang et al. 2019) and 1F1B (Narayanan et al. 2019, PipeDream-Flush
2021).
"""

from __future__ import annotations

from collections.abc import Callable

from autopar.core.errors import UnknownName
from autopar.core.graph import Phase
from autopar.core.schedule import Schedule, Task


def gpipe(stages: int, microbatches: int) -> Schedule:
    """Returns the schedule that runs every forward, then every backward: each stage holds all micro-
    batches."""
    order = tuple(Task(phase, i) for phase in (Phase.FORWARD, Phase.BACKWARD) for i in range(microbatches))
    return Schedule("gpipe", (order,) * stages)


def one_forward_one_backward(stages: int, microbatches: int) -> Schedule:
    """Returns 1F1B: stage s warms up with (stages − s) forwards, then alternates, so that it holds no
    more."""
    return Schedule(
        "1f1b", tuple(_alternate(min(microbatches, stages - s), microbatches) for s in range(stages))
    )


def _alternate(warm: int, microbatches: int) -> tuple[Task, ...]:
    tasks = [Task(Phase.FORWARD, i) for i in range(warm)]
    for i in range(microbatches):
        tasks.append(Task(Phase.BACKWARD, i))
        if warm + i < microbatches:
            tasks.append(Task(Phase.FORWARD, warm + i))
    return tuple(tasks)


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {"1f1b": one_forward_one_backward, "gpipe": gpipe}


def schedule(name: str, stages: int, microbatches: int) -> Schedule:
    """Returns the schedule of that name. Raises UnknownName."""
    if name not in SCHEDULES:
        raise UnknownName("schedule", name, SCHEDULES)
    return SCHEDULES[name](stages, microbatches)
