"""Draws layers × mesh: what each layer cuts over which axis, and the communication on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autopar.core import spec as specs
from autopar.core.graph import Graph
from autopar.core.plan import Plan
from autopar.report.layers import LANES, Layers, Sent, Tensor, layers_of
from autopar.report.units import seconds, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LANE_COLOURS = dict(zip(LANES, ("#4C78A8", "#9D755D", "#54A24B"), strict=True))
KIND_COLOURS = {
    "all-reduce": "#E45756",
    "all-gather": "#F58518",
    "reduce-scatter": "#B279A2",
    "all-to-all": "#72B7B2",
    "permute": "#EECA3B",
}
NAME, AXIS, TENSORS = 2.6, 2.9, 5.2
"""Widths of the columns, in inches: the layers' names, one mesh axis, the tensors."""
LINE = 0.19
"""Height of a line of text, in inches."""
MOST_TENSORS, MOST_SENT = 3, 8
"""Lines of a layer, of each kind of tensor and of collectives; what is left out is counted."""


def rows_of(plan: Plan, graph: Graph) -> list[tuple[Layers, ...]]:
    """Returns the rows of each stage."""
    return [layers_of(plan, s, graph) for s in range(len(plan.stages))]


def width_of(plan: Plan) -> float:
    """Returns how wide the drawing is, in inches."""
    return NAME + TENSORS + AXIS * max(len(_axes(plan, s)) for s in range(len(plan.stages)))


def height_of(rows: Sequence[Layers]) -> float:
    """Returns how high one stage's drawing is, in inches."""
    return LINE * (3.5 + sum(_lines(row) + 1 for row in rows))


def _axes(plan: Plan, stage: int) -> list[Any]:
    return [axis for axis in plan.stages[stage].mesh.axes if axis.size > 1]


def _lines(row: Layers) -> int:
    tensors = len(_biggest(row)) + (len(row.tensors) > len(_biggest(row)))
    sent = min(len(row.sent), MOST_SENT) + (len(row.sent) > MOST_SENT)
    return max(tensors, len(LANES) + sent, 3)


def _biggest(row: Layers) -> list[Tensor]:
    """Returns the tensors that are listed."""
    return [t for lane in LANES for t in [t for t in row.tensors if t.lane == lane][:MOST_TENSORS]]


def draw_layers(axes: Axes, plan: Plan, stage: int, rows: Sequence[Layers]) -> None:
    """Draws one stage's layers into existing axes, whose size is `width_of` × `height_of` inches."""
    mesh, width = _axes(plan, stage), width_of(plan)
    axes.set(xlim=(0, width), ylim=(height_of(rows), 0))
    axes.axis("off")
    title = f"stage {stage}: " if len(plan.stages) > 1 else ""
    axes.text(0, LINE, f"{title}{plan.stages[stage].mesh}", fontsize=9, weight="bold", va="center")
    for k, axis in enumerate(mesh):
        words = f"{axis.name}: {axis.size} ways, {axis.bandwidth / 1e9:.3g} GB/s"
        axes.text(NAME + AXIS * k, 2 * LINE, words, fontsize=8, weight="bold", va="center")
    top = 3 * LINE
    for row in rows:
        _draw_row(axes, row, [axis.name for axis in mesh], top, width)
        top += LINE * (_lines(row) + 1)


def _draw_row(axes: Axes, row: Layers, names: Sequence[str], top: float, width: float) -> None:
    axes.plot([0, width], [top, top], color="#CCCCCC", lw=0.6)
    first = top + 0.7 * LINE
    axes.text(0, first, row.title, fontsize=8.5, weight="bold", va="center")
    each = "each " if len(row.names) > 1 else ""
    words = f"{each}sends {_amount(row.sent)}" if row.sent else "sends nothing"
    axes.text(0, first + LINE, words, fontsize=7, va="center", color="#555555")
    for k, name in enumerate(names):
        _draw_lanes(axes, row, name, NAME + AXIS * k, first)
    _draw_sent(axes, row.sent, names, first + LINE * len(LANES))
    _draw_tensors(axes, row, NAME + AXIS * len(names), first)


def _draw_lanes(axes: Axes, row: Layers, axis: str, left: float, first: float) -> None:
    """Bars: the share of the bytes that the axis cuts."""
    from matplotlib.patches import Rectangle

    room = AXIS - 1.3
    for n, lane in enumerate(LANES):
        y, share = first + LINE * n, row.share(lane, axis)
        if share is None:
            continue
        colour = LANE_COLOURS[lane]
        axes.add_patch(Rectangle((left, y - 0.06), room, 0.12, facecolor="#EEEEEE", lw=0))
        axes.add_patch(Rectangle((left, y - 0.06), room * share, 0.12, facecolor=colour, lw=0))
        words = f"{lane} {'whole' if share == 0 else 'cut' if share == 1 else f'{share:.0%} cut'}"
        axes.text(left + room + 0.05, y, words, fontsize=6, va="center", color="#333333")


def _draw_sent(axes: Axes, sent: Sequence[Sent], names: Sequence[str], first: float) -> None:
    """Bands over the axes that a collective runs on, one line each."""
    from matplotlib.patches import FancyBboxPatch

    for n, each in enumerate(sent[:MOST_SENT]):
        columns = [k for k, name in enumerate(names) if name in each.axes]
        if not columns:
            continue
        left, right = NAME + AXIS * min(columns), NAME + AXIS * (max(columns) + 1) - 0.25
        y, colour = first + LINE * n, KIND_COLOURS.get(each.kind, "#888888")
        style: Any = {"boxstyle": "round,pad=0.01", "facecolor": colour, "alpha": 0.28, "lw": 0}
        axes.add_patch(FancyBboxPatch((left, y - 0.07), right - left, 0.14, **style))
        words = f"⇄ {each.kind} · {each.phase} · {size(each.nbytes)} · {seconds(each.seconds)}"
        axes.text(left + 0.05, y, words, fontsize=6.5, va="center")
    if len(sent) > MOST_SENT:
        words = f"… {len(sent) - MOST_SENT} more, {_amount(sent[MOST_SENT:])}"
        axes.text(NAME, first + LINE * MOST_SENT, words, fontsize=6.5, va="center", color="#555555")


def _amount(sent: Sequence[Sent]) -> str:
    return f"{size(sum(s.nbytes for s in sent))}, {seconds(sum(s.seconds for s in sent))}"


def _draw_tensors(axes: Axes, row: Layers, left: float, first: float) -> None:
    listed = _biggest(row)
    for n, t in enumerate(listed):
        y = first + LINE * n
        axes.plot([left], [y], "s", color=LANE_COLOURS[t.lane], ms=4)
        words = f"{t.name}  {t.value}  {specs.text(t.spec)}" + (f"  × {t.count}" if t.count > 1 else "")
        axes.text(left + 0.12, y, words, fontsize=6.5, va="center")
    rest = sum(t.count for t in row.tensors) - sum(t.count for t in listed)
    if rest:
        y = first + LINE * len(listed)
        axes.text(left + 0.12, y, f"… {rest} smaller ones", fontsize=6.5, va="center", color="#555555")
