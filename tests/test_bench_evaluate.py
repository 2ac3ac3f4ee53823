"""The comparison of lm-eval's runs: the tasks it writes, and what counts as the same."""

import copy
import importlib.util
import io
import json

import pytest
import yaml
from click.testing import CliRunner
from rich.console import Console

from autopar.bench.evaluate import TASKS, evaluate, report, sentences, write_tasks

FOUND = {
    "version": "0",
    "results": {
        "choice": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "choice"},
        "perplexity": {"bits_per_byte,none": 8.19},
        "generation": {"exact_match,none": 0.0},
    },
    "answers": {
        "choice": [[[["-12.5", "False"]], [["-13.25", "True"]]]],
        "perplexity": [[[-470.125]]],
        "generation": [[["one two"]], [["three"]]],
    },
}


def same(change=lambda found: None):
    """Whether the report calls a changed copy the same, and its text."""
    other, out = copy.deepcopy(FOUND), io.StringIO()
    change(other)
    return report(Console(file=out, width=110), FOUND, other), out.getvalue()


def test_equal_runs_are_the_same_and_others_are_not():
    equal, text = same()
    assert equal and "2 of 2 generated answers are the same; of 3 log likelihoods" in text
    assert "bits_per_byte" in text and "stderr" not in text
    assert not same(lambda f: f["results"]["perplexity"].update({"bits_per_byte,none": 8.2}))[0]
    assert same(lambda f: f["results"]["perplexity"].update({"bits_per_byte,none": 8.19001}))[0]
    equal, text = same(lambda f: f["answers"]["generation"].__setitem__(1, [["four"]]))
    assert not equal and "1 of 2" in text
    assert (
        "2.5e-01 nats" in same(lambda f: f["answers"]["choice"][0].__setitem__(0, [["-12.25", "False"]]))[1]
    )


def test_tasks_are_what_lm_eval_reads(tmp_path):
    write_tasks(tmp_path, 5)
    for name in TASKS:
        task = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
        assert task["task"] == name and task["metric_list"]
        with open(task["dataset_kwargs"]["data_files"]["test"]) as file:
            rows = [json.loads(line) for line in file]
        assert len(rows) == 5
        if name == "choice":
            assert all(len(set(row["ends"])) == 3 and 0 <= row["right"] < 3 for row in rows)
            assert all(row["start"] + row["ends"][row["right"]] in sentences() for row in rows)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_lm_eval_it_says_what_to_install():
    result = CliRunner().invoke(evaluate, [])
    assert "has no lm-eval; pip install" in str(result.exception)
