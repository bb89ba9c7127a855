"""A retrofit that is killed at some of its stages and restarted each time, compared with an uninterrupted one."""

import torch

import regard
from regard.retrofit import sensitivity, stage

STAGES = (("first steps", 2), ("sensitivity", 1), ("attention transfer", 3), ("training", 5), ("evaluation", 1))
"""All stages, each with the step after which it is killed."""


class Killed(BaseException):
    """Stands for the end of a process."""


def undisturbed_and_killed(monkeypatch, place, model, mechanism, stages=STAGES, **settings):
    """Run both retrofits, check that losses and weights are the same, and return them. The second is also killed when
    each training stage is about to save its result."""
    whole = regard.retrofit(model, mechanism, output=place / "whole", **settings)
    monkeypatch.setattr(stage, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(sensitivity.Known, "read", lambda *_: None)  # or the second would take it from the first
    left, ended, save_checkpoint = list(stages), set(), stage.save_checkpoint

    def save(path, module, optimizer, record):
        if record["finished"] and path.name not in ended:
            ended.add(path.name)
            raise Killed
        save_checkpoint(path, module, optimizer, record)

    monkeypatch.setattr(stage, "save_checkpoint", save)

    def watch(progress):
        if left and progress.doing.startswith(left[0][0]) and progress.done == left[0][1]:
            left.pop(0)
            raise Killed

    kills, again = 0, None
    while again is None:
        try:
            again = regard.retrofit(model, mechanism, output=place / "killed", watch=watch, **settings)
        except Killed:
            kills += 1
    assert not left and "tune.safetensors" in ended and kills == len(stages) + len(ended)
    assert again.record["losses"] == whole.record["losses"]
    expected, found = whole.model.state_dict(), again.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    return whole, again
