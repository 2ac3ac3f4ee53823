"""The choice model: nodes that choose, homes of values on nodes, and the reads between them.

A *node* chooses between ways to lay out one thing: an input, an operation, a copy of a value. The *home* of a
value says in which layout it is for every choice of its node; an operation that follows its source puts its
results on the source's node. A *read* says in which layout a node wants a value for every choice of its own:
what it costs to move the value there becomes the cost of the edge. Results of equations that only depend on
constants, and expansions of small values (a bias broadcast over the batch), are *lazy*: they have no home but
are computed wherever they are read, in the reader's layout.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from autopar.core.graph import Alternative, Equation, Loop, OpKind, Phase, Value
from autopar.sharding.ways.grid import Layout
from autopar.sharding.ways.strategies import Op, Ways

Path: TypeAlias = tuple[int, ...]
"""Indices of the loop equations around a scope; () is the region itself."""
Key: TypeAlias = tuple[Path, int]
"""A value: the scope it lives in, and its id there."""
Site: TypeAlias = tuple[Path, int, int]
"""An operand or result: scope, equation index, position."""


@dataclass(frozen=True, slots=True)
class Scope:
    """Where equations live: the region, or the body of a loop.

    Attributes:
        sizes: bytes of each value, as this stage keeps it. kinds: a number that values of one shape and dtype
            share, 0 for scalars.
        trips: per run of the phase.
    """

    path: Path
    values: tuple[Value, ...]
    equations: tuple[Equation, ...]
    sizes: tuple[int, ...]
    kinds: tuple[int, ...]
    trips: int = 1
    phase: Phase | None = None


@dataclass(slots=True)
class Node:
    """Something that chooses. like: nodes with equal `like` have the same choices in the same order."""

    name: str
    choices: int
    like: Hashable
    cost: npt.NDArray[np.float64]
    parents: frozenset[int] = frozenset()


class Home(NamedTuple):
    """A value's layout for each choice of a node."""

    node: int
    layouts: tuple[Layout, ...]


@dataclass(frozen=True, slots=True)
class Read:
    """A node wants a value in a layout.

    Attributes:
        key: the value. source: where it is read from. target: who wants it, and in which layout for each
            choice.
        times: per step. site: the operand it is for, or None for a copy or the body of a loop.
        tie: the value moves to where it is kept from then on.
        lazy: what is really read is a lazy value made of this one.
        copy: the target only offers the value to its readers.
        kernels: ticks of those that compute the value themselves where it lies as wanted: moved, it has to be
            written, and read by each.
        held: of a copy whose layouts are there twice (`Holding`): False: it is read from where it lies for
            the first half of them, True: from the forward's copy for the second.
    """

    key: Key
    source: Home
    target: Home
    phase: Phase
    times: int
    site: Site | None = None
    tie: bool = False
    lazy: bool = False
    copy: bool = False
    kernels: frozenset[int] = frozenset()
    held: bool | None = None


@dataclass(frozen=True, slots=True)
class Holding:
    """A value of the backward that equals one of the forward, and may be taken from what that was moved to.

    Attributes:
        key: of the backward. of: of the forward.
        home: the copy for the readers of the backward; it has each layout twice, moved anew for the backward
            and, in the second half, held since the forward.
    """

    key: Key
    of: Key
    home: Home

    @property
    def node(self) -> int:
        return self.home.node

    def held(self, choice: int) -> bool:
        """Returns whether a choice of the node is to hold what the forward moved."""
        return 2 * choice >= len(self.home.layouts)


@dataclass(frozen=True, slots=True)
class Step:
    """An equation that runs: on which node, and how for each of the node's choices.

    Attributes:
        times: per step. tick: its place in time.
        kind: what it costs (`strategies.kind_of`). fuses: whether its kernel may compute its operands itself:
            elementwise ones and reductions may.
    """

    path: Path
    index: int
    equation: Equation
    node: int
    ways: Ways
    phase: Phase
    times: int
    tick: int
    kind: OpKind
    fuses: bool


@dataclass(frozen=True, slots=True)
class Lazy:
    """A value without a home: made by an equation wherever it is read."""

    op: Op | None
    path: Path
    index: int
    position: int
    sources: tuple[tuple[int, Key], ...]


@dataclass
class Model:
    """Everything the builder found out; see the fields' types.

    Attributes:
        made: homes of results before a tie moved them.
        now: the alternative that is being added. owners: node → the alternative it is part of.
        asked: tick → the alternative whose equation runs then.
        same: homes of one value that have to agree, as far as their alternatives are taken.
        entries: homes from which alternatives read.
        streaming: (node, phase) → seconds per step in which elementwise kernels read and write memory, for
            each choice.
        holdings: what may be held from the forward to the backward instead of being moved again.
    """

    nodes: list[Node] = field(default_factory=list)
    homes: dict[Key, Home] = field(default_factory=dict)
    made: dict[Site, Home] = field(default_factory=dict)
    lazy: dict[Key, Lazy] = field(default_factory=dict)
    wanted: dict[Key, list[tuple[Home, Site | None]]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    scopes: dict[Path, Scope] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    first: dict[Key, int] = field(default_factory=dict)
    uses: dict[Key, list[tuple[int, Phase]]] = field(default_factory=dict)
    ticks: int = 0
    carried: dict[Key, Key] = field(default_factory=dict)
    now: Alternative | None = None
    owners: dict[int, Alternative] = field(default_factory=dict)
    asked: dict[int, Alternative] = field(default_factory=dict)
    same: list[tuple[Home, Home]] = field(default_factory=list)
    entries: dict[tuple[Key, Alternative], Home] = field(default_factory=dict)
    streaming: dict[tuple[int, Phase], npt.NDArray[np.float64]] = field(default_factory=dict)
    holdings: list[Holding] = field(default_factory=list)

    def node(
        self,
        name: str,
        choices: int,
        like: Hashable,
        parents: frozenset[int] = frozenset(),
        owner: Alternative | None = None,
    ) -> int:
        """Adds a node; returns its number. owner: the alternative it is part of, by default `now`."""
        self.nodes.append(Node(name, choices, like, np.zeros(choices), parents))
        owner = owner or self.now
        if owner is not None:
            self.owners[len(self.nodes) - 1] = owner
        return len(self.nodes) - 1

    def loops(self) -> Iterator[tuple[Path, Loop]]:
        """Yields the loops, each with the path of its body."""
        for path in self.scopes:
            if path:
                loop = self.scopes[path[:-1]].equations[path[-1]].loop
                assert loop is not None
                yield path, loop

    def owner(self, key: Key) -> Alternative | None:
        """Returns the alternative that a value is part of."""
        home = self.homes.get(key)
        return None if home is None else self.owners.get(home.node)

    def entry(self, key: Key, when: Alternative) -> Home:
        """Returns where an alternative reads a value that it did not make: as the value lies."""
        if (key, when) not in self.entries:
            home = self.homes[key]
            node = self.node("entry", len(home.layouts), ("entry", home.layouts), owner=when)
            self.entries[key, when] = Home(node, home.layouts)
            self.same.append((home, self.entries[key, when]))
        return self.entries[key, when]

    def value(self, key: Key) -> Value:
        """Returns the value of a key."""
        return self.scopes[key[0]].values[key[1]]

    def nbytes(self, key: Key) -> int:
        """Returns the bytes of a value, as this stage keeps it."""
        return self.scopes[key[0]].sizes[key[1]]

    @functools.cached_property
    def ticks_of(self) -> dict[tuple[Path, int], int]:
        """(scope, index) of each equation that runs → its tick; to be asked for when all steps are known."""
        return {(step.path, step.index): step.tick for step in self.steps}
