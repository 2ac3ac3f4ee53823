"""A tokenizer for models that have none: random weights, tried by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopar.serve.alphabet import written

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def stand_in(vocabulary: int) -> Tokenizer:
    """Returns a tokenizer of bytes, so that any text can be sent and every answer can be read.

    Texts become the ids of their bytes, 0 to 255. A model with random weights mostly answers with other ids;
    these are written as `⟨id⟩`.

    Args:
        vocabulary: number of ids of the model, at least 256.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    assert vocabulary >= 256, vocabulary
    texts = [bytes([i]) if i < 256 else f" ⟨{i}⟩".encode() for i in range(vocabulary)]
    made = Tokenizer(models.BPE({written(text): i for i, text in enumerate(texts)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return made
