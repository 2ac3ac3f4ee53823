"""Quantities with units, as people write them in cluster files."""

from __future__ import annotations

import re

from autopar.core.errors import ClusterError

_NUMBER = re.compile(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*([A-Za-zµ/]+)\s*$")
_BANDWIDTH = {"bps": 1 / 8, "kbps": 1e3 / 8, "mbps": 1e6 / 8, "gbps": 1e9 / 8, "tbps": 1e12 / 8}
_BYTES = {"B/s": 1.0, "KB/s": 1e3, "MB/s": 1e6, "GB/s": 1e9}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_MEMORY = {"GB": 1e9, "GiB": 1 << 30, "MB": 1e6, "MiB": 1 << 20}


def _read(text: object, units: dict[str, float], what: str) -> float:
    found = _NUMBER.match(str(text))
    if found is None or found[2] not in units:
        raise ClusterError(
            f"expected {what} such as 3 {next(iter(units))} (units: {', '.join(units)}), got {text!r}"
        )
    try:
        value = float(found[1]) * units[found[2]]
    except ValueError:
        raise ClusterError(f"expected {what}, got {text!r}") from None
    if not value > 0:
        raise ClusterError(f"expected {what} above zero, got {text!r}")
    return value


def bandwidth(text: object) -> float:
    """Returns bytes/s of "25Gbps" (bits) or "12 GB/s" (bytes)."""
    found = _NUMBER.match(str(text))
    if found is not None and found[2].lower() in _BANDWIDTH:
        return _read(f"{found[1]} {found[2].lower()}", _BANDWIDTH, "a bandwidth")
    return _read(text, {**_BYTES, "Gbps": 1e9 / 8}, "a bandwidth")


def seconds(text: object) -> float:
    """Returns seconds of "50us"."""
    return _read(text, _SECONDS, "a time")


def memory(text: object) -> int:
    """Returns bytes of "16GiB"."""
    return int(_read(text, _MEMORY, "an amount of memory"))
