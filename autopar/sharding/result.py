"""From a choice per node to a plan: layouts of all values, and what the compiled program will do and take."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from autopar.core.graph import Phase, Value
from autopar.core.plan import Collective, LoopLayouts
from autopar.core.spec import Spec
from autopar.sharding.choices.copies import moved_for
from autopar.sharding.choices.model import Home, Key, Lazy, Model, Path
from autopar.sharding.region import Region
from autopar.sharding.ways.cost import SLICE, collective
from autopar.sharding.ways.grid import Grid, Layout
from autopar.sharding.ways.resharding import table_for
from autopar.sharding.ways.strategies import lead

Triples = tuple[tuple[int, int, Spec], ...]


@dataclass
class Outcome:
    """What a choice means. held: see `ShardingPlan`. seconds: per phase, for a whole step."""

    layouts: dict[Key, Layout] = field(default_factory=dict)
    uses: dict[tuple[Path, int, int], Layout] = field(default_factory=dict)
    partials: dict[tuple[Path, int, int], Layout] = field(default_factory=dict)
    held: dict[Key, tuple[Key, Layout]] = field(default_factory=dict)
    collectives: list[Collective] = field(default_factory=list)
    seconds: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(Phase, 0.0))


class Reader:
    """Reads a model at a choice per node."""

    def __init__(
        self,
        region: Region,
        model: Model,
        grid: Grid,
        nbytes: Callable[[Value], int],
        chosen: Sequence[int],
        regather: bool,
    ):
        self.region, self.model, self.grid, self.nbytes, self.chosen = region, model, grid, nbytes, chosen
        self.regather = regather
        self.out = Outcome()
        self.moved: set[tuple[Key, Layout, Layout, str]] = set()  # value, from, to, program
        self.wanted: set[tuple[Key, Layout, str]] = set()
        self.through: dict[Key, Layout] = {}

    def at(self, home: Home) -> Layout:
        """Returns the layout a home has under the choice."""
        return home.layouts[self.chosen[home.node]]

    def read(self) -> Outcome:
        """Returns what the choice means."""
        self.out.layouts = {key: self.at(home) for key, home in self.model.homes.items()}
        taken = (each for each in self.model.holdings if each.held(self.chosen[each.node]))
        self.out.held = {each.key: (each.of, self.at(each.home)) for each in taken}
        self.through = dict(self.out.held.values())
        for key in self.model.lazy:
            wanted = [self.at(target) for target, _ in self.model.wanted.get(key, ())]
            rank = len(self.model.value(key).shape)
            self.out.layouts[key] = common(wanted) if wanted else ((),) * rank
        for site, home in self.model.made.items():
            path, i, j = site
            key = path, self.model.scopes[path].equations[i].outputs[j]
            if self.at(home) != self.out.layouts[key]:
                self.out.partials[site] = self.at(home)
        self._steps()
        self._reads()
        self._lazies()
        return self.out

    def _steps(self) -> None:
        for step in self.model.steps:
            way = step.ways[self.chosen[step.node]]
            self.out.seconds[step.phase] += way.seconds * step.times
            for t in way.traffic:
                value = self._outer((step.path, step.equation.outputs[t.result]))
                self._add(t.kind, t.axes, t.nbytes, t.seconds, step.times, value, step.phase)

        for (node, phase), seconds in self.model.streaming.items():
            self.out.seconds[phase] += float(seconds[self.chosen[node]])

    def _reads(self) -> None:
        for read in self.model.reads:
            if read.lazy or read.copy:
                continue
            want = self.at(read.target)
            have = self.at(read.source) if read.tie else self.out.layouts[read.key]
            if read.site is not None and not read.tie and want != have:
                self.out.uses[read.site] = want
            of = self.out.held.get(read.key, (read.key, have))[0]
            if want != have and of in self.through:  # both passes go by where it is held
                self._move(of, have, self.through[of], Phase.FORWARD, read.times)
                have = self.through[of]
            self._move(read.key, have, want, read.phase, read.times, len(read.kernels))

    def _lazies(self) -> None:
        """Lazy values are made in a layout of which every reader takes a part."""
        for key, lazy in self.model.lazy.items():
            have = self.out.layouts[key]
            phase, times = self._rhythm(lazy)
            for target, site in self.model.wanted.get(key, ()):
                want = self.at(target)
                if site is not None and want != have:
                    self.out.uses[site] = want
                    self._move(key, have, want, phase, times)
            if lazy.op is None or lazy.position:
                continue
            way = lead(lazy.op, lazy.position, have, self.grid)
            if way.results[lazy.position] != have:
                self.out.partials[lazy.path, lazy.index, lazy.position] = way.results[lazy.position]
            for k, origin in lazy.sources:
                want = way.operands[k]
                if want is not None and want != self.out.layouts[origin]:
                    self.out.uses[lazy.path, lazy.index, k] = want
                    self._move(origin, self.out.layouts[origin], want, phase, times)

    def _rhythm(self, lazy: Lazy) -> tuple[Phase, int]:
        scope = self.model.scopes[lazy.path]
        phase = scope.phase or scope.equations[lazy.index].phase
        return phase, self.region.times(phase) * scope.trips

    def _move(self, key: Key, have: Layout, want: Layout, phase: Phase, times: int, kernels: int = 0) -> None:
        """Counts a change of layout, the first time it happens in a program; of several that begin with the
        same moves a compiler makes these once."""
        group = moved_for(self.region, self.regather, key, phase)
        if have == want or (key, want, group) in self.wanted:
            return
        self.wanted.add((key, want, group))
        value = self.model.value(key)
        size = self.nbytes(value)
        table = table_for(value.shape, self.grid)
        chain = table.chain(have, want)
        if kernels:
            once, more = table.apart(have, chain)
            self.out.seconds[phase] += times * size * (once + (kernels - 1) * more)
        for before, move in zip((have, *(move.after for move in chain)), chain, strict=False):
            hop = key, before, move.after, group
            if hop in self.moved:
                continue
            self.moved.add(hop)
            self.out.seconds[phase] += times * size * table.ordering(before, (move,))
            if move.kind != SLICE and size:
                price = collective(self.grid, move.kind, move.axes)
                local = size * move.share
                seconds = price.seconds(local)
                self._add(move.kind, move.axes, price.wire * local, seconds, times, self._outer(key), phase)

    def _add(
        self,
        kind: str,
        axes: tuple[int, ...],
        wire: float,
        seconds: float,
        count: int,
        value: int,
        phase: Phase,
    ) -> None:
        names = tuple(self.grid.names[a] for a in axes)
        self.out.collectives.append(Collective(kind, names, round(wire), seconds, count, value, phase))
        self.out.seconds[phase] += seconds * count

    def _outer(self, key: Key) -> int:
        """Returns the value's id in the region; inside a loop, that of the loop's first result."""
        path, v = key
        return v if not path else self.region.equations[path[0]].outputs[0]


def common(layouts: Sequence[Layout]) -> Layout:
    """Returns the finest layout of which all of these are parts."""

    def shared(cuts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        same = itertools.takewhile(lambda axes: len({*axes}) == 1, zip(*cuts))
        return tuple(axes[0] for axes in same)

    return tuple(map(shared, zip(*layouts, strict=True)))


def loops(out: Outcome, model: Model, grid: Grid, path: Path = ()) -> tuple[LoopLayouts, ...]:
    """Returns the layouts inside the loops of a scope."""
    inner = sorted(p for p in model.scopes if len(p) == len(path) + 1 and p[: len(path)] == path)
    return tuple(
        LoopLayouts(
            p[-1],
            specs_of(out, grid, p),
            triples(out.uses, grid, p),
            triples(out.partials, grid, p),
            loops(out, model, grid, p),
        )
        for p in inner
    )


def specs_of(out: Outcome, grid: Grid, path: Path) -> tuple[tuple[int, Spec], ...]:
    """Returns (value id, layout) of a scope's tensors, by id."""
    return tuple(sorted((v, grid.spec(x)) for (p, v), x in out.layouts.items() if p == path))


def triples(found: dict[tuple[Path, int, int], Layout], grid: Grid, path: Path) -> Triples:
    """Returns (equation, position, layout) of a scope, in order."""
    return tuple(sorted((i, k, grid.spec(x)) for (p, i, k), x in found.items() if p == path))
