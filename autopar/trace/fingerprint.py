"""A name for a step that is the same in every process: a hash of its operations, shapes and parameters."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any

from jax.extend.core import JaxprEqn, Literal

from autopar.trace import compat
from autopar.trace.graph import value
from autopar.trace.kinds import Kinds
from autopar.trace.traced import Traced

_ADDRESS = re.compile(r"0x[0-9a-f]+")


def fingerprint(traced: Traced) -> str:
    """Returns 64 hexadecimal digits, equal for steps that compute the same on the same shapes.

    Layers, phases and source lines don't count; values of captured constants neither, only their shapes.
    """
    return hashlib.sha256("".join(f"{line}\n" for line in _lines(traced)).encode()).hexdigest()


def _lines(traced: Traced) -> Iterable[str]:
    graph = traced.graph
    yield f"inputs {graph.inputs} outputs {graph.outputs} constants {graph.constants} {graph.microbatches}"
    yield from (f"{v} {graph.values[v]}" for v in (*graph.inputs, *graph.constants))
    texts = Kinds.among(traced.equations).each(_kind)
    for i, (node, equation, text) in enumerate(zip(graph.equations, traced.equations, texts, strict=True)):
        literals = [str(a.val) for a in equation.invars if isinstance(a, Literal)]
        yield f"{node.op} {node.inputs} {literals} {text}"
        if i in traced.bodies:
            yield from _lines(traced.bodies[i])


def _kind(equation: JaxprEqn) -> str:
    """Parameters, but for the body of a scan, and results: what equations of one kind have in common."""
    body = compat.scan_of(equation) is not None
    params = _text({k: v for k, v in equation.params.items() if not (body and k == "jaxpr")})
    return f"{params} {' '.join(str(value(v)) for v in equation.outvars)}"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_text(v)}" for k, v in sorted(value.items(), key=str)) + "}"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(_text, value))) + "}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(map(_text, value)) + ")"
    return _ADDRESS.sub("0x", str(value))
