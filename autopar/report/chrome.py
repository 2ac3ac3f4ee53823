"""A timeline as a Chrome trace (chrome://tracing, ui.perfetto.dev): the Trace Event Format, complete
events."""

from __future__ import annotations

import json
from typing import Any

from autopar.core.timeline import Timeline


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """Returns the trace as JSON data: one process per worker, computation and transfers as two threads,
    times in µs."""
    events: list[dict[str, Any]] = []
    for w, name in enumerate(timeline.workers):
        events.append({"ph": "M", "pid": w, "name": "process_name", "args": {"name": name}})
        for thread, label in enumerate(("compute", "transfer")):
            events.append(
                {"ph": "M", "pid": w, "tid": thread, "name": "thread_name", "args": {"name": label}}
            )
    for e in timeline.events:
        events.append(
            {
                "ph": "X",
                "pid": e.worker,
                "tid": int(e.kind == "send"),
                "name": e.name if e.microbatch is None else f"{e.name} #{e.microbatch}",
                "cat": e.kind,
                "ts": 1e6 * e.start,
                "dur": 1e6 * (e.stop - e.start),
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def save(timeline: Timeline, path: str) -> None:
    """Writes the trace to `path` (JSON)."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(chrome_trace(timeline), file)
