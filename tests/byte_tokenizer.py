"""A transformers tokenizer whose tokens are the bytes of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save_byte_tokenizer(folder: Path) -> Any:
    """Save a tokenizer of 256 tokens into a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    own = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=own)
    found.save_pretrained(folder)
    return found
