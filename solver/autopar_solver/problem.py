"""The choice problem: one choice per node, costs on nodes and edges, memory over time.

    minimise    sum_i node_cost[i][x_i] + sum_(a,b) edge_cost[a,b][x_a, x_b]
    subject to  sum over the usage items alive at time t of usage[x_node] <= limit[t]   for every time t

It is the contest problem of ASPLOS/EuroSys 2025 ("intra-operator parallelism for distributed deep learning"),
with several usage items per node and a limit that may vary over time.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from autopar_solver.errors import ProblemError

IntArray: TypeAlias = npt.NDArray[np.int64]
UsageItem: TypeAlias = tuple[int, int, npt.ArrayLike]

FORBIDDEN = 10**18
"""A cost of FORBIDDEN or more marks a choice (node) or a pair of choices (edge) that may not be taken."""

MAX_TOTAL = 2**58
"""The largest total of absolute costs (or usages) a problem may have, so that no sum overflows 64 bits."""


@dataclass(frozen=True, eq=False)
class ChoiceProblem:
    """A choice problem as flat int64 arrays.

    Attributes:
        node_start: (n+1,) node i's choices are node_cost[node_start[i]:node_start[i+1]].
        node_cost: costs of every choice of every node; FORBIDDEN or more means "may not be taken".
        edge_ends: (m, 2) the nodes an edge joins; parallel edges add up, an edge a-a is allowed.
        edge_start: (m+1,) edge e's matrix is edge_cost[edge_start[e]:edge_start[e+1]], row-major by
            (choice of the first end, choice of the second end).
        edge_cost: entries of every matrix, FORBIDDEN or more where the pair may not be taken.
        item_node: (q,) the node a usage item belongs to; a node may have any number of items.
        item_interval: (q, 2) half-open time steps [start, stop) in which the item is alive; start == stop is
            empty.
        item_start: (q+1,) item r's usage per choice is item_usage[item_start[r]:item_start[r+1]].
        item_usage: bytes (any unit), not negative.
        limit: (horizon,) the limit at every time step, or an empty array when there is none.
    """

    node_start: IntArray
    node_cost: IntArray
    edge_ends: IntArray
    edge_start: IntArray
    edge_cost: IntArray
    item_node: IntArray
    item_interval: IntArray
    item_start: IntArray
    item_usage: IntArray
    limit: IntArray

    def __post_init__(self) -> None:
        validate(self)

    @classmethod
    def build(
        cls,
        node_costs: Sequence[npt.ArrayLike],
        edges: Sequence[tuple[int, int]] = (),
        edge_costs: Sequence[npt.ArrayLike] = (),
        usage: Sequence[Iterable[UsageItem]] | None = None,
        limit: int | npt.ArrayLike | None = None,
    ) -> "ChoiceProblem":
        """Returns the problem given as one array per node, one matrix per edge and usage items per node.

        Args:
            node_costs: per node, its cost per choice (integers; FORBIDDEN for a choice that may not be
                taken).
            edges: the two ends of every edge.
            edge_costs: per edge, a matrix (choices of the first end x choices of the second end).
            usage: per node, any number of (start, stop, usage per choice), half-open in time steps.
            limit: one limit for every time step, one per time step, or None for no limit.

        Raises:
            ProblemError: a shape, an interval, an end or a size is wrong; says which.
        """
        usage = [()] * len(node_costs) if usage is None else usage
        if len(usage) != len(node_costs):
            raise ProblemError(
                f"usage has {len(usage)} entries for {len(node_costs)} nodes; give one list per node"
            )
        if len(edges) != len(edge_costs):
            raise ProblemError(
                f"{len(edges)} edges but {len(edge_costs)} cost matrices; give one matrix per edge"
            )
        nodes = [as_ints(c, f"costs of node {i}") for i, c in enumerate(node_costs)]
        matrices = [as_ints(c, f"costs of edge {e}") for e, c in enumerate(edge_costs)]
        for e, ((a, b), matrix) in enumerate(zip(edges, matrices)):
            if not (0 <= a < len(nodes) and 0 <= b < len(nodes)):
                raise ProblemError(f"edge {e} joins nodes {a} and {b}, but there are {len(nodes)} nodes")
            shape = (nodes[a].size, nodes[b].size)
            if matrix.shape != shape and matrix.shape != (shape[0] * shape[1],):
                raise ProblemError(f"costs of edge {e} ({a}-{b}) have shape {matrix.shape}, expected {shape}")
        items = [(i, int(s), int(t), u) for i, of_node in enumerate(usage) for s, t, u in of_node]
        used = [as_ints(u, f"a usage of node {i}") for i, _, _, u in items]
        horizon = max((t for _, _, t, _ in items), default=0)
        return cls(
            *flatten([c.ravel() for c in nodes]),
            np.array(edges, dtype=np.int64).reshape(-1, 2),
            *flatten([c.ravel() for c in matrices]),
            np.array([i for i, _, _, _ in items], dtype=np.int64),
            np.array([(s, t) for _, s, t, _ in items], dtype=np.int64).reshape(-1, 2),
            *flatten([u.ravel() for u in used]),
            expand_limit(limit, horizon),
        )

    @property
    def num_nodes(self) -> int:
        """The number of nodes."""
        return len(self.node_start) - 1

    @property
    def num_edges(self) -> int:
        """The number of edges."""
        return len(self.edge_ends)

    @cached_property
    def num_choices(self) -> IntArray:
        """(n,) the number of choices of every node."""
        return np.diff(self.node_start)

    @cached_property
    def horizon(self) -> int:
        """The number of time steps: the largest stop of an item."""
        return int(self.item_interval[:, 1].max(initial=0))

    def costs(self, node: int) -> IntArray:
        """Returns the costs of one node's choices (a view)."""
        return self.node_cost[self.node_start[node] : self.node_start[node + 1]]

    def matrix(self, edge: int) -> IntArray:
        """Returns the cost matrix of one edge (a view)."""
        a, b = self.edge_ends[edge]
        flat = self.edge_cost[self.edge_start[edge] : self.edge_start[edge + 1]]
        return flat.reshape(self.num_choices[a], self.num_choices[b])

    def cost(self, index: npt.ArrayLike) -> int:
        """Returns the exact cost of a choice per node; at least FORBIDDEN if it takes a forbidden entry."""
        x = self._checked(index)
        a, b = self.edge_ends[:, 0], self.edge_ends[:, 1]
        on_nodes = self.node_cost[self.node_start[:-1] + x]
        on_edges = self.edge_cost[self.edge_start[:-1] + x[a] * self.num_choices[b] + x[b]]
        return _exact_sum(on_nodes) + _exact_sum(on_edges)

    def usage(self, index: npt.ArrayLike) -> IntArray:
        """Returns the usage at every time step, (horizon,), for a choice per node."""
        x = self._checked(index)
        used = self.item_usage[self.item_start[:-1] + x[self.item_node]]
        steps = np.zeros(self.horizon + 1, np.int64)
        np.add.at(steps, self.item_interval[:, 0], used)
        np.add.at(steps, self.item_interval[:, 1], -used)
        return np.cumsum(steps)[:-1]

    def check(self, index: npt.ArrayLike) -> list[str]:
        """Returns what is wrong with a choice per node: nothing when it is feasible."""
        found: list[str] = []
        if self.cost(index) >= FORBIDDEN // 2:
            found.append("takes a forbidden choice or pair of choices")
        if len(self.limit):
            over = self.usage(index) - self.limit
            if len(over) and over.max() > 0:
                t = int(over.argmax())
                found.append(f"uses {over[t]} more than the limit of {self.limit[t]} at time step {t}")
        return found

    def least_usage(self) -> IntArray:
        """Returns the usage at every time step if every item took the least it can."""
        least = (
            np.minimum.reduceat(self.item_usage, self.item_start[:-1])
            if len(self.item_node)
            else self.item_node
        )
        steps = np.zeros(self.horizon + 1, np.int64)
        np.add.at(steps, self.item_interval[:, 0], least)
        np.add.at(steps, self.item_interval[:, 1], -least)
        return np.cumsum(steps)[:-1]

    def infeasible_at_once(self) -> str:
        """Returns why no choice can satisfy the limit or a node, or "" if nothing is seen at a glance."""
        if len(self.limit) and self.horizon:
            over = self.least_usage() - self.limit
            t = int(over.argmax())
            if over[t] > 0:
                return (
                    f"the limit of {self.limit[t]} at time step {t} is {over[t]} below the least possible "
                    f"usage there, {self.limit[t] + over[t]}; raise the limit by at least {over[t]}"
                )
        best = np.minimum.reduceat(self.node_cost, self.node_start[:-1]) if self.num_nodes else self.node_cost
        if len(best) and best.max() >= FORBIDDEN:
            return f"every choice of node {int(best.argmax())} is forbidden"
        return ""

    def _checked(self, index: npt.ArrayLike) -> IntArray:
        x = np.asarray(index)
        if x.shape != (self.num_nodes,) or (x.size and not np.issubdtype(x.dtype, np.integer)):
            raise ProblemError(
                f"expected {self.num_nodes} integers, one choice per node, got {x.dtype}{x.shape}"
            )
        wrong = np.flatnonzero((x < 0) | (x >= self.num_choices))
        if len(wrong):
            i = int(wrong[0])
            raise ProblemError(f"node {i}: choice {x[i]} is not one of its {self.num_choices[i]} choices")
        return x.astype(np.int64)

    def __repr__(self) -> str:
        limit = f"limit {self.limit.min()}" if len(self.limit) else "no limit"
        return (
            f"ChoiceProblem({self.num_nodes} nodes, {len(self.node_cost)} choices, {self.num_edges} edges, "
            f"{len(self.item_node)} usage items over {self.horizon} steps, {limit})"
        )


def as_ints(values: npt.ArrayLike, what: str) -> IntArray:
    """Returns values as an int64 array, themselves if they are one; refuses anything that isn't whole numbers
    within 64 bits."""
    try:
        got: npt.NDArray[Any] = np.asarray(values)
    except (ValueError, OverflowError) as error:
        raise ProblemError(f"{what}: not a regular array of integers ({error})") from None
    if got.size == 0:
        return got.astype(np.int64)
    if (
        got.dtype.kind == "f"
        and np.isfinite(got).all()
        and (got == np.rint(got)).all()
        and np.abs(got).max() < 2**53
    ):
        return got.astype(np.int64)
    if got.dtype.kind not in "iu" or (got.dtype.kind == "u" and int(got.max()) > np.iinfo(np.int64).max):
        raise ProblemError(
            f"{what}: expected integers within 64 bits, got {got.dtype}; scale and round costs first"
        )
    return got.astype(np.int64, copy=False)


def flatten(arrays: Sequence[IntArray]) -> tuple[IntArray, IntArray]:
    """Returns (start, flat) for a list of arrays laid end to end."""
    start = np.zeros(len(arrays) + 1, np.int64)
    start[1:] = np.cumsum([a.size for a in arrays], dtype=np.int64)
    return start, np.concatenate(arrays) if arrays else np.zeros(0, np.int64)


def expand_limit(limit: int | npt.ArrayLike | None, horizon: int) -> IntArray:
    """Returns a limit per time step, or an empty array for no limit."""
    if limit is None:
        return np.zeros(0, np.int64)
    each = as_ints(limit, "limit")
    if each.ndim == 0:
        return np.full(horizon, int(each), np.int64)
    if each.ndim != 1 or each.size < horizon:
        raise ProblemError(
            f"limit has shape {each.shape}; give one number, or one for each of {horizon} time steps"
        )
    return each[:horizon].copy()


def validate(p: ChoiceProblem) -> None:
    """Raises ProblemError where the arrays of a problem don't fit each other or could overflow."""
    for name in ("node", "edge", "item"):
        start = getattr(p, f"{name}_start")
        flat = getattr(p, "item_usage" if name == "item" else f"{name}_cost")
        if len(start) < 1 or start[0] != 0 or start[-1] != len(flat) or (np.diff(start) < 0).any():
            raise ProblemError(f"{name}_start must rise from 0 to {len(flat)}")
    n, k = p.num_nodes, np.diff(p.node_start)
    if (k < 1).any():
        raise ProblemError(f"node {int(np.argmin(k))} has no choice")
    ends = p.edge_ends
    if ends.shape != (len(p.edge_start) - 1, 2) or (ends.size and not (ends.min() >= 0 and ends.max() < n)):
        raise ProblemError(
            f"edge ends must be {len(p.edge_start) - 1} pairs of nodes below {n}, got {ends.shape}"
        )
    _same(np.diff(p.edge_start), k[ends[:, 0]] * k[ends[:, 1]], "edge", "costs")
    _validate_items(p, k)
    for what, values in (
        ("costs of nodes", p.node_cost),
        ("costs of edges", p.edge_cost),
        ("usages", p.item_usage),
    ):
        finite = values if what == "usages" else np.where(values < FORBIDDEN, values, 0)
        least = int(finite.min(initial=0))
        sizes = np.abs(finite) if least < 0 else finite
        if least < -MAX_TOTAL or sizes.sum(dtype=np.float64) > MAX_TOTAL:
            raise ProblemError(
                f"the {what} sum to more than 2**58 in size and could overflow; divide them all"
            )


def _validate_items(p: ChoiceProblem, k: IntArray) -> None:
    items, span = p.item_node, p.item_interval
    if len(items) != len(p.item_start) - 1 or span.shape != (len(items), 2):
        raise ProblemError(
            f"{len(p.item_start) - 1} usage items, but {len(items)} nodes and {len(span)} intervals"
        )
    if items.size and not (items.min() >= 0 and items.max() < len(k)):
        raise ProblemError(f"usage item {int(items.argmax())} belongs to node {items.max()} of {len(k)}")
    _same(np.diff(p.item_start), k[items], "usage item", "usages")
    wrong = np.flatnonzero((span[:, 0] < 0) | (span[:, 1] < span[:, 0]))
    if len(wrong):
        s, t = span[wrong[0]]
        raise ProblemError(f"node {items[wrong[0]]}: interval [{s}, {t}) must satisfy 0 <= start <= stop")
    if p.item_usage.size and p.item_usage.min() < 0:
        raise ProblemError(f"a usage is negative ({p.item_usage.min()}); usages must be at least 0")
    if len(p.limit) and len(p.limit) != p.horizon:
        raise ProblemError(f"limit has {len(p.limit)} time steps, the items reach {p.horizon}")


def _same(got: IntArray, expected: IntArray, what: str, of: str) -> None:
    wrong = np.flatnonzero(got != expected)
    if len(wrong):
        e = int(wrong[0])
        raise ProblemError(f"{what} {e} has {got[e]} {of}, expected {expected[e]}")


def _exact_sum(values: IntArray) -> int:
    """Forbidden entries are summed as Python integers: ten of them would overflow 64 bits."""
    forbidden = values >= FORBIDDEN
    return int(values[~forbidden].sum()) + sum(int(v) for v in values[forbidden])
