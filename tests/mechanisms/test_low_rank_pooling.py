"""Tests specific to low-rank pooling: its scores, reductions, streams, and parity with a known implementation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import calls, close, load, refused
from torch import Tensor, nn

from regard import Context, Mask, create_layer
from regard.contract import BlockMask, Result
from regard.mechanisms.low_rank_pooling import MECHANISM, slot_logits
from regard.models import Encoder, EncoderConfig

run = calls(MECHANISM, "noncausal-self")


def sample(n: int = 9, slots: int = 3, rank: int = 1, width: int = 6) -> dict[str, Tensor]:
    shapes = {"x": (2, n, 6), "p": (width, slots, rank), "q": (6, slots, rank), "c": (width,)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def pool(inputs: dict[str, Tensor], mask: Mask | None = None, **options: Any) -> Result:
    given = {name: x for name, x in inputs.items() if name != "c" or options.get("context", "learned") == "learned"}
    return run(given, options, mask=mask, want=("weights",))


def make_layer(dim: int = 6, heads: int = 3, pattern: str = "noncausal-self", **options: Any) -> nn.Module:
    return create_layer("lama", dim, heads, pattern=pattern, **options).double()


@pytest.mark.parametrize("name", ["low_rank_pooling", "low_rank_pooling_linear", "low_rank_pooling_masked"])
def test_equals_the_known_implementation(name):
    data = load(name)
    inputs = {"x": data["x"], "p": data["weight_p"][..., None], "q": data["weight_q"][..., None]}
    valid = data.get("mask")
    activation = None if name.endswith("linear") else "tanh"
    result = pool(inputs, context="mean", activation=activation, mask=None if valid is None else Mask(valid=valid))
    weights = result.extras["weights"]
    if valid is not None:  # from right-padded back to their places
        spread = torch.zeros_like(data["attn"])
        for row in range(len(valid)):
            spread[row][:, valid[row]] = weights[row][:, : int(valid[row].sum())]
        weights = spread
    close(weights, data["attn"], 1e-10)  # observed 6e-17
    close(result.output, data["pooled"], 1e-10)  # observed 2e-16
    if valid is None:
        close(data["scores"].softmax(-1), weights, 1e-10)
    if "out" in data:
        projected = result.output.flatten(1) @ data["weight_proj_weight"].T + data["weight_proj_bias"]
        close(projected, data["out"], 1e-10)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("width", [6, 4])
def test_scores_are_bilinear_forms_of_low_rank(rank, width):
    inputs = sample(rank=rank, width=width)
    weights = pool(inputs, activation=None, norm=None).extras["weights"]
    for head in range(3):
        matrix = sum(torch.outer(inputs["p"][:, head, r], inputs["q"][:, head, r]) for r in range(rank))
        assert torch.linalg.matrix_rank(matrix) == rank
        close(weights[:, head], (inputs["x"] @ (matrix.T @ inputs["c"])).softmax(-1))


def test_weights_are_distributions_over_valid_tokens():
    inputs = sample()
    weights = pool(inputs, mask=Mask(lengths=torch.tensor([9, 4]))).extras["weights"]
    close(weights.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    assert (weights[1, :, 4:] == 0).all() and (weights[1, :, :4] > 0).all()
    empty = pool(inputs, mask=Mask(lengths=torch.tensor([9, 0]))).extras["weights"]
    assert (empty[1] == 0).all() and torch.equal(empty[0], pool(inputs).extras["weights"][0])


@pytest.mark.parametrize("context", ["learned", "mean", "max"])
def test_order_of_tokens_does_not_matter(context):
    inputs, order = sample(), torch.randperm(9)
    one, other = pool(inputs, context=context), pool(inputs | {"x": inputs["x"][:, order]}, context=context)
    close(other.output, one.output, 1e-14)
    close(other.extras["weights"], one.extras["weights"][..., order], 1e-14)


@pytest.mark.parametrize("options", [{}, {"norm": None}, {"activation": None}], ids=str)
def test_no_weight_exceeds_e_squared_times_another_without_a_temperature(options):
    inputs = {name: 30 * x for name, x in sample(n=50).items()}
    weights = pool(inputs, **options).extras["weights"]
    assert (weights.amax(-1) / weights.amin(-1) <= np.e**2 * (1 + 1e-12)).all()
    hot = pool(inputs | {"temperature": torch.tensor([0.1, 1, 10], dtype=torch.float64)}, **options).extras["weights"]
    ratio = hot.amax(-1) / hot.amin(-1)
    assert (ratio[:, 0] > np.e**2).all() and (ratio[:, 2] <= np.e**0.2 * (1 + 1e-12)).all()


@pytest.mark.parametrize("zero", ["p", "q"])
def test_zero_factors_give_the_mean(zero):
    inputs = sample()
    inputs[zero].zero_()
    close(pool(inputs).output, inputs["x"].mean(1, keepdim=True).expand(-1, 3, -1))


def test_the_norm_removes_the_size_of_a_linear_score():
    inputs = sample()
    larger = inputs | {"p": 7 * inputs["p"]}
    one = pool(inputs, activation=None).output
    close(pool(larger, activation=None).output, one, 1e-13)
    assert not torch.allclose(pool(larger, activation=None, norm=None).output, one)
    assert not torch.allclose(run(inputs, {"activation": None}, scale=3.0).output, one)


def test_a_single_head_skips_the_norm():
    inputs = sample(slots=1)
    leaf = inputs["p"].requires_grad_()
    output = pool(inputs).output
    close(output, pool(inputs, norm=None).output)
    assert torch.autograd.grad(output.square().sum(), leaf)[0].abs().max() > 1e-3


@pytest.mark.parametrize("norm", ["heads", "tokens", None])
def test_gradients_are_finite_at_tokens_of_zeros(norm):
    inputs = sample(n=4)
    inputs["x"][:, 1:3] = 0
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    output = pool(leaves, norm=norm, mask=Mask(lengths=torch.tensor([4, 2]))).output
    gradients = torch.autograd.grad(output.square().sum(), list(leaves.values()))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("options", [{}, {"temperature": True, "rank": 2}, {"norm": None, "activation": None}], ids=str)
def test_a_stream_in_pieces_equals_the_whole(options):
    layer, x = make_layer(**options), torch.randn(2, 11, 6, dtype=torch.float64)
    state, counts = None, torch.zeros(2, dtype=torch.long)
    for advance in ([3, 0], [1, 1], [0, 2], [4, 5]):
        advance = torch.tensor(advance)
        piece = torch.full((2, int(advance.max()), 6), float("nan"), dtype=torch.float64)
        for row in range(2):
            piece[row, : advance[row]] = x[row, counts[row] : counts[row] + advance[row]]
        result = layer(piece, state=state, context=Context(mask=Mask(lengths=advance), want=frozenset({"state"})))
        state, counts = result.state, counts + advance
        close(result.output, layer(x, context=Context(mask=Mask(lengths=counts))).output, 1e-14)
        assert torch.equal(state.length, counts)
    assert sum(t[0].numel() for t in (state.m, state.u, state.w)) == 3 * (6 + 2)
    chosen = layer(x[[1, 1], :1], state=state.select(torch.tensor([1, 1]))).output
    whole = torch.cat([x[1:, : counts[1]], x[1:, :1]], 1)
    close(chosen, layer(whole).output.expand(2, -1, -1), 1e-14)


def test_diversity_is_the_overlap_of_the_heads():
    layer, x = make_layer(diversity=True), torch.randn(3, 7, 6, dtype=torch.float64)
    mask = Mask(lengths=torch.tensor([7, 0, 3]))
    result = layer(x, context=Context(mask=mask, want=frozenset({"weights"})))
    total, count = result.losses["diversity"]
    weights = result.extras["weights"][[0, 2]]
    close(total, (weights @ weights.mT - torch.eye(3, dtype=torch.float64)).square().sum())
    assert count == 2 and total.requires_grad


def test_init_follows_the_number_of_slots_or_the_width():
    assert 0.45 < make_layer(100, 4).p.abs().max() <= 0.5
    assert 0.09 < make_layer(100, 4, init="dim").p.abs().max() <= 0.1


def test_slot_logits_add_up_to_the_logits():
    pooled, head = torch.randn(2, 3, 6), nn.Linear(18, 5)
    torch.testing.assert_close(slot_logits(pooled, head).sum(1) + head.bias, head(pooled.flatten(1)))


def test_an_encoder_pools_with_it():
    pool = {"pool": "lama", "pool_options": {"slots": 4, "context": "mean", "diversity": True}}
    config = EncoderConfig(num_classes=3, vocab_size=20, dim=16, plan="linear", num_layers=1, num_heads=2, **pool)
    model = Encoder(config).double().eval()
    ids, lengths = torch.randint(20, (2, 9)), torch.tensor([9, 5])
    result = model(ids, context=Context(mask=Mask(lengths=lengths)))
    assert model.head.in_features == 4 * 16
    close(result.output[1:], model(ids[1:, :5]).output)
    assert set(result.losses) == {"diversity"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "dimm"}, "try dim"),
        # options of a stream that need the whole sequence
        *(({"context": context}, "need the whole sequence") for context in ("mean", "max", "last")),
        ({"norm": "tokens"}, "need the whole sequence"),
        ({"diversity": True}, "a whole sequence"),
    ],
    ids=str,
)
def test_wrong_options_of_a_stream_are_refused(options, message):
    refused(message, lambda: make_layer(**options)(sample()["x"], context=Context(want=frozenset({"state"}))))


def test_tensors_that_do_not_fit_are_refused():
    inputs = sample()
    refused("no c", run, {name: x for name, x in inputs.items() if name != "c"})
    refused("with c", run, inputs, {"context": "mean"})
    refused("equal numbers", pool, sample(width=4), context="mean")
    refused("memory", lambda: make_layer()(inputs["x"], inputs["x"]))


@pytest.mark.parametrize("want", [frozenset(), frozenset({"state"})], ids=["whole", "stream"])
def test_block_masks_and_tokens_that_are_no_floats_are_refused(want):
    layer, x = make_layer(), sample()["x"]
    blocks = Mask(blocks=BlockMask(torch.ones(1, 1, 3, 3, dtype=torch.bool), 3))
    refused("block", layer, x, context=Context(mask=blocks, want=want))
    for tokens in (x.long(), x > 0):
        refused(rf"x of dtype {tokens.dtype}.* supported: .*floats", layer, tokens, context=Context(want=want))
    for form in ("reference", "parallel"):
        refused("supported: a tensor of floats", run, sample() | {"x": x.long()}, form=form)
