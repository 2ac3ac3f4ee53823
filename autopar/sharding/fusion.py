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
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from autopar.core.graph import OpKind, Value
from autopar.sharding.model import Key, Model, Step
from autopar.sharding.region import Region
from autopar.sharding.strategies import kind_of, streams

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
        kept_for: such a value → ticks of readers for which it is written all the same.
        inside: tick of what is computed inside of its readers → ticks of the kernels that compute it.
    """

    sources: dict[Key, frozenset[Key]] = field(default_factory=dict)
    kept_for: dict[Key, frozenset[int]] = field(default_factory=dict)
    inside: dict[int, set[int]] = field(default_factory=dict)


def fuse(region: Region, model: Model, nbytes: Callable[[Value], int], timed: bool = False) -> Fusion:
    """Returns which values of a model are fused into their readers.

    timed: for what kernels read and write, instead of for what is alive. Then who reads what is one of
        several alternatives' reads that of each; otherwise it is written. And where all readers are
        elementwise they compute a sum each for themselves (a reduction among them has it written: the
        residual stream is not added up anew by every layer); for memory it is taken to be kept, as it is
        where a barrier or a collective reads it, too.
    """
    found = Fusion()
    hungry = {s.tick for s in model.steps if not fuses(s) and s.equation.op not in EXPANDED}
    reducing = {step.tick for step in model.steps if kind_of(step.equation) is OpKind.MEMORY}
    steps = {step.tick for step in model.steps}
    summed = region.combine if region.microbatches > 1 else ()
    leaving = {((), v) for v in (*region.leaving, *(v for v, _ in (*region.ties, *summed)))}
    read = {key: {tick for tick, _ in uses} for key, uses in model.uses.items()}
    if timed:
        leaving |= _leaving_bodies(model)
        for key, joined in alternatives(model).items():
            for made, tick in joined:
                read[made] = read[made] - {tick} | read.get(key, set())
    for step in sorted(model.steps, key=lambda step: -step.tick):  # readers first
        if kind_of(step.equation) not in INSIDE:
            continue
        for v in step.equation.outputs:
            key = step.path, v
            if key not in model.homes or key in leaving:
                continue
            ticks, of = read.get(key, set()), _viewed(step, model, nbytes, v)
            kernels = {kernel for tick in ticks for kernel in found.inside.get(tick, {tick})}
            big = _big(step, model, nbytes, nbytes(model.value(key)))
            several = max(_readers(model, ticks), _readers(model, kernels)) > 1
            apart = not timed or any(t in hungry or t in reducing or t not in steps for t in ticks)
            if several and (step.equation.costly or (len(big) > 1 and apart)):
                continue
            found.sources[key] = big
            found.inside.setdefault(step.tick, set()).update(kernels)
            if of is None:
                found.kept_for[key] = frozenset(t for t in ticks if t in hungry or t not in steps)
            else:  # who reads the view reads the value itself
                read[of] = read[of] - {step.tick} | ticks
    return found


def _leaving_bodies(model: Model) -> set[Key]:
    """What the bodies of loops leave: carries and what is stacked."""
    return {(path, v) for path, loop in model.loops() for v in loop.body.outputs if v is not None}


def alternatives(model: Model) -> dict[Key, tuple[tuple[Key, int], ...]]:
    """Returns value → (what an alternative makes for it, the tick at which they are joined)."""
    ticks = {key: model.first[key] - 1 for key in model.homes}
    found: dict[Key, tuple[tuple[Key, int], ...]] = {}
    for path, scope in model.scopes.items():
        for e in scope.equations:
            key = path, e.outputs[0] if e.outputs else -1
            if e.kind is OpKind.EITHER and key in model.homes:
                found[key] = tuple(((path, v), ticks[key]) for v in e.operands)
    return found


def mark_fused(model: Model, found: Fusion, timed: Fusion) -> None:
    """Marks the reads of values that their readers compute themselves (`Read.kernels`). timed: what kernels
    do; found: what is alive."""
    ticks = {(step.path, step.index): step.tick for step in model.steps}
    for r, read in enumerate(model.reads):
        if read.key not in found.sources or read.site is None or read.tie:
            continue
        tick = ticks.get(read.site[:2], -1)
        if tick not in found.kept_for.get(read.key, frozenset()):
            model.reads[r] = replace(read, kernels=frozenset(timed.inside.get(tick, {tick})))


def _viewed(step: Step, model: Model, nbytes: Callable[[Value], int], v: int) -> Key | None:
    """The operand that a result is a view of."""
    if step.equation.kind is not OpKind.VIEW:
        return None
    size = nbytes(model.value((step.path, v)))
    same = (u for u in _big(step, model, nbytes, size) if nbytes(model.value(u)) == size)
    return next(same, None)


def _readers(model: Model, ticks: set[int]) -> int:
    """How many kernels read a value: of several alternatives, the one that has most."""
    if not model.asked:
        return len(ticks)
    shared = [tick for tick in ticks if tick not in model.asked]
    most: dict[str, int] = {}
    for (layer, _), count in Counter(model.asked[tick] for tick in ticks if tick in model.asked).items():
        most[layer] = max(count, most.get(layer, 0))
    return len(shared) + sum(most.values())


def fuses(step: Step) -> bool:
    """Whether the kernel of a step may compute its operands itself: elementwise ones and reductions may."""
    kind, rule = kind_of(step.equation), step.equation.rule
    return kind is OpKind.VIEW or (rule is not None and streams(kind, rule))


def _big(step: Step, model: Model, nbytes: Callable[[Value], int], size: int) -> frozenset[Key]:
    """The operands that are not broadcast."""
    operands = ((step.path, u) for u in step.equation.operands)
    return frozenset(k for k in operands if k in model.homes and SMALL * nbytes(model.value(k)) > size)
