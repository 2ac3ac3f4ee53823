"""The routes that generate nothing: models, tokens, health, metrics, the page."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources
from typing import Any

from starlette.responses import HTMLResponse, JSONResponse, Response

from autopar.serve.http.chat import prompt_ids
from autopar.serve.http.errors import ApiError, bad
from autopar.serve.http.schemas import DetokenizeRequest, TokenizeRequest, parse
from autopar.serve.http.service import Service


def models(service: Service) -> dict[str, Any]:
    """Returns `/v1/models`: one entry for each name of the one model."""
    return {"object": "list", "data": [_model(service, name) for name in service.names]}


def model(service: Service, name: str) -> dict[str, Any]:
    """Returns `/v1/models/NAME`."""
    service.check_model(name)
    return _model(service, name)


def _model(service: Service, name: str) -> dict[str, Any]:
    """OpenAI's fields, then ours: what the page and other clients need to know."""
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "autopar",
        "root": service.names[0],
        "max_model_len": service.longest,
        "chat": service.template is not None,
    }


def tokenize(service: Service, raw: bytes) -> dict[str, Any]:
    """Returns the token ids of a text or a conversation."""
    body = parse(TokenizeRequest, raw)
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad("give either prompt or messages", "prompt")
    if body.messages is not None:
        ids = prompt_ids(service, body.messages, body.add_generation_prompt)
    else:
        ids = service.words.encode(body.prompt or "", body.add_special_tokens)
    texts = [service.words.text_of(token) for token in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": service.longest, "tokens": ids, "token_strs": texts}


def detokenize(service: Service, raw: bytes) -> dict[str, Any]:
    """Returns the text of token ids, special tokens by their names."""
    body = parse(DetokenizeRequest, raw)
    service.check_model(body.model)
    service.words.check(body.tokens, "tokens")
    return {"prompt": service.words.decode(body.tokens)}


def tokenizer_info(service: Service) -> dict[str, Any]:
    """Returns what a client needs to build prompts by itself: special tokens and the chat template."""
    template = service.template.text if service.template else None
    return {
        **service.words.special,
        "tokenizer_class": service.words.name,
        "vocab_size": service.words.vocabulary,
        "model_max_length": service.longest,
        "chat_template": template,
    }


def health(service: Service) -> JSONResponse:
    """Returns 200 while requests are taken, 503 when not; with the figures that the page shows."""
    found, state = service.engine.metrics(), service.engine.health()
    status = "draining" if service.draining and state.ok else "ok" if state.state == "ready" else state.state
    body = {
        "status": status,
        "restarts": state.restarts,
        "last_error": state.error,
        "seconds_since_error": state.since,
        "running": found.running,
        "waiting": found.queued + found.preempted,
        "kv_use": found.blocks_held / max(1, found.blocks),
        "generated_tokens": found.answer_tokens,
    }
    return JSONResponse(body, status_code=200 if status == "ok" else 503)


async def plan(service: Service) -> Response:
    """Returns the plan's picture."""
    picture = await service.picture()
    if picture is None:
        raise ApiError(404, "this model was not planned over several devices", code="not_found")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return Response(picture, media_type="image/svg+xml", headers={"Content-Security-Policy": policy})


def page() -> HTMLResponse:
    """Returns the page; its policy lets nothing run but its own script, and nothing load but from here."""
    text, script = _page()
    policy = (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(text, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})


@cache
def _page() -> tuple[str, str]:
    """The page and the SHA-256 of its script, in base64."""
    text = resources.files("autopar.serve.http").joinpath("page.html").read_text(encoding="utf-8")
    found = re.search(r"<script>(.*)</script>", text, re.DOTALL)
    assert found
    return text, base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
