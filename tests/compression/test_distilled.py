"""Distillation losses and TransKD, against the official modules and the claims of the paper."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from command_line import answer, run
from safetensors.torch import load_file
from support import close, load, recorded_state, refused
from torch import Tensor, nn
from torch.nn import functional as F

from regard.compression.distillation import (
    AnswerCache,
    GLMixer,
    ResponseConfig,
    SelectiveFusion,
    Stages,
    Taught,
    TransKD,
    TransKDConfig,
    attention_transfer_loss,
    channel_loss,
    coarse_cross_entropy,
    context_loss,
    encoder_of,
    feature_loss,
    patient_layers,
    patient_loss,
    place_loss,
    read_method,
    recorded,
    relation_loss,
    response_loss,
)
from regard.compression.distillation.cached import FILE
from regard.compression.distillation.teaching import LOSS
from regard.compression.distillation.transkd import VARIANTS
from regard.models import build_model
from regard.models.image_model import ImageModelConfig
from regard.models.segmentation_model import SegmentationModelConfig
from regard.models.vision.mit import MiTConfig
from regard.models.vision.segmentation import create_segmenter
from regard.tasks import Task, create_task
from regard.training import Point, TrainConfig, train
from regard.workbench.trained.teacher import Teacher

OWN, TOLD = (4, 6, 8, 16), (6, 8, 10, 12)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def config_of(widths: tuple[int, ...]) -> MiTConfig:
    return MiTConfig(widths=widths, depths=(1,) * 4, heads=(1, 1, 1, 8), image_size=64, num_classes=0)


def transkd(**options: object) -> TransKD:
    return TransKD(config_of(OWN), config_of(TOLD), TransKDConfig(width=8, **options)).double()


def stages(widths: tuple[int, ...], batch: int = 2) -> Stages:
    inputs, embeddings, maps = [normal(batch, 3, 64, 64)], [], []
    for number, width in enumerate(widths):
        side = 16 >> number
        embeddings.append(normal(batch, side**2, width).requires_grad_())
        maps.append(normal(batch, width, side, side).requires_grad_())
    return Stages(inputs + maps[:-1], embeddings, maps)


def official(name: str) -> dict[str, Tensor]:
    """The official modules' weights under our names."""
    found = {}
    fusion: dict[int, Tensor] = {}
    names = (
        (r"^skfs\.(\d)\.conv1\.", lambda m: f"fusions.{3 - int(m[1])}.reduce."),
        (r"^skfs\.(\d)\.conv2\.", lambda m: f"fusions.{3 - int(m[1])}.widen."),
        (r"^skfs\.(\d)\.fc\.", lambda m: f"fusions.{3 - int(m[1])}.squeeze."),
        (r"^skfs\.(\d)\.fc1\.", lambda m: f"fusions.{3 - int(m[1])}.squeeze_single."),
        (r"^skfs\.(\d)\.fcs\.", lambda m: f"fusions.{3 - int(m[1])}.branches."),
        (r"^embed(\d)_linearproject\.", lambda m: f"alignments.{int(m[1]) - 1}."),
        (r"^patch_embed(\d)\.proj\.", lambda m: f"assistants.{int(m[1]) - 1}.convolution."),
        (r"^patch_embed(\d)\.norm\.", lambda m: f"assistants.{int(m[1]) - 1}.norm."),
        (r"^attn4\.qkv\.", "mixer.inputs."),
        (r"^attn4\.proj\.", "mixer.output."),
        (r"^conv1\.", "mixer.convolution."),
        (r"^conv2\.", "mixer.gate."),
        (r"^atten_weight$", "mixer.attention_share"),
        (r"^conv_weight$", "mixer.convolution_share"),
    )
    for key, value in recorded_state(name).items():
        if key.startswith("fuse_weights."):
            fusion[int(key.split(".")[1])] = value
            continue
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        if any(part in key for part in ("squeeze", "branches")) and value.ndim == 4:
            value = value[:, :, 0, 0]
        found[key] = value.reshape(()) if key.endswith("_share") else value
    if fusion:
        found["fusion"] = torch.cat([fusion[i] for i in range(len(fusion))])
    return found


def recorded_stages(of: dict[str, Tensor], kind: str = "") -> Stages:
    maps, embeddings = (
        [of[f"{kind}{part}{i}"].double().requires_grad_() for i in range(4) if f"{kind}{part}{i}" in of]
        for part in ("map", "embedding")
    )
    return Stages([of["image"].double(), *maps[:-1]] if "image" in of else [], embeddings, maps)


def test_fusion_alignment_losses_and_gradients_are_the_official_ones() -> None:
    told, module = load("vision_transkd_base"), transkd()
    module.load_state_dict(official("vision_transkd_base"))
    own, teacher = recorded_stages(told), recorded_stages(told, "teacher_")
    maps, embeddings = module(own)
    for i in range(4):
        close(maps[i], told[f"out_map{i}"])
        close(embeddings[i], told[f"out_embedding{i}"])
    close(context_loss(maps, teacher.maps), told["hcl"])
    for kind, loss in (("channel", channel_loss), ("spatial", place_loss)):
        pairs = zip(maps, teacher.maps, strict=True)
        close(torch.stack([loss(*pair, temperature=2.0) for pair in pairs]).sum(), told[f"{kind}_kl"])
    total = module.loss(own, teacher)
    close(total, told["hcl"] + told["pea"])
    total.backward()
    for i in range(4):  # gradients of 6e-6, left over from terms of size 1: one rounding of these is 4e-11 of them
        close(own.maps[i].grad, told[f"grad_map{i}"], 1e-10)
        close(own.embeddings[i].grad, told[f"grad_embedding{i}"], 1e-10)

    module.load_state_dict(official("vision_transkd_base"))
    module.eval()
    for i, found in enumerate(module.fuse([x[:1] for x in own.maps])):  # a single image has its own squeeze
        close(found, told[f"single_map{i}"])


@pytest.mark.parametrize("variant", ["gl", "ea"])
def test_mixed_and_assisted_embeddings_are_the_official_ones(variant: str) -> None:
    told, module = load(f"vision_transkd_{variant}"), transkd(variant=variant)
    module.load_state_dict(official(f"vision_transkd_{variant}"))
    for i, found in enumerate(module.align(recorded_stages(told))):
        close(found, told[f"out_embedding{i}"])


def test_parameters_are_those_of_the_paper_and_the_student_has_none_of_them() -> None:
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        student, teacher = (create_segmenter(f"segformer_{size}", num_classes=20) for size in ("b0", "b2"))
        beside = [
            TransKD(encoder_of(student).config, encoder_of(teacher).config, TransKDConfig(variant=variant))
            for variant in VARIANTS
        ]
    assert (count(student), count(teacher)) == (3_719_284, 27_362_004)
    assert [count(each) for each in beside] == [843_840, 1_499_970, 1_814_792]  # counts of the official modules
    assert [round((count(student) + count(each)) / 1e6, 2) for each in beside] == [4.56, 5.22, 5.53]


def test_shares_of_a_fusion_sum_to_one_and_are_halves_for_equal_branches() -> None:
    fusion = SelectiveFusion(5, 8, 7, below=True).double()
    x, y = normal(3, 8, 4, 4), normal(3, 8, 4, 4)
    shares = fusion.weights(x, y)
    close(shares.sum(0), torch.ones(3, 8, 1, 1, dtype=torch.float64))
    assert (shares - 0.5).abs().max() > 1e-3
    assert fusion.branches is not None
    fusion.branches[1].load_state_dict(fusion.branches[0].state_dict())
    given, below = normal(3, 5, 4, 4), normal(3, 8, 2, 2)
    _, fused = fusion(given, below)
    close(fused, (fusion.reduce(given) + F.interpolate(below, (4, 4), mode="nearest")) / 2)


def test_maps_come_in_the_order_and_shapes_of_the_teacher() -> None:
    for fusion in ("csf", "projection"):
        maps = transkd(fusion=fusion).fuse(stages(OWN).maps)
        assert [tuple(x.shape) for x in maps] == [(2, width, 16 >> i, 16 >> i) for i, width in enumerate(TOLD)]
    assert transkd(fusion="none").fuse(stages(OWN).maps) == []


def test_one_image_alone_is_squeezed_by_weights_of_its_own_or_refused_in_training() -> None:
    one, module = stages(OWN, batch=1), transkd()
    context_loss(module.fuse(one.maps), stages(TOLD, batch=1).maps).backward()
    assert module.fusions is not None
    for fusion in list(module.fusions)[:-1]:
        assert fusion.squeeze[0].weight.grad is None and fusion.squeeze_single[0].weight.grad.abs().max() > 0
    module = transkd(single=False)
    refused("a batch of one image", module.fuse, one.maps)
    assert module.eval().fuse(one.maps)[0].isfinite().all()


def test_an_assistant_without_weight_and_a_mixer_that_only_adds_are_the_base() -> None:
    own = stages(OWN)
    base = transkd()
    for variant in ("ea", "gl"):
        module = transkd(variant=variant, add=variant == "gl")
        module.load_state_dict({**module.state_dict(), **base.state_dict()})
        with torch.no_grad():
            if variant == "ea":
                assert module.fusion.tolist() == pytest.approx([0.1 * i for i in range(1, 9)])
                module.fusion.copy_(torch.tensor([1.0] * 4 + [0.0] * 4))
            else:
                mixer = module.mixer
                assert isinstance(mixer, GLMixer) and mixer.attention_share == mixer.convolution_share == 0.5
                mixer.attention_share.zero_()
                mixer.convolution_share.zero_()
        for found, expected in zip(module.align(own), base.align(own), strict=True):
            close(found, expected)


def test_the_context_loss_is_zero_quadratic_and_of_the_pooled_sides_below_the_height() -> None:
    for height, sides in ((8, (4, 2, 1)), (5, (4, 2, 1)), (4, (2, 1)), (3, (2, 1)), (2, (1,)), (1, ())):
        own, told = normal(2, 3, height, 6), normal(2, 3, height, 6)
        expected, weights = (own - told).square().mean(), 1.0
        for i, side in enumerate(sides, 1):
            pooled = (F.adaptive_avg_pool2d(x, side) for x in (own, told))
            expected, weights = expected + 2.0**-i * F.mse_loss(*pooled), weights + 2.0**-i
        close(context_loss([own], [told]), expected / weights)
        assert context_loss([own], [own]) == 0
        close(context_loss([3 * own, own], [3 * told, told]), 10 * context_loss([own], [told]))


def test_the_features_reach_every_stage_and_an_embedding_those_before_its_blocks() -> None:
    """A pitfall: embeddings are taken before a stage's blocks, maps after its norm."""
    student, teacher = segmenter((4, 6, 8)), segmenter((6, 8, 10))
    images = torch.randn(2, 1, 32, 32)
    encoder = encoder_of(student)
    with torch.no_grad(), recorded(encoder_of(teacher)) as told:
        teacher.backbone(images)

    def reached(config: TransKDConfig) -> list[tuple[bool, bool]]:
        """Whether the embedding and the blocks of each stage get a gradient."""
        module = TransKD(encoder.config, encoder_of(teacher).config, config)
        student.zero_grad()
        with recorded(encoder) as own:
            student.backbone(images)
        module.loss(own, told).backward()

        def moved(part: nn.Module) -> bool:
            return any(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())

        return [(moved(stage.embedding), moved(stage.blocks)) for stage in encoder.stages]

    assert reached(TransKDConfig(embeddings=(0, 0, 0))) == [(True, True)] * 3
    for stage in range(3):
        betas = tuple(float(i == stage) for i in range(3))
        found = reached(TransKDConfig(fusion="none", embeddings=betas))
        assert found == [(i <= stage, i < stage) for i in range(3)]


def network(widths: tuple[int, ...]) -> dict[str, object]:
    return {"widths": widths, "depths": (1, 1, 1), "heads": (1, 1, 2), "decoder_width": 8}


def scenes(size: int = 32) -> Task:
    return create_task("segmentation", data="near-cue", size=size, patch=4, evaluation_items=4)


def segmenter(widths: tuple[int, ...], task: Task | None = None) -> nn.Module:
    config = SegmentationModelConfig.for_task(task or scenes(), "segformer_nano", network(widths))
    return build_model(config)


@pytest.mark.parametrize("written", ["transkd:variant=ea,width=8", "transkd:variant=gl,width=8", "response"])
def test_a_taught_student_is_alone_in_evaluation_and_its_teacher_stays_as_it_was(written: str) -> None:
    task, student, teacher = scenes(), segmenter((4, 6, 8)), segmenter((6, 8, 10)).train()
    taught = Taught(student, teacher, read_method(written), task)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    own = {name: value.clone() for name, value in student.state_dict().items()}
    history = train(taught, task, TrainConfig(steps=3, batch_size=2, learning_rate=1e-2, measure_memory=False))
    assert all(point.auxiliary > 0 for point in history.curve)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters()) and teacher.training
    assert all(name.startswith(("student.", "beside.")) for name in taught.state_dict())
    assert any(not torch.equal(value, own[name]) for name, value in student.state_dict().items())
    batch = next(iter(task.evaluation_batches(2)))
    alone = copy.deepcopy(student).eval()
    assert torch.equal(taught.eval()(batch.inputs).output, alone(batch.inputs).output)
    assert taught(batch.inputs).losses == {}
    assert alone.state_dict().keys() == own.keys()


@pytest.mark.parametrize("written", ["transkd:variant=base,width=8", "response", "token"])
def test_a_teacher_with_a_cache_is_asked_once_for_each_item_and_says_the_same(written: str, tmp_path: Path) -> None:
    if written == "token":
        task: Task = create_task("images", size=8, patch=4)
        make = lambda dim, **more: build_model(  # noqa: E731
            ImageModelConfig.for_task(task, "vit_nano", {"dim": dim, "num_layers": 1, **more})
        )
        student, teacher = make(12, distillation_token=True), make(24)
    else:
        task, student, teacher = scenes(16), segmenter((4, 6, 8), scenes(16)), segmenter((6, 8, 10), scenes(16))
    student, teacher, asked = student.double().eval(), teacher.double(), list[int]()
    teacher.register_forward_pre_hook(lambda _, given: asked.append(len(given[0])))
    items = task.training_batch(0, 0, 6).inputs.double()

    def loss(rows: list[int], cache: AnswerCache | None) -> Tensor:
        torch.manual_seed(0)  # for the parts next to the student
        taught = Taught(student, teacher, read_method(written), task, cache=cache)
        taught.training = True
        return taught(items[rows]).losses[LOSS][0]

    cache = AnswerCache(tmp_path / "answers", teacher)
    expected = [loss(rows, None) for rows in ([0, 1, 2], [2, 3, 1], [0, 4, 3])]
    asked.clear()
    found = [loss(rows, cache) for rows in ([0, 1, 2], [2, 3, 1], [0, 4, 3])]
    assert asked == [3, 1, 1] and (cache.written, cache.read) == (5, 4)
    for one, other in zip(found, expected, strict=True):
        close(one, other, 1e-12)
    close(loss([4, 0, 3], AnswerCache(tmp_path / "answers", teacher)), expected[2], 1e-12)
    assert asked == [3, 1, 1], "a later run reads what an earlier one has written"
    with torch.no_grad():
        next(teacher.parameters()).mul_(1.5)
    loss([0, 1, 2], AnswerCache(tmp_path / "answers", teacher))
    assert asked == [3, 1, 1, 3], "another teacher has answers of its own"


def test_a_cache_that_is_no_folder_or_another_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused("is a file", AnswerCache, tmp_path / "file", nn.Linear(2, 2))
    (tmp_path / "answers.db").write_text("something else" * 100)
    refused("not a database", AnswerCache, tmp_path, nn.Linear(2, 2))
    assert (tmp_path / "answers.db").read_text() == "something else" * 100


def test_a_distillation_token_learns_the_teachers_classes_and_the_class_token_the_data() -> None:
    task = create_task("images", size=8, patch=4)
    config = ImageModelConfig.for_task(task, "vit_nano", {"dim": 12, "num_layers": 1, "distillation_token": True})
    student, teacher = build_model(config), build_model(ImageModelConfig.for_task(task, "vit_nano", {"num_layers": 1}))
    taught = Taught(student, teacher, read_method("token:weight=0.5"), task).train()
    batch = task.training_batch(0, 0, 6)
    result = taught(batch.inputs)
    class_token, token = student.backbone.forward_distilled(student.images(batch.inputs))
    classes = teacher.eval()(batch.inputs).output.argmax(-1)
    close(result.output, class_token.output)
    close(result.losses[LOSS][0], 0.5 * F.cross_entropy(token, classes))
    close(taught.eval()(batch.inputs).output, (class_token.output + token) / 2)
    refused("distillation by a token in vit_nano, which has none", Taught, teacher, student, read_method("token"), task)


def test_a_stopped_run_goes_on_to_the_same_student(tmp_path: Path) -> None:
    task, teacher, first = scenes(16), segmenter((6, 8, 10), scenes(16)), segmenter((4, 6, 8), scenes(16))

    def begin() -> Taught:
        torch.manual_seed(0)  # for the parts next to the student
        return Taught(copy.deepcopy(first), teacher, read_method("transkd:width=8"), task)

    def stop(point: Point) -> None:
        if point.step == 1:
            raise KeyboardInterrupt

    config = TrainConfig(steps=4, batch_size=2, measure_memory=False)
    whole, parts, place = begin(), begin(), tmp_path / "checkpoint.safetensors"
    train(whole, task, config)
    with pytest.raises(KeyboardInterrupt):
        train(parts, task, config, checkpoint=place, on_step=stop)
    parts = begin()
    train(parts, task, config, checkpoint=place)
    for name, value in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], value), name


def test_transkd_needs_stages_of_equal_strides_in_both() -> None:
    task = scenes()
    unet = build_model(SegmentationModelConfig.for_task(task, "unet_nano", {"widths": [4, 4]}))
    refused("stages of a mix transformer", Taught, segmenter((4, 6, 8)), unet, TransKDConfig(), task)
    options = {
        "patch": 4,
        "widths": [4, 6],
        "depths": [1, 1],
        "heads": [1, 1],
        "expansions": [2, 2],
        "reductions": [1, 1],
    }
    two = build_model(SegmentationModelConfig.for_task(task, "segformer_nano", options))
    refused("strides", Taught, segmenter((4, 6, 8)), two, TransKDConfig(), task)
    refused(
        "a weight for each stage",
        Taught,
        segmenter((4, 6, 8)),
        segmenter((6, 8, 10)),
        TransKDConfig(embeddings=(1,)),
        task,
    )
    refused("classify or segment images", Taught, two, two, ResponseConfig(), create_task("listops"))


def test_methods_are_read_with_their_options_or_refused() -> None:
    assert read_method("response:temperature=2,weight=0.5") == ResponseConfig(2, 0.5)
    assert read_method("transkd:embeddings=[0,0,1]").embeddings == (0, 0, 1)
    for written, words in (
        ("transkt", "distillation 'transkt'"),
        ("transkd:varient=gl", "option 'varient' of transkd"),
        ("transkd:variant=x", "variant='x'"),
        ("transkd:width=0", "width=0"),
        ("transkd:width=1.5", "width=1.5"),
        ("transkd:embeddings=5", "embeddings=5"),
        ("response:temperature=hot", "temperature='hot'"),
        ("response:temperature=0", "temperature=0"),
        ("response:weight=-1", "weight=-1"),
    ):
        refused(re.escape(words), read_method, written)


def test_the_loss_of_the_paper_reads_labels_at_the_size_of_the_logits() -> None:
    """A pitfall: the official code's logits and scores are those of every fourth pixel."""
    labels = torch.randint(0, 4, (2, 16, 16))
    logits, weights = normal(2, 4, 4, 4), torch.tensor([1.0, 2.0, 3.0, 0.0]).double()
    reduced = labels[:, 2::4, 2::4]
    nats, each = -logits.log_softmax(1).gather(1, reduced[:, None])[:, 0], weights[reduced]
    close(coarse_cross_entropy(logits, labels, weights), (nats * each).sum() / each.sum())
    ignored = torch.where(labels == 3, 255, labels)
    close(coarse_cross_entropy(logits, ignored, weights, ignore=255), (nats * each).sum() / each.sum())


def test_losses_are_zero_without_gradient_where_the_student_is_its_teacher() -> None:
    x = normal(2, 3, 5, 5)
    weights = x.softmax(-1)
    for loss, given in (
        (lambda own: response_loss(own, x, 3.0), x),
        (lambda own: feature_loss(own, x), x),
        (lambda own: attention_transfer_loss(own.softmax(-1), weights), x),
        (lambda own: relation_loss(own, x), x),
        (lambda own: patient_loss([own.flatten(1)], [x.flatten(1)]), x),
        (lambda own: channel_loss(own, x), x),
        (lambda own: place_loss(own, x, 2.0), x),
    ):
        own = given.clone().requires_grad_()
        found = loss(own)
        (gradient,) = torch.autograd.grad(found, own)
        assert found.detach().abs() < 1e-12 and gradient.abs().max() < 1e-12


def test_losses_give_the_teacher_no_gradient() -> None:
    own, told = (normal(2, 3, 5, 5).requires_grad_() for _ in range(2))
    total = response_loss(own, told) + feature_loss(own, told) + context_loss([own], [told]) + channel_loss(own, told)
    total = total + place_loss(own, told) + patient_loss([own.flatten(1)], [told.flatten(1)])
    total = total + attention_transfer_loss(own.softmax(-1), told.softmax(-1)) + relation_loss(own, told)
    total.backward()
    assert told.grad is None and own.grad.abs().max() > 0


def test_response_is_the_divergence_of_softened_answers_and_of_logits_in_the_limit() -> None:
    own, told = normal(4, 6, 5), normal(4, 6, 5)
    p, q = (told / 2.5).softmax(-1), (own / 2.5).softmax(-1)
    close(response_loss(own, told, 2.5), 2.5**2 * (p * (p / q).log()).sum(-1).mean())
    own, told = own - own.mean(-1, keepdim=True), told - told.mean(-1, keepdim=True)
    close(response_loss(own, told, 1e4), (own - told).square().sum(-1).mean() / (2 * 5), 1e-3)
    refused("equal shapes", response_loss, own, told[..., :4])


def test_features_pass_a_projection_and_attention_is_compared_row_by_row() -> None:
    own, told, projection = normal(2, 7, 3), normal(2, 7, 4), nn.Linear(3, 4).double()
    close(feature_loss(own, told, projection), (projection(own) - told).square().mean())
    refused("equal shapes", feature_loss, own, told)
    p, q = normal(2, 3, 4, 6).softmax(-1), normal(2, 3, 4, 6).softmax(-1)
    close(attention_transfer_loss(q, p), (p * (p / q).log()).sum(-1).mean())
    values = normal(2, 3, 6, 5), normal(2, 3, 6, 8)
    q, p = ((x @ x.mT / x.shape[-1] ** 0.5).softmax(-1) for x in values)
    close(relation_loss(*values), (p * (p / q).log()).sum(-1).mean())
    padded = torch.zeros(2, 1, 1, 6).double().index_fill(3, torch.tensor([5]), -math.inf)
    q, p = ((x @ x.mT / x.shape[-1] ** 0.5)[..., :5].softmax(-1) for x in values)
    close(relation_loss(*values, padded), (p * (p / q).log()).sum(-1).mean())
    refused("heads and tokens", relation_loss, values[0], values[1][:, :2])
    hidden = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]]]).double()
    assert attention_transfer_loss(hidden, hidden) == 0


def test_patience_reads_directions_and_every_kth_layer_or_the_last() -> None:
    own, told = [normal(3, 8) for _ in range(2)], [normal(3, 8) for _ in range(2)]
    expected = sum(
        (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).square().mean() for a, b in zip(own, told, strict=True)
    )
    close(patient_loss(own, told), torch.as_tensor(expected) / 2)
    close(patient_loss([3 * x for x in own], told), patient_loss(own, told))
    assert patient_layers(6, 12) == (2, 4, 6, 8, 10) and patient_layers(6, 12, "last") == (7, 8, 9, 10, 11)
    refused("skip layers of 10", patient_layers, 4, 10)
    refused("last layers of 3", patient_layers, 4, 3, "last")
    refused("1 layers of a student", patient_loss, own[:1], told)


SMALL = '"segformer_nano:widths=[4,6,8],depths=[1,1,1],heads=[1,1,2],decoder_width=8"'


def test_a_small_language_model_learns_the_next_tokens_of_a_larger_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog and runs\n" * 400)
    line = f"train {tmp_path / 'text.txt'} --length 32 --batch-tokens 128 --budget 20steps --learning-rate 0.01 --frame bare"
    small = f"{line} --dim 8 --layers 1 --heads 1 --teacher {tmp_path / 'teacher'}"
    told = answer(capsys, f"{line} --dim 16 --layers 2 --heads 1 --output {tmp_path / 'teacher'}")
    found = answer(capsys, f"{small} --distil response:temperature=2 --output {tmp_path / 'student'}")
    assert found["teacher"]["score"] == told["score"] and found["parameters"] < told["parameters"]
    assert answer(capsys, f"evaluate {tmp_path / 'student'}")["score"] == found["score"]
    assert answer(capsys, f"generate {tmp_path / 'student'} the --tokens 4")["text"]
    plain = answer(capsys, f"{small.partition(' --teacher')[0]} --output {tmp_path / 'alone'}")
    assert plain["score"] != found["score"], "the teacher has moved the weights"
    for asked, words in (
        (f"{small} --distil transkd", "supported: response"),
        (f"{small} --tokenizer bpe:280", "try --tokenizer bytes"),
    ):
        code, _, messages = run(capsys, f"{asked} --output {tmp_path / 'no'}")
        assert code == 2 and words in " ".join(messages.split()), (asked, messages)
    assert not (tmp_path / "no").exists()


TASK = "--task segmentation:data=near-cue,size=16,patch=4,evaluation_items=8"
TRAIN = f"train {TASK} --batch-tokens 64 --budget 20steps --learning-rate 0.01"


def test_a_student_is_trained_from_a_folder_and_is_like_any_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    big = SMALL.replace("[4,6,8]", "[6,8,10]")
    told = answer(capsys, f"{TRAIN} --model {big} --best-of 0 --output {teacher}")
    line = f"{TRAIN} --model {SMALL} --teacher {teacher} --distil transkd:variant=ea --ema 0.9"
    found = answer(capsys, f"{line} --output {student}")
    assert found["teacher"] == {key: told[key] for key in ("mechanism", "parameters", "score", "metric")}
    assert found["parameters"] < told["parameters"]
    plain = SegmentationModelConfig.for_task(scenes(size=16), "segformer_nano", network((4, 6, 8)))
    assert load_file(student / "model.safetensors").keys() == build_model(plain).state_dict().keys()
    assert answer(capsys, f"evaluate {student}")["score"] == found["score"]
    read = Teacher.read(teacher, "transkd", scenes(size=16))
    one, other = (read.teach(build_model(plain), seed=3).beside.state_dict() for _ in range(2))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    readme = (student / "README.md").read_text()
    assert f"Distilled by transkd:variant=ea from {teacher}" in readme and "None" not in readme

    mechanism = f"{TRAIN} --dim 8 --layers 1 --heads 1 --frame bare --teacher {teacher}"
    assert answer(capsys, f"{mechanism} --output {tmp_path / 'softmax'}")["settings"]["distil"] == "response"
    for asked, words in (
        (f"{line.replace(':variant=ea', '')} --output {student}", "transkd:variant=ea"),
        (f"{TRAIN} --model {SMALL} --ema 0.9 --output {student}", "teacher="),
        (f"{mechanism} --distil transkd --output {tmp_path / 'no'}", "stages of a mix transformer"),
        (f"{mechanism} --distil transkt --output {tmp_path / 'no'}", "try transkd"),
        (f"{TRAIN} --model {SMALL} --distil transkd --output {tmp_path / 'no'}", "--teacher FOLDER"),
        (f"{TRAIN} --teacher {tmp_path} --output {tmp_path / 'no'}", "written by"),
        (f"{TRAIN.replace('near-cue', 'shapes')} --teacher {teacher} --output {tmp_path / 'no'}", "classes background"),
        (f"{TRAIN.replace('size=16', 'size=32')} --teacher {teacher} --output {tmp_path / 'no'}", "height 16"),
        (f"{line} --teacher-cache {tmp_path / 'c'} --output {tmp_path / 'no'}", "new at every step"),
        (f"{TRAIN} --model {SMALL} --teacher-cache {tmp_path / 'c'} --output {tmp_path / 'no'}", "--teacher FOLDER"),
        (f"train --task listops --teacher {teacher} --output {tmp_path / 'no'}", "the task listops"),
    ):
        code, _, messages = run(capsys, asked)
        assert code == 2 and words in messages, (asked, messages)
    assert not (tmp_path / "no").exists() and not (tmp_path / "c").exists()


def test_students_of_the_same_images_share_the_answers_of_their_teacher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "train --task images:size=8,patch=4,evaluation_items=20 --batch-tokens 64 --learning-rate 0.01"
    small = f"{line} --budget 20steps --dim 8 --layers 1 --heads 1 --frame bare"
    answer(
        capsys, f"{line} --budget 20steps --dim 16 --layers 1 --heads 1 --frame bare --output {tmp_path / 'teacher'}"
    )
    taught = f"{small} --teacher {tmp_path / 'teacher'}"
    plain = answer(capsys, f"{taught} --output {tmp_path / 'plain'}")
    cached = answer(capsys, f"{taught} --teacher-cache {tmp_path / 'answers'} --output {tmp_path / 'cached'}")
    written = (tmp_path / "answers" / FILE).stat().st_mtime_ns
    assert cached["score"] == plain["score"]
    answer(capsys, f"{taught} --teacher-cache {tmp_path / 'answers'} --output {tmp_path / 'again'}")
    assert (tmp_path / "answers" / FILE).stat().st_mtime_ns == written, "no answer is new"
