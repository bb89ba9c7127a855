"""Tests specific to sigmoid attention: closed forms, independent keys, its biases and norms, and parity."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from support import calls, check_recorded, close, load, qkv, refused
from torch import Tensor
from torch.nn.functional import normalize

from regard.catalogue import get_mechanism
from regard.contract import Context, Mask
from regard.create import create_layer
from regard.mechanisms.sigmoid import MECHANISM, Config

run = calls(MECHANISM, "noncausal-self")
RULES = {"sigmoid": lambda s: 1 / (1 + (-s).exp()), "relu": lambda s: s.clamp(min=0)}
RULES["relu_squared"] = lambda s: s.clamp(min=0) ** 2


@pytest.mark.parametrize("variant", ["", *MECHANISM.variants])
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_weights_are_those_of_the_formula(variant, pattern):
    """The bias is added after scale, temperature and score bias; other keys matter only by their number."""
    options = {"log_temperature": 0.5, **MECHANISM.variants.get(variant, {})}
    config, tensors = Config(**options), qkv(9)
    tensors["head_bias"], bias = torch.randn(2, dtype=torch.float64), torch.randn(1, 2, 9, 9, dtype=torch.float64)
    ahead = torch.arange(9) - torch.arange(9)[:, None]
    left, right = (math.inf if side is None else side for side in config.window)
    visible = (-left <= ahead) & (ahead <= (0 if pattern == "causal-self" else right))
    count = visible.sum(-1, keepdim=True).double()
    if config.schedule == "position":
        b = -count.log()
    elif config.length:
        b = -math.log(config.length)
    else:
        b = torch.tensor(config.sigmoid_bias or 0.0).double()[..., None, None]
    scores = math.exp(config.log_temperature) * (0.3 * tensors["q"] @ tensors["k"].mT + bias)
    expected = RULES[config.activation](scores + b + tensors["head_bias"][:, None, None])
    expected = expected * visible / count ** {"none": 0, "sqrt": 0.5, "seq": 1}[config.norm]
    call = {"pattern": pattern, "scale": 0.3, "mask": Mask(bias=bias)}
    close(run(tensors, options, want={"weights"}, **call).extras["weights"], expected)
    for form in ("reference", None):
        close(run(tensors, options, form=form, **call).output, expected @ tensors["v"])


def test_queries_of_zero_give_the_closed_form():
    n, tensors = 30, qkv(30)
    tensors["q"] = torch.zeros_like(tensors["q"])
    mean = tensors["v"].mean(2, keepdim=True).expand(-1, -1, n, -1)
    close(run(tensors, {"length": n}).output, n / (n + 1) * mean)
    close(run(tensors).output, n / 2 * mean)


@pytest.mark.parametrize("options", [{"length": 70}, {"length": 70, "log_temperature": 0.5}, {"sigmoid_bias": 5.0}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_largest_negative_score_and_then_a_bias_give_zero_and_stay_finite(dtype, options):
    tensors = qkv(70, dtype=dtype)
    hidden = torch.rand(1, 2, 70, 70) > 0.5
    hidden[..., 3, :] = True
    leaves = [x.requires_grad_() for x in tensors.values()]
    found = []
    for lowest in (torch.finfo(dtype).min, -math.inf):
        mask = Mask(bias=torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, lowest))
        weights = run(tensors, options, mask=mask, want={"weights"}).extras["weights"]
        output = run(tensors, options, mask=mask).output
        assert (weights[hidden.expand_as(weights)] == 0).all() and (output[:, :, 3] == 0).all()
        found.append((weights, output, *torch.autograd.grad(output.square().sum(), leaves)))
    for finite, infinite in zip(*found, strict=True):
        assert finite.isfinite().all() and torch.equal(finite, infinite)


def largest_gain(mechanism: str, tokens: Tensor, **options) -> float:
    """Largest singular value of the Jacobian of one self-attention head with identity projections."""
    attend = calls(get_mechanism(mechanism), "noncausal-self")
    jacobian = torch.autograd.functional.jacobian(
        lambda x: attend(dict.fromkeys("qkv", x[None, None]), options, scale=1.0).output[0, 0], tokens
    )
    return torch.linalg.matrix_norm(jacobian.flatten(2).flatten(0, 1), 2).item()


def two_clusters(count: int) -> tuple[float, Tensor]:
    """R with exp(R^2 / 4) = count, and `count` tokens at R/2, one of them moved to R. For the others that token weighs as
    much as all the rest together, so that it moves them all."""
    radius = math.sqrt(4 * math.log(count))
    tokens = (radius / 2 * normalize(torch.randn(2, dtype=torch.float64), dim=0)).repeat(count, 1)
    tokens[0] *= 2
    return radius, tokens


def test_sensitivity_grows_as_the_radius_squared_and_that_of_softmax_exponentially():
    def bound(radius: float) -> float:
        # values contribute at most 1, queries and keys at most R^2 / 4 each, however many keys there are
        return 1 + radius**2 / 2

    clusters = [two_clusters(count) for count in (16, 64, 256)]
    directions = normalize(torch.randn(20, 3, dtype=torch.float64), dim=-1) * torch.rand(20, 1, dtype=torch.float64)
    for radius, tokens in clusters + [(radius, radius * directions) for radius in (0.5, 1.0, 2.0, 4.0, 8.0)]:
        assert largest_gain("sigmoid", tokens, norm="seq") <= bound(radius)
        assert largest_gain("sigmoid", tokens, length=len(tokens)) <= len(tokens) * bound(radius)
    softmax = [largest_gain("softmax", tokens) / bound(radius) for radius, tokens in clusters]
    # R^2 grows by 4 log 4 each time, which doubles R^2 exp(R^2 / 8)
    assert all(1.7 < later / earlier < 2.1 for earlier, later in pairwise(softmax))
    assert softmax[-1] > 2


@pytest.mark.parametrize("options", [{"norm": "seq", "activation": "relu"}, {"norm": "sqrt"}], ids=str)
def test_normalised_outputs_are_rounded_once(options):
    inputs = {name: x.bfloat16() for name, x in qkv(40).items()}
    found = run(inputs, options).output
    wide = run({name: x.float() for name, x in inputs.items()}, options).output
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wide.bfloat16())


def test_dropout_is_not_rescaled_by_row():
    tensors = {"q": torch.zeros(1, 1, 200, 4), "k": torch.zeros(1, 1, 200, 4), "v": torch.eye(200)[None, None]}
    output = run(tensors, dropout=0.25).output
    kept = output[output != 0]
    close(kept, torch.full_like(kept, 0.5 / 0.75), 1e-6)
    assert abs(kept.numel() / output.numel() - 0.75) < 0.02


def test_a_layer_learns_one_bias_a_head_that_starts_at_b():
    plain = create_layer("sigmoid", 8, 2, length=12).double()
    learned = create_layer("sigmoid", 8, 2, length=12, learn_bias=True).double()
    extra = learned.load_state_dict(plain.state_dict(), strict=False)
    assert extra.missing_keys == ["projection.head_bias"] and not list(plain.projection.parameters())
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    output = learned(x).output
    close(output, plain(x).output)
    output.square().sum().backward()
    assert learned.projection.head_bias.grad.abs().min() > 0


@pytest.mark.parametrize(
    "name", ["sigmoid_causal_more_keys_flash", "sigmoid_causal_more_queries_flash", "sigmoid_cross_masked_flash"]
)
def test_parity_with_the_kernels_reference(name):
    arrays = load(name)
    tensors = {x: arrays[x].requires_grad_() for x in "qkv"}
    call = {"pattern": "causal-self"}
    if "key_mask" in arrays:
        call = {"pattern": "noncausal-cross", "memory_mask": Mask(valid=arrays["key_mask"])}
    result = run(tensors, {"sigmoid_bias": float(arrays["sigmoid_bias"])}, want={"weights"}, **call)
    if "key_mask" not in arrays:  # here weights of masked keys are gathered to the right
        close(result.extras["weights"], arrays["attn"], 1e-10)
    check_recorded(arrays, result.output, tensors, 1e-10)  # observed 9e-16


def official_weights(arrays: dict[str, Tensor], features: Tensor | None) -> dict[str, Tensor]:
    """A recorded layer's weights under our names; `features` is the order of query and key features."""
    if "weight_qkv_weight" in arrays:
        projections = arrays["weight_qkv_weight"].chunk(3)
    else:
        projections = (arrays["weight_q_proj_weight"], *arrays["weight_kv_proj_weight"].chunk(2))
    weights = {"output.weight": arrays["weight_proj_weight"]}
    for ours, theirs, projection in zip(("query", "key", "value"), "qkv", projections, strict=True):
        order = None if theirs == "v" else features
        if order is not None:
            projection = projection.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)
        weights[f"{ours}.weight"] = projection
        for part in ("weight", "bias"):
            if (norm := arrays.get(f"weight_{theirs}_norm_{part}")) is not None:
                weights[f"{ours}_norm.{part}"] = norm if order is None else norm[order]
    return weights


@pytest.mark.parametrize(
    ("name", "pattern", "options"),
    [
        ("sigmoid_noncausal", "noncausal-self", {}),
        ("sigmoid_causal_padded", "causal-self", {}),
        ("sigmoid_causal_qknorm", "causal-self", {"query_key_norm": "layer"}),
        ("sigmoid_causal_seqnorm", "causal-self", {"norm": "seq"}),
        ("sigmoid_causal_sqrtnorm", "causal-self", {"norm": "sqrt"}),
        ("sigmoid_rope", "causal-self", {"positions": "rotary", "query_key_norm": "layer"}),
        ("sigmoid_alibi", "causal-self", {"positions": "alibi", "log_temperature": 0.3}),
        ("sigmoid_cross", "noncausal-cross", {"query_key_norm": "layer", "value_norm": "layer"}),
        ("sigmoid_cross_streaming", "causal-cross", {"value_norm": "layer"}),
    ],
)
def test_parity_with_the_official_layers(name, pattern, options):
    arrays = load(name)
    dim, heads, bias = arrays["x"].shape[-1], arrays["attn"].shape[1], float(arrays["sigmoid_bias"])
    layer = create_layer("sigmoid", dim, heads, pattern=pattern, sigmoid_bias=bias, **options).double()
    # the official code rotates adjacent features, regard features half a head apart
    pairs = torch.arange(dim // heads).view(-1, 2).mT.flatten() if name == "sigmoid_rope" else None
    layer.load_state_dict(official_weights(arrays, pairs))
    inputs = {x: arrays[x].requires_grad_() for x in ("x", "memory") if x in arrays}
    masks = {}
    if name == "sigmoid_cross":
        masks["memory_mask"] = Mask(valid=arrays["mask"][:, 0, 0])
    elif name in ("sigmoid_causal_padded", "sigmoid_cross_streaming"):
        # the reference masks only padded keys: hide them by a bias, so that padded queries are computed too
        hidden = ~arrays["mask"][(None,) * (4 - arrays["mask"].ndim)]
        masks["mask"] = Mask(bias=torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, -torch.inf))
    if name != "sigmoid_cross":  # here weights of masked keys are gathered to the right
        context = Context(want=frozenset({"weights"}), **masks)
        close(layer(*inputs.values(), context=context).extras["weights"], arrays["attn"], 1e-10)
    output = layer(*inputs.values(), context=Context(**masks)).output
    check_recorded(arrays, output, inputs, 1e-10)  # observed 9e-16


@pytest.mark.parametrize(
    ("pattern", "options", "told"),
    [
        ("causal-self", {"sigmoid_bias": (0.0, 1.0, 2.0)}, "3 biases for 2 heads"),
        ("causal-self", {"window": (2, 1)}, "window"),
        ("noncausal-cross", {"window": (2, None)}, "window"),
        ("causal-cross", {"window": (2, None)}, "window"),
    ],
)
def test_options_that_do_not_fit_the_call_are_refused(pattern, options, told):
    refused(told, run, qkv(4), options, pattern=pattern)
    refused(told, create_layer, "sigmoid", 8, 2, pattern=pattern, **options)
