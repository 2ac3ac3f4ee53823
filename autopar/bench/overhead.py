"""`autopar bench overhead`: a step through `parallelize` on one device beside `jax.jit`, run in turns.

Which pages arrays happen to lie in, and whose code and data the caches still hold, move a step's time by some
per cent. Hence three programs take turns, `jax.jit`'s twice, compiled each time: the second says what a ratio
means, for it should be 1. And every round makes its states anew, each time another's first.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from autopar import cluster as room
from autopar.api.methods import ShardParallel
from autopar.api.parallelize import parallelize
from autopar.models import catalog
from autopar.trace.gradient import value_and_grad

WARM = 5
"""Steps of each that are not counted."""

BLOCK = 200
"""Calls of the small step between two looks at the clock."""


@dataclass(frozen=True)
class Turns:
    """Seconds of a step through `parallelize` and through `jax.jit`, medians over all rounds.

    Attributes:
        ratio: of the first to the second: of each round the median of pairs, and of these the median.
        control: the same ratio of a second `jax.jit` of the same step to the first.
    """

    ours: float
    jit: float
    ratio: float
    control: float


def one_device(kind: Any = None) -> room.Cluster:
    """Returns a cluster of one device, an A100 where `kind` says nothing else."""
    return room.Cluster((room.Node("here", kind or room.device("A100-40GB"), 1),))


Step = Callable[[Any, Any], tuple[Any, Any]]


def three(name: str, cluster: room.Cluster, sizes: dict[str, Any]) -> tuple[list[Step], Any, Any]:
    """Returns a model's step through `jax.jit`, `parallelize` and `jax.jit` again; what makes its state; and
    a batch."""
    ours, theirs = (
        catalog.get(name, value_and_grad=g, **sizes) for g in (value_and_grad, jax.value_and_grad)
    )

    def again(state: Any, batch: Any) -> Any:  # a function of its own, or `jax.jit` would share the program
        return theirs.step(state, batch)

    steps = [
        jax.jit(theirs.step, donate_argnums=0),
        parallelize(ours.step, method=ShardParallel(), cluster=cluster, donate=True),
        jax.jit(again, donate_argnums=0),
    ]
    batch = jax.block_until_ready(theirs.make_batch(jax.random.key(1)))
    return steps, lambda: theirs.init(jax.random.key(0)), batch


def one_round(steps: Sequence[Step], init: Any, batch: Any, count: int, first: int) -> list[list[float]]:
    """Returns the seconds of `count` calls of each step `(state, batch) → (state, loss)`, run in turns from
    fresh states, each call waited for.

    Args:
        first: whose state is made first.
    """
    turns = deque(range(len(steps)))
    turns.rotate(-first)
    states = {k: init() for k in turns}
    times = [[0.0] * count for _ in steps]
    for i in range(-WARM, count):
        for k in reversed(turns) if i % 2 else turns:
            start = time.perf_counter()
            states[k], loss = steps[k](states[k], batch)
            jax.block_until_ready((states[k], loss))
            times[k][i] = time.perf_counter() - start  # those that warm up are written over
        turns.rotate()
    return times


def in_turns(steps: Sequence[Step], init: Any, batch: Any, count: int, rounds: int) -> Turns:
    """Returns how `jax.jit`, `parallelize` and `jax.jit` again compare over rounds of `count` calls each."""
    found = [one_round(steps, init, batch, count, first=r) for r in range(rounds)]
    ratio, control = (
        statistics.median(
            statistics.median(a / b for a, b in zip(times[k], times[0], strict=True)) for times in found
        )
        for k in (1, 2)
    )
    jit, ours = (statistics.median(t for times in found for t in times[k]) for k in (0, 1))
    return Turns(ours, jit, ratio, control)


def per_call(leaves: int, blocks: int) -> tuple[float, float]:
    """Returns the seconds of one call through `parallelize` and `jax.jit`, of a step with next to no work.

    Args:
        leaves: arrays of two numbers in its state. blocks: of calls, taken in turns; the fastest counts.
    """

    def step(state: Any, batch: Any) -> Any:
        return jax.tree.map(lambda x: x + 1.0, state), batch.sum()

    def fresh() -> Any:
        return {f"w{k:03}": jnp.zeros(2) for k in range(leaves)}

    runs = (
        parallelize(step, method=ShardParallel(), cluster=one_device(), donate=True),
        jax.jit(step, donate_argnums=0),
    )
    batch, best = jnp.ones(4), [float("inf")] * 2
    states = [fresh() for _ in runs]
    for i in range(-1, blocks):
        for k, run in enumerate(runs):
            jax.block_until_ready(states[k])
            start = time.perf_counter()
            for _ in range(BLOCK):
                states[k], _ = run(states[k], batch)
            jax.block_until_ready(states[k])
            took = (time.perf_counter() - start) / BLOCK
            best[k] = best[k] if i < 0 else min(best[k], took)
    return best[0], best[1]


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT": ("gpt-tiny", {"batch": 4, "sequence": 64, "layers": 4, "dtype": "float32"}),
    "MLP": ("mlp", {"batch": 64, "dtype": "float32"}),
}


@click.command()
@click.option(
    "--steps", default=60, show_default=True, type=click.IntRange(min=WARM), help="calls of each in a round"
)
@click.option(
    "--rounds", default=9, show_default=True, type=click.IntRange(min=1), help="with states made anew"
)
@click.option(
    "--blocks", default=10, show_default=True, type=click.IntRange(min=1), help="of the small steps"
)
def overhead(steps: int, rounds: int, blocks: int) -> None:
    """Runs train steps on the first device through `parallelize` and `jax.jit`, in turns, and prints ratios.

    `jax.jit` takes part twice: its ratio to itself says how far ratios can be trusted. Then the time of one
    call where there is next to nothing to compute: what Python costs, in microseconds.
    """
    console = Console(width=110)
    table = Table("step", show_edge=False, pad_edge=False)
    for column in ("parallelize ms", "jax.jit ms", "ratio", "wanted", "jax.jit to itself"):
        table.add_column(column, justify="right")
    for title, (name, sizes) in MODELS.items():
        found = in_turns(*three(name, one_device(), sizes), steps, rounds)
        table.add_row(
            title, f"{1e3 * found.ours:.3f}", f"{1e3 * found.jit:.3f}", f"{found.ratio:.3f}", "≤ 1.02",
            f"{found.control:.3f}",
        )  # fmt: skip
    console.print(table)
    for leaves in (1, 16, 256):
        ours, jit = (1e6 * x for x in per_call(leaves, blocks))
        console.print(
            f"a call with {leaves} small arrays of state: parallelize {ours:.1f} µs, jax.jit {jit:.1f} µs, "
            f"{ours - jit:+.1f} µs"
        )
