"""The function that a gradient equation holds, out of it as a Flat and back."""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend.core import ClosedJaxpr, JaxprEqn

from autopar.core.graph import Phase
from autopar.trace import compat
from autopar.trace.compat import Atom
from autopar.trace.flat import Builder, Flat, Mark, inline


def function_of(equation: JaxprEqn) -> Flat:
    """Returns the function in a GRAD equation, one input per operand.

    Custom derivatives and remat stay whole, other calls are inlined. Its marks say FORWARD, and the layer
    where a pass has cut the function already. Its names lie within those of the equation.
    """
    closed, names = equation.params["jaxpr"], equation.params["layers"]
    inputs = [compat.variable(aval) for aval in closed.in_avals]
    builder = Builder()
    stack = None if names is not None else equation.source_info.name_stack
    outputs = inline(
        builder, closed, inputs, Mark(None, Phase.FORWARD), keep=compat.DIFFERENTIABLE, stack=stack
    )
    if names is not None:
        assert len(names) == len(builder.equations), "a pass marked a function that it had not flattened"
        builder.marks = [Mark(name, Phase.FORWARD) for name in names]
    return builder.flat(inputs, outputs)


def with_function(
    builder: Builder, equation: JaxprEqn, function: Flat, operands: Sequence[Atom], wrt: Sequence[int]
) -> JaxprEqn:
    """Returns a GRAD equation of another function; its results still are those of `equation`.

    Args:
        builder: takes the arrays that the function captures; they become operands.
        equation: the old one.
        function: flat, with absolute names; its marks say which layers are known.
        operands: one per input of `function`.
        wrt: positions of those to differentiate for.
    """
    captured = [builder.constant(v.aval, value) for v, value in function.constants]
    inputs = [*function.inputs, *(v for v, _ in function.constants)]
    name = equation.params["name"]
    jaxpr = ClosedJaxpr(compat.make_jaxpr(inputs, function.outputs, function.equations, name), ())
    layers = tuple(m.layer for m in function.marks)
    params = {"jaxpr": jaxpr, "wrt": tuple(wrt), "name": name, "layers": layers}
    return equation.replace(invars=[*operands, *captured], params=params)
