"""assign and cut: every equation somewhere, the segments in order compute what the whole graph computes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.core.errors import BadInput, PlanError
from autopar.core.graph import Combine, Equation, Graph, OpKind, Phase, Value
from autopar.core.program import Segment
from autopar.stages import assign, cut, holders

GOLDEN = Path(__file__).parent / "golden"
B, D, V = 8, 16, 64


@dataclass
class Maker:
    """Builds a graph equation by equation; `marks[i]` says whether equation i's phase is told to assign."""

    values: list[Value] = field(default_factory=list)
    equations: list[Equation] = field(default_factory=list)
    marks: list[bool] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    phase: Phase | None = None
    layer: int | None = None

    def value(self, shape, name="", dtype="float32"):
        self.values.append(Value(tuple(shape), dtype, name))
        return len(self.values) - 1

    def arg(self, shape, name):
        self.inputs.append(self.value(shape, name))
        return self.inputs[-1]

    def op(self, name, inputs, shape, kind=OpKind.FUSED, flops=0.0):
        out = self.value(shape)
        source = f"model.py:{len(self.equations) + 1}"
        phase = self.phase or Phase.FORWARD
        e = Equation(name, tuple(inputs), (out,), None, kind, flops, phase, self.layer, source)
        self.equations.append(e)
        self.marks.append(self.phase is not None)
        return out

    def dot(self, a, b, shape, name="dot"):
        return self.op(name, (a, b), shape, OpKind.CONTRACTION, 2.0 * B * D * D)


@dataclass(frozen=True)
class Shape:
    """What a random step has."""

    blocks: int = 3
    named: bool = True
    tied: bool = True
    clip: bool = True
    mask: bool = True
    decay: bool = False  # a sum of squared parameters in the loss
    accuracy: bool = False
    skips: tuple[tuple[int, int], ...] = ()
    microbatches: int = 2


def train_step(s: Shape) -> tuple[Graph, tuple[bool, ...]]:
    """A GPT's skeleton: embedding, blocks x + f(x W), head (tied or not), momentum with clipping, a step counter."""
    m = Maker()
    table = m.arg((V, D), "p.table")
    head = table if s.tied else m.arg((V, D), "p.head")
    weights = [m.arg((D, D), f"p.w{k}") for k in range(s.blocks)]
    params = [table, *([] if s.tied else [head]), *weights]
    moments = [m.arg(m.values[p].shape, f"m.{m.values[p].name[2:]}") for p in params]
    count = m.arg((), "count")
    ids, labels = m.arg((B,), "ids"), m.arg((B,), "labels")

    mask = m.op("iota", (), (B, D)) if s.mask else None  # unmarked: upstream of the forward
    m.phase = Phase.FORWARD
    x = m.op("gather", (table, ids), (B, D), OpKind.MEMORY)
    xs, hs, decays = [x], [], []
    for k, w in enumerate(weights):
        m.layer = k if s.named else None
        for a, b in s.skips:
            if b == k and a < k:
                x = m.op("add", (x, xs[a]), (B, D))
        xs[k] = x
        h = m.op("gelu", (x, mask), (B, D))
        hs.append(h)
        y = m.dot(h, w, (B, D))
        m.layer = None
        x = m.op("add", (x, y), (B, D))
        xs.append(x)
    turned = m.op("transpose", (head,), (D, V), OpKind.VIEW)
    logits = m.dot(x, turned, (B, V))
    loss = m.op("loss", (logits, labels), (), OpKind.MEMORY)
    if s.decay:
        for w in weights:
            decays.append(m.op("sum", (m.op("square", (w,), (D, D)),), (), OpKind.MEMORY))
            loss = m.op("add", (loss, decays[-1]), ())

    m.phase = Phase.BACKWARD
    seed = m.op("broadcast", (None,), (B, V), OpKind.VIEW)
    g = m.op("dloss", (seed, logits, labels), (B, V))
    grads: dict[int, int] = {}
    grads[head] = m.dot(x, g, (V, D), "dhead")
    g = m.dot(g, turned, (B, D))
    later: dict[int, int] = {}
    for k in reversed(range(s.blocks)):
        m.layer = k if s.named else None
        grads[weights[k]] = m.dot(hs[k], g, (D, D), "dw")
        d = m.dot(g, weights[k], (B, D))
        d = m.op("dgelu", (d, xs[k]), (B, D))
        m.layer = None
        if k in later:
            d = m.op("add_any", (d, later.pop(k)), (B, D))
        g = m.op("add_any", (g, d), (B, D))
        for a, b in s.skips:
            if b == k and a < k:
                later[a] = m.op("add_any", (later[a], g), (B, D)) if a in later else g
        if s.decay:
            extra = m.op("mul", (weights[k], None), (D, D))
            grads[weights[k]] = m.op("add_any", (grads[weights[k]], extra), (D, D))
    dtable = m.op("scatter", (ids, g), (V, D), OpKind.MEMORY)
    grads[table] = m.op("add_any", (dtable, grads[table]), (V, D)) if s.tied else dtable

    m.phase = None
    outputs: list[int | None] = []
    scale = None
    if s.clip:
        norms = [m.op("sumsq", (grads[p],), (), OpKind.MEMORY) for p in params]
        total = norms[0]
        for n in norms[1:]:
            total = m.op("add", (total, n), ())
        scale = m.op("clip", (total,), ())
    following = m.op("add", (count, None), ())
    rate = m.op("schedule", (following,), ())
    new = []
    for p, mu in zip(params, moments):
        g = m.op("mul", (grads[p], scale), m.values[p].shape)
        mu = m.op("add", (m.op("mul", (mu, None), m.values[p].shape), g), m.values[p].shape)
        new.append(m.op("sgd", (p, mu, rate), m.values[p].shape))
        outputs.append(mu)
    outputs = [*new, *outputs, following, loss]
    combine = [(grads[p], Combine.MEAN) for p in params] + [(loss, Combine.MEAN)]
    if s.accuracy:
        hits = m.op("equal", (logits, labels), (B,))
        outputs.append(m.op("sum", (hits,), (), OpKind.MEMORY))
    aliases = tuple((i, i) for i in range(2 * len(params) + 1))
    graph = Graph(
        tuple(m.values),
        tuple(m.equations),
        tuple(m.inputs),
        tuple(outputs),
        tuple(f"block {k}" for k in range(s.blocks)) if s.named else (),
        aliases,
        (ids, labels),
        microbatches=s.microbatches,
        combine=tuple(combine),
        gradients=tuple((grads[p], p) for p in params),
    )
    graph.check()
    return graph, tuple(m.marks)


def evaluate(graph: Graph, equations, env: dict[int, int]) -> None:
    """Every operation as a hash of its name and operands: copies agree, anything else differs."""
    for i in equations:
        e = graph.equations[i]
        read = tuple(None if v is None else env[v] for v in e.inputs)
        env.update((v, hash((e.op, read, k))) for k, v in enumerate(e.outputs))


def run(graph: Graph, segments: tuple[Segment, ...]) -> list[int | None]:
    """Runs the segments in order, each seeing its declared inputs only and keeping its declared outputs only."""
    held = holders(graph, segments)
    env = {v: hash(("input", v)) for v in (*graph.inputs, *graph.constants)}
    made: dict[int, int] = {}
    for segment in segments:
        local = {}
        for v in segment.inputs:
            assert v in made or segment.stage in held[v], f"{segment.name} reads v{v}, which it does not hold"
            local[v] = made[v] if v in made else env[v]
        evaluate(graph, segment.equations, local)
        assert not set(segment.outputs) & set(made), "made twice"
        made.update((v, local[v]) for v in segment.outputs)
    return [None if v is None else made.get(v, env.get(v)) for v in graph.outputs]


def expected(graph: Graph) -> list[int | None]:
    env = {v: hash(("input", v)) for v in (*graph.inputs, *graph.constants)}
    evaluate(graph, range(len(graph.equations)), env)
    return [None if v is None else env[v] for v in graph.outputs]


def check_levels(graph: Graph, segments: tuple[Segment, ...]) -> None:
    """An apply segment reads results of its own stage or of lower levels; a level is one more than it waits for."""
    made = {v: s for s in segments for v in s.outputs}
    for s in segments:
        before = [made[v] for v in s.inputs if v in made and made[v].phase is Phase.APPLY]
        for b in before:
            assert b.level + (b.stage != s.stage) <= s.level, f"{s.name} reads {b.name}"
        if s.phase is Phase.APPLY and s.level:
            assert any(b.level + (b.stage != s.stage) == s.level for b in before), (
                f"{s.name} waits for nothing"
            )


def check_cut(graph: Graph, segments: tuple[Segment, ...]) -> None:
    live = {i for s in segments for i in s.equations}
    assert live == set(range(len(graph.equations))), "an equation is nowhere"
    assert run(graph, segments) == expected(graph)
    check_levels(graph, segments)
    for v, stages in holders(graph, segments).items():
        assert len(set(stages)) == len(stages)
        assert set(stages) >= {s.stage for s in segments if v in s.inputs}
    made = {v: s.stage for s in segments for v in s.outputs}
    for o, i in graph.aliases:
        new = graph.outputs[o]
        if new in made:
            assert holders(graph, segments)[graph.inputs[i]][0] == made[new]
    for s in segments:
        read = {v for i in s.equations for v in graph.equations[i].operands}
        inner = {v for i in s.equations for v in graph.equations[i].outputs}
        assert set(s.inputs) == read - inner
        others = {v for t in segments if t is not s for v in t.inputs} | set(graph.outputs)
        assert set(s.outputs) <= inner & others


shapes = st.builds(
    Shape,
    blocks=st.integers(1, 6),
    named=st.booleans(),
    tied=st.booleans(),
    clip=st.booleans(),
    mask=st.booleans(),
    decay=st.booleans(),
    accuracy=st.booleans(),
    skips=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5)), max_size=2).map(tuple),
    microbatches=st.integers(1, 2),
)


@settings(max_examples=200, deadline=None)
@given(shapes, st.lists(st.booleans(), min_size=6, max_size=6))
def test_segments_compute_the_graph(shape: Shape, new_stage: list[bool]):
    graph, marked = train_step(shape)
    graph = assign(graph, marked, layers=None if shape.named else shape.blocks)
    stages = [0]
    for step in new_stage[: len(graph.layers) - 1]:
        stages.append(stages[-1] + step)
    segments = cut(graph, tuple(stages[: len(graph.layers)]))
    check_cut(graph, segments)
