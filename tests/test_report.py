"""Texts, pictures and traces of plans, timelines and curves."""

import json
from dataclasses import replace

import pytest

from autopar.core.graph import Value
from autopar.core.timeline import Event, Timeline
from autopar.program import emit, schedule, simulate
from autopar.report import chrome, picture
from autopar.report.tensors import groups, path_of, standing
from autopar.report.text import plan_text
from autopar.report.units import seconds, share, size
from tests.test_program import golden, pipeline, sharding


def test_units():
    assert [size(x) for x in (0, 999, 1000, 123456, 7.5e9, 3e15)] == [
        "0 B",
        "999 B",
        "1 KB",
        "123 KB",
        "7.5 GB",
        "3e+03 TB",
    ]
    assert [seconds(x) for x in (0, 2.5e-6, 3.14159e-3, 12)] == ["0 s", "2.5 µs", "3.14 ms", "12 s"]
    assert share(0.12345) == "12.3 %"


def test_paths():
    assert path_of("state.params['Block_0']['up'].kernel") == ("state", "params", "Block_0", "up", "kernel")
    assert path_of("args[0][1].mu['w']") == ("args", "0", "1", "mu", "w")


def test_equal_tensors_share_a_line():
    names = [f"state.{tree}['Block_{i}']['up']['kernel']" for tree in ("params", "mu") for i in (0, 1)]
    values = {v: Value((4, 8), "float32", name) for v, name in enumerate(names)}
    values[9] = Value((4,), "float32", "batch['x']")
    found = groups(sharding(values), values)
    assert [(g.pattern, g.count) for g in found] == [("…/Block_*/up/kernel", 4), ("batch/x", 1)]


@pytest.fixture
def plan():
    plan = pipeline(3, 4)
    line = simulate(plan, emit(plan, schedule("1f1b", 3, 4)))
    return replace(plan.with_timing(line.step_time, line.bubble), cluster="a toy", notes=("a note",))


def test_a_plan_prints(plan):
    golden("plan_text", plan_text(plan))


def test_new_state_is_no_tensor_of_its_own(plan):
    new = {plan.outputs[output] for output, _ in plan.aliases}
    assert new and standing(plan).keys() == plan.value.keys() - new


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_pictures(tmp_path, plan, suffix: str):
    line = simulate(plan, emit(plan, schedule("1f1b", 3, 4)))
    picture.plan_picture(plan, str(tmp_path / f"plan.{suffix}"), line)
    picture.timeline_picture(line, str(tmp_path / f"line.{suffix}"))
    picture.curve_picture({"a": [3, 2, 1], "b": [3, 2.5]}, str(tmp_path / f"curve.{suffix}"))
    assert all((tmp_path / f"{n}.{suffix}").stat().st_size > 1000 for n in ("plan", "line", "curve"))


def test_chrome_trace(tmp_path):
    line = Timeline(
        (Event(0, "forward_0", "run", 0.5, 1.5, 2), Event(0, "m", "send", 1.5, 2.0)), ("stage 0",)
    )
    chrome.save(line, str(tmp_path / "t.json"))
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    run, send = (e for e in events if e["ph"] == "X")
    assert (run["name"], run["ts"], run["dur"], run["tid"]) == ("forward_0 #2", 5e5, 1e6, 0)
    assert (send["name"], send["tid"]) == ("m", 1)
