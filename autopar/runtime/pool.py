"""State that several programs of one worker share: a served model's parameters and cache.

A prompt and a single token are steps of other shapes, so they are other programs; what they have in common
lies in the registers of the program that needed it last.
"""

from __future__ import annotations

from collections.abc import Mapping

from autopar.core.program import Buffer
from autopar.runtime.interpreter import Interpreter


class Pool:
    """Where each shared buffer is now, and what every program calls it.

    Args:
        interpreter: of the first program, which holds everything in the beginning. Its names are the pool's.
    """

    def __init__(self, interpreter: Interpreter):
        self._last = interpreter
        self._holder = dict.fromkeys(interpreter.worker.state, interpreter)
        self._places: dict[int, dict[Buffer, int]] = {}
        self._join(interpreter, {buffer: buffer for buffer in interpreter.worker.state})

    def join(self, interpreter: Interpreter, names: Mapping[Buffer, Buffer]) -> None:
        """Adds a program. names: buffer of its state → what the first program calls it."""
        self._join(interpreter, {b: names[b] for b in interpreter.worker.state if b in names})

    def _join(self, interpreter: Interpreter, names: Mapping[Buffer, Buffer]) -> None:
        self._places[id(interpreter)] = {name: interpreter.place(b) for b, name in names.items()}

    def take(self, interpreter: Interpreter) -> None:
        """Brings all that a program shares into its registers."""
        if interpreter is self._last:
            return
        for name, place in self._places[id(interpreter)].items():
            holder = self._holder[name]
            if holder is not interpreter:
                interpreter.take(place, holder, self._places[id(holder)][name])
                self._holder[name] = interpreter
        self._last = interpreter
