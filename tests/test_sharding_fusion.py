"""What reaches memory: the rules of fusion on hand-written graphs, and the peak beside the compiled one's."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest

from autopar.bench.plan_cell import STRUCTURE, step_segment
from autopar.bench.score import peak_bytes
from autopar.core.graph import Equation, Graph, OpKind, Phase, Rule, Value
from autopar.core.mesh import Axis, Device, Mesh
from autopar.models import catalog
from autopar.runtime.layout import jax_mesh
from autopar.runtime.lower import lower
from autopar.runtime.segments import Compiled
from autopar.sharding.memory.alive import Spans
from autopar.sharding.memory.fusion import Fusion
from autopar.sharding.options import Options
from autopar.sharding.plan import plan
from autopar.sharding.problem.assemble import read_seconds
from autopar.sharding.problem.setting import prepare
from autopar.sharding.region import extract
from autopar.trace.capture import capture
from autopar.trace.gradient import value_and_grad

MESH = Mesh(Device("test", 1 << 34, 9e11, (("float32", 1.4e13),), 1e11), (Axis("x", 4, 1e11, 5e-6),))
SIDE = 64
SAME = Rule((((0,), (1,)),), (((0,), (1,)),), (SIDE, SIDE))
SUM = Rule((((0,), (1,)),), ((),), (SIDE, SIDE), reductions=(0, 1))
BOTH = replace(SAME, operands=SAME.operands * 2)
DOT = Rule((((0,), (1,)), ((1,), (2,))), (((0,), (2,)),), (SIDE,) * 3, reductions=(1,))


def unary(source: int, to: int, costly: bool = False) -> Equation:
    return Equation("tanh" if costly else "neg", (source,), (to,), SAME, OpKind.FUSED, costly=costly)


def add(a: int, b: int, to: int) -> Equation:
    return Equation("add", (a, b), (to,), BOTH, OpKind.FUSED)


def total(source: int, to: int) -> Equation:
    return Equation("reduce_sum", (source,), (to,), SUM, OpKind.MEMORY)


def dot(a: int, b: int, to: int) -> Equation:
    return Equation("dot_general", (a, b), (to,), DOT, OpKind.CONTRACTION, 2.0 * SIDE**3)


def analyse(*equations: Equation, outputs: tuple[int, ...]) -> tuple[Fusion, Spans]:
    """Value 0 is the batch, value 1 a parameter."""
    count = 1 + max(v for e in equations for v in e.outputs)
    values = tuple(Value((SIDE, SIDE), "float32") for _ in range(count))
    graph = Graph(values, equations, (0, 1), outputs, ("0",), batch=(0,))
    graph.check()
    setting = prepare(extract(graph, range(len(equations))), MESH, Options())
    spans = Spans(setting.region, setting.model, setting.nbytes)
    ids = {v: i for i, v in enumerate(setting.region.ids)}
    assert ids == {v: v for v in ids}, "the tests number values as they appear"
    return spans.fusion, spans


def test_a_cheap_result_is_computed_in_its_readers_and_keeps_its_operand():
    fusion, spans = analyse(dot(0, 1, 2), unary(2, 3), unary(3, 4), dot(4, 1, 5), outputs=(5,))
    assert spans.of(((), 3)) is None
    assert fusion.sources[(), 4] == {((), 3)} and fusion.kept_for[(), 4] == {4}
    assert spans.of(((), 4)) == (3, 5, False)  # a product reads it, so it is written
    assert spans.of(((), 2)) == (1, 4, False)  # read by the kernel that writes 4


def test_a_costly_result_is_kept_for_several_readers_only():
    many = (dot(0, 1, 2), unary(2, 3, costly=True), unary(3, 4), unary(3, 5), add(4, 5, 6))
    fusion, spans = analyse(*many, outputs=(6,))
    assert ((), 3) not in fusion.sources and spans.of(((), 3)) is not None
    fusion, spans = analyse(dot(0, 1, 2), unary(2, 3, costly=True), unary(3, 4), outputs=(4,))
    assert ((), 3) in fusion.sources and spans.of(((), 3)) is None


def test_a_costly_result_is_kept_where_what_is_made_of_it_is_computed_twice():
    many = (dot(0, 1, 2), unary(2, 3, costly=True), unary(3, 4), unary(4, 5), unary(4, 6))
    fusion, spans = analyse(*many, outputs=(5, 6))
    assert ((), 4) in fusion.sources and ((), 3) not in fusion.sources
    assert spans.of(((), 3)) == (2, 6, False)


def test_a_sum_of_two_that_several_read_is_kept():
    fusion, _ = analyse(
        dot(0, 1, 2), dot(2, 1, 3), add(2, 3, 4), unary(4, 5), unary(4, 6), add(5, 6, 7), outputs=(7,)
    )
    assert ((), 4) not in fusion.sources
    assert ((), 5) in fusion.sources and ((), 6) in fusion.sources


def test_what_spreads_the_gradient_of_a_pooling_computes_its_operands_itself():
    many = (dot(0, 1, 2), unary(2, 3), dot(3, 1, 4), unary(3, 5))
    fusion, _ = analyse(*many, replace(dot(5, 3, 6), op="select_and_scatter_add"), outputs=(4, 6))
    assert fusion.kept_for[(), 3] == {3}, "written for the product alone"


def test_who_reads_a_view_reads_what_it_is_a_view_of():
    many = (dot(0, 1, 2), unary(2, 3), view(3, 4), dot(4, 1, 5), unary(5, 6), add(6, 4, 7))
    fusion, spans = analyse(*many, outputs=(7,))
    assert fusion.kept_for[(), 3] == {4}
    assert spans.of(((), 3)) == (2, 5, False), "written for the product, through its view"
    assert spans.of(((), 2)) == (1, 7, False), "and computed again for the sum"


def test_a_kernel_costs_what_it_reads_and_writes_however_many_equations_it_is():
    """Of the chain between two products only its first operand and its last result reach memory."""
    count = {n: _passes(*[unary(k, k + 1) for k in range(2, 2 + n)], last=2 + n) for n in (1, 4)}
    assert count == {1: 2.0, 4: 2.0}
    both = _passes(unary(2, 3), add(2, 3, 4), add(4, 0, 5), last=5)
    assert both == 3.0, "the product, the batch, the sum: each once"
    assert _passes(unary(2, 3, costly=True), unary(3, 4), unary(3, 5), add(4, 5, 6), last=6) == 4.0
    one = _passes(add(0, 2, 3), unary(3, 4), unary(3, 5), add(4, 5, 6), last=6)
    assert one == 3.0, "a sum that several equations of one kernel read stays inside"
    summed = (add(0, 2, 3), total(3, 4), unary(3, 5), add(5, 0, 6))
    assert _passes(*summed, last=6) == 7.0, "what a reduction reads is written"
    two = (add(0, 2, 3), unary(3, 4, costly=True), unary(3, 5, costly=True), dot(4, 5, 6))
    assert _passes(*two, last=6) == 6.0, "two kernels each read both operands"


def test_what_is_moved_instead_of_computed_inside_is_read_by_every_kernel():
    """Gathered, it is written by 4 devices and read whole; every further kernel reads it whole, too."""
    for count in (1, 3):
        readers = (unary(4, 5 + k, costly=True) for k in range(count))
        products = (dot(5 + k, 1, 5 + count + k) for k in range(count))
        many = (dot(0, 1, 2), unary(2, 3), add(0, 3, 4), *readers, *products)
        values = tuple(Value((SIDE, SIDE), "float32") for _ in range(5 + 2 * count))
        graph = Graph(values, many, (0, 1), tuple(range(5 + count, 5 + 2 * count)), ("0",), batch=(0,))
        setting = prepare(extract(graph, range(len(many))), MESH, Options())
        (read,) = (r for r in setting.model.reads if r.key == ((), 3))
        assert len(read.kernels) == count
        rows, whole = read.source.layouts.index(((0,), ())), read.target.layouts.index(((), ()))
        inside = read_seconds(setting.model, read, setting.grid, setting.nbytes)
        written = replace(read, kernels=frozenset[int]())
        more = inside - read_seconds(setting.model, written, setting.grid, setting.nbytes)
        passes = more[rows, whole] * MESH.device.bandwidth / (4 * SIDE * SIDE)
        assert passes == pytest.approx(5 / 4 + (count - 1) * 3 / 4)


def _passes(*chain: Equation, last: int) -> float:
    """How often elementwise kernels between two products read or write a whole matrix on one device."""
    every = (dot(0, 1, 2), *chain, dot(last, 1, last + 1))
    sums = {e.outputs[0] for e in chain if e.rule is SUM}
    values = tuple(Value(() if v in sums else (SIDE, SIDE), "float32") for v in range(last + 2))
    graph = Graph(values, every, (0, 1), (last + 1,), ("0",), batch=(0,))
    setting = prepare(extract(graph, range(len(every))), MESH, Options())
    chosen = (home.layouts.index(((), ())) for home in setting.model.homes.values())
    whole = {home.node: k for home, k in zip(setting.model.homes.values(), chosen, strict=True)}
    seconds = sum(each[whole[node]] for (node, _), each in setting.model.streaming.items())
    return round(seconds * MESH.device.bandwidth / (4 * SIDE * SIDE), 6)


def view(source: int, to: int) -> Equation:
    return Equation("copy", (source,), (to,), SAME, OpKind.VIEW)


def test_what_only_the_caller_waits_for_comes_before_the_backwards_first_product():
    """A loss (value 3) keeps what it reads (2), unless there is no backward to wait for."""
    forward = (dot(0, 1, 2), unary(2, 3), unary(2, 4))
    backward = (unary(4, 5), dot(5, 1, 6), dot(6, 1, 7))
    backward = tuple(replace(e, phase=Phase.BACKWARD) for e in backward)
    _, spans = analyse(*forward, *backward, outputs=(3, 7))
    assert spans.late == {2: 4} and spans.of(((), 2)) == (1, 5, True)
    _, spans = analyse(*forward, *(replace(e, phase=Phase.FORWARD) for e in backward), outputs=(3, 7))
    assert not spans.late


GPT = {"layers": 2, "sequence": 64, "hidden": 128}
SCANNED = {"layers": 4, "sequence": 32, "hidden": 256, "scan_layers": True}
"""Its weights are gathered before the loops, and stay so until the backward's ends."""


@pytest.mark.parametrize("sizes", [("mlp", {}), ("gpt-tiny", GPT), ("gpt-tiny", SCANNED)])
def test_the_predicted_peak_is_near_the_compiled_programs(sizes: tuple[str, dict[str, int]]):
    """XLA orders kernels by itself, so that some results live longer than the equations' order says."""
    name, more = sizes
    model = catalog.get(name, batch=64, value_and_grad=value_and_grad, **more)
    traced = capture(model.step, model.args, layer_scans=False)
    found = plan(traced.graph, range(len(traced.graph.equations)), MESH)
    low = lower(traced, step_segment(traced.graph), found, jax_mesh(MESH, jax.devices()[:4]))
    donated = tuple(sorted({i for _, i in traced.graph.aliases}))
    ready = Compiled(low, donated).jitted.lower(*low.inputs)  # type: ignore[attr-defined]
    assert found.memory.peak == pytest.approx(peak_bytes(ready.compile(compiler_options=STRUCTURE)), rel=0.1)
