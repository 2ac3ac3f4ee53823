"""What an operator may set: limits, keys and their shares, how long to drain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from autopar.core.errors import BadInput


@dataclass(frozen=True)
class Limits:
    """What is refused before it costs anything.

    Attributes:
        body: bytes of a request's body.
        prompts: prompts in one request.
        choices: `n` and `best_of`.
        logprobs: alternatives per token.
        stops: stop strings per request, and stop_length their characters.
        body_seconds: seconds within which a body must have come.
    """

    body: int = 4 << 20
    prompts: int = 256
    choices: int = 16
    logprobs: int = 20
    stops: int = 16
    stop_length: int = 256
    body_seconds: float = 60.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1 and name != "body_seconds":
                raise BadInput(f"the limit on {name.replace('_', ' ')} must be at least 1, but got {value}")


@dataclass(frozen=True)
class Options:
    """How the service runs.

    Attributes:
        limits: see `Limits`.
        keys: API keys that are let in; empty lets everyone in.
        drain: seconds that requests under way are given to finish after SIGTERM.
        origins: web origins (`https://example.org` or `*`) whose pages may call the service.
        served_as: names under which clients may ask for the model, besides its own.
    """

    limits: Limits = field(default_factory=Limits)
    keys: frozenset[str] = frozenset()
    drain: float = 30.0
    origins: tuple[str, ...] = ()
    served_as: tuple[str, ...] = ()


def parse_keys(texts: Iterable[str]) -> Mapping[str, float]:
    """Returns key to weight from texts `KEY` (weight 1) or `KEY=WEIGHT`.

    Raises:
        BadInput: an empty key, a key given twice, or a weight that is no positive number.
    """
    found: dict[str, float] = {}
    for position, text in enumerate(texts, 1):
        key, separator, weight = text.partition("=")
        try:
            share = float(weight) if separator else 1.0
        except ValueError:
            share = 0.0
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise BadInput(f"--api-key number {position}: expected KEY or KEY=WEIGHT without spaces")
        if not 0 < share < float("inf"):
            raise BadInput(
                f"--api-key number {position}: the weight must be a positive number, got {weight!r}"
            )
        if key in found:
            raise BadInput(f"--api-key number {position} repeats an earlier key")
        found[key] = share
    return MappingProxyType(found)
