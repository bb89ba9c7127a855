"""Tests specific to adaptive spans: the ramp, its limits, what it learns, and which pairs are skipped."""

from __future__ import annotations

import pytest
import torch
from support import calls, close, qkv

from regard.catalogue import get_mechanism
from regard.contract import Context, Mask, Unsupported
from regard.create import create_layer
from regard.engines import attention_forms
from regard.functional import local_attention, softmax_attention
from regard.mechanisms.adaptive_span import MECHANISM
from regard.models import LanguageModel, LanguageModelConfig

run = calls(MECHANISM)


def inputs(n: int, span: list[float]) -> dict[str, torch.Tensor]:
    given = qkv(n, n)
    return {**given, "span": torch.tensor(span, dtype=torch.float64)[: given["q"].shape[1]]}


def by_hand(given: dict[str, torch.Tensor], ramp: int, longest: int, causal: bool) -> torch.Tensor:
    """The equation, one pair at a time."""
    q, k, v, span = (given[name] for name in ("q", "k", "v", "span"))
    output = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for h in range(q.shape[1]):
        z = min(max(float(span[h]), 0), longest)
        for i in range(q.shape[2]):
            keys = range(i + 1 if causal else k.shape[2])
            m = torch.tensor([min(max((ramp + z - abs(i - j)) / ramp, 0), 1) for j in keys], dtype=q.dtype)
            scores = (q[:, h, i, None] * k[:, h, : len(m)]).sum(-1) * q.shape[-1] ** -0.5
            weights = m * scores.exp()
            shares = weights / weights.sum(-1, keepdim=True)
            output[:, h, i] = (shares[..., None] * v[:, h, : len(m)]).sum(1)
    return output


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
@pytest.mark.parametrize("form", [None, "reference"])
def test_weights_fall_to_nothing_along_the_ramp_behind_the_span_of_each_head(pattern, form):
    given = inputs(21, [2.4, 9.7])
    found = run(given, {"longest": 8, "ramp": 5}, pattern=pattern, form=form).output
    close(found, by_hand(given, 5, 8, pattern == "causal-self"))


def test_a_span_of_all_tokens_is_softmax_and_a_ramp_of_one_is_a_window():
    given = inputs(15, [14.0, 20.0])
    tensors = [given[name] for name in ("q", "k", "v")]
    whole = run(given, {"longest": 20, "ramp": 4}).output
    close(whole, softmax_attention(*tensors, pattern="causal-self"))
    given["span"] = torch.full_like(given["span"], 3.0)
    found = run(given, {"longest": 20, "ramp": 1}).output
    close(found, local_attention(*tensors, pattern="causal-self", window=4))


def test_gradients_reach_the_span_from_the_ramp_alone():
    given = inputs(15, [2.4, 5.6])
    options = {"longest": 12, "ramp": 4}
    weight = torch.randn(1)

    def loss(span):
        return (run({**given, "span": span}, options).output * weight).square().sum()

    assert torch.autograd.gradcheck(loss, given["span"].clone().requires_grad_())
    far = torch.full_like(given["span"], 14.5).requires_grad_()
    (gradient,) = torch.autograd.grad(run({**given, "span": far}, {"longest": 30, "ramp": 4}).output.sum(), far)
    assert not gradient.any()


def test_keys_beyond_the_longest_span_are_not_looked_at(monkeypatch):
    seen = []
    monkeypatch.setattr(
        attention_forms,
        "attention",
        lambda *args, **options: seen.append(options["visibility"]) or (args[2], None, None),
    )
    run(inputs(15, [2.4, 5.6]), {"longest": 12, "ramp": 4})
    assert seen[0].left == 9  # 5.6 + 4 - 9 > 0, 5.6 + 4 - 10 < 0


def test_the_loss_is_the_mean_share_and_shortens_spans_in_training_that_nothing_else_keeps():
    found = run(inputs(9, [3.0, 9.0]), {"longest": 12, "ramp": 4}).losses["span"]
    assert (found[0] / found[1]).item() == pytest.approx((3 + 9) / 24)
    plan = [("adaptive_span", {"longest": 16, "ramp": 2, "initial": 0.5})] * 2
    model = LanguageModel(LanguageModelConfig(11, dim=16, num_heads=2, plan=plan))
    result = model(torch.randint(11, (2, 40)))
    total, count = result.losses["span"]
    assert (total / count).item() == pytest.approx(0.5) and int(count) == 4
    (total / count).backward()
    for block in model.blocks:
        assert (block.mixer.projection.share.grad > 0).all()


def test_a_layer_keeps_its_spans_inside_and_lets_them_return():
    layer = create_layer("adaptive_span", 16, 2, pattern="causal-self", longest=10, ramp=2)
    with torch.no_grad():
        layer.projection.share.copy_(torch.tensor([1.7, -0.4]))
    layer(torch.randn(1, 12, 16)).losses["span"][0].backward()
    assert (layer.projection.share.grad > 0).all()
    found = layer.projection.inputs({}, None)["span"]
    assert found.tolist() == [10.0, 0.0]


def test_the_state_has_the_keys_of_the_longest_span_whatever_is_learned():
    layer = create_layer("adaptive_span", 16, 2, pattern="causal-self", longest=10, ramp=3).eval()
    state = layer(torch.randn(1, 40, 16), context=Context(want=frozenset({"state"}))).state
    assert state.mechanism.k.shape[2] == 12
    assert MECHANISM.config(longest=10, ramp=3).cached == 12


@pytest.mark.parametrize(
    ("options", "words"), [({"longest": 0}, "longest"), ({"ramp": 0}, "ramp"), ({"initial": 2}, "initial")]
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(Unsupported, match=words):
        get_mechanism("adaptive_attention_span").options(**options)


def test_a_bias_of_pairs_with_a_state_is_refused():
    state = run(inputs(4, [1.0, 1.0]), return_state=True).state
    with pytest.raises(Unsupported, match="pairwise bias"):
        run(inputs(1, [1.0, 1.0]), state=state, mask=Mask(bias=torch.zeros(1, 1, 1, 5)))
