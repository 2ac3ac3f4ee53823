"""Parameters in safetensors files: checked by their headers, then read slice by slice."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - makes numpy know bfloat16, which safetensors gives
import numpy as np

from autopar.core.errors import BadInput
from autopar.io.names import Names
from autopar.io.views import View
from autopar.io.weights import Index, Shapes, bounds

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SHOWN = 5
"""How many names of each kind of trouble an error lists."""


@dataclass(frozen=True)
class SafetensorsWeights:
    """Parameters that lie in the safetensors files of a folder; files are opened when first read.

    Args:
        folder: where the files are.
        shapes: as in `WeightSource`.
        views: how each leaf lies in a tensor. files: the file, in `folder`, of each of those tensors.
    """

    folder: str
    shapes: Shapes
    views: Mapping[str, View]
    files: Mapping[str, str]
    _open: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def read(self, path: str, index: Index | None = None, dtype: Any = None) -> np.ndarray:
        leaf, view = self.shapes[path], self.views[path]
        stored = self._file(self.files[view.tensor]).get_slice(view.tensor)
        spans = bounds(index, leaf.shape)
        if any(start == stop for start, stop in spans):
            return np.empty([stop - start for start, stop in spans], leaf.dtype if dtype is None else dtype)
        return view.read(stored, leaf.shape, spans).astype(leaf.dtype if dtype is None else dtype)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = _open_file(Path(self.folder) / name)
        return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


def open_safetensors(folder: str | Path, names: Names, shapes: Shapes) -> SafetensorsWeights:
    """Returns the parameters in a folder's safetensors files; only headers are read.

    Args:
        folder: with `model.safetensors`, shards and their index, or any `*.safetensors`.
        names: the family's table.
        shapes: the leaves that are wanted, by path.
    Raises:
        BadInput: no such files, unreadable ones, or tensors missing, left over or of another shape: all of
            them in one message.
    """
    folder = Path(folder)
    stored = _headers(folder, _shards(folder))
    prefix = _prefix(names, stored, folder)
    views = {path: names.view(path, prefix) for path in shapes}
    wanted = {view.tensor for view in views.values()}
    missing = sorted(wanted - set(stored))
    extra = sorted(t for t in set(stored) - wanted if not names.ignores(t))
    misshaped = [
        f"{view.tensor} {stored[view.tensor][1]} for {view.stored_shape(shapes[path].shape)}"
        for path, view in views.items()
        if view.tensor in stored and stored[view.tensor][1] != view.stored_shape(shapes[path].shape)
    ]
    trouble = {"missing": missing, "unknown": extra, "of another shape than config.json says": misshaped}
    if any(trouble.values()):
        told = "; ".join(f"{len(t)} {what}: {_some(t)}" for what, t in trouble.items() if t)
        raise BadInput(f"the tensors in {folder} are not those of its config.json: {told}")
    return SafetensorsWeights(str(folder), shapes, views, {t: stored[t][0] for t in wanted})


def _shards(folder: Path) -> list[str]:
    """Returns the names of the folder's safetensors files."""
    index = folder / INDEX
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    if index.is_file():
        try:
            listed = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise BadInput(f"{index} cannot be read as an index of shards: {error!r}") from None
        if lost := [name for name in listed if name not in found]:
            raise BadInput(
                f"{folder} lacks {len(lost)} of the {len(listed)} shards in its index: {_some(lost)}"
            )
        return listed
    if found:
        return found
    if pickles := sorted(p.name for pattern in PICKLES for p in folder.glob(pattern)):
        raise BadInput(
            f"{folder} has its weights in {_some(pickles)}. Such files are pickles: opening one can run any "
            "code that is in it, so they are not read here. Where you trust the file, convert it with "
            "transformers: "
            f'python -c "from transformers import AutoModelForCausalLM as M; '
            f'M.from_pretrained({shlex.quote(str(folder))}).save_pretrained({shlex.quote(str(folder))})"'
        )
    raise BadInput(f"no *.safetensors in {folder}; expected model.safetensors, or shards with {INDEX}")


def _headers(folder: Path, files: list[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns file and shape of each tensor."""
    stored = {}
    for name in files:
        file = _open_file(folder / name)
        for tensor in file.keys():  # noqa: SIM118 - no dictionary
            stored[tensor] = name, tuple(file.get_slice(tensor).get_shape())
    return stored


def _prefix(names: Names, stored: Mapping[str, Any], folder: Path) -> str:
    for prefix in names.prefixes:
        if names.view(names.anchor, prefix).tensor in stored:
            return prefix
    want = " or ".join(names.view(names.anchor, prefix).tensor for prefix in names.prefixes)
    raise BadInput(f"expected a tensor {want} in {folder}, but it has {_some(sorted(stored)) or 'none'}")


def _open_file(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise BadInput('opening it needs safetensors; install it: pip install "autopar[serve]"') from None
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} cannot be read as safetensors ({error}); is it complete?") from None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
