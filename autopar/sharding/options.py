"""What a caller may ask of an intra-operator plan."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autopar.core.spec import Spec


@dataclass(frozen=True)
class Options:
    """What to plan for.

    Attributes:
        limit: bytes a device may use; None: `mesh.device.memory`.
        in_flight: micro-batches whose forward → backward residuals are held at once.
        pinned: (value id, layout) the plan has to keep; everything else is solved around them.
        memory_price: seconds per byte of state and residuals, added to the objective (0: only speed counts).
        gap: relative distance from the optimum at which the solver may stop.
        seconds: time the solver may take.
        dtypes: (from, to) element types that are kept in another type (`ShardingPlan.dtypes`).
        products: (from, to) types in which matrix products run (`ShardingPlan.products`).
        uniform: the region is one of a stack of equal layers, so moving its activations from the layout it
            leaves them in to the layout it takes them in is part of the price.
        regather: whether state that forward and backward read in another layout is moved again for the
            backward rather than kept in that layout; None: only where it would not fit otherwise.
        share: let equal parts of a deep graph take one decision (then depth does not grow the problem).
        ceiling: seconds per step of a plan that is known; little is spent on what promises no faster one.
    """

    limit: int | None = None
    in_flight: int = 1
    pinned: tuple[tuple[int, Spec], ...] = ()
    memory_price: float = 0.0
    gap: float = 1e-4
    seconds: float = 60.0
    dtypes: tuple[tuple[str, str], ...] = ()
    products: tuple[tuple[str, str], ...] = ()
    uniform: bool = False
    regather: bool | None = None
    share: bool = True
    ceiling: float = math.inf
