"""The communication of a compiled program: every collective, its axes, its buffer, and how often it runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from autopar.bench.hlo import Computation, Instruction, Module
from autopar.bench.hlo_groups import Groups, axes_of, groups
from autopar.sharding.ways.cost import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, PERMUTE, REDUCE_SCATTER

KINDS = {
    "all-reduce": ALL_REDUCE,
    "all-gather": ALL_GATHER,
    "reduce-scatter": REDUCE_SCATTER,
    "all-to-all": ALL_TO_ALL,
    "ragged-all-to-all": ALL_TO_ALL,
    "collective-permute": PERMUTE,
    "collective-broadcast": PERMUTE,
}
VIEWS = ("bitcast", "reshape", "copy", "transpose", "convert", "get-tuple-element", "opt-barrier")


@dataclass(frozen=True)
class Sent:
    """One collective of the compiled program.

    Attributes:
        kind: as in `autopar.sharding.ways.cost`.
        sizes: (axis of the mesh, how many of its positions one group spans).
        nbytes: the biggest buffer of one device: the whole tensor of an all-reduce, the result of an
            all-gather, the input of a reduce-scatter, the local part in an all-to-all or permute.
        count: how often it runs in one call of the program.
        source: name stack of the operation it belongs to.
    """

    kind: str
    sizes: tuple[tuple[int, int], ...]
    nbytes: float
    count: int
    source: str = ""

    @property
    def axes(self) -> tuple[int, ...]:
        return tuple(axis for axis, _ in self.sizes)


def traffic(module: Module, shape: Sequence[int]) -> tuple[Sent, ...]:
    """Returns all communication of a program compiled for a mesh of this shape (row-major device ids).

    The CPU backend has no reduce-scatter: an all-reduce of which every reader takes a slice is one where
    there is, and counts as one; each result of a tuple all-reduce is judged by itself.
    """
    found: list[Sent] = []
    for name, count in module.runs.items():
        for i in module.computations[name].instructions:
            if (kind := KINDS.get(i.opcode.removesuffix("-start"))) is not None:
                found += _sent(module, module.computations[name], i, kind, count, shape)
    return tuple(found)


def _sent(
    module: Module, where: Computation, i: Instruction, kind: str, count: int, shape: Sequence[int]
) -> Iterator[Sent]:
    members = groups(i.attributes, math.prod(shape))
    spans = _spans(members, shape)
    if not spans:
        return
    arrays = [a.nbytes for a in i.arrays]
    if i.opcode.endswith("-start") and i.tuple:
        arrays = arrays[len(arrays) // 2 :]  # (operands, results)
    if kind == ALL_REDUCE:
        pieces = _pieces(where, i) if i.tuple and not i.opcode.endswith("-start") else [(i.name, sum(arrays))]
        for name, nbytes in pieces:
            yield from _reduced(module, where, name, float(nbytes), spans, count, i.source)
        return
    whole = sum(arrays) * (math.prod(n for _, n in spans) if kind == REDUCE_SCATTER else 1)
    yield Sent(kind, spans, float(whole), count, i.source)


def _spans(members: Groups, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """How many positions of every axis one group (or all pairs of a permute) differs in."""
    used = axes_of(members, shape)
    strides = [math.prod(shape[a + 1 :]) for a in range(len(shape))]
    first = max(members, key=len)
    spans = [(a, len({device // strides[a] % shape[a] for device in first})) for a in used]
    pairs = all(len(group) <= 2 for group in members)
    return tuple((a, shape[a] if pairs and n == 1 else n) for a, n in spans)


def _pieces(where: Computation, i: Instruction) -> Iterator[tuple[str, int]]:
    """(name, bytes) of every result of a tuple-shaped collective that somebody reads."""
    for user in where.users.get(i.name, []):
        if user.opcode == "get-tuple-element":
            yield user.name, user.nbytes


def _reduced(
    module: Module,
    where: Computation,
    name: str,
    nbytes: float,
    spans: tuple[tuple[int, int], ...],
    count: int,
    source: str,
) -> Iterator[Sent]:
    """An all-reduce; or, where only slices are read, the reduce-scatter that it stands for, and the rest."""
    kept = slices(module, where, name)
    parts = 1 if not kept else int(nbytes // max(kept))
    scattered = _subset(spans, parts)
    rest = tuple(s for s in spans if s not in scattered)
    if scattered:
        yield Sent(REDUCE_SCATTER, scattered, nbytes, count, source)
        nbytes /= math.prod(n for _, n in scattered)
    if rest:
        yield Sent(ALL_REDUCE, rest, nbytes, count, source)


def _subset(spans: tuple[tuple[int, int], ...], parts: int) -> tuple[tuple[int, int], ...]:
    """The most axes over which a result cut into so many parts is scattered."""
    subsets = [s for k in range(len(spans), 0, -1) for s in itertools.combinations(spans, k)]
    ways = [(math.prod(n for _, n in s), s) for s in subsets]
    return max(((w, s) for w, s in ways if parts % w == 0), default=(1, ()), key=lambda found: found[0])[1]


def slices(module: Module, where: Computation, name: str) -> tuple[int, ...] | None:
    """Returns the bytes of the slices that are all that is read of a value, or None if more is.

    Views are looked through, and so are the computations of fusions and calls.
    """
    found: list[int] = []
    for user in where.users.get(name, []):
        if user.opcode == "dynamic-slice" and user.operands[0] == name:
            found.append(user.nbytes)
            continue
        inner: tuple[int, ...] | None = None
        if user.opcode in VIEWS and not user.root:
            inner = slices(module, where, user.name)
        elif user.opcode in ("fusion", "call") and len(user.called) == 1:
            body = module.computations[user.called[0]]
            reads = [slices(module, body, p) for p in _parameters(body, user, name)]
            inner = None if None in reads else tuple(n for r in reads if r for n in r)
        if inner is None:
            return None
        found += inner
    return tuple(found) or None


def _parameters(body: Computation, call: Instruction, name: str) -> list[str]:
    """Names under which a fused computation knows one of the operands it was given."""
    positions = {k for k, operand in enumerate(call.operands) if operand == name}
    inputs = (i for i in body.instructions if i.opcode == "parameter")
    return [i.name for i in inputs if _position(i) in positions]


def _position(parameter: Instruction) -> int:
    """Which argument a parameter is: `parameter(3)`."""
    return int(parameter.operands[0]) if parameter.operands else -1
