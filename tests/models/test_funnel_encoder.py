from __future__ import annotations

import pytest
import torch
from model_checks import FUNNELS, made

from regard.contract import BlockMask, Context, Mask, Unsupported
from regard.models import FunnelEncoder


def make_model(**options) -> FunnelEncoder:
    return made("funnel encoder", **options)


def features(rows=1, n=9):
    return torch.randn(rows, n, 2, dtype=torch.float64)


@pytest.mark.parametrize("funnel", FUNNELS, ids=str)
def test_rows_of_every_length_equal_the_same_rows_alone(funnel):
    model = make_model(funnel=funnel, plan="linear", decoder_plan=["softmax", "linear"])
    x, lengths = features(14, 13), torch.arange(14)
    padded = torch.arange(13) >= lengths[:, None]
    x[padded] = torch.nan
    output = model(x, context=Context(mask=Mask(lengths=lengths))).output
    assert output.shape == (14, 13, 3)
    assert (output[padded] == 0).all()
    for row in range(14):
        torch.testing.assert_close(output[row : row + 1, :row], model(x[row : row + 1, :row]).output)


def test_far_tokens_are_seen_through_the_funnel_alone():
    window = ("local", {"window": 1})
    model, x = make_model(plan=[window], decoder_plan=[window], num_layers=None), features(n=30)
    changed = x.clone()
    changed[:, 20] += 1
    difference = (model(x).output - model(changed).output).abs().sum(-1)[0]
    assert (difference > 0).all()
    for name in ("norm_weight", "norm_bias"):
        model.funnel.weights[name].data.zero_()  # the funnel returns nothing
    difference = (model(x).output - model(changed).output).abs().sum(-1)[0]
    assert (difference[:15] == 0).all() and difference[20] > 0


def test_tokens_that_were_pooled_together_keep_their_own_answers():
    model = make_model(funnel={"blocks": 3}, positions="none")  # they must differ without positions
    output = model(features()).output[0]
    assert torch.pdist(output).min() > 1e-6


def test_weights_and_losses_of_all_layers_at_full_length_are_given():
    model = make_model(num_layers=2, decoder_layers=3)
    weights = model(features(), context=Context(want=frozenset({"weights"}))).extras["weights"]
    assert [tuple(w.shape) for w in weights] == [(1, 2, 9, 9)] * 5
    moh = ("mixture_of_heads", {"shared_heads": 1, "active_heads": 1})
    losses = make_model(num_heads=4, plan=[moh], decoder_plan=[moh] * 2).train()(features()).losses
    assert {name: int(count) for name, (_, count) in losses.items()} == {"load_balance": 3}


def test_what_the_funnel_cannot_honour_is_refused():
    model, x = make_model(), features()
    for context, words in (
        (Context(mask=Mask(bias=torch.zeros(1, 1, 9, 9))), "a bias"),
        (Context(mask=Mask(blocks=BlockMask(torch.ones(1, 1, 1, 1, dtype=torch.bool), 16))), "block mask"),
        (Context(grid=(3, 3)), "grid"),
        (Context(roles=torch.zeros(1, 9, dtype=torch.long)), "roles"),
        (Context(positions=torch.arange(9)[None]), "explicit positions"),
    ):
        with pytest.raises(Unsupported, match=words):
            model(x, context=context)
    with pytest.raises(Unsupported, match="floats"):
        model(torch.zeros(2, 3, dtype=torch.long))
