"""Compiled HLO as data: computations of instructions, and how often each of them runs.

Only what a reader of scheduled, partitioned modules needs: every instruction's arrays, opcode, operands and
attributes, and the trip counts of loops. All shapes in a partitioned module are those of one device.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

BITS = {
    **dict.fromkeys(("s4", "u4"), 4),
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3", "f8e4m3fn", "f8e4m3fnuz", "f8e4m3b11fnuz"), 8),
    **dict.fromkeys(("f8e5m2", "f8e5m2fnuz"), 8),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 16),
    **dict.fromkeys(("s32", "u32", "f32"), 32),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 64),
    "c128": 128,
}
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r"(?:body|condition)=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{\s*"n":\s*"?(\d+)')


@dataclass(frozen=True, slots=True)
class Array:
    """An element type of XLA's and a shape, on one device."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return -(-self.size * BITS[self.dtype] // 8)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: without the percent sign. opcode: "dot", "all-reduce-start", ….
        arrays: of the result; several when it is a tuple (nested ones are flattened).
        tuple: whether the result is a tuple.
        operands: names of instructions of the same computation.
        attributes: the rest of the line.
        root: whether it is its computation's result.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    tuple: bool
    operands: tuple[str, ...]
    attributes: str
    root: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the whole result."""
        return sum(a.nbytes for a in self.arrays)

    @property
    def source(self) -> str:
        """The name stack of the operation it was compiled from, or ""."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations it runs once: of a fusion, call or conditional."""
        branches = _BRANCHES.search(self.attributes)
        names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
        return (*_CALLED.findall(self.attributes), *names)


@dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instruction name → the instructions that read it."""
        found: dict[str, list[Instruction]] = {}
        for i in self.instructions:
            for name in dict.fromkeys(i.operands):
                found.setdefault(name, []).append(i)
        return found


@dataclass(frozen=True)
class Module:
    """A compiled program. entry: name of the computation it begins with."""

    computations: dict[str, Computation]
    entry: str

    @cached_property
    def runs(self) -> Counter[str]:
        """Computation → how often it runs as a program: the entry once, a loop's body once per trip.

        Bodies of fusions count here too; scalar functions that a reduction applies do not. A loop whose
        trip count is unknown counts once.
        """
        times: Counter[str] = Counter()

        def visit(name: str, count: int) -> None:
            times[name] += count
            for i in self.computations[name].instructions:
                if i.opcode == "while":
                    trips = _TRIPS.search(i.attributes)
                    for inner in _LOOP.findall(i.attributes):
                        visit(inner, count * (int(trips[1]) if trips else 1))
                elif i.opcode in ("fusion", "call", "conditional", "async-start"):
                    for inner in i.called:
                        visit(inner, count)

        visit(self.entry, 1)
        return times

    @cached_property
    def fused(self) -> frozenset[str]:
        """Names of computations that are bodies of fusions: their values never reach memory."""
        every = (i for c in self.computations.values() for i in c.instructions)
        return frozenset(name for i in every if i.opcode == "fusion" for name in i.called)


def read(text: str) -> Module:
    """Returns the module that `jax.stages.Compiled.as_text()` printed.

    Raises:
        ValueError: a text without an entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, lines = "", "", list[Instruction]()
    for line in text.splitlines():
        header = None if line.startswith(" ") else _HEADER.match(line)
        if header:
            name, lines = header[2], []
            entry = name if header[1] else entry
        elif line.startswith("}") and name:
            computations[name] = Computation(name, tuple(lines))
            name = ""
        elif name and " = " in line:
            lines.append(_instruction(line.strip()))
    if entry not in computations:
        raise ValueError("expected the text of a compiled HLO module, found no ENTRY computation")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction:
    root = line.startswith("ROOT ")
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _close(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    stop = _close(rest, start)
    operands = tuple(_operands(rest[start + 1 : stop]))
    # layouts such as {1,0:T(8,128)} hold no brackets, so arrays are found anywhere in the type
    arrays = tuple(_arrays(kind))
    return Instruction(
        name.lstrip("%"), rest[:start], arrays, kind.startswith("("), operands, rest[stop + 1 :], root
    )


def _arrays(kind: str) -> Iterator[Array]:
    for dtype, dims in _ARRAY.findall(kind):
        if dtype in BITS:
            yield Array(dtype, tuple(int(n) for n in dims.split(",") if n))


def _operands(text: str) -> list[str]:
    """Names in an operand list; without percent signs they are the last word of every part."""
    found = _NAME.findall(text)
    if found or "%" in text:
        return found
    plain = re.sub(r"/\*.*?\*/", "", text)
    return [m[1] for m in re.finditer(r"(?:^|[\s,])([\w.\-]+)\s*(?=,|$)", plain)]


def _close(text: str, start: int) -> int:
    """Position of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"expected a closing parenthesis in {text[:80]!r}")
