"""`autopar bench device`: the cost model beside one real device, operator by operator and for a GPT step."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import click
import jax
import jax.numpy as jnp
from jax import lax
from rich.console import Console
from rich.table import Table

from autopar.bench.calibrate import calibrate, seconds_of
from autopar.bench.overhead import in_turns, one_device, three
from autopar.cluster.submesh import inside
from autopar.core.mesh import Device
from autopar.sharding.options import Options
from autopar.sharding.plan import plan
from autopar.trace.capture import capture

ROUNDS = 5
"""Of the GPT's steps, each with states made anew."""

Operator = tuple[str, Callable[..., Any], tuple[tuple[int, ...], ...]]


def operators(n: int) -> tuple[Operator, ...]:
    """Returns twenty operators of a transformer, of width n."""

    def norm(x: jax.Array) -> jax.Array:
        x = x - x.mean(-1, keepdims=True)
        return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)

    def convolution(x: jax.Array, k: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    square, tall, heads = (n, n), (4 * n, n), (8, n // 2, n // 8)
    return (
        ("product n³", lambda a, b: a @ b, (square, square)),
        ("product 4n·n·n", lambda a, b: a @ b, (tall, square)),
        ("product n·n·4n", lambda a, b: a @ b.T, (square, tall)),
        ("product, thin", lambda a, b: a @ b, ((16, n), square)),
        ("product, long sum", lambda a, b: a.T @ b, (tall, tall)),
        ("batched product", lambda a, b: jnp.einsum("bqd,bkd->bqk", a, b), (heads, heads)),
        ("product and tanh", lambda a, b: jnp.tanh(a @ b), (square, square)),
        ("add", lambda a, b: a + b, (tall, tall)),
        ("gelu", jax.nn.gelu, (tall,)),
        ("exp", jnp.exp, (tall,)),
        ("bias", lambda a, b: a + b, (tall, (n,))),
        ("sum of rows", lambda a: a.sum(-1), (tall,)),
        ("sum of columns", lambda a: a.sum(0), (tall,)),
        ("softmax", lambda a: jax.nn.softmax(a, axis=-1), (tall,)),
        ("layer norm", norm, (tall,)),
        ("transpose", lambda a: a.T + 0.0, (tall,)),
        ("gather", lambda a: a[jnp.arange(0, 2 * n) * 7 % (4 * n)], (tall,)),
        ("cumsum", lambda a: jnp.cumsum(a, axis=-1), (square,)),
        ("convolution", convolution, ((8, n // 32, n // 32, 64), (3, 3, 64, 64))),
        ("concatenate", lambda a, b: jnp.concatenate([a, b], axis=1), (tall, tall)),
    )


@click.command("device")
@click.option("--width", type=click.IntRange(min=64), help="of the operators; 512 on a CPU, 4096 on a GPU")
@click.option("--dtype", default="float32", show_default=True, help="of the operators and the GPT")
@click.option("--steps", default=30, show_default=True, help="paired steps of a GPT (0: none)")
def device(width: int | None, dtype: str, steps: int) -> None:
    """Calibrates the first device, and prints how far predicted times are from measured ones.

    Twenty operators are planned and run; then a GPT's train step runs through `parallelize` and through
    `jax.jit`, in turns.
    """
    first = jax.devices()[0]
    found, launch = calibrate([first])
    n = width or (512 if first.platform == "cpu" else 4096)
    console = Console(width=120)
    console.print(f"{first.device_kind}, jax {jax.__version__}: {found.flops}, launch {launch * 1e6:.1f} µs")
    rows = [(name, *compare(fun, shapes, dtype, found, launch)) for name, fun, shapes in operators(n)]
    table = Table("operator", "predicted µs", "measured µs", "error", show_edge=False)
    for name, said, took in rows:
        table.add_row(name, f"{said * 1e6:.1f}", f"{took * 1e6:.1f}", f"{said / took - 1:+.0%}")
    console.print(table)
    off = [abs(said / took - 1) for _, said, took in rows]
    console.print(f"error of {len(off)} operators: mean {statistics.mean(off):.0%}, max {max(off):.0%}")
    if steps:
        console.print(paired(found, dtype, steps, first.platform == "cpu"))


def compare(
    fun: Callable[..., Any], shapes: tuple[tuple[int, ...], ...], dtype: str, found: Device, launch: float
) -> tuple[float, float]:
    """Returns (predicted, measured) seconds of one operator; a launch is part of both."""
    (mesh,) = inside(found, 1)
    graph = capture(lambda *xs: fun(*xs), tuple(jax.ShapeDtypeStruct(s, dtype) for s in shapes)).graph
    said = plan(graph, range(len(graph.equations)), mesh, Options()).objective
    arrays = [jax.random.normal(jax.random.key(k), s, dtype) for k, s in enumerate(shapes)]
    jitted = jax.jit(fun)
    return said + launch, seconds_of(lambda: jitted(*arrays), 15)


def paired(found: Device, dtype: str, steps: int, small: bool) -> str:
    """Returns in words how a GPT's train step through `parallelize` compares with `jax.jit`, run in turns."""
    sizes: dict[str, Any] = (
        {"batch": 4, "sequence": 64} if small else {"batch": 8, "sequence": 1024, "hidden": 1024}
    )
    sizes |= {"layers": 4} if small else {"layers": 12, "heads": 16, "vocabulary": 32768}
    row = in_turns(*three("gpt-tiny", one_device(found), sizes | {"dtype": dtype}), steps, ROUNDS)
    times = f"parallelize {1e3 * row.ours:.2f} ms, jax.jit {1e3 * row.jit:.2f} ms"
    return f"GPT train step: {times}, ratio {row.ratio:.3f} (jax.jit to itself {row.control:.3f})"
