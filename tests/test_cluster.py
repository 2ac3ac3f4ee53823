"""Clusters: devices, files, the short form, submeshes, placement."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar import cluster
from autopar.cluster.cluster import from_data
from autopar.core.errors import AutoparError, ClusterError, UnknownName

MIXED = {
    "nodes": [
        {"device": "A100-40GB", "per_node": 4},
        {"device": "V100-16GB", "per_node": 2},
        {"device": "T4", "per_node": 2},
    ],
    "network": "25Gbps",
}


def test_every_device_has_effective_rates_below_its_peak():
    for name in cluster.device_names():
        d = cluster.device(name)
        assert d.name == name and d.memory > 0 and all(rate > 0 for _, rate in d.flops)
    assert cluster.device("T4").rate("float16") == 29e12
    assert cluster.device("A100").rate("bfloat16") == 257e12
    assert cluster.device("V100").bandwidth == 744e9
    assert not cluster.device("V100-16GB").supports("bfloat16")
    assert cluster.device("V100-16GB").rate("float32") == pytest.approx(15.7e12 * 93 / 125)


def test_short_form_makes_nodes_of_eight():
    c = cluster.parse("8xA100-40GB,20xV100-16GB,4xT4")
    assert [(n.device.name, n.count) for n in c.nodes] == [
        ("A100-40GB", 8),
        ("V100-16GB", 8),
        ("V100-16GB", 8),
        ("V100-16GB", 4),
        ("T4", 4),
    ]
    assert c.available == {"A100-40GB": 8, "V100-16GB": 20, "T4": 4}
    assert str(c) == "1 × 8xA100-40GB + 2 × 8xV100-16GB + 1 × 4xV100-16GB + 1 × 4xT4, 25 Gbps between nodes"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8xB200", "unknown device 'B200'"),
        ("A100", "expected a cluster file"),
        ("0xT4", "at least one"),
        ("none.yaml", "cannot read cluster file none.yaml"),
    ],
)
def test_bad_short_forms(text: str, message: str):
    with pytest.raises(AutoparError, match=message):
        cluster.parse(text)


def test_unknown_device_suggests():
    with pytest.raises(UnknownName, match=r"did you mean .*A100-40GB"):
        cluster.device("A100-48GB")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": []}, "expected a list"),
        ({"nodes": [{"per_node": 4}]}, r"nodes\[0\]: device is missing"),
        ({"nodes": [{"device": "T4", "per_node": 0}]}, "per_node must be a whole number"),
        ({"nodes": [{"device": "T4", "gpus": 4}]}, "unknown key gpus"),
        ({"network": "25 parsecs"}, "expected a bandwidth"),
        ({"network": [["1Gbps"]]}, "3×3 matrix"),
        ({"nodes": [{"device": "T4"}, {"device": "T4", "memory": "8GiB"}]}, "described in two ways"),
        ({"nodes": [{"device": "T4", "name": "a"}, {"device": "A100", "name": "a"}]}, "must differ"),
    ],
)
def test_bad_files(change: dict, message: str):
    with pytest.raises(ClusterError, match=message):
        from_data({**MIXED, **change})


def test_files_and_their_errors_name_the_file(tmp_path):
    good = tmp_path / "mixed.yaml"
    good.write_text(
        "nodes:\n  - {device: T4, per_node: 4, count: 2, link: 8 GB/s}\nnetwork: [[50Gbps]]\nlatency: 20us\n"
    )
    c = cluster.load(str(good))
    assert [n.name for n in c.nodes] == ["n0", "n1"] and c.nodes[0].device.link == 8e9
    assert c.bandwidth(*c.nodes) == 50e9 / 8 and c.latency == pytest.approx(20e-6)
    bad = tmp_path / "bad.yaml"
    bad.write_text("nodes: [")
    with pytest.raises(ClusterError, match=r"bad\.yaml is not YAML"):
        cluster.load(str(bad))


def test_submeshes_of_the_mixed_cluster():
    found = [str(c.mesh) for c in cluster.submeshes(from_data(MIXED))]
    assert found == [
        "A100-40GB 1",
        "A100-40GB 2",
        "A100-40GB 4",
        "A100-40GB 2×2",
        "V100-16GB 1",
        "V100-16GB 2",
        "T4 1",
        "T4 2",
    ]


def test_devices_of_a_node_share_its_network_card():
    c = cluster.parse("16xV100-16GB")
    mesh = next(m.mesh for m in cluster.submeshes(c) if m.nodes == 2)
    assert mesh.shape == (2, 8) and mesh.axes[0].bandwidth == 25e9 / 8 / 8


def test_links():
    c = from_data(MIXED)
    assert c.link("A100-40GB", "T4") == (25e9 / 8, c.latency)
    assert c.link("T4", "T4")[0] == cluster.device("T4").link
    assert c.between(0, 1, ("n0",), ("n0",)).bandwidth == cluster.device("A100").link
    assert c.between(0, 1, ("n0",), ("n1",)).bandwidth == 25e9 / 8


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 4, 8, 16]), min_size=1, max_size=8))
def test_powers_of_two_always_pack(sizes: list[int]):
    total = -(-sum(sizes) // 16) * 16
    c = cluster.parse(f"{total}xT4")
    by_size = {m.devices: m for m in cluster.submeshes(c)}
    placed = cluster.place(c, [by_size[s] for s in sizes])
    used = [d for devices in placed for d in devices]
    assert len(set(used)) == len(used) == sum(sizes)
    assert all(len(devices) == size for devices, size in zip(placed, sizes, strict=True))
    assert all(
        len({n for n, _ in devices}) == max(1, size // 8) for devices, size in zip(placed, sizes, strict=True)
    )


def test_what_cannot_be_packed_is_refused():
    c = cluster.parse("4xT4")
    choice = next(m for m in cluster.submeshes(c) if m.devices == 4)
    with pytest.raises(ClusterError, match="cannot be placed"):
        cluster.place(c, [choice, choice])


def test_discovery():
    c = cluster.discover([("Tesla T4", 0)] * 4)
    assert str(c.nodes[0].device) == "T4" and c.size == 4
    host = cluster.discover([("cpu", 0)] * 8, memory=8 << 30)
    assert host.nodes[0].device.memory == 1 << 30
    with pytest.raises(UnknownName, match="TPU v5"):
        cluster.discover([("TPU v5", 0)])


def test_shapes_of_a_whole_cluster():
    one = cluster.parse("8xT4")
    assert str(cluster.shaped(one, (2, 4)).mesh) == "T4 2×4"
    two = cluster.parse("16xV100-16GB")
    aligned, crossing = cluster.shaped(two, (2, 8)).mesh, cluster.shaped(two, (4, 4)).mesh
    assert [a.bandwidth for a in aligned.axes] == [25e9 / 64, cluster.device("V100").link]
    assert [a.bandwidth for a in crossing.axes] == [25e9 / 64] * 2
    with pytest.raises(ClusterError, match="not the cluster's 8 devices"):
        cluster.shaped(one, (3, 2))
    with pytest.raises(ClusterError, match="alike"):
        cluster.shaped(cluster.parse("8xT4,4xT4"), (12,))
