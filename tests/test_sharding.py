"""The sharding room on hand-written graphs: closed forms, brute force, ties, memory, loops, text."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest

from autopar.core.codec import from_data, to_data
from autopar.core.errors import BadInput, DoesNotFit, PlanError
from autopar.core.graph import Combine, Equation, Graph, Loop, OpKind, Phase, Rule, Value
from autopar.core.mesh import Axis, Device, Mesh
from autopar.core.plan import ShardingPlan
from autopar.sharding.options import Options
from autopar.sharding.pins import data_parallel, zero2, zero3
from autopar.sharding.plan import offers, plan
from autopar.sharding.region import extract, signature
from autopar.sharding.text import table
from autopar.sharding.ways.grid import grid_of
from autopar.sharding.ways.resharding import table_for
from autopar.sharding.ways.strategies import Op, Tensor, enumerate_strategies, place

GOLDEN = Path(__file__).parent / "golden"
FLOPS, MEMORY_BANDWIDTH = 1e13, 1e12
DEVICE = Device("test", 1 << 34, MEMORY_BANDWIDTH, (("float32", FLOPS),), 1e11)
F, B, A = Phase.FORWARD, Phase.BACKWARD, Phase.APPLY

MATMUL = "ij,jk->ik"


def line(n: int = 4, bandwidth: float = 1e10, latency: float = 1e-5) -> Mesh:
    return Mesh(DEVICE, (Axis("x", n, bandwidth, latency),))


def square() -> Mesh:
    return Mesh(DEVICE, (Axis("x", 2, 1e10, 2e-5), Axis("y", 4, 1e11, 5e-6)))


class Builder:
    """Writes graphs in a few lines; rules are spelled like einsum."""

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.equations: list[Equation] = []

    def value(self, *shape: int, name: str = "") -> int:
        self.values.append(Value(shape, "float32", name))
        return len(self.values) - 1

    def op(
        self,
        spelled: str,
        *inputs: int,
        kind: OpKind = OpKind.FUSED,
        phase: Phase = F,
        layer: int | None = 0,
        name: str = "op",
        fixed: str = "",
    ) -> int:
        left, right = spelled.split("->")
        operands, sizes = left.split(","), dict[str, int]()
        for letters, v in zip(operands, inputs, strict=True):
            sizes |= dict(zip(letters, self.values[v].shape, strict=True))
        number = {c: i for i, c in enumerate(sizes)}
        result = self.value(*[sizes[c] for c in right])
        gone = [number[c] for c in sizes if c not in right]
        rule = Rule(
            operands=tuple(tuple((number[c],) for c in letters) for letters in operands),
            results=(tuple((number[c],) for c in right),),
            sizes=tuple(sizes.values()),
            reductions=tuple(gone),
            fixed=tuple(number[c] for c in fixed),
        )
        flops = 2.0 * math.prod(sizes.values()) if kind is OpKind.CONTRACTION else 0.0
        self.equations.append(
            Equation(name, inputs, (result,), rule, kind, flops, phase, layer, "model.py:7")
        )
        return result

    def matmul(self, spelled: str, a: int, b: int, phase: Phase = F, layer: int | None = 0) -> int:
        return self.op(spelled, a, b, kind=OpKind.CONTRACTION, phase=phase, layer=layer, name="dot_general")

    def graph(self, inputs: list[int], outputs: list[int], **more: object) -> Graph:
        layers = tuple(map(str, range(1 + max(e.layer or 0 for e in self.equations))))
        made = Graph(tuple(self.values), tuple(self.equations), tuple(inputs), tuple(outputs), layers, **more)  # type: ignore[arg-type]
        made.check()
        return made


def mlp(batch: int, width: int, hidden: int, microbatches: int = 1) -> Graph:
    """relu-free perceptron with a squared loss and plain SGD: two products forward, three backward."""
    g = Builder()
    w1, w2 = g.value(width, hidden, name="w1"), g.value(hidden, width, name="w2")
    x, t = g.value(batch, width, name="x"), g.value(batch, width, name="t")
    h = g.matmul("ij,jk->ik", x, w1)
    y = g.matmul("ik,kj->ij", h, w2)
    dy = g.op("ij,ij->ij", y, t, phase=B, name="sub")
    dw2 = g.matmul("ik,ij->kj", h, dy, B)
    dh = g.matmul("ij,kj->ik", dy, w2, B)
    dw1 = g.matmul("ij,ik->jk", x, dh, B)
    new1 = g.op("jk,jk->jk", w1, dw1, phase=A, name="sub")
    new2 = g.op("kj,kj->kj", w2, dw2, phase=A, name="sub")
    return g.graph(
        [w1, w2, x, t],
        [new1, new2],
        aliases=((0, 0), (1, 1)),
        batch=(x, t),
        microbatches=microbatches,
        combine=((dw1, Combine.MEAN), (dw2, Combine.MEAN)) if microbatches > 1 else (),
        gradients=((dw1, w1), (dw2, w2)),
    )


def whole(graph: Graph) -> range:
    return range(len(graph.equations))


# closed forms


def half_all_reduce(nbytes: float, n: int, bandwidth: float = 1e10, latency: float = 1e-5) -> float:
    """An all-gather or a reduce-scatter of so many bytes over n devices."""
    return math.ceil(math.log2(n)) * latency + (n - 1) / n * nbytes / bandwidth


def product(flops: float, *nbytes: float) -> float:
    return max(flops / FLOPS, sum(nbytes) / MEMORY_BANDWIDTH)


def kernel(*nbytes: float) -> float:
    """An elementwise kernel that reads and writes these."""
    return sum(nbytes) / MEMORY_BANDWIDTH


def test_data_parallel_costs_what_it_does_on_paper():
    batch, width, hidden, n = 1 << 16, 256, 512, 4
    g = mlp(batch, width, hidden)
    x, w, h = 4.0 * batch * width / n, 4.0 * width * hidden, 4.0 * batch * hidden / n
    dot = product(2.0 * batch * width * hidden / n, x, w, h)
    compute = 5 * dot + kernel(x, x, x) + 2 * kernel(w, w, w)
    found = plan(g, whole(g), line(n), Options(pinned=data_parallel(g, line(n))))
    # each gradient is all-reduced: scattered, and gathered again where the update is not cheaper cut
    assert found.objective == pytest.approx(compute + 2 * 2 * half_all_reduce(w, n), rel=1e-9)
    assert found.status == "optimal" and found.bound == pytest.approx(found.objective, rel=1e-4)


def test_megatron_costs_what_it_does_on_paper():
    batch, width, hidden, n = 64, 1024, 4096, 4
    g = mlp(batch, width, hidden)
    pins = ((0, ((), ("x",))), (1, (("x",), ())), (2, ((), ())))
    x, w, h = 4.0 * batch * width, 4.0 * width * hidden / n, 4.0 * batch * hidden / n
    dot = product(2.0 * batch * width * hidden / n, x, w, h)
    update = kernel(w, w, w)
    # the sum of y is scattered, the error computed on the parts and gathered: one all-reduce in two halves
    error = 3 * kernel(x / n)
    found = plan(g, whole(g), line(n), Options(pinned=pins))
    assert found.objective == pytest.approx(
        5 * dot + 2 * update + error + 2 * half_all_reduce(x, n), rel=1e-9
    )
    kinds = sorted(c.kind for c in found.collectives)
    assert kinds == ["all-gather", "reduce-scatter"]


@pytest.mark.parametrize("hidden", [1024, 4096])
def test_a_grid_of_data_and_model_axes_costs_what_it_does_on_paper(hidden):
    """Batch over x (2, slow), hidden over y (4, fast): gradients are reduced over x, activations over y.

    Where the hidden layer is not much wider than the model, there is something cheaper than to reduce the
    second product's sums: the first one's result goes from hidden to batch over y by an all-to-all, and the
    second weight is gathered.
    """
    batch, width = 1 << 15, 512
    g = mlp(batch, width, hidden)
    inner = (("x",), ("y",))  # of h and its cotangent
    pins = (
        (0, ((), ("y",))),
        (1, (("y",), ())),
        (2, (("x",), ())),
        (3, (("x",), ())),
        (4, inner),
        (8, inner),
    )
    x, w, h = 4.0 * batch * width / 2, 4.0 * width * hidden / 4, 4.0 * batch * hidden / 8
    dot = product(2.0 * batch * width * hidden / 8, x, w, h)
    update = kernel(w, w, w)
    error = 3 * kernel(x / 4)
    half_over_y = functools.partial(half_all_reduce, n=4, bandwidth=1e11, latency=5e-6)
    over_x = half_all_reduce(w, 2, 1e10, 2e-5)
    sums = half_over_y(x)  # scattered; the error is computed on the parts, and gathered
    # an all-to-all sends (n−1)/n of what a device has, too, and what it received has to be put side by side
    moved = half_over_y(h) + kernel(h, h) + half_over_y(4 * w)
    assert (moved < sums) == (hidden == 1024)
    paper = 5 * dot + 2 * update + error + min(sums, moved) + half_over_y(x) + 2 * 2 * over_x
    found = plan(g, whole(g), square(), Options(pinned=pins, gap=0.0))
    assert found.objective == pytest.approx(paper, rel=1e-9)


def attention(batch: int, time: int, heads: int, size: int) -> Graph:
    """Attention with its four projections, forward only: values 0 to 4 are its input and weights."""
    b = Builder()
    x = b.value(batch, time, heads * size)
    wq, wk, wv = (b.value(heads * size, heads, size) for _ in range(3))
    wo = b.value(heads, size, heads * size)
    q, k, v = (b.matmul("bqd,dhs->bqhs", x, w) for w in (wq, wk, wv))
    scores = b.matmul("bqhs,bkhs->bhqk", q, k)
    weights = b.op("bhqk->bhqk", scores, name="exp")
    mixed = b.matmul("bhqk,bkhs->bqhs", weights, v)
    out = b.matmul("bqhs,hsd->bqd", mixed, wo)
    return b.graph([x, wq, wk, wv, wo], [out], batch=(x,))


@pytest.mark.parametrize(
    "mesh, data, model",
    [(line(4), ("x",), ()), (line(4), (), ("x",)), (square(), ("x",), ("y",))],
    ids=["data parallel", "Megatron", "2D"],
)
def test_an_attention_block_costs_what_it_does_on_paper(mesh, data, model):
    """Examples over `data`, heads over `model`: products are cut, the sum of the last one is all-reduced."""
    batch, time, heads, size = 4, 64, 16, 128
    width, ways = heads * size, dict(zip(mesh.names, mesh.shape, strict=True))
    d, m = (math.prod(ways[a] for a in axes) for axes in (data, model))
    g = attention(batch, time, heads, size)
    kept, cut = (data, (), ()), ((), model, ())
    pins = (
        (0, kept),
        *((w, cut) for w in (1, 2, 3)),
        (4, (model, (), ())),
        (g.equations[-1].outputs[0], kept),
    )
    found = plan(g, whole(g), mesh, Options(pinned=pins, gap=0.0))
    tokens, part = 4.0 * batch * time * width / d, batch * time * width / d / m
    square = 4.0 * batch * heads * time * time / d / m
    projection = product(2.0 * part * width, tokens, 4.0 * width * width / m, 4 * part)
    mixing = product(2.0 * part * time, 4 * part, 4 * part, square)
    paper = 4 * projection + 2 * mixing + kernel(square, square)
    for axis in mesh.axes:
        if axis.name in model:
            paper += 2 * half_all_reduce(tokens, axis.size, axis.bandwidth, axis.latency)
    assert found.objective == pytest.approx(paper, rel=1e-9)


def test_the_planner_picks_the_cheaper_of_the_two():
    wide, tall = mlp(64, 1024, 4096), mlp(1 << 16, 256, 512)
    assert plan(wide, whole(wide), line()).layout[0] == ((), ("x",))  # tensor parallel
    assert plan(tall, whole(tall), line()).layout[2] == (("x",), ())  # data parallel
    for g in (wide, tall):
        free = plan(g, whole(g), line()).objective
        for method in (data_parallel, zero2, zero3):
            assert free <= plan(g, whole(g), line(), Options(pinned=method(g, line()))).objective * (1 + 1e-4)


def test_microbatches_multiply_forward_and_backward_but_not_the_update():
    one, four = mlp(1 << 16, 256, 512), mlp(1 << 16, 256, 512, microbatches=4)
    pins = data_parallel(one, line())
    a, b = (plan(g, whole(g), line(), Options(pinned=pins)) for g in (one, four))
    assert b.objective == pytest.approx(4 * (b.forward + b.backward) + b.apply, rel=1e-9)
    assert b.forward == pytest.approx(a.forward, rel=1e-9)
    assert {c.count for c in b.collectives} <= {1, 4}


def test_moves_within_a_microbatch_count_every_time():
    g = mlp(256, 512, 1024, microbatches=4)
    found = plan(g, whole(g), line(), Options(pinned=data_parallel(g, line())))
    assert any(c.count == 4 and c.kind == "all-gather" for c in found.collectives)
    assert found.bound == pytest.approx(found.objective, rel=1e-3)  # the solver's sum and the plan's agree


# brute force


def test_a_look_up_leaves_no_major_axis_out():
    """Else XLA permutes indices and results over it; seen for every pair of axes of a 2×2×2 mesh."""
    axes = tuple(Axis(name, 2, 1e10, 1e-5) for name in "xyz")
    grid = grid_of(Mesh(DEVICE, axes))
    rule = Rule((((0,), (1,)), ((2,),)), (((2,), (1,)),), (64, 32, 16), reductions=(0,), inside=True)
    table, indices, made = Tensor((64, 32), 8192), Tensor((16,), 64), Tensor((16, 32), 2048)
    op = Op(rule, OpKind.INDEXED, 0.0, FLOPS, MEMORY_BANDWIDTH, (table, indices), (made,))
    found = {way.operands for way in enumerate_strategies(op, grid)}

    def cut(rows: int, where: int) -> bool:
        return (((rows,), ()), ((where,),)) in found

    assert cut(2, 0) and cut(1, 0) and cut(0, 1) and cut(0, 2)
    assert not cut(2, 1) and not cut(1, 2)
    assert all(way.made == way.results for way in enumerate_strategies(op, grid))  # nothing is scattered


def test_two_products_cost_the_least_of_all_combinations():
    mesh, grid = square(), grid_of(square())
    g = Builder()
    a, b, c = g.value(64, 32, name="a"), g.value(32, 128, name="b"), g.value(128, 16, name="c")
    y = g.matmul("ij,jk->ik", a, b)
    z = g.matmul("ik,kl->il", y, c)
    graph = g.graph([a, b, c], [z], batch=(a, b, c))
    found = plan(graph, whole(graph), mesh)

    def op(e: Equation) -> Op:
        shapes = [graph.values[v] for v in (*e.operands, *e.outputs)]
        tensors = [Tensor(v.shape, v.nbytes) for v in shapes]
        assert e.rule is not None
        return Op(e.rule, e.kind, e.flops, FLOPS, MEMORY_BANDWIDTH, tuple(tensors[:2]), tuple(tensors[2:]))

    first, second = (enumerate_strategies(op(e), grid) for e in graph.equations)
    between = table_for((64, 128), grid)
    nbytes = graph.values[y].nbytes
    best = math.inf
    for s, t in itertools.product(first, second):
        fixed, per_byte = between.prices([s.results[0]], [t.operands[0]])[:2, 0, 0]  # type: ignore[list-item]
        best = min(best, s.total + t.total + fixed + per_byte * nbytes)
    assert found.objective == pytest.approx(best, rel=1e-6)


def test_strategies_of_a_product_are_all_assignments():
    g = Builder()
    g.matmul(MATMUL, g.value(8, 8), g.value(8, 8))
    rule = g.equations[0].rule
    assert rule is not None
    t = Tensor((8, 8), 256)
    op = Op(rule, OpKind.CONTRACTION, 1024.0, FLOPS, MEMORY_BANDWIDTH, (t, t), (t,))
    one = enumerate_strategies(op, grid_of(line(4)))
    # whole, i, k, and j with its sum all-reduced, scattered over i, or over k
    assert len(one) == 6
    assert {s.results[0] for s in one if s.traffic} == {((), ()), ((0,), ()), ((), (0,))}
    two = enumerate_strategies(op, grid_of(square()))
    both_on_i = {s.operands[0] for s in two if s.results[0] in (((0, 1), ()), ((1, 0), ())) and not s.traffic}
    assert both_on_i == {((0, 1), ()), ((1, 0), ())}
    for s in two:
        used = [a for dims in (s.operands[0] or ()) for a in dims]
        assert len(used) == len(set(used))


def test_three_axes_and_sizes_that_do_not_divide():
    g = Builder()
    g.matmul(MATMUL, g.value(6, 8), g.value(8, 8))
    rule = g.equations[0].rule
    assert rule is not None
    op = Op(
        rule,
        OpKind.CONTRACTION,
        1.0,
        FLOPS,
        1e12,
        (Tensor((6, 8), 192), Tensor((8, 8), 256)),
        (Tensor((6, 8), 192),),
    )
    cube = Mesh(DEVICE, tuple(Axis(n, 2, 1e10, 1e-5) for n in "xyz"))
    grid = grid_of(cube)
    found = enumerate_strategies(op, grid)
    assert any(sum(map(len, s.operands[0] or ())) == 2 and s.traffic for s in found)
    assert all(grid.ways(s.results[0][0]) in (1, 2) for s in found), "6 rows are cut in 2 at most"
    assert any(s.operands[1] == ((0, 1, 2), ()) for s in found), "j over all three axes"


def test_a_minor_factor_is_cut_only_under_a_whole_major_one():
    grid = grid_of(square())
    dims = ((0, 1),)
    assert place(dims, {1: (0,)}, (2, 8), grid) is None
    assert place(dims, {0: (0,), 1: (1,)}, (2, 8), grid) == ((0, 1),)


# ties, roles, followers


def test_new_state_is_kept_where_the_old_one_was():
    g = mlp(64, 256, 512)
    for mesh in (line(), square()):
        found = plan(g, whole(g), mesh)
        for output, position in g.aliases:
            v = g.outputs[output]
            assert v is not None and found.layout[v] == found.layout[g.inputs[position]]


def test_new_state_that_is_made_elsewhere_moves_home():
    g = Builder()
    w, x = g.value(64, 64, name="w"), g.value(64, 64, name="x")
    new = g.matmul(MATMUL, w, x, A)
    graph = g.graph([w, x], [new], aliases=((0, 0),), batch=(x,))
    pins = ((w, ((), ("x",))), (x, (("x",), ())))  # summed over x: scattered over columns again
    found = plan(graph, whole(graph), line(), Options(pinned=pins))
    assert found.layout[new] == found.layout[w] == ((), ("x",))
    rows = Options(pinned=((w, (("x",), ())), (x, ((), ("x",)))))
    moved = plan(graph, whole(graph), line(), rows)
    assert moved.layout[new] == (("x",), ())
    assert moved.made or moved.reads


def test_every_tensor_has_a_layout_that_divides():
    g = mlp(64, 256, 512)
    found = plan(g, whole(g), square())
    assert set(found.layout) == {v for v, value in enumerate(g.values) if value.shape}
    for v, spec in found.specs:
        for size, dim in zip(g.values[v].shape, spec, strict=True):
            assert size % square().ways(dim) == 0


def test_zero_pins_cut_state():
    g = mlp(64, 256, 512)
    found = plan(g, whole(g), line(), Options(pinned=zero3(g, line())))
    replicated = plan(g, whole(g), line(), Options(pinned=data_parallel(g, line())))
    assert found.memory.state * 4 == replicated.memory.state
    assert found.layout[0] == ((), ("x",)) and found.layout[2] == (("x",), ())


def test_a_pin_that_does_not_divide_is_refused():
    g = mlp(6, 6, 6)
    with pytest.raises(PlanError, match=r"w1 .*cannot be kept as \[x, ·\]"):
        plan(g, whole(g), line(4), Options(pinned=((0, (("x",), ())),)))
    with pytest.raises(BadInput, match="no axis 'q'"):
        plan(g, whole(g), line(4), Options(pinned=((0, (("q",), ())),)))


def test_bad_options_are_refused():
    g = mlp(8, 8, 8)
    for options in (Options(in_flight=0), Options(memory_price=math.nan), Options(limit=0)):
        with pytest.raises(BadInput):
            plan(g, whole(g), line(), options)


def test_an_equation_without_a_rule_is_replicated_with_a_note():
    g = Builder()
    x = g.value(8, 8, name="x")
    y = g.op("ij->ij", x, name="tanh")
    g.equations[0] = replace(g.equations[0], rule=None, kind=OpKind.OPAQUE, op="mystery")
    found = plan(g.graph([x], [y], batch=(x,)), range(1), line())
    assert found.layout[y] == ((), ())
    (note,) = found.notes
    assert note.startswith("mystery at model.py:7: no sharding rule: computed whole on every device, ")


def test_one_device_needs_no_choice():
    g = mlp(64, 64, 64)
    found = plan(g, whole(g), Mesh(DEVICE, (Axis("x", 1, 1e10, 1e-5),)))
    assert not found.collectives and all(spec == ((), ()) for _, spec in found.specs)


def test_a_broadcast_is_computed_where_it_is_read():
    """A bias broadcast over the batch takes the layout of what it is added to and costs no communication."""
    g = Builder()
    x, b = g.value(64, 32, name="x"), g.value(32, name="b")
    number = {c: i for i, c in enumerate("ij")}
    wide = g.value(64, 32)
    rule = Rule((((number["j"],),),), (((0,), (1,)),), (64, 32))
    g.equations.append(Equation("broadcast", (b,), (wide,), rule, OpKind.VIEW, 0.0, F, 0))
    y = g.op("ij,ij->ij", x, wide, name="add")
    graph = g.graph([x, b], [y], batch=(x,))
    pins = ((x, (("x",), ())), (b, ((),)))
    found = plan(graph, whole(graph), line(), Options(pinned=pins))
    assert found.layout[wide] == (("x",), ()) and not found.collectives and not found.uses


def test_a_value_two_operations_want_elsewhere_is_moved_once():
    g = Builder()
    x = g.value(64, 64, name="x")
    ws = [g.value(64, 64, name=f"w{k}") for k in range(2)]
    ys = [g.matmul(MATMUL, x, w) for w in ws]
    graph = g.graph([x, *ws], ys, batch=(x,))
    columns = ((), ("x",))
    pins = ((x, (("x",), ())), *((w, columns) for w in ws), *((y, columns) for y in ys))
    found = plan(graph, whole(graph), line(), Options(pinned=pins))
    assert [c.kind for c in found.collectives] == ["all-gather"]
    assert found.objective < found.bound * (1 + 1e-4)


# memory


def test_a_limit_is_kept_and_costs_time():
    g = mlp(4096, 512, 1024)
    free = plan(g, whole(g), square())
    tight = plan(g, whole(g), square(), Options(limit=free.memory.peak * 3 // 4))
    assert tight.memory.peak <= tight.memory.limit < free.memory.peak
    assert tight.objective >= free.objective * (1 - 1e-4)


def test_what_never_fits_says_how_much_is_missing():
    g = mlp(4096, 512, 1024)
    with pytest.raises(DoesNotFit, match=r"at least .* are missing\. Biggest per device: ") as caught:
        plan(g, whole(g), square(), Options(limit=100_000))
    missing = caught.value.missing
    assert missing is not None and missing > 0
    fits = plan(g, whole(g), square(), Options(limit=100_000 + 8 * missing))
    assert fits.memory.peak <= fits.memory.limit


def test_residuals_count_for_every_microbatch_in_flight():
    batch, width, hidden = 1 << 14, 256, 512
    g = mlp(batch, width, hidden, microbatches=4)
    pins = data_parallel(g, line())
    one, two, four = (plan(g, whole(g), line(), Options(pinned=pins, in_flight=k)).memory for k in (1, 2, 4))
    h = 4 * batch * hidden // 4  # the hidden activations, and the inputs, are read by both passes
    x = 4 * batch * width // 4
    assert one.activations == two.activations == four.activations == h + x + x  # x, h, and y or t
    assert four.peak - two.peak == 2 * one.activations
    assert one.peak < two.peak  # one micro-batch frees them as its backward goes


def test_gradient_sums_stay_for_the_step():
    one, four = mlp(64, 256, 512), mlp(64, 256, 512, microbatches=4)
    pins = data_parallel(one, line())
    a, b = (plan(g, whole(g), line(), Options(pinned=pins)).memory for g in (one, four))
    weights = 2 * 4 * 256 * 512
    assert a.state == weights and weights < b.state <= 2 * weights


def test_offers_go_from_fast_to_lean():
    g = mlp(4096, 512, 1024, microbatches=2)
    found = offers(g, whole(g), square(), prices=(0.0, 1e-10, 1e-8))
    seconds = [2 * (p.forward + p.backward) + p.apply for p in found]
    peaks = [p.memory.peak for p in found]
    assert seconds == sorted(seconds) and peaks == sorted(peaks, reverse=True) and len(found) > 1


# regions and signatures


def stack(layers: int, width: int = 64) -> Graph:
    """Products in a row: forward only, one layer each."""
    g = Builder()
    x = g.value(32, width, name="x")
    ws = [g.value(width, width, name=f"w{k}") for k in range(layers)]
    y = x
    for k, w in enumerate(ws):
        y = g.matmul(MATMUL, y, w, layer=k)
    return g.graph([x, *ws], [y], batch=(x,))


def test_equal_layers_share_a_signature_and_offers():
    g = stack(4)
    assert signature(g, [1]) == signature(g, [2]) != signature(g, [1, 2])
    one, two = (offers(g, [k], line(), prices=(0.0,))[0] for k in (1, 2))
    assert one.layout[2] == two.layout[3] and set(two.layout) == {3, 6, 7}
    assert one.objective == two.objective


def test_a_region_knows_its_roles():
    g = mlp(8, 8, 8)
    region = extract(g, [0, 1])
    assert [region.values[v].name for v in region.state] == ["w1", "w2"]
    assert [region.values[v].name for v in region.arriving] == ["x"]
    assert {region.ids[v] for v in region.leaving} == {4, 5} and not region.whole


def test_uniform_pays_for_the_way_back():
    """A layer that would leave its activations in another layout than it takes them in pays for it."""
    g = stack(3, width=4096)
    loose = plan(g, [1], line()).objective
    closed = plan(g, [1], line(), Options(uniform=True))
    assert closed.objective >= loose * (1 - 1e-6)
    assert closed.layout[4] == closed.layout[5] or closed.collectives


def test_depth_does_not_change_what_inner_layers_do():
    deep = stack(200, width=256)
    shared = plan(deep, whole(deep), square())
    apart = plan(deep, whole(deep), square(), Options(share=False))
    assert shared.objective == pytest.approx(apart.objective, rel=1e-6)


# loops


def scan(length: int) -> Graph:
    """A carry multiplied by a slice of stacked weights on every trip; the products are stacked too."""
    b = Builder()
    carry, w = b.value(64, 128), b.value(128, 128)
    out = b.matmul(MATMUL, carry, w)
    body = b.graph([carry, w], [out, out])
    g = Builder()
    x, ws = g.value(64, 128, name="x"), g.value(length, 128, 128, name="ws")
    last, ys = g.value(64, 128), g.value(length, 64, 128)
    loop = Loop(body, length, consts=0, carries=1)
    g.equations.append(Equation("scan", (x, ws), (last, ys), None, OpKind.LOOP, 0.0, F, 0, loop=loop))
    return g.graph([x, ws], [last, ys], batch=(x,))


def test_a_loop_costs_its_length_and_ties_its_carry():
    four, eight = scan(4), scan(8)
    a, b = (plan(g, whole(g), line()) for g in (four, eight))
    assert b.objective == pytest.approx(2 * a.objective, rel=1e-6)
    inside = a.loops[0]
    specs = dict(inside.specs)
    assert inside.equation == 0 and a.layout[2] == specs[0] and a.layout[1][0] == ()
    assert a.layout[1] == ((), *specs[1]) or (0, 1) in a.reads


# text


def test_a_plan_prints_and_saves():
    g = mlp(64, 1024, 4096)
    found = plan(g, whole(g), line())
    assert table(found, g) == (GOLDEN / "sharding_mlp.txt").read_text()
    assert from_data(ShardingPlan, to_data(found)) == found
