"""`autopar bench serve-gpu`: decoding on one GPU, beside what its memory allows and beside transformers."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from autopar.bench.random_opt import random_opt
from autopar.bench.serve import Measured, System, at_once, measure
from autopar.core.dtypes import itemsize
from autopar.core.errors import BadInput
from autopar.io.weights import by_path
from autopar.models.serving import get_serving

SYSTEMS = ("autopar", "transformers")
MODELS = ("opt-1.3b", "opt-6.7b", "opt-13b")


@dataclass(frozen=True)
class Reads:
    """What a decode step has to read, in bytes.

    Attributes:
        weights: parameters, all but the table of positions, of which a step needs a few rows. token: keys and
            values of one token of a sequence.
    """

    weights: int
    token: int

    @classmethod
    def of(cls, name: str, dtype: str) -> Reads:
        """Returns those of a known model."""
        serving = get_serving(name, dtype=dtype)
        config, shapes = serving.config, by_path(serving.module.parameter_shapes(serving.config))
        weights = sum(x.size * x.dtype.itemsize for path, x in shapes.items() if path != "position")
        return cls(weights, 2 * config.layers * config.kv_heads * config.head_size * itemsize(dtype))

    def bound(self, rows: int, context: float, bytes_per_second: float) -> float:
        """Returns the most tokens per second of so many sequences of `context` tokens: what is read is read
        once a step."""
        return rows * bytes_per_second / (self.weights + rows * context * self.token)


@dataclass(frozen=True)
class Row:
    """One system, model and batch: seconds to the first token, tokens per second, the most there can be."""

    model: str
    batch: int
    system: str
    first: float
    rate: float
    bound: float
    tokens: list[list[int]]


@click.command("serve-gpu")
@click.option("--model", "models", multiple=True, default=MODELS, show_default=True, help="known OPTs")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(min=1), default=(1, 8, 64),
              show_default=True)  # fmt: skip
@click.option("--prompt", default=64, show_default=True, help="tokens of each prompt")
@click.option(
    "--new", default=64, show_default=True, type=click.IntRange(min=2), help="tokens of each answer"
)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--dtype", default="float16", show_default=True,
              type=click.Choice(["float16", "bfloat16", "float32"]))  # fmt: skip
@click.option("--systems", default=",".join(SYSTEMS), show_default=True, help="which, by commas")
@click.option("--device", default="gpu", show_default=True, type=click.Choice(["gpu", "cpu"]),
              help="cpu: to try the command itself, with a small model")  # fmt: skip
@click.option("--json", "out", type=click.Path(dir_okay=False), help="write all figures to this file")
def serve_gpu(
    models: Sequence[str], batches: Sequence[int], prompt: int, new: int, rounds: int, dtype: str,
    systems: str, device: str, out: str | None,
) -> None:  # fmt: skip
    """Decodes with OPTs of random weights on one GPU, with our engine and with transformers.

    The systems read the same files and have the GPU one after the other. Tokens per second count from the
    moment every request of a batch has its first token; the bound is what the GPU reads (a matrix-vector
    product, measured) over what a step must read: all weights once, and every sequence's keys and values.
    Figures are medians over the rounds, after one that is not counted.
    """
    names = [name.strip() for name in systems.split(",")]
    if unknown := set(names) - set(SYSTEMS):
        raise BadInput(f"systems are {', '.join(SYSTEMS)}; got {', '.join(sorted(unknown))}")
    click.echo(
        f"device: {gpu() if device == 'gpu' else 'CPU, to try the command: these are no figures of a GPU'}"
    )
    platform = "cuda" if device == "gpu" else "cpu"
    rows = list[Row]()
    for model in models:
        with random_opt(model, dtype, platform) as directory:
            expected = {"rows": sorted(set(batches)), "prompt": prompt, "new": new}
            options = {"device": platform, "dtype": dtype, **expected}
            rows += _model(model, directory, names, rounds, options)
    _print(rows)
    if out:
        Path(out).write_text(json.dumps([asdict(row) for row in rows], indent=1))


def gpu() -> str:
    """Returns what JAX calls the first GPU; asked in a process of its own, which holds no memory afterwards.

    Raises:
        BadInput: there is none.
    """
    words = "import jax; print(jax.devices('gpu')[0].device_kind)"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")
    }
    found = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, env=environment)
    if found.returncode == 0:
        return found.stdout.strip()
    said = [line for line in found.stderr.splitlines() if line.strip()] or ["nothing"]
    raise BadInput(
        "no GPU: JAX sees none here, so this benchmark has nothing to measure "
        f"(it said: {said[-1][:160]}). Run it on a machine with an NVIDIA GPU, after pip install "
        "'jax[cuda12]' and a torch that uses the GPU; --device cpu --model opt-tiny tries the command "
        "without one, and `autopar bench serve` measures a CPU"
    )


def _model(model: str, directory: str, names: list[str], rounds: int, options: dict[str, Any]) -> list[Row]:
    """The figures of all systems for one model."""
    vocabulary, rate, rows = get_serving(model).config.vocabulary, 0.0, list[Row]()
    reads, context = Reads.of(model, options["dtype"]), options["prompt"] + options["new"] / 2
    for name in sorted(names):  # our own first: it tells what the device reads
        system = System(name, sys.executable, directory, os.cpu_count() or 1, **options)
        try:
            click.echo(f"{model}, {name} {system.version or '– left out: ' + system.error[:300]}")
            if not system.version:
                continue
            rate = system.about.get("bytes_per_second") or rate
            for batch in options["rows"]:
                found = Measured()
                for turn in range(rounds + 1):
                    work = at_once(batch, options["prompt"], options["new"], vocabulary, 1000 * turn + batch)
                    if not measure(system, work, found if turn else Measured()):
                        raise BadInput(f"{name} ended over a batch of {batch}; has the GPU memory for it?")
                bound = reads.bound(batch, context, rate)
                first, speed = statistics.median(found.first), statistics.median(found.rate)
                rows.append(Row(model, batch, name, first, speed, bound, found.tokens))
        finally:
            system.close()
    return rows


def _print(rows: list[Row]) -> None:
    table = Table(title="medians; ratio: ours over theirs, above 1 where ours is better", show_edge=False)
    for column in (
        "model",
        "batch",
        "system",
        "first token s",
        "tokens/s",
        "of the bound",
        "ratio",
        "same tokens",
    ):
        table.add_column(column, justify="left" if column in ("model", "system") else "right")
    ours = {(row.model, row.batch): row for row in rows if row.system == "autopar"}
    order = list(dict.fromkeys(row.model for row in rows))
    for row in sorted(rows, key=lambda row: (order.index(row.model), row.batch)):
        own = ours.get((row.model, row.batch))
        ratio = same = ""
        if own is not None and own is not row:
            ratio = f"{own.rate / row.rate:.2f}"
            same = f"{statistics.mean(a == b for a, b in zip(own.tokens, row.tokens)):.0%}"
        share = f"{row.rate / row.bound:.0%}" if row.bound else "–"
        table.add_row(
            row.model, str(row.batch), row.system, f"{row.first:.3f}", f"{row.rate:.1f}", share, ratio, same
        )
    Console(width=130).print(table)
