"""Which layer and phase each equation belongs to, read off the names that differentiation leaves in place."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jax.extend.core import JaxprEqn, Literal

from autopar.core.graph import Phase
from autopar.trace import boundary
from autopar.trace.flat import Flat, Mark
from autopar.trace.kinds import Kinds
from autopar.trace.work import contraction_flops

_TRANSFORM = re.compile(r"\w*\(|\)")
_INDEXED = re.compile(r"^(?P<stem>.*?)[_\-]?(?P<index>\d+)(?:\.\w+)?$")
_RECOMPUTED = frozenset({"rematted_computation", "checkpoint", "remat"})
_SHARE = (
    0.05  # a family with less than this share of the products is not one of layers (a head, a projection)
)


def annotate(flat: Flat) -> Flat:
    """Returns `flat` with its marks completed: layers from `layer_boundary` where called, else by name.

    Marks that are there already are kept; what is not known stays None.
    """
    phases = [m.phase or phase_of(e) for e, m in zip(flat.equations, flat.marks)]
    if any(boundary.is_boundary(e) for e in flat.equations):
        layers = boundary.layers(flat.equations, phases)
    else:
        layers = layer_names(flat.equations)
    marks = tuple(
        Mark(old.layer or layer, phase, old.when)
        for old, layer, phase in zip(flat.marks, layers, phases, strict=True)
    )
    return replace(flat, marks=marks)


def phase_of(equation: JaxprEqn) -> Phase | None:
    """Returns FORWARD or BACKWARD for an equation made by differentiation, None for any other."""
    names = str(equation.source_info.name_stack)
    if "transpose(" in names:
        return Phase.BACKWARD
    return Phase.FORWARD if "jvp(" in names else None


def complete_phases(flat: Flat) -> Flat:
    """Returns `flat` with a phase in every mark.

    What feeds a forward equation is forward, what feeds only backward ones backward, the rest apply. Where
    nothing was differentiated, all is forward.
    """
    phases = [m.phase for m in flat.marks]
    if not any(phases):
        phases = [Phase.FORWARD] * len(phases)
    feeding: dict[Phase, set[Any]] = {phase: set() for phase in Phase}
    early = Phase.FORWARD, Phase.BACKWARD
    for i in range(len(phases) - 1, -1, -1):
        equation, known = flat.equations[i], phases[i]
        if known is None:
            fed = (p for p in early if not feeding[p].isdisjoint(equation.outvars))
            known = phases[i] = next(fed, Phase.APPLY)
        feeding[known].update([a for a in equation.invars if not isinstance(a, Literal)])
    pairs = zip(flat.marks, phases, strict=True)
    return replace(flat, marks=tuple(m if m.phase is p else replace(m, phase=p) for m, p in pairs))


def order(flat: Flat) -> tuple[str, ...]:
    """Returns the names of the layers in the order in which the forward equations meet them."""
    forward = [m.layer for m in flat.marks if m.layer is not None and m.phase is not Phase.BACKWARD]
    anywhere = [m.layer for m in flat.marks if m.layer is not None]
    return tuple(dict.fromkeys([*forward, *anywhere]))


@dataclass(frozen=True)
class _Family:
    """Names that differ in a number only: "GPT/Block_0", "GPT/Block_1"…"""

    prefix: tuple[str, ...]
    stem: str


def layer_names(equations: Sequence[JaxprEqn]) -> list[str | None]:
    """Returns per equation the name of its layer, or None.

    The layers are the outermost family of numbered names with at least two members that holds more than half
    of the products' FLOPs; families side by side (encoder and decoder) count together.
    """
    paths = _paths(equations)
    members: dict[_Family, set[str]] = defaultdict(set)
    held: dict[_Family, float] = defaultdict(float)
    total = 0.0
    work: dict[tuple[str, ...], float] = defaultdict(float)
    for path, flops in zip(paths, Kinds.among(equations).each(contraction_flops), strict=True):
        work[path] += flops
    for path, flops in work.items():
        total += flops
        for family, name in _families(path):
            members[family].add(name)
            held[family] += flops
    found = [f for f in members if len(members[f]) > 1 and held[f] >= _SHARE * total]
    for depth in sorted({len(f.prefix) for f in found}):
        chosen = {f for f in found if len(f.prefix) == depth}
        if total and sum(held[f] for f in chosen) > total / 2:
            named = {path: _name(path, chosen) for path in work}
            return _short([named[path] for path in paths])
    return [None] * len(equations)


def _paths(equations: Sequence[JaxprEqn]) -> list[tuple[str, ...]]:
    """Returns `path_of` of each equation; many share a name stack."""
    known: dict[int, tuple[str, ...]] = {}
    for e in equations:
        if id(e.source_info.name_stack) not in known:
            known[id(e.source_info.name_stack)] = path_of(e)
    return [known[id(e.source_info.name_stack)] for e in equations]


def path_of(equation: JaxprEqn) -> tuple[str, ...]:
    """Returns an equation's scopes, outermost first, without transformations: ("GPT", "Block_1", "mlp")."""
    path: list[str] = []
    for part in str(equation.source_info.name_stack).split("/"):
        name = _TRANSFORM.sub("", part)
        if path and name == path[0] and name != part:
            path = []  # what remat recomputes has its absolute name behind that of the backward pass
        if name and name not in _RECOMPUTED:
            path.append(name)
    return tuple(path)


def _families(path: tuple[str, ...]) -> list[tuple[_Family, str]]:
    found = []
    for depth, part in enumerate(path):
        match = _INDEXED.match(part)
        if match:
            found.append((_Family(path[:depth], match["stem"]), match["index"]))
    return found


def _name(path: tuple[str, ...], chosen: set[_Family]) -> str | None:
    for depth, (family, index) in ((len(f.prefix), (f, n)) for f, n in _families(path)):
        if family in chosen:
            part = path[depth]
            match = _INDEXED.match(part)
            assert match is not None
            whole = part[: match.end("index")]  # "Block_1.attend" is Block_1
            return "/".join((*path[:depth], whole)) if index else None
    return None


def _short(names: list[str | None]) -> list[str | None]:
    """Drops the scopes that all names share: "GPT/Block_1" → "Block_1", but keeps "h/3"."""
    split = [n.split("/") for n in dict.fromkeys(names) if n is not None]
    common = 0
    while split and all(len(s) > common + 1 and s[common] == split[0][common] for s in split):
        common += 1
    if any(s[common:][0].isdigit() for s in split) and common:
        common -= 1
    return [None if n is None else "/".join(n.split("/")[common:]) for n in names]
