"""Scans over layers cut into runs, and with them the stacked parameters, down to the inputs and results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jax.extend.core import JaxprEqn, Var

from autopar.core.errors import BadInput
from autopar.core.graph import Rule
from autopar.trace import compat, work
from autopar.trace.flat import Flat, dce
from autopar.trace.grad_equation import GRAD
from autopar.trace.held_function import function_of
from autopar.trace.leading import groups
from autopar.trace.scan_pieces import Cutter

Rules = Callable[[JaxprEqn], Rule | None]


@dataclass(frozen=True)
class CutScans:
    """A step whose scans over layers are cut.

    Attributes:
        flat: the step. An input or result that was stacked is several now, its pieces along dim 0.
        inputs: per input of the original, how many it became (1: untouched).
        outputs: per result of the original, the same.
        sizes: how many layers each piece holds.
        notes: where pieces had to be put together again, for people.
    """

    flat: Flat
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    sizes: tuple[int, ...]
    notes: tuple[str, ...] = ()


def find_layer_scans(flat: Flat, rules: Rules, batch_inputs: Sequence[int] = ()) -> int | None:
    """Returns the length of the scans over layers, None if there is no such scan.

    A scan is over layers when what it scans comes from an input of that length that is not the batch
    (directly, or cast or otherwise computed layer by layer). Of several lengths, the one with most work.

    Args:
        flat: a step; a scan in the function of a gradient equation counts as well.
        rules: gives factor rules.
        batch_inputs: positions of the inputs that are no parameters.
    """
    if not _has_scan(flat):
        return None  # without asking for rules of all that leads to none
    held: dict[int, float] = defaultdict(float)
    _count(flat, rules, {v for i, v in enumerate(flat.inputs) if i not in batch_inputs}, held)
    return max(held, key=lambda n: held[n], default=None)


def _has_scan(flat: Flat) -> bool:
    return any(
        _has_scan(function_of(e)) if e.primitive is GRAD else compat.scan_of(e) is not None
        for e in flat.equations
    )


def _count(flat: Flat, rules: Rules, parameters: set[Var], held: dict[int, float]) -> None:
    stacked = dict.fromkeys(parameters, True)
    for equation in flat.equations:
        if equation.primitive is GRAD:
            inner = function_of(equation)
            inside = {v for v, a in zip(inner.inputs, equation.invars) if isinstance(a, Var) and a in stacked}
            _count(inner, rules, inside, held)
            continue
        scan = compat.scan_of(equation)
        if scan is None:
            for group in _groups(equation, rules, None):
                if any(v in stacked for v in group):
                    stacked.update(dict.fromkeys(group, True))
        elif scan.length > 1 and any(a in stacked for a in _scanned(equation) if isinstance(a, Var)):
            held[scan.length] += work.flops(equation)


def _scanned(equation: JaxprEqn) -> Sequence[object]:
    scan = compat.scan_of(equation)
    assert scan is not None
    return equation.invars[scan.consts + scan.carries :]


def _groups(equation: JaxprEqn, rules: Rules, length: int | None) -> list[list[Var]]:
    return groups(equation, None if equation.primitive is GRAD else rules(equation), length)


def cut_scans(
    flat: Flat,
    rules: Rules,
    length: int | None = None,
    pieces: Sequence[int] | None = None,
    batch_inputs: Sequence[int] = (),
) -> CutScans:
    """Returns the step with its scans over layers cut into runs, each run a layer ("scan[3]", "scan[4:6]").

    A run of one layer is the body itself, a longer one a shorter scan. Inputs that are scanned over are cut
    into inputs, and the cut is carried on through whatever treats the layers one by one (optimizers), through
    sums over everything (a global norm) and through other scans of these layers (the backward pass). Anywhere
    else the pieces are concatenated, with a note. A scan inside a gradient equation is cut there, before
    it is differentiated.

    Args:
        flat: a step, calls inlined.
        rules: gives factor rules.
        length: how many layers; None: `find_layer_scans`.
        pieces: layers per run, in order; None: one each.
        batch_inputs: positions of the inputs that are no parameters.
    Raises:
        BadInput: `pieces` do not add up to `length`.
    """
    length = length or find_layer_scans(flat, rules, batch_inputs)
    whole = CutScans(flat, (1,) * len(flat.inputs), (1,) * len(flat.outputs), ())
    if length is None:
        return whole
    sizes = tuple(pieces) if pieces is not None else (1,) * length
    if sum(sizes) != length or min(sizes, default=0) < 1:
        raise BadInput(
            f"a scan over {length} layers was to be cut into runs of {sizes}, which add up to {sum(sizes)}"
        )
    if len(sizes) == 1:
        return whole
    parameters = {v for i, v in enumerate(flat.inputs) if i not in batch_inputs}
    wanted = _Wanted(flat, rules, length, parameters)
    wanted.settle()
    cutter = Cutter(rules, sizes)
    result, inputs, outputs = cutter.cut(wanted, nested=False)
    result = dce(result)
    result.check()
    return CutScans(result, inputs, outputs, sizes, tuple(dict.fromkeys(cutter.notes)))


@dataclass
class _Wanted:
    """Which variables are to be known in pieces, and which scans go over layers; grows to a fixed point.

    Attributes:
        flat: the step, or the function of a gradient equation.
        rules: gives factor rules. length: of the scans.
        parameters: inputs that may make a scan one over layers.
        variables: to be known in pieces.
        scans: indices of the scans over layers.
        inner: index of a gradient equation → the same for its function.
    """

    flat: Flat
    rules: Rules
    length: int
    parameters: set[Var]
    variables: set[Var] = field(default_factory=set)
    scans: set[int] = field(default_factory=set)
    inner: dict[int, _Wanted] = field(default_factory=dict)

    def __post_init__(self) -> None:
        stacked = set(self.parameters)
        self.links: list[list[list[Var]]] = []
        for i, equation in enumerate(self.flat.equations):
            self.links.append([])
            if equation.primitive is GRAD:
                function = function_of(equation)
                from_outside = {
                    v for v, a in zip(function.inputs, equation.invars) if isinstance(a, Var) and a in stacked
                }
                self.inner[i] = _Wanted(function, self.rules, self.length, from_outside)
            elif (scan := compat.scan_of(equation)) is not None:
                if scan.length == self.length and any(a in stacked for a in _scanned(equation)):
                    self.scans.add(i)
            else:
                self.links[i] = _groups(equation, self.rules, self.length)
                stacked.update(v for g in self.links[i] if any(v in stacked for v in g) for v in g)

    def settle(self) -> None:
        """Adds variables until nothing new follows."""
        before = -1
        while before != self.count():
            before = self.count()
            order = range(len(self.flat.equations))
            for i in (*order, *reversed(order)):
                self._visit(i)

    def count(self) -> int:
        """Returns how much is known."""
        return len(self.variables) + len(self.scans) + sum(w.count() for w in self.inner.values())

    def _visit(self, i: int) -> None:
        equation = self.flat.equations[i]
        if i in self.inner:
            self._visit_gradient(equation, self.inner[i])
            return
        for group in self.links[i]:
            if any(v in self.variables for v in group):
                self.variables.update(group)
        scan = compat.scan_of(equation)
        if scan is None or scan.length != self.length:
            return
        scanned = [a for a in _scanned(equation) if isinstance(a, Var)]
        if i in self.scans or any(a in self.variables for a in scanned):
            self.scans.add(i)
            self.variables.update(scanned, equation.outvars[scan.carries :])

    def _visit_gradient(self, equation: JaxprEqn, inner: _Wanted) -> None:
        pairs = [(a, v) for a, v in zip(equation.invars, inner.flat.inputs) if isinstance(a, Var)]
        results = len(inner.flat.outputs)
        pairs += [(o, a) for o, a in zip(equation.outvars, inner.flat.outputs) if isinstance(a, Var)]
        gradients = equation.outvars[results:]
        pairs += [(o, inner.flat.inputs[w]) for o, w in zip(gradients, equation.params["wrt"])]
        inner.variables.update(v for a, v in pairs if a in self.variables)
        inner.settle()
        self.variables.update(a for a, v in pairs if v in inner.variables)
