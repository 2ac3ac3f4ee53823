"""Differentiation by layers: a gradient equation becomes each layer's forward and each layer's backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from autopar.core.graph import Graph, Phase, Remat
from autopar.trace import boundary
from autopar.trace.compat import Atom
from autopar.trace.either import Remats, either, own, ways
from autopar.trace.flat import Builder, Flat, Mark, dce, inline
from autopar.trace.forward_layers import (
    Assigned,
    assign_layers,
    expand_gradients,
    forward_of,
    is_inexact,
    relevant_variables,
)
from autopar.trace.grad_equation import GRAD, grad, value_and_grad
from autopar.trace.layer_vjp import Derivative, Layer, cut, has_parts, relocated, tracebacks
from autopar.trace.rename import keep_names
from autopar.trace.sinking import sunk
from autopar.trace.twins import Differentiator

__all__ = ["GRAD", "differentiate", "grad", "gradient_equations", "value_and_grad"]


def gradient_equations(flat: Flat) -> list[int]:
    """Returns the positions of the equations that `value_and_grad` and `grad` left at the top level of
    `flat`.
    """
    return [i for i, e in enumerate(flat.equations) if e.primitive is GRAD]


def differentiate(
    flat: Flat,
    assign: Callable[[Graph], Graph],
    build: Callable[[Flat], Graph],
    remat: Remats = False,
) -> Flat:
    """Returns `flat` without gradient equations: in their place each layer's forward, then each layer's
    backward.

    The function in a gradient equation is flattened and cut into layers; each layer is differentiated by
    itself with `jax.vjp`. Every new equation carries an exact mark. Cotangents that several layers contribute
    to a value are summed in the backward of the layer that made it; a parameter's, if several layers use it,
    in the apply phase: the sum is linear, so it may happen once per step instead of once per micro-batch. An
    equation without a layer that parameters flow through (a cast) is copied into each layer that reads it;
    any other stays single, marked with the forward phase and no layer.

    Gradient equations inside scan, while and cond are differentiated by JAX as a whole. Variables of `flat`
    keep their identity.

    Args:
        flat: a step, as `flatten` returns it.
        assign: completes the graph of the forward: a layer's index for every equation, or None where it
            belongs to none.
        build: makes the graph of the forward, one equation for one. Its inputs are the step's own variables
            where possible.
        remat: what each layer's backward computes again from the layer's inputs.
    Raises:
        NotImplementedError: when one gradient depends on another's result.
    """
    flat = expand_gradients(flat, top=False)
    _refuse_chained(flat)
    while positions := gradient_equations(flat):
        flat = _replaced(flat, positions[0], assign, build, remat)
    # Boundaries have told `assign` what they know; left in place they would be read again, backward pass
    # included.
    return dce(boundary.remove(flat))


def _refuse_chained(flat: Flat) -> None:
    if len(gradient_equations(flat)) < 2:
        return
    tainted: dict[Var, JaxprEqn] = {}
    for equation in flat.equations:
        source = next((tainted[a] for a in equation.invars if isinstance(a, Var) and a in tainted), None)
        if source is not None and equation.primitive is GRAD:
            raise NotImplementedError(
                f"the gradient of {equation.params['name']} depends on that of {source.params['name']} in the"
                " same step; differentiate one of them with jax.grad, or make it two steps"
            )
        source = equation if equation.primitive is GRAD else source
        if source is not None:
            tainted.update(dict.fromkeys(equation.outvars, source))


def _replaced(
    flat: Flat,
    at: int,
    assign: Callable[[Graph], Graph],
    build: Callable[[Flat], Graph],
    remat: Remats,
) -> Flat:
    equation = flat.equations[at]
    assigned = assign_layers(forward_of(equation), assign, build)
    builder = Builder(
        list(flat.equations[:at]), list(flat.marks[:at]), [*flat.constants, *assigned.forward.flat.constants]
    )
    results = _Differentiation(builder, assigned, equation, remat).run()
    env = keep_names(builder, at, results, equation.outvars)

    def renamed(atoms: Sequence[Atom]) -> list[Atom]:
        return [env.get(a, a) if isinstance(a, Var) else a for a in atoms]

    for later, mark in zip(flat.equations[at + 1 :], flat.marks[at + 1 :]):
        same = env.keys().isdisjoint([a for a in later.invars if isinstance(a, Var)])
        builder.add(later if same else later.replace(invars=renamed(later.invars)), mark)
    return builder.flat(flat.inputs, renamed(flat.outputs))


@dataclass(frozen=True)
class _Way:
    """One way to differentiate a layer. residuals: what its backward reads of its forward."""

    remat: Remat
    derivative: Derivative
    residuals: list[Atom]


class _Differentiation:
    """One gradient equation being replaced; lives within `_replaced`."""

    def __init__(self, builder: Builder, assigned: Assigned, equation: JaxprEqn, remat: Remats):
        self.builder, self.assigned, self.equation = builder, assigned, equation
        self.remat = remat
        self.forward = assigned.forward
        self.relevant = relevant_variables(self.forward)
        self.differentiate = Differentiator(self.relevant)
        self.outside: dict[Var, Atom] = dict(zip(self.forward.flat.inputs, self.forward.operands))
        self.contributions: dict[Var, list[Atom]] = {}

    def run(self) -> list[Atom]:
        """Returns the atoms of the equation's results: those of the function, then the gradients."""
        flat = self.forward.flat
        self._add_layerless()
        saved = [self._add_forward(layer) for layer in self._layers()]
        loss = flat.outputs[0]
        if isinstance(loss, Var):
            self.contributions[loss] = [_scalar(1.0, loss)]
        for layer, found in reversed(saved):
            self._add_backward(layer, found)
        results = [a if isinstance(a, Literal) else self._outer(a) for a in flat.outputs]
        return results + [self._total(v, Mark(None, Phase.APPLY)) for v in self.forward.wrt]

    def _outer(self, v: Var) -> Atom:
        return self.outside.get(v, v)

    def _add_layerless(self) -> None:
        for equation, k in zip(self.forward.flat.equations, self.assigned.layer):
            if k is None:
                operands = [self._outer(a) if isinstance(a, Var) else a for a in equation.invars]
                self.builder.add(equation.replace(invars=operands), Mark(None, Phase.FORWARD))

    def _layers(self) -> list[Layer]:
        def copied(equation: JaxprEqn) -> bool:
            return any(v in self.relevant for v in equation.outvars)

        flat, assigned = self.forward.flat, self.assigned
        return cut(flat.equations, assigned.layer, len(assigned.names), copied, flat.outputs)

    def _add_forward(self, layer: Layer) -> tuple[Layer, list[_Way]]:
        name, count = self.assigned.names[layer.index], len(layer.outputs)
        forced = layer.index in self.assigned.remat
        remats = (Remat.FULL,) if forced else _distinct(ways(self.remat, name), layer)
        operands = [self._outer(v) for v in layer.inputs]
        found: list[_Way] = []
        made: list[list[Atom]] = []
        for remat in remats:
            derivative = self.differentiate(layer, remat)
            mark = self._mark(layer, Phase.FORWARD, remat, len(remats))
            start = len(self.builder.equations)
            results = self._inline(derivative.forward, operands, mark, layer)
            found.append(_Way(remat, derivative, results[count:]))
            made.append(self._own(start, results[:count], mark, len(remats)))
        outputs = either(self.builder, made, Mark(name, Phase.FORWARD), self.equation)
        self.outside.update(zip(layer.outputs, outputs))
        return layer, [_passed_on(way, mine, outputs) for way, mine in zip(found, made)]

    def _add_backward(self, layer: Layer, found: list[_Way]) -> None:
        targets, wanted = found[0].derivative.targets, found[0].derivative.wanted
        if not wanted:
            return
        shared = Mark(self.assigned.names[layer.index], Phase.BACKWARD)
        cotangents = [self._total(v, shared) for v in targets]
        made: list[list[Atom]] = []
        for way in found:
            mark = self._mark(layer, Phase.BACKWARD, way.remat, len(found))
            start = len(self.builder.equations)
            assert way.derivative.backward is not None, "it has cotangents to give"
            results = self._inline(
                way.derivative.backward, [*way.residuals, *cotangents], mark, layer, cotangents
            )
            made.append(self._own(start, results, mark, len(found)))
        for v, cotangent in zip(wanted, either(self.builder, made, shared, self.equation)):
            self.contributions.setdefault(v, []).append(cotangent)

    def _mark(self, layer: Layer, phase: Phase, remat: Remat, alternatives: int) -> Mark:
        name = self.assigned.names[layer.index]
        return Mark(name, phase, (name or "", remat) if alternatives > 1 else None)

    def _own(self, start: int, results: Sequence[Atom], mark: Mark, alternatives: int) -> list[Atom]:
        if alternatives == 1:
            return list(results)
        return own(self.builder, start, results, mark, self.equation)

    def _inline(
        self,
        closed: ClosedJaxpr,
        operands: Sequence[Atom],
        mark: Mark,
        layer: Layer,
        cotangents: Sequence[Atom] | None = None,
    ) -> list[Atom]:
        """Adds a layer's forward, or the backward that is given these cotangents; returns its results."""
        start = len(self.builder.equations)
        results = inline(self.builder, closed, operands, mark)
        own, known = self.builder.equations[start:], tracebacks(layer.equations)
        order = range(len(own)) if cotangents is None else sunk(own, cotangents)
        self.builder.equations[start:] = [relocated(own[i], known, layer) for i in order]
        return results

    def _total(self, v: Var, mark: Mark) -> Atom:
        """Returns the sum of the cotangents of `v`, zeros if there is none."""
        total, *others = self.contributions.get(v) or [self._zeros(v, mark)]
        for other in others:
            (total,) = self.builder.bind(lax.add_p, [total, other], [v.aval], {}, mark, self.equation)
        return total

    def _zeros(self, v: Var, mark: Mark) -> Atom:
        aval: Any = v.aval
        params = {"shape": aval.shape, "broadcast_dimensions": (), "sharding": None}
        return self.builder.bind(
            lax.broadcast_in_dim_p, [_scalar(0.0, v)], [v.aval], params, mark, self.equation
        )[0]


def _passed_on(way: _Way, made: Sequence[Atom], outputs: Sequence[Atom]) -> _Way:
    """Returns the way with what it leaves to other layers read from where they read it, not kept twice."""
    names = {a: b for a, b in zip(made, outputs) if isinstance(a, Var)}
    return replace(way, residuals=[names.get(a, a) if isinstance(a, Var) else a for a in way.residuals])


def _distinct(remats: Sequence[Remat], layer: Layer) -> tuple[Remat, ...]:
    """Returns ways to differentiate a layer: computing its only part again computes everything."""
    if Remat.PARTS not in remats or has_parts(layer):
        return tuple(remats)
    return tuple(dict.fromkeys(Remat.FULL if remat is Remat.PARTS else remat for remat in remats))


def _scalar(value: float, like: Var) -> Literal:
    assert is_inexact(like), "only real and complex values have cotangents"
    aval = like.aval.update(shape=())
    return Literal(np.asarray(value, aval.dtype), aval)
