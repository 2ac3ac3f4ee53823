"""`autopar plan NAME --serve`: how a model is served on a cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from autopar.api.cluster import Cluster
from autopar.api.inference import Latency, Throughput, Wanted
from autopar.api.serving import Served
from autopar.cluster import Cluster as Devices
from autopar.core.errors import BadInput
from autopar.io.huggingface import open_directory
from autopar.models.serving import get_serving
from autopar.serve.model import BLOCK_SIZE
from autopar.serve.opening import NATIVE
from autopar.serve.plan import ServingPlan, half_for, serving_plan


def plan_serving(
    target: str,
    cluster_text: str,
    *,
    dtype: str | None = None,
    int8: bool = False,
    length: int | None = None,
    prompt: int | None = None,
    tokens: int | None = None,
    throughput: bool = False,
    latency: float | None = None,
    slack: float | None = None,
    stages: int | None = None,
    across: bool = False,
    progress: Callable[[str], None] = lambda words: None,
) -> ServingPlan:
    """Returns how a known model, or one in a directory, is served on a cluster; nothing of it is allocated.

    Args:
        target: a name or a directory in Hugging Face's format. cluster_text: a file or short form.
        dtype: of weights and cache; None: the model's own 16 bits, float16 where bfloat16 lacks.
        int8: kernels in int8, with a scale per channel.
        length: tokens of the longest sequence; None: the model's, at most 2048. prompt: of the prompt that is
            timed; None: a quarter of that. tokens: that the cache holds at least; None: `length`.
        throughput: rather than latency. latency: seconds a token may take then.
        slack: share of latency that may be given for a larger cache. stages: exactly so many.
        across: let a stage span nodes.

    Raises:
        AutoparError: unknown names, bad files, a cluster that is too small (with the missing gigabytes).
    """
    cluster = Cluster.parse(cluster_text)
    family, config, name = _model(target, cluster, dtype)
    config = dataclasses.replace(config, int8=int8)
    length = min(length or 2048, config.positions)
    least = -(-(tokens or length) // BLOCK_SIZE) + 1
    if latency is not None and not throughput:
        raise BadInput("--latency limits what --throughput may cost; give both")
    goal = Throughput(latency) if throughput else Latency() if slack is None else Latency(slack)
    served = Served(family, config, 2, BLOCK_SIZE, np.dtype(config.param_dtype))
    found, _ = serving_plan(
        served,
        cluster,
        name=name,
        wanted=Wanted(goal, least, stages, across),
        length=length,
        prompt=min(prompt or max(1, length // 4), length),
        say=progress,
    )
    return found


def _model(target: str, cluster: Devices, dtype: str | None) -> tuple[Any, Any, str]:
    def opened(kind: str) -> tuple[str, Any, Any, str]:
        if Path(target).is_dir():
            found = open_directory(target, dtype=kind, random=True)
            return found.family, found.module, found.config, found.name
        serving = get_serving(target, dtype=kind)
        return serving.family, serving.module, serving.config, target

    native = NATIVE.get(opened("float16")[0], "float16")
    _, module, config, name = opened(dtype or half_for(cluster, native))
    return module.DECODER, config, name
