"""GPT-2's alphabet, in which byte-level tokenizers write bytes as printable characters."""

from __future__ import annotations


def _alphabet() -> dict[str, int]:
    """Printable bytes stand for themselves, the others for the characters from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE = {character: bytes([number]) for character, number in _alphabet().items()}
"""The byte that each character stands for."""
CHARACTER = {byte: character for character, byte in BYTE.items()}


def written(text: bytes) -> str:
    """Returns bytes in the alphabet."""
    return "".join(CHARACTER[bytes([byte])] for byte in text)
