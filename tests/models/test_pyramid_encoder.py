from __future__ import annotations

import pytest
import torch
from model_checks import FUNNELS, made, small
from support import refused

from regard.contract import BlockMask, Context, Mask
from regard.layers.shortening import SHORTENINGS, Windows
from regard.models import build_model, from_pretrained, save_pretrained
from regard.training.heads import head_importance, mix_heads

GRID = {"axes": 2, "plan": ["softmax", ("large_kernel", {"axes": 2})]}


def stages(shortening: str, *, first: str = "none", **options) -> list[dict]:
    return [{"layers": 1, "shortening": first}, {"layers": 1, "shortening": shortening, **options}]


def features(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 2, dtype=torch.float64)


def of_window(kind: str, windows: Windows, x: torch.Tensor, sides: tuple[int, ...]) -> torch.Tensor:
    """The definition: each window on its own, cut out of one sequence or grid."""
    found, size = [], windows.size
    grid = x.reshape(*sides, -1)
    for start in (
        torch.cartesian_prod(*(torch.arange(0, side, size) for side in sides)).reshape(-1, len(sides)).tolist()
    ):
        if kind == "convolution":
            weight, total = windows.projection.weight, windows.projection.bias.clone()
            for offset in torch.cartesian_prod(*(torch.arange(2 * size - 1),) * len(sides)).reshape(-1, len(sides)):
                place = [s + int(o) - size + 1 for s, o in zip(start, offset, strict=True)]
                if all(0 <= p < side for p, side in zip(place, sides, strict=True)):
                    total = total + weight[(..., *offset.tolist())] @ grid[tuple(place)]
            found.append(windows.norm(total))
            continue
        offsets = torch.cartesian_prod(*(torch.arange(size),) * len(sides)).reshape(-1, len(sides)).tolist()
        places = [tuple(s + o for s, o in zip(start, offset, strict=True)) for offset in offsets]
        tokens = [grid[p] if all(a < b for a, b in zip(p, sides, strict=True)) else None for p in places]
        there = torch.stack([token for token in tokens if token is not None])
        if kind == "merge":
            laid = torch.cat([torch.zeros_like(grid[places[0]]) if token is None else token for token in tokens])
            found.append(windows.projection(windows.norm(laid)))
        else:
            found.append(windows.projection(there.mean(0) if kind == "mean" else there.amax(0)))
    return torch.stack(found)


@pytest.mark.parametrize("kind", SHORTENINGS)
@pytest.mark.parametrize(("sides", "size"), [((7,), 2), ((6,), 3), ((3, 5), 2), ((2, 3, 3), 2)], ids=str)
def test_each_window_becomes_the_token_of_the_definition_and_goes_back_to_its_places(kind, sides, size):
    windows = Windows(kind, 3, 4, size=size, axes=len(sides)).double()
    x = torch.randn(2, torch.Size(sides).numel(), 3, dtype=torch.float64)
    grid = None if len(sides) == 1 else sides
    y, lengths, shorter = windows.shorten(x, None, grid)
    assert lengths is None and shorter == (None if grid is None else tuple(-(-side // size) for side in sides))
    for row in range(2):
        torch.testing.assert_close(y[row], of_window(kind, windows, x[row], sides))
    number = torch.arange(y.shape[1], dtype=torch.float64).expand(2, -1)[..., None]
    places = torch.cartesian_prod(*(torch.arange(side) // size for side in sides)).reshape(-1, len(sides))
    wanted = [
        sum(int(p) * torch.Size([-(-s // size) for s in sides][i + 1 :]).numel() for i, p in enumerate(place))
        for place in places
    ]
    assert windows.back(number, x.shape[1], None, grid)[0, :, 0].tolist() == wanted


@pytest.mark.parametrize("shortening", ["none", *SHORTENINGS, "funnel"])
@pytest.mark.parametrize("pool", ["mean", "none"])
def test_rows_of_every_length_equal_the_same_rows_alone(shortening, pool):
    widen = 1 if shortening in ("none", "funnel") else 2
    decoder = {"decoder_plan": "softmax"} if pool == "none" else {}
    model = made(
        "pyramid encoder", stages=stages(shortening, widen=widen), pool=pool, plan="linear*1+softmax", **decoder
    )
    x, lengths = features(9, 8), torch.arange(9)
    padded = torch.arange(8) >= lengths[:, None]
    x[padded] = torch.nan
    output = model(x, context=Context(mask=Mask(lengths=lengths))).output
    assert output.isfinite().all()
    for row in range(1, 9):
        alone = model(x[row : row + 1, :row]).output
        torch.testing.assert_close(output[row : row + 1, :row] if pool == "none" else output[row : row + 1], alone)
    order = torch.randperm(8)
    valid = torch.zeros(9, 8, dtype=torch.bool)  # the same tokens with padding anywhere, and packed
    spread = torch.full_like(x, torch.nan)
    for row, length in enumerate(lengths.tolist()):
        places = order[:length].sort().values
        valid[row, places], spread[row, places] = True, x[row, :length]
    moved = model(spread, context=Context(mask=Mask(valid=valid))).output
    packed = torch.cat([x[row, :row] for row in range(1, 9)])[None]
    borders = torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(1, 9).cumsum(0)])
    joined = model(packed, context=Context(mask=Mask(cu_seqlens=borders, max_length=8))).output
    if pool == "none":
        torch.testing.assert_close(moved[valid], output[~padded])
        torch.testing.assert_close(joined[0], output[~padded])
    else:
        torch.testing.assert_close(moved[1:], output[1:])
        torch.testing.assert_close(joined, output[1:])


@pytest.mark.parametrize("pool", ["mean", "none"])
def test_right_padded_grids_equal_the_grids_without_their_padding_rows(pool):
    model = made("pyramid encoder", **GRID, stages=stages("merge", widen=2), pool=pool)
    x = features(2, 30)
    lengths = torch.tensor([15, 30])  # three of six rows of five
    x[0, 15:] = torch.nan
    output = model(x, context=Context(mask=Mask(lengths=lengths), grid=(6, 5))).output
    short = model(x[:1, :15], context=Context(grid=(3, 5))).output
    torch.testing.assert_close(output[:1, :15] if pool == "none" else output[:1], short)
    assert pool == "mean" or (output[0, 15:] == 0).all()


def test_a_later_stage_sees_merged_tokens_of_the_width_and_heads_that_it_asks_for():
    model = made(
        "pyramid encoder",
        axes=2,
        plan="softmax*3",
        stages=[{"layers": 2}, {"layers": 1, "shortening": "merge", "size": 3, "widen": 3}],
    )
    given = model(features(1, 35), context=Context(grid=(5, 7), want=frozenset({"weights"})))
    assert [tuple(w.shape) for w in given.extras["weights"]] == [(1, 2, 35, 35)] * 2 + [(1, 6, 6, 6)]
    assert [block.mixer.dim for block in model.blocks] == [16, 16, 48]
    assert model.head.in_features == 48


def test_the_outputs_of_tokens_add_the_stages_up():
    model = made("pyramid encoder", stages=stages("mean", first="convolution"), pool="none", plan="linear*2")
    x = features(1, 12)
    whole = model(x).output
    with torch.no_grad():
        model.stages[1].norm.weight.zero_()  # removes the last stage's contribution
    assert not torch.allclose(model(x).output, whole)
    first = model(x).output[0]
    assert torch.equal(first[0::2], first[1::2])  # both come from the same window
    assert torch.pdist(first[0::2]).min() > 1e-9


def test_losses_of_all_stages_and_the_decoder_are_added():
    moh = ("mixture_of_heads", {"shared_heads": 1, "active_heads": 1})
    model = made("pyramid encoder", plan=[moh] * 2, decoder_plan=[moh], pool="none", stages=stages("merge"))
    assert {name: int(count) for name, (_, count) in model.train()(features(1, 6)).losses.items()} == {
        "load_balance": 3
    }


def test_stochastic_depth_goes_by_the_place_among_all_layers():
    config = small(
        "pyramid encoder",
        plan="linear*4",
        num_layers=None,
        stages=[{"layers": 1}, {"layers": 3, "shortening": "mean"}],
        stack={"stochastic_depth": 0.5},
    )
    places = [stage.blocks.before for stage in build_model(config).stages]
    assert places == [(0, 4), (1, 4)]


@pytest.mark.parametrize("funnel", FUNNELS[:2], ids=str)
def test_a_funnel_encoder_is_a_pyramid_whose_second_stage_is_a_funnel(funnel):
    model = made("funnel encoder", funnel=funnel, plan="linear", decoder_plan="softmax", num_layers=1)
    options = [{"layers": 1}, {"layers": 0, "shortening": "funnel", "options": funnel}]
    pyramid = made("pyramid encoder", plan=["linear"], decoder_plan="softmax", stages=options, pool="none")
    pyramid.load_state_dict(model.state_dict())
    x = features(2, 9)
    assert torch.equal(pyramid(x).output, model(x).output)


def test_without_stages_the_second_half_is_merged_and_twice_as_wide():
    config = small("pyramid encoder", plan="softmax*3")
    assert [(s.layers, s.shortening, s.widen) for s in config.stages] == [(2, "none", 1), (1, "merge", 2)]
    assert [s.layers for s in small("pyramid encoder", plan=["softmax"]).stages] == [1]


def test_what_stages_cannot_be_is_refused():
    for options, words in (
        ({"stages": stages("pool")}, "shortening"),
        ({"stages": [{"layers": 1}]}, "add up"),
        ({"stages": [{"layer": 2}]}, "layers"),
        ({"stages": [{"widen": 2}]}, "without layers"),
        ({"stages": stages("none", widen=2)}, "merge"),
        ({"stages": stages("merge", options={"blocks": 1})}, "options"),
        ({"axes": 2, "stages": stages("funnel")}, "grid"),
        ({"axes": 4}, "axes"),
        ({"plan": ["softmax", ("large_kernel", {"axes": 2})]}, "large_kernel"),
        ({"positions": "seqpe_mul"}, "positions"),
        ({"decoder_plan": "softmax"}, "pool"),
        ({"stack": {"exits": (1,)}}, "exits"),
    ):
        refused(words, made, "pyramid encoder", **{"plan": "softmax*2", **options})
    model, x = made("pyramid encoder"), features(1, 4)
    for context, words in (
        (Context(mask=Mask(bias=torch.zeros(1, 1, 4, 4))), "a bias"),
        (Context(mask=Mask(blocks=BlockMask(torch.ones(1, 1, 1, 1, dtype=torch.bool), 16))), "block mask"),
        (Context(grid=(2, 2)), "a grid"),
        (Context(roles=torch.zeros(1, 4, dtype=torch.long)), "roles"),
        (Context(positions=torch.arange(4)[None]), "explicit positions"),
    ):
        refused(words, model, x, context=context)
    images = made("pyramid encoder", **GRID)
    refused("2 sides", images, x)
    refused("grid", images, x, context=Context(grid=(3, 3)))


@pytest.mark.parametrize("shortening", [*SHORTENINGS, "funnel"])
def test_sequences_without_tokens_have_the_output_of_none(shortening):
    model = made("pyramid encoder", stages=stages(shortening), plan=["softmax", "linear"], pool="none")
    assert model(features(2, 0)).output.shape == (2, 0, 3)


def test_a_saved_model_and_a_grown_one_have_the_same_stages(tmp_path):
    model = made("pyramid encoder", plan=["softmax"] * 2, stages=stages("merge"))
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path).double()
    assert again.config == model.config
    x = features(1, 7)
    torch.testing.assert_close(again(x).output, model(x).output)


def test_heads_are_mixed_and_weighed_in_every_stage():
    model = made("pyramid encoder", plan=["softmax"] * 2, stages=stages("merge"))
    mixed, x = mix_heads(model, shared_heads=1, active_heads=1), features(2, 6)
    torch.testing.assert_close(mixed(x).output, model(x).output)
    found = head_importance(model, [x], loss=lambda m, batch: m(batch).output.square().sum())
    assert [scores.shape for scores in found] == [(2,)] * 2 and all((scores > 0).all() for scores in found)
