"""Rotary positions of several axes: the definition, what scores depend on, grids, class tokens and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import GRAPH, close, refused, shaken
from torch import Tensor

from regard import Context, Mask, create_layer
from regard.compression.tokens.hosts import OwnHost
from regard.contract import Role
from regard.models import Encoder, EncoderConfig, LanguageModel, LanguageModelConfig
from regard.models.vision.vit import VisionTransformer, VisionTransformerConfig
from regard.positions import Rotary, create_positions

AXIAL = {"positions": "rotary", "position_options": {"axes": 2}}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def places(*sides: int) -> Tensor:
    """Coordinates of a grid's places, row by row, (1, N, axes)."""
    return torch.cartesian_prod(*map(torch.arange, sides)).view(1, -1, len(sides))


def layer(name: str = "softmax", pattern: str = "noncausal-self", **options: object):
    return shaken(create_layer(name, 24, 3, pattern=pattern, **{**AXIAL, **options})).eval()


def vit(**changed: object) -> VisionTransformer:
    sizes = {"dim": 16, "num_heads": 2, "num_layers": 2, "patch": 8, "image_size": 32, "expansion": 2, "num_classes": 5}
    return shaken(VisionTransformer(VisionTransformerConfig(**{**sizes, **AXIAL, **changed}))).eval()


@pytest.mark.parametrize(("axes", "fraction", "width"), [(2, 1.0, 12), (2, 0.5, 16), (3, 1.0, 12)])
def test_each_part_of_a_head_is_turned_by_its_coordinate_as_a_complex_number(axes, fraction, width):
    x, at = normal(2, 3, 5, width), torch.randint(0, 300, (2, 5, axes))
    rotated = int(width * fraction)
    part = rotated // axes
    theta = 100.0 ** (-torch.arange(0, part, 2).double() / part)
    expected = []
    for axis in range(axes):
        one = x[..., axis * part : (axis + 1) * part]
        turned = torch.complex(*one.chunk(2, -1)) * torch.exp(1j * at[:, None, :, None, axis] * theta)
        expected += [turned.real, turned.imag]
    found = Rotary(head_dim=width, axes=axes, fraction=fraction).rotate(x, at)
    close(found, torch.cat([*expected, x[..., rotated:]], -1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_far_places_are_as_exact_as_near_ones_and_gradients_turn_back(dtype, tolerance):
    scheme, x, at = Rotary(head_dim=24, axes=2, fraction=0.7), normal(2, 3, 5, 24), torch.randint(10**6, (2, 5, 2))
    x = x.to(dtype).requires_grad_()
    found = scheme.rotate(x, at)
    assert found.dtype == dtype
    close(found.double(), scheme.rotate(x.double(), at), tolerance)
    (back,) = torch.autograd.grad(found, x, found)
    close(back, x, tolerance)


@pytest.mark.parametrize("options", [{}, {"interpolation": 2.0}, {"ntk": 3.0}, {"base": 10_000.0, "fraction": 0.5}])
def test_scores_depend_on_differences_of_rows_and_of_columns_alone(options):
    scheme, (q, k) = Rotary(head_dim=16, axes=2, **options), normal(2, 1, 2, 7, 16)
    i, j = torch.randint(0, 50, (2, 1, 7, 2))

    def scores(ahead: Tensor, apart: Tensor) -> Tensor:
        return scheme.rotate(q, i + ahead + apart) @ scheme.rotate(k, j + ahead).mT

    none = torch.zeros(2, dtype=torch.long)
    close(scores(torch.tensor([123, 4567]), none), scores(none, none), 1e-10)
    for apart in torch.eye(2, dtype=torch.long):
        assert (scores(none, apart) - scores(none, none)).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{"ntk": 4.0}, {"interpolation": 4.0, "wavelengths": (8.0, 200.0)}])
def test_longer_contexts_are_those_of_a_head_for_each_axis(options):
    x, at = normal(1, 2, 5, 16), torch.randint(0, 300, (1, 5, 2))
    half = Rotary(head_dim=8, base=100.0, **options)
    expected = [half.rotate(part, at[..., axis]) for axis, part in enumerate(x.chunk(2, -1))]
    close(Rotary(head_dim=16, axes=2, **options).rotate(x, at), torch.cat(expected, -1))


@pytest.mark.parametrize("grid", [(3, 4), (4, 3), (1, 12)])
@pytest.mark.parametrize("name", ["softmax", "linear", "local"])
def test_a_layer_numbers_the_places_of_any_grid_row_by_row(name, grid):
    mixer, x = layer(name), normal(2, 12, 24)
    found = mixer(x, context=Context(grid=grid)).output
    close(found, mixer(x, context=Context(positions=places(*grid).expand(2, -1, -1))).output)
    assert (found - mixer(x, context=Context(grid=(2, 6))).output).abs().max() > 1e-6


@pytest.mark.parametrize("positions", ["rotary", "seqpe_mul"])
def test_padding_leaves_tokens_of_a_grid_in_their_places(positions):
    mixer, x = layer(positions=positions), normal(2, 12, 24)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, [0, 5]] = valid[1, 7:] = False
    hidden = torch.zeros(2, 1, 1, 12, dtype=torch.float64).masked_fill(~valid[:, None, None], -torch.inf)
    expected = mixer(x, context=Context(mask=Mask(bias=hidden), grid=(3, 4))).output
    x = x.masked_fill(~valid[..., None], torch.nan)
    close(mixer(x, context=Context(mask=Mask(valid=valid), grid=(3, 4))).output[valid], expected[valid])


def test_an_encoder_depends_on_the_grid_of_its_call_and_ignores_right_padding():
    sizes = {"features": 2, "dim": 16, "num_heads": 2, "num_layers": 2}
    model, x = shaken(Encoder(EncoderConfig(3, **AXIAL, **sizes))).eval(), normal(2, 15, 2)
    wide, tall = (model(x, context=Context(grid=grid)).output for grid in ((3, 5), (5, 3)))
    assert (wide - tall).abs().max() > 1e-6
    lengths = torch.tensor([10, 15])
    found = model(x, context=Context(grid=(3, 5), mask=Mask(lengths=lengths))).output
    close(found[:1], model(x[:1, :10], context=Context(grid=(2, 5))).output)
    close(found[1:], wide[1:])
    refused("2 axes on a sequence", model, x)


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("plan", ["softmax", "agent", "mixture_of_heads", "local"])
def test_a_vision_transformer_turns_patches_by_row_and_column_and_class_tokens_not_at_all(plan, distilled):
    model, before, seen = vit(plan=plan, distillation_token=distilled), 1 + distilled, []
    for part in model.modules():
        if isinstance(part, Rotary):
            turn = part.rotate
            part.rotate = lambda x, at, turn=turn: (seen.append((x, at, turn(x, at))), seen[-1][2])[1]
    model(normal(2, 3, 16, 40))
    assert len(seen) == 4
    for x, at, turned in seen:
        assert torch.equal(at[:, before:], places(2, 5).expand(2, -1, -1))
        close(turned[:, :, :before], x[:, :, :before])
        assert (turned[:, :, before:] - x[:, :, before:]).abs().amax((0, 1, 3))[1:].min() > 1e-3


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_images_of_other_sizes_are_taken_and_a_saved_model_gives_the_same(pool, tmp_path: Path):
    model, x = vit(pool=pool), normal(2, 3, 16, 48)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = vit(pool=pool, image_size=(16, 48))
    again.load_state_dict(torch.load(tmp_path / "model.pt"))
    close(again(x), model(x))
    assert (model(x) - model(x.flip(-1))).abs().max() > 1e-6
    assert (model(x) - model(x.flip(-2))).abs().max() > 1e-6


def test_a_compiled_model_gives_the_same_for_images_of_any_size():
    torch._dynamo.reset()
    model = vit(num_layers=1)
    compiled = torch.compile(model, backend=GRAPH, fullgraph=True)
    with torch.no_grad():
        for width in (48, 40, 24):
            x = normal(2, 3, 16, width)
            close(compiled(x), model(x))


def test_removed_patches_leave_the_others_in_their_places():
    model, x = vit(), normal(2, 3, 16, 40)
    host, kept = OwnHost(model), torch.tensor([0, 2, 3, 7, 10])
    tokens, shared = host.embed(x)
    found = host.run(model.blocks, tokens[:, kept], shared, places=kept.expand(2, -1))
    alive = torch.zeros(2, 11, dtype=torch.bool)
    alive[:, kept] = True
    context = Context(mask=Mask(valid=alive), grid=(2, 5), roles=int(Role.CLS) * (torch.arange(11) == 0).expand(2, -1))
    expected = tokens
    for block in model.blocks:
        expected = block(expected, context=context).output
    close(found, expected[:, kept])


def test_what_has_no_grid_is_refused_with_the_reason():
    text = LanguageModel(LanguageModelConfig(vocab_size=11, dim=16, num_heads=2, num_layers=1, **AXIAL))
    refused("rotary positions of 2 axes on a sequence", text, torch.randint(0, 11, (1, 5)))
    refused("a grid of 2 axes", text.generate, torch.randint(0, 11, (1, 5)), max_new_tokens=2)
    refused("places its keys", create_layer, "landmark", 24, 3, **AXIAL)
    refused("places its keys", create_layer, "norm_linear", 24, 3, pattern="noncausal-self", **AXIAL)
    refused("3 axes|axes=3", layer(), normal(1, 8, 24), context=Context(grid=(2, 2, 2)))
    refused("at most 12 tokens", layer(), normal(1, 13, 24), context=Context(grid=(3, 4)))
    refused("coordinates", Rotary(head_dim=8, axes=2).rotate, normal(1, 1, 3, 8), torch.zeros(1, 3, dtype=torch.long))
    refused("positions of shape", Rotary(head_dim=8).rotate, normal(1, 1, 3, 8), torch.zeros(1, 3, 2, dtype=torch.long))
    refused("roles", Context, roles=torch.zeros(1, 3, 2, dtype=torch.long))
    for name in ("sinusoidal", "lrpe", "seqpe", "seqpe_mul"):
        one = shaken(create_layer("softmax", 24, 3, positions=name))
        refused("positions of shape", one, normal(1, 12, 24), context=Context(positions=places(3, 4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 6}, "head_dim=8"),
        ({"head_dim": 10}, "a head_dim that 4 divides"),
        ({"axes": 0}, "axes >= 1"),
        ({"fraction": 0.25}, "at least 4"),
        ({"ntk": 2.0, "head_dim": 4}, "at least 8"),
    ],
)
def test_heads_that_cannot_be_divided_among_the_axes_are_refused(options, message):
    sizes = {"dim": 16, "heads": 2, "head_dim": 8, "axes": 2}
    refused(message, create_positions, "rotary", **{**sizes, **options})
