"""One layer of a forward function and its vector-Jacobian product, as two jaxprs with explicit residuals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var, jaxpr_as_fun

from autopar.core.graph import Remat
from autopar.trace import compat
from autopar.trace.compat import Atom
from autopar.trace.waists import parts


@dataclass(frozen=True)
class Layer:
    """Equations of the forward that belong together.

    Attributes:
        index: which layer.
        equations: its own, and copies of layer-less ones that it needs a derivative of.
        inputs: variables read but not made here, in order of first use.
        outputs: variables of its own that later layers or the caller read.
    """

    index: int
    equations: tuple[JaxprEqn, ...]
    inputs: tuple[Var, ...]
    outputs: tuple[Var, ...]

    def reaching(self, targets: Sequence[Var], among: frozenset[Var]) -> list[Var]:
        """Returns the inputs from which some of `targets` can be reached through variables in `among`."""
        live = set(targets)
        for equation in reversed(self.equations):
            if any(v in live for v in equation.outvars):
                live.update(a for a in equation.invars if isinstance(a, Var) and a in among)
        return [v for v in self.inputs if v in live]


def cut(
    equations: Sequence[JaxprEqn],
    layer: Sequence[int | None],
    count: int,
    copied: Callable[[JaxprEqn], bool],
    results: Sequence[Atom],
) -> list[Layer]:
    """Returns the forward's layers.

    Args:
        equations: the whole forward, in order.
        layer: index per equation, None for those that belong to no layer.
        count: how many layers there are.
        copied: whether a layer-less equation is copied into each layer that reads it; the others are read
            from outside.
        results: what the forward returns.
    """
    makers = {v: i for i, e in enumerate(equations) for v in e.outvars}
    members = [_with_copies(equations, layer, k, makers, copied) for k in range(count)]
    readers: dict[Var, set[int]] = {}
    for k, indices in enumerate(members):
        for i in indices:
            for a in equations[i].invars:
                if isinstance(a, Var):
                    readers.setdefault(a, set()).add(k)
    returned = {a for a in results if isinstance(a, Var)}
    layers: list[Layer] = []
    for k, indices in enumerate(members):
        made = {v for i in indices for v in equations[i].outvars}
        read = dict.fromkeys(a for i in indices for a in equations[i].invars if isinstance(a, Var))
        own = [v for i in indices if layer[i] == k for v in equations[i].outvars]
        outputs = [v for v in own if v in returned or readers.get(v, set()) - {k}]
        inputs = [v for v in read if v not in made]
        layers.append(Layer(k, tuple(equations[i] for i in indices), tuple(inputs), tuple(outputs)))
    return layers


def _with_copies(
    equations: Sequence[JaxprEqn],
    layer: Sequence[int | None],
    k: int,
    makers: dict[Var, int],
    copied: Callable[[JaxprEqn], bool],
) -> list[int]:
    indices = {i for i in range(len(equations)) if layer[i] == k}
    pending = list(indices)
    while pending:
        for a in equations[pending.pop()].invars:
            i = makers.get(a) if isinstance(a, Var) else None
            if i is not None and i not in indices and layer[i] is None and copied(equations[i]):
                indices.add(i)
                pending.append(i)
    return sorted(indices)


@dataclass(frozen=True)
class Derivative:
    """A layer as two functions.

    Attributes:
        forward: inputs → outputs, then residuals.
        backward: residuals, then cotangents of `targets` → cotangents of `wanted`; None where nothing is
            differentiated.
        targets: outputs that the loss depends on.
        wanted: inputs that get a cotangent.
    """

    forward: ClosedJaxpr
    backward: ClosedJaxpr | None
    targets: tuple[Var, ...]
    wanted: tuple[Var, ...]


_KEEPS = {
    Remat.PRODUCTS: jax.checkpoint_policies.dots_saveable,
    Remat.FULL: jax.checkpoint_policies.nothing_saveable,
}


def differentiate_layer(layer: Layer, relevant: frozenset[Var], remat: Remat) -> Derivative:
    """Returns the layer's forward with residuals and its backward, traced by `jax.vjp`.

    Args:
        layer: what to differentiate.
        relevant: variables that depend on something to differentiate for and on which the loss depends.
        remat: what to compute again in the backward; the layer's inputs are kept.
    """
    closed = ClosedJaxpr(compat.make_jaxpr(layer.inputs, layer.outputs, layer.equations), ())
    targets = tuple(v for v in layer.outputs if v in relevant)
    wanted = tuple(layer.reaching(targets, relevant))
    if not wanted:
        return Derivative(closed, None, (), ())
    position = {v: i for i, v in enumerate(layer.inputs)}
    differentiable = [layer.outputs.index(v) for v in targets]
    fun = _part_by_part(layer) if remat is Remat.PARTS else jaxpr_as_fun(closed)

    def split(values: Sequence[Any], everything: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        full = list(everything)
        for v, value in zip(wanted, values):
            full[position[v]] = value
        results = fun(*full)
        return [results[i] for i in differentiable], results

    traced = jax.checkpoint(split, policy=_KEEPS[remat]) if remat in _KEEPS else split
    trees: list[Any] = []

    def forward(*everything: Any) -> tuple[Any, Any]:
        values = [everything[position[v]] for v in wanted]
        _, pullback, results = jax.vjp(lambda *w: traced(w, everything), *values, has_aux=True)
        residuals, tree = jax.tree.flatten(pullback)
        trees.append(tree)
        return results, residuals

    ahead = jax.make_jaxpr(forward)(*(v.aval for v in layer.inputs))
    residuals = ahead.out_avals[len(layer.outputs) :]
    back = jax.make_jaxpr(lambda r, c: jax.tree.unflatten(trees[-1], r)(c))(
        residuals, [v.aval for v in targets]
    )
    return Derivative(ahead, back, targets, wanted)


def has_parts(layer: Layer) -> bool:
    """Returns whether a layer has several parts, of which each can be computed again by itself."""
    return max(parts(layer.equations, layer.outputs), default=0) > 0


def _part_by_part(layer: Layer) -> Callable[..., list[Any]]:
    """Returns the layer as a function of its inputs, each part of which is computed again by itself."""
    number = parts(layer.equations, layer.outputs)
    pieces = cut(layer.equations, number, number[-1] + 1, lambda _: False, layer.outputs)
    functions = [
        jax.checkpoint(
            jaxpr_as_fun(ClosedJaxpr(compat.make_jaxpr(each.inputs, each.outputs, each.equations), ())),
            policy=_KEEPS[Remat.FULL],
        )
        for each in pieces
    ]

    def run(*inputs: Any) -> list[Any]:
        values = dict(zip(layer.inputs, inputs, strict=True))
        for each, function in zip(pieces, functions):
            values.update(zip(each.outputs, function(*(values[v] for v in each.inputs)), strict=True))
        return [values[v] for v in layer.outputs]

    return run


def tracebacks(equations: Sequence[JaxprEqn]) -> set[int]:
    """Returns the identities of the places in user code that `equations`, and those inside of them, come
    from.
    """
    found: set[int] = set()
    for equation in equations:
        found.add(id(equation.source_info.traceback))
        for inner in compat.inner_jaxprs(equation):
            found |= tracebacks(inner.jaxpr.eqns)
    return found


def relocated(equation: JaxprEqn, known: set[int], layer: Layer) -> JaxprEqn:
    """Returns `equation`, pointing at the layer's last line if it pointed at no line of the layer (but at
    autopar itself).
    """
    if id(equation.source_info.traceback) in known or not layer.equations:
        return equation
    return equation.replace(source_info=layer.equations[-1].source_info)
