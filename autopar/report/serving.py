"""Serving plans as text and pictures: what every device holds, how many tokens, how fast it will be."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from autopar.core import spec as specs
from autopar.report.picture import PALETTE, figure_of
from autopar.report.tensors import groups, standing
from autopar.report.text import WIDTH, layers_text
from autopar.report.units import seconds, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Serving = Any
"""An `autopar.serve.plan.ServingPlan`, which is made in a room below."""


def serving_text(plan: Serving) -> str:
    """Returns a serving plan as a person would want it: stages, the cache, latency and throughput."""
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, color_system=None, highlight=False, legacy_windows=False)
    console.print("\n".join(_headline(plan)), markup=False, soft_wrap=True)
    console.print(_stages(plan))
    console.print("\n".join(_figures(plan)), markup=False, soft_wrap=True)
    for note in plan.decode.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _headline(plan: Serving) -> list[str]:
    decode = plan.decode
    many = f"{len(decode.stages)} stage{'s' * (len(decode.stages) > 1)}"
    first = f"{plan.name or 'the model'} in {plan.dtype}: {size(plan.parameters)} of weights, {many}"
    return [f"{first} on {decode.devices} devices of: {plan.cluster}", ""]


def _stages(plan: Serving) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    for name in ("stage", "layers", "devices", "node"):
        table.add_column(name)
    for name in ("weights", "cache", "work", "of", "room for", "one token"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("cut over devices")
    for s, (stage, room) in enumerate(zip(plan.decode.stages, plan.rooms, strict=True)):
        held = [size(x) for x in (room.weights, plan.blocks * room.block, room.workspace, room.limit)]
        tokens = f"{max(0, room.blocks - 1) * plan.block_size:,} tokens"
        row = [
            str(s),
            layers_text(plan.decode, stage),
            str(stage.mesh),
            ", ".join(stage.nodes),
            *held,
            tokens,
        ]
        table.add_row(*row, seconds(stage.sharding.forward), cut_text(plan, s))
    return table


def cut_text(plan: Serving, s: int) -> str:
    """Returns how many of a stage's largest kinds of tensors are cut, e.g. "weights 8 ways, cache 8 ways"."""
    stage = plan.decode.stages[s]
    if stage.mesh.size == 1:
        return "–"
    found = groups(stage.sharding, standing(plan.decode))
    cache = next((g for g in found if g.pattern.startswith("cache")), None)
    weights = [g for g in found if g.pattern.startswith("params")]
    total = sum(g.value.nbytes * g.count for g in weights)
    held = sum(g.value.nbytes * g.count / specs.shards(g.spec, stage.mesh) for g in weights)
    words = [f"weights {total / held:.2g} ×" if held else ""]
    words += [f"cache {specs.shards(cache.spec, stage.mesh)} ×"] if cache is not None else []
    return ", ".join(words)


def _figures(plan: Serving) -> list[str]:
    """The lines under the table."""
    stages, bound = len(plan.rooms), plan.bounding
    sequences = plan.rows * stages
    bounded = f", bounded by stage {bound}" if stages > 1 else ""
    lines = [
        "",
        f"cache: {plan.tokens:,} tokens in {plan.blocks - 1:,} blocks of {plan.block_size}{bounded}",
        f"first token: {seconds(plan.time_to_first_token)} after a prompt of {plan.prompt} tokens",
        f"one sequence: {rate(plan.single)} tokens/s ({seconds(plan.decode.step_time)} a token)",
        f"full: {rate(plan.most)} tokens/s, {sequences} × {plan.length} tokens"
        + (f", {stages} steps of {plan.rows} in flight" if stages > 1 else ""),
    ]
    link = plan.slowest_link
    if link is not None:
        lines.append(f"slowest link: {link[0]}, {rate(link[1] * 8 / 1e9)} Gbps")
    return lines


def rate(value: float) -> str:
    """Returns e.g. "14.3" or "1,350"."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def serving_picture(plans: Sequence[Serving], path: str) -> None:
    """Draws what every stage's devices hold, one row of bars per plan, to *.svg, *.png or *.pdf."""
    rows = [0.8 + 0.3 * len(plan.rooms) for plan in plans]
    figure, axes = figure_of(10.0, 0.6 + 1.1 * sum(rows), rows)
    for plan, ax in zip(plans, axes, strict=True):
        _bars(ax, plan)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    axes[-1].set_xlabel("GB on one device (red: what it has)", fontsize=8)
    figure.savefig(path, dpi=130)


def _bars(axes: Axes, plan: Serving) -> None:
    names = [
        f"{s}: {stage.stop - stage.start} layers on {stage.mesh}"
        for s, stage in enumerate(plan.decode.stages)
    ]
    parts = {
        "weights": [room.weights for room in plan.rooms],
        "cache": [plan.blocks * room.block for room in plan.rooms],
        "work": [room.workspace for room in plan.rooms],
    }
    left = [0.0] * len(names)
    for (label, values), colour in zip(parts.items(), PALETTE, strict=False):
        widths = [v / 1e9 for v in values]
        axes.barh(range(len(names)), widths, left=left, label=label, color=colour, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for y, room in enumerate(plan.rooms):
        axes.plot([room.limit / 1e9] * 2, [y - 0.4, y + 0.4], color="#E45756", lw=2)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=8)
    title = f"{plan.name} on {plan.cluster}\n{plan.tokens:,} tokens of cache, first token after "
    title += (
        f"{seconds(plan.time_to_first_token)}, {rate(plan.single)} tokens/s alone, {rate(plan.most)} full"
    )
    axes.set_title(title, fontsize=9, loc="left")
