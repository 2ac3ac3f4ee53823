"""The HTTP service through the `openai` client and by hand, over the engine and a made-up runner."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from autopar.core.errors import BadInput
from autopar.serve.http.schemas import CompletionRequest
from autopar.serve.http.template import ChatTemplate
from autopar.serve.http.tokens import Words
from autopar.serve.stand_in import stand_in
from tests.serve_http_fakes import EOS, TEMPLATE, Story, byte_tokenizer, serving, told

TEXT = "It was the best of times."


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(told()) as found:
        yield found


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as found:
        yield found


def after(prompt: str, count: int, text: str = TEXT) -> str:
    """What the story tells after a prompt, up to its end."""
    start = len(prompt) % (len(text) + 1)
    return text[start : start + count]


# --- the client's surface


def test_models(client: openai.OpenAI):
    (model,) = client.models.list().data
    assert (model.id, model.object, client.models.retrieve("story").id) == ("story", "model", "story")
    with pytest.raises(openai.NotFoundError, match="'tale' is not served"):
        client.models.retrieve("tale")


def test_a_completion_with_usage(client: openai.OpenAI):
    got = client.completions.create(model="story", prompt="Hello", max_tokens=6, temperature=0)
    assert got.choices[0].text == after("Hello", 6)
    assert got.choices[0].finish_reason == "length"
    assert got.usage and (got.usage.prompt_tokens, got.usage.completion_tokens) == (5, 6)
    assert got.id.startswith("cmpl-") and got._request_id == got.id


def test_it_ends_at_the_end(client: openai.OpenAI):
    got = client.completions.create(model="story", prompt="abc", max_tokens=100, temperature=0)
    assert (got.choices[0].text, got.choices[0].finish_reason) == (TEXT[3:], "stop")


def test_prompts_as_text_texts_ids_and_lists_of_ids(client: openai.OpenAI):
    ids = byte_tokenizer().encode("Hey").ids
    for prompt in ("Hey", ["Hey"], ids, [ids]):
        got = client.completions.create(model="story", prompt=prompt, max_tokens=4, temperature=0)
        assert [c.text for c in got.choices] == [after("Hey", 4)]
    got = client.completions.create(
        model="story", prompt=["H", "He", "Hel"], n=2, max_tokens=3, temperature=0
    )
    texts = [after(p, 3) for p in ("H", "H", "He", "He", "Hel", "Hel")]
    assert [(c.index, c.text) for c in got.choices] == list(enumerate(texts))
    assert got.usage and (got.usage.prompt_tokens, got.usage.completion_tokens) == (6, 18)


def test_echo_and_logprobs_have_the_shape_that_lm_eval_reads(client: openai.OpenAI):
    prompt = byte_tokenizer().encode("It was thE").ids
    got = client.completions.create(
        model="story", prompt=[prompt], max_tokens=1, temperature=0, echo=True, logprobs=1, seed=1
    )
    found = got.choices[0].logprobs
    assert found and found.tokens and found.token_logprobs and found.top_logprobs and found.text_offset
    assert got.choices[0].text == "It was thE" + after("0123456789", 1) == "".join(found.tokens)
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert found.text_offset == list(range(11))
    told_, missed = -math.log1p(256 * math.exp(-9)), -math.log1p(256 * math.exp(-9)) - 9
    expected = [told_] * 8 + [missed, told_]  # the story has an e where the prompt has an E
    assert found.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    greedy = [t == max(top, key=top.__getitem__) for t, top in zip(found.tokens[1:], found.top_logprobs[1:])]
    assert greedy == [True] * 8 + [False, True]


def test_scoring_alone(client: openai.OpenAI):
    got = client.completions.create(model="story", prompt="It was", max_tokens=0, echo=True, logprobs=0)
    choice = got.choices[0]
    assert (choice.text, choice.finish_reason) == ("It was", "length")
    assert choice.logprobs and len(choice.logprobs.tokens or ()) == 6
    assert got.usage and got.usage.completion_tokens == 0


def test_sampling_repeats_with_a_seed(client: openai.OpenAI):
    def texts(seed: int) -> list[str]:
        ask: dict[str, Any] = {"prompt": "Hi", "max_tokens": 24, "temperature": 2.0, "n": 3, "seed": seed}
        return [c.text for c in client.completions.create(model="story", **ask).choices]

    assert texts(1) == texts(1) != texts(2)
    assert len(set(texts(1))) == 3


def test_stop_strings_bias_and_best_of(client: openai.OpenAI):
    ask: dict[str, Any] = {"model": "story", "prompt": "ab", "max_tokens": 20, "temperature": 0}
    got = client.completions.create(**ask, stop=["the", "st"])
    assert (got.choices[0].text, got.choices[0].finish_reason) == (" was ", "stop")
    letter = byte_tokenizer().encode("Z").ids[0]
    biased = client.completions.create(**ask, logit_bias={str(letter): 100})
    assert biased.choices[0].text == "Z" * 20
    best = client.completions.create(**{**ask, "temperature": 1}, best_of=3, n=1, seed=3)
    assert len(best.choices) == 1


def test_vllm_s_parameters_work_through_extra_body(client: openai.OpenAI):
    extra = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True}
    got = client.completions.create(model="story", prompt="x", max_tokens=4, extra_body=extra)
    assert len(got.choices[0].text) == 4
    beams = client.completions.create(model="story", prompt="x", max_tokens=4, extra_body={"num_beams": 3})
    assert beams.choices[0].text == after("x", 4)


def test_a_stream_is_the_whole_in_pieces(client: openai.OpenAI):
    ask: dict[str, Any] = {
        "model": "story",
        "prompt": ["Hey", "Ho"],
        "max_tokens": 8,
        "temperature": 0,
        "echo": True,
        "logprobs": 2,
    }
    whole = client.completions.create(**ask)
    texts, tokens, finishes = ["", ""], [[], []], [None, None]
    *chunks, last = client.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
        finishes[choice.index] = choice.finish_reason or finishes[choice.index]
    assert texts == [c.text for c in whole.choices]
    assert tokens == [c.logprobs and c.logprobs.tokens for c in whole.choices]
    assert finishes == ["length", "length"]
    assert last.usage == whole.usage and not last.choices
    assert len(chunks) > 8


def test_a_stream_ends_with_done(url: str):
    body = {"prompt": "Hey", "max_tokens": 2, "temperature": 0, "stream": True}
    got = httpx.post(f"{url}/v1/completions", json=body)
    assert got.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in got.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    assert "usage" not in json.loads(lines[0][6:])


def test_characters_are_never_cut():
    with serving(told(Story("Ein Köder für Bären: 🐻!"))) as url:
        ask = {"prompt": "x", "max_tokens": 40, "temperature": 0, "logprobs": 0}
        got = httpx.post(f"{url}/v1/completions", json=ask).json()["choices"][0]
        assert got["text"] == "in Köder für Bären: 🐻!"
        assert got["logprobs"]["tokens"][4:6] == ["bytes:\\xc3", "bytes:\\xb6"]
        assert got["logprobs"]["text_offset"][4:7] == [4, 4, 5]
        stream = httpx.post(f"{url}/v1/completions", json={**ask, "stream": True}).text
        pieces = [json.loads(line[6:])["choices"][0]["text"] for line in stream.split("\n\n")[:-2]]
        assert "".join(pieces) == got["text"] and not any("\ufffd" in piece for piece in pieces)


def test_a_model_without_a_tokenizer_takes_and_gives_ids():
    ids = byte_tokenizer().encode(TEXT).ids
    model = told()
    model.tokenizer = None
    with serving(model) as url:
        body = {"prompt": ids[:4], "max_tokens": 3, "temperature": 0, "return_token_ids": True}
        (choice,) = httpx.post(f"{url}/v1/completions", json=body).json()["choices"]
        assert (choice["token_ids"], choice["prompt_token_ids"]) == (ids[4:7], ids[:4])
        stream = httpx.post(f"{url}/v1/completions", json={**body, "stream": True}).text.split("\n\n")
        pieces = (json.loads(event[6:])["choices"][0]["token_ids"] for event in stream[:-2])
        assert list(itertools.chain.from_iterable(pieces)) == ids[4:7]
        got = httpx.post(f"{url}/v1/completions", json={**body, "prompt": "x"})
        assert got.status_code == 400 and "send token ids" in got.json()["error"]["message"]
        assert httpx.get(f"{url}/tokenizer_info").json()["vocab_size"] == 0


# --- chat


def test_a_chat_goes_through_the_template(client: openai.OpenAI):
    messages: Any = [{"role": "user", "content": "Hey"}]
    got = client.chat.completions.create(
        model="story",
        messages=messages,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        max_completion_tokens=5,
    )
    prompt = "<user>Hey<eos><assistant>"  # one token is <eos>, the others single characters
    size = len(prompt) - len("<eos>") + 1
    (choice,) = got.choices
    assert (choice.message.role, choice.message.content) == ("assistant", after("x" * size, 5))
    assert got.usage and got.usage.prompt_tokens == size
    assert choice.logprobs and choice.logprobs.content
    assert [t.token for t in choice.logprobs.content] == [*(choice.message.content or ""), "<eos>"]
    assert all(
        len(t.top_logprobs) == 2 and t.bytes == list(t.token.encode()) for t in choice.logprobs.content
    )


def test_a_chat_s_stream_and_its_default_length(client: openai.OpenAI):
    parts: Any = [
        {"role": "user", "content": [{"type": "text", "text": "He"}, {"type": "text", "text": "y"}]}
    ]
    ask: dict[str, Any] = {"model": "story", "messages": parts, "temperature": 0}
    whole = client.chat.completions.create(**ask)
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(**ask, n=2, stream=True))
    texts = ["", ""]
    for choice in itertools.chain.from_iterable(c.choices for c in chunks):
        texts[choice.index] += choice.delta.content or ""
    assert texts == [whole.choices[0].message.content] * 2
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {c.choices[0].finish_reason for c in chunks[-2:]} == {"stop"}


def test_the_template_may_refuse_and_may_be_missing(url: str, client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match="no role wizard"):
        client.chat.completions.create(model="story", messages=[{"role": "wizard", "content": "x"}])  # type: ignore
    with serving(told(template=None)) as base:
        got = httpx.post(f"{base}/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
        assert got.status_code == 400 and "--chat-template FILE" in got.json()["error"]["message"]


def test_templates_run_in_a_sandbox():
    assert ChatTemplate("{{ messages | tojson }}", {}).render([{"content": "<é>"}]) == '[{"content": "<é>"}]'
    with pytest.raises(BadInput, match="line 1"):
        ChatTemplate("{% if %}", {})
    for text in (
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
    ):
        with pytest.raises(Exception, match="cannot render"):
            ChatTemplate(text, {}).render([])


# --- tokens, health, metrics, page


def test_tokenize_and_detokenize(url: str):
    post = lambda path, **body: httpx.post(url + path, json=body).json()  # noqa: E731
    ids = byte_tokenizer().encode("Ä!").ids
    got = post("/tokenize", prompt="Ä!", return_token_strs=True)
    assert (got["tokens"], got["count"], got["max_model_len"]) == (ids, 3, 128)
    assert got["token_strs"] == ["bytes:\\xc3", "bytes:\\x84", "!"]
    assert post("/detokenize", tokens=[*ids, EOS]) == {"prompt": "Ä!<eos>"}
    chat = post("/tokenize", messages=[{"role": "user", "content": "Hey"}])
    assert post("/detokenize", tokens=chat["tokens"])["prompt"] == "<user>Hey<eos><assistant>"
    info = httpx.get(url + "/tokenizer_info").json()
    assert (info["eos_token"], info["chat_template"]) == ("<eos>", TEMPLATE)
    assert post("/detokenize", tokens=[999])["error"]["param"] == "tokens"
    assert post("/tokenize")["error"]["message"] == "give either prompt or messages"


def test_token_texts_of_sentencepiece_like_vocabularies():
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE({"<s>": 0, "▁Paris": 1, "<0xC3>": 2, "s": 3}, []))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    words = Words(tokenizer, {})
    assert [words.text_of(i) for i in (1, 2, 3)] == [" Paris", "bytes:\\xc3", "s"]


def test_a_stand_in_reads_every_text_and_writes_every_id():
    tokenizer = stand_in(300)
    assert tokenizer.encode("Ä!").ids == list("Ä!".encode())
    assert tokenizer.decode([*"Ä".encode(), 299, 256]) == "Ä ⟨299⟩ ⟨256⟩"
    assert Words(tokenizer, {}).text_of(299) == " ⟨299⟩"


def test_health_metrics_and_page(url: str):
    httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 3})
    health = httpx.get(f"{url}/health")
    assert health.status_code == 200 and health.json()["status"] == "ok"
    assert health.json()["generated_tokens"] >= 3 and health.json()["running"] == 0
    from prometheus_client.parser import text_string_to_metric_families

    families = {f.name: f for f in text_string_to_metric_families(httpx.get(f"{url}/metrics").text)}
    wanted = "time_to_first_token_seconds inter_token_seconds batch_size kv_use_ratio preemptions rejections"
    assert {f"autopar_{name}" for name in wanted.split()} <= set(families)
    first = {s.name: s.value for s in families["autopar_time_to_first_token_seconds"].samples}
    assert first["autopar_time_to_first_token_seconds_count"] >= 1
    page = httpx.get(url)
    assert "sha256-" in page.headers["content-security-policy"] and "<script>" in page.text
    assert "http://" not in page.text.replace("http://www.w3.org", "") and "https://" not in page.text


def test_every_parameter_of_ours_is_documented():
    """Each field of a completion is in docs/serving.md."""
    from pathlib import Path

    text = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    assert [name for name in CompletionRequest.model_fields if f"`{name}`" not in text] == []
