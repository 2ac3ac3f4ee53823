"""Text from tokens one at a time: whole characters only, and no part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_BROKEN = "\ufffd"
_CONTEXT = 6
"""Tokens of the prompt that are decoded along, so that the first new token keeps its leading space."""
_PATIENCE = 8
"""Tokens without a whole character after which what they hold is not one."""
_WINDOW = 16
"""Tokens after which the decoded window moves on; decoding costs as much as the window is long."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer (`tokenizers.Tokenizer` has it)."""

    def decode(self, ids: Sequence[int], /) -> str:
        """Returns the text of token ids, special tokens left out; broken UTF-8 becomes U+FFFD."""
        ...


class Detokenizer:
    """The text of a growing list of tokens, in pieces that are never cut inside a character.

    A token may be half a character, and its text may depend on those before it (leading spaces). So a window
    of the last tokens is decoded each time, and what is new at its end is the piece. Replacement characters
    at the end are held back, as they may become a character; all of them, since tokenizers that fall back to
    bytes make one of every byte while a character is incomplete. After too many tokens of that they can't.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        """Args: context: the tokens before, of whose text nothing is returned."""
        self._decode = tokenizer.decode
        self._ids = list(context[-_CONTEXT:])
        self._given = 0  # characters of the window's text that were returned
        self._whole = 0  # tokens of the window up to which its text ended in a whole character
        if self._ids:
            text = self._decode(self._ids)
            self._given = len(text.rstrip(_BROKEN))
            self._whole = len(self._ids) if self._given == len(text) else 0

    def add(self, tokens: Sequence[int]) -> str:
        """Returns the text that is certain now that these tokens have come."""
        return "".join([self._add(token) for token in tokens])  # one by one, not to miss where one is whole

    def _add(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode(self._ids)
        settled = len(text.rstrip(_BROKEN))
        hopeless = len(self._ids) - self._whole > _PATIENCE
        if hopeless:
            settled = max(settled, len(text) - 3)  # the last three bytes may still become one
        piece = text[self._given : settled]
        self._given = max(self._given, settled)
        if settled == len(text):
            self._move(self._whole)
            self._whole = len(self._ids)
        elif hopeless:
            self._move(len(self._ids) - _WINDOW)  # which may cut a character, but there is none in sight
        return piece

    def finish(self) -> str:
        """Returns what was held back; half a character is what the tokenizer makes of it."""
        text = self._decode(self._ids)
        piece = text[self._given :]
        self._given = len(text)
        return piece

    def _move(self, start: int) -> None:
        """Lets the window begin at one of its tokens once it has grown long."""
        if start > 0 and len(self._ids) > _WINDOW:
            held = len(self._decode(self._ids)) - self._given
            self._ids = self._ids[start:]
            self._given = max(0, len(self._decode(self._ids)) - held)
            self._whole = max(0, self._whole - start)


class StopFinder:
    """Finds stop strings in text that comes in pieces, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""

    def add(self, piece: str) -> tuple[str, str | None]:
        """Returns (text that can go out, the stop string that was found or None).

        Of several stop strings the one that begins first counts, and of those that begin together the
        longest; the text goes up to its beginning.
        """
        text = self._held + piece
        found = [(at, -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, _, stop = min(found)
            self._held = ""
            return text[:at], stop
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def finish(self) -> str:
        """Returns what was held back: the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`, but not all of it."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
