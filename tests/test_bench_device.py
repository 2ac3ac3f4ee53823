"""Calibration: a measured device is a file that clusters take; the operators are planned as what they are."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from autopar import cluster as room
from autopar.bench.calibrate import calibrate, save
from autopar.bench.device import compare, operators
from autopar.core.errors import BadInput
from autopar.core.mesh import Device

DEVICE = Device("here", 1 << 33, 1e10, (("float32", 4e10),), 4e9)


def test_a_measured_device_is_a_name_that_clusters_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    save(DEVICE, "here.json")
    assert room.device("here.json") == DEVICE
    assert room.parse("4xhere.json").nodes[0].device == DEVICE
    (tmp_path / "c.yaml").write_text("nodes: [{device: here.json, per_node: 2}]\n")
    assert room.load("c.yaml").nodes[0].count == 2


def test_a_file_without_a_device_is_refused(tmp_path: Path):
    with pytest.raises(BadInput, match="autopar calibrate"):
        room.device(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text('{"is": "Plan"}')
    with pytest.raises(BadInput, match="expected a Device"):
        room.device(str(tmp_path / "bad.json"))


def test_a_product_is_predicted_by_its_flops():
    name, fun, shapes = operators(256)[0]
    said, took = compare(fun, shapes, "float32", DEVICE, 0.0)
    assert name == "product n³" and said == pytest.approx(2 * 256**3 / 4e10) and took > 0


def test_all_operators_can_be_planned():
    found = operators(64)
    assert len(found) == len({name for name, _, _ in found}) == 20
    for _, fun, shapes in found:
        jax.eval_shape(fun, *(jax.ShapeDtypeStruct(s, "float32") for s in shapes))


def test_host_devices_can_be_measured():
    found, launch = calibrate(jax.devices()[:2], "two")
    assert found.name == "two" and found.bandwidth > 0 and found.link > 0 and launch > 0
    assert dict(found.flops)["float32"] > 0
