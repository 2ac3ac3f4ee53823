"""How a model is served on a cluster: its stages, what each device holds, how fast it will be.

Nothing is allocated: a decode step is planned, a prompt and a full batch are derived from its plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autopar.api.inference import Latency, Wanted, cache_use, plan, width
from autopar.api.planning import Made, Say
from autopar.api.serving import Served, Shape, derived, same_state
from autopar.cluster import Cluster
from autopar.core.errors import BadInput, DoesNotFit
from autopar.core.plan import Plan, Stage
from autopar.report.units import size

MOST_ROWS = 256
"""Sequences in one step at most: beyond that a step takes longer without giving more."""


@dataclass(frozen=True)
class Room:
    """What one device of a stage holds, in bytes.

    Attributes:
        weights: parameters. workspace: the most that is alive beside them and the cache.
        block: one cache block of all the stage's layers. limit: what the device has.
    """

    weights: float
    workspace: float
    block: float
    limit: float

    @property
    def blocks(self) -> int:
        """Cache blocks that there is room for."""
        return max(0, int((self.limit - self.weights - self.workspace) // self.block))


@dataclass(frozen=True)
class ServingPlan:
    """A plan for serving.

    Attributes:
        name, dtype, cluster: what is served, in which type, where.
        decode: the plan of a step of one token for one sequence.
        prefill: of a prompt of `prompt` tokens.
        full: of a step of `rows` sequences of `length` tokens: as many as fill the cache when every stage has
            a step of its own in flight.
        rooms: per stage, what its devices hold.
        block_size: tokens in a cache block.
        parameters: bytes of all weights, once.
    """

    name: str
    dtype: str
    cluster: str
    decode: Plan
    prefill: Plan
    full: Plan
    rooms: tuple[Room, ...]
    block_size: int
    prompt: int
    length: int
    rows: int
    parameters: int

    @property
    def blocks(self) -> int:
        """Cache blocks there will be: as many as the stage with least room has, `SCRATCH` among them."""
        return min(room.blocks for room in self.rooms)

    @property
    def tokens(self) -> int:
        """Tokens that the cache holds."""
        return max(0, self.blocks - 1) * self.block_size

    @property
    def bounding(self) -> int:
        """The stage that has room for the fewest tokens."""
        return min(range(len(self.rooms)), key=lambda s: self.rooms[s].blocks)

    @property
    def time_to_first_token(self) -> float:
        """Seconds from a prompt to its first token, with nothing else running."""
        return self.prefill.step_time

    @property
    def single(self) -> float:
        """Tokens per second of one sequence alone."""
        return 1 / self.decode.step_time

    @property
    def most(self) -> float:
        """Tokens per second with a full cache: every stage busy with a step of `rows` sequences."""
        slowest = max(stage.sharding.forward for stage in self.full.stages)
        return self.rows / max(slowest, self.full.step_time / len(self.full.stages))

    @property
    def slowest_link(self) -> tuple[str, float] | None:
        """What the slowest link that is used joins, and its bytes/s; None where nothing is sent."""
        found = [(f"stage {x.source} → stage {x.to}", x.bandwidth) for x in self.decode.links]
        for s, stage in enumerate(self.decode.stages):
            used = {axis for c in stage.sharding.collectives for axis in c.axes}
            found += [(f"inside stage {s}", stage.mesh.axis(axis).bandwidth) for axis in used]
        return min(found, key=lambda x: x[1], default=None)

    def picture(self, path: str) -> None:
        """Draws stages and memory to *.svg, *.png or *.pdf."""
        from autopar.report.serving import serving_picture

        serving_picture([self], path)

    def __str__(self) -> str:
        from autopar.report.serving import serving_text

        return serving_text(self)


def serving_plan(
    served: Served,
    cluster: Cluster,
    *,
    name: str = "",
    wanted: Wanted | None = None,
    length: int = 2048,
    prompt: int = 512,
    say: Say = lambda words: None,
) -> tuple[ServingPlan, Made]:
    """Returns how a model is served on a cluster, and the decode step's plan with its trace.

    Args:
        served: the model; its number of blocks does not matter. wanted: what the plan is to be good at;
            by default latency, with room for one sequence of `length` tokens.
        length: tokens of the longest sequence. prompt: tokens of the prompt that is timed.

    Raises:
        DoesNotFit: the cluster's memory is too small; says how many gigabytes are missing.
    """
    served, made = decode_plan(served, cluster, name=name, wanted=wanted, length=length, say=say)
    return described(served, made, cluster, name=name, length=length, prompt=prompt, say=say), made


def decode_plan(
    served: Served,
    cluster: Cluster,
    *,
    name: str = "",
    wanted: Wanted | None = None,
    length: int = 2048,
    say: Say = lambda words: None,
) -> tuple[Served, Made]:
    """Returns the plan of a decode step, and the model with as many cache blocks as it was traced with."""
    nominal = -(-length // served.block_size) + 1
    served = replace(served, blocks=nominal)
    say("tracing a decode step")
    traced = served.tracer(Shape(1, 1, nominal - 1))(1, False)
    return served, _planned(traced, served, cluster, wanted or Wanted(Latency(), nominal), name, say)


def described(
    served: Served,
    made: Made,
    cluster: Cluster,
    *,
    name: str = "",
    length: int = 2048,
    prompt: int = 512,
    say: Say = lambda words: None,
) -> ServingPlan:
    """Returns what a decode step's plan means: its cache, prompts, full batches. Arguments as above."""
    nominal = served.blocks
    say("a prompt")
    prefill = _of_shape(made, served, Shape(1, prompt, -(-prompt // served.block_size)), cluster)
    rooms = tuple(_room(made, nominal, s, [prefill]) for s in range(len(made.plan.stages)))
    rows = _rows(min(room.blocks for room in rooms), nominal - 1, len(rooms))
    say(f"a step of {rows} sequences")
    full = _of_shape(made, served, Shape(rows, 1, nominal - 1), cluster) if rows > 1 else made.plan
    rooms = tuple(_room(made, nominal, s, [prefill, full]) for s in range(len(made.plan.stages)))
    return ServingPlan(
        name, types(served), str(cluster), made.plan, prefill, full, rooms, served.block_size,
        prompt, length, min(rows, max(1, _rows(min(r.blocks for r in rooms), nominal - 1, len(rooms)))),
        served.weight_bytes,
    )  # fmt: skip


def _rows(blocks: int, each: int, stages: int) -> int:
    """Sequences in one of as many steps as there are stages, where all together fill the cache."""
    return max(1, min(MOST_ROWS, (blocks - 1) // each // stages))


def _planned(traced: Any, served: Served, cluster: Cluster, wanted: Wanted, name: str, say: Say) -> Made:
    try:
        return plan(traced, served.blocks, cluster, wanted, say)
    except DoesNotFit as error:
        raise DoesNotFit(missing_text(served, cluster, wanted.blocks, name, error), error.missing) from None


def missing_text(served: Served, cluster: Cluster, blocks: int, name: str, error: DoesNotFit) -> str:
    """Returns why a model does not fit a cluster, in gigabytes."""
    cache = served.block_bytes * blocks
    needs, has = served.weight_bytes + cache, cluster.memory
    short = max(needs - has, (error.missing or 0))
    where = (
        ""
        if needs > has
        else " on its fullest device (layers cannot be cut finely enough, or need room to work)"
    )
    return (
        f"{name or 'the model'} does not fit {cluster}: its weights in {types(served)} take "
        f"{size(served.weight_bytes)} and a cache of {(blocks - 1) * served.block_size} tokens "
        f"{size(cache)}, the devices have {size(has)} together; {size(short)} are missing{where}. "
        "Add devices, keep fewer tokens, or weights of fewer bits"
    )


def types(served: Served) -> str:
    """Returns the element types of a model in words."""
    kept = np.dtype(served.dtype).name
    return f"int8 and {kept}" if getattr(served.config, "int8", False) else kept


def _of_shape(made: Made, served: Served, shape: Shape, cluster: Cluster) -> Plan:
    traced = served.tracer(shape)(1, False)
    return derived(made, traced, same_state(made.traced, traced), cluster).plan


def _room(made: Made, blocks: int, s: int, others: list[Plan]) -> Room:
    stage = made.plan.stages[s]
    use = cache_use(made.traced, blocks)
    block = use.on_device(stage.sharding) * width(stage.sharding)
    workspace = max(p.stages[s].memory.workspace for p in (made.plan, *others))
    return Room(stage.memory.state - blocks * block, workspace, block, _limit(stage))


def _limit(stage: Stage) -> float:
    return float(stage.mesh.device.memory)


def half_for(cluster: Cluster, native: str) -> str:
    """Returns the 16-bit type a model is kept in: its own, or float16 where some device lacks that.

    Args:
        native: the type its weights were trained or published in; "float32" stays.
    """
    if native not in ("float16", "bfloat16"):
        return native
    if all(node.device.supports(native) for node in cluster.nodes):
        return native
    other = "float16" if native == "bfloat16" else "bfloat16"
    if all(node.device.supports(other) for node in cluster.nodes):
        return other
    lacking = ", ".join(sorted({n.device.name for n in cluster.nodes if not n.device.supports(native)}))
    raise BadInput(f"{lacking} has neither float16 nor bfloat16; plan in float32")
