"""Pictures: a plan over its cluster, a timeline, a training curve. Matplotlib draws; the file's suffix
says how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autopar.core import spec as specs
from autopar.core.graph import Graph
from autopar.core.plan import Plan
from autopar.core.timeline import Timeline
from autopar.report.layers_picture import draw_layers, height_of, rows_of, width_of
from autopar.report.tensors import groups, standing
from autopar.report.text import layers_text
from autopar.report.units import seconds, share, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "forward": "#4C78A8",
    "backward": "#F58518",
    "apply": "#54A24B",
    "send": "#B8B8B8",
    "other": "#9D755D",
}
PALETTE = ("#4C78A8", "#F58518", "#54A24B", "#B279A2", "#E45756", "#72B7B2", "#EECA3B", "#9D755D")


def figure_of(width: float, height: float, rows: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """A figure that needs no display, with one axes per row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(rows), 1, height_ratios=list(rows))
    return figure, [figure.add_subplot(grid[i]) for i in range(len(rows))]


def plan_picture(plan: Plan, path: str, timeline: Timeline | None = None, graph: Graph | None = None) -> None:
    """Draws layers over the mesh, or the stages over their devices where there are several or the step is not
    known; memory against the limit; and, if given, the timeline of several stages.

    Args:
        path: *.svg, *.png or *.pdf.
        graph: of the step; its layers are drawn with what they cut and send.
    """
    stages = len(plan.stages)
    width, small = max(8.0, 2.6 * stages), 0.8 + 0.45 * stages
    layers = [] if graph is None else rows_of(plan, graph)
    boxes = stages > 1 or graph is None
    timeline = timeline if boxes else None
    rows = [3.0] * boxes + [height_of(x) for x in layers] + [small] * (2 if timeline else 1)
    width = max(width, width_of(plan)) if layers else width
    figure, axes = figure_of(width, sum(rows) + 0.5, rows)
    figure.suptitle(
        f"{seconds(plan.step_time)} per step · bubble {share(plan.bubble)} · proven gap {share(plan.gap)} · "
        f"{plan.microbatches} micro-batches, {plan.schedule}",
        fontsize=10,
    )
    if boxes:
        _boxes(axes[0], plan)
    for s, found in enumerate(layers):
        draw_layers(axes[boxes + s], plan, s, found)
    _memory(axes[boxes + len(layers)], plan)
    if timeline:
        draw_timeline(axes[-1], timeline)
    figure.savefig(path)


def _boxes(axes: Axes, plan: Plan) -> None:
    from matplotlib.patches import FancyBboxPatch, Rectangle

    axes.set(xlim=(0, len(plan.stages)), ylim=(0, 1))
    axes.axis("off")
    for s, stage in enumerate(plan.stages):
        colour = PALETTE[s % len(PALETTE)]
        style: Any = {"boxstyle": "round,pad=0.01", "facecolor": colour, "alpha": 0.15, "edgecolor": colour}
        axes.add_patch(FancyBboxPatch((s + 0.06, 0.04), 0.8, 0.92, **style))
        middle = s + 0.46
        axes.text(middle, 0.92, f"stage {s}: {layers_text(plan, stage)}", ha="center", va="top", fontsize=8)
        axes.text(
            middle, 0.80, f"{stage.mesh} on {', '.join(stage.nodes)}", ha="center", va="top", fontsize=8
        )
        shape = (1, *stage.mesh.shape)[-2:]
        cell = min(0.6 / shape[1], 0.22)
        for i in range(min(shape[0], 8)):
            for j in range(min(shape[1], 16)):
                corner = (middle + (j - shape[1] / 2) * cell, 0.60 - i * 0.09)
                axes.add_patch(Rectangle(corner, cell * 0.85, 0.07, facecolor=colour, edgecolor="white"))
        largest = groups(stage.sharding, standing(plan))[:4]
        lines = [f"{_short(g.pattern)} {specs.text(g.spec)}" for g in largest]
        sent = sum(c.nbytes * c.count for c in stage.sharding.collectives)
        lines.append(f"collectives {size(sent)} a step")
        axes.text(
            middle, 0.50 - 0.09 * min(shape[0], 8), "\n".join(lines), ha="center", va="top", fontsize=6.5
        )
        if s:
            axes.annotate(
                "", (s + 0.04, 0.5), (s - 0.12, 0.5), arrowprops={"arrowstyle": "->", "color": "#555555"}
            )


def _short(name: str) -> str:
    return "/".join(name.split("/")[-2:])


def _memory(axes: Axes, plan: Plan) -> None:
    names = [f"stage {s}" for s in range(len(plan.stages))]
    left = [0.0] * len(names)
    parts = {
        "state": [s.memory.state for s in plan.stages],
        "activations": [s.memory.activations * s.memory.in_flight for s in plan.stages],
        "workspace": [s.memory.workspace for s in plan.stages],
    }
    for (label, values), colour in zip(parts.items(), PALETTE, strict=False):
        widths = [v / 1e9 for v in values]
        axes.barh(names, widths, left=left, label=label, color=colour, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for y, stage in enumerate(plan.stages):
        axes.plot([stage.memory.limit / 1e9] * 2, [y - 0.4, y + 0.4], color="#E45756", lw=2)
    axes.invert_yaxis()
    axes.set_xlabel("GB per device (red: limit)", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7, loc="lower right")


def draw_timeline(axes: Axes, timeline: Timeline) -> None:
    """Draws a timeline's rows into existing axes: one row per worker, transfers as thin bars under it."""
    scale, unit = (1e3, "ms") if timeline.step_time < 10 else (1.0, "s")
    for event in timeline.events:
        row, height = (event.worker + 0.3, 0.12) if event.kind == "send" else (event.worker - 0.1, 0.6)
        colour = (
            COLOURS["send"] if event.kind == "send" else COLOURS.get(_phase(event.name), COLOURS["other"])
        )
        width = scale * (event.stop - event.start)
        axes.barh(
            row, width, left=scale * event.start, height=height, color=colour, edgecolor="white", lw=0.3
        )
    axes.set_yticks(range(len(timeline.workers)), timeline.workers, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"{unit} (blue forward, orange backward, green apply, grey transfers)", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)


def _phase(name: str) -> str:
    return name.split("_")[0].split(".")[0]


def timeline_picture(timeline: Timeline, path: str) -> None:
    """Draws one timeline to `path` (*.svg, *.png, *.pdf)."""
    figure, axes = figure_of(10, 0.9 + 0.45 * len(timeline.workers), [1])
    draw_timeline(axes[0], timeline)
    figure.savefig(path)


def curve_picture(
    curves: Mapping[str, Sequence[float]], path: str, title: str = "", ylabel: str = "loss"
) -> None:
    """Draws named curves over the step number to `path` (*.png, *.svg, *.pdf)."""
    figure, axes = figure_of(7, 4, [1])
    for i, (name, values) in enumerate(curves.items()):
        style = ("-", "--", ":")[i % 3]
        axes[0].plot(
            range(1, len(values) + 1),
            values,
            style,
            label=name,
            color=PALETTE[i % len(PALETTE)],
            lw=2 - 0.3 * i,
        )
    axes[0].set(xlabel="step", ylabel=ylabel, title=title)
    axes[0].legend()
    axes[0].grid(alpha=0.3)
    figure.savefig(path, dpi=130)
