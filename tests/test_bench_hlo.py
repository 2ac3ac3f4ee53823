"""The reader of compiled HLO against hand-written programs: bytes, groups, trips, slices, FLOPs."""

from __future__ import annotations

import pytest

from autopar.bench.hlo import read
from autopar.bench.hlo_groups import axes_of, groups
from autopar.bench.hlo_traffic import Sent, traffic
from autopar.bench.hlo_work import kernels
from autopar.bench.score import price_of
from autopar.core.mesh import Axis, Device, Mesh
from autopar.sharding.ways.cost import collective
from autopar.sharding.ways.grid import grid_of

MESH = Mesh(
    Device("test", 1 << 34, 9e11, (("float32", 1.4e13),), 1e11),
    (Axis("x", 2, 1.2e10, 2e-5), Axis("y", 4, 1e11, 5e-6)),
)
ADD = """%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def program(body: str, *more: str) -> str:
    lines = "\n".join(f"  {line.strip()}" for line in body.strip().splitlines())
    computations = "\n".join((ADD, *more))
    entry = "ENTRY %main (p: f32[8,64]) -> f32[8,64]"
    return f"HloModule test, is_scheduled=true\n\n{computations}\n{entry} {{\n{lines}\n}}\n"


def sent(body: str, *more: str) -> list[Sent]:
    return list(traffic(read(program(body, *more)), (2, 4)))


# groups


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups={}", (tuple(range(8)),)),
        ("replica_groups=[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        (
            "replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}",
            ((0, 1, 2, 3), (4, 5, 6, 7)),
        ),
        ("replica_groups=mesh['a'=8], device_ids=([8]) {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
    ],
)
def test_groups_in_every_spelling(text: str, expected: tuple[tuple[int, ...], ...]):
    assert groups(f", channel_id=1, {text}, dimensions={{0}}", 8) == expected


def test_axes_along_which_the_members_of_a_group_differ():
    assert axes_of(((0, 4), (1, 5)), (2, 4)) == (0,)
    assert axes_of(((0, 1, 2, 3),), (2, 4)) == (1,)
    assert axes_of((tuple(range(8)),), (2, 4)) == (0, 1)
    assert axes_of(((0,), (1,)), (2, 4)) == ()
    assert axes_of(((0, 5),), (2, 2, 2)) == (0, 2)


# collectives

PARAMETER = "%p = f32[8,64]{1,0} parameter(0)"
OVER_Y = "channel_id=1, replica_groups=[2,4]<=[8], use_global_device_ids=true"
Y = ((1, 4),)


def test_an_all_gather_counts_its_result():
    body = f"{PARAMETER}\nROOT %g = f32[32,64]{{1,0}} all-gather(%p), {OVER_Y}, dimensions={{0}}"
    assert sent(body) == [Sent("all-gather", Y, 4 * 32 * 64, 1)]


def test_a_reduce_scatter_counts_its_input_and_an_all_to_all_its_part():
    body = f"""{PARAMETER}
    %s = f32[2,64]{{1,0}} reduce-scatter(%p), {OVER_Y}, dimensions={{0}}, to_apply=%add
    ROOT %a = f32[8,64]{{1,0}} all-to-all(%p), {OVER_Y}, dimensions={{0}}"""
    assert sent(body) == [Sent("reduce-scatter", Y, 4 * 8 * 64, 1), Sent("all-to-all", Y, 4 * 8 * 64, 1)]


def test_an_all_reduce_read_whole_is_one():
    body = f"""{PARAMETER}
    %r = f32[8,64]{{1,0}} all-reduce(%p), {OVER_Y}, to_apply=%add
    ROOT %n = f32[8,64]{{1,0}} negate(%r)"""
    assert sent(body) == [Sent("all-reduce", Y, 4 * 8 * 64, 1)]


SLICING = """%slicing (q: f32[8,64], i: s32[]) -> f32[2,64] {
  %q = f32[8,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %view = f32[8,64]{1,0} bitcast(%q)
  %d = f32[2,64]{1,0} dynamic-slice(%view, %i, %zero), dynamic_slice_sizes={2,64}
  ROOT %n = f32[2,64]{1,0} negate(%d)
}
"""


def test_an_all_reduce_of_which_only_slices_are_read_is_a_reduce_scatter():
    body = f"""{PARAMETER}
    %i = s32[] partition-id()
    %r = f32[8,64]{{1,0}} all-reduce(%p), {OVER_Y}, to_apply=%add
    ROOT %f = f32[2,64]{{1,0}} fusion(%r, %i), kind=kLoop, calls=%slicing"""
    assert sent(body, SLICING) == [Sent("reduce-scatter", Y, 4 * 8 * 64, 1)]
    whole = body.replace("ROOT %f", "%f") + "\nROOT %n = f32[8,64]{1,0} negate(%r)"
    assert [s.kind for s in sent(whole, SLICING)] == ["all-reduce"]


def test_a_result_scattered_over_one_of_two_axes_is_reduced_over_the_other():
    body = f"""{PARAMETER}
    %i = s32[] partition-id()
    %r = f32[8,64]{{1,0}} all-reduce(%p), channel_id=1, replica_groups={{}}, to_apply=%add
    ROOT %f = f32[2,64]{{1,0}} fusion(%r, %i), kind=kLoop, calls=%slicing"""
    first, rest = sent(body, SLICING)
    assert first == Sent("reduce-scatter", Y, 4 * 8 * 64, 1)
    assert rest == Sent("all-reduce", ((0, 2),), 4 * 8 * 64 / 4, 1)


def test_every_result_of_a_combined_all_reduce_is_judged_by_itself():
    body = f"""{PARAMETER}
    %i = s32[] partition-id()
    %r = (f32[8,64]{{1,0}}, /*index=1*/f32[8,64]{{1,0}}) all-reduce(%p, %p), {OVER_Y}, to_apply=%add
    %one = f32[8,64]{{1,0}} get-tuple-element(%r), index=0
    %two = f32[8,64]{{1,0}} get-tuple-element(%r), index=1
    %f = f32[2,64]{{1,0}} fusion(%one, %i), kind=kLoop, calls=%slicing
    ROOT %n = f32[8,64]{{1,0}} negate(%two)"""
    assert [s.kind for s in sent(body, SLICING)] == ["reduce-scatter", "all-reduce"]


def test_an_asynchronous_all_gather_counts_once():
    body = f"""{PARAMETER}
    %s = (f32[8,64]{{1,0}}, f32[32,64]{{1,0}}) all-gather-start(%p), {OVER_Y}, dimensions={{0}}
    ROOT %d = f32[32,64]{{1,0}} all-gather-done(%s)"""
    assert sent(body) == [Sent("all-gather", Y, 4 * 32 * 64, 1)]


LOOP = """%body (t: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {
  %t = (s32[], f32[8,64]{1,0}) parameter(0)
  %c = s32[] get-tuple-element(%t), index=0
  %x = f32[8,64]{1,0} get-tuple-element(%t), index=1
  %r = f32[8,64]{1,0} collective-permute(%x), channel_id=3, source_target_pairs={{0,0},{0,1},{1,0}}
  ROOT %o = (s32[], f32[8,64]{1,0}) tuple(%c, %r)
}

%condition (t: (s32[], f32[8,64])) -> pred[] {
  %t = (s32[], f32[8,64]{1,0}) parameter(0)
  ROOT %n = pred[] constant(true)
}
"""
SEVEN = 'backend_config={"known_trip_count":{"n":"7"}}'


def test_a_loops_body_counts_once_per_trip():
    body = f"""{PARAMETER}
    %zero = s32[] constant(0)
    %t = (s32[], f32[8,64]{{1,0}}) tuple(%zero, %p)
    %w = (s32[], f32[8,64]{{1,0}}) while(%t), condition=%condition, body=%body, {SEVEN}
    ROOT %o = f32[8,64]{{1,0}} get-tuple-element(%w), index=1"""
    assert sent(body, LOOP) == [Sent("permute", Y, 4 * 8 * 64, 7)]


def test_a_collective_among_one_device_each_sends_nothing():
    body = f"""{PARAMETER}
    ROOT %r = f32[8,64]{{1,0}} all-reduce(%p), channel_id=1, replica_groups=[8,1]<=[8], to_apply=%add"""
    assert sent(body) == []


def test_a_group_over_a_part_of_an_axis_costs_as_an_axis_of_that_size():
    grid = grid_of(MESH)
    price, parts = price_of(Sent("all-gather", ((1, 2),), 100.0, 1), grid)
    assert price.wire == pytest.approx(1 / 2) and parts == {"y": pytest.approx(1 / 2)}
    assert price.fixed == pytest.approx(5e-6)
    both, parts = price_of(Sent("all-reduce", ((0, 2), (1, 4)), 100.0, 1), grid)
    assert both == collective(grid, "all-reduce", (0, 1))
    assert parts == {"y": pytest.approx(2 * 3 / 4), "x": pytest.approx(2 * 1 / 2 / 4)}


# work

FUSED_DOT = """%product (a: f32[8,64], b: f32[64,16]) -> f32[8,16] {
  %a = f32[8,64]{1,0} parameter(0)
  %b = f32[64,16]{1,0} parameter(1)
  %d = f32[8,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %n = f32[8,16]{1,0} negate(%d)
}
"""


def test_flops_and_bytes_of_a_fused_product():
    body = f"""{PARAMETER}
    %w = f32[64,16]{{1,0}} constant({{...}})
    ROOT %f = f32[8,16]{{1,0}} fusion(%p, %w), kind=kOutput, calls=%product"""
    (found,) = kernels(read(program(body, FUSED_DOT)))
    assert found.flops == 2 * 8 * 64 * 16
    assert found.nbytes == 4 * (8 * 64 + 64 * 16 + 8 * 16)


def test_flops_of_convolutions():
    image, kernel = (
        "%i = f32[2,16,16,3]{3,2,1,0} constant({...})",
        "%k = f32[3,3,3,8]{3,2,1,0} constant({...})",
    )
    window = "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f"
    body = f"{image}\n{kernel}\nROOT %c = f32[2,16,16,8]{{3,2,1,0}} convolution(%i, %k), {window}"
    (found,) = kernels(read(program(body)))
    assert found.flops == 2 * (2 * 16 * 16 * 8) * (3 * 3 * 3)
    dilated = body.replace("pad=1_1x1_1", "pad=1_1x1_1 lhs_dilate=2x2")
    assert next(kernels(read(program(dilated)))).flops == found.flops / 4


def test_of_a_sliced_operand_only_the_slice_is_read():
    body = f"""{PARAMETER}
    %i = s32[] partition-id()
    ROOT %f = f32[2,64]{{1,0}} fusion(%p, %i), kind=kLoop, calls=%slicing"""
    (found,) = kernels(read(program(body, SLICING)))
    assert found.nbytes == 4 * 2 * 64 + 4 + 4 * 2 * 64


UPDATING = """%updating (q: f32[8,64], u: f32[1,64], i: s32[]) -> f32[8,64] {
  %q = f32[8,64]{1,0} parameter(0)
  %u = f32[1,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %d = f32[8,64]{1,0} dynamic-update-slice(%q, %u, %i, %zero)
}
"""


def test_of_a_result_updated_in_place_only_the_update_is_written():
    body = f"""{PARAMETER}
    %u = f32[1,64]{{1,0}} constant({{...}})
    %i = s32[] constant(3)
    ROOT %f = f32[8,64]{{1,0}} fusion(%p, %u, %i), kind=kLoop, calls=%updating"""
    (found,) = kernels(read(program(body, UPDATING)))
    assert found.nbytes == 4 * 64 + 4 + 4 * 64


def test_a_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        read("HloModule empty\n")
