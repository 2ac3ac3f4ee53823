"""Captures a user's step: run on tracers, normalised into a graph that the other rooms can plan."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.extend.core import Literal, Var

from autopar.core.errors import AutoparError, BadInput, MixedExamples
from autopar.core.graph import Graph
from autopar.trace import boundary, gradient, marks, microbatch, rng_slices
from autopar.trace.arguments import Call, Tree, shapes, split_call, take_apart
from autopar.trace.either import Remats
from autopar.trace.fingerprint import fingerprint
from autopar.trace.flat import Flat, dce, flatten
from autopar.trace.graph import trace
from autopar.trace.kept import kept_bytes
from autopar.trace.microbatch import Analysis
from autopar.trace.rules import RuleBook
from autopar.trace.scans import CutScans, cut_scans
from autopar.trace.staging import Staged, definition, failed_at, stage
from autopar.trace.state import Roles, roles
from autopar.trace.traced import Assign, Leaf, Traced
from autopar.trace.work import flops, nbytes

RULES = RuleBook()
"""What Shardy has been asked so far in this process; pass another RuleBook to `capture` to start afresh."""


def capture(
    fun: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    static_argnums: Sequence[int] = (),
    static_argnames: Sequence[str] = (),
    batch_argnums: Sequence[int] | None = None,
    microbatches: int = 1,
    assign: Assign = lambda graph: graph,
    remat: Remats = False,
    layer_scans: Sequence[int] | bool = True,
    rules: RuleBook = RULES,
) -> Traced:
    """Returns the graph of `fun(*args, **kwargs)` with the equations behind it; nothing is computed.

    Args:
        fun: a pure function of pytrees.
        args: example arguments; `jax.ShapeDtypeStruct`s in place of arrays are enough.
        kwargs: keyword arguments, likewise.
        static_argnums: positions of arguments passed on as they are; the function may branch on them.
        static_argnames: names of such arguments.
        batch_argnums: positions of the arguments that are the batch; None: those that are no state and whose
            arrays agree on a leading dim (see `state.roles`).
        microbatches: how many pieces the batch is cut into; shapes in the graph are those of one.
        assign: completes the layers and phases that names leave open (`stages.assign.assign`).
        remat: what layers' backward computes again of their forward, for all (True: everything) or by name;
            only where `autopar.grad` or `autopar.value_and_grad` says what is differentiated.
        layer_scans: how many layers each piece of a scan over layers has (see `scans.cut_scans`);
            True: one each; False: scans stay whole.
        rules: where factor rules are kept.
    Raises:
        TraceError: the function cannot be captured; the message names the line.
        MixedExamples: the micro-batches' results do not make the full batch's; the message names the line.
        BadInput: an argument that does not exist, a batch that `microbatches` does not divide.
    """
    _check_count(microbatches)
    begun = begin(
        fun,
        args,
        kwargs,
        static_argnums=static_argnums,
        static_argnames=static_argnames,
        batch_argnums=batch_argnums,
    )
    prepared = split(begun, microbatches, layer_scans=layer_scans, rules=rules)
    return finish(prepared, assign=assign, remat=remat, rules=rules)


def _check_count(microbatches: int) -> None:
    if microbatches < 1:
        raise BadInput(f"expected at least 1 micro-batch, got {microbatches}")


def begin(
    fun: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    static_argnums: Sequence[int] = (),
    static_argnames: Sequence[str] = (),
    batch_argnums: Sequence[int] | None = None,
) -> Begun:
    """Returns the step traced for the full batch, which every number of micro-batches begins with. Arguments
    as in `capture`."""
    call = split_call(fun, args, kwargs or {}, static_argnums, static_argnames)
    tree = take_apart((call.args, dict(call.kwargs)), call.describe, definition(fun))
    full = shapes(tree.arrays)
    staged = stage(fun, call, tree, full)
    return Begun(fun, call, tree, tuple(full), staged, dce(flatten(staged.closed)), batch_argnums)


def split(
    begun: Begun,
    microbatches: int,
    *,
    layer_scans: Sequence[int] | bool = True,
    rules: RuleBook = RULES,
) -> Prepared:
    """Returns a step for one of `microbatches` micro-batches. Arguments and errors as in `capture`."""
    _check_count(microbatches)
    b = begun
    role = roles(b.call, b.tree, b.full, b.staged.result, b.batch_argnums, microbatches)
    step = _Step(b.fun, b.call, b.tree, b.full, b.staged, role, microbatches)
    return Prepared(step, *_cut_batch(step, b.flat, layer_scans, rules))


def finish(
    prepared: Prepared,
    *,
    assign: Assign = lambda graph: graph,
    remat: Remats = False,
    rules: RuleBook = RULES,
) -> Traced:
    """Returns the second half of `capture`: gradients differentiated layer by layer, and the graph."""
    cut, analysis = prepared.cut, prepared.analysis
    gradients = _gradient_variables(cut.flat)
    flat = normalise(cut.flat, assign, remat, rules)
    traced = _assemble(prepared.step, cut, flat, prepared.index, gradients, rules)
    graph = traced.graph
    if analysis is not None:
        graph = replace(graph, combine=analysis.combinations(graph, traced.values))
    traced = replace(traced, graph=_assigned(graph, assign))
    traced = replace(traced, fingerprint=fingerprint(traced))
    traced.check()
    return traced


@dataclass(frozen=True)
class Begun:
    """A function, its arguments, and what one run on tracers told about them.

    Attributes:
        fun, call, tree: the function and its arguments. full: shapes of the full batch's arrays.
        staged, flat: its jaxpr, as it was traced and flattened.
        batch_argnums: as `capture` got them.
    """

    fun: Callable[..., Any]
    call: Call
    tree: Tree
    full: tuple[Any, ...]
    staged: Staged
    flat: Flat
    batch_argnums: Sequence[int] | None


@dataclass(frozen=True)
class _Step:
    """A function, its arguments and what one run on tracers told about them."""

    fun: Callable[..., Any]
    call: Call
    tree: Tree
    full: tuple[Any, ...]
    staged: Staged
    role: Roles
    microbatches: int

    @property
    def paths(self) -> list[str]:
        """Returns the names of the arguments' arrays."""
        return [self.call.describe(path) for path in self.tree.paths]


@dataclass(frozen=True)
class Prepared:
    """A step for one micro-batch, not yet differentiated.

    Attributes:
        step: what was traced. cut: its equations, scans over layers cut.
        analysis: how micro-batches combine, None with a single one.
        index: the variable of the micro-batch's index, if the step needs to know it.
    """

    step: _Step
    cut: CutScans
    analysis: Analysis | None
    index: Var | None

    @property
    def flops(self) -> float:
        """The step's floating-point operations for one micro-batch; a backward counts twice its forward."""
        ahead = set(gradient.gradient_equations(self.cut.flat))
        return sum(flops(e) * (3 if i in ahead else 1) for i, e in enumerate(self.cut.flat.equations))

    @property
    def differentiates(self) -> bool:
        """Whether `autopar.grad` says what is differentiated, so that layers may compute things again."""
        return bool(gradient.gradient_equations(self.cut.flat))

    @property
    def least_bytes(self) -> int:
        """Bytes that all devices together need at least: state, sums of gradients, and what the backward pass
        of one micro-batch keeps, where nothing is computed again. Only `autopar.grad` tells of a backward."""
        flat = self.cut.flat
        pieces = zip(self.step.role.batch, self.cut.inputs, strict=True)
        is_batch = [b for b, n in pieces for _ in range(n)]
        state = [v for v, b in zip(flat.inputs, is_batch) if not b]
        ahead = [flat.equations[i] for i in gradient.gradient_equations(flat)]
        kept = sum(kept_bytes(e) for e in ahead)
        several = self.step.microbatches > 1
        sums = [e.invars[i] for e in ahead for i in e.params["wrt"]] if several else []
        return sum(nbytes(v.aval) for v in [*state, *sums]) + kept


def _cut_batch(
    step: _Step, whole: Flat, layer_scans: Sequence[int] | bool, rules: RuleBook
) -> tuple[CutScans, Analysis | None, Var | None]:
    """Returns the step for one micro-batch, how its results combine, and its index if it needs to know it."""
    batch = [i for i, is_batch in enumerate(step.role.batch) if is_batch]
    full = _cut_scans(whole, layer_scans, batch, rules)
    m = step.microbatches
    if m == 1:
        return full, None, None
    staged = _staged_cut(step)
    micro = _cut_scans(dce(flatten(staged.closed)), layer_scans, batch, rules)
    if micro.inputs != full.inputs:
        raise MixedExamples(
            "a scan over layers for the full batch is none for a micro-batch; use micro_batches=1"
        )
    starts = list(itertools.accumulate(full.inputs, initial=0))
    pieces = [starts[i] for i in batch]  # of the batch nothing is cut by layers
    analysis = microbatch.analyse(full.flat, micro.flat, m, pieces, rules)
    if not rng_slices.draws_per_example(analysis.flat, full.flat):
        return replace(micro, flat=analysis.flat), analysis, None
    sliced = microbatch.slice_rng(analysis.flat, full.flat, m)
    return replace(micro, flat=sliced), analysis, sliced.inputs[-1]


def _staged_cut(step: _Step) -> Staged:
    """Returns the function run on one micro-batch. Raises MixedExamples where it fails on that."""
    try:
        return stage(step.fun, step.call, step.tree, _cut_shapes(step))
    except AutoparError:
        raise
    except Exception as error:  # whatever a user's function raises
        where = failed_at(error) or definition(step.fun) or "the function"
        raise MixedExamples(
            f"{where}: it runs on the full batch, but on one of {step.microbatches} micro-batches it raises "
            f"{type(error).__name__}: {error}; use micro_batches=1, or say which arguments are the batch "
            "(batch_argnums)"
        ) from error


def _cut_scans(
    flat: Flat, layer_scans: Sequence[int] | bool, batch: Sequence[int], rules: RuleBook
) -> CutScans:
    if layer_scans is False:
        return CutScans(flat, (1,) * len(flat.inputs), (1,) * len(flat.outputs), ())
    pieces = None if layer_scans is True else layer_scans
    return cut_scans(flat, rules, pieces=pieces, batch_inputs=batch)


def _cut_shapes(step: _Step) -> list[jax.ShapeDtypeStruct]:
    m = step.microbatches
    if not any(step.role.batch):
        raise BadInput(
            f"micro_batches={m}, but no argument was recognised as the batch (arrays that agree on a leading "
            f"dim of at least {m}); say which with batch_argnums"
        )
    cut = []
    for path, s, is_batch in zip(step.paths, step.full, step.role.batch):
        if is_batch and s.shape[0] % m:
            raise BadInput(
                f"{path} has {s.shape[0]} examples, which {m} micro-batches do not divide; "
                f"choose a batch that is a multiple of {m} or another number of micro_batches"
            )
        shape = (s.shape[0] // m, *s.shape[1:]) if is_batch else s.shape
        cut.append(jax.ShapeDtypeStruct(shape, s.dtype, weak_type=s.weak_type))
    return cut


def _gradient_variables(flat: Flat) -> list[tuple[Any, Any]]:
    """Returns (gradient, what it is for) as far as gradient equations say it."""
    found = []
    for i in gradient.gradient_equations(flat):
        equation = flat.equations[i]
        wrt = equation.params["wrt"]
        made = equation.outvars[len(equation.outvars) - len(wrt) :]
        found += [(v, equation.invars[n]) for v, n in zip(made, wrt)]
    return found


def normalise(flat: Flat, assign: Assign, remat: Remats, rules: RuleBook) -> Flat:
    """Returns a step with its marks, gradient equations differentiated layer by layer, boundaries removed."""
    if gradient.gradient_equations(flat):
        flat = gradient.differentiate(flat, assign, lambda f: trace(marks.annotate(f), rules).graph, remat)
        flat = boundary.remove(flat)  # they have done their work where the forward was cut
    return boundary.remove(marks.annotate(flat))


def _assigned(graph: Graph, assign: Assign) -> Graph:
    after = assign(graph)
    same = [e.op for e in graph.equations] == [e.op for e in after.equations]
    assert same, "assign says where equations belong, it does not add, drop or move them"
    return after


def _assemble(
    step: _Step,
    cut: CutScans,
    flat: Flat,
    index: Var | None,
    gradients: Sequence[tuple[Any, Any]],
    rules: RuleBook,
) -> Traced:
    result = step.staged.result
    out_paths = [f"result{jax.tree_util.keystr(tuple(path))}" for path in result.paths]
    names = dict(zip(_variables(flat.outputs), _piece_names(out_paths, cut.outputs)))
    names |= dict(zip(flat.inputs, [*_piece_names(step.paths, cut.inputs), "index of the micro-batch"]))
    traced = trace(flat, rules, {v: name for v, name in names.items() if isinstance(v, Var)})
    graph = traced.graph
    ids = {v: i for i, v in enumerate(traced.values)}
    leaves = tuple(
        Leaf(path, tuple(s.shape), str(s.dtype), values, is_batch, position)
        for path, s, values, is_batch, position in zip(
            step.paths, step.full, _grouped(graph.inputs, cut.inputs), step.role.batch, step.tree.positions
        )
    )
    batch = tuple(v for leaf in leaves if leaf.batch for v in leaf.values)
    return replace(
        traced,
        graph=replace(
            graph,
            aliases=_aliases(step.role, cut),
            batch=batch if index is None else (*batch, ids[index]),
            microbatches=step.microbatches,
            gradients=tuple((ids[g], ids[p]) for g, p in gradients if g in ids and p in flat.inputs),
        ),
        in_tree=step.tree.structure,
        out_tree=result.structure,
        leaves=leaves,
        out_leaves=_out_leaves(flat, graph, step, cut, out_paths),
        static_args=step.call.static_args,
        static_kwargs=step.call.static_kwargs,
        statics=step.tree.statics,
        out_statics=result.statics,
        index=None if index is None else ids[index],
        name=getattr(step.fun, "__name__", type(step.fun).__name__),
        notes=(*traced.notes, *cut.notes),
    )


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [a if isinstance(a, Var) else object() for a in atoms]


def _piece_names(paths: Sequence[str], counts: Sequence[int]) -> list[str]:
    """Returns the name of each piece: the leaf's own, or "kernel piece 0", "kernel piece 1"…"""
    return [path if n == 1 else f"{path} piece {i}" for path, n in zip(paths, counts) for i in range(n)]


def _grouped(items: Sequence[Any], counts: Sequence[int]) -> list[tuple[Any, ...]]:
    supply = iter(items)
    return [tuple(itertools.islice(supply, n)) for n in counts]


def _aliases(role: Roles, cut: CutScans) -> tuple[tuple[int, int], ...]:
    """Returns the aliases of the graph's outputs and inputs: piece for piece."""
    inputs = _grouped(range(sum(cut.inputs)), cut.inputs)
    outputs = _grouped(range(sum(cut.outputs)), cut.outputs)
    pairs = [(outputs[o], inputs[i]) for o, i in role.aliases]
    return tuple(pair for os, is_ in pairs if len(os) == len(is_) for pair in zip(os, is_))


def _out_leaves(
    flat: Flat, graph: Graph, step: _Step, cut: CutScans, paths: Sequence[str]
) -> tuple[Leaf, ...]:
    result, leaves = step.staged.result, []
    for path, s, ids, atoms, position in zip(
        paths,
        result.arrays,
        _grouped(graph.outputs, cut.outputs),
        _grouped(flat.outputs, cut.outputs),
        result.positions,
        strict=True,
    ):
        literal = atoms[0].val if isinstance(atoms[0], Literal) else None
        values = () if literal is not None else ids
        leaves.append(Leaf(path, tuple(s.shape), str(s.dtype), values, position=position, literal=literal))
    return tuple(leaves)
