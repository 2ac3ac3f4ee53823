"""A name for a step that is the same in every process: a hash of its operations, shapes and parameters."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any

from jax.extend.core import Literal

from autopar.trace.rules import signature
from autopar.trace.traced import Traced

_ADDRESS = re.compile(r"0x[0-9a-f]+")


def fingerprint(traced: Traced) -> str:
    """Returns 64 hexadecimal digits, equal for steps that compute the same on the same shapes.

    Layers, phases and source lines don't count; values of captured constants neither, only their shapes.
    """
    digest = hashlib.sha256()
    for line in _lines(traced, {}):
        digest.update(line.encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _lines(traced: Traced, texts: dict[Any, str]) -> Iterable[str]:
    graph = traced.graph
    yield f"inputs {graph.inputs} outputs {graph.outputs} constants {graph.constants} {graph.microbatches}"
    yield from (f"{v} {graph.values[v]}" for v in (*graph.inputs, *graph.constants))
    for i, (node, equation) in enumerate(zip(graph.equations, traced.equations)):
        literals = [str(a.val) for a in equation.invars if isinstance(a, Literal)]
        key = signature(equation)
        if key not in texts:
            texts[key] = _text(
                {k: v for k, v in equation.params.items() if node.loop is None or k != "jaxpr"}
            )
        results = " ".join(str(graph.values[v]) for v in node.outputs)
        yield f"{node.op} {node.inputs} {literals} {texts[key]} {results}"
        if i in traced.bodies:
            yield from _lines(traced.bodies[i], texts)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_text(v)}" for k, v in sorted(value.items(), key=str)) + "}"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(_text, value))) + "}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(map(_text, value)) + ")"
    return _ADDRESS.sub("0x", str(value))
