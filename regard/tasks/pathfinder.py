"""Pathfinder: are two dots the ends of one dashed curve?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from regard.contract import Pattern, Unsupported
from regard.tasks.generated import GeneratedTask
from regard.tasks.protocol import TRAINING, Baseline, check_integer, counter_generator

if TYPE_CHECKING:
    from jaxtyping import Bool, Int, UInt8

EMPTY, LINE, DOT = range(3)
DASH, GAP = 3, 2
"""Points per dash, and points between two dashes of a curve."""
LINK = GAP + 1
"""Largest distance in pixels, along the longer axis, between consecutive dashes; different curves are further apart."""
TRIES, ROUNDS = 8, 32
"""Curves drawn at once for each picture, of which the first that fits is used, and how often this is repeated."""
BEND, STEADY = 3.0, 1 / 3
"""Radians that a curve turns over the side of a picture; share of a side over which it keeps turning one way."""
AT_ONCE, MOST_AT_ONCE = 1 << 19, 256
"""Pixels of the pictures drawn at once, and the largest number of such pictures."""
LARGEST, MANY = 256, 64
"""Largest side in pixels; number of pictures drawn at once of which at least one should hold all curves."""
FITTED, TRACED = 256, 64
"""Training items on which the baseline is fitted, and held-out items that are traced for the description."""


class PathfinderTask(GeneratedTask):
    """Pathfinder (Linsley et al., "Learning long-range spatial dependencies with horizontal gated-recurrent units",
    arXiv 1805.08315; as sequences of pixels in Long Range Arena, arXiv 2011.04006).

    A picture has two long dashed curves and shorter distractors. Two ends of long curves are marked by dots: of the
    same curve (class 1) or of both (class 0), in half of the items each. Different curves are at least four pixels
    apart along an axis, dashes of one curve at most three, so the picture determines the class. For class 0, the dots
    are the ends of two curves whose distance is most like that between the ends of one, so that the distance reveals
    little; the score of the baseline shows how much.

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
        _, labels = self._held_out
        self.chance = float(np.bincount(labels).max() / len(labels))
        self.baseline: Baseline | None = self._rule()

    def draw(self, rng: np.random.Generator, count: int) -> tuple[UInt8[np.ndarray, "b n"], Int[np.ndarray, " b"]]:
        """Draw pictures and classes; fewer than `count` if some pictures have no room for all curves."""
        side = self.size + 2 * LINK
        blocked = np.zeros((count, side, side), dtype=bool)
        near = np.arange(2 * LINK + 1)
        curves: list[np.ndarray] = []
        for points in self._shapes:
            curve, placed = self._place(rng, blocked[:, LINK:-LINK, LINK:-LINK], points)
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
        ends = np.stack([curve[:, [0, -1]] for curve in curves[:2]], 1)  # (B, curve, end, axis)
        # random order, because the second curve had less room than the first
        swapped = rng.integers(0, 2, len(blocked))[:, None, None, None] == 1
        ends = np.where(swapped, ends[:, ::-1], ends)
        dots = np.where(targets[:, None, None] == 1, ends[:, 0], _of_two(ends))
        pictures[rows[:, None], dots[..., 0], dots[..., 1]] = DOT
        return pictures.reshape(len(blocked), self.length), targets

    def _place(
        self, rng: np.random.Generator, blocked: Bool[np.ndarray, "b s s"], points: int
    ) -> tuple[Int[np.ndarray, "b p 2"], Bool[np.ndarray, " b"]]:
        """A curve in each picture that avoids blocked pixels, and which pictures have one."""
        curve = np.zeros((len(blocked), points, 2), dtype=np.int64)
        left = np.arange(len(blocked))
        for _ in range(ROUNDS):
            if not len(left):
                break
            drawn, fits = _curves(rng, len(left), points, self.size)
            free = fits & ~blocked[left[:, None, None], drawn[..., 0], drawn[..., 1]].any(-1)
            some = free.any(1)
            curve[left[some]] = drawn[some, free[some].argmax(1)]
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
        """The rule that decides by the distance of the dots, with a threshold fitted on training items."""
        inputs, labels = self._collect(counter_generator(self.seed, 0, TRAINING), FITTED, held_out=False)
        apart = _distances(inputs, self.size)
        cuts = np.unique(apart)
        above = (apart[:, None] >= cuts) == labels[:, None].astype(bool)
        share = above.mean(0)
        best = np.abs(share - 0.5).argmax()
        inputs, labels = self._held_out
        right = ((_distances(inputs, self.size) >= cuts[best]) == labels) == (share[best] >= 0.5)
        return Baseline("the distance of the dots", np.stack([right, np.ones_like(right)], -1).astype(np.float64))


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
    rng: np.random.Generator, rows: int, points: int, size: int
) -> tuple[Int[np.ndarray, "b t p 2"], Bool[np.ndarray, "b t"]]:
    """Draw `TRIES` smooth curves per row, with points one pixel apart before rounding; also returns which curves fit.

    Curves are placed anywhere in the picture; those whose ends are close to each other do not fit.
    """
    steady = STEADY * size
    ago = np.arange(points)[:, None] - np.arange(points)
    memory = np.where(ago >= 0, np.exp(-np.abs(ago) / steady), 0)
    memory /= np.sqrt((memory**2).sum(1, keepdims=True))
    turns = rng.standard_normal((rows, TRIES, points), dtype=np.float32) @ memory.T.astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi, (rows, TRIES, 1)) + turns.cumsum(-1) * (BEND / size)
    place = np.stack([np.sin(angle), np.cos(angle)], -1).cumsum(2)
    place -= place.min(2, keepdims=True)
    room = size - 1 - place.max(2, keepdims=True)
    place += rng.random(room.shape) * room.clip(0)
    found = np.floor(place + 0.5).astype(np.int64).clip(0, size - 1)
    apart = np.abs(found[:, :, 0] - found[:, :, -1]).max(-1) > LINK
    return found, (room >= 0).all((2, 3)) & apart


def _of_two(ends: Int[np.ndarray, "b 2 2 axis"]) -> Int[np.ndarray, "b 2 axis"]:
    """One end of each of two curves, chosen so that their distance is most like that between the ends of the first."""
    one, other = ends[:, 0, :, None], ends[:, 1, None]
    apart = ((one - other) ** 2).sum(-1).reshape(-1, 4)
    alike = np.abs(np.sqrt(apart) - np.sqrt(((ends[:, 0, 0] - ends[:, 0, 1]) ** 2).sum(-1))[:, None]).argmin(1)
    rows = np.arange(len(ends))
    return np.stack([ends[rows, 0, alike // 2], ends[rows, 1, alike % 2]], 1)


def _distances(inputs: UInt8[np.ndarray, "b n"], size: int) -> Int[np.ndarray, " b"]:
    """Squared distance between the two dots."""
    places = np.nonzero(inputs == DOT)[1].reshape(-1, 2)
    y, x = places // size, places % size
    found: np.ndarray = (y[:, 0] - y[:, 1]) ** 2 + (x[:, 0] - x[:, 1]) ** 2
    return found
