"""The plan benchmark: what experts pin, and one cell from plan to compiled program."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import asdict, replace
from typing import Any

import pytest

from autopar.bench.experts import Expert, experts, residual
from autopar.bench.plan_cases import case, mesh_of
from autopar.bench.plan_cell import Bench, Cell, Row, keepable
from autopar.bench.plan_jobs import Done, Job, Kept, cell_of, run
from autopar.bench.plans import errors, summary, verdict
from autopar.bench.score import Score
from autopar.core.errors import BadInput
from autopar.sharding.explain import tokens

MESH = mesh_of("2x4", "V100-16GB", 12.5e9)


@functools.cache
def bench(name: str) -> Bench:
    return Bench.of(case(name, 8), MESH)


def pinned(name: str, expert: Expert) -> dict[str, Any]:
    """Path of each pinned parameter and batch entry → layout."""
    b = bench(name)
    pins = expert.pins(b.graph, MESH, b.case)
    assert keepable(b.graph, MESH, pins) == pins, "sizes are chosen so that axes divide them"
    return {"/".join(tokens(b.graph.values[v].name)): spec for v, spec in pins if b.graph.values[v].name}


def test_a_mesh_says_which_axis_is_slow():
    slow, fast = MESH.axes
    assert (slow.size, fast.size) == (2, 4) and slow.bandwidth < fast.bandwidth
    assert mesh_of("1x8", "A100-40GB", 1e9).shape == (8,)
    with pytest.raises(BadInput, match="2x4"):
        mesh_of("two", "V100-16GB", 1e9)


def test_megatron_cuts_heads_and_inner_widths():
    found = pinned("gpt", Expert("", ("x",), ("y",)))
    block = "state/params/Block_1"
    assert found[f"{block}/attention/query/kernel"] == ((), ("y",), ())
    assert found[f"{block}/attention/query/bias"] == (("y",), ())
    assert found[f"{block}/attention/out/kernel"] == (("y",), (), ())
    assert found[f"{block}/attention/out/bias"] == ((),)
    assert found[f"{block}/feed_forward/up/kernel"] == ((), ("y",))
    assert found[f"{block}/feed_forward/up/bias"] == (("y",),)
    assert found[f"{block}/feed_forward/down/kernel"] == (("y",), ())
    assert found["state/params/embedding/embedding"] == (("y",), ())
    assert found["state/optimizer/1/0/mu/Block_1/feed_forward/up/kernel"] == ((), ("y",))
    assert found["batch/tokens"] == (("x",), ())


def test_a_served_decoder_s_kernels_are_cut_where_they_lie():
    found = pinned("opt-decode", Expert("", ("x",), ("y",)))
    block = "params/Block_1"
    assert found[f"{block}/query/kernel"] == (("y",), (), ())
    assert found[f"{block}/out/kernel"] == ((), ("y",), ())
    assert found[f"{block}/up/kernel"] == (("y",), ()) and found[f"{block}/up/bias"] == (("y",),)
    assert found[f"{block}/down/kernel"] == ((), ("y",)) and found["params/embedding"] == (("y",), ())


def test_images_are_cut_by_rows():
    found = pinned("wresnet", Expert("", ("x",), rows=("y",)))
    assert found["batch/images"] == (("x",), ("y",), (), ()) and found["batch/labels"] == (("x",),)
    assert not any(axes for name, spec in found.items() if "params" in name for axes in spec)


def test_zero_cuts_what_it_says():
    two = pinned("gpt", Expert("", ("x", "y"), zero=("x", "y")))
    three = pinned("gpt", Expert("", ("x", "y"), zero=("x", "y"), whole=True))
    name = "Block_0/feed_forward/up/kernel"
    assert two[f"state/params/{name}"] == ((), ())
    assert two[f"state/optimizer/1/0/mu/{name}"] == three[f"state/params/{name}"] == ((), ("x", "y"))


def test_the_residual_stream_is_found_and_cut_along_the_sequence():
    b = bench("gpt")
    stream = residual(b.graph, 512)
    assert len(stream) >= 4, "two sums in each of two blocks"
    pins = dict(Expert("", ("x",), ("y",), sequence=True).pins(b.graph, MESH, b.case))
    assert {pins[v] for v in stream} == {(("x",), ("y",), ())}


def test_an_all_reduce_is_not_split_for_work_that_its_reader_does_anyway():
    """The bias that is added between costs nothing where it is: its kernel is the reader's.

    Scattered before the loss, a sum is gathered again, and read whole by the kernels of loss and gradient.
    """
    node = mesh_of("1x8", "V100-16GB", 12.5e9)
    found = replace(bench("mlp"), mesh=node, rows={}).draft(()).plan
    assert [c.kind for c in found.collectives if c.nbytes > 1e5] == ["all-reduce"] * 3


def test_a_grid_of_two_axes_has_both_orders():
    names = [e.name for e in experts(MESH, case("moe", 8))]
    assert "data x × model y" in names and "data y × model x" in names and "expert parallel" in names
    assert len(names) == len(set(names))


def test_grids_that_differ_in_like_axes_are_one():
    cube = mesh_of("2x2x2", "V100-16GB", 12.5e9)
    names = {re.sub(r" \+.*", "", e.name) for e in experts(cube, case("gpt", 8)) if "×" in e.name}
    assert names == {"data yz × model x", "data xz × model y", "data z × model xy", "data x × model yz"}


def made(job: Job, mine: float, theirs: float) -> Cell:
    def row(name: str, seconds: float) -> Row:
        return Row(name, "", Score(seconds, 0.0, {"x": 8.0}, peak=100), {"x": 8.0}, 95)

    return Cell(job.model, job.mesh, job.device, row("automatic", mine), (row("expert", theirs),), ())


def test_judged_cells_are_kept(tmp_path):
    jobs = [Job(m, "2x4", "V100-16GB", 1e9) for m in ("mlp", "gpt")]
    for job, seconds in zip(jobs, (1.0, 2.0)):
        Kept(tmp_path / "cells.json").add(Done(job, made(job, seconds, 1.5)))
    kept, started = Kept(tmp_path / "cells.json"), []
    found = [done.cell for done in run(jobs, kept, 1, started.append)]
    assert not started and [c.ratio for c in found if c] == [1 / 1.5, 2 / 1.5]
    assert "1 of 2 compared above 1.00" in verdict([c for c in found if c])
    (tmp_path / "cells.json").write_text("[{}]")
    with pytest.raises(BadInput, match="delete it"):
        Kept(tmp_path / "cells.json")


def test_a_cell_from_plan_to_compiled_program():
    b = bench("mlp")
    automatic, _ = b.automatic()
    grid, spread = Expert("data x × model y", ("x",), ("y",)), Expert("data parallel", ("x", "y"))
    failed: list[tuple[str, str]] = []
    rows = list(replace(b, near=1.0).judge((grid, spread), failed))
    ((far, why),) = failed
    assert far == "data parallel" and "times as long as the best" in why
    found = Cell("mlp", "2x4", "V100-16GB", automatic, tuple(rows), ())
    assert found.ratio <= 1.0 and {row.variant for row in rows} == {"as written", "rest planned"}
    wire, memory = errors(found)
    assert abs(wire) < 0.01 and abs(memory) < 0.1
    assert summary([found]).row_count == 1
    assert cell_of(json.loads(json.dumps(asdict(found)))) == found
