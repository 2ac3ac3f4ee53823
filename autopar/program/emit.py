"""A plan turned into a program: runs in the schedule's order, with the sends, receives, sums and frees they
need.
"""

from __future__ import annotations

from dataclasses import replace

from autopar.core.graph import Combine, Phase
from autopar.core.plan import Plan
from autopar.core.program import (
    Accumulate,
    Buffer,
    Instruction,
    Program,
    Recv,
    Rename,
    Role,
    Run,
    Segment,
    Send,
    Worker,
    Zero,
)
from autopar.core.schedule import Schedule
from autopar.program.layout import Facts
from autopar.program.liveness import donate, free


def emit(plan: Plan, schedule: Schedule) -> Program:
    """Returns the program of one step.

    Per micro-batch every stage runs its forward and backward in the schedule's order; a result that another
    stage reads is sent right after the run that makes it, and received right before the first run that reads
    it. Values that outlive the micro-batches are folded into sums: by the segment that makes them, which is
    handed the sums so far, where nothing else reads a single micro-batch's; so gradients and their sums are
    not all there at once. Then the apply segments run level by level, new state goes from the stage that
    makes it to every stage that holds it, and at last takes the old state's name.

    Args:
        plan: with segments. schedule: for as many stages and micro-batches as the plan has.
    """
    assert len(schedule.tasks) == len(plan.stages), "the schedule is for another number of stages"
    emitter = _Emitter(Facts(plan), schedule)
    emitter.micro_batches()
    emitter.sums()
    emitter.apply()
    emitter.new_state()
    return Program(emitter.workers(), tuple(map(emitter.summing, plan.segments)), plan.microbatches)


class _Emitter:
    """The instruction lists under construction, one per stage."""

    def __init__(self, facts: Facts, schedule: Schedule):
        self.facts, self.plan, self.schedule = facts, facts.plan, schedule
        self.lists: list[list[Instruction]] = [[] for _ in schedule.tasks]
        self.have: list[set[Buffer]] = [set() for _ in schedule.tasks]  # received or copied so far, per stage
        # Equal for every micro-batch, so found once: by segment (and receiver).
        self._messages: dict[tuple[str, int], tuple[int, ...]] = {}
        self._lasting: dict[str, list[int]] = {}
        self._origins: dict[str, list[Segment]] = {}
        self._summing: dict[str, Segment] = {}
        self.by_task = {(s.stage, s.phase): s for s in self.plan.segments if s.phase is not Phase.APPLY}

    # micro-batches
    def micro_batches(self) -> None:
        for stage, tasks in enumerate(self.schedule.tasks):
            started: set[int] = set()
            self._fold(
                stage,
                [v for v in self.plan.batch if self._outlives(v, stage)],
                started,
                range(self.plan.microbatches),
            )
            for task in tasks:
                segment = self.by_task.get((stage, task.phase))
                if segment is not None:
                    self._run_micro(segment, task.microbatch, started)

    def _run_micro(self, segment: Segment, i: int, started: set[int]) -> None:
        stage, facts = segment.stage, self.facts
        for maker in self._sources(segment):
            values = self._message(maker, stage)
            buffers = facts.parts(values, i)
            if not self.have[stage].issuperset(buffers):
                self.lists[stage].append(Recv(buffers, maker.stage, f"{maker.name}>{stage}.{i}"))
                self.have[stage].update(buffers)
        segment = self.summing(segment)
        ins, outs = facts.parts(segment.inputs, i), list(facts.parts(segment.outputs, i))
        sums = facts.sums(segment.outputs[position] for position, _ in segment.sums)
        for (position, _), total in zip(segment.sums, sums):
            outs[position] = total
        if new := tuple(total for total in sums if total.value not in started):
            self.lists[stage].append(Zero(new))
            started.update(total.value for total in new)
        given = tuple(range(len(ins), len(ins) + len(sums)))
        self.lists[stage].append(Run(segment.name, ins + sums, tuple(outs), given))
        for to in range(len(self.lists)):
            if to != stage and (values := self._message(segment, to)):
                buffers = facts.parts(values, i)
                self.lists[stage].append(Send(buffers, to, f"{segment.name}>{to}.{i}"))
        summed = {total.value for total in sums}
        self._fold(stage, [v for v in self._outliving(segment) if v not in summed], started, [i])

    def summing(self, segment: Segment) -> Segment:
        """Returns the segment with the sums that it adds to itself."""
        if segment.name not in self._summing:
            lasting = set() if segment.phase is Phase.APPLY else {*self._outliving(segment)}
            sums = tuple(
                (position, self._scale(v))
                for position, v in enumerate(segment.outputs)
                if v in lasting and self.facts.summed_where_made(v)
            )
            self._summing[segment.name] = replace(segment, sums=sums)
        return self._summing[segment.name]

    def _scale(self, value: int) -> float:
        return 1 / self.plan.microbatches if self.facts.combine(value) is Combine.MEAN else 1.0

    def _outliving(self, segment: Segment) -> list[int]:
        if segment.name not in self._lasting:
            self._lasting[segment.name] = [v for v in segment.outputs if self._outlives(v, segment.stage)]
        return self._lasting[segment.name]

    def _sources(self, segment: Segment) -> list[Segment]:
        """The micro-batch segments of other stages whose results this one reads."""
        if segment.name in self._origins:
            return self._origins[segment.name]
        found: dict[str, Segment] = {}
        for v in segment.inputs:
            makers = [m for m in self.facts.makers.get(v, ()) if m.phase is not Phase.APPLY]
            if makers and not self.facts.made_on(v, segment.stage):
                found[makers[0].name] = makers[0]
        return self._origins.setdefault(segment.name, list(found.values()))

    def _message(self, maker: Segment, to: int) -> tuple[int, ...]:
        """What the maker sends to a stage after each micro-batch: all that its forward and backward read."""
        facts, key = self.facts, (maker.name, to)
        if key not in self._messages:
            self._messages[key] = tuple(
                v
                for v in maker.outputs
                if not facts.made_on(v, to)
                and facts.makers[v][0] == maker
                and any(r.stage == to and r.phase is not Phase.APPLY for r in facts.readers.get(v, ()))
            )
        return self._messages[key]

    def _outlives(self, value: int, stage: int) -> bool:
        """Whether the micro-batch value is read after the micro-batches and this stage is where it is
        folded."""
        if not self.facts.combined(value):
            return False
        later = any(r.phase is Phase.APPLY for r in self.facts.readers.get(value, ()))
        later = later or value in self.plan.outputs
        return later and stage == self.facts.home(value)

    def _fold(self, stage: int, values: list[int], started: set[int], micro: range | list[int]) -> None:
        """Appends the accumulations of `values` for the given micro-batches, grouped by how they combine."""
        groups: dict[tuple[bool, Combine], list[int]] = {}
        for v in values:
            groups.setdefault((v not in started, self.facts.combine(v)), []).append(v)
        for (fresh, how), group in groups.items():
            for i in micro:
                first = how is Combine.LAST or (fresh and i == micro[0])  # the last one's stays
                scale = self._scale(group[0])
                sums, parts = self.facts.sums(group), tuple([Buffer(v, i) for v in group])
                self.lists[stage].append(Accumulate(sums, parts, first, scale, how is Combine.CONCAT))
            started.update(group)

    # once per step
    def sums(self) -> None:
        """Sends what the micro-batches left to the stages whose apply segments read it, once per step."""
        wanted: dict[tuple[int, int], list[int]] = {}
        for v in sorted(self.facts.micro):
            home = self.facts.home(v)
            readers = {r.stage for r in self.facts.readers.get(v, ()) if r.phase is Phase.APPLY}
            for to in sorted(readers - {home}):
                if not (self.plan.microbatches == 1 and self._on(v, to)):
                    wanted.setdefault((home, to), []).append(v)
        for (home, to), values in wanted.items():
            buffers = tuple(self.facts.whole(v) for v in values)
            self._transfer(home, to, buffers, f"sums{home}>{to}")

    def _on(self, value: int, stage: int) -> bool:
        """Whether a micro-batch value is on the stage anyway: fed to it, made there or received."""
        return (
            value in self.plan.batch
            or self.facts.made_on(value, stage)
            or Buffer(value, 0) in self.have[stage]
        )

    def _transfer(self, source: int, to: int, buffers: tuple[Buffer, ...], tag: str) -> None:
        self.lists[source].append(Send(buffers, to, tag))
        self.lists[to].append(Recv(buffers, source, tag))
        self.have[to].update(buffers)

    def apply(self) -> None:
        """Runs the apply segments level by level; a level's results go to the stages that read them later."""
        segments = sorted(
            (s for s in self.plan.segments if s.phase is Phase.APPLY), key=lambda s: (s.level, s.stage)
        )
        for segment in segments:
            ins = tuple(self.facts.whole(v) for v in segment.inputs)
            outs = tuple(Buffer(v) for v in segment.outputs)
            self.lists[segment.stage].append(Run(segment.name, ins, outs))
            for to in range(len(self.lists)):
                values = self._apply_message(segment, to)
                if to != segment.stage and values:
                    self._transfer(segment.stage, to, tuple(map(Buffer, values)), f"{segment.name}>{to}")

    def _apply_message(self, maker: Segment, to: int) -> tuple[int, ...]:
        facts = self.facts
        return tuple(
            v
            for v in maker.outputs
            if facts.makers[v][0] == maker
            and not facts.made_on(v, to)
            and any(r.stage == to for r in facts.readers.get(v, ()))
        )

    def new_state(self) -> None:
        """Brings each new state value to all holders of the old one, then renames (last, so that no send is
        late).
        """
        renames: list[tuple[int, Buffer, Buffer]] = []
        pairs = self.facts.replaced_by
        news = sorted(pairs.values())
        shared = {news[k] for k in range(1, len(news)) if news[k] == news[k - 1]}
        for old, new in pairs.items():
            source = self.facts.whole(new)
            for to in self.facts.holders(old):
                self._bring(new, source, to, f"new v{old}>{to}")
                if new in self.facts.state or new in shared:
                    copy = Buffer(old, role=Role.NEXT)
                    self.lists[to].append(Accumulate((copy,), (source,), True, 1.0))
                    renames.append((to, copy, Buffer(old)))
                else:
                    renames.append((to, source, Buffer(old)))
        for stage, source, target in renames:
            self.lists[stage].append(Rename(source, target))

    def _bring(self, value: int, buffer: Buffer, to: int, tag: str) -> None:
        facts = self.facts
        if value in facts.state:
            there = to in facts.holders(value)
            home = facts.holders(value)[0]
        else:
            home = facts.home(value)
            there = to == home if facts.combined(value) else facts.made_on(value, to)
        if not there and buffer not in self.have[to]:
            self._transfer(home, to, (buffer,), tag)

    # workers
    def workers(self) -> tuple[Worker, ...]:
        return tuple(self._worker(stage, instructions) for stage, instructions in enumerate(self.lists))

    def _worker(self, stage: int, instructions: list[Instruction]) -> Worker:
        facts = self.facts
        held = {v for v in facts.state if stage in facts.holders(v)}
        read = {v for s in self.plan.segments if s.stage == stage for v in s.inputs}
        folded = {v for v in self.plan.batch if self._outlives(v, stage)}
        fed = [v for v in self.plan.batch if v in read or v in folded]
        feeds = tuple(Buffer(v, i) for v in fed for i in range(self.plan.microbatches))
        state = tuple(Buffer(v) for v in sorted(held))
        results = self._results(stage)
        keep = {*state, *(b for _, b in results)}
        done = free(donate(instructions), keep, feeds)
        names = {b.value for i in done for b in _buffers(i)} | {b.value for b in (*state, *feeds)}
        slots = tuple(facts.slot(v, stage) for v in sorted(names))
        return Worker(stage, state, feeds, results, tuple(done), slots)

    def _results(self, stage: int) -> tuple[tuple[int, Buffer], ...]:
        """The step's outputs that are fetched from this stage. A replaced state value is read under the
        state's name.
        """
        facts, found = self.facts, list[tuple[int, Buffer]]()
        state_of = {o: self.plan.inputs[i] for o, i in self.plan.aliases}
        renamed = {new: old for old, new in facts.replaced_by.items() if new not in facts.state}
        for position, value in enumerate(self.plan.outputs):
            if value is None:
                continue
            old = state_of.get(position, renamed.get(value, value if value in facts.state else None))
            if old is not None:
                if stage == facts.holders(old)[0]:
                    found.append((position, Buffer(old)))
            elif stage == facts.home(value):
                found.append((position, facts.whole(value)))
        return tuple(found)


def _buffers(instruction: Instruction) -> tuple[Buffer, ...]:
    match instruction:
        case Run(inputs=a, outputs=b):
            return a + b
        case Accumulate(sums=a, buffers=b):
            return a + b
        case Rename(old=a, new=b):
            return (a, b)
        case _:
            return instruction.buffers
