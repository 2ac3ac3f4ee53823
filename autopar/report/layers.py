"""What a plan does layer by layer: what is split over which mesh axis, and what is sent over it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from autopar.core.graph import Graph, OpKind, Phase, Value
from autopar.core.plan import Plan, Stage
from autopar.core.spec import Spec
from autopar.report.tensors import path_of

PARAMETERS, MOMENTS, ACTIVATIONS = "parameters", "optimizer state", "activations"
LANES: tuple[str, ...] = (PARAMETERS, MOMENTS, ACTIVATIONS)

_INDEX = re.compile(r"\d+")
BETWEEN = "outside of layers"


@dataclass(frozen=True)
class Tensor:
    """Tensors of a layer: what they are (one of `LANES`), what they are called there, how each is cut."""

    lane: str
    name: str
    value: Value
    spec: Spec
    count: int = 1

    @property
    def nbytes(self) -> int:
        return self.count * self.value.nbytes


@dataclass(frozen=True)
class Sent:
    """One kind of collective of a layer, summed. nbytes: one device sends in a step. seconds: in a step."""

    phase: Phase
    kind: str
    axes: tuple[str, ...]
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class Layers:
    """Consecutive layers that do the same.

    Attributes:
        names: of the layers.
        tensors: of one of them, by lane, biggest first. sent: by one of them, longest first.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    sent: tuple[Sent, ...]

    @property
    def title(self) -> str:
        """The name of one layer, or the first and last and how many there are."""
        if len(self.names) == 1:
            return self.names[0]
        return f"{self.names[0]} … {self.names[-1]}  × {len(self.names)}"

    def share(self, lane: str, axis: str) -> float | None:
        """Returns what share of a lane's bytes is cut over an axis; None where there are none."""
        sizes = [(t.nbytes, any(axis in dim for dim in t.spec)) for t in self.tensors if t.lane == lane]
        whole = sum(nbytes for nbytes, _ in sizes)
        return sum(nbytes for nbytes, is_cut in sizes if is_cut) / whole if whole else None


def layers_of(plan: Plan, stage: int, graph: Graph) -> tuple[Layers, ...]:
    """Returns a stage's layers in order, equal neighbours folded; what belongs to none comes first.

    Args:
        graph: of the step that was planned.
    """
    mine = sorted({e for x in plan.segments if x.stage == stage for e in x.equations})
    tensors, sent = _tensors(plan.stages[stage], graph, mine), _sent(plan.stages[stage], graph, mine)
    order = [k for k in (None, *range(len(graph.layers))) if k in tensors or k in sent]
    rows = (
        Layers(
            (BETWEEN if k is None else graph.layers[k],),
            tuple(_counted(tensors.get(k, ()))),
            tuple(sorted(sent.get(k, ()), key=lambda s: (-s.seconds, s.phase, s.kind, s.axes))),
        )
        for k in order
    )
    return tuple(_folded(rows))


def _counted(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns equal tensors once, by lane, biggest first."""
    found = [replace(t, count=n) for t, n in Counter(tensors).items()]
    return sorted(found, key=lambda t: (LANES.index(t.lane), -t.nbytes, t.name))


def _folded(rows: Iterable[Layers]) -> list[Layers]:
    found: list[Layers] = []
    for row in rows:
        if found and (found[-1].tensors, found[-1].sent) == (row.tensors, row.sent):
            found[-1] = replace(found[-1], names=(*found[-1].names, *row.names))
        else:
            found.append(row)
    return found


def _tensors(stage: Stage, graph: Graph, mine: Sequence[int]) -> dict[int | None, list[Tensor]]:
    """Returns layer → its parameters and optimizer state, where first read, and its products and results."""
    layout, batch = stage.sharding.layout, {*graph.batch}
    homes, readers = _homes(graph, mine), _readers(graph, mine)
    found: dict[int | None, list[Tensor]] = {}
    for v in graph.inputs:
        if v in homes and v not in batch and v in layout and graph.values[v].shape:
            layer, phase = homes[v]
            lane = MOMENTS if phase is Phase.APPLY else PARAMETERS
            found.setdefault(layer, []).append(
                _tensor(graph, v, lane, layout[v], _called(graph.values[v].name))
            )
    for i in mine:
        e = graph.equations[i]
        for v in e.outputs if e.phase is Phase.FORWARD and e.layer is not None else ():
            leaves = any(k != e.layer for k in readers.get(v, ()))
            shown = leaves or e.kind is OpKind.CONTRACTION
            if shown and v in layout and graph.values[v].shape:
                name = f"{e.op} {e.source}".strip() + " →" * leaves
                found.setdefault(e.layer, []).append(_tensor(graph, v, ACTIVATIONS, layout[v], name))
    return found


def _tensor(graph: Graph, v: int, lane: str, spec: Spec, name: str) -> Tensor:
    return Tensor(lane, name, replace(graph.values[v], name=""), spec)


def _homes(graph: Graph, mine: Sequence[int]) -> dict[int, tuple[int | None, Phase]]:
    """Returns value → layer and phase of its first reader that has a layer, else of its first reader."""
    found: dict[int, tuple[int | None, Phase]] = {}
    for i in mine:
        e = graph.equations[i]
        for v in e.operands:
            if v not in found or (found[v][0] is None and e.layer is not None):
                found[v] = e.layer, found[v][1] if v in found else e.phase
    return found


def _readers(graph: Graph, mine: Sequence[int]) -> dict[int, set[int | None]]:
    """Returns value → layers of the forward that read it."""
    found: dict[int, set[int | None]] = {}
    for i in mine:
        e = graph.equations[i]
        if e.phase is Phase.FORWARD and e.layer is not None:
            for v in e.operands:
                found.setdefault(v, set()).add(e.layer)
    return found


def _sent(stage: Stage, graph: Graph, mine: Sequence[int]) -> dict[int | None, list[Sent]]:
    """Returns layer → its collectives: those of what it makes, and of inputs it is the first to read."""
    layer = {v: k for v, (k, _) in _homes(graph, mine).items()}
    layer |= {v: graph.equations[i].layer for i in mine for v in graph.equations[i].outputs}
    sums: dict[tuple[int | None, Phase, str, tuple[str, ...]], tuple[int, float]] = {}
    for c in stage.sharding.collectives:
        key = layer.get(c.value), c.phase, c.kind, c.axes
        nbytes, seconds = sums.get(key, (0, 0.0))
        sums[key] = nbytes + c.nbytes * c.count, seconds + c.seconds * c.count
    found: dict[int | None, list[Sent]] = {}
    for (k, phase, kind, axes), (nbytes, seconds) in sums.items():
        found.setdefault(k, []).append(Sent(phase, kind, axes, nbytes, round(seconds, 12)))
    return found


def _called(name: str) -> str:
    """Returns the last two parts of a path, without the layer's number."""
    return "/".join(_INDEX.sub("*", part) for part in path_of(name)[-2:])
