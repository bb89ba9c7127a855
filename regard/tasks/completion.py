"""Point-cloud completion: a whole shape from its visible half."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from regard.contract import Pattern, Unsupported
from regard.measurement.units import counted
from regard.tasks.documents import Paths, one_folder, walk
from regard.tasks.protocol import (
    EVALUATION,
    TRAINING,
    Baseline,
    Batch,
    Task,
    check_integer,
    counter_generator,
    in_batches,
)
from regard.tasks.sampling import without_repetitions
from regard.tasks.shapes import MESHES, on_mesh, read_mesh, superquadrics

if TYPE_CHECKING:
    from jaxtyping import Float

SPACE = 3
NEAR = 0.05
"""Distance within which a point counts as found; shapes extend to a distance of 1 from their centre."""
THOUSANDTHS = 1000.0


class CompletionTask(Task):
    """Predict points all over a shape from points on one side of it (as in PCN, Yuan et al., arXiv 1808.00671).

    The memory holds points on the visible side: one side of a randomly oriented plane through the centre. None of them
    is among the points to predict, so that copying them earns no more than other points of that side would. The inputs
    are fixed places on a sphere, one for each point to predict. The training loss is the Chamfer distance to points all
    over the shape: the mean distance to the nearest point, averaged over both directions; the score is the same in
    thousandths of the shape's half size. CD-l2 (squared distances, summed over both directions) and an F-score (share of
    points within `NEAR`) are reported too. The baseline returns the given points.

    Args:
        data: a folder of meshes (OBJ, binary STL), of which a tenth is held out; None for combined superquadrics, drawn
            anew at each step.
        length: number of points to predict, 8 to 65536.
        seen: number of given points, 8 to 65536.
        evaluation_items: number of held-out clouds, 1 to 65536.
        seed: seed of the held-out clouds.
    """

    name = "completion"
    pattern = Pattern.NONCAUSAL_CROSS
    objective = "regression"
    features = memory_features = num_targets = SPACE
    target_features = ()
    memory_ordered = False
    metric = "CD-l1"
    higher_is_better = False

    def __init__(
        self,
        *,
        data: Paths | None = None,
        length: int = 512,
        seen: int = 256,
        evaluation_items: int = 64,
        seed: int = 0,
    ) -> None:
        self.length = check_integer("length", length, 8, 1 << 16)
        self.memory_length: int = check_integer("seen", seen, 8, 1 << 16)
        self._items = check_integer("evaluation_items", evaluation_items, 1, 1 << 16)
        self.seed = check_integer("seed", seed, 0, (1 << 63) - 1)
        folder = None if data is None else one_folder(data, "meshes: " + " ".join(MESHES))
        self._meshes = None if folder is None else _read_folder(folder)
        self._named = "superquadrics" if folder is None else f"the meshes of {folder.name}"
        self._places = _sphere(self.length)
        self._scored: Batch | None = None
        given = Baseline.of("the points that are given", self, _given)
        self.baseline: Baseline | None = given
        self.chance = Baseline.of("a sphere", self, lambda batch: batch.inputs).score

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        check_integer("batch_size", batch_size, 1, 1 << 20)
        return self._drawn(counter_generator(seed, step, TRAINING), batch_size, held_out=False)

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        if self._scored is None:
            self._scored = self._drawn(counter_generator(self.seed, 0, EVALUATION), self._items, held_out=True)
        for rows in in_batches(self._items, batch_size):
            yield self._scored.items(rows.start, rows.stop)

    def loss(self, output: Float[Tensor, "b n 3"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """CD-l1 for each item, in half sizes of the shape."""
        there, back = nearest(output, batch.targets)
        distance = (there.mean(1) + back.mean(1)) / 2
        return distance, torch.ones_like(distance)

    def score(self, logits: Float[Tensor, "b n 3"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        distance, weight = self.loss(logits.double(), batch)
        return THOUSANDTHS * distance, weight

    def figures(
        self, output: Float[Tensor, "b n 3"], batch: Batch
    ) -> dict[str, tuple[Float[Tensor, " b"], Float[Tensor, " b"]]]:
        there, back = nearest(output.double(), batch.targets)
        right, found = ((way < NEAR).double().mean(1) for way in (there, back))
        both = 2 * right * found / (right + found).clamp(min=1e-12)
        squared = THOUSANDTHS * (there.square().mean(1) + back.square().mean(1))
        ones = torch.ones_like(both)
        return {"CD-l2": (squared, ones), "F-score": (both, ones)}

    def describe(self) -> str:
        assert self.baseline is not None
        return "\n".join(
            [
                f"completion: {self.length} points all over a shape from {self.memory_length} of one side, of {self._named}",
                f"training: new points in each step; held out: {self._items} clouds of other shapes",
                f"scored in CD-l1, thousandths of the shape's half size, lower is better; a sphere: {self.chance:.1f}; "
                f"{self.baseline.name}: {self.baseline.score:.1f}",
            ]
        )

    def _drawn(self, rng: np.random.Generator, count: int, *, held_out: bool) -> Batch:
        whole = np.empty((count, self.length, SPACE), dtype=np.float32)
        seen = np.empty((count, self.memory_length, SPACE), dtype=np.float32)
        for row in range(count):
            cloud = self._cloud(rng, self.length + 4 * self.memory_length, held_out=held_out)
            whole[row], rest = cloud[: self.length], cloud[self.length :]
            plane = rng.normal(size=SPACE)
            side = rest[rest @ plane > 0]
            if not len(side):
                side = rest
            seen[row] = side[np.arange(self.memory_length) % len(side)]
        inputs = self._places.expand(count, -1, -1).clone()
        return Batch(inputs, torch.from_numpy(whole), memory=torch.from_numpy(seen))

    def _cloud(self, rng: np.random.Generator, points: int, *, held_out: bool) -> np.ndarray:
        """Points of a shape around its centre, the farthest at a distance of 1."""
        if self._meshes is None:
            cloud = superquadrics(rng, points)
        else:
            training, scored = self._meshes
            meshes = scored if held_out else training
            cloud = on_mesh(meshes[int(rng.integers(len(meshes)))], rng, points)
        cloud = cloud - cloud.mean(0)
        scaled: np.ndarray = cloud / np.linalg.norm(cloud, axis=1).max()
        return scaled


def nearest(one: Float[Tensor, "b n 3"], other: Float[Tensor, "b m 3"]) -> tuple[Tensor, Tensor]:
    """Distance from each point to the nearest point of the other cloud: (B, N) and (B, M).

    The choice of the nearest point has no gradient; the distance has one, except for points that coincide.
    """
    with torch.no_grad():
        between = torch.cdist(one, other.to(one.dtype))
        to, back = between.argmin(2), between.argmin(1)
    other = other.to(one.dtype)
    return tuple(
        (x - y.take_along_dim(at[..., None], 1)).square().sum(-1).clamp(min=1e-14).sqrt()
        for x, y, at in ((one, other, to), (other, one, back))
    )  # type: ignore[return-value]


def _given(batch: Batch) -> Tensor:
    assert batch.memory is not None
    return batch.memory[:, torch.arange(batch.targets.shape[1]) % batch.memory.shape[1]]


def _sphere(count: int) -> Float[Tensor, "n 3"]:
    """Points on a sphere, evenly spread along a spiral."""
    i = torch.arange(count, dtype=torch.float64) + 0.5
    height = 1 - 2 * i / count
    angle, radius = math.pi * (1 + math.sqrt(5)) * i, (1 - height**2).sqrt()
    return torch.stack([radius * angle.cos(), radius * angle.sin(), height], -1).float()


def _read_folder(folder: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    files = sorted(path for path in walk(folder)[0] if path.suffix.lower() in MESHES)
    read = [read_mesh(path) for path in files]
    meshes = [read[i] for i in without_repetitions([mesh.tobytes() for mesh in read])[0]]
    if len(meshes) < 2:
        raise Unsupported(
            f"{folder} with {counted(len(files), 'mesh file')}",
            supported="files of two or more different shapes: " + " ".join(MESHES),
        )
    held_out = set(range(0, len(meshes), 10))
    return (
        [mesh for i, mesh in enumerate(meshes) if i not in held_out],
        [mesh for i, mesh in enumerate(meshes) if i in held_out],
    )
