"""Programs: schedules, emission, the symbolic check, the simulator. Plans are written by hand: no JAX
here."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.core.errors import ProgramError, UnknownName
from autopar.core.graph import Combine, Phase, Value
from autopar.core.mesh import Axis, Device, Mesh
from autopar.core.plan import Link, Memory, Plan, ShardingPlan, Stage
from autopar.core.program import Buffer, Free, Program, Recv, Role, Run, Segment, Send, Worker, reads
from autopar.program import check, emit, schedule, simulate
from autopar.program.check import beside, order

GOLDEN = Path(__file__).parent / "golden"
DEVICE = Device("toy", 1 << 30, 1e9, (("float32", 1e12),), 1e9)


def sharding(values: dict[int, Value], forward: float = 1.0, backward: float = 2.0) -> ShardingPlan:
    mesh = Mesh(DEVICE, (Axis("x", 1, 1e9, 0.0),))
    specs = tuple((v, ((),) * len(value.shape)) for v, value in values.items())
    memory = Memory(0, 0, 1, 0, 1 << 30)
    return ShardingPlan(mesh, specs, (), (), forward, backward, 0.5, memory, (), 1.0, 1.0, "optimal")


def pipeline(stages: int, micro: int, tied: bool = True, train: bool = True) -> Plan:
    """A chain: each stage s has a parameter w_s and maps a_{s-1} to a_s; clipping needs every gradient's
    norm.

    With `tied`, the last stage reads stage 0's parameter too, so that its gradient is a sum over two stages.
    """
    ids = itertools.count()
    values: dict[int, Value] = {}

    def new(name: str = "", shape: tuple[int, ...] = (4,)) -> int:
        v = next(ids)
        values[v] = Value(shape, "float32", name)
        return v

    w = [new(f"w{s}") for s in range(stages)]
    x = new("batch")
    acts = [new() for _ in range(stages)]
    loss = acts[-1]
    segments: list[Segment] = []
    for s in range(stages):
        ins = [w[s], acts[s - 1] if s else x] + ([w[0]] if tied and s == stages - 1 and s else [])
        segments.append(Segment(f"forward_{s}", s, Phase.FORWARD, 0, (s,), tuple(ins), (acts[s],)))
    outputs: list[int | None] = []
    combine = [(loss, Combine.MEAN)]
    if train:
        grads, cotangents = [new() for _ in range(stages)], [new() for _ in range(stages)]
        extra = new() if tied and stages > 1 else None
        for s in reversed(range(stages)):
            ins = [w[s], acts[s - 1] if s else x] + ([cotangents[s + 1]] if s + 1 < stages else [])
            outs = (
                [grads[s]] + ([cotangents[s]] if s else []) + ([extra] if extra and s == stages - 1 else [])
            )
            segments.append(Segment(f"backward_{s}", s, Phase.BACKWARD, 0, (9,), tuple(ins), tuple(outs)))
        norms, scale, fresh = [new(shape=()) for _ in w], new(shape=()), [new() for _ in w]
        for s in range(stages):
            ins = [grads[s]] + ([extra] if extra and s == 0 else [])
            segments.append(Segment(f"apply.0_{s}", s, Phase.APPLY, 0, (10,), tuple(ins), (norms[s],)))
        segments.append(Segment("apply.1_0", 0, Phase.APPLY, 1, (11,), tuple(norms), (scale,)))
        for s in range(stages):
            ins = (w[s], grads[s], scale) + ((extra,) if extra and s == 0 else ())
            segments.append(Segment(f"apply.2_{s}", s, Phase.APPLY, 2, (12,), ins, (fresh[s],)))
        outputs = [*fresh]
        combine += [(g, Combine.MEAN) for g in (*grads, *([extra] if extra else []))]
    aliases = tuple((s, s) for s in range(stages)) if train else ()
    links = tuple(Link(a, b, 16.0, 0.25) for a in range(stages) for b in range(stages) if a != b)
    own = tuple(Stage(s, s + 1, (("n0", s),), sharding(values)) for s in range(stages))
    return Plan(
        "model", tuple(f"layer {s}" for s in range(stages)), own, links, micro, "1f1b", tuple(segments),
        tuple(values.items()), (*w, x), (*outputs, loss), aliases, (x,), (), tuple(combine), 1.0, 1.0,
    )  # fmt: skip


def golden(name: str, text: str) -> None:
    path = GOLDEN / f"{name}.txt"
    assert path.exists(), f"write {path} with:\n{text}"
    assert text == path.read_text().rstrip("\n")


def test_schedules_print():
    text = "\n\n".join(f"{n} 3x4\n{schedule(n, 3, 4)}" for n in ("1f1b", "gpipe"))
    golden("schedules", text)
    with pytest.raises(UnknownName, match="unknown schedule '1f2b'; did you mean 1f1b"):
        schedule("1f2b", 2, 2)


@pytest.mark.parametrize(("stages", "micro"), [(1, 1), (2, 1), (2, 4), (4, 2), (4, 8)])
def test_in_flight(stages: int, micro: int):
    assert schedule("gpipe", stages, micro).in_flight == (micro,) * stages
    assert schedule("1f1b", stages, micro).in_flight == tuple(min(micro, stages - s) for s in range(stages))


def test_program_of_a_tied_pipeline_prints():
    golden("program_tied_1f1b", str(emit(pipeline(3, 2), schedule("1f1b", 3, 2))))


def test_program_of_one_micro_batch_prints():
    golden("program_single", str(emit(pipeline(2, 1), schedule("gpipe", 2, 1))))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.booleans(), st.booleans(), st.sampled_from(["gpipe", "1f1b"]))
def test_every_program_passes_the_check(stages: int, micro: int, tied: bool, train: bool, name: str):
    plan = pipeline(stages, micro, tied, train)
    program = emit(plan, schedule(name, stages, micro))
    peaks = check(program)
    assert len(peaks) == stages and all(peak > 0 for peak in peaks)
    runs = [(w, program.workers[w].instructions[i]) for w, i in order(program)]
    assert sum(isinstance(i, Run) for _, i in runs) == sum(
        1 if s.phase is Phase.APPLY else micro for s in plan.segments
    )
    fetched = sorted(p for worker in program.workers for p, _ in worker.results)
    assert fetched == list(range(len(plan.outputs)))


def test_one_forward_one_backward_deadlocks_without_buffers():
    program = emit(pipeline(3, 4), schedule("1f1b", 3, 4))
    with pytest.raises(ProgramError, match="deadlock"):
        check(program, buffered=False)


def mutate(program: Program, worker: int, keep: object) -> Program:
    w = program.workers[worker]
    changed = replace(w, instructions=tuple(i for i in w.instructions if i is not keep))
    return replace(program, workers=tuple(changed if v is w else v for v in program.workers))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_lost_instruction_is_noticed(data: st.DataObject):
    program = emit(pipeline(3, 2), schedule("1f1b", 3, 2))
    worker = data.draw(st.integers(0, 2))
    lost = data.draw(st.sampled_from(program.workers[worker].instructions))
    if isinstance(lost, Run) and not lost.outputs:
        return
    with pytest.raises(ProgramError):
        check(mutate(program, worker, lost))


def test_a_wrong_tag_and_an_early_free_are_noticed():
    program = emit(pipeline(2, 1), schedule("gpipe", 2, 1))
    first, second = program.workers
    moved = tuple(replace(i, tag="other") if isinstance(i, Send) else i for i in first.instructions)
    with pytest.raises(ProgramError, match=r"deadlock: worker 1 waits forever .* recv from 0"):
        check(replace(program, workers=(replace(first, instructions=moved), second)))
    early = (Free((first.state[0],)), *first.instructions)
    with pytest.raises(ProgramError, match=r"v0 is not there"):
        check(replace(program, workers=(replace(first, instructions=early), second)))


def test_limits_are_checked():
    program = emit(pipeline(2, 2), schedule("gpipe", 2, 2))
    peaks = check(program)
    check(program, peaks)
    with pytest.raises(ProgramError, match="worker 1 needs"):
        check(program, (peaks[0], peaks[1] - 1))


def test_old_state_is_donated_only_where_it_is_replaced():
    program = emit(pipeline(3, 2), schedule("1f1b", 3, 2))
    for worker in program.workers:
        for n, run in enumerate(worker.instructions):
            if isinstance(run, Run) and run.donated:
                dead = {run.inputs[k] for k in run.donated}
                if run.segment.startswith(("forward", "backward")):  # sums, which it makes anew
                    assert dead <= {*run.outputs} and all(b.role is Role.SUM for b in dead)
                    continue
                assert run.segment.startswith("apply.2") and dead <= set(worker.state)
                assert not dead & {b for later in worker.instructions[n + 1 :] for b in reads(later)}
    assert program.workers[1].instructions[-2] != program.workers[1].instructions[-1]


def undonated(worker: Worker) -> Worker:
    kept = (replace(i, donated=()) if isinstance(i, Run) else i for i in worker.instructions)
    return replace(worker, instructions=tuple(kept))


def test_donated_memory_is_counted_once_and_gone_afterwards():
    program = emit(pipeline(1, 1, tied=False), schedule("1f1b", 1, 1))
    (worker,) = program.workers
    assert check(program) == (64,), "16 bytes each: parameter, loss, gradient, and what is passed on"
    assert check(replace(program, workers=(undonated(worker),))) == (68,)
    early = (
        replace(i, donated=(0,)) if isinstance(i, Run) and i.segment == "forward_0" else i
        for i in worker.instructions
    )
    with pytest.raises(ProgramError, match="is not there"):
        check(replace(program, workers=(replace(worker, instructions=tuple(early)),)))


def test_what_is_held_beside_a_segment_is_what_it_does_not_read():
    program = emit(pipeline(2, 4, tied=False), schedule("1f1b", 2, 4))
    held = beside(program)
    assert held[0]["forward_0"] > 0, "activations of the micro-batch before, and its sum of gradients"
    for worker, peak, others in zip(program.workers, check(program), held):
        sizes = {slot.value: slot.nbytes for slot in worker.slots}
        for run in (i for i in worker.instructions if isinstance(i, Run)):
            own = sum(sizes[b.value] for b in {*run.inputs, *run.outputs})
            again = sum(sizes[run.inputs[k].value] for k in run.donated)
            assert others[run.segment] + own - again <= peak


def test_simulation_of_1f1b_equals_the_closed_form():
    """Equal stages, free links: (B − 1 + K)(forward + backward) + apply, as in the 1F1B paper."""
    stages, micro = 3, 5
    plan = pipeline(stages, micro, tied=False)
    plan = replace(plan, links=tuple(replace(link, bandwidth=1e30, latency=0.0) for link in plan.links))
    free = replace(DEVICE, bandwidth=1e30)
    own = tuple(
        replace(s, sharding=replace(s.sharding, apply=0.0, mesh=replace(s.mesh, device=free)))
        for s in plan.stages
    )
    plan = replace(plan, stages=own)
    for name in ("1f1b", "gpipe"):
        line = simulate(plan, emit(plan, schedule(name, stages, micro)))
        assert line.step_time == pytest.approx((micro - 1 + stages) * 3.0)
        assert line.bubble == pytest.approx((stages - 1) / (micro - 1 + stages))


def test_simulation_counts_transfers():
    plan = pipeline(2, 1, train=False)
    line = simulate(plan, emit(plan, schedule("gpipe", 2, 1)))
    message = 0.25 + 16 / 16.0
    sends = [e for e in line.events if e.kind == "send"]
    assert line.step_time == pytest.approx(1.0 + 2.0 + message + 1.0 + 2.0)
    assert [(e.start, e.stop) for e in sends] == [(3.0, 3.0 + message)]


def test_receives_come_in_the_senders_words():
    program = emit(pipeline(3, 2), schedule("gpipe", 3, 2))
    sends = {i.tag: i for w in program.workers for i in w.instructions if isinstance(i, Send)}
    for worker in program.workers:
        for i in worker.instructions:
            if isinstance(i, Recv):
                assert sends[i.tag].buffers == i.buffers and sends[i.tag].to == worker.stage
    assert Buffer(1, 2, Role.SUM) > Buffer(1, 1)
