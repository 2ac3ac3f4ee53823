"""A plan as text: what runs where, how the big tensors are cut, memory against the limit, time and proof."""

from __future__ import annotations

import io

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from autopar.core import spec as specs
from autopar.core.graph import Remat
from autopar.core.plan import Memory, Plan, Stage
from autopar.report.tensors import groups, standing
from autopar.report.units import seconds, share, size

WIDTH = 132


def plan_text(plan: Plan, tensors: int = 5) -> str:
    """Returns the plan as a person would want it: a headline, a row per stage, the big tensors, notes.

    Args:
        tensors: how many groups of tensors to show per stage.
    """
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, color_system=None, highlight=False, legacy_windows=False)
    console.print("\n".join(_headline(plan)), markup=False)
    console.print(_stages(plan))
    console.print(_tensors(plan, tensors))
    if plan.remat:
        console.print(recomputed_text(plan), markup=False, soft_wrap=True)
    for note in plan.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _headline(plan: Plan) -> list[str]:
    parts = "micro-batch" if plan.microbatches == 1 else "micro-batches"
    stages = f"{len(plan.layers)} layers in {len(plan.stages)} stage{'s' * (len(plan.stages) > 1)}"
    first = f"{stages} on {plan.devices} devices of: {plan.cluster}"
    second = f"{plan.microbatches} {parts}, schedule {plan.schedule}"
    third = (
        f"predicted {seconds(plan.step_time)} per step, bubble {share(plan.bubble)}; "
        f"proven within {share(plan.gap)} of the best plan of its kind"
    )
    return [first, second, third, ""]


def _stages(plan: Plan) -> Table:
    table = Table(title=None, expand=False, show_edge=False, pad_edge=False)
    for name in ("stage", "layers", "devices", "nodes"):
        table.add_column(name)
    for name in ("forward", "backward", "apply", "sent"):
        table.add_column(name, justify="right")
    table.add_column("memory per device", no_wrap=True)
    for s, stage in enumerate(plan.stages):
        own = stage.sharding
        times = [seconds(t) for t in (own.forward, own.backward, own.apply)]
        row = [str(s), layers_text(plan, stage), str(stage.mesh), ", ".join(stage.nodes), *times]
        table.add_row(*row, size(sum(c.nbytes * c.count for c in own.collectives)), memory_text(stage.memory))
    return table


def layers_text(plan: Plan, stage: Stage) -> str:
    """Returns e.g. "Block_0 … Block_3 (4)"."""
    names = plan.layers[stage.start : stage.stop]
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"


def recomputed_text(plan: Plan) -> str:
    """Returns e.g. "computed again in the backward pass: everything of Block_0, Block_1; …"."""
    words = {
        Remat.PRODUCTS: "all but products",
        Remat.PARTS: "everything, part by part,",
        Remat.FULL: "everything",
    }
    found = {remat: [name or "the step" for name, r in plan.remat if r is remat] for remat in words}
    if len(plan.layers) == len(found[Remat.FULL]) > 1:
        return "computed again in the backward pass: everything of every layer but what it reads"
    parts = [f"{words[remat]} of {', '.join(names)}" for remat, names in found.items() if names]
    return f"computed again in the backward pass: {'; '.join(parts)}"


def memory_text(memory: Memory) -> str:
    """Returns e.g. "███░░░░░  1.2 GB of 14.7 GB"."""
    filled = min(8, round(8 * memory.peak / memory.limit)) if memory.limit else 0
    return f"{'█' * filled}{'░' * (8 - filled)} {size(memory.peak)} of {size(memory.limit)}"


def _tensors(plan: Plan, most: int) -> Table:
    table = Table(
        show_edge=False, pad_edge=False, title="\nthe largest tensors and their layouts", title_justify="left"
    )
    for name in ("stage", "tensor", "type", "layout"):
        table.add_column(name)
    table.add_column("each device holds", justify="right")
    for s, stage in enumerate(plan.stages):
        found = groups(stage.sharding, standing(plan))
        for group in found[:most]:
            part = group.nbytes / specs.shards(group.spec, stage.mesh)
            name = group.pattern + (f"  × {group.count}" if group.count > 1 else "")
            cells = (name, str(group.value), specs.text(group.spec), size(part))
            table.add_row(str(s), *map(escape, cells))
        if len(found) > most:
            table.add_row(str(s), f"… and {len(found) - most} more kinds", "", "", "")
    return table
