"""The command line: `autopar plan | simulate | devices | solve | serve | bench`."""

from __future__ import annotations

import importlib
import json
import sys
from typing import TYPE_CHECKING, Any

import click

from autopar.core.errors import AutoparError, BadInput

if TYPE_CHECKING:
    from autopar.api.plan import Plan


BENCHES = {
    "device": "autopar.bench.device:device",
    "evaluate": "autopar.bench.evaluate:evaluate",
    "int8": "autopar.bench.int8:int8",
    "load-memory": "autopar.bench.load_memory:load_memory",
    "memory": "autopar.bench.memory:memory",
    "overhead": "autopar.bench.overhead:overhead",
    "planning": "autopar.bench.planning:planning",
    "plans": "autopar.bench.plans:plans",
    "simulation": "autopar.bench.simulation:simulation",
    "solver": "autopar_solver.bench:bench_command",
    "serve": "autopar.bench.serve:serve",
    "serve-gpu": "autopar.bench.serve_gpu:serve_gpu",
    "serve-load": "autopar.bench.serve_load:serve_load",
    "stages": "autopar_solver.stage_dp_bench:stage_bench_command",
}


class Lazy(click.Group):
    """A group some of whose commands live in other packages ("module:attribute") and imported when used."""

    def __init__(self, *args: Any, places: dict[str, str], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.places = places

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *self.places])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.places:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = self.places[cmd_name].partition(":")
        return getattr(importlib.import_module(module), attribute)


class Friendly(Lazy):
    """Prints our own errors as one message, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (AutoparError, NotImplementedError) as error:
            raise click.ClickException(str(error)) from None


@click.group(
    cls=Friendly,
    places={
        "calibrate": "autopar.bench.calibrate:calibrate_command",
        "serve": "autopar.cli.serve:serve",
        "solve": "autopar_solver.cli:solve_command",
    },
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="autopar")
def main() -> None:
    """Plans a single-device JAX step for a whole cluster of unlike GPUs, and says what it will cost."""


@main.command()
@click.argument("target")
@click.option(
    "--cluster", "-c", "cluster_text", required=True, help="a cluster file (*.yaml) or e.g. 8xA100-40GB,4xT4"
)
@click.option("--batch", type=click.IntRange(min=1), help="examples per step (built-in models)")
@click.option("--sequence", type=click.IntRange(min=1), help="tokens per example (built-in language models)")
@click.option(
    "--micro-batches", type=click.IntRange(min=1), help="per step; the default tries divisors of the batch"
)
@click.option(
    "--stages", type=click.IntRange(min=1), help="exactly so many pipeline stages; the default chooses"
)
@click.option("--schedule", type=click.Choice(["1f1b", "gpipe"]), default="1f1b", show_default=True)
@click.option(
    "--remat/--no-remat",
    default=None,
    help="recompute what layers keep for their backward pass; the default does if nothing fits otherwise, or "
    "if devices would wait",
)
@click.option(
    "--json", "json_path", metavar="FILE", help="write the plan as JSON; - prints it instead of the table"
)
@click.option("--picture", metavar="FILE", help="draw the plan (.svg, .png, .pdf)")
@click.option("--trace", metavar="FILE", help="write the simulated timeline as a Chrome trace")
@click.option("--tensors", default=5, show_default=True, help="kinds of tensors to show per stage")
@click.option("--serve", is_flag=True, help="plan how TARGET, a known model or a directory, is served")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="with --serve: of weights"
)
@click.option("--int8", is_flag=True, help="with --serve: weights in int8, a scale per channel")
@click.option("--length", type=click.IntRange(min=1), help="with --serve: tokens of the longest sequence")
@click.option("--prompt", type=click.IntRange(min=1), help="with --serve: tokens of the prompt that is timed")
@click.option("--tokens", type=click.IntRange(min=1), help="with --serve: that the KV cache holds at least")
@click.option("--throughput", is_flag=True, help="with --serve: most tokens/s, rather than least latency")
@click.option("--latency", type=float, metavar="SECONDS", help="with --throughput: that a token may take")
@click.option(
    "--slack", type=float, help="with --serve: share of latency to give for a larger KV cache [0.1]"
)
@click.option("--across", is_flag=True, help="with --serve: let a stage span nodes")
def plan(target: str, cluster_text: str, json_path: str | None, picture: str | None, trace: str | None,
         tensors: int, serve: bool, **options: Any) -> None:  # fmt: skip
    """Plans TARGET for a cluster; nothing of the model is allocated.

    TARGET is a built-in model (gpt-2.6b, moe-2.4b, wresnet-1b, opt-175b, …; `autopar models` lists them) or
    FILE.py:FUNCTION, where FILE also has a function FUNCTION_args() that returns the arguments' shapes.
    """
    if serve:
        return _plan_serving(target, cluster_text, json_path, picture, options)
    from autopar.cli.commands import plan_target

    for name in SERVING:
        if options.pop(name):
            raise BadInput(f"--{name} is for plans of serving: add --serve")
    with _spinner() as say:
        found = plan_target(target, cluster_text, progress=say, **options)
    _show(found, json_path, picture, trace, tensors)


SERVING = ("dtype", "int8", "length", "prompt", "tokens", "throughput", "latency", "slack", "across")
"""Options of `plan` that only --serve has."""


def _plan_serving(
    target: str, cluster_text: str, json_path: str | None, picture: str | None, options: dict[str, Any]
) -> None:
    from autopar.cli.plan_serving import plan_serving
    from autopar.core.codec import to_data

    wanted = {name: options[name] for name in (*SERVING, "stages")}
    with _spinner() as say:
        found = plan_serving(target, cluster_text, progress=say, **wanted)
    text = json.dumps(to_data(found)) if json_path else ""
    click.echo(text if json_path == "-" else str(found))
    if json_path and json_path != "-":
        with open(json_path, "w", encoding="utf-8") as file:
            file.write(text)
    if picture:
        found.picture(picture)
        click.echo(f"picture: {picture}", err=True)


def _show(found: Plan, json_path: str | None, picture: str | None, trace: str | None, tensors: int) -> None:
    from autopar.report.text import plan_text

    if json_path == "-":
        from autopar.core.codec import to_data

        click.echo(json.dumps(to_data(found)))
    else:
        click.echo(plan_text(found, tensors))
    if json_path and json_path != "-":
        found.save(json_path)
        click.echo(f"plan: {json_path}", err=True)
    if picture:
        found.picture(picture)
        click.echo(f"picture: {picture}", err=True)
    if trace:
        found.simulate().save(trace)
        click.echo(f"timeline: {trace}", err=True)


def _spinner() -> Any:
    """A live line on standard error that says what is going on; silent when that is not a terminal."""
    import contextlib

    from rich.console import Console

    console = Console(stderr=True)

    @contextlib.contextmanager
    def live():
        with console.status("planning") as status:
            yield lambda text: status.update(text)

    return live()


@main.command()
@click.argument("plan_file", type=click.Path(dir_okay=False))
@click.option("--trace", metavar="FILE", help="write the timeline as a Chrome trace")
@click.option("--picture", metavar="FILE", help="draw the timeline (.svg, .png, .pdf)")
@click.option("--json", "as_json", is_flag=True, help="print step time, bubble and memory as JSON")
def simulate(plan_file: str, trace: str | None, picture: str | None, as_json: bool) -> None:
    """Runs the program of a saved plan against its cost model."""
    from autopar.api.plan import Plan
    from autopar.report.units import seconds, share, size

    timeline = Plan.load(plan_file).simulate()
    rows = [
        {"worker": name, "busy": timeline.busy(w), "peak_bytes": timeline.peak[w]}
        for w, name in enumerate(timeline.workers)
    ]
    if as_json:
        click.echo(json.dumps({"step_time": timeline.step_time, "bubble": timeline.bubble, "workers": rows}))
    else:
        click.echo(f"step {seconds(timeline.step_time)}, bubble {share(timeline.bubble)}")
        for row in rows:
            busy = share(row["busy"] / timeline.step_time)
            click.echo(f"  {row['worker']}: busy {busy}, buffers {size(row['peak_bytes'])} per device")
    if trace:
        timeline.save(trace)
    if picture:
        timeline.picture(picture)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="print as JSON")
def devices(as_json: bool) -> None:
    """Lists the device database and what this machine has."""
    from autopar.cli.commands import device_rows, local_devices

    rows, here = device_rows(), local_devices()
    if as_json:
        click.echo(json.dumps({"devices": rows, "here": here}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "device" else "right")
    for row in rows:
        table.add_row(*("–" if v is None else v if isinstance(v, str) else f"{v:g}" for v in row.values()))
    Console(file=sys.stdout, width=120).print(table)
    click.echo(f"\nthis machine: {here}")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="print as JSON")
def models(as_json: bool) -> None:
    """Lists the built-in models."""
    from autopar.models import catalog

    if as_json:
        click.echo(json.dumps(list(catalog.names())))
    else:
        click.echo("\n".join(catalog.names()))


@main.group(cls=Lazy, places=BENCHES)
def bench() -> None:
    """Benchmarks: figures and ratios side by side."""


if __name__ == "__main__":
    main()
