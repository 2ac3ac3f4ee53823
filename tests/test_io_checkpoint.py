"""Checkpoints: what is saved comes back, the newest few are kept, what is broken is refused."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autopar.core.errors import BadInput
from autopar.io.checkpoint import restore_checkpoint, save_checkpoint


class State(NamedTuple):
    step: Any
    params: dict[str, Any]
    key: Any
    empty: Any = None


def state(n: int) -> State:
    return State(jnp.int32(n), {"w": n * jnp.ones((3, 2)), "b": jnp.ones(2, jnp.bfloat16)}, jax.random.key(n))


def test_state_comes_back(tmp_path):
    for n in (1, 2, 3):
        save_checkpoint(tmp_path / "run", n, state(n), keep=2)
    like = jax.eval_shape(lambda: state(0))
    step, found = restore_checkpoint(tmp_path / "run", like)
    assert step == 3 and isinstance(found, State) and found.empty is None
    np.testing.assert_array_equal(found.params["w"], 3 * np.ones((3, 2)))
    assert found.params["b"].dtype == jnp.bfloat16
    assert jax.random.uniform(found.key) == jax.random.uniform(jax.random.key(3))
    assert restore_checkpoint(tmp_path / "run", like, step=2)[0] == 2
    with pytest.raises(BadInput, match=r"no checkpoint of step 1 .* steps there: \[2, 3\]"):
        restore_checkpoint(tmp_path / "run", like, step=1)


def test_what_is_missing_or_unlike_is_refused(tmp_path):
    with pytest.raises(BadInput, match="is not there"):
        restore_checkpoint(tmp_path / "nothing", state(0))
    save_checkpoint(tmp_path, 1, {"w": jnp.ones(3)})
    with pytest.raises(BadInput, match="of another model"):
        restore_checkpoint(tmp_path, {"other": jnp.ones(3)})
