"""The load test's clients against a small server: nothing surprises them, nothing is left over."""

from __future__ import annotations

import asyncio
import io

from rich.console import Console

from autopar.bench.serve_load import Manners, attack, leftovers, report
from tests.serve_http_fakes import Story, serving, told

STORY = {"blocks": 300, "max_length": 256, "table_buckets": (8, 64), "row_buckets": (1, 8, 32)}


def test_rude_clients_leave_nothing_behind():
    model = told(Story(pace=0.002, **STORY), queue_requests=20)
    with serving(model) as url:
        port = int(url.rsplit(":", 1)[1])
        manners = Manners(clients=30, seconds=2.0, leaving=0.4, malformed=0.2, longest=30)
        seen = asyncio.run(attack(port, manners))
        left = asyncio.run(leftovers(port, 10))
    assert not seen.surprises and not any(left.values())
    assert seen.left > 0 and {200, 400} <= set(seen.statuses)
    console = Console(file=io.StringIO(), width=120)
    report(console, seen, left, [100 << 20, 101 << 20], 2.0)
    assert "surprises: 0" in console.file.getvalue()  # type: ignore[attr-defined]


def test_surprises_are_noticed():
    story = Story(pace=0.002, **STORY)
    story.fault = RuntimeError("broken")
    with serving(told(story)) as url:
        seen = asyncio.run(attack(int(url.rsplit(":", 1)[1]), Manners(clients=4, seconds=0.5)))
    assert any("503 to a good request" in text or "error" in text for text in seen.surprises)
