"""`autopar bench evaluate`: lm-eval through `autopar serve`, beside lm-eval with transformers."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from autopar.bench.random_opt import random_opt
from autopar.bench.serve_load import HOST, server
from autopar.core.errors import BadInput

SCRIPT = Path(__file__).with_name("evaluate_lm.py")
NAME = "evaluated"
NEAR = 1e-4
"""Relative difference up to which two metrics are the same: float32 sums in other orders."""

NEW = 24
"""Tokens of an answer in the generation task."""

TASKS = {
    "choice": """output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: "{{ends}}"
doc_to_target: "{{right}}"
metric_list: [{metric: acc}, {metric: acc_norm}]""",
    "perplexity": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]""",
    "generation": f"""output_type: generate_until
doc_to_text: "{{{{start}}}}"
doc_to_target: "{{{{end}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: {NEW}, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]""",
}
"""What lm-eval is told of each task, beside where its documents are."""

Found = dict[str, Any]


@click.command()
@click.argument("directory", required=False, type=click.Path(exists=True, file_okay=False))
@click.option("--documents", default=8, show_default=True, type=click.IntRange(3, 50), help="of each task")
@click.option("--python", default=sys.executable, help="the interpreter that lm-eval is installed in")
@click.option("--max-length", default=128, show_default=True, type=click.IntRange(min=64),
              help="tokens of the longest sequence")  # fmt: skip
def evaluate(directory: str | None, documents: int, python: str, max_length: int) -> None:
    """Scores DIRECTORY (default: a tiny OPT of random weights) with lm-eval through `autopar serve`, and
    again with transformers. The tasks (multiple choice, perplexity, generation) are made here, of sentences
    from Python's own documentation.

    Ends with status 1 if a metric differs by more than 1 in 10,000 or an answer by a character.
    """
    _check(python)
    with contextlib.ExitStack() as stack:
        where = directory or stack.enter_context(random_opt("opt-tiny", text=True))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        write_tasks(Path(folder), documents)
        common = {"max_length": max_length}
        options = ["--max-length", str(max_length), "--dtype", "float32", "--served-as", NAME]
        with server(where, options) as (port, _):
            url = f"http://{HOST}:{port}/v1/completions"
            asked = {"model": NAME, "base_url": url, "tokenizer_backend": "remote", "num_concurrent": 4}
            ours = _run(python, folder, "local-completions", asked | common)
        theirs = _run(
            python, folder, "hf", {"pretrained": where, "dtype": "float32", "device": "cpu"} | common
        )
    click.echo(f"lm-eval {ours['version']}, {documents} documents of each task")
    if not report(Console(width=110), ours, theirs):
        raise click.exceptions.Exit(1)


def _check(python: str) -> None:
    words = "import importlib.util, sys; sys.exit(importlib.util.find_spec('lm_eval') is None)"
    if subprocess.run([python, "-c", words]).returncode:
        raise BadInput(
            f"{python} has no lm-eval; pip install 'lm-eval[api]' torch transformers, there or in an "
            "environment of its own, and name that one's interpreter with --python"
        )


def _run(python: str, tasks: str, model: str, arguments: dict[str, Any]) -> Found:
    request = {"tasks": tasks, "names": list(TASKS), "model": model, "arguments": arguments}
    click.echo(f"lm-eval with {model}", err=True)
    found = subprocess.run([python, str(SCRIPT), json.dumps(request)], stdout=subprocess.PIPE, text=True,
                           env={**os.environ, "HF_HOME": tasks})  # fmt: skip
    if found.returncode:
        raise BadInput(f"lm-eval with {model} ended with status {found.returncode}; its message is above")
    return json.loads(found.stdout)


# -- the tasks


def write_tasks(folder: Path, documents: int) -> None:
    """Writes the tasks' documents and what lm-eval is told of them."""
    rng = random.Random(0)
    taken = rng.sample(sentences(), 3 * documents)
    halves = [_halves(text) for text in taken]
    made: dict[str, list[dict[str, Any]]] = {"choice": [], "perplexity": [], "generation": []}
    for k in range(documents):
        start, end = halves[k]
        ends = [end, *(each for _, each in rng.sample(halves[:k] + halves[k + 1 :], 2))]
        rng.shuffle(ends)
        made["choice"].append({"start": start, "ends": ends, "right": ends.index(end)})
        made["perplexity"].append({"text": taken[documents + k]})
        start, end = halves[2 * documents + k]
        made["generation"].append({"start": start, "end": end})
    for name, rows in made.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        files = f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(data))}}}}}\n"
        (folder / f"{name}.yaml").write_text(f"{head}{files}{TASKS[name]}\n", encoding="utf-8")


def sentences() -> list[str]:
    """Returns plain sentences of 60 to 90 characters from Python's documentation, as every Python has it."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topic.split()) for _, topic in sorted(topics.items()))
    found = re.findall(r"(?<=\. )[A-Z][a-zA-Z ,;()-]{58,88}\.(?= )", text)
    return sorted(set(found))


def _halves(text: str) -> tuple[str, str]:
    """A sentence in two, at a space; the second begins with it."""
    at = text.index(" ", len(text) // 2)
    return text[:at], text[at:]


# -- what came of it


def report(console: Console, ours: Found, theirs: Found) -> bool:
    """Prints both runs side by side; returns whether they are the same."""
    table = Table("task", "metric", "autopar serve", "transformers", "difference", show_edge=False)
    same = True
    for task in TASKS:
        for metric, a, b in _metrics(ours["results"][task], theirs["results"][task]):
            apart = abs(a - b) / max(abs(a), abs(b), 1e-9)
            same &= apart <= NEAR
            table.add_row(task, metric, f"{a:.7g}", f"{b:.7g}", f"{apart:.1e}")
    console.print(table)
    answers = list(zip(_flat(ours["answers"]["generation"]), _flat(theirs["answers"]["generation"])))
    equal = sum(a == b for a, b in answers)
    scores = [_numbers(found["answers"][t] for t in ("choice", "perplexity")) for found in (ours, theirs)]
    apart = max(abs(a - b) for a, b in zip(*scores, strict=True))
    console.print(
        f"{equal} of {len(answers)} generated answers are the same; of {len(scores[0])} log likelihoods the "
        f"largest difference is {apart:.1e} nats"
    )
    return same and equal == len(answers)


def _metrics(ours: Found, theirs: Found) -> Iterator[tuple[str, float, float]]:
    """Metrics that both have, without their errors of estimation."""
    for name, value in ours.items():
        if isinstance(value, float) and "stderr" not in name and isinstance(theirs.get(name), float):
            yield name.partition(",")[0], value, theirs[name]


def _flat(answers: Any) -> Iterator[Any]:
    """All that is in lists of lists."""
    if isinstance(answers, list):
        for each in answers:
            yield from _flat(each)
    else:
        yield answers


def _numbers(answers: Iterable[Any]) -> list[float]:
    """The log likelihoods among answers; lm-eval writes some of them as text."""
    found = (x for each in answers for x in _flat(each))
    return [float(x) for x in found if x not in ("True", "False") and not isinstance(x, bool)]
