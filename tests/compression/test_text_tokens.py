"""Text encoders that drop tokens on the way: to a given number (PoWER-BERT), or by attention (LTP)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import close, load, recorded_state, refused
from torch import Tensor

import regard
from regard.compression.pruning.anatomy import Cut, find_host
from regard.compression.tokens.text import PrunedTokens

transformers = pytest.importorskip("transformers")


def bert(layers: int = 3) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=30, num_labels=3, initializer_range=0.5, **sizes)
    return transformers.BertForSequenceClassification(config).double().eval()


def padded(rows: int = 3, n: int = 12) -> dict[str, Tensor]:
    mask = torch.ones(rows, n, dtype=torch.int64)
    mask[1, 7:] = 0
    return {"input_ids": torch.randint(30, (rows, n)), "attention_mask": mask}


def logits(model: Any, given: dict[str, Tensor]) -> Tensor:
    return model(**given).logits


def test_all_tokens_or_a_threshold_of_nothing_change_nothing_and_undo_gives_the_model_back():
    for options in ({"counts": [12, 12, 12]}, {"counts": [99, 99, 99]}, {"thresholds": [-1.0, -1.0, -1.0]}):
        model, given = bert(), padded()
        before = logits(model, given).detach()
        pruning = PrunedTokens(model, **options)
        close(logits(model, given).detach(), before)
        assert pruning.kept[-1] == pytest.approx((12 + 7 + 12) / 3)
        pruning.undo()
        close(logits(model, given).detach(), before, 0.0)


def test_so_many_tokens_stay_the_first_among_them_in_their_order():
    model, given = bert(), padded()
    pruning = PrunedTokens(model, counts=[9, 5, 2])
    logits(model, given)
    places = pruning.tokens.places
    assert pruning.tokens.x.shape[1] == 2 and bool((places[:, 0] == 0).all())
    assert bool(((places >= 0).sum(1) == 2).all()) and bool((places[1, 7:] == -1).all()), "padding goes first"


def test_the_tokens_that_stay_are_those_that_the_others_attend_to_most():
    model, given = bert(1), {"input_ids": torch.randint(30, (2, 10))}
    model.set_attn_implementation("eager")
    weights = model(**given, output_attentions=True).attentions[0]
    scores = weights.sum((1, 2)) - weights.diagonal(dim1=2, dim2=3).sum(1)
    scores[:, 0] = torch.inf
    expected = scores.topk(4).indices.sort(1).values
    pruning = PrunedTokens(model, counts=[4])
    logits(model, given)
    assert torch.equal((pruning.tokens.places >= 0).nonzero()[:, 1].view(2, 4), expected)


def test_a_row_is_pruned_by_thresholds_as_if_it_were_alone_and_unpadded():
    model, given = bert(), padded()
    PrunedTokens(model, thresholds=[0.07, 0.1, 0.12])
    together = logits(model, given).detach()
    for row, length in enumerate((12, 7, 12)):
        alone = {name: x[row : row + 1, :length] for name, x in given.items()}
        close(logits(model, alone).detach()[0], together[row])


def test_thresholds_that_rise_leave_fewer_tokens():
    model, given = bert(), padded()
    kept = []
    for threshold in (0.0, 0.08, 0.15, 2.0):
        pruning = PrunedTokens(model, thresholds=[threshold] * 3)
        logits(model, given)
        kept.append(pruning.kept[-1])
        pruning.undo()
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[2] and kept[-1] == 1


def test_soft_thresholds_learn_by_the_penalty_and_soft_counts_too():
    model, given = bert(), padded()
    soft = PrunedTokens(model, thresholds=[0.05] * 3)
    soft.soften(temperature=0.05)
    (logits(model, given).sum() + soft.penalty()).backward()
    assert soft.thresholds is not None and bool((soft.thresholds.grad != 0).all())
    soft.undo()
    counted = PrunedTokens(model, counts=[12, 12, 12])
    before = logits(model, given).detach()
    counted.soften(length=12)
    close(logits(model, given).detach(), before, 1e-6)
    optimizer = torch.optim.SGD([counted.shares], lr=0.02)
    for _ in range(10):
        optimizer.zero_grad()
        counted.penalty().backward()
        optimizer.step()
    counted.harden()
    assert counted.counts == [10, 8, 5], "12 (1 - 0.2 l), rounded up: later layers pay more"


def alone(layers: int, heads: int, width: int, hidden: int) -> Any:
    """A BERT of this shape in float64."""
    sizes = {"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers}
    return transformers.BertModel(transformers.BertConfig(vocab_size=9, num_attention_heads=heads, **sizes)).double()


def through(pruning: PrunedTokens, model: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs of a BERT's layers, and after each of them which of the first tokens are left."""
    left = []
    for layer in model.encoder.layer:
        x = layer(x)
        left.append(pruning.tokens.places[0] >= 0)
    return x, left


def test_power_bert_takes_the_tokens_and_factors_of_the_authors_layers():
    found = load("compression_power_bert")
    x, weights = found["x"].double(), found["weights"].double()
    model = alone(2, 12, 24, 8)
    pruning = PrunedTokens(model, counts=[6, 6])
    pruning.begin(x, None)
    close(pruning.after(0, x, weights), found["hard"].double(), 0.0)
    pruning.soften(length=14)
    assert pruning.shares is not None
    with torch.no_grad():
        pruning.shares[1] = found["shares"]
    pruning.begin(x, None)
    close(pruning.after(1, x, weights)[:, 1:], found["soft"][:, 1:].double(), 1e-7)


def test_ltp_learns_as_the_authors_encoder_does():
    found, model = load("compression_ltp"), alone(3, 3, 12, 20).train(False)
    model.encoder.load_state_dict(recorded_state("compression_ltp"))
    pruning = PrunedTokens(model, thresholds=found["soft_thresholds"].tolist()).double()
    assert pruning.thresholds is not None
    with torch.no_grad():
        pruning.thresholds.copy_(found["soft_thresholds"])
    pruning.soften(temperature=5e-4)
    out, _ = through(pruning, model, found["x"])
    close(out, found["soft_out"], 1e-10)
    close(pruning.penalty(), found["factors"].mean(), 1e-10)
    close(torch.autograd.grad(out, pruning.thresholds, found["grad_out"])[0], found["grad_thresholds"], 1e-10)


@torch.no_grad()
def test_ltp_drops_the_tokens_of_the_authors_encoder_at_thresholds_for_the_tokens_left():
    """The authors divide a token's attention by the length of the input, this project by the number of tokens left."""
    found, model = load("compression_ltp"), alone(3, 3, 12, 20).eval()
    model.encoder.load_state_dict(recorded_state("compression_ltp"))
    kept, n = found["kept"], found["kept"].shape[1]
    before = torch.tensor([n, *kept.sum(1)[:-1].tolist()])
    pruning = PrunedTokens(model, thresholds=(found["hard_thresholds"] * n / before).tolist())
    out, left = through(pruning, model, found["x"])
    assert torch.equal(torch.stack(left), kept)
    close(out[0], found["hard_out"][0, kept[-1]], 1e-10)


def relative(kind: str) -> Any:
    """A classifier that descends from BERT."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=30, num_labels=3, pad_token_id=1, initializer_range=0.5, **sizes
    )
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.parametrize("kind", ["RobertaPreLayerNorm", "Esm", "XLMRobertaXL", "MegatronBert", "RoFormer", "BigBird"])
def test_layers_that_are_not_as_berts_are_refused(kind):
    refused("as BERT's", PrunedTokens, relative(kind), counts=[3, 3])


def test_hard_attention_is_not_softened_by_dropping_tokens():
    model = bert(2)
    undo = find_host(model).compact([Cut(), Cut(hard=2)])
    refused("as BERT's", PrunedTokens, model, counts=[3, 3])
    undo()
    PrunedTokens(model, counts=[3, 3])


def test_a_model_whose_answers_change_although_all_tokens_stay_is_refused():
    model, given = relative("MarkupLM"), padded()  # its mask is -10000 at padding
    before = logits(model, given)
    refused("answers change", regard.compress, model, "tokens:method=power_bert,keep=0.5", [given])
    assert torch.equal(logits(model, given), before)


def test_what_cannot_be_pruned_is_refused():
    model = bert()
    refused("one of the two", PrunedTokens, model)
    refused("numbers for 2 layers", PrunedTokens, model, counts=[3, 2])
    refused("do not come back", PrunedTokens, model, counts=[3, 4, 2])
    refused("length=", PrunedTokens(model, counts=[3, 2, 1]).soften)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=9, **sizes))
    refused("as BERT's", PrunedTokens, llama, counts=[3])
