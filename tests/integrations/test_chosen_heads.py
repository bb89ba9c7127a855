"""Swapped models compute only the heads that a token chose, with the same result as computing and masking all heads."""

from __future__ import annotations

import pytest
import torch
from models import KEPT, bert, gpt2, ids, llama
from support import watched
from torch import nn

import regard
from regard.engines import attention_forms
from regard.integrations import collect_losses
from regard.integrations.swap import mechanism_in

transformers = pytest.importorskip("transformers")
bridge = pytest.importorskip("regard.integrations.transformers")

QUERY_NORMS = {"router": "query_norm", "shared_heads": 1, "active_heads": 1}
BINARY = {"shared_heads": (0, 2), "active_heads": 1, "gates": "binary"}
WEIGHTED = {"shared_heads": 0, "active_heads": 2}


def computing(compute, make, options):
    """A swapped model in float64, with the same weights at every call."""
    torch.manual_seed(5)
    model = make()
    regard.swap(model, "mixture_of_heads", compute=compute, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double()


def both(make, options):
    return [computing(compute, make, options) for compute in ("dense", "gather")]


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", [QUERY_NORMS, BINARY, WEIGHTED], ids=str)
@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_padded_texts_their_gradients_and_losses(make, options):
    tokens, found = ids(), []
    for model in both(make, options):
        with torch.no_grad():
            plain = model(tokens, attention_mask=KEPT)[0][KEPT.bool()]
        with collect_losses(model) as collected:
            read = model(tokens, attention_mask=KEPT)[0][KEPT.bool()]
        total = read.square().sum() + collected.total({"load_balance": 1.0})
        slopes = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
        found.append([plain, read, collected.total({"load_balance": 1.0}), *slopes])
    for expected, one in zip(*found, strict=True):
        assert (expected is None) == (one is None)
        if expected is not None:
            same(one, expected)


@pytest.mark.parametrize("options", [QUERY_NORMS, WEIGHTED], ids=str)
@pytest.mark.parametrize("make", [llama, gpt2])
@torch.no_grad()
def test_pieces_go_on_from_the_cache(make, options):
    dense, gathered = both(make, options)
    tokens, cache, pieces = ids(), None, []
    for start, end in ((0, 5), (5, 6), (6, 9)):
        result = gathered(tokens[:, start:end], use_cache=True, **{bridge.CACHE: cache})
        cache = getattr(result, bridge.CACHE)
        pieces.append(result.logits)
    same(torch.cat(pieces, 1), dense(tokens, use_cache=False).logits)


def test_attention_of_torch_and_vision_transformers():
    timm = pytest.importorskip("timm")
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    x, image = torch.randn(2, 7, 16).double(), torch.randn(2, 3, 16, 16).double()

    def vit():
        sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4, "num_classes": 3}
        return timm.models.VisionTransformer(**sizes).eval()

    for make, given in ((lambda: nn.TransformerEncoder(layer, 1).eval(), x), (vit, image)):
        dense, gathered = both(make, QUERY_NORMS)
        with torch.no_grad():
            same(gathered(given), dense(given))


@torch.no_grad()
def test_a_model_has_scores_of_the_chosen_heads_alone_and_a_token_keeps_what_it_reads(monkeypatch):
    count = lambda q, k, *rest, **options: q.shape[1] * q.shape[2]  # noqa: E731
    rows = watched(monkeypatch, attention_forms, "attention", count)
    tokens, read = ids(1), []
    for model in both(llama, QUERY_NORMS):
        rows.clear()
        cache = getattr(model(tokens, use_cache=True), bridge.CACHE)
        prompt = sum(rows)
        rows.clear()
        model(tokens[:, :1], use_cache=True, **{bridge.CACHE: cache})
        read.append((prompt, sum(rows)))
    assert read == [(2 * 9 * 4, 2 * 4), (2 * 9 * 2, 2 * 4)]


def test_long_prompts_are_gathered_by_themselves_and_the_option_is_kept(tmp_path):
    model = computing("auto", llama, QUERY_NORMS)
    config = mechanism_in(model.model.layers[0].self_attn).chosen.wrapper_config
    assert config.gathers(4, 600) and not config.gathers(4, 500)
    model = computing("gather", llama, QUERY_NORMS)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert mechanism_in(again.model.layers[1].self_attn).chosen.wrapper_config.compute == "gather"
