"""The factor rule of each equation, asked of Shardy once per distinct equation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, jaxpr_as_fun

from autopar.core.graph import Rule
from autopar.trace import compat
from autopar.trace.kinds import Kinds, signature
from autopar.trace.lowered import Composer, with_rules

STRUCTURED = frozenset({"scan", "autopar_grad", "autopar_either", "shard_map", "pallas_call"})
"""Equations that hold jaxprs of their own and have no rule as a whole."""

_NESTED = frozenset({"while", "cond"})
"""Equations whose rule is that of what is inside; sums are finished inside, so they leave nothing partial."""


@dataclass
class RuleBook:
    """A cache from distinct equations (primitive, parameters, shapes) to rules; share one to keep it.

    Attributes:
        asked: how many distinct equations were lowered so far.
    """

    asked: int = 0
    _rules: dict[Any, Rule | None] = field(default_factory=dict)
    _notes: dict[Any, str] = field(default_factory=dict)

    def __call__(self, equation: JaxprEqn) -> Rule | None:
        """Returns the rule of one equation, None when there is none (see `note`)."""
        key = signature(equation)
        if key not in self._rules:
            self.learn([equation])
        return self._rules[key]

    def note(self, equation: JaxprEqn) -> str:
        """Returns why an equation has no rule, or "" when it has one."""
        return self._notes.get(signature(equation), "") if self._notes else ""

    def learn(self, equations: Iterable[JaxprEqn]) -> list[Rule | None]:
        """Returns a rule per equation, None where there is none.

        Those that are not known yet are lowered together, in one module.
        """
        kinds = Kinds.among(list(equations))
        return kinds.spread(self.of_kinds(kinds))

    def of_kinds(self, kinds: Kinds) -> list[Rule | None]:
        """Returns a rule per kind, as `learn` per equation."""
        unknown: dict[Any, JaxprEqn] = {}
        equations = kinds.first
        keys = list(map(signature, equations))
        for key, equation in zip(keys, equations):
            if key not in self._rules and key not in unknown:
                unknown[key] = equation
        for key in [k for k, e in unknown.items() if e.primitive.name in STRUCTURED]:
            self._store(key, None, f"{unknown.pop(key).primitive.name} has no rule as a whole")
        self._ask(list(unknown.items()))
        return [self._rules[key] for key in keys]

    def _ask(self, unknown: list[tuple[Any, JaxprEqn]]) -> None:
        if not unknown:
            return
        try:
            rules = rules_of([e for _, e in unknown])
        except Exception as error:  # whatever a primitive's lowering may raise: the plan says so, and goes on
            if len(unknown) == 1:
                key, equation = unknown[0]
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                self._store(key, None, f"{equation.primitive.name} cannot be lowered by itself ({reason})")
                return
            middle = len(unknown) // 2  # one bad equation spoils a module: look for it by halves
            self._ask(unknown[:middle])
            self._ask(unknown[middle:])
            return
        for (key, equation), rule in zip(unknown, rules):
            self.asked += 1
            self._store(key, rule, f"{equation.primitive.name}: nothing known of {', '.join(rule.notes)}")

    def _store(self, key: Any, rule: Rule | None, note: str) -> None:
        known = rule is not None and not rule.notes
        self._rules[key] = rule
        if not known:
            self._notes[key] = note


def rules_of(equations: Sequence[JaxprEqn]) -> list[Rule]:
    """Returns one rule per equation: all are lowered as independent parts of one function."""
    return read_rules(equations, lower(equations))


def lower(equations: Sequence[JaxprEqn]) -> Any:
    """Returns a module whose main function takes all equations' operands and returns all their results."""
    inputs, outputs, made = [], [], []
    for equation in equations:
        operands = [a if isinstance(a, Literal) else compat.variable(a.aval) for a in equation.invars]
        results = [compat.variable(v.aval) for v in equation.outvars]
        inputs += [a for a in operands if not isinstance(a, Literal)]
        outputs += results
        made.append(equation.replace(invars=operands, outvars=results))
    closed = ClosedJaxpr(compat.make_jaxpr(inputs, outputs, made, "rules"), ())
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in inputs]  # type: ignore[attr-defined]
    return jax.jit(jaxpr_as_fun(closed), keep_unused=True).lower(*shapes).compiler_ir()


def read_rules(equations: Sequence[JaxprEqn], module: Any) -> list[Rule]:
    """Returns one rule per equation from the module that `lower` made of them."""
    composer = Composer(with_rules(module))
    arguments, results = (iter(tensors) for tensors in composer.main())
    ends = iter(composer.ends())
    rules = []
    for equation in equations:
        operands = [None if isinstance(a, Literal) else next(arguments) for a in equation.invars]
        made = [next(results) for _ in equation.outvars]
        last = {next(ends) for _ in equation.outvars}
        # A typed PRNG key is lowered with the dims of its data behind its own.
        operands = [t and t[: len(a.aval.shape)] for t, a in zip(operands, equation.invars)]  # type: ignore[attr-defined]
        made = [t[: len(v.aval.shape)] for t, v in zip(made, equation.outvars)]  # type: ignore[attr-defined]
        rule = composer.pool.rule(operands, made, composer.notes_on([*operands, *made]))
        if equation.primitive.name in _NESTED:
            rule = replace(rule, reductions=(), fixed=tuple(sorted({*rule.fixed, *rule.reductions})))
        # a gather that masks what lies outside: nobody can scatter what the mask is about to read
        rules.append(replace(rule, inside=bool(rule.reductions) and "stablehlo.select" in last))
    return rules
