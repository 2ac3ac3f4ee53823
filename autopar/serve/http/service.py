"""Requests on their way to the engine and pieces of answers on their way back."""

from __future__ import annotations

import asyncio
import importlib.metadata
import math
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

from autopar.serve.engine import Engine
from autopar.serve.http.errors import ApiError, bad, busy, unavailable
from autopar.serve.http.metrics import Metrics
from autopar.serve.http.options import Options
from autopar.serve.http.template import ChatTemplate
from autopar.serve.http.tokens import Words
from autopar.serve.request import (
    BadParameter,
    FinishReason,
    Output,
    QueueFull,
    Request,
    Sampling,
    Unavailable,
)
from autopar.serve.stream import Stream


class Served(Protocol):
    """A loaded model: what `autopar.serve.load` returns."""

    name: str
    engine: Engine
    tokenizer: Any
    chat_template: str | None

    def plan_svg(self) -> str | None: ...


class Service:
    """One model behind HTTP.

    Args:
        model: what is served. options: limits and the like.

    Raises:
        BadInput: the chat template is no template.
    """

    def __init__(self, model: Served, options: Options):
        engine = model.engine
        self.model, self.options, self.engine = model, options, engine
        self.names = (model.name, *options.served_as)
        self.words = Words(model.tokenizer, getattr(model, "special_tokens", {}))
        self.template = ChatTemplate(model.chat_template, self.words.special) if model.chat_template else None
        self.metrics = Metrics(engine.metrics)
        self.started = int(time.time())
        self.fingerprint = f"autopar-{importlib.metadata.version('autopar')}"
        self._picture: asyncio.Task[str | None] | None = None
        self.draining = False
        self.active: set[Batch] = set()

    @property
    def longest(self) -> int:
        """Returns the tokens of the longest sequence, prompt and answer together."""
        return self.engine.longest

    async def picture(self) -> str | None:
        """Returns the plan's picture; it is drawn when it is first asked for, beside what else runs."""
        if self._picture is None:
            self._picture = asyncio.create_task(asyncio.to_thread(self.model.plan_svg))
        return await asyncio.shield(self._picture)

    def check_model(self, name: str | None) -> None:
        """Raises a 404 unless `name` is the model served; None is."""
        if name is not None and name not in self.names:
            shown = name if len(name) <= 100 else f"{name[:99]}…"
            message = f"the model {shown!r} is not served here; {self.names[0]!r} is"
            raise ApiError(404, message, param="model", code="model_not_found")

    def checked_prompt(self, ids: Sequence[int], most: int | None, param: str = "prompt") -> tuple[int, ...]:
        """Returns the prompt as the engine takes it.

        Raises:
            ApiError: 400 if it is empty, or longer than the longest sequence with `most` new tokens.
        """
        if not ids:
            raise bad(f"{param} has no tokens", param)
        if len(ids) + (1 if most is None else most) > self.longest:
            wanted = "" if not most else f" and {most} were asked for"
            raise bad(
                f"the longest sequence is {self.longest} tokens, but the {param} has {len(ids)}{wanted}; "
                "shorten one or the other",
                param, "context_length_exceeded",
            )  # fmt: skip
        return tuple(ids)

    def submit(self, prompts: Sequence[tuple[int, ...]], sampling: Sampling, key: str) -> Batch:
        """Returns the answers to come of some prompts.

        Raises:
            ApiError: 400 for a parameter out of range, 429 if the queue is full, 503 if the engine cannot.
        """
        if self.draining:
            self.metrics.rejected("draining")
            raise unavailable("the server is shutting down", "shutting_down")
        try:
            streams = self.engine.submit_all(Request(prompt, sampling, key) for prompt in prompts)
        except BadParameter as error:
            raise bad(str(error), error.parameter) from None
        except QueueFull as error:
            self.metrics.rejected("queue_full")
            raise busy(str(error), max(1, math.ceil(error.retry_after))) from None
        except Unavailable as error:
            self.metrics.rejected("unavailable")
            raise unavailable(str(error)) from None
        batch = Batch(self, streams)
        self.active.add(batch)
        return batch

    def stop(self) -> None:
        """Cancels everything under way; its clients are told that the server stopped."""
        for batch in list(self.active):
            for stream in batch.streams:
                stream.cancel()


class Batch:
    """The answers to one HTTP request: a stream for each of its prompts. Whoever has one closes it.

    Attributes:
        streams: one for each prompt.
    """

    def __init__(self, service: Service, streams: list[Stream]):
        self.streams = streams
        self._metrics, self._active = service.metrics, service.active
        self._made = dict[tuple[int, int], int]()
        self._prompts, self._cached = dict[int, int](), dict[int, int]()
        self._complete = False

    def close(self) -> None:
        """Ends what has not ended; harmless after the end."""
        self._active.discard(self)
        if not self._complete:
            self._complete = True
            self._metrics.unfinished()
            for stream in self.streams:
                stream.cancel()

    def usage(self) -> dict[str, Any]:
        """Returns the tokens so far as OpenAI counts them."""
        prompt, made = sum(self._prompts.values()), sum(self._made.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }

    async def pieces(self) -> AsyncGenerator[tuple[int, Output], None]:
        """Yields (number of the prompt, piece) as they come.

        Raises:
            ApiError: 503 if the engine failed or stopped.
        """
        merged: asyncio.Queue[tuple[int, Output] | BaseException | None] = asyncio.Queue()
        readers = [asyncio.create_task(_read(i, s, merged)) for i, s in enumerate(self.streams)]
        try:
            left = len(readers)
            while left:
                match await merged.get():
                    case None:
                        left -= 1
                    case BaseException() as error:
                        raise error
                    case position, piece:
                        self._note(position, piece)
                        yield position, piece
            self._complete = True
        finally:
            for reader in readers:
                reader.cancel()

    def _note(self, position: int, piece: Output) -> None:
        self._made[position, piece.index] = piece.completion_tokens
        self._prompts[position], self._cached[position] = piece.prompt_tokens, piece.cached_tokens
        if piece.finish is FinishReason.ERROR:
            raise unavailable(piece.error or "the engine failed")
        if piece.finish is FinishReason.CANCELLED:
            raise unavailable("the server stopped before the answer was complete", "shutting_down")


async def _read(position: int, stream: Stream, merged: asyncio.Queue[Any]) -> None:
    try:
        async for piece in stream:
            merged.put_nowait((position, piece))
    except Exception as error:
        merged.put_nowait(error)
    merged.put_nowait(None)
