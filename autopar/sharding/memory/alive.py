"""Bytes over time: what is alive on one device while the region runs, for every choice.

State is there for the whole step; so are gradient sums when there are several micro-batches. Everything else
lives from its equation to its last use; where micro-batches overlap (a pipeline's stage), what the forward
leaves to the backward counts for every one in flight while micro-batches run. Which elementwise results reach
memory at all follows XLA's rules of fusion, see `memory/fusion.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autopar.core.graph import Alternative, Combine, Equation, OpKind, Phase, Value
from autopar.core.plan import Memory
from autopar.sharding.choices.model import Home, Key, Model
from autopar.sharding.memory.fusion import Fusion, fusions
from autopar.sharding.memory.late import late
from autopar.sharding.memory.moved import Held
from autopar.sharding.region import Region
from autopar.sharding.ways.grid import Grid, Layout

STATE, RESIDUAL, PASSING, BY, TURNED = "state", "residual", "passing", "passing by", "turned"


@dataclass(frozen=True, eq=False)
class Item:
    """Bytes per choice of a node in the half-open interval [start, stop) of ticks. key: the value, for
    messages.
    """

    node: int
    start: int
    stop: int
    nbytes: npt.NDArray[np.int64]
    role: str
    key: Key

    @property
    def lasting(self) -> bool:
        """Whether the bytes stay from one micro-batch's forward to its backward, or longer."""
        return self.role in (STATE, RESIDUAL)


def usage(
    region: Region,
    model: Model,
    grid: Grid,
    nbytes: Callable[[Value], int],
    in_flight: int,
    fused: Fusion | None = None,
) -> tuple[Item, ...]:
    """Returns all that is alive at some time; a residual's bytes are those of all micro-batches in flight.

    fused: what is computed inside of its readers, if that is known.
    """
    end, turn = model.ticks + 1, last_microbatch_tick(region, model)
    items: list[Item] = []
    local = Local(grid)

    def add(key: Key, home: Home, start: int, stop: int, role: str, factor: int = 1) -> None:
        each = local(nbytes(model.value(key)) * factor, home.layouts)
        if each.any() and stop > start:
            items.append(Item(home.node, start, stop, each, role, key))

    def keep(key: Key, home: Home, span: tuple[int, int, bool]) -> None:
        start, stop, residual = span
        if residual and region.whole and in_flight == 1:  # one program: freed as the backward goes
            add(key, home, start, stop, RESIDUAL)
        elif residual:
            add(key, home, 0, turn, RESIDUAL, in_flight)
        else:
            add(key, home, start, stop, PASSING)

    for v in region.state:
        if ((), v) in model.homes:
            add(((), v), model.homes[(), v], 0, end, STATE)
    spans = Spans(region, model, nbytes, fused)
    sums = dict(region.combine) if region.microbatches > 1 else {}
    for key, home in list(model.homes.items()):
        span = spans.of(key)
        if span is None:
            continue
        start, stop, residual = span
        given = region.whole and not key[0] and key[1] in region.arriving
        if given:  # the caller's, who may keep it
            start, stop = 0, end if region.microbatches == 1 else turn
        if not key[0] and key[1] in sums:
            add(key, home, 0, end, STATE, region.microbatches if sums[key[1]] is Combine.CONCAT else 1)
            stop = spans.added(key) if sums[key[1]].adds else min(stop, max(turn, start + 1))
        keep(key, home, (start, stop, residual))
        for when, longer in () if given else spans.longer(key, stop):
            keep(key, model.entry(key, when), longer)
    return (
        *items,
        *_turned(model, local, nbytes),
        *_held(model, local, nbytes),
        *_passing_by(model, local, nbytes),
    )


class Local:
    """Bytes on one device. The parts of equal layouts are counted once: most equations share theirs."""

    def __init__(self, grid: Grid):
        self._grid = grid
        self._known: dict[int, tuple[Sequence[Layout], npt.NDArray[np.int64]]] = {}
        self._bytes: dict[tuple[int, int], npt.NDArray[np.int64]] = {}

    def parts(self, layouts: Sequence[Layout]) -> npt.NDArray[np.int64]:
        """Returns into how many parts each layout cuts a tensor. Held layouts keep their identity."""
        known = self._known.get(id(layouts))
        if known is None:
            known = self._known[id(layouts)] = layouts, self._grid.parts(layouts)
        return known[1]

    def __call__(self, nbytes: int, layouts: Sequence[Layout]) -> npt.NDArray[np.int64]:
        """Returns the bytes of one part in each layout, rounded up; not to be changed."""
        key = nbytes, id(layouts)
        if key not in self._bytes:
            self._bytes[key] = -(-nbytes // self.parts(layouts))
        return self._bytes[key]


def last_microbatch_tick(region: Region, model: Model) -> int:
    """Returns the tick after the last equation that runs per micro-batch."""
    ticks = [step.tick for step in model.steps if step.phase is not Phase.APPLY]
    return max(ticks, default=model.ticks) + 1


class Spans:
    """When each homed value is alive."""

    def __init__(
        self, region: Region, model: Model, nbytes: Callable[[Value], int], fused: Fusion | None = None
    ):
        self.region, self.model = region, model
        self.split = not region.whole
        self.made: dict[Key, Phase] = {}
        for path, scope in model.scopes.items():
            for e in scope.equations:
                for v in e.outputs:
                    self.made[path, v] = scope.phase or e.phase
        self.skip: set[Key] = {((), v) for v in region.state} | {((), v) for v, _ in region.ties}
        self.skip |= loop_constants(model)
        self.fusion = fused or fusions(region, model)[0]
        self.late = late(region, model) if region.whole else {}
        self.last: dict[Key, int] = {}
        self.begun: dict[Key, int] = {}
        self.crossing: set[Key] = set()
        self.reading = Reading(model)
        self._begun: dict[Key, Phase] = {}
        for key, uses in model.uses.items():
            for tick, phase in uses:
                self._use(key, tick, phase, model.asked.get(tick))

    def of(self, key: Key) -> tuple[int, int, bool] | None:
        """Returns (start, stop, is a residual) of a value, or None when it takes no memory of its own."""
        result = not key[0] and key[1] in self.region.results
        read = key in self.last or key in self.reading.found
        if key in self.skip or (key in self.fusion.sources and not read and not result):
            return None
        # a slice that a loop reads is cut out of the whole when it is first read
        start = self.model.first[key]
        if key[0] and key not in self.made:
            start = self.begun.get(key, start)
        certain, crosses = self.reading.certain(key)
        last = max(self.last.get(key, start), start, certain)
        return start, self.model.ticks + 1 if result else last + 1, key in self.crossing or crosses

    def added(self, key: Key) -> int:
        """Returns the tick at which a micro-batch's value is in its sum (`program.emit`), and no longer read.

        What another region may want by itself waits for the end of the micro-batch.
        """
        uses = [tick for tick, phase in self.model.uses.get(key, ()) if phase is not Phase.APPLY]
        if key[1] in self.region.leaving or key in self.crossing:
            uses.append(last_microbatch_tick(self.region, self.model) - 1)
        return max(uses, default=self.model.first[key]) + 1

    def longer(self, key: Key, stop: int) -> list[tuple[Alternative, tuple[int, int, bool]]]:
        """Returns (start, stop, is a residual) beyond `stop` of a value that some alternatives keep for
        longer."""
        found = self.reading.found.get(key, {}).items()
        return [(when, (stop, last + 1, crosses)) for when, (last, crosses) in found if last >= stop]

    def _use(self, key: Key, tick: int, phase: Phase, when: Alternative | None) -> None:
        """Keeps alive what a read of a value needs: the value itself, or what it is computed from again.

        when: the alternative that reads it; what only it made is read only if it is taken.
        """
        own = self.model.owner(key) if self.model.asked else None
        when = when or own
        sources = self.fusion.sources.get(key)
        # separate programs hand over the value that the backward reads, not what it is made of
        handed = self.split and self.made.get(key) is Phase.FORWARD and phase is not Phase.FORWARD
        if sources is not None and not handed and tick not in self.fusion.kept_for.get(key, ()):
            for source in sources:
                self._use(source, tick, phase, when)
            return
        self._read(key, self.late.get(tick, tick), phase, when, apart=when is not None and own != when)

    def _read(self, key: Key, tick: int, phase: Phase, when: Alternative | None, apart: bool) -> None:
        """Keeps a value alive until a tick. apart: of alternatives only `when` reads it, which did not make
        it."""
        if not apart:
            self.last[key] = max(self.last.get(key, 0), tick)
            self.begun[key] = min(self.begun.get(key, tick), tick)
        arriving = not key[0] and key[1] in self.region.arriving
        begun = self._begun.setdefault(key, phase)
        made = self.made.get(key, begun if arriving else Phase.APPLY)
        crosses = made is Phase.FORWARD and phase is Phase.BACKWARD
        if apart:
            self.reading.add(key, when, tick, crosses)
        elif crosses:
            self.crossing.add(key)


class Reading:
    """Until when alternatives read values that are no part of them.

    Attributes:
        found: value → alternative → (the tick of its last read, whether that is in the backward and the value
            from the forward).
    """

    def __init__(self, model: Model):
        self.found: dict[Key, dict[Alternative, tuple[int, bool]]] = {}
        self._of_layer: dict[str, set[Alternative]] = {}
        for when in model.asked.values():
            self._of_layer.setdefault(when[0], set()).add(when)

    def add(self, key: Key, when: Alternative | None, tick: int, crosses: bool) -> None:
        """Records a read."""
        assert when is not None
        last, before = self.found.setdefault(key, {}).get(when, (0, False))
        self.found[key][when] = max(last, tick), before or crosses

    def certain(self, key: Key) -> tuple[int, bool]:
        """Returns until when a value is read whatever alternatives are taken, and whether that crosses."""
        found = self.found.get(key, {})
        layers = [self._of_layer[name] for name in dict.fromkeys(name for name, _ in found)]
        reads = [[found.get(when, (0, False)) for when in several] for several in layers]
        return (
            max((min(last for last, _ in each) for each in reads), default=0),
            any(all(crosses for _, crosses in each) for each in reads),
        )


def loop_constants(model: Model) -> set[Key]:
    """Returns the body inputs that are no slices: they are what the loop was given."""
    found: set[Key] = set()
    for path, loop in model.loops():
        found.update((path, b) for b in scope_inputs(loop.body.inputs, loop.consts + loop.carries))
    return found


def scope_inputs(inputs: Sequence[int], count: int) -> Iterable[int]:
    """Returns the body inputs that are no slices: consts and carries, which live outside of the body."""
    return inputs[:count]


def _turned(model: Model, local: Local, nbytes: Callable[[Value], int]) -> list[Item]:
    """Returns the transposed copies that matrix products read.

    A product over several dims of its first operand wants them last, as `xla::DotDecomposer` puts it; a
    compiler for CPUs writes such an operand anew (the gradient of what a layer made, which is multiplied with
    what it read). A single dim it turns within the product.
    """
    steps = {(step.path, step.index): step for step in model.steps if _turns(step.equation)}
    found: list[Item] = []
    for read in model.reads:
        step = None if read.site is None or read.site[2] else steps.get(read.site[:2])
        if step is not None and not read.tie and not read.lazy:
            each = local(nbytes(model.value(read.key)), read.target.layouts)
            if read.target.node == step.node:  # gone before its partial sums are added up
                size = nbytes(model.value((step.path, step.equation.outputs[0])))
                later = np.maximum(0, step.ways.resolving[0] - 1) * local(size, step.ways.made[0])
                each = np.maximum(0, each - later)
            found.append(Item(read.target.node, step.tick, step.tick + 1, each, TURNED, read.key))
    return found


def _held(model: Model, local: Local, nbytes: Callable[[Value], int]) -> list[Item]:
    """Returns what held copies take, from the first reader in the forward to the first in the backward."""
    found: list[Item] = []
    for each in model.holdings:
        size = local(nbytes(model.value(each.of)), each.home.layouts)
        start = min(tick for tick, phase in model.uses[each.of] if phase is Phase.FORWARD)
        stop = min(tick for tick, _ in model.uses[each.key]) + 1
        taken = np.where(np.arange(len(size)) < len(size) // 2, 0, size)
        found.append(Item(each.node, start, stop, taken, RESIDUAL, each.of))
    return found


def _turns(equation: Equation) -> bool:
    """Whether the first operand of a product has several dims that are summed over before one that is not."""
    rule = equation.rule
    first = rule.operands[0] if rule is not None and rule.operands else None
    if equation.kind is not OpKind.CONTRACTION or rule is None or first is None:
        return False
    summed = [bool(dim) and all(f in rule.reductions for f in dim) for dim in first]
    return sum(summed) > 1 and not all(summed[-sum(summed) :])


def _passing_by(model: Model, local: Local, nbytes: Callable[[Value], int]) -> list[Item]:
    """Returns what exists only while one operation runs: operands in its own layout, sums not yet scattered.

    Operands are counted beyond their finest layout, even where the value already has the wanted one, since
    that depends on two choices: the solver sees more than the truth by at most the operands of one operation.
    A plan's memory counts what really is moved (`memory/moved.py`) instead of these.
    """
    found: list[Item] = []
    ticks = model.ticks_of

    def add(key: Key, node: int, tick: int, sizes: npt.NDArray[np.int64]) -> None:
        if sizes.any():
            found.append(Item(node, tick, tick + 1, sizes, BY, key))

    for read in model.reads:
        tick = None if read.site is None else ticks.get(read.site[:2])
        if tick is None or read.tie or read.copy or read.target.node == read.source.node:
            continue
        each = local(nbytes(model.value(read.key)), read.target.layouts)
        add(read.key, read.target.node, tick, each - each.min())
    for step in model.steps:
        for k, v in enumerate(step.equation.outputs):
            if step.ways.sums[k]:
                size, beside = nbytes(model.value((step.path, v))), step.ways.resolving[k]
                add((step.path, v), step.node, step.tick, local(size, step.ways.made[k]) * beside)
    return found


def totals(
    items: Sequence[Item], held: Sequence[Held], chosen: Sequence[int], in_flight: int, limit: int
) -> Memory:
    """Returns the memory of a choice per node; its `peak` is the most that is alive at any tick."""
    state = residual = 0
    spans = [(each.start, each.stop, each.nbytes) for each in held]
    for item in items:
        used = int(item.nbytes[chosen[item.node]])
        state += used if item.role == STATE else 0
        if item.role in (STATE, BY):
            continue
        residual += used if item.role == RESIDUAL else 0
        spans.append((item.start, item.stop, used))
    kept = residual // max(1, in_flight)
    alive = most_alive(spans)
    return Memory(state, kept, in_flight, max(0, alive - kept * in_flight), limit)


def most_alive(spans: Sequence[tuple[int, int, int]]) -> int:
    """Returns the most bytes at any tick of (start, stop, bytes), alive in [start, stop)."""
    ticks = max((stop for _, stop, _ in spans), default=0)
    return int(over_time(spans, ticks).max(initial=0))


def over_time(spans: Iterable[tuple[int, int, int]], ticks: int) -> npt.NDArray[np.int64]:
    """Returns the bytes at every tick of (start, stop, bytes), alive in [start, stop)."""
    steps = np.zeros(ticks + 1, np.int64)
    for start, stop, nbytes in spans:
        steps[min(start, ticks)] += nbytes
        steps[min(stop, ticks)] -= nbytes
    return np.cumsum(steps)[:-1]
