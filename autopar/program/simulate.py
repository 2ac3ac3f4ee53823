"""The simulator: the program that will run, executed against the plan's cost model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autopar.core.dtypes import itemsize
from autopar.core.graph import Phase
from autopar.core.plan import Plan
from autopar.core.program import Accumulate, Instruction, Program, Run, Segment, Send
from autopar.core.timeline import Event, Timeline
from autopar.program.walk import Step, Walk


@dataclass(frozen=True)
class Costs:
    """What instructions cost, in seconds. run: of a segment; send: on the wire; fold: of an accumulation;
    launch: each.
    """

    run: Callable[[Segment], float]
    send: Callable[[int, Send], float]
    fold: Callable[[int, Accumulate], float]
    launch: float = 0.0


def simulate(plan: Plan, program: Program, costs: Costs | None = None) -> Timeline:
    """Returns the timeline of one step.

    Raises:
        ProgramError: the program cannot run; see `check`.
    Args:
        costs: what instructions cost; by default the plan's own model (stage times, link bandwidths).
    """
    costs = costs or planned(plan, program)
    segments = {s.name: s for s in program.segments}

    def seconds(worker: int, instruction: Instruction) -> float:
        match instruction:
            case Run(segment=name):
                return costs.launch + costs.run(segments[name])
            case Accumulate():
                return costs.launch + costs.fold(worker, instruction)
            case Send():
                return costs.launch
            case _:
                return 0.0

    walk = Walk(program, seconds, costs.send).run()
    walk.refuse()
    names = tuple(f"stage {s} · {stage.mesh}" for s, stage in enumerate(plan.stages))
    events = (*(e for step in walk.steps if (e := _event(step))), *_wires(walk, costs))
    return Timeline(tuple(sorted(events, key=lambda e: (e.start, e.worker))), names, tuple(walk.peak))


def _event(step: Step) -> Event | None:
    match step.instruction:
        case Run(segment=name, inputs=inputs, outputs=outputs):
            micro = next((b.microbatch for b in (*outputs, *inputs) if b.microbatch is not None), None)
            return Event(step.worker, name, "run", step.start, step.stop, micro)
        case Accumulate(buffers=buffers):
            return Event(
                step.worker, "accumulate", "accumulate", step.start, step.stop, buffers[0].microbatch
            )
        case _:
            return None


def _wires(walk: Walk, costs: Costs) -> list[Event]:
    """Transfers, on the sender's row: a link carries one message after another."""
    busy: dict[tuple[int, int], float] = {}
    events: list[Event] = []
    for step in walk.steps:
        match step.instruction:
            case Send(buffers=buffers, to=to, tag=tag) as send:
                start = max(step.stop, busy.get((step.worker, to), 0.0))
                busy[step.worker, to] = start + costs.send(step.worker, send)
                events.append(
                    Event(step.worker, tag, "send", start, busy[step.worker, to], buffers[0].microbatch)
                )
            case _:
                pass
    return events


def planned(plan: Plan, program: Program) -> Costs:
    """Returns the costs the plan predicts: each stage's times, its share of apply per level, links, memory
    traffic.
    """
    work: dict[int, int] = {}
    for s in program.segments:
        if s.phase is Phase.APPLY:
            work[s.stage] = work.get(s.stage, 0) + len(s.equations)
    backward = {s.stage for s in program.segments if s.phase is Phase.BACKWARD}
    slots = [{slot.value: slot for slot in worker.slots} for worker in program.workers]

    def run(segment: Segment) -> float:
        return alone(segment) + fold_in(segment)

    def fold_in(segment: Segment) -> float:
        """Reads the sums; they are written instead of what is added to them."""
        sums = sum(slots[segment.stage][segment.outputs[position]].nbytes for position, _ in segment.sums)
        return sums / plan.stages[segment.stage].mesh.device.bandwidth

    def alone(segment: Segment) -> float:
        own = plan.stages[segment.stage].sharding
        if len(program.segments) == 1:
            return own.forward + own.backward + own.apply
        if segment.phase is Phase.FORWARD:
            return own.forward + (0.0 if segment.stage in backward else own.backward)
        if segment.phase is Phase.BACKWARD:
            return own.backward
        micro = any(s.stage == segment.stage and s.phase is not Phase.APPLY for s in program.segments)
        share = len(segment.equations) / max(1, work[segment.stage])
        return own.apply * share if micro else own.forward + own.backward + own.apply

    def send(worker: int, message: Send) -> float:
        link = plan.link(worker, message.to)
        size = sum(plan.value[b.value].size * itemsize(slots[worker][b.value].dtype) for b in message.buffers)
        return link.latency + size / link.bandwidth

    def fold(worker: int, accumulate: Accumulate) -> float:
        moved = sum(slots[worker][b.value].nbytes for b in accumulate.buffers) * (
            2 if accumulate.first else 3
        )
        return moved / plan.stages[worker].mesh.device.bandwidth

    return Costs(run, send, fold)
