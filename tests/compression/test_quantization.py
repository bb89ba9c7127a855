"""Simulated quantization: rounding to a grid, finding ranges, and quantizing a model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import read_in_pieces
from torch import nn

from regard.compression import Grid, RunningRange, asymmetric_grid, keeps_precision, quantize, simulate, symmetric_grid
from regard.compression.ranges import least_divergence_range, least_error_range
from regard.contract import Context, Mask, Unsupported
from regard.models import EncoderDecoder, EncoderDecoderConfig, LanguageModel, LanguageModelConfig

BITS = [2, 4, 8, 11]


def normals(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def grids(bits: int) -> list[Grid]:
    """Grids for numbers around 0, and for numbers that are entirely or mostly on one side of it."""
    ranges = [sorted((normals(2) * 10 ** normals(1)).tolist()) for _ in range(4)]
    sided = [asymmetric_grid(low, high, bits) for low, high in [*ranges, (-3.7, -0.2), (0.1, 5.0), (0.0, 0.0)]]
    return [symmetric_grid(3 * normals(50), bits), symmetric_grid(torch.zeros(3), bits), *sided]


def ends(grid: Grid) -> tuple[float, float]:
    return grid.scale * (grid.low - grid.zero), grid.scale * (grid.high - grid.zero)


def model(plan="softmax", **options) -> LanguageModel:
    sizes = {"vocab_size": 13, "dim": 16, "num_heads": 2, "num_layers": 2} | options
    return LanguageModel(LanguageModelConfig(plan=plan, **sizes)).double()


@pytest.mark.parametrize("bits", BITS)
def test_a_grid_rounds_to_one_of_as_many_numbers_as_its_bits_tell_with_zero_among_them(bits):
    for grid in grids(bits):
        low, high = ends(grid)
        once = simulate(3 * normals(500), grid)
        assert torch.equal(simulate(once, grid), once)
        assert simulate(torch.zeros(3, dtype=torch.float64), grid).tolist() == [0, 0, 0]
        assert len(simulate(torch.linspace(low, high, 20 * 2**bits, dtype=torch.float64), grid).unique()) == 2**bits
        x = low + (high - low) * torch.rand(500, dtype=torch.float64)
        assert float((simulate(x, grid) - x).abs().max()) <= grid.scale / 2 * (1 + 1e-9)
        beyond = [low - 0.6 * grid.scale, low - 1e6, high + 0.6 * grid.scale, high + 1e6]
        found = simulate(torch.tensor(beyond, dtype=torch.float64), grid).tolist()
        assert found == pytest.approx([low, low, high, high], rel=1e-12, abs=0)


@pytest.mark.parametrize("bits", BITS)
def test_what_a_grid_was_made_of_is_no_further_than_half_a_step(bits):
    w = 5 * normals(200)
    made = [(w, symmetric_grid(w, bits))]
    for shift in (0.0, -3.0, 40.0, -40.0):
        made.append((w + shift, asymmetric_grid(float(w.min()) + shift, float(w.max()) + shift, bits)))
    for x, grid in made:
        assert float((simulate(x, grid) - x).abs().max()) <= grid.scale / 2 * (1 + 1e-9)
    assert ends(symmetric_grid(w, bits))[1] == pytest.approx(float(w.abs().max()))


def test_integers_are_their_own_eight_bits():
    x = torch.arange(-128, 128, dtype=torch.float64)
    assert torch.equal(simulate(x, asymmetric_grid(-128, 127)), x)
    assert torch.equal(simulate(x[1:], symmetric_grid(x[1:])), x[1:])


@pytest.mark.parametrize("p", [1.0, 2.0, 2.4])
def test_a_range_of_least_error_is_as_good_as_the_best_of_many(p):
    def error(grid):
        return float((simulate(x, grid) - x).abs().pow(p).mean())

    for far in ((), (25.0,), (-40.0,), (50.0, -30.0)):
        x = torch.cat([normals(400), torch.tensor(far, dtype=torch.float64)])
        x = x.abs() if not far else x
        lows, highs = (
            end * torch.linspace(0, 1, 61, dtype=torch.float64) for end in (min(float(x.min()), 0.0), x.max())
        )
        best = min(error(asymmetric_grid(float(a), float(b), 3)) for a in lows.unique() for b in highs)
        assert error(asymmetric_grid(*least_error_range(x, 3, p), 3)) <= 1.05 * best
        sizes = x.abs().max() * torch.linspace(0.01, 1, 200, dtype=torch.float64)
        best = min(error(symmetric_grid(size[None], 4)) for size in sizes)
        assert error(symmetric_grid(x, 4, p=p)) <= 1.05 * best


def test_gradients_go_straight_through_the_rounding_and_not_through_the_clip():
    grid = asymmetric_grid(-1.0, 2.0)
    x = torch.tensor([-1.5, -0.9, 0.0, 0.3, 1.9, 2.5], dtype=torch.float64, requires_grad=True)
    simulate(x, grid).backward(torch.arange(1.0, 7.0, dtype=torch.float64))
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 0]


def test_half_precision_is_rounded_in_float32():
    x = torch.randn(200).bfloat16()
    grid = symmetric_grid(x)
    assert torch.equal(simulate(x, grid), simulate(x.float(), grid).bfloat16())


def test_ranges_are_running_means_of_the_batches_ends_or_percentiles_or_ranges_of_least_error():
    batches = [normals(40, 5) for _ in range(4)]
    for options in ({}, {"percentile": 90.0}, {"p": 2.4, "bits": 3}, {"kl": True, "bits": 3}):
        found = RunningRange(momentum=0.75, **options)
        for batch in batches:
            found.update(batch)
            found.update(batch[:0])
        own = [10, 90] if "percentile" in options else [0, 100]
        pairs = [np.percentile(batch.numpy(), own) for batch in batches]
        if "p" in options:
            pairs = [np.array(least_error_range(batch, 3, 2.4)) for batch in batches]
        if "kl" in options:
            pairs = [np.array(least_divergence_range(batch, 3)) for batch in batches]
        expected = pairs[0]
        for pair in pairs[1:]:
            expected = 0.75 * expected + 0.25 * pair
        assert (found.low, found.high) == pytest.approx(tuple(expected))


def test_the_range_of_least_divergence_leaves_outliers_out_and_does_not_see_zeros():
    x = normals(4000)
    x[0] = 50.0
    low, high = least_divergence_range(x, 4)
    assert high < 25 and low == max(float(x.min()), -high)
    assert least_divergence_range(-x, 4) == (-high, -low)
    assert least_divergence_range(3 * x, 4) == pytest.approx((3 * low, 3 * high))
    assert least_divergence_range(torch.cat([x, torch.zeros(10000).double()]), 4) == (low, high)
    positive = x.abs()
    low, high = least_divergence_range(positive, 3)
    assert low == 0 and high == least_divergence_range(torch.cat([positive, -positive[1:]]), 4)[1]  # steps of one side
    assert least_divergence_range(torch.zeros(5), 8) == (0, 0)
    assert least_divergence_range(torch.ones(5), 8) == (0, 1)


@pytest.mark.parametrize("p", [None, 2.4])
def test_a_quantized_layer_is_the_product_of_rounded_numbers(p):
    layer = nn.Sequential(nn.Linear(6, 4)).double()
    batches = [normals(5, 6) for _ in range(3)]
    options = {"weight_bits": 5, "activation_bits": 7, "weight_p": p, "activation_p": p}
    found = quantize(layer, batches, momentum=0.5, **options)
    w = simulate(layer[0].weight, symmetric_grid(layer[0].weight, 5, p=p))
    seen = {"0.input": batches, "0": [nn.functional.linear(x, w, layer[0].bias) for x in batches]}
    for place, numbers in seen.items():
        running = RunningRange(momentum=0.5, p=p, bits=7)
        for x in numbers:
            running.update(x.detach())
        grid, expected = found.activations[place], asymmetric_grid(running.low, running.high, 7)
        assert grid.scale == pytest.approx(expected.scale)
        assert grid.zero == expected.zero
    x = normals(7, 6)
    inside = nn.functional.linear(simulate(x, found.activations["0.input"]), w, layer[0].bias)
    torch.testing.assert_close(found.model(x), simulate(inside, found.activations["0"]), rtol=0, atol=1e-13)


def test_a_model_is_rounded_in_every_linear_layer_norm_and_table_but_its_head():
    plan = ["softmax", ("gated_softmax", {"predictor": "all_features"})]
    whole = model(plan, positions="learned", max_length=20)
    before = {name: x.clone() for name, x in whole.state_dict().items()}
    ids = torch.randint(13, (3, 20))
    found = quantize(whole, [ids] * 2)
    assert all(torch.equal(x, before[name]) for name, x in whole.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in whole.modules())
    names = dict(whole.named_modules())
    linears = {name for name, module in names.items() if isinstance(module, nn.Linear)}
    linears -= {"head", "blocks.1.mixer.projection.maps.0"}
    norms = {name for name, module in names.items() if name.endswith("norm") and not isinstance(module, nn.Identity)}
    assert len(linears) == 14 and len(norms) == 5
    assert found.weights.keys() == linears | {"embedding", "positions"}
    assert found.activations.keys() == {f"{n}{end}" for n in linears | norms for end in ("", ".input")}
    for name, tensor in found.model.state_dict().items():
        module = name.rpartition(".")[0]
        rounded = module in found.weights and module != "embedding"
        expected = simulate(before[name], found.weights[module]) if rounded else before[name]
        assert torch.equal(tensor, expected), name
    hooks = {n: (len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in found.model.named_modules()}
    once = {name: (1, 1) for name in linears | norms} | {"embedding": (0, 1)}
    assert {name: count for name, count in hooks.items() if count != (0, 0)} == once
    seen = {}
    for name in [*found.activations, "embedding"]:
        module = found.model.get_submodule(name.removesuffix(".input"))
        if name.endswith(".input"):
            module.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
        else:
            module.register_forward_hook(lambda _, given, result, name=name: seen.update({name: result}))
    found.model(ids)
    for name, numbers in seen.items():
        grid = found.weights["embedding"] if name == "embedding" else found.activations[name]
        assert torch.equal(simulate(numbers, grid), numbers), name
        assert len(numbers.unique()) <= 256
    assert seen.keys() == found.activations.keys() | {"embedding"}


PAPER = ["softmax", ("clipped_softmax", {"gamma": -0.05}), ("gated_softmax", {"predictor": "all_features"})]


def by_hand(found, ids):
    """The logits when every point rounds, and the numbers that reach the points no module returns."""
    seen, one = {}, found.model

    def at(name, x):
        seen[name] = x
        return simulate(x, found.activations[name])

    n = ids.shape[1]
    x = at("blocks.0.input", one.embedding(ids) + one.positions.table[:n])
    for i, block in enumerate(one.blocks):
        mixer, h = block.mixer, block.mixer_norm(x)
        q, k, v = (y(h).unflatten(-1, (2, 8)).transpose(1, 2) for y in (mixer.query, mixer.key, mixer.value))
        scores = at(f"blocks.{i}.mixer.scores", q @ k.mT / math.sqrt(8))
        weights = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
        if i == 1:
            weights = (1.05 * weights - 0.05).clip(0, 1)
        context = at(f"blocks.{i}.mixer.weights", weights) @ v
        if i == 2:
            context = context * mixer.projection.maps[0](h).mT[..., None].sigmoid()
        x = at(f"blocks.{i}.mixed", x + mixer.output(context.transpose(1, 2).flatten(2)))
        x = at(f"blocks.{i}.fed", x + block.feed_forward(block.feed_forward_norm(x)))
    return one.head(one.norm(x)), seen


@torch.no_grad()
def test_all_points_of_the_paper_are_the_layers_and_the_sums_scores_and_weights_between_them():
    whole, ids = model(PAPER, positions="learned", max_length=20, num_layers=3), torch.randint(13, (3, 20))
    layers = quantize(whole, [ids]).activations
    for bits in (8, 40):
        found = quantize(whole, [ids], activation_bits=bits, points="all")
        logits, seen = by_hand(found, ids)
        torch.testing.assert_close(found.model(ids).output, logits, rtol=0, atol=1e-10)
        assert found.activations.keys() == layers.keys() | seen.keys() and not layers.keys() & seen.keys()
    for name, x in seen.items():  # 40 bits change no number by much
        low, high = ends(found.activations[name])
        assert (low, high) == pytest.approx((min(float(x.min()), 0), max(float(x.max()), 0)), abs=1e-6), name
    assert (
        len(
            simulate(
                seen["blocks.0.mixed"], quantize(whole, [ids], points="all").activations["blocks.0.mixed"]
            ).unique()
        )
        <= 256
    )


@torch.no_grad()
def test_on_grids_fine_enough_a_model_is_itself_in_every_pattern():
    fine = {"weight_bits": 40, "activation_bits": 40, "points": "all"}
    plan = [("softmax", {"window": (4, 0), "softcap": 2.0, "learn_sink": True}), *PAPER[1:]]
    context = Context(mask=Mask(valid=torch.rand(3, 12) > 0.3))
    for options in ({}, {"positions": "alibi"}, {"num_kv_heads": 1, "positions": "relative"}):
        one, ids = model(plan, num_layers=3, **options), torch.randint(13, (3, 12))
        found = quantize(one, [ids], run=lambda m, x: m(x, context=context), **fine)
        torch.testing.assert_close(
            found.model(ids, context=context).output, one(ids, context=context).output, rtol=0, atol=1e-5
        )
    sizes = {"memory_vocab_size": 13, "dim": 16, "num_heads": 2, "num_layers": 2}
    plans = {"encoder_plan": PAPER[0], "decoder_plan": PAPER[1:], "cross_plan": PAPER[1:]}
    both = EncoderDecoder(EncoderDecoderConfig(13, **sizes, **plans)).double()
    given = torch.randint(13, (2, 9)), torch.randint(13, (2, 7))
    found = quantize(both, [given], run=lambda m, batch: m(*batch), **fine)
    torch.testing.assert_close(found.model(*given).output, both(*given).output, rtol=0, atol=1e-5)


def test_one_outlier_takes_its_bits_from_all_other_activations_unless_the_range_leaves_it_out():
    layer = nn.Sequential(nn.Linear(8, 8)).double()
    x = normals(4000, 8)
    spiked = x.clone()
    spiked[7, 3] = 300.0
    errors = []
    for batch, options in ((x, {}), (spiked, {}), (spiked, {"percentile": 99.95}), (spiked, {"activation_kl": True})):
        found = quantize(layer, [batch], **options)
        errors.append(float((found.model(x) - layer(x)).detach().square().mean().sqrt()))
    assert errors[1] > 20 * errors[0]
    assert errors[2] < 2 * errors[0]
    assert errors[3] < errors[1] / 4  # a sixteenth of the largest is the least end


def test_tied_tables_are_rounded_where_they_are_looked_up_and_not_as_the_head():
    tied = model(tie_embeddings=True)
    ids = torch.randint(13, (2, 9))
    found = quantize(tied, [ids], keep=lambda name, module: keeps_precision(name, module) or name == "blocks.0")
    assert not any(name.startswith("blocks.0") for name in [*found.weights, *found.activations])
    assert torch.equal(found.model.embedding.weight, tied.embedding.weight)
    assert torch.equal(found.model.embedding(ids), simulate(tied.embedding.weight, found.weights["embedding"])[ids])


@pytest.mark.parametrize("points", ["linear", "all"])
def test_a_quantized_model_decodes_as_it_reads(points):
    found = quantize(model(PAPER, num_layers=3), [torch.randint(13, (4, 12))], points=points)
    ids = torch.randint(13, (2, 12))
    whole = found.model(ids).output
    torch.testing.assert_close(read_in_pieces(found.model, ids, [5, 1, 1, 5])[0], whole, rtol=0, atol=1e-10)


IDS = torch.zeros(1, 5, dtype=torch.long)


def first_norm(one, ids):
    return one.blocks[0].mixer_norm(one.embedding(ids))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: quantize(model(), []), "a batch or more"),
        (lambda: quantize(model(), [IDS], weight_bits=1), "bits >= 2"),
        (lambda: quantize(model(), [IDS], activation_bits=1), "bits >= 2"),
        (lambda: quantize(model(), [IDS], momentum=1.0), "momentum < 1"),
        (lambda: quantize(model(), [IDS], percentile=50.0), "50 < percentile"),
        (lambda: quantize(model(), [IDS], percentile=99.0, activation_p=2.0), "percentile=99.0 with p=2.0"),
        (lambda: quantize(model(), [IDS], activation_p=2.0, activation_kl=True), "p=2.0 with kl=True"),
        (lambda: quantize(model(), [IDS], activation_p=0.0), "finite p > 0"),
        (lambda: quantize(model(), [IDS], weight_p=math.inf), "finite p > 0"),
        (lambda: quantize(model(), [IDS], points="scores"), "linear, all"),
        (lambda: quantize(model(["softmax", "linear"]), [IDS], points="all"), r"blocks\.1\.mixer \(linear\)"),
        (lambda: quantize(model(stack={"reversible": True}), [IDS], points="all"), "reversible=True"),
        (lambda: quantize(nn.Sequential(nn.Linear(2, 2)), [IDS], points="all"), "without regard's blocks"),
        (lambda: quantize(model(), [IDS], points="all", run=first_norm), r"blocks\.0\.input.*did not pass"),
        (lambda: quantize(model(), [IDS], points="all").model(IDS, context=Context(want={"lse"})), "log-sum-exp"),
        (lambda: quantize(nn.TransformerEncoderLayer(8, 2, 16), [torch.randn(1, 3, 8)]), "regard.swap"),
        (lambda: quantize(nn.ReLU(), [IDS]), "torch.nn.Linear"),
        (lambda: asymmetric_grid(0.0, math.inf), "finite"),
    ],
)
def test_what_cannot_be_quantized_is_refused(call, told):
    with pytest.raises(Unsupported, match=told):
        call()
