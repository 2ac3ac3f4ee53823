"""What the commands do, as functions: targets to plans, the device table."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autopar import cluster as room
from autopar.api.cluster import Cluster
from autopar.api.methods import Auto
from autopar.api.parallelize import parallelize
from autopar.api.plan import Plan
from autopar.core.errors import AutoparError, BadInput
from autopar.trace.gradient import value_and_grad


def plan_target(
    target: str,
    cluster_text: str,
    *,
    batch: int | None = None,
    sequence: int | None = None,
    micro_batches: int | None = None,
    stages: int | None = None,
    schedule: str = "1f1b",
    remat: bool | None = None,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """Returns the plan of a built-in model or of "file.py:function" on a cluster given as a file or short
    form.

    Raises:
        AutoparError: unknown names, bad files, no plan that fits; see the command's help.
    """
    cluster = Cluster.parse(cluster_text)
    method = Auto(micro_batches=micro_batches, schedule=schedule, stages=stages, remat=remat)
    if ".py:" in target:
        if batch or sequence:
            raise BadInput(
                "--batch and --sequence are for built-in models; FUNCTION_args() gives a file's shapes"
            )
        step, args = _from_file(target)
    else:
        step, args = _built_in(target, cluster, batch, sequence)
    return parallelize(step, method=method, cluster=cluster, progress=progress).plan(*args)


def _built_in(name: str, cluster: room.Cluster, batch: int | None, sequence: int | None) -> tuple[Any, Any]:
    """A model of the catalogue. It computes in bfloat16 if any device of the cluster does, else in
    float16."""
    from autopar.models import catalog

    half = all(node.device.supports("bfloat16") for node in cluster.nodes)
    dtype = None if name.startswith("wresnet") else "bfloat16" if half else "float16"
    model = catalog.get(name, batch=batch, sequence=sequence, dtype=dtype, value_and_grad=value_and_grad)
    return model.step, model.args


def _from_file(target: str) -> tuple[Any, tuple[Any, ...]]:
    path, _, name = target.rpartition(":")
    if not Path(path).is_file():
        raise BadInput(f"expected FILE.py:FUNCTION, but there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)
    sys.path.insert(0, str(Path(path).absolute().parent))
    spec.loader.exec_module(module)
    step, args = getattr(module, name, None), getattr(module, f"{name}_args", None)
    if step is None:
        raise BadInput(f"{path} has no function {name}")
    if args is None:
        raise BadInput(
            f"{path} has no function {name}_args; add one that returns the arguments of {name} as a tuple "
            "(jax.ShapeDtypeStruct leaves are enough)"
        )
    return getattr(step, "function", step), tuple(args())


def device_rows() -> list[dict[str, Any]]:
    """Returns the device database as rows: effective rates in TFLOP/s and GB/s, usable memory in GB."""
    rows: list[dict[str, Any]] = []
    for name in room.device_names():
        d = room.device(name)
        rates = {t: rate / 1e12 for t, rate in d.flops}
        half = {t: rates.get(t) for t in ("float16", "bfloat16", "float32")}
        speed = {"GB": d.memory / 1e9, "GB/s": d.bandwidth / 1e9, "link GB/s": d.link / 1e9}
        rows.append({"device": name, **{f"{t} TF/s": r for t, r in half.items()}, **speed})
    return rows


def local_devices() -> str:
    """Returns what this machine has, in words."""
    try:
        return str(Cluster.local())
    except AutoparError as error:
        return str(error)
