"""`autopar.parallelize`: a step for one device becomes a step for a cluster."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import core

from autopar import cluster as room
from autopar.api.cluster import Cluster
from autopar.api.methods import Auto, CreateState, Follow, Manual, Method, ShardParallel
from autopar.api.plan import Plan
from autopar.api.planning import Made, Say, make
from autopar.api.tracing import Tracer, known_traces
from autopar.core.errors import BadInput, TraceError
from autopar.runtime import executable
from autopar.runtime.backend import Backend
from autopar.runtime.executable import Executable
from autopar.runtime.inprocess import InProcess
from autopar.trace.arguments import split_call
from autopar.trace.traced import Traced

LOG = logging.getLogger("autopar")


def parallelize(
    function: Callable[..., Any] | None = None,
    *,
    method: Method | None = None,
    cluster: room.Cluster | str | None = None,
    backend: Backend | None = None,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    batch_argnums: int | Sequence[int] | None = None,
    donate: bool = False,
    progress: Say | None = None,
) -> Any:
    """Returns the step spread over a cluster; called like the original, it gives the original's results.

    The first call plans, compiles and runs; later calls with arguments of the same shapes run. `plan` plans
    without running (`jax.ShapeDtypeStruct` arguments are enough), `compile` compiles ahead of time.

    Args:
        function: a pure function of pytrees, e.g. `train_step(state, batch) -> (state, loss)`. An argument
            whose tree comes back in the result is state; other arguments whose arrays share a leading dim are
            the batch.
        method: how to spread it; `Auto()` by default.
        cluster: what to plan for: a Cluster, a cluster file or a short form ("8xA100-40GB,4xT4"); by default
            this machine's devices. A plan for another cluster runs here on as many devices, whatever they
            are.
        backend: who runs it; `InProcess()` by default.
        static_argnums, static_argnames: arguments that are passed on as they are, as in `jax.jit`.
        batch_argnums: which arguments are the batch, where the rule above does not say.
        donate: arrays passed in may be taken over and deleted; without it they are copied when first seen.
        progress: called with a few words at every step of planning.

    Raises:
        AutoparError: at planning or calling; see `Parallelized`.
    """
    options: dict[str, Any] = {
        "method": method or Auto(),
        "cluster": room.parse(cluster) if isinstance(cluster, str) else cluster,
        "backend": backend,
        "static_argnums": (static_argnums,) if isinstance(static_argnums, int) else tuple(static_argnums),
        "static_argnames": (static_argnames,) if isinstance(static_argnames, str) else tuple(static_argnames),
        "batch_argnums": (batch_argnums,) if isinstance(batch_argnums, int) else batch_argnums,
        "donate": donate,
        "progress": progress or (lambda text: None),
    }
    if not isinstance(options["method"], Method):
        raise BadInput(
            "method must be an Auto, Pipeline, ShardParallel, DataParallel, Zero2, Zero3, Manual, Follow or "
            f"CreateState, got {method!r}"
        )
    if function is None:
        return lambda f: Parallelized(f, **options)
    if not callable(function):
        raise BadInput(f"parallelize takes a function, got {type(function).__name__}; options go by keyword")
    return Parallelized(function, **options)


class Parallelized:
    """A step that plans itself for a cluster and runs there. Made by `parallelize`."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        method: Method,
        cluster: room.Cluster | None,
        backend: Backend | None,
        static_argnums: tuple[int, ...],
        static_argnames: tuple[str, ...],
        batch_argnums: tuple[int, ...] | None,
        donate: bool,
        progress: Say,
    ):
        functools.update_wrapper(self, function)
        self.function, self.method, self.cluster = function, method, cluster
        self._backend, self._donate, self._say = backend, donate, progress
        self._static_argnums, self._static_argnames = static_argnums, static_argnames
        self._batch_argnums = batch_argnums
        self._made: dict[Any, Made] = {}
        self._running: dict[Any, Executable] = {}
        self._last: tuple[Any, Executable] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the step's results, planned and compiled at the first call with these shapes.

        Raises:
            TraceError, MixedExamples, DoesNotFit, BadInput, StageFailed: see `plan` and the executable.
        """
        if self._last is not None:  # a training loop: the state of the last call, and a batch like its
            results = self._last[1].direct(args, kwargs)
            if results is not NotImplemented:
                return results
            leaves, tree = jax.tree.flatten((args, kwargs))
            if self._last[1].follows(leaves, tree):
                return self._last[1].next(leaves)
        key = self._key(args, kwargs)
        if self._last is None or self._last[0] != key:
            self._last = (key, self._executable(key, args, kwargs))
        return self._last[1](*args, **kwargs)

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """Returns the plan for arguments of these shapes; nothing is allocated or run.

        Raises:
            TraceError: the function cannot be captured. MixedExamples: micro-batches would change the result.
            DoesNotFit: no plan keeps every device within its memory. BadInput, StalePlan: the method or
                cluster.
        """
        made = self._planned(self._key(args, kwargs), args, kwargs)
        return Plan.of(made.plan, made.traced.graph)

    def trace(self, *args: Any, **kwargs: Any) -> Traced:
        """Returns what the planner sees: the graph, with the equations behind it."""
        return self._planned(self._key(args, kwargs), args, kwargs).traced

    def compile(self, *args: Any, **kwargs: Any) -> Executable:
        """Returns the compiled step: `.hlo()`, `.memory()`, `.timeline()`; call it like the function."""
        return self._executable(self._key(args, kwargs), args, kwargs).compile()

    def close(self) -> None:
        """Stops the workers and drops what they hold."""
        for running in self._running.values():
            running.close()
        self._running.clear()
        self._last = None

    def _planned(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Made:
        if key not in self._made:
            if self._made:
                LOG.warning(
                    "%s: arguments of other shapes, structure or static values than before, so it is planned "
                    "and compiled again",
                    getattr(self.function, "__name__", "step"),
                )
            how = self._static_argnums, self._static_argnames, self._batch_argnums
            weak = tuple(getattr(x, "weak_type", False) for x in jax.tree.leaves((args, kwargs)))
            traces = known_traces(self.function, (key, weak, how))
            tracer = Tracer(self.function, args, kwargs, *how, traces=traces)
            self._made[key] = self._make(tracer)
        return self._made[key]

    def _make(self, tracer: Tracer) -> Made:
        """Returns the plan of a trace: the known one, if an equal method planned it for an equal cluster."""
        cluster, method, known = self._cluster(), self.method, tracer.traces.made
        asked = method, cluster
        if not isinstance(method, Auto | ShardParallel) or isinstance(method.remat, Mapping):
            return make(tracer, cluster, method, self._say)  # they depend on what has no hash, or changes
        if asked not in known:
            known[asked] = make(tracer, cluster, method, self._say)
        return known[asked]

    def _cluster(self) -> room.Cluster:
        if self.cluster is None:
            other = self.method.step if isinstance(self.method, Follow | CreateState) else None
            self.cluster = Cluster.local() if other is None else other._cluster()
        return self.cluster

    @property
    def made(self) -> Made | None:
        """The plan that was made last, with its trace; None before there is one."""
        return next(reversed(self._made.values()), None)

    def _executable(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Executable:
        if key not in self._running:
            made = self._planned(key, args, kwargs)
            backend = self._backend or InProcess()
            program = Plan.of(made.plan).program()
            self._say("compiling")
            self._running[key] = executable.load(made.plan, program, made.traced, backend, self._donate)
        return self._running[key]

    def _key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Trees, shapes, dtypes and static values: what a plan depends on."""
        statics: tuple[Any, ...] = ()
        if self._static_argnums or self._static_argnames:
            call = split_call(self.function, args, kwargs, self._static_argnums, self._static_argnames)
            args, kwargs = call.args, dict(call.kwargs)
            statics = (*call.static_args.items(), *call.static_kwargs.items())
            for name, value in statics:
                _refuse_unhashable(name, value)
        leaves, tree = jax.tree.flatten((args, kwargs))
        if any(isinstance(leaf, core.Tracer) for leaf in leaves):
            raise _traced(self.function, args, kwargs)
        return tree, tuple(map(_leaf_key, leaves)), statics


def _traced(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> TraceError:
    """Returns the error for a step that is called by a function that JAX transforms."""
    leaves, _ = jax.tree_util.tree_flatten_with_path((args, kwargs))
    path = next(path for path, leaf in leaves if isinstance(leaf, core.Tracer))
    name = getattr(function, "__name__", "the step")
    which = split_call(function, args, kwargs).describe(path)
    return TraceError(
        f"{name} was called inside jax.jit, jax.grad, jax.vmap or a loop of jax.lax ({which} has no value "
        "there); a parallelized step runs on its cluster by itself: call it from plain Python, or "
        "parallelize the function around it"
    )


def _refuse_unhashable(name: Any, value: Any) -> None:
    try:
        hash(value)
    except TypeError:
        raise BadInput(
            f"static argument {name} is a {type(value).__name__}, which has no hash, so equal ones cannot be "
            "recognised; pass a tuple, a frozen dataclass or the like"
        ) from None


def _leaf_key(leaf: Any) -> Any:
    shape = getattr(leaf, "shape", None)
    if shape is not None:
        return shape, leaf.dtype
    if isinstance(leaf, bool | int | float | complex):
        return jnp.result_type(leaf), isinstance(leaf, bool)
    return leaf


__all__ = ["Manual", "Parallelized", "parallelize"]
