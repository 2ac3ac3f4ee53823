"""OPT-175B planned for four clusters nobody else would use, and the same code serving OPT-125m here.

Nothing of OPT-175B is allocated. Then a small OPT, from a directory in Hugging Face's format or with random
weights, is spread over three emulated nodes of unlike devices, in processes of their own, and its tokens are
compared with a single device's. Run it with `python examples/serve_opt175b.py`; pictures go to out/.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import autopar
from autopar.cli.plan_serving import plan_serving
from autopar.core.errors import DoesNotFit
from autopar.report.serving import rate, serving_picture
from autopar.report.units import seconds, size
from autopar.serve import Buckets, ServingPlan

CLUSTERS = (
    "22xV100-16GB",
    "32xV100-16GB",
    "8xA100-40GB,8xA10G",
    "8xV100-16GB,8xT4,8xA100-40GB",
)
SMALL = "1xA100-40GB,1xV100-16GB,1xT4"
PROMPTS = [[2, 133, 12, 9, 147, 16], [2, 100, 52], [2, 113, 16, 10, 129, 6, 8, 24, 16, 10, 205, 65]]
CONSOLE = Console(highlight=False, soft_wrap=True)


def plans(name: str) -> list[ServingPlan]:
    """Returns a serving plan for each cluster that is large enough; says what the others lack."""
    found = []
    for cluster in CLUSTERS:
        began = time.monotonic()
        try:
            found.append(plan_serving(name, cluster))
            CONSOLE.print(f"{cluster}: planned in {time.monotonic() - began:.1f} s")
        except DoesNotFit as error:
            CONSOLE.print(f"{cluster}: refused in {time.monotonic() - began:.1f} s: {error}")
    return found


def side_by_side(found: list[ServingPlan]) -> Table:
    """Returns a table with a column per plan."""
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("")
    for plan in found:
        table.add_column(plan.cluster.replace(", 25 Gbps between nodes", ""), overflow="fold")
    stages = [[(x.stop - x.start, str(x.mesh)) for x in plan.decode.stages] for plan in found]
    rows = {
        "layers on": ["\n".join(f"{n} on {mesh}" for n, mesh in each) for each in stages],
        "weights per device": ["\n".join(size(r.weights) for r in plan.rooms) for plan in found],
        "cache per device": ["\n".join(size(plan.blocks * r.block) for r in plan.rooms) for plan in found],
        "cache": [f"{plan.tokens:,} tokens" for plan in found],
        "first token": [f"{seconds(plan.time_to_first_token)} after {plan.prompt} tokens" for plan in found],
        "one sequence": [f"{rate(plan.single)} tokens/s" for plan in found],
        "full": [f"{rate(plan.most)} tokens/s" for plan in found],
        "slowest link": [
            "–" if (link := plan.slowest_link) is None else f"{rate(link[1] * 8 / 1e9)} Gbps"
            for plan in found
        ],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def run(directory: str | None, model: str, tokens: int) -> None:
    """Serves a small OPT over three emulated nodes and on one device, and compares."""
    given = {"model": directory} if directory else {"model": model, "weights": "random"}
    buckets = Buckets(rows=(4,), new=(16,), blocks=(8,), tokens=64)
    common = {"max_length": 128, "tokens": 1024, "dtype": "float32", "buckets": buckets, "behind": False}
    answers = []
    for cluster, backend, stages in ((SMALL, autopar.Ray(emulate=True), 3), (None, None, None)):
        began = time.monotonic()
        with autopar.serve.load(**given, **common, cluster=cluster, backend=backend, stages=stages) as served:
            CONSOLE.print(f"\n{served.plan}\nready after {time.monotonic() - began:.0f} s")
            answers.append(served.generate(PROMPTS, max_new_tokens=tokens, ignore_eos=True))
            for prompt, ids in zip(PROMPTS, answers[-1]):
                CONSOLE.print(f"  {len(prompt)} tokens → {ids[len(prompt) :]}")
    assert answers[0] == answers[1], "the stages' tokens differ from a single device's"
    CONSOLE.print("\nthree unlike stages and a single device generate the same tokens")


def main() -> None:
    """Plans, draws, runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "directory", nargs="?", help="an OPT in Hugging Face's format; random weights without"
    )
    parser.add_argument("--model", default="opt-125m", help="what to run with random weights")
    parser.add_argument("--plan", default="opt-175b", help="what to plan")
    parser.add_argument("--tokens", type=int, default=16, help="to generate for each prompt")
    parser.add_argument("--out", default="out/serve_opt175b", help="folder for pictures")
    options = parser.parse_args()
    found = plans(options.plan)
    CONSOLE.print(side_by_side(found))
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in ("svg", "png"):
        serving_picture(found, str(folder / f"plans.{suffix}"))
    CONSOLE.print(f"pictures: {folder}/plans.svg, plans.png")
    run(options.directory, options.model, options.tokens)


if __name__ == "__main__":
    main()
