"""A loaded plan that is called like the function it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autopar.core.errors import BadInput
from autopar.core.plan import Plan
from autopar.core.program import Buffer, Program
from autopar.core.timeline import Timeline
from autopar.runtime.array import Generation
from autopar.runtime.backend import Backend, Session, StageMemory
from autopar.runtime.feeds import Feeder
from autopar.runtime.held import fullest
from autopar.runtime.picks import getter
from autopar.runtime.results import Results, positions_of
from autopar.runtime.signature import Signature
from autopar.runtime.state import State

Array = Any


def load(plan: Plan, program: Program, traced: Any, backend: Backend, donate: bool = False) -> Executable:
    """Returns the plan's executable on a backend.

    Args:
        plan, program: what to run; traced: the function it was made from (`autopar.trace.traced.Traced`).
        backend: who runs it, e.g. `InProcess()`.
        donate: whether arrays passed to a call may be taken over and deleted, as `jax.jit` can.
            Without it they are copied when they are first seen, and stay valid.

    Raises:
        BackendError: the backend cannot be reached or has too few devices.
        PlanError: a layout that cannot be realised.
    """
    return Executable(plan, program, traced, backend.start(plan, program, traced), donate)


class Executable:
    """Runs steps. Calling it starts a step and returns its results without waiting for them.

    State that a call returns is consumed by the call it is passed to; an array that came from elsewhere (the
    first call, a checkpoint, an edit) is copied to where the plan wants it and stays valid.

    Attributes:
        plan, program, traced: what is run. steps: how many were started.
    """

    def __init__(self, plan: Plan, program: Program, traced: Any, session: Session, donate: bool = False):
        self.plan, self.program, self.traced, self.session = plan, program, traced, session
        self.steps = 0
        self._generation, self._timeline = Generation(), Timeline((), ())
        self._signature, leaves = Signature(traced), traced.leaves
        self._batch = getter([k for k, leaf in enumerate(leaves) if leaf.batch])
        self._kept = getter([k for k, leaf in enumerate(leaves) if not leaf.batch])
        self._feeder = Feeder(self._batch(leaves), program)
        self._results = Results(traced.out_leaves, plan.outputs, program, session)
        sizes = {v: value.shape for v, value in enumerate(traced.graph.values)}
        kept = self._kept(leaves)
        self._state = State(kept, replacements(traced, kept), program, session, sizes, donate)
        self._ready = False
        self._direct = session.direct(traced) if donate else None

    def direct(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the step's results in one hop, or `NotImplemented` where there is none for these arguments.

        See `autopar.runtime.direct`: where arrays passed in may be taken over, a step of one segment needs
        nothing else around it.
        """
        if self._direct is None:
            return NotImplemented
        results = self._direct(args, kwargs)
        if results is not NotImplemented:
            self.steps += 1
            self._state.forget()
        return results

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the step's results in the function's own tree.

        Raises:
            BadInput: arguments of another structure, shape or dtype than traced, or state already consumed.
            StageFailed: a stage that failed; the state is lost, so load a checkpoint.
        """
        return self._step(args, kwargs, measured=False)

    def measure(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the step's results, every instruction waited for and timed: see `timeline()`."""
        return self._step(args, kwargs, measured=True)

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any], measured: bool) -> Any:
        leaves = self._signature.flatten(args, kwargs)
        return self._run(leaves, self._feeder(self._batch(leaves)), measured)

    def follows(self, leaves: Sequence[Any], tree: Any) -> bool:
        """Returns whether these are the arguments of a next step: the state that the last call returned, and
        a batch of the shapes that were traced. Cheap: nothing is done per leaf of the state but `is`."""
        return (
            self._signature.plain(tree)
            and self._state.holds(self._kept(leaves))
            and self._feeder.fits(self._batch(leaves))
        )

    def next(self, leaves: Sequence[Any]) -> Any:
        """Returns the results of a step with these leaves, for which `follows` is true."""
        return self._run(leaves, self._feeder.cut(self._batch(leaves)), measured=False)

    def _run(self, leaves: Sequence[Any], feeds: list[Mapping[Buffer, Array]], measured: bool) -> Any:
        if self._direct is not None:
            self._direct.forget()
        try:
            self._prepare(self._kept(leaves))
            self.steps += 1
            self._generation.consumed, self._generation = self.steps, Generation()
            if measured:
                self._timeline = self.session.measure(feeds)
            else:
                self.session.step(feeds)
            results = self._results(self._generation)
        except BadInput:
            raise
        except BaseException:
            self._state.forget()
            self._ready = False
            raise
        self._state.renew(results)
        return self._signature.unflatten(results)

    # -- what a plan became

    def compile(self) -> Executable:
        """Compiles everything ahead of the first step; returns the executable itself."""
        self.session.compile()
        return self

    def hlo(self) -> dict[str, str]:
        """Returns segment name → compiled text."""
        return self.session.hlo()

    def memory(self) -> tuple[StageMemory, ...]:
        """Returns per stage what the compiler says one device needs, beside what the plan predicts."""
        return self.session.compiled_memory()

    def held(self) -> tuple[int, ...]:
        """Returns the bytes held now on the fullest device of each stage."""
        direct = self._direct.held() if self._direct is not None else []
        return (fullest(direct),) if direct else self.session.memory()

    def timeline(self) -> Timeline:
        """Returns what each stage did when, in the last call of `measure`."""
        return self._timeline

    def close(self) -> None:
        """Drops all arrays and stops the workers; results that were not fetched are lost."""
        self.session.close()

    def __enter__(self) -> Executable:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self, state: Sequence[Any]) -> None:
        """Brings constants and state to the workers, as far as they do not hold them already."""
        self._state.update(state)
        if self._ready:
            return
        for s, worker in enumerate(self.program):
            held = {
                b: self.traced.constants[b.value] for b in worker.state if b.value in self.traced.constants
            }
            if held:
                self.session.load(s, held)
        self._ready = True


def replacements(traced: Any, kept: Sequence[Any]) -> list[tuple[int, int]]:
    """Returns (result leaf, kept argument leaf) wherever a result is the next step's argument."""
    graph = traced.graph
    results = {
        o: r for r, positions in enumerate(positions_of(traced.out_leaves, graph.outputs)) for o in positions
    }
    arguments = {v: k for k, leaf in enumerate(kept) for v in leaf.values}
    pairs = ((results.get(o), arguments.get(graph.inputs[i])) for o, i in graph.aliases)
    return sorted({(r, k) for r, k in pairs if r is not None and k is not None})
