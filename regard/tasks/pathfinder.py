"""Pathfinder: are two dots the ends of one dashed curve?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from regard.contract import Pattern, Unsupported
from regard.tasks.generated import GeneratedTask
from regard.tasks.protocol import EVALUATION, TRAINING, Baseline, check_integer, counter_generator

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt8

EMPTY, LINE, DOT = range(3)
DASH, GAP = 3, 2
"""Points per dash, and points between two dashes of a curve."""
LINK = GAP + 1
"""Largest distance in pixels, along the longer axis, between consecutive dashes; different curves are further apart."""
TRIES, ROUNDS = 8, 32
"""Curves drawn at once for each picture, of which the first that fits is used, and how often this is repeated."""
CHOICE, ALIKE = 4, 0.5
"""How many times as many second curves are drawn, of which the one with the most alike ends is used; difference between
two pairs of ends up to which pictures are kept; a quarter of them is kept in any case."""
BEND, STEADY = 3.0, 1 / 3
"""Radians that a curve turns over the side of a picture; share of a side over which it keeps turning one way."""
AT_ONCE, MOST_AT_ONCE = 1 << 19, 256
"""Pixels of the pictures drawn at once, and the largest number of such pictures."""
LARGEST, MANY = 256, 64
"""Largest side in pixels; number of pictures drawn at once of which at least one should hold all curves."""
FITTED, TRACED = 512, 64
"""Training items on which the baseline is fitted, and held-out items that are traced for the description."""
STEPS, RIDGE = 8, 1.0
"""Steps of Newton's method that fit the baseline, and its ridge."""


class PathfinderTask(GeneratedTask):
    """Pathfinder (Linsley et al., "Learning long-range spatial dependencies with horizontal gated-recurrent units",
    arXiv 1805.08315; as sequences of pixels in Long Range Arena, arXiv 2011.04006).

    A picture has two long dashed curves and shorter distractors. Two ends of long curves are marked by dots: of the
    same curve (class 1) or of both (class 0), in half of the items each. Different curves are at least four pixels
    apart along an axis, dashes of one curve at most three, so the picture determines the class. For class 0, the dots
    are the ends of two curves that look most like those of one, by their distance and by the directions of the curves
    next to them; pictures without such ends are left out, but at most three in four. Long curves then have to be
    followed; with few dashes the dots still tell much. The baseline shows how much: a logistic rule of just these
    features.

    Pixels are tokens, row by row: 0 is empty, 1 a line, 2 a dot. A model is not given the width of the picture.

    Args:
        size: side of the picture in pixels, 16 to 256; 32 and 128 are usual.
        dashes: dashes of a long curve, 2 to 64; None for a curve as long as the picture, with a fifth of `size`.
        distractors: number of shorter curves, with a third of the dashes, 0 to 64; None for a tenth of `size`.
        evaluation_items: number of held-out items, 1 to 65536.
        seed: seed of the held-out items.
    """

    name = "pathfinder"
    pattern = Pattern.NONCAUSAL_SELF
    objective = "classification"
    vocab_size = 3
    num_classes = 2
    solved = 0.95
    vast = True

    def __init__(
        self,
        *,
        size: int = 32,
        dashes: int | None = None,
        distractors: int | None = None,
        evaluation_items: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed, evaluation_items=evaluation_items)
        self.size = check_integer("size", size, 16, LARGEST)
        self.dashes = check_integer("dashes", size // 5 if dashes is None else dashes, 2, 64)
        self.distractors = check_integer("distractors", size // 10 if distractors is None else distractors, 0, 64)
        self.length = size**2
        self.block: int | None = min(MOST_AT_ONCE, max(16, AT_ONCE // self.length))
        self._shapes = [_points(self.dashes)] * 2 + [_points(max(2, self.dashes // 3))] * self.distractors
        if evaluation_items < MANY:  # so few held-out pictures would not tell whether the curves fit
            self.draw(counter_generator(self.seed, 0, EVALUATION), MANY)
        _, labels = self._held_out
        self.chance = float(np.bincount(labels).max() / len(labels))
        self.baseline: Baseline | None = self._rule()

    def draw(self, rng: np.random.Generator, count: int) -> tuple[UInt8[np.ndarray, "b n"], Int[np.ndarray, " b"]]:
        """Draw pictures and classes; fewer than `count` if some pictures have no room for all curves."""
        side = self.size + 2 * LINK
        blocked = np.zeros((count, side, side), dtype=bool)
        near = np.arange(2 * LINK + 1)
        curves: list[np.ndarray] = []
        for number, points in enumerate(self._shapes):
            beside = curves[0] if number == 1 else None
            curve, placed = self._place(rng, blocked[:, LINK:-LINK, LINK:-LINK], points, beside)
            blocked, curves, curve = blocked[placed], [one[placed] for one in curves], curve[placed]
            y, x = (curve[..., axis, None, None] for axis in range(2))
            rows = np.arange(len(curve))[:, None, None, None]
            blocked[rows, y + near[:, None], x + near] = True
            curves.append(curve)
        if not len(blocked) and count >= MANY:
            fitting = max(5 * self.dashes, 10 * self.distractors)
            fewer = f"dashes={min(self.dashes, self.size // 5)},distractors={min(self.distractors, self.size // 10)}"
            raise Unsupported(
                f"pathfinder with dashes={self.dashes} and distractors={self.distractors} in {self.size}x{self.size} pixels, in which "
                f"so many curves rarely fit",
                supported="fewer dashes or distractors, or a larger size",
                nearest=f"size={fitting}" if self.size < fitting <= LARGEST else fewer,
            )
        pictures = np.full((len(blocked), self.size, self.size), EMPTY, dtype=np.uint8)
        rows = np.arange(len(blocked))
        for curve in curves:
            drawn = curve[:, np.arange(curve.shape[1]) % (DASH + GAP) < DASH]
            pictures[rows[:, None], drawn[..., 0], drawn[..., 1]] = LINE
        targets = rng.integers(0, 2, len(blocked))
        # random order, because the second curve had less room than the first
        swapped = rng.integers(0, 2, len(blocked))[:, None, None] == 1
        first, second = np.where(swapped, curves[1], curves[0]), np.where(swapped, curves[0], curves[1])
        of_two, difference = _of_two(first, second, self.size)
        dots = np.where(targets[:, None, None] == 1, first[:, [0, -1]], of_two)
        pictures[rows[:, None], dots[..., 0], dots[..., 1]] = DOT
        alike = difference <= (max(ALIKE, float(np.quantile(difference, 0.25))) if len(difference) else ALIKE)
        return pictures.reshape(len(blocked), self.length)[alike], targets[alike]

    def _place(
        self,
        rng: np.random.Generator,
        blocked: Bool[np.ndarray, "b s s"],
        points: int,
        beside: Int[np.ndarray, "b p 2"] | None,
    ) -> tuple[Int[np.ndarray, "b p 2"], Bool[np.ndarray, " b"]]:
        """A curve in each picture that avoids blocked pixels, and which pictures have one.

        Args:
            beside: a curve of each picture; of the new one and this one, an end each should look like ends of one.
        """
        curve = np.zeros((len(blocked), points, 2), dtype=np.int64)
        left = np.arange(len(blocked))
        for _ in range(ROUNDS):
            if not len(left):
                break
            tries = TRIES if beside is None else CHOICE * TRIES
            drawn, fits = _curves(rng, len(left), points, self.size, tries)
            free = fits & ~blocked[left[:, None, None], drawn[..., 0], drawn[..., 1]].any(-1)
            some = free.any(1)
            order = (~free).astype(float)
            if beside is not None:
                near = np.broadcast_to(beside[left, None], drawn.shape)
                order += np.maximum(_of_two(near, drawn, self.size)[1], _of_two(drawn, near, self.size)[1]) / 100
            curve[left[some]] = drawn[some, order[some].argmin(1)]
            left = left[~some]
        return curve, ~np.isin(np.arange(len(blocked)), left)

    def describe(self) -> str:
        assert self.baseline is not None
        inputs, labels = self._held_out
        some = inputs[:TRACED].reshape(-1, self.size, self.size)
        traced = float((connected(some) == labels[:TRACED]).mean())
        step = -(-self.size // 64)
        first = np.zeros([-(-self.size // step) * step] * 2, dtype=np.uint8)
        first[: self.size, : self.size] = some[0]
        shown = first.reshape(len(first) // step, step, -1, step).max((1, 3))
        return "\n".join(
            [
                f"pathfinder: {self.size}x{self.size} pixels, {self.length} tokens; two curves of {self.dashes} dashes and "
                f"{self.distractors} shorter ones; are the dots ends of one curve?",
                self._sizes(),
                f"chance {self.chance:.3f}; {self.baseline.name}: {self.baseline.score:.3f}; from dash to dash: {traced:.3f}; "
                f"solved at {self.solved}",
                f"sample: {'one curve' if labels[0] else 'two curves'}",
                *("  " + "".join(" .O"[pixel] * 2 for pixel in row) for row in shown),
            ]
        )

    def _rule(self) -> Baseline:
        """The rule that looks at the dots and around them, fitted on training items."""
        inputs, labels = self._collect(counter_generator(self.seed, 0, TRAINING), FITTED, held_out=False)
        weights = _fitted(_terms(_seen(inputs, self.size)), labels)
        inputs, labels = self._held_out
        right = (_terms(_seen(inputs, self.size)) @ weights > 0) == labels
        return Baseline.of_answers("directions and distance of the dots", right)


def connected(pictures: UInt8[np.ndarray, "b s s"]) -> Bool[np.ndarray, " b"]:
    """Whether lines lead from dot to dot of each picture in steps of at most three pixels: an upper bound for
    scores."""
    drawn = torch.from_numpy(pictures > EMPTY).float()[:, None]
    dots = torch.from_numpy(pictures == DOT).flatten(1)
    first = dots & (dots.cumsum(1) == 1)
    reached = first.float().view_as(drawn)
    while True:
        near = F.max_pool2d(reached, (2 * LINK + 1, 1), 1, (LINK, 0))
        further = F.max_pool2d(near, (1, 2 * LINK + 1), 1, (0, LINK)) * drawn
        if torch.equal(further, reached):
            break
        reached = further
    last = dots & ~first
    found: np.ndarray = (last & (reached.flatten(1) > 0)).any(1).numpy()
    return found


def _points(dashes: int) -> int:
    """Number of points of a curve that begins and ends with a dash."""
    return dashes * (DASH + GAP) - GAP


def _curves(
    rng: np.random.Generator, rows: int, points: int, size: int, tries: int
) -> tuple[Int[np.ndarray, "b t p 2"], Bool[np.ndarray, "b t"]]:
    """Draw `tries` smooth curves per row, with points one pixel apart before rounding; also returns which curves fit.

    Curves are placed anywhere in the picture; those whose ends are close to each other do not fit.
    """
    steady = STEADY * size
    ago = np.arange(points)[:, None] - np.arange(points)
    memory = np.where(ago >= 0, np.exp(-np.abs(ago) / steady), 0)
    memory /= np.sqrt((memory**2).sum(1, keepdims=True))
    turns = rng.standard_normal((rows, tries, points), dtype=np.float32) @ memory.T.astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi, (rows, tries, 1)) + turns.cumsum(-1) * (BEND / size)
    place = np.stack([np.sin(angle), np.cos(angle)], -1).cumsum(2)
    place -= place.min(2, keepdims=True)
    room = size - 1 - place.max(2, keepdims=True)
    place += rng.random(room.shape) * room.clip(0)
    found = np.floor(place + 0.5).astype(np.int64).clip(0, size - 1)
    apart = np.abs(found[:, :, 0] - found[:, :, -1]).max(-1) > LINK
    return found, (room >= 0).all((2, 3)) & apart


def _of_two(
    first: Int[np.ndarray, "*b p 2"], second: Int[np.ndarray, "*b p 2"], size: int
) -> tuple[Int[np.ndarray, "*b 2 2"], Float[np.ndarray, "*b"]]:
    """One end of each of two curves, chosen to look most like the ends of the first: in their distance and in how much
    their dashes lead towards each other. Also returns how much they differ."""
    ends, dashes = (np.stack([x[..., at, :] for x in (first, second)], -3) for at in ([0, -1], [DASH - 1, -DASH]))
    ways = dashes - ends  # (..., curve, end, axis)
    own = _look(ends[..., 0, 0, :], ends[..., 0, 1, :], ways[..., 0, 0, :], ways[..., 0, 1, :], size)
    one, other, way, other_way = (
        x for of in (ends, ways) for x in (of[..., 0, :, None, :], of[..., 1, None, :, :])
    )  # of each end of the first and each of the second
    apart = np.abs(_look(one, other, way, other_way, size) - own[..., None, None, :]).sum(-1)
    apart = apart.reshape(*apart.shape[:-2], 4)
    chosen = [
        np.take_along_axis(ends[..., curve, :, :], of[..., None, None], -2)
        for curve, of in enumerate(divmod(apart.argmin(-1), 2))
    ]
    return np.concatenate(chosen, -2), apart.min(-1)


def _look(
    one: Float[np.ndarray, "*b 2"],
    other: Float[np.ndarray, "*b 2"],
    way: Float[np.ndarray, "*b 2"],
    other_way: Float[np.ndarray, "*b 2"],
    size: int,
) -> Float[np.ndarray, "*b 3"]:
    """What can be seen of two ends without following a curve: their distance in units of a quarter of the side, and
    how far the directions at the ends lead towards each other (cosines, in order)."""
    between = other - one
    distance = np.sqrt(_product(between, between))
    towards = [
        _product(x, between) * sign / np.maximum(np.sqrt(_product(x, x)) * distance, 1e-9)
        for x, sign in ((way, 1), (other_way, -1))
    ]
    return np.stack([4 * distance / size, np.minimum(*towards), np.maximum(*towards)], -1)


def _product(one: Float[np.ndarray, "*b 2"], other: Float[np.ndarray, "*b 2"]) -> Float[np.ndarray, "*b"]:
    """Inner products of vectors in the plane, without a reduction over two numbers, which takes numpy longer."""
    return one[..., 0] * other[..., 0] + one[..., 1] * other[..., 1]


def _seen(inputs: UInt8[np.ndarray, "b n"], size: int) -> Float[np.ndarray, "b 3"]:
    """What can be seen of the dots: their distance, and where the pixels of a line within two of each dot lead."""
    places = np.nonzero(inputs == DOT)[1].reshape(-1, 2)
    dots = np.stack([places // size, places % size], -1)  # (b, dot, axis)
    steps = np.stack(np.meshgrid(*[np.arange(-DASH + 1, DASH)] * 2, indexing="ij"), -1).reshape(-1, 2)
    around = dots[:, :, None] + steps
    inside = ((around >= 0) & (around < size)).all(-1)
    y, x = np.moveaxis(around.clip(0, size - 1), -1, 0)
    lines = inside & (inputs[np.arange(len(inputs))[:, None, None], y * size + x] == LINE)
    ways = lines.astype(np.float64) @ steps
    return _look(dots[:, 0], dots[:, 1], ways[:, 0], ways[:, 1], size)


def _terms(looks: Float[np.ndarray, "b 3"]) -> Float[np.ndarray, "b 10"]:
    """A constant, and the features with their squares and products."""
    ones = np.concatenate([np.ones((len(looks), 1)), looks], 1)
    return (ones[:, :, None] * ones[:, None])[:, *np.triu_indices(ones.shape[1])]


def _fitted(terms: Float[np.ndarray, "b k"], labels: Int[np.ndarray, " b"]) -> Float[np.ndarray, " k"]:
    """Weights of a logistic rule, with a small ridge, by Newton's method."""
    weights = np.zeros(terms.shape[1])
    for _ in range(STEPS):
        chance = 1 / (1 + np.exp(-(terms @ weights).clip(-30, 30)))
        slope = terms.T @ (labels - chance) - RIDGE * weights
        bend = (terms * (chance * (1 - chance))[:, None]).T @ terms + RIDGE * np.eye(len(weights))
        weights += np.linalg.solve(bend, slope)
    return weights
