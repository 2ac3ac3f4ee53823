"""A schedule as data: the order in which each stage runs the forward and backward of each micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.core.graph import Phase


@dataclass(frozen=True, slots=True)
class Task:
    """One micro-batch through one phase of a stage."""

    phase: Phase
    microbatch: int

    def __str__(self) -> str:
        return f"{self.phase[0]}{self.microbatch}"


@dataclass(frozen=True)
class Schedule:
    """`tasks[s]` is what stage s does, in order."""

    name: str
    tasks: tuple[tuple[Task, ...], ...]

    @property
    def in_flight(self) -> tuple[int, ...]:
        """Most forwards without their backward, per stage (at least 1)."""
        peaks: list[int] = []
        for tasks in self.tasks:
            now = peak = 0
            for task in tasks:
                now += 1 if task.phase is Phase.FORWARD else -1
                peak = max(peak, now)
            peaks.append(max(1, peak))
        return tuple(peaks)

    def __str__(self) -> str:
        return "\n".join(f"stage {s}: {' '.join(map(str, tasks))}" for s, tasks in enumerate(self.tasks))
