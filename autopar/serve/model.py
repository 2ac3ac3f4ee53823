"""A model on its devices, ready to generate: what `autopar.serve.load` returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autopar import cluster as room
from autopar.api.cluster import Cluster
from autopar.api.inference import Goal, Latency, Wanted
from autopar.api.planning import Made, Say
from autopar.api.serving import Programs, Served, Shape, derived, on_cpu, same_state
from autopar.core.errors import BadInput
from autopar.runtime.cache import keep_compiled
from autopar.runtime.cores import spread
from autopar.runtime.inprocess import InProcess
from autopar.serve.engine import Engine
from autopar.serve.engine import Options as EngineOptions
from autopar.serve.opening import quantised, suited
from autopar.serve.plan import ServingPlan, decode_plan, described
from autopar.serve.request import Output, Request, Sampling
from autopar.serve.runner import Buckets, CompiledRunner, table_buckets
from autopar.serve.stream import Stream

if TYPE_CHECKING:
    from autopar.io.huggingface import Checkpoint

BLOCK_SIZE = 16
LONGEST = 2048
"""Tokens of the longest sequence, where the model itself could hold longer ones."""

HOST_TOKENS = 16384
"""Tokens that the cache holds on host devices: their memory is the machine's, which others use too."""

WINDOW = 4
"""What part of the cache's size a window of decode steps may have on host devices, one in so many."""

SPARE = 0.03
"""Share of the cache's blocks that is left out on real devices, for what the plan cannot know."""

Ids = Sequence[int] | Sequence[Sequence[int]]


def load(
    model: str | Path | Checkpoint | None = None,
    *,
    cluster: room.Cluster | str | None = None,
    backend: Any = None,
    dtype: str | None = None,
    weights: str | None = None,
    seed: int = 0,
    max_length: int | None = None,
    tokens: int | None = None,
    goal: Goal | None = None,
    stages: int | None = None,
    buckets: Buckets | None = None,
    behind: bool = True,
    quantise: str | None = None,
    compiled: str | Path | None = None,
    chat_template: str | None = None,
    options: EngineOptions | None = None,
    progress: Say | None = None,
) -> Model:
    """Returns a model that generates: planned, compiled for every shape of step, its weights in place.

    Args:
        model: a directory in Hugging Face's format, a known name (with `weights="random"`), or a
            `Checkpoint`; None: the small model of `autopar[demo]`.
        cluster: what to plan for: a Cluster, a file or a short form ("1xA100-40GB,4xT4"); None: this machine.
        backend: who runs it; `InProcess()` by default.
        dtype: of weights and cache; None: float32 on host devices, else 16 bits.
        weights: "random" draws them from `seed` instead of reading them.
        max_length: tokens of the longest sequence; None: the model's, at most 2048.
        tokens: tokens the cache holds; None: as many as there is room for (16384 on host devices).
        goal: what the plan is to be good at; `Latency()` by default. stages: exactly so many.
        buckets: the shapes of steps that are compiled.
        behind: serve as soon as every step has some shape that holds it, and compile the closer-fitting ones
            in the background.
        quantise: "int8" keeps the kernels as int8 with a scale per channel; they are quantised slice by slice
            while they are read. `autopar bench int8` says what that costs a model.
        compiled: folder that keeps compiled programs for the next start, such as
            `autopar.runtime.cache.user_folder()`, JAX's setting for the whole process. None: as JAX is set.
        chat_template: Jinja, in place of the model's own.
        options: of the engine. progress: called with a few words at every step.

    Raises:
        BadInput, UnknownName: no such model, an incomplete directory. DoesNotFit: the cluster is too small.
        BackendError: the backend cannot be reached.
    """
    say = progress or (lambda words: None)
    backend = backend or InProcess()
    if cluster is None and not isinstance(backend, InProcess):
        raise BadInput(
            "which devices does the Ray cluster have? Pass cluster=, a file or e.g. 1xV100-16GB,2xT4"
        )
    where = room.parse(cluster) if isinstance(cluster, str) else cluster or Cluster.local()
    host = on_cpu(backend)
    if compiled is not None:
        keep_compiled(compiled)
    checkpoint = quantised(suited(model, dtype, weights, seed, where, host), quantise)
    config = checkpoint.config
    longest = min(max_length or LONGEST, config.positions)
    family: Any = checkpoint.module.DECODER
    served = Served(family, config, 2, BLOCK_SIZE, np.dtype(config.param_dtype))
    wanted = Wanted(goal or Latency(), -(-(tokens or longest) // BLOCK_SIZE) + 1, stages)
    served, made = decode_plan(served, where, name=checkpoint.name, wanted=wanted, length=longest, say=say)
    if tokens is None and host:
        tokens = max(longest, HOST_TOKENS)
    blocks = _blocks(served, made, where, checkpoint.name, longest, tokens)
    fine = behind and isinstance(backend, InProcess)  # where it costs no time before serving
    setup = Setup(
        replace(served, blocks=blocks), made, where, backend, checkpoint.weights,
        buckets or Buckets(blocks=table_buckets(longest, BLOCK_SIZE, fine)), longest, behind,
        blocks * BLOCK_SIZE // WINDOW if host else 0,
    )  # fmt: skip
    return Model(checkpoint, setup, chat_template, options or EngineOptions(), say)


def _blocks(
    served: Served, made: Made, cluster: room.Cluster, name: str, longest: int, tokens: int | None
) -> int:
    """Cache blocks to make: as many as asked for, or as many as there is room for."""
    found = described(served, made, cluster, name=name, length=longest, prompt=min(256, longest))
    room_for = max(2, int(found.blocks * (1 - SPARE)))
    return room_for if tokens is None else min(room_for, -(-tokens // BLOCK_SIZE) + 1)


@dataclass(frozen=True)
class Setup:
    """All that a runner is made of, so that it can be made again when a worker is lost.

    Attributes:
        served: the model, with its number of cache blocks. made: the plan of a decode step.
        cluster, backend: what it was planned for, who runs it. weights: where parameters come from.
        buckets: shapes of steps. longest: tokens of a sequence.
        behind: whether shapes that are not needed to begin with are compiled while it serves.
        window: tokens that a window of decode steps may hold beside the cache.
    """

    served: Served
    made: Made
    cluster: room.Cluster
    backend: Any
    weights: Any
    buckets: Buckets
    longest: int
    behind: bool = True
    window: int = 0

    def runner(self, say: Say) -> CompiledRunner:
        """Returns a runner with everything compiled and loaded."""
        first = Shape(self.buckets.rows[0], 1, self.buckets.blocks[0])
        traced = self.served.tracer(first)(1, False)
        base = derived(self.made, traced, same_state(self.made.traced, traced), self.cluster)
        programs = Programs(self.served, base, self.cluster, self.backend, say)
        try:
            programs.place(self.weights)
            programs.adopt(first)
            config = self.served.config
            runner = CompiledRunner(
                programs, self.buckets, config.vocabulary, self.longest, window=self.window
            )
            here = isinstance(self.backend, InProcess)  # a worker that compiles does not serve meanwhile
            if here:
                spread()
            return runner.compile(say, behind=here and self.behind, threads=2 if here else 1)
        except BaseException:
            programs.close()
            raise


class Model:
    """A model that generates; made by `load`.

    Attributes:
        name: what it is called. engine: what serves it; clients may share it.
        tokenizer: a `tokenizers.Tokenizer`, None for a model without. special_tokens: text by name.
        chat_template: Jinja, None for a base model. checkpoint: where it comes from.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        setup: Setup,
        chat_template: str | None,
        options: EngineOptions,
        say: Say,
    ):
        self.checkpoint, self.setup, self.name = checkpoint, setup, checkpoint.name
        self.tokenizer = checkpoint.load_tokenizer()
        self.special_tokens = dict(checkpoint.special)
        self.chat_template = chat_template or checkpoint.chat_template
        options = replace(options, eos=options.eos or checkpoint.eos)
        self._runner = setup.runner(say)
        self.engine = Engine(self._runner, self.tokenizer, options, self._again)

    def _again(self) -> CompiledRunner:
        """A new runner in place of one whose worker is lost."""
        self._runner.close()
        self._runner = self.setup.runner(lambda words: None)
        return self._runner

    @cached_property
    def plan(self) -> ServingPlan:
        """How it is spread: stages, memory, predicted speed."""
        setup, length = self.setup, self.setup.longest
        nominal = replace(setup.served, blocks=-(-length // BLOCK_SIZE) + 1)
        return described(
            nominal, setup.made, setup.cluster, name=self.name, length=length, prompt=min(256, length)
        )

    def plan_svg(self) -> str | None:
        """Returns the plan's picture."""
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "plan.svg"
            self.plan.picture(str(path))
            return path.read_text(encoding="utf-8")

    def generate(
        self,
        prompt: str | Sequence[str] | Ids,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        num_beams: int = 1,
        num_return_sequences: int = 1,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        ignore_eos: bool = False,
    ) -> Any:
        """Returns what follows the prompts; names and defaults are those of Hugging Face's `generate`.

        Args:
            prompt: a text, or token ids, or a list of either.
            max_new_tokens … early_stopping: as there; `top_k`, `top_p`, `temperature` only if `do_sample`.
            stop: texts at which an answer ends; they are left out.
            seed: the same seed gives the same answers. ignore_eos: go on after the end-of-text token.

        Returns:
            Of a text the text that follows; of ids the prompt's and the new ones. A list of them for a list
            of prompts, or for several answers: all answers to the first prompt first.

        Raises:
            BadInput: an argument out of range, named; a text without a tokenizer.
        """
        sampling = _sampling(**{k: v for k, v in locals().items() if k not in ("self", "prompt")})
        texts, prompts, single = self._prompts(prompt)
        streams = [self.engine.submit(Request(tuple(ids), sampling)) for ids in prompts]
        found = [answer for ids, stream in zip(prompts, streams) for answer in _answers(ids, stream, texts)]
        return found[0] if single and num_return_sequences == 1 else found

    def stream(self, prompt: str | Sequence[int], **options: Any) -> Iterator[Any]:
        """Yields the answer to one prompt as it comes: pieces of text, or token ids for a prompt of ids.

        Args:
            options: as `generate` takes; beams cannot be streamed.
        """
        sampling = _sampling(**_DEFAULTS | options)
        if sampling.num_beams > 1 or sampling.n > 1:
            raise BadInput("one answer is streamed at a time, and none of beams; use generate")
        texts, (ids,), _ = self._prompts(prompt)
        running = self.engine.submit(Request(tuple(ids), sampling))
        try:
            for piece in running:
                _check(piece)
                yield from ([piece.text] if piece.text else []) if texts else piece.token_ids
        finally:
            running.cancel()

    def _prompts(self, prompt: Any) -> tuple[bool, list[list[int]], bool]:
        """Whether it is text, the ids of each prompt, and whether it is one prompt rather than a list."""
        if isinstance(prompt, str):
            return True, [self._encode(prompt)], True
        items = list(prompt)
        if items and isinstance(items[0], str):
            return True, [self._encode(text) for text in items], False
        if items and isinstance(items[0], int | np.integer):
            return False, [[int(i) for i in items]], True
        return False, [[int(i) for i in ids] for ids in items], False

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise BadInput(
                f"{self.name} has no tokenizer, so that it reads token ids only, not {text[:40]!r}"
            )
        return self.tokenizer.encode(text).ids

    def close(self) -> None:
        """Ends what is running and frees the devices."""
        self.engine.close()
        self._runner.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 20, "do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "num_beams": 1,
    "num_return_sequences": 1, "repetition_penalty": 1.0, "length_penalty": 1.0, "early_stopping": False,
    "stop": None, "seed": None, "ignore_eos": False,
}  # fmt: skip


def _sampling(**given: Any) -> Sampling:
    """Hugging Face's names as the engine's."""
    if unknown := sorted(set(given) - set(_DEFAULTS)):
        raise BadInput(f"generate has no option {unknown[0]!r}; it has {', '.join(_DEFAULTS)}")
    beams, sample, stop = given["num_beams"], given["do_sample"], given["stop"]
    if not sample and beams == 1 and given["num_return_sequences"] > 1:
        raise BadInput("several answers need do_sample=True or num_beams > 1: greedy ones are all the same")
    return Sampling(
        max_tokens=given["max_new_tokens"],
        temperature=given["temperature"] if sample else 0.0,
        top_k=given["top_k"] if sample else 0,
        top_p=given["top_p"] if sample else 1.0,
        repetition_penalty=given["repetition_penalty"],
        num_beams=beams,
        n=given["num_return_sequences"],
        length_penalty=given["length_penalty"],
        early_stopping=given["early_stopping"],
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        seed=given["seed"],
        ignore_eos=given["ignore_eos"],
    )


def _answers(prompt: Sequence[int], stream: Stream, texts: bool) -> list[Any]:
    """All answers to a prompt, by index."""
    found: dict[int, list[Output]] = {}
    for piece in stream:
        _check(piece)
        found.setdefault(piece.index, []).append(piece)
    pieces = [found[index] for index in sorted(found)]
    if texts:
        return ["".join(piece.text for piece in each) for each in pieces]
    return [[*prompt, *(token for piece in each for token in piece.token_ids)] for each in pieces]


def _check(piece: Output) -> None:
    from autopar.core.errors import BackendError

    if piece.error is not None:
        raise BackendError(piece.error)
