"""Errors for people: each says what was expected, what came, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AutoparError(Exception):
    """Base of every error that a user's input can cause."""


class UnknownName(AutoparError):
    """A name that is not in a catalogue (devices, models, methods); the message lists close matches."""

    def __init__(self, what: str, name: str, known: Iterable[str]):
        names = sorted(known)
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"
        super().__init__(f"unknown {what} {name!r}; {hint}")


class BadInput(AutoparError):
    """An argument that cannot be used: wrong type, shape, range or combination."""


class ClusterError(BadInput):
    """A cluster description that is unreadable or contradicts itself."""


class TraceError(AutoparError):
    """A function that cannot be captured as a graph; the message names the user's line."""


class MixedExamples(TraceError):
    """A step whose micro-batches cannot be combined into the full batch's result."""


class PlanError(AutoparError):
    """A plan that cannot be made, read or applied."""


class StalePlan(PlanError):
    """A plan file made for another model, version or cluster."""


class DoesNotFit(PlanError):
    """No plan keeps every device within its memory.

    Attributes:
        missing: bytes by which the best plan found is over the limit, or None.
        leanest: bytes that the plan takes which takes least, of those found, or None.
        least: bytes that every plan takes, where it is proven that nothing fits, or None.
    """

    def __init__(
        self,
        message: str,
        missing: int | None = None,
        leanest: int | None = None,
        least: int | None = None,
    ):
        super().__init__(message)
        self.missing, self.leanest, self.least = missing, leanest, least


class ProgramError(AutoparError):
    """A program that would deadlock, read a buffer that is not there, or overrun a device's memory."""


class BackendError(AutoparError):
    """A backend that cannot be reached or used."""


class StageFailed(BackendError):
    """A stage that died or raised during a step.

    Attributes:
        stage: index of the stage. node: the node it ran on. cause: the first cause that was seen, in words.
    """

    def __init__(self, stage: int, node: str, cause: str):
        super().__init__(f"stage {stage} on node {node} failed: {cause}")
        self.stage, self.node, self.cause = stage, node, cause
