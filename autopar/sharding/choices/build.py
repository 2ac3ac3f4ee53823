"""From a region to its choice model: which equations choose, which follow, which are lazy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from autopar.core.dtypes import itemsize
from autopar.core.graph import Equation, OpKind, Phase, Value
from autopar.core.mesh import Device
from autopar.sharding.choices import alternatives
from autopar.sharding.choices.model import Home, Key, Lazy, Model, Path, Read, Scope, Site, Step
from autopar.sharding.options import Options
from autopar.sharding.region import Region
from autopar.sharding.ways.grid import Grid, Layout
from autopar.sharding.ways.resharding import table_for
from autopar.sharding.ways.strategies import (
    Op,
    Strategy,
    Tensor,
    Ways,
    enumerate_strategies,
    follow_all,
    kind_of,
    lead_all,
)

EXPANSION = 4
"""An elementwise result at least this many times its sources is computed where it is read, in the reader's
layout.
"""

MINOR = 8
"""A tensor at least this many times smaller than the result does not decide how an elementwise equation is
laid out.
"""

ELEMENTWISE = (OpKind.FUSED, OpKind.VIEW)

FOLLOWING = (*ELEMENTWISE, OpKind.MEMORY, OpKind.INDEXED)
"""What may follow one of its operands."""


class Builder:
    """Builds the model of one region. See `choices/model.py` for the words used."""

    def __init__(self, region: Region, grid: Grid, device: Device, options: Options):
        self.region, self.grid, self.device, self.options = region, grid, device, options
        self.kept = dict(options.dtypes)
        self.kinds: dict[tuple[tuple[int, ...], str], int] = {}
        self.products = dict(options.products)
        self.ties = dict(region.ties)
        self.pinned = {v for v, _ in options.pinned}
        self.model = Model()
        self.state_nodes: set[int] = set()
        self.ops: dict[tuple[object, ...], Op] = {}
        self.ways: dict[int, tuple[Op, Ways]] = {}
        self.followed: dict[tuple[int, int, int], tuple[Op, tuple[Layout, ...], Ways]] = {}

    def build(self) -> Model:
        """Returns the model."""
        scope = self.scope((), self.region.values, self.region.equations)
        self.crossing = _crossing(self.region)
        scanned = _scanned(self.region)
        for v in self.region.state:
            self.free(((), v), "state", whole_first=v in scanned)
            if ((), v) in self.model.homes:
                self.state_nodes.add(self.model.homes[(), v].node)
        for v in self.region.arriving:
            self.free(((), v), "arriving")
        self.walk(scope)
        for v in self.region.leaving:
            self.materialize(((), v), self.phase_made(v))
        if self.options.uniform:
            self.close_stack()
        return self.model

    def phase_made(self, v: int) -> Phase:
        """Returns the phase of the equation that makes a value of the region."""
        return next((e.phase for e in self.region.equations if v in e.outputs), Phase.FORWARD)

    def scope(
        self,
        path: Path,
        values: tuple[Value, ...],
        equations: tuple[Equation, ...],
        trips: int = 1,
        phase: Phase | None = None,
    ) -> Scope:
        """Adds the region, or the body of a loop, to the model."""
        sizes = tuple(map(self.nbytes, values))
        kinds = tuple(
            self.kinds.setdefault((v.shape, v.dtype), len(self.kinds) + 1) if v.shape else 0 for v in values
        )
        self.model.scopes[path] = Scope(path, values, equations, sizes, kinds, trips, phase)
        return self.model.scopes[path]

    # values
    def nbytes(self, value: Value) -> int:
        """Returns the bytes of a value in the element type that this stage keeps it in."""
        return value.size * itemsize(self.kept.get(value.dtype, value.dtype))

    def layouts(self, shape: tuple[int, ...]) -> tuple[Layout, ...]:
        return table_for(shape, self.grid).layouts

    def free(self, key: Key, name: str, whole_first: bool = False) -> None:
        """Gives a tensor a node of its own that may take any layout; `whole_first`: but never cut dim 0."""
        shape = self.model.value(key).shape
        if not shape:
            return
        layouts = tuple(x for x in self.layouts(shape) if not (whole_first and x[0]))
        node = self.model.node(name, len(layouts), ("free", shape, whole_first))
        self.model.homes[key] = Home(node, layouts)
        self.model.first.setdefault(key, self.model.ticks)

    def rank(self, scope: Scope, v: int | None) -> int:
        return 0 if v is None else len(scope.values[v].shape)

    def tensors(self, scope: Scope, values: Iterable[int | None]) -> list[tuple[int, Key]]:
        """Returns position and key of those that are no scalars."""
        path, kinds = scope.path, scope.kinds
        return [(k, (path, v)) for k, v in enumerate(values) if v is not None and kinds[v]]

    # equations
    def walk(self, scope: Scope) -> None:
        """Adds all equations of a scope."""
        for i, equation in enumerate(scope.equations):
            self.model.ticks += 1
            if equation.when is not None:
                alternatives.add(self, scope, i, equation)
            elif equation.kind is OpKind.EITHER:
                alternatives.join(self, scope, equation)
            else:
                self.equation(scope, i, equation)

    def equation(self, scope: Scope, i: int, e: Equation) -> None:
        tensors = self.tensors(scope, e.inputs)
        if not tensors and not self.tensors(scope, e.outputs):
            return
        if e.loop is not None:
            self.loop(scope, i, e)
            return
        homed = [(k, key) for k, key in tensors if key in self.model.homes]
        if e.rule is None:
            if tensors:
                self.opaque(scope, i, e, tensors)
            else:
                self.postpone(scope, i, e, None, ())
            return
        if e.rule.notes:
            self.note(e, f"no rule for {', '.join(e.rule.notes)}: the dims it touches stay whole")
        op = self.op_of(scope, e)
        if op.kind in ELEMENTWISE and (not homed or self.expands(op, homed)):
            self.postpone(scope, i, e, op, tuple(tensors))
            return
        leader = self.leader(scope, e, op, homed)
        if leader is None:
            self.choose(scope, i, e, op, tensors)
        else:
            self.follow(scope, i, e, op, tensors, leader)

    def op_of(self, scope: Scope, e: Equation) -> Op:
        """Returns what the strategies depend on: one object for equations of one rule and shapes."""
        kinds = scope.kinds
        read = [None if v is None else kinds[v] or scope.values[v].dtype for v in e.inputs]
        made = [kinds[v] or scope.values[v].dtype for v in e.outputs]
        key = id(e.rule), e.kind, e.flops, *read, *made
        op = self.ops.get(key)
        if op is None:
            op = self.ops[key] = self.new_op(scope, e)
        return op

    def new_op(self, scope: Scope, e: Equation) -> Op:
        assert e.rule is not None, "only equations with a rule have strategies"
        values = [None if v is None else scope.values[v] for v in e.inputs]
        first = next((v for v in values if v is not None), None)
        given = "float32" if first is None else first.dtype
        rate = self.device.rate(self.products.get(given, self.kept.get(given, given)))
        operands = tuple(
            None if v is None or dims is None else Tensor(v.shape, self.nbytes(v))
            for v, dims in zip(values, e.rule.operands, strict=True)
        )
        outputs = [scope.values[v] for v in e.outputs]
        results = tuple(Tensor(v.shape, self.nbytes(v)) for v in outputs)
        return Op(e.rule, kind_of(e), e.flops, rate, self.device.bandwidth, operands, results)

    def expands(self, op: Op, homed: Sequence[tuple[int, Key]]) -> bool:
        """Returns whether the results are much larger than all that they are made of."""
        return op.written >= EXPANSION * sum([self.model.nbytes(key) for _, key in homed])

    def leader(self, scope: Scope, e: Equation, op: Op, homed: list[tuple[int, Key]]) -> int | None:
        """Returns the operand whose layout the equation follows, or None when it chooses by itself."""
        if op.kind not in FOLLOWING or not homed:
            return None
        size = {k: self.model.nbytes(key) for k, key in homed}
        nodes: dict[int, int] = {}  # node → its largest operand
        for k, key in homed:
            node = self.model.homes[key].node
            if node not in nodes or size[k] > size[nodes[node]]:
                nodes[node] = k
        written = op.written
        if op.kind not in ELEMENTWISE:
            free = not op.rule.fixed and not op.rule.reductions
            shrinks = bool(op.rule.reductions) and MINOR * written <= max(size.values())
            return next(iter(nodes.values())) if len(nodes) == 1 and (free or shrinks) else None
        if len(nodes) == 1:
            return next(iter(nodes.values()))
        major = [n for n, k in nodes.items() if MINOR * size[k] > written]
        if len(major) == 1:
            return nodes[major[0]]
        if e.phase is Phase.APPLY and not scope.path and (kept := self.kept_with(e, nodes)) is not None:
            return nodes[kept]
        for n in major:
            if self.model.nodes[n].parents.issuperset({*major} - {n}):
                return nodes[n]
        return None

    def kept_with(self, e: Equation, nodes: dict[int, int]) -> int | None:
        """Returns the state an elementwise update follows: what its result replaces, else the first it reads.

        The new state has to end in the layout of the old one, so the update is computed there.
        """
        tied = [self.model.homes[(), self.ties[v]].node for v in e.outputs if v in self.ties]
        return next((n for n in [*tied, *(n for n in nodes if n in self.state_nodes)] if n in nodes), None)

    def follow(
        self, scope: Scope, i: int, e: Equation, op: Op, tensors: list[tuple[int, Key]], main: int
    ) -> None:
        """Puts an equation on the node of the operand it follows."""
        home = self.model.homes[dict(tensors)[main]]
        # by identity: hashing an operation and its layouts takes longer than the rest
        key = id(op), main, id(home.layouts)
        if key not in self.followed:
            self.followed[key] = op, home.layouts, follow_all(op, main, home.layouts, self.grid)
        self.run(scope, i, e, op, home.node, self.followed[key][2], tensors)

    def choose(self, scope: Scope, i: int, e: Equation, op: Op, tensors: list[tuple[int, Key]]) -> None:
        """Gives an equation a node of its own."""
        if id(op) not in self.ways:  # by identity, as in `follow`
            self.ways[id(op)] = op, enumerate_strategies(op, self.grid)
        ways = self.ways[id(op)][1]
        if len(ways) == 1 and op.rule.fixed and self.grid.sizes:
            self.note(e, f"none of its dims can be cut: {self.whole(ways[0].seconds)}")
        parents = frozenset(self.model.homes[key].node for _, key in tensors if key in self.model.homes)
        node = self.model.node(
            e.op, len(ways), ("op", op), parents if op.kind in ELEMENTWISE else frozenset()
        )
        self.run(scope, i, e, op, node, ways, tensors)

    def opaque(self, scope: Scope, i: int, e: Equation, tensors: list[tuple[int, Key]]) -> None:
        """Replicates an equation without a rule."""
        whole = [((),) * self.rank(scope, v) for v in e.outputs]
        reads = tuple(None if v is None else ((),) * self.rank(scope, v) for v in e.inputs)
        seconds = sum(self.nbytes(scope.values[v]) for v in e.outputs) / self.device.bandwidth
        self.note(e, f"no sharding rule: {self.whole(seconds)}")
        way = Strategy(reads, tuple(whole), tuple(whole), seconds)
        node = self.model.node(e.op, 1, ("whole", seconds))
        self.run(scope, i, e, None, node, Ways((way,)), tensors)

    def run(
        self,
        scope: Scope,
        i: int,
        e: Equation,
        op: Op | None,
        node: int,
        ways: Ways,
        tensors: Sequence[tuple[int, Key]],
    ) -> None:
        """Records a step, what it reads and where its results are."""
        phase = scope.phase or e.phase
        times = self.region.times(phase) * scope.trips
        self.step(scope, i, op, node, ways, phase, times, self.model.ticks)
        for k, key in tensors:
            if wants := ways.operands[k]:
                self.pull(key, Home(node, wants), (scope.path, i, k), phase, times)
        for j, key in self.tensors(scope, e.outputs):
            site = scope.path, i, j
            self.model.made[site] = Home(node, ways.made[j])
            self.put(key, Home(node, ways.results[j]), site, phase, times)

    def step(
        self,
        scope: Scope,
        i: int,
        op: Op | None,
        node: int,
        ways: Ways,
        phase: Phase,
        times: int,
        tick: int,
    ) -> None:
        """Records that an equation runs. op: None where it has no rule."""
        e = scope.equations[i]
        kind, fuses = (e.kind, e.kind is OpKind.VIEW) if op is None else (op.kind, op.fuses)
        self.model.steps.append(Step(scope.path, i, e, node, ways, phase, times, tick, kind, fuses))

    def put(self, key: Key, home: Home, site: Site, phase: Phase, times: int) -> None:
        """Records where a result is; new state moves to where the old one is kept."""
        self.model.first[key] = self.model.ticks
        if not key[0] and key[1] in self.ties:
            kept = self.model.homes[(), self.ties[key[1]]]
            self.model.reads.append(Read(key, home, kept, phase, times, site, tie=True))
            home = kept
        self.model.homes[key] = home

    def pull(
        self, key: Key, target: Home, site: Site | None, phase: Phase, times: int, lazily: bool = False
    ) -> None:
        """Records that a node wants a value; what a lazy value is made of is wanted in its stead."""
        self.model.uses.setdefault(key, []).append((self.model.ticks, phase))
        source = self.model.homes.get(key)
        if source is not None:
            if source.node != target.node or source.layouts != target.layouts:
                self.model.reads.append(Read(key, source, target, phase, times, site, lazy=lazily))
            return
        lazy = self.model.lazy[key]
        self.model.wanted.setdefault(key, []).append((target, site))
        for k, origin in lazy.sources:
            self.pull(origin, self.through(lazy, k, target), None, phase, times, lazily=True)

    def through(self, lazy: Lazy, operand: int, target: Home) -> Home:
        """Returns how a node wants an operand of a lazy equation, given how it wants the result."""
        assert lazy.op is not None, "a lazy value with sources has a rule"
        ways = lead_all(lazy.op, lazy.position, target.layouts, self.grid)
        return Home(target.node, ways.operands[operand])

    # lazy values
    def postpone(
        self, scope: Scope, i: int, e: Equation, op: Op | None, sources: tuple[tuple[int, Key], ...]
    ) -> None:
        """Makes results lazy, unless something needs them in one place."""
        sources = tuple((k, key) for k, key in sources if op is not None and op.operands[k] is not None)
        for j, v in enumerate(e.outputs):
            if not self.rank(scope, v):
                continue
            key = scope.path, v
            self.model.lazy[key] = Lazy(op, scope.path, i, j, sources)
            self.model.first[key] = self.model.ticks
            settled = not scope.path and (v in self.ties or v in self.crossing or v in self.pinned)
            if settled:
                self.materialize(key, scope.phase or e.phase)

    def materialize(self, key: Key, phase: Phase) -> None:
        """Gives a lazy value a home that may take any layout."""
        lazy = self.model.lazy.pop(key, None)
        if lazy is None:
            return
        scope = self.model.scopes[key[0]]
        value = self.model.value(key)
        times = self.region.times(phase) * scope.trips
        layouts = self.layouts(value.shape)
        node = self.model.node("made", len(layouts), ("free", value.shape, False))
        home = Home(node, layouts)
        if lazy.op is not None:
            ways = lead_all(lazy.op, lazy.position, layouts, self.grid)
            self.step(scope, lazy.index, lazy.op, node, ways, phase, times, self.model.first[key])
            for k, origin in lazy.sources:
                self.pull(origin, self.through(lazy, k, home), (key[0], lazy.index, k), phase, times)
        tick = self.model.first[key]
        self.put(key, home, (key[0], lazy.index, lazy.position), phase, times)
        self.model.first[key] = tick

    # loops
    def loop(self, scope: Scope, i: int, e: Equation) -> None:
        """Adds a loop: its body once, with carries tied; body inputs choose their layouts."""
        assert e.loop is not None
        phase, body = scope.phase or e.phase, e.loop.body
        trips = scope.trips * e.loop.length
        inner = self.scope((*scope.path, i), body.values, body.equations, trips, phase)
        outside = self.region.times(phase) * scope.trips
        for k, (v, b) in enumerate(zip(e.inputs, body.inputs, strict=True)):
            self.enter(scope, inner, i, k, v, b, k >= e.loop.consts + e.loop.carries, phase, outside)
        for c in body.constants:
            if self.rank(inner, c):
                self.model.lazy[inner.path, c] = Lazy(None, inner.path, 0, 0, ())
        start = self.model.ticks
        self.walk(inner)
        for k, (b, v) in enumerate(zip(body.outputs, e.outputs, strict=True)):
            carry = body.inputs[e.loop.consts + k] if k < e.loop.carries else None
            self.leave(scope, inner, (scope.path, i, k), b, v, carry, phase, start)

    def enter(
        self,
        scope: Scope,
        inner: Scope,
        i: int,
        k: int,
        v: int | None,
        b: int,
        sliced: bool,
        phase: Phase,
        times: int,
    ) -> None:
        """Connects operand k of a loop with the body input b."""
        self.free((inner.path, b), "body")
        if v is None or not self.rank(scope, v):
            return
        home = self.model.homes.get((inner.path, b))
        if home is None:  # one number per trip
            home = Home(self.model.node("trips", 1, ("trips",)), ((),))
        layouts = tuple(((), *x) for x in home.layouts) if sliced else home.layouts
        self.pull((scope.path, v), Home(home.node, layouts), (scope.path, i, k), phase, times)

    def leave(
        self,
        scope: Scope,
        inner: Scope,
        site: Site,
        b: int | None,
        v: int,
        carry: int | None,
        phase: Phase,
        start: int,
    ) -> None:
        """Connects the body output b with result v of the loop; a carry ends every trip in the layout it
        began in.
        """
        if not self.rank(scope, v):
            return
        times = self.region.times(phase) * inner.trips
        if carry is not None:
            home = inside = self.model.homes[inner.path, carry]
        else:
            layouts = self.layouts(scope.values[v].shape[1:])
            node = self.model.node("stacked", len(layouts), ("stacked", scope.values[v].shape))
            inside, home = Home(node, layouts), Home(node, tuple(((), *x) for x in layouts))
        if b is not None and self.rank(inner, b):
            self.pull((inner.path, b), inside, None, phase, times)
        self.model.made[site] = home
        self.put((scope.path, v), home, site, phase, self.region.times(phase) * scope.trips)
        self.model.first[scope.path, v] = start

    # a stack of layers
    def close_stack(self) -> None:
        """Prices moving the activations a layer leaves to where the next, equal layer takes them."""
        phases = self.phase_of_arriving()
        summed = {v for v, _ in self.region.combine}
        leaving = [v for v in self.region.leaving if v not in summed and v not in self.region.results]
        for v, phase in phases.items():
            value = self.region.values[v]
            twins = [
                u
                for u in leaving
                if self.phase_made(u) is phase and self.region.values[u].shape == value.shape
            ]
            if twins and ((), v) in self.model.homes:
                u = twins[-1]
                leaving.remove(u)
                source, target = self.model.homes[(), u], self.model.homes[(), v]
                times = self.region.times(phase)
                self.model.reads.append(Read(((), u), source, target, phase, times))

    def phase_of_arriving(self) -> dict[int, Phase]:
        """Returns the phase in which each arriving value is first read."""
        first: dict[int, Phase] = {}
        for e in self.region.equations:
            for v in e.operands:
                first.setdefault(v, e.phase)
        return {v: first[v] for v in self.region.arriving if v in first}

    def whole(self, seconds: float) -> str:
        """What it means that an equation is not sharded, in words."""
        return f"computed whole on every device, {seconds * 1e3:.3g} ms each time"

    def note(self, e: Equation, text: str) -> None:
        where = f" at {e.source}" if e.source else ""
        line = f"{e.op}{where}: {text}"
        if line not in self.model.notes:
            self.model.notes.append(line)


def _crossing(region: Region) -> set[int]:
    """Returns values made in the forward and read in the backward program, where these are separate programs.

    Values of no layer are computed again in each program that reads them.
    """
    if region.whole:
        return set()
    forward = {
        v
        for e in region.equations
        if e.phase is Phase.FORWARD and e.layer is not None
        for v in e.outputs
        if region.values[v].shape
    }
    return {v for e in region.equations if e.phase is Phase.BACKWARD for v in e.operands if v in forward}


def _scanned(region: Region) -> set[int]:
    """Returns inputs that a loop reads slice by slice: cutting their dim 0 would gather the whole stack."""
    found: set[int] = set()
    for e in region.equations:
        if e.loop is not None:
            found.update(v for v in e.inputs[e.loop.consts + e.loop.carries :] if v is not None)
    return found
