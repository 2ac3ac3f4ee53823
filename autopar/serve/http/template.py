"""Chat templates: Jinja in a sandbox, as Hugging Face tokenizers carry them."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from autopar.core.errors import BadInput
from autopar.serve.http.errors import bad


class ChatTemplate:
    """Turns messages into a prompt.

    Args:
        text: the template. tokens: what it may name, such as `bos_token` and `eos_token`.

    Raises:
        BadInput: the text is no Jinja template.
    """

    def __init__(self, text: str, tokens: Mapping[str, str]):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_refuse, strftime_now=_now)
        try:
            self._template = environment.from_string(text)
        except TemplateSyntaxError as error:
            raise BadInput(
                f"the chat template is no Jinja template: line {error.lineno}: {error.message}"
            ) from None
        self.text, self._tokens = text, {k: v for k, v in tokens.items() if v}

    def render(self, messages: Sequence[Mapping[str, Any]], answer: bool = True, **more: Any) -> str:
        """Returns the prompt of a conversation.

        Args:
            messages: each with role and content. answer: end with the start of the assistant's turn.
            more: further names for the template.

        Raises:
            ApiError: 400 with the template's own words if it refuses the messages or fails on them.
        """
        names = {**self._tokens, **more, "messages": messages, "add_generation_prompt": answer}
        try:
            return self._template.render(names)
        except (TemplateError, TypeError, ValueError, KeyError, ArithmeticError) as error:
            raise bad(f"the chat template cannot render these messages: {error}", "messages") from None


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)
