"""Realistic stage problems, generated: a transformer over nodes of unlike GPUs, by simple closed forms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopar_solver.stage_dp_problem import Array, Objective, StageProblem, SubmeshChoice, TrainStep

TRAIN = TrainStep()


@dataclass(frozen=True)
class DeviceKind:
    """A kind of device, as nodes of equal devices.

    Attributes:
        flops: effective FLOP/s of one device. memory: bytes.
        per_node: devices in a node. link: bytes/s of a device inside its node. network: bytes/s of a node.
    """

    name: str
    flops: float
    memory: float
    per_node: int
    link: float
    network: float


A100_80 = DeviceKind("A100-80GB", 257e12, 80e9, 8, 300e9, 50e9)
A100_40 = DeviceKind("A100-40GB", 257e12, 40e9, 8, 300e9, 50e9)
V100_32 = DeviceKind("V100-32GB", 93e12, 32e9, 8, 150e9, 3.1e9)
V100_16 = DeviceKind("V100-16GB", 93e12, 16e9, 8, 150e9, 3.1e9)
KINDS = (A100_80, A100_40, V100_32, V100_16)


@dataclass(frozen=True)
class Transformer:
    """A decoder-only model: `layers` blocks of `hidden` features; `batch` sequences a micro-batch."""

    layers: int
    hidden: int
    sequence: int = 2048
    batch: int = 1
    vocabulary: int = 50272


def submesh_choices(kinds: tuple[DeviceKind, ...], available: tuple[int, ...]) -> tuple[SubmeshChoice, ...]:
    """Powers of two inside a node, then whole nodes by powers of two, as far as there are devices."""
    choices: list[SubmeshChoice] = []
    for index, (kind, count) in enumerate(zip(kinds, available)):
        devices = 1
        while devices <= count:
            choices.append(SubmeshChoice(index, devices, f"{devices}x{kind.name}"))
            devices *= 2
    return tuple(choices)


def transformer_problem(
    model: Transformer,
    kinds: tuple[DeviceKind, ...],
    available: tuple[int, ...],
    *,
    microbatches: int = 64,
    objective: Objective = TRAIN,
    noise: float = 0.1,
    seed: int = 0,
) -> StageProblem:
    """A stage problem for a transformer on a mixed cluster.

    Times are compute at a per-device efficiency that falls with the number of devices, plus tensor-parallel
    all-reduces inside a node; devices of further nodes split the micro-batch and sync gradients once a step.
    Memory is 16 bytes a parameter (mixed precision with Adam), split over the node, and the activations kept
    for the backward pass.

    Args:
        model: the model. kinds, available: the cluster.
        microbatches: B. objective: what to minimise.
        noise: every layer's cost varies by about this fraction, and every (run, choice) by a third of it.
        seed: of the noise.
    """
    rng = np.random.default_rng(seed)
    choices = submesh_choices(kinds, available)
    tokens = model.batch * model.sequence
    parameters = np.full(model.layers, 12.0 * model.hidden**2)
    parameters[[0, -1]] += model.vocabulary * model.hidden / (1 if model.layers > 1 else 0.5)
    parameters *= 1 + noise * rng.standard_normal(model.layers).clip(-2, 2)
    weights, width = _runs(parameters), _runs(np.ones(model.layers))
    shape = (len(choices), model.layers, model.layers + 1)
    time, fixed, state, kept = (np.empty(shape) for _ in range(4))
    for c, choice in enumerate(choices):
        kind, n = kinds[choice.kind], choice.devices
        local = min(n, kind.per_node)
        nodes = n // local
        activations = 2.0 * tokens / nodes * model.hidden
        compute = (
            8.0 * weights * tokens / (n * kind.flops) * (1 + 0.04 * np.log2(n))
        )  # forward twice (rematerialised)
        reduce = width * 6 * activations * 2 * (local - 1) / local / kind.link
        time[c] = (compute + reduce) * (1 + noise / 3 * rng.standard_normal(shape[1:]).clip(-2, 2))
        sync = 2 * (nodes - 1) / nodes * 2 * weights / kind.network
        fixed[c] = sync + 16 * weights / local / 5e11
        state[c] = 16 * weights / local
        kept[c] = activations * (width + 10) / local * 2
    moved = 2 * 2.0 * tokens * model.hidden
    slowest = np.minimum.outer([k.network for k in kinds], [k.network for k in kinds])
    transfer = np.broadcast_to(moved / slowest + 20e-6, (model.layers, len(kinds), len(kinds)))
    limit = np.array([kinds[c.kind].memory * 0.92 for c in choices])
    return StageProblem(
        choices=choices,
        available=available,
        time=np.maximum(time, 0.0),
        transfer=transfer,
        fixed=fixed,
        memory_fixed=state,
        memory_per_microbatch=kept,
        limit=limit,
        microbatches=microbatches,
        objective=objective,
    )


def _runs(values: Array) -> Array:
    """Sums over every run [i, j) of layers: [L, L+1], 0 where j <= i."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return np.maximum(sums[None, :] - sums[:-1, None], 0.0)
