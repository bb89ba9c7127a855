"""What is peculiar to sigmoid attention: closed forms, independent keys, its biases and norms, and parity."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from regard.apply import absorb, apply
from regard.catalogue import get_mechanism
from regard.contract import ALL_PATTERNS, Context, Mask, Unsupported
from regard.create import create_layer
from regard.mechanisms.sigmoid import MECHANISM, Config
from regard.positions import create_positions

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
OPTIONS = [
    {"length": 50},
    {"sigmoid_bias": -1.5},
    {"sigmoid_bias": (-1.0, 0.5)},
    {"schedule": "position"},
    {"log_temperature": 0.7, "length": 9},
    {"norm": "seq"},
    {"norm": "sqrt"},
    {"activation": "relu", "norm": "seq"},
    {"activation": "relu_squared", "norm": "seq"},
    {"window": (3, None)},
    {"window": (3, 0), "schedule": "position"},
    {"window": (2, None), "norm": "sqrt", "log_temperature": -0.3},
]


def load(name: str) -> dict[str, Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def inputs(n: int, m: int | None = None, batch: int = 2) -> dict[str, Tensor]:
    sizes = {"q": n, "k": n if m is None else m, "v": n if m is None else m}
    return {name: torch.randn(batch, 2, size, 4, dtype=torch.float64) for name, size in sizes.items()}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def weights_of(tensors: dict[str, Tensor], pattern: str = "noncausal-self", **options) -> Tensor:
    return apply(MECHANISM, tensors, pattern=pattern, config=Config(**options), want={"weights"}).extras["weights"]


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_has_all_forms(options, pattern):
    if pattern.cross and "window" in options:
        pytest.skip("windows are for self patterns")
    config = Config(**options)
    tensors = inputs(19, 13 if pattern.cross else None)
    head_bias = None if options.get("norm") else torch.randn(2, dtype=torch.float64)
    call = {"pattern": pattern, "config": config}
    scheme = create_positions("alibi", dim=8, heads=2, head_dim=4)
    call["position_bias"] = lambda i, j: scheme.bias(i, j, pattern.causal)
    tensors["head_bias"] = head_bias
    expected = apply(MECHANISM, tensors, form="reference", **call).output
    close(apply(MECHANISM, tensors, **call).output, expected)
    if pattern.cross:
        state = None
        for part in (slice(0, 5), slice(5, 13)):
            memory = {name: tensors[name][:, :, part] for name in "kv"}
            state = absorb(MECHANISM, memory, pattern=pattern, config=config, state=state)
        found = apply(MECHANISM, {"q": tensors["q"], "head_bias": head_bias}, state=state, **call).output
        close(found, expected)
    elif pattern.causal:
        for sizes in ([1] * 19, [8, 1, 10]):
            state, outputs = None, []
            for part in torch.arange(19).split(sizes):
                piece = {name: tensors[name][:, :, part] for name in "qkv"} | {"head_bias": head_bias}
                result = apply(MECHANISM, piece, state=state, return_state=True, **call)
                state = result.state
                outputs.append(result.output)
            close(torch.cat(outputs, 2), expected)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_every_option_knows_padding(options, pattern):
    tensors = inputs(12)
    valid = torch.rand(2, 12) > 0.3
    call = {"pattern": pattern, "config": Config(**options)}
    found = apply(MECHANISM, tensors, mask=Mask(valid=valid), **call).output
    for b in range(2):
        alone = {name: x[b : b + 1, :, valid[b]] for name, x in tensors.items()}
        close(found[b : b + 1, :, valid[b]], apply(MECHANISM, alone, **call).output)


@pytest.mark.parametrize("options", [*OPTIONS[:5], {"log_temperature": 0.4}])
def test_every_option_has_the_gradients_of_the_definition(options):
    tensors = {name: x.requires_grad_() for name, x in inputs(9).items()}
    tensors["head_bias"] = torch.randn(2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 2, 9, 9, dtype=torch.float64, requires_grad=True)
    leaves = [*tensors.values(), bias]
    found, expected = (
        torch.autograd.grad(
            apply(MECHANISM, tensors, config=Config(**options), mask=Mask(bias=bias), form=form).output.square().sum(),
            leaves,
        )
        for form in ("parallel", "reference")
    )
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-11)


def test_queries_of_zero_give_the_closed_form():
    n = 30
    tensors = inputs(n)
    tensors["q"] = torch.zeros_like(tensors["q"])
    mean = tensors["v"].mean(2, keepdim=True).expand(-1, -1, n, -1)
    close(
        weights_of(tensors, sigmoid_bias=-0.7), torch.full((2, 2, n, n), 1 / (1 + math.exp(0.7)), dtype=torch.float64)
    )

    def output(**options) -> Tensor:
        return apply(MECHANISM, tensors, pattern="noncausal-self", config=Config(**options)).output

    close(output(length=n), n / (n + 1) * mean)
    close(output(), n / 2 * mean)
    ratio = output().norm() / output(length=n).norm()
    assert ratio.item() == pytest.approx((n + 1) / 2)


def test_the_position_schedule_keeps_row_sums_near_one():
    tensors = inputs(40)
    tensors["q"] = torch.zeros_like(tensors["q"])
    count = torch.arange(1.0, 41, dtype=torch.float64)
    sums = weights_of(tensors, "causal-self", schedule="position").sum(-1)
    close(sums, (count / (count + 1)).expand(2, 2, -1))
    constant = weights_of(tensors, "causal-self", length=40).sum(-1)
    close(constant, (count / 41).expand(2, 2, -1))


def test_the_weight_of_a_key_depends_on_no_other_key():
    tensors = inputs(8)
    before = weights_of(tensors, length=8)
    tensors["k"][:, :, 3] += 1.0
    after = weights_of(tensors, length=8)
    others = torch.arange(8) != 3
    assert torch.equal(before[..., others], after[..., others]) and not torch.equal(before, after)


def test_parts_of_the_keys_add_up_in_any_order():
    tensors = inputs(6, 20)
    call = {"pattern": "noncausal-cross", "config": Config(length=20)}
    whole = apply(MECHANISM, tensors, **call).output
    parts = torch.randperm(20).split([3, 9, 8])
    pieces = [
        apply(MECHANISM, {"q": tensors["q"]} | {name: tensors[name][:, :, p] for name in "kv"}, **call).output
        for p in parts
    ]
    close(sum(pieces), whole)


def test_a_very_negative_bias_gives_softmax_up_to_the_row_sum():
    tensors = inputs(10)
    for b in (-5.0, -10.0, -20.0):
        weights = weights_of(tensors, sigmoid_bias=b)
        softmax = (tensors["q"] @ tensors["k"].mT / 2).softmax(-1)
        error = (weights / weights.sum(-1, keepdim=True) - softmax).abs().max()
        assert error < 20 * math.exp(b)


def test_the_bias_does_not_follow_the_length_of_the_call():
    tensors = inputs(16)
    short = {name: x[:, :, :5] for name, x in tensors.items()}
    for options in ({}, {"length": 16}, {"schedule": "position"}):
        whole = apply(MECHANISM, tensors, config=Config(**options)).output[:, :, :5]
        close(apply(MECHANISM, short, config=Config(**options)).output, whole)


def test_the_bias_is_added_after_scale_temperature_and_score_bias():
    tensors, bias = inputs(5), torch.randn(1, 2, 5, 5, dtype=torch.float64)
    config = Config(sigmoid_bias=-1.0, log_temperature=0.5)
    found = apply(
        MECHANISM, tensors, pattern="noncausal-self", config=config, scale=0.3, mask=Mask(bias=bias), want={"weights"}
    ).extras["weights"]
    scores = 0.3 * tensors["q"] @ tensors["k"].mT + bias
    close(found, (math.exp(0.5) * scores - 1.0).sigmoid())


def test_masked_keys_have_weight_exactly_zero_whatever_the_bias():
    tensors = inputs(6)
    bias = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    bias[..., 2] = -torch.inf
    bias[..., 4, :] = -torch.inf
    found = apply(
        MECHANISM,
        tensors,
        pattern="noncausal-self",
        config=Config(sigmoid_bias=30.0),
        mask=Mask(bias=bias),
        want={"weights"},
    )
    assert (found.extras["weights"][..., 2] == 0).all() and (found.output[:, :, 4] == 0).all()


@pytest.mark.parametrize("log_temperature", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_largest_negative_score_and_then_a_bias_give_zero_and_stay_finite(dtype, log_temperature):
    tensors = {name: x.to(dtype) for name, x in inputs(70).items()}
    hidden = torch.rand(1, 2, 70, 70) > 0.5
    hidden[..., 3, :] = True
    config = Config(length=70, log_temperature=log_temperature)
    leaves = [x.requires_grad_() for x in tensors.values()]
    found = []
    for lowest in (torch.finfo(dtype).min, -math.inf):
        bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, lowest)
        call = {"pattern": "noncausal-self", "config": config, "mask": Mask(bias=bias)}
        weights = apply(MECHANISM, tensors, want={"weights"}, **call).extras["weights"]
        output = apply(MECHANISM, tensors, **call).output
        assert (weights[hidden.expand_as(weights)] == 0).all() and (output[:, :, 3] == 0).all()
        found.append((weights, output, *torch.autograd.grad(output.square().sum(), leaves)))
    for finite, infinite in zip(*found, strict=True):
        assert finite.isfinite().all() and torch.equal(finite, infinite)


def largest_gain(mechanism: str, tokens: Tensor, **options) -> float:
    """Largest singular value of the Jacobian of one head of self-attention with identities for projections."""
    card = get_mechanism(mechanism)

    def attend(x: Tensor) -> Tensor:
        heads = dict.fromkeys("qkv", x[None, None])
        call = {"pattern": "noncausal-self", "config": card.options(**options), "scale": 1.0}
        return apply(card, heads, **call).output[0, 0]

    jacobian = torch.autograd.functional.jacobian(attend, tokens)
    return torch.linalg.matrix_norm(jacobian.flatten(2).flatten(0, 1), 2).item()


def two_clusters(count: int) -> tuple[float, Tensor]:
    """R with exp(R^2 / 4) = count, and as many tokens at R/2, one of them moved to R: to the others it weighs as much as
    all of them together, so that it moves them all."""
    radius = math.sqrt(4 * math.log(count))
    direction = torch.nn.functional.normalize(torch.randn(2, dtype=torch.float64), dim=0)
    tokens = (radius / 2 * direction).repeat(count, 1)
    tokens[0] *= 2
    return radius, tokens


def test_sensitivity_grows_as_the_radius_squared_and_that_of_softmax_exponentially():
    def bound(radius: float) -> float:
        # the values' part is at most 1, and those of queries and keys R^2 / 4 each, however many keys there are
        return 1 + radius**2 / 2

    clusters = [two_clusters(count) for count in (16, 64, 256)]
    cases = list(clusters)
    for radius in (0.5, 1.0, 2.0, 4.0, 8.0):
        directions = torch.nn.functional.normalize(torch.randn(20, 3, dtype=torch.float64), dim=-1)
        cases.append((radius, radius * torch.rand(20, 1, dtype=torch.float64) * directions))
    for radius, tokens in cases:
        assert largest_gain("sigmoid", tokens, norm="seq") <= bound(radius)
        assert largest_gain("sigmoid", tokens, length=len(tokens)) <= len(tokens) * bound(radius)
    softmax = [largest_gain("softmax", tokens) / bound(radius) for radius, tokens in clusters]
    # R^2 more by 4 log 4: twice as large, if it grows as R^2 exp(R^2 / 8)
    assert all(1.7 < later / earlier < 2.1 for earlier, later in pairwise(softmax))
    assert softmax[-1] > 2


def test_query_key_norms_come_before_the_rotation():
    layer = create_layer("sigmoid", 16, 2, length=9, positions="rotary", query_key_norm="layer").double()
    for norm in (layer.query_norm, layer.key_norm):
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter)
    x, ranks = torch.randn(2, 9, 16, dtype=torch.float64), torch.arange(9)[None]
    split = {name: getattr(layer, name)(x).unflatten(-1, (2, 8)).transpose(1, 2) for name in ("query", "key", "value")}
    rotate = layer.positions.rotate
    normed = {name: getattr(layer, f"{name}_norm")(split[name]) for name in ("query", "key")}
    before = {name: rotate(normed[name], ranks) for name in normed}
    after = {name: getattr(layer, f"{name}_norm")(rotate(split[name], ranks)) for name in normed}
    found = layer(x, context=Context(want=frozenset({"weights"}))).extras["weights"]
    weights = [((h["query"] @ h["key"].mT / math.sqrt(8) - math.log(9)).sigmoid().tril()) for h in (before, after)]
    close(found, weights[0])
    assert (found - weights[1]).abs().max() > 1e-3


def test_dropout_is_not_rescaled_by_row():
    tensors = {"q": torch.zeros(1, 1, 200, 4), "k": torch.zeros(1, 1, 200, 4), "v": torch.eye(200)[None, None]}
    output = apply(MECHANISM, tensors, pattern="noncausal-self", dropout=0.25).output
    kept = output[output != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 0.5 / 0.75))
    assert abs(kept.numel() / output.numel() - 0.75) < 0.02


def test_gradcheck():
    tensors = [x.requires_grad_() for x in inputs(4, batch=1).values()]
    head_bias = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def run(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        return apply(MECHANISM, {"q": q, "k": k, "v": v, "head_bias": b}, config=Config(length=4)).output

    assert torch.autograd.gradcheck(run, (*tensors, head_bias))


def test_a_layer_learns_one_bias_a_head_that_starts_at_b():
    torch.manual_seed(0)
    plain = create_layer("sigmoid", 8, 2, length=12).double()
    learned = create_layer("sigmoid", 8, 2, length=12, learn_bias=True).double()
    extra = learned.load_state_dict(plain.state_dict(), strict=False)
    assert extra.missing_keys == ["projection.head_bias"] and not list(plain.projection.parameters())
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    close(learned(x).output, plain(x).output)
    learned(x).output.square().sum().backward()
    assert learned.projection.head_bias.grad.abs().min() > 0
    with torch.no_grad():
        learned.projection.head_bias.copy_(torch.tensor([0.5, -2.0]))
    state, outputs = learned(x[:, :0], context=Context(want=frozenset({"state"}))).state, []
    for t in range(12):
        y, state = learned.step(x[:, t], state)
        outputs.append(y)
    close(torch.stack(outputs, 1), learned(x).output)


def test_a_learned_bias_works_on_encoded_memory():
    layer = create_layer("sigmoid", 8, 2, pattern="causal-cross", learn_bias=True).double()
    layer.projection.head_bias.data += torch.tensor([0.5, -2.0])
    x, memory = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 7, 8, dtype=torch.float64)
    state = layer.encode_memory(memory)
    close(layer(x, state=state).output, layer(x, memory).output)


@pytest.mark.parametrize(
    "name", ["sigmoid_causal_more_keys_flash", "sigmoid_causal_more_queries_flash", "sigmoid_cross_masked_flash"]
)
def test_parity_with_the_kernels_reference(name):
    arrays = load(name)
    tensors = {x: arrays[x].requires_grad_() for x in "qkv"}
    cross = "key_mask" in arrays
    result = apply(
        MECHANISM,
        tensors,
        pattern="noncausal-cross" if cross else "causal-self",
        memory_mask=Mask(valid=arrays["key_mask"]) if cross else None,
        config=Config(sigmoid_bias=float(arrays["sigmoid_bias"])),
        want={"weights"},
    )
    close(result.output, arrays["out"], 1e-10)  # observed 4e-16
    if not cross:  # weights of masked keys are gathered to the right here
        close(result.extras["weights"], arrays["attn"], 1e-10)
    for x, gradient in zip(
        "qkv", torch.autograd.grad(result.output, list(tensors.values()), arrays["grad_out"]), strict=True
    ):
        close(gradient, arrays[f"grad_{x}"], 1e-10)  # observed 9e-16


def official_weights(arrays: dict[str, Tensor], features: Tensor | None = None) -> dict[str, Tensor]:
    """A recorded layer's weights by the names of ours; `features` is the order in which a query's and key's are taken."""
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
    ],
)
def test_parity_with_the_official_layer(name, pattern, options):
    arrays = load(name)
    layer = create_layer("sigmoid", 16, 2, pattern=pattern, sigmoid_bias=float(arrays["sigmoid_bias"]), **options)
    layer = layer.double()
    layer.load_state_dict(official_weights(arrays))
    x = arrays["x"].requires_grad_()
    if name == "sigmoid_causal_padded":
        # the reference pads keys only: hide them by a bias, so that padded queries are computed too
        bias = torch.zeros(arrays["mask"].shape, dtype=torch.float64).masked_fill(~arrays["mask"], -torch.inf)
        output = layer(x, context=Context(mask=Mask(bias=bias))).output
    else:
        output = layer(x).output
    close(output, arrays["out"], 1e-10)  # observed 3e-16
    (gradient,) = torch.autograd.grad(output, x, arrays["grad_out"])
    close(gradient, arrays["grad_x"], 1e-10)  # observed 4e-16
    core = {key: arrays[key] for key in "qkv"}
    config = Config(sigmoid_bias=float(arrays["sigmoid_bias"]), norm=options.get("norm", "none"))
    found = apply(MECHANISM, core, pattern=pattern, config=config, want={"weights"}).extras["weights"]
    if name != "sigmoid_causal_padded":
        close(found, arrays["attn"], 1e-10)


@pytest.mark.parametrize(
    ("name", "pattern", "options"),
    [
        ("sigmoid_rope", "causal-self", {"positions": "rotary", "query_key_norm": "layer"}),
        ("sigmoid_alibi", "causal-self", {"positions": "alibi", "log_temperature": 0.3}),
        ("sigmoid_cross", "noncausal-cross", {"query_key_norm": "layer", "value_norm": "layer"}),
        ("sigmoid_cross_streaming", "causal-cross", {"value_norm": "layer"}),
    ],
)
def test_parity_with_the_official_layers_of_positions_and_memory(name, pattern, options):
    arrays = load(name)
    dim, heads = arrays["x"].shape[-1], arrays["attn"].shape[1]
    bias = float(arrays["sigmoid_bias"])
    layer = create_layer("sigmoid", dim, heads, pattern=pattern, sigmoid_bias=bias, **options).double()
    # they turn neighbouring features, regard features half a head apart
    pairs = torch.arange(dim // heads).view(-1, 2).mT.flatten() if options.get("positions") == "rotary" else None
    layer.load_state_dict(official_weights(arrays, pairs))
    inputs = {x: arrays[x].requires_grad_() for x in ("x", "memory") if x in arrays}
    mask = memory_mask = None
    if name == "sigmoid_cross":
        memory_mask = Mask(valid=arrays["mask"][:, 0, 0])
    elif name == "sigmoid_cross_streaming":
        hidden = ~arrays["mask"]
        mask = Mask(bias=torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, -torch.inf)[None, None])
    context = Context(mask=mask, memory_mask=memory_mask, want=frozenset({"weights"}))
    result = layer(*inputs.values(), context=context)
    close(result.output, arrays["out"], 1e-10)  # observed 9e-16
    if memory_mask is None:  # weights of masked keys are gathered to the right here
        close(result.extras["weights"], arrays["attn"], 1e-10)
    gradients = torch.autograd.grad(result.output, list(inputs.values()), arrays["grad_out"])
    for x, gradient in zip(inputs, gradients, strict=True):
        close(gradient, arrays[f"grad_{x}"], 1e-10)  # observed 7e-16


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "tanh"},
        {"norm": "row"},
        {"schedule": "linear"},
        {"length": 0},
        {"length": 4, "sigmoid_bias": -1.0},
        {"schedule": "position", "length": 4},
        {"schedule": "position", "sigmoid_bias": 0.0},
        {"norm": "seq", "length": 4},
        {"norm": "sqrt", "learn_bias": True},
        {"norm": "seq", "schedule": "position"},
        {"window": (-1, None)},
        {"window": (1,)},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(Unsupported):
        Config(**options)


def test_options_that_do_not_fit_the_call_are_refused():
    tensors = inputs(4)
    with pytest.raises(Unsupported, match="3 biases for 2 heads"):
        apply(MECHANISM, tensors, config=Config(sigmoid_bias=(0.0, 1.0, 2.0)))
    with pytest.raises(Unsupported, match="window"):
        apply(MECHANISM, tensors, config=Config(window=(2, 1)))
    with pytest.raises(Unsupported, match="window"):
        apply(MECHANISM, tensors, pattern="noncausal-cross", config=Config(window=(2, None)))
    with pytest.raises(Unsupported, match="window"):
        create_layer("sigmoid", 8, 2, pattern="causal-cross", window=(2, None))
    with pytest.raises(Unsupported, match="biases"):
        create_layer("sigmoid", 8, 2, sigmoid_bias=(0.0, 1.0, 2.0))
