"""Numbers for people: bytes, seconds, counts and shares."""

from __future__ import annotations


def size(count: float) -> str:
    """Returns e.g. "3.2 GB" (powers of ten, as on the box)."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    raise AssertionError


def seconds(value: float) -> str:
    """Returns e.g. "3.21 ms"."""
    if value == 0:
        return "0 s"
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if abs(value) * factor >= 1 or unit == "µs":
            return f"{value * factor:.3g} {unit}"
    raise AssertionError


def share(value: float) -> str:
    """Returns e.g. "12.3 %"."""
    return f"{100 * value:.3g} %"
