"""Everything that depends on how this version of JAX writes structured equations, or on its private names."""

from __future__ import annotations

import functools
import os
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, DebugInfo, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

Atom: TypeAlias = Var | Literal

DIFFERENTIABLE = frozenset(
    {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "remat2", "remat", "checkpoint"}
)
"""Calls that mean something to differentiation; `flatten(keep=DIFFERENTIABLE)` leaves them whole."""

_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "core_closed_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_vmap_call": "call",
    "composite": "jaxpr",
}


@dataclass(frozen=True)
class Scan:
    """A scan equation taken apart.

    Its operands are consts, initial carries, scanned arrays; its results final carries, stacked arrays.
    """

    body: ClosedJaxpr
    length: int
    consts: int
    carries: int
    reverse: bool
    unroll: int


def closed(jaxpr: Any) -> ClosedJaxpr:
    """Returns `jaxpr` as a ClosedJaxpr (JAX keeps some inner jaxprs open, without constants)."""
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def called(equation: JaxprEqn) -> ClosedJaxpr | None:
    """Returns the jaxpr that a call (jit, remat, custom_jvp…) stands for, None for any other equation."""
    name = _CALLS.get(equation.primitive.name)
    inner = equation.params.get(name) if name else None
    return closed(inner) if isinstance(inner, ClosedJaxpr | Jaxpr) else None


def is_recomputation(equation: JaxprEqn) -> bool:
    """Returns whether a remat equation recomputes in the backward pass, and XLA must not undo that."""
    params = equation.params
    return bool(params.get("differentiated") and params.get("prevent_cse"))


def rounds_nothing(equation: JaxprEqn) -> bool:
    """Returns whether an equation rounds a value to the precision it has and no compiler computes in a higher
    one, as some do for types narrower than float32."""
    if equation.primitive.name != "reduce_precision":
        return False
    aval: Any = equation.outvars[0].aval
    dtype = aval.dtype
    if dtype not in (np.float32, np.float64):
        return False
    bits = np.finfo(dtype)
    same = equation.params["exponent_bits"] == bits.nexp and equation.params["mantissa_bits"] == bits.nmant
    return bool(same)


def is_recomputed(equation: JaxprEqn) -> bool:
    """Returns whether an equation is one that remat evaluates again in the backward pass."""
    return "rematted_computation" in str(equation.source_info.name_stack)


def inner_jaxprs(equation: JaxprEqn) -> list[ClosedJaxpr]:
    """Returns every jaxpr found in the parameters of an equation (bodies, conditions, branches)."""
    found: list[ClosedJaxpr] = []
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr | Jaxpr):
                found.append(closed(item))
    return found


def scan_of(equation: JaxprEqn) -> Scan | None:
    """Returns a scan equation taken apart, None for any other equation."""
    if equation.primitive.name != "scan":
        return None
    params = equation.params
    if "num_consts" in params:
        consts, carries = params["num_consts"], params["num_carry"]
    else:  # jax 0.12 describes operands by flat trees: (consts, carry, xs)
        const_tree, carry_tree, _ = params["ft_in"].unpack()
        consts, carries = len(const_tree), len(carry_tree)
    return Scan(params["jaxpr"], params["length"], consts, carries, params["reverse"], params["unroll"])


def variable(aval: Any) -> Var:
    """Returns a fresh variable of abstract value `aval`."""
    return Var(aval)


def debug_info(name: str, inputs: int, outputs: int) -> DebugInfo:
    """Returns the debug record that JAX wants on every jaxpr, without argument names."""
    return DebugInfo(name, None, ("",) * inputs, ("",) * outputs)  # type: ignore[arg-type]


def make_jaxpr(
    inputs: Sequence[Var], outputs: Sequence[Atom], equations: Sequence[JaxprEqn], name: str = "autopar"
) -> Jaxpr:
    """Returns an open jaxpr of the given equations, its effects gathered from them."""
    effects = frozenset().union(*(e.effects for e in equations))
    info = debug_info(name, len(inputs), len(outputs))
    return Jaxpr((), tuple(inputs), tuple(outputs), list(equations), effects, info)


def evaluate(equation: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Returns the results of one equation for its non-literal operands, under its own context and names."""
    inputs = [variable(a.aval) for a in equation.invars if not isinstance(a, Literal)]
    supply = iter(inputs)
    invars = [a if isinstance(a, Literal) else next(supply) for a in equation.invars]
    results = [variable(v.aval) for v in equation.outvars]
    one = equation.replace(invars=invars, outvars=results)
    return list(jaxpr_as_fun(ClosedJaxpr(make_jaxpr(inputs, results, [one]), ()))(*operands))


def context_of(equation: JaxprEqn) -> Any:
    """Returns what was set around an equation when it was traced; equal contexts are equal or the same."""
    return getattr(equation, "ctx", None)


def scopes_of(equation: JaxprEqn) -> tuple[str, ...]:
    """Returns the names around an equation, outermost first, without transformations."""
    return tuple(part.name for part in equation.source_info.name_stack.stack if _is_scope(part))


def renamed(stack: Any, rename: Callable[[tuple[str, ...]], tuple[str, ...]]) -> Any:
    """Returns a name stack with its names, outermost first, replaced by as many others."""
    names = iter(rename(tuple(part.name for part in stack.stack if _is_scope(part))))
    parts = (type(part)(next(names)) if _is_scope(part) else part for part in stack.stack)
    return type(stack)(tuple(parts))


def _is_scope(part: Any) -> bool:
    return type(part).__name__ == "Scope"


def version() -> tuple[int, ...]:
    """Returns JAX's version as numbers: (0, 10, 2)."""
    return tuple(int(n) for n in jax.__version__.split(".")[:3] if n.isdigit())


@dataclass(frozen=True)
class Line:
    """One line of a source file."""

    file: str
    number: int

    def __str__(self) -> str:
        return f"{self.file.rsplit('/', 1)[-1]}:{self.number}"


def line_of(equation: JaxprEqn) -> Line | None:
    """Returns the user's line that made an equation: the innermost one that lies in no library, else None."""
    traceback: Any = equation.source_info.traceback
    if traceback is None:
        return None
    codes, offsets = traceback.raw_frames()  # much cheaper than the line of every frame
    at = _innermost(code.co_filename for code in codes)
    return (
        None if at is None else Line(codes[at].co_filename, traceback.code_addr2line(codes[at], offsets[at]))
    )


def has_line(equation: JaxprEqn) -> bool:
    """Returns whether `line_of` knows a line."""
    return _has_line(equation.source_info.traceback)


@functools.lru_cache(maxsize=4096)
def _has_line(traceback: Any) -> bool:
    return traceback is not None and _innermost(c.co_filename for c in traceback.raw_frames()[0]) is not None


def innermost(frames: Iterable[tuple[str, int]]) -> Line | None:
    """Returns the first of `frames` (innermost first) in the user's code, else the first outside of JAX."""
    known = list(frames)
    at = _innermost(file for file, _ in known)
    return None if at is None else Line(*known[at])


def _innermost(files: Iterable[str]) -> int | None:
    outside = None
    for i, file in enumerate(files):
        origin = _origin(file)
        if origin == "user":
            return i
        if origin == "library" and outside is None:
            outside = i
    return outside


@functools.cache
def _origin(file: str) -> str:
    """Says whose code a file is: "ours" (or JAX's), a "library"'s or the "user"'s."""
    if file.startswith(("<", _OWN)) or f"{os.sep}jax{os.sep}_src{os.sep}" in file:
        return "ours"
    return "library" if file.startswith(_LIBRARIES) else "user"


_OWN = os.path.dirname(os.path.abspath(__file__)) + os.sep
_LIBRARIES = tuple(
    {sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)


def is_debug(effect: Any) -> bool:
    """Returns whether an effect is that of `jax.debug.print` or `callback`, which may be repeated."""
    return type(effect).__name__ == "DebugEffect"


def with_operands(equation: JaxprEqn, operands: Sequence[Any], params: dict[str, Any]) -> JaxprEqn:
    """Returns an equation like this one on all of `operands` (no literals), with other parameters."""
    return equation.replace(invars=[variable(jax.typeof(x)) for x in operands], params=params)
