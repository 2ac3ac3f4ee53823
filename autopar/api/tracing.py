"""A user's function with what the decorator was told about it: traced as often as planning needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autopar.stages import assign
from autopar.trace.capture import capture
from autopar.trace.traced import Traced


@dataclass
class Tracer:
    """Traces of one call, by number of micro-batches and rematerialisation; each is made once.

    Attributes:
        function: the user's. args, kwargs: arrays or shapes of the full batch.
        static_argnums, static_argnames, batch_argnums: as `parallelize` got them.
        layers: how many layers to cluster an unnamed model into, or None.
    """

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    static_argnums: tuple[int, ...] = ()
    static_argnames: tuple[str, ...] = ()
    batch_argnums: tuple[int, ...] | None = None
    layers: int | None = None
    _known: dict[tuple[int, bool], Traced] = field(default_factory=dict)

    def __call__(self, microbatches: int, remat: bool) -> Traced:
        """Returns the trace. Raises TraceError, MixedExamples, BadInput."""
        key = (microbatches, remat)
        if key not in self._known:
            self._known[key] = capture(
                self.function,
                self.args,
                self.kwargs,
                static_argnums=self.static_argnums,
                static_argnames=self.static_argnames,
                batch_argnums=self.batch_argnums,
                microbatches=microbatches,
                remat=remat,
                assign=lambda graph: assign(graph, layers=self.layers),
            )
        return self._known[key]

    def batch(self) -> int:
        """Returns the examples per step: the leading dim that the batch's arrays share; 1 without a batch."""
        sizes = {leaf.shape[0] for leaf in self(1, False).leaves if leaf.batch and leaf.shape}
        return min(sizes, default=1)
