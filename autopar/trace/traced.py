"""Traced: a graph together with the jaxpr equations it stands for, the one noun that carries JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jax.extend.core import JaxprEqn, Literal, Var

from autopar.core.graph import Graph


@dataclass(frozen=True)
class Leaf:
    """One array of the arguments or of the results.

    Attributes:
        path: where it is: "state.params['Block_0']['kernel']".
        shape: of the full batch.
        dtype: its name.
        values: ids of the values it is: one, or several: its pieces along dim 0; none for a literal.
        batch: whether it is cut into micro-batches along dim 0.
        position: which leaf of the whole tree it is; leaves in between are static.
        literal: the result itself, where a result depends on no argument.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    values: tuple[int, ...]
    batch: bool = False
    position: int = 0
    literal: Any = None


@dataclass(frozen=True)
class Traced:
    """A captured function.

    Attributes:
        graph: what the other rooms see.
        equations: parallel to `graph.equations`.
        values: the variable of each value id.
        constants: value id → array, for `graph.constants`.
        bodies: index of a scan's equation → its body.
        in_tree: of `(args, kwargs)`, static arguments replaced by None; its static leaves are in `statics`.
        out_tree: of the result.
        leaves: the array leaves of the arguments, in order.
        out_leaves: those of the result.
        statics: position in the argument tree → leaf that is not an array (compared by equality).
        static_args, static_kwargs: arguments that were passed on as they are: position, name → value.
        out_statics: position in the result tree → leaf that is not an array.
        index: id of the input that says which micro-batch it is (an int32 scalar), None if nothing reads it.
        fingerprint: equal for equal steps (operations, shapes, parameters), also in another process.
        name: of the function.
        notes: what a person should know: equations without a rule, and why.
    """

    graph: Graph
    equations: tuple[JaxprEqn, ...]
    values: tuple[Var, ...]
    constants: Mapping[int, Any]
    bodies: Mapping[int, Traced]
    in_tree: Any = None
    out_tree: Any = None
    leaves: tuple[Leaf, ...] = ()
    out_leaves: tuple[Leaf, ...] = ()
    statics: Mapping[int, Any] = field(default_factory=dict)
    static_args: Mapping[int, Any] = field(default_factory=dict)
    static_kwargs: Mapping[str, Any] = field(default_factory=dict)
    out_statics: Mapping[int, Any] = field(default_factory=dict)
    index: int | None = None
    fingerprint: str = ""
    name: str = ""
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises AssertionError unless equations, values and graph tell the same story."""
        graph = self.graph
        graph.check()
        assert len(self.equations) == len(graph.equations) and len(self.values) == len(graph.values)
        assert set(self.constants) == set(graph.constants), "one array per captured constant"
        for i, (equation, node) in enumerate(zip(self.equations, graph.equations)):
            operands = [a for a in equation.invars if not isinstance(a, Literal)]
            assert operands == [self.values[v] for v in node.operands], f"equation {i}: operands"
            assert list(equation.outvars) == [self.values[v] for v in node.outputs], f"equation {i}: results"
            assert (node.loop is not None) == (i in self.bodies), f"equation {i}: body"
            if node.loop is not None:
                self.bodies[i].check()
                assert self.bodies[i].graph == node.loop.body, f"equation {i}: body"
        if self.in_tree is not None:
            fed = [v for leaf in self.leaves for v in leaf.values]
            assert [*fed, *([] if self.index is None else [self.index])] == list(graph.inputs), "inputs"

    def __str__(self) -> str:
        count = sum(len(b.equations) for b in self.bodies.values())
        inner = f" (+ {count} in loops)" if count else ""
        return (
            f"{self.name or 'step'}: {len(self.equations)} equations{inner}, {len(self.graph.layers)} layers,"
            f" {len(self.leaves)} argument leaves, {self.fingerprint[:12]}"
        )


Assign = Callable[[Graph], Graph]
"""A pass that completes layers and phases and leaves the equations where they are."""
