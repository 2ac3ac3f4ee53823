"""Equations that only the caller waits for: a compiler leaves them for later.

The value of a loss is such a result. Its last reduction reads all the logits, which therefore stay in memory
although nothing else reads them. A program that keeps its order (`autopar.runtime.order`) has it computed
before the first product of the backward, beside the gradient of the logits.
"""

from __future__ import annotations

from autopar.core.graph import OpKind, Phase
from autopar.sharding.choices.model import Model
from autopar.sharding.memory.fusion import INSIDE
from autopar.sharding.region import Region


def late(region: Region, model: Model) -> dict[int, int]:
    """Returns tick → the tick at which a compiler may still compute what the equation there does: those of
    the forward that the backward and the update do not depend on.

    None where nothing is differentiated: then all of the forward is for the caller.
    """
    waiting = (OpKind.MEMORY, *INSIDE)
    backward = (s for s in model.steps if not s.path and s.phase is Phase.BACKWARD)
    products = [step.tick for step in backward if step.equation.kind not in waiting]
    if not products:
        return {}
    needed = {v for v, _ in region.ties} | ({*region.leaving} - {*region.results})
    found: set[int] = set()
    for i in reversed(range(len(region.equations))):
        e = region.equations[i]
        if e.phase is Phase.FORWARD and needed.isdisjoint(e.outputs):
            found.add(i)
        else:
            needed.update(e.operands)
    ticks = (step.tick for step in model.steps if not step.path and step.index in found)
    return {tick: max(tick, min(products) - 1) for tick in ticks}
