"""A plan as text: what is kept where, what is moved, what it costs."""

from __future__ import annotations

from autopar.core.graph import Graph
from autopar.core.plan import Collective, Memory, ShardingPlan
from autopar.core.spec import text


def table(plan: ShardingPlan, graph: Graph) -> str:
    """Returns the plan for people: a summary, the layouts of named tensors, the communication, the notes."""
    lines = [*summary(plan), "", "kept", *kept(plan, graph)]
    if plan.collectives:
        lines += ["", "communication per step", *communication(plan, graph)]
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines) + "\n"


def summary(plan: ShardingPlan) -> list[str]:
    """Returns the lines on time and memory."""
    axes = ", ".join(f"{axis.name}={axis.size}" for axis in plan.mesh.axes)
    gap = f", gap {plan.gap:.2%}" if plan.gap > 5e-5 else ""
    return [
        f"{plan.mesh} ({axes}): {_ms(plan.objective)} a step, {plan.status}{gap}",
        f"forward {_ms(plan.forward)}, backward {_ms(plan.backward)} per micro-batch; "
        f"apply {_ms(plan.apply)}",
        memory_line(plan.memory),
    ]


def memory_line(memory: Memory) -> str:
    """Returns one line on the bytes of a device."""
    return (
        f"memory {gigabytes(memory.peak)} of {gigabytes(memory.limit)}: state {gigabytes(memory.state)}, "
        f"activations {gigabytes(memory.activations)} × {memory.in_flight}, "
        f"workspace {gigabytes(memory.workspace)}"
    )


def kept(plan: ShardingPlan, graph: Graph) -> list[str]:
    """Returns one line per named tensor: its name, shape and layout."""
    named = [(graph.values[v], spec) for v, spec in plan.specs if graph.values[v].name]
    wide = max((len(value.name) for value, _ in named), default=0)
    return [f"  {value.name:<{wide}}  {value!s:<20} {text(spec)}" for value, spec in named]


def communication(plan: ShardingPlan, graph: Graph) -> list[str]:
    """Returns one line per kind, axes and phase: how often, the bytes a device sends, the seconds."""
    groups: dict[tuple[str, str, str], list[Collective]] = {}
    for c in plan.collectives:
        groups.setdefault((str(c.phase), c.kind, "".join(c.axes)), []).append(c)
    lines: list[str] = []
    for (phase, kind, axes), members in sorted(groups.items()):
        count = sum(c.count for c in members)
        sent = sum(c.nbytes * c.count for c in members)
        seconds = sum(c.seconds * c.count for c in members)
        lines.append(
            f"  {phase:<8} {kind:<14} {axes:<4} {count:>4} × {gigabytes(sent):>12} {_ms(seconds):>12}"
        )
    return lines


def gigabytes(nbytes: float) -> str:
    """Returns bytes for people."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes:.0f} bytes"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"
