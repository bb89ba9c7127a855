"""Tests specific to large kernel attention: its field, its grid, its causal form, and parity with the official code."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support import calls, close, in_pieces, load, refused, shaken
from torch import Tensor

from regard.contract import Context, Mask, Pattern, Shape, Unsupported
from regard.create import create_layer
from regard.mechanisms.large_kernel import MECHANISM, LargeKernelLayer, sample_inputs

run = calls(MECHANISM, "noncausal-self")
UNGATED = {"gating": "none"}


def inputs(n: int, *, axes: int = 2, batch: int = 2, channels: int = 4, **options) -> dict[str, Tensor]:
    sizes = {"batch": batch, "n": n, "m": n, "sizes": {"c": channels}, "axes": axes}
    call = {"dtype": torch.float64, "pattern": Pattern.NONCAUSAL_SELF, "config": MECHANISM.options(**options)}
    return sample_inputs(torch.default_generator, **sizes, **call)


def make_layer(pattern: str = "noncausal-self", axes: int | None = None, **options) -> LargeKernelLayer:
    return shaken(create_layer("large_kernel", 6, pattern=pattern, axes=axes, **options))


def tokens(image: Tensor) -> Tensor:
    """Convert (B, C, H, W) to (B, N, C)."""
    return image.flatten(2).mT


def impulse_response(kernel: int, dilation: int, size: int, axes: int = 2, **call) -> Tensor:
    """The map A for positive filters and an image with a single pixel set, in the middle."""
    options = {"kernel": kernel, "dilation": dilation, **UNGATED}
    filters = inputs(1, axes=axes, channels=1, batch=1, **options)
    x = torch.zeros(1, size**axes, 1, dtype=torch.float64)
    x[0, size**axes // 2] = 1
    weights = {name: filters[name].abs() for name in ("depthwise", "dilated")}
    return run({"x": x, **weights}, options, **call).output.view((size,) * axes)


@pytest.mark.parametrize(
    ("kernel", "dilation", "field"), [(7, 2, 9), (14, 3, 17), (21, 3, 23), (28, 4, 31), (10, 2, 11)]
)
def test_receptive_field(kernel, dilation, field):
    assert MECHANISM.options(kernel=kernel, dilation=dilation).receptive_field == field
    seen = impulse_response(kernel, dilation, 61, grid=(61, 61)) > 0
    places = seen.nonzero()
    assert places.amin(0).tolist() == [30 - field // 2] * 2
    assert places.amax(0).tolist() == [30 + field // 2] * 2
    assert int(seen.sum()) == field**2
    causal = impulse_response(kernel, dilation, 91, 1, pattern="causal-self") > 0
    assert causal.nonzero().flatten().tolist() == list(range(45, 45 + field))


def test_interior_is_one_convolution_with_the_composed_kernel():
    x = inputs(31 * 29, channels=2)
    del x["depthwise_bias"], x["dilated_bias"], x["pointwise"], x["pointwise_bias"]
    spread = torch.zeros(2, 19, 19, dtype=torch.float64)
    spread[:, ::3, ::3] = x["dilated"].view(2, 7, 7)
    # the full convolution of the two correlation kernels
    composed = F.conv2d(spread[None], x["depthwise"].view(2, 1, 5, 5).flip(2, 3), padding=4, groups=2)[0]
    image = x["x"].mT.unflatten(2, (31, 29))
    expected = F.conv2d(image, composed[:, None], padding=11, groups=2)
    found = run(x, UNGATED, grid=(31, 29)).output.mT.unflatten(2, (31, 29))
    inner = (slice(None), slice(None), slice(11, -11), slice(11, -11))
    close(found[inner], expected[inner])
    assert (found - expected).abs().max() > 1e-3  # zero padding between the two convolutions matters at the border


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_constant_gates_multiply_the_input(constant):
    x = inputs(30)
    x["pointwise"] = torch.zeros_like(x["pointwise"])
    x["pointwise_bias"] = torch.full_like(x["pointwise_bias"], constant)
    close(run(x, grid=(5, 6)).output, constant * x["x"])


def test_homogeneous_of_degree_two_without_biases():
    x = {name: t for name, t in inputs(42).items() if not name.endswith("bias")}
    close(run({**x, "x": 3 * x["x"]}, grid=(6, 7)).output, 9 * run(x, grid=(6, 7)).output)


def test_translation_equivariant_inside_and_not_permutation_equivariant():
    x = {name: t for name, t in inputs(40 * 40, batch=1).items() if not name.endswith("bias")}
    image = torch.zeros(1, 40, 40, 4, dtype=torch.float64)
    image[:, 14:20, 15:22] = torch.randn(1, 6, 7, 4, dtype=torch.float64)
    shifted = image.roll((3, -2), (1, 2))
    outputs = [run({**x, "x": i.flatten(1, 2)}, grid=(40, 40)).output.unflatten(1, (40, 40)) for i in (image, shifted)]
    close(outputs[0].roll((3, -2), (1, 2)), outputs[1])
    small, order = inputs(30), torch.randperm(30)
    permuted = run({**small, "x": small["x"][:, order]}, grid=(5, 6)).output
    assert (permuted - run(small, grid=(5, 6)).output[:, order]).abs().max() > 1e-3


def test_gatings_and_sigmoid():
    x = inputs(30)
    gate = run(x, UNGATED, grid=(5, 6)).output
    close(run(x, grid=(5, 6)).output, gate * x["x"])
    close(run(x, {"gating": "add"}, grid=(5, 6)).output, gate + x["x"])
    close(run(x, {"sigmoid": True}, grid=(5, 6)).output, gate.sigmoid() * x["x"])


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("missing", ["depthwise", "dilated", "pointwise", "nothing"])
@pytest.mark.parametrize(("kernel", "dilation"), [(7, 2), (9, 3)], ids=["even", "odd"])
def test_grids_of_one_two_and_three_axes_equal_the_definition(kernel, dilation, missing, axes):
    """Dilated filters with even and odd sides, on grids whose sides are and are not multiples of the dilation."""
    options, grid = {"kernel": kernel, "dilation": dilation}, (7, 6, 4)[:axes]
    x = inputs(math.prod(grid), axes=axes, **options)
    kept = {name: t for name, t in x.items() if not name.startswith(missing)}
    found = run(kept, options, grid=grid).output
    close(found, run(kept, options, grid=grid, form="reference").output)
    assert axes > 1 or torch.equal(run(kept, options).output, found)  # without a grid


@pytest.mark.parametrize("grid", [(7,), (3, 4), (3, 3, 3)])
def test_autocast_does_not_reach_the_convolutions(grid):
    """In bfloat16, torch's gradients of depthwise convolutions on small volumes are wrong."""
    layer = make_layer(axes=len(grid)).float()
    x, gradients = torch.randn(2, math.prod(grid), 6), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(x, context=Context(grid=grid)).output
        filters = [p for name, p in layer.named_parameters() if "dilated" in name or "depthwise" in name]
        gradients.append(torch.autograd.grad(y.float().square().sum(), filters))
    for found, expected in zip(*gradients, strict=True):
        assert (found - expected).norm() <= 0.03 * expected.norm()


def test_invalid_places_stay_where_they_are_and_are_zeroed_before_each_convolution():
    x = inputs(56)
    valid = torch.rand(2, 56) < 0.7
    poisoned = {**x, "x": torch.where(valid[..., None], x["x"], float("nan")).requires_grad_()}
    found = run(poisoned, grid=(8, 7), mask=Mask(valid=valid)).output
    assert (found[~valid] == 0).all()
    found.square().sum().backward()
    assert (poisoned["x"].grad[~valid] == 0).all() and poisoned["x"].grad.isfinite().all()
    mask = valid.view(2, 1, 8, 7)
    a = torch.where(mask, x["x"].mT.unflatten(2, (8, 7)), 0)
    a = F.conv2d(a, x["depthwise"].view(4, 1, 5, 5), x["depthwise_bias"], padding=2, groups=4)
    a = torch.where(mask, a, 0)
    a = F.conv2d(a, x["dilated"].view(4, 1, 7, 7), x["dilated_bias"], padding=9, dilation=3, groups=4)
    a = F.conv2d(a, x["pointwise"][..., None, None], x["pointwise_bias"])
    close(found[valid], (tokens(a) * x["x"])[valid])
    close(run(x, grid=(8, 7), mask=Mask(valid=valid), form="reference").output, found)


def test_sequences_are_gathered_where_grids_are_not():
    x = inputs(12, axes=1, batch=1)
    valid = torch.ones(1, 12, dtype=torch.bool)
    valid[:, 4] = False
    alone = run({**x, "x": x["x"][valid][None]}).output
    close(run(x, mask=Mask(valid=valid)).output[valid][None], alone)
    in_place = run(x, grid=(12,), mask=Mask(valid=valid)).output[valid][None]
    assert (in_place - alone).abs().max() > 1e-3


@pytest.mark.parametrize(("kernel", "dilation"), [(7, 2), (21, 3), (28, 4)])
def test_pieces_and_steps_past_the_field_equal_the_definition(kernel, dilation):
    options = {"kernel": kernel, "dilation": dilation}
    x, causal = inputs(45, axes=1, **options), {"options": options, "pattern": "causal-self"}
    pieces = x["x"].split([1, 2, 0, 17, *[1] * 25], 1)
    found, _ = in_pieces(lambda p, s: run({**x, "x": p}, state=s, return_state=True, **causal), pieces, axis=1)
    close(found, run(x, form="reference", **causal).output)


@pytest.mark.parametrize("n", [1, 3, 40])
def test_state_holds_what_the_spec_counts(n):
    """The last 4 inputs and the last 18 outputs of DW: 22 C numbers, at any length."""
    x = inputs(n, axes=1)
    state = run(x, pattern="causal-self", return_state=True).state
    assert state.inputs.shape == (2, 4, 4) and state.mixed.shape == (2, 18, 4)
    assert torch.equal(state.inputs[:, -n:], x["x"][:, -4:])
    assert MECHANISM.cost(Shape(1, 1, 9, 9, 4, 4), MECHANISM.config()).state == 22 * 4


def test_narrow_dtypes_keep_the_products_in_float32():
    """For large activations the gate overflows float16 long before its product with small inputs does."""
    x = {name: t.half() for name, t in inputs(30).items()}
    x["pointwise_bias"] = torch.full_like(x["pointwise_bias"], 60000)
    x["pointwise"] = x["pointwise"] + 60000
    x["x"] = x["x"].abs() * 1e-3
    output = run(x, grid=(5, 6)).output
    assert output.dtype == torch.float16 and output.isfinite().all()


@pytest.mark.parametrize("form", ["parallel", "reference"])
def test_parity_of_lka(form):
    f = load("large_kernel_lka")
    x = tokens(f["x"]).requires_grad_()
    given = {"x": x, "pointwise": f["weight_conv1_weight"][..., 0, 0], "pointwise_bias": f["weight_conv1_bias"]}
    for own, name in (("depthwise", "conv0"), ("dilated", "conv_spatial")):
        given |= {own: f[f"weight_{name}_weight"].flatten(1), f"{own}_bias": f[f"weight_{name}_bias"]}
    output = run(given, grid=(11, 14), form=form).output
    close(output, tokens(f["out"]), 1e-10)
    close(run(given, UNGATED, grid=(11, 14), form=form).output, tokens(f["gate"]), 1e-10)
    (gradient,) = torch.autograd.grad((output * tokens(f["grad_out"])).sum(), x)
    close(gradient, tokens(f["grad_x"]), 1e-10)


def recorded_layer(f, prefix: str = "weight_") -> LargeKernelLayer:
    layer = create_layer("large_kernel", f["x"].shape[1], pattern="noncausal-self").double()
    weights = {}
    for own, name in (("depthwise", "conv0"), ("dilated", "conv_spatial"), ("pointwise", "conv1")):
        name = f"{prefix}spatial_gating_unit_{name}"
        weights |= {f"weights.{own}": f[f"{name}_weight"].flatten(1), f"weights.{own}_bias": f[f"{name}_bias"]}
    for own, name in (("input_proj", f"{prefix}proj_1"), ("output_proj", f"{prefix}proj_2")):
        weights |= {f"{own}.weight": f[f"{name}_weight"].flatten(1), f"{own}.bias": f[f"{name}_bias"]}
    layer.load_state_dict(weights)
    return layer


def test_parity_of_the_attention_module():
    f = load("large_kernel_attention")
    layer, x = recorded_layer(f), tokens(f["x"]).requires_grad_()
    output = layer(x, context=Context(grid=(13, 10))).output
    close(output, tokens(f["out"]), 1e-10)
    (gradient,) = torch.autograd.grad((output * tokens(f["grad_out"])).sum(), x)
    close(gradient, tokens(f["grad_x"]), 1e-10)


def test_parity_inside_the_official_block():
    """The official block is written out here: batch norm, LayerScale, the block's residual, convolutional FFN."""
    f = load("large_kernel_block")
    layer, image = recorded_layer(f, "weight_attn_"), f["x"].clone().requires_grad_()

    def norm(x, i):
        statistics = f[f"norm{i}_running_mean"], f[f"norm{i}_running_var"]
        return F.batch_norm(x, *statistics, f[f"weight_norm{i}_weight"], f[f"weight_norm{i}_bias"])

    def conv(x, name, **options):
        return F.conv2d(x, f[f"weight_mlp_{name}_weight"], f[f"weight_mlp_{name}_bias"], **options)

    mixed = layer(tokens(norm(image, 1)), context=Context(grid=(9, 8))).output.mT.unflatten(2, (9, 8))
    x = image + f["weight_layer_scale_1"][:, None, None] * mixed
    hidden = F.gelu(conv(conv(norm(x, 2), "fc1"), "dwconv_dwconv", padding=1, groups=8))
    output = x + f["weight_layer_scale_2"][:, None, None] * conv(hidden, "fc2")
    close(output, f["out"], 1e-10)
    (gradient,) = torch.autograd.grad((output * f["grad_out"]).sum(), image)
    close(gradient, f["grad_x"], 1e-10)


@pytest.mark.parametrize("options", [{}, {"gating": "add", "residual": False}, {"axes": 3, "kernel": 7, "dilation": 2}])
def test_a_layer_on_a_masked_grid_equals_one_on_a_smaller_grid(options):
    layer, x = make_layer(**options), torch.randn(2, 42, 6, dtype=torch.float64)
    sides = (7, 1) if "axes" in options else (7,)
    valid = (torch.arange(42) < 28).expand(2, -1)
    poisoned = torch.where(valid[..., None], x, float("nan"))
    output = layer(poisoned, context=Context(grid=(6, *sides), mask=Mask(valid=valid))).output
    close(output[:, :28], layer(x[:, :28], context=Context(grid=(4, *sides))).output)
    assert (output[:, 28:] == 0).all()


def test_the_inner_residual_can_be_left_to_the_host():
    layer, host = make_layer(), make_layer(residual=False)
    host.load_state_dict(layer.state_dict())
    x, context = torch.randn(1, 20, 6, dtype=torch.float64), Context(grid=(4, 5))
    close(layer(x, context=context).output, x + host(x, context=context).output)


def test_initial_values():
    dim = 64
    layer = create_layer("large_kernel", dim, pattern="noncausal-self")
    for name, fan_out in (("depthwise", 25), ("dilated", 49), ("pointwise", dim)):
        assert layer.weights[name].std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
        assert (layer.weights[f"{name}_bias"] == 0).all()
    assert layer.input_proj.weight.std().item() == pytest.approx((2 / dim) ** 0.5, rel=0.1)


def test_cost_is_linear_in_the_pixels():
    few, many = (MECHANISM.cost(Shape(1, 1, n, n, 64, 64), MECHANISM.config()) for n in (256, 4096))
    assert many.flops == 16 * few.flops == 2.0 * 4096 * (64**2 + 74 * 64)
    assert MECHANISM.recurrent


@pytest.mark.parametrize(
    ("changed", "call"),
    [
        ({}, {"grid": (5, 5)}),
        ({}, {"grid": (2, 3, 5, 1)}),
        ({}, {"grid": None}),  # two-axis filters on a sequence
        ({}, {"pattern": "causal-self"}),
        ({}, {"mask": Mask(cu_seqlens=torch.tensor([0, 30]))}),
        ({"pointwise": torch.zeros(4, 3).double()}, {}),
        ({"pointwise": torch.zeros(3, 4).double(), "pointwise_bias": torch.zeros(3).double()}, {}),
        ({"depthwise": None}, {}),  # but not its bias
        (dict.fromkeys(("depthwise", "depthwise_bias", "dilated", "dilated_bias")), {}),
    ],
)
def test_calls_that_do_not_fit_are_refused(changed, call):
    given = {name: x for name, x in {**inputs(30), **changed}.items() if x is not None}
    with pytest.raises(Unsupported):
        run(given, **{"grid": (5, 6), **call})


@pytest.mark.parametrize(
    ("options", "grid"),
    [({}, None), ({}, (2, 2, 3)), ({"axes": 1}, (3, 4)), ({"pattern": "causal-self"}, (3, 4)), ({}, (3, 5))],
)
def test_layer_refuses_grids_that_its_filters_do_not_have(options, grid):
    with pytest.raises(Unsupported, match="grid"):
        make_layer(**options)(torch.randn(1, 12, 6, dtype=torch.float64), context=Context(grid=grid))


def test_a_causal_layer_refuses_grids():
    refused("axes", make_layer, "causal-self", axes=2)
