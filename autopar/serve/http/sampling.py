"""Fields of a request as the engine's sampling parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

from autopar.serve.http.errors import bad
from autopar.serve.http.options import Limits
from autopar.serve.http.schemas import Sampled
from autopar.serve.request import Sampling

COMMON = tuple(
    f.name
    for f in dataclasses.fields(Sampling)
    if f.name in Sampled.model_fields and f.name not in {"stop", "stop_token_ids", "top_k"}
)


def sampling_of(body: Sampled, **more: Any) -> Sampling:
    """Returns the sampling parameters of a request; `more` are those that its routes name differently."""
    common = {name: getattr(body, name) for name in COMMON}
    return Sampling(
        **common,
        stop=tuple(body.stop),
        stop_token_ids=tuple(body.stop_token_ids),
        top_k=max(body.top_k, 0),
        **more,
    )


def check_limits(body: Sampled, limits: Limits) -> None:
    """Raises a 400 naming the field that is above one of the operator's limits."""
    for name in ("n", "num_beams"):
        if getattr(body, name) > limits.choices:
            raise bad(f"{name} must be at most {limits.choices}, but is {getattr(body, name)}", name)
    if len(body.stop) > limits.stops:
        raise bad(f"stop may have {limits.stops} strings, but has {len(body.stop)}", "stop")
    if any(len(text) > limits.stop_length for text in body.stop):
        raise bad(f"each stop string may have {limits.stop_length} characters", "stop")
    if body.stream_options is not None and not body.stream:
        raise bad("stream_options goes with stream: true", "stream_options")
