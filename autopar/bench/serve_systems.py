"""One serving system in a process of its own: reads jobs as JSON lines, answers with what it measured.

Run as a script by `autopar bench serve`, with whatever interpreter the system is installed in; so it imports
nothing but the standard library and that system.

    python serve_systems.py autopar|transformers|ctranslate2|vllm DIRECTORY THREADS
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

Tokens = list[list[int]]


class Autopar:
    """This project's engine, everything included: scheduling, sampling, text."""

    def __init__(self, directory: str, threads: int):
        import autopar
        from autopar.serve.model import load

        self.version = autopar.__version__
        self.model = load(directory)
        runner: Any = self.model.engine.runner
        runner.wait()  # for the shapes that are compiled while it serves

    def requests(self, prompts: Tokens, new: list[int], after: list[float]) -> list[dict[str, Any]]:
        import threading

        from autopar.serve.request import Request, Sampling

        made = [
            Request(tuple(p), Sampling(max_tokens=n, temperature=0.0, ignore_eos=True))
            for p, n in zip(prompts, new)
        ]
        rows: list[dict[str, Any]] = [{} for _ in made]
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


class Transformers:
    """Hugging Face's generate, one padded batch."""

    def __init__(self, directory: str, threads: int):
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(threads)
        self.torch, self.version = torch, transformers.__version__
        kind = transformers.AutoModelForCausalLM
        self.model = kind.from_pretrained(directory, dtype=torch.float32).eval()

    def requests(self, prompts: Tokens, new: list[int], after: list[float]) -> list[dict[str, Any]]:
        if any(after) or len(set(new)) > 1 or len({len(p) for p in prompts}) > 1:
            raise NotImplementedError("requests of unlike lengths or times: no continuous batching")
        times: list[float] = []
        began = time.monotonic()

        def criterion(ids: Any, scores: Any, **_: Any) -> Any:
            times.append(time.monotonic() - began)
            return self.torch.zeros(len(ids), dtype=self.torch.bool)

        criteria: Any = [criterion]
        with self.torch.inference_mode():
            ids = self.torch.tensor(prompts)
            out = self.model.generate(
                ids, attention_mask=self.torch.ones_like(ids), do_sample=False, max_new_tokens=new[0],
                min_new_tokens=new[0], stopping_criteria=criteria, pad_token_id=1,
            )  # fmt: skip
        return [{"times": times, "tokens": row[ids.shape[1] :].tolist()} for row in out]


class CTranslate2:
    """CTranslate2's generator on the same weights, converted once."""

    def __init__(self, directory: str, threads: int):
        import ctranslate2  # pyright: ignore[reportMissingImports]

        self.version = ctranslate2.__version__
        target = os.path.join(directory, "ctranslate2")
        if not os.path.isdir(target):
            ctranslate2.converters.TransformersConverter(directory).convert(target)
        self.model = ctranslate2.Generator(
            target, device="cpu", intra_threads=threads, compute_type="float32"
        )
        with open(os.path.join(target, "vocabulary.json")) as file:
            self.words = json.load(file)

    def requests(self, prompts: Tokens, new: list[int], after: list[float]) -> list[dict[str, Any]]:
        if any(after) or len(set(new)) > 1:
            raise NotImplementedError("requests of unlike lengths or times: no continuous batching")
        times: dict[int, list[float]] = {k: [] for k in range(len(prompts))}
        began = time.monotonic()

        def seen(step: Any) -> bool:
            times[step.batch_id].append(time.monotonic() - began)
            return False

        results = self.model.generate_batch(
            [[self.words[t] for t in p] for p in prompts], max_length=new[0], min_length=new[0],
            sampling_topk=1, include_prompt_in_result=False, callback=seen,
        )  # fmt: skip
        return [{"times": times[k], "tokens": r.sequences_ids[0]} for k, r in enumerate(results)]


class VLLM:
    """vLLM's engine, CPU build."""

    def __init__(self, directory: str, threads: int):
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import vllm  # pyright: ignore[reportMissingImports]

        self.vllm, self.version = vllm, vllm.__version__
        self.engine = vllm.LLM(
            directory, dtype="float32", skip_tokenizer_init=True, max_model_len=1024, max_num_seqs=64
        ).llm_engine
        self.count = 0

    def requests(self, prompts: Tokens, new: list[int], after: list[float]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = [{"times": [], "tokens": []} for _ in prompts]
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
    """Answers jobs {"prompts", "new", "after"} with {"rows": [{"times", "tokens"}]} or {"error"}."""
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the system prints is no answer
    name, directory, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    try:
        system = SYSTEMS[name](directory, threads)
    except Exception as error:  # of any kind: the benchmark goes on without this system
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)
        return
    print(json.dumps({"version": system.version}), file=answers)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            print(json.dumps({"rows": system.requests(**job)}), file=answers)
        except NotImplementedError as error:
            print(json.dumps({"error": str(error)}), file=answers)


if __name__ == "__main__":
    main()
