"""Language models on sequences split over virtual ranks: loss and gradients are those of one rank."""

from __future__ import annotations

import pytest
import torch
from support import refused, shaken

from regard.distributed import ContextParallel
from regard.models import LanguageModel, LanguageModelConfig


def model(plan, **options):
    return shaken(LanguageModel(LanguageModelConfig(11, dim=16, plan=plan, num_heads=2, **options)))


@pytest.mark.parametrize("plan", [["softmax"] * 2, ["delta_rule", "softmax"]])
def test_loss_and_gradients_are_those_of_one_rank(plan):
    whole, ids = model(plan), torch.randint(11, (2, 13))
    expected = whole.loss(ids)
    slopes = torch.autograd.grad(expected, list(whole.parameters()))
    parallel = ContextParallel(whole, ranks=3)
    found = parallel.loss(ids)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for one, other in zip(torch.autograd.grad(found, list(whole.parameters())), slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    assert all(over.forward_traffic[0].bytes for _, over in parallel.mixers)
    assert torch.equal(whole.loss(ids), expected)  # its layers are unchanged


def test_models_whose_layers_do_more_are_refused_in_words():
    refused("in other ways", ContextParallel, model(["mamba2"]), ranks=2)
    refused("window", ContextParallel, model([("softmax", {"window": (2, 0)})]), ranks=2)
    refused("grows with the sequence", ContextParallel, model(["sigmoid"]), ranks=2)
    refused("dropout", ContextParallel, model(["softmax"], dropout=0.1), ranks=2)
    biased = ContextParallel(model(["softmax"], positions="alibi"), ranks=2)
    refused("position_bias", biased.loss, torch.zeros(1, 4, dtype=torch.long))
