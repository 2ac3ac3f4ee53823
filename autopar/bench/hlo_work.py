"""What one device computes in a compiled program: FLOPs of products, bytes that kernels read and write."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from autopar.bench.hlo import Array, Computation, Instruction, Module
from autopar.bench.hlo_traffic import KINDS

FREE = frozenset(
    [
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id"),
        *("while", "conditional", "call", "async-start", "async-update", "async-done"),
        *("after-all", "add-dependency", "opt-barrier"),
    ]
)
"""Instructions that move nothing themselves; what a loop, call or branch runs is counted where it stands."""


@dataclass(frozen=True)
class Kernel:
    """One kernel: FLOPs of the products in it, bytes it reads and writes, the element type it multiplies."""

    name: str
    flops: float
    nbytes: float
    dtype: str
    count: int


def kernels(module: Module) -> Iterator[Kernel]:
    """Yields every kernel of a program that computes; `count` is how often it runs in one call."""
    for name, count in module.runs.items():
        if name in module.fused:
            continue
        where = module.computations[name]
        for i in where.instructions:
            base = i.opcode.removesuffix("-start").removesuffix("-done")
            if i.opcode not in FREE and base not in KINDS:
                flops, dtype = products(module, where, i)
                yield Kernel(i.name, flops, moved(module, where, i), dtype, count)


def products(module: Module, where: Computation, i: Instruction) -> tuple[float, str]:
    """Returns the FLOPs of matrix products and convolutions in an instruction, and their element type."""
    if i.opcode == "dot":
        return 2.0 * i.arrays[0].size * _contracted(where, i), _operand(where, i, 0).dtype
    if i.opcode == "convolution":
        return _convolution(where, i), _operand(where, i, 0).dtype
    if i.opcode == "custom-call" and (
        dims := re.search(r'lhs_contracting_dimensions":\[([^\]]*)', i.attributes)
    ):
        left = _operand(where, i, 0)
        inner = math.prod(left.shape[int(d)] for d in re.findall(r"\d+", dims[1]))
        return 2.0 * i.arrays[0].size * inner, left.dtype
    flops, dtype = 0.0, i.arrays[0].dtype if i.arrays else "f32"
    if i.opcode == "fusion":
        for name in i.called:
            body = module.computations[name]
            for j in body.instructions:
                more, kind = products(module, body, j)
                flops, dtype = (flops + more, kind) if more else (flops, dtype)
    return flops, dtype


def _operand(where: Computation, i: Instruction, k: int) -> Array:
    return where.by_name[i.operands[k]].arrays[0]


def _contracted(where: Computation, i: Instruction) -> int:
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
    shape = _operand(where, i, 0).shape
    return math.prod(shape[int(d)] for d in dims[1].split(",") if d) if dims else 1


def _convolution(where: Computation, i: Instruction) -> float:
    """2 · results · kernel elements per output feature; a dilated input's zeros multiply nothing."""
    kernel = _operand(where, i, 1)
    labels = re.search(r"dim_labels=\w+_(\w+)->", i.attributes)
    features = kernel.shape[labels[1].index("o")] if labels else 1
    dilated = re.search(r"lhs_dilate=([\dx]+)", i.attributes)
    skipped = math.prod(int(n) for n in dilated[1].split("x")) if dilated else 1
    grouped = re.search(r"batch_group_count=(\d+)", i.attributes)
    per_result = kernel.size / features / skipped / (int(grouped[1]) if grouped else 1)
    return 2.0 * i.arrays[0].size * per_result


def moved(module: Module, where: Computation, i: Instruction) -> float:
    """Returns the bytes a kernel reads and writes: of what it slices or updates in place, only that part."""
    if i.opcode == "dynamic-update-slice":
        return 2.0 * where.by_name[i.operands[1]].nbytes
    if i.opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * i.nbytes
    body = module.computations[i.called[0]] if i.opcode == "fusion" and i.called else None
    reads = (where.by_name[name].nbytes for name in i.operands if name in where.by_name)
    if body is None:
        return float(sum(reads)) + i.nbytes
    inner = {int(p.operands[0]): p for p in body.instructions if p.opcode == "parameter"}
    total = sum(min(whole, _read(body, inner[k])) for k, whole in enumerate(reads))
    return float(total + _written(body))


def _read(body: Computation, parameter: Instruction) -> float:
    """Bytes of a fusion's operand that are read: of one that is only sliced, the slices."""
    users = body.users.get(parameter.name, [])
    if parameter.tuple or not users:
        return parameter.nbytes if users else 0
    parts = 0.0
    for user in users:
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == parameter.name:
            parts += user.nbytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
            continue  # updated in place
        elif user.opcode == "bitcast" and not user.root:
            parts += _read(body, user)
        else:
            return parameter.nbytes
    return parts


def _written(body: Computation) -> int:
    """Bytes a fusion writes: of a result that is updated in place, only the update."""
    total = 0
    for i in body.instructions:
        if not i.root:
            continue
        for result in [body.by_name[name] for name in i.operands] if i.opcode == "tuple" else [i]:
            while result.opcode in ("bitcast", "copy") and result.operands[0] in body.by_name:
                inner = body.by_name[result.operands[0]]
                if inner.opcode not in ("bitcast", "copy", "dynamic-update-slice"):
                    break
                result = inner
            update = result.opcode == "dynamic-update-slice"
            total += body.by_name[result.operands[1]].nbytes if update else result.nbytes
    return total
