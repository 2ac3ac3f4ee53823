"""Eight host devices for every test, compiled quickly rather than well; set before JAX is imported.

XLA_FLAGS of the caller's come last, so they win: `XLA_FLAGS=--xla_backend_optimization_level=3 pytest …` for
tests that run long.
"""

import importlib.metadata
import os

FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones no longer know the flag
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # they make faster code, but compile half as fast
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", "")])
os.environ["JAX_PLATFORMS"] = "cpu"
