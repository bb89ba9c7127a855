"""Backbones whose widths are scaled to equal size: how near they come, and that this is reported."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from command_line import answer, run
from support import ALL, refused

from regard.contract import Unsupported
from regard.measurement.budget import Budget
from regard.models import build_model, count_parameters
from regard.models.image_model import ImageModelConfig
from regard.models.segmentation_model import SegmentationModelConfig
from regard.models.variants import read_variant
from regard.models.vision import list_backbones, read_backbone
from regard.models.vision.scaling import scaled_widths
from regard.models.vision.vit import VisionTransformer
from regard.tasks import create_task
from regard.workbench.comparison import matching
from regard.workbench.comparison.matching import flops, match, sentence, with_options
from regard.workbench.comparison.settings import CompareSettings
from regard.workbench.comparison.task_models import model_config
from regard.workbench.comparison.work import Work

pytest.importorskip("sklearn")
SMALL = ("van_nano:widths=[8,12,16]", "mixer_nano:width=32,hidden=48,depth=2,token_hidden=8", "vit_nano:num_layers=1")


@pytest.fixture(scope="module")
def task():
    return create_task("images", size=32, evaluation_items=20)


@pytest.mark.parametrize("positions", ["seqpe", "learned"])
def test_positions_of_the_input_named_for_all_layers_are_the_models(task, positions):
    def config(name):
        return model_config(read_variant(name), task, CompareSettings(("softmax",), Budget.parse("40 steps")), "bare")

    assert build_model(config(f"softmax:positions={positions}")).positions.name == positions
    assert config("softmax").positions == "sinusoidal"
    refused("for one layer", lambda: build_model(config(f"softmax:positions={positions}+softmax")))


VM_UNET = "vm_unet_nano:widths=[24,48],depths=[1,1],decoder_depths=[1,1]"


def settings(*names, quantity="parameters"):
    return CompareSettings(names or SMALL, Budget.parse("40 steps"), match=quantity)


def test_small_backbones_come_within_a_tenth_of_another_ones_parameters(task):
    names = ["van_nano", "tnt_nano", "biformer_nano", "vmamba_nano"]
    if ALL:
        names = [name for name in list_backbones() if name.endswith("_nano")]
    asked = settings("van_nano", *(name for name in names if name != "van_nano"))
    found = match(task, asked)
    matched = with_options(asked, found)
    assert matched.names == asked.names
    for name, variant in matched.variants.items():
        assert abs(found[name]["off"]) < 0.1, name
        config = ImageModelConfig.for_task(task, *variant.backbone)
        assert count_parameters(config) == found[name]["value"]


@pytest.mark.parametrize(
    ("task", "names"),
    [
        (("segmentation", 32), ("unet_nano", "segformer_nano", VM_UNET)),
        (("segmentation_3d", 16), ("unet_nano_3d", "segmamba_nano")),
    ],
)
def test_networks_that_segment_come_within_a_tenth_too(task, names):
    task = create_task(task[0], size=task[1], evaluation_items=2)
    asked = settings(*names)
    matched = with_options(asked, match(task, asked)).variants
    counts = [count_parameters(SegmentationModelConfig.for_task(task, *one.backbone)) for one in matched.values()]
    assert max(counts) / min(counts) < 1.1, counts


@pytest.mark.parametrize("name", ["van_nano", "tnt_nano", "biformer_nano", "vit_nano", "pvt_nano", "mixer_nano"])
def test_scaled_widths_rise_and_have_the_published_ones_among_them(name):
    backbone, config = read_backbone(name)
    found = scaled_widths(backbone, config)
    assert {option: getattr(config, option) for option in backbone.scales} in found
    totals = [sum(sum(v) if isinstance(v, tuple) else v for v in options.values()) for options in found]
    assert totals == sorted(totals) and totals[0] < totals[-1] / 10


def test_flops_are_those_of_products_and_convolutions_with_attention(task):
    config = ImageModelConfig.for_task(task, "vit_nano", {"num_layers": 2, "dim": 24})
    n, d = 65, 24
    block = 2 * n * (4 * d * d + 2 * 4 * d * d) + 2 * 2 * n * n * d
    assert flops(config) == 2 * 64 * 16 * d + 2 * block + 2 * d * 10


def test_flops_of_scans_are_counted_too(task):
    def count(states):
        mixer = {"d_state": states}
        return flops(ImageModelConfig.for_task(task, "vim_nano", {"depth": 2, "class_token": "none", "mixer": mixer}))

    n, inner, paths = 64, 2 * 96, 2
    each = 7 * n * inner + 2 * n * inner * 2  # the scan, and the projections to B and C
    assert count(16) - count(8) == 2 * paths * 8 * each


def test_flops_are_matched(task):
    found = match(task, settings(SMALL[0], "vit_nano:num_layers=1,dim=24", quantity="flops"))
    assert abs(found["vit_nano:num_layers=1,dim=24"]["off"]) < 0.1
    said = sentence("flops", found)
    assert said.startswith(f"Matched in FLOPs of an image to {SMALL[0]}, which has ")
    assert re.search(r"dim=24 [+-]\d\.\d% \(dim \d+\)\.", said)


def test_a_backbone_of_fixed_widths_is_told(task, monkeypatch):
    monkeypatch.setattr(VisionTransformer, "scales", {})
    found = match(task, settings("van_nano", "vit_nano"))
    assert found["vit_nano"]["fixed"] and not found["vit_nano"]["options"]
    assert re.search(r"vit_nano \+\d+\.\d% \(its widths are fixed\)", sentence("parameters", found))


def test_the_time_of_a_training_step_is_measured(task):
    config = ImageModelConfig.for_task(task, "vit_nano", {"num_layers": 1, "dim": 24})
    assert 0 < matching._measures(task, settings(*SMALL, quantity="time"))["time"](config) < 60


def test_a_machine_that_becomes_slower_and_slower_does_not_mislead(task, monkeypatch):
    pace = [1.0]

    def seconds(config):
        pace[0] *= 1.03
        return pace[0] * count_parameters(config)

    monkeypatch.setattr(matching, "_measures", lambda *_: {"time": seconds})
    asked = settings(*SMALL[:2], quantity="time")
    found = match(task, asked)
    first, second = (
        count_parameters(ImageModelConfig.for_task(task, *variant.backbone))
        for variant in with_options(asked, found).variants.values()
    )
    assert abs(second / first - 1) < 0.1
    assert found[SMALL[1]]["off"] == pytest.approx(second / (1.03 * first) - 1)  # as measured together just before


def test_a_time_that_was_near_by_chance_is_measured_again(task, monkeypatch):
    once = []

    def seconds(config):
        if config.backbone == "mixer_nano" and not once:
            once.append(config)
            return seconds(ImageModelConfig.for_task(task, *asked.variants[SMALL[0]].backbone))
        return float(count_parameters(config))

    monkeypatch.setattr(matching, "_measures", lambda *_: {"time": seconds})
    asked = settings(*SMALL[:2], quantity="time")
    found = match(task, asked)[SMALL[1]]
    assert found["options"] and abs(found["off"]) < 0.1


@pytest.mark.parametrize(
    ("names", "quantity", "told"),
    [
        (("van_nano", "softmax"), "flops", "no mechanisms"),
        (("van_nano",), "flops", "two or more"),
        (SMALL, "flop", "try flops"),
    ],
)
def test_what_cannot_be_matched_is_refused(names, quantity, told):
    with pytest.raises(Unsupported, match=told):
        settings(*names, quantity=quantity)


def test_a_matched_comparison_trains_these_models_says_so_and_goes_on_with_them(tmp_path, capsys, monkeypatch):
    models = ",".join(SMALL[:2])
    line = f"compare --task images:size=16,evaluation_items=20 --models {models} --match time --seeds 1 --rates 0.003"
    line += f" --budget '20 steps' --lengths 16 --output {tmp_path}"
    asked = []

    def measures(task, settings):
        return {"time": lambda config: asked.append(1) or float(count_parameters(config))}

    monkeypatch.setattr(matching, "_measures", measures)
    found = answer(capsys, line)
    first, second = (
        entry["parameters"] for entry in sorted(found["summary"]["images"], key=lambda e: e["mechanism"])[::-1]
    )
    task = create_task("images", size=16, evaluation_items=20)
    published = [
        count_parameters(build_model(ImageModelConfig.for_task(task, *v.backbone)))
        for v in settings().variants.values()
    ][:2]
    assert first == published[0] and abs(second / first - 1) < 0.1 < abs(published[1] / first - 1)
    page = (tmp_path / "report.html").read_text()
    assert "Matched in time of a training step to van_nano" in page
    assert "Which model? images" in page and "What surrounds the mechanisms" not in page
    count = len(asked)
    again = answer(capsys, line)
    assert len(asked) == count and again["summary"] == found["summary"]
    code, _, said = run(capsys, line + " --task images:patch=2,size=16")
    assert code == 2 and "two tasks named images" in said


def test_rows_of_matched_and_of_published_backbones_are_kept_apart(task):
    asked = settings(*SMALL[:2])
    matched = with_options(asked, match(task, asked))
    identities = [Work(task, one).identity for one in (replace(asked, match=None), asked, matched)]
    assert len({json.dumps(identity) for identity in identities}) == 3
