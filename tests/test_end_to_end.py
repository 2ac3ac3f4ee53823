"""The product: a planned, spread step gives the single device's numbers, on every mesh, schedule and model.

Losses of three steps and the last parameters and momenta agree within 1e-5 relative, leaf by leaf (see
`steps.errors`). The default run covers every model, mesh, method, schedule and number of micro-batches, and
the pairs that are likely to interact; the rest of the matrix is marked slow.
"""

import itertools

import pytest

import autopar as ap
from tests.steps import EIGHT, MIXED, alone, assert_equal, case, run

MODELS = (
    *("gpt", "gpt jax.grad", "gpt anonymous", "gpt scan", "gpt scan dropout"),
    *("bert", "vit", "unet", "llama", "llama scan", "moe", "wresnet", "mlp"),
)


def compare(name, cluster, method, **options):
    """Runs a model both ways; returns the plan."""
    of = case(name)
    step = ap.parallelize(of.step, cluster=cluster, method=method, **options)
    plan = step.plan(of.state, of.batches[0])
    assert_equal(run(step, of), alone(name))
    step.close()
    return plan


# -- one stage

QUICK_SPMD = (
    ("gpt", ap.ShardParallel(mesh=(2, 4))),
    ("gpt anonymous", ap.ShardParallel(mesh=(1, 8))),
    ("gpt scan", ap.ShardParallel(mesh=(2, 4))),
    ("moe", ap.ShardParallel(mesh=(2, 4), micro_batches=2)),
    ("wresnet", ap.ShardParallel(mesh=(1, 8))),
    ("mlp", ap.DataParallel(mesh=(1, 8), micro_batches=4)),
    ("mlp", ap.Zero2(mesh=(1, 8))),
    ("mlp", ap.Zero3(mesh=(2, 4), micro_batches=2)),
    ("mlp adamw", ap.ShardParallel(mesh=(2, 4), micro_batches=4)),
    ("gpt", ap.Zero3(mesh=(1, 8), micro_batches=2)),
    ("gpt jax.grad", ap.ShardParallel(mesh=(1, 8), micro_batches=2)),
    ("gpt scan dropout", ap.ShardParallel(mesh=(1, 8), micro_batches=2)),
    ("bert", ap.ShardParallel(mesh=(2, 4))),
    ("vit", ap.ShardParallel(mesh=(2, 4))),
    ("unet", ap.ShardParallel(mesh=(1, 8))),
    ("llama scan", ap.ShardParallel(mesh=(2, 4), micro_batches=2)),
)
METHODS = (ap.ShardParallel, ap.DataParallel, ap.Zero2, ap.Zero3)


def matrix(quick, cases):
    """Returns the quick cases, then the others marked slow."""
    rest = [pytest.param(*c, marks=pytest.mark.slow) for c in cases if c not in quick]
    return [*quick, *rest]


SPMD = matrix(
    QUICK_SPMD,
    [
        (name, method(mesh=mesh, micro_batches=micro))
        for name, method, mesh, micro in itertools.product(MODELS, METHODS, ((1, 8), (2, 4)), (1, 2, 4))
        if method is ap.ShardParallel or micro == 1
    ],
)


def spmd_id(value):
    if isinstance(value, str):
        return value.replace(" ", "-")
    return f"{type(value).__name__}-{'x'.join(map(str, value.mesh))}-{value.micro_batches}"


@pytest.mark.parametrize(("name", "method"), SPMD, ids=spmd_id)
def test_one_stage(name, method):
    plan = compare(name, EIGHT, method)
    assert plan.microbatches == method.micro_batches
    (stage,) = plan.stages
    assert tuple(axis.size for axis in stage.mesh.axes if axis.size > 1) == tuple(
        n for n in method.mesh if n > 1
    )
    assert stage.sharding.collectives, "everything is replicated, so nothing was tested"


# -- stages on unlike devices

QUICK_PIPELINES = (
    ("gpt", 3, "1f1b", 4),
    ("gpt jax.grad", 2, "gpipe", 2),
    ("gpt anonymous", 2, "1f1b", 2),
    ("gpt scan", 3, "gpipe", 1),
    ("moe", 2, "1f1b", 4),
    ("wresnet", 3, "gpipe", 2),
    ("mlp", 3, "gpipe", 4),
    ("mlp", 2, "1f1b", 1),
    ("mlp adamw", 3, "1f1b", 2),
    ("gpt scan dropout", 2, "1f1b", 4),
)
PIPELINES = matrix(
    QUICK_PIPELINES,
    itertools.product(MODELS, (2, 3), ("gpipe", "1f1b"), (1, 2, 4)),
)


@pytest.mark.parametrize(
    ("name", "stages", "schedule", "micro_batches"), PIPELINES, ids=lambda x: str(x).replace(" ", "-")
)
def test_stages_on_the_mixed_cluster(name, stages, schedule, micro_batches):
    method = ap.Auto(stages=stages, schedule=schedule, micro_batches=micro_batches, whole_nodes=True)
    plan = compare(name, MIXED, method)
    assert len(plan.stages) == stages and plan.schedule == schedule and plan.microbatches == micro_batches
    assert all(stage.mesh.size == {"A100-40GB": 4}.get(stage.mesh.device.name, 2) for stage in plan.stages)
