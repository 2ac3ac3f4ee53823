"""`autopar.Plan`: a plan that prints, draws, simulates, saves and loads itself."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from autopar.core import plan as nouns
from autopar.core.codec import from_data, to_data
from autopar.core.errors import BadInput, PlanError, StalePlan
from autopar.core.graph import Graph
from autopar.core.program import Program
from autopar.core.timeline import Timeline as TimelineNoun
from autopar.program import emit, schedule, simulate
from autopar.sharding.explain import Explanation, explain, find


class Timeline(TimelineNoun):
    """What each worker does when; `save` writes a Chrome trace, `picture` draws it."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a Chrome trace (JSON) to open in chrome://tracing or ui.perfetto.dev."""
        from autopar.report import chrome

        chrome.save(self, os.fspath(path))

    def picture(self, path: str | os.PathLike[str]) -> None:
        """Draws the timeline to an .svg, .png or .pdf file."""
        from autopar.report.picture import timeline_picture

        timeline_picture(self, os.fspath(path))


@dataclass(frozen=True)
class Plan(nouns.Plan):
    """How a step is spread over a cluster; the fields are those of `autopar.core.plan.Plan`."""

    @classmethod
    def of(cls, noun: nouns.Plan, graph: Graph | None = None) -> Plan:
        """Returns the same plan with the verbs; with the step's graph it can explain itself."""
        plan = cls(**{f.name: getattr(noun, f.name) for f in fields(nouns.Plan)})
        object.__setattr__(plan, "_graph", graph)
        return plan

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Returns the plan that `save` wrote.

        Raises:
            PlanError: not there, not JSON or not a plan. StalePlan: written by another version.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"cannot read plan {path}: {error.strerror}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise PlanError(f"{path} is not a plan: {error}") from None
        if not isinstance(data, dict) or data.get("is") != "Plan":
            raise PlanError(f"{path} is JSON, but not a plan that autopar wrote")
        if data.get("version") != nouns.VERSION:
            raise StalePlan(
                f"{path} has plan format {data.get('version')}, but {nouns.VERSION} is needed; plan again"
            )
        try:
            return cls.of(from_data(nouns.Plan, data, str(path)))
        except BadInput as error:
            raise PlanError(f"not a plan that autopar wrote, or edited by mistake: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON: whole, or not at all."""
        target = Path(path)
        part = target.with_name(target.name + ".part")
        part.write_text(json.dumps(to_data(self), separators=(",", ":")), encoding="utf-8")
        os.replace(part, target)

    def explain(self, name: str, alternatives: int = 3) -> Explanation:
        """Returns why a tensor lies as it does: what that costs, what else would, and who decided; print it.

        Args:
            name: tree path of an argument, e.g. "params/Block_3/Dense_0/kernel".
            alternatives: for how many other layouts everything else is planned anew.

        Raises:
            BadInput: no such tensor, or the plan was loaded from a file, without its step.
        """
        graph: Graph | None = getattr(self, "_graph", None)
        if graph is None:
            raise BadInput(
                "a plan from a file does not know its step; ask the plan of "
                "parallelize(step, method=Manual(plan)).plan(*args)"
            )
        v = find(graph, name)
        stages = [s for s, stage in enumerate(self.stages) if v in stage.sharding.layout]
        if not stages:
            raise BadInput(f"{name} is no tensor that a stage keeps: a number, or unused")
        stage = self.stages[stages[0]]
        mine = sorted({e for x in self.segments if x.stage == stages[0] for e in x.equations})
        return explain(graph, mine, stage.sharding, v, stage.memory.in_flight, alternatives)

    def program(self) -> Program:
        """Returns what each worker does in one step."""
        return emit(self, schedule(self.schedule, len(self.stages), self.microbatches))

    def simulate(self) -> Timeline:
        """Returns the predicted timeline of one step: the program that will run, against the cost model."""
        found = simulate(self, self.program())
        return Timeline(found.events, found.workers, found.peak)

    def picture(self, path: str | os.PathLike[str]) -> None:
        """Draws layers × mesh with the communication on it, memory and the timeline to an .svg, .png or .pdf.

        Layers that do the same are drawn once. A plan from a file does not know its step's layers: then the
        stages are drawn.
        """
        from autopar.report.picture import plan_picture

        plan_picture(self, os.fspath(path), self.simulate(), getattr(self, "_graph", None))

    def __str__(self) -> str:
        from autopar.report.text import plan_text

        return plan_text(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))
