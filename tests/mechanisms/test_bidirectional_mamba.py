"""What is peculiar to bidirectional Mamba: its paths, padding along them, its block, and parity with recorded outputs."""

from __future__ import annotations

import itertools
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from regard.apply import apply
from regard.catalogue import get_mechanism
from regard.contract import Context, Mask, Pattern, Shape, Unsupported
from regard.create import create_layer
from regard.mechanisms.bidirectional_mamba import (
    MECHANISM,
    BidirectionalMambaLayer,
    count_paths,
    find_paths,
    sample_inputs,
    scan_orders,
)
from regard.models import Encoder, EncoderConfig

FIXTURES = File(__file__).parents[1] / "parity" / "fixtures"
NONCAUSAL = "noncausal-self"
SS2D = {"scan": "cross", "combine": "sum", "convolution": "grid", "conv_width": 3, "norm": "layer"}
SCANS = [
    *("forward", "reverse", "bidirectional", "columns", "columns_reverse"),
    *("cross", "snake", "slices", "strided", "windows"),
]
SEQUENCE_OPTIONS = [
    {},
    {"scan": "forward"},
    {"copies": 2},
    {"combine": "sum"},
    {"combine": "gate"},
    {"combine": "concat"},
    {"combine": "concat", "norm": "rms"},
    {"shared": ("conv", "x_proj", "dt", "A", "D")},
    {"shared": ("x_proj",)},
    {"convolution": "once", "shared": ("x_proj", "dt", "D")},
    {"convolution": "once", "shared": ("x_proj", "A")},
    {"convolution": "grid", "conv_width": 3, "axes": 1},
    {"conv_width": 0},
    {"gate": False},
    {"skip": False},
    {"norm": "layer"},
    {"dt_rank": 5, "d_state": 1},
    {"symmetric_dt_init": False},
]
GRID_OPTIONS = [
    *({"scan": scan, "combine": "sum"} for scan in SCANS),
    {"scan": "strided", "combine": "sum", "shared": ("conv", "x_proj", "dt")},
    {"scan": "strided", "combine": "sum", "shared": ("conv", "x_proj")},
    {"scan": "strided", "combine": "sum", "conv_width": 0, "copies": 1},
    {"scan": "cross", "combine": "gate"},
    {"scan": "cross", "combine": "concat", "copies": 2},
    SS2D,
    {**SS2D, "gate": False, "d_state": 1},
    {"scan": "cascade", "convolution": "grid", "conv_width": 3, "combine": "sum", "norm": "layer"},
    {"scan": "cascade", "convolution": "once"},
]


def small_windows(scan: str, sides: tuple[int, int] = (2, 2)) -> dict[str, Any]:
    """Windows of other sides than (7, 7), for the scan that has windows."""
    return {"window": sides} if scan == "windows" else {}


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def make_layer(dim: int = 6, **options) -> BidirectionalMambaLayer:
    torch.manual_seed(len(str(options)))
    layer = create_layer("bidirectional_mamba", dim, pattern=NONCAUSAL, **{"d_state": 4, **options}).double()
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return layer


def inputs_of(n: int, axes: int = 1, options=None, **sizes) -> dict[str, torch.Tensor]:
    config = MECHANISM.options(**(options or {}))
    generator = torch.Generator().manual_seed(n)
    return sample_inputs(
        generator,
        batch=2,
        n=n,
        m=n,
        dtype=torch.float64,
        pattern=Pattern.NONCAUSAL_SELF,
        config=config,
        sizes=sizes,
        grid=(0,) * axes,
    )


def run(inputs, options=None, **call):
    config = MECHANISM.options(**(options or {}))
    return apply(MECHANISM, inputs, pattern=NONCAUSAL, config=config, **call).output


def close(found, expected, tolerance=1e-12):
    assert found.shape == expected.shape
    assert float((found - expected).detach().abs().max()) <= tolerance * float(expected.detach().abs().max())


def one_set(inputs):
    """The same weights for all paths."""
    alone = {name: t[:, :1] for name, t in inputs.items() if name in ("x", "dt", "b", "c")}
    return inputs | alone | {name: inputs[name][:1] for name in ("a", "skip", "dt_bias")}


def orders_of(scan: str, sides, **options) -> list[torch.Tensor]:
    return scan_orders(MECHANISM.options(scan=scan, combine="sum", **options), sides)


def paths_of(scan: str, grid, valid=None):
    n = int(np.prod(grid))
    combine = "sum" if scan == "strided" else "mean"
    config = MECHANISM.options(scan=scan, combine=combine, **small_windows(scan, (2, 3)))
    return find_paths(config, n, grid, None, valid, torch.device("cpu")), n


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("grid", [(3, 5), (5, 3), (1, 4), (4, 4)])
def test_merging_what_was_scanned_gives_every_token_once_for_each_path(scan, grid):
    """And the gradient of scanning is merging: H and W are not mixed up on the way back."""
    paths, n = paths_of(scan, grid)
    x = torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True)
    total = sum(path.put(path.take(x), n) for path in paths)
    close(total, (1 if scan == "strided" else len(paths)) * x)
    cotangents = [torch.randn_like(path.take(x)) for path in paths]
    scanned = sum((path.take(x) * g).sum() for path, g in zip(paths, cotangents, strict=True))
    (gradient,) = torch.autograd.grad(scanned, x)
    close(gradient, sum(path.put(g, n) for path, g in zip(paths, cotangents, strict=True)))


def test_orders_of_a_grid_of_two_rows_of_three():
    expected = {
        "forward": ["012345"],
        "reverse": ["543210"],
        "columns": ["031425"],
        "columns_reverse": ["524130"],
        "bidirectional": ["012345", "543210"],
        "cross": ["012345", "031425", "543210", "524130"],
        "snake": ["012543", "034125", "345210", "521430"],
        "slices": ["012345", "543210", "031425"],
        "strided": ["02", "35", "1", "4"],
        "windows": ["013425", "524310"],
    }
    for scan, orders in expected.items():
        assert ["".join(map(str, order.tolist())) for order in orders_of(scan, (2, 3), **small_windows(scan))] == orders
    assert [order.tolist() for order in orders_of("strided", (3, 3))] == [[0, 2, 6, 8], [3, 5], [1, 7], [4]]
    assert len(orders_of("cross", (2, 2, 2))) == 6
    assert orders_of("cross", (2, 3, 2))[1].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_columns_of_a_strided_grid_are_walked_down():
    assert orders_of("strided", (4, 4))[1].tolist() == [4, 12, 6, 14]
    assert orders_of("strided", (4, 4))[3].tolist() == [5, 13, 7, 15]


@pytest.mark.parametrize("grid", [(4, 5), (3, 3), (1, 6), (6, 1), (1, 1)])
def test_strided_grids_visit_every_place_once(grid):
    places = torch.cat(orders_of("strided", grid))
    assert places.sort().values.tolist() == list(range(grid[0] * grid[1]))


@pytest.mark.parametrize("grid", [(3, 4), (4, 2, 3)])
def test_snakes_and_slices_move_as_they_say(grid):
    if len(grid) == 2:
        for order in orders_of("snake", grid):
            row, column = order // grid[1], order % grid[1]
            assert (row.diff().abs() + column.diff().abs() == 1).all()
    order = orders_of("slices", grid)[2]
    inside = int(np.prod(grid[1:]))
    assert (order.view(inside, grid[0]) % inside == torch.arange(inside)[:, None]).all()
    assert (order.view(inside, grid[0]) // inside == torch.arange(grid[0])).all()


@pytest.mark.parametrize("grid", [(1, 7), (7, 1), (1, 2, 3)])
def test_one_slice_or_slices_of_one_place_are_the_forward_order(grid):
    forward, _, across = orders_of("slices", grid)
    assert torch.equal(forward, across)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("copies", [1, 2])
def test_paths_are_separate_scans_of_permuted_sequences(scan, copies):
    """Each is `mamba` in causal form on the tokens in its order; together they are one scan in groups."""
    grid, options = (3, 5), {"scan": scan, "copies": copies, "combine": "sum", **small_windows(scan)}
    x = inputs_of(15, 2, options)
    expected = torch.zeros(2, 15, 8, dtype=torch.float64)
    strided = scan == "strided"
    scanned = []
    for p, order in enumerate(orders_of(scan, grid, copies=copies, **small_windows(scan))):
        own = {name: x[name][:, 0 if strided else p, order] for name in ("x", "dt", "b", "c")}
        own |= {name: x[name][p] for name in ("a", "skip", "dt_bias")}
        y = apply(get_mechanism("mamba"), own).output
        scanned.append(own)
        expected[:, order] += y
    expected = expected * F.silu(x["z"])
    close(run(x, options, grid=grid), expected)
    close(run(x, options, grid=grid, form="reference"), expected)
    if not strided:
        names = {"x": 2, "dt": 2, "b": 2, "c": 2, "a": 0, "skip": 0, "dt_bias": 0}
        grouped = {name: torch.cat([own[name] for own in scanned], axis) for name, axis in names.items()}
        y = apply(get_mechanism("mamba"), grouped).output
        total = torch.zeros_like(expected)
        for part, order in zip(
            y.split(8, -1), orders_of(scan, grid, copies=copies, **small_windows(scan)), strict=True
        ):
            total[:, order] += part
        close(total * F.silu(x["z"]), expected)


def test_two_directions_are_noncausal_mamba_and_each_token_once_more():
    x = one_set(inputs_of(9))
    del x["z"]
    alone = {name: x[name][:, 0] for name in ("x", "dt", "b", "c")} | {n: x[n][0] for n in ("a", "skip", "dt_bias")}
    once = apply(get_mechanism("mamba"), alone, pattern=NONCAUSAL).output
    steps = F.softplus(alone["dt"] + alone["dt_bias"])
    keys = (alone["b"] * alone["c"]).sum(-1).repeat_interleave(4, 2)
    own = steps * alone["x"] * keys + alone["skip"] * alone["x"]
    close(run(x, {"combine": "sum"}), once + own)
    close(run(x), (once + own) / 2)


def move(inputs, grid, change):
    """Tokens of every input on the changed grid."""

    def moved(t: torch.Tensor, axis: int) -> torch.Tensor:
        return change(t.movedim(axis, 0).unflatten(0, grid)).flatten(0, 1).movedim(0, axis)

    axes = {"x": 2, "dt": 2, "b": 2, "c": 2, "z": 1}
    return inputs | {name: moved(inputs[name], axis) for name, axis in axes.items()}


def test_cross_scans_with_one_set_commute_with_half_turns_and_transposition_but_not_with_a_flip():
    grid, options = (3, 5), {"scan": "cross", "combine": "sum"}
    x = one_set(inputs_of(15, 2, options))
    y = run(x, options, grid=grid).unflatten(1, grid)
    turned = run(move(x, grid, lambda t: t.flip(0, 1)), options, grid=grid).unflatten(1, grid)
    close(turned, y.flip(1, 2))
    transposed = run(move(x, grid, lambda t: t.transpose(0, 1)), options, grid=(5, 3)).unflatten(1, (5, 3))
    close(transposed, y.transpose(1, 2))
    flipped = run(move(x, grid, lambda t: t.flip(1)), options, grid=grid).unflatten(1, grid)
    assert float((flipped - y.flip(2)).abs().max()) > 0.01


def test_a_block_with_one_set_turns_with_its_input():
    layer = make_layer(shared=("conv", "x_proj", "dt", "A", "D"))
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    close(layer(x.flip(1)).output, layer(x).output.flip(1))
    once = make_layer(shared=("conv", "x_proj", "dt", "A", "D"), convolution="once")
    assert float((once(x.flip(1)).output - once(x).output.flip(1)).detach().abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("scan", "seen"),
    [
        ("cross", range(35)),
        ("bidirectional", range(35)),
        ("forward", range(18)),
        ("reverse", range(17, 35)),
        ("columns", [i for i in range(35) if (i % 7, i // 7) <= (3, 2)]),
        ("windows", range(35)),
    ],
)
def test_receptive_field_of_the_centre(scan, seen):
    layer = make_layer(scan=scan)
    x = torch.randn(1, 35, 6, dtype=torch.float64, requires_grad=True)
    output = layer(x, context=Context(grid=(5, 7))).output
    (gradient,) = torch.autograd.grad(output[0, 17].sum(), x)
    assert gradient[0].abs().amax(-1).nonzero().flatten().tolist() == list(seen)


@pytest.mark.parametrize("options", SEQUENCE_OPTIONS, ids=str)
def test_padded_rows_equal_rows_alone_with_every_option(options):
    """The reversed path starts at the last valid token, and no bias of a step or a convolution is written before."""
    layer = make_layer(**options)
    x = torch.randn(3, 8, 6, dtype=torch.float64)
    valid = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0, 0], [0] * 8], dtype=torch.bool)
    poisoned = torch.where(valid[..., None], x, float("nan")).requires_grad_()
    output = layer(poisoned, context=Context(mask=Mask(valid=valid))).output
    for row in range(2):
        close(output[row : row + 1, valid[row]], layer(x[row : row + 1, valid[row]]).output)
    assert (output[~valid] == 0).all()
    (gradient,) = torch.autograd.grad(output.sum(), poisoned)
    assert gradient.isfinite().all() and (gradient[~valid] == 0).all()


@pytest.mark.parametrize("options", SEQUENCE_OPTIONS[:7], ids=str)
def test_packed_documents_do_not_see_each_other_in_either_direction(options):
    layer = make_layer(**options)
    x = torch.randn(1, 9, 6, dtype=torch.float64)
    packed = layer(x, context=Context(mask=Mask(cu_seqlens=torch.tensor([0, 4, 4, 9])))).output
    close(packed[:, :4], layer(x[:, :4]).output)
    close(packed[:, 4:], layer(x[:, 4:]).output)


@pytest.mark.parametrize("options", GRID_OPTIONS, ids=str)
@pytest.mark.parametrize("inner", [(4, 5), (3, 6)])
def test_a_grid_with_a_masked_border_equals_the_smaller_grid(options, inner):
    """Paths and convolutions pass over masked places: rows below and columns to the right."""
    layer, (rows, columns) = make_layer(**options), inner
    small = torch.randn(2, rows * columns, 6, dtype=torch.float64)
    large = torch.full((2, 5, 6, 6), float("nan"), dtype=torch.float64)
    large[:, :rows, :columns] = small.unflatten(1, inner)
    valid = torch.zeros(2, 5, 6, dtype=torch.bool)
    valid[:, :rows, :columns] = True
    context = Context(grid=(5, 6), mask=Mask(valid=valid.flatten(1)))
    output = layer(large.flatten(1, 2), context=context).output.unflatten(1, (5, 6))
    close(output[:, :rows, :columns].flatten(1, 2), layer(small, context=Context(grid=inner)).output)
    assert (output[~valid] == 0).all()


@pytest.mark.parametrize("scan", SCANS)
def test_masked_places_neither_write_nor_decay(scan):
    """The parallel form passes them over; the definition stands still there (a step of 0)."""
    options = {"scan": scan, "combine": "sum", **small_windows(scan, (3, 2))}
    x = inputs_of(20, 2, options)
    valid = torch.rand(2, 20, generator=torch.Generator().manual_seed(5)) < 0.6
    mask = Mask(valid=valid)
    poisoned = x | {"x": torch.where(valid[:, None, :, None], x["x"], float("nan"))}
    found = run(poisoned, options, grid=(4, 5), mask=mask)
    close(found, run(x, options, grid=(4, 5), mask=mask, form="reference"))
    assert (found[~valid] == 0).all()


@pytest.mark.parametrize("scan", ["cross", "strided"])
def test_gradients_on_a_masked_grid_are_those_of_the_definition(scan):
    options = {"scan": scan, "combine": "sum"}
    mask = Mask(valid=torch.rand(2, 12, generator=torch.Generator().manual_seed(4)) < 0.7)
    x = {name: t.requires_grad_() for name, t in inputs_of(12, 2, options).items()}
    found, expected = (
        torch.autograd.grad(run(x, options, grid=(3, 4), mask=mask, form=form).sin().sum(), list(x.values()))
        for form in ("parallel", "reference")
    )
    for a, b in zip(found, expected, strict=True):
        close(a, b)


def test_a_cascade_scans_every_row_and_then_every_column():
    options = {"scan": "cascade", "convolution": "once", "conv_width": 0, "combine": "sum", "gate": False}
    layer = make_layer(**options)
    x = torch.randn(1, 12, 6, dtype=torch.float64)
    y = F.silu(layer.in_proj(x))

    def both(line, first):
        total = torch.zeros_like(line)
        for p in (first, first + 1):
            tokens = line if p == first else line.flip(1)
            parts = layer.x_proj[p](tokens).split([1, 4, 4], -1)
            own = {"x": tokens, "dt": layer.dt_proj[p](parts[0]), "a": -layer.A_log[p].exp()}
            own |= {"b": parts[1][:, :, None], "c": parts[2][:, :, None]}
            out = apply(get_mechanism("mamba"), own | {"skip": layer.D[p], "dt_bias": layer.dt_bias[p]}).output
            total = total + (out if p == first else out.flip(1))
        return total

    image = F.layer_norm(y, (12,)).unflatten(1, (3, 4))
    rows = torch.stack([both(image[:, i], 0) for i in range(3)], 1)
    image = F.layer_norm(rows, (12,))
    columns = torch.stack([both(image[:, :, j], 2) for j in range(4)], 2)
    close(layer(x, context=Context(grid=(3, 4))).output, layer.out_proj(columns.flatten(1, 2)))


def test_the_block_by_hand():
    """Vim, version 2: one pair of outer projections, sets of their own inside, half of the sum of gated directions."""
    layer = make_layer()
    u = torch.randn(2, 7, 6, dtype=torch.float64)
    x, z = layer.in_proj(u).split(12, -1)
    total = 0
    for p in range(2):
        tokens = x.flip(1) if p else x
        taps = F.pad(tokens, (0, 0, 3, 0)).unfold(1, 4, 1)
        tokens = F.silu((taps * layer.convs[p].weight).sum(-1) + layer.convs[p].bias)
        delta, b, c = layer.x_proj[p](tokens).split([1, 4, 4], -1)
        steps = F.softplus(layer.dt_proj[p](delta) + layer.dt_bias[p])
        h, outputs = 0, []
        for t in range(7):
            h = (steps[:, t, :, None] * -layer.A_log[p].exp()).exp() * h
            h = h + (steps[:, t] * tokens[:, t])[..., None] * b[:, t, None]
            outputs.append((h * c[:, t, None]).sum(-1) + layer.D[p] * tokens[:, t])
        y = torch.stack(outputs, 1)
        total = total + (y.flip(1) if p else y) * F.silu(z)
    close(layer(u).output, layer.out_proj(total / 2))


def test_gates_of_paths_start_as_the_mean_and_choose_when_trained():
    torch.manual_seed(0)
    layer = create_layer("bidirectional_mamba", 6, pattern=NONCAUSAL, combine="gate").double()
    mean = create_layer("bidirectional_mamba", 6, pattern=NONCAUSAL).double()
    mean.load_state_dict({k: v for k, v in layer.state_dict().items() if "mix" not in k})
    x = torch.randn(2, 8, 6, dtype=torch.float64)
    close(layer(x).output, mean(x).output)
    layer.mix_proj.bias.data += torch.tensor([0.0, -200.0])
    forward = create_layer("bidirectional_mamba", 6, pattern=NONCAUSAL, scan="forward").double()
    state = {k: v for k, v in mean.state_dict().items() if ".1." not in k}
    forward.load_state_dict({k: v[:1] if k in ("A_log", "D", "dt_bias") else v for k, v in state.items()})
    close(layer(x).output, forward(x).output)


def test_concatenated_paths_are_a_sum_of_projections():
    layer = make_layer(combine="concat")
    total = make_layer(combine="sum")
    state = {k: v for k, v in layer.state_dict().items() if k != "out_proj.weight"}
    left, right = layer.out_proj.weight.detach().split(12, 1)
    layer.out_proj.weight.data = torch.cat([left, left], 1)
    total.load_state_dict(state | {"out_proj.weight": left})
    x = torch.randn(2, 8, 6, dtype=torch.float64)
    close(layer(x).output, total(x).output)
    assert right.shape == left.shape


PARITY = {
    "bidirectional_mamba_cross": SS2D,
    "bidirectional_mamba_cross_without_gate": {**SS2D, "gate": False, "d_state": 1},
    "bidirectional_mamba_forward_copies": {**SS2D, "scan": "forward", "copies": 4, "axes": 2},
    "bidirectional_mamba_bidirectional_copies": {**SS2D, "scan": "bidirectional", "copies": 2, "axes": 2},
}


@pytest.mark.parametrize("name", PARITY)
def test_parity_of_the_block_on_a_grid(name):
    f = load(name)
    layer = make_layer(6, dt_rank=3, **PARITY[name])
    w = {key.removeprefix("weight_"): t for key, t in f.items() if key.startswith("weight_")}
    state = {
        "in_proj.weight": w["in_proj_weight"].flatten(1),
        "out_proj.weight": w["out_proj_weight"].flatten(1),
        "grid_conv.weight": w["conv2d_weight"].flatten(1),
        "grid_conv.bias": w.get("conv2d_bias", torch.zeros(12, dtype=torch.float64)),
        "norm.weight": w["out_norm_weight"],
        "norm.bias": w["out_norm_bias"],
        "A_log": w["A_logs"].unflatten(0, (4, -1)),
        "D": w["Ds"].view(4, -1),
        "dt_bias": w["dt_projs_bias"],
    }
    for p in range(4):
        state |= {f"x_proj.{p}.weight": w["x_proj_weight"][p], f"dt_proj.{p}.weight": w["dt_projs_weight"][p]}
    layer.load_state_dict(state)
    x = f["x"].flatten(1, 2).requires_grad_()
    output = layer(x, context=Context(grid=(5, 7))).output
    close(output, f["out"].flatten(1, 2), 1e-10)
    (gradient,) = torch.autograd.grad((output * f["grad_out"].flatten(1, 2)).sum(), x)
    close(gradient, f["grad_x"].flatten(1, 2), 1e-10)


def test_initial_values_and_parameter_count():
    layer = create_layer("bidirectional_mamba", 64, pattern=NONCAUSAL)
    steps = F.softplus(layer.dt_bias)
    assert steps.shape == (2, 128) and steps.min() >= 1e-3 and steps.max() <= 0.1 + 1e-6
    torch.testing.assert_close(-layer.A_log.exp(), -torch.arange(1.0, 17).expand(2, 128, 16))
    assert (layer.D == 1).all()
    inner, rank, states = 128, 4, 16
    own = inner * 4 + inner + inner * (rank + 2 * states) + inner * rank + inner + inner * states + inner
    assert sum(p.numel() for p in layer.parameters()) == 2 * own + 3 * inner * 64
    assert all(p._no_weight_decay for p in (layer.A_log, layer.dt_bias, layer.D))
    vim = create_layer("bidirectional_mamba", 64, pattern=NONCAUSAL, symmetric_dt_init=False)
    assert (vim.dt_bias[1] == 0).all() and (vim.dt_bias[0] != 0).all()


def test_time_constants_stay_in_float32_and_narrow_inputs_stay_finite():
    layer = create_layer("bidirectional_mamba", 16, pattern=NONCAUSAL, **SS2D).bfloat16()
    assert {layer.A_log.dtype, layer.dt_bias.dtype, layer.D.dtype} == {torch.float32}
    output = layer(30 * torch.randn(2, 48, 16, dtype=torch.bfloat16), context=Context(grid=(6, 8))).output
    assert output.dtype == torch.bfloat16 and output.isfinite().all()


def test_shared_sets_are_there_once():
    names = ("conv", "x_proj", "dt", "A", "D")
    for shared in itertools.chain.from_iterable(itertools.combinations(names, k) for k in (0, 1, 5)):
        layer = create_layer("bidirectional_mamba", 6, pattern=NONCAUSAL, scan="cross", shared=shared)
        counts = {"conv": len(layer.convs), "x_proj": len(layer.x_proj), "dt": len(layer.dt_proj)}
        counts |= {"A": len(layer.A_log), "D": len(layer.D)}
        assert counts == {name: 1 if name in shared else 4 for name in names}
        assert len(layer.dt_bias) == counts["dt"]


def test_an_encoder_of_images_learns_through_cross_scans():
    torch.manual_seed(0)
    plan = [("bidirectional_mamba", {"scan": "cross", "d_state": 4})]
    model = Encoder(EncoderConfig(num_classes=2, features=3, dim=16, num_heads=1, plan=plan, positions="none"))
    x = torch.randn(32, 20, 3)
    y = (x[:, 0, 0] * x[:, -1, 0] > 0).long()  # opposite corners
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(x, context=Context(grid=(4, 5))).output, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("options", [SS2D, {"scan": "strided", "combine": "sum"}], ids=["ss2d", "strided"])
def test_a_masked_grid_compiles_whole(options):
    layer = make_layer(**options)
    x, valid = torch.randn(2, 12, 6, dtype=torch.float64), torch.rand(2, 12) < 0.7
    context = Context(grid=(3, 4), mask=Mask(valid=valid))
    compiled = torch.compile(lambda x, c: layer(x, context=c).output, fullgraph=True, backend="aot_eager")
    close(compiled(x, context), layer(x, context=context).output)


def test_cost_is_linear_in_the_tokens_and_in_the_paths():
    def flops(n, **options):
        return MECHANISM.cost(Shape(1, 1, n, n, 8, 8), MECHANISM.options(**options)).flops

    assert flops(4096) == 16 * flops(256)
    assert flops(256, scan="cross") == 2 * flops(256) == 4 * flops(256, scan="forward")
    assert flops(256, scan="strided", combine="sum") == flops(256, scan="forward")
    assert count_paths(MECHANISM.options(scan="cross"), 3) == 6


@pytest.mark.parametrize(
    "options",
    [
        {"scan": "diagonal"},
        {"combine": "max"},
        {"convolution": "both"},
        {"shared": ("B",)},
        {"copies": 0},
        {"d_state": 0},
        {"dt_rank": 0},
        {"expand": 0.0},
        {"conv_width": -1},
        {"dt_init": (0.1, 0.01)},
        {"norm": "batch"},
        {"chunk_size": 0},
        {"scan": "strided"},
        {"scan": "windows", "window": (0, 2)},
        {"window": (2, 2)},
        {"window": (2, 2, 2)},
        {"scan": "cascade", "convolution": "grid", "conv_width": 3, "copies": 2},
        {"scan": "cascade", "convolution": "path"},
        {"convolution": "grid", "conv_width": 4},
    ],
    ids=str,
)
def test_wrong_options_are_refused(options):
    with pytest.raises(Unsupported):
        MECHANISM.options(**options)


def test_calls_that_do_not_fit_are_refused():
    x = inputs_of(12)
    refused = [
        (lambda: run(x, {"scan": "cross"}), "a sequence"),
        (lambda: run(x, {"scan": "snake"}, grid=(2, 2, 3)), "2 axes"),
        (lambda: run(x, {"scan": "windows"}), "a sequence"),
        (lambda: run(x, grid=(3, 5)), "grid"),
        (lambda: run(x, {"scan": "cross"}, grid=(3, 4)), "2 paths"),
        (lambda: run(x, {"combine": "gate"}), "without mix"),
        (lambda: run(x | {"mix": torch.zeros(2, 2, 12)}), "with mix"),
        (lambda: run(x, {"scan": "cascade", "conv_width": 0}, grid=(3, 4)), "cascade"),
        (lambda: run(x | {"a": x["a"][[0, 0, 0]]}), "3 paths"),
        (lambda: run(x, mask=Mask(cu_seqlens=torch.tensor([0, 12])), grid=(3, 4)), "cu_seqlens"),
        (lambda: make_layer(scan="cross")(torch.randn(1, 12, 6).double()), "sequence"),
        (lambda: make_layer(**SS2D)(torch.randn(1, 12, 6).double(), context=Context(grid=(2, 2, 3))), "grid"),
        (lambda: make_layer(scan="strided", combine="sum", axes=3), "axes"),
        (lambda: make_layer()(torch.randn(1, 4, 6).double(), context=Context(want=frozenset({"state"}))), "state"),
        (lambda: create_layer("bidirectional_mamba", 6, pattern="causal-self"), "mamba"),
    ]
    for call, reason in refused:
        with pytest.raises(Unsupported, match=reason):
            call()
    strided = inputs_of(12, 2, {"scan": "strided", "combine": "sum"})
    with pytest.raises(Unsupported, match="each token is on one"):
        run(strided | {"x": strided["x"].expand(2, 4, 12, 8)}, {"scan": "strided", "combine": "sum"}, grid=(3, 4))
