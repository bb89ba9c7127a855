"""A stage of a retrofit ends with each part's best weights on held-out data."""

import pytest
import torch
from torch import nn

from regard.retrofit.best import Best
from regard.retrofit.folder import Folder
from regard.retrofit.stage import Stage, train_stage


class Normed(nn.Linear):
    """A linear map with a buffer that training changes."""

    def __init__(self):
        super().__init__(3, 3, bias=False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return super().forward(x)


def trained(folder, losses, *, steps=80, stop=None, judged=True):
    """Train a stage of two parts with given held-out losses, one entry per evaluation; records the weights at each."""
    torch.manual_seed(torch.seed())
    parts, asked, weights = nn.ModuleList([Normed(), Normed()]), iter(losses), []

    def measure():
        weights.append([{k: v.clone() for k, v in part.state_dict().items()} for part in parts])
        return next(asked)

    def step(number):
        found = sum(part(torch.randn(4, 3)).square().mean() for part in parts)
        found.backward()
        if number == stop:
            raise KeyboardInterrupt
        return [found.item()]

    best = Best(list(parts), measure, folder, "tune") if judged else None
    curve = train_stage(Stage("tune", "training", steps, 0.1, 0), folder, parts, set(), step, print, best=best)
    return parts, best, weights, curve


def equal(part, kept):
    return all(torch.equal(value, kept[name]) for name, value in part.state_dict().items())


def test_each_part_ends_with_its_best_weights_and_buffers(tmp_path):
    folder = Folder(tmp_path / "out", {})
    losses = [[3.0, 1.0], [2.0, 4.0], [5.0, float("nan")], [4.0, 1.5], [6.0, 2.0]]
    parts, best, weights, curve = trained(folder, losses)
    assert [done for done, _ in best.looks] == [0, 20, 40, 60, 80] and len(curve) == 80
    assert best.steps() == [20, 0] and best.mean() == pytest.approx(1.5)
    assert equal(parts[0], weights[1][0]) and equal(parts[1], weights[0][1])
    assert not equal(parts[0], weights[4][0])
    assert not list(folder.work.glob("*best*"))


def test_the_last_weights_stay_where_they_are_best_or_nothing_was_a_number(tmp_path):
    for i, losses in enumerate([[[2.0, 2.0], [1.0, 1.0]], [[float("nan")] * 2, [float("inf")] * 2]]):
        parts, best, weights, _ = trained(Folder(tmp_path / str(i), {}), losses, steps=8)
        assert len(best.looks) == 2 and all(equal(part, weights[1][n]) for n, part in enumerate(parts))


def test_a_stopped_stage_goes_on_with_what_it_knew(tmp_path):
    folder = Folder(tmp_path / "out", {})
    losses = [[3.0, 1.0], [2.0, 4.0], [5.0, 3.0], [4.0, 1.5], [6.0, 2.0]]
    with pytest.raises(KeyboardInterrupt):
        trained(folder, losses, stop=50)
    parts, best, weights, _ = trained(folder, losses[3:])
    assert best.looks == [(20 * i, found) for i, found in enumerate(losses)] and len(weights) == 2
    assert not equal(parts[0], weights[1][0]) and not equal(parts[1], weights[1][1])
    assert all(part["seen"] == 80 for part in weights[1])  # the buffers forget the step that was stopped
    again, known, _, _ = trained(folder, [])
    assert known.looks == best.looks and all(equal(part, again[n].state_dict()) for n, part in enumerate(parts))


def test_a_stage_that_was_begun_without_evaluations_goes_on_with_them(tmp_path):
    folder = Folder(tmp_path / "out", {})
    with pytest.raises(KeyboardInterrupt):
        trained(folder, [], stop=50, judged=False)
    parts, best, weights, _ = trained(folder, [[4.0, 1.5], [6.0, 1.0]])
    assert [done for done, _ in best.looks] == [60, 80]
    assert equal(parts[0], weights[0][0]) and equal(parts[1], weights[1][1])


def test_a_stage_that_was_finished_without_evaluations_is_left_as_it_is(tmp_path):
    folder = Folder(tmp_path / "out", {})
    parts, *_ = trained(folder, [], steps=8, judged=False)
    again, *_ = trained(folder, [], steps=8)
    assert all(equal(part, again[n].state_dict()) for n, part in enumerate(parts))
