"""Which elementwise results reach memory: XLA's rules of fusion, applied to a region.

A kernel writes what other kernels read. An elementwise result is computed inside of every kernel that reads
it, and keeps alive what it is made of instead of itself, except (`xla::InstructionFusion`):

- what has several readers, or readers that several kernels compute, and is too dear for that
  (`Equation.costly`);
- what has such readers and more than one operand of its size: each kernel would read all of them;
- readers that no elementwise operation fuses into (products, gathers, sorts, loops, …): for these the result
  is written, once.

A reshape or a cast-free view of one operand is that operand: who reads the view reads the operand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from autopar.core.graph import OpKind
from autopar.sharding.choices.model import Key, Model, Step
from autopar.sharding.region import Region

INSIDE = (OpKind.FUSED, OpKind.VIEW)
"""What may be computed inside of its readers."""

SMALL = 8
"""An operand at least this many times smaller than the result counts as broadcast."""

EXPANDED = ("select_and_scatter_add",)
"""Operations that XLA takes apart, before it fuses, into elementwise ones and a scatter."""


@dataclass
class Fusion:
    """What is computed inside of its readers.

    Attributes:
        sources: such a value → the values it is made of (none for what is made of constants).
        kept_for: such a value → ticks of readers for which it is written all the same, if there are any.
        inside: tick of what is computed inside of its readers → ticks of the kernels that compute it.
    """

    sources: dict[Key, frozenset[Key]] = field(default_factory=dict)
    kept_for: dict[Key, frozenset[int]] = field(default_factory=dict)
    inside: dict[int, set[int]] = field(default_factory=dict)


class _Result(NamedTuple):
    """An elementwise result that lies somewhere.

    Attributes:
        step: which makes it. big: the operands that are not broadcast. of: the operand that it is a view of.
    """

    step: Step
    key: Key
    big: frozenset[Key]
    of: Key | None


def fusions(region: Region, model: Model) -> tuple[Fusion, Fusion]:
    """Returns which values of a model are fused into their readers: for what is alive, and for what kernels
    read and write.

    In the second, who reads what is one of several alternatives' reads that of each; otherwise it is written.
    And where all readers are elementwise they compute a sum each for themselves (a reduction among them has
    it written: the residual stream is not added up anew by every layer); for memory it is taken to be kept,
    as it is where a barrier or a collective reads it, too.
    """
    results = _results(model)
    read = {key: {tick for tick, _ in uses} for key, uses in model.uses.items()}
    summed = region.combine if region.microbatches > 1 else ()
    leaving = {((), v) for v in (*region.leaving, *(v for v, _ in (*region.ties, *summed)))}
    alive = _fuse(model, results, dict(read), leaving, timed=False)
    leaving |= _leaving_bodies(model)
    for key, joined in alternatives(model).items():
        for made, tick in joined:
            read[made] = read[made] - {tick} | read.get(key, set())
    return alive, _fuse(model, results, read, leaving, timed=True)


def _results(model: Model) -> list[_Result]:
    """Returns the elementwise results, readers first."""
    found: list[_Result] = []
    for step in sorted(model.steps, key=lambda step: -step.tick):
        if step.kind not in INSIDE:
            continue
        operands = [(step.path, u) for u in step.equation.operands]
        homed = [key for key in operands if key in model.homes]
        for v in step.equation.outputs:
            key = step.path, v
            if key in model.homes:
                size = model.nbytes(key)
                big = frozenset([u for u in homed if SMALL * model.nbytes(u) > size])
                view = step.equation.kind is OpKind.VIEW
                of = next((u for u in big if model.nbytes(u) == size), None) if view else None
                found.append(_Result(step, key, big, of))
    return found


def _fuse(
    model: Model, results: Sequence[_Result], read: dict[Key, set[int]], leaving: set[Key], timed: bool
) -> Fusion:
    """Returns which results are fused. read: value → ticks of its readers; changed on the way."""
    found = Fusion()
    fusing = {step.tick for step in model.steps if step.fuses or step.equation.op in EXPANDED}
    plain = fusing - {step.tick for step in model.steps if step.kind is OpKind.MEMORY}
    for step, key, big, of in results:
        if key in leaving:
            continue
        ticks = read.get(key, set[int]())
        kernels = set[int]().union(*[found.inside.get(tick, (tick,)) for tick in ticks])
        if _several(model, ticks) or _several(model, kernels):
            apart = not timed or not ticks <= plain
            if step.equation.costly or (len(big) > 1 and apart):
                continue
        found.sources[key] = big
        found.inside[step.tick] = found.inside.get(step.tick, set()) | kernels
        if of is None:
            if not ticks <= fusing:
                found.kept_for[key] = frozenset(ticks - fusing)
        else:  # who reads the view reads the value itself
            read[of] = read[of] - {step.tick} | ticks
    return found


def _leaving_bodies(model: Model) -> set[Key]:
    """What the bodies of loops leave: carries and what is stacked."""
    return {(path, v) for path, loop in model.loops() for v in loop.body.outputs if v is not None}


def alternatives(model: Model) -> dict[Key, tuple[tuple[Key, int], ...]]:
    """Returns value → (what an alternative makes for it, the tick at which they are joined)."""
    found: dict[Key, tuple[tuple[Key, int], ...]] = {}
    for path, scope in model.scopes.items():
        for e in scope.equations:
            if e.kind is OpKind.EITHER and (key := (path, e.outputs[0])) in model.homes:
                found[key] = tuple(((path, v), model.first[key] - 1) for v in e.operands)
    return found


def mark_fused(model: Model, found: Fusion, timed: Fusion) -> None:
    """Marks the reads of values that their readers compute themselves (`Read.kernels`). timed: what kernels
    do; found: what is alive."""
    ticks = model.ticks_of
    for r, read in enumerate(model.reads):
        if read.key not in found.sources or read.site is None or read.tie:
            continue
        tick = ticks.get(read.site[:2], -1)
        if tick not in found.kept_for.get(read.key, frozenset()):
            model.reads[r] = replace(read, kernels=frozenset(timed.inside.get(tick, {tick})))


def _several(model: Model, ticks: set[int]) -> bool:
    """Whether several kernels read a value: of a layer's alternatives, that of which most do counts."""
    if len(ticks) < 2 or not model.asked:
        return len(ticks) > 1
    shared = [tick for tick in ticks if tick not in model.asked]
    most: dict[str, int] = {}
    for (layer, _), count in Counter(model.asked[tick] for tick in ticks if tick in model.asked).items():
        most[layer] = max(count, most.get(layer, 0))
    return len(shared) + sum(most.values()) > 1
