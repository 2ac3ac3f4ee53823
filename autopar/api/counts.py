"""How many micro-batches: plans for several numbers of them, from a likely one on, until none is better."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TypeAlias

from autopar.api.exact import Made
from autopar.core.errors import DoesNotFit, MixedExamples, PlanError

Found: TypeAlias = dict[int, Made | Exception]
"""Number of micro-batches → the plan with so many, or why there is none."""

PATIENCE = 25.0
"""Seconds after which no further number of micro-batches is tried."""


def best_of(batch: int, first: int, plan: Callable[[int], Made]) -> Made:
    """Returns the fastest plan over numbers of micro-batches; its notes say which were tried.

    Args:
        batch: examples per step. first: a number to begin with. plan: plans for one number.

    Raises:
        PlanError, MixedExamples: there is a plan for none of them.
    """
    found: Found = {}
    began = time.monotonic()
    for micro in candidates(batch, first, found):
        try:
            found[micro] = plan(micro)
        except (PlanError, MixedExamples) as error:
            found[micro] = error
        if time.monotonic() - began > PATIENCE and any(isinstance(x, Made) for x in found.values()):
            break
    return _best(found)


def candidates(batch: int, first: int, found: Mapping[int, Made | Exception]) -> Iterator[int]:
    """Yields divisors of the batch, each at least twice the one before: downhill from `first`, then from the
    best, until none is better.

    More micro-batches make the bubble smaller and activations fewer, but each less efficient, so that the
    time falls and then grows. A count that does not fit asks for more of them.

    Args:
        found: what is known of those yielded so far.
    """
    counts = [1]
    for n in range(2, batch + 1):
        if batch % n == 0 and n >= 2 * counts[-1]:
            counts.append(n)
    at = max(i for i, n in enumerate(counts) if n <= first)

    def time_of(i: int) -> float:
        result = found.get(counts[i])
        return result.plan.step_time if isinstance(result, Made) else math.inf

    yield counts[at]
    for step in (1, -1):
        here = at
        while 0 <= here + step < len(counts):
            if counts[here + step] not in found:
                yield counts[here + step]
            if step == 1 and math.isinf(time_of(here)):
                here += 1
            elif time_of(here + step) < time_of(here):
                here += step
            else:
                break
        if here != at:
            return


def _best(found: Found) -> Made:
    made = {micro: x for micro, x in found.items() if isinstance(x, Made)}
    if not made:
        errors = [x for x in found.values() if isinstance(x, Exception)]
        short = [x for x in errors if isinstance(x, DoesNotFit)]
        raise min(short, key=lambda x: x.missing or math.inf) if short else errors[0]
    best = min(made.values(), key=lambda x: x.plan.step_time)
    if len(found) == 1:
        return best
    tried = ", ".join(
        f"{m} ({1e3 * made[m].plan.step_time:.4g} ms)" if m in made else f"{m} (no)" for m in sorted(found)
    )
    notes = (*best.plan.notes, f"numbers of micro-batches tried: {tried}")
    return Made(replace(best.plan, notes=notes), best.traced)
