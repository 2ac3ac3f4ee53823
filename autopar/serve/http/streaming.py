"""Answers that outlive a moment: server-sent events, and work that ends when its client hangs up."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from autopar.serve.http.errors import ApiError, unexpected

LINGER = 4
"""Times the limit up to which a body is read (and dropped), as one who still sends does not see an answer."""

LONG = 1 << 15
"""Bytes of a body from which on its text is tokenised in a thread."""

Result = TypeVar("Result")


class Job(Protocol):
    """An answer under way.

    Attributes:
        id: its name, in a header too.
    """

    id: str

    def chunks(self) -> AsyncGenerator[Any, None]:
        """Yields it event by event."""
        ...

    async def whole(self) -> Any:
        """Returns it when all of it is there."""
        ...

    def close(self) -> None:
        """Ends what has not ended."""
        ...


async def respond(request: Request, job: Job, stream: bool) -> Response:
    """Returns the response with an answer, whole or as a stream; its job ends if the client hangs up."""
    headers = {"x-request-id": job.id}
    if stream:
        return EventStream(job.chunks(), job.close, headers)
    try:
        answer = await while_connected(request.receive, job.whole())
    finally:
        job.close()
    return JSONResponse(answer, headers=headers)


async def beside(raw: bytes, work: Callable[..., Result], *args: Any) -> Result:
    """Returns `work(*args)`; in a thread if the body is long, so that others' tokens go on meanwhile."""
    return await asyncio.to_thread(work, *args) if len(raw) > LONG else work(*args)


class ClientGone(Exception):
    """The client hung up; nobody reads an answer."""


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Returns what `work` returns; cancels it when the client hangs up.

    Raises:
        ClientGone: it did.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class EventStream(Response):
    """Server-sent events from an iterator of JSON values, ended by `[DONE]`.

    An error on the way is the last event, in OpenAI's shape. `close` is called at the end, however it comes:
    all sent, the client gone (even before the iterator has begun), or the server stopping.
    """

    def __init__(
        self,
        events: AsyncGenerator[Any, None],
        close: Callable[[], None],
        headers: dict[str, str] | None = None,
    ):
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"
        self.events, self.close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientGone):
                await while_connected(receive, self._send(send))
        finally:
            self.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        texts = _settled(self.events)
        async with contextlib.aclosing(self.events), contextlib.aclosing(texts):
            async for text in texts:
                await send(
                    {"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True}
                )
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _settled(events: AsyncIterator[Any]) -> AsyncGenerator[str, None]:
    """The events as texts; errors become the last one."""
    try:
        async for event in events:
            yield _text(event)
    except ApiError as error:
        yield _text(error.body())
    except Exception as error:
        yield _text(unexpected(error).body())
    yield "[DONE]"


def _text(event: Any) -> str:
    return json.dumps(event, ensure_ascii=False, separators=(",", ":"))


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """Returns the request's body.

    Raises:
        ApiError: 413 if it is longer than `most` bytes, said or sent; 408 if it takes longer than `seconds`;
            415 if it says that it is not JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(
            415, f"send JSON with the header 'Content-Type: application/json', not {kind or 'none'!r}",
            code="unsupported_media_type",
        )  # fmt: skip
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= most:
                    body += chunk
                elif size > LINGER * most:
                    break
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {seconds:g} seconds", code="timeout") from None
    if size > most:
        raise ApiError(413, f"the body is longer than {most} bytes", code="request_too_large")
    return bytes(body)
