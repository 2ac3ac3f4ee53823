"""Stand-ins for tests of serving: a tokenizer of bytes, an engine that tells a fixed story, a server in a thread."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from autopar.serve.detokenize import Detokenizer, StopFinder
from autopar.serve.http.app import create_app
from autopar.serve.http.options import Options
from autopar.serve.http.server import Server, bind
from autopar.serve.request import FinishReason, Output, QueueFull, Request, TokenLogprob, Unavailable
from autopar.serve.stream import Stream, wake

EOS = 0
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """Returns a tokenizer with a token for each byte, after `<eos>` (id 0)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<eos>": EOS, **{c: i + 1 for i, c in enumerate(alphabet)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return tokenizer


@dataclass
class Story:
    """An engine that answers everything with the same text, a token every `pace` seconds.

    Attributes:
        fails: what goes wrong at every request's third token. room: requests at most. live: those under way.
        gate: while cleared, nothing goes on. prompts: of the requests so far.
    """

    text: str = "It was the best of times."
    pace: float = 0.0
    fails: str | None = None
    room: int = 100
    failure: str | None = None
    live: dict[str, threading.Event] = field(default_factory=dict)
    gate: threading.Event = field(default_factory=threading.Event)
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self):
        self.tokenizer, self.runner = byte_tokenizer(), SimpleNamespace(vocabulary=257, max_length=128)
        self.gate.set()
        self.generated = 0

    def submit(self, request: Request) -> Stream:
        if self.failure:
            raise Unavailable(self.failure)
        if len(self.live) >= self.room:
            raise QueueFull(f"{self.room} requests wait", 3)
        request.sampling.check(self.runner.vocabulary)
        self.requests.append(request)
        ended = self.live[request.id] = threading.Event()
        stream = Stream(request, lambda: self.cancel(request.id))
        threading.Thread(target=self._tell, args=(stream, ended), daemon=True).start()
        return stream

    def cancel(self, name: str) -> None:
        if name in self.live:
            self.live[name].set()

    def metrics(self) -> Any:
        names = "running waiting batch_size prompt_tokens cached_tokens preemptions steps"
        zeros = dict.fromkeys(names.split(), 0)
        return SimpleNamespace(
            **{**zeros, "running": len(self.live)}, kv_use=0.5, generated_tokens=self.generated
        )

    def _tell(self, stream: Stream, cancelled: threading.Event) -> None:
        request = stream.request
        for index in range(request.sampling.n):
            for piece in self._pieces(request, index, cancelled):
                self.generated += len(piece.token_ids)
                stream.put(piece)
                wake([stream])
        del self.live[request.id]
        stream.end()
        wake([stream])

    def _pieces(self, request: Request, index: int, cancelled: threading.Event) -> Iterator[Output]:
        sampling, counts = request.sampling, {"prompt_tokens": len(request.prompt)}
        if sampling.prompt_logprobs is not None and index == 0:
            scores = (None, *(self._score(t, sampling.prompt_logprobs) for t in request.prompt[1:]))
            yield Output(index, prompt_logprobs=scores, **counts)
        story = self.tokenizer.encode(self.text).ids
        ids = [*story, EOS] if sampling.max_tokens is None else [*story, EOS][: sampling.max_tokens]
        reader, stops = Detokenizer(self.tokenizer, request.prompt), StopFinder(sampling.stop)
        for made, token in enumerate(ids, 1):
            time.sleep(self.pace)
            while not self.gate.wait(0.01) and not cancelled.is_set():
                pass
            if cancelled.is_set():
                yield Output(index, finish=FinishReason.CANCELLED, completion_tokens=made, **counts)
                return
            if self.fails and made == 3:
                yield Output(index, finish=FinishReason.ERROR, error=self.fails, **counts)
                return
            text, stop = stops.add(reader.add([token]) if token != EOS else "")
            found = (self._score(token, sampling.logprobs),) if sampling.logprobs is not None else None
            finish = (
                FinishReason.STOP
                if stop or token == EOS
                else FinishReason.LENGTH
                if made == len(ids)
                else None
            )
            text += "" if not finish or stop else stops.finish()
            yield Output(index, (token,), text, found, finish=finish, completion_tokens=made, **counts)
            if finish:
                return
        yield Output(index, finish=FinishReason.LENGTH, **counts)

    def _score(self, token: int, top: int) -> TokenLogprob:
        others = itertools.chain([(token, -0.5)], ((t, -3.0) for t in itertools.count(1) if t != token))
        return TokenLogprob(token, -0.5, tuple(itertools.islice(others, top)))


def told(engine: Any = None, template: str | None = TEMPLATE, **more: Any) -> Any:
    """Returns a model to serve, as `autopar.serve.load` would."""
    engine = engine or Story()
    return SimpleNamespace(
        name="story", engine=engine, tokenizer=engine.tokenizer, chat_template=template,
        special_tokens={"eos_token": "<eos>"}, plan_svg=lambda: None, **more,
    )  # fmt: skip


@contextlib.contextmanager
def serving(model: Any, options: Options | None = None) -> Iterator[str]:
    """Serves a model from a thread; gives its address."""
    listener, ready = bind("127.0.0.1", 0), threading.Event()
    server = Server(create_app(model, options), ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    assert ready.wait(10)
    try:
        yield "http://{}:{}".format(*listener.getsockname())
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()
