"""What elementwise kernels read and write: seconds for every choice of the nodes that decide how much.

An elementwise result or a reduction that reaches memory is one kernel. It writes its own part, and reads the
parts of what it is made of, however many equations lie between (`memory/fusion.py`): those cost
nothing by themselves. What several kernels compute each for themselves is read by each of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import numpy as np

from autopar.core.graph import Alternative, OpKind, Phase
from autopar.sharding.choices.model import Home, Key, Model, Step
from autopar.sharding.memory.alive import Local
from autopar.sharding.memory.fusion import Fusion, alternatives
from autopar.sharding.problem.assemble import Floats
from autopar.sharding.region import Region
from autopar.sharding.ways.grid import Grid, Layout


def charge(region: Region, model: Model, found: Fusion, grid: Grid) -> None:
    """Fills `Model.streaming`. found: what is computed inside of its readers.

    What is read and written is gathered first: nodes of one kind (the updates of like parameters) gather the
    same, and share one sum.
    """
    touching, sums = _Touching(region, model, found), _Sums(grid)
    gathered: dict[tuple[int, Phase], list[_Part]] = {}

    def add(key: Key, home: Home, phase: Phase, times: int) -> None:
        if size := model.nbytes(key):
            gathered.setdefault((home.node, phase), []).append(sums.part(times * size, home.layouts))

    for kernel in model.steps:
        for key, home in touching.by(kernel):
            add(key, home, kernel.phase, kernel.times)
    for sliced in _slices(region, model):
        add(*sliced)
    model.streaming.update((key, sums(tuple(parts))) for key, parts in gathered.items())


_Part: TypeAlias = tuple[int, int]
"""Bytes read or written in a step, and the identity of the layouts in which they lie."""


class _Sums:
    """Seconds to read and write parts of tensors, for every choice; those of equal lists are one array."""

    def __init__(self, grid: Grid):
        self._memory, self._local = grid.memory, Local(grid)
        self._each: dict[_Part, Floats] = {}
        self._known: dict[tuple[_Part, ...], Floats] = {}

    def part(self, nbytes: int, layouts: Sequence[Layout]) -> _Part:
        """Returns what stands for the bytes of a tensor that lies so."""
        part = nbytes, id(layouts)
        if part not in self._each:
            self._each[part] = nbytes / self._memory / self._local.parts(layouts)
        return part

    def __call__(self, parts: tuple[_Part, ...]) -> Floats:
        """Returns the seconds of several, added up in their order."""
        if parts not in self._known:
            self._known[parts] = functools.reduce(np.add, (self._each[part] for part in parts))
        return self._known[parts]


def _slices(region: Region, model: Model) -> Iterator[tuple[Key, Home, Phase, int]]:
    """Yields (value, where its layout is decided, phase, how often it is read or written) of what loops take
    slice by slice, and of what they stack.

    An elementwise kernel reads and writes slices in their place. For others a slice is cut out first (read,
    written), and put into the stack at last; stacks begin as zeros.
    """
    loops = list(model.loops())
    read, made = _apart(model) if loops else (set[Key](), set[Key]())
    for path, loop in loops:
        scope, around = model.scopes[path], model.scopes[path[:-1]]
        equation, phase = around.equations[path[-1]], scope.phase
        assert phase is not None
        often, once = (region.times(phase) * trips for trips in (scope.trips, around.trips))
        for b in loop.body.inputs[loop.consts + loop.carries :]:
            if (path, b) in read and (path, b) in model.homes:
                yield (path, b), model.homes[path, b], phase, 2 * often
        for k, v in enumerate(equation.outputs[loop.carries :], loop.carries):
            home = model.made.get((path[:-1], path[-1], k))
            if home is not None:
                yield (path[:-1], v), home, phase, (3 if (path, loop.body.outputs[k]) in made else 1) * once


def _apart(model: Model) -> tuple[set[Key], set[Key]]:
    """Returns what is read and what is made by kernels that compute none of their operands themselves, views
    looked through."""
    read, made = set[Key](), set[Key]()
    in_order = sorted(model.steps, key=lambda step: step.tick)
    for step in in_order:
        operands = {(step.path, v) for v in step.equation.operands}
        if not step.fuses or (step.equation.kind is OpKind.VIEW and not operands.isdisjoint(made)):
            made.update((step.path, v) for v in step.equation.outputs)
    for step in reversed(in_order):
        outputs = {(step.path, v) for v in step.equation.outputs}
        if not step.fuses or (step.equation.kind is OpKind.VIEW and not outputs.isdisjoint(read)):
            read.update((step.path, v) for v in step.equation.operands)
    return read, made


class _Touching:
    """Which values each kernel reads and writes, and in which layouts."""

    def __init__(self, region: Region, model: Model, found: Fusion):
        self.region, self.model, self.found = region, model, found
        self.makers = {(step.path, v): step for step in model.steps for v in step.equation.outputs}
        self.inner = {key: step for key, step in self.makers.items() if key in found.sources}
        self.handed = frozenset[Key]() if region.whole else self._handed()
        self.joined = alternatives(model)
        self._known: dict[int, list[tuple[int, Key]]] = {}

    def by(self, kernel: Step) -> Iterator[tuple[Key, Home]]:
        """Yields (value, where its layout is decided) of all that a kernel writes and reads, each once;
        nothing for what is no kernel of its own, or is priced as an operation (`ways/cost.py`)."""
        if kernel.equation.kind is OpKind.VIEW or not kernel.fuses:
            return
        keys = [(kernel.path, v) for v in kernel.equation.outputs]
        kept = [k for k, key in enumerate(keys) if self._written(key)]
        if not kept:
            return
        for k in kept:
            if keys[k] in self.model.homes:
                yield keys[k], Home(kernel.node, kernel.ways.made[k])
        yield from self._reads(kernel)

    def _reads(self, kernel: Step) -> Iterator[tuple[Key, Home]]:
        """Yields what a kernel reads, be it for equations before its own."""
        seen = set[tuple[Key, Alternative | None]]()
        waiting, visited = [kernel], {kernel.tick}
        while waiting:
            step = waiting.pop()
            when = self.model.asked.get(step.tick)
            for k, key in self._operands(step):
                for value, maker in self._ways(key, kernel):
                    if maker is not None:
                        if maker.tick not in visited:
                            visited.add(maker.tick)
                            waiting.append(maker)
                    elif (value, None) not in seen and (value, when) not in seen:
                        seen.add((value, when))
                        yield (
                            value,
                            self._decided(kernel, step, k) if value == key else self.model.homes[value],
                        )

    def _operands(self, step: Step) -> list[tuple[int, Key]]:
        """The operands of a step that lie somewhere and are read in some layout."""
        known = self._known.get(step.tick)
        if known is None:
            path, homes, wants = step.path, self.model.homes, step.ways.operands
            known = self._known[step.tick] = [
                (k, key)
                for k, v in enumerate(step.equation.inputs)
                if v is not None and (key := (path, v)) in homes and wants[k]
            ]
        return known

    def _ways(self, key: Key, kernel: Step) -> Iterable[tuple[Key, Step | None]]:
        """How a kernel comes by a value: by running the step that makes it, or by reading it (None).

        What is one of several alternatives' it takes from each of them, if it runs anything of them. A kernel
        that is part of an alternative itself is taken to do the same with all of another layer's.
        """
        if key not in self.joined:
            return ((key, self._inside(key, kernel)),)
        each = [(v, self._inside(v, kernel)) for v, _ in self.joined[key]]
        if all(maker is None for _, maker in each):
            return [(key, None)]
        return each[:1] if kernel.tick in self.model.asked else each

    def _written(self, key: Key) -> bool:
        return key not in self.found.sources or bool(self.found.kept_for.get(key)) or key in self.handed

    def _inside(self, key: Key, kernel: Step) -> Step | None:
        """The step that a kernel runs to compute what it reads itself."""
        maker = self.inner.get(key)
        if maker is None or (key in self.handed and maker.phase is not kernel.phase):
            return None
        return maker

    def _decided(self, kernel: Step, step: Step, k: int) -> Home:
        """Where it is decided how much of operand k of a step a kernel reads: at the step, but for steps that
        may not be taken where the kernel is; of these it reads as much as is its own part."""
        asked = self.model.asked
        if kernel.tick not in asked or asked.get(step.tick) == asked[kernel.tick]:
            return Home(step.node, step.ways.operands[k])
        own = next((columns for columns in kernel.ways.operands if columns), kernel.ways.made[0])
        return Home(kernel.node, own)

    def _handed(self) -> frozenset[Key]:
        """What separate programs hand over: made in the forward, read in the backward."""
        found = set[Key]()
        for key, step in self.makers.items():
            if step.phase is Phase.FORWARD and any(
                phase is not Phase.FORWARD for _, phase in self.model.uses.get(key, ())
            ):
                found.add(key)
        return frozenset(found)
