"""Skipped attention, as a lower bound."""

import pytest
import torch
from torch import nn

from regard.contract import Unsupported
from regard.models import LanguageModel, LanguageModelConfig
from regard.training import make_optimizer, skip_attention


def test_a_model_whose_attention_is_skipped_treats_each_token_alone_whatever_it_learns():
    plan = ["softmax", "mamba2", ("clipped_softmax", {"bias": True})]
    model = LanguageModel(LanguageModelConfig(vocab_size=11, dim=16, num_heads=2, plan=plan)).double()
    assert skip_attention(model) == ("blocks.0.mixer", "blocks.2.mixer")
    ids = torch.randint(11, (2, 9))
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, learning_rate=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(ids).backward()
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if not name.startswith(("blocks.0.mixer", "blocks.2.mixer"))}
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    assert all((model.blocks[i].mixer(x).output == 0).all() for i in (0, 2))


def test_a_model_without_attention_layers_has_none_to_skip():
    with pytest.raises(Unsupported, match="kind attention"):
        skip_attention(nn.Linear(2, 2))
