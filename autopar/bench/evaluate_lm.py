"""One run of lm-eval in a process of its own: what it is asked comes as JSON, and so goes what it found.

Run as a script by `autopar bench evaluate`, with whatever interpreter lm-eval is installed in; so it imports
nothing but the standard library and lm-eval.

    python evaluate_lm.py JSON

JSON has "tasks" (a folder), "names", "model" ("hf" or "local-completions") and "arguments" of that model.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def run(tasks: str, names: list[str], model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns lm-eval's metrics by task, and what the model answered to each request, in order."""
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = TaskManager(include_path=tasks, include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=names, task_manager=manager, batch_size=1, log_samples=True
    )
    answers = {
        name: [x["resps"] for x in sorted(found["samples"][name], key=lambda x: x["doc_id"])]
        for name in names
    }
    return {"version": lm_eval.__version__, "results": found["results"], "answers": answers}


def main() -> None:
    """Answers the request in the first argument."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what lm-eval prints is no answer
    print(json.dumps(run(**json.loads(sys.argv[1])), default=str), file=answers)


if __name__ == "__main__":
    main()
