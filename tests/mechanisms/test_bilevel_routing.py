"""Tests specific to bi-level routing: which regions are read, on any grid, and parity."""

from __future__ import annotations

import math

import pytest
import torch
from support import Largest, calls, check_recorded, close, close_gradients, load, qkv, recorded_state, refused, shaken
from torch.nn.attention import SDPBackend, sdpa_kernel

from regard import create_layer
from regard.apply import apply
from regard.backends import NATIVE
from regard.contract import Call, Context, Mask, Pattern
from regard.mechanisms import bilevel_routing
from regard.mechanisms.bilevel_routing import MECHANISM, Config, read_regions

SELF, CROSS = "noncausal-self", "noncausal-cross"
run = calls(MECHANISM, SELF)


def make_layer(pattern=SELF, **options):
    return create_layer("bilevel_routing", 8, 2, pattern=pattern, bias=True, **options).double()


def numbers(grid, sizes):
    """The region of each token, for regions that divide the grid's sides evenly."""
    (height, width), (h, w) = grid, sizes
    return (torch.arange(height)[:, None] // h * (width // w) + torch.arange(width) // w).flatten()


def chosen_regions(q, k, of, top):
    """A mask (B, regions, regions): whether the first region reads the second."""
    inside = torch.nn.functional.one_hot(of).double()
    means = [inside.T @ x.transpose(1, 2).flatten(2) for x in (q, k)]
    best = (means[0] @ means[1].mT).topk(top).indices
    return torch.zeros(len(q), *(inside.shape[1],) * 2, dtype=torch.bool).scatter(2, best, True)


@pytest.mark.parametrize("scale_by", ["dim", "head_dim"])
def test_gathered_regions_are_dense_attention_with_the_others_hidden(scale_by):
    """Gradients agree too; none flows through the choice."""
    inputs = {name: x.requires_grad_() for name, x in qkv(48, heads=3).items()}
    q, k, v = inputs.values()
    of = numbers((6, 8), (2, 4))
    visible = chosen_regions(q, k, of, 3)[:, of][:, :, of][:, None]
    scale = 0.5 / (math.sqrt(3) if scale_by == "dim" else 1)
    expected = (scale * q @ k.mT).masked_fill(~visible, -torch.inf).softmax(-1) @ v
    found = run(inputs, {"region_size": (2, 4), "top": 3, "scale_by": scale_by}, grid=(6, 8)).output
    close_gradients(found, expected, inputs)


@pytest.mark.skipif(NATIVE.missing is not None, reason="needs the native library")
@pytest.mark.parametrize("routing", ["shared", "head"])
@pytest.mark.parametrize("pattern", [SELF, CROSS])
def test_where_a_quarter_of_the_regions_is_read_nothing_is_copied(routing, pattern, monkeypatch):
    """In float32, kernels skip hidden pairs; outputs and gradients equal those with copies in float64."""
    inputs = {name: x.requires_grad_() for name, x in qkv(40, heads=4, groups=2).items()}
    options = {"pattern": pattern, "config": Config(region_size=5, top=2, routing=routing)}
    expected = apply(MECHANISM, inputs, **options).output
    monkeypatch.setattr(bilevel_routing, "_gathered", None)
    found = apply(MECHANISM, {name: x.float() for name, x in inputs.items()}, **options).output
    close_gradients(found.double(), expected, inputs, 1e-5)


@pytest.mark.parametrize(
    ("n", "m", "config"),
    [
        (40, 40, Config(region_size=5, top=1)),
        (24, 40, Config(windows=4, top=2)),
        (43, 43, Config(region_size=5, top=3)),
    ],
    ids=["few", "of other sizes", "not filled"],
)
def test_where_regions_are_few_or_unlike_they_are_copied(n, m, config):
    inputs = qkv(n, m, heads=2)
    pattern = SELF if n == m else CROSS
    expected = apply(MECHANISM, inputs, pattern=pattern, config=config).output
    found = apply(MECHANISM, {name: x.float() for name, x in inputs.items()}, pattern=pattern, config=config).output
    close(found.double(), expected, 1e-5)


@pytest.mark.parametrize("spoilt", [torch.inf, torch.nan])
def test_values_that_are_not_finite_reach_no_query_that_does_not_read_them(spoilt):
    inputs = {name: x.float() for name, x in qkv(40, heads=2).items()}
    options = {"pattern": SELF, "config": Config(region_size=5, top=2)}
    inputs["v"][:, :, 12] = spoilt
    found, expected = (apply(MECHANISM, inputs, form=form, **options).output for form in ("parallel", "reference"))
    assert torch.equal(found.isfinite(), expected.isfinite()) and found.isfinite().any()


@pytest.mark.parametrize("routing", ["shared", "head"])
@pytest.mark.parametrize("pattern", [SELF, CROSS])
def test_the_regions_that_are_told_are_those_that_are_read(routing, pattern):
    """Unit vectors as values reveal the weights, which are 0 elsewhere."""
    config, n = Config(region_size=5, top=2, routing=routing), 20
    inputs = qkv(n, heads=2, groups=1)
    inputs["v"] = torch.eye(n, dtype=torch.float64).expand(2, 1, n, n)
    call = Call(pattern=Pattern.parse(pattern), config=config)
    chosen, regions = read_regions(call, inputs["q"], inputs["k"])
    weights = apply(MECHANISM, inputs, pattern=pattern, config=config).output
    read = weights.unflatten(2, (4, 5)).unflatten(4, (4, 5)).sum((3, 5)) > 0  # (B, H, regions, regions)
    told = torch.zeros(len(chosen), 4, 4, dtype=torch.bool).scatter(2, chosen, True)
    told = told.view(2, -1, 4, 4)
    assert regions.count == 4 and torch.equal(read, told.expand_as(read))


@pytest.mark.parametrize("grid", [(5, 7), (13, 4), (2, 3, 9), (1, 1), (11,)])
@pytest.mark.parametrize("options", [{"windows": 3, "top": 2}, {"windows": 4, "top": 3, "routing": "head"}])
def test_windows_divide_any_grid_with_places_missing_anywhere(grid, options):
    """A side has at most `windows` regions; on a short side the last ones are smaller or missing."""
    inputs = qkv(math.prod(grid))
    valid = torch.rand(2, math.prod(grid)) < 0.7
    poisoned = {name: x.masked_fill(~valid[:, None, :, None], torch.nan) for name, x in inputs.items()}
    mask = Mask(valid=valid)
    expected = run(inputs, options, mask=mask, grid=grid, form="reference").output
    close(run(poisoned, options, mask=mask, grid=grid).output, expected)


@pytest.mark.parametrize("options", [{"windows": 3, "top": 9}, {"windows": 1, "top": 1}])
def test_a_layer_that_leaves_no_region_out_is_full_attention_and_a_local_convolution(options):
    layer, x = shaken(make_layer(**options)), torch.randn(2, 30, 8, dtype=torch.float64)
    q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (layer.query, layer.key, layer.value))
    attended = ((q @ k.mT) * 8**-0.5).softmax(-1) @ v
    local = layer.merge.convolution(v.transpose(1, 2).flatten(2).mT.unflatten(-1, (5, 6))).flatten(2).mT
    expected = layer.output(attended.transpose(1, 2).flatten(2) + local)
    close(layer(x, context=Context(grid=(5, 6))).output, expected)


def test_with_one_token_a_region_a_query_reads_the_keys_of_the_highest_scores():
    inputs = qkv(20)
    scores = inputs["q"] @ inputs["k"].mT
    least = scores.topk(5).values[..., -1:]
    expected = (scores / 2).masked_fill(scores < least, -torch.inf).softmax(-1) @ inputs["v"]
    options = {"region_size": 1, "top": 5, "routing": "head", "scale_by": "head_dim"}
    close(run(inputs, options, grid=(4, 5)).output, expected)


@pytest.mark.parametrize("own", [False, True])
def test_a_region_whose_keys_dominate_is_all_that_is_read_beside_the_own_where_that_is_forced(own):
    inputs, of = qkv(36), numbers((6, 6), (2, 2))
    inputs["q"] = inputs["q"].abs()
    inputs["k"][:, :, of == 4] += 100
    visible = (of == 4).expand(36, 36) | ((of[:, None] == of) if own else False)
    expected = (inputs["q"] @ inputs["k"].mT / math.sqrt(8)).masked_fill(~visible, -torch.inf).softmax(-1) @ inputs["v"]
    top = 1 if not own else 2
    options = {"windows": 3, "top": top, "include_self": own}
    found = run(inputs, options, grid=(6, 6)).output
    rows = (of != 4) if own else torch.ones(36, dtype=torch.bool)  # region 4 may choose one more
    close(found[:, :, rows], expected[:, :, rows])


def test_regions_moved_about_move_the_outputs():
    inputs, of = qkv(48), numbers((6, 8), (2, 4))
    order = torch.randperm(6)
    moved = torch.empty(48, dtype=torch.long)
    for region in range(6):
        moved[of == region] = (of == order[region]).nonzero()[:, 0]
    options = {"region_size": (2, 4), "top": 2}
    expected = run(inputs, options, grid=(6, 8)).output[:, :, moved]
    close(run({name: x[:, :, moved] for name, x in inputs.items()}, options, grid=(6, 8)).output, expected)


def test_nothing_of_the_size_of_all_pairs_is_made():
    """With four times the tokens and regions of the same size, the largest tensor is four times as large."""
    found = []
    for side in (16, 32):
        inputs = qkv(side**2, batch=1, dtype=torch.float32)
        with sdpa_kernel(SDPBackend.MATH), Largest() as largest:
            run(inputs, {"region_size": 4, "top": 2}, grid=(side, side), backend="torch")
        found.append(largest.numbers)
    assert found[1] == 4 * found[0] < 32**4


@pytest.mark.parametrize("lce_of", ["value", "input"])
def test_an_image_padded_below_and_beside_is_as_it_is_alone(lce_of):
    layer, x = shaken(make_layer(region_size=(2, 3), top=2, lce_of=lce_of)), torch.randn(2, 4, 6, 8).double()
    padded = torch.full((2, 6, 12, 8), torch.nan, dtype=torch.float64)
    padded[:, :4, :6] = x
    valid = torch.zeros(2, 6, 12, dtype=torch.bool)
    valid[:, :4, :6] = True
    context = Context(Mask(valid=valid.flatten(1)), grid=(6, 12))
    found = layer(padded.flatten(1, 2), context=context).output.unflatten(1, (6, 12))
    close(found[:, :4, :6], layer(x.flatten(1, 2), context=Context(grid=(4, 6))).output.unflatten(1, (4, 6)))
    assert (found[~valid] == 0).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("layer", {"windows": 3, "top": 4}),
        ("padded_keys", {"region_size": (2, 2), "top": 5, "padded_keys": True, "lce": 3}),
    ],
)
def test_parity_with_the_authors_layers(name, options):
    """The authors' older layer, and the newer one with regions that do not divide the sides."""
    recording, layer = load(f"bilevel_routing_{name}"), make_layer(**options)
    weights = {}
    for key, value in recorded_state(f"bilevel_routing_{name}").items():
        part, kind = key.split(".")[0], key.rsplit(".", 1)[1]
        value = value.flatten(1) if value.ndim == 4 and part != "lepe" else value
        if part.startswith("qkv"):
            weights |= dict(zip((f"{p}.{kind}" for p in ("query", "key", "value")), value.chunk(3), strict=True))
        else:
            weights[f"{'merge.convolution' if part == 'lepe' else 'output'}.{kind}"] = value
    layer.load_state_dict(weights)
    x = recording["x"].requires_grad_()
    output = layer(x, context=Context(grid=tuple(recording["grid"].tolist()))).output
    check_recorded(recording, output, {"x": x})


def test_what_it_cannot_do_is_refused():
    inputs = qkv(12)
    refused("include_self", run, inputs, {"include_self": True}, pattern=CROSS)
    refused("grid", run, inputs, pattern=CROSS, grid=(3, 4))
    refused("sequences", run, inputs, {"region_size": (2, 2)})
    refused("grid", run, inputs, {"region_size": (2, 2, 2)}, grid=(3, 4))
    refused("lce=3.*noncausal-cross", make_layer, CROSS, lce=3)
    refused("one or two sides", make_layer(), torch.randn(1, 8, 8).double(), context=Context(grid=(2, 2, 2)))
    refused("lce=4", Config, lce=4)
    refused("windows=3", Config, windows=3, region_size=2)
    refused("region_size", Config, region_size=(2, 0))
