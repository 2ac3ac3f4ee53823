"""Factor rules: golden texts (operation in, rule out), and the properties that every rule must have.

`python tests/test_trace_rules.py` writes the golden file anew.
"""

from __future__ import annotations

import math
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Literal

from autopar.core.graph import OpKind
from autopar.trace import compat, work
from autopar.trace.factors import Pool
from autopar.trace.flat import dce, flatten
from autopar.trace.rules import RuleBook, lower, signature

GOLDEN = pathlib.Path(__file__).parent / "golden" / "trace_rules.txt"
F32, I32 = jnp.float32, jnp.int32


def arrays(*shapes: tuple[int, ...], dtype: Any = F32) -> tuple[Any, ...]:
    return tuple(jax.ShapeDtypeStruct(s, dtype) for s in shapes)


def indices(*shapes: tuple[int, ...]) -> tuple[Any, ...]:
    return arrays(*shapes, dtype=I32)


KEY = jax.eval_shape(lambda: jax.random.key(0))
NHWC = ("NHWC", "HWIO", "NHWC")


def conv(x: Any, w: Any, **options: Any) -> Any:
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC, **options)


def kernel_gradient(x: Any, w: Any, ct: Any) -> Any:
    return jax.vjp(lambda w: conv(x, w), w)[1](ct)[0]


CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "matrix product": (jnp.dot, arrays((8, 16), (16, 32))),
    "batched product": (jnp.matmul, arrays((4, 8, 16), (4, 16, 32))),
    "attention scores": (
        lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k),
        arrays((2, 8, 4, 16), (2, 8, 4, 16)),
    ),
    "vector product": (jnp.dot, arrays((16,), (16,))),
    "convolution": (conv, arrays((4, 8, 8, 3), (3, 3, 3, 16))),
    "grouped convolution": (
        lambda x, w: conv(x, w, feature_group_count=2),
        arrays((4, 8, 8, 6), (3, 3, 3, 16)),
    ),
    "gradient of a kernel": (kernel_gradient, arrays((4, 8, 8, 3), (3, 3, 3, 16), (4, 8, 8, 16))),
    "embedding": (lambda t, i: jnp.take(t, i, axis=0, mode="clip"), (*arrays((32, 16)), *indices((4, 8)))),
    "scatter-add": (lambda t, i, u: t.at[i].add(u), (*arrays((32, 16)), *indices((4,)), *arrays((4, 16)))),
    "dynamic slice": (lambda x, i: lax.dynamic_slice(x, (i, 0), (4, 16)), (*arrays((32, 16)), *indices(()))),
    "dynamic update slice": (
        lambda x, u, i: lax.dynamic_update_slice(x, u, (i, 0)),
        (*arrays((32, 16), (4, 16)), *indices(())),
    ),
    "reshape, split": (lambda x: x.reshape(4, 8, 3, 16), arrays((4, 8, 48))),
    "reshape, merge": (lambda x: x.reshape(32, 48), arrays((4, 8, 48))),
    "reshape, regroup": (lambda x: x.reshape(8, 4), arrays((4, 8))),
    "transpose": (lambda x: x.transpose(2, 0, 1), arrays((4, 8, 16))),
    "broadcast": (lambda x: jnp.broadcast_to(x, (4, 8, 16)), arrays((16,))),
    "broadcast of ones": (lambda x: jnp.broadcast_to(x, (4, 8)), arrays((4, 1))),
    "sum": (lambda x: x.sum(1), arrays((4, 8, 16))),
    "max": (lambda x: x.max(-1), arrays((4, 8))),
    "mean of all": (jnp.mean, arrays((4, 8))),
    "cumsum": (lambda x: jnp.cumsum(x, 1), arrays((4, 8))),
    "argmax": (lambda x: lax.argmax(x, 1, I32), arrays((4, 8))),
    "sort": (lambda x: lax.sort(x, dimension=1), arrays((4, 8))),
    "top_k": (lambda x: lax.top_k(x, 2), arrays((4, 8))),
    "concatenate": (lambda x, y: jnp.concatenate([x, y], 1), arrays((4, 8), (4, 16))),
    "slice": (lambda x: x[:, 2:6], arrays((4, 8))),
    "reverse": (lambda x: lax.rev(x, (1,)), arrays((4, 8))),
    "pad": (lambda x: jnp.pad(x, ((0, 0), (1, 1))), arrays((4, 8))),
    "max pooling": (
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
        arrays((4, 8, 8, 3)),
    ),
    "random bits": (lambda k: jax.random.bits(k, (4, 8)), (KEY,)),
    "split of a key": (lambda k: jax.random.split(k, 4), (KEY,)),
    "select": (jnp.where, (*arrays((4, 8), dtype=jnp.bool_), *arrays((4, 8), (4, 8)))),
    "softmax": (lambda x: jax.nn.softmax(x, -1), arrays((4, 8))),
    "gelu": (lambda x: jax.nn.gelu(x, approximate=False), arrays((4, 8))),
    "iota": (lambda: lax.broadcasted_iota(I32, (4, 8), 1), ()),
    "cast": (lambda x: x.astype(jnp.bfloat16), arrays((4, 8))),
    "optimization barrier": (lambda x: lax.optimization_barrier(x), arrays((4, 8))),
    "diagonal product": (lambda x, y: jnp.einsum("ij,ij->i", x, y), arrays((4, 8), (4, 8))),
    "cond": (
        lambda p, x: lax.cond(p, lambda x: x @ jnp.ones((8, 8)), lambda x: x + 1, x),
        (*arrays((), dtype=jnp.bool_), *arrays((4, 8))),
    ),
    "while": (lambda x: lax.while_loop(lambda c: c.sum() < 9, lambda c: c * 2, x), arrays((4, 8))),
    "cholesky": (jnp.linalg.cholesky, arrays((4, 8, 8))),
}


def equations_of(name: str) -> list[Any]:
    fun, args = CASES[name]
    return list(dce(flatten(jax.make_jaxpr(fun)(*args))).equations)


def text() -> str:
    book = RuleBook()
    lines = []
    for name in CASES:
        lines.append(f"# {name}")
        for e in equations_of(name):
            rule = book(e)
            shapes = ", ".join(a.aval.str_short(short_dtypes=True) for a in e.invars)
            lines.append(f"{e.primitive.name}({shapes}) {work.kind(e, rule)}: {rule or book.note(e)}")
    return "\n".join(lines) + "\n"


def cases(golden: str) -> list[str]:
    """Returns the text of each case, but one on jax ≥ 0.11, whose Shardy wants an updated dim whole."""
    parts = golden.split("# ")
    return parts if compat.version() < (0, 11) else [p for p in parts if not p.startswith("dynamic update")]


def test_rules_are_as_written() -> None:
    assert cases(text()) == cases(GOLDEN.read_text())


@pytest.mark.parametrize("name", CASES)
def test_every_dim_is_the_product_of_its_factors(name: str) -> None:
    book = RuleBook()
    for e in equations_of(name):
        rule = book(e)
        if rule is None:
            continue
        tensors = [*zip(rule.operands, e.invars), *zip(rule.results, e.outvars)]
        for dims, v in tensors:
            if dims is not None:
                assert [math.prod(rule.sizes[f] for f in d) for d in dims] == list(v.aval.shape)
        summed = {f for r in rule.results for d in r for f in d} & set(rule.reductions)
        assert not summed, "a factor that is summed is in no result"
        assert not set(rule.reductions) & set(rule.fixed)


def sliced(x: np.ndarray, dims: Any, sizes: Any, factor: int, half: int) -> np.ndarray:
    """Returns the part of x where `factor` has the upper or lower half of its range."""
    split = x.reshape([sizes[f] for d in dims for f in d])
    at = [f for d in dims for f in d].index(factor)
    n = sizes[factor] // 2
    part = np.take(split, range(half * n, half * n + n), axis=at)
    shape = [math.prod(n if f == factor else sizes[f] for f in d) for d in dims]
    return part.reshape(shape)


SHARDABLE = [
    "matrix product", "batched product", "attention scores", "sum", "reshape, split", "reshape, merge",
    "transpose", "cumsum", "argmax", "sort", "concatenate", "slice", "pad", "select", "softmax", "max",
]  # fmt: skip


@pytest.mark.parametrize("name", SHARDABLE)
def test_halves_of_a_factor_compute_halves_of_the_result(name: str) -> None:
    """What a rule claims, checked by arithmetic: cut the operands along one factor, run each half."""
    rng = np.random.default_rng(0)
    book = RuleBook()
    checked = 0
    for e in equations_of(name):
        rule = book(e)
        free = [] if rule is None else [f for f in range(len(rule.sizes)) if f not in rule.fixed]
        if e.params.get("shape") or e.params.get("new_sizes") or "limit_indices" in e.params:
            free = []  # its parameters hold shapes: halves would need others
        read = [a.aval for a in e.invars if not isinstance(a, Literal)]
        operands = [rng.integers(0, 9, a.shape).astype(a.dtype) for a in read]
        for f in free:
            assert rule is not None
            dims = [d for d in rule.operands if d is not None]
            parts = []
            for half in (0, 1):
                xs = [
                    sliced(x, t, rule.sizes, f, half) if f in [g for d in t for g in d] else x
                    for x, t in zip(operands, dims)
                ]
                parts.append([np.asarray(y) for y in compat.evaluate(e, xs)])
            for i, (whole, t) in enumerate(zip(compat.evaluate(e, operands), rule.results)):
                whole = np.asarray(whole)
                if f in rule.reductions:
                    join = np.maximum if "max" in e.primitive.name else np.add
                    np.testing.assert_allclose(join(parts[0][i], parts[1][i]), whole, rtol=1e-5)
                else:
                    for half in (0, 1):
                        want = sliced(whole, t, rule.sizes, f, half)
                        np.testing.assert_allclose(parts[half][i], want, rtol=1e-5)
                checked += 1
    assert checked or name.startswith(("reshape", "slice"))


def test_a_distinct_equation_is_asked_once() -> None:
    def f(x: Any) -> Any:
        for _ in range(5):
            x = jnp.tanh(x) @ x
        return x

    flat = flatten(jax.make_jaxpr(f)(*arrays((8, 8))))
    book = RuleBook()
    book.learn(flat.equations)
    assert book.asked == len({signature(e) for e in flat.equations}) == 2
    book.learn(flat.equations)
    assert book.asked == 2


@pytest.mark.parametrize("mode, inside", [("fill", True), ("clip", False)])
def test_a_gather_that_masks_reads_its_sums_itself(mode: str, inside: bool) -> None:
    """The rows of a cut table are summed over its parts, and what lies outside becomes NaN only then."""
    table, where = jax.ShapeDtypeStruct((8, 4), F32), jax.ShapeDtypeStruct((6,), jnp.int32)
    equations = flatten(jax.make_jaxpr(lambda t, i: t.at[i].get(mode=mode))(table, where)).equations
    (rule,) = (RuleBook()(e) for e in equations if e.primitive.name == "gather")
    assert rule is not None and rule.reductions and rule.inside == inside


def test_asking_leaves_jax_as_it_was() -> None:
    equations = equations_of("softmax")
    before = str(lower(equations))
    RuleBook().learn(equations)
    assert str(lower(equations)) == before


def test_an_equation_that_cannot_be_lowered_spoils_no_other() -> None:
    bad = jax.extend.core.Primitive("cannot_be_lowered")
    bad.def_abstract_eval(lambda x: x)
    flat = flatten(jax.make_jaxpr(lambda x: jnp.sin(bad.bind(jnp.cos(x))))(*arrays((4,))))
    book = RuleBook()
    book.learn(flat.equations)
    rules = [book(e) for e in flat.equations]
    assert rules[0] is not None and rules[1] is None and rules[2] is not None
    assert "cannot be lowered by itself" in book.note(flat.equations[1])
    assert work.kind(flat.equations[1], None) is OpKind.OPAQUE


def test_factors_split_where_two_spellings_of_a_dim_meet() -> None:
    pool = Pool()
    a, b = [pool.new(8)], [pool.new(2), pool.new(4)]
    pool.tie(a, b)
    assert str(pool.rule([[a]], [[b]])) == "([ij])->([ij]) {i=2, j=4}"
    c = [pool.new(4), pool.new(2)]
    pool.tie(a, c)
    assert str(pool.rule([[a]], [[b], [c]])) == "([ijk])->([ijk], [ijk]) {i=2, j=2, k=2}"


def test_factors_that_cannot_agree_stay_whole() -> None:
    pool = Pool()
    a, b = [pool.new(6)], [pool.new(4)]
    pool.tie(a, b)
    assert pool.rule([[a]], [[b]]).fixed == (0, 1)


def test_work_counts_multiply_adds_twice() -> None:
    (dot,) = equations_of("matrix product")
    assert work.flops(dot) == 2 * 8 * 16 * 32
    (convolution,) = equations_of("convolution")
    assert work.flops(convolution) == 2 * (4 * 8 * 8 * 16) * (3 * 3 * 3)
    scan = jax.make_jaxpr(lambda x: lax.scan(lambda c, _: (c @ c, None), x, None, length=5)[0])(
        *arrays((8, 8))
    )
    assert work.total_flops(scan) == 5 * 2 * 8**3


if __name__ == "__main__":
    if len(sys.argv) == 1:  # in a process of its own, so that it sees what the tests see
        made = subprocess.run([sys.executable, __file__, "print"], capture_output=True, text=True, check=True)
        GOLDEN.write_text(made.stdout)
    else:
        sys.stdout.write(text())
