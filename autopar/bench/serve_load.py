"""`autopar bench serve-load`: many clients, some of them rude; what they saw and what was left over."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from autopar.core.errors import AutoparError

HOST = "127.0.0.1"
WORDS = (
    "the",
    "of",
    "and",
    "a",
    "to",
    "in",
    "is",
    "that",
    "it",
    "for",
    "was",
    "on",
    "are",
    "as",
    "with",
    "they",
)
MALFORMED: tuple[tuple[bytes, tuple[int, ...]], ...] = (
    (b'{"prompt": "x"', (400,)),
    (b"\xff\xfe\x00", (400,)),
    (b"", (400,)),
    (b"[" * 5000, (400,)),
    (b"null", (400,)),
    (b'{"prompt": 3}', (400,)),
    (b'{"prompt": []}', (400,)),
    (b'{"prompt": [999999999]}', (400,)),
    (b'{"prompt": "x", "n": 1000000}', (400,)),
    (b'{"prompt": "x", "temperature": -1}', (400,)),
    (b'{"prompt": "x", "max_tokens": 1e99}', (400,)),
    (b'{"prompt": "x", "max_tokens": 99999999}', (400,)),
    (b'{"prompt": "x", "temprature": 1}', (400,)),
    (b'{"prompt": "x", "model": "nobody"}', (404,)),
    (b'{"prompt": "' + b"x" * (5 << 20) + b'"}', (413, 0)),  # 0: refused before all of it was sent
)
"""Bodies that no server should choke on, and the statuses that answer them."""


@dataclass(frozen=True)
class Manners:
    """How the clients behave.

    Attributes:
        clients: at once. seconds: for how long. leaving: share of requests whose client hangs up.
        malformed: share of bodies that are none. seed: of all that is random. longest: tokens of an answer.
    """

    clients: int = 200
    seconds: float = 180.0
    leaving: float = 0.2
    malformed: float = 0.1
    seed: int = 0
    longest: int = 48


@dataclass
class Seen:
    """What the clients saw.

    Attributes:
        statuses: responses by status. left: requests that their client left. surprises: what was wrong.
        first, whole: seconds to the first event of a stream and to the end of an answer.
    """

    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    left: int = 0
    surprises: collections.Counter[str] = field(default_factory=collections.Counter)
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)


@click.command()
@click.argument("model", required=False)
@click.option("--clients", default=200, show_default=True, type=click.IntRange(min=1), help="at once")
@click.option("--seconds", default=180.0, show_default=True, help="for how long")
@click.option("--leaving", default=0.2, show_default=True, help="share of requests whose client hangs up")
@click.option("--malformed", default=0.1, show_default=True, help="share of bodies that are malformed")
@click.option("--seed", default=0, show_default=True)
@click.option("--longest", default=48, show_default=True, help="tokens of an answer at most")
@click.option("--serve-options", default="", help="further options of `autopar serve`, as one text")
def serve_load(model: str | None, serve_options: str, **manners: Any) -> None:
    """Starts `autopar serve MODEL`, sends it many clients, and prints what they saw and what is left over."""
    with server(model, serve_options.split()) as (port, process):
        memory = _Memory(process.pid)
        seen = asyncio.run(attack(port, Manners(**manners), memory.look))
        left = asyncio.run(leftovers(port))
        report(Console(), seen, left, memory.readings, manners["seconds"])
    if seen.surprises or any(left.values()):
        raise click.exceptions.Exit(1)


@contextlib.contextmanager
def server(model: str | None, options: list[str]) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """Starts `autopar serve` in a process of its own, and stops it at the end: (port, process)."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        port = found.getsockname()[1]
    command = ["serve", *([model] if model else []), "--host", HOST, "--port", str(port), *options]
    program = "from autopar.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", program, *command], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        if not process.stdout.readline():
            raise AutoparError(f"`autopar {' '.join(command)}` did not start; its message is above")
        yield port, process
    finally:
        process.terminate()
        try:
            code = process.wait(60)
            click.echo(f"the server ended with status {code} after SIGTERM")
        except subprocess.TimeoutExpired:
            process.kill()


class _Memory:
    """Resident memory of a process, in bytes."""

    def __init__(self, process: int):
        self._path, self.readings = f"/proc/{process}/status", list[int]()

    def look(self) -> None:
        """Notes what it is now; nothing where there is no /proc."""
        with contextlib.suppress(OSError), open(self._path) as file:
            found = re.search(r"VmRSS:\s+(\d+) kB", file.read())
            if found:
                self.readings.append(int(found[1]) * 1024)


async def attack(port: int, manners: Manners, look: Any = lambda: None) -> Seen:
    """Returns what the clients saw.

    Args:
        port: of the server, on 127.0.0.1. look: called every second.
    """
    seen, end = Seen(), time.monotonic() + manners.seconds

    async def watch() -> None:
        while True:
            look()
            await asyncio.sleep(1)

    watcher = asyncio.create_task(watch())
    clients = [
        _client(port, manners, random.Random(f"{manners.seed} {i}"), end, seen)
        for i in range(manners.clients)
    ]
    await asyncio.gather(*clients)
    watcher.cancel()
    return seen


async def _client(port: int, manners: Manners, dice: random.Random, end: float, seen: Seen) -> None:
    while time.monotonic() < end:
        try:
            if dice.random() < manners.malformed:
                await _misbehave(port, dice, seen)
            else:
                await _ask(port, manners, dice, seen)
        except Exception as error:
            seen.surprises[f"{type(error).__name__}: {error}"[:100]] += 1
            await asyncio.sleep(0.1)


async def _misbehave(port: int, dice: random.Random, seen: Seen) -> None:
    body, expected = dice.choice(MALFORMED)
    status = 0
    try:
        async with _post(port, "/v1/completions", body) as (status, lines):
            text = b"".join([line async for line in lines])
        if status not in expected:
            seen.surprises[f"{status} to {body[:40]!r}"] += 1
        elif set(json.loads(text)["error"]) != {"message", "type", "param", "code"}:
            seen.surprises[f"shape of the error to {body[:40]!r}"] += 1
    except (ConnectionError, asyncio.IncompleteReadError):
        if 0 not in expected:
            raise
    seen.statuses[status] += 1


async def _ask(port: int, manners: Manners, dice: random.Random, seen: Seen) -> None:
    """One request; its client may leave before or during the answer."""
    body = {
        "prompt": " ".join(dice.choices(WORDS, k=dice.randint(1, 60))),
        "max_tokens": dice.randint(1, manners.longest),
        "temperature": dice.choice([0, 1]),
        "n": dice.choice([1, 1, 1, 2]),
        "stream": dice.random() < 0.6,
    }
    leave = dice.randint(0, 8) if dice.random() < manners.leaving else None
    start, events = time.monotonic(), 0
    patience = 0.05 if leave == 0 else None
    async with _post(port, "/v1/completions", json.dumps(body).encode(), patience) as (status, lines):
        if status == 0:
            seen.left += 1
            return
        async for line in lines:
            if line.startswith(b"data: "):
                events += 1
                if events == 1:
                    seen.first.append(time.monotonic() - start)
            if b'"error"' in line and status == 200:
                seen.surprises[line.decode(errors="replace")[:100]] += 1
            if leave is not None and events >= leave:
                seen.left += 1
                return
    seen.statuses[status] += 1
    if status == 200:
        seen.whole.append(time.monotonic() - start)
    elif status == 429:
        await asyncio.sleep(dice.uniform(0.2, 1.0))
    else:
        seen.surprises[f"{status} to a good request"] += 1


@contextlib.asynccontextmanager
async def _post(
    port: int, path: str, body: bytes, patience: float | None = None
) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
    """(status, lines of the answer); status 0 if no answer began within `patience` seconds."""
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 24)
    try:
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        with contextlib.suppress(ConnectionError):  # it may be refused before all of it is sent
            await writer.drain()
        try:
            async with asyncio.timeout(patience):
                text = await reader.readuntil(b"\r\n\r\n")
        except TimeoutError:
            yield 0, reader
            return
        yield int(text.split(b" ", 2)[1]), reader
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def leftovers(port: int, patience: float = 60.0) -> dict[str, float]:
    """Returns what the server still holds after its clients went: all zeros is good.

    Args:
        patience: seconds in which it may finish what was under way.
    """
    end, found = time.monotonic() + patience, dict[str, float]()
    names = ("running", "waiting", "kv_use")
    while time.monotonic() < end:
        health = await _get(port, "/health")
        found = {name: float(health[name]) for name in names}
        if health["status"] == "ok" and not any(found.values()):
            break
        await asyncio.sleep(0.5)
    return found


async def _get(port: int, path: str) -> Any:
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode())
    text = await reader.read()
    writer.close()
    return json.loads(text.partition(b"\r\n\r\n")[2])


def report(console: Console, seen: Seen, left: dict[str, float], memory: list[int], seconds: float) -> None:
    """Prints it all."""
    table = Table("", "count", "p50 s", "p95 s", "worst s")
    for name, times in (("first event", seen.first), ("whole answer", seen.whole)):
        cuts = statistics.quantiles(times, n=20) if len(times) > 1 else [0.0] * 19
        table.add_row(
            name, str(len(times)), *(f"{t:.2f}" for t in (cuts[9], cuts[18], max(times, default=0.0)))
        )
    console.print(table)
    statuses = ", ".join(f"{status or 'cut off'}: {count}" for status, count in sorted(seen.statuses.items()))
    rate = sum(seen.statuses.values()) / seconds
    console.print(f"answers by status: {statuses}; left by their clients: {seen.left}; {rate:.1f} answers/s")
    console.print("left over: " + ", ".join(f"{name} {value:g}" for name, value in left.items()))
    if memory:
        quarters = [memory[(len(memory) - 1) * i // 4] for i in range(5)]
        text = " → ".join(f"{each / 1e6:.0f}" for each in quarters)
        console.print(
            f"memory of the server by quarters of the time: {text} MB, highest {max(memory) / 1e6:.0f} MB"
        )
    console.print(f"surprises: {sum(seen.surprises.values())}")
    for text, count in seen.surprises.most_common(20):
        console.print(f"  {count} × {text}", markup=False)
