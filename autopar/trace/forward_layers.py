"""The function inside a gradient equation, flattened, with a layer for every equation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from autopar.core.graph import Graph
from autopar.trace import compat
from autopar.trace.compat import Atom
from autopar.trace.flat import Builder, Flat, dce, flatten, inline, to_jaxpr
from autopar.trace.grad_equation import GRAD, as_jax_would
from autopar.trace.held_function import function_of

_REMAT = frozenset({"remat2", "remat", "checkpoint"})


@dataclass(frozen=True)
class Forward:
    """The function that is differentiated.

    Attributes:
        flat: its equations; custom derivatives and remat stay whole. An input is the variable of the
            surrounding trace where that is possible (an operand passed twice has a variable of its own for
            each place).
        operands: what the surrounding trace passes, one per input.
        wrt: the inputs to differentiate for.
    """

    flat: Flat
    operands: tuple[Atom, ...]
    wrt: tuple[Var, ...]


def forward_of(equation: JaxprEqn) -> Forward:
    """Returns the function held by a GRAD equation."""
    function, wrt = function_of(equation), equation.params["wrt"]
    names: dict[Var, Var] = {}
    for i in (*wrt, *(i for i in range(len(equation.invars)) if i not in wrt)):
        a = equation.invars[i]
        if isinstance(a, Var) and a not in names.values():
            names[function.inputs[i]] = a
    flat = expand_gradients(dce(_renamed_inputs(function, names)))
    return Forward(flat, tuple(equation.invars), tuple(flat.inputs[i] for i in wrt))


def _renamed_inputs(flat: Flat, names: dict[Var, Var]) -> Flat:
    def read(a: Atom) -> Atom:
        return names.get(a, a) if isinstance(a, Var) else a

    return replace(
        flat,
        inputs=tuple(names.get(v, v) for v in flat.inputs),
        outputs=tuple(map(read, flat.outputs)),
        equations=tuple(e.replace(invars=[read(a) for a in e.invars]) for e in flat.equations),
    )


def expand_gradients(flat: Flat, top: bool = True) -> Flat:
    """Returns `flat` with gradient equations differentiated as a whole: those inside loops and branches, and
    if `top` all.
    """
    if not any((e.primitive is GRAD and top) or _inside(e) for e in flat.equations):
        return flat
    builder = Builder(constants=list(flat.constants))
    env: dict[Var, Atom] = {}
    for equation, mark in zip(flat.equations, flat.marks):
        operands = [env.get(a, a) if isinstance(a, Var) else a for a in equation.invars]
        if equation.primitive is GRAD and top:
            avals = [a.aval for a in operands]
            closed = jax.make_jaxpr(lambda *x, e=equation: as_jax_would(*x, **e.params))(*avals)
            stack = equation.source_info.name_stack
            results = inline(builder, closed, operands, mark, keep=compat.DIFFERENTIABLE, stack=stack)
            env.update(zip(equation.outvars, results))
        elif equation.primitive is GRAD:
            builder.add(equation.replace(invars=operands), mark)
        else:
            params = {k: _expanded(v) for k, v in equation.params.items()}
            builder.add(equation.replace(invars=operands, params=params), mark)
    outputs = [env.get(a, a) if isinstance(a, Var) else a for a in flat.outputs]
    return builder.flat(flat.inputs, outputs)


def _inside(equation: JaxprEqn) -> bool:
    """Whether a loop or branch holds a gradient equation."""
    params = equation.params.values() if equation.primitive is not GRAD else ()
    several = (p if isinstance(p, tuple | list) else (p,) for p in params)
    return any(_holds_gradient(param) for each in several for param in each)


def _expanded(param: Any) -> Any:
    if isinstance(param, tuple | list):
        return type(param)(map(_expanded, param)) if any(map(_holds_gradient, param)) else param
    if not _holds_gradient(param):
        return param
    closed = to_jaxpr(expand_gradients(flatten(compat.closed(param), keep=compat.DIFFERENTIABLE)))
    if isinstance(param, ClosedJaxpr):
        return closed
    if closed.consts:
        raise NotImplementedError(
            "autopar.grad inside a rematerialised function that captures arrays; use jax.grad there"
        )
    return closed.jaxpr


def _holds_gradient(param: Any) -> bool:
    if not isinstance(param, ClosedJaxpr | Jaxpr):
        return False
    equations = compat.closed(param).jaxpr.eqns
    return any(e.primitive is GRAD or any(map(_holds_gradient, compat.inner_jaxprs(e))) for e in equations)


@dataclass(frozen=True)
class Assigned:
    """A forward with a layer for every equation.

    Attributes:
        forward: the function, remat that spanned several layers taken off.
        layer: index per equation; None depends on no layer's result.
        names: of the layers.
        remat: indices of layers that the user's own remat covered, where it had to be taken off.
    """

    forward: Forward
    layer: tuple[int | None, ...]
    names: tuple[str | None, ...]
    remat: frozenset[int]


def assign_layers(
    forward: Forward, assign: Callable[[Graph], Graph], build: Callable[[Flat], Graph]
) -> Assigned:
    """Returns the forward with the layers that `assign` gave to the graph of its equations, calls inlined."""
    fine, owner = _opened(forward.flat)
    graph = assign(build(fine))
    assert len(graph.equations) == len(fine.equations), "build must keep every equation"
    layers = [e.layer for e in graph.equations]
    flat, remat = forward.flat, set[int]()
    while True:
        inside: list[set[int]] = [set() for _ in flat.equations]
        for k, i in zip(layers, owner):
            if k is not None:
                inside[i].add(k)
        wide = {
            i for i, ks in enumerate(inside) if len(ks) > 1 and flat.equations[i].primitive.name in _REMAT
        }
        if not wide:
            break
        remat |= {k for i in wide for k in inside[i]}
        flat = _without(flat, wide)
        _, owner = _opened(flat)
    names: tuple[str | None, ...] = graph.layers or (None,)
    chosen = [max(ks, default=None) for ks in inside]
    forward = replace(forward, flat=flat)
    return Assigned(forward, _settled(forward, chosen, len(names)), names, frozenset(remat))


def _opened(flat: Flat) -> tuple[Flat, list[int]]:
    """Returns `flat` with every call inlined, and for each equation the index of the one it came from."""
    return _inlined(flat, range(len(flat.equations)), frozenset())


def _without(flat: Flat, wide: set[int]) -> Flat:
    return _inlined(flat, wide, compat.DIFFERENTIABLE)[0]


def _inlined(flat: Flat, chosen: Any, keep: frozenset[str]) -> tuple[Flat, list[int]]:
    builder, owner, env = Builder(constants=list(flat.constants)), list[int](), dict[Var, Atom]()
    for i, (equation, mark) in enumerate(zip(flat.equations, flat.marks)):
        operands = [env.get(a, a) if isinstance(a, Var) else a for a in equation.invars]
        inner = compat.called(equation) if i in chosen else None
        if inner is None:
            builder.add(equation.replace(invars=operands), mark)
        else:
            stack = equation.source_info.name_stack
            env.update(zip(equation.outvars, inline(builder, inner, operands, mark, keep=keep, stack=stack)))
        owner += [i] * (len(builder.equations) - len(owner))
    outputs = [env.get(a, a) if isinstance(a, Var) else a for a in flat.outputs]
    return builder.flat(flat.inputs, outputs), owner


def _settled(forward: Forward, layer: Sequence[int | None], count: int) -> tuple[int | None, ...]:
    """Returns layers in which nothing reads a later layer, and only what depends on no layer has none."""
    layer = _pushed(forward.flat, layer)
    layer = _pushed(forward.flat, _homes(forward, layer))
    loss = forward.flat.outputs[0]
    for i, equation in enumerate(forward.flat.equations):
        if layer[i] is None and loss in equation.outvars:
            layer[i] = count - 1  # someone must own the loss
    return tuple(layer)


def _pushed(flat: Flat, layer: Sequence[int | None]) -> list[int | None]:
    made: dict[Var, int] = {}
    pushed: list[int | None] = []
    for equation, own in zip(flat.equations, layer):
        floors = [made[a] for a in equation.invars if isinstance(a, Var) and a in made]
        at = max(floors if own is None else [*floors, own]) if floors or own is not None else None
        pushed.append(at)
        if at is not None:
            made.update(dict.fromkeys(equation.outvars, at))
    return pushed


def _homes(forward: Forward, layer: Sequence[int | None]) -> list[int | None]:
    """Returns layers for layer-less reductions of parameters (a weight decay term): where the parameter is
    used first.

    Copied to the reader instead, the whole parameter would travel to the loss's layer and its gradient back.
    """
    first: dict[Var, int] = {}
    for equation, k in zip(forward.flat.equations, layer):
        if k is not None:
            for a in equation.invars:
                if isinstance(a, Var):
                    first[a] = min(k, first.get(a, k))
    sources: dict[Var, set[Var]] = {v: {v} for v in forward.wrt}
    homes = list(layer)
    for i, equation in enumerate(forward.flat.equations):
        read = [a for a in equation.invars if isinstance(a, Var)]
        from_ = set[Var]().union(*(sources.get(a, set()) for a in read))
        shrinks = from_ and max(map(_size, equation.outvars)) < max(map(_size, read))
        if layer[i] is None and shrinks:
            homes[i] = max((first[v] for v in from_ if v in first), default=None)
        if from_ and homes[i] is None:
            sources.update((v, from_) for v in equation.outvars)
    return homes


def _size(v: Any) -> int:
    return int(v.aval.size)


def relevant_variables(forward: Forward) -> frozenset[Var]:
    """Returns the variables that depend on something to differentiate for and on which the loss depends."""
    active = {v for v in forward.wrt if is_inexact(v)}
    for equation in forward.flat.equations:
        if any(not isinstance(a, Literal) and a in active for a in equation.invars):
            active.update(v for v in equation.outvars if is_inexact(v))
    live = {a for a in forward.flat.outputs[:1] if isinstance(a, Var)}
    for equation in reversed(forward.flat.equations):
        if any(v in live for v in equation.outvars):
            live.update(a for a in equation.invars if isinstance(a, Var) and a in active)
    return frozenset(active & live)


def is_inexact(v: Var) -> bool:
    """Returns whether a variable is real or complex, so that it has a cotangent."""
    aval: Any = v.aval
    return bool(jnp.issubdtype(aval.dtype, np.inexact))
