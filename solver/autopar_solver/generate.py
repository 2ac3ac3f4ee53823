"""Generators of choice problems like those of auto-sharding, one per regime a solver meets.

A node is a tensor, or an operator's way of computing one; a choice lays its dimensions out over the axes of
a mesh. Its usage is its bytes over the parts it is cut into, alive from its definition to its last use. An
edge costs the bytes that must move when its two ends lay the tensor out differently.
"""

import itertools

import numpy as np

from autopar_solver.problem import FORBIDDEN, ChoiceProblem, IntArray

Layout = tuple[int, ...]
"""Per mesh axis, the dimension it cuts, or -1 for none."""


def layouts(dims: int, axes: int) -> list[Layout]:
    """Returns every way to let each axis cut one dimension or none."""
    return list(itertools.product(range(-1, dims), repeat=axes))


def parts(layout: Layout, mesh: tuple[int, ...]) -> int:
    """Returns into how many parts a layout cuts a tensor."""
    return int(np.prod([size for dim, size in zip(layout, mesh) if dim >= 0], initial=1))


def move_costs(
    a: list[Layout], b: list[Layout], size: int, mesh: tuple[int, ...], rng: np.random.Generator
) -> IntArray:
    """Returns the cost of going from each layout of a to each of b: what every axis that changes must
    move.
    """
    dims = 1 + max(d for layout in a for d in layout)
    turn = np.append(rng.permutation(dims), -1) if rng.random() < 0.3 else np.append(np.arange(dims), -1)
    price = rng.uniform(0.5, 2.0, len(mesh))
    before, after = turn[np.array(a)][:, None, :], np.array(b)[None, :, :]
    cut = [np.array([parts(layout, mesh) for layout in layouts]) for layouts in (a, b)]
    share = size / np.minimum(cut[0][:, None], cut[1][None, :])
    # An axis that gathers moves most, one that re-cuts less, one that only slices least.
    weight = np.where(after == -1, 1.0, np.where(before == -1, 0.4, 0.6))
    return ((before != after) * weight * price * share[:, :, None]).sum(axis=2).astype(np.int64)


def matching(k: int) -> IntArray:
    """Returns the matrix of an edge whose ends must make the same choice."""
    return np.where(np.eye(k, dtype=np.bool_), 0, FORBIDDEN)


def random_sharding(
    nodes: int,
    *,
    seed: int = 0,
    mesh: tuple[int, ...] = (4, 2),
    dims: tuple[int, int] = (1, 3),
    reach: int = 8,
    extra_edges: float = 0.5,
    tied: float = 0.0,
    resident: float = 0.0,
    tightness: float | None = 1.3,
) -> ChoiceProblem:
    """Returns a random problem shaped like the auto-sharding of a layered program.

    Args:
        nodes: how many.
        seed: of the generator.
        mesh: axis sizes.
        dims: the fewest and the most dimensions of a tensor; (dims + 1) ** axes choices.
        reach: how far back an edge may go; the treewidth grows with it.
        extra_edges: edges per node beyond the chain.
        tied: the share of edges that force both ends to one choice (forbidden elsewhere).
        resident: the share of tensors that stay alive to the end, like parameters: they couple all of the
            program.
        tightness: the limit, as a multiple of the least possible peak; None for no limit.
    """
    rng = np.random.default_rng(seed)
    sets: list[list[Layout]] = []
    sizes: list[int] = []
    last = np.arange(nodes) + 1
    edges: list[tuple[int, int]] = []
    matrices: list[IntArray] = []
    for i in range(nodes):
        back = [i - 1] if i else []
        back += [int(i - 1 - rng.integers(0, min(i, reach))) for _ in range(rng.poisson(extra_edges)) if i]
        tie = i > 0 and rng.random() < tied
        sets.append(sets[i - 1] if tie else layouts(int(rng.integers(dims[0], dims[1] + 1)), len(mesh)))
        sizes.append(sizes[i - 1] if tie else int(2 ** rng.uniform(14, 22)))
        for j in back:
            last[j] = max(last[j], i + 1)
            edges.append((j, i))
            same = tie and j == i - 1
            matrices.append(
                matching(len(sets[i])) if same else move_costs(sets[j], sets[i], sizes[j], mesh, rng)
            )
    last[rng.random(nodes) < resident] = nodes
    costs = [compute_costs(options, size, mesh, rng) for options, size in zip(sets, sizes)]
    usage = [
        [(i, int(last[i]), np.array([size // parts(o, mesh) for o in options]))]
        for i, (options, size) in enumerate(zip(sets, sizes))
    ]
    free = ChoiceProblem.build(costs, edges, matrices, usage, None)
    limit = None if tightness is None else int(free.least_usage().max() * tightness)
    return ChoiceProblem.build(costs, edges, matrices, usage, limit)


def compute_costs(
    options: list[Layout], size: int, mesh: tuple[int, ...], rng: np.random.Generator
) -> IntArray:
    """Returns the cost of computing a tensor under each layout: work over parts, and what cutting it entails.

    Cutting costs more than it saves about as often as not, so that memory, not work, forces it.
    """
    work = size * rng.uniform(0.05, 1.0)
    cuts = np.array([sum(dim >= 0 for dim in o) for o in options])
    reduce = size * rng.uniform(0, 0.5, len(options)) * cuts
    return np.array([work / parts(o, mesh) for o in options] + reduce, np.int64)


def small_core(nodes: int = 2000, seed: int = 0) -> ChoiceProblem:
    """Returns a problem most of whose nodes follow from others: presolve leaves a small core."""
    return random_sharding(
        nodes, seed=seed, tied=0.8, reach=40, extra_edges=0.6, resident=0.1, tightness=1.05
    )


def eliminated(nodes: int = 2000, seed: int = 0) -> ChoiceProblem:
    """Returns a problem that forbidden entries almost decide: next to nothing is left after presolve."""
    return random_sharding(
        nodes, seed=seed, mesh=(4,), tied=0.97, extra_edges=0.1, resident=0.2, tightness=1.03
    )


def dense_core(nodes: int = 2000, seed: int = 0) -> ChoiceProblem:
    """Returns a problem without forbidden entries: thousands of nodes stay, coupled by edges and memory."""
    return random_sharding(nodes, seed=seed, reach=60, extra_edges=1.0, resident=0.3, tightness=1.05)


def large_choices(
    nodes: int = 400, seed: int = 0, *, choices: tuple[int, int] = (30, 180), slack: float = 1.02
) -> ChoiceProblem:
    """Returns a small, tightly coupled problem with many choices a node and little memory to spare.

    An edge lets at most one mesh axis change, so that a choice is compatible with few of a neighbour's and a
    node can hardly move alone; choices that need little memory are dear. That there is a feasible choice is
    known from one that was hidden; the limit is its peak.

    Args:
        nodes: how many.
        seed: of the generator.
        choices: the fewest and the most choices of a node.
        slack: the limit as a multiple of the hidden choice's peak usage.
    """
    rng, mesh = np.random.default_rng(seed), (4, 2, 2)
    everything = np.array(layouts(5, len(mesh)))
    lean = np.array([parts(tuple(row), mesh) for row in everything.tolist()])
    sets, hidden = list[IntArray](), list[IntArray]()
    for i in range(nodes):
        before = hidden[i - 1] if i else everything[rng.integers(len(everything))]
        near = everything[((everything != before).sum(axis=1) <= 1) & (lean >= lean.max() // 2)]
        hidden.append(near[rng.integers(len(near))] if len(near) else before)
        size = int(rng.integers(choices[0], choices[1] + 1))
        own = everything[rng.permutation(len(everything))[: size - 1]]
        sets.append(np.unique(np.vstack([own, hidden[i][None]]), axis=0))
    sizes = (2 ** rng.uniform(16, 22, nodes)).astype(np.int64)
    price = rng.uniform(0.5, 2.0, len(mesh))
    last, edges, matrices = np.arange(nodes) + 1, list[tuple[int, int]](), list[IntArray]()
    for i in range(1, nodes):
        for j in {i - 1, *(int(i - 1 - rng.integers(0, min(i, 20))) for _ in range(3))}:
            last[j] = max(last[j], i + 1)
            edges.append((j, i))
            changed = sets[j][:, None, :] != sets[i][None, :, :]
            moved = (changed * price * sizes[j] * rng.uniform(0.2, 1.0)).sum(axis=2).astype(np.int64)
            at_most = max(1, int((hidden[j] != hidden[i]).sum()))
            matrices.append(np.where(changed.sum(axis=2) <= at_most, moved, FORBIDDEN))
    last[rng.random(nodes) < 0.4] = nodes
    costs, usage, used = list[IntArray](), list[list[tuple[int, int, IntArray]]](), np.zeros(nodes, np.int64)
    for i, own in enumerate(sets):
        cut = np.array([parts(tuple(row), mesh) for row in own.tolist()])
        costs.append((sizes[i] * rng.uniform(0.2, 1.0, len(own)) * (1 + np.log2(cut))).astype(np.int64))
        usage.append([(i, int(last[i]), sizes[i] // cut)])
        used[i : last[i]] += usage[i][0][2][(own == hidden[i]).all(axis=1).argmax()]
    return ChoiceProblem.build(costs, edges, matrices, usage, int(used.max() * slack))
