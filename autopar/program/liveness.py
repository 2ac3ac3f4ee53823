"""Last uses: which buffers may be freed after which instruction, and which inputs a run may overwrite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from autopar.core.program import Buffer, Free, Instruction, Rename, Run, reads, writes


def free(
    instructions: Sequence[Instruction], keep: Iterable[Buffer], feeds: Sequence[Buffer]
) -> list[Instruction]:
    """Returns the instructions with a Free after the last use of every buffer that is not kept or renamed."""
    kept = {*keep, *(i.old for i in instructions if isinstance(i, Rename))}
    last: dict[Buffer, int] = dict.fromkeys(feeds, -1)
    for n, instruction in enumerate(instructions):
        for buffer in (*reads(instruction), *writes(instruction)):
            last[buffer] = n
    dying: dict[int, list[Buffer]] = {}
    for buffer, n in last.items():
        if buffer not in kept:
            dying.setdefault(n, []).append(buffer)
    done: list[Instruction] = [Free(tuple(dying[-1]))] if -1 in dying else []
    for n, instruction in enumerate(instructions):
        done.append(instruction)
        if n in dying:
            done.append(Free(tuple(sorted(dying[n], key=_order))))
    return done


def donate(instructions: Sequence[Instruction], replaced_by: dict[int, int]) -> list[Instruction]:
    """Returns the instructions with the old state donated to the run that makes the new one.

    Only to the last instruction that reads it, and only if its replacement is among the run's outputs: then
    layout and size agree, and the new state is written over the old.
    """
    last: dict[Buffer, int] = {}
    for n, instruction in enumerate(instructions):
        for buffer in reads(instruction):
            last[buffer] = n
    return [
        _donated(i, n, last, replaced_by) if isinstance(i, Run) else i for n, i in enumerate(instructions)
    ]


def _donated(run: Run, n: int, last: dict[Buffer, int], replaced_by: dict[int, int]) -> Run:
    made = {b.value for b in run.outputs if b.microbatch is None}
    positions = tuple(
        k
        for k, b in enumerate(run.inputs)
        if b.microbatch is None and replaced_by.get(b.value) in made and last[b] == n
    )
    return replace(run, donated=positions)


def _order(buffer: Buffer) -> tuple[int, int, str]:
    return buffer.value, -1 if buffer.microbatch is None else buffer.microbatch, buffer.role
