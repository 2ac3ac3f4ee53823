"""`autopar bench serve`: our engine beside the peers that are installed, same files and threads."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from autopar.bench.random_opt import random_opt
from autopar.core.errors import BadInput

SYSTEMS = ("autopar", "vllm", "ctranslate2", "transformers")
MODULE = Path(__file__).with_name("serve_systems.py")


@dataclass(frozen=True)
class Work:
    """Requests that are sent together or over time.

    Attributes:
        prompts: token ids. new: tokens wanted of each. after: seconds after the start at which each comes.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    new: tuple[int, ...]
    after: tuple[float, ...]

    @property
    def job(self) -> str:
        """Returns the work as a line for a system's process."""
        return json.dumps({"prompts": self.prompts, "new": self.new, "after": self.after})


@dataclass
class Measured:
    """What one system took for one work, a figure per round.

    Attributes:
        first: seconds until every request had its first token (of a work that comes at once), or the median
            wait for it. rate: tokens per second after the first ones; for a work over time, of all tokens.
        slow: 95th percentile of the wait for the first token. gap: median seconds between tokens.
        tokens: of the last round, to be compared.
    """

    first: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    slow: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)


class System:
    """A system in its own process, stopped (SIGSTOP) while another one is measured.

    Args:
        python: the interpreter that it is installed in. options: as in `serve_systems`.

    Attributes:
        version: empty if it did not start. error: then why. about: what it said of its device, if anything.
    """

    def __init__(self, name: str, python: str, directory: str, threads: int, **options: Any):
        self.name = name
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "XLA_FLAGS": "",
        }
        self._process = subprocess.Popen(
            [python, str(MODULE), name, directory, str(threads), json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE if name == "vllm" else None,
            text=True, env=environment,
        )  # fmt: skip
        self.about = self._answer()
        self.version, self.error = self.about.get("version", ""), self.about.get("error", "")
        self._signal(signal.SIGSTOP)

    def run(self, work: Work) -> list[dict[str, Any]] | None:
        """Returns a row per request, or None if the system ended over it."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write(work.job + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        return answer.get("rows")

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError), self._process:
            pass  # closes its pipes and waits for it

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": "the process ended without an answer"}

    def _signal(self, what: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(what)


# -- work


def at_once(batch: int, prompt: int, new: int, vocabulary: int, seed: int) -> Work:
    """Returns `batch` requests of `prompt` random tokens that come together and want `new` tokens each."""
    rng = random.Random(seed)
    prompts = tuple(tuple(rng.randrange(5, vocabulary) for _ in range(prompt)) for _ in range(batch))
    return Work(f"batch {batch}", prompts, (new,) * batch, (0.0,) * batch)


def poisson(requests: int, rate: float, vocabulary: int, seed: int) -> Work:
    """Returns requests that come as a Poisson process, their lengths log-normal.

    The shape is that of Azure's conversation trace (Patel et al. 2024, Splitwise: a long tail of prompts,
    shorter answers), scaled down by 8 so that two cores can follow: medians of 128 and 16 tokens.
    """
    rng = random.Random(seed)
    prompts, new, after, now = [], [], [], 0.0
    for _ in range(requests):
        now += rng.expovariate(rate)
        size = min(512, max(8, round(rng.lognormvariate(np.log(128), 0.8))))
        prompts.append(tuple(rng.randrange(5, vocabulary) for _ in range(size)))
        new.append(min(128, max(2, round(rng.lognormvariate(np.log(16), 0.8)))))
        after.append(now)
    return Work(f"{rate:g} requests/s", tuple(prompts), tuple(new), tuple(after))


def measure(system: System, work: Work, into: Measured) -> bool:
    """Runs the work once; returns whether the system could."""
    rows = system.run(work)
    if rows is None:
        return False
    firsts = [row["times"][0] - at for row, at in zip(rows, work.after)]
    last = max(row["times"][-1] for row in rows)
    total = sum(len(row["times"]) for row in rows)
    gaps = [b - a for row in rows for a, b in zip(row["times"], row["times"][1:])]
    if any(work.after):
        into.first.append(statistics.median(firsts))
        into.rate.append(total / last)
    else:
        into.first.append(max(firsts))
        into.rate.append((total - len(rows)) / (last - max(firsts)))
    into.slow.append(float(np.percentile(firsts, 95)))
    into.gap.append(statistics.median(gaps) if gaps else 0.0)
    into.tokens = [row["tokens"] for row in rows]
    return True


def read_rate(seconds: float = 1.0) -> float:
    """Returns bytes per second that a matrix-vector product reads here: what bounds decoding one sequence."""
    matrix, x = np.ones((8192, 8192), np.float32), np.ones(8192, np.float32)
    best, until = float("inf"), time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.perf_counter()
        np.dot(matrix, x)
        best = min(best, time.perf_counter() - began)
    return matrix.nbytes / best


# -- the model


def weight_bytes(directory: str) -> int:
    """Returns the bytes of a directory's weights."""
    return sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))


# -- the command


@click.command("serve")
@click.argument("directory", required=False, type=click.Path(exists=True, file_okay=False))
@click.option("--systems", default=",".join(SYSTEMS), show_default=True, help="which, by commas")
@click.option("--python", "pythons", multiple=True, metavar="SYSTEM=PYTHON",
              help="the interpreter that a peer is installed in, if not this one")  # fmt: skip
@click.option("--batch", "batches", multiple=True, type=int, default=(1, 8, 32), show_default=True)
@click.option("--prompt", default=64, show_default=True, help="tokens of each prompt")
@click.option("--new", default=64, show_default=True, help="tokens of each answer")
@click.option("--rounds", default=3, show_default=True, help="the systems take turns so many times")
@click.option("--threads", default=os.cpu_count(), show_default=True)
@click.option("--requests", default=40, show_default=True, help="of the load over time; 0: leave it out")
@click.option("--rate", default=2.0, show_default=True, help="requests per second of that load")
@click.option("--json", "out", type=click.Path(dir_okay=False), help="write all figures to this file")
def serve(
    directory: str | None, systems: str, pythons: Sequence[str], batches: Sequence[int], prompt: int,
    new: int, rounds: int, threads: int, requests: int, rate: float, out: str | None,
) -> None:  # fmt: skip
    """Serves DIRECTORY (default: OPT-125m's shapes, random weights, float32) beside the peers installed.

    All greedy, same files, same threads; the systems take turns within each round, each in a process of its
    own that is stopped while another works. Of requests over time, transformers and CTranslate2 take all that
    wait as one padded batch, as they do not batch continuously. First: seconds until every request of the
    batch has a token; then tokens per second. Figures are medians over the rounds; ratios are ours over
    theirs, above 1 where we are better.
    """
    names = [name.strip() for name in systems.split(",")]
    if unknown := set(names) - set(SYSTEMS):
        raise BadInput(f"systems are {', '.join(SYSTEMS)}; got {', '.join(sorted(unknown))}")
    interpreters = dict(pair.split("=", 1) for pair in pythons)
    with contextlib.ExitStack() as stack:
        where = directory or stack.enter_context(random_opt())
        vocabulary = json.loads(Path(where, "config.json").read_text())["vocab_size"]
        works = [at_once(batch, prompt, new, vocabulary, batch) for batch in batches]
        works.append(replace(at_once(1, 512, 8, vocabulary, 77), name="512-token prompt"))
        if requests:
            works.append(poisson(requests, rate, vocabulary, 99))
        bandwidth = read_rate()
        click.echo(f"{weight_bytes(where) / 1e6:.0f} MB of weights; a matrix-vector product reads "
                   f"{bandwidth / 1e9:.0f} GB/s here, so one sequence decodes at most "
                   f"{bandwidth / weight_bytes(where):.0f} tokens/s")  # fmt: skip
        running = [
            system for name in names
            if (system := _start(stack, name, interpreters.get(name, sys.executable), where, threads))
        ]  # fmt: skip
        figures = _rounds(running, works, rounds, len(batches))
    _print(running, works, figures, len(batches))
    if out:
        Path(out).write_text(json.dumps(_data(running, works, figures, bandwidth), indent=1))


def _start(
    stack: contextlib.ExitStack, name: str, python: str, directory: str, threads: int
) -> System | None:
    system = System(name, python, directory, threads)
    stack.callback(system.close)
    click.echo(f"{name} {system.version or '– left out: ' + system.error[:200]}")
    return system if system.version else None


Figures = dict[tuple[str, str], Measured]


def _rounds(running: list[System], works: list[Work], rounds: int, closed: int) -> Figures:
    """Runs every work on every system, by turns. A first, unmeasured run warms each system up."""
    figures: Figures = {}
    with click.progressbar(length=(rounds + 1) * len(works) * len(running), file=sys.stderr) as bar:
        for turn in range(rounds + 1):
            for at, work in enumerate(works):
                now = _shifted(work, turn) if at <= closed else work
                for system in running:
                    names = [work.name, "again"] if at == closed else [work.name]
                    for name in names:  # a long prompt comes twice: the second may find the first's blocks
                        into = figures.setdefault((system.name, name), Measured())
                        measure(system, now, into if turn else Measured())
                    bar.update(1)
    return figures


def _shifted(work: Work, turn: int) -> Work:
    """The work with other first tokens, so that no round finds its prompts in a cache of prefixes."""
    prompts = tuple((5 + turn, *p[1:]) for p in work.prompts)
    return replace(work, prompts=prompts)


def _print(running: list[System], works: list[Work], figures: Figures, closed: int) -> None:
    table = Table(title="medians; ratio: ours over theirs, above 1 where ours is better", show_edge=False)
    for column in ("work", "system", "first token s", "ratio", "tokens/s", "ratio", "same tokens"):
        table.add_column(column, justify="left" if column in ("work", "system") else "right")
    for at, work in enumerate(works):
        ours = figures.get(("autopar", work.name))
        for system in running:
            found = figures.get((system.name, work.name))
            if found is None or not found.first:
                table.add_row(work.name, system.name, "–", "", "–", "", "")
                continue
            first, rate = statistics.median(found.first), statistics.median(found.rate)
            ratios = ("", "")
            if ours is not None and ours.first and system.name != "autopar":
                ratios = (
                    f"{first / statistics.median(ours.first):.2f}",
                    f"{statistics.median(ours.rate) / rate:.2f}",
                )
            same = f"{_same(ours, found):.0%}" if ours is not None and ours.tokens else ""
            table.add_row(work.name, system.name, f"{first:.3f}", ratios[0], f"{rate:.1f}", ratios[1], same)
            if at == closed:
                again = statistics.median(figures[system.name, "again"].first)
                table.add_row("the same again", system.name, f"{again:.3f}", f"{first / again:.1f} × sooner")
        table.add_section()
    Console(width=130).print(table)


def _same(ours: Measured, theirs: Measured) -> float:
    """Share of the requests whose tokens agree."""
    return statistics.mean(float(a == b) for a, b in zip(ours.tokens, theirs.tokens))


def _data(running: list[System], works: list[Work], figures: Figures, bandwidth: float) -> dict[str, Any]:
    rows = [
        {"system": name, "work": work, "first": m.first, "rate": m.rate, "slow": m.slow, "gap": m.gap}
        for (name, work), m in figures.items()
    ]
    return {
        "versions": {s.name: s.version for s in running},
        "bytes_per_second": bandwidth,
        "works": [w.name for w in works],
        "rows": rows,
    }
