"""A tokenizer as clients see it: ids, texts, the bytes of a single token."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

from autopar.serve.alphabet import BYTE
from autopar.serve.http.errors import bad

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class Words:
    """What the service asks of a tokenizer.

    Args:
        tokenizer: a `tokenizers.Tokenizer`; None: clients must send ids and get ids.
        special: special tokens' texts by their roles (`bos_token`, …).
    """

    def __init__(self, tokenizer: Any, special: Mapping[str, str]):
        self._tokenizer, self.name = tokenizer, type(tokenizer).__name__
        self.special = {role: special[role] for role in SPECIAL if special.get(role)}
        self.text_of = lru_cache(maxsize=1 << 16)(self._text_of)

    @property
    def tokenizer(self) -> Any:
        """Returns the tokenizer.

        Raises:
            ApiError: 400 if there is none.
        """
        if self._tokenizer is None:
            raise bad("this model has no tokenizer: send token ids, and return_token_ids: true", "prompt")
        return self._tokenizer

    @property
    def vocabulary(self) -> int:
        """Returns how many tokens the tokenizer knows, 0 if there is none."""
        return 0 if self._tokenizer is None else self._tokenizer.get_vocab_size()

    def encode(self, text: str, special: bool, param: str = "prompt") -> list[int]:
        """Returns the token ids of a text.

        Args:
            special: add what the tokenizer puts around a text, such as a beginning-of-text token.
            param: the request's field that the text came from.
        """
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise bad(f"{param} holds half a character (an unpaired surrogate)", param)
        return self.tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Returns the text of token ids."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def check(self, ids: Sequence[int], param: str = "prompt") -> None:
        """Raises a 400 unless the tokenizer knows all ids."""
        for token in ids:
            if not 0 <= token < self.vocabulary:
                raise bad(f"{param} has token id {token}, but ids go from 0 to {self.vocabulary - 1}", param)

    def bytes_of(self, token: int) -> bytes:
        """Returns the bytes that a token stands for; those of a special token are its name."""
        text = None if self._tokenizer is None else self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        if token in self._added:
            return text.encode()
        if self._byte_level:
            return b"".join(BYTE[c] if c in BYTE else c.encode() for c in text)
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", text):
            return bytes([int(byte[1], 16)])
        return text.replace("▁", " ").encode()

    def _text_of(self, token: int) -> str:
        """Returns the text of one token; `bytes:\\xe2\\x80` if it is part of a character, as at OpenAI."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def offsets(self, tokens: Sequence[int], start: int) -> tuple[list[int], int]:
        """Returns (where in the text each token begins, where the last ends), in characters from `start`."""
        decoder, places = codecs.getincrementaldecoder("utf-8")("replace"), list[int]()
        for token in tokens:
            places.append(start)
            start += len(decoder.decode(self.bytes_of(token)))
        return places, start

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self.tokenizer.get_added_tokens_decoder())

    @cached_property
    def _byte_level(self) -> bool:
        """Whether tokens are written in GPT-2's alphabet of bytes."""
        decoder = self.tokenizer.decoder
        return decoder is not None and "ByteLevel" in json.dumps(json.loads(decoder.__getstate__()))
