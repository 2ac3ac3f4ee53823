"""What each layer computes again in its backward pass, chosen with all layouts under a memory limit.

The graph holds every alternative of every layer, and one integer program chooses among them and all layouts
(`choices/alternatives.py`); where it is small it is solved as a whole, which bounds what any choice can
reach, or proves that nothing fits. A larger one is branched on its layers first: the alternatives that are
taken make an ordinary graph (`limit/restrict.py`), whose own program is solved. Few assignments are gone
through completely, as far as the time they need without a limit does not rule them out. Of many, those are
looked at that save most bytes per second that computing again takes, layer by layer (the choices at every
price of memory, as far as layers do not influence each other); how many layers have to compute more is
bisected.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from autopar.core.errors import DoesNotFit, PlanError
from autopar.core.graph import Alternative, Graph, OpKind, Remat
from autopar.core.mesh import Mesh
from autopar.core.plan import ShardingPlan
from autopar.sharding import plan as intra
from autopar.sharding.limit.restrict import choosing, restrict
from autopar.sharding.limit.shallow import layer_kinds, shallow
from autopar.sharding.memory.alive import BY
from autopar.sharding.options import Options
from autopar.sharding.problem.assemble import assemble
from autopar.sharding.problem.conditional import conditional
from autopar.sharding.problem.setting import Setting, canonical, limit_of, prepare
from autopar.sharding.problem.solving import Solved, minimise
from autopar.sharding.region import extract
from autopar.sharding.text import gigabytes

Taken: TypeAlias = tuple[Remat, ...]
"""An alternative for every layer that has several."""

WHOLE = 250
"""A program of at most so many nodes is solved as a whole."""

ENUMERATED = 27
"""So many assignments are all gone through."""

COARSE = 24
"""How many layers compute more is found out to the length of the path over this."""

SECONDS = 30.0
"""Processor time after which the best assignment found so far is returned."""

PROVING = 15.0
"""Processor time for proofs that assignments which were not planned are no faster."""

UNLIMITED = 1 << 60
"""Bytes that no plan needs."""

MOST_SHOWN = 6
"""Of so many layers it is said what each costs."""

WORDS = {
    Remat.PRODUCTS: "all but products",
    Remat.PARTS: "everything, part by part",
    Remat.FULL: "everything",
}


@dataclass(frozen=True)
class Chosen:
    """What to compute again.

    Attributes:
        remat: the alternative of every layer that has several.
        plan: of the graph in which these are taken.
        seconds: per step, what computing again costs: per layer, or of many layers together.
        bound: seconds per step that no assignment goes below; 0 if not known.
        tried: how many assignments were planned exactly.
    """

    remat: tuple[Alternative, ...]
    plan: ShardingPlan
    seconds: tuple[float, ...]
    bound: float
    tried: int

    def text(self) -> str:
        """Returns what is computed again and what that costs, for people."""
        again = [each for each in self.remat if each[1] is not Remat.NONE]
        if not again:
            return f"memory is short; of {self.tried} choices of layers to recompute, none was faster"
        each = len(self.seconds) == len(again)
        costs = [f" ({1e3 * s:.3g} ms)" for s in self.seconds] if each else [""] * len(again)
        words = ", ".join(f"{name or 'the step'}: {WORDS[r]}{cost}" for (name, r), cost in zip(again, costs))
        total = "" if each else f"; together {1e3 * sum(self.seconds):.3g} ms"
        return f"memory is short; recomputed in the backward pass: {words}{total}"


def are_few(graph: Graph) -> bool:
    """Returns whether all assignments of alternatives are gone through."""
    return math.prod(map(len, choosing(graph).values())) <= ENUMERATED


def choose(graph: Graph, mesh: Mesh, options: Options) -> Chosen:
    """Returns the assignment of alternatives whose plan is fastest within the memory limit.

    Args:
        graph: holds alternatives. mesh, options: as for `plan`.

    Raises:
        DoesNotFit: no assignment fits; says what the best one misses, and whether that is proven.
    """
    return _chosen(intra.Same(graph), mesh, options)


@functools.lru_cache(maxsize=4)
def _chosen(same: intra.Same, mesh: Mesh, options: Options) -> Chosen:
    search = Search(same.graph, mesh, options)
    joint = search.joint() if search.small and not search.few else None
    if joint is not None and joint.status == "infeasible":
        raise search.failure(proven=True)
    for taken in search.candidates(joint):
        search.began = search.began or time.process_time()
        search.visit(taken)
        if search.late():
            break
    if search.best is None:
        raise search.failure(proven=search.few and search.excluded)
    best = search.best
    remat = tuple(zip(search.names, best))
    bound = search.bound(joint)
    return Chosen(remat, search.planned(best), search.seconds(best), bound, len(search.visited))


@dataclass
class Search:
    """Assignments seen so far. best: the fastest that fits. began: when the first was planned."""

    graph: Graph
    mesh: Mesh
    options: Options
    visited: dict[Taken, ShardingPlan | DoesNotFit] = field(default_factory=dict)
    best: Taken | None = None
    began: float = 0.0

    def __post_init__(self) -> None:
        self.layers = choosing(self.graph)
        self.names = tuple(self.layers)
        self._promises: dict[Taken, intra.Promise] = {}
        self._graphs: dict[Taken, Graph] = {}
        self.few = are_few(self.graph)
        every = layer_kinds(self.graph)
        self.kinds = {name: every[self.graph.layers.index(name)] if name else () for name in self.names}
        self.brief = shallow(self.graph, every)

    @functools.cached_property
    def setting(self) -> Setting:
        """The choice model of all alternatives."""
        region = extract(self.graph, range(len(self.graph.equations)))
        return prepare(region, self.mesh, canonical(self.options, region))

    # the integer program of all alternatives
    @property
    def small(self) -> bool:
        """Whether the whole program is one to solve at once."""
        products = sum(e.kind is OpKind.CONTRACTION for e in self.graph.equations)
        return products <= WHOLE and len(self.setting.model.nodes) <= WHOLE

    def joint(self) -> Solved:
        """Returns the solution of the whole program under the limit."""
        s = self.setting
        items = tuple(item for item in s.items if item.role != BY)
        costs = conditional(assemble(s.model, s.grid, s.nbytes, items, 0.0), s.model)
        limit = limit_of(self.options, self.mesh)
        return minimise(costs, limit, self.options.seconds, self.options.gap)

    def taken(self, solved: Solved) -> Taken | None:
        """Returns the layers' part of a solution."""
        if solved.chosen is None:
            return None
        own = solved.chosen[len(solved.chosen) - len(self.layers) :]
        return tuple(remats[k] for remats, k in zip(self.layers.values(), own))

    # assignments
    def candidates(self, joint: Solved | None) -> Iterator[Taken]:
        """Yields assignments worth planning; which come next depends on what was found of the last."""
        if joint is not None and (first := self.taken(joint)) is not None:
            yield first
        if self.few:
            yield from self._promising()
            return
        path = self._path()
        low, high = -1, len(path) - 1  # low does not fit, or is slower because so little is left
        yield path[high]
        while high - low > max(1, len(path) // COARSE):
            middle = (low + high) // 2
            yield path[middle]
            low, high = (low, middle) if self.best == path[middle] else (middle, high)
        if self.best is None:  # computing more again can need more at once: look at the others, too
            yield from path[:: max(1, len(path) // 8)]
        yield from self._relaxed(path[0])

    def _promising(self) -> Iterator[Taken]:
        """Yields assignments, the one first that promises to be fastest, until none promises to be faster
        than the best that was planned. Promises that come cheap are too good: an assignment is looked at
        thoroughly before it is yielded."""
        every = itertools.product(*self.layers.values())
        waiting = [(self.promise(taken).seconds, k, taken, False) for k, taken in enumerate(every)]
        heapq.heapify(waiting)
        while waiting:
            promised, k, taken, sure = heapq.heappop(waiting)
            if self.best is not None and promised >= self.planned(self.best).objective:
                return
            if sure:
                yield taken
            else:
                seconds = self.promise(taken, thorough=True).seconds
                heapq.heappush(waiting, (seconds, k, taken, True))

    def _relaxed(self, kept: Taken) -> Iterator[Taken]:
        """Yields the best assignment with one layer less that computes again, as long as one fits."""
        before: Taken | None = None
        while self.best is not None and self.best != before:
            before = self.best
            kinds = {(self.kinds[name], remat): k for k, (name, remat) in enumerate(zip(self.names, before))}
            for k in kinds.values():  # of like layers one is tried
                if before[k] is not kept[k] and self.best == before:
                    yield (*before[:k], kept[k], *before[k + 1 :])

    def _path(self) -> list[Taken]:
        """Returns assignments from keeping everything on, each of which saves more bytes than the one before,
        the cheapest bytes first."""
        kept = tuple(Remat.NONE if Remat.NONE in r else r[0] for r in self.layers.values())
        measured = self._measured(dict(zip(self.names, kept)))
        steps: list[tuple[float, int, Remat]] = []
        for k, (name, remats) in enumerate(self.layers.items()):
            before = (0.0, 0)
            for remat in remats:
                if remat is kept[k]:
                    continue
                seconds, saved = measured[self.kinds[name], remat]
                if saved > before[1]:
                    steps.append(((seconds - before[0]) / (saved - before[1]), k, remat))
                    before = seconds, saved
        path, now = [kept], list(kept)
        for _, k, remat in sorted(steps, key=lambda step: step[:2]):
            order = list(self.layers.values())[k]
            if order.index(remat) > order.index(now[k]):
                now[k] = remat
                path.append(tuple(now))
        return path

    def _measured(self, kept: dict[str, Remat]) -> dict[tuple[Hashable, Remat], tuple[float, int]]:
        """Returns per kind of layer and alternative the seconds it takes and the bytes it saves, measured on
        one layer of a graph of few. kept: the alternative of every layer that saves nothing."""
        layers = choosing(self.brief)
        middle = {self.kinds[name]: name for name in (*reversed(layers), *list(layers)[1:2])}
        base = self._brief({name: kept[name] for name in layers})
        found: dict[tuple[Hashable, Remat], tuple[float, int]] = {}
        for kind, name in middle.items():
            for remat in layers[name]:
                if remat is not kept[name]:
                    plan = self._brief({other: kept[other] for other in layers} | {name: remat})
                    saved = base.memory.activations - plan.memory.activations
                    found[kind, remat] = max(0.0, plan.objective - base.objective), saved
        return found

    def _brief(self, taken: dict[str, Remat]) -> ShardingPlan:
        """Returns the plan of few layers whatever memory it needs."""
        graph = restrict(self.brief, taken)
        unlimited = replace(self.options, limit=UNLIMITED, regather=False)
        return intra.plan(graph, range(len(graph.equations)), self.mesh, unlimited)

    def visit(self, taken: Taken) -> None:
        """Plans an assignment, unless it cannot be the best."""
        if taken in self.visited:
            return
        ceiling = self.planned(self.best).objective if self.best else math.inf
        if self.few and self.best and self.promise(taken).seconds >= ceiling:
            return
        self._visit(taken, ceiling)

    def _visit(self, taken: Taken, ceiling: float) -> None:
        try:
            self.visited[taken] = found = self._plan(taken, replace(self.options, ceiling=ceiling))
        except PlanError as error:
            self.visited[taken] = error if isinstance(error, DoesNotFit) else DoesNotFit(str(error))
            return
        if self.best is None or found.objective < self.planned(self.best).objective:
            self.best = taken

    def planned(self, taken: Taken) -> ShardingPlan:
        """Returns the plan of an assignment that fits."""
        found = self.visited[taken]
        assert isinstance(found, ShardingPlan)
        return found

    def fastest(self, taken: Taken) -> float:
        """Returns seconds that an assignment needs whatever memory there is."""
        return self._unlimited(taken).bound

    def promise(self, taken: Taken, thorough: bool = False) -> intra.Promise:
        """Returns what can be expected of an assignment within the limit. thorough: known better."""
        if taken not in self._promises or thorough:
            graph = self._restricted(taken)
            every = range(len(graph.equations))
            self._promises[taken] = intra.promise(graph, every, self.mesh, self.options, thorough)
        return self._promises[taken]

    def seconds(self, taken: Taken) -> tuple[float, ...]:
        """Returns what computing again costs, layer by layer, or of many layers together."""
        again = [k for k, remat in enumerate(taken) if remat is not Remat.NONE]
        one_less = [(*taken[:k], Remat.NONE, *taken[k + 1 :]) for k in again]
        if len(again) > MOST_SHOWN:
            one_less = [(Remat.NONE,) * len(taken)]
        return tuple(max(0.0, self.fastest(taken) - self.fastest(other)) for other in one_less)

    def _unlimited(self, taken: Taken) -> ShardingPlan:
        return self._plan(taken, replace(self.options, limit=UNLIMITED, regather=False))

    def _plan(self, taken: Taken, options: Options) -> ShardingPlan:
        graph = self._restricted(taken)
        return intra.plan(graph, range(len(graph.equations)), self.mesh, options)

    def _restricted(self, taken: Taken) -> Graph:
        """The graph of one assignment: asked for what it promises, then for its plan."""
        if taken not in self._graphs:
            self._graphs[taken] = restrict(self.graph, dict(zip(self.names, taken)))
        return self._graphs[taken]

    @property
    def excluded(self) -> bool:
        """Whether of every assignment it is proven that it does not fit."""
        visited = (isinstance(e, DoesNotFit) and e.least is not None for e in self.visited.values())
        every = itertools.product(*self.layers.values())
        return all(visited) and all(
            taken in self.visited or self.promise(taken).bound == math.inf for taken in every
        )

    def bound(self, joint: Solved | None) -> float:
        """Returns seconds that no assignment that fits goes below; 0 if not known."""
        if not self.few:  # computing again takes time, whatever it saves
            kept = tuple(Remat.NONE if Remat.NONE in remats else remats[0] for remats in self.layers.values())
            known = joint.bound if joint is not None and math.isfinite(joint.bound) else 0.0
            return max(known, self.fastest(kept))
        every = [*itertools.product(*self.layers.values())]
        waiting, until = {*every} - {*self.visited}, time.process_time() + PROVING
        goal = self.planned(self.best).objective * (1 - self.options.gap) if self.best else math.inf
        while True:  # as long as the weakest bound is not a plan's, it may be proven better
            weakest = min(every, key=self._at_least)
            if weakest not in waiting or self._at_least(weakest) >= goal or time.process_time() > until:
                return self._at_least(weakest)
            waiting.remove(weakest)
            self.promise(weakest, thorough=True)

    def _at_least(self, taken: Taken) -> float:
        found = self.visited.get(taken)
        if isinstance(found, ShardingPlan):
            return found.bound
        if found is not None and found.least is not None:
            return math.inf
        return self.promise(taken).bound

    def late(self) -> bool:
        """Whether time is up and there is something to return."""
        return self.best is not None and time.process_time() - self.began > SECONDS

    def failure(self, proven: bool) -> DoesNotFit:
        """Returns the error when nothing fits, with what the assignment says that takes least."""
        if not self.visited:
            self._visit(tuple(remats[-1] for remats in self.layers.values()), math.inf)
        errors = {taken: e for taken, e in self.visited.items() if isinstance(e, DoesNotFit)}
        limit = gigabytes(limit_of(self.options, self.mesh))
        taken = min(errors, key=lambda t: errors[t].leanest or errors[t].missing or math.inf)
        nearest, least = errors[taken], [e.least for e in errors.values() if e.least is not None]
        again = [f"{n}: {r}" for n, r in zip(self.names, taken) if r is not Remat.NONE][:MOST_SHOWN]
        words = f"recomputing {', '.join(again)}" if again else "recomputing nothing"
        why = "no choice of layers to recompute was found that does"
        if proven:
            most = f", the least that any takes is {gigabytes(min(least))}" if least else ""
            why = f"it is proven that no choice of layers to recompute fits{most}"
        return DoesNotFit(
            f"nothing fits into {limit}; {why}; nearest is {words}: {nearest}; add devices, use more "
            "micro-batches",
            nearest.missing,
            nearest.leanest,
            min(least) if proven and least else None,
        )
