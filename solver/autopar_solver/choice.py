"""What a solver returns: a choice per node, what it costs, and how far from optimal it can be."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from autopar_solver.problem import IntArray

Status: TypeAlias = Literal["optimal", "feasible", "infeasible", "unknown"]


@dataclass(frozen=True, eq=False)
class Choice:
    """The outcome of a solve.

    Attributes:
        index: the choice taken at every node, or None if none was found.
        objective: the exact cost of index, or None.
        bound: a proven lower bound on the cost of every feasible choice, or None if nothing was proven.
        gap: (objective - bound) / |objective|; inf without an objective or a bound.
        status: optimal (proven), feasible, infeasible (proven), or unknown (nothing found in time).
        seconds: wall-clock time taken.
        presolve_seconds: the part of it that presolve took.
        log: one line per thing worth telling, in order; the last says why there is no choice if there is
            none.
    """

    index: IntArray | None
    objective: int | None
    bound: int | None
    gap: float
    status: Status
    seconds: float
    log: tuple[str, ...]
    presolve_seconds: float = 0.0

    def to_json(self) -> str:
        """Returns the JSON written by the command line: choice, objective, bound, gap, status, seconds."""
        form: dict[str, Any] = {
            "choice": None if self.index is None else [int(x) for x in self.index],
            "objective": self.objective,
            "bound": self.bound,
            "gap": self.gap if math.isfinite(self.gap) else None,
            "status": self.status,
            "seconds": round(self.seconds, 3),
        }
        return json.dumps(form)

    def __repr__(self) -> str:
        return f"Choice({self.status}, objective {self.objective}, bound {self.bound}, {self.seconds:.2f} s)"


def relative_gap(objective: int | None, bound: int | None) -> float:
    """Returns (objective - bound) / |objective|, 0 when they meet, inf when either is missing."""
    if objective is None or bound is None:
        return math.inf
    return 0.0 if bound >= objective else (objective - bound) / max(1, abs(objective))


@dataclass(frozen=True)
class Progress:
    """The state of a running solve: seconds since its start, the best objective, the bound, and what it is
    doing.
    """

    seconds: float
    objective: int | None
    bound: int | None
    doing: str

    @property
    def gap(self) -> float:
        """The relative gap, inf while either side is missing."""
        return relative_gap(self.objective, self.bound)


ProgressCallback: TypeAlias = Callable[[Progress], None]
