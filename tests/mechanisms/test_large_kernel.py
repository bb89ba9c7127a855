"""What is peculiar to large kernel attention: its field, its grid, its causal form, and parity with the official code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from regard.apply import apply
from regard.contract import Context, Mask, Pattern, Shape, Unsupported
from regard.create import create_layer
from regard.mechanisms.large_kernel import MECHANISM, LargeKernelLayer, sample_inputs

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
WANT_STATE = Context(want=frozenset({"state"}))
KERNELS = {(7, 2): 9, (14, 3): 17, (21, 3): 23, (28, 4): 31, (10, 2): 11}
OPTIONS = [
    {},
    {"kernel": 7, "dilation": 2},
    {"kernel": 3, "dilation": 1},
    {"gating": "add"},
    {"gating": "none"},
    {"sigmoid": True},
    {"without": ("depthwise",)},
    {"without": ("dilated",)},
    {"without": ("pointwise",)},
    {"residual": False},
]


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def inputs_of(n: int, *, axes: int = 2, batch: int = 2, pattern: str = "noncausal-self", channels: int = 4, **options):
    return sample_inputs(
        torch.Generator().manual_seed(n),
        batch=batch,
        n=n,
        m=n,
        dtype=torch.float64,
        pattern=Pattern(pattern),
        config=MECHANISM.options(**options),
        sizes={"c": channels},
        axes=axes,
    )


def run(inputs, *, grid=None, pattern="noncausal-self", options=None, **call):
    config = MECHANISM.options(**(options or {}))
    return apply(MECHANISM, inputs, pattern=pattern, grid=grid, config=config, **call)


def make_layer(pattern: str = "noncausal-self", dim: int = 6, axes: int | None = None, **options) -> LargeKernelLayer:
    layer = create_layer("large_kernel", dim, pattern=pattern, axes=axes, **options).double()
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return layer


def close(found, expected, tolerance=1e-12):
    assert found.shape == expected.shape
    assert float((found - expected).detach().abs().max()) <= tolerance * float(expected.detach().abs().max())


def tokens(image: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) to (B, N, C)."""
    return image.flatten(2).mT


def impulse_response(kernel: int, dilation: int, size: int, pattern="noncausal-self", axes=2) -> torch.Tensor:
    """A of positive filters for one pixel set in the middle."""
    options = {"kernel": kernel, "dilation": dilation, "gating": "none"}
    filters = inputs_of(1, axes=axes, channels=1, batch=1, **options)
    x = torch.zeros(1, size**axes, 1, dtype=torch.float64)
    x[0, size**axes // 2] = 1
    weights = {name: filters[name].abs() for name in ("depthwise", "dilated")}
    grid = (size,) * axes if axes > 1 else None
    return run({"x": x, **weights}, grid=grid, pattern=pattern, options=options).output.view((size,) * axes)


@pytest.mark.parametrize("kernel", KERNELS)
def test_receptive_field(kernel):
    field = KERNELS[kernel]
    assert MECHANISM.options(kernel=kernel[0], dilation=kernel[1]).receptive_field == field
    seen = impulse_response(*kernel, 61) > 0
    places = seen.nonzero()
    assert places.amin(0).tolist() == [30 - field // 2] * 2
    assert places.amax(0).tolist() == [30 + field // 2] * 2
    assert int(seen.sum()) == field**2


def test_causal_field_reaches_back_only():
    seen = impulse_response(21, 3, 61, "causal-self", axes=1) > 0
    assert seen.nonzero().flatten().tolist() == list(range(30, 53))


def test_interior_is_one_convolution_with_the_composed_kernel():
    x = inputs_of(31 * 29, channels=2)
    del x["depthwise_bias"], x["dilated_bias"], x["pointwise"], x["pointwise_bias"]
    spread = torch.zeros(2, 19, 19, dtype=torch.float64)
    spread[:, ::3, ::3] = x["dilated"].view(2, 7, 7)
    # a full convolution of the two correlation kernels
    composed = F.conv2d(spread[None], x["depthwise"].view(2, 1, 5, 5).flip(2, 3), padding=4, groups=2)[0]
    image = x["x"].mT.unflatten(2, (31, 29))
    expected = F.conv2d(image, composed[:, None], padding=11, groups=2)
    found = run(x, grid=(31, 29), options={"gating": "none"}).output.mT.unflatten(2, (31, 29))
    inner = (slice(None), slice(None), slice(11, -11), slice(11, -11))
    close(found[inner], expected[inner])
    assert (found - expected).abs().max() > 1e-3  # zeros between the two convolutions matter at the border


def test_identity_and_zero_without_a_gate():
    x = inputs_of(30)
    x["pointwise"] = torch.zeros_like(x["pointwise"])
    for constant in (0.0, 1.0):
        x["pointwise_bias"] = torch.full_like(x["pointwise_bias"], constant)
        close(run(x, grid=(5, 6)).output + 1, constant * x["x"] + 1)


def test_homogeneous_of_degree_two_without_biases():
    x = {name: t for name, t in inputs_of(42).items() if not name.endswith("bias")}
    close(run({**x, "x": 3 * x["x"]}, grid=(6, 7)).output, 9 * run(x, grid=(6, 7)).output)


def test_translation_equivariant_inside_and_not_permutation_equivariant():
    x = {name: t for name, t in inputs_of(40 * 40, batch=1).items() if not name.endswith("bias")}
    image = torch.zeros(1, 40, 40, 4, dtype=torch.float64)
    image[:, 14:20, 15:22] = torch.randn(1, 6, 7, 4, dtype=torch.float64)
    shifted = image.roll((3, -2), (1, 2))
    outputs = [run({**x, "x": i.flatten(1, 2)}, grid=(40, 40)).output.unflatten(1, (40, 40)) for i in (image, shifted)]
    close(outputs[0].roll((3, -2), (1, 2)), outputs[1])
    small = inputs_of(30)
    order = torch.randperm(30)
    permuted = run({**small, "x": small["x"][:, order]}, grid=(5, 6)).output
    assert (permuted - run(small, grid=(5, 6)).output[:, order]).abs().max() > 1e-3


def test_gatings_and_sigmoid():
    x = inputs_of(30)
    gate = run(x, grid=(5, 6), options={"gating": "none"}).output
    close(run(x, grid=(5, 6)).output, gate * x["x"])
    close(run(x, grid=(5, 6), options={"gating": "add"}).output, gate + x["x"])
    close(run(x, grid=(5, 6), options={"sigmoid": True}).output, gate.sigmoid() * x["x"])


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_grids_of_one_two_and_three_axes_equal_the_definition(axes):
    options = {"kernel": 7, "dilation": 2}
    grid = (7, 5, 4)[:axes]
    x = inputs_of(int(np.prod(grid)), axes=axes, **options)
    for name in ("depthwise", "dilated", "pointwise", None):
        kept = {k: t for k, t in x.items() if name is None or not k.startswith(name)}
        expected = run(kept, grid=grid, options=options, form="reference").output
        close(run(kept, grid=grid, options=options).output, expected)


def test_a_grid_of_one_axis_is_a_sequence():
    x = inputs_of(37, axes=1)
    assert torch.equal(run(x, grid=(37,)).output, run(x).output)


def test_flat_filters_have_their_taps_row_by_row():
    x = inputs_of(1, channels=1, batch=1, kernel=3, dilation=2)
    image = torch.randn(1, 1, 6, 7, dtype=torch.float64)
    expected = F.conv2d(image, x["depthwise"].view(1, 1, 3, 3), padding=1)
    found = run(
        {"x": tokens(image), "depthwise": x["depthwise"]},
        grid=(6, 7),
        options={"gating": "none", "kernel": 3, "dilation": 2},
    )
    close(found.output, tokens(expected))


def test_invalid_places_stay_where_they_are_and_are_zeroed_before_each_convolution():
    x = inputs_of(56)
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


def test_masked_border_rows_act_like_a_smaller_grid():
    x = inputs_of(56)
    whole = run(x, grid=(8, 7), mask=Mask(lengths=torch.tensor([35, 56]))).output
    small = run({**x, "x": x["x"][:1, :35]}, grid=(5, 7)).output
    close(whole[:1, :35], small)


def test_sequences_are_gathered_where_grids_are_not():
    x = inputs_of(12, axes=1, batch=1)
    valid = torch.ones(1, 12, dtype=torch.bool)
    valid[:, 4] = False
    alone = run({**x, "x": x["x"][valid][None]}).output
    close(run(x, mask=Mask(valid=valid)).output[valid][None], alone)
    in_place = run(x, grid=(12,), mask=Mask(valid=valid)).output[valid][None]
    assert (in_place - alone).abs().max() > 1e-3


@pytest.mark.parametrize("kernel", KERNELS)
def test_causal_form_in_pieces_and_steps_equals_the_definition(kernel):
    options = {"kernel": kernel[0], "dilation": kernel[1]}
    x = inputs_of(45, axes=1, pattern="causal-self", **options)
    expected = run(x, pattern="causal-self", options=options, form="reference").output
    close(run(x, pattern="causal-self", options=options).output, expected)
    state, outputs, start = None, [], 0
    for stop in (1, 3, 3, 20, *range(21, 46)):
        part = {**x, "x": x["x"][:, start:stop]}
        result = run(part, pattern="causal-self", options=options, state=state, return_state=True)
        outputs.append(result.output)
        state, start = result.state, stop
    close(torch.cat(outputs, 1), expected)
    assert state.length.tolist() == [45, 45]


def test_rows_of_unequal_length_go_on_and_may_rest():
    x = inputs_of(30, axes=1, pattern="causal-self")
    expected = run(x, pattern="causal-self", form="reference").output
    head = {**x, "x": torch.stack([x["x"][0, :6], F.pad(x["x"][1, :2], (0, 0, 0, 4), value=float("nan"))])}
    state = run(head, pattern="causal-self", mask=Mask(lengths=torch.tensor([6, 2])), return_state=True).state
    for t in range(2, 6):  # the first row rests
        token = {**x, "x": torch.stack([torch.full((1, 4), float("nan")).double(), x["x"][1, t : t + 1]])}
        result = run(token, pattern="causal-self", mask=Mask(lengths=torch.tensor([0, 1])), state=state)
        close(result.output[1], expected[1, t : t + 1])
        assert (result.output[0] == 0).all()
        state = result.state
    assert state.length.tolist() == [6, 6]
    close(run({**x, "x": x["x"][:, 6:]}, pattern="causal-self", state=state).output, expected[:, 6:])


def test_state_holds_what_the_spec_counts():
    """The last 4 inputs of DW and the last 18 outputs of DW: 22 C numbers, at any length."""
    for n in (1, 3, 40):
        x = inputs_of(n, axes=1, pattern="causal-self")
        state = run(x, pattern="causal-self", return_state=True).state
        assert state.inputs.shape == (2, 4, 4) and state.mixed.shape == (2, 18, 4)
    assert MECHANISM.cost(Shape(1, 1, 9, 9, 4, 4), MECHANISM.config()).state == 22 * 4
    close(state.inputs, x["x"][:, -4:])


def test_narrow_dtypes_keep_the_products_in_float32():
    """The gate of large activations overflows float16 long before their product with small inputs does."""
    x = {name: t.half() for name, t in inputs_of(30).items()}
    x["pointwise_bias"] = torch.full_like(x["pointwise_bias"], 60000)
    x["pointwise"] = x["pointwise"] + 60000
    x["x"] = x["x"].abs() * 1e-3
    output = run(x, grid=(5, 6)).output
    assert output.dtype == torch.float16 and output.isfinite().all()


@pytest.mark.parametrize("form", ["parallel", "reference"])
def test_parity_of_lka(form):
    f = load("large_kernel_lka")
    x = tokens(f["x"]).requires_grad_()
    inputs = {
        "x": x,
        "depthwise": f["weight_conv0_weight"].flatten(1),
        "depthwise_bias": f["weight_conv0_bias"],
        "dilated": f["weight_conv_spatial_weight"].flatten(1),
        "dilated_bias": f["weight_conv_spatial_bias"],
        "pointwise": f["weight_conv1_weight"][..., 0, 0],
        "pointwise_bias": f["weight_conv1_bias"],
    }
    output = run(inputs, grid=(11, 14), form=form).output
    close(output, tokens(f["out"]), 1e-10)
    close(run(inputs, grid=(11, 14), options={"gating": "none"}, form=form).output, tokens(f["gate"]), 1e-10)
    (gradient,) = torch.autograd.grad((output * tokens(f["grad_out"])).sum(), x)
    close(gradient, tokens(f["grad_x"]), 1e-10)


def recorded_layer(f, prefix: str = "weight_") -> LargeKernelLayer:
    layer = create_layer("large_kernel", f["x"].shape[1], pattern="noncausal-self").double()
    gate = f"{prefix}spatial_gating_unit_"
    names = {"depthwise": f"{gate}conv0", "dilated": f"{gate}conv_spatial", "pointwise": f"{gate}conv1"}
    names |= {"input_proj": f"{prefix}proj_1", "output_proj": f"{prefix}proj_2"}
    weights = {}
    for own, name in names.items():
        if own.endswith("proj"):
            weights[f"{own}.weight"], weights[f"{own}.bias"] = f[f"{name}_weight"].flatten(1), f[f"{name}_bias"]
        else:
            weights[f"weights.{own}"] = f[f"{name}_weight"].flatten(1)
            weights[f"weights.{own}_bias"] = f[f"{name}_bias"]
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
    """The block around it, written out here: batch norm, LayerScale, the host's own residual, convolutional FFN."""
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


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_layer_decodes_with_every_option(options):
    layer = make_layer("causal-self", **options)
    x = torch.randn(2, 30, 6, dtype=torch.float64)
    whole = layer(x).output
    first = layer(x[:, :5], context=WANT_STATE)
    outputs, state = [first.output], first.state
    for t in range(5, 30):
        y, state = layer.step(x[:, t], state)
        outputs.append(y[:, None])
    close(torch.cat(outputs, 1), whole)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("pattern", ["noncausal-self", "causal-self"])
def test_layer_on_padded_sequences_equals_rows_alone(pattern, options):
    layer = make_layer(pattern, axes=1, **options)
    x = torch.randn(2, 12, 6, dtype=torch.float64)
    valid = torch.rand(2, 12) < 0.6
    output = layer(torch.where(valid[..., None], x, float("nan")), context=Context(mask=Mask(valid=valid))).output
    for row in range(2):
        close(output[row : row + 1, valid[row]], layer(x[row : row + 1, valid[row]]).output)
    assert (output[~valid] == 0).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_layer_on_a_masked_grid_equals_a_smaller_grid(options):
    layer = make_layer(**options)
    x = torch.randn(2, 42, 6, dtype=torch.float64)
    valid = (torch.arange(42) < 28).expand(2, -1)
    poisoned = torch.where(valid[..., None], x, float("nan"))
    output = layer(poisoned, context=Context(grid=(6, 7), mask=Mask(valid=valid))).output
    close(output[:, :28], layer(x[:, :28], context=Context(grid=(4, 7))).output)
    assert (output[:, 28:] == 0).all()


def test_the_inner_residual_can_be_left_to_the_host():
    layer = make_layer()
    host = make_layer(residual=False)
    host.load_state_dict(layer.state_dict())
    x, context = torch.randn(1, 20, 6, dtype=torch.float64), Context(grid=(4, 5))
    close(layer(x, context=context).output, x + host(x, context=context).output)


def test_the_gate_multiplies_the_input_of_the_large_kernel_and_not_of_the_block():
    layer = make_layer(residual=False)
    layer.weights["pointwise"].data.zero_()
    layer.weights["pointwise_bias"].data.fill_(1.0)
    x = torch.randn(1, 20, 6, dtype=torch.float64)
    expected = layer.output_proj(F.gelu(layer.input_proj(x)))
    close(layer(x, context=Context(grid=(4, 5))).output, expected)


def test_parameter_count_and_initial_values():
    """C^2 + C (k1^2 + k2^2) + 3 C for the operator, 2 C^2 + 2 C for the projections around it."""
    dim = 64
    layer = create_layer("large_kernel", dim, pattern="noncausal-self")
    own = sum(p.numel() for p in layer.weights.values())
    assert own == dim**2 + 74 * dim + 3 * dim
    assert sum(p.numel() for p in layer.parameters()) == own + 2 * dim**2 + 2 * dim
    for name, fan_out in (("depthwise", 25), ("dilated", 49), ("pointwise", dim)):
        assert layer.weights[name].std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
        assert (layer.weights[f"{name}_bias"] == 0).all()
    assert layer.input_proj.weight.std().item() == pytest.approx((2 / dim) ** 0.5, rel=0.1)


def test_cost_is_linear_in_the_pixels():
    few, many = (MECHANISM.cost(Shape(1, 1, n, n, 64, 64), MECHANISM.config()) for n in (256, 4096))
    assert many.flops == 16 * few.flops == 2.0 * 4096 * (64**2 + 74 * 64)
    assert MECHANISM.recurrent


@pytest.mark.parametrize(
    "options",
    [{"kernel": 10, "dilation": 3}, {"gating": "dot"}, {"kernel": 0}, {"dilation": 0}, {"without": ("gate",)}],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(Unsupported):
        MECHANISM.options(**options)
    with pytest.raises(Unsupported, match="no tokens mix"):
        MECHANISM.options(without=("depthwise", "dilated"))


def test_calls_that_do_not_fit_are_refused():
    x = inputs_of(30)
    refused = [
        lambda: run(x, grid=(5, 5)),
        lambda: run(x, grid=(2, 3, 5, 1)),
        lambda: run(x),  # filters of two axes on a sequence
        lambda: run(x, grid=(5, 6), pattern="causal-self"),
        lambda: run({**x, "pointwise": x["pointwise"][:, :3]}, grid=(5, 6)),
        lambda: run({**x, "pointwise": x["pointwise"][:3], "pointwise_bias": x["pointwise_bias"][:3]}, grid=(5, 6)),
        lambda: run({"x": x["x"], "depthwise_bias": x["depthwise_bias"], "dilated": x["dilated"]}, grid=(5, 6)),
        lambda: run({"x": x["x"], "pointwise": x["pointwise"]}, grid=(5, 6)),
        lambda: run(x, grid=(5, 6), mask=Mask(cu_seqlens=torch.tensor([0, 30]))),
        lambda: run(x, pattern="noncausal-cross"),
    ]
    for call in refused:
        with pytest.raises(Unsupported):
            call()


def test_layer_refuses_grids_that_its_filters_do_not_have():
    x = torch.randn(1, 12, 6, dtype=torch.float64)
    for layer, grid in (
        (make_layer(), None),
        (make_layer(), (2, 2, 3)),
        (make_layer(axes=1), (3, 4)),
        (make_layer("causal-self"), (3, 4)),
        (make_layer(), (3, 5)),
    ):
        with pytest.raises(Unsupported, match="grid"):
            layer(x, context=Context(grid=grid))
    with pytest.raises(Unsupported, match="axes"):
        make_layer("causal-self", axes=2)


def test_three_axes():
    layer = make_layer(axes=3, kernel=7, dilation=2)
    x = torch.randn(1, 24, 6, dtype=torch.float64)
    assert layer(x, context=Context(grid=(2, 3, 4))).output.shape == x.shape
