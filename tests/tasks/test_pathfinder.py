"""Pathfinder: the class follows from the picture, curves keep apart, and pictures are a function of their number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from task_data import items

from regard.tasks import check_task, create_task
from regard.tasks.pathfinder import DOT, EMPTY, LINE, LINK, RIDGE, PathfinderTask, _fitted, _seen, connected


@pytest.fixture(scope="module")
def small():
    return check_task(create_task("pathfinder", evaluation_items=64))


def parts(picture):
    """Sets of pixels connected by steps of at most `LINK`: a flood fill, pixel by pixel."""
    left = set(zip(*map(list, np.nonzero(picture != EMPTY)), strict=True))
    found = []
    while left:
        edge, part = [left.pop()], set()
        while edge:
            y, x = edge.pop()
            part.add((y, x))
            near = {(a, b) for a, b in left if max(abs(a - y), abs(b - x)) <= LINK}
            left -= near
            edge += near
        found.append(part)
    return found


def pictures(batch, size):
    return batch.inputs.numpy().reshape(-1, size, size)


def test_labels_equal_a_flood_fill_and_the_curves_are_as_many_as_asked_for(small):
    batch = small.training_batch(int(torch.randint(1000, ())), 5, 48)
    for picture, label in zip(pictures(batch, 32), batch.targets.tolist(), strict=True):
        dots = [tuple(place) for place in np.argwhere(picture == DOT).tolist()]
        found = parts(picture)
        assert len(dots) == 2
        assert len(found) == 2 + small.distractors
        of = [next(i for i, part in enumerate(found) if dot in part) for dot in dots]
        assert (of[0] == of[1]) == bool(label)
        assert all(len(found[i]) > 3 * max(2, small.dashes // 3) for i in of), "dots are ends of long curves"
    assert 10 < int(batch.targets.sum()) < 38


def test_dots_are_the_ends_of_their_curves(small):
    """Pixels within three of a dot are all on one side of it, unless a curve returns to its own end."""
    one_sided = []
    for picture in pictures(small.training_batch(1, 1, 48), 32):
        for dot in np.argwhere(picture == DOT):
            away = np.argwhere(picture != EMPTY) - dot
            own = away[(np.abs(away).max(1) <= LINK) & np.any(away != 0, 1)]
            one_sided.append((own @ own.T >= 0).all())
    assert np.mean(one_sided) > 0.9


@pytest.mark.parametrize(("size", "options"), [(20, {"distractors": 0}), (128, {"distractors": 4, "dashes": 12})])
def test_tracing_finds_every_label_at_any_size(size, options):
    task = PathfinderTask(size=size, evaluation_items=16, **options)
    batch = next(iter(task.evaluation_batches(16)))
    assert np.array_equal(connected(pictures(batch, size)), batch.targets.numpy() == 1)
    assert batch.inputs.shape == (16, size**2) and 0 < int(batch.targets.sum()) < 16


def test_tracing_sees_a_line_that_is_cut(small):
    picture = np.zeros((1, 12, 12), dtype=np.uint8)
    picture[0, 5, ::3] = 1
    picture[0, 5, [0, 9]] = DOT
    assert connected(picture).tolist() == [True]
    picture[0, 5, 6] = EMPTY
    assert connected(picture).tolist() == [False]


def test_a_batch_does_not_depend_on_what_was_drawn_before_it_or_on_how_items_are_grouped(small):
    fresh = create_task("pathfinder", evaluation_items=64)
    block = small.block
    last = small.training_batch(block // 4 - 1, 3, 4), small.training_batch(block // 4, 3, 4)
    across = fresh.training_batch(1, 3, block - 2)  # starts two items before a block's end
    assert torch.equal(across.inputs[:6], torch.cat([last[0].inputs[2:], last[1].inputs]))
    assert not set(items([across])) & set(items(small.evaluation_batches(64)))


def test_training_leaves_out_the_held_out_pictures(monkeypatch):
    """The generator is replaced by one that draws the same few pictures again and again."""
    task = create_task("pathfinder", size=16, distractors=0, evaluation_items=4)
    few, labels = task.draw(np.random.default_rng(0), 2000)
    few, labels = few[:40], labels[:40]

    def draw(rng, count):
        chosen = rng.integers(0, len(few), count)
        return few[chosen], labels[chosen]

    monkeypatch.setattr(task, "draw", draw)
    del task.__dict__["_held_out"], task.__dict__["_held_out_digests"]
    held_out = set(items(task.evaluation_batches(4)))
    trained = set(items([task.training_batch(0, 0, 500)]))
    assert len(held_out) == 4 and not held_out & trained and len(trained) > 20


def test_what_lies_around_the_dots_tells_little_and_the_rule_says_how_much():
    task = create_task("pathfinder", evaluation_items=1000)
    assert task.baseline.name == "directions and distance of the dots"
    assert 0.45 < task.baseline.score < 0.66
    told = task.describe()
    assert f"{task.baseline.name}: {task.baseline.score:.3f}; from dash to dash: 1.000" in told
    assert told.count("OO") == 2
    easy = create_task("pathfinder", size=16, dashes=2, distractors=0)
    assert easy.baseline.score > 0.7, "with two dashes the rule knows more"


def test_dots_of_both_classes_look_alike():
    """The features of the rule, pixel by pixel, have about the same means in both classes."""
    inputs, labels = create_task("pathfinder", evaluation_items=600)._held_out
    looks = []
    for picture in inputs.reshape(-1, 32, 32):
        one, other = np.argwhere(picture == DOT)
        between = other - one
        cosines = []
        for dot, sign in ((one, 1), (other, -1)):
            near = [at - dot for at in np.argwhere(picture == LINE) if np.abs(at - dot).max() <= 2]
            way = np.sum(near, 0)
            cosines.append(sign * way @ between / np.linalg.norm(way) / np.linalg.norm(between))
        looks.append([np.linalg.norm(between) / 8, *sorted(cosines)])
    looks = np.array(looks)
    assert np.allclose(looks, _seen(inputs, 32))
    apart = looks[labels == 1].mean(0) - looks[labels == 0].mean(0)
    assert (np.abs(apart) < 0.4 * looks.std(0)).all()


def test_the_rule_is_the_logistic_regression_of_its_terms():
    rng = np.random.default_rng(0)
    terms, labels = rng.normal(size=(400, 3)), rng.integers(0, 2, 400)
    weights = _fitted(terms, labels)
    chance = 1 / (1 + np.exp(-terms @ weights))
    assert np.allclose(terms.T @ (labels - chance), RIDGE * weights)
