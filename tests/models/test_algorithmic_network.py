"""The network without residual connections: positions next to the numbers, and refusals."""

from __future__ import annotations

import pytest
import torch
from model_checks import check_comes_back_from_disk, made, small
from support import refused

from regard.contract import Context
from regard.models import AlgorithmicNetworkConfig, config_for, count_parameters, match_parameters
from regard.tasks import create_task

KIND = "algorithmic network"


def numbers(n=7):
    return torch.randn(3, n, 2, dtype=torch.float64)


@pytest.mark.parametrize(("plan", "told"), [("softmax", True), ("mamba2", True), ("positional_attention", False)])
def test_the_place_stands_beside_the_numbers_where_the_mechanism_reads_content(plan, told):
    width = made(KIND, plan=plan, places=12).embedding.projection.in_features
    assert width == (14 if told else 2)


@pytest.mark.parametrize(("encoding", "order_counts"), [("one_hot", True), ("sinusoidal", True), ("none", False)])
def test_without_places_softmax_knows_no_order(encoding, order_counts):
    model, x = made(KIND, plan="softmax", encoding=encoding), numbers()
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    moved = model(x[:, order]).output
    assert torch.allclose(moved, model(x).output[:, order]) is not order_counts


def test_a_layer_is_a_network_of_its_input_beside_what_is_mixed():
    model, x = made(KIND, plan="softmax", num_layers=1, encoding="none"), numbers()
    (block,) = model.blocks
    h = model.embedding(x)
    mixed = block.mixer(h, context=Context()).output
    up, _, down = block.network
    expected = model.head(down(up(torch.cat([h, mixed], -1)).relu()))
    torch.testing.assert_close(model(x).output, expected)


def test_it_comes_back_from_disk_and_is_matched_in_size(tmp_path):
    check_comes_back_from_disk(made(KIND, plan="softmax"), (numbers(),), tmp_path)
    config = small(KIND, plan=[("positional_attention", {"encoding_dim": 8})] * 2)
    target = count_parameters(small(KIND, plan="softmax", feed_forward=100))
    assert count_parameters(match_parameters(config, target)) == pytest.approx(target, rel=0.02)


def test_longer_sequences_than_one_hot_places_and_what_is_no_sequence_of_numbers_are_refused():
    refused(
        "try places=9, or encoding='sinusoidal'", made(KIND, plan="softmax", encoding="one_hot", places=8), numbers(9)
    )
    model, x = made(KIND), numbers()
    for context in (Context(grid=(1, 7)), Context(positions=torch.arange(7)[None])):
        refused("padding and packing", model, x, context=context)
    refused("3 features", model, torch.randn(1, 4, 3, dtype=torch.float64))


def test_only_tasks_of_sequences_of_numbers_have_it():
    images = create_task("segmentation", size=16, evaluation_items=4, data="near-cue")
    refused("tasks of sequences of numbers", AlgorithmicNetworkConfig.for_task, images, "softmax")
    task = create_task("algorithmic", evaluation_items=4)
    refused("--stack", config_for, task, "softmax", "AlgorithmicNetwork", stack={"reversible": True})
