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
    shared: bool = False  # all blocks use one weight
    decay: bool = False  # a sum of squared parameters in the loss
    accuracy: bool = False
    skips: tuple[tuple[int, int], ...] = ()
    microbatches: int = 2


def train_step(s: Shape) -> tuple[Graph, tuple[bool, ...]]:
    """A GPT's skeleton: embedding, blocks x + f(x W), head, momentum with clipping, a step counter."""
    m = Maker()
    table = m.arg((V, D), "p.table")
    head = table if s.tied else m.arg((V, D), "p.head")
    weights = [m.arg((D, D), f"p.w{k}") for k in range(1 if s.shared else s.blocks)]
    params = [table, *([] if s.tied else [head]), *weights]
    weights *= s.blocks if s.shared else 1
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
        own = m.dot(hs[k], g, (D, D), "dw")
        if weights[k] in grads:
            own = m.op("add_any", (grads[weights[k]], own), (D, D))
        grads[weights[k]] = own
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
    """Runs the segments in order; each sees its declared inputs only and keeps its declared outputs only."""
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
    """An apply segment reads its own stage or lower levels; a level is one more than it waits for."""
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
    shared=st.booleans(),
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


def golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if not path.exists():
        path.write_text(text)
    assert text == path.read_text()


def text_of(graph: Graph, segments: tuple[Segment, ...]) -> str:
    def values(ids):
        return " ".join(graph.values[v].name or f"v{v}" for v in ids) or "-"

    lines = [f"{graph}", ""]
    for s in segments:
        ops = " ".join(graph.equations[i].op for i in s.equations)
        lines += [f"{s.name}: {ops}", f"  in  {values(s.inputs)}", f"  out {values(s.outputs)}"]
    held = holders(graph, segments)
    lines += ["", *(f"{graph.values[v].name} on {' '.join(map(str, on))}" for v, on in held.items())]
    return "\n".join(lines) + "\n"


def completed(shape: Shape, layers: int | None = None) -> Graph:
    graph, marked = train_step(shape)
    return assign(graph, marked, layers)


def test_tied_three_stages_text():
    graph = completed(Shape(accuracy=True))
    golden("stages_tied_gpt.txt", text_of(graph, cut(graph, (0, 1, 2))))


def test_anonymous_two_stages_text():
    graph = completed(Shape(blocks=4, named=False, decay=True, skips=((0, 2),)), layers=4)
    golden("stages_anonymous.txt", text_of(graph, cut(graph, (0, 0, 1, 1))))


@pytest.mark.parametrize("named", [True, False])
def test_every_weight_lives_on_one_stage(named: bool):
    """Anonymous backward equations find the layer of their forward, or weights would be held twice."""
    graph = completed(Shape(blocks=6, named=named, tied=False, decay=True), layers=6)
    last = len(graph.layers) - 1
    held = holders(graph, cut(graph, tuple(range(last + 1))))
    assert all(len(on) == 1 for v, on in held.items() if graph.values[v].shape)
    weights = [held[v][0] for v in held if graph.values[v].name.startswith("p.w")]
    assert weights == sorted(weights) and len(set(weights)) >= last
    for v in held:
        name = graph.values[v].name
        if name.startswith("m."):
            twin = next(w for w in held if graph.values[w].name == "p." + name[2:])
            assert held[v] == held[twin]


@pytest.mark.parametrize("named", [True, False])
def test_one_weight_for_all_blocks(named: bool):
    """The last use of the weight must not draw the backward of earlier blocks to the last stage."""
    graph = completed(Shape(blocks=4, named=named, shared=True, tied=False), layers=4)
    segments = cut(graph, (0, 1, 2, 3))
    check_cut(graph, segments)
    work = [sum(graph.equations[i].op == "dgelu" for i in s.equations) for s in segments]
    assert [n for s, n in zip(segments, work) if s.phase is Phase.BACKWARD] == [1, 1, 1, 1] if named else True
    (weight,) = [v for v in graph.inputs if graph.values[v].name == "p.w0"]
    assert holders(graph, segments)[weight][0] == 0


def test_the_home_of_state_is_where_its_next_value_is_made():
    m = Maker(phase=Phase.FORWARD)
    w, state, x = m.arg((D, D), "w"), m.arg((D, D), "state"), m.arg((B, D), "x")
    m.layer = 0
    x0 = m.dot(x, state, (B, D))
    m.layer = 1
    new = m.dot(x0, w, (D, D))
    layers, batch = ("a", "b"), (x,)
    graph = Graph(tuple(m.values), tuple(m.equations), (w, state, x), (new,), layers, ((0, 1),), batch)
    segments = cut(assign(graph), (0, 1))
    assert holders(graph, segments) == {w: (1,), state: (1, 0), x: (0,)}
    check_cut(graph, segments)


def test_tied_gradient_crosses_once_per_step():
    graph = completed(Shape())
    made = graph.producers()
    (parts, parameter) = [v for v, p in graph.gradients if graph.values[p].name == "p.table"], graph.inputs[0]
    assert [graph.equations[made[v]].op for v in parts] == ["scatter", "dhead"]
    assert {v for v, _ in graph.combine} >= set(parts)
    segments = cut(graph, (0, 1, 2))
    readers = [s for s in segments if set(parts) & set(s.inputs)]
    assert [s.phase for s in readers] == [Phase.APPLY] and readers[0].stage == 0
    assert holders(graph, segments)[parameter] == (0, 2)


def test_global_norm_takes_three_levels():
    segments = cut(completed(Shape()), (0, 1, 2))
    update = [(s.level, s.stage) for s in segments if s.phase is Phase.APPLY]
    assert update == [(0, 1), (0, 2), (1, 0), (2, 1), (2, 2)]  # norms; all of stage 0; updates
    plain = cut(completed(Shape(clip=False)), (0, 1, 2))
    assert {s.level for s in plain if s.phase is Phase.APPLY} == {0}


def test_one_stage():
    assert [s.name for s in cut(completed(Shape(microbatches=1)), (0, 0, 0))] == ["step"]
    graph = completed(Shape(microbatches=4, accuracy=True))
    segments = cut(graph, (0, 0, 0))
    assert [(s.name, s.phase) for s in segments] == [("micro", Phase.FORWARD), ("apply", Phase.APPLY)]
    check_cut(graph, segments)


def inference(layers: int, marks: bool = True) -> Graph:
    m = Maker()
    weights = [m.arg((D, D), f"w{k}") for k in range(layers)]
    caches = [m.arg((B, D), f"cache{k}") for k in range(layers)]
    position, x = m.arg((), "position"), m.arg((B, D), "x")
    batch, new = (x,), []
    for k, (w, cache) in enumerate(zip(weights, caches)):
        m.layer = k if marks else None
        x = m.dot(x, w, (B, D))
        new.append(m.op("update", (cache, x, position), (B, D), OpKind.MEMORY))
        x = m.op("attend", (x, new[-1]), (B, D), OpKind.MEMORY)
    m.layer = None
    following = m.op("add", (position, None), ())
    outputs = (*new, following, x)
    names = tuple(f"layer {k}" for k in range(layers)) if marks else ()
    aliases = tuple((k, layers + k) for k in range(layers + 1))
    return Graph(
        tuple(m.values), tuple(m.equations), tuple(m.inputs), outputs, names, aliases, batch, microbatches=2
    )


def test_forward_only():
    graph = assign(inference(4), (False,) * len(inference(4).equations))
    segments = cut(graph, (0, 0, 1, 2))
    assert [s.name for s in segments] == ["forward_0", "forward_1", "forward_2"]
    check_cut(graph, segments)
    assert [s.name for s in cut(graph, (0, 0, 0, 0))] == ["micro"]


def test_many_layers_stay():
    graph = assign(inference(96))
    assert len(graph.layers) == 96
    assert [e.layer for e in graph.equations[:6]] == [0, 0, 0, 1, 1, 1]


def test_default_number_of_layers():
    assert len(assign(inference(12, marks=False)).layers) == 6
    assert len(assign(inference(96, marks=False)).layers) == 16
    assert len(assign(inference(12, marks=False), layers=3).layers) == 3


def test_a_value_that_would_flow_back_is_refused():
    graph = completed(Shape(named=True))
    equations = list(graph.equations)
    swapped = next(i for i, e in enumerate(equations) if e.op == "dot")
    equations[swapped] = replace(equations[swapped], layer=2)
    with pytest.raises(
        PlanError, match=r"add at model\.py:5.*forward value of the later stage 2 \(dot at model"
    ):
        cut(replace(graph, equations=tuple(equations)), (0, 1, 2))
    late = next(i for i, e in enumerate(equations) if e.op == "dgelu" and e.layer == 1)
    equations = list(graph.equations)
    equations[late] = replace(equations[late], layer=0)
    with pytest.raises(PlanError, match=r"add_any at .*cotangent of the earlier stage 0 \(dgelu at model"):
        cut(replace(graph, equations=tuple(equations)), (0, 1, 2))


def test_named_layers_out_of_order_are_pushed():
    """A layer used a second time after later ones (shared weights) runs, that time, with the later ones."""
    graph, marked = train_step(Shape(blocks=4))
    again = [replace(e, layer=1) if e.layer == 3 else e for e in graph.equations]
    graph = assign(replace(graph, equations=tuple(again)), marked)
    check_cut(graph, cut(graph, (0, 1, 2, 3)))


def test_batch_in_the_update_is_refused():
    graph, marked = train_step(Shape())
    update = graph.equations[-1]
    reads = replace(update, inputs=(*update.inputs[:2], graph.batch[0]))
    graph = replace(graph, equations=(*graph.equations[:-1], reads))
    with pytest.raises(PlanError, match=r"sgd at model\.py.*'ids' of the batch"):
        cut(assign(graph, marked), (0, 1, 2))


def test_a_free_value_of_the_examples_read_by_the_update():
    """A token count made from labels alone is combined over micro-batches, not computed in the update."""
    m = Maker(phase=Phase.FORWARD)
    w, labels = m.arg((D, D), "w"), m.arg((B, D), "labels")
    tokens = m.op("count", (labels,), (), OpKind.MEMORY)
    m.layer = 0
    x = m.dot(labels, w, (B, D))
    m.layer = 1
    y = m.dot(x, w, (B, D))
    m.phase, m.layer = Phase.BACKWARD, None
    g = m.dot(y, y, (D, D))
    m.phase = Phase.APPLY
    new = m.op("sgd", (w, g, tokens), (D, D))
    graph = Graph(
        tuple(m.values),
        tuple(m.equations),
        (w, labels),
        (new,),
        ("a", "b"),
        ((0, 0),),
        (labels,),
        microbatches=2,
    )
    segments = cut(assign(graph), (0, 1))
    maker = {v: s.name for s in segments for v in s.outputs}
    assert maker[tokens] == "forward_1"
    check_cut(graph, segments)


@pytest.mark.parametrize("named", [True, False])
def test_a_forward_whose_batch_is_not_known(named: bool):
    """What an embedding makes from two arguments goes to the first layer, whichever is the batch."""
    graph, _ = train_step(Shape(named=named))
    first = next(i for i, e in enumerate(graph.equations) if e.phase is Phase.BACKWARD)
    logits = graph.equations[first - 2].outputs
    bare = Graph(graph.values, graph.equations[:first], graph.inputs, logits, graph.layers)
    gather = next(e for e in assign(bare, layers=3).equations if e.op == "gather")
    assert gather.layer == 0


def test_bad_arguments():
    graph, marked = train_step(Shape())
    with pytest.raises(BadInput, match="one mark for each"):
        assign(graph, marked[1:])
    with pytest.raises(BadInput, match="at least 1 layer"):
        assign(graph, marked, layers=0)
    for stages in [(0, 1), (0, 2, 2), (1, 1, 1), (0, 1, 0)]:
        with pytest.raises(PlanError, match="stage"):
            cut(assign(graph, marked), stages)


def test_a_gradient_made_in_another_layer_is_applied_with_its_parameter():
    """A bias at a boundary: its gradient is summed on the later stage, the update is on the parameter's."""
    m = Maker(phase=Phase.FORWARD)
    w, bias, moment, x = m.arg((D, D), "w"), m.arg((D,), "bias"), m.arg((D,), "moment"), m.arg((B, D), "x")
    m.layer = 0
    y = m.op("add", (m.dot(x, w, (B, D)), bias), (B, D))
    m.layer = 1
    z = m.dot(y, y, (B, D))
    m.phase, m.layer = Phase.BACKWARD, 1
    g = m.dot(z, y, (B, D))
    gradient = m.op("sum", (g,), (D,), OpKind.MEMORY)
    m.phase, m.layer = Phase.APPLY, None
    scaled = m.op("mul", (gradient, None), (D,))
    following = m.op("add", (moment, scaled), (D,))
    new = m.op("sub", (bias, following), (D,))
    graph = Graph(
        tuple(m.values),
        tuple(m.equations),
        tuple(m.inputs),
        (new, following, z),
        ("a", "b"),
        ((0, 1), (1, 2)),
        (x,),
        combine=((gradient, Combine.MEAN),),
    )
    graph = assign(graph)
    assert [e.layer for e in graph.equations if e.phase is Phase.APPLY] == [0, 0, 0]
    segments = cut(graph, (0, 1))
    assert [s.name for s in segments if s.phase is Phase.APPLY] == ["apply.0_0"]
    check_cut(graph, segments)


def test_random_keys_are_free():
    """A key made of the state is copied to the layers that use it; what they make of it stays there."""
    m = Maker(phase=Phase.FORWARD)
    w, key, x = m.arg((D, D), "w"), m.value((2,), "key", "uint32"), m.arg((B, D), "x")
    m.inputs.insert(1, key)
    wrapped = m.op("wrap", (key,), (), OpKind.VIEW)
    made = []
    for k in range(2):
        m.layer = None
        made.append(m.op("bits", (m.op("fold_in", (wrapped, None), ()),), (B, D), OpKind.MEMORY))
        m.layer = k
        x = m.op("drop", (m.dot(x, w, (B, D)), made[-1]), (B, D))
    batch = (m.inputs[-1],)
    graph = Graph(tuple(m.values), tuple(m.equations), tuple(m.inputs), (x,), ("a", "b"), (), batch)
    graph = assign(graph)
    assert [e.op for e in graph.equations if e.layer is None] == [
        "wrap",
        "fold_in",
        "bits",
        "fold_in",
        "bits",
    ]
    assert holders(graph, cut(graph, (0, 1)))[key] == (0, 1)
