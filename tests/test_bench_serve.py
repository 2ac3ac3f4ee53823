"""The serving benchmark's arithmetic: what it sends, and what it makes of the times that come back."""

import json
import statistics

import pytest
from click.testing import CliRunner

from autopar.bench.serve import Measured, Work, at_once, measure, poisson, serve


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
