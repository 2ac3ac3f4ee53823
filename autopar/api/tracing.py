"""A user's function with what the decorator was told about it: traced as often as planning needs.

As with `jax.jit`, a function that has been traced for arguments of some shapes is not run again for them:
another method or cluster plans the trace that is known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax

from autopar.core.stopwatch import section
from autopar.stages import assign
from autopar.trace.capture import Begun, Prepared, begin, finish, split
from autopar.trace.either import Remats
from autopar.trace.traced import Traced

RECENT = 4
"""Functions whose traces are kept."""


@dataclass
class Traces:
    """What is known of a function on arguments of some shapes: as it was traced, cut, and differentiated, and
    how it was planned.

    Attributes:
        made: all that a plan depends on beside the trace → the plan (`exact.Made`).
    """

    begun: list[Begun] = field(default_factory=list)
    prepared: dict[Hashable, Prepared] = field(default_factory=dict)
    known: dict[Hashable, Traced] = field(default_factory=dict)
    made: dict[Hashable, Any] = field(default_factory=dict)


@functools.lru_cache(maxsize=RECENT)
def _recent(function: Callable[..., Any], key: Hashable) -> Traces:
    return Traces()


def known_traces(function: Callable[..., Any], key: Hashable) -> Traces:
    """Returns where the traces of a function are kept; a fresh place for one that has no hash.

    Args:
        key: all that a trace depends on beside the function.
    """
    try:
        return _recent(function, key)
    except TypeError:
        return Traces()


@dataclass
class Tracer:
    """Traces of one call, by number of micro-batches and rematerialisation; each is made once.

    Attributes:
        function: the user's. args, kwargs: arrays or shapes of the full batch; only shapes are kept.
        static_argnums, static_argnames, batch_argnums: as `parallelize` got them.
        layers: how many layers to cluster an unnamed model into, or None.
        stages: how many stages will be asked for, at least; an unnamed model gets as many layers.
        layer_scans: whether scans over layers are cut into layers, so that stages can be made of them.
        ending: whether what follows the last named layer may be a layer of its own.
        traces: what is known already.
    """

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    static_argnums: tuple[int, ...] = ()
    static_argnames: tuple[str, ...] = ()
    batch_argnums: tuple[int, ...] | None = None
    layers: int | None = None
    layer_scans: bool = True
    stages: int = 1
    ending: bool = False
    traces: Traces = field(default_factory=Traces)

    def __post_init__(self) -> None:
        self.args, self.kwargs = jax.tree.map(_shape_of, (tuple(self.args), dict(self.kwargs)))

    def __call__(self, microbatches: int, remat: Remats) -> Traced:
        """Returns the trace. Raises TraceError, MixedExamples, BadInput."""
        named = tuple(sorted(remat.items())) if isinstance(remat, Mapping) else remat
        key = (microbatches, self.layer_scans, self.layers, self.stages, self.ending, named)
        known = self.traces.known
        if key not in known:
            prepared = self.prepared(microbatches)
            with section("graph"):
                completed = partial(assign, layers=self.layers, least=self.stages, ending=self.ending)
                known[key] = finish(prepared, assign=completed, remat=remat)
        return known[key]

    def prepared(self, microbatches: int) -> Prepared:
        """Returns the step traced for one micro-batch, not yet differentiated."""
        key = (microbatches, self.layer_scans)
        known = self.traces.prepared
        if key not in known:
            begun = self.begun
            with section("trace"):
                known[key] = split(begun, microbatches, layer_scans=self.layer_scans)
        return known[key]

    @property
    def begun(self) -> Begun:
        """The step traced for the full batch."""
        if not self.traces.begun:
            with section("trace"):
                begun = begin(
                    self.function,
                    self.args,
                    self.kwargs,
                    static_argnums=self.static_argnums,
                    static_argnames=self.static_argnames,
                    batch_argnums=self.batch_argnums,
                )
            self.traces.begun.append(begun)
        return self.traces.begun[0]

    def batch(self) -> int:
        """Returns the examples per step: the leading dim that the batch's arrays share; 1 without a batch."""
        step = self.prepared(1).step
        sizes = [x.shape[0] for x, is_batch in zip(step.full, step.role.batch, strict=True) if is_batch]
        return min(sizes, default=1)


def _shape_of(leaf: Any) -> Any:
    """An array's shape and type, so that it is not kept alive; other leaves as they are."""
    if isinstance(leaf, type) or not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=bool(getattr(leaf, "weak_type", False)))
