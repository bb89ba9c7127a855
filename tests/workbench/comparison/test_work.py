"""The plan of a comparison's work."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from regard.contract import Unsupported
from regard.measurement.budget import Budget
from regard.models import StackConfig
from regard.tasks import create_task
from regard.training import Supervised, TrainConfig
from regard.training.loop import History, Point
from regard.workbench.comparison.planning import _count_steps, best_threads
from regard.workbench.comparison.settings import CompareSettings
from regard.workbench.comparison.work import Work


@pytest.mark.parametrize(("slow", "chosen"), [((), 1), ((1,), 3), ((3,), 1), ((1, 3), 1)])
def test_threads_are_chosen_though_a_busy_machine_does_no_step_in_time(monkeypatch, slow, chosen):
    def train(model, task, config: TrainConfig, deadline):
        count = torch.get_num_threads()
        return History([] if count in slow else [Point(0, 1.0, 0.0, 1.0, 0.1, float(count))])

    settings = CompareSettings(("softmax",), Budget.parse("1m"), dim=16, layers=1)
    one = Work(create_task("copying", length=32), settings)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(Supervised, "train", staticmethod(train))
    try:
        assert best_threads(one) == chosen
    finally:
        torch.set_num_threads(before)


def test_what_no_other_size_would_help_is_not_told_as_a_question_of_sizes():
    settings = CompareSettings(
        ("softmax",), Budget.parse("10k tokens"), dim=16, layers=2, stack=StackConfig(exits=(1, 9))
    )
    with pytest.raises(Unsupported) as found:
        Work(create_task("copying", length=32), settings)
    assert "exits" in str(found.value) and "--dim" not in str(found.value)


def test_what_gives_more_held_out_items_is_what_the_task_has(tmp_path):
    """A shorter length gives more windows of a text, but never more images."""
    image, rng = pytest.importorskip("PIL.Image"), np.random.default_rng()
    for i in range(10):
        for kind, values in (("images", 256), ("masks", 3)):
            path = tmp_path / kind / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            image.fromarray(rng.integers(0, values, (16, 16), np.uint8)).save(path)
    (tmp_path / "a.txt").write_text("".join(f"a line of text, the number {i}\n" for i in range(40)))
    settings = CompareSettings(("softmax",), Budget.parse("10k tokens"), dim=16, layers=2)
    cases = (
        ("segmentation", {"data": tmp_path, "size": 16}, "a larger share to hold out"),
        ("segmentation", {"evaluation_items": 4, "size": 16}, "evaluation_items"),
        ("text", {"data": tmp_path / "a.txt", "length": 32}, "a shorter --length"),
    )
    for name, options, told in cases:
        advice = Work(create_task(name, **options), settings).few_items
        assert told in advice and ("--length" in advice) == (name == "text"), (name, options)


def test_lengths_whose_squares_a_backbone_cannot_take_are_known_before_its_cost_is_measured():
    names = ("van_nano:widths=[8,8,8]", "agent_pvt_nano:widths=[8,8,8]")
    one = Work(create_task("images", size=16, patch=4), CompareSettings(names, Budget.parse("20 steps")))
    assert one.takes(1024) and not one.takes(2048)  # 128 x 128 and 180 x 180 pixels


def test_a_step_of_large_images_has_several_of_them():
    """A task counts patches of 4 pixels, of which one image of 224 has more than a step's tokens."""
    large = create_task("images", size=224)
    settings = CompareSettings(("vit_nano:patch=16",), Budget.parse("20 steps"), batch_tokens=4096)
    assert settings.batch_size(large) == 16
    assert settings.batch_size(create_task("images", size=16)) == 256
    assert CompareSettings(("softmax",), Budget.parse("20 steps")).batch_size(large) == 1
    given = dataclasses.replace(settings, whole_batches=False)
    with pytest.raises(Unsupported, match=r"one image of 3136 tokens.*--batch-tokens 50176"):
        given.batch_size(large)
    assert dataclasses.replace(given, batch_tokens=6272).batch_size(large) == 2


def test_a_budget_that_would_do_leaves_out_what_matching_took_which_the_store_keeps():
    settings = CompareSettings(("van_nano:widths=[8,8,8]", "vit_nano"), Budget.parse("10s"), match="parameters")
    one = Work(create_task("images", size=16), settings)
    one.step_seconds, one.evaluation_seconds = dict.fromkeys(one.configs, 0.1), dict.fromkeys(one.configs, 0.1)
    told = []
    for spent in (1.0, 1000.0):
        with pytest.raises(Unsupported) as found:
            _count_steps([one], settings, spent)
        told.append(found.value.nearest)
    assert told[0] == told[1] and told[0].endswith('s", which goes on with the widths that were found')
