"""Algorithms on numbers: targets, ranges, and scores inside and outside the training range."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from task_data import refused

from regard.models import AlgorithmicNetwork, Encoder, build_model, config_for, models_for
from regard.tasks import Batch, create_task
from regard.tasks.algorithmic import FUNCTIONS, TRAINED_BOUND, draw_numbers
from regard.training import TrainConfig, evaluate, train

LITERALLY = {
    "minimum": min,
    "median": statistics.median,
    "sum": sum,
    "maximum_subarray": lambda x: max(sum(x[i:j]) for i in range(len(x)) for j in range(i + 1, len(x) + 1)),
}
"""Functions of a number and all numbers before it."""


def made(**options):
    return create_task("algorithmic", **{"evaluation_items": 64, "samples": 0, **options})


def rows(batch):
    """Yield the numbers and targets of each item without padding."""
    for i in range(batch.size):
        valid = torch.ones(batch.inputs.shape[1], dtype=torch.bool) if batch.valid is None else batch.valid[i]
        yield batch.inputs[i, valid, 0].double(), batch.targets[i, valid, 0].double()


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_targets_equal_the_function_in_plain_python(function, variable):
    task = made(length=11, extra=2, function=function, variable=variable)
    counts = set()
    for x, y in rows(task.training_batch(int(torch.randint(1000, ())), 0, 64)):
        assert (x[:2] == 0).all() and y[:2].isnan().all()
        numbers = x[2:].tolist()
        counts.add(len(numbers))
        if function == "sort":
            expected = sorted(numbers)
        else:
            expected = [LITERALLY[function](numbers[: i + 1]) for i in range(len(numbers))]
        torch.testing.assert_close(y[2:], torch.tensor(expected).double(), rtol=1e-5, atol=1e-5)
    assert counts == (set(range(1, 10)) if variable else {9})


def test_padding_has_no_target_and_is_not_valid():
    batch = made(variable=True).training_batch(3, 0, 64)
    assert torch.equal(batch.targets[:, 1:, 0].isnan(), ~batch.valid[:, 1:])
    assert (batch.inputs[~batch.valid] == 0).all()


def test_every_second_held_out_item_has_numbers_from_further_out():
    task = made(evaluation_items=512, outside=10)
    near, far = ([x.abs().max() for x, _ in list(rows(b))[i::2]] for b in task.evaluation_batches(512) for i in (0, 1))
    assert max(near) <= TRAINED_BOUND < 15 < max(far) <= 20
    training = task.training_batch(0, 0, 512).inputs
    assert training.abs().max() <= TRAINED_BOUND
    # rows are inside only by chance: with both bounds inside, all rows would be
    inside = (np.abs(draw_numbers(np.random.default_rng(), 4000, 8, 1.25 * TRAINED_BOUND)) <= TRAINED_BOUND).all(1)
    assert inside.mean() < 0.5


def test_a_rule_that_scales_has_the_same_score_at_each_range_and_the_figures_are_in_the_numbers_own_units():
    task = made(evaluation_items=2048)
    (batch,) = task.evaluation_batches(2048)
    errors = torch.randn(batch.targets.shape, dtype=torch.float64) * batch.bounds[:, None, None]
    output = batch.targets.double() + errors
    sums, weights = task.score(output, batch)
    near, far = (float(sums[i::2].sum() / weights[i::2].sum()) for i in (0, 1))
    assert near == pytest.approx(1, abs=0.1) and far == pytest.approx(1, abs=0.1)
    (_, (inside, counted)), (name, (outside, _)) = task.figures(output, batch).items()
    assert "10 times" in name
    torch.testing.assert_close(inside, sums[0::2] * TRAINED_BOUND**2, rtol=1e-5, atol=0)
    torch.testing.assert_close(outside, sums[1::2] * (10 * TRAINED_BOUND) ** 2, rtol=1e-5, atol=0)
    assert torch.equal(counted, weights[0::2])
    refused(lambda: task.score(output, Batch(batch.inputs, batch.targets)), "a batch without bounds")


def test_an_epoch_shows_each_training_item_once_and_without_items_every_step_is_new():
    def shown(task, *steps):
        return {x.numpy().tobytes() for step in steps for x, _ in rows(task.training_batch(step, 1, 8))}

    assert len(shown(made(samples=16), 0, 1)) == len(shown(made(samples=16), *range(6))) == 16
    assert len(shown(made(), *range(6))) == 48


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"function": "minimun"}, "supported: minimum, median, sort, sum, maximum_subarray; try minimum"),
        ({"length": 2}, "try length=3"),
        ({"length": 1000}, "try length=512"),
        ({"extra": -1}, "try extra=0"),
        ({"outside": 1.0}, "a number from 1.1 to 1000"),
        ({"variable": 1}, "true or false"),
        ({"samples": -1}, "try samples=0"),
    ],
)
def test_nonsense_is_refused(options, told):
    refused(lambda: made(**options), told)


def test_its_network_is_a_model_of_the_task_beside_the_encoder():
    task = made()
    assert {"Encoder", "AlgorithmicNetwork"} <= set(models_for(task))
    batch = next(iter(task.evaluation_batches(4)))
    for name, kind in ((None, Encoder), ("AlgorithmicNetwork", AlgorithmicNetwork)):
        model = build_model(config_for(task, "softmax", name, dim=16, num_layers=1, num_heads=2))
        assert type(model) is kind
        assert model(batch.inputs).output.shape == batch.targets.shape


def test_a_mechanism_is_trained_in_its_network_and_scored_inside_and_outside():
    task = made(variable=True, samples=100)
    model = build_model(
        config_for(task, "positional_attention", "AlgorithmicNetwork", dim=16, num_layers=1, num_heads=2)
    )
    train(model, task, TrainConfig(steps=2, batch_size=8, measure_memory=False))
    found = evaluate(model, task, 10)
    assert np.isfinite(found.score) and [len(items) for items in found.figures.values()] == [32, 32]
