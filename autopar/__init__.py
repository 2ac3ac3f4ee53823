"""autopar: one decorator turns a single-device JAX step into a plan for a whole cluster, and runs it.

Names are looked up when they are first used (PEP 562), so that importing a room that needs no JAX does not
import it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autopar.api.cluster import Cluster as Cluster
    from autopar.api.methods import Auto as Auto
    from autopar.api.methods import CreateState as CreateState
    from autopar.api.methods import DataParallel as DataParallel
    from autopar.api.methods import Follow as Follow
    from autopar.api.methods import Manual as Manual
    from autopar.api.methods import Pipeline as Pipeline
    from autopar.api.methods import ShardParallel as ShardParallel
    from autopar.api.methods import Zero2 as Zero2
    from autopar.api.methods import Zero3 as Zero3
    from autopar.api.parallelize import parallelize as parallelize
    from autopar.api.plan import Plan as Plan
    from autopar.cluster.emulate import emulate as emulate
    from autopar.core.errors import AutoparError as AutoparError
    from autopar.io.checkpoint import restore_checkpoint as restore_checkpoint
    from autopar.io.checkpoint import save_checkpoint as save_checkpoint
    from autopar.runtime.inprocess import InProcess as InProcess
    from autopar.runtime.ray_backend import Ray as Ray
    from autopar.trace.boundary import layer_boundary as layer_boundary
    from autopar.trace.gradient import grad as grad
    from autopar.trace.gradient import value_and_grad as value_and_grad

__version__ = "0.1.0"

_WHERE = {
    "Auto": "api.methods",
    "AutoparError": "core.errors",
    "Cluster": "api.cluster",
    "CreateState": "api.methods",
    "DataParallel": "api.methods",
    "Follow": "api.methods",
    "InProcess": "runtime.inprocess",
    "Manual": "api.methods",
    "Pipeline": "api.methods",
    "Plan": "api.plan",
    "Ray": "runtime.ray_backend",
    "ShardParallel": "api.methods",
    "Zero2": "api.methods",
    "Zero3": "api.methods",
    "emulate": "cluster.emulate",
    "grad": "trace.gradient",
    "layer_boundary": "trace.boundary",
    "parallelize": "api.parallelize",
    "restore_checkpoint": "io.checkpoint",
    "save_checkpoint": "io.checkpoint",
    "value_and_grad": "trace.gradient",
}
__all__ = sorted(_WHERE)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "serve":  # a room that people use by its name: autopar.serve.load(...)
        return importlib.import_module("autopar.serve")
    if name not in _WHERE:
        raise AttributeError(f"module 'autopar' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"autopar.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
