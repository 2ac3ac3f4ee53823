"""How one equation acts on the batch: by its factor rule where dims move, by algebra where it sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn, Literal

from autopar.core.graph import Dims, Rule
from autopar.trace import batch_algebra as algebra
from autopar.trace import compat
from autopar.trace.batch_tags import SAME, Kind, Mix, Tag, mixed, piece, term

_MOVES = frozenset({"broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "reshape", "squeeze"})
"""Leave a number what it is."""

_SCATTERS = frozenset({"scatter", "scatter-add", "scatter_add", "scatter-mul", "scatter-min", "scatter-max"})


@dataclass(frozen=True)
class Pair:
    """The same equation in the trace of the full batch and in that of one micro-batch; `m` micro-batches."""

    full: JaxprEqn
    micro: JaxprEqn
    m: int

    @property
    def op(self) -> str:
        return self.full.primitive.name

    @property
    def differs(self) -> bool:
        """Whether a shape or a literal of this equation depends on the batch size."""
        full = (*self.full.invars, *self.full.outvars)
        return any(_unlike(a, b) for a, b in zip(full, (*self.micro.invars, *self.micro.outvars)))

    def mix(self, why: str) -> Tag:
        """Returns the tag of a result that mixes examples here."""
        return mixed(Mix(why, str(compat.line_of(self.micro) or ""), self.op))

    def grown(self, i: int) -> list[int]:
        """Returns the dims of result i that differ between the traces."""
        full, micro = shape(self.full.outvars[i]), shape(self.micro.outvars[i])
        return [d for d, (a, b) in enumerate(zip(full, micro)) if a != b]

    def checked(self, tags: Sequence[Tag]) -> list[Tag]:
        """Returns the results' tags, MIXED where the two shapes contradict one."""
        return [self._checked(i, t) for i, t in enumerate(tags)]

    def _checked(self, i: int, tag: Tag) -> Tag:
        if tag.kind is Kind.MIXED:
            return tag
        full, micro = shape(self.full.outvars[i]), shape(self.micro.outvars[i])
        want = list(micro)
        if tag.is_piece:
            want[tag.dim] *= self.m
        if list(full) == want:
            return tag
        return self.mix(
            f"its result has shape {full} for the full batch and {micro} for one of {self.m} pieces"
        )


def _unlike(a: Any, b: Any) -> bool:
    if shape(a) != shape(b):
        return True
    return isinstance(a, Literal) and not np.array_equal(np.asarray(a.val), np.asarray(b.val))


def shape(atom: Any) -> tuple[int, ...]:
    """Returns the shape of a variable or literal."""
    return tuple(atom.aval.shape)


def judge(pair: Pair, tags: Sequence[Tag], rule: Callable[[JaxprEqn], Rule | None]) -> list[Tag]:
    """Returns the tags of an equation's results.

    Args:
        pair: the equation, no scan, while, cond or gradient.
        tags: of its operands, literals included.
        rule: gives factor rules.
    """
    bad = next((t for t in tags if t.kind is Kind.MIXED), None)
    if bad is not None:
        return [bad] * len(pair.full.outvars)
    if pair.op == "optimization_barrier":
        return list(tags)
    if pair.op == "iota":
        return [_iota(pair)]
    if pair.op.startswith("random_"):
        return pair.checked(_random(pair, tags))
    y = pair.full.params.get("y")
    counted = any(t.numbered for t in tags) and pair.op in ("add", "lt", "select_n")
    free = counted or any(t.kind is Kind.TERM for t in tags)  # of_terms has its own
    exponent = 0 if free else algebra.power(pair.op, tags, y)
    if isinstance(exponent, str):
        return [pair.mix(exponent)] * len(pair.full.outvars)
    if any(t.is_piece for t in tags):
        found = _pieces(pair, tags, exponent, rule)
    elif any(t.kind is Kind.TERM for t in tags):
        answer = algebra.of_terms(pair.op, tags)
        found = [pair.mix(answer) if isinstance(answer, str) else answer] * len(pair.full.outvars)
    else:
        zero = algebra.is_zero(pair.op, tags)
        found = [
            _of_same(pair, i, replace(SAME, exponent=exponent, zero=zero))
            for i in range(len(pair.full.outvars))
        ]
    return pair.checked(found)


def _of_same(pair: Pair, i: int, tag: Tag) -> Tag:
    """Returns the tag of a result of operands equal in all micro-batches: it may be repeated per example."""
    grown = pair.grown(i)
    if not grown:
        return tag
    if pair.op == "broadcast_in_dim" and len(grown) == 1:
        return replace(piece(grown[0], 0, tag.exponent), zero=tag.zero)
    return pair.mix("it depends on the size of the batch")


def _iota(pair: Pair) -> Tag:
    grown = pair.grown(0)
    if not grown:
        return SAME
    if len(grown) > 1:
        return pair.mix("it numbers pairs of examples")
    if pair.full.params["dimension"] != grown[0]:
        return piece(grown[0], 0)
    return replace(piece(grown[0], shape(pair.full.outvars[0])[grown[0]]), numbered=True)


def _random(pair: Pair, tags: Sequence[Tag]) -> list[Tag]:
    """Returns the tags of a PRNG operation: per key if keys differ, else a slice of the full batch's draw."""
    keys = [t for t in tags if t.is_piece]
    if any(t.kind is Kind.TERM or t.exponent or t.numbered for t in tags):
        return [pair.mix("a random key depends on a sum over examples or on the size of the batch")]
    if keys:
        return [piece(keys[0].dim, keys[0].span)] * len(pair.full.outvars)
    grown = pair.grown(0)
    if len(grown) > 1:
        return [pair.mix("its shape has the batch in two dims")]
    return [piece(grown[0], shape(pair.full.outvars[0])[grown[0]]) if grown else SAME]


@dataclass(frozen=True)
class _Cut:
    """Where the batch is within a rule: a factor, and the run of it that makes one full batch (0: any)."""

    factor: int
    span: int


def _pieces(
    pair: Pair, tags: Sequence[Tag], exponent: int, rule_of: Callable[[JaxprEqn], Rule | None]
) -> list[Tag]:
    count = len(pair.full.outvars)
    if any(t.kind is Kind.TERM for t in tags):
        return [pair.mix("a sum over examples meets single examples")] * count
    indexed = _indexed_by_number(pair, tags)
    number = None if indexed else _number(pair, tags)
    if isinstance(number, str):
        return [pair.mix(number)] * count
    rule = rule_of(pair.full)
    if rule is None:
        return [pair.mix("nothing is known of this operation")] * count
    if pair.op in (*_SCATTERS, "dynamic_update_slice") and not indexed and _writes_batch(pair, tags):
        return [pair.mix("it writes at places in the batch that are counted from its start")] * count
    cuts = set[_Cut]()
    for i, tag in enumerate(tags):
        dims = rule.operands[i]
        if not tag.is_piece or (indexed and i == 0 and pair.op == "gather"):
            continue
        cut = _located(tag, dims, rule.sizes, pair.m)
        if cut is None:
            return [pair.mix("it cuts through the batch")] * count
        cuts.add(cut)
    factors, spans = {c.factor for c in cuts}, {c.span for c in cuts if c.span}
    if indexed and pair.op in _SCATTERS and len(factors) == 2:
        factors = {
            _located_factor(tags[0], rule, pair.m)
        }  # index k of example k: the operand's dim is the batch
    if len(factors) != 1 or len(spans) > 1:
        return [pair.mix("every example meets every other")] * count
    cut = _Cut(factors.pop(), max(spans, default=0))
    found = []
    for i, dims in enumerate(rule.results):
        if pair.op == "reshape" and not cut.span and len(pair.grown(i)) == 1:
            found.append(replace(tags[0], dim=pair.grown(i)[0]))  # equal anywhere
            continue
        tag = _result(pair, cut, dims, rule, exponent)
        if tag.kind is not Kind.MIXED:
            tag = replace(tag, zero=algebra.is_zero(pair.op, tags))
        found.append(
            replace(tag, numbered=True, column=number) if number is not None and tag.is_piece else tag
        )
    return found


def _number(pair: Pair, tags: Sequence[Tag]) -> int | str | None:
    """Returns the column of the result that numbers examples, None if none does, or why that cannot be said.

    These are the steps from `jnp.arange(n)` to the gather in `x[jnp.arange(n), labels]`: a negative
    index gets n added, then the indices are put side by side.
    """
    numbers = [i for i, t in enumerate(tags) if t.numbered]
    if not numbers:
        return None
    others = [t for t in tags if not t.numbered]
    if all(tags[i].column < 0 for i in numbers):
        if pair.op in _MOVES:
            return -1
        if pair.op == "lt" and others and others[0].zero:
            return None  # no number is negative, in no micro-batch
        if pair.op == "add" and len(others) == 1 and others[0] == SAME.scaled(1):
            return -1  # counted from the end
        if pair.op == "select_n" and len(others) == 1 and not tags[0].numbered:
            return -1
        if pair.op == "concatenate" and len(numbers) == 1:
            before = pair.full.invars[: numbers[0]]
            along = pair.full.params["dimension"]
            if shape(pair.full.invars[numbers[0]])[along] == 1:
                return sum(shape(a)[along] for a in before)
    return "it depends on the position of an example in the batch"


def _located_factor(tag: Tag, rule: Rule, m: int) -> int:
    cut = _located(tag, rule.operands[0], rule.sizes, m) if tag.is_piece else None
    return -1 if cut is None else cut.factor


def _located(tag: Tag, dims: Dims | None, sizes: Sequence[int], m: int) -> _Cut | None:
    """Returns the factor in which a PIECE is cut, None when the cut goes through several factors."""
    if dims is None or tag.dim >= len(dims):
        return None
    factors = dims[tag.dim]
    if tag.span == 0:
        return _Cut(factors[0], 0) if factors else None
    stride = 1
    for factor in reversed(factors):
        if tag.span % stride == 0 and tag.span <= stride * sizes[factor] and tag.span // stride % m == 0:
            return _Cut(factor, tag.span // stride)
        stride *= sizes[factor]
    return None


def _result(pair: Pair, cut: _Cut, dims: Dims, rule: Rule, exponent: int) -> Tag:
    for d, factors in enumerate(dims):
        if cut.factor in factors:
            if cut.factor in rule.fixed:
                return pair.mix("its result for one example depends on the others")
            stride = 1
            for factor in factors[factors.index(cut.factor) + 1 :]:
                stride *= rule.sizes[factor]
            return piece(d, cut.span * stride, exponent)
    if cut.factor in rule.reductions and pair.op in algebra.SUMS:
        # A sum of equal values is m times the micro-batch's, whatever the examples are.
        return SAME.scaled(exponent + 1) if cut.span == 0 else term(exponent)
    if pair.op.startswith(("reduce_", "arg")):
        return pair.mix(f"it takes the {pair.op.removeprefix('reduce_').removeprefix('arg')} over examples")
    return pair.mix("it looks at all examples at once")


def _indexed_by_number(pair: Pair, tags: Sequence[Tag]) -> bool:
    """Returns whether this reads or writes `x[arange(batch), …]`: each example its own row."""
    if pair.op != "gather" and pair.op not in _SCATTERS:
        return False
    target, index = tags[0], tags[1]
    if not (target.is_piece and index.is_piece and index.numbered):
        return False
    dims = _indexed_dims(pair)
    column = max(index.column, 0)
    right = column < len(dims) and dims[column] == target.dim and (index.column >= 0 or len(dims) == 1)
    return right and target.span in (0, shape(pair.full.invars[0])[target.dim])


def _indexed_dims(pair: Pair) -> tuple[int, ...]:
    numbers = pair.full.params["dimension_numbers"]
    if pair.op == "gather":
        return tuple(numbers.start_index_map)
    return tuple(numbers.scatter_dims_to_operand_dims)


def _writes_batch(pair: Pair, tags: Sequence[Tag]) -> bool:
    if pair.op == "dynamic_update_slice":
        whole, part = shape(pair.full.invars[0]), shape(pair.full.invars[1])
        return any(t.is_piece and whole[t.dim] != part[t.dim] for t in tags[:2])
    return tags[0].is_piece and tags[0].dim in _indexed_dims(pair)
