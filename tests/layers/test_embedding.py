"""Factorised embeddings equal one table, the product of the factors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regard.contract import Unsupported
from regard.layers.embedding import FactorisedEmbedding, make_embedding
from regard.models import build_model, count_parameters
from regard.models.encoder import EncoderConfig
from regard.models.encoder_decoder import EncoderDecoderConfig
from regard.models.language_model import LanguageModelConfig

SIZES = {"dim": 16, "num_heads": 2, "num_layers": 1}
MODELS = {
    "language model": lambda width: LanguageModelConfig(30, tie_embeddings=True, embedding_dim=width, **SIZES),
    "encoder": lambda width: EncoderConfig(3, vocab_size=30, embedding_dim=width, **SIZES),
    "encoder-decoder": lambda width: EncoderDecoderConfig(
        30, memory_vocab_size=30, tie_embeddings=True, embedding_dim=width, **SIZES
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_with_factors_is_the_model_with_their_product_and_has_fewer_parameters(kind):
    narrow, wide = (build_model(MODELS[kind](width)).double().eval() for width in (4, None))
    weights = {}
    for name, module in narrow.named_modules():
        if isinstance(module, FactorisedEmbedding):
            weights[f"{name}.weight"] = (module.up(module.table.weight)).detach()
    wide.load_state_dict({n: t for n, t in narrow.state_dict().items() if n in wide.state_dict()} | weights)
    inputs = [torch.randint(30, (2, 6)) for _ in range(2 if kind == "encoder-decoder" else 1)]
    torch.testing.assert_close(narrow(*inputs).output, wide(*inputs).output)
    tables = len(weights)
    assert count_parameters(wide) - count_parameters(narrow) == tables * (30 * 16 - 30 * 4 - 4 * 16)
    with pytest.raises(Unsupported, match="0 to 29"):
        narrow(*[torch.full((1, 3), 30) for _ in inputs])


def test_entries_are_of_size_one_whatever_the_width():
    for width in (None, 2, 64):
        embedding = make_embedding(4000, 256, width)
        assert embedding(torch.arange(4000)).std().item() == pytest.approx(1, abs=0.25)
        assert isinstance(embedding, nn.Embedding) == (width is None)


def test_widths_without_tokens_or_below_one_are_refused():
    with pytest.raises(Unsupported, match="measured features"):
        EncoderConfig(3, features=2, embedding_dim=4)
    with pytest.raises(Unsupported, match="embedding_dim"):
        build_model(LanguageModelConfig(30, embedding_dim=0, **SIZES))
