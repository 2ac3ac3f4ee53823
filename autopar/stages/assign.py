"""A layer and a phase for every equation: the names that trace found first, dataflow for the rest."""

from __future__ import annotations

from dataclasses import replace

from autopar.core.errors import BadInput
from autopar.core.graph import Graph, Phase
from autopar.stages.backward import backward_layers, shared_sums
from autopar.stages.clustering import cluster_layers
from autopar.stages.draft import Draft
from autopar.stages.forward import end_apart, forward_layers
from autopar.stages.phases import complete_phases
from autopar.stages.update import apply_layers


def assign(
    graph: Graph,
    marked: tuple[bool, ...] | None = None,
    layers: int | None = None,
    least: int = 1,
    ending: bool = False,
) -> Graph:
    """Returns the graph with every equation's phase and layer completed.

    A layer of None in the result means: computed wherever it is used (a mask, a cast of a parameter, a
    counter), or, for a scalar of the apply phase that mixes layers (a global norm), computed on one stage
    (see `cut`). Values whose sum over layers moves to the apply phase hand their entries in `combine` and
    `gradients` on to what they sum.

    Args:
        graph: equations with the layers that names gave (None: unknown).
        marked: per equation, whether its phase is known; None: all are.
        layers: how many layers to make by cost where no equation has one; None: about one per two
            contractions, at most 16, but `least` at least. Ignored where names gave layers.
        least: so many stages will be asked for.
        ending: whether what follows the last named layer may be a layer of its own.

    Raises:
        BadInput: marks of another length, or fewer than one layer asked for.
    """
    if marked is not None and len(marked) != len(graph.equations):
        raise BadInput(f"expected one mark for each of {len(graph.equations)} equations, got {len(marked)}")
    if layers is not None and layers < 1:
        raise BadInput(f"expected at least 1 layer, got {layers}")
    draft = Draft.of(graph)
    named = {i for i, k in enumerate(draft.layer) if k is not None}
    if marked is not None:
        complete_phases(draft, marked)
    if not graph.layers or all(e.layer is None for e in graph.equations):
        draft.graph = replace(graph, layers=cluster_layers(draft, layers, least))
    forward_layers(draft)
    if ending:
        end_apart(draft, named)
    backward_layers(draft)
    shared_sums(draft)
    apply_layers(draft)
    return _hand_on(draft.finish())


def _hand_on(graph: Graph) -> Graph:
    """Replaces entries about per-micro-batch values that are now sums in the apply phase by what they sum."""
    maker = graph.producers()

    def sources(v: int) -> list[int]:
        i = maker.get(v)
        if i is None or graph.equations[i].phase is not Phase.APPLY:
            return [v]
        return [w for operand in graph.equations[i].operands for w in sources(operand)]

    # aliases never lead here: only a moved sum is both combined and made by the apply phase
    combine = {w: how for v, how in graph.combine for w in sources(v)}
    gradients = {w: parameter for v, parameter in graph.gradients for w in sources(v)}
    return replace(graph, combine=tuple(combine.items()), gradients=tuple(gradients.items()))
