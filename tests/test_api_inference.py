"""Plans for inference: against brute force over all cuts, and capacity against a closed form."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import pytest

import autopar
from autopar.api import inference
from autopar.api.inference import Latency, Throughput, Wanted, cache_use, halves, largest, smallest
from autopar.api.serving import Served, Shape
from autopar.cluster import Cluster, Node, device
from autopar.core.errors import BadInput, DoesNotFit
from autopar.models import opt
from autopar.serve.plan import half_for, serving_plan
from tests import paged

CONFIG = paged.Config(layers=6, hidden=64, heads=4, dtype=jnp.float16)
BLOCKS = 9


def quiet(words: str) -> None:
    pass


def shrunk(name: str, memory: float, slower: float = 1.0):
    """A device with so many bytes, so that a toy model is large for it."""
    d = device(name)
    flops = tuple((t, r / slower) for t, r in d.flops)
    return replace(d, memory=int(memory), bandwidth=d.bandwidth / slower, flops=flops)


def cluster(*kinds) -> Cluster:
    return Cluster(
        tuple(Node(f"n{i}", kind, 1, i) for i, kind in enumerate(kinds)), network=1e12, latency=1e-7
    )


def traced():
    served = Served(paged, CONFIG, BLOCKS, 16, jnp.float16)
    return served, served.tracer(Shape(1, 1, 8))(1, False)


def every_plan(search, blocks: int):
    """(latency, slowest) of every cut and placement on single devices that fits, at the planner's prices."""
    kinds = {node.device.name: node for node in search.cluster.nodes}
    meshes = {c.kind: c.mesh for c in search.choices}
    layers = len(search.graph.layers)
    from autopar.stages.problem import transfers

    moved, order = transfers(search.graph, search.cluster), search.cluster.kinds
    for count in range(1, len(kinds) + 1):
        for cuts in itertools.combinations(range(1, layers), count - 1):
            runs = list(itertools.pairwise((0, *cuts, layers)))
            for chosen in itertools.permutations(kinds, count):
                for rank in itertools.product((0, 1), repeat=count):
                    seconds = []
                    for (i, j), kind, r in zip(runs, chosen, rank):
                        found = [search.costs(k, meshes[kind]) for k in range(i, j)]
                        costs = [c[min(r, len(c) - 1)] for c in found]
                        held = sum(c.offer.state + blocks * c.block + c.offer.activations for c in costs)
                        if held + max(c.offer.workspace for c in costs) > kinds[kind].device.memory:
                            break
                        seconds.append(sum(c.offer.forward + c.offer.backward for c in costs))
                    else:
                        pairs = zip(cuts, itertools.pairwise(chosen))
                        sent = sum(moved[k, order.index(a), order.index(b)] for k, (a, b) in pairs)
                        yield sum(seconds) + sent, max(seconds)


def test_latency_and_capacity_are_the_best_there_are():
    _, step = traced()
    both = cluster(shrunk("A100-40GB", 6e5), shrunk("V100-16GB", 4.5e5, 4))
    search = inference._Search(step, cache_use(step, BLOCKS), both, Wanted(Latency(), BLOCKS), quiet)
    for blocks in (BLOCKS, 20, 40):
        want = min((x for x, _ in every_plan(search, blocks)), default=math.inf)
        assert search.latency(blocks) == pytest.approx(want, rel=2 * inference.WITHIN)
    assert not math.isfinite(search.latency(10_000))
    made = inference.plan(step, BLOCKS, both, Wanted(Latency(slack=3.0), BLOCKS), quiet)
    assert len(made.plan.stages) == 2


def test_throughput_keeps_the_latency_and_has_the_quickest_slowest_stage():
    _, step = traced()
    both = cluster(shrunk("A100-40GB", 1e7), shrunk("V100-16GB", 1e7, 1.5))
    found = list(every_plan(inference._Search(
        step, cache_use(step, BLOCKS), both, Wanted(Throughput(), BLOCKS), quiet), BLOCKS))  # fmt: skip
    quickest = min(x for x, _ in found)
    for limit in (1.02 * quickest, 1.2 * quickest, 2 * quickest, None):
        want = min(slowest for latency, slowest in found if limit is None or latency <= limit)
        made = inference.plan(step, BLOCKS, both, Wanted(Throughput(limit), BLOCKS), quiet)
        slowest = max(stage.sharding.forward for stage in made.plan.stages)
        assert slowest <= 1.05 * want, (limit, quickest)
    with pytest.raises(BadInput, match=r"no plan .* within"):
        inference.plan(step, BLOCKS, both, Wanted(Throughput(0.5 * quickest), BLOCKS), quiet)


def test_capacity_is_what_the_weights_leave():
    served, _ = traced()
    one = cluster(shrunk("T4", 4e6))
    plan, _ = serving_plan(served, one, length=128, prompt=16)
    weights = served.weight_bytes
    per_block = 2 * CONFIG.layers * 16 * CONFIG.hidden * 2  # keys and values of 16 tokens, two bytes each
    room = plan.rooms[0]
    assert room.weights == weights and room.block == per_block == served.block_bytes
    assert plan.blocks == (4_000_000 - weights - room.workspace) // per_block
    assert plan.tokens == 16 * (plan.blocks - 1)
    assert plan.most > plan.single > 0


def test_the_smallest_device_does_not_set_the_capacity():
    served, _ = traced()
    small = cluster(shrunk("T4", 1.2e6), shrunk("A100-40GB", 4e6))
    plan, _ = serving_plan(served, small, length=128, prompt=16, wanted=Wanted(Latency(1.0), 40, stages=2))
    stages = {stage.mesh.device.name: stage for stage in plan.decode.stages}
    layers = {name: stage.stop - stage.start for name, stage in stages.items()}
    assert layers["T4"] < layers["A100-40GB"]
    assert plan.blocks >= 40 and plan.blocks == min(room.blocks for room in plan.rooms)
    assert plan.blocks == plan.rooms[plan.bounding].blocks


def test_a_model_that_does_not_fit_says_how_much_is_missing():
    served, _ = traced()
    with pytest.raises(DoesNotFit, match=r"weights in .*float16.* take .* are missing") as caught:
        serving_plan(served, cluster(shrunk("T4", 3e5)), length=128, prompt=16, name="toy")
    assert caught.value.missing is not None and caught.value.missing > 0


def test_float16_stands_in_for_bfloat16_where_that_lacks():
    step = Served(paged, replace(CONFIG, dtype=jnp.bfloat16), BLOCKS, 16, jnp.bfloat16).tracer(Shape(1, 1, 8))
    graph = step(1, False).graph
    assert halves(device("V100-16GB"), graph).dtypes == (("bfloat16", "float16"),)
    assert halves(device("V100-16GB"), graph).products == ()
    assert halves(device("A100-40GB"), graph) == ((), ())
    parse = autopar.Cluster.parse
    assert half_for(parse("1xA100-40GB"), "bfloat16") == "bfloat16"
    assert half_for(parse("1xA100-40GB,1xT4"), "bfloat16") == "float16"
    assert half_for(parse("1xT4"), "float32") == "float32"


def test_bisections_find_the_edge():
    assert largest(lambda n: n <= 700, 1, 10_000, 40) == 700
    assert largest(lambda n: False, 5, 10_000, 40) == 5
    assert smallest(lambda x: x >= 0.3, 1e-3, 1.0, 60) == pytest.approx(0.3)


def test_a_plan_prints():
    half = replace(opt.Config(4, 1024, 16, vocabulary=2048), dtype=jnp.float16, param_dtype=jnp.float16)
    served = Served(opt.DECODER, half, 2, 16, "float16")
    both = cluster(shrunk("V100-16GB", 7e7), shrunk("A100-40GB", 9e7))
    plan, _ = serving_plan(served, both, length=256, prompt=64, name="opt-toy")
    assert str(plan) + "\n" == (Path(__file__).parent / "golden" / "serving_plan.txt").read_text()
