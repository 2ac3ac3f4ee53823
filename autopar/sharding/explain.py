"""Why a tensor lies as it does: what its layout costs, what each other would, and which neighbours decide."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autopar.core.errors import BadInput, PlanError
from autopar.core.graph import Graph
from autopar.core.plan import ShardingPlan
from autopar.core.spec import Spec, text
from autopar.sharding.options import Options
from autopar.sharding.problem.assemble import Floats
from autopar.sharding.problem.setting import Setting, canonical, limit_of, prepare
from autopar.sharding.problem.solving import minimise
from autopar.sharding.region import Region, extract

SECONDS = 5.0
"""Time to plan again with one layout pinned."""


@dataclass(frozen=True)
class Alternative:
    """A layout a tensor could have.

    Attributes:
        spec: the layout. nbytes: of the tensor on one device.
        alone: seconds per step more than the plan's if only this tensor (and copies of it) lay so; inf where
            that cannot be.
        replanned: seconds more if everything else is planned anew around it; None where not asked for.
        neighbours: (what, seconds more because of it), the largest first; negative ones would gain.
    """

    spec: Spec
    nbytes: int
    alone: float
    replanned: float | None
    neighbours: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Explanation:
    """Why a tensor lies as it does.

    Attributes:
        name, value: the tensor. spec: its layout in the plan. nbytes: on one device.
        seconds: what the plan spends on it per step: computing it, moving it to its readers.
        neighbours: (what, seconds): who it is moved for in the plan.
        alternatives: other layouts, the cheapest first.
    """

    name: str
    value: str
    spec: Spec
    nbytes: int
    seconds: float
    neighbours: tuple[tuple[str, float], ...]
    alternatives: tuple[Alternative, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.name} {self.value} is kept as {text(self.spec)}: {self.nbytes / 1e6:.3g} MB on a device, "
            f"{_ms(self.seconds)} a step for computing and moving it"
        ]
        lines += [f"    {_ms(seconds):>12}  {what}" for what, seconds in self.neighbours]
        if self.alternatives:
            lines.append("otherwise (time and memory more than now)")
        for a in self.alternatives:
            again = "" if a.replanned is None else f", {_more(a.replanned)} with the rest planned anew"
            megabytes = (a.nbytes - self.nbytes) / 1e6
            alone = "impossible alone" if math.isinf(a.alone) else _more(a.alone)
            lines.append(f"  {text(a.spec):<16} {alone}{again}, {megabytes:+.3g} MB")
            lines += [f"    {_more(seconds):>12}  {what}" for what, seconds in a.neighbours]
        return "\n".join(lines)


def explain(
    graph: Graph,
    equations: Iterable[int],
    plan: ShardingPlan,
    value: int,
    in_flight: int = 1,
    replan: int = 3,
    neighbours: int = 3,
) -> Explanation:
    """Returns why a value lies as it does in a plan.

    Args:
        graph: the step. equations: those that the plan is for. plan: maybe edited.
        value: its id in the graph.
        in_flight: as the plan was made.
        replan: for how many of the cheapest alternatives everything else is planned anew.
        neighbours: how many of them to name.

    Raises:
        BadInput: the value has no layout of its own: it is computed wherever it is read.
    """
    region = extract(graph, equations)
    options = Options(
        in_flight=in_flight, dtypes=plan.dtypes, products=plan.products, regather=plan.regather, share=False
    )
    v = region.ids.index(value) if value in region.ids else -1
    free = prepare(region, plan.mesh, canonical(options, region))
    if ((), v) not in free.model.homes:
        raise BadInput(
            f"{graph.values[value].name or 'the value'} has no layout of its own: it is not in this stage, "
            "or it is computed wherever it is read"
        )
    return _Explainer(free, plan, v, region).explanation(replan, neighbours)


class _Explainer:
    """The costs around one value in one plan."""

    def __init__(self, setting: Setting, plan: ShardingPlan, v: int, region: Region):
        self.setting, self.v, self.region = setting, v, region
        self.home = setting.model.homes[(), v]
        self.costs = setting.costs(0.0)
        self.chosen = _chosen(setting, plan, region)
        self.around: dict[int, list[tuple[int, Floats]]] = {}
        for (a, b), seconds in self.costs.edges.items():
            self.around.setdefault(a, []).append((b, seconds))
            self.around.setdefault(b, []).append((a, seconds.T))
        self.labels = _labels(setting)

    def explanation(self, replan: int, count: int) -> Explanation:
        setting, grid = self.setting, self.setting.grid
        value = setting.region.values[self.v]
        node, now = self.home.node, self.chosen[self.home.node]
        layout = self.home.layouts[now]
        spent = self._parts(now)
        best: dict[Spec, tuple[float, int]] = {}
        for c, other in enumerate(self.home.layouts):
            if other != layout:
                alone = sum(self._parts(c).values())
                best[grid.spec(other)] = min(best.get(grid.spec(other), (math.inf, c)), (alone, c))
        total = sum(spent.values())
        order = sorted(best, key=lambda spec: best[spec][0])
        found: list[Alternative] = []
        for i, spec in enumerate(order):
            seconds, c = best[spec]
            again = self._again(spec) if i < replan else None
            more = _difference(self._parts(c), spent)
            found.append(
                Alternative(
                    spec, self._nbytes(spec), seconds - total, again, _largest(more, count, self.labels, node)
                )
            )
        if replan:
            found.sort(key=lambda a: (a.replanned is None, a.replanned or 0.0, a.alone))
        return Explanation(
            name=value.name or "a value",
            value=str(value),
            spec=grid.spec(layout),
            nbytes=self._nbytes(grid.spec(layout)),
            seconds=total,
            neighbours=_largest(spent, count, self.labels, node),
            alternatives=tuple(found),
        )

    def _nbytes(self, spec: Spec) -> int:
        grid = self.setting.grid
        return -(-self.setting.nbytes(self.region.values[self.v]) // grid.shards(grid.layout(spec)))

    def _parts(self, choice: int) -> dict[int, float]:
        """Seconds at a choice of the value's node: its own, and those of moves for each neighbour.

        A copy adapts to the choice; its own readers stay as they are.
        """
        node = self.home.node
        parts = {node: float(self.costs.nodes[node][choice])}
        for other, seconds in self.around.get(node, []):
            if self.setting.model.nodes[other].name == "copy":
                options = seconds[choice] + self.costs.nodes[other]
                for third, more in self.around[other]:
                    if third != node:
                        options = options + more[:, self.chosen[third]]
                parts[other] = parts.get(other, 0.0) + float(np.min(options))
            else:
                parts[other] = parts.get(other, 0.0) + float(seconds[choice, self.chosen[other]])
        return parts

    def _again(self, spec: Spec) -> float | None:
        """Seconds more per step with the value pinned and everything else planned anew."""
        setting, options = self.setting, self.setting.options
        pinned = replace(options, pinned=((self.v, spec),), share=True)
        pinned_setting = prepare(setting.region, setting.mesh, pinned)
        limit = limit_of(options, setting.mesh)
        solved = minimise(pinned_setting.costs(0.0), limit, SECONDS, 1e-3)
        return math.inf if solved.chosen is None else solved.objective - self._objective()

    def _objective(self) -> float:
        costs = self.costs
        own = sum(float(cost[c]) for cost, c in zip(costs.nodes, self.chosen, strict=True))
        return own + sum(float(m[self.chosen[a], self.chosen[b]]) for (a, b), m in costs.edges.items())


def _chosen(setting: Setting, plan: ShardingPlan, region: Region) -> tuple[int, ...]:
    """A choice per node that gives the plan's layouts."""
    own = replace(setting.options, pinned=plan.specs)
    # a value without a home would get one by being pinned, and the model would be another
    kept = tuple((v, spec) for v, spec in canonical(own, region).pinned if ((), v) in setting.model.homes)
    pinned = replace(own, pinned=kept)
    solved = minimise(prepare(region, plan.mesh, pinned).costs(0.0), None, SECONDS, 1e-3)
    if solved.chosen is None:
        raise PlanError("the plan's layouts contradict each other; plan again")
    return solved.chosen


def _difference(there: dict[int, float], here: dict[int, float]) -> dict[int, float]:
    return {node: there.get(node, 0.0) - here.get(node, 0.0) for node in there | here}


def _largest(
    parts: dict[int, float], count: int, labels: Sequence[str], node: int
) -> tuple[tuple[str, float], ...]:
    """The neighbours with most at stake, in words."""
    ranked = sorted(parts.items(), key=lambda part: -abs(part[1]))[:count]
    words = ((("computing " if n == node else "") + labels[n], seconds) for n, seconds in ranked)
    return tuple((what, seconds) for what, seconds in words if abs(seconds) > 1e-12)


def _labels(setting: Setting) -> list[str]:
    """What each node stands for: a named tensor, an operation at a line, or a copy for some readers."""
    model = setting.model
    labels = [node.name for node in model.nodes]
    for step in reversed(model.steps):
        where = f" at {step.equation.source}" if step.equation.source else ""
        labels[step.node] = f"{step.equation.op}{where} ({step.phase})"
    for key, home in model.homes.items():
        if not key[0] and (name := model.value(key).name) and model.nodes[home.node].name == "state":
            labels[home.node] = name
    readers: dict[int, list[str]] = {}
    for read in model.reads:
        if model.nodes[read.source.node].name == "copy" and not read.copy:
            readers.setdefault(read.source.node, []).append(labels[read.target.node])
    for node, names in readers.items():
        unique = list(dict.fromkeys(names))
        labels[node] = " and ".join(unique[:2]) + (f" and {len(unique) - 2} more" if len(unique) > 2 else "")
    return labels


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4f} ms"


def _more(seconds: float) -> str:
    return "does not fit" if math.isinf(seconds) else f"{seconds * 1e3:+.4f} ms"


def find(graph: Graph, name: str) -> int:
    """Returns the id of the argument or result that a path names, e.g. "params/Block_3/Dense_0/kernel".

    The path may be spelled like `state.params['Block_3']['Dense_0']['kernel']` too, and may leave out its
    beginning as long as it means one tensor.

    Raises:
        BadInput: none, or several.
    """
    wanted = tokens(name)
    every = {v: tokens(value.name) for v, value in enumerate(graph.values) if value.name}
    exact = [v for v, path in every.items() if path == wanted]
    found = exact or [v for v, path in every.items() if wanted and path[-len(wanted) :] == wanted]
    state = [v for v in found if v in graph.inputs]
    found = state or found
    if len(found) == 1:
        return found[0]
    names = ["/".join(path) for path in every.values()]
    if found:
        some = ", ".join("/".join(every[v]) for v in found[:4])
        raise BadInput(f"{name!r} may be any of {len(found)} tensors: {some}; give more of the path")
    close = difflib.get_close_matches("/".join(wanted), names, n=3, cutoff=0.3)
    raise BadInput(f"no tensor is called {name!r}; did you mean {' or '.join(close or names[:3])}?")


def tokens(name: str) -> tuple[str, ...]:
    """Returns the parts of a tree path, however it is spelled: a.b['c'][0] or a/b/c/0."""
    for mark in ("['", "']", '["', '"]', "[", "]", "."):
        name = name.replace(mark, "/")
    return tuple(part for part in name.split("/") if part)
