"""The one way this package compiles: machine code cached on disk, the interpreter lock released."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def jit(kernel: Kernel) -> Kernel:
    """Returns a kernel compiled at its first call."""
    return cast(Kernel, numba.njit(cache=True, nogil=True)(kernel))
