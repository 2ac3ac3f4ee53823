"""What clients may send: each field, its type and its range; nothing else is taken."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from autopar.serve.http.errors import ApiError, bad

Prompt = str | list[int]
MAX_INT = 2**63 - 1


class Strict(BaseModel):
    """A body that refuses unknown fields, so that no misspelt one goes unnoticed; null means absent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


def _prompts(value: Any) -> list[Prompt]:
    """A string, strings, token ids or lists of them, as a list of prompts."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(v) is int for v in value)):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(v, str) for v in value):
            return value
        if all(isinstance(v, list) and v and all(type(i) is int for i in v) for v in value):
            return value
    raise ValueError(
        "expected a string, a list of strings, a list of token ids, or a list of such lists; none empty"
    )


def _texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _content(value: Any) -> str:
    """A message's text: a string, or parts that are all text."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        kinds = {str(part.get("type")) for part in value} - {"text"}
        if kinds:
            raise ValueError(f"only text parts can be read, but got {', '.join(sorted(kinds))}")
        if all(isinstance(part.get("text"), str) for part in value):
            return "".join(part["text"] for part in value)
    raise ValueError("expected a string or a list of {type: 'text', text: …}")


def _bias(value: Any) -> Any:
    """Token ids come as JSON keys, so as strings."""
    if not isinstance(value, dict):
        return value
    try:
        return {int(token): amount for token, amount in value.items()}
    except ValueError:
        raise ValueError("the keys must be token ids, such as '50256'") from None


class StreamOptions(Strict):
    """`include_usage`: a last chunk with the token counts."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Sampled(Strict):
    """What completions and chats have in common; the last block is ours and vLLM's beyond OpenAI's."""

    model: str | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[
        dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_bias), Field(max_length=1024)
    ] = {}
    n: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=-MAX_INT - 1, le=MAX_INT)] | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_texts)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0

    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = []
    ignore_eos: bool = False
    num_beams: Annotated[int, Field(ge=1)] = 1
    length_penalty: Annotated[float, Field(ge=-10, le=10)] = 1.0
    return_token_ids: bool = False

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionRequest(Sampled):
    """The body of /v1/completions."""

    prompt: Annotated[list[Prompt], BeforeValidator(_prompts)]
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] = 16
    suffix: str | None = None
    add_special_tokens: bool = True


class Message(Strict):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: Annotated[str, BeforeValidator(_content)] = ""


class ResponseFormat(Strict):
    """Only plain text is written."""

    type: Literal["text"]


class ChatRequest(Sampled):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0)] = 0
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    response_format: ResponseFormat | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = {}


class TokenizeRequest(Strict):
    """The body of /tokenize: a text, or a conversation to put through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    """The body of /detokenize."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


UNSUPPORTED = {
    "tools": "tools are not supported",
    "tool_choice": "tools are not supported",
    "parallel_tool_calls": "tools are not supported",
    "functions": "functions are not supported",
    "function_call": "functions are not supported",
    "audio": "only text is supported",
    "modalities": "only text is supported",
    "reasoning_effort": "this server's models have no reasoning effort",
    "prediction": "predicted outputs are not supported",
    "web_search_options": "web search is not supported",
}

Body = TypeVar("Body", bound=Strict)


def parse(kind: type[Body], raw: bytes) -> Body:
    """Returns the body as a `kind`.

    Raises:
        ApiError: 400 naming the field at fault, what was expected and what came.
    """
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise _told(kind, error.errors(include_url=False)[0]) from None


def _told(kind: type[Strict], problem: Mapping[str, Any]) -> ApiError:
    """One of pydantic's findings in OpenAI's shape."""
    param, message, got = (
        _path(problem["loc"]),
        problem["msg"].removeprefix("Value error, "),
        problem["input"],
    )
    match problem["type"]:
        case "json_invalid":
            return bad(f"the body is not JSON: {message.removeprefix('Invalid JSON: ')}", code="invalid_json")
        case "missing":
            return bad(f"{param} is required", param, "missing_required_parameter")
        case "extra_forbidden":
            return _unknown(kind, param)
        case "model_type" | "model_attributes_type" | "dict_type" if not param:
            return bad(f"the body must be a JSON object, but got {_short(got)}", code="invalid_json")
        case kind_of if kind_of.startswith(("greater_than", "less_than")):
            return bad(f"{param} must be {_range(kind, problem)}, but is {_short(got)}", param)
        case _:
            message = message.removeprefix("Input should be ").removesuffix(".")
            text = message if message.startswith(("expected", "only", "the ")) else f"it should be {message}"
            return bad(f"invalid {param}: {text}, but got {_short(got)}", param)


def _range(kind: type[Strict], problem: Mapping[str, Any]) -> str:
    """The whole range of a field, of which only one end was overstepped."""
    name = problem["loc"][0]
    field = kind.model_fields.get(name) if isinstance(name, str) and len(problem["loc"]) == 1 else None
    limits = dict[str, Any]()
    for constraint in field.metadata if field else ():
        limits |= {side: getattr(constraint, side) for side in _SIDES if hasattr(constraint, side)}
    if not limits:
        return problem["msg"].removeprefix("Input should be ")
    return " and ".join(f"{words} {limits[side]}" for side, words in _SIDES.items() if side in limits)


_SIDES = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def _unknown(kind: type[Strict], param: str) -> ApiError:
    if param in UNSUPPORTED:
        return bad(f"{param}: {UNSUPPORTED[param]}", param, "unsupported_parameter")
    close = difflib.get_close_matches(param, kind.model_fields, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return bad(f"unrecognised parameter: {_short(param)}{hint}", _short(param), "unknown_parameter")


def _path(place: tuple[str | int, ...]) -> str:
    """`("messages", 0, "content")` as `messages[0].content`."""
    text = ""
    for step in place:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _short(value: Any) -> str:
    text = value if isinstance(value, str) and value.isidentifier() else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
