"""Compiled segments of one stage: lowered once, compiled when first needed or ahead of time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax

from autopar.core.plan import Stage
from autopar.core.program import Buffer, Free, Rename, Run, Slot, Worker, reads
from autopar.runtime.lower import Lowered

Array = Any


class Compiled:
    """One segment on one mesh.

    Args:
        lowered: the function and how its inputs and outputs lie.
        donated: positions of inputs whose memory it may take.
    """

    def __init__(self, lowered: Lowered, donated: tuple[int, ...]):
        self.lowered, self.donated = lowered, donated

    @cached_property
    def jitted(self) -> Callable[..., Sequence[Array]]:
        """The function of its inputs as separate arguments, with layouts pinned on both sides."""
        fun = self.lowered.fun
        return jax.jit(
            lambda *inputs: fun(list(inputs)),
            in_shardings=tuple(x.sharding for x in self.lowered.inputs),
            out_shardings=[x.sharding for x in self.lowered.outputs],
            donate_argnums=self.donated,
        )

    @cached_property
    def executable(self) -> Any:
        """The compiled program (`jax.stages.Compiled`)."""
        return self.jitted.lower(*self.lowered.inputs).compile()  # type: ignore[attr-defined]

    @property
    def text(self) -> str:
        return self.executable.as_text()

    def __call__(self, *inputs: Array) -> Sequence[Array]:
        return self.executable(*inputs)


def donations(worker: Worker) -> dict[str, tuple[int, ...]]:
    """Returns segment → input positions whose memory the segment may take.

    Only positions that all Runs of a segment donate, so that it is compiled once; and no feeds, which may be
    the caller's own arrays.
    """
    feeds, agreed = set(worker.feeds), dict[str, set[int]]()
    for run in worker.instructions:
        if isinstance(run, Run):
            mine = {k for k in run.donated if run.inputs[k] not in feeds}
            agreed[run.segment] = agreed.get(run.segment, mine) & mine
    return {name: tuple(sorted(positions)) for name, positions in agreed.items()}


def consumed(worker: Worker) -> frozenset[Buffer]:
    """Returns the buffers whose memory some Run takes."""
    taken = donations(worker)
    runs = (i for i in worker.instructions if isinstance(i, Run))
    return frozenset(run.inputs[k] for run in runs for k in (*run.donated, *taken[run.segment]))


def read_once(worker: Worker) -> frozenset[Buffer]:
    """Returns the feeds that one Run reads and nothing else: a numpy array can be handed to it as it is."""
    readers = Counter(b for i in worker.instructions for b in reads(i) if not isinstance(i, Free))
    ran = {b for i in worker.instructions if isinstance(i, Run) for b in i.inputs}
    return frozenset(b for b in worker.feeds if readers[b] == 1 and b in ran)


def slots(stage: Stage, worker: Worker) -> dict[int, Slot]:
    """Returns value id → how it is kept on a worker.

    New state that another stage makes is unknown to this stage's sharding plan; it arrives as the state it
    replaces.
    """
    kept = {slot.value: slot for slot in worker.slots}
    for rename in worker.instructions:
        if isinstance(rename, Rename) and rename.old.value not in stage.sharding.layout:
            kept[rename.old.value] = replace(kept[rename.new.value], value=rename.old.value)
    return kept
