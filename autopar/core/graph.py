"""The graph of one step: values, equations with factor rules, and the layer and phase each belongs to."""

from __future__ import annotations

import enum
import functools
import math
from dataclasses import dataclass, field
from typing import TypeAlias

from autopar.core.dtypes import itemsize

Dims: TypeAlias = tuple[tuple[int, ...], ...]
"""The factors of each dim of one tensor, major first: ((0,), (1, 2)) is "i, jk"."""


class Phase(enum.StrEnum):
    """When an equation runs: forward and backward once per micro-batch, apply once per step."""

    FORWARD = "forward"
    BACKWARD = "backward"
    APPLY = "apply"


class Remat(enum.StrEnum):
    """What the backward pass of a layer computes again instead of keeping it from the forward."""

    NONE = "none"
    PRODUCTS = "products"  # what matrix products and convolutions made is kept, the rest computed again
    PARTS = "parts"  # what passes between the layer's parts is kept, each part computed again by itself
    FULL = "full"  # the layer's inputs are kept, everything else is computed again


Alternative: TypeAlias = tuple[str, Remat]
"""A layer's name ("" without one), and one of the ways to run it."""


class OpKind(enum.StrEnum):
    """What an equation costs; decided by `trace`, so that no later room asks for an op's name."""

    CONTRACTION = "contraction"  # matrix products and convolutions: FLOPs and memory traffic
    FUSED = "fused"  # elementwise: folded into its neighbours, never kept
    VIEW = "view"  # reshape, transpose, broadcast, cast: moves (almost) nothing
    MEMORY = "memory"  # reductions, gather, scatter, sort, concatenate…: writes its result
    INDEXED = "indexed"  # gather, scatter, slices at an index: touches only the part that is indexed
    LOOP = "loop"  # has a body (scan)
    OPAQUE = "opaque"  # no rule: replicated, with a note
    EITHER = "either"  # one of its operands: what the alternative made that is taken


class Combine(enum.StrEnum):
    """How a per-micro-batch value becomes one value per step."""

    MEAN = "mean"
    SUM = "sum"
    CONCAT = "concat"  # along dim 0: per-example results
    LAST = "last"  # equal in every micro-batch

    @property
    def adds(self) -> bool:
        """Whether micro-batches are added up one by one, as they are made."""
        return self in (Combine.MEAN, Combine.SUM)


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor. `name` is the tree path of an argument or result ("params/Block_0/kernel"), else ""."""

    shape: tuple[int, ...]
    dtype: str
    name: str = ""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * itemsize(self.dtype)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Rule:
    """A factor rule in the sense of Shardy: which dims of operands and results move together.

    Attributes:
        operands: per operand (literals included as None) the factors of each dim, major first.
        results: per result the same.
        sizes: the size of each factor.
        reductions: factors summed over: sharding one leaves partial sums (an all-reduce).
        fixed: factors that must stay whole (sorted, scanned, permuted dims).
        inside: sums are read by more of the operation's own work: they can be finished, but not scattered.
        notes: ops for which no rule was known.
    """

    operands: tuple[Dims | None, ...]
    results: tuple[Dims, ...]
    sizes: tuple[int, ...]
    reductions: tuple[int, ...] = ()
    fixed: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    inside: bool = False

    def __str__(self) -> str:
        def tensor(dims: Dims | None) -> str:
            return (
                "_" if dims is None else "[" + ", ".join("".join(map(letter, d)) or "1" for d in dims) + "]"
            )

        text = f"({', '.join(map(tensor, self.operands))})->({', '.join(map(tensor, self.results))})"
        text += " {" + ", ".join(f"{letter(i)}={n}" for i, n in enumerate(self.sizes)) + "}"
        if self.reductions:
            text += f" reduction={{{', '.join(map(letter, self.reductions))}}}" + " inside" * self.inside
        return text + (f" fixed={{{', '.join(map(letter, self.fixed))}}}" if self.fixed else "")


def letter(factor: int) -> str:
    """Returns a printable name of a factor: i, j, k, … then z_1, z_2, …"""
    return chr(ord("i") + factor) if factor < 18 else f"z_{factor - 17}"


@dataclass(frozen=True, slots=True)
class Loop:
    """The body of a scan.

    The body's inputs are the consts, the carries, then one slice of each scanned operand; its outputs are the
    carries, then one slice of each stacked result.
    """

    body: Graph
    length: int
    consts: int
    carries: int


@dataclass(frozen=True, slots=True)
class Equation:
    """One operation.

    Attributes:
        op: name for people (never tested by later rooms).
        inputs: value ids; None for a literal.
        outputs: value ids.
        rule: factor rule, or None (opaque).
        kind: what it costs.
        flops: of the whole operation, unsharded.
        phase: when it runs.
        layer: index into `Graph.layers`, or None: belongs to no layer (a mask, a counter) and is computed
            wherever it is used.
        source: the user's "file.py:41", or "".
        loop: the body, when kind is LOOP.
        costly: elementwise, but too dear to be computed again in every kernel that reads it (exp, tanh,
            division, …): with several readers its result is kept.
        when: the alternative it belongs to, in a graph that holds several for a layer: it runs only if that
            is taken.
    """

    op: str
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]
    rule: Rule | None = None
    kind: OpKind = OpKind.OPAQUE
    flops: float = 0.0
    phase: Phase = Phase.FORWARD
    layer: int | None = None
    source: str = ""
    loop: Loop | None = None
    costly: bool = False
    when: Alternative | None = None

    @property
    def operands(self) -> tuple[int, ...]:
        """The value ids read, without literals."""
        inputs = self.inputs
        return tuple([v for v in inputs if v is not None]) if None in inputs else inputs  # type: ignore[return-value]

    def between(self, inputs: tuple[int | None, ...], outputs: tuple[int, ...]) -> Equation:
        """Returns the same operation on other values (in half the time of `dataclasses.replace`)."""
        return Equation(
            self.op,
            inputs,
            outputs,
            self.rule,
            self.kind,
            self.flops,
            self.phase,
            self.layer,
            self.source,
            self.loop,
            self.costly,
            self.when,
        )

    def placed(self, phase: Phase, layer: int | None) -> Equation:
        """Returns the same equation in another phase or layer (see `between`)."""
        return Equation(
            self.op,
            self.inputs,
            self.outputs,
            self.rule,
            self.kind,
            self.flops,
            phase,
            layer,
            self.source,
            self.loop,
            self.costly,
            self.when,
        )


@dataclass(frozen=True)
class Graph:
    """One step as a flat list of equations in execution order.

    Attributes:
        values: every tensor; ids are positions here.
        equations: in an order in which every operand comes before its use.
        inputs: value ids of the arguments' leaves, in order.
        outputs: value ids of the results' leaves; None for a result that is a literal.
        layers: names of the layers, in forward order.
        aliases: (output position, input position): the output is the next step's input, so layouts agree.
        batch: ids of the inputs that differ per micro-batch (leaves of the batch, the micro-batch's index).
        constants: ids of captured constants: inputs of the program that are not arguments.
        microbatches: how many micro-batches make a step; shapes in the graph are those of one.
        combine: (value id, how) for every per-micro-batch value that the apply phase or the caller reads.
        gradients: (value id of a gradient summed over micro-batches, id of its parameter), where known.
    """

    values: tuple[Value, ...]
    equations: tuple[Equation, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int | None, ...]
    layers: tuple[str, ...] = ()
    aliases: tuple[tuple[int, int], ...] = ()
    batch: tuple[int, ...] = ()
    constants: tuple[int, ...] = ()
    microbatches: int = 1
    combine: tuple[tuple[int, Combine], ...] = ()
    gradients: tuple[tuple[int, int], ...] = field(default=())

    def producers(self) -> dict[int, int]:
        """Returns value id → index of the equation that makes it."""
        return {v: i for i, equation in enumerate(self.equations) for v in equation.outputs}

    @functools.cached_property
    def consumers(self) -> dict[int, list[int]]:
        """Value id → indices of the equations that read it, in order; not to be changed."""
        uses: dict[int, list[int]] = {}
        for i, equation in enumerate(self.equations):
            for v in dict.fromkeys(equation.operands):
                uses.setdefault(v, []).append(i)
        return uses

    def check(self) -> None:
        """Raises AssertionError unless ids are in range, every value is made once and before it is read."""
        known = {*self.inputs, *self.constants}
        for i, equation in enumerate(self.equations):
            for v in equation.operands:
                assert v in known, f"equation {i} ({equation.op}) reads value {v} before it is made"
            for v in equation.outputs:
                assert v not in known, f"equation {i} ({equation.op}) makes value {v} again"
                assert 0 <= v < len(self.values), f"equation {i} ({equation.op}): no value {v}"
                known.add(v)
            if equation.rule is not None:
                assert len(equation.rule.operands) == len(equation.inputs), (
                    f"equation {i}: operands of the rule"
                )
                assert len(equation.rule.results) == len(equation.outputs), (
                    f"equation {i}: results of the rule"
                )
            assert equation.layer is None or 0 <= equation.layer < len(self.layers), f"equation {i}: layer"
        assert all(v is None or v in known for v in self.outputs), "an output is never made"

    def __str__(self) -> str:
        lines = [f"inputs {', '.join(f'v{v}:{self.values[v]}' for v in self.inputs)}"]
        for e in self.equations:
            made = ", ".join(f"v{v}:{self.values[v]}" for v in e.outputs)
            read = ", ".join("·" if v is None else f"v{v}" for v in e.inputs)
            where = f"{e.phase} {'-' if e.layer is None else self.layers[e.layer]}"
            lines.append(f"  {made} = {e.op}({read})  # {where}")
        return "\n".join(
            [*lines, f"outputs {', '.join('·' if v is None else f'v{v}' for v in self.outputs)}"]
        )
