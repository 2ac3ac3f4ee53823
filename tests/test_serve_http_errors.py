"""What the HTTP service refuses and how it stands load: errors, keys, shares, clients gone, failures."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from autopar.core.errors import BadInput
from autopar.serve.http.options import Limits, Options, parse_keys
from autopar.serve.http.server import bind
from tests.serve_http_fakes import Story, serving, told


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(told()) as found:
        yield found


def until(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


TABLE: list[tuple[Any, int, str | None, str]] = [
    (b'{"prompt": "x"', 400, None, "not JSON"),
    (b"\xff\xfe", 400, None, "not JSON"),
    (b"", 400, None, "not JSON"),
    (b"[" * 100_000, 400, None, "not JSON"),
    (b"[]", 400, None, "must be a JSON object"),
    ({}, 400, "prompt", "required"),
    ({"prompt": 3}, 400, "prompt", "string"),
    ({"prompt": []}, 400, "prompt", "none empty"),
    ({"prompt": ["a", [1]]}, 400, "prompt", "list"),
    ({"prompt": ""}, 400, "prompt", "no tokens"),
    ({"prompt": [9999]}, 400, "prompt", "from 0 to 256"),
    ({"prompt": [-1]}, 400, "prompt", "from 0 to 256"),
    ({"prompt": "x" * 200}, 400, "prompt", "128"),
    ({"prompt": "x", "max_tokens": 128}, 400, "prompt", "128"),
    ({"prompt": "x", "max_tokens": -1}, 400, "max_tokens", "at least 0"),
    ({"prompt": "x", "temperature": 3}, 400, "temperature", "at least 0 and at most 2, but is 3"),
    ({"prompt": "x", "temperature": "hot"}, 400, "temperature", "number"),
    ({"prompt": "x", "top_p": 0}, 400, "top_p", "more than 0 and at most 1"),
    ({"prompt": "x", "n": 17}, 400, "n", "at most 16"),
    ({"prompt": "x", "n": True}, 400, "n", "integer"),
    ({"prompt": "x", "n": 2, "best_of": 1}, 400, "best_of", "at least n = 2"),
    ({"prompt": "x", "best_of": 2, "stream": True}, 400, "best_of", "streamed"),
    ({"prompt": "x", "logprobs": 21}, 400, "logprobs", "at most 20"),
    ({"prompt": "x", "logit_bias": {"a": 1}}, 400, "logit_bias", "token ids"),
    ({"prompt": "x", "logit_bias": {"999": 1}}, 400, "logit_bias", "999"),
    ({"prompt": "x", "stop": [""]}, 400, "stop[0]", "at least 1 character"),
    ({"prompt": "x", "stop": ["a"] * 17}, 400, "stop", "16"),
    ({"prompt": "x", "suffix": "y"}, 400, "suffix", "put it into the prompt"),
    ({"prompt": "x", "stream_options": {}}, 400, "stream_options", "stream"),
    ({"prompt": "x", "temprature": 1}, 400, "temprature", "did you mean temperature?"),
    ({"prompt": "x", "tools": []}, 400, "tools", "not supported"),
    ({"prompt": "x", "model": "y"}, 404, "model", "'story' is"),
    ({"prompt": "x" * (5 << 20)}, 413, None, "longer than"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "param", "words"), TABLE, ids=range(len(TABLE)))
def test_bad_bodies(url: str, body: Any, status: int, param: str | None, words: str):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    got = httpx.post(f"{url}/v1/completions", content=content, headers={"content-type": "application/json"})
    error = got.json()["error"]
    assert (got.status_code, error["param"]) == (status, param), error
    assert words in error["message"] and "Traceback" not in got.text
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"


def test_bad_messages(url: str):
    for body, param in [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}], "top_logprobs": 2}, "top_logprobs"),
        ({"messages": [{"role": "user"}], "response_format": {"type": "json"}}, "response_format.type"),
        ({"messages": [{"role": "user"}], "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
    ]:  # fmt: skip
        got = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert (got.status_code, got.json()["error"]["param"]) == (400, param), got.text


def test_wrong_paths_methods_and_kinds(url: str):
    for method, path, status in [
        ("GET", "/nowhere", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/models", 405),
        ("POST", "/v1/completions", 415), ("GET", "/plan.svg", 404),
    ]:  # fmt: skip
        got = httpx.request(method, url + path, content=b"x" if status == 415 else None)
        assert got.status_code == status and got.json()["error"]["message"]
    chunks = (b'{"prompt": "' if i == 0 else b"x" * 65536 for i in range(100))
    got = httpx.post(f"{url}/v1/completions", content=chunks, headers={"content-type": "application/json"})
    assert got.status_code == 413


def test_mistakes_of_ours_tell_no_secrets(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    with serving(told()) as url:
        monkeypatch.setattr("autopar.serve.http.tokens.Words.encode", lambda *_: 1 / 0)
        got = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
        assert got.status_code == 500 and "division" not in got.text
        assert got.json()["error"]["type"] == "server_error"
    assert "division by zero" in caplog.text


# --- load


def test_keys():
    with serving(told(), Options(keys=frozenset({"alpha", "beta"}))) as url:
        for given, status in [(None, 401), ("gamma", 401), ("alpha", 200), ("beta", 200)]:
            headers = {"Authorization": f"Bearer {given}"} if given else {}
            got = httpx.get(f"{url}/v1/models", headers=headers)
            assert got.status_code == status
            if status == 401:
                assert got.json()["error"]["code"] == "invalid_api_key" and "www-authenticate" in got.headers
        assert httpx.get(f"{url}/health").status_code == 200
        with pytest.raises(openai.AuthenticationError, match="wrong API key"):
            openai.OpenAI(base_url=f"{url}/v1", api_key="gamma", max_retries=0).models.list()


def test_parsed_keys():
    assert dict(parse_keys(["a", "b=2.5"])) == {"a": 1.0, "b": 2.5}
    for texts in (["a=0"], ["a=x"], ["=1"], ["a", "a"], ["a b"], [""]):
        with pytest.raises(BadInput, match="--api-key number"):
            parse_keys(texts)
    with pytest.raises(BadInput, match="limit on body"):
        Limits(body=0)


def test_a_full_queue_is_429_and_recovers():
    story = Story()
    model = told(story, queue_requests=2)
    with serving(model) as url:
        story.gate.clear()
        body = {"prompt": "x", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
        answers: list[httpx.Response] = []
        ask = lambda: answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=30))  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(20)]
        for thread in threads:
            thread.start()
        until(lambda: len(answers) >= 20 - 8 - 2)
        story.gate.set()
        for thread in threads:
            thread.join()
        statuses = [a.status_code for a in answers]
        assert set(statuses) == {200, 429}
        refused = next(a for a in answers if a.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=30).status_code == 200
        assert 'rejections_total{reason="queue_full"}' in httpx.get(f"{url}/metrics").text


def test_keys_get_their_shares():
    story = Story(row_buckets=(1,), pace=0.01)  # answers so far apart that clients hear them in this order
    model = told(story, weights={"big": 3.0, "small": 1.0})
    with serving(model, Options(keys=frozenset({"big", "small"}))) as url:
        order: list[str] = []

        def ask(key: str) -> None:
            body = {"prompt": "xxxx", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=30).is_success
            order.append(key)

        story.gate.clear()
        threads = [threading.Thread(target=ask, args=(key,)) for key in ["small"] * 12 + ["big"] * 12]
        for thread in threads:
            thread.start()
        until(lambda: model.engine.metrics().requests == 24)
        story.gate.set()
        for thread in threads:
            thread.join()
        assert 7 <= order[:12].count("big") <= 10


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_is_forgotten(stream: bool):
    story = Story(pace=0.01)
    model = told(story)
    with serving(model) as url:
        body = {"prompt": ["x", "y"], "max_tokens": 100, "ignore_eos": True, "stream": stream}
        host, port = url.removeprefix("http://").split(":")
        payload = json.dumps(body)
        with socket.create_connection((host, int(port))) as plug:
            plug.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(payload)}\r\n\r\n{payload}".encode()
            )
            until(lambda: model.engine.metrics().running == 2)
        until(lambda: model.engine.metrics().running == 0)
        found = model.engine.metrics()
        assert found.answer_tokens < 100 and found.blocks_held == 0
        assert found.finished.get("cancelled") == 2
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200


def test_a_failing_engine_says_so(caplog: pytest.LogCaptureFixture):
    story = Story()
    with serving(told(story)) as url:
        ask: dict[str, Any] = {"prompt": "Hey", "max_tokens": 50, "ignore_eos": True}
        story.pace = 0.02
        with httpx.stream("POST", f"{url}/v1/completions", json={**ask, "stream": True}) as running:
            lines = running.iter_lines()
            assert json.loads(next(lines)[6:])["choices"]
            story.fault = RuntimeError("the card fell out")
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        error = json.loads(rest[-2][6:])["error"]
        assert error["type"] == "server_error" and "the card fell out" in error["message"]
        got = httpx.post(f"{url}/v1/completions", json=ask)
        assert got.status_code == 503 and got.headers["retry-after"] and got.json()["error"]["code"]
        health = httpx.get(f"{url}/health")
        assert health.status_code == 503 and health.json()["status"] == "failed"
        assert "the card fell out" in health.json()["last_error"]


def test_an_engine_that_recovers_says_so_too(caplog: pytest.LogCaptureFixture):
    story = Story()

    def again() -> Story:
        story.fault = None
        return story

    with serving(told(story, restart=again)) as url:
        ask: dict[str, Any] = {"prompt": "Hey", "max_tokens": 5}
        story.fault = RuntimeError("the card fell out")
        got = httpx.post(f"{url}/v1/completions", json=ask)
        assert got.status_code == 503 and "the card fell out" in got.json()["error"]["message"]
        until(lambda: httpx.get(f"{url}/health").json()["status"] == "ok")
        health = httpx.get(f"{url}/health").json()
        assert health["restarts"] == 1 and "the card fell out" in health["last_error"]
        assert httpx.post(f"{url}/v1/completions", json=ask).status_code == 200


# --- the process


def test_a_port_in_use_is_said_so():
    with bind("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(BadInput, match=r"in use; give another with --port"):
            bind("127.0.0.1", first.getsockname()[1])
    with pytest.raises(BadInput, match="no address"):
        bind("192.0.2.1", 8000)
