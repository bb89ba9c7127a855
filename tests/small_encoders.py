from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

transformers = pytest.importorskip("transformers")
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
WORDS = [*SPECIAL.values(), *(f"{a}{b}" for a in "bdfgklm" for b in "aeiou")]
WORK = {"length": 24, "batch_size": 2, "lengths": (32,), "evaluation_blocks": 4, "rate": 0.01}
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def tokenizer():
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL)


def bert(kind="BertForMaskedLM", layers=2, **options):
    """A model with random weights, in which the first layer's attention matters more than the others'."""
    config = transformers.BertConfig(**{**SIZES, **options}, num_hidden_layers=layers)
    return getattr(transformers, kind)(config).eval()


def tokens(n=1200):
    return torch.randint(len(SPECIAL), len(WORDS), (n,))


def text(n=1200, step=3):
    return " ".join(WORDS[len(SPECIAL) + (step * at * at) % 35] for at in range(n))
