"""Where planning spends its time: sections name themselves, whoever wants to know listens.

Nothing is kept and nothing costs more than a look-up while nobody listens.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar


class Stopwatch:
    """Seconds per section, without those of sections inside of it. Start with `listen`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._last = 0.0

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._open:
            section = self._open[-1]
            self.seconds[section] = self.seconds.get(section, 0.0) + now - self._last
        self._last = now

    def enter(self, section: str) -> None:
        """From now on time counts for a section."""
        self._turn()
        self._open.append(section)

    def leave(self) -> None:
        """Time counts for the section around it again."""
        self._turn()
        self._open.pop()


_listening: ContextVar[Stopwatch | None] = ContextVar("stopwatch", default=None)


@contextmanager
def listen() -> Generator[Stopwatch, None, None]:
    """Gives a stopwatch that sections report to as long as this runs."""
    token = _listening.set(watch := Stopwatch())
    try:
        yield watch
    finally:
        _listening.reset(token)


@contextmanager
def section(name: str) -> Generator[None, None, None]:
    """Counts the time inside under a name, if somebody listens."""
    watch = _listening.get()
    if watch is None:
        yield
        return
    watch.enter(name)
    try:
        yield
    finally:
        watch.leave()
