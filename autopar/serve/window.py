"""Which decode steps go on from a window: those whose rows are the ones of the step before, one token on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from autopar.api.serving import Loaded, Programs, Shape
from autopar.api.windows import Window
from autopar.serve.batch import SCRATCH, Ints

LEAST_ROWS = 8
"""Rows of the smallest step that has a window: for fewer, gathering is too small a part of a step."""

GREEDY_ROWS = 16
"""Rows from which on there are steps in windows without logits: for fewer, these are too little to write."""


class _Rows(NamedTuple):
    """What a decode step did: where its rows were."""

    shape: Shape
    positions: Ints
    lengths: Ints
    tables: Ints

    def lead_to(self, now: _Rows) -> bool:
        """Whether another step goes on with the same rows; tables may have grown.

        What counts is the blocks, not whose they are: a row of the same blocks has the same keys and values,
        as long as nothing but these steps wrote to the cache.
        """
        return (
            self.shape == now.shape
            and np.array_equal(self.lengths, now.lengths)
            and np.array_equal(self.positions + self.lengths, now.positions)
            and bool(np.all((self.tables == now.tables) | (self.tables == SCRATCH)))
        )


class Windows:
    """Chooses between a step that gathers blocks and the one that goes on from a window of its rows.

    The first step of a group of rows fills a window, those that follow go on from it. To fill it takes no
    longer than to gather, so it does not matter if no step follows. There is one window at a time; its memory
    is kept until another one is filled.

    Args:
        programs: of the model.
        tokens: that a window may hold, all rows together; 0: no windows.
        block_size: tokens in a KV block.
    """

    def __init__(self, programs: Programs, tokens: int, block_size: int):
        self._programs, self._block_size = programs, block_size
        local = getattr(programs.base.session, "local", False)
        one = len(programs.base.made.plan.stages) == 1  # groups of rows take turns on several
        self._tokens = tokens if local and one and programs.served.has_windows else 0
        self._compiled: dict[Shape, Window] = {}
        self._last: _Rows | None = None
        self._filled: Window | None = None  # the one that has memory
        self._held: Window | None = None  # the same, if it holds what the last step left

    def shapes(self, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
        """Returns the steps in windows that go with those of these shapes."""
        found = [
            shape._replace(window=True)
            for shape in shapes
            if shape.new == 1
            and shape.rows >= LEAST_ROWS
            and shape.rows * shape.blocks * self._block_size <= self._tokens
        ]
        return (*found, *(shape._replace(greedy=True) for shape in found if shape.rows >= GREEDY_ROWS))

    def add(self, shape: Shape) -> None:
        """Notes that the step in a window of this shape has been compiled."""
        self._compiled[shape] = Window(self._programs, shape)

    def forget(self) -> None:
        """Notes that something else writes to the cache."""
        self._last = self._held = None

    def step(self, shape: Shape, arrays: tuple[Ints, Ints, Ints, Ints], greedy: bool) -> Loaded | None:
        """Returns the step that goes on from a window with this batch, None if none does.

        Args:
            shape: of the compiled step that the batch's arrays were padded for.
            greedy: the likeliest tokens are enough.
        """
        if shape.new != 1 or not self._tokens:
            self.forget()
            return None
        _, positions, lengths, tables = arrays
        last, self._last = self._last, _Rows(shape, positions, lengths, tables)
        wanted = shape._replace(window=True)
        window = (greedy and self._compiled.get(wanted._replace(greedy=True))) or self._compiled.get(wanted)
        if last is None or not last.lead_to(self._last):
            self._held = None
        if window is not None and self._held is not window:
            if self._filled is not None and self._filled is not window:
                self._filled.drop()
            window.enter(tables, positions)
            self._filled = window
        self._held = window
        return window and window.loaded
