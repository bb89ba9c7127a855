"""The Vision Transformer and Agent-DeiT: parity with timm and the official code, and the context passed to mechanisms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import GRAPH, close, load, recorded_state, refused, shaken
from torch import Tensor, nn

from regard.contract import Context
from regard.models import Encoder, EncoderConfig
from regard.models.losses import LOSS_WEIGHTS
from regard.models.vision import create_backbone
from regard.models.vision.vit import VisionTransformer, VisionTransformerConfig

TINY = {"dim": 16, "num_heads": 2, "num_layers": 3, "patch": 8, "image_size": 32, "expansion": 2, "num_classes": 5}
AGENTS = ("agent", {"num_agents": 9, "agent_bias": "all"})


def tiny(**changed: object) -> VisionTransformer:
    return VisionTransformer(VisionTransformerConfig(**{**TINY, **changed})).double().eval()


def images(height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(2, 3, height, width, dtype=torch.float64)


def test_agent_deit_gives_the_outputs_of_the_official_code() -> None:
    """Two layers of agent attention with all biases, a class token and bins that do not divide the grid, then softmax."""
    recording = load("vision_agent_deit")
    model = tiny(plan=[AGENTS, AGENTS, "softmax"])
    model.load_released(recorded_state("vision_agent_deit"))
    features, (first,) = model.forward_intermediates(recording["images"].double(), indices=[0])
    close(first.flatten(2).mT.contiguous(), recording["first_block"][:, 1:])
    close(model.forward_head(features), recording["output"])


@pytest.mark.parametrize("distilled", [False, True])
def test_vit_and_deit_give_the_outputs_of_timm(distilled: bool) -> None:
    timm = pytest.importorskip("timm.models.deit")
    sizes = {"img_size": (16, 32), "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2}
    made = timm.VisionTransformerDistilled if distilled else timm.VisionTransformer
    theirs = made(**sizes, num_classes=5, init_values=0.5).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model = tiny(distillation_token=distilled, image_size=(16, 32), layer_scale=1.0)
    model.load_released(theirs.state_dict())
    x = images(16, 32)
    close(model(x), theirs(x))
    expected, found = (m.forward_intermediates(x, intermediates_only=True) for m in (theirs, model))
    for one, other in zip(found, expected, strict=True):
        close(one.contiguous(), other.contiguous())
    for reshape in (False, True):
        expected, found = (m.get_intermediate_layers(x, [0, 2], reshape) for m in (theirs, model))
        for one, other in zip(found, expected, strict=True):
            close(one.contiguous(), other.contiguous())
    if distilled:
        close(
            model.forward_head(model.forward_features(x), pre_logits=True),
            theirs.forward_head(theirs.forward_features(x), pre_logits=True),
        )
        result, second = model.forward_distilled(x)
        first = result.output
        close(first, theirs.head(theirs.forward_features(x)[:, 0]))
        close((first + second) / 2, model(x))
    else:
        refused("distillation_token=True", model.forward_distilled, x)


@pytest.mark.parametrize("size", [(24, 40), (8, 16)])
def test_weights_of_another_image_size_give_the_outputs_of_timm(size: tuple[int, int]) -> None:
    timm = pytest.importorskip("timm.models.vision_transformer")
    sizes = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2, "num_classes": 5}
    state = timm.VisionTransformer(**sizes, img_size=32, init_values=0.5).state_dict()
    state["pos_embed"] = torch.randn_like(state["pos_embed"])
    theirs = timm.VisionTransformer(**sizes, img_size=size, init_values=0.5).double().eval()
    theirs.load_state_dict(timm.checkpoint_filter_fn(dict(state), theirs))
    model = tiny(image_size=size, layer_scale=1.0)
    model.load_released(state)
    x = images(*size)
    assert (model(x) - theirs(x)).abs().max() < 1e-5  # timm resizes in float32


def rows_alone(mixer: nn.Module, line: str) -> None:
    """Make agent a gather only values of row (or column) a, and the places of that row read only agent a."""
    with torch.no_grad():
        for linear in (mixer.query, mixer.key):
            linear.weight.zero_()
            linear.bias.zero_()
        for parameter in mixer.merge.parameters():
            parameter.zero_()
        for tables in (mixer.projection.gather_bias, mixer.projection.share_bias):
            for name, table in tables.named_parameters():
                table.zero_()
                if name == line:
                    table.sub_(1e3 * (1 - torch.eye(*table.shape[1:], dtype=table.dtype)))
        mixer.projection.gather_bias.other.fill_(-1e3)


@pytest.mark.parametrize("line", ["rows", "columns"])
def test_agent_biases_of_a_row_are_those_of_a_whole_row_of_a_map_that_is_not_square(line: str) -> None:
    grid = (3, 5) if line == "rows" else (5, 3)
    model = tiny(
        plan=[("agent", {"num_agents": 4, "agent_bias": "all"})], num_layers=1, image_size=[8 * s for s in grid]
    )
    block = model.blocks[0]
    rows_alone(block.mixer, line)
    seen = {}
    block.mixer_norm.register_forward_hook(lambda module, given, out: seen.update(x=out))
    block.mixer.register_forward_hook(lambda module, given, out: seen.update(y=out.output.clone()))
    model(images(8 * grid[0], 8 * grid[1]))
    values = block.mixer.value(seen["x"][:, 1:]).unflatten(1, grid)
    mean = values.mean(2 if line == "rows" else 1, keepdim=True).expand_as(values)
    close(seen["y"][:, 1:], block.mixer.output(mean.flatten(1, 2)))


@pytest.mark.parametrize(
    ("plan", "options"),
    [
        ([("softmax", {"positions": "rotary"}), ("gated_linear", {}), ("linear", {"feed_forward": 0})], {}),
        (
            [("agent", {"num_agents": 4}), ("longformer", {"window": 4}), ("bidirectional_mamba", {})],
            {"positions": "sinusoidal"},
        ),
        ([("large_kernel", {"kernel": 3, "dilation": 1}), ("fnet", {}), AGENTS], {"pool": "mean"}),
        ("softmax", {"positions": "alibi"}),
        ("softmax", {"positions": "auto", "distillation_token": True}),
    ],
)
def test_layers_may_have_any_mechanism(plan: object, options: dict[str, object]) -> None:
    model, x = tiny(plan=plan, **options).train(), images()
    (2 * model(x)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


@pytest.mark.parametrize("entry", [AGENTS, ("kernelized_rpe", {"max_offset": (4, 4)})], ids=["agent", "kernelized_rpe"])
def test_layers_that_are_told_the_class_token_are_compiled(entry: object) -> None:
    model, x = tiny(plan=[entry], num_layers=1), images()
    with torch.no_grad():
        close(torch.compile(model, backend=GRAPH, fullgraph=True)(x), model(x))


SEQPE = ["seqpe", "seqpe_mul", "seqpe_add", "seqpe_scalar"]


@pytest.mark.parametrize("positions", ["sinusoidal", "none", "rotary", *SEQPE])
def test_without_a_table_of_positions_images_of_another_size_are_taken(positions: str) -> None:
    model, x = tiny(positions=positions), images(16, 48)
    again = tiny(positions=positions, image_size=(16, 48))
    again.load_released(model.state_dict())
    close(model(x), again(x))
    assert float((model(x) - model(x.flip(-1))).detach().abs().max()) > 1e-6


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("positions", SEQPE)
def test_seqpe_without_class_tokens_is_that_of_an_encoder_on_the_grid(positions: str, training: bool) -> None:
    given = {"positions": positions, "max_length": 400, "expansion": 2}
    model = shaken(tiny(pool="mean", position_options={"dropout": 0.0, "shift": 0.5}, **given)).train(training)
    options = {"bias": True, "feed_forward_kind": "gelu", "feed_forward_options": {"bias": True}}
    config = EncoderConfig(
        **{name: TINY[name] for name in ("dim", "num_heads", "num_layers", "num_classes")},
        features=3 * 8 * 8,
        plan=[("softmax", options)] * 3,
        feed_forward=32,
        norm="layer:1e-6",
        positions=positions,
        position_options={"axes": 2, "dropout": 0.0, "shift": 0.5},
        max_length=400,
    )
    encoder = Encoder(config).double().train(training)
    for ours, theirs in (("blocks", "blocks"), ("norm", "norm"), ("head", "head"), ("encoding", "positions")):
        getattr(encoder, theirs).load_state_dict(getattr(model, ours).state_dict())
    x = images()
    encoder.embedding.load_state_dict(model.embedding.state_dict())
    for seed in range(1 + 3 * training):
        torch.manual_seed(seed)
        found = model.forward_with_losses(x)
        torch.manual_seed(seed)
        expected = encoder(F.unfold(x, 8, stride=8).mT, context=Context(grid=(4, 4)))
        close(found.output, expected.output)
        assert found.losses.keys() == expected.losses.keys() == (LOSS_WEIGHTS.keys() & found.losses.keys())
        assert bool(found.losses) == training
        for name, (total, count) in expected.losses.items():
            close(found.losses[name][0], total)
            assert found.losses[name][1] == count


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("positions", SEQPE[1:])
def test_class_tokens_have_vectors_in_place_of_the_encoders_for_all_layers(positions: str, distilled: bool) -> None:
    model, x = shaken(tiny(positions=positions, distillation_token=distilled)), images(16, 40)
    before, seen = 1 + distilled, []
    for block in model.blocks:
        block.register_forward_pre_hook(
            lambda _, __, more: seen.append(more["context"].position_vectors), with_kwargs=True
        )
    output = model(x)
    assert len(seen) == 3 and seen[0] is seen[1] is seen[2]
    places = torch.cartesian_prod(torch.arange(2), torch.arange(5))
    e = torch.cat([model.class_positions, model.encoding.vectors(places)])
    close(seen[0][0], torch.cat([model.encoding.query_projection(e), model.encoding.key_projection(e)], -1))
    assert "encoder" not in {part for name, _ in model.blocks.named_parameters() for part in name.split(".")}
    with torch.no_grad():
        model.class_positions[-1] += 1
    assert not torch.allclose(model(x), output)
    assert model.class_positions.shape == (before, 16)


@pytest.mark.parametrize("positions", SEQPE)
def test_seqpe_learns_is_saved_and_its_tables_do_not_decay(positions: str, tmp_path: Path) -> None:
    model = tiny(positions=positions, position_options={"encoder_dim": 24, "encoder_heads": 2}).train()
    result = model.forward_with_losses(images())
    (result.output.square().sum() + sum(total for total, _ in result.losses.values())).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert {"encoding.encoder.token", "encoding.encoder.last", "class_tokens"} <= model.no_weight_decay()
    assert ("class_positions" in model.no_weight_decay()) == (positions != "seqpe")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = tiny(positions=positions, position_options={"encoder_dim": 24, "encoder_heads": 2})
    again.load_state_dict(torch.load(tmp_path / "model.pt"))
    close(again(x := images()), model.eval()(x))


def test_a_model_with_seqpe_is_compiled() -> None:
    model, x = tiny(positions="seqpe_mul", num_layers=1), images()
    with torch.no_grad():
        close(torch.compile(model, backend=GRAPH, fullgraph=True)(x), model(x))


def test_fixed_positions_tell_rows_in_one_half_of_the_features_and_columns_in_the_other() -> None:
    model = tiny(positions="sinusoidal", pool="mean", image_size=(24, 32))
    images = torch.randn(1, 3, *model.config.size, dtype=torch.float64)
    added = (model.embed(images) - model.embedding(images)).unflatten(1, model.config.grid)[0]
    close(added[..., :8], added[:, :1, :8].expand(3, 4, 8))
    close(added[..., 8:], added[:1, :, 8:].expand(3, 4, 8))
    assert len({tuple(place.tolist()) for place in added.detach().flatten(0, 1)}) == 12


def test_tables_are_resized_when_weights_come_from_another_image_size() -> None:
    old, new = tiny(plan=[AGENTS] * 3), tiny(plan=[AGENTS] * 3, image_size=(48, 24))
    new.load_released(old.state_dict())
    image = F.interpolate(old.positions[1:].mT.unflatten(-1, (4, 4))[None], (6, 3), mode="bicubic", antialias=True)
    close(new.positions, torch.cat([old.positions[:1], image[0].flatten(1).mT]))
    before, after = (m.blocks[0].mixer.projection.share_bias for m in (old, new))
    close(after.rows, F.interpolate(before.rows, 6, mode="linear"))
    close(after.columns, F.interpolate(before.columns, 3, mode="linear"))
    close(after.block, before.block)
    half = {name: value.bfloat16() for name, value in old.state_dict().items()}  # torch cannot resize these so
    new.load_released(half)
    rounded = F.interpolate(
        half["positions"][1:].double().mT.unflatten(-1, (4, 4))[None], (6, 3), mode="bicubic", antialias=True
    )
    torch.testing.assert_close(new.positions[1:], rounded[0].flatten(1).mT, atol=1e-3, rtol=1e-2)


def test_mixture_of_heads_with_even_routers_and_all_heads_active_is_attention() -> None:
    """Its loss, k when balanced, is returned along with the logits."""
    plan = [("mixture_of_heads", {"shared_heads": 1, "active_heads": 3, "mechanism_options": {"bias": True}})] * 2
    sizes = {"num_heads": 4, "num_layers": 2}
    plain, routed = tiny(**sizes), tiny(plan=plan, **sizes)
    state = {name.replace(".mixer.", ".mixer.attention."): value for name, value in plain.state_dict().items()}
    routers = {name: torch.zeros_like(p) for name, p in routed.named_parameters() if ".merge.logits." in name}
    assert len(routers) == 4
    routed.load_state_dict({**state, **routers})
    x = images()
    result = routed.forward_with_losses(x)
    close(result.output, plain(x))
    close(result.output, routed(x))
    total, count = result.losses["load_balance"]
    close(total / count, torch.tensor(3.0, dtype=total.dtype))
    assert not plain.forward_with_losses(x).losses


def test_losses_of_experts_are_added_over_the_layers() -> None:
    model = tiny(
        plan=[
            ("softmax", {"feed_forward_kind": "mixture_of_experts"}),
            "softmax",
            ("linear", {"feed_forward_kind": "mixture_of_experts"}),
        ]
    )
    pixels, wanted = images(), {}
    x = model.embed(pixels)
    for block in model.blocks:
        x = x + block.mix(x, context=Context()).output
        x = x + block.feed(x, context=Context(), losses=wanted)
    found = model.forward_with_losses(pixels).losses
    assert found.keys() == wanted.keys() == {"load_balance"}
    for one, other in zip(found["load_balance"], wanted["load_balance"], strict=True):
        close(one, other)


def test_stochastic_depth_leaves_out_each_branch_of_each_example_alone() -> None:
    model = tiny(drop_path=0.6)
    assert [block.drop_path.probability for block in model.blocks] == pytest.approx([0.0, 0.3, 0.6])
    block, x = model.blocks[2], torch.randn(64, 4, 16, dtype=torch.float64)
    context = Context()
    with torch.no_grad():
        found = block.train()(x, context=context).output
        mixed = x + block.mix(x, context=context).output / 0.4
        kept = [y + block.feed(y, context=context) / 0.4 for y in (x, mixed)]
    same = torch.stack([(found - y).abs().amax((1, 2)) < 1e-12 for y in (x, mixed, *kept)])
    assert same.any(0).all()
    assert same.any(1).all()


def test_dropped_tokens_and_branches_leave_the_norm_and_the_head() -> None:
    model = shaken(tiny(branch_dropout=1 - 1e-9)).train()
    close(model(images()), model.head(model.norm.bias).expand(2, -1))


def test_layers_start_as_those_of_deit() -> None:
    block = create_backbone("deit_t", num_classes=0, image_size=32).blocks[1]
    for linear in (block.mixer.query, block.mixer.output, block.feed_forward.up):
        assert float(linear.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert not linear.bias.any()


def test_what_cannot_be_done_is_refused() -> None:
    refused("pool='mean'", tiny, plan="large_kernel")
    refused("pool='class'", tiny, pool="mean", distillation_token=True)
    refused("pool='last'", tiny, pool="last")
    refused("positions='seqpe' in", tiny, plan=[("softmax", {"positions": "seqpe"})] * 3)
    own = ("softmax", {"positions": "seqpe_mul", "position_options": {"axes": 2}})
    refused("positions='seqpe_mul' in", tiny, plan=[own] * 3)
    tiny(plan=[own] * 3, pool="mean", positions="none")(images())
    refused("max_length=25", tiny(positions="seqpe_mul", max_length=16), images(40, 32))
    refused("position_options of learned", tiny, position_options={"base": 10})
    refused("supported: base", tiny, positions="sinusoidal", position_options={"axes": 2})
    refused("multiples of 8 from 8; try 40 x 32 pixels", tiny, image_size=(36, 32))
    refused("image_size=\\(32, 40\\)", tiny(), images(32, 40))
    refused("a plan of 2 layers", tiny, plan=["softmax", "linear"])
