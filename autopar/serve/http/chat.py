"""`/v1/chat/completions`: a conversation through the model's chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import Request
from starlette.responses import Response

from autopar.serve.http.errors import bad
from autopar.serve.http.logprobs import chat_logprobs
from autopar.serve.http.sampling import check_limits, sampling_of
from autopar.serve.http.schemas import ChatRequest, Message, parse
from autopar.serve.http.service import Batch, Service
from autopar.serve.http.streaming import beside, respond
from autopar.serve.request import Output, Sampling


async def chat(service: Service, request: Request, raw: bytes, key: str) -> Response:
    """Returns the answer to a chat request, whole or as a stream."""
    body = parse(ChatRequest, raw)
    service.check_model(body.model)
    most = _most(body)
    sampling = _sampling(service, body, most)
    more = (body.messages, body.add_generation_prompt, body.chat_template_kwargs)
    ids = await beside(raw, prompt_ids, service, *more)
    prompt = service.checked_prompt(ids, most, "messages")
    job = _Job(service, body, service.submit([prompt], sampling, key))
    return await respond(request, job, body.stream)


def prompt_ids(
    service: Service, messages: Sequence[Message], answer: bool = True, more: dict[str, Any] | None = None
) -> list[int]:
    """Returns the token ids of a conversation.

    Raises:
        ApiError: 400 if the model has no chat template, or its template refuses the messages.
    """
    if service.template is None:
        raise bad(
            f"{service.names[0]} is a base model without a chat template; use /v1/completions, or start the "
            "server with --chat-template FILE",
            "messages",
            "no_chat_template",
        )
    plain = [message.model_dump(exclude_unset=True) | {"content": message.content} for message in messages]
    text = service.template.render(plain, answer, **(more or {}))
    return service.words.encode(text, special=False, param="messages")


def _most(body: ChatRequest) -> int | None:
    given = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(given) == 2:
        raise bad("max_tokens and max_completion_tokens are the same; give one", "max_tokens")
    return given.pop() if given else None


def _sampling(service: Service, body: ChatRequest, most: int | None) -> Sampling:
    limit = service.options.limits.logprobs
    check_limits(body, service.options.limits)
    if body.top_logprobs and not body.logprobs:
        raise bad("top_logprobs goes with logprobs: true", "top_logprobs")
    if body.top_logprobs > limit:
        raise bad(f"top_logprobs must be at most {limit}, but is {body.top_logprobs}", "top_logprobs")
    return sampling_of(body, max_tokens=most, logprobs=body.top_logprobs if body.logprobs else None)


class _Job:
    """One request under way."""

    def __init__(self, service: Service, body: ChatRequest, batch: Batch):
        self.service, self.body, self.batch = service, body, batch
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.head = {
            "id": self.id, "created": int(time.time()), "model": service.names[0],
            "system_fingerprint": service.fingerprint,
        }  # fmt: skip

    def close(self) -> None:
        """Ends what has not ended."""
        self.batch.close()

    async def whole(self) -> dict[str, Any]:
        """Returns the answer when all of it is there."""
        texts, finishes = [""] * self.body.n, list[str | None]([None] * self.body.n)
        content, ids = [list[Any]() for _ in texts], [list[int]() for _ in texts]
        async for _, piece in self.batch.pieces():
            texts[piece.index] += piece.text
            finishes[piece.index] = piece.finish.value if piece.finish else None
            ids[piece.index] += piece.token_ids
            content[piece.index] += chat_logprobs(self.service.words, piece.logprobs or ())
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": {"content": content[i], "refusal": None} if self.body.logprobs else None,
                "finish_reason": finishes[i],
                **({"token_ids": ids[i]} if self.body.return_token_ids else {}),
            }
            for i, text in enumerate(texts)
        ]
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": self.batch.usage()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yields the answer chunk by chunk: first each choice's role, then its text, then why it ended."""
        options = self.body.stream_options
        usage = {"usage": None} if options and options.include_usage else {}
        head = {**self.head, "object": "chat.completion.chunk"}
        for i in range(self.body.n):
            yield {**head, "choices": [_delta(i, {"role": "assistant", "content": ""})], **usage}
        async for _, piece in self.batch.pieces():
            logprobs = self._logprobs(piece)
            if piece.text or logprobs:
                yield {**head, "choices": [_delta(piece.index, {"content": piece.text}, logprobs)], **usage}
            if piece.finish:
                yield {**head, "choices": [_delta(piece.index, {}, None, piece.finish.value)], **usage}
        if usage:
            yield {**head, "choices": [], "usage": self.batch.usage()}

    def _logprobs(self, piece: Output) -> dict[str, Any] | None:
        found = chat_logprobs(self.service.words, piece.logprobs or ())
        return {"content": found, "refusal": None} if found else None


def _delta(
    index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
