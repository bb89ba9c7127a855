"""What is peculiar to DiagAttention: independent blocks, ReLU weights and their norm, a cache that empties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transnormer_checks import check_equals_the_authors_layer

from regard.apply import apply
from regard.catalogue import get_mechanism
from regard.contract import Context, Mask, Pattern, Shape, Unsupported
from regard.create import create_layer
from regard.mechanisms.diagonal import MECHANISM, Config, cost

RECORDED = {
    "diagonal_t1": {"activation": "relu", "block": 5},
    "diagonal_t2": {"activation": "softmax", "block": 4},
}
OPTIONS = [
    {"block": 5},
    {"block": 4, "activation": "relu"},
    {"block": 1},
    {"block": 7, "activation": "relu", "output_norm": "none"},
    {"block": 3, "activation": "relu", "form": "window"},
    {"block": 6, "output_norm": "layer"},
    {"block": 40, "activation": "relu", "output_norm": "rms"},
]
NORM = {
    "simple_rms": lambda x: x / (x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + 1e-8),
    "rms": lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-6),
    "layer": lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-5),
    "none": lambda x: x,
}
SELF = ["causal-self", "noncausal-self"]


def inputs(n: int, batch: int = 2) -> dict[str, Tensor]:
    return {name: torch.randn(batch, 2, n, 4, dtype=torch.float64) for name in "qkv"}


def run(tensors: dict[str, Tensor], pattern: str = "causal-self", options: dict | None = None, **call: Any) -> Tensor:
    return apply(MECHANISM, tensors, pattern=pattern, config=Config(**(options or {})), **call).output


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def allowed(config: Config, pattern: str, n: int) -> Tensor:
    """Visible pairs, from the definition in words."""
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    if config.form == "block":
        seen = i // config.block == j // config.block
        return seen & (j <= i) if pattern == "causal-self" else seen
    return (j <= i) & (j > i - config.block) if pattern == "causal-self" else (i - j).abs() <= config.block


def expected(tensors: dict[str, Tensor], pattern: str, options: dict) -> Tensor:
    config, n = Config(**options), tensors["q"].shape[2]
    seen, scores = allowed(config, pattern, n), tensors["q"] @ tensors["k"].mT / 2
    relu = config.activation == "relu"
    weights = scores.relu() * seen if relu else scores.masked_fill(~seen, -torch.inf).softmax(-1)
    norm = options.get("output_norm", "simple_rms" if relu else "none")
    return NORM[norm]((weights @ tensors["v"]).transpose(1, 2).flatten(2)).unflatten(-1, (2, 4)).transpose(1, 2)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pattern", SELF)
@pytest.mark.parametrize("n", [1, 13, 64, 131])
def test_equals_its_definition(options, pattern, n):
    tensors = inputs(n)
    close(run(tensors, pattern, options), expected(tensors, pattern, options))
    close(run(tensors, pattern, options, form="reference"), expected(tensors, pattern, options))


@pytest.mark.parametrize("pattern", SELF)
def test_one_block_for_all_is_softmax_attention(pattern):
    tensors = inputs(37)
    close(run(tensors, pattern, {"block": 37}), apply(get_mechanism("softmax"), tensors, pattern=pattern).output)


@pytest.mark.parametrize("pattern", SELF)
def test_softmax_blocks_are_those_of_local_attention_without_lookback(pattern):
    tensors, local = inputs(37), get_mechanism("local")
    config = local.options(form="block", block=8, lookback=0)
    close(run(tensors, pattern, {"block": 8}), apply(local, tensors, pattern=pattern, config=config).output)


@pytest.mark.parametrize("options", OPTIONS[:2])
@pytest.mark.parametrize("pattern", SELF)
def test_nothing_crosses_the_border_of_a_block(options, pattern):
    tensors = inputs(23)
    changed = {name: x.clone() for name, x in tensors.items()}
    size = options["block"]
    for x in changed.values():
        x[:, :, size : 2 * size] = 100 * torch.randn_like(x[:, :, size : 2 * size])
    before, after = run(tensors, pattern, options), run(changed, pattern, options)
    kept = torch.ones(23, dtype=torch.bool)
    kept[size : 2 * size] = False
    assert torch.equal(before[:, :, kept], after[:, :, kept])
    assert not torch.allclose(before[:, :, ~kept], after[:, :, ~kept])


@pytest.mark.parametrize("options", OPTIONS)
def test_later_keys_have_no_part_in_a_denominator(options):
    """One public version masks after the softmax."""
    tensors = inputs(20)
    tensors["k"].requires_grad_()
    output = run(tensors, options=options)
    for i in (0, 9, 18):
        gradient = torch.autograd.grad(output[:, :, i].sum(), tensors["k"], retain_graph=True)[0]
        assert (gradient[:, :, i + 1 :] == 0).all()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pattern", SELF)
def test_padding_takes_no_part_in_the_last_block(options, pattern):
    """One public version leaves the zeros that pad the last block in the softmax, each with the weight e^0."""
    tensors = inputs(20)
    mask = Mask(valid=torch.rand(2, 20) > 0.4)
    found = run(tensors, pattern, options, mask=mask)
    for row in range(2):
        alone = {name: x[row : row + 1, :, mask.valid[row]] for name, x in tensors.items()}
        close(found[row : row + 1, :, mask.valid[row]], expected(alone, pattern, options))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sizes", [[1] * 23, [23], [1, 7, 1, 0, 14]])
def test_decoding_across_blocks_equals_the_whole(options, sizes):
    tensors, state, outputs = inputs(23), None, []
    for part in torch.arange(23).split(sizes):
        piece = {name: x[:, :, part] for name, x in tensors.items()}
        result = apply(MECHANISM, piece, state=state, return_state=True, config=Config(**options))
        outputs.append(result.output)
        state = result.state
    close(torch.cat(outputs, 2), run(tensors, options=options))
    assert state.k[0].numel() + state.v[0].numel() == cost(Shape(1, 2, 1, 1000, 4, 4), Config(**options)).state
    assert MECHANISM.recurrent


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n", [1, 7, 12, 31])
def test_the_cost_counts_visible_pairs(options, n):
    config = Config(**options)
    assert cost(Shape(2, 3, n, n, 4, 5), config).flops == 2 * 2 * 3 * 9 * allowed(config, "causal-self", n).sum()
    seen = allowed(config, "causal-self", n + 1)[-1].sum()
    assert cost(Shape(2, 3, 1, n, 4, 5), config).step_flops == 2 * 2 * 3 * 9 * seen


def test_the_norm_of_relu_weights_is_over_all_heads():
    tensors = inputs(9)
    tensors["v"][:, 1] *= 50
    output = run(tensors, "noncausal-self", {"block": 9, "activation": "relu"})
    close(output.square().mean((1, 3)), torch.ones(2, 9, dtype=torch.float64), 1e-6)
    size = output.square().mean((0, 2, 3))
    assert size[1] > 100 * size[0]


def test_relative_positions_restart_with_each_block():
    """Only differences of positions matter, so that positions of the whole sequence do as well."""
    layer = create_layer("diagonal", 8, 2, block=4, positions="lrpe", bias=False).double()
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    output = layer(x.repeat(1, 3, 1)).output
    close(output[:, :4], output[:, 8:])
    assert not torch.allclose(
        output, create_layer("diagonal", 8, 2, block=4, bias=False).double()(x.repeat(1, 3, 1)).output
    )


@pytest.mark.parametrize("options", [{"activation": "relu", "output_norm": "layer"}, {"output_norm": "rms"}])
def test_a_layer_learns_the_weights_of_its_norm(options):
    layer = create_layer("diagonal", 8, 2, **options).double()
    assert layer.merge.weight.shape == (2, 1, 4)
    layer(torch.randn(1, 5, 8, dtype=torch.float64)).output.square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert not [name for name, _ in create_layer("diagonal", 8, 2).merge.named_parameters()]


def test_dropout_is_of_weights():
    layer = create_layer("diagonal", 8, 2, dropout=0.5, activation="relu", output_norm="none").double().train()
    x = torch.randn(1, 200, 8, dtype=torch.float64)
    draws = [layer(x, context=Context(generator=torch.Generator().manual_seed(seed))).output for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_what_it_lacks_is_refused_with_the_reason():
    for pattern in (Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS):
        with pytest.raises(Unsupported, match="no place in a block"):
            create_layer("diagonal", 8, 2, pattern=pattern)
    for options in ({"block": 0}, {"activation": "gelu"}, {"output_norm": "batch"}, {"form": "dilated"}):
        with pytest.raises(Unsupported):
            Config(**options)
    state = apply(MECHANISM, inputs(3), return_state=True).state
    with pytest.raises(Unsupported, match="bias of pairs"):
        apply(MECHANISM, inputs(3), state=state, mask=Mask(bias=torch.zeros(1, 1, 3, 3)))
    with pytest.raises(Unsupported, match="log-sum-exp"):
        run(inputs(3), options={"activation": "relu"}, want={"lse"})


# parity


@pytest.mark.parametrize(("name", "options"), RECORDED.items())
def test_equals_the_authors_layer(name, options):
    check_equals_the_authors_layer("diagonal", name, options, close)
