"""A byte-level GPT over a shelf of unlike GPUs, emulated on this machine: plan, train, save, restore, go on.

Run it with `make quickstart`; what it writes is in out/quickstart.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table

import autopar as ap
from autopar.models import gpt
from autopar.models.text import ByteDataset, standard_library

CONFIG = gpt.GPTConfig(vocabulary=256, positions=64, layers=8, hidden=256, heads=4)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.01))
CONSOLE = Console(highlight=False, soft_wrap=True)


class State(NamedTuple):
    """What a step takes and returns."""

    params: Any
    optimizer: Any


def train_step(state: State, batch: dict[str, Any]) -> tuple[State, Any]:
    """An ordinary train step for one device; `ap.value_and_grad` is one that a pipeline can cut."""
    loss, gradient = ap.value_and_grad(lambda params: gpt.loss(CONFIG, params, batch))(state.params)
    updates, optimizer = OPTIMIZER.update(gradient, state.optimizer, state.params)
    return State(optax.apply_updates(state.params, updates), optimizer), loss


def initial_state() -> State:
    params = gpt.init(CONFIG, jax.random.key(0))
    return State(params, OPTIMIZER.init(params))


def train(name: str, step: Any, state: State, data: ByteDataset, steps: range) -> tuple[State, list[float]]:
    """Runs `step` over the batches numbered `steps`; returns the last state and the losses."""
    losses: list[float] = []
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=CONSOLE) as progress:
        task = progress.add_task(f"{name:>14}", total=len(steps), note="compiling")
        for i in steps:
            state, loss = step(state, data[i])
            losses.append(float(loss))
            progress.update(task, advance=1, note=f"loss {losses[-1]:.4f}")
    return state, losses


def heading(text: str) -> None:
    CONSOLE.print(f"\n[bold]{text}[/bold]")


def show_losses(curves: dict[str, list[float]]) -> float:
    """Prints the losses side by side; returns the largest relative difference from the first column."""
    table = Table("step", *curves, show_edge=False)
    for i, row in enumerate(zip(*curves.values(), strict=True)):
        table.add_row(str(i + 1), *(f"{loss:.6f}" for loss in row))
    CONSOLE.print(table)
    first, *others = (np.array(curve) for curve in curves.values())
    return max(float(np.max(np.abs(other - first) / first)) for other in others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="training steps of each run (default 20)")
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"), help="where to write")
    parser.add_argument("--no-ray", action="store_true", help="leave out the run on a local Ray cluster")
    options = parser.parse_args()
    began, out = time.perf_counter(), options.out
    out.mkdir(parents=True, exist_ok=True)
    ap.emulate(8)

    heading("1. A model and data")
    data = ByteDataset(standard_library(), sequence=64, batch=8)
    shapes = jax.eval_shape(initial_state)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
    CONSOLE.print(
        f"a GPT of {CONFIG.layers} blocks, {count / 1e6:.1f} M parameters, on Python's own standard library"
    )

    heading("2. A cluster of unlike GPUs, and one decorator")
    cluster = ap.Cluster.load(str(Path(__file__).parent / "mixed.yaml"))
    CONSOLE.print(str(cluster))
    best = ap.parallelize(train_step, cluster=cluster, method=ap.Auto(micro_batches=4)).plan(shapes, data[0])
    method = ap.Auto(stages=3, micro_batches=4, whole_nodes=True)
    step = ap.parallelize(train_step, cluster=cluster, method=method)
    plan = step.plan(shapes, data[0])

    heading("3. The plan")
    CONSOLE.print(
        f"left to itself, autopar would run a model as small as this on "
        f"{' + '.join(str(s.mesh) for s in best.stages)} ({1e3 * best.step_time:.2f} ms a step); so that "
        "there is something to see, the quickstart asks for three stages on whole nodes:\n"
    )
    print(plan)
    plan.save(out / "plan.json")
    plan.picture(out / "plan.svg")
    plan.simulate().save(out / "timeline.json")

    heading("4. Training: one device, then the plan in this process, then the same plan on Ray")
    curves: dict[str, list[float]] = {}
    steps = range(options.steps)
    _, curves["one device"] = train("one device", jax.jit(train_step), initial_state(), data, steps)
    _, curves["in process"] = train("in process", step, initial_state(), data, steps)
    runner = step
    if not options.no_ray:
        backend = ap.Ray(emulate=True)
        runner = ap.parallelize(train_step, cluster=cluster, method=ap.Manual(plan), backend=backend)
    state, last = train("Ray" if runner is not step else "again", runner, initial_state(), data, steps)
    curves["Ray" if runner is not step else "again"] = last
    difference = show_losses(curves)
    CONSOLE.print(f"largest difference from one device: {difference:.1e} relative")

    heading("5. A checkpoint")
    where = ap.save_checkpoint(out / "checkpoints", options.steps, state)
    more = range(options.steps, options.steps + 5)
    _, unbroken = train("unbroken", runner, state, data, more)
    at, restored = ap.restore_checkpoint(out / "checkpoints", like=shapes)
    _, resumed = train("restored", runner, restored, data, more)
    off = show_losses({"unbroken": unbroken, "restored": resumed})
    runs = {**curves, "restored": last + resumed}
    CONSOLE.print(f"saved {where}, restored step {at}; largest difference {off:.1e} relative")
    runner.close()
    step.close()

    from autopar.report.picture import curve_picture

    curve_picture(runs, str(out / "loss.png"), title="byte-level GPT, the same loss three ways")
    heading("Done")
    CONSOLE.print(
        f"{time.perf_counter() - began:.0f} s. In {out}: plan.json, plan.svg, timeline.json, loss.png"
    )
    CONSOLE.print(
        "Try next:\n"
        "  autopar plan gpt-2.6b --cluster 8xV100-16GB --picture plan.svg     a model of Alpa's paper\n"
        "  autopar plan opt-175b --cluster 4xA100-40GB,16xV100-16GB,12xT4     one that fits on none of them\n"
        "  autopar simulate out/quickstart/plan.json                           a saved plan, step by step\n"
        "and put @ap.parallelize on a step of your own: docs/first-steps.md"
    )
    if difference > 1e-4 or off > 1e-4:
        raise SystemExit(f"the runs differ by more than 1e-4: {difference:.1e}, {off:.1e}")


if __name__ == "__main__":
    main()
