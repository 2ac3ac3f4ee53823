"""Stage problems: which layers run on which submesh, as arrays; and the exact cost of an answer.

A model is a chain of L layers. A *stage* is a run of layers [i, j) on one *submesh choice* c: so many
devices of one kind, in one shape. A plan cuts the chain into stages and gives each a choice, using at most
the devices there are of each kind; kinds may come in any order along the pipeline, and devices may be left
unused.

For a plan with stages s = 1..S, stage times t_s, once-a-step costs f_s and transfer times x_b at its inner
boundaries, and B micro-batches, the objectives are

    TrainStep    sum t_s + sum x_b + (B - 1) * max g_s + max f_s
    Latency      sum t_s + sum x_b
    Throughput   max g_s

where g_s = t_s, or t_s plus the transfer that follows the stage when `transfer_blocks` is set (a device that
cannot compute while it sends). TrainStep is the time of a 1F1B or GPipe step in Alpa's model (Zheng et al.,
OSDI 2022, Sec. 5.2) with two terms it lacks: transfers, and the work that stages do once a step side by side
(gradient synchronisation, the optimizer), which ends when the slowest is done.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from autopar_solver.errors import ProblemError

Array = NDArray[np.float64]


class StageProblemError(ProblemError):
    """A stage problem or an assignment that contradicts itself; the message names the array and entry."""


@dataclass(frozen=True)
class SubmeshChoice:
    """One way to give devices to a stage.

    Attributes:
        kind: index into `StageProblem.available`.
        devices: how many devices of that kind it takes, at least 1.
        name: what a report should call it, such as "8xV100 (2, 4)". Two choices may differ in their shape
            only.
    """

    kind: int
    devices: int
    name: str = ""


@dataclass(frozen=True)
class TrainStep:
    """Seconds of a training step: sum of stages and transfers + (B - 1) * slowest + largest fixed cost.

    Attributes:
        transfer_blocks: charge the transfer after a stage to that stage's share of the slowest-stage term.
    """

    transfer_blocks: bool = False


@dataclass(frozen=True)
class Latency:
    """Seconds until one micro-batch has passed all stages: sum of stages and transfers."""


@dataclass(frozen=True)
class Throughput:
    """Seconds between two micro-batches in the steady state: the slowest stage (see `TrainStep`)."""

    transfer_blocks: bool = False


Objective = TrainStep | Latency | Throughput


class Weights(NamedTuple):
    """An objective as weights of (sum of stages and transfers, slowest stage, largest fixed cost)."""

    total: float
    slowest: float
    fixed: float


def one_f_one_b(microbatches: int) -> tuple[int, ...]:
    """Micro-batches in flight per position from the end, under 1F1B: min(p, B)."""
    return tuple(range(1, microbatches + 1))


def gpipe(microbatches: int) -> tuple[int, ...]:
    """Micro-batches in flight under GPipe: B at every position."""
    return (microbatches,)


def inference() -> tuple[int, ...]:
    """Micro-batches in flight when nothing is kept for a backward pass: 1 at every position."""
    return (1,)


def _zero() -> Array:
    return np.zeros(())


def _infinite() -> Array:
    return np.full((), np.inf)


@dataclass(frozen=True, eq=False)
class StageProblem:
    """A chain of L layers to be cut into stages over K kinds of devices and C submesh choices.

    Every array may also be given as a scalar (0-dimensional), which then holds for all its entries.

    Attributes:
        choices: the C submesh choices.
        available: devices there are of each of the K kinds.
        time: float64 [C, L, L+1]; `time[c, i, j]` is seconds per micro-batch (forward and backward) of layers
            [i, j) on choice c, inf where impossible. Entries with j <= i are not read.
        transfer: float64 [L, K, K]; `transfer[b, k1, k2]` is seconds per micro-batch (activations forward,
            gradients backward) between layer b-1 on kind k1 and layer b on kind k2 when they lie in different
            stages; inf forbids the crossing, entry b = 0 is not read. Default 0.
        fixed: like `time`, seconds once a step. Default 0.
        memory_fixed: like `time`, bytes per device whatever the micro-batches. Default 0.
        memory_per_microbatch: like `time`, bytes per device for each micro-batch in flight. Default 0.
        limit: float64 [C], bytes a device of that choice has. Default inf.
        microbatches: B, at least 1.
        in_flight: micro-batches in flight at position p = 1, 2, … from the end (the last stage is p = 1);
            the last entry holds for all further positions; it must not decrease. Empty: `one_f_one_b(B)`. A
            stage fits if `memory_fixed + in_flight[p] * memory_per_microbatch <= limit`.
        objective: what is minimised.
        max_stages: at most so many stages. Default L.

    Raises:
        StageProblemError: an array has a wrong shape, or a NaN or negative entry, or an index is out of
        range.
    """

    choices: tuple[SubmeshChoice, ...]
    available: tuple[int, ...]
    time: Array
    transfer: Array = field(default_factory=_zero)
    fixed: Array = field(default_factory=_zero)
    memory_fixed: Array = field(default_factory=_zero)
    memory_per_microbatch: Array = field(default_factory=_zero)
    limit: Array = field(default_factory=_infinite)
    microbatches: int = 1
    in_flight: tuple[int, ...] = ()
    objective: Objective = TrainStep()
    max_stages: int | None = None

    def __post_init__(self) -> None:
        self._check_scalars()
        shape = np.shape(self.time)
        if len(shape) != 3 or shape[0] != len(self.choices) or shape[1] < 1 or shape[2] != shape[1] + 1:
            raise StageProblemError(
                f"time must have shape (choices, layers, layers + 1) with {len(self.choices)} choices, "
                f"got {shape}"
            )
        kinds, layers = len(self.available), shape[1]
        self._set("time", self.time, shape)
        for name in ("fixed", "memory_fixed", "memory_per_microbatch"):
            self._set(name, getattr(self, name), shape)
        self._set("transfer", self.transfer, (layers, kinds, kinds))
        self._set("limit", self.limit, (len(self.choices),))
        if not self.in_flight:
            object.__setattr__(self, "in_flight", one_f_one_b(self.microbatches))
        if self.max_stages is None:
            object.__setattr__(self, "max_stages", layers)

    def _check_scalars(self) -> None:
        if not self.choices:
            raise StageProblemError("choices is empty; a stage needs at least one submesh choice")
        if any(count < 0 for count in self.available):
            raise StageProblemError(f"available must hold device counts >= 0, got {self.available}")
        for index, choice in enumerate(self.choices):
            if not 0 <= choice.kind < len(self.available) or choice.devices < 1:
                raise StageProblemError(
                    f"choices[{index}] = {choice} needs a kind in 0..{len(self.available) - 1} "
                    "and devices >= 1"
                )
        if self.microbatches < 1:
            raise StageProblemError(f"microbatches must be at least 1, got {self.microbatches}")
        if self.max_stages is not None and self.max_stages < 1:
            raise StageProblemError(f"max_stages must be at least 1, got {self.max_stages}")
        counts = self.in_flight
        if counts and (counts[0] < 0 or any(a > b for a, b in itertools.pairwise(counts))):
            raise StageProblemError(f"in_flight must be >= 0 and never decrease, got {counts}")

    def _set(self, name: str, value: ArrayLike, shape: tuple[int, ...]) -> None:
        """Store `value` as a read-only float64 array, after checking shape, sign and NaN."""
        array = np.array(value, dtype=np.float64)
        if array.ndim == 0:
            array = np.full(shape, array)
        if array.shape != shape:
            raise StageProblemError(f"{name} must have shape {shape}, got {array.shape}")
        bad = np.argwhere(~(array >= 0))
        if len(bad):
            where = tuple(int(x) for x in bad[0])
            raise StageProblemError(f"{name}{list(where)} must be >= 0, got {array[where]}")
        array.flags.writeable = False
        object.__setattr__(self, name, array)

    @property
    def layers(self) -> int:
        """L, the number of layers."""
        return int(self.time.shape[1])

    @property
    def weights(self) -> Weights:
        """The objective as weights of (total, slowest, largest fixed cost)."""
        match self.objective:
            case TrainStep():
                return Weights(1.0, float(self.microbatches - 1), 1.0)
            case Latency():
                return Weights(1.0, 0.0, 0.0)
            case Throughput():
                return Weights(0.0, 1.0, 0.0)

    @property
    def transfer_blocks(self) -> bool:
        """Whether the transfer after a stage counts in the slowest-stage term."""
        return not isinstance(self.objective, Latency) and self.objective.transfer_blocks

    def in_flight_at(self, position: int) -> int:
        """Micro-batches in flight at this position from the end (the last stage is 1)."""
        return self.in_flight[min(position, len(self.in_flight)) - 1]


Stages = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class StagePlan:
    """A cut of the layers into stages, and what it costs.

    Attributes:
        stages: (start, stop, choice) per stage, in pipeline order; layers are [start, stop).
        objective: seconds, by the problem's objective.
        slowest: seconds of the slowest stage, g_s of the module's docstring.
        shortfall: bytes by which the worst stage exceeds its limit; 0 if all fit.
        tight: index of the stage with the least room.
    """

    stages: Stages
    objective: float
    slowest: float
    shortfall: float
    tight: int


def price(problem: StageProblem, stages: Sequence[tuple[int, int, int]]) -> StagePlan:
    """The cost of an assignment, computed from the problem's arrays alone.

    Args:
        problem: the stage problem.
        stages: (start, stop, choice) per stage, in pipeline order.
    Returns:
        The plan with its objective (inf if a stage is impossible or a crossing forbidden), slowest stage and
        shortfall.
    Raises:
        StageProblemError: the stages don't cover the layers in order, are too many, or take more devices
        than there are.
    """
    _check_cover(problem, stages)
    total = slowest = fixed = 0.0
    shortfalls: list[float] = []
    for index, (i, j, c) in enumerate(stages):
        after = 0.0
        if index + 1 < len(stages):
            following = problem.choices[stages[index + 1][2]].kind
            after = float(problem.transfer[j, problem.choices[c].kind, following])
        seconds = float(problem.time[c, i, j])
        total += seconds + after
        slowest = max(slowest, seconds + after if problem.transfer_blocks else seconds)
        fixed = max(fixed, float(problem.fixed[c, i, j]))
        count = problem.in_flight_at(len(stages) - index)
        need = float(problem.memory_fixed[c, i, j]) + times_count(
            problem.memory_per_microbatch[c, i, j], count
        )
        shortfalls.append(need - float(problem.limit[c]) if need > problem.limit[c] else 0.0)
    weights = problem.weights
    objective = sum(w * x for w, x in zip(weights, (total, slowest, fixed)) if w)
    if not np.isfinite(total + fixed):  # an impossible stage or a forbidden crossing, whatever the weights
        objective = np.inf
    tight = int(np.argmax(shortfalls))
    return StagePlan(
        tuple((int(i), int(j), int(c)) for i, j, c in stages), objective, slowest, shortfalls[tight], tight
    )


def times_count(per_microbatch: float, count: int) -> float:
    """Bytes of `count` micro-batches in flight (0 of them need nothing, even where one would be infinite)."""
    return float(per_microbatch) * count if count else 0.0


def _check_cover(problem: StageProblem, stages: Sequence[tuple[int, int, int]]) -> None:
    cuts = [0, *(stop for _, stop, _ in stages)]
    starts = [start for start, _, _ in stages]
    if not stages or starts != cuts[:-1] or cuts[-1] != problem.layers or any(i >= j for i, j, _ in stages):
        raise StageProblemError(f"stages must cover layers 0..{problem.layers} in order, got {tuple(stages)}")
    assert problem.max_stages is not None
    if len(stages) > problem.max_stages:
        raise StageProblemError(f"{len(stages)} stages, but at most {problem.max_stages} are allowed")
    used = [0] * len(problem.available)
    for _, _, c in stages:
        used[problem.choices[c].kind] += problem.choices[c].devices
    for kind, (need, have) in enumerate(zip(used, problem.available)):
        if need > have:
            raise StageProblemError(f"the stages take {need} devices of kind {kind}, but there are {have}")
