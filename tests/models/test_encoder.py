from __future__ import annotations

from ast import literal_eval

import pytest
import torch

from regard.contract import Context, Mask, Unsupported
from regard.models import Encoder, EncoderConfig

POOLS = ("mean", "first", "max", "low_rank_pooling")


def make_encoder(**options) -> Encoder:
    config = {"num_classes": 3, "features": 2, "dim": 16, "num_heads": 2, "plan": ["softmax", "linear"], **options}
    return Encoder(EncoderConfig(**config)).double().eval()


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("positions", ["auto", "learned"])
def test_padding_anywhere_equals_no_padding(pool, positions):
    model = make_encoder(pool=pool, positions=positions)
    x = torch.randn(4, 7, 2, dtype=torch.float64)
    valid = torch.rand(4, 7) < 0.6
    valid[:, 3] = True
    x[~valid] = torch.nan
    output = model(x, context=Context(mask=Mask(valid=valid))).output
    alone = torch.cat([model(x[row][valid[row]][None]).output for row in range(4)])
    torch.testing.assert_close(output, alone)


@pytest.mark.parametrize("pool", POOLS)
def test_packed_documents_get_a_row_each_and_empty_ones_are_finite(pool):
    model = make_encoder(pool=pool, features=None, vocab_size=5)
    ids = torch.randint(5, (1, 6))
    output = model(ids, context=Context(mask=Mask(cu_seqlens=torch.tensor([0, 2, 2, 6])))).output
    torch.testing.assert_close(output[0], model(ids[:, :2]).output[0])
    torch.testing.assert_close(output[2], model(ids[:, 2:]).output[0])
    if pool != "low_rank_pooling":
        torch.testing.assert_close(output[1], model.head.bias)
    assert output.isfinite().all()


def test_without_a_pool_every_token_has_an_output():
    model = make_encoder(pool="none")
    x = torch.randn(2, 5, 2, dtype=torch.float64)
    assert model(x).output.shape == (2, 5, 3)
    masked = model(x, context=Context(mask=Mask(lengths=torch.tensor([5, 3])))).output
    torch.testing.assert_close(masked[1, :3], model(x[1:, :3]).output[0])
    assert not masked[1, 3:].any()


def test_a_token_sees_later_ones():
    model = make_encoder(pool="first", plan=["softmax"])
    x = torch.randn(1, 5, 2, dtype=torch.float64)
    changed = x.clone()
    changed[:, 4] += 1
    assert not torch.allclose(model(x).output, model(changed).output)


def test_gradients_reach_every_parameter():
    model = make_encoder().train()
    model(torch.randn(2, 5, 2, dtype=torch.float64)).output.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocab_size": 4}, "None for the other"),
        ({"features": None}, "None for the other"),
        ({"pool": "meen"}, "nearest: mean"),
        ({"pool_options": {"slots": 2}}, "pool_options"),
    ],
)
def test_bad_configs_are_refused(options, words):
    with pytest.raises(Unsupported, match=words):
        make_encoder(**options)


GRID_LAYERS = [
    ("large_kernel", {"kernel": 9}),
    ("bidirectional_mamba", {"scan": "snake"}),
    ("bidirectional_mamba", {"axes": 2, "convolution": "grid", "conv_width": 3}),
]


@pytest.mark.parametrize("entry", GRID_LAYERS)
def test_a_layer_for_grids_is_refused_without_one_with_an_entry_for_sequences(entry):
    model = make_encoder(plan=["softmax", entry])
    x = torch.randn(2, 6, 2, dtype=torch.float64)
    assert model(x, context=Context(grid=(2, 3))).output.isfinite().all()
    with pytest.raises(Unsupported, match=f"{entry[0]} for grids of 2 axes .* without a grid") as caught:
        model(x)
    proposed = literal_eval(caught.value.nearest.partition(" in the plan")[0])
    assert make_encoder(plan=["softmax", proposed])(x).output.isfinite().all()


@pytest.mark.parametrize("entry", GRID_LAYERS)
def test_layers_that_no_input_suits_are_refused_when_the_encoder_is_built(entry):
    alone = ("large_kernel", {"axes": 1})
    for plan in ([entry, alone], [alone, entry], [("large_kernel", {"axes": 3}), entry]):
        with pytest.raises(Unsupported, match="beside one of") as caught:
            make_encoder(plan=plan)
        assert "'axes': 1" in caught.value.nearest
    make_encoder(plan=[entry, "linear", entry])


def test_inputs_of_the_wrong_kind_are_refused():
    with pytest.raises(Unsupported, match="floats"):
        make_encoder()(torch.zeros(2, 3, dtype=torch.long))
    grid = Context(mask=Mask(valid=torch.tensor([[False, True, True, True]])), grid=(2, 2))
    with pytest.raises(Unsupported, match="grid"):
        make_encoder()(torch.zeros(1, 4, 2, dtype=torch.float64), context=grid)
