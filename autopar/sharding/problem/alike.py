"""Equal parts of a deep graph take one decision, so that depth does not grow the problem.

Two nodes are alike when their costs and choices agree and so do, four steps around, their neighbours'
(Weisfeiler–Leman colours). In a stack of layers that makes one class of the inner layers; the first and last
ones stay apart. The merged problem contains every plan that treats like nodes alike, and is exact for those.
How much elementwise kernels read and write does not tell nodes apart: where kernels compute sums of sums each
for themselves (`problem/streams.py`), what comes early is read by all that come later, and no two
layers cost the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from autopar.sharding.problem.assemble import Costs, Floats, Pair, merge

ROUNDS = 4


def share(
    costs: Costs, nodes: Sequence[Floats] | None = None, edges: Mapping[Pair, Floats] | None = None
) -> Costs:
    """Returns the costs with like nodes merged.

    Args:
        nodes, edges: the part of the costs that may differ between like ones (`assemble.uneven`).
    """
    own = costs.nodes if nodes is None else tuple(a - b for a, b in zip(costs.nodes, nodes, strict=True))
    between = costs.edges | {pair: costs.edges[pair] - seconds for pair, seconds in (edges or {}).items()}
    return merge(costs, colours(replace(costs, nodes=own, edges=between), ROUNDS))


def colours(costs: Costs, rounds: int) -> list[int]:
    """Returns a class number per node, counted in order of appearance."""
    memo: dict[int, int] = {}
    equal: dict[tuple[bytes, tuple[int, ...]], int] = {}

    def digest(x: Floats) -> int:
        if id(x) not in memo:
            exact = x.tobytes(), x.strides
            if exact not in equal:
                equal[exact] = hash((np.round(x * 1e12) + 0.0).tobytes())  # no zeros with a sign
            memo[id(x)] = equal[exact]
        return memo[id(x)]

    held = {key: x.tobytes() for key, x in {id(item.nbytes): item.nbytes for item in costs.items}.items()}
    usage: list[list[tuple[bool, bytes]]] = [[] for _ in costs.nodes]
    for item in costs.items:
        usage[item.node].append((item.lasting, held[id(item.nbytes)]))
    near: list[list[tuple[int, int, int]]] = [[] for _ in costs.nodes]
    for (a, b), seconds in costs.edges.items():
        near[a].append((b, digest(seconds), 0))
        near[b].append((a, digest(seconds), 1))
    now = [
        hash((like, digest(node), tuple(sorted(used))))
        for like, node, used in zip(costs.likes, costs.nodes, usage, strict=True)
    ]
    for _ in range(rounds):
        now = [
            hash((mine, tuple(sorted((now[j], m, s) for j, m, s in near[i])))) for i, mine in enumerate(now)
        ]
    number: dict[int, int] = {}
    return [number.setdefault(colour, len(number)) for colour in now]
