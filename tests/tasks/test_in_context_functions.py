"""In-context Boolean functions: classes are what they claim, teaching leaves one function, learners see only the past."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from support import close, load
from task_data import refused

from regard.tasks import create_task
from regard.tasks.in_context_functions import as_batch, examples, functions, learners, predicted
from regard.tasks.in_context_functions.functions import (
    CLASSES,
    Contexts,
    Functions,
    draw_contexts,
    draw_functions,
    neighbour_labels,
    with_thresholds,
)
from regard.tasks.in_context_functions.teaching import teaching_sequences

OF_CLAUSES = [name for name in CLASSES if name != "nearest_neighbours"]
TEACHING = [name for name, kind in CLASSES.items() if kind.teaches]
RATES = {
    "conjunction": 0.30,
    "disjunction": 0.70,
    "sparse_disjunction": 0.66,
    "majority": 0.44,
    "dnf": 0.45,
    "cnf": 0.61,
    "sparse_parity": 0.50,
    "int_halfspace": 0.48,
    "sparse_threshold": 0.50,
    "teach_conjunction": 0.345,
    "teach_biconjunction": 0.345,
    "teach_dnf": 0.31,
}
"""Share of positive labels by the public code of arXiv 2310.03016, for 28 bits and 40 examples."""


def generator() -> np.random.Generator:
    return np.random.default_rng(int(torch.randint(1 << 30, ())))


def made(function="conjunction", **options):
    options = {"length": 40, "evaluation_items": 64, "seed": int(torch.randint(1 << 30, ()))} | options
    return create_task("in_context_functions", function=function, **options)


def tensors(contexts: Contexts):
    return (torch.from_numpy(each).double() for each in (contexts.x, contexts.y))


def literally(name, weights, threshold, x):
    """The definition of a class in plain Python: clauses are lists of (coordinate, weight)."""
    clauses = [[(i, w) for i, w in enumerate(clause) if w] for clause in weights]
    if name in ("parity", "sparse_parity"):
        return sum(x[i] == 1 for i, _ in clauses[0]) % 2 == 1
    if name in ("majority", "int_halfspace", "sparse_threshold"):
        return sum(w * x[i] for i, w in clauses[0]) > threshold
    each = [[x[i] == w for i, w in clause] for clause in clauses]
    if name in ("disjunction", "sparse_disjunction", "cnf"):
        return all(any(literals) for literals in each)
    return any(all(literals) for literals in each)


@pytest.mark.parametrize("name", OF_CLAUSES)
def test_labels_are_the_truth_table_of_the_definition(name):
    functions = draw_functions(CLASSES[name], 40, 4, generator())
    table = np.array(list(itertools.product([-1, 1], repeat=4)))
    labels = functions(np.broadcast_to(table, (40, *table.shape)))
    for at in range(40):
        weights, threshold = functions.weights[at].tolist(), functions.thresholds[at, 0]
        expected = [literally(name, weights, threshold, x) for x in table.tolist()]
        assert (labels[at] > 0).tolist() == expected


@pytest.mark.parametrize("name", RATES)
def test_labels_are_as_often_positive_as_in_the_public_code(name):
    kind, rng = CLASSES[name], generator()
    functions = draw_functions(kind, 1000, 28, rng)
    contexts = draw_contexts(functions, 40, rng, taught=float(kind.teaches), ones=0.5)
    assert (contexts.y > 0).mean() == pytest.approx(RATES[name], abs=0.03)


@pytest.mark.parametrize("signed", [False, True])
def test_after_a_teaching_sequence_one_conjunction_is_left(signed):
    kind = CLASSES["teach_biconjunction" if signed else "teach_conjunction"]
    values = (-1, 0, 1) if signed else (0, 1)
    every = np.array(list(itertools.product(values, repeat=6)))[:, None]  # (functions, 1, 6)
    functions = with_thresholds(kind, every)
    sequences, lengths = teaching_sequences(every, signed=signed)
    sizes = np.abs(every).sum((1, 2))
    assert (lengths == sizes + (2 if signed else 1)).all()
    for at in generator().choice(len(every), 30, replace=False):
        shown = sequences[at, : lengths[at]]
        labels = functions(np.broadcast_to(shown, (len(every), *shown.shape)))
        assert np.flatnonzero((labels == labels[at]).all(1)).tolist() == [at]
        assert (labels[at] > 0).tolist() == [True] * (2 if signed else 1) + [False] * sizes[at]


def test_after_a_teaching_sequence_one_formula_of_three_clauses_is_left():
    clauses = list(itertools.product((0, 1), repeat=4))
    every = np.array(list(itertools.combinations_with_replacement(clauses, 3)))  # (functions, 3, 4)
    table = np.array(list(itertools.product([-1, 1], repeat=4)))
    truths = with_thresholds(CLASSES["teach_dnf"], every)(np.broadcast_to(table, (len(every), *table.shape)))
    rows = dict(zip(map(bytes, table.astype(np.int8)), range(len(table)), strict=True))
    assert len(every) == 816
    functions = draw_functions(CLASSES["teach_dnf"], 200, 4, generator(), 0.4)
    sequences, lengths = teaching_sequences(functions.weights, signed=False)
    own = functions(np.broadcast_to(table, (200, *table.shape)))
    for truth, sequence, length in zip(own, sequences, lengths, strict=True):
        shown = [rows[bytes(x)] for x in sequence[:length].astype(np.int8)]
        left = truths[(truths[:, shown] == truth[shown]).all(1)]
        assert len(left) and (left == truth).all()


@pytest.mark.parametrize("name", TEACHING)
def test_a_teaching_sequence_that_is_longer_than_the_context_is_cut(name):
    task = made(name, dimensions=8, length=8, literals=0.6 if name == "teach_dnf" else 1.0)
    assert task.held_out.x.shape == (64, 4, 8)
    assert (task.held_out.taught == 4).all()
    sequences, _ = teaching_sequences(task.held_out.functions.weights, signed=task.kind.signed)
    assert (task.held_out.x == sequences[:, :4]).all()


def test_elimination_is_right_after_teaching_and_never_wrong_where_it_says_yes():
    for name in ("teach_conjunction", "teach_biconjunction"):
        task = made(name)
        x, y = tensors(task.held_out)
        right = learners.elimination(monotone=not task.kind.signed)(x, y) == y
        after = torch.arange(task.points) >= torch.from_numpy(task.held_out.taught)[:, None]
        assert after.any() and right[after].all()
    for name, sign in (
        ("conjunction", 1),
        ("monotone_conjunction", 1),
        ("disjunction", -1),
        ("sparse_disjunction", -1),
    ):
        task = made(name)
        x, y = tensors(task.held_out)
        said = learners.elimination(monotone=not task.kind.signed, disjunction=sign < 0)(x, y)
        assert (y[said == sign] == sign).all() and (said == sign).any()
        assert (said[:, -5:] == y[:, -5:]).double().mean() > 0.9


LEARNERS = {
    "null": learners.null,
    "nearest": learners.neighbours(1),
    "three nearest": learners.neighbours(3),
    "averaging": learners.averaging,
    "elimination": learners.elimination(monotone=False),
    "gaussian": learners.gaussian,
    "gradient descent": learners.gradient_descent(hidden=8, steps=5),
    "best guess": learners.best_guess(CLASSES["conjunction"], 4),
    "best guess, taught": learners.best_guess(CLASSES["teach_biconjunction"], 4, taught=0.5),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_a_prediction_does_not_depend_on_its_label_or_on_what_follows(name):
    x, y = tensors(made(dimensions=4, evaluation_items=60, length=24).held_out)
    before = LEARNERS[name](x, y)
    at = 5
    later, labels = x.clone(), y.clone()
    later[:, at + 1 :] = later[:, at + 1 :].flip(1)
    labels[:, at:] = -labels[:, at:]
    after = LEARNERS[name](later, labels)
    close(after[:, : at + 1], before[:, : at + 1])
    if name != "null":
        assert not torch.equal(after[:, at + 1 :], before[:, at + 1 :])


@pytest.mark.parametrize("name", ["conjunction", "disjunction", "teach_biconjunction", "parity"])
def test_no_learner_is_right_more_often_than_the_best_guess(name):
    task = made(name, dimensions=5, length=24, evaluation_items=400)
    x, y = tensors(task.held_out)
    best = learners.best_guess(task.kind, 5, literals=task.literals, taught=task.taught)
    right = (best(x, y).sign() == y).double()
    for other, learner in LEARNERS.items():
        if not other.startswith("best"):
            gain = (right - (learner(x, y).sign() == y).double()).mean(1)
            assert gain.mean() > -3 * gain.std() / len(gain) ** 0.5, other


@pytest.mark.parametrize(
    ("name", "taught"),
    [("conjunction", 0.0), ("disjunction", 0.0), ("teach_biconjunction", 0.5), ("parity", 0.0), ("majority", 0.0)],
)
def test_the_best_guess_is_the_rule_of_bayes_over_all_functions(name, taught):
    kind, n = CLASSES[name], 3
    task = made(name, dimensions=n, length=14, evaluation_items=8, taught=taught)
    weights = np.array(list(itertools.product((-1, 0, 1) if kind.signed else (0, 1), repeat=n)))[:, None]
    functions, (sequences, lengths) = with_thresholds(kind, weights), teaching_sequences(weights, signed=kind.signed)
    x, y = tensors(task.held_out)
    found = learners.best_guess(kind, n, literals=task.literals, taught=taught)(x, y)
    for own, labels, odds in zip(task.held_out.x, task.held_out.y, found, strict=True):
        sums = {1: np.zeros(len(own)), -1: np.zeros(len(own))}
        for f, literals in enumerate(weights[:, 0]):
            k = np.count_nonzero(literals)
            prior = task.literals**k * (1 - task.literals) ** (n - k) / (2**k if kind.signed else 1)
            told = functions.take(np.array([f]))(own[None])[0]
            as_planted = (own == kind.planted_label * literals)[:, literals != 0].all(1)
            drawn = kind.planted * as_planted * 2.0 ** (k - n) + (1 - kind.planted) * 2.0**-n
            given = drawn.copy()
            given[: lengths[f]] = (sequences[f, : lengths[f]] == own[: lengths[f]]).all(1)
            shown = taught * given.cumprod() + (1 - taught) * drawn.cumprod()
            fits = np.cumprod([True, *(told == labels)[:-1]])
            for sign in sums:
                sums[sign] += prior * fits * shown * (told == sign)
        with np.errstate(divide="ignore"):
            expected = np.log(sums[1] / sums[-1]).clip(-1e3, 1e3)
        expected[np.abs(expected) < learners.LEAST_ODDS] = -learners.LEAST_ODDS  # without evidence a guess
        close(odds, torch.from_numpy(expected))


def test_gaussian_elimination_is_right_as_soon_as_one_parity_is_left():
    task = made("parity", dimensions=6, length=60)
    x, y = tensors(task.held_out)
    said = learners.gaussian(x, y)
    assert (said[said != 0] == y[said != 0]).all()
    assert (said[:, -5:] != 0).double().mean() > 0.95
    assert (said[:, 0] == 0).sum() == (x[:, 0] > 0).any(1).sum(), "of zeros alone the label is known"


def test_the_nearest_neighbour_gives_all_labels_that_follow():
    task = made("nearest_neighbours", dimensions=5, start=6)
    x, y = tensors(task.held_out)
    said = learners.nearest_cosine(x, y)
    assert torch.equal(said[:, 6:], y[:, 6:]) and not torch.equal(said[:, 1:6], y[:, 1:6])
    same = (x[:, :, None] == x[:, None]).all(-1)[:, :6, :6]
    assert (same.sum((1, 2)) > 6).any(), "inputs must repeat for this test to mean something"
    assert (y[:, :6, None] == y[:, None, :6])[same].all()
    targets = next(iter(task.evaluation_batches(64))).targets
    assert targets[:, :12].isnan().all() and not targets[:, 12::2].isnan().any()


def test_labels_are_asked_for_at_inputs_and_shown_in_one_coordinate_after_them():
    task = made(noise=0.0)
    batch = next(iter(task.evaluation_batches(64)))
    x, y = examples(batch)
    assert torch.equal(x, torch.from_numpy(task.held_out.x).float())
    assert (batch.inputs[:, 1::2, 1:] == 0).all()
    assert torch.equal(batch.targets[:, ::2, 0], y) and batch.targets[:, 1::2].isnan().all()
    output = torch.randn(64, task.length, 1, dtype=torch.float64)
    sums, counts = task.loss(output, batch)
    odds = torch.nn.functional.binary_cross_entropy_with_logits(output[:, ::2, 0], (y.double() + 1) / 2)
    close(sums.sum() / counts.sum(), odds)
    right, weight = task.score(output, batch)
    assert right.sum() == (output[:, ::2, 0].sign() == y).sum() and weight.sum() == y.numel()
    assert task.score(torch.zeros_like(output), batch)[0].sum() == 0, "no sign is wrong"


def test_a_batch_of_one_is_a_context():
    for name in CLASSES:
        batch = made(name, dimensions=6).training_batch(3, 1, 1)
        assert batch.inputs.shape == (1, 40, 6)


def test_noise_flips_labels_of_training_alone():
    noisy, clean = made(noise=0.25, seed=5), made(seed=5)
    assert (noisy.held_out.y == clean.held_out.y).all()
    one, other = (task.training_batch(2, 1, 500) for task in (noisy, clean))
    (x, y), (same, right) = examples(one), examples(other)
    assert torch.equal(x, same)
    assert (y != right).double().mean() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(one.targets[:, ::2, 0], y), "the flipped label is the target"


@pytest.mark.parametrize(
    ("name", "pool", "dimensions"),
    [("conjunction", 3, 12), ("conjunction", 512, 8), ("sparse_parity", 20, 8), ("int_halfspace", 8, 3)],
)
def test_training_draws_from_the_pool_and_held_out_functions_do_not(name, pool, dimensions):
    task = made(name, pool=pool, dimensions=dimensions)
    known = set(task.pooled.identities())
    drawn = task.draw(generator(), 50 * pool, task.pooled).functions
    assert {each.tobytes() for each in drawn.weights} == {each.tobytes() for each in task.pooled.weights}
    assert set(drawn.identities()) == known
    assert len(task.held_out.functions.weights) == 64 and not known & set(task.held_out.functions.identities())


@pytest.mark.parametrize("name", OF_CLAUSES)
def test_functions_are_told_apart_by_what_they_answer(name, monkeypatch):
    """The same by truth tables as by clauses, of which several weights may mean one function."""
    drawn = draw_functions(CLASSES[name], 200, 4, generator())
    tables = drawn.identities()
    monkeypatch.setattr(functions, "TABLED", 0)
    clauses = drawn.identities()
    assert len(set(zip(tables, clauses, strict=True))) == len(set(clauses)) >= len(set(tables))
    if name in ("conjunction", "disjunction", "parity", "majority", "teach_dnf"):
        assert len(set(clauses)) == len(set(tables))


def test_bits_are_as_often_one_as_asked():
    assert (made("majority", ones=0.8).held_out.x > 0).mean() == pytest.approx(0.8, abs=0.02)


def test_functions_of_many_bits_are_drawn_without_a_list_of_all():
    for name in ("parity", "monotone_conjunction"):
        assert made(name, dimensions=60).held_out.x.shape == (64, 20, 60)


def test_what_reads_no_example_is_told_with_the_nearest_neighbour():
    task = made()
    ups = (task.held_out.y > 0).mean()
    assert task.chance == pytest.approx(max(ups, 1 - ups))
    batch = next(iter(task.evaluation_batches(64)))
    right, weight = task.score(predicted(learners.null, batch), batch)
    assert float(right.sum() / weight.sum()) == pytest.approx(1 - ups)
    assert (
        f"always the commoner label {task.chance:.3f}, nearest neighbour {task.baseline.score:.3f}" in task.describe()
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"function": "conjuction"}, "try conjunction"),
        ({"length": 41}, "try length=42"),
        ({"function": "majority", "taught": 0.5}, "try taught=0"),
        ({"function": "dnf", "taught": 1.0}, "teach_dnf"),
        ({"function": "nearest_neighbours", "pool": 3}, "try pool=0"),
        ({"function": "sparse_disjunction", "dimensions": 3}, "4 or more"),
        ({"function": "sparse_parity", "pool": 4096}, "100% of the functions as they are drawn"),
        ({"function": "int_halfspace", "dimensions": 1, "pool": 1024}, "try pool="),
        ({"function": "teach_dnf", "dimensions": 2}, "3 or more"),
        ({"function": "teach_dnf", "literals": 1.0}, "try literals=0.5"),
        ({"function": "int_halfspace", "literals": 0.5}, "literals are a share"),
        ({"literals": 0.0}, "a share above 0"),
        ({"start": 3}, "start of nearest_neighbours"),
        ({"function": "nearest_neighbours", "start": 20}, "try start=19"),
        ({"noise": 0.7}, "0 to 0.5"),
    ],
)
def test_what_makes_no_sense_is_refused(options, told):
    refused(lambda: made(**options), told)


def test_the_best_guess_is_refused_where_it_would_take_too_long():
    refused(lambda: learners.best_guess(CLASSES["conjunction"], 28), "fewer dimensions")
    refused(lambda: learners.best_guess(CLASSES["dnf"], 4), "of one clause")


@pytest.mark.parametrize("name", [name for name in OF_CLAUSES if name != "monotone_conjunction"])  # it fails there
def test_labels_and_teaching_sequences_equal_those_of_the_public_code(name):
    recorded = load("in_context_functions_official")
    weights, x, y = (recorded[f"{name}_{part}"].long().numpy() for part in ("w", "x", "y"))
    functions = with_thresholds(CLASSES[name], weights)
    if CLASSES[name].thresholds != (0, 0):
        functions = Functions(CLASSES[name], weights, recorded[f"{name}_threshold"].numpy())
    assert (functions(x) == y).all()
    if CLASSES[name].teaches:
        sequences, lengths = teaching_sequences(weights, signed=CLASSES[name].signed)
        for found, expected, count in zip(sequences, x, lengths, strict=True):
            assert (found[:count] == expected[:count]).all()


def test_nearest_neighbours_and_learners_equal_those_of_the_public_code():
    recorded = load("in_context_functions_official")
    x, y = (recorded[f"nearest_neighbours_{part}"].long().numpy() for part in "xy")
    assert (neighbour_labels(x, y, 6) == y).all()
    x, y = (recorded[f"learners_{part}"].float() for part in "xy")
    told = {"nearest": learners.neighbours(1), "nearest_3": learners.neighbours(3), "null": learners.null}
    for name, learner in told.items():
        assert torch.equal(learner(x, y), recorded[f"learners_{name}"]), name
    close(learners.averaging(x, y), recorded["learners_averaging"], 1e-6)
    # the public code breaks ties between cosines by rounding: compare where the nearest is unique
    similar = torch.where(torch.ones(16, 16).tril(-1) > 0, x @ x.mT, -torch.inf)
    single = (similar == similar.max(-1, keepdim=True).values).sum(-1) == 1
    assert single.sum() > 20
    assert torch.equal(learners.nearest_cosine(x, y)[single], recorded["learners_cosine"][single])


def test_a_context_is_the_batch_that_it_was_made_of():
    contexts = made().held_out
    x, y = examples(as_batch(contexts.x, contexts.y))
    assert (x.numpy() == contexts.x).all() and (y.numpy() == contexts.y).all()
