"""Compiled programs that outlive the process: JAX's persistent compilation cache, and where it lies."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
from pathlib import Path

import jax

MOST = 2 << 30
"""Bytes that the cache may take; the programs used longest ago go first."""


def keep_compiled(folder: str | Path) -> None:
    """Keeps what this process compiles from now on in a folder, and takes from there what it finds.

    It is JAX's own setting, for the whole process. An entry is known by the program, the devices, the
    compiler's version and its options; a folder that cannot be written only costs the time to compile.
    """
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if importlib.util.find_spec("filelock") is not None:  # without it JAX cannot drop entries
        jax.config.update("jax_compilation_cache_max_size", MOST)


def user_folder() -> Path:
    """Returns the folder in the user's cache for programs compiled on processors like this machine's.

    Programs for a CPU use the instructions that it has, and a home may be shared by unlike machines.
    """
    home = os.environ.get("XDG_CACHE_HOME")
    base = Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache"
    return base / "autopar" / f"compiled-{_processor()}"


def _processor() -> str:
    found = [platform.machine(), platform.processor()]
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            found += [next((line for line in file if line.startswith(("flags", "Features"))), "")]
    except OSError:
        pass
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:12]
