"""Checkpoints with orbax: whole or not there at all, the newest few kept, restored into any plan."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autopar.core.errors import BadInput

Tree = Any
KEY_IMPLEMENTATIONS = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}


def save_checkpoint(folder: str | os.PathLike[str], step: int, state: Tree, keep: int = 3) -> Path:
    """Writes the state under folder/step and returns that path.

    A checkpoint appears under its name only when it is complete, so one that a crash interrupts is never
    seen.
    Leaves that live on other devices or processes are brought here, one at a time.

    Args:
        state: any pytree of arrays (`jax.Array`, numpy, or what a plan over several processes returned).
        keep: how many checkpoints to keep; older ones are deleted.
    """
    import orbax.checkpoint as ocp

    with _manager(folder, keep) as manager:
        manager.save(step, args=ocp.args.StandardSave(_to_host(state)), force=True)
    return Path(folder).absolute() / str(step)


def restore_checkpoint(
    folder: str | os.PathLike[str], like: Tree, step: int | None = None
) -> tuple[int, Tree]:
    """Returns (step, state) of the newest checkpoint, or of the given step, as numpy arrays.

    Args:
        like: a tree of arrays or `jax.ShapeDtypeStruct`s with the state's structure, shapes and dtypes.

    Raises:
        BadInput: there is no such checkpoint, or it is of another structure; the message lists what there is.
    """
    import orbax.checkpoint as ocp

    if not Path(folder).is_dir():
        raise BadInput(f"expected a folder of checkpoints, but {folder} is not there")
    with _manager(folder, None) as manager:
        steps = manager.all_steps()
        chosen = manager.latest_step() if step is None else step
        if chosen is None or chosen not in steps:
            raise BadInput(
                f"no checkpoint of step {step} in {folder}; steps there: {sorted(steps) or 'none'}"
            )
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _keys_as_data(like))
        try:
            found = manager.restore(chosen, args=ocp.args.StandardRestore(shapes))
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"the checkpoint of step {chosen} in {folder} is of another model: {error}"
            ) from None
    return chosen, jax.tree.map(_as_key, like, found)


def _manager(folder: str | os.PathLike[str], keep: int | None) -> Any:
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
    return ocp.CheckpointManager(Path(folder).absolute(), options=options)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_host(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if _is_key(x) else x), tree)


def _keys_as_data(tree: Tree) -> Tree:
    """Typed PRNG keys are stored as their data."""
    return jax.tree.map(lambda x: jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x, tree)


def _as_key(like: Any, leaf: Any) -> Any:
    return (
        jax.random.wrap_key_data(leaf, impl=KEY_IMPLEMENTATIONS[str(like.dtype)]) if _is_key(like) else leaf
    )
