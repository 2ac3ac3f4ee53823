"""Steps that are called as `jax.jit` calls a function: in the caller's own trees, in one hop.

Around a step the runtime takes trees apart, sees which arrays the workers hold already, feeds, runs and puts
the results together: tens of microseconds of Python. None of it is needed where a program is one segment in
this process and arguments may be taken over. Such a segment is compiled for the trees themselves
(`autopar.runtime.trees`), and JAX's dispatch does the rest in C++.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

Array = Any
PATIENCE = 8
"""Calls that may be refused before no more are tried: a refusal costs more than a look at the arguments."""


class Direct:
    """A segment compiled for its function's trees, called by those who hold the arguments.

    Args:
        segment: what was compiled: its `executable` takes the arguments, and takes over those it donates.
    """

    def __init__(self, segment: Any):
        self._segment, self._refused = segment, 0
        self._left: Any = None

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Returns the function's result, or `NotImplemented` for arguments that must be looked at first.

        Those are of other shapes, dtypes or trees than were traced, lie on other devices, or are gone.
        """
        if kwargs or self._refused > PATIENCE:
            return NotImplemented
        try:
            self._left = self._segment.executable(*args)
        except (TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "deleted" not in str(error):
                raise
            self._refused += 1
            return NotImplemented
        return self._left

    def forget(self) -> None:
        """Lets go of the last result."""
        self._left = None

    def held(self) -> list[Array]:
        """Returns the arrays of the last result that nobody took over since."""
        return [x for x in jax.tree.leaves(self._left) if not x.is_deleted()]
