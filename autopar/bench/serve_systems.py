"""One serving system in a process of its own: reads jobs as JSON lines, answers with what it measured.

Run as a script by `autopar bench serve`, with whatever interpreter the system is installed in; so it imports
nothing but the standard library and that system.

    python serve_systems.py autopar|transformers|ctranslate2|vllm DIRECTORY THREADS [OPTIONS]

OPTIONS is JSON: "device" ("cpu" or "cuda") and "dtype"; and "rows", "prompt" and "new" if no other numbers of
requests and tokens will come, so that no more is compiled and kept.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Tokens = list[list[int]]
Rows = list[dict[str, Any]]
TOGETHER = 32
"""Requests that a system without continuous batching takes at once."""


class Autopar:
    """This project's engine, everything included: scheduling, sampling, text."""

    def __init__(
        self, directory: str, threads: int, device: str = "cpu", dtype: str = "float32", **expected: Any
    ):
        os.environ["JAX_PLATFORMS"] = device
        import jax

        import autopar
        from autopar.serve.model import load

        self.version = autopar.__version__
        kind, rate = jax.devices()[0].device_kind, _read_rate(dtype) if expected else None
        self.about = {"device": kind, "bytes_per_second": rate}
        self.model = load(directory, dtype=dtype, **_limits(**expected) if expected else {})
        runner: Any = self.model.engine.runner
        runner.wait()  # for the shapes that are compiled while it serves

    def requests(self, prompts: Tokens, new: list[int], after: list[float]) -> Rows:
        import threading

        from autopar.serve.request import Request, Sampling

        made = [
            Request(tuple(p), Sampling(max_tokens=n, temperature=0.0, ignore_eos=True))
            for p, n in zip(prompts, new)
        ]
        rows: Rows = [{} for _ in made]
        began = time.monotonic()

        def read(k: int, stream: Any) -> None:
            times, tokens = [], []
            for piece in stream:
                times += [time.monotonic() - began] * len(piece.token_ids)
                tokens += piece.token_ids
            rows[k] = {"times": times, "tokens": tokens}

        readers = []
        for at, group in _together(after):
            time.sleep(max(0.0, at - (time.monotonic() - began)))
            for k, stream in zip(group, self.model.engine.submit_all([made[k] for k in group])):
                readers.append(threading.Thread(target=read, args=(k, stream)))
                readers[-1].start()
        for reader in readers:
            reader.join()
        return rows


def _limits(rows: list[int], prompt: int, new: int) -> dict[str, Any]:
    """What `load` needs to know to compile no more than the steps of such requests."""
    from autopar.serve.runner import Buckets

    blocks = -(-(prompt + new) // 16)
    buckets = Buckets(tuple(rows), (prompt,), (blocks,), tokens=max(prompt, min(8192, rows[-1] * prompt)))
    longest = 16 * blocks
    return {"max_length": longest, "tokens": rows[-1] * longest, "buckets": buckets, "behind": False}


def _read_rate(dtype: str) -> float:
    """Bytes per second that a matrix-vector product reads on the device: what bounds decoding."""
    import jax
    import jax.numpy as jnp

    side = 2048 if jax.default_backend() == "cpu" else 16384
    matrix, x = jnp.ones((side, side), dtype), jnp.ones(side, dtype)
    product = jax.jit(lambda matrix, x: matrix @ x)
    best = float("inf")
    for _ in range(20):
        jax.block_until_ready(product(matrix, x))
        began = time.perf_counter()
        jax.block_until_ready([product(matrix, x) for _ in range(10)])
        best = min(best, (time.perf_counter() - began) / 10)
    return matrix.nbytes / best


class Transformers:
    """Hugging Face's generate: what waits goes together, as one padded batch."""

    def __init__(self, directory: str, threads: int, device: str = "cpu", dtype: str = "float32", **_: Any):
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(threads)
        self.torch, self.version = torch, transformers.__version__
        kind, self.device = transformers.AutoModelForCausalLM, device
        self.model = kind.from_pretrained(directory, dtype=getattr(torch, dtype)).to(device).eval()

    def requests(self, prompts: Tokens, new: list[int], after: list[float]) -> Rows:
        return _in_batches(after, lambda chosen, began: self._batch(prompts, new, chosen, began))

    def _batch(self, prompts: Tokens, new: list[int], chosen: list[int], began: float) -> Rows:
        torch, times = self.torch, list[float]()

        def criterion(ids: Any, scores: Any, **_: Any) -> Any:
            if self.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.monotonic() - began)
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        criteria: Any = [criterion]
        width, most = max(len(prompts[k]) for k in chosen), max(new[k] for k in chosen)
        padded = [[1] * (width - len(prompts[k])) + prompts[k] for k in chosen]
        real = [[0] * (width - len(prompts[k])) + [1] * len(prompts[k]) for k in chosen]
        with torch.inference_mode():
            out = self.model.generate(
                torch.tensor(padded, device=self.device),
                attention_mask=torch.tensor(real, device=self.device), do_sample=False, max_new_tokens=most,
                min_new_tokens=most, stopping_criteria=criteria, pad_token_id=1,
            )  # fmt: skip
        answers = [row[width:].tolist() for row in out]
        return [{"times": times[: new[k]], "tokens": a[: new[k]]} for k, a in zip(chosen, answers)]


class CTranslate2:
    """CTranslate2's generator on the same weights, converted once; what waits goes together."""

    def __init__(self, directory: str, threads: int, device: str = "cpu", dtype: str = "float32", **_: Any):
        import ctranslate2  # pyright: ignore[reportMissingImports]

        self.version = ctranslate2.__version__
        target = os.path.join(directory, "ctranslate2")
        if not os.path.isdir(target):
            ctranslate2.converters.TransformersConverter(directory).convert(target)
        self.model = ctranslate2.Generator(target, device=device, intra_threads=threads, compute_type=dtype)
        with open(os.path.join(target, "vocabulary.json")) as file:
            self.words = json.load(file)

    def requests(self, prompts: Tokens, new: list[int], after: list[float]) -> Rows:
        return _in_batches(after, lambda chosen, began: self._batch(prompts, new, chosen, began))

    def _batch(self, prompts: Tokens, new: list[int], chosen: list[int], began: float) -> Rows:
        times = [list[float]() for _ in chosen]

        def seen(step: Any) -> bool:
            times[step.batch_id].append(time.monotonic() - began)
            return False

        most = max(new[k] for k in chosen)
        results = self.model.generate_batch(
            [[self.words[t] for t in prompts[k]] for k in chosen], max_length=most, min_length=most,
            sampling_topk=1, include_prompt_in_result=False, callback=seen,
        )  # fmt: skip
        answers = [result.sequences_ids[0] for result in results]
        return [
            {"times": t[-most:][: new[k]], "tokens": a[: new[k]]} for k, t, a in zip(chosen, times, answers)
        ]


class VLLM:
    """vLLM's engine, CPU build."""

    def __init__(self, directory: str, threads: int, device: str = "cpu", dtype: str = "float32", **_: Any):
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import vllm  # pyright: ignore[reportMissingImports]

        self.vllm, self.version = vllm, vllm.__version__
        self.engine = vllm.LLM(
            directory, dtype=dtype, skip_tokenizer_init=True, max_model_len=1024, max_num_seqs=64
        ).llm_engine
        self.count = 0

    def requests(self, prompts: Tokens, new: list[int], after: list[float]) -> Rows:
        rows: Rows = [{"times": [], "tokens": []} for _ in prompts]
        waiting = _together(after)
        known: dict[str, int] = {}
        began = time.monotonic()
        while waiting or self.engine.has_unfinished_requests():
            now = time.monotonic() - began
            if waiting and not known and now < waiting[0][0]:
                time.sleep(min(0.001, waiting[0][0] - now))
            while waiting and waiting[0][0] <= now:
                for k in waiting.pop(0)[1]:
                    self.count += 1
                    known[str(self.count)] = k
                    wanted = self.vllm.SamplingParams(
                        temperature=0, max_tokens=new[k], ignore_eos=True, detokenize=False
                    )
                    prompt = {"prompt_token_ids": prompts[k]}
                    self.engine.add_request(str(self.count), prompt, wanted)
            for out in self.engine.step() if self.engine.has_unfinished_requests() else ():
                row, tokens = rows[known[out.request_id]], list(out.outputs[0].token_ids)
                row["times"] += [time.monotonic() - began] * (len(tokens) - len(row["tokens"]))
                row["tokens"] = tokens
                if out.finished:
                    known.pop(out.request_id)
        return rows


def _in_batches(after: list[float], run: Callable[[list[int], float], Rows]) -> Rows:
    """Returns the rows of requests that come over time, of a system that takes all that wait as one batch.

    Args:
        run: (indices, when it all began) → their rows.
    """
    rows, began = dict[int, dict[str, Any]](), time.monotonic()
    waiting = sorted(range(len(after)), key=lambda k: after[k])
    while waiting:
        now = time.monotonic() - began
        chosen = [k for k in waiting if after[k] <= now][:TOGETHER]
        if chosen:
            rows |= dict(zip(chosen, run(chosen, began)))
            waiting = [k for k in waiting if k not in rows]
        else:
            time.sleep(min(0.001, after[waiting[0]] - now))
    return [rows[k] for k in range(len(after))]


def _together(after: list[float]) -> list[tuple[float, list[int]]]:
    """Returns (seconds, indices) of requests that come at the same time, in order."""
    groups: dict[float, list[int]] = {}
    for k, at in enumerate(after):
        groups.setdefault(at, []).append(k)
    return sorted(groups.items())


SYSTEMS = {"autopar": Autopar, "transformers": Transformers, "ctranslate2": CTranslate2, "vllm": VLLM}


def _end_with_parent() -> None:
    """Asks Linux to kill this process when the benchmark ends in any way: it may be stopped."""
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal, kill = 1, 9
        ctypes.CDLL(None).prctl(set_parent_death_signal, kill)


def main() -> None:
    """Answers jobs {"prompts", "new", "after"} with {"rows": [{"times", "tokens"}]}."""
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the system prints is no answer
    name, directory, threads, *more = sys.argv[1:]
    try:
        system = SYSTEMS[name](directory, int(threads), **json.loads(more[0] if more else "{}"))
    except Exception as error:  # of any kind: the benchmark goes on without this system
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)
        return
    print(json.dumps({"version": system.version, **getattr(system, "about", {})}), file=answers)
    for line in sys.stdin:
        print(json.dumps({"rows": system.requests(**json.loads(line))}), file=answers)


if __name__ == "__main__":
    main()
