"""plan: against brute force over all runs, submeshes and offers; refusals, limits, links and notes."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest

from autopar.cluster import Cluster, Node, place, submeshes
from autopar.core.errors import BadInput, ClusterError, DoesNotFit, PlanError, UnknownName
from autopar.core.graph import Combine, Equation, Graph, OpKind, Phase, Value
from autopar.core.mesh import Device
from autopar.core.plan import Memory, ShardingPlan
from autopar.stages import Offer, Options, assign, holders, plan, replacements
from autopar.stages.problem import boundary_bytes

GB = 10**9
FAST = Device("fast", 8 * GB, 1e12, (("float32", 1e13), ("bfloat16", 1e14), ("float16", 1e14)), 1e11)
SLOW = Device("slow", 4 * GB, 5e11, (("float32", 5e12), ("float16", 4e13)), 1e10)
OLD = Device("old", 4 * GB, 5e11, (("float32", 5e12),), 1e10)


def cluster(*nodes: tuple[Device, int], network: float = 3e9) -> Cluster:
    return Cluster(tuple(Node(f"n{k}", d, count) for k, (d, count) in enumerate(nodes)), network)


MIXED = cluster((FAST, 2), (SLOW, 2))


def chain(layers: int, microbatches=4, backward=True, wide=1000, dtype="float32", tied=False) -> Graph:
    """x → x·w₀ → … with a skip from first to last layer, its backward and an update of the weights."""
    values, equations = [], []

    def value(shape, name=""):
        values.append(Value(shape, dtype, name))
        return len(values) - 1

    def op(name, inputs, shape, phase, layer):
        out = value(shape)
        equations.append(Equation(name, inputs, (out,), None, OpKind.FUSED, 1.0, phase, layer, "m.py:1"))
        return out

    weights = [value((7, 7), f"w{k}") for k in range(layers)]
    x = batch = value((wide, 7), "x")
    xs = []
    for k, w in enumerate(weights):
        x = op("dot", (x, w), (wide, 7 * (k + 1)), Phase.FORWARD, k)
        xs.append(x)
    if tied:
        x = op("dot", (x, weights[0]), (wide, 7), Phase.FORWARD, layers - 1)
    elif layers > 2:
        x = op("add", (x, xs[0]), (wide, 7 * layers), Phase.FORWARD, layers - 1)
    outputs, g = [], x
    for k in reversed(range(layers if backward else 0)):
        grad = op("dw", (g, xs[k]), (7, 7), Phase.BACKWARD, k)
        outputs.append(op("sgd", (weights[k], grad), (7, 7), Phase.APPLY, k))
        g = op("dx", (g, weights[k]), (wide, 7), Phase.BACKWARD, k)
    outputs = outputs[::-1] if backward else [x]
    aliases = tuple((k, k) for k in range(layers)) if backward else ()
    combine = tuple((e.inputs[1], Combine.MEAN) for e in equations if e.op == "sgd")
    graph = Graph(
        tuple(values),
        tuple(equations),
        (*weights, batch),
        tuple(outputs),
        tuple(f"layer {k}" for k in range(layers)),
        aliases,
        (batch,),
        microbatches=microbatches,
        combine=combine,
    )
    graph.check()
    return assign(graph)


class Prices:
    """Random offers per (layer, mesh); the exact plan of a stage needs what `need` says."""

    def __init__(self, seed: int, offers: int = 2, memory: float = 3.0, holes=False, kept: float = 0.6):
        self.seed, self.count, self.memory, self.holes, self.kept = seed, offers, memory, holes, kept
        self.asked: list[tuple[tuple[int, ...], object, int]] = []

    def __call__(self, layer, mesh):
        rng = random.Random(f"{self.seed} {layer} {mesh}")
        base = rng.uniform(0.5, 2.0) / mesh.size
        if self.holes and rng.random() < 0.15:
            return (Offer(math.inf, 0.0, 0.0, 0.0, 0.0, 0.0),)
        out = []
        for q in range(rng.randint(1, self.count)):
            state = rng.uniform(0.2, self.memory) * GB / mesh.size / (q + 1)
            kept, work = rng.uniform(0.0, self.kept) * GB / (q + 1), rng.uniform(0.0, 0.3) * GB
            apply = rng.uniform(0.0, 1.0) * (q + 1)
            out.append(Offer(base * (1 + q), 2 * base * (1 + q), apply, state, kept, work))
        return tuple(out)

    def shard(self, equations, mesh, in_flight):
        self.asked.append((equations, mesh, in_flight))
        return sharding(mesh, in_flight)


def sharding(mesh, in_flight=1):
    memory = Memory(0, 0, in_flight, 0, mesh.device.memory)
    return ShardingPlan(mesh, (), (), (), 1.0, 2.0, 0.5, memory, (), 1.0, 1.0, "optimal")


def compositions(layers: int):
    for cuts in itertools.product([False, True], repeat=layers - 1):
        at = [0, *(k + 1 for k, c in enumerate(cuts) if c), layers]
        yield list(itertools.pairwise(at))


def brute(graph: Graph, where: Cluster, prices: Prices, options: Options, starts=None) -> float:
    """The least step time over everything, from the definitions."""
    choices, best = submeshes(where), math.inf
    layers = len(graph.layers)
    forward, backward = boundary_bytes(graph)
    train = any(e.phase is Phase.BACKWARD for e in graph.equations)
    m = graph.microbatches
    for runs in compositions(layers):
        if not options.least <= len(runs) <= (options.most or layers):
            continue
        if starts is not None and not starts.issuperset(i for i, _ in runs):
            continue
        if options.max_layers and max(j - i for i, j in runs) > options.max_layers:
            continue
        ranked = [(c, q) for c in choices for q in range(prices.count)]
        for picks in itertools.product(ranked, repeat=len(runs)):
            used: dict[str, int] = {}
            for c, _ in picks:
                used[c.kind] = used.get(c.kind, 0) + c.devices
            if any(n > where.available[k] for k, n in used.items()):
                continue
            times, fixed, total, fits = [], [], 0.0, True
            for s, ((i, j), (c, q)) in enumerate(zip(runs, picks)):
                offers = [prices(k, c.mesh) for k in range(i, j)]
                o = [x[min(q, len(x) - 1)] for x in offers]
                times.append(sum(x.forward + x.backward for x in o))
                fixed.append(sum(x.apply for x in o))
                position = len(runs) - s
                flight = (m if options.schedule == "gpipe" else min(position, m)) if train else 1
                need = sum(x.state for x in o) + max(x.workspace for x in o)
                fits &= need + flight * sum(x.activations for x in o) <= c.mesh.device.memory
                if s:
                    a, b = picks[s - 1][0].kind, c.kind
                    for nbytes, (bandwidth, latency) in (
                        (forward[i], where.link(a, b)),
                        (backward[i], where.link(b, a)),
                    ):
                        total += latency + nbytes / bandwidth if nbytes else 0.0
            if fits:
                best = min(best, total + sum(times) + (m - 1) * max(times) + max(fixed))
    return best


CASES = [
    (3, Options(), 4, True),
    (4, Options(), 2, True),
    (3, Options(schedule="gpipe"), 4, True),
    (4, Options(stages=3), 4, True),
    (4, Options(stages=2), 4, True),
    (3, Options(min_stages=2), 1, True),
    (4, Options(max_stages=2), 8, True),
    (4, Options(max_layers=2), 4, True),
    (3, Options(), 4, False),
]


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("seed", range(6))
def test_plan_is_the_best_of_all(case: int, seed: int):
    layers, options, microbatches, backward = CASES[case]
    graph, prices = chain(layers, microbatches, backward, wide=10**6), Prices(seed, holes=seed % 2 == 1)
    best = brute(graph, MIXED, prices, options)
    if math.isinf(best):
        with pytest.raises(PlanError):
            plan(graph, MIXED, prices, lambda *_: (_ for _ in ()).throw(DoesNotFit("no")), options)
        return
    found = plan(graph, MIXED, prices, prices.shard, options)
    assert found.objective == pytest.approx(best, rel=1e-6)
    assert found.bound <= found.objective * (1 + 1e-9) and found.bound >= best * (1 - 1e-5)
    assert options.least <= len(found.stages) <= (options.most or layers)
    for stage in found.stages:
        assert len(set(stage.devices)) == stage.mesh.size
        assert {MIXED.node(node).device for node in stage.nodes} == {stage.mesh.device}


def test_brute_force_sees_plans_and_failures():
    found = [brute(chain(3, wide=10**6), MIXED, Prices(s, holes=s % 2 == 1), Options()) for s in range(6)]
    assert sum(map(math.isfinite, found)) >= 3


def test_a_stage_that_does_not_fit_exactly_is_forbidden():
    graph, prices = chain(4, wide=10), Prices(1, memory=0.5)
    first = plan(graph, MIXED, prices, prices.shard)
    refused = first.stages[0].mesh

    def shard(equations, mesh, in_flight):
        if mesh == refused:
            raise DoesNotFit("too big by 5 bytes", 5)
        return sharding(mesh, in_flight)

    second = plan(graph, MIXED, prices, shard, Options(rounds=40))
    assert refused not in [stage.mesh for stage in second.stages]
    assert second.objective >= first.objective
    assert any("do not fit: too big by 5 bytes" in note for note in second.notes)


def test_nothing_fits_exactly():
    def shard(equations, mesh, in_flight):
        raise DoesNotFit("too big by 5 bytes", 5)

    with pytest.raises(DoesNotFit, match=r"no plan keeps every device.*too big by 5 bytes") as error:
        plan(chain(3), MIXED, Prices(1, memory=0.5), shard)
    assert error.value.missing == 5


def test_prices_that_do_not_fit_say_how_much_is_missing():
    def price(layer, mesh):
        return (Offer(1.0, 1.0, 0.0, 20 * GB / mesh.size, 0.0, 0.0),)

    def refuse(equations, mesh, in_flight):
        raise DoesNotFit("too big", 1)

    with pytest.raises(DoesNotFit, match=r"misses .*GiB; add devices") as error:
        plan(chain(2), MIXED, price, refuse)
    assert error.value.missing and error.value.missing >= 2 * GB
    # exact plans may be leaner than the sum of the prices
    found = plan(chain(2), MIXED, price, lambda e, mesh, n: sharding(mesh, n))
    assert found.stages and any("misses least" in note for note in found.notes)


def test_stages_get_their_equations_and_micro_batches_in_flight():
    graph, prices = chain(4, microbatches=8, wide=10), Prices(3, memory=0.1)
    found = plan(graph, MIXED, prices, prices.shard, Options(stages=4))
    assert [flight for _, _, flight in prices.asked] == [4, 3, 2, 1]
    covered = {i for equations, _, _ in prices.asked for i in equations}
    assert covered == set(range(len(graph.equations)))
    assert [(s.start, s.stop) for s in found.stages] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert len({d for s in found.stages for d in s.devices}) == 4
    assert found.values == tuple(sorted(found.values)) and found.value[graph.inputs[0]].name == "w0"
    prices.asked.clear()
    plan(graph, MIXED, prices, prices.shard, Options(stages=2, schedule="gpipe"))
    assert [flight for _, _, flight in prices.asked] == [8, 8]
    prices.asked.clear()
    plan(graph, MIXED, prices, prices.shard, Options(stages=1, schedule="gpipe"))
    assert [flight for _, _, flight in prices.asked] == [1]


def test_links_join_the_stages_that_exchange():
    graph, prices = chain(3, wide=10), Prices(3, memory=0.1)
    found = plan(graph, MIXED, prices, prices.shard, Options(stages=3))
    pairs = {(link.source, link.to) for link in found.links}
    assert pairs == {(0, 1), (1, 2), (0, 2), (2, 1), (1, 0)}  # the skip goes straight from 0 to 2
    assert set(holders(graph, found.segments)) == set(graph.inputs)


def test_new_state_is_linked_to_every_holder():
    graph, prices = chain(3, wide=10, tied=True), Prices(3, memory=0.1)
    found = plan(graph, MIXED, prices, prices.shard, Options(stages=3))
    assert holders(graph, found.segments)[graph.inputs[0]] == (0, 2)
    assert {(link.source, link.to) for link in found.links} == {(0, 1), (1, 2), (0, 2), (2, 1), (1, 0)}


def test_the_largest_workspace_counts():
    def price(layer, mesh):
        seconds = 2.0 if mesh.device == FAST else 1.0
        return (Offer(seconds, 0.0, 0.0, 1.0, 1.0, 5 * GB if layer == 1 else 1.0),)

    found = plan(chain(2), MIXED, price, lambda e, mesh, n: sharding(mesh, n), Options(stages=2))
    assert found.stages[1].mesh.device == FAST  # the others have 4 GB


def test_more_stages_than_layers_or_devices():
    prices = Prices(0)
    with pytest.raises(BadInput, match="5 stages asked for, but the model has 3 layers"):
        plan(chain(3), MIXED, prices, prices.shard, Options(stages=5))
    with pytest.raises(BadInput, match="6 stages asked for, but there are 4 devices"):
        plan(chain(8), MIXED, prices, prices.shard, Options(min_stages=6))


def test_bad_options():
    with pytest.raises(UnknownName, match="did you mean"):
        Options(schedule="1f1")
    with pytest.raises(BadInput, match="max_layers"):
        Options(max_layers=0)
    with pytest.raises(BadInput, match="min_stages <= max_stages"):
        Options(min_stages=3, max_stages=2)


def test_submeshes_that_cannot_be_packed_are_avoided():
    """Two nodes of 3: 2 + 2 + 2 devices are there by number, but do not pack."""
    where = cluster((FAST, 3), (FAST, 3))

    def price(layer, mesh):
        ideal = mesh.size == 2 and len(mesh.axes) == 1
        return (Offer(1.0 if ideal else 10.0 / mesh.size, 0.0, 0.0, 1.0, 1.0, 1.0),)

    try:
        found = plan(chain(3), where, price, lambda e, mesh, n: sharding(mesh, n), Options(stages=3))
    except ClusterError:
        pytest.fail("a plan with other submeshes exists")
    place(where, [c for s in found.stages for c in submeshes(where) if c.mesh == s.mesh][: len(found.stages)])
    assert len({d for s in found.stages for d in s.devices}) == sum(s.mesh.size for s in found.stages)


def test_graph_without_layers_is_one_stage():
    graph = chain(1)
    graph = replace(
        graph, layers=(), equations=tuple(replace(e, layer=None) for e in graph.equations), microbatches=1
    )
    found = plan(graph, MIXED, Prices(1), Prices(1).shard)
    assert [s.name for s in found.segments] == ["step"] and len(found.stages) == 1


def test_replacements():
    graph = chain(2, dtype="bfloat16")
    assert replacements(FAST, graph) == ((), ())
    assert replacements(SLOW, graph) == ((("bfloat16", "float32"),), (("bfloat16", "float16"),))
    assert replacements(OLD, graph) == ((("bfloat16", "float32"),), ())
    assert replacements(OLD, chain(2)) == ((), ())
    prices = Prices(3, memory=0.1)
    found = plan(graph, cluster((SLOW, 1)), prices, prices.shard)
    assert "stage 0: slow lacks bfloat16: kept as float32, products in float16" in found.notes


def test_large_programs_begin_stages_at_fewer_layers(monkeypatch):
    monkeypatch.setattr("autopar.stages.problem.MOST_ENTRIES", 1)
    graph, prices, options = chain(4, wide=10**6), Prices(2, memory=1.0, kept=0.3), Options(stages=2)
    found = plan(graph, MIXED, prices, prices.shard, options)
    assert "to keep the stage program small, no stage begins at layer 1, 3" in found.notes
    assert found.objective == pytest.approx(brute(graph, MIXED, prices, options, {0, 2}), rel=1e-6)
    assert [(s.start, s.stop) for s in found.stages] == [(0, 2), (2, 4)]


def test_ninety_six_layers_plan():
    where = cluster((FAST, 4), (FAST, 4), (SLOW, 4), (SLOW, 4))
    prices = Prices(5, memory=0.3, kept=0.003)
    found = plan(chain(96, microbatches=16, wide=10), where, prices, prices.shard)
    assert found.stages[0].start == 0 and found.stages[-1].stop == 96
    assert found.gap < 1e-3
