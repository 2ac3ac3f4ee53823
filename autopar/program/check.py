"""The symbolic check of a program: sends meet receives, nothing deadlocks, nothing is read after it is
freed."""

from __future__ import annotations

from autopar.core.program import Program
from autopar.program.walk import Walk


def check(
    program: Program, limits: tuple[int, ...] | None = None, *, buffered: bool = True
) -> tuple[int, ...]:
    """Returns the most bytes each worker's buffers take on one device (without the segments' own workspace).

    Args:
        limits: bytes a device of each worker has; None for no check.
        buffered: sends do not wait for their receives (the contract). With False, a rendezvous is checked.

    Raises:
        ProgramError: the first few things that are wrong, with worker, instruction and buffer.
    """
    walk = Walk(program, buffered=buffered).run()
    walk.refuse(
        [
            f"worker {w} needs {walk.peak[w]:,} bytes for its buffers, but its devices have {limit:,}"
            for w, limit in enumerate(limits or ())
            if walk.peak[w] > limit
        ]
    )
    return tuple(walk.peak)


def order(program: Program) -> tuple[tuple[int, int], ...]:
    """Returns (worker, index of instruction) in an order in which one thread can execute the whole
    program."""
    return tuple((step.worker, step.index) for step in Walk(program).run().steps)


def beside(program: Program) -> tuple[dict[str, int], ...]:
    """Returns for each worker, segment → most bytes on one device that are held while the segment runs and
    that it does not read: other micro-batches' activations, sums of gradients, state of other phases."""
    return tuple(Walk(program).run().beside)
