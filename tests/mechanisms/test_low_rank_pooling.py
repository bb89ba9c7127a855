"""What is peculiar to low-rank pooling: its scores, reductions, streams, and parity with a known implementation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import regard
from regard import Context, Mask, Unsupported
from regard.apply import apply
from regard.contract import BlockMask
from regard.mechanisms.low_rank_pooling import MECHANISM, slot_logits
from regard.models import Encoder, EncoderConfig

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
POOLED = ["mean", "max", "last"]
WANT_STATE = Context(want=frozenset({"state"}))


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def sample(n: int = 9, dim: int = 6, slots: int = 3, rank: int = 1, batch: int = 2, width: int | None = None):
    e = dim if width is None else width
    return {
        "x": torch.randn(batch, n, dim, dtype=torch.float64),
        "p": torch.randn(e, slots, rank, dtype=torch.float64),
        "q": torch.randn(dim, slots, rank, dtype=torch.float64),
        "c": torch.randn(e, dtype=torch.float64),
    }


def pool(inputs, want=("weights",), **rest):
    call = {k: rest.pop(k) for k in ("mask", "scale") if k in rest}
    given = {k: v for k, v in inputs.items() if k != "c" or rest.get("context", "learned") == "learned"}
    return apply(MECHANISM, given, pattern="noncausal-self", config=MECHANISM.options(**rest), want=want, **call)


def make_layer(dim: int = 6, heads: int = 3, **options):
    return regard.create_layer("lama", dim, heads, pattern="noncausal-self", **options).double()


@pytest.mark.parametrize("name", ["low_rank_pooling", "low_rank_pooling_linear", "low_rank_pooling_masked"])
def test_equals_the_known_implementation(name):
    data = load(name)
    inputs = {"x": data["x"], "p": data["weight_p"][..., None], "q": data["weight_q"][..., None]}
    valid = data.get("mask")
    activation = None if name.endswith("linear") else "tanh"
    result = pool(inputs, context="mean", activation=activation, mask=None if valid is None else Mask(valid=valid))
    weights = result.extras["weights"]
    if valid is not None:  # back from right-padded to their places
        spread = torch.zeros_like(data["attn"])
        for row in range(len(valid)):
            spread[row][:, valid[row]] = weights[row][:, : int(valid[row].sum())]
        weights = spread
    torch.testing.assert_close(weights, data["attn"], rtol=0, atol=1e-10)  # observed 6e-17
    torch.testing.assert_close(result.output, data["pooled"], rtol=0, atol=1e-10)  # observed 2e-16
    if valid is None:
        torch.testing.assert_close(data["scores"].softmax(-1), weights, rtol=0, atol=1e-10)
    if "out" in data:
        projected = result.output.flatten(1) @ data["weight_proj_weight"].T + data["weight_proj_bias"]
        torch.testing.assert_close(projected, data["out"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("width", [6, 4])
def test_scores_are_bilinear_forms_of_low_rank(rank, width):
    inputs = sample(rank=rank, width=width)
    weights = pool(inputs, activation=None, norm=None).extras["weights"]
    for head in range(3):
        matrix = sum(torch.outer(inputs["p"][:, head, r], inputs["q"][:, head, r]) for r in range(rank))
        assert torch.linalg.matrix_rank(matrix) == rank
        expected = (inputs["x"] @ (matrix.T @ inputs["c"])).softmax(-1)
        torch.testing.assert_close(weights[:, head], expected, rtol=0, atol=1e-12)


def test_weights_are_distributions_over_valid_tokens():
    inputs, valid = sample(), torch.rand(2, 9) < 0.6
    valid[:, 0] = True
    weights = pool(inputs, mask=Mask(lengths=torch.tensor([9, 4]))).extras["weights"]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    assert (weights[1, :, 4:] == 0).all() and (weights[1, :, :4] > 0).all()
    empty = pool(inputs, mask=Mask(lengths=torch.tensor([9, 0]))).extras["weights"]
    assert (empty[1] == 0).all() and torch.equal(empty[0], pool(inputs).extras["weights"][0])
    altered = inputs | {"x": torch.where(valid[..., None], inputs["x"], 1e6)}
    for context in ("learned", *POOLED):
        found = pool(altered, context=context, mask=Mask(valid=valid)).output
        assert torch.equal(found, pool(inputs, context=context, mask=Mask(valid=valid)).output)


@pytest.mark.parametrize("context", ["learned", "mean", "max"])
def test_order_of_tokens_does_not_matter(context):
    inputs, order = sample(), torch.randperm(9)
    one, other = pool(inputs, context=context), pool(inputs | {"x": inputs["x"][:, order]}, context=context)
    torch.testing.assert_close(other.output, one.output, rtol=0, atol=1e-14)
    torch.testing.assert_close(other.extras["weights"], one.extras["weights"][..., order], rtol=0, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"norm": None}, {"activation": None}], ids=str)
def test_no_weight_exceeds_e_squared_times_another(options):
    inputs = {name: 30 * t for name, t in sample(n=50).items()}
    weights = pool(inputs, **options).extras["weights"]
    assert (weights.amax(-1) / weights.amin(-1) <= np.e**2 * (1 + 1e-12)).all()
    hot = pool(inputs | {"temperature": torch.tensor([0.1, 1, 10], dtype=torch.float64)}, **options).extras["weights"]
    ratio = hot.amax(-1) / hot.amin(-1)
    assert (ratio[:, 0] > np.e**2).all() and (ratio[:, 2] <= np.e**0.2 * (1 + 1e-12)).all()


@pytest.mark.parametrize("zero", ["p", "q"])
def test_zero_factors_give_the_mean(zero):
    inputs = sample()
    inputs[zero].zero_()
    torch.testing.assert_close(pool(inputs).output, inputs["x"].mean(1, keepdim=True).expand(-1, 3, -1))


def test_the_norm_removes_the_size_of_a_linear_score():
    inputs = sample()
    one = pool(inputs, activation=None).output
    torch.testing.assert_close(pool(inputs | {"p": 7 * inputs["p"]}, activation=None).output, one, rtol=0, atol=1e-13)
    assert not torch.allclose(pool(inputs | {"p": 7 * inputs["p"]}, activation=None, norm=None).output, one)
    assert not torch.allclose(pool(inputs, scale=3.0, activation=None).output, one)


def test_a_single_head_skips_the_norm():
    inputs = sample(slots=1)
    leaf = inputs["p"].requires_grad_()
    output = pool(inputs).output
    torch.testing.assert_close(output, pool(inputs, norm=None).output)
    (gradient,) = torch.autograd.grad(output.square().sum(), leaf)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("norm", ["heads", "tokens", None])
def test_gradients_are_finite_at_tokens_of_zeros(norm):
    inputs = {name: t.requires_grad_() for name, t in sample(n=4).items()}
    with torch.no_grad():
        inputs["x"][:, 1:3] = 0
    output = pool(inputs, norm=norm, mask=Mask(lengths=torch.tensor([4, 2]))).output
    for gradient in torch.autograd.grad(output.square().sum(), list(inputs.values())):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"temperature": True, "rank": 2}, {"norm": None, "activation": None}], ids=str)
def test_a_stream_in_pieces_equals_the_whole(options):
    layer = make_layer(**options)
    x = torch.randn(2, 11, 6, dtype=torch.float64)
    state, counts = None, torch.zeros(2, dtype=torch.long)
    for advance in ([3, 0], [1, 1], [0, 2], [4, 5]):
        advance = torch.tensor(advance)
        piece = torch.full((2, int(advance.max()), 6), float("nan"), dtype=torch.float64)
        for row in range(2):
            piece[row, : advance[row]] = x[row, counts[row] : counts[row] + advance[row]]
        context = Context(mask=Mask(lengths=advance), want=frozenset({"state"}))
        result = layer(piece, state=state, context=context)
        state, counts = result.state, counts + advance
        expected = layer(x, context=Context(mask=Mask(lengths=counts))).output
        torch.testing.assert_close(result.output, expected, rtol=0, atol=1e-14)
        assert torch.equal(state.length, counts)
    assert sum(t[0].numel() for t in (state.m, state.u, state.w)) == 3 * (6 + 2)
    chosen = layer(x[[1, 1], :1], state=state.select(torch.tensor([1, 1]))).output
    whole = torch.cat([x[1:, : counts[1]], x[1:, :1]], 1)
    torch.testing.assert_close(chosen, layer(whole).output.expand(2, -1, -1), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "options", [*({"context": c} for c in POOLED), {"norm": "tokens"}, {"diversity": True}], ids=str
)
def test_a_stream_that_needs_the_whole_sequence_is_refused(options):
    with pytest.raises(Unsupported):
        make_layer(**options)(torch.randn(1, 3, 6, dtype=torch.float64), context=WANT_STATE)


def test_diversity_is_the_overlap_of_the_heads():
    layer = make_layer(diversity=True)
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    mask = Mask(lengths=torch.tensor([7, 0, 3]))
    result = layer(x, context=Context(mask=mask, want=frozenset({"weights"})))
    total, count = result.losses["diversity"]
    weights = result.extras["weights"][[0, 2]]
    expected = (weights @ weights.mT - torch.eye(3, dtype=torch.float64)).square().sum()
    torch.testing.assert_close(total, expected)
    assert count == 2
    assert total.requires_grad


def test_parameters_are_2_d_m_and_a_context():
    assert sum(p.numel() for p in make_layer(300, 10).parameters()) == 6300
    assert sum(p.numel() for p in make_layer(300, 10, context="mean").parameters()) == 6000
    assert (
        sum(p.numel() for p in make_layer(8, 2, slots=5, rank=3, temperature=True).parameters())
        == 2 * 8 * 5 * 3 + 8 + 5
    )


def test_init_follows_the_number_of_slots_or_the_width():
    assert 0.45 < make_layer(100, 4).p.abs().max() <= 0.5
    assert 0.09 < make_layer(100, 4, init="dim").p.abs().max() <= 0.1


def test_slot_logits_add_up_to_the_logits():
    pooled, head = torch.randn(2, 3, 6), nn.Linear(18, 5)
    torch.testing.assert_close(slot_logits(pooled, head).sum(1) + head.bias, head(pooled.flatten(1)))


def test_an_encoder_pools_with_it():
    config = EncoderConfig(num_classes=3, vocab_size=20, dim=16, plan="linear", num_layers=1, pool="lama", num_heads=2)
    options = {"slots": 4, "context": "mean", "diversity": True}
    model = Encoder(EncoderConfig(**{**config.__dict__, "pool_options": options})).double().eval()
    ids, lengths = torch.randint(20, (2, 9)), torch.tensor([9, 5])
    result = model(ids, context=Context(mask=Mask(lengths=lengths)))
    assert model.head.in_features == 4 * 16
    torch.testing.assert_close(result.output[1:], model(ids[1:, :5]).output)
    assert set(result.losses) == {"diversity"}


def test_mistakes_are_refused():
    inputs = sample()
    with pytest.raises(Unsupported, match="no c"):
        pool({k: v for k, v in inputs.items() if k != "c"})
    with pytest.raises(Unsupported, match="with c"):
        apply(MECHANISM, inputs, pattern="noncausal-self", config=MECHANISM.options(context="mean"))
    with pytest.raises(Unsupported, match="equal numbers"):
        pool(sample(width=4), context="mean")
    with pytest.raises(Unsupported, match="pools a sequence in pieces"):
        regard.create_layer("lama", 6, 3)
    for options in ({"slots": 0}, {"rank": 0}, {"init": "dimm"}, {"context": "mode"}, {"eps": 0.0}, {"norm": "head"}):
        with pytest.raises(Unsupported):
            make_layer(**options)
    layer, x = make_layer(), inputs["x"]
    blocks = Mask(blocks=BlockMask(torch.ones(1, 1, 3, 3, dtype=torch.bool), 3))
    for context in (Context(mask=blocks), Context(mask=blocks, want=frozenset({"state"}))):
        with pytest.raises(Unsupported):
            layer(x, context=context)
    with pytest.raises(Unsupported, match="memory"):
        layer(x, x)


@pytest.mark.parametrize("context", [Context(), WANT_STATE])
def test_numbers_of_tokens_are_refused(context):
    for x in (torch.ones(2, 5, 6, dtype=torch.long), torch.ones(2, 5, 6, dtype=torch.bool)):
        with pytest.raises(Unsupported, match=rf"x of dtype {x.dtype}.* supported: .*floats"):
            make_layer()(x, context=context)
    inputs = sample() | {"x": torch.ones(2, 9, 6, dtype=torch.long)}
    for form in ("reference", "parallel"):
        with pytest.raises(Unsupported, match="supported: a tensor of floats"):
            apply(MECHANISM, inputs, pattern="noncausal-self", form=form)
