"""Informer-mini: tokens are distilled between encoder layers; the decoder begins with the past and is causal in itself."""

import math
from datetime import datetime, timedelta

import pytest
import torch
from support import close
from torch.nn import functional as F

from regard.contract import Pattern
from regard.studies.cab.backbones import Informer, Plans
from regard.tasks import create_task

NS, CS, NC, CC = Pattern
START, PAST, AHEAD = 5, 24, 7


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "load.csv"
    times = (datetime(2024, 1, 1) + timedelta(hours=i) for i in range(300))
    numbers = torch.randn(300, 2)
    rows = [f"{time},{one:.4f},{other:.4f}" for time, (one, other) in zip(times, numbers.tolist(), strict=True)]
    path.write_text("\n".join(["time,load,price", *rows]) + "\n")
    return create_task("forecast", data=path, target="load", covariates="price", length=AHEAD, history=PAST)


@pytest.fixture
def make(task):
    def build(mechanism="softmax", pattern=NS, layers=2):
        sizes = {"dim": 16, "heads": 2, "layers": layers, "start": START}
        return Informer(task, sizes, Plans(mechanism, pattern, 64)).double().eval()

    return build


@pytest.fixture
def batch(task):
    drawn = task.training_batch(0, int(torch.randint(1 << 30, ())), 3)
    return drawn.inputs.double(), drawn.memory.double()


def lengths_seen(model, *batch):
    """Tokens that each encoder block, and each cross block as its memory, gets."""
    found = []
    for block in (*model.encoder_blocks, *(b for b in model.blocks if b.cross)):
        block.register_forward_pre_hook(lambda _, given: found.append(given[-1].shape[1]))
    model(*batch)
    return found


def test_tokens_are_halved_between_encoder_layers(make, batch):
    inputs, memory = batch
    assert lengths_seen(make(layers=3), inputs, memory) == [24, 12, 6, 6]
    assert lengths_seen(make(layers=3), inputs, memory[:, 1:]) == [23, 12, 6, 6]
    assert lengths_seen(make(layers=1), inputs, memory) == [24, 24]


def test_distilling_is_the_largest_of_three_neighbours_after_a_circular_convolution(make):
    convolution, norm, *_ = layers = make().distil[0]
    norm.running_mean.copy_(torch.randn(16))
    norm.running_var.copy_(torch.rand(16) + 0.5)
    x = torch.randn(2, 16, 9, dtype=torch.float64)
    mixed = sum(
        torch.einsum("oc,bcn->bon", convolution.weight[:, :, k], x.roll(1 - k, 2)) for k in range(3)
    ) + convolution.bias.view(-1, 1)
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).view(-1, 1)
    mixed = F.elu((mixed - norm.running_mean.view(-1, 1)) * scale + norm.bias.view(-1, 1))
    expected = torch.stack([mixed[:, :, max(0, 2 * i - 1) : 2 * i + 2].amax(2) for i in range(math.ceil(9 / 2))], 2)
    close(layers(x), expected)


def test_the_decoder_sees_its_own_points_causally(make, batch):
    inputs, memory = batch
    model, changed = make(), inputs.clone()
    changed[:, 3] += torch.randn_like(changed[:, 3])
    one, other = model(inputs, memory).output, model(changed, memory).output
    close(other[:, :3], one[:, :3])
    assert bool((one[:, 3:] != other[:, 3:]).all()), "later points attend to it"


def test_the_decoder_begins_with_the_last_points_of_the_past(make, batch):
    inputs, memory = batch
    model = make()
    model.encoder_norm.register_forward_hook(lambda *given: torch.zeros_like(given[-1]))
    early, late = memory.clone(), memory.clone()
    early[:, : PAST - START, 0] = memory[:, : PAST - START, 0].flip(1)
    late[:, PAST - START :, 0] = memory[:, PAST - START :, 0].flip(1)
    expected = model(inputs, memory).output
    close(model(inputs, early).output, expected)
    assert bool((model(inputs, late).output != expected).all())


def test_the_decoder_s_own_attention_stays_softmax(make):
    for pattern in (NS, NC):
        model = make("linear", pattern)
        found = {p: block.entry[0] for p, block in zip((CS, NC), model.blocks, strict=True)}
        found[NS] = {block.entry[0] for block in model.encoder_blocks}.pop()
        assert found == {p: "linear" if p is pattern else "softmax" for p in (NS, CS, NC)}
