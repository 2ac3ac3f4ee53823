"""Real text that is on every machine, as deterministic batches of bytes."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autopar.core.errors import BadInput


def standard_library(limit: int = 4_000_000, folder: str | Path | None = None) -> bytes:
    """Returns the Python standard library's own source, `.py` files in the order of their paths, joined.

    Installed packages and tests are left out, so the same Python gives the same text whatever is installed.

    Args:
        limit: most bytes to return.
        folder: where to look, instead of `sysconfig.get_path("stdlib")`.
    Raises:
        BadInput: when the folder has no `.py` file.
    """
    root = Path(folder or sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    text, found = bytearray(), False
    for path in sorted(root.rglob("*.py")):
        if len(text) >= limit:
            break
        if skipped.isdisjoint(path.relative_to(root).parts):
            text += path.read_bytes()
            found = True
    if not found:
        raise BadInput(f"no Python source below {root}; pass another folder")
    return bytes(text[:limit])


@dataclass(frozen=True)
class ByteDataset:
    """Returns batches of bytes as tokens, by index.

    The same index gives the same batch in any process, so training can go on at any step.

    Args:
        text: at least `sequence + 1` bytes.
        sequence: tokens per example.
        batch: examples per batch.
        seed: another seed, other batches.
    Raises:
        BadInput: when the text is too short.
    """

    text: bytes
    sequence: int
    batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.text) <= self.sequence:
            raise BadInput(
                f"a text of {len(self.text)} bytes holds no example of {self.sequence} tokens and a target; "
                f"pass at least {self.sequence + 1} bytes or a shorter sequence"
            )

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns batch `index` (0, 1, …, without end): `tokens` and `targets`, `[batch, sequence]` int32.

        The targets are the tokens one to the right. Examples start at random places, drawn with replacement.
        """
        if index < 0:
            raise IndexError(f"a batch index counts from 0, but got {index}")
        starts = np.random.default_rng((self.seed, index)).integers(
            0, len(self.text) - self.sequence, self.batch
        )
        text = np.frombuffer(self.text, np.uint8)
        rows = text[starts[:, None] + np.arange(self.sequence + 1)].astype(np.int32)
        return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}
