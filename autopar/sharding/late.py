"""Equations that only the caller waits for: a compiler leaves them to the end of the step.

The value of a loss is such a result. Its last reduction reads all the logits, which therefore stay in memory
while the backward runs, although nothing of that reads them.
"""

from __future__ import annotations

from autopar.core.graph import Phase
from autopar.sharding.model import Model
from autopar.sharding.region import Region


def late(region: Region, model: Model) -> frozenset[int]:
    """Returns the ticks of the forward's equations that the backward and the update do not depend on.

    None where nothing is differentiated: then all of the forward is for the caller.
    """
    if not any(e.phase is Phase.BACKWARD for e in region.equations):
        return frozenset()
    needed = {v for v, _ in region.ties} | ({*region.leaving} - {*region.results})
    found: set[int] = set()
    for i in reversed(range(len(region.equations))):
        e = region.equations[i]
        if e.phase is Phase.FORWARD and needed.isdisjoint(e.outputs):
            found.add(i)
        else:
            needed.update(e.operands)
    return frozenset(step.tick for step in model.steps if not step.path and step.index in found)
