"""Compiled segments of one stage: lowered once, compiled when first needed or ahead of time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from operator import itemgetter
from typing import Any

import jax

from autopar.core.plan import Stage
from autopar.core.program import Buffer, Free, Rename, Run, Slot, Worker, reads
from autopar.runtime.lower import Lowered
from autopar.runtime.trees import Trees

Array = Any


class Compiled:
    """One segment on one mesh.

    Args:
        lowered: the function and how its inputs and outputs lie.
        donated: positions of inputs whose memory it may take.
        heirs: donated position → position of the output that should take it. JAX gives a donated input to the
            first output of its shape that is still without one; so the outputs are compiled in the order of
            what they replace, or every one of them would be copied at last.

    Attributes:
        trees: how it is called in its function's own trees; set before it is compiled, or not at all.
    """

    def __init__(self, lowered: Lowered, donated: tuple[int, ...], heirs: Mapping[int, int] | None = None):
        self.lowered, self.donated = lowered, donated
        self.trees: Trees | None = None
        first = [heirs[k] for k in donated if k in heirs] if heirs else []
        order = [*first, *(o for o in range(len(lowered.outputs)) if o not in {*first})]
        self.order = order
        self._restore = restorer(order)

    @cached_property
    def jitted(self) -> Callable[..., Sequence[Array]]:
        """The function of its inputs as separate arguments, with layouts pinned on both sides.

        Its results come in the order in which donated inputs are replaced.
        """
        if self.trees is not None:
            return self._in_trees(self.trees)
        fun, order = self.lowered.fun, self.order

        def ordered(*inputs: Array) -> list[Array]:
            results = fun(list(inputs))
            return [results[o] for o in order]

        return jax.jit(
            ordered,
            in_shardings=tuple(x.sharding for x in self.lowered.inputs),
            out_shardings=[self.lowered.outputs[o].sharding for o in order],
            donate_argnums=self.donated,
        )

    def _in_trees(self, trees: Trees) -> Callable[..., Any]:
        """The function in the trees of the step it came from."""

        def step(*arguments: Any) -> Any:
            return trees.result(self.lowered.fun(trees.read(arguments)))

        return jax.jit(
            step,
            in_shardings=trees.arguments([x.sharding for x in self.lowered.inputs]),
            out_shardings=trees.result([x.sharding for x in self.lowered.outputs]),
            donate_argnums=trees.donated,
        )

    @cached_property
    def executable(self) -> Any:
        """The compiled program (`jax.stages.Compiled`)."""
        inputs = self.lowered.inputs
        arguments = inputs if self.trees is None else self.trees.arguments(inputs)
        lowered = self.jitted.lower(*arguments)  # type: ignore[attr-defined]
        return lowered.compile(self.lowered.options and dict(self.lowered.options))

    @property
    def text(self) -> str:
        return self.executable.as_text()

    def __call__(self, *inputs: Array) -> Sequence[Array]:
        if self.trees is not None:
            return self.trees.made(self.executable(*self.trees.arguments(inputs)))
        results = self.executable(*inputs)
        return results if self._restore is None else self._restore(results)


def restorer(order: Sequence[int]) -> Callable[[Sequence[Array]], Sequence[Array]] | None:
    """Returns what puts results that come in `order` back into theirs, None where they are."""
    back = [list(order).index(o) for o in range(len(order))]
    return itemgetter(*back) if back != sorted(back) else None


def heirs(worker: Worker) -> dict[str, dict[int, int]]:
    """Returns segment → input position → position of the output that takes its name: a sum's at once, new
    state's after the step."""
    named = {i.new: i.old for i in worker.instructions if isinstance(i, Rename)}
    found: dict[str, dict[int, int]] = {}
    for run in worker.instructions:
        if isinstance(run, Run):
            places = {b: o for o, b in enumerate(run.outputs)}
            takes = [named.get(b, b) for b in run.inputs]
            mine = {k: places[b] for k, b in enumerate(takes) if b in places}
            found[run.segment] = {k: o for k, o in mine.items() if found.get(run.segment, mine).get(k) == o}
    return found


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
