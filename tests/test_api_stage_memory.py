"""What a plan of several stages says its devices hold is what programs and compiled segments hold there."""

import pytest

import autopar as ap
from autopar.models import catalog
from autopar.program import check
from autopar.trace.gradient import value_and_grad

MARGIN = 0.08
"""Share of a device that planners leave free."""


@pytest.mark.parametrize("name", ["gpt-tiny", "moe-tiny"])
def test_micro_batches_in_flight_and_sums_of_gradients_fit_where_the_plan_says(name: str):
    """Weights' gradients are often casts or transposes, which need no memory where nobody sums them."""
    model = catalog.get(name, value_and_grad=value_and_grad)
    method = ap.Auto(micro_batches=4, stages=2)
    step = ap.parallelize(model.step, method=method, cluster="2xV100-16GB,2xV100-16GB")
    plan = step.plan(*model.args)
    with step.compile(*model.args) as executable:
        held, compiled = check(plan.program()), executable.memory()
    for stage, buffers, row in zip(plan.stages, held, compiled, strict=True):
        assert stage.memory.peak / 1.2 < buffers < 1.001 * stage.memory.peak
        assert row.beside > 0 and row.segment.startswith("backward")
        assert buffers < row.peak < (1 + MARGIN) * row.predicted
