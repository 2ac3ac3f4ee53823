"""Factor rules off a lowered module: asks Shardy for the rule of each StableHLO op and composes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jaxlib.mlir import ir, passmanager
from jaxlib.mlir.dialects import sdy

from autopar.trace.factors import Factors, Pool, covers

_PIPELINE = "builtin.module(func.func(sdy-populate-op-sharding-rules))"
_RULE = "sdy.sharding_rule"
_VIEWS = ("stablehlo.convert", "stablehlo.reshape", "stablehlo.transpose")

Tensor = list[Factors]
"""The factors of each dim of one tensor."""


def with_rules(module: Any) -> Any:
    """Returns a copy of an MLIR module in which every op carries Shardy's rule.

    A copy, because JAX keeps the module it lowered: a pass on it would change what later lowerings return.
    """
    copy = module.operation.clone()
    with module.context:
        passmanager.PassManager.parse(_PIPELINE).run(copy)
    return copy


class Composer:
    """Walks the ops of a module and ties the factors of the tensors that flow between them.

    Attributes:
        pool: the factors.
    """

    def __init__(self, module: Any):
        self._module = module  # owns the ops read below
        self.pool = Pool()
        self._notes: list[tuple[str, Factors]] = []
        self._tensors: dict[Any, Tensor] = {}
        functions = [o for o in module.regions[0].blocks[0].operations if o.operation.name == "func.func"]
        self._functions = {o.attributes["sym_name"].value: o for o in functions}

    def main(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the tensors of the main function's arguments and results."""
        block = self._functions["main"].regions[0].blocks[0]
        arguments = [self._fresh(a) for a in block.arguments]
        return arguments, self._block(block, arguments)

    def ends(self) -> list[str]:
        """Returns the op that makes each result of the main function, behind views of it."""
        *_, last = self._functions["main"].regions[0].blocks[0].operations
        return [_maker(value) for value in last.operation.operands]

    def _fresh(self, value: Any) -> Tensor:
        return [[self.pool.new(n)] for n in _shape(value)]

    def _get(self, value: Any) -> Tensor:
        if value not in self._tensors:
            if _is_constant(value):  # made anew wherever it is wanted, so it ties nothing together
                return self._fresh(value)
            self._tensors[value] = self._fresh(value)
        return self._tensors[value]

    def _block(self, block: Any, arguments: Sequence[Tensor]) -> list[Tensor]:
        for value, tensor in zip(block.arguments, arguments):
            self._tensors[value] = tensor
        for op in block.operations:
            operation = op.operation
            if operation.name in ("func.return", "stablehlo.return"):
                return [self._get(v) for v in operation.operands]
            self._operation(operation)
        return []

    def _operation(self, op: Any) -> None:
        name = op.name
        if name in ("stablehlo.constant", "stablehlo.iota", "sdy.constant"):
            return
        if name == "func.call":
            self._call(op, op.attributes["callee"].value)
        elif name == "stablehlo.composite":
            self._call(op, op.attributes["decomposition"].value)
        elif _RULE in op.attributes:
            self._ruled(op)
        elif name == "stablehlo.while":
            self._while(op)
        elif name in ("stablehlo.case", "stablehlo.if"):
            self._case(op)
        elif name == "stablehlo.optimization_barrier":
            self._tensors.update({r: self._get(v) for v, r in zip(op.operands, op.results)})
        elif name == "chlo.top_k":
            self._top_k(op)
        elif name.startswith("chlo.") and len({_shape(v) for v in [*op.operands, *op.results]}) == 1:
            self._elementwise(op)
        else:
            self._fix(name, *op.operands, *op.results)

    def _call(self, op: Any, callee: str) -> None:
        block = self._functions[callee].regions[0].blocks[0]
        outer = self._tensors  # a function may be called twice: its values are new ones each time
        arguments = [self._get(v) for v in op.operands]
        self._tensors = {}
        results = self._block(block, arguments)
        self._tensors = outer
        self._tensors.update(zip(op.results, results))

    def _while(self, op: Any) -> None:
        carry = [self._get(v) for v in op.operands]
        for region in op.regions:
            for tensor, after in zip(carry, self._block(region.blocks[0], carry)):
                if len(tensor) == len(after):  # the condition's one scalar ties nothing
                    self._tie(tensor, after)
        self._tensors.update(zip(op.results, carry))

    def _case(self, op: Any) -> None:
        results = [self._get(r) for r in op.results]
        for region in op.regions:
            for tensor, made in zip(results, self._block(region.blocks[0], ())):
                self._tie(tensor, made)

    def _elementwise(self, op: Any) -> None:
        first, *rest = [self._get(v) for v in op.operands]
        for tensor in rest:
            self._tie(first, tensor)
        self._tensors.update(dict.fromkeys(op.results, first))

    def _top_k(self, op: Any) -> None:
        operand = self._get(op.operands[0])
        self.pool.fixed.update(operand[-1])
        for result in op.results:
            last = self.pool.new(_shape(result)[-1])
            self.pool.fixed.add(last)
            self._tensors[result] = [*operand[:-1], [last]]

    def _fix(self, name: str, *values: Any) -> None:
        factors = [f for v in values for dim in self._get(v) for f in dim]
        self.pool.fixed.update(factors)
        self._notes.append((name, factors))

    def notes_on(self, tensors: Iterable[Tensor | None]) -> list[str]:
        """Returns the names of the ops on these tensors' factors of which nothing was known."""
        used = set(self.pool.leaves(f for t in tensors if t is not None for dim in t for f in dim))
        return [name for name, factors in self._notes if used & set(self.pool.leaves(factors))]

    def _tie(self, some: Tensor, others: Tensor) -> None:
        for a, b in zip(some, others):
            self.pool.tie(a, b)

    def _ruled(self, op: Any) -> None:
        rule = sdy.OpShardingRuleAttr(op.attributes[_RULE])
        factors = [self.pool.new(n) for n in rule.factor_sizes]
        reductions = {factors[k] for k in rule.reduction_factors}
        whole = {factors[k] for k in [*rule.need_replication_factors, *rule.permutation_factors]}
        if op.name == "stablehlo.reduce" and len(op.results) > 1:
            whole |= reductions  # an argmax has no all-reduce: XLA gathers
        if (
            op.name == "stablehlo.custom_call"
        ):  # a library's kernel: a dim of its own can be cut on neither side
            sides = [rule.operand_mappings, rule.result_mappings]
            used = [{f for t in side for d in _dims(t, factors) for f in d} for side in sides]
            whole |= used[0] ^ used[1]
        self.pool.reduced |= reductions
        self.pool.fixed |= whole
        for value, mapping in zip(op.operands, rule.operand_mappings):
            for dim, part, size in zip(self._get(value), _dims(mapping, factors), _shape(value)):
                if covers(self.pool, part, size):
                    self.pool.tie(dim, part)
                else:  # a slice's, a window's or a concatenation's dim: as long as it is whole, all is well
                    self.pool.fixed.update([*dim, *part])
        for value, mapping in zip(op.results, rule.result_mappings):
            pairs = zip(_dims(mapping, factors), _shape(value))
            self._tensors[value] = [self._dim(part, size) for part, size in pairs]

    def _dim(self, part: Factors, size: int) -> Factors:
        if covers(self.pool, part, size):
            return part
        whole = self.pool.new(size)
        self.pool.fixed.update([*part, whole])
        return [whole]


def _maker(value: Any) -> str:
    """The name of the op behind a value, or "" of an argument."""
    name = getattr(value.owner, "name", "")
    return _maker(value.owner.operands[0]) if name in _VIEWS else name


def _shape(value: Any) -> tuple[int, ...]:
    kind = value.type
    return tuple(kind.shape) if isinstance(kind, ir.RankedTensorType) else ()


def _is_constant(value: Any) -> bool:
    owner = value.owner
    name = getattr(owner, "name", "")  # a block argument's owner is a block, which has no name
    return name in ("stablehlo.constant", "stablehlo.iota", "sdy.constant")


def _dims(mapping: Any, factors: list[int]) -> list[Factors]:
    dims = sdy.TensorMappingAttr(mapping).dim_mappings
    return [[factors[k] for k in sdy.DimMappingAttr(d).factor_indices] for d in dims]
