"""The cheapest choice found within a memory limit, or what is missing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from autopar.core.errors import DoesNotFit, PlanError
from autopar.sharding.limit.lowered import SMALL
from autopar.sharding.limit.mixing import LEAN, mixed
from autopar.sharding.limit.moments import moments_of, remember
from autopar.sharding.limit.squeeze import Squeezed, squeeze
from autopar.sharding.memory.alive import STATE
from autopar.sharding.problem.assemble import Costs, assemble
from autopar.sharding.problem.solving import Solved, least_peak, minimise
from autopar.sharding.text import gigabytes

if TYPE_CHECKING:
    from autopar.sharding.problem.setting import Setting

TRIES = 4
"""How often a plan is looked for below a lower limit when what is moved does not fit beside it."""

WATCHED, APART = 3000, 1000
"""Programs of at most so many nodes are looked at moment by moment; in the integer program of so many, like
parts may choose differently."""

NEAR = 0.1
"""A mixture of two plans that is proven to be this near the best is taken as it is."""

NOTHING = Solved(None, math.inf, math.inf, "infeasible")


def fitting(setting: Setting, price: float, limit: int) -> Solved:
    """Returns the cheapest choice found that keeps within a limit which the best one without it exceeds.

    Args:
        price: seconds per byte. limit: bytes.

    Raises:
        DoesNotFit: nothing was found; says what is missing, and which tensors are the biggest.
        PlanError: pinned layouts contradict each other.
    """
    mixture = mixed(setting, price, limit)
    if mixture.chosen is not None and mixture.objective * (1 - NEAR) <= mixture.bound:
        return mixture
    try:
        found = _searched(setting, price, limit)
    except DoesNotFit:
        if mixture.chosen is None:
            raise
        return mixture
    best = min(mixture, found, key=lambda each: each.objective)
    return replace(best, bound=min(best.objective, max(mixture.bound, found.bound)))


def _searched(setting: Setting, price: float, limit: int) -> Solved:
    nodes = len(setting.model.nodes)
    hopeless = setting.least > limit and not setting.region.whole  # one of several stages to choose from
    if price or nodes > WATCHED or hopeless:
        return _estimated(setting, price, limit)
    watched = squeeze(setting, limit, setting.options.seconds, setting.options.ceiling)
    if watched.seconds == math.inf:
        raise refusal(setting, limit, watched)
    if watched.promise >= setting.options.ceiling or (watched.fastest and nodes <= SMALL):
        return _as_found(setting, limit, watched)
    return _best(setting, limit, watched, apart=nodes <= APART)


def _best(setting: Setting, limit: int, watched: Squeezed, apart: bool) -> Solved:
    """Returns the better of what was found moment by moment and what the integer program finds."""
    options, fastest, bound = setting.options, watched.fastest, watched.seconds
    if fastest is None or fastest.seconds > (1 + options.gap) * bound:
        costs = moments_of(setting).costs if apart else setting.costs(0.0, cautious=False)
        solved = minimise(costs, limit, options.seconds, options.gap)
        if solved.status == "infeasible" and apart:
            raise refusal(setting, limit, watched)
        if apart:
            bound = max(bound, solved.bound)
        if solved.chosen is not None:
            solved = _within(setting, costs, limit, solved)
        if solved.chosen is not None:
            found = remember(setting, solved.chosen)
            fastest = found if fastest is None or found.seconds < fastest.seconds else fastest
    return _as_found(setting, limit, replace(watched, fastest=fastest, seconds=bound))


def _as_found(setting: Setting, limit: int, watched: Squeezed) -> Solved:
    """Returns the fastest choice found. Raises DoesNotFit: none was."""
    fastest, bound = watched.fastest, watched.seconds
    if fastest is None:
        raise refusal(setting, limit, watched)
    status = "optimal" if fastest.seconds <= (1 + setting.options.gap) * bound else "feasible"
    return Solved(fastest.chosen, fastest.seconds, min(bound, fastest.seconds), status)


def _estimated(setting: Setting, price: float, limit: int) -> Solved:
    """Returns a choice that the integer program finds with a cautious estimate of what it does not see, or
    else without it."""
    options = setting.options
    for cautious in (True, False):
        costs = setting.costs(price, cautious)
        solved = minimise(costs, limit, options.seconds, options.gap)
        if solved.chosen is not None:
            break
    if solved.chosen is not None:
        solved = _within(setting, costs, limit, solved)
    return solved if solved.chosen is not None else _leanest(setting, limit, solved)


def _within(setting: Setting, costs: Costs, limit: int, solved: Solved) -> Solved:
    """Returns a choice that fits with what the solver does not see, looked for below ever lower limits."""
    options, lower, bound = setting.options, limit, solved.bound
    for _ in range(TRIES):
        assert solved.chosen is not None
        over = setting.memory(solved.chosen).peak - limit
        if over <= 0:
            return replace(solved, bound=bound, status=solved.status if lower == limit else "feasible")
        lower -= over
        solved = minimise(costs, lower, options.seconds / 2, options.gap) if lower > 0 else NOTHING
        if solved.chosen is None:
            return replace(NOTHING, status="unknown")
    fits = setting.memory(solved.chosen or ()).peak <= limit
    return replace(solved, bound=bound, status="feasible") if fits else replace(NOTHING, status="unknown")


def leanest(setting: Setting) -> Solved:
    """Returns the choice that takes least bytes, added over time. Raises PlanError: there is no choice."""
    items = tuple(replace(item, role=STATE) for item in setting.items)
    costs = setting.merged(assemble(setting.model, setting.grid, setting.nbytes, items, LEAN))
    lean = minimise(costs, None, setting.options.seconds, setting.options.gap)
    if lean.chosen is None:
        raise PlanError(
            "the pinned layouts contradict each other: no choice satisfies all of them; "
            "leave one of them out to see which"
            if setting.options.pinned
            else f"no way to shard these equations over {setting.mesh} has a finite cost; "
            "check the rates of the device and the links"
        )
    return replace(lean, bound=-math.inf, status="feasible")


def _leanest(setting: Setting, limit: int, failed: Solved) -> Solved:
    """Returns the leanest choice if that fits after all."""
    lean = leanest(setting)
    if failed.status != "infeasible" and setting.memory(lean.chosen or ()).peak <= limit:
        return lean
    raise refusal(setting, limit, Squeezed())


def refusal(setting: Setting, limit: int, watched: Squeezed) -> DoesNotFit:
    """Returns the error when nothing was found that fits.

    Args:
        watched: what is known of the least that any plan takes.
    """
    chosen = leanest(setting).chosen if watched.leanest is None else watched.leanest.chosen
    assert chosen is not None
    memory = setting.memory(chosen)
    least = max(least_peak(setting.items) if watched.leanest is None else setting.least, round(watched.least))
    proven = least > limit
    missing = least - limit if proven else max(1, memory.peak - limit)
    return DoesNotFit(
        f"{setting.mesh} has {gigabytes(limit)} per device, but the plan that needs least takes "
        f"{gigabytes(memory.peak)} (state {gigabytes(memory.state)}, activations "
        f"{gigabytes(memory.activations)} × {memory.in_flight} in flight, workspace "
        f"{gigabytes(memory.workspace)}); at least {gigabytes(missing)} are missing. Biggest per device: "
        f"{biggest(setting, chosen)}. Use more devices, or smaller or fewer micro-batches in flight",
        missing,
        memory.peak,
        least if proven else None,
    )


def biggest(setting: Setting, chosen: Sequence[int], count: int = 3) -> str:
    """Returns the tensors that take most of a device, for people."""
    items = sorted(setting.items, key=lambda item: -int(item.nbytes[chosen[item.node]]))
    words: list[str] = []
    for item in items[:count]:
        value = setting.model.value(item.key)
        words.append(f"{value.name or item.role} {value} {gigabytes(int(item.nbytes[chosen[item.node]]))}")
    return ", ".join(words)
