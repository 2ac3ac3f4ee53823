"""The serving benchmark's arithmetic: what it sends, and what it makes of the times that come back."""

import json
import statistics
import time

import pytest
from click.testing import CliRunner

from autopar.bench.serve import Measured, Work, at_once, measure, poisson, serve
from autopar.bench.serve_gpu import Reads, serve_gpu
from autopar.bench.serve_systems import TOGETHER, _in_batches
from autopar.core.errors import BadInput
from autopar.models.serving import get_serving


class Recorded:
    """A system that took these times."""

    name = "recorded"

    def __init__(self, times):
        self.times = times

    def run(self, work):
        job = json.loads(work.job)
        assert len(job["prompts"]) == len(job["new"]) == len(job["after"])
        return [{"times": t, "tokens": [7] * len(t)} for t in self.times]


def test_a_batch_is_measured_from_the_last_first_token_on():
    work = at_once(2, 4, 3, 100, 0)
    found = Measured()
    assert measure(Recorded([[1.0, 2.0, 3.0], [2.0, 2.5, 4.0]]), work, found)
    assert found.first == [2.0]
    assert found.rate == [4 / (4.0 - 2.0)], "four tokens after the first ones, in two seconds"
    assert found.gap == [1.0]
    assert found.tokens == [[7, 7, 7], [7, 7, 7]]


def test_a_load_over_time_counts_from_each_arrival():
    work = Work("load", ((5,), (6,)), (2, 2), (1.0, 2.0))
    found = Measured()
    assert measure(Recorded([[1.5, 2.0], [4.0, 5.0]]), work, found)
    assert found.first == [statistics.median([0.5, 2.0])]
    assert found.rate == [4 / 5.0]


def test_a_system_that_cannot_do_a_work_is_left_out():
    class Unable:
        def run(self, work):
            return None

    found = Measured()
    assert not measure(Unable(), at_once(1, 2, 2, 10, 0), found)
    assert found.first == []


def test_loads_are_the_same_for_a_seed_and_keep_their_rate():
    work = poisson(400, 2.0, 1000, 3)
    assert work == poisson(400, 2.0, 1000, 3) != poisson(400, 2.0, 1000, 4)
    assert list(work.after) == sorted(work.after)
    assert work.after[-1] / 400 == pytest.approx(0.5, rel=0.15)
    assert statistics.median(map(len, work.prompts)) == pytest.approx(128, rel=0.2)
    assert all(8 <= len(p) <= 512 for p in work.prompts) and all(2 <= n <= 128 for n in work.new)


def test_an_unknown_system_is_named():
    result = CliRunner().invoke(serve, ["--systems", "autopar,tgi"])
    assert "got tgi" in str(result.exception)


def test_a_system_without_continuous_batching_takes_all_that_waits():
    taken = []

    def run(chosen, began):
        taken.append(chosen)
        time.sleep(0.05)
        return [{"times": [k], "tokens": [k]} for k in chosen]

    rows = _in_batches([0.0, 0.02, 0.0, 0.03, 0.2], run)
    assert taken == [[0, 2], [1, 3], [4]]
    assert [row["tokens"] for row in rows] == [[0], [1], [2], [3], [4]]
    taken.clear()
    _in_batches([0.0] * (TOGETHER + 1), run)
    assert [len(chosen) for chosen in taken] == [TOGETHER, 1]


def test_what_a_decode_step_reads_bounds_it():
    reads = Reads.of("opt-1.3b", "float16")
    config = get_serving("opt-1.3b").config
    blocks = 24 * (12 * 2048**2 + 13 * 2048)
    assert reads.weights == 2 * (blocks + config.vocabulary * 2048 + 2 * 2048)
    assert reads.token == 2 * 24 * 2048 * 2
    assert reads.bound(1, 0, 1e12) == pytest.approx(1e12 / reads.weights)
    assert reads.bound(8, 100, 1e12) == pytest.approx(8e12 / (reads.weights + 800 * reads.token))


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = CliRunner().invoke(serve_gpu, ["--model", "opt-tiny"])
    assert isinstance(result.exception, BadInput) and "no GPU: JAX sees none here" in str(result.exception)


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path):
    pytest.importorskip("transformers")
    options = ["--batch", "1", "--batch", "3", "--prompt", "16", "--new", "5", "--rounds", "1"]
    options += ["--device", "cpu", "--model", "opt-tiny", "--dtype", "float32", "--json", str(tmp_path / "x")]
    result = CliRunner().invoke(serve_gpu, options)
    assert result.exit_code == 0, result.output
    assert "these are no figures of a GPU" in result.output and "of the bound" in result.output
    rows = json.loads((tmp_path / "x").read_text())
    assert [(row["system"], row["batch"]) for row in rows] == [
        ("autopar", 1), ("autopar", 3), ("transformers", 1), ("transformers", 3)
    ]  # fmt: skip
    assert rows[0]["tokens"] == rows[2]["tokens"] and rows[1]["tokens"] == rows[3]["tokens"]
    assert all(row["rate"] > 0 and row["bound"] > 0 for row in rows)
