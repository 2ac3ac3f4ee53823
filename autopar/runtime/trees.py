"""How a program of one segment is called in the trees of the function it came from."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from autopar.core.program import Buffer, Free, Program, Rename, Run
from autopar.runtime.layout import as_dtype
from autopar.runtime.lower import Lowered
from autopar.runtime.results import positions_of

Array = Any


@dataclass(frozen=True)
class Trees:
    """How a segment is called in the trees of the function it came from.

    Attributes:
        in_tree: of the positional arguments. out_tree: of the result.
        inputs: per leaf of the arguments, which of the segment's inputs it is.
        outputs: per leaf of the result, which of its outputs it is.
        donated: which arguments are taken over, each as a whole.
    """

    in_tree: Any
    out_tree: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    donated: tuple[int, ...]

    def arguments(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Returns the arguments with these inputs of the segment in them."""
        return jax.tree.unflatten(self.in_tree, [inputs[k] for k in self.inputs])

    def read(self, arguments: Sequence[Any]) -> list[Any]:
        """Returns the segment's inputs, given the arguments."""
        return _sorted(self.inputs, jax.tree.leaves(arguments))

    def result(self, outputs: Sequence[Any]) -> Any:
        """Returns the result with these outputs of the segment in it."""
        return jax.tree.unflatten(self.out_tree, [outputs[k] for k in self.outputs])

    def made(self, result: Any) -> list[Any]:
        """Returns the segment's outputs, given the result."""
        return _sorted(self.outputs, jax.tree.leaves(result))


def trees(traced: Any, program: Program, outputs: Sequence[int | None], lowered: Lowered) -> Trees | None:
    """Returns how the only segment of a program is called in its function's trees; None where it is not so.

    Not so: several workers, Runs or micro-batches; static arguments or results; keyword arguments; captured
    constants; leaves that are kept in another dtype, are not read, or are only partly taken over; state that
    would be compiled into the memory of other state.

    Args:
        traced: the function. program, outputs: of its plan. lowered: the segment.
    """
    run = _only_run(program)
    if run is None or not _plain(traced):
        return None
    reads = {b.value: k for k, b in enumerate(run.inputs)}
    names = {b: k for k, b in enumerate(run.outputs)}
    renamed = {i.new: names[i.old] for i in program.workers[0].instructions if isinstance(i, Rename)}
    found = dict(program.workers[0].results)
    made = [found[p] for (p,) in positions_of(traced.out_leaves, outputs)]
    inputs = tuple(reads.get(leaf.values[0], -1) for leaf in traced.leaves)
    returned = tuple((names | renamed).get(b, -1) for b in made)
    if sorted(inputs) != list(range(len(run.inputs))) or {*returned} != {*range(len(run.outputs))}:
        return None
    if not (
        _as_traced(traced.leaves, inputs, lowered.inputs)
        and _as_traced(traced.out_leaves, returned, lowered.outputs)
    ):
        return None
    positional = traced.in_tree.children()[0]
    donated = _whole(positional, [k in run.donated for k in inputs])
    if donated is None or not _heirs_fit(inputs, returned, run, renamed, lowered):
        return None
    return Trees(positional, traced.out_tree, inputs, returned, donated)


def _only_run(program: Program) -> Run | None:
    if len(program.workers) != 1 or program.microbatches != 1:
        return None
    instructions = program.workers[0].instructions
    first, others = instructions[0], instructions[1:]
    if not isinstance(first, Run) or not all(isinstance(i, Free | Rename) for i in others):
        return None
    old = [i.old for i in others if isinstance(i, Rename)]
    return first if {*old} <= {*first.outputs} and len({*old}) == len(old) else None


def _plain(traced: Any) -> bool:
    """Whether arguments and results are arrays, one for each value, and nothing else is read."""
    if traced.statics or traced.static_args or traced.static_kwargs or traced.out_statics or traced.constants:
        return False
    if traced.in_tree.children()[1].num_leaves:
        return False
    return all(len(leaf.values) == 1 for leaf in (*traced.leaves, *traced.out_leaves))


def _as_traced(leaves: Sequence[Any], which: Sequence[int], kept: Sequence[jax.ShapeDtypeStruct]) -> bool:
    """Whether leaves are kept in the dtypes in which they were traced."""
    return all(kept[k].dtype == as_dtype(leaf.dtype) for leaf, k in zip(leaves, which, strict=True))


def _whole(positional: Any, donated: Sequence[bool]) -> tuple[int, ...] | None:
    """Which arguments are donated; None if one is in part."""
    found, rest = list[int](), iter(donated)
    for k, argument in enumerate(positional.children()):
        mine = {*itertools.islice(rest, argument.num_leaves)}
        if len(mine) > 1:
            return None
        found += [k] if True in mine else []
    return tuple(found)


def _heirs_fit(
    inputs: Sequence[int], outputs: Sequence[int], run: Run, renamed: Mapping[Buffer, int], lowered: Lowered
) -> bool:
    """Whether each donated input's memory goes to what replaces it.

    JAX gives it to the first output of its shape and dtype that is still without one.
    """
    waiting = [k for k in inputs if k in run.donated]
    for o in outputs:
        for k in waiting:
            if _kind(lowered.inputs[k]) == _kind(lowered.outputs[o]):
                waiting.remove(k)
                if renamed.get(run.inputs[k], o) != o:
                    return False
                break
    return True


def _kind(x: jax.ShapeDtypeStruct) -> tuple[Any, Any]:
    return x.shape, x.dtype


def _sorted(places: Sequence[int], leaves: Sequence[Any]) -> list[Any]:
    """The leaves in the order of their places; of several with one place, the last."""
    return [leaf for _, leaf in sorted(dict(zip(places, leaves, strict=True)).items(), key=lambda x: x[0])]
