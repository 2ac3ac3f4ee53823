"""The device database: kinds of GPU with the rates a transformer really reaches on them (devices.json)."""

from __future__ import annotations

import functools
import json
from importlib import resources
from pathlib import Path
from typing import Any

from autopar.core.codec import from_data
from autopar.core.errors import BadInput, UnknownName
from autopar.core.mesh import Device

GIB = 1 << 30


@functools.cache
def _database() -> dict[str, Any]:
    return json.loads(resources.files("autopar.cluster").joinpath("devices.json").read_text())


def device_names() -> tuple[str, ...]:
    """Returns the names of all known devices."""
    return tuple(_database()["devices"])


@functools.cache
def device(name: str) -> Device:
    """Returns the device of that name or alias ("V100-16GB", "A100"), with effective rates.

    FLOP/s and bytes/s are published measurements on transformer layers where there are any, else a share of
    the peak; memory is what the driver's context leaves; the link is one direction of what a ring reaches.

    A path that ends in .json is a device that `autopar calibrate` measured.

    Raises:
        UnknownName: no such device; the message lists close names. BadInput: a file that holds none.
    """
    if name.endswith(".json"):
        return _measured(name)
    base = _database()
    devices: dict[str, Any] = base["devices"]
    key = next((k for k in devices if k.lower() == name.lower()), base["aliases"].get(name.upper(), name))
    if key not in devices:
        raise UnknownName("device", name, (*devices, *base["aliases"]))
    facts = devices[key]
    measured, share = facts.get("measured", {}), facts.get("efficiency", 0.7)
    best = max(
        measured.get(t, share * peak) / peak
        for t, peak in facts["flops"].items()
        if t != "float32" or key == "CPU"
    )
    rates = {t: 1e12 * measured.get(t, best * peak) for t, peak in facts["flops"].items()}
    link = base["links"][facts["link"]["kind"]]
    return Device(
        name=key,
        memory=int(facts["memory"] * GIB * facts.get("usable", base["usable"])),
        bandwidth=1e9 * measured.get("bandwidth", max(share, 0.7) * facts["bandwidth"]),
        flops=tuple(sorted(rates.items())),
        link=1e9 * facts["link"]["nominal"] * link["effective"],
        link_latency=link["latency"],
    )


def _measured(path: str) -> Device:
    try:
        return from_data(Device, json.loads(Path(path).read_text(encoding="utf-8")), path)
    except OSError as error:
        raise BadInput(
            f"cannot read device {path}: {error.strerror}; `autopar calibrate` writes one"
        ) from None
    except ValueError as error:
        raise BadInput(f"{path} is not JSON: {error}") from None


def match(kind: str) -> str | None:
    """Returns our name of the device that a driver calls `kind` ("Tesla T4"), or None if it is unknown."""
    for name, facts in _database()["devices"].items():
        if kind in facts["match"] or kind == name:
            return name
    return None
