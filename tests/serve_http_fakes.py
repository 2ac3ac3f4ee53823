"""Stand-ins for tests of serving: a byte tokenizer, an engine that tells a story, a server in a thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from autopar.serve.batch import StepBatch
from autopar.serve.engine import Engine
from autopar.serve.engine import Options as EngineOptions
from autopar.serve.http.app import create_app
from autopar.serve.http.options import Options
from autopar.serve.http.server import Server, bind

EOS = 0
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}<{{ m.role }}>{{ m.content }}{{ eos_token }}"
    "{% endfor %}"
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
    """A runner that foresees a text and `<eos>`, over and over: after n tokens comes the n-th.

    Attributes:
        text: the story. pace: seconds per step. gate: while cleared, steps wait. fault: raised by steps.
        seen: tokens of each step, for tests to look at.
    """

    text: str = "It was the best of times."
    pace: float = 0.0
    gate: threading.Event = field(default_factory=threading.Event)
    fault: Exception | None = None
    seen: list[np.ndarray] = field(default_factory=list)
    vocabulary: int = 257
    block_size: int = 4
    blocks: int = 200
    max_length: int = 128
    groups: int = 1
    chains: bool = False
    row_buckets: tuple[int, ...] = (1, 4, 8)
    new_buckets: tuple[int, ...] = (1, 16, 64)
    table_buckets: tuple[int, ...] = (8, 32)
    max_tokens: int = 64

    def __post_init__(self):
        self.gate.set()
        self.tokenizer = byte_tokenizer()
        self._next = np.array([*self.tokenizer.encode(self.text).ids, EOS])

    def run(self, batch: StepBatch, every: bool = False) -> Foreseen:
        time.sleep(self.pace)
        self.gate.wait(20)
        if self.fault:
            raise self.fault
        self.seen.append(batch.tokens)
        places = batch.positions[:, None] + np.arange(1, batch.tokens.shape[1] + 1)
        logits = np.zeros((*places.shape, self.vocabulary), np.float32)
        np.put_along_axis(logits, self._next[places % len(self._next)][..., None], 9.0, axis=2)
        return Foreseen(logits, batch.lengths)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class Foreseen:
    """Logits of a step, `[rows, new, vocabulary]`, and the rows' lengths."""

    logits: np.ndarray
    lengths: np.ndarray

    def greedy(self) -> np.ndarray:
        return self.last().argmax(axis=1).astype(np.int32)

    def last(self) -> np.ndarray:
        return self.logits[np.arange(len(self.lengths)), np.maximum(self.lengths - 1, 0)]

    def every(self) -> np.ndarray:
        return self.logits


def told(
    story: Story | None = None,
    template: str | None = TEMPLATE,
    restart: Callable[[], Story] | None = None,
    **options: Any,
) -> Any:
    """Returns a model to serve, as `autopar.serve.load` would; restart and options are the engine's."""
    story = story or Story()
    return SimpleNamespace(
        name="story",
        engine=Engine(story, story.tokenizer, EngineOptions(eos=(EOS,), **options), restart),
        tokenizer=story.tokenizer,
        chat_template=template,
        special_tokens={"eos_token": "<eos>"},
        plan_svg=lambda: None,
    )


@contextlib.contextmanager
def serving(model: Any, options: Options | None = None) -> Iterator[str]:
    """Serves a model from a thread; gives its address, and closes the engine at the end."""
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
        model.engine.close()
        assert not thread.is_alive()
