"""Whether micro-batches give the full batch's result, and how: proven by comparing the traces of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from autopar.core.errors import MixedExamples
from autopar.core.graph import Combine, Graph, Phase, Rule
from autopar.trace import batch_algebra as algebra
from autopar.trace import compat, marks
from autopar.trace.batch_rules import Pair, judge, shape
from autopar.trace.batch_tags import SAME, ZERO, Kind, Mix, Tag, joined, mixed, piece
from autopar.trace.flat import Flat, Mark, dce, flatten, to_jaxpr
from autopar.trace.forward_layers import expand_gradients
from autopar.trace.grad_equation import GRAD
from autopar.trace.rng_slices import slice_rng

__all__ = ["Analysis", "analyse", "slice_rng"]

_REMEDY = (
    "micro-batches would give another result than the full batch. Use micro_batches=1, or write the step so "
    "that the loss is a mean or a sum of one value per example"
)


@dataclass(frozen=True)
class Analysis:
    """What the values of one micro-batch are to those of the full batch.

    Attributes:
        flat: the micro-batch's step; what must run once per micro-batch has a mark that says so.
        microbatches: how many.
        tags: of the variables computed once per micro-batch, and of the inputs.
        shapes: the full batch's shape of each of them.
        gradient: of what backward equations make that `flat` does not know yet (parts of a gradient).
    """

    flat: Flat
    microbatches: int
    tags: Mapping[Var, Tag]
    shapes: Mapping[Var, tuple[int, ...]]
    gradient: Tag | None

    def combine(self, v: Var, *, name: str = "", backward: bool = False) -> Combine:
        """Returns how the micro-batches' values of `v` become the full batch's.

        Args:
            v: a variable of `flat`, or one that a backward equation makes.
            name: for the message.
            backward: whether a backward equation makes it.
        Raises:
            MixedExamples: no way is known.
        """
        tag = self.tags.get(v)
        if tag is None:
            assert backward and self.gradient is not None, "only parts of gradients are unknown"
            tag = self.gradient
        if tag.mix is not None:
            raise MixedExamples(f"{tag.mix}; {_REMEDY}")
        full = self.shapes.get(v, shape(v))
        how = tag.combine(full[0] if full else 0)
        if how is None:
            raise MixedExamples(f"{name or 'a result'} {_unusable(tag)}; {_REMEDY}")
        return how

    def combinations(self, graph: Graph, values: Sequence[Var]) -> tuple[tuple[int, Combine], ...]:
        """Returns (value id, how) for what leaves the micro-batches: read by an apply equation, or a result.

        Args:
            graph: of the differentiated step, phases complete. values: the variable of each value id.
        Raises:
            MixedExamples: one of them cannot be combined.
        """
        phase = {v: e.phase for e in graph.equations for v in e.outputs}
        phase.update(dict.fromkeys(graph.batch, Phase.FORWARD))
        read = [v for e in graph.equations if e.phase is Phase.APPLY for v in e.operands]
        leaving = dict.fromkeys([*read, *(v for v in graph.outputs if v is not None)])
        found = []
        for v in sorted(leaving):
            if phase.get(v, Phase.APPLY) is not Phase.APPLY:
                name = graph.values[v].name
                how = self.combine(values[v], name=name, backward=phase[v] is Phase.BACKWARD)
                found.append((v, how))
        return tuple(found)


def _unusable(tag: Tag) -> str:
    if tag.numbered:
        return "numbers the examples of the batch"
    if tag.is_piece and not tag.exponent:
        return "has the examples in another dim than the first"
    return f"depends on the batch size: it changes with the number of micro-batches (power {tag.exponent})"


def analyse(
    full: Flat,
    micro: Flat,
    m: int,
    batch_inputs: Sequence[int],
    rules: Callable[[JaxprEqn], Rule | None],
) -> Analysis:
    """Returns what the micro-batch's values are to the full batch's, proven equation by equation.

    Args:
        full: the step traced with the full batch, calls inlined (`dce(flatten(…))`).
        micro: the same with a batch m times smaller along dim 0.
        m: how many micro-batches.
        batch_inputs: positions of the inputs that are cut.
        rules: gives factor rules; a RuleBook.
    Raises:
        MixedExamples: the two traces do not have the same equations.
    """
    full, micro = expand_gradients(full, top=False), expand_gradients(micro, top=False)
    pairs = _paired(full, micro, m)
    tags = dict.fromkeys(micro.inputs, SAME)
    for i in batch_inputs:
        tags[micro.inputs[i]] = piece(0, shape(full.inputs[i])[0])
    constants = _constants(full, micro)
    tags |= constants
    once = _per_microbatch(pairs, micro, {v for v, t in constants.items() if t.kind is Kind.MIXED})
    judged = _Judge(m, rules, tags)
    for i, pair in enumerate(pairs):
        if once[i]:
            judged.equation(pair)
    shapes = {v: shape(f) for p in pairs for f, v in zip(p.full.outvars, p.micro.outvars)}
    shapes |= {v: shape(f) for f, v in zip(full.inputs, micro.inputs)}
    marked = replace(micro, marks=tuple(_marked(p, k, o) for p, k, o in zip(pairs, micro.marks, once)))
    return Analysis(marked, m, judged.tags, shapes, judged.gradient)


def _marked(pair: Pair, mark: Mark, once: bool) -> Mark:
    if not once or mark.phase is not None or pair.full.primitive is GRAD:
        return mark
    return Mark(mark.layer, marks.phase_of(pair.micro) or Phase.FORWARD)


def _paired(full: Flat, micro: Flat, m: int) -> list[Pair]:
    for a, b in zip(full.equations, micro.equations):
        if a.primitive is not b.primitive:
            raise _unlike(a, b)
    if len(full.equations) != len(micro.equations):
        longer = max(full.equations, micro.equations, key=len)
        raise _unlike(longer[min(len(full.equations), len(micro.equations))], None)
    return [Pair(a, b, m) for a, b in zip(full.equations, micro.equations)]


def _unlike(a: JaxprEqn, b: JaxprEqn | None) -> MixedExamples:
    other = f"{b.primitive.name} in its place" if b is not None else "nothing in its place"
    return MixedExamples(
        f"{compat.line_of(a) or 'the step'}: {a.primitive.name} for the full batch has {other} for "
        "a micro-batch, so the function depends on the batch size (batches of one are often special). "
        "Use fewer micro-batches, or micro_batches=1"
    )


def _per_microbatch(pairs: Sequence[Pair], micro: Flat, varying: set[Var]) -> list[bool]:
    """Returns which equations run per micro-batch: the differentiated, those on the batch, what feeds them.

    What reads a constant that depends on the batch size is among them: applied once per step, the mean of a
    sum would divide by the size of a micro-batch.
    """
    needed: set[Var] = set()
    once = [False] * len(pairs)
    for i in range(len(pairs) - 1, -1, -1):
        pair = pairs[i]
        marked = (
            micro.marks[i].phase in (Phase.FORWARD, Phase.BACKWARD) or marks.phase_of(pair.micro) is not None
        )
        needs = (
            marked or pair.micro.primitive is GRAD or pair.differs or bool(varying & set(_variables(pair)))
        )
        if needs or any(v in needed for v in pair.micro.outvars):
            once[i] = True
            needed.update(_variables(pair))
    return once


def _variables(pair: Pair) -> list[Var]:
    return [a for a in pair.micro.invars if isinstance(a, Var)]


def _constants(full: Flat, micro: Flat) -> dict[Var, Tag]:
    """Returns the tags of captured arrays; those of the two traces come in the same order."""
    why = Mix("an array that the function captures depends on the batch size", "", "a constant")
    if len(full.constants) != len(micro.constants):
        return {v: mixed(why) for v, _ in micro.constants}
    found = {}
    for (_, a), (v, b) in zip(full.constants, micro.constants):
        equal = a is b or (np.shape(a) == np.shape(b) and bool(np.all(np.asarray(a) == np.asarray(b))))
        found[v] = SAME if equal else mixed(why)
    return found


class _Judge:
    """The tags found so far; lives within `analyse`, and one within each loop body."""

    def __init__(self, m: int, rules: Callable[[JaxprEqn], Rule | None], tags: dict[Var, Tag]):
        self.m, self.rules, self.tags = m, rules, tags
        self.gradient: Tag | None = None
        self.line: compat.Line | None = None  # the last one seen: jnp's inside has none

    def equation(self, pair: Pair) -> None:
        """Adds the tags of an equation's results."""
        operands = [self.operand(pair, i) for i in range(len(pair.micro.invars))]
        self.line = compat.line_of(pair.micro) or self.line
        match pair.op:
            case "autopar_grad":
                found = self._gradient(pair, operands)
            case "scan":
                found = self._scan(pair, operands)
            case "while":
                found = self._while(pair, operands)
            case "cond":
                found = self._cond(pair, operands)
            case _:
                found = judge(pair, operands, self.rules)
        self.tags.update(zip(pair.micro.outvars, [self._near(t) for t in found]))

    def _near(self, tag: Tag) -> Tag:
        if tag.mix is None or tag.mix.where or self.line is None:
            return tag
        return mixed(replace(tag.mix, where=f"near {self.line}"))

    def operand(self, pair: Pair, i: int) -> Tag:
        """Returns the tag of an operand; a literal's from the values in both traces."""
        micro, full = pair.micro.invars[i], pair.full.invars[i]
        if isinstance(micro, Var):
            return self.tags.get(micro) or pair.mix(
                "it reads a value that is known only after all micro-batches"
            )
        assert isinstance(full, Literal), "the traces have the same form"
        if np.ndim(micro.val) or not np.issubdtype(np.asarray(micro.val).dtype, np.number):
            same = np.array_equal(np.asarray(micro.val), np.asarray(full.val))
            return SAME if same else pair.mix("a constant depends on the batch size")
        tag = algebra.literal(complex(full.val).real, complex(micro.val).real, self.m)
        return tag or pair.mix(f"the constant {full.val} is {micro.val} for one of {self.m} micro-batches")

    def body(self, full: ClosedJaxpr, micro: ClosedJaxpr, operands: Sequence[Tag]) -> list[Tag]:
        """Returns the tags of what a function returns for operands with these tags."""
        a, b = _flat_body(full), _flat_body(micro)
        inner = _Judge(self.m, self.rules, dict(zip(b.inputs, operands)) | _constants(a, b))
        inner.line = self.line
        for pair in _paired(a, b, self.m):
            inner.equation(pair)
        return [inner._output(x, y) for x, y in zip(a.outputs, b.outputs)]

    def _output(self, full: Any, micro: Any) -> Tag:
        if isinstance(micro, Var):
            return self.tags[micro]
        why = Mix("a constant depends on the batch size", "", "a result")
        return algebra.literal(float(full.val), float(micro.val), self.m) or mixed(why)

    def _gradient(self, pair: Pair, operands: Sequence[Tag]) -> list[Tag]:
        results = self.body(pair.full.params["jaxpr"], pair.micro.params["jaxpr"], operands)
        found = results + [_derivative(pair, results[0], operands[i]) for i in pair.full.params["wrt"]]
        of_parameters = _derivative(pair, results[0], SAME)
        if self.gradient not in (None, of_parameters):
            of_parameters = pair.mix("one of the losses is a mean over examples and another is not")
        self.gradient = of_parameters
        return found

    def _scan(self, pair: Pair, operands: Sequence[Tag]) -> list[Tag]:
        full, micro = compat.scan_of(pair.full), compat.scan_of(pair.micro)
        assert full is not None and micro is not None
        count = len(pair.full.outvars)
        fixed, carries, scanned = (
            list(operands[: full.consts]),
            list(operands[full.consts : full.consts + full.carries]),
            operands[full.consts + full.carries :],
        )
        if full.length != micro.length or any(t.is_piece and t.dim == 0 and t.span for t in scanned):
            return [pair.mix("a loop goes over the examples one after another")] * count
        inside = [replace(t, dim=t.dim - 1) if t.is_piece else t for t in scanned]

        def step(carries: Sequence[Tag]) -> list[Tag]:
            return self.body(full.body, micro.body, [*fixed, *carries, *inside])

        carries, results = _settled(pair, carries, step)
        stacked = [replace(t, dim=t.dim + 1) if t.is_piece else t for t in results[full.carries :]]
        return pair.checked([*carries, *stacked])

    def _while(self, pair: Pair, operands: Sequence[Tag]) -> list[Tag]:
        full, micro = pair.full.params, pair.micro.params
        conditions, consts = full["cond_nconsts"], full["body_nconsts"]
        head, fixed = operands[:conditions], operands[conditions : conditions + consts]

        def step(carries: Sequence[Tag]) -> list[Tag]:
            return self.body(full["body_jaxpr"], micro["body_jaxpr"], [*fixed, *carries])

        carries, _ = _settled(pair, list(operands[conditions + consts :]), step)
        (going,) = self.body(full["cond_jaxpr"], micro["cond_jaxpr"], [*head, *carries])
        if going.kind is not Kind.SAME or going.exponent:
            return [pair.mix("how long a loop runs depends on the examples")] * len(carries)
        return pair.checked(carries)

    def _cond(self, pair: Pair, operands: Sequence[Tag]) -> list[Tag]:
        which, *inputs = operands
        count = len(pair.full.outvars)
        if which.kind is not Kind.SAME or which.exponent:
            return [pair.mix("which branch is taken depends on the examples")] * count
        branches = zip(pair.full.params["branches"], pair.micro.params["branches"])
        outcomes = [self.body(a, b, inputs) for a, b in branches]
        return pair.checked([_all_joined(pair, tags) for tags in zip(*outcomes)])


def _flat_body(closed: ClosedJaxpr) -> Flat:
    flat = dce(flatten(closed))
    if any(e.primitive is GRAD for e in flat.equations):
        flat = dce(flatten(to_jaxpr(expand_gradients(flat))))
    return flat


def _derivative(pair: Pair, loss: Tag, operand: Tag) -> Tag:
    """Returns the tag of the loss's gradient for an operand: differentiation is linear, m's power stays."""
    if loss.kind is Kind.MIXED or operand.kind is Kind.MIXED:
        return loss if loss.kind is Kind.MIXED else operand
    if operand.exponent or operand.kind is Kind.TERM:
        return pair.mix("it differentiates for a value that depends on the other examples")
    if loss.zero:
        return ZERO
    if not operand.is_piece:
        return loss
    # Of F = m^e · (l₁ + … + l_m), example k's gradient is m^e times that of the only term that it is in.
    return replace(operand, exponent=loss.exponent if loss.kind is Kind.TERM else loss.exponent - 1)


def _settled(
    pair: Pair, carries: list[Tag], step: Callable[[Sequence[Tag]], list[Tag]]
) -> tuple[list[Tag], list[Tag]]:
    """Returns tags that hold for a loop's carries in every trip, and those of all the body's results."""
    for _ in range(2 * len(carries) + 2):
        results = step(carries)
        after = [_all_joined(pair, pairing) for pairing in zip(carries, results)]
        if after == carries:
            return carries, results
        carries = after
    return [pair.mix("what a loop carries has no fixed relation to the batch")] * len(carries), results


def _all_joined(pair: Pair, tags: Sequence[Tag]) -> Tag:
    first, *others = tags
    for other in others:
        both = joined(first, other)
        if both is None:
            return pair.mix("it is summed over examples in one case and not in another")
        first = both
    return first
