"""Captures a user's step: one run on tracers, normalised into a graph that the other rooms can plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.extend.core import Literal

from autopar.core.errors import BadInput
from autopar.core.graph import Graph
from autopar.trace import boundary, gradient, marks
from autopar.trace.arguments import Call, Tree, shapes, split_call, take_apart
from autopar.trace.fingerprint import fingerprint
from autopar.trace.flat import Flat, dce, flatten
from autopar.trace.graph import trace
from autopar.trace.rules import RuleBook
from autopar.trace.staging import Staged, definition, stage
from autopar.trace.state import Roles, roles
from autopar.trace.traced import Assign, Leaf, Traced

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
    remat: frozenset[str] | bool = False,
    rules: RuleBook = RULES,
) -> Traced:
    """Returns the graph of `fun(*args, **kwargs)` with the equations behind it; nothing is computed.

    Args:
        fun: a pure function of pytrees.
        args: example arguments; `jax.ShapeDtypeStruct`s in place of arrays are enough.
        kwargs: keyword arguments, likewise.
        static_argnums: positions of arguments that are passed on as they are; the function may branch on them.
        static_argnames: names of such arguments.
        batch_argnums: positions of the arguments that are the batch; None: those that are no state and whose arrays agree
            on a leading dim (see `state.roles`).
        microbatches: how many pieces the batch is cut into; shapes in the graph are those of one.
        assign: completes the layers and phases that names leave open (`stages.assign.assign`).
        remat: layers whose backward computes the forward again (names; True for all); only where `autopar.grad` or
            `autopar.value_and_grad` says what is differentiated.
        rules: where factor rules are kept.
    Raises:
        TraceError: the function cannot be captured; the message names the line.
        BadInput: an argument number that does not exist, a batch that `microbatches` does not divide.
    """
    if microbatches < 1:
        raise BadInput(f"expected at least 1 micro-batch, got {microbatches}")
    call = split_call(fun, args, kwargs or {}, static_argnums, static_argnames)
    tree = take_apart((call.args, dict(call.kwargs)), call.describe, definition(fun))
    full = shapes(tree.arrays)
    staged = stage(fun, call, tree, full)
    role = roles(call, tree, full, staged.result, batch_argnums, microbatches)
    flat = normalise(staged, assign, remat, rules)
    if microbatches > 1:
        raise NotImplementedError("micro-batches are not joined to capture yet; use microbatches=1")
    traced = _assemble(fun, call, tree, full, staged, role, flat, rules)
    traced = replace(traced, graph=_assigned(traced.graph, assign))
    traced = replace(traced, fingerprint=fingerprint(traced))
    traced.check()
    return traced


def normalise(staged: Staged, assign: Assign, remat: frozenset[str] | bool, rules: RuleBook) -> Flat:
    """Returns a staged function as marked, flat equations, gradient equations differentiated layer by layer."""
    flat = dce(flatten(staged.closed))
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
    fun: Callable[..., Any],
    call: Call,
    tree: Tree,
    full: Sequence[Any],
    staged: Staged,
    role: Roles,
    flat: Flat,
    rules: RuleBook,
) -> Traced:
    paths = [call.describe(path) for path in tree.paths]
    out_paths = [f"result{jax.tree_util.keystr(tuple(path))}" for path in staged.result.paths]
    names = {v: name for v, name in zip(flat.outputs, out_paths) if not isinstance(v, Literal)}
    names |= dict(zip(flat.inputs, paths))
    traced = trace(flat, rules, names)
    graph = traced.graph
    leaves = tuple(
        Leaf(path, tuple(s.shape), str(s.dtype), (v,), is_batch, position)
        for path, s, v, is_batch, position in zip(paths, full, graph.inputs, role.batch, tree.positions)
    )
    return replace(
        traced,
        graph=replace(
            graph,
            aliases=role.aliases,
            batch=tuple(v for leaf in leaves if leaf.batch for v in leaf.values),
        ),
        in_tree=tree.structure,
        out_tree=staged.result.structure,
        leaves=leaves,
        out_leaves=_out_leaves(flat, graph, staged.result, out_paths),
        statics=tree.statics,
        out_statics=staged.result.statics,
        name=getattr(fun, "__name__", type(fun).__name__),
    )


def _out_leaves(flat: Flat, graph: Graph, result: Tree, paths: Sequence[str]) -> tuple[Leaf, ...]:
    leaves = []
    for path, s, v, atom, position in zip(
        paths, result.arrays, graph.outputs, flat.outputs, result.positions, strict=True
    ):
        literal = atom.val if isinstance(atom, Literal) else None
        values = () if v is None else (v,)
        leaves.append(Leaf(path, tuple(s.shape), str(s.dtype), values, position=position, literal=literal))
    return tuple(leaves)
