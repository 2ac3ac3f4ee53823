"""A user's function with what the decorator was told about it: traced as often as planning needs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from autopar.stages import assign
from autopar.trace.capture import Begun, Prepared, begin, finish, split
from autopar.trace.either import Remats
from autopar.trace.traced import Traced


@dataclass
class Tracer:
    """Traces of one call, by number of micro-batches and rematerialisation; each is made once.

    Attributes:
        function: the user's. args, kwargs: arrays or shapes of the full batch.
        static_argnums, static_argnames, batch_argnums: as `parallelize` got them.
        layers: how many layers to cluster an unnamed model into, or None.
        stages: how many stages will be asked for, at least; an unnamed model gets as many layers.
        layer_scans: whether scans over layers are cut into layers, so that stages can be made of them.
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
    _known: dict[Hashable, Traced] = field(default_factory=dict)
    _prepared: dict[tuple[int, bool], Prepared] = field(default_factory=dict)

    def __call__(self, microbatches: int, remat: Remats) -> Traced:
        """Returns the trace. Raises TraceError, MixedExamples, BadInput."""
        named = tuple(sorted(remat.items())) if isinstance(remat, Mapping) else remat
        key = (microbatches, self.layer_scans, named)
        if key not in self._known:
            completed = partial(assign, layers=self.layers, least=self.stages)
            self._known[key] = finish(self.prepared(microbatches), assign=completed, remat=remat)
        return self._known[key]

    def prepared(self, microbatches: int) -> Prepared:
        """Returns the step traced for one micro-batch, not yet differentiated."""
        key = (microbatches, self.layer_scans)
        if key not in self._prepared:
            self._prepared[key] = split(self.begun, microbatches, layer_scans=self.layer_scans)
        return self._prepared[key]

    @functools.cached_property
    def begun(self) -> Begun:
        """The step traced for the full batch."""
        return begin(
            self.function,
            self.args,
            self.kwargs,
            static_argnums=self.static_argnums,
            static_argnames=self.static_argnames,
            batch_argnums=self.batch_argnums,
        )

    def batch(self) -> int:
        """Returns the examples per step: the leading dim that the batch's arrays share; 1 without a batch."""
        step = self.prepared(1).step
        sizes = [x.shape[0] for x, is_batch in zip(step.full, step.role.batch, strict=True) if is_batch]
        return min(sizes, default=1)
