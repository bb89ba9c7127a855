"""Super-resolution: restore a patch of a photo from a version a quarter as wide and high."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from regard.contract import Pattern, Unsupported
from regard.measurement.units import counted
from regard.tasks.documents import Paths, one_folder, walk
from regard.tasks.image_files import images_among, read_image, require_pillow
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
from regard.tasks.sampling import spread, without_repetitions

if TYPE_CHECKING:
    from jaxtyping import Float

SIDE_READ = 512
"""Size at which photos from a folder are read."""
PHOTOS_MEASURED, LEAST_UNIT = 64, 1e-4
"""Training photos that the unit of the differences is measured on, and its least value (for photos of one colour)."""
CHANNELS = 3
SHAPES, PAINTED = "shapes", 3
"""Name of the drawn pictures, and number of shapes in each."""
MEASURED = 256
"""Drawn pictures that the unit is measured on."""


class UpscaleTask(Task):
    """Predict what a downscaled patch lacks at each pixel (as SR3 is trained to, Saharia et al., arXiv 2104.07636).

    A token is a pixel: its three colours in the downscaled patch, enlarged again (bicubic); the output is the
    difference to add, divided by its root mean square over training patches. Scored in PSNR of the patch, in dB; SSIM is
    reported too. The baseline is the enlarged patch itself.

    Args:
        data: a folder of photos, the last of which are held out; None for scikit-learn's two photos: china.jpg for
            training, flower.jpg held out; ``shapes`` for patches that are drawn afresh: discs and bars of any colour and
            rotation, whose edges tell more than those of photos.
        size: side of a patch in pixels, 12 to 256 (SSIM has windows of 11).
        factor: downscaling factor; a divisor of `size`.
        evaluation_items: largest number of held-out patches, 1 to 65536.
        seed: seed of the shapes held out; unused for photos, whose held-out patches are evenly spread.
    """

    name = "upscale"
    pattern = Pattern.NONCAUSAL_SELF
    objective = "regression"
    features = num_targets = CHANNELS
    metric = "PSNR"

    def __init__(
        self,
        *,
        data: Paths | None = None,
        size: int = 32,
        factor: int = 4,
        evaluation_items: int = 64,
        seed: int = 0,
    ) -> None:
        self.size = check_integer("size", size, 12, 256)
        self.factor = check_integer("factor", factor, 2, 16)
        check_integer("evaluation_items", evaluation_items, 1, 1 << 16)
        self.seed = check_integer("seed", seed, 0, (1 << 63) - 1)
        if size % factor:
            raise Unsupported(
                f"factor={factor} of patches of {size} pixels",
                supported="a divisor of size",
                nearest=f"factor={max(f for f in (2, 4, 8) if size % f == 0 or f == 2)}, size={size - size % 2}",
            )
        self.length, self.grid = size**2, (size, size)
        self._training: list[Tensor] | None = None
        if data == SHAPES:
            self._held_out = draw_shapes(counter_generator(self.seed, 0, EVALUATION), evaluation_items, size)
            self._described = (
                f"{PAINTED} coloured shapes\ntraining: drawn afresh at each step; held out: {evaluation_items}"
            )
            measured = iter([draw_shapes(counter_generator(self.seed, 1, EVALUATION), MEASURED, size)])
        else:
            measured = self._read(data, evaluation_items)
        self.unit = self._typical_difference(measured)
        self.baseline: Baseline | None = Baseline.of(
            "bicubic enlargement", self, lambda batch: torch.zeros_like(batch.targets)
        )
        self.chance = Baseline.of("grey", self, lambda batch: (0.5 - batch.inputs) / self.unit).score

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        check_integer("batch_size", batch_size, 1, 1 << 20)
        draws = counter_generator(seed, step, TRAINING)
        if self._training is None:
            return self._batch(draw_shapes(draws, batch_size, self.size))
        chosen = []
        for which, top, left in zip(
            draws.integers(0, len(self._training), batch_size), *draws.random((2, batch_size)), strict=True
        ):
            photo = self._training[which]
            y, x = (int(at * (side - self.size + 1)) for at, side in zip((top, left), photo.shape[-2:], strict=True))
            chosen.append(photo[:, y : y + self.size, x : x + self.size])
        patches = torch.stack(chosen)
        flips = torch.from_numpy(draws.random(batch_size) < 0.5)
        return self._batch(torch.where(flips[:, None, None, None], patches.flip(-1), patches))

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        for rows in in_batches(len(self._held_out), batch_size):
            yield self._batch(self._held_out[rows])

    def score(self, logits: Float[Tensor, "b n 3"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """PSNR for each patch, in dB."""
        found, true = self._pictures(logits, batch)
        error = (found - true).square().mean((1, 2, 3)).clamp(min=1e-10)
        return -10 * error.log10(), torch.ones_like(error)

    def figures(
        self, output: Float[Tensor, "b n 3"], batch: Batch
    ) -> dict[str, tuple[Float[Tensor, " b"], Float[Tensor, " b"]]]:
        alike = structural_similarity(*self._pictures(output, batch))
        return {"SSIM": (alike, torch.ones_like(alike))}

    def describe(self) -> str:
        assert self.baseline is not None
        return "\n".join(
            [
                f"upscale: patches of {self.size} x {self.size} pixels from {self.size // self.factor} x "
                f"{self.size // self.factor}, of {self._described}",
                f"scored in PSNR (dB); {self.baseline.name}: {self.baseline.score:.2f}",
            ]
        )

    def _read(self, data: Paths | None, evaluation_items: int) -> Iterator[Tensor]:
        """Read the photos to train on and those to hold out. Returns patches of training photos, photo by photo, for the
        unit."""
        self._training, held_out, named = _photos(data)
        for photo in (*self._training, *held_out):
            if min(photo.shape[-2:]) < self.size:
                raise Unsupported(
                    f"size={self.size} of a photo of {photo.shape[-2]} x {photo.shape[-1]}",
                    supported="patches within each photo",
                    nearest=f"size={min(photo.shape[-2:]) // self.factor * self.factor}",
                )
        patches = torch.cat([_tiles(photo, self.size) for photo in held_out])
        self._held_out = patches[torch.from_numpy(spread(len(patches), evaluation_items))]
        self._described = (
            f"{named}\ntraining: patches anywhere in {counted(len(self._training), 'photo')}, half of them mirrored; "
            f"held out: {len(self._held_out)} of {len(patches)} patches of other photos"
        )
        measured = (self._training[i] for i in spread(len(self._training), PHOTOS_MEASURED))
        return (_tiles(photo, self.size) for photo in measured)

    def _typical_difference(self, measured: Iterator[Float[Tensor, "b 3 s s"]]) -> float:
        """The root mean square of the differences over patches, each photo's counting the same.

        As pixels are, differences are around 0.02: far less than what a model outputs before it is trained.
        """
        squares = [float((each - self._enlarged(each)).double().square().mean()) for each in measured]
        return max(math.sqrt(sum(squares) / len(squares)), LEAST_UNIT)

    def _enlarged(self, patches: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b 3 s s"]:
        """Patches after downscaling and enlargement."""
        small = F.interpolate(patches, scale_factor=1 / self.factor, mode="area")
        return F.interpolate(small, size=patches.shape[-2:], mode="bicubic", align_corners=False).clamp(0, 1)

    def _batch(self, patches: Float[Tensor, "b 3 s s"]) -> Batch:
        rough = self._enlarged(patches)
        inputs, targets = (x.flatten(2).mT.contiguous() for x in (rough, (patches - rough) / self.unit))
        return Batch(inputs, targets, grid=self.grid)

    def _pictures(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predicted and target patches, (B, 3, S, S) in float64."""
        rough = batch.inputs.double()
        made = (rough + self.unit * output.double()).clamp(0, 1), rough + self.unit * batch.targets.double()
        found, true = (x.mT.unflatten(-1, self.grid) for x in made)
        return found, true


def structural_similarity(
    one: Float[Tensor, "b c h w"], other: Float[Tensor, "b c h w"], *, window: int = 11, sigma: float = 1.5
) -> Float[Tensor, " b"]:
    """SSIM of images from 0 to 1 (Wang et al., "Image quality assessment", 2004): Gaussian windows, no padding."""
    places = torch.arange(window, dtype=one.dtype, device=one.device) - (window - 1) / 2
    line = torch.exp(-places.square() / (2 * sigma**2))
    line = line / line.sum()
    channels = one.shape[1]

    def blurred(x: Tensor) -> Tensor:
        x = F.conv2d(x, line.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
        return F.conv2d(x, line.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)

    mean, mean_other = blurred(one), blurred(other)
    variance, variance_other = blurred(one * one) - mean**2, blurred(other * other) - mean_other**2
    shared = blurred(one * other) - mean * mean_other
    small, large = 0.01**2, 0.03**2
    alike = (2 * mean * mean_other + small) * (2 * shared + large)
    unlike = (mean**2 + mean_other**2 + small) * (variance + variance_other + large)
    return (alike / unlike).mean((1, 2, 3))


def draw_shapes(rng: np.random.Generator, count: int, side: int) -> Float[Tensor, "b 3 s s"]:
    """Draw pictures of a disc or a bar over a disc or a bar over another, each of any colour, size and rotation."""
    row, column = (np.mgrid[:side, :side] + 0.5) / side
    picture = np.broadcast_to(rng.random((count, CHANNELS, 1, 1)), (count, CHANNELS, side, side))
    for _ in range(PAINTED):
        y, x = (at - centre for at, centre in zip((row, column), rng.random((2, count, 1, 1)), strict=True))
        half, turn = rng.uniform(0.15, 0.5, (count, 1, 1)), rng.uniform(0, math.pi, (count, 1, 1))
        along, across = y * np.sin(turn) + x * np.cos(turn), y * np.cos(turn) - x * np.sin(turn)
        bar = (abs(along) < half) & (abs(across) < half * rng.uniform(0.3, 1, (count, 1, 1)))
        inside = np.where(rng.random((count, 1, 1)) < 0.5, bar, np.hypot(y, x) < half)
        picture = np.where(inside[:, None], rng.random((count, CHANNELS, 1, 1)), picture)
    return torch.from_numpy(picture).float()


def _tiles(photo: Tensor, size: int) -> Tensor:
    """All complete, non-overlapping patches of a photo (C, H, W)."""
    rows, columns = (side // size for side in photo.shape[-2:])
    cut = photo[:, : rows * size, : columns * size]
    return cut.unflatten(1, (rows, size)).unflatten(-1, (columns, size)).permute(1, 3, 0, 2, 4).flatten(0, 1)


def _photos(data: Paths | None) -> tuple[list[Tensor], list[Tensor], str]:
    """Training and held-out photos (3, H, W), from 0 to 1, and a description."""
    if data is None:
        try:
            from sklearn.datasets import load_sample_image
        except ImportError:
            raise Unsupported(
                "upscale without scikit-learn, which holds two photos",
                supported="data=FOLDER",
                nearest="pip install 'regard[data]'",
            ) from None
        require_pillow()
        china, flower = (_tensor(load_sample_image(name)) for name in ("china.jpg", "flower.jpg"))
        return [china], [flower], "scikit-learn's china.jpg (training) and flower.jpg (held out)"
    folder = one_folder(data, "photos")
    require_pillow()
    files = sorted(images_among(walk(folder)[0], folder))
    read = [_tensor(read_image(path, (SIDE_READ, SIDE_READ), CHANNELS)[0]) for path in files]
    photos = [read[i] for i in without_repetitions([photo.numpy().tobytes() for photo in read])[0]]
    if len(photos) < 2:
        raise Unsupported(f"{folder} with one photo", supported="two different photos or more: the last are held out")
    kept = len(photos) - math.ceil(len(photos) / 10)
    repeated = f", {counted(len(read) - len(photos), 'repeated one')} left out" if len(photos) < len(read) else ""
    return photos[:kept], photos[kept:], f"the photos of {folder.name}{repeated}"


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float().div(255)
