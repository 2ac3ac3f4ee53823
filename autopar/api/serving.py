"""Steps of a served model as programs: one plan, and programs of other shapes with its stages and layouts.

A decode step is planned; prompts of other lengths, batches of other sizes and the copying of cache blocks are
derived from its plan: the same layers on the same devices, parameters and cache in the same layouts, so that
all of them work on the same arrays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from autopar.api.likeliest import likeliest, likeliest_by_parts
from autopar.api.planning import GAP, SECONDS, Made, Say
from autopar.api.tracing import Tracer
from autopar.cluster import Cluster
from autopar.core.errors import BadInput
from autopar.core.graph import Graph
from autopar.core.plan import Plan, ShardingPlan, Stage
from autopar.core.program import Buffer, Program
from autopar.core.spec import Spec
from autopar.program import emit, schedule, simulate
from autopar.runtime.backend import Fetch, Session
from autopar.runtime.inprocess import InProcess, constants
from autopar.runtime.results import homes
from autopar.sharding import plan as intra
from autopar.sharding.options import Options as ShardingOptions
from autopar.stages import Options, cut
from autopar.stages.assemble import assemble
from autopar.trace.traced import Traced

Array = Any


class Family(Protocol):
    """What a served model consists of: a `models.decoder.Decoder`, such as `autopar.models.opt.DECODER`.

    One whose steps can go on from a window also has `Windowed`, which pairs a layer's cache and window for
    `step`, and `rows_of(cache, tables, held)`, which makes the window of rows.
    """

    def parameter_shapes(self, config: Any) -> Any: ...

    def cache_shapes(self, config: Any, blocks: int, block_size: int, dtype: Any) -> Any: ...

    def step(
        self,
        config: Any,
        params: Any,
        cache: Any,
        tokens: Array,
        positions: Array,
        lengths: Array,
        tables: Array,
        every: bool = False,
    ) -> tuple[Array, Any]: ...


class Source(Protocol):
    """Where parameters come from (`autopar.io.weights.WeightSource`); it can be pickled."""

    def read(self, path: str, index: Any = None, dtype: Any = None) -> Any: ...


class Shape(NamedTuple):
    """Sizes of a step: rows of sequences, new tokens in each, KV blocks in each row's table.

    every: it gives the logits of all new tokens, not only of each row's last.
    window: it goes on from a window, a copy of what its rows hold, beside the cache.
    greedy: it gives the likeliest tokens only, not the logits; in a window.
    """

    rows: int
    new: int
    blocks: int
    every: bool = False
    window: bool = False
    greedy: bool = False


@dataclass(frozen=True)
class Served:
    """A model to be served: its functions, and how large its cache is.

    Attributes:
        family, config: the model. blocks, block_size: of the KV cache. dtype: of its elements.
    """

    family: Family
    config: Any
    blocks: int
    block_size: int
    dtype: Any

    @property
    def parameters(self) -> Any:
        """The parameters' shapes."""
        return self.family.parameter_shapes(self.config)

    @property
    def cache(self) -> Any:
        """The cache's shapes."""
        return self.family.cache_shapes(self.config, self.blocks, self.block_size, self.dtype)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters."""
        return _bytes(self.parameters)

    @property
    def block_bytes(self) -> int:
        """Bytes of one cache block, all layers together."""
        return _bytes(self.cache) // self.blocks

    @property
    def has_windows(self) -> bool:
        """Whether the model's steps can go on from windows."""
        return hasattr(self.family, "Windowed") and hasattr(self.family, "rows_of")

    def window(self, shape: Shape) -> Any:
        """Returns the shapes of the window of a step's rows: a cache that has one long block per row."""
        return self.family.cache_shapes(self.config, shape.rows, shape.blocks * self.block_size, self.dtype)

    def window_step(self, greedy: bool) -> Callable[..., Any]:
        """Returns `(params, cache, window, batch) -> (results, cache, window)`, results as of `step`.

        greedy: without the logits; to write them takes a fortieth of a step of 32 rows of OPT-125m on a CPU.
        """
        family: Any = self.family

        def step(params: Any, cache: Any, window: Any, batch: tuple[Array, ...]) -> tuple[Any, Any, Any]:
            layers = tuple(map(family.Windowed, cache, window))
            logits, layers = family.step(self.config, params, layers, *batch)
            cache, window = zip(*layers)
            tokens = likeliest_by_parts(logits)
            return (tokens,) if greedy else (tokens, logits), cache, window

        return step

    def step(self, every: bool) -> Callable[..., Any]:
        """Returns `(params, cache, batch) -> (results, cache)`; results: likeliest tokens and logits, or
        all logits.
        """

        def step(params: Any, cache: Any, batch: tuple[Array, ...]) -> tuple[Any, Any]:
            logits, cache = self.family.step(self.config, params, cache, *batch, every=every)
            return (logits if every else (likeliest(logits), logits)), cache

        return step

    def tracer(self, shape: Shape) -> Tracer:
        """Returns the tracer of a step of this shape."""

        def ints(*sizes: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(sizes, jnp.int32)

        batch = (
            ints(shape.rows, shape.new),
            ints(shape.rows),
            ints(shape.rows),
            ints(shape.rows, shape.blocks),
        )
        state = (self.parameters, self.cache)
        if shape.window:
            window = self.window(shape)
            return Tracer(self.window_step(shape.greedy), (*state, window, batch), {}, batch_argnums=(3,))
        return Tracer(self.step(shape.every), (*state, batch), {}, batch_argnums=(2,))

    def copier(self, count: int) -> Tracer:
        """Returns the tracer of a step that copies so many cache blocks: `(cache, (from, to)) -> cache`."""

        def copy(cache: Any, batch: tuple[Array, Array]) -> Any:
            source, target = batch
            return jax.tree.map(lambda x: x.at[target].set(x[source]), cache)

        batch = (jax.ShapeDtypeStruct((count,), jnp.int32),) * 2
        return Tracer(copy, (self.cache, batch), {}, batch_argnums=(1,))


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


# -- derived plans
# ---------------------------------------------------------------------------------------------


def derived(base: Made, traced: Traced, same: Mapping[int, int], cluster: Cluster) -> Made:
    """Returns the plan of another step with the stages of a plan, shared state in the layouts it has there.

    Args:
        base: the plan. traced: the other step; its layers are the plan's.
        same: state value of the other step → the value of the plan that it is.
        cluster: that the plan was made for.

    Raises:
        BadInput: a step with other layers.
        DoesNotFit: a stage that does not fit its devices with these shapes.
    """
    graph, plan = traced.graph, base.plan
    if graph.layers != plan.layers:
        raise BadInput(
            f"a step with the layers {', '.join(graph.layers) or 'of no name'} cannot take over the stages "
            f"of a plan for {', '.join(plan.layers) or 'layers of no name'}"
        )
    stage_of = tuple(s for s, stage in enumerate(plan.stages) for _ in range(stage.start, stage.stop))
    segments = cut(graph, stage_of[: len(graph.layers)])
    stages: list[Stage] = []
    for s, stage in enumerate(plan.stages):
        own = tuple(sorted({i for x in segments if x.stage == s for i in x.equations}))
        pins = tuple((v, stage.sharding.layout[w]) for v, w in same.items() if w in stage.sharding.layout)
        stages.append(replace(stage, sharding=_sharded(graph, own, stage.sharding, pins)))
    seconds = sum(stage.sharding.forward for stage in stages)
    options = Options(schedule=plan.schedule, model=traced.fingerprint)
    made = assemble(graph, cluster, tuple(stages), segments, options, seconds, seconds, ())
    made = replace(made, layer_scans=plan.layer_scans)
    line = simulate(made, program_of(made))
    return Made(made.with_timing(line.step_time, line.bubble), traced)


def _sharded(
    graph: Graph, equations: Sequence[int], known: ShardingPlan, pins: tuple[tuple[int, Spec], ...]
) -> ShardingPlan:
    """Returns the plan of a stage on the mesh and in the element types of another plan of it."""
    options = ShardingOptions(
        pinned=pins, gap=GAP, seconds=SECONDS, dtypes=known.dtypes, products=known.products
    )
    return intra.plan(graph, equations, known.mesh, options)


def program_of(plan: Plan) -> Program:
    """Returns the program of a plan."""
    return emit(plan, schedule(plan.schedule, len(plan.stages), plan.microbatches))


def at_home(traced: Traced, layers: tuple[str, ...], home: Mapping[int, int]) -> Traced:
    """Returns a trace whose equations belong to the layer whose state they work on.

    Args:
        layers: names of all layers. home: input → the layer it belongs to.
    """
    found, equations = dict(home), []
    for equation in traced.graph.equations:
        layer = max((found[v] for v in equation.operands if v in found), default=None)
        if layer is not None:
            found.update(dict.fromkeys(equation.outputs, layer))
        equations.append(replace(equation, layer=layer))
    return replace(traced, graph=replace(traced.graph, layers=layers, equations=tuple(equations)))


def layer_of(graph: Graph, inputs: Sequence[int]) -> dict[int, int]:
    """Returns input → the first layer that reads it, directly or through equations without a layer."""
    users, found = graph.consumers, dict[int, int]()
    for v in inputs:
        todo, seen = [v], set[int]()
        while todo:
            for i in users.get(todo.pop(), ()):
                equation = graph.equations[i]
                if equation.layer is None:
                    todo += [w for w in equation.outputs if w not in seen]
                    seen.update(equation.outputs)
                else:
                    found[v] = min(equation.layer, found.get(v, equation.layer))
    return found


# -- programs that share their state
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A step of one shape, ready to run.

    Attributes:
        made: its plan and trace. program, session: what runs.
        feeds: per stage, (buffer, which array of the batch) that it reads.
        results: per result leaf that is no state, the stage and buffer it is in.
    """

    made: Made
    program: Program
    session: Session
    feeds: tuple[tuple[tuple[Buffer, int], ...], ...]
    results: tuple[tuple[int, Buffer], ...]

    @classmethod
    def of(cls, made: Made, program: Program, session: Session) -> Loaded:
        leaves = made.traced.leaves
        position = {leaf.values[0]: k for k, leaf in enumerate(x for x in leaves if x.batch)}
        feeds = tuple(tuple((b, position[b.value]) for b in worker.feeds) for worker in program)
        held = [set(worker.state) for worker in program]
        found = [home.pieces[0] for home in homes(made.traced.out_leaves, made.plan.outputs, program)]
        return cls(made, program, session, feeds, tuple((s, b) for s, b in found if b not in held[s]))

    def __call__(self, arrays: Sequence[Array]) -> None:
        """Starts a step on the batch's arrays, numpy, in the order of the function's arguments."""
        self.session.step([{b: arrays[k] for b, k in wanted} for wanted in self.feeds])

    def fetch(self, result: int, rows: Sequence[int] | None = None) -> Callable[[], Array]:
        """Returns a function that waits for what the steps started so far leave in a result.

        rows: of its first dim that are wanted; a worker in another process sends these only.
        """
        wait = self.fetchers[result](rows)
        return lambda: wait()[0]

    @cached_property
    def fetchers(self) -> list[Fetch]:
        return [self.session.fetcher(stage, [buffer]) for stage, buffer in self.results]


def state_of(traced: Traced) -> tuple[tuple[str, int], ...]:
    """Returns (path, value) of the arguments that are state, in order."""
    leaves = [leaf for leaf in traced.leaves if not leaf.batch]
    if any(len(leaf.values) != 1 for leaf in leaves):
        raise NotImplementedError("a served model with a scan over its layers; unroll them")
    return tuple((leaf.path, leaf.values[0]) for leaf in leaves)


def same_state(base: Traced, other: Traced) -> dict[int, int]:
    """Returns state value of another step → the value of the first that it is: they have the same path."""
    known = dict(state_of(base))
    return {v: known[path] for path, v in state_of(other) if path in known}


class Programs:
    """The programs of a served model: the first is planned, the others derived; all share one state.

    Args:
        served: the model. base: the plan of the first shape and its trace.
        cluster: what it was planned for. backend: who runs it. say: told what is being done.

    Attributes:
        base: the first shape, loaded.
    """

    def __init__(self, served: Served, base: Made, cluster: Cluster, backend: Any, say: Say):
        self.served, self.cluster, self._say = served, cluster, say
        program = program_of(base.plan)
        self.base = Loaded.of(base, program, backend.start(base.plan, program, base.traced))
        self._state = state_of(base.traced)
        self._known: dict[Any, Loaded] = {}

    def compiled(self, key: Shape | int) -> Loaded:
        """Returns the step of a shape, or the copying of so many blocks; it is made when first asked for."""
        if key not in self._known:
            self._say(f"compiling {text(key)}")
            made = self._derive(key)
            program = program_of(made.plan)
            names = {Buffer(v): Buffer(w) for v, w in same_state(self.base.made.traced, made.traced).items()}
            session = self.base.session.sibling(made.plan, program, made.traced, names)
            session.compile()
            self._known[key] = Loaded.of(made, program, session)
        return self._known[key]

    def adopt(self, key: Shape) -> None:
        """Notes that the first program is the one of this shape."""
        self.base.session.compile()
        self._known[key] = self.base

    def place(self, source: Source) -> None:
        """Brings parameters where they are wanted, slice by slice, and empties the cache."""

        def reader(path: str) -> Any:
            if path.startswith("cache"):
                return None
            return partial(source.read, "/".join(re.findall(r"\['([^']*)'\]", path)))

        names = {Buffer(v): path for path, v in self._state}
        for s, worker in enumerate(self.base.program):
            self._say(f"loading the weights of stage {s}")
            self.base.session.load(s, constants(worker, self.base.made.traced))
            found = {b: names[b] for b in worker.state if b in names}
            self.base.session.make(s, {b: reader(path) for b, path in found.items()})

    def _derive(self, key: Shape | int) -> Made:
        base = self.base.made
        if isinstance(key, Shape):
            traced = self.served.tracer(key)(1, False)
            return derived(base, traced, same_state(self.base.made.traced, traced), self.cluster)
        traced = self.served.copier(key)(1, False)
        same = same_state(self.base.made.traced, traced)
        home = layer_of(base.traced.graph, list(same.values()))
        traced = at_home(traced, base.plan.layers, {v: home[w] for v, w in same.items()})
        return derived(base, traced, same, self.cluster)

    def close(self) -> None:
        """Stops what runs and drops everything held."""
        self.base.session.close()
        self._known.clear()


def on_cpu(backend: Any) -> bool:
    """Returns whether a backend computes on host devices, whatever the cluster is that was planned for."""
    if isinstance(backend, InProcess):
        return (backend.devices or tuple(jax.devices()))[0].platform == "cpu"
    return getattr(backend, "emulate", False) or getattr(backend, "platform", None) == "cpu"


def text(key: Shape | int) -> str:
    """Returns a shape in words."""
    if not isinstance(key, Shape):
        return f"the copying of {key} blocks"
    words = f"steps of {key.rows} × {key.new} tokens over {key.blocks} blocks"
    if key.window:
        return f"{words} in a window, {'greedy' if key.greedy else 'with logits'}"
    return f"{words}, all logits" if key.every else words
