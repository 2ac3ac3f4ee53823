"""Serving: sequences, a scheduler and KV blocks over a model that the compiler has spread.

`autopar.serve.load(...)` returns a `Model` that generates. Names are looked up when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autopar.serve.engine import Engine as Engine
    from autopar.serve.engine import Options as Options
    from autopar.serve.model import Model as Model
    from autopar.serve.model import load as load
    from autopar.serve.plan import ServingPlan as ServingPlan
    from autopar.serve.request import Request as Request
    from autopar.serve.request import Sampling as Sampling
    from autopar.serve.runner import Buckets as Buckets

_WHERE = {
    "Buckets": "runner",
    "Engine": "engine",
    "Model": "model",
    "Options": "engine",
    "Request": "request",
    "Sampling": "request",
    "ServingPlan": "plan",
    "load": "model",
}
__all__ = sorted(_WHERE)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'autopar.serve' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"autopar.serve.{_WHERE[name]}"), name)
    globals()[name] = value
    return value
