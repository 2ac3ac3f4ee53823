"""What a micro-batch's value is to the full batch's: equal, a piece of it, a term of a sum, or neither."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from autopar.core.graph import Combine


class Kind(enum.Enum):
    """How the full batch's value F follows from those of the micro-batches, v₁ … v_m, up to a factor m^e."""

    SAME = "same"  # F = m^e · v, and all v are equal
    PIECE = "piece"  # F = m^e · (v₁ … v_m put together along a dim)
    TERM = "term"  # F = m^e · (v₁ + … + v_m): e = −1 is a mean
    MIXED = "mixed"  # none of these is known to hold


@dataclass(frozen=True, slots=True)
class Mix:
    """The first place where examples of the batch met. `where`: the user's line, "" if unknown."""

    why: str
    where: str
    op: str

    def __str__(self) -> str:
        return f"{self.where or 'the step'}: {self.op} mixes the examples of the batch: {self.why}"


@dataclass(frozen=True, slots=True)
class Tag:
    """What is known of one value.

    Attributes:
        kind: see Kind.
        exponent: of m.
        dim: of a PIECE: the dim that is cut.
        span: of a PIECE: elements of that dim that make one run of the full batch; the dim is a multiple of
            it (smaller where a major dim was merged into it). 0: equal along the dim, so that any cut is
            right.
        numbered: the value counts the examples of its micro-batch (an iota), so it is right up to an offset.
        column: of indices in which one column is such a number: which one; −1: the value is the number alone.
        zero: the value is exactly zero.
        mix: of MIXED: where it began.
    """

    kind: Kind
    exponent: int = 0
    dim: int = 0
    span: int = 0
    numbered: bool = False
    column: int = -1
    zero: bool = False
    mix: Mix | None = None

    @property
    def is_piece(self) -> bool:
        return self.kind is Kind.PIECE

    def scaled(self, exponent: int) -> Tag:
        """Returns the tag of the same value with another power of m."""
        return replace(self, exponent=exponent)

    def combine(self, length: int) -> Combine | None:
        """Returns how the micro-batches' values become the full batch's, None if no way to is known.

        Args:
            length: of dim 0 of the full batch's value, 0 for a scalar.
        """
        match self.kind, self.exponent:
            case Kind.SAME, 0:
                return Combine.LAST
            case (Kind.SAME, 1) | (Kind.TERM, 0):
                return Combine.SUM
            case Kind.TERM, -1:
                return Combine.MEAN
            case Kind.PIECE, 0 if self.dim == 0 and self.span in (0, length) and not self.numbered:
                return Combine.CONCAT
        return None


SAME = Tag(Kind.SAME)
ZERO = Tag(Kind.SAME, zero=True)


def piece(dim: int, span: int, exponent: int = 0) -> Tag:
    """Returns the tag of a value that is cut along a dim."""
    return Tag(Kind.PIECE, exponent, dim, span)


def term(exponent: int) -> Tag:
    """Returns the tag of a term of a sum over micro-batches."""
    return Tag(Kind.TERM, exponent)


def mixed(mix: Mix) -> Tag:
    """Returns the tag of a value that mixes examples."""
    return Tag(Kind.MIXED, mix=mix)


def joined(a: Tag, b: Tag) -> Tag | None:
    """Returns a tag that holds for a value that is either of two (a loop's carry), None if there is none."""
    if a == b:
        return a
    if a.kind is Kind.MIXED or b.kind is Kind.MIXED:
        return a if a.kind is Kind.MIXED else b
    if a.zero or b.zero:
        return replace(b if a.zero else a, zero=False)
    a, b = replace(a, zero=False), replace(b, zero=False)
    if {a.kind, b.kind} == {Kind.SAME, Kind.TERM}:
        same, other = (a, b) if a.kind is Kind.SAME else (b, a)
        return other if same.exponent == other.exponent + 1 else None  # m equal values sum to m times one
    if a.is_piece and b.is_piece and (a.exponent, a.dim) == (b.exponent, b.dim) and 0 in (a.span, b.span):
        return replace(a, span=a.span or b.span, numbered=a.numbered or b.numbered)
    return a if a == b else None
