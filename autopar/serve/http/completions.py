"""`/v1/completions`."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.responses import Response

from autopar.serve.http.errors import bad
from autopar.serve.http.logprobs import completion_logprobs
from autopar.serve.http.sampling import check_limits, sampling_of
from autopar.serve.http.schemas import CompletionRequest, parse
from autopar.serve.http.service import Batch, Service
from autopar.serve.http.streaming import beside, respond
from autopar.serve.request import Output, Sampling, TokenLogprob


@dataclass
class _Choice:
    """What one choice's text and log probabilities have come to."""

    end: int = 0
    begun: bool = False
    text: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: dict[str, list[Any]] | None = None
    finish: str | None = None


async def complete(service: Service, request: Request, raw: bytes, key: str) -> Response:
    """Returns the answer to a completion request, whole or as a stream."""
    body = parse(CompletionRequest, raw)
    service.check_model(body.model)
    sampling = _sampling(service, body)
    texts, prompts = await beside(raw, _prompts, service, body)
    job = _Job(service, body, texts, service.submit(prompts, sampling, key))
    return await respond(request, job, body.stream)


def _sampling(service: Service, body: CompletionRequest) -> Sampling:
    limits = service.options.limits
    check_limits(body, limits)
    if body.suffix:
        raise bad("suffix: this model cannot insert text before a suffix; put it into the prompt", "suffix",
                  "unsupported_parameter")  # fmt: skip
    if body.logprobs is not None and body.logprobs > limits.logprobs:
        raise bad(f"logprobs must be at most {limits.logprobs}, but is {body.logprobs}", "logprobs")
    best_of = body.best_of or body.n
    if best_of > limits.choices:
        raise bad(f"best_of must be at most {limits.choices}, but is {best_of}", "best_of")
    if best_of < body.n:
        raise bad(f"best_of must be at least n = {body.n}, but is {best_of}", "best_of")
    if body.stream and best_of > body.n:
        raise bad("best_of above n cannot be streamed: the best are known only at the end", "best_of")
    return sampling_of(
        body,
        max_tokens=body.max_tokens,
        best_of=body.best_of,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )


def _prompts(service: Service, body: CompletionRequest) -> tuple[list[str], list[tuple[int, ...]]]:
    """(texts to echo, token ids) of the prompts."""
    limit = service.options.limits.prompts
    if len(body.prompt) > limit:
        raise bad(
            f"prompt holds {len(body.prompt)} prompts, but at most {limit} go into one request", "prompt"
        )
    texts, prompts = list[str](), list[tuple[int, ...]]()
    for prompt in body.prompt:
        if isinstance(prompt, str):
            ids = service.words.encode(prompt, body.add_special_tokens)
        else:
            ids = prompt
        prompts.append(service.checked_prompt(ids, body.max_tokens))
        texts.append(prompt if isinstance(prompt, str) else _echoed(service, ids) if body.echo else "")
    return texts, prompts


def _echoed(service: Service, ids: list[int]) -> str:
    service.words.check(ids)
    return service.words.decode(ids)


class _Job:
    """One request under way."""

    def __init__(self, service: Service, body: CompletionRequest, texts: list[str], batch: Batch):
        self.service, self.body, self.texts, self.batch = service, body, texts, batch
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self.head = {
            "id": self.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.names[0],
            "system_fingerprint": service.fingerprint,
        }
        self.choices = [_Choice() for _ in range(len(texts) * body.n)]
        self.prompt_logprobs: dict[int, tuple[TokenLogprob | None, ...]] = {}

    def close(self) -> None:
        """Ends what has not ended."""
        self.batch.close()

    async def whole(self) -> dict[str, Any]:
        """Returns the answer when all of it is there."""
        async for position, piece in self.batch.pieces():
            choice = self.choices[position * self.body.n + piece.index]
            text, logprobs, choice.finish = self._read(position, piece)
            choice.text.append(text)
            choice.logprobs = _joined(choice.logprobs, logprobs)
            choice.ids += piece.token_ids
        found = list[dict[str, Any]]()
        for index, choice in enumerate(self.choices):
            found.append(_shape(index, "".join(choice.text), choice.logprobs, choice.finish))
            if self.body.return_token_ids:
                prompt = self.batch.streams[index // self.body.n].request.prompt
                found[-1] |= {"token_ids": choice.ids, "prompt_token_ids": prompt}
        return {**self.head, "choices": found, "usage": self.batch.usage()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yields the answer chunk by chunk."""
        options = self.body.stream_options
        usage = {"usage": None} if options and options.include_usage else {}
        async for position, piece in self.batch.pieces():
            text, logprobs, finish = self._read(position, piece)
            ids = {"token_ids": piece.token_ids} if self.body.return_token_ids else {}
            if text or logprobs or finish or ids:
                shape = _shape(position * self.body.n + piece.index, text, logprobs, finish) | ids
                yield {**self.head, "choices": [shape], **usage}
        if usage:
            yield {**self.head, "choices": [], "usage": self.batch.usage()}

    def _read(self, position: int, piece: Output) -> tuple[str, dict[str, list[Any]] | None, str | None]:
        """(text, logprobs, finish) of a piece, the prompt before the first one if it is echoed."""
        choice = self.choices[position * self.body.n + piece.index]
        if piece.prompt_logprobs is not None:
            self.prompt_logprobs[position] = piece.prompt_logprobs
        text, ids, found = piece.text, list(piece.token_ids), list[TokenLogprob | None](piece.logprobs or ())
        if self.body.echo and not choice.begun:
            text = self.texts[position] + text
            ids = [*self.batch.streams[position].request.prompt, *ids]
            found = [*self.prompt_logprobs.get(position, ()), *found]
        choice.begun = True
        finish = piece.finish.value if piece.finish else None
        if self.body.logprobs is None or not ids:
            return text, None, finish
        logprobs, choice.end = completion_logprobs(self.service.words, ids, found, choice.end)
        return text, logprobs, finish


def _shape(index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _joined(
    first: dict[str, list[Any]] | None, then: dict[str, list[Any]] | None
) -> dict[str, list[Any]] | None:
    if first is None or then is None:
        return first or then
    return {name: list(itertools.chain(first[name], then[name])) for name in first}
