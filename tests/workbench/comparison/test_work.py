"""The plan of a comparison's work."""

from __future__ import annotations

import pytest
import torch

from regard.contract import Unsupported
from regard.measurement.budget import Budget
from regard.models import StackConfig
from regard.tasks import create_task
from regard.training import Supervised, TrainConfig
from regard.training.loop import History, Point
from regard.workbench.comparison.planning import best_threads
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
