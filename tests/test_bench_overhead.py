"""`autopar bench overhead`: programs take turns, each with its own state, and a slow one shows."""

from __future__ import annotations

import itertools

from autopar.bench import overhead


def counting(name: str, clock: list[float], seconds: float, log: list[str]):
    """Returns a step that takes `seconds` of a clock that is set by hand, and counts in its state."""

    def step(state, batch):
        log.append(name)
        clock[0] += seconds
        return state + 1, batch

    return step


def test_a_slower_step_shows_and_nobody_always_follows_the_same(monkeypatch):
    clock, log = [0.0], list[str]()
    monkeypatch.setattr(overhead.time, "perf_counter", lambda: clock[0])
    steps = [
        counting(name, clock, seconds, log) for name, seconds in (("jit", 2.0), ("ours", 3.0), ("jit2", 1.0))
    ]
    found = overhead.in_turns(steps, lambda: 0, 0, count=12, rounds=3)
    assert found == overhead.Turns(ours=3.0, jit=2.0, ratio=1.5, control=0.5)
    assert [log.count(name) for name in ("jit", "ours", "jit2")] == [3 * (12 + overhead.WARM)] * 3
    before = {name: {a for a, b in itertools.pairwise(log) if b == name} for name in ("jit", "ours", "jit2")}
    assert all(len(others) >= 2 for others in before.values()), before


def test_states_are_not_shared_and_are_made_anew():
    seen = list[tuple[str, int]]()

    def step(name):
        return lambda state, batch: (seen.append((name, state)), (state + 1, batch))[1]

    overhead.in_turns([step("a"), step("b"), step("c")], lambda: 0, 0, count=overhead.WARM, rounds=2)
    for name in "abc":
        assert [s for n, s in seen if n == name] == [*range(2 * overhead.WARM)] * 2
