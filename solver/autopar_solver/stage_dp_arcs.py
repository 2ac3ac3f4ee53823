"""From a stage problem to arcs: stages worth considering, each with the furthest position where it fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopar_solver.stage_dp_problem import Array, StageProblem

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Arcs:
    """Stages that may be chosen, sorted by first layer; flat arrays over arcs.

    Attributes:
        layers: L. positions: P; positions from P on behave alike and are stored as P.
        start, stop: layers [start, stop). choice: submesh choice. kind, devices: of that choice.
        last: the furthest position from the end at which the arc fits, at most P.
        seconds: per micro-batch. extra: once a step.
        slow: the least this arc contributes to the slowest-stage term.
    """

    layers: int
    positions: int
    start: Ints
    stop: Ints
    choice: Ints
    kind: Ints
    devices: Ints
    last: Ints
    seconds: Array
    extra: Array
    slow: Array

    def __len__(self) -> int:
        return len(self.start)

    def where(self, keep: Bools) -> Arcs:
        """The arcs for which `keep` holds."""
        names = ("start", "stop", "choice", "kind", "devices", "last", "seconds", "extra", "slow")
        return Arcs(self.layers, self.positions, *(getattr(self, name)[keep] for name in names))

    @property
    def flat(self) -> tuple[Ints, ...]:
        """What the kernels take: (first, stop, kind, devices, last); first[i] is the first arc of layer i."""
        first = np.searchsorted(self.start, np.arange(self.layers + 2))
        return first, self.stop, self.kind, self.devices, self.last


def arcs_of(problem: StageProblem) -> Arcs:
    """All arcs that can be part of a plan, without those that another arc beats in everything."""
    fits = positions_that_fit(problem)
    devices = np.array([c.devices for c in problem.choices], np.int64)
    kinds = np.array([c.kind for c in problem.choices], np.int64)
    enough = devices <= np.array(problem.available, np.int64)[kinds]
    order = np.arange(problem.layers + 1)
    runs = order[None, :-1, None] < order[None, None, :]
    possible = (
        np.isfinite(problem.time) & np.isfinite(problem.fixed) & (fits > 0) & runs & enough[:, None, None]
    )
    possible &= ~beaten(problem, fits, devices, kinds)
    start, stop, choice = np.nonzero(possible.transpose(1, 2, 0))
    last, positions = _fold_positions(problem, fits[choice, start, stop])
    seconds, extra = problem.time[choice, start, stop], problem.fixed[choice, start, stop]
    slow = seconds
    if problem.transfer_blocks:
        least = problem.transfer.min(axis=2)  # over the kind that follows
        inner = stop < problem.layers
        slow = seconds + np.where(inner, least[np.where(inner, stop, 0), kinds[choice]], 0.0)
    weights = problem.weights
    extra = extra if weights.fixed else np.zeros_like(extra)
    arcs = Arcs(
        problem.layers,
        positions,
        start,
        stop,
        choice,
        kinds[choice],
        devices[choice],
        last,
        seconds,
        extra,
        slow,
    )
    return arcs.where(np.isfinite(slow))  # no kind may follow: not even the last stage


def positions_that_fit(problem: StageProblem) -> Ints:
    """The furthest position from the end where each stage fits, 0 if it never does: int64 [C, L, L+1]."""
    assert problem.max_stages is not None
    furthest = min(problem.max_stages, problem.layers)
    fits = np.zeros(problem.time.shape, np.int64)
    for position in range(1, furthest + 1):
        fits += memory_over(problem, position) <= 0
    return fits


def memory_over(problem: StageProblem, position: int) -> Array:
    """Bytes by which each stage is over its limit at a position (negative: room): float64 [C, L, L+1]."""
    count = problem.in_flight_at(position)
    activations = problem.memory_per_microbatch * count if count else 0.0
    with np.errstate(invalid="ignore"):
        over: Any = problem.memory_fixed + activations - problem.limit[:, None, None]
    return np.where(np.isnan(over), np.inf, over)  # an infinite need fits nowhere


def beaten(problem: StageProblem, fits: Ints, devices: Ints, kinds: Ints) -> Bools:
    """Where a choice of the same kind needs no more devices and is as good in time, fixed cost and memory."""
    out = np.zeros(problem.time.shape, np.bool_)
    for c in range(len(devices)):
        for d in range(len(devices)):
            if c == d or kinds[c] != kinds[d] or devices[d] > devices[c]:
                continue
            as_good = (
                (problem.time[d] <= problem.time[c])
                & (problem.fixed[d] <= problem.fixed[c])
                & (fits[d] >= fits[c])
            )
            if devices[d] == devices[c] and d > c:  # of equals, the first stays
                equal = (problem.time[d] == problem.time[c]) & (problem.fixed[d] == problem.fixed[c])
                as_good &= ~(equal & (fits[d] == fits[c]))
            out[c] |= as_good
    return out


def _fold_positions(problem: StageProblem, last: Ints) -> tuple[Ints, int]:
    """Positions cut to the P that memory can tell apart.

    No plan has more stages than layers, nor than the smallest choices allow; an arc that fits at all those
    positions is unrestricted, and beyond the furthest position of a restricted arc all positions are alike.
    """
    smallest = [
        min((c.devices for c in problem.choices if c.kind == kind), default=count + 1)
        for kind, count in enumerate(problem.available)
    ]
    most = min(problem.layers, sum(have // need for have, need in zip(problem.available, smallest)))
    restricted = last[last < most]
    positions = int(restricted.max()) + 1 if len(restricted) else 1
    return np.minimum(last, positions), positions
