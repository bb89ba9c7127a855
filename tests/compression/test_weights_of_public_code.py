"""Compressed weights are those of public code, on the same weights and inputs.

Where grids differ by convention (integer zero points against offsets in bfloat16), the recorded grids are used, or such as
both conventions give; `tests/parity/fixtures/SOURCES.json` tells them.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support import close, load
from torch import Tensor, nn

from regard.compression.calibration import Statistics
from regard.compression.layer_work import compress_layer
from regard.compression.pruning.gates import LearnedGates, chance_to_stay, final_gates, sample_gates
from regard.compression.pruning.weights import magnitude, sparsegpt, wanda
from regard.compression.recipes import read_recipe
from regard.compression.weights import gptq as rounding
from regard.compression.weights.gptq import gptq, inverse_factor
from regard.compression.weights.grids import Grids, round_to_nearest
from regard.compression.weights.learned import LearnedSteps
from regard.compression.weights.limits import mse
from regard.compression.weights.scaling import activation_scale, smooth_scale
from regard.layers.quantized import Codes, Format, QuantizedLinear


def moments(x: Tensor) -> Tensor:
    x = x.double()
    return x.T @ x


# GPTQ


def test_gptq_rounds_rows_as_the_authors_code():
    found = load("compression_gptq_rows")
    weight, second, format = found["weight"], moments(found["x"]), Format(4, 64, symmetric=False)
    plain = gptq(weight, second, format, calibrate="minmax", damping=0.01, order="columns")
    order = gptq(weight, second, format, calibrate="minmax", damping=0.05, order="activations")
    close(plain.weight(torch.float64), found["plain"])
    close(order.weight(torch.float64), found["order"])


@pytest.mark.parametrize("order", ["plain", "order"])
def test_gptq_makes_and_uses_the_grids_of_groups_as_the_authors_code(order, monkeypatch):
    """The grid of each group is made from the same weights, and later groups compensate in the same way."""
    found = load("compression_gptq_groups")
    format = Format(4, 32, symmetric=False) if order == "plain" else Format(3, 32)
    scales, steps, numbers = iter(found[f"{order}_scale"].T), [], []
    zeros = iter(found["plain_zero"].T)

    def recorded(rows: Tensor, *_: object, **__: object) -> Grids:
        scale = next(scales)
        least, largest = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
        widths = largest - least if order == "plain" else 2 * torch.maximum(-least, largest)
        steps.append((widths / (2**format.bits - 1), scale))
        offset = None if format.symmetric else scale * (8 - next(zeros))
        grids = Grids(scale, offset, *format.codes)
        return Watched(grids, numbers)

    monkeypatch.setattr(rounding, "make_grids", recorded)
    how = "columns" if order == "plain" else "activations"
    second = moments(found["x"])
    gptq(found["weight"], second, format, damping=0.01, order=how, block=32)
    for step, scale in steps:
        close(step, scale, 1e-10)
    order_of = inverse_factor(second, 128, 0.01, None if order == "plain" else 32)[1]
    close(torch.stack(numbers, 1)[:, order_of.argsort()], found[order], 1e-10)


class Watched(Grids):
    """Grids that keep the numbers that they represent."""

    def __init__(self, grids: Grids, numbers: list[Tensor]) -> None:
        super().__init__(grids.scale, grids.offset, grids.low, grids.high)
        object.__setattr__(self, "seen", numbers)

    def numbers(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        numbers = super().numbers(codes, dtype)
        self.seen.append(numbers[:, 0])  # type: ignore[attr-defined]
        return numbers


def test_groups_and_columns_with_the_largest_inputs_come_first_as_in_group_aware_reordering():
    found = load("compression_gptq_group_order")
    for group in (32, 64):
        order = inverse_factor(torch.diag(found["diagonal"]), 256, 0.01, group)[1]
        assert torch.equal(order, found[f"order{group}"])


# weights set to 0

PATTERNS = {"free": "free", "two_of_four": "2:4", "five_of_eight": "5:8"}


@pytest.mark.parametrize("name", PATTERNS)
def test_sparsegpt_sets_the_same_weights_to_0_and_adjusts_the_others_as_the_authors_code(name):
    """The authors' code removes one weight more than the share from each block of the free pattern."""
    found = load("compression_sparsegpt")
    ratio, block = (81 / 160, 16) if name == "free" else (0.5, 64)
    weight, mask = sparsegpt(found["weight"], moments(found["x"]), ratio, PATTERNS[name], block=block)
    close(weight, found[name])
    assert torch.equal(mask, found[name] != 0)


@pytest.mark.parametrize("name", PATTERNS)
def test_wanda_and_magnitude_keep_the_weights_that_the_authors_code_keeps(name):
    """The authors' code removes one weight more than the share where it compares sizes over the whole weight."""
    found, pattern = load("compression_wanda"), PATTERNS[name]
    squares = found["x"].double().square().sum(0)
    assert torch.equal(wanda(found["weight"], squares, 0.5, pattern), found[f"wanda_{name}"])
    assert torch.equal(magnitude(found["weight"], 321 / 640, pattern), found[f"magnitude_{name}"])


# rounding to nearest, and inputs in 8 bits


def layer_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight.data = weight.float()
    if bias is not None:
        linear.bias.data = bias.float()
    return linear


def test_symmetric_codes_are_those_of_torchao():
    found = load("compression_torchao_symmetric")
    codes = round_to_nearest(found["weight"], Format(8))
    assert torch.equal(codes.values, found["codes"])
    close(codes.scale[:, 0].float(), found["scale"], 0.0)
    close(codes.weight(), found["rounded"], 0.0)
    for sign in (1, -1):  # grids turn around with the weights
        codes = round_to_nearest(sign * found["grouped"], Format(4, 32))
        assert torch.equal(codes.values, found["grouped_codes"])
        close(codes.scale.float(), sign * found["grouped_scale"], 0.0)


def test_codes_in_groups_of_4_bits_are_those_of_torchao():
    found, format = load("compression_torchao_int4"), Format(4, 32, symmetric=False)
    codes = round_to_nearest(found["weight"], format)
    assert torch.equal(codes.values + 8, found["codes"].to(torch.int8))
    assert codes.offset is not None
    close(codes.scale.float(), found["scale"], 0.0)
    close(codes.offset.float(), found["zero"], 0.0)
    close(codes.weight(), found["rounded"], 0.0)


def test_grids_rounded_to_bfloat16_are_those_of_torchao_widened_by_the_rounding():
    found = load("compression_torchao_int4")
    codes = round_to_nearest(found["other"], Format(4, 32, symmetric=False))
    assert codes.offset is not None
    wider, moved = codes.scale.float() / found["other_scale"], codes.offset.float() - found["other_zero"]
    assert (wider >= 1).all() and (wider < 1.03).all()
    assert (moved.abs() <= found["other_zero"].abs() * 2**-8).all()


def test_smoothing_scales_are_those_of_smoothquant():
    found = load("compression_smoothquant_scales")
    for name, alpha in (("50", 0.5), ("80", 0.8)):
        scale = smooth_scale(found["largest"], found["weight"], alpha)
        close(1 / scale, found[f"norm_{name}"])
        close(found["weight"] * scale, found[f"smoothed_{name}"])


def test_layers_with_inputs_in_8_bits_are_those_of_smoothquant():
    found, format = load("compression_smoothquant_w8a8"), Format(8, dynamic=True)
    codes = round_to_nearest(found["weight"], format)
    close(codes.weight(torch.float64), found["rounded"], 0.0)
    made = QuantizedLinear.of(layer_of(found["weight"], found["bias"]), codes, format)
    close(made(found["x"]).double(), found["out"], 1e-6)


def test_columns_of_large_inputs_are_kept_apart_as_in_bitsandbytes():
    """bitsandbytes computes in float16, the codes of the inputs are exact."""
    found = load("compression_llm_int8")
    x, linear = found["x"].float(), layer_of(found["weight"])
    statistics = Statistics(64, wants_second=False)
    statistics.update(x)
    made, report = compress_layer("layer", linear, read_recipe("llm_int8:threshold=6"), statistics)
    assert isinstance(made, QuantizedLinear) and made.kept_columns is not None
    assert report.float_columns == 3 and torch.equal(made.kept_columns, found["columns"])
    kept = found["columns"]
    assert torch.equal(made.codes, found["weight_codes"].index_fill(1, kept, 0))
    close(made.scale[:, 0].float() * 127, found["weight_sizes"].float(), 0.0)
    small = x.index_fill(1, kept, 0.0)
    step = small.abs().amax(1, keepdim=True) / 127
    assert torch.equal((small / step).round().to(torch.int8), found["input_codes"])
    close(step[:, 0] * 127, found["input_sizes"].float(), 0.0)
    products = (found["input_codes"].double() @ made.codes.double().T) * step.double() * made.scale.double().T
    close(made(x).double(), products + x[:, kept].double() @ found["weight"][:, kept].double().T, 1e-6)
    close(made(x), found["out"].float(), 1e-3)


# AWQ


def integer_zeros(rows: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, steps and offsets of the grids that AWQ's code makes: 0 is on each of them."""
    least, largest, half = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), 2 ** (bits - 1)
    step = (largest - least) / (2 * half - 1)
    zero = (-least / step).round().clamp(0, 2 * half - 1)
    codes = ((rows / step).round() + zero).clamp(0, 2 * half - 1) - half
    return codes, step, (half - zero) * step


@pytest.mark.parametrize("layer", ["out_proj", "fc1", "fc2"])
def test_scales_by_inputs_are_those_of_awq(layer):
    found = load("compression_awq_scales")
    x, weight = found[f"{layer}_x"].double(), found[f"{layer}_weight"].double()

    def rounded(scaled: Tensor) -> Codes:
        codes, step, offset = integer_zeros(scaled.view(-1, 32), 3)
        return Codes(codes.view(len(scaled), -1), step.view(len(scaled), -1), offset.view(len(scaled), -1))

    scale, alpha = activation_scale(x.abs().mean(0), moments(x), weight, rounded)
    close(scale, found[f"{layer}_scale"])
    assert 0 < alpha < 1


def test_ends_of_grids_lose_no_more_than_those_of_awq():
    """Over inputs without correlations, where weighted errors of weights are errors of outputs."""
    found = load("compression_awq_clip")
    rows = found["weight"].double().view(-1, 32)
    squares = moments(found["x"]).diagonal().view(1, 2, 32).expand(64, 2, 32).reshape(-1, 32)
    largest = rows.abs().amax(1)

    def lost(share: Tensor) -> Tensor:
        most = (share * largest)[:, None]
        codes, step, offset = integer_zeros(rows.clamp(-most, most), 3)
        return ((codes * step + offset - rows).square() * squares).sum(1)

    theirs = found["most"].flatten() / largest
    ours = mse(rows, lost, 3)
    assert (lost(ours) <= lost(theirs)).all()
    tried = torch.stack([lost(torch.full_like(largest, 1 - step / 20)) for step in range(10)])
    close(1 - tried.argmin(0).double() / 20, theirs)  # among the shares that AWQ tries, the recorded ones are best


# learned steps


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_learned_steps_and_their_gradients_are_those_of_public_code(bits):
    found = load("compression_lsq")
    weight = found[f"weight_{bits}"].requires_grad_()
    steps = LearnedSteps(weight, Format(bits, None if bits == 8 else 32))
    close(steps.scale.detach(), found[f"start_{bits}"])
    steps.scale.data = found[f"step_{bits}"].clone()
    out = steps(weight)
    close(out.detach(), found[f"out_{bits}"])
    gradients = torch.autograd.grad(out, [weight, steps.scale], found[f"grad_out_{bits}"])
    close(gradients[0], found[f"grad_weight_{bits}"])
    close(gradients[1], found[f"grad_step_{bits}"])


# gates


def test_gates_and_their_chances_are_those_of_hard_concrete_code(monkeypatch):
    found = load("compression_gates")
    alpha = found["log_alpha"].requires_grad_()
    monkeypatch.setattr(torch, "rand", lambda *_, **__: found["uniform"])
    gates = sample_gates(alpha)
    close(gates.detach(), found["sampled"])
    (gradient,) = torch.autograd.grad(gates, alpha, torch.arange(1.0, 25, dtype=torch.float64))
    close(gradient, found["grad"])
    close(final_gates(alpha).detach(), found["final"])
    close(chance_to_stay(alpha).detach(), found["stay"])


def test_gates_and_the_expected_share_are_those_of_cofi(monkeypatch):
    """CoFi's code counts 33 parameters for each of 64 neurons, but 2128 for all of them."""
    found = load("compression_gates_cofi")
    parts, sizes = ("heads", "neurons", "attention", "feed_forward"), {"attention": 1088, "feed_forward": 33 * 64}
    for part in parts:
        monkeypatch.setattr(torch, "rand", lambda *_, part=part, **__: found[f"uniform_{part}"])
        close(sample_gates(found[f"alpha_{part}"]), found[f"gates_{part}"])
    monkeypatch.undo()
    ends = {"attention": nn.Identity(), "feed_forward": nn.Identity()}
    facts = {"ends": ends, "last": ends, "units": 4, "neurons": 64, "fixed": (), "parameters": sizes.__getitem__}
    layer = SimpleNamespace(name="layer", **facts)
    gates = LearnedGates(SimpleNamespace(layers=[layer] * 3)).double()
    for name, alpha in gates.log_alpha.items():
        i, part = name.split()
        alpha.data = found[f"alpha_{part}"][int(i)].clone()
    share = gates.expected_share() * (1088 + 33 * 64) / (1088 + 2128)
    close(1 - share.detach(), found["sparsity"])
    (-share).backward()
    for name, alpha in gates.log_alpha.items():
        i, part = name.split()
        close(alpha.grad, found[f"grad_{part}"][int(i)])
