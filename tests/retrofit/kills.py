"""A retrofit that is killed at some of its stages and restarted each time, compared with an uninterrupted one."""

import pytest
import torch

import regard
from regard.retrofit import stage

STAGES = (("first steps", 2), ("sensitivity", 1), ("attention transfer", 3), ("training", 5), ("evaluation", 1))
"""All stages, each with the step after which it is killed."""


class Killed(BaseException):
    """Stands for the end of a process."""


def undisturbed_and_killed(monkeypatch, place, model, mechanism, stages=STAGES, **settings):
    """Run both retrofits, check that losses and weights are the same, and return them."""
    whole = regard.retrofit(model, mechanism, output=place / "whole", **settings)
    monkeypatch.setattr(stage, "CHECKPOINT_SECONDS", 0.0)
    left = list(stages)

    def watch(progress):
        if left and progress.doing.startswith(left[0][0]) and progress.done == left[0][1]:
            left.pop(0)
            raise Killed

    for _ in stages:
        with pytest.raises(Killed):
            regard.retrofit(model, mechanism, output=place / "killed", watch=watch, **settings)
    again = regard.retrofit(model, mechanism, output=place / "killed", watch=watch, **settings)
    assert again.record["losses"] == whole.record["losses"]
    expected, found = whole.model.state_dict(), again.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    return whole, again
