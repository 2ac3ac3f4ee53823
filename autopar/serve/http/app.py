"""The application: routes, keys, counting."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

from fastapi import Depends, FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autopar.serve.http import chat, completions, errors, plain
from autopar.serve.http.options import Options
from autopar.serve.http.service import Served, Service
from autopar.serve.http.streaming import ClientGone, read_body


def create_app(model: Served, options: Options | None = None) -> FastAPI:
    """Returns the ASGI application that serves a model; its `state.service` is the `Service`.

    Args:
        model: what `autopar.serve.load` returns. options: limits, keys and the like.

    Raises:
        BadInput: the model's chat template is no template.
    """
    service = Service(model, options or Options())
    app = FastAPI(title="autopar", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    errors.install(app)
    _add_open(app, service)
    _add_closed(app, service)
    if service.options.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.options.origins),
            allow_methods=["*"],
            allow_headers=["*"],
        )
    app.add_middleware(Counted, service=service)
    return app


def _add_open(app: FastAPI, service: Service) -> None:
    """What needs no key."""

    @app.api_route("/", methods=["GET", "HEAD"])
    async def page() -> Response:
        return plain.page()

    @app.get("/plan.svg")
    async def plan() -> Response:
        return await plain.plan(service)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        return plain.health(service)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_closed(app: FastAPI, service: Service) -> None:
    """What needs a key, if there are any."""
    keys, limits = _Keys(service.options.keys), service.options.limits
    known = Depends(keys.check)

    async def body(request: Request) -> bytes:
        return await read_body(request, limits.body, limits.body_seconds)

    @app.get("/v1/models")
    async def models(key: str = known) -> dict[str, Any]:
        return plain.models(service)

    @app.get("/v1/models/{name:path}")
    async def model(name: str, key: str = known) -> dict[str, Any]:
        return plain.model(service, name)

    @app.get("/tokenizer_info")
    async def tokenizer_info(key: str = known) -> dict[str, Any]:
        return plain.tokenizer_info(service)

    @app.post("/tokenize")
    async def tokenize(request: Request, key: str = known) -> dict[str, Any]:
        return plain.tokenize(service, await body(request))

    @app.post("/detokenize")
    async def detokenize(request: Request, key: str = known) -> dict[str, Any]:
        return plain.detokenize(service, await body(request))

    @app.post("/v1/completions")
    async def complete(request: Request, key: str = known) -> Response:
        return await _answered(completions.complete(service, request, await body(request), key))

    @app.post("/v1/chat/completions")
    async def converse(request: Request, key: str = known) -> Response:
        return await _answered(chat.chat(service, request, await body(request), key))


async def _answered(answer: Any) -> Response:
    try:
        return await answer
    except ClientGone:
        return Response(status_code=499)  # nobody reads it; the log and the metrics do


class _Keys:
    """Who may come in. Keys are compared by digest, in the same time whatever they are."""

    def __init__(self, keys: frozenset[str]):
        self._keys = {hashlib.sha256(key.encode()).digest(): key for key in keys}

    async def check(self, request: Request) -> str:
        """Returns the request's key, "" if none are asked for.

        Raises:
            ApiError: 401 for a missing or wrong key.
        """
        if not self._keys:
            return ""
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode()).digest()
        found = [key for known, key in self._keys.items() if hmac.compare_digest(known, digest)]
        if kind.lower() == "bearer" and found:
            return found[0]
        message = "wrong API key" if given else "this server asks for an API key"
        raise errors.ApiError(
            401, f"{message}; send the header 'Authorization: Bearer KEY'", code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip


class Counted:
    """Counts responses by route and status."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                self.service.metrics.responded(getattr(route, "path", "other"), message["status"])
            await send(message)

        await self.app(scope, receive, noted if scope["type"] == "http" else send)
