"""Plans of one stage: every mesh that the method allows, and per layer what to compute again where memory is
short."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TypeAlias

from autopar import stages
from autopar.api import following, specs
from autopar.api.exact import Made, Pins, Say, exact, stage_options, timed
from autopar.api.methods import (
    CreateState,
    DataParallel,
    Follow,
    Manual,
    ShardParallel,
    Zero2,
    Zero3,
    remat_of,
)
from autopar.api.tracing import Tracer
from autopar.cluster import Cluster, MeshChoice, shaped, submeshes
from autopar.core.errors import BadInput, DoesNotFit, PlanError, UnknownName
from autopar.core.graph import Remat
from autopar.core.mesh import Mesh
from autopar.core.plan import ShardingPlan
from autopar.sharding import pins
from autopar.sharding import plan as intra
from autopar.sharding import remat as layers
from autopar.sharding.limit.restrict import choosing
from autopar.stages.forward import END
from autopar.stages.offers import Offer
from autopar.trace.either import Remats
from autopar.trace.traced import Traced

OneStage: TypeAlias = ShardParallel | Manual | Follow | CreateState

WORTHWHILE = 0.01
"""How much less time has to be possible, as far as is known, for a better plan to be looked for among what
layers may compute again."""

ALTERNATIVES = Remat.NONE, Remat.PRODUCTS, Remat.FULL
"""What a layer may compute again, if there are many."""

FEW = Remat.NONE, Remat.PRODUCTS, Remat.PARTS
"""The same, if there are few: to compute everything again at once takes more memory than to keep what
passes between the parts of a few layers."""

MUCH = 4.0
"""Times the price of computing again that a byte has to cost before nothing else is tried."""

SLOWED = 1.05
"""A plan that needs no more time than so many times what it would need without a limit is not short of
memory."""


def one_stage(tracer: Tracer, cluster: Cluster, method: OneStage, say: Say) -> Made:
    """Returns the fastest plan over the meshes that the method allows.

    Where nothing fits, or the fastest plan is slowed down by the memory limit, layers may compute again what
    they would have kept (unless the method says what to recompute).

    Raises:
        BadInput: devices of several kinds, bad layouts. DoesNotFit: no plan keeps within the memory.
    """
    if len(cluster.kinds) > 1:
        raise BadInput(
            f"{type(method).__name__} shards over devices of one kind, but the cluster has "
            f"{', '.join(cluster.kinds)}; use autopar.Auto(), which gives each kind stages of its own"
        )
    work = _Work(tracer, cluster, method, say)
    said = False if isinstance(method, Follow | CreateState) else remat_of(method.remat)
    choices = _meshes(cluster, method)
    say("tracing")
    if said is None and work.differentiates:
        early = [work.alike(choice) for choice in choices]
        if all(early):
            return min((made for made in early if made), key=_time)
    best, refused = work.fastest(choices, False if said is None else said)
    if said is None and work.differentiates:
        best, reason = work.or_recomputing(best, choices)
        refused = reason or refused
    if best is None:
        assert refused is not None
        raise refused
    return best


def _time(made: Made) -> float:
    return made.plan.step_time


@dataclass
class _Work:
    """What is known while plans of one stage are looked for.

    Attributes:
        tried: plans in which all layers compute the same again.
        floors: mesh → seconds that no plan on it goes below, whatever layers compute again.
    """

    tracer: Tracer
    cluster: Cluster
    method: OneStage
    say: Say
    tried: list[Made] = field(default_factory=list[Made])
    floors: dict[Mesh, float] = field(default_factory=dict[Mesh, float])

    @property
    def micro(self) -> int:
        return 1 if isinstance(self.method, Follow | CreateState) else self.method.micro_batches

    @property
    def differentiates(self) -> bool:
        return self.tracer.prepared(self.micro).differentiates

    def fastest(
        self, choices: tuple[MeshChoice, ...], remat: Remats
    ) -> tuple[Made | None, DoesNotFit | BadInput | None]:
        """Returns the fastest plan that fits, or why there is none."""
        # whole scans are planned once for all layers; only what layers recompute needs them apart
        self.tracer.layer_scans, self.tracer.ending = remat not in (False, Remat.NONE), False
        traced = self.tracer(self.micro, remat)
        _check_names(remat, traced)
        best: Made | None = None
        refused: DoesNotFit | BadInput | None = None
        for choice in choices:
            self.say(f"sharding over {choice.mesh}")
            try:
                found = self._planned(traced, choice, remat)
            except (DoesNotFit, BadInput) as error:
                refused = error
                continue
            if best is None or _time(found) < _time(best):
                best = found
        return best, refused

    def _planned(self, traced: Traced, choice: MeshChoice, remat: Remats) -> Made:
        options = stages.Options(stages=1, choices=(choice,), model=traced.fingerprint)
        shard = exact(traced.graph, _fixed(self.method, traced, choice.mesh))
        found = stages.plan(traced.graph, self.cluster, _unpriced, shard, options)
        return Made(timed(found, self.cluster, remat, self.tracer.layer_scans), traced)

    def alike(self, choice: MeshChoice) -> Made | None:
        """Returns the plan in which all layers compute the same again, where that is as good as any: it takes
        hardly longer than a plan that needs not fit, or memory is dearer than computing anything again. None
        where nothing has to be computed again, or what has to be is not known so easily.
        """
        self.tracer.layer_scans, self.tracer.ending = False, False
        kept = self.tracer(self.micro, False)
        if any(e.loop is not None for e in kept.graph.equations):  # cut into layers, they are other steps
            return None
        free = self._free(kept, choice)
        if free is None or free.memory.peak <= free.memory.limit:
            return None
        self.floors[choice.mesh] = free.bound
        if len(ALTERNATIVES) ** len(kept.graph.layers) <= layers.ENUMERATED:
            return None  # all that layers may compute again is soon looked at
        half = free.memory.state + free.memory.activations // 2
        remat = Remat.PRODUCTS if half <= choice.mesh.device.memory else Remat.FULL
        try:
            found, enough = self._everywhere(remat, choice, free)
        except DoesNotFit:
            return None
        floor = self._floor(kept, choice, found, free) if enough and remat is Remat.FULL else free.bound
        self.tried.append(_bounded(found, floor))
        return self.tried[-1] if enough else None

    def _floor(self, kept: Traced, choice: MeshChoice, found: Made, free: ShardingPlan) -> float:
        """Returns seconds that no plan goes below in which like layers compute the same again: either they
        keep products, or everything is computed again.

        Args:
            kept: nothing is computed again. found: everything is. free: of `kept`, if memory did not matter.
        """
        own: ShardingPlan = found.plan.stages[0].sharding
        unlimited = self._free(found.traced, choice) or own
        over = max(1, unlimited.memory.peak - own.memory.limit)
        price = max(0.0, own.objective - unlimited.objective) / over
        graph, mesh = kept.graph, choice.mesh
        options = stage_options(graph, mesh, _fixed(self.method, kept, mesh))
        keeping = intra.keeping(graph, range(len(graph.equations)), mesh, options, price, own.bound)
        return max(free.bound, min(own.bound, keeping))

    def _everywhere(self, remat: Remat, choice: MeshChoice, free: ShardingPlan) -> tuple[Made, bool]:
        """Returns the plan in which every layer takes an alternative, and whether that is good enough.

        Args:
            free: with nothing computed again, if memory did not matter.
        """
        self.tracer.layer_scans, self.tracer.ending = True, True
        every = _with_the_end(remat)
        traced = self.tracer(self.micro, every)
        self.say(f"sharding over {choice.mesh}, recomputing {layers.WORDS[remat]}")
        found = self._planned(traced, choice, every)
        own: ShardingPlan = found.plan.stages[0].sharding
        unlimited = self._free(traced, choice) or own
        again = max(0.0, unlimited.objective - free.objective)
        words = f"{layers.WORDS[remat]} in every layer ({1e3 * again:.3g} ms)"
        note = f"memory is short; recomputed in the backward pass: {words}"
        found = replace(found, plan=replace(found.plan, notes=(*found.plan.notes, note)))
        near = own.objective <= (1 + WORTHWHILE) * free.bound
        return found, near or (remat is Remat.FULL and _dear(own, unlimited, free))

    def _free(self, traced: Traced, choice: MeshChoice) -> ShardingPlan | None:
        """The fastest plan whatever memory it needs."""
        graph, mesh = traced.graph, choice.mesh
        options = stage_options(graph, mesh, _fixed(self.method, traced, mesh))
        options = replace(options, limit=layers.UNLIMITED, regather=False)
        try:
            found = intra.plan(graph, range(len(graph.equations)), mesh, options)
        except PlanError:
            return None
        return replace(found, memory=replace(found.memory, limit=mesh.device.memory))

    def or_recomputing(
        self, kept: Made | None, choices: tuple[MeshChoice, ...]
    ) -> tuple[Made | None, DoesNotFit | None]:
        """Returns the better of a plan in which nothing is computed again and those in which layers compute
        again what pays, looked for where it is short of memory."""
        short = choices if kept is None else tuple(c for c in choices if _is_short(kept, c))
        other, reason = self.recomputing(short)
        both = [x for x in (kept, other) if x is not None]
        bound = min((x.plan.stages[0].sharding.bound for x in both), default=math.inf)
        best = min([*both, *self.tried], key=_time, default=None)
        if best is None:
            return None, reason
        floor = self.floors.get(best.plan.stages[0].mesh)
        if floor is not None:  # what was found by looking at all that layers may compute again is as true
            bound = min(bound, floor) if other is None else max(bound, floor)
        return _bounded(best, bound), reason

    def recomputing(self, choices: tuple[MeshChoice, ...]) -> tuple[Made | None, DoesNotFit | None]:
        """Returns the fastest plan in which layers compute again what pays, or why there is none."""
        best: Made | None = None
        refused: DoesNotFit | None = None
        for choice in choices:
            self.say(f"choosing what layers recompute on {choice.mesh}")
            try:
                found = self._recomputing(choice)
            except DoesNotFit as error:
                refused = error
                continue
            if best is None or _time(found) < _time(best):
                best = found
        return best, None if best else refused

    def _recomputing(self, choice: MeshChoice) -> Made:
        self.tracer.layer_scans, self.tracer.ending = True, True
        every = self.tracer(self.micro, _with_the_end(ALTERNATIVES))
        if not choosing(every.graph):
            raise DoesNotFit("no layer keeps anything for its backward pass that could be computed again")
        if layers.are_few(every.graph):
            by_parts = self.tracer(self.micro, _with_the_end(FEW))
            try:
                return self._chosen(by_parts, choice)
            except DoesNotFit:
                if choosing(by_parts.graph) == choosing(every.graph):
                    raise
        return self._chosen(every, choice)

    def _chosen(self, several: Traced, choice: MeshChoice) -> Made:
        """Returns the fastest plan of a trace that holds what layers may compute again."""
        pinned = _fixed(self.method, several, choice.mesh)
        options = stage_options(several.graph, choice.mesh, pinned)
        chosen = layers.choose(several.graph, choice.mesh, options)
        remat = dict(chosen.remat)
        found = self._planned(self.tracer(self.micro, remat), choice, remat)
        found = replace(found, plan=replace(found.plan, notes=(*found.plan.notes, chosen.text())))
        return _bounded(found, chosen.bound)


def _with_the_end(remat: Remat | tuple[Remat, ...]) -> Remats:
    """Returns that all layers recompute so; what follows the last keeps everything or nothing: its products
    are what takes most."""
    several = remat if isinstance(remat, tuple) else (remat,)
    end = tuple(r for r in several if r is not Remat.PRODUCTS) or (Remat.NONE,)
    return {END: end, "*": remat}


def _bounded(made: Made, bound: float) -> Made:
    """Returns a plan with the seconds that none is faster than, whatever layers compute again."""
    (stage,) = made.plan.stages
    sharding = replace(stage.sharding, bound=min(stage.sharding.objective, bound))
    return replace(made, plan=replace(made.plan, stages=(replace(stage, sharding=sharding),)))


def _dear(own: ShardingPlan, unlimited: ShardingPlan, kept: ShardingPlan) -> bool:
    """Whether a byte costs much more than to compute again what it holds.

    Args:
        own: the plan that fits, everything computed again. unlimited: the same if memory did not matter.
        kept: nothing computed again, if memory did not matter.
    """
    over = unlimited.memory.peak - own.memory.limit
    freed = kept.memory.peak - unlimited.memory.peak
    if over <= 0 or freed <= 0:
        return False
    byte = (own.objective - unlimited.objective) / over
    return byte > MUCH * max(0.0, unlimited.objective - kept.objective) / freed


def _check_names(remat: Remats, traced: Traced) -> None:
    for name in remat if isinstance(remat, Mapping) else ():
        if not any(found == name or fnmatchcase(found, name) for found in traced.graph.layers):
            raise UnknownName("layer to recompute", name, traced.graph.layers)


def _is_short(made: Made, choice: MeshChoice) -> bool:
    """Whether a plan on this mesh would be faster if its devices had more memory."""
    (stage,) = made.plan.stages
    own: ShardingPlan = stage.sharding
    if stage.mesh != choice.mesh or not own.memory.tight:
        return False
    graph = made.traced.graph
    options = replace(stage_options(graph, choice.mesh), limit=layers.UNLIMITED, regather=False)
    free = intra.plan(graph, range(len(graph.equations)), choice.mesh, options)
    return own.objective > SLOWED * free.objective


def _meshes(cluster: Cluster, method: OneStage) -> tuple[MeshChoice, ...]:
    if isinstance(method, Follow | CreateState):
        (stage,) = following.made_of(method.step.made, type(method).__name__).plan.stages
        return (following.mesh_of(stage.sharding, cluster),)
    mesh = method.mesh
    if mesh is None:
        return tuple(c for c in submeshes(cluster) if c.devices == cluster.size)
    choice = shaped(cluster, tuple(mesh.values()) if isinstance(mesh, Mapping) else mesh)
    if isinstance(mesh, Mapping):
        axes = tuple(replace(a, name=name) for a, name in zip(choice.mesh.axes, mesh, strict=True))
        choice = replace(choice, mesh=replace(choice.mesh, axes=axes))
    return (choice,)


def _fixed(method: OneStage, traced: Traced, mesh: Mesh) -> Pins:
    """The layouts that the method prescribes."""
    match method:
        case DataParallel():
            return pins.data_parallel(traced.graph, mesh)
        case Zero2():
            return pins.zero2(traced.graph, mesh)
        case Zero3():
            return pins.zero3(traced.graph, mesh)
        case Manual(specs=wanted):
            return specs.pinned(traced, mesh, wanted or {}, method.where)
        case Follow(step=step) | CreateState(step=step):
            assert step.made is not None, "checked when its mesh was asked for"
            sharding = step.made.plan.stages[0].sharding
            if isinstance(method, Follow):
                return following.arguments(traced.graph, step.made, sharding)
            found = following.results(traced.graph, step.made)
            return tuple((v, sharding.layout[u]) for v, u in found.items() if u in sharding.layout)
        case _:
            return ()


def _unpriced(layer: int, mesh: Mesh) -> tuple[Offer, ...]:
    """With one stage and one mesh there is nothing to choose, so nothing has to be priced."""
    return (Offer(0.0, 0.0, 0.0, 0.0, 0.0, 0.0),)
