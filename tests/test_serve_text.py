"""Text comes in whole characters; joined it is the text of all tokens, and stop strings cut it."""

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from autopar.serve.detokenize import Detokenizer, StopFinder
from tests.serve_fakes import ByteTokenizer


def byte_level() -> Tokenizer:
    """GPT-2's kind: bytes as printable characters, some of several bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    for pair in ("Ġt", "Ġa", "he", "Ã©", "ðŁ"):
        vocabulary[pair] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def sentence_pieces() -> Tokenizer:
    """Llama's kind: words with a mark for the space before, and single bytes for what has no piece."""
    pieces = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for piece in ("▁the", "▁cat", "s", "▁", "é", "▁über", "!"):
        pieces[piece] = len(pieces)
    tokenizer = Tokenizer(models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


KINDS = {"byte level": byte_level(), "sentence pieces": sentence_pieces()}


def utf8_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """A token for each byte of a text."""
    ids = {bytes([b]): tokenizer.token_to_id(f"<0x{b:02X}>") for b in range(256)}
    if None in ids.values():
        ids = {bytes([byte]): tokenizer.token_to_id(c) for byte, c in bytes_to_unicode().items()}
    return [ids[bytes([byte])] for byte in text.encode()]


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes (Radford et al. 2019, encoder.py's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + n) for n, b in enumerate(others)}}


@pytest.mark.parametrize("kind", KINDS)
def test_characters_come_whole(kind):
    tokenizer = KINDS[kind]
    text = "naïve 漢字 👩‍🚀🏽 end €"
    detokenizer, pieces = Detokenizer(tokenizer), []
    for token in utf8_tokens(tokenizer, text):
        pieces.append(detokenizer.add([token]))
    assert [piece for piece in pieces if piece] == list(text)
    assert detokenizer.finish() == ""


def stream(tokenizer: Tokenizer, ids: list[int], sizes: random.Random) -> list[str]:
    detokenizer, pieces, at = Detokenizer(tokenizer), [], 0
    while at < len(ids):
        size = sizes.randint(1, 3)
        pieces.append(detokenizer.add(ids[at : at + size]))
        at += size
    return [*pieces, detokenizer.finish()]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 261), min_size=1, max_size=60), st.randoms(use_true_random=False))
def test_pieces_joined_are_the_whole_text_even_of_nonsense(ids, sizes):
    tokenizer = KINDS["byte level"]
    assert "".join(stream(tokenizer, ids, sizes)) == tokenizer.decode(ids)


@settings(max_examples=150, deadline=None)
@example(items=["0", "0", "\U00010000", "\U00010000"], sizes=random.Random(0))
@given(
    items=st.lists(
        st.one_of(st.characters(codec="utf-8", exclude_characters="�"), st.integers(257, 263)), max_size=40
    ),
    sizes=st.randoms(use_true_random=False),
)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_joined_are_the_whole_text(kind, items, sizes):
    tokenizer = KINDS[kind]
    ids = []
    for item in items:
        ids += (
            utf8_tokens(tokenizer, item)
            if isinstance(item, str)
            else [min(item, tokenizer.get_vocab_size() - 1)]
        )
    assert "".join(stream(tokenizer, ids, sizes)) == tokenizer.decode(ids)


def test_what_cannot_become_a_character_is_not_held_back_for_ever():
    detokenizer = Detokenizer(ByteTokenizer())
    pieces = [detokenizer.add([0xFF]) for _ in range(10)]
    assert "".join(pieces) == "�" * 7 and detokenizer.finish() == "�" * 3


def test_half_a_character_at_the_end_is_what_the_tokenizer_makes_of_it():
    detokenizer = Detokenizer(ByteTokenizer())
    assert detokenizer.add([ord("a"), 0xE2, 0x82]) == "a"
    assert detokenizer.finish() == "�"


def test_a_character_begun_in_the_prompt_comes_whole_and_the_first_space_stays():
    euro = list("€".encode())
    detokenizer = Detokenizer(ByteTokenizer(), context=[ord("x"), *euro[:2]])
    assert detokenizer.add(euro[2:]) == "€"
    tokenizer = KINDS["sentence pieces"]
    the, cat = tokenizer.token_to_id("▁the"), tokenizer.token_to_id("▁cat")
    assert Detokenizer(tokenizer, context=[the]).add([cat]) == " cat"
    assert Detokenizer(tokenizer).add([cat]) == "cat"


def test_long_answers_are_decoded_by_a_short_window():
    class Counting(ByteTokenizer):
        longest = 0

        def decode(self, ids):
            self.longest = max(self.longest, len(ids))
            return super().decode(ids)

    tokenizer = Counting()
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.add([byte]) for byte in b"abcdefghij" * 50)
    assert text == "abcdefghij" * 50 and tokenizer.longest < 40


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text up to the first stop string, straight from the definition."""
    found = sorted((text.find(stop), -len(stop), stop) for stop in stops if stop in text)
    return (text[: found[0][0]], found[0][2]) if found else (text, None)


def test_stop_strings_are_found_across_pieces_and_never_shown():
    finder = StopFinder(["END", "\n\n"])
    assert finder.add("so E") == ("so ", None)
    assert finder.add("N") == ("", None)
    assert finder.add("T") == ("ENT", None)
    assert finder.add("\n") == ("", None)
    assert finder.add("\nmore") == ("", "\n\n")


def test_held_back_text_comes_at_the_end():
    finder = StopFinder(["stop"])
    assert finder.add("don't sto") == ("don't ", None)
    assert finder.finish() == "sto" and finder.finish() == ""


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    st.integers(0, 99),
)
def test_stop_strings_cut_where_they_would_in_the_whole_text(text, stops, seed):
    rng, finder, shown, at = random.Random(seed), StopFinder(stops), "", 0
    seen = ""
    while at < len(text):
        size = rng.randint(1, 3)
        seen += text[at : at + size]
        piece, stop = finder.add(text[at : at + size])
        shown, at = shown + piece, at + size
        if stop is not None:
            assert (shown, stop) == cut(seen, stops)
            return
        assert cut(seen, stops)[1] is None
    assert shown + finder.finish() == text
