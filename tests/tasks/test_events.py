"""Events: Hawkes processes are drawn by their definition, densities integrate to one, and likelihoods are exact."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from task_data import refused

from regard.models import Encoder, build_model, config_for
from regard.tasks import create_task
from regard.tasks.events.hawkes import Hawkes
from regard.tasks.events.likelihood import RAREST, SLOWEST, constant_output, event_nats


def made(**options):
    return create_task("events", **{"length": 24, "evaluation_items": 64, **options})


def process(marks=3):
    """A process without symmetries."""
    generator = np.random.default_rng(int(torch.randint(1 << 30, ())))
    offspring = generator.random((marks, marks))
    offspring *= 0.7 / np.abs(np.linalg.eigvals(offspring)).max()
    return Hawkes(0.2 + generator.random(marks), offspring, 1.7), generator


def intensities(hawkes, gaps, marks, until):
    """Intensities by the definition, for one row of events and the time since the last of them."""
    times = np.cumsum(gaps)
    total = hawkes.base.copy()
    for time, mark in zip(times, marks, strict=True):
        age = (times[-1] if len(times) else 0.0) + until - time
        total = total + hawkes.offspring[:, mark] * hawkes.decay * math.exp(-hawkes.decay * age)
    return total


def thinned(hawkes, generator, events):
    """Ogata's thinning: propose at the intensity after the last event, accept by the intensity that remains."""
    gaps, marks = [], []
    for _ in range(events):
        waited = 0.0
        while True:
            bound = intensities(hawkes, gaps, marks, waited).sum()
            waited += generator.exponential() / bound
            found = intensities(hawkes, gaps, marks, waited)
            if generator.random() * bound < found.sum():
                break
        gaps.append(waited)
        marks.append(int(generator.choice(len(found), p=found / found.sum())))
    return gaps, marks


def test_drawn_events_have_the_statistics_of_those_by_thinning():
    hawkes, generator = process()
    ours = hawkes.draw(generator, 1500, 6)
    theirs = [np.array(x) for x in zip(*(thinned(hawkes, generator, 6) for _ in range(300)), strict=True)]

    def statistics(gaps, marks):
        """Columns whose means are compared: gaps, exponentials of negative gaps, and pairs of consecutive marks."""
        follows = [(marks[:, :-1] == a) & (marks[:, 1:] == b) for a in range(3) for b in range(3)]
        return np.concatenate([gaps[:, [1, 5]], np.exp(-gaps[:, [0, 3]]), np.stack([f.mean(1) for f in follows], 1)], 1)

    one, other = statistics(*ours), statistics(*theirs)
    error = np.sqrt(one.var(0) / len(one) + other.var(0) / len(other))
    assert (np.abs(one.mean(0) - other.mean(0)) < 5 * error).all()


def test_the_density_of_the_next_event_integrates_to_one():
    hawkes, generator = process()
    gaps, marks = hawkes.draw(generator, 1, 5)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    total = 0.0
    for mark in range(3):
        each, of = np.repeat(gaps, 400, 0), np.repeat(marks, 400, 0)
        each[:, 4], of[:, 4] = 20 * (nodes + 1), mark  # up to 40 units of time
        total += (np.exp(hawkes.log_density(each, of)[:, 4]) * 20 * weights).sum()
    assert total == pytest.approx(1, abs=1e-6)


def test_the_density_is_the_intensity_times_the_chance_of_no_event_before():
    hawkes, generator = process()
    gaps, marks = hawkes.draw(generator, 1, 5)
    past = hawkes, gaps[0, :4], marks[0, :4]
    times = np.linspace(0, gaps[0, 4], 2001)
    expected = torch.trapezoid(torch.tensor([intensities(*past, time).sum() for time in times]), torch.tensor(times))
    found = hawkes.log_density(gaps, marks)[0, 4]
    assert found == pytest.approx(np.log(intensities(*past, times[-1])[marks[0, 4]]) - float(expected), abs=1e-5)


def as_output(hawkes, gaps, marks):
    """The output at each event of a model that knows the process."""
    excited, rows = np.zeros((len(gaps), len(hawkes.base))), []
    for i in range(gaps.shape[1]):
        rows.append(np.concatenate([hawkes.base + excited, np.tile(hawkes.base, (len(gaps), 1))], 1))
        excited = excited * np.exp(-hawkes.decay * gaps[:, i, None]) + hawkes.decay * hawkes.offspring.T[marks[:, i]]
    rates = torch.from_numpy(np.stack(rows, 1)) - RAREST
    decay = torch.full_like(rates[..., : len(hawkes.base)], hawkes.decay - SLOWEST)
    return torch.cat([rates, decay], -1).expm1().log()


def test_the_process_itself_is_among_what_a_model_can_say_and_has_its_exact_likelihood():
    task = made()
    (batch,) = task.evaluation_batches(64)
    output = as_output(task.process, *task.held_out)
    nats, counted = task.score(output, batch)
    exact = -task.process.log_density(*task.held_out).sum(1)
    torch.testing.assert_close(nats, torch.from_numpy(exact), rtol=1e-5, atol=1e-4)
    assert (counted == 24).all()
    ((above, _),) = task.figures(output, batch).values()
    assert above.abs().max() < 1e-3
    assert float(nats.sum() / counted.sum()) == pytest.approx(task.process_score, abs=1e-5)


def test_no_other_process_has_a_lower_score_and_the_rule_is_above_it():
    task = made(length=64, evaluation_items=256)
    least = task.process_score
    for excitation, decay in ((0.4, 2.0), (0.8, 8.0), (0.8, 0.5)):
        other = Hawkes.cyclic(3, excitation, decay)
        assert -other.log_density(*task.held_out).mean() > least
    assert least < task.solved < task.baseline.score
    assert task.baseline.score - task.solved == pytest.approx(0.9 * (task.baseline.score - least))


def test_the_rule_is_a_poisson_process_with_the_mean_rates():
    rates, gaps = torch.tensor([0.3, 0.9]).double(), torch.rand(2, 5).double()
    marks = torch.randint(2, (2, 5))
    batch = made(marks=2, length=5).batch(gaps.numpy(), marks.numpy())
    nats, _ = event_nats(constant_output(rates).expand(2, 5, 6), batch)
    torch.testing.assert_close(nats, (1.2 * gaps - rates[marks].log()).sum(1), rtol=1e-5, atol=1e-5)
    without = made(excitation=0)
    assert without.solved is None
    assert without.baseline.score == pytest.approx(without.process_score, abs=0.02)


def test_in_the_long_run_there_is_one_event_in_a_unit_of_time():
    gaps, marks = Hawkes.cyclic(4, 0.6, 2.0).draw(np.random.default_rng(), 200, 300)
    late = gaps[:, 100:].sum(1) / 200
    assert late.mean() == pytest.approx(1, abs=5 * late.std() / math.sqrt(200))
    assert np.bincount(marks.ravel()) / marks.size == pytest.approx(np.full(4, 0.25), abs=0.02)


def test_a_token_is_the_event_before_its_target():
    task = made(marks=2)
    batch = task.training_batch(4, 0, 3)
    assert (batch.inputs[:, 0] == 0).all()
    gaps, marks = batch.targets.unbind(-1)
    torch.testing.assert_close(batch.inputs[:, 1:, 0], gaps[:, :-1])
    torch.testing.assert_close(batch.inputs[:, 1:, 1], gaps[:, :-1].log())
    torch.testing.assert_close(batch.inputs[:, 1:, 2], gaps.cumsum(1)[:, :-1] / 24)
    assert torch.equal(batch.inputs[:, 1:, 3:].argmax(-1), marks[:, :-1].long())


def test_a_causal_encoder_says_three_numbers_for_each_mark_and_learns_by_the_likelihood():
    task = made()
    model = build_model(config_for(task, "aaren", dim=16, num_layers=1, num_heads=2))
    assert isinstance(model, Encoder) and model.config.causal
    batch = task.training_batch(0, 0, 4)
    output = model(batch.inputs).output
    assert output.shape == (4, 24, 9)
    sums, _ = task.loss(output, batch)
    sums.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    refused(lambda: event_nats(output[..., :8], batch), "three numbers for each mark")


def test_missing_events_have_no_loss():
    task = made()
    batch = task.training_batch(0, 0, 4)
    output = torch.randn(4, 24, 9)
    whole, _ = event_nats(output[:, :10], type(batch)(batch.inputs[:, :10], batch.targets[:, :10]))
    batch.targets[:, 10:] = torch.nan
    found, counted = event_nats(output, batch)
    torch.testing.assert_close(found, whole)
    assert (counted == 10).all()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"excitation": 1.0}, "excitation=1.0; supported: a number from 0 to 0.95"),
        ({"decay": 0}, "a number from 0.01 to 100"),
        ({"marks": 0}, "try marks=1"),
        ({"length": 1}, "try length=2"),
    ],
)
def test_nonsense_is_refused(options, told):
    refused(lambda: made(**options), told)
