"""Every error a client can get, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import http
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

log = logging.getLogger("autopar.serve")


class ApiError(Exception):
    """A refusal or failure that a client is told of.

    Attributes:
        status: HTTP status. message: what was expected, what came, what to do. param: the field at fault.
        code: a word for programs. headers: further response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """The kind of error, by OpenAI's words."""
        known = {401: "authentication_error", 429: "rate_limit_error"}
        return known.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """Returns the JSON that goes to the client."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Returns the whole answer."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def bad(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """Returns a 400 about one field."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, code: str = "engine_failed", retry: int = 5) -> ApiError:
    """Returns a 503 that asks to come back after `retry` seconds."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(retry)})


def busy(message: str, retry: int) -> ApiError:
    """Returns a 429 that asks to come back after `retry` seconds."""
    return ApiError(429, message, code="queue_full", headers={"Retry-After": str(retry)})


def install(app: FastAPI) -> None:
    """Makes `app` answer every error in this shape, its own 404 and 405 included."""
    app.add_exception_handler(ApiError, _api)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _unexpected)


async def _api(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status, method, path = error.status_code, request.method, request.url.path
    messages = {
        404: f"there is no {method} {path} here; see /v1/models, /v1/completions and /v1/chat/completions",
        405: f"{path} does not take {method}; it takes {(error.headers or {}).get('Allow', 'other methods')}",
    }
    codes = {404: "not_found", 405: "method_not_allowed"}
    message = messages.get(status) or error.detail or http.HTTPStatus(status).phrase
    return ApiError(status, message, code=codes.get(status), headers=error.headers).response()


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return bad(str(first["msg"]), ".".join(map(str, first["loc"]))).response()


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    return unexpected(error).response()


def unexpected(error: BaseException) -> ApiError:
    """Returns a 500 for a mistake of ours; the traceback goes to the log, never to a client."""
    log.error("unexpected error while answering", exc_info=error)
    return ApiError(500, "the server made a mistake; its log has the details", code="internal_error")
