"""Where a step's program is held to the order of its equations, so that memory is freed when the plan says.

A compiler is free to compute gradients of weights after the whole chain of cotangents, and some do (XLA's
scheduler for CPUs goes down the chain first): everything that these products read stays alive meanwhile. So
gradients that nothing of the backward waits for are joined with the cotangents that go on to the rest of it,
by one barrier: who reads the cotangents reads them after the gradients have been computed. The same holds
for what only the caller waits for, the value of a loss: left to the end of the step, it would keep all that
it is made of, such as the logits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from autopar.core.graph import Equation, Graph, OpKind, Phase
from autopar.sharding.memory.fusion import INSIDE

KEEPING_ORDER = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_disable_hlo_passes": "cse_barrier_expander",
}
"""Options of XLA's compiler for CPUs, which would drop barriers before it orders kernels."""


def joins(graph: Graph, equations: Sequence[int], fences: Collection[int] = ()) -> dict[int, tuple[int, ...]]:
    """Returns equation → the values to be joined right after it: gradients made so far (and the forward's
    results), and all cotangents that later equations of the backward read.

    Joined is what is in memory anyway, so that nothing is written for the barrier's sake, and where no
    cotangent made since goes on that is not.

    Args:
        equations: of one program, in order.
        fences: those in front of what is computed again, which is not to begin before its cotangents are
            there: they are joined with these.
    """
    backward = [e for e in equations if graph.equations[e].phase is Phase.BACKWARD]
    readers = _readers(graph, backward)
    found: dict[int, tuple[int, ...]] = {}
    waiting = _results(graph, equations)
    passing: dict[int, None] = {}  # cotangents that are still to be read and are in memory
    inside: set[int] = set()  # those made since a gradient waits that are not
    for e in backward:
        equation = graph.equations[e]
        for v in equation.operands:
            if v in readers and readers[v][-1] == e:
                passing.pop(v, None)
                inside.discard(v)
        for v in equation.outputs:
            if v in readers:
                if e in fences or _written(graph, equation, readers[v]):
                    passing[v] = None
                elif waiting and len(readers[v]) == 1:
                    inside.add(v)
            elif equation.kind not in INSIDE and graph.values[v].shape:
                waiting.append(v)
        if e in fences or (waiting and passing and not inside):
            found[e] = (*waiting, *passing)
            waiting = []
    return found


def _results(graph: Graph, equations: Sequence[int]) -> list[int]:
    """Returns what the forward makes for the caller and no equation reads."""
    read = {v for e in equations for v in graph.equations[e].operands}
    forward = (graph.equations[e] for e in equations if graph.equations[e].phase is Phase.FORWARD)
    returned = {v for v in graph.outputs if v is not None} - read
    return [v for equation in forward for v in equation.outputs if v in returned]


def _written(graph: Graph, equation: Equation, readers: Sequence[int]) -> bool:
    """Whether the result of an equation is in memory as long as it is read; what kernels compute again, each
    for itself, is not (`autopar.sharding.memory.fusion`)."""
    if equation.kind not in INSIDE:
        return True
    shapes = [graph.values[v].shape for v in equation.operands]
    several = shapes.count(graph.values[equation.outputs[0]].shape) > 1
    hungry = any(graph.equations[e].kind not in (*INSIDE, OpKind.MEMORY) for e in readers)
    return len(readers) > 1 and (equation.costly or several or hungry)


def _readers(graph: Graph, backward: Sequence[int]) -> dict[int, list[int]]:
    """Returns value → the equations of the backward that read it; views of what only the update or the
    caller reads are no readers."""
    readers: dict[int, list[int]] = {}
    for e in reversed(backward):
        equation = graph.equations[e]
        if equation.kind is OpKind.VIEW and not any(v in readers for v in equation.outputs):
            continue
        for v in dict.fromkeys(equation.operands):
            readers.setdefault(v, []).insert(0, e)
    return readers
