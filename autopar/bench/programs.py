"""Compiled programs as text, kept by what they were compiled from: equal plans are compiled once."""

from __future__ import annotations

import gzip
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from autopar.bench.score import peak_bytes
from autopar_solver.json_form import write_whole


@dataclass(frozen=True)
class Program:
    """What is judged of a compiled program.

    Attributes:
        text: its scheduled, partitioned HLO. peak: bytes of one device. compiling: seconds it took.
    """

    text: str
    peak: int
    compiling: float


@dataclass
class Programs:
    """Compiled programs by the module they were compiled from, and the options.

    folder: where they are kept between calls, or None: in memory only.
    """

    folder: Path | None = None
    known: dict[str, Program] = field(default_factory=dict)

    def compiled(self, lowered: Any, options: Mapping[str, Any]) -> Program:
        """Returns the program of a `jax.stages.Lowered`, compiled unless it is known."""
        asked = f"{jax.__version__} {sorted(options.items())}\n{lowered.as_text()}"
        key = hashlib.sha256(asked.encode()).hexdigest()[:24]
        if key not in self.known:
            self.known[key] = self._loaded(key) or self._made(key, lowered, options)
        return self.known[key]

    def _loaded(self, key: str) -> Program | None:
        path = None if self.folder is None else self.folder / f"{key}.json.gz"
        if path is None or not path.exists():
            return None
        return Program(**json.loads(gzip.decompress(path.read_bytes())))

    def _made(self, key: str, lowered: Any, options: Mapping[str, Any]) -> Program:
        start = time.perf_counter()
        compiled = lowered.compile(compiler_options=dict(options))
        found = Program(compiled.as_text(), peak_bytes(compiled), time.perf_counter() - start)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            packed = gzip.compress(json.dumps(vars(found)).encode(), compresslevel=4)
            write_whole(str(self.folder / f"{key}.json.gz"), packed)
        return found
