"""Host devices that stand in for GPUs, so that a plan for a cluster runs on a laptop."""

from __future__ import annotations

import os
import re
import sys

from autopar.core.errors import BadInput

_FLAG = "--xla_force_host_platform_device_count"


def emulate(devices: int) -> None:
    """Makes this process see `devices` CPU devices; call it before the first use of JAX.

    Raises:
        BadInput: JAX is already running with fewer devices.
    """
    jax = sys.modules.get("jax")
    bridge = sys.modules.get("jax._src.xla_bridge")
    if jax is not None and bridge is not None and getattr(bridge, "_backends", None):
        if len(jax.devices()) < devices:
            raise BadInput(
                f"JAX already runs with {len(jax.devices())} devices; call autopar.emulate({devices}) before "
                f"anything uses JAX, or set XLA_FLAGS={_FLAG}={devices}"
            )
        return
    flags = re.sub(rf"{_FLAG}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}={devices}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if jax is not None:  # imported before, when it read the variable
        jax.config.update("jax_platforms", "cpu")
