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


def donate(instructions: Sequence[Instruction]) -> list[Instruction]:
    """Returns the instructions with old state donated to the run that makes the new one.

    Only if nothing reads the old one between that run and the renaming that gives its name to one of the
    run's results: then layout and size agree, and the new state is written over the old.
    """
    found: list[Instruction] = []
    heir: dict[Buffer, Buffer | None] = {}  # buffer → what takes its name next; None: it is read before
    for instruction in reversed(instructions):
        match instruction:
            case Run(inputs=inputs, outputs=outputs):
                made = {*outputs}
                positions = tuple(k for k, b in enumerate(inputs) if heir.get(b) in made)
                found.append(replace(instruction, donated=(*positions, *instruction.donated)))
            case _:
                found.append(instruction)
        heir.update(dict.fromkeys(reads(instruction)))
        if isinstance(instruction, Rename):
            heir[instruction.new] = instruction.old
    return found[::-1]


def _order(buffer: Buffer) -> tuple[int, int, str]:
    return buffer.value, -1 if buffer.microbatch is None else buffer.microbatch, buffer.role
