"""Tests specific to bidirectional Mamba: its paths, padding along them, its block, and parity with recorded outputs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import GRAPH, calls, close, close_gradients, load, refused, shaken

from regard.apply import apply
from regard.catalogue import get_mechanism
from regard.contract import Context, Mask, Pattern, Shape
from regard.create import create_layer
from regard.mechanisms.bidirectional_mamba import (
    MECHANISM,
    SCANS,
    SS2D,
    BidirectionalMambaLayer,
    count_paths,
    find_paths,
    sample_inputs,
    scan_orders,
)
from regard.workbench.verification.properties.layers import layer_padding
from regard.workbench.verification.subjects import Subject

NONCAUSAL = Pattern.NONCAUSAL_SELF
THROUGH_GRIDS = [scan for scan in SCANS if scan != "cascade"]
SETS = ("conv", "x_proj", "dt", "A", "D")

run = calls(MECHANISM, NONCAUSAL)


def of_scan(scan: str, window: tuple[int, int] = (2, 2), **options: Any) -> dict[str, Any]:
    """Options for a scan whose paths are summed; the scan by windows gets `window` in place of (7, 7)."""
    return {"scan": scan, "combine": "sum", **({"window": window} if scan == "windows" else {}), **options}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def make_layer(dim: int = 6, **options: Any) -> BidirectionalMambaLayer:
    return shaken(create_layer("bidirectional_mamba", dim, pattern=NONCAUSAL, **{"d_state": 4, **options}))


def inputs_of(n: int, options: dict[str, Any] | None = None, axes: int = 2) -> dict[str, torch.Tensor]:
    config, generator = MECHANISM.options(**(options or {})), torch.Generator().manual_seed(n)
    call = {"pattern": NONCAUSAL, "config": config, "grid": (0,) * axes, "dtype": torch.float64}
    return sample_inputs(generator, batch=2, n=n, m=n, **call)


def one_set(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keep one set of weights, for all paths."""
    alone = {name: inputs[name][:, :1] for name in ("x", "dt", "b", "c")}
    return inputs | alone | {name: inputs[name][:1] for name in ("a", "skip", "dt_bias")}


def orders_of(scan: str, sides: tuple[int, ...], **options: Any) -> list[torch.Tensor]:
    return scan_orders(MECHANISM.options(**of_scan(scan, **options)), sides)


@pytest.mark.parametrize("scan", THROUGH_GRIDS)
@pytest.mark.parametrize("grid", [(3, 5), (5, 3), (1, 4), (4, 4)])
def test_merging_what_was_scanned_gives_every_token_once_for_each_path(scan, grid):
    """The gradient of scanning is merging, too: H and W are not swapped on the way back."""
    n = math.prod(grid)
    paths = find_paths(MECHANISM.options(**of_scan(scan, (2, 3))), n, grid, None, None, torch.device("cpu"))
    x = randn(2, n, 3).requires_grad_()
    total = sum(path.put(path.take(x), n) for path in paths)
    close(total, (1 if scan == "strided" else len(paths)) * x)
    cotangents = [torch.randn_like(path.take(x)) for path in paths]
    scanned = sum((path.take(x) * g).sum() for path, g in zip(paths, cotangents, strict=True))
    (gradient,) = torch.autograd.grad(scanned, x)
    close(gradient, sum(path.put(g, n) for path, g in zip(paths, cotangents, strict=True)))


def test_orders_of_small_grids():
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
        assert ["".join(map(str, order.tolist())) for order in orders_of(scan, (2, 3))] == orders
    assert [order.tolist() for order in orders_of("strided", (3, 3))] == [[0, 2, 6, 8], [3, 5], [1, 7], [4]]
    assert [order.tolist() for order in orders_of("strided", (4, 4))[1::2]] == [[4, 12, 6, 14], [5, 13, 7, 15]]
    assert len(orders_of("cross", (2, 2, 2))) == 6
    assert orders_of("cross", (2, 3, 2))[1].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert orders_of("slices", (2, 2, 2))[2].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_one_slice_or_slices_of_one_place_are_the_forward_order():
    for sides in ((1, 7), (7, 1), (1, 2, 3)):
        forward, _, across = orders_of("slices", sides)
        assert torch.equal(forward, across)


@pytest.mark.parametrize("scan", THROUGH_GRIDS)
@pytest.mark.parametrize("copies", [1, 2])
def test_paths_are_separate_scans_of_permuted_sequences(scan, copies):
    """Each path is causal `mamba` on the tokens in the path's order."""
    options = of_scan(scan, copies=copies)
    x, expected = inputs_of(15, options), torch.zeros(2, 15, 8, dtype=torch.float64)
    for p, order in enumerate(orders_of(scan, (3, 5), copies=copies)):
        own = {name: x[name][:, 0 if scan == "strided" else p, order] for name in ("x", "dt", "b", "c")}
        own |= {name: x[name][p] for name in ("a", "skip", "dt_bias")}
        expected[:, order] += apply(get_mechanism("mamba"), own).output
    close(run(x, options, grid=(3, 5)).output, expected * F.silu(x["z"]))


def move(inputs, grid, change):
    """Apply `change` to the grid of every input's tokens."""

    def moved(t: torch.Tensor, axis: int) -> torch.Tensor:
        return change(t.movedim(axis, 0).unflatten(0, grid)).flatten(0, 1).movedim(0, axis)

    axes = {"x": 2, "dt": 2, "b": 2, "c": 2, "z": 1}
    return inputs | {name: moved(inputs[name], axis) for name, axis in axes.items()}


def test_cross_scans_with_one_set_commute_with_half_turns_and_transposition_but_not_with_a_flip():
    grid, options = (3, 5), of_scan("cross")
    x = one_set(inputs_of(15, options))

    def scanned(inputs, grid=grid):
        return run(inputs, options, grid=grid).output.unflatten(1, grid)

    y = scanned(x)
    close(scanned(move(x, grid, lambda t: t.flip(0, 1))), y.flip(1, 2))
    close(scanned(move(x, grid, lambda t: t.transpose(0, 1)), (5, 3)), y.transpose(1, 2))
    assert float((scanned(move(x, grid, lambda t: t.flip(1))) - y.flip(2)).abs().max()) > 0.01


def test_a_block_with_one_set_turns_with_its_input():
    layer, once = make_layer(shared=SETS), make_layer(shared=SETS, convolution="once")
    x = randn(2, 9, 6)
    close(layer(x.flip(1)).output, layer(x).output.flip(1))
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
    layer, x = make_layer(scan=scan), randn(1, 35, 6).requires_grad_()
    output = layer(x, context=Context(grid=(5, 7))).output
    (gradient,) = torch.autograd.grad(output[0, 17].sum(), x)
    assert gradient[0].abs().amax(-1).nonzero().flatten().tolist() == list(seen)


@pytest.mark.parametrize(
    "options",
    [
        {"shared": ("x_proj",)},
        {"convolution": "once", "shared": ("x_proj", "dt", "D")},
        {"convolution": "grid", "conv_width": 3, "axes": 1},
    ],
    ids=str,
)
def test_padded_rows_equal_rows_alone_with_options_that_no_variant_has(options):
    assert layer_padding(Subject(MECHANISM, NONCAUSAL, options), torch.float64) < 1e-12


@pytest.mark.parametrize(
    "options",
    [
        *(options for name, options in MECHANISM.variants.items() if name in MECHANISM.grid_variants),
        *({"scan": scan} for scan in ("forward", "reverse", "bidirectional")),
        of_scan("strided", shared=("conv", "x_proj", "dt")),
        of_scan("strided", conv_width=0),
        {"scan": "cross", "combine": "gate"},
        {"scan": "cross", "combine": "concat", "copies": 2},
        SS2D,
        {**SS2D, "gate": False, "d_state": 1},
        {**SS2D, "scan": "cascade"},
    ],
    ids=str,
)
def test_a_grid_with_a_masked_border_equals_the_smaller_grid(options):
    """Paths and convolutions skip masked places: rows at the bottom and columns on the right."""
    layer, small = make_layer(axes=2, **options), randn(2, 20, 6)
    large = torch.full((2, 5, 6, 6), float("nan"), dtype=torch.float64)
    large[:, :4, :5] = small.unflatten(1, (4, 5))
    valid = torch.zeros(2, 5, 6, dtype=torch.bool)
    valid[:, :4, :5] = True
    context = Context(grid=(5, 6), mask=Mask(valid=valid.flatten(1)))
    output = layer(large.flatten(1, 2), context=context).output.unflatten(1, (5, 6))
    close(output[:, :4, :5].flatten(1, 2), layer(small, context=Context(grid=(4, 5))).output)
    assert (output[~valid] == 0).all()


@pytest.mark.parametrize("scan", THROUGH_GRIDS)
def test_masked_places_neither_write_nor_decay(scan):
    """The parallel form skips them; in the definition the state stands still there (a step of 0)."""
    options = of_scan(scan, (3, 2))
    x = {name: t.requires_grad_() for name, t in inputs_of(20, options).items()}
    valid = torch.rand(2, 20, generator=torch.Generator().manual_seed(5)) < 0.6
    call = {"grid": (4, 5), "mask": Mask(valid=valid)}
    poisoned = x | {"x": torch.where(valid[:, None, :, None], x["x"], float("nan"))}
    found, expected = run(poisoned, options, **call).output, run(x, options, form="reference", **call).output
    assert (found[~valid] == 0).all()
    close_gradients(found, expected, x)


def test_a_cascade_scans_every_row_and_then_every_column():
    layer, x = make_layer(**of_scan("cascade", convolution="once", conv_width=0, gate=False)), randn(1, 12, 6)

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

    image = F.layer_norm(F.silu(layer.in_proj(x)), (12,)).unflatten(1, (3, 4))
    rows = torch.stack([both(image[:, i], 0) for i in range(3)], 1)
    image = F.layer_norm(rows, (12,))
    columns = torch.stack([both(image[:, :, j], 2) for j in range(4)], 2)
    close(layer(x, context=Context(grid=(3, 4))).output, layer.out_proj(columns.flatten(1, 2)))


def test_the_block_by_hand():
    """Vim, version 2: shared outer projections, separate inner weights, and half the sum of the gated directions."""
    layer, u = make_layer(), randn(2, 7, 6)
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
    gated, mean, forward = (
        create_layer("bidirectional_mamba", 6, pattern=NONCAUSAL, **options).double()
        for options in ({"combine": "gate"}, {}, {"scan": "forward"})
    )
    mean.load_state_dict({k: v for k, v in gated.state_dict().items() if "mix" not in k})
    x = randn(2, 8, 6)
    close(gated(x).output, mean(x).output)
    gated.mix_proj.bias.data += torch.tensor([0.0, -200.0])
    state = {k: v for k, v in mean.state_dict().items() if ".1." not in k}
    forward.load_state_dict({k: v[:1] if k in ("A_log", "D", "dt_bias") else v for k, v in state.items()})
    close(gated(x).output, forward(x).output)


def test_concatenated_paths_are_a_sum_of_projections():
    layer, total, x = make_layer(combine="concat"), make_layer(combine="sum"), randn(2, 8, 6)
    left = layer.out_proj.weight.detach()[:, :12]
    layer.out_proj.weight.data = torch.cat([left, left], 1)
    total.load_state_dict(layer.state_dict() | {"out_proj.weight": left})
    close(layer(x).output, total(x).output)


PARITY = {
    "bidirectional_mamba_cross": SS2D,
    "bidirectional_mamba_cross_without_gate": {**SS2D, "gate": False, "d_state": 1, "conv_bias": False},
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
        "norm.weight": w["out_norm_weight"],
        "norm.bias": w["out_norm_bias"],
        "A_log": w["A_logs"].unflatten(0, (4, -1)),
        "D": w["Ds"].view(4, -1),
        "dt_bias": w["dt_projs_bias"],
    }
    if "conv2d_bias" in w:
        state["grid_conv.bias"] = w["conv2d_bias"]
    for p in range(4):
        state |= {f"x_proj.{p}.weight": w["x_proj_weight"][p], f"dt_proj.{p}.weight": w["dt_projs_weight"][p]}
    layer.load_state_dict(state)
    x = f["x"].flatten(1, 2).requires_grad_()
    output = layer(x, context=Context(grid=(5, 7))).output
    close(output, f["out"].flatten(1, 2), 1e-10)
    (gradient,) = torch.autograd.grad(output, x, f["grad_out"].flatten(1, 2))
    close(gradient, f["grad_x"].flatten(1, 2), 1e-10)


def test_initial_values():
    layer = create_layer("bidirectional_mamba", 64, pattern=NONCAUSAL)
    steps = F.softplus(layer.dt_bias)
    assert steps.shape == (2, 128) and steps.min() >= 1e-3 and steps.max() <= 0.1 + 1e-6
    torch.testing.assert_close(-layer.A_log.exp(), -torch.arange(1.0, 17).expand(2, 128, 16))
    assert (layer.D == 1).all()
    assert all(p._no_weight_decay for p in (layer.A_log, layer.dt_bias, layer.D))
    vim = create_layer("bidirectional_mamba", 64, pattern=NONCAUSAL, symmetric_dt_init=False)
    assert (vim.dt_bias[1] == 0).all() and (vim.dt_bias[0] != 0).all()


def test_time_constants_stay_in_float32_and_narrow_inputs_stay_finite():
    layer = create_layer("bidirectional_mamba", 16, pattern=NONCAUSAL, **SS2D).bfloat16()
    assert {layer.A_log.dtype, layer.dt_bias.dtype, layer.D.dtype} == {torch.float32}
    output = layer(30 * torch.randn(2, 48, 16, dtype=torch.bfloat16), context=Context(grid=(6, 8))).output
    assert output.dtype == torch.bfloat16 and output.isfinite().all()


def test_shared_sets_are_there_once():
    for shared in itertools.chain.from_iterable(itertools.combinations(SETS, k) for k in (0, 1, 5)):
        layer = create_layer("bidirectional_mamba", 6, pattern=NONCAUSAL, scan="cross", shared=shared)
        counts = {"conv": len(layer.convs), "x_proj": len(layer.x_proj), "dt": len(layer.dt_proj)}
        counts |= {"A": len(layer.A_log), "D": len(layer.D)}
        assert counts == {name: 1 if name in shared else 4 for name in SETS}
        assert len(layer.dt_bias) == counts["dt"]


@pytest.mark.parametrize("options", [SS2D, of_scan("strided")], ids=["ss2d", "strided"])
def test_a_masked_grid_compiles_whole(options):
    layer, x = make_layer(**options), randn(2, 12, 6)
    context = Context(grid=(3, 4), mask=Mask(valid=torch.rand(2, 12) < 0.7))
    compiled = torch.compile(lambda x, c: layer(x, context=c).output, fullgraph=True, backend=GRAPH)
    close(compiled(x, context), layer(x, context=context).output)


def test_cost_is_linear_in_the_tokens_and_in_the_paths():
    def flops(n, **options):
        return MECHANISM.cost(Shape(1, 1, n, n, 8, 8), MECHANISM.options(**options)).flops

    assert flops(4096) == 16 * flops(256)
    assert flops(256, scan="cross") == 2 * flops(256) == 4 * flops(256, scan="forward")
    assert flops(256, scan="strided", combine="sum") == flops(256, scan="forward")
    assert count_paths(MECHANISM.options(scan="cross"), 3) == 6


X, ON_GRID = inputs_of(12, axes=1), {"grid": (3, 4)}
STRIDED = inputs_of(12, of_scan("strided"))


@pytest.mark.parametrize(
    ("inputs", "options", "call", "reason"),
    [
        (X, {"scan": "cross"}, {}, "a sequence"),
        (X, {"scan": "snake"}, {"grid": (2, 2, 3)}, "2 axes"),
        (X, {"scan": "windows"}, {}, "a sequence"),
        (X, {}, {"grid": (3, 5)}, "grid"),
        (X, {"scan": "cross"}, ON_GRID, "2 paths"),
        (X, {"combine": "gate"}, {}, "without mix"),
        (X | {"mix": torch.zeros(2, 2, 12)}, {}, {}, "with mix"),
        (X, {"scan": "cascade", "conv_width": 0}, ON_GRID, "cascade"),
        (X | {"a": X["a"][[0, 0, 0]]}, {}, {}, "3 paths"),
        (X, {}, {"mask": Mask(cu_seqlens=torch.tensor([0, 12])), **ON_GRID}, "cu_seqlens"),
        (STRIDED | {"x": STRIDED["x"].expand(2, 4, 12, 8)}, of_scan("strided"), ON_GRID, "each token is on one"),
    ],
)
def test_calls_that_do_not_fit_are_refused(inputs, options, call, reason):
    refused(reason, run, inputs, options, **call)


@pytest.mark.parametrize(
    ("options", "context", "reason"),
    [
        ({"scan": "cross"}, {}, "sequence"),
        (SS2D, {"grid": (2, 2, 3)}, "grid"),
        ({"scan": "strided", "combine": "sum", "axes": 3}, {}, "axes"),
        ({}, {"want": frozenset({"state"})}, "state"),
    ],
)
def test_layers_and_contexts_that_do_not_fit_are_refused(options, context, reason):
    refused(reason, lambda: make_layer(**options)(randn(1, 12, 6), context=Context(**context)))
