"""A directory with an OPT of random weights, as transformers saves it: the same files for every system."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

from autopar.core.errors import BadInput
from autopar.models.opt import OPTConfig
from autopar.models.serving import get_serving
from autopar.serve.stand_in import stand_in


@contextlib.contextmanager
def random_opt(
    name: str = "opt-125m", dtype: str = "float32", device: str = "cpu", text: bool = False
) -> Iterator[str]:
    """Yields a directory with a known OPT's shapes, random weights and a tokenizer.

    Args:
        name: a known OPT. dtype: of the weights. device: "cpu" or "cuda", where they are drawn.
        text: the tokenizer reads any text, byte by byte; else it knows a made-up word for every id.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise BadInput(
            "pass a model's directory, or `pip install 'autopar[peers]'` so that one can be made of random "
            "weights"
        ) from None
    known = get_serving(name).config
    if not isinstance(known, OPTConfig):
        raise BadInput(f"{name} is no OPT; the directories made here are")
    config = transformers.OPTConfig(
        vocab_size=known.vocabulary, max_position_embeddings=known.positions, hidden_size=known.hidden,
        num_hidden_layers=known.layers, num_attention_heads=known.heads,
        ffn_dim=known.inner or 4 * known.hidden, word_embed_proj_dim=known.embedding or known.hidden,
        do_layer_norm_before=not known.post_norm,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            with torch.device(device):
                transformers.OPTForCausalLM(config).save_pretrained(directory)
        finally:
            torch.set_default_dtype(before)
        tokenizer = stand_in(known.vocabulary) if text else _words(known.vocabulary)
        pad, end, unknown = (tokenizer.id_to_token(i) for i in (1, 2, 3))  # as in OPT's own
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token=unknown, bos_token=end, eos_token=end, pad_token=pad
        ).save_pretrained(directory)
        if device == "cuda":
            torch.cuda.empty_cache()  # the systems that are measured need the memory
        yield directory


def _words(vocabulary: int) -> Any:
    """A tokenizer that knows the words t0, t1, …."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return made
