"""The rewriting that cuts scans over layers: values that are stacked become tuples of pieces along dim 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jax import lax
from jax.extend.core import JaxprEqn, Literal, Var

from autopar.core.graph import Phase, Rule
from autopar.trace import compat, marks
from autopar.trace.compat import Atom
from autopar.trace.flat import Builder, Flat, Mark, inline
from autopar.trace.held_function import with_function
from autopar.trace.leading import SUMMED, on_piece, on_pieces, piece_of, stacked_operands

if TYPE_CHECKING:
    from autopar.trace.scans import _Wanted

Pieces = tuple[Var, ...]


class Cutter:
    """Rewrites one step; `notes` gathers what could not be done piece by piece."""

    def __init__(self, rules: Callable[[JaxprEqn], Rule | None], sizes: Sequence[int]):
        self.rules, self.sizes, self.length = rules, tuple(sizes), sum(sizes)
        self.starts = tuple(sum(sizes[:k]) for k in range(len(sizes)))
        self.notes: list[str] = []
        self.scans = 0

    def cut(self, wanted: _Wanted, nested: bool) -> tuple[Flat, tuple[int, ...], tuple[int, ...]]:
        """Returns a function in pieces, and into how many each input and each result was cut.

        Args:
            wanted: the function, and what is to be known in pieces.
            nested: whether it is that of a gradient equation, still to be differentiated.
        """
        return _Rewriting(self, wanted, nested).run()


class _Rewriting:
    """One function being rewritten: `whole` and `pieces` say what has become of each old variable."""

    def __init__(self, cutter: Cutter, wanted: _Wanted, nested: bool):
        self.cutter, self.wanted, self.nested = cutter, wanted, nested
        self.builder = Builder(constants=list(wanted.flat.constants))
        self.whole: dict[Var, Atom] = {}
        self.pieces: dict[Var, Pieces] = {}
        self.owner: dict[Var, str] = {}

    def run(self) -> tuple[Flat, tuple[int, ...], tuple[int, ...]]:
        """Returns the new function, and the numbers of pieces of its inputs and results."""
        flat = self.wanted.flat
        inputs: list[Var] = []
        for v in flat.inputs:
            if self._is_stack(v):
                self.pieces[v] = self._fresh(v)
            inputs += self.pieces.get(v, (v,))
        for i, (equation, mark) in enumerate(zip(flat.equations, flat.marks)):
            self._equation(i, equation, mark)
        outputs: list[Atom] = []
        for a in flat.outputs:
            outputs += self.pieces.get(a, (self._read(a),)) if isinstance(a, Var) else (a,)
        counts = tuple(
            tuple(len(self.pieces.get(a, (a,))) if isinstance(a, Var) else 1 for a in atoms)
            for atoms in (flat.inputs, flat.outputs)
        )
        return self.builder.flat(inputs, outputs), counts[0], counts[1]

    def _is_stack(self, v: Var) -> bool:
        shape = v.aval.shape  # type: ignore[attr-defined]
        return v in self.wanted.variables and shape and shape[0] % self.cutter.length == 0

    def _fresh(self, v: Any) -> Pieces:
        length = self.cutter.length
        return tuple(compat.variable(piece_of(v.aval, n, length)) for n in self.cutter.sizes)

    def _read(self, a: Atom) -> Atom:
        return self.whole.get(a, a) if isinstance(a, Var) else a

    def _concatenated(self, a: Atom, like: JaxprEqn) -> Atom:
        """Returns an operand as one value, its pieces put together if it has any."""
        if not isinstance(a, Var) or a not in self.pieces:
            return self._read(a)
        if a not in self.whole:
            where = compat.line_of(like)
            aval: Any = a.aval
            note = f"the pieces of a {aval.str_short()} are put together for {like.primitive.name}"
            self.cutter.notes.append(f"{where}: {note}" if where else note)
            params = {"dimension": 0}
            self.whole[a] = self.builder.bind(lax.concatenate_p, self.pieces[a], [a.aval], params, like=like)[
                0
            ]
        return self.whole[a]

    def _in_pieces(self, a: Atom, like: JaxprEqn, mark: Mark) -> Sequence[Atom]:
        """Returns an operand in pieces, sliced if it is known as a whole only."""
        if not isinstance(a, Var) or a in self.pieces:
            return self.pieces[a] if isinstance(a, Var) else (a,) * len(self.cutter.sizes)
        aval: Any = a.aval
        unit, rank = aval.shape[0] // self.cutter.length, len(aval.shape)
        sliced: list[Var] = []
        for start, n in zip(self.cutter.starts, self.cutter.sizes):
            params = {
                "start_indices": (start * unit, *(0,) * (rank - 1)),
                "limit_indices": ((start + n) * unit, *aval.shape[1:]),
                "strides": None,
            }
            made = piece_of(aval, n, self.cutter.length)
            sliced += self.builder.bind(lax.slice_p, [self._read(a)], [made], params, like=like)
        self.pieces[a] = tuple(sliced)
        return self.pieces[a]

    def _equation(self, i: int, equation: JaxprEqn, mark: Mark) -> None:
        if i in self.wanted.inner:
            self._gradient(equation, mark, self.wanted.inner[i])
        elif i in self.wanted.scans:
            self._scan(equation, mark)
        elif any(isinstance(a, Var) and a in self.pieces for a in equation.invars):
            self._piecewise(equation, mark)
        elif equation.primitive is lax.broadcast_in_dim_p and self._is_stack(equation.outvars[0]):
            self._repeated(equation, mark)
        else:
            self.builder.add(equation.replace(invars=[self._read(a) for a in equation.invars]), mark)

    def _repeated(self, equation: JaxprEqn, mark: Mark) -> None:
        """A value broadcast along the stack: each piece by itself, unless dim 0 comes from an operand."""
        operands = [self._read(a) for a in equation.invars]
        parts = [on_piece(equation, operands, [True], n, self.cutter.length) for n in self.cutter.sizes]
        if 0 in equation.params["broadcast_dimensions"] or None in parts:
            self.builder.add(equation.replace(invars=operands), mark)
            return
        made = [part for part in parts if part is not None]
        for part in made:
            self.builder.add(part, mark)
        self.pieces[equation.outvars[0]] = tuple(part.outvars[0] for part in made)

    def _piecewise(self, equation: JaxprEqn, mark: Mark) -> None:
        cut = [isinstance(a, Var) and a in self.pieces for a in equation.invars]
        scanned = compat.scan_of(equation) is not None or compat.inner_jaxprs(equation)
        rule = None if scanned else self.cutter.rules(equation)
        kept = on_pieces(equation, rule, cut, self.cutter.length)
        parts = None
        if kept is not None:
            assert rule is not None
            parts = self._parts(equation, mark, stacked_operands(rule, cut), kept)
        if kept is None or parts is None:
            operands = [self._concatenated(a, equation) for a in equation.invars]
            self.builder.add(equation.replace(invars=operands), mark)
            return
        for part in parts:
            self.builder.add(part, mark)
        for j, v in enumerate(equation.outvars):
            made = [part.outvars[j] for part in parts]
            if kept[j]:
                self.pieces[v] = tuple(made)
            else:
                self.whole[v] = self._reduced(equation, made, mark)

    def _parts(
        self, equation: JaxprEqn, mark: Mark, stacked: Sequence[bool], kept: Sequence[bool]
    ) -> list[JaxprEqn] | None:
        operands = [
            self._in_pieces(a, equation, mark) if s else (self._read(a),) * len(self.cutter.sizes)
            for a, s in zip(equation.invars, stacked)
        ]
        parts: list[JaxprEqn] = []
        for n, *values in zip(self.cutter.sizes, *operands):
            part = on_piece(equation, values, kept, n, self.cutter.length)
            if part is None:
                return None
            parts.append(part)
        return parts

    def _reduced(self, equation: JaxprEqn, partial: Sequence[Var], mark: Mark) -> Atom:
        total, *others = partial
        for other in others:
            primitive = SUMMED[equation.primitive.name]
            (total,) = self.builder.bind(primitive, [total, other], [total.aval], {}, mark, equation)
        return total

    def _scan(self, equation: JaxprEqn, mark: Mark) -> None:
        scan = compat.scan_of(equation)
        assert scan is not None
        ends = scan.consts, scan.consts + scan.carries
        consts = [self._concatenated(a, equation) for a in equation.invars[: ends[0]]]
        carries = [self._concatenated(a, equation) for a in equation.invars[ends[0] : ends[1]]]
        scanned = [self._in_pieces(a, equation, mark) for a in equation.invars[ends[1] :]]
        phase = mark.phase or marks.phase_of(equation)
        stem = self._stem(scanned, phase)
        for parts in scanned:
            self.owner.setdefault(parts[0], stem)  # type: ignore[arg-type]
        stacked: list[dict[int, Var]] = [{} for _ in equation.outvars[scan.carries :]]
        order = range(len(self.cutter.sizes))
        for k in reversed(order) if scan.reverse else order:
            operands = [*consts, *carries, *(x[k] for x in scanned)]
            results = self._trip(equation, operands, k, Mark(mark.layer or self._name(stem, k), phase))
            carries = results[: scan.carries]
            for slot, value in zip(stacked, results[scan.carries :]):
                assert isinstance(value, Var)
                slot[k] = value
        self.whole.update(zip(equation.outvars, carries))
        for v, slot in zip(equation.outvars[scan.carries :], stacked):
            self.pieces[v] = tuple(slot[k] for k in order)
            self.owner[self.pieces[v][0]] = stem

    def _stem(self, scanned: Sequence[Sequence[Atom]], phase: Phase | None) -> str:
        """Returns a name for a scan's layers; a backward scan has that of the forward one it belongs to."""
        known = [self.owner[x[0]] for x in scanned if isinstance(x[0], Var) and x[0] in self.owner]
        if phase is Phase.BACKWARD and known:
            return known[0]
        self.cutter.scans += 1
        return "scan" if self.cutter.scans == 1 else f"scan_{self.cutter.scans - 1}"

    def _name(self, stem: str, k: int) -> str:
        start, n = self.cutter.starts[k], self.cutter.sizes[k]
        return f"{stem}[{start}]" if n == 1 else f"{stem}[{start}:{start + n}]"

    def _trip(self, equation: JaxprEqn, operands: Sequence[Atom], k: int, mark: Mark) -> list[Atom]:
        """Returns the carries and stacked results of one run of layers."""
        scan = compat.scan_of(equation)
        assert scan is not None
        n = self.cutter.sizes[k]
        if n > 1:
            avals = [
                v.aval if j < scan.carries else piece_of(v.aval, n, self.cutter.length)
                for j, v in enumerate(equation.outvars)
            ]
            results = [compat.variable(aval) for aval in avals]
            params = {**equation.params, "length": n, "unroll": min(scan.unroll, n)}
            self.builder.add(equation.replace(invars=list(operands), outvars=results, params=params), mark)
            return list(results)
        first = scan.consts + scan.carries
        slices = [self._squeezed(a, equation, mark) for a in operands[first:]]
        keep = compat.DIFFERENTIABLE if self.nested else frozenset[str]()
        stack = equation.source_info.name_stack
        made = inline(self.builder, scan.body, [*operands[:first], *slices], mark, keep=keep, stack=stack)
        return made[: scan.carries] + [self._stacked(a, equation, mark) for a in made[scan.carries :]]

    def _squeezed(self, a: Atom, like: JaxprEqn, mark: Mark) -> Atom:
        aval: Any = a.aval
        made = aval.update(shape=aval.shape[1:])
        if isinstance(a, Literal):
            return a
        return self.builder.bind(lax.squeeze_p, [a], [made], {"dimensions": (0,)}, mark, like)[0]

    def _stacked(self, a: Atom, like: JaxprEqn, mark: Mark) -> Atom:
        aval: Any = a.aval
        made = aval.update(shape=(1, *aval.shape))
        params = {
            "shape": made.shape,
            "broadcast_dimensions": tuple(range(1, len(made.shape))),
            "sharding": None,
        }
        return self.builder.bind(lax.broadcast_in_dim_p, [a], [made], params, mark, like)[0]

    def _gradient(self, equation: JaxprEqn, mark: Mark, inner: _Wanted) -> None:
        """Cuts inside a gradient equation: gradients of stacked operands come in pieces."""
        if not inner.scans:
            operands = [self._concatenated(a, equation) for a in equation.invars]
            self.builder.add(equation.replace(invars=operands), mark)
            return
        function, inputs, outputs = self.cutter.cut(inner, nested=True)
        operands, positions = list[Atom](), list[range]()
        for a, count in zip(equation.invars, inputs):
            values = [self._concatenated(a, equation)] if count == 1 else self._in_pieces(a, equation, mark)
            positions.append(range(len(operands), len(operands) + count))
            operands += values
        wrt = [p for i in equation.params["wrt"] for p in positions[i]]
        counts = [*outputs, *(inputs[i] for i in equation.params["wrt"])]
        results: list[Var] = []
        for v, count in zip(equation.outvars, counts, strict=True):
            made = self._fresh(v) if count > 1 else (v,)
            if count > 1:
                self.pieces[v] = made
            results += made
        cut = with_function(self.builder, equation.replace(outvars=results), function, operands, wrt)
        self.builder.add(cut, mark)
