"""Segmentation in three dimensions: a class for each voxel of a volume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from regard.contract import Unsupported, one_of
from regard.core.patches import cut, joined
from regard.measurement.units import counted
from regard.tasks.images import choose_patch
from regard.tasks.protocol import (
    AUGMENTATION,
    EVALUATION,
    IGNORED,
    SPLIT,
    TRAINING,
    Baseline,
    Batch,
    check_fraction,
    check_integer,
    check_sides,
    counter_generator,
)
from regard.tasks.sampling import in_epochs, spread
from regard.tasks.segmentation.base import MaskTask, letters
from regard.tasks.segmentation.folders import VOLUMES
from regard.tasks.segmentation.heads import HEADS, is_head
from regard.tasks.segmentation.masks import colours_of
from regard.tasks.segmentation_3d.blocks import read_blocks
from regard.tasks.segmentation_3d.reader import LEAST_SIDE, VolumeReader, Volumes, read_volumes
from regard.tasks.segmentation_3d.scenes import SCENES
from regard.tasks.segmentation_3d.windows import in_windows

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt8

    Labelled = tuple[Float[np.ndarray, "x y z c"], Int[np.ndarray, "x y z"]]

SAMPLED = 16
"""Number of scenes from which the class shares and the baseline of drawn data are taken."""
FOREGROUND = 1 / 3
"""Share of the crops that are centred on a voxel of a class other than the background, as in nnU-Net."""
PLACES, SHADES, LOOKED_AT = 1000, 64, 200_000
"""Most voxels per class around which crops are drawn; shades, and voxels per volume, that the baseline uses."""


class Segmentation3DTask(MaskTask):
    """Classify every voxel of volumes that are cut into cubes of voxels; the cubes are the tokens.

    Training uses crops of `size` voxels, a third of them around a voxel of a class other than the background. Held-out
    volumes are scored whole: the model runs on overlapping windows of the crops' size, and the logits are averaged with
    weights that decrease towards a window's border. The score of a volume is defined as for images in the task
    segmentation. Exact duplicates of a volume count once, and volumes without a labelled voxel not at all. A fourth axis
    of files holds channels, whose number must be the same in all volumes; the features of a token hold all channels.

    Args:
        data: ``bodies`` (drawn: four kinds of bodies; the default), ``far-cue`` (drawn: ellipsoids whose class is shown
            by a mark in one of the eight corners) or ``near-cue`` (by their own brightness), ``mni152`` (a head with
            its tissues, from nilearn) or ``colin27`` (a head with 116 regions), or a folder with `images` and `masks`,
            NIfTI files of the same names, and optionally `classes.txt` with a line ``value name`` for each class.
        validation: a folder like `data`, if that is a folder; its volumes are held out.
        length: tokens per crop, as an alternative to `patch`.
        patch: side of a token in voxels, a divisor of `size`; by default close to 4.
        size: sides of a crop in voxels, 8 to 256: one number, or one for each axis (left to right, back to front, up).
        spacing: distance in millimetres to which voxels are resampled, 0.1 to 20; None leaves them as they are.
        overlap: smallest share of a window that the next one overlaps, 0 to 0.9.
        skip_unreadable: whether unreadable volumes or masks in a folder are left out and reported, instead of refused.
        augment: augmentation of crops from a folder or a head, together with their masks: ``none``, ``light``
            (mirrored) or ``standard`` (also rotated around the vertical axis, scaled, and with changed shades and
            noise).
        flip: whether half of the crops are mirrored, independently along each axis; by default with `augment` if no
            class is named for a side.
        normalise: ``volume`` (each volume by its own mean and deviation) or ``data`` (all by those of the training
            data's classes, clipped at the 0.5 and the 99.5 % quantile: for CT, where values mean the same in every
            scan).
        classes: keep only this many classes, those with the most voxels; others become background. For a folder or a
            head.
        background: value in a folder's masks that is not scored; ``None`` scores all values, ``auto`` means 0.
        ignore: value in a folder's masks without loss and score; ``None`` for none, ``auto`` means 255 if there are
            more than two values.
        metric: ``dice`` or ``iou``, the metric of the comparison.
        held_out: share of a folder's volumes, or of a head's blocks, to hold out, 0.01 to 0.5.
        evaluation_items: largest number of held-out volumes, 1 to 65536.
        seed: seed of the split and of drawn held-out volumes.
    """

    name = "segmentation_3d"
    kind, scenes = VOLUMES, SCENES
    named = (*SCENES, *HEADS)
    mirrored, placed = ((0, 1, 2), "along each axis"), False

    def __init__(
        self,
        *,
        data: str | Path | None = None,
        validation: str | Path | None = None,
        length: int | None = None,
        patch: int | None = None,
        size: int | Sequence[int] = 32,
        spacing: float | None = None,
        overlap: float = 0.5,
        skip_unreadable: bool = False,
        augment: str = "none",
        flip: bool | None = None,
        normalise: str = "volume",
        classes: int | None = None,
        background: int | str | None = "auto",
        ignore: int | str | None = "auto",
        metric: str = "dice",
        held_out: float = 0.2,
        evaluation_items: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__(metric, held_out, evaluation_items, seed, augment)
        self.size = check_sides(size, 3, LEAST_SIDE, 256)
        check_fraction("overlap", overlap, 0.0, 0.9)
        one_of("normalise", normalise, ("volume", "data"))
        if spacing is not None:
            check_fraction("spacing", spacing, 0.1, 20.0)
        self.patch = choose_patch(self.size, length, patch)
        self.grid: tuple[int, ...] = tuple(side // self.patch for side in self.size)
        self.length = int(np.prod(self.grid))
        self.num_targets: int = self.patch**3

        if classes is not None:
            check_integer("classes", classes, 1, 255)
        chosen = "bodies" if data is None else str(data)
        values_of_masks = {"background": background, "ignore": ignore}
        of_read = {
            "classes": classes,
            "spacing": spacing,
            "augment": None if augment == "none" else augment,
            "flip": flip or None,
        }
        of_folders = {"validation": validation, "skip_unreadable": skip_unreadable or None}
        self.check_data(chosen, values_of_masks, of_folders, of_read)
        self._scene = chosen if chosen in SCENES else None
        notes = list[str]()
        nothing: int | None = 0
        if self._scene is not None:
            names = SCENES[chosen][1]
            streams = (counter_generator(seed, 0, stream) for stream in (SPLIT, EVALUATION))
            seen, held = (
                self._drawn(rng, count) for rng, count in zip(streams, (SAMPLED, evaluation_items), strict=True)
            )
            values, source = tuple(range(len(names))), f"the scenes {chosen}, drawn"
            split = f"held-out scenes are drawn from a seed of their own ({seed})"
            self._held_out = evaluation_items
        else:
            volumes = self._read(chosen, validation, spacing, values_of_masks, held_out, skip_unreadable, classes)
            self.shared: int = volumes.shared
            labelled = np.array([(labels != IGNORED).any() for labels in volumes.labels])
            source = volumes.source
            training, apart, split = self.told_apart(source, labelled, volumes.split, held_out)
            if classes is not None:
                volumes = volumes.largest(classes, training.tolist(), self._known)
            notes = [*volumes.notes, *self.unlabelled_told(labelled)]
            parts = training, apart[spread(len(apart), evaluation_items)]
            seen, held = ([(volumes.voxels[i], volumes.labels[i]) for i in part] for part in parts)
            names, values, nothing = volumes.classes, volumes.values, volumes.background
            self._held_out = len(apart)
        self.num_classes: int = len(names)
        channels = seen[0][0].shape[3]
        self.features: int = self.num_targets * channels
        self.reader = VolumeReader(
            size=self.size,
            patch=self.patch,
            spacing=spacing,
            overlap=overlap,
            scale=_scale(seen, nothing) if normalise == "data" else None,
            classes=names,
            values=values,
            colours=colours_of(len(names)),
            background=nothing,
            channels=channels,
        )
        self.augmentation = self.augmentation_of(augment, flip)
        self._scored = held  # normalised only when used, since a trained model may bring its own reader
        seen = [(self.reader.normalised(v), labels) for v, labels in seen]
        self._told, self._notes = (source, split), notes
        self._seen = [] if self._scene else seen
        self._places = [self._around(labels) for _, labels in self._seen]
        counts = np.stack([np.bincount(x[x != IGNORED], minlength=len(names)) for _, x in seen])
        self._shares, self._having = counts.sum(0) / max(1, counts.sum()), (counts > 0).sum(0)
        fullest = np.array([self._scored_voxels(x).sum() for _, x in seen]).argmax()
        self._measured, self._example = len(seen), seen[fullest][1]
        self._ignored = float(np.mean([(labels == IGNORED).mean() for _, labels in seen]))
        self.baseline: Baseline | None = self._of_shades(seen)

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        check_integer("batch_size", batch_size, 1, 1 << 20)
        if self._scene is not None:
            rng = counter_generator(seed, step, TRAINING)
            drawn = self._drawn(rng, batch_size)
            crops = [self._crop(rng, self.reader.normalised(v), x, self._around(x)) for v, x in drawn]
        else:
            rng = counter_generator(seed, step, AUGMENTATION)
            chosen = in_epochs(np.arange(len(self._seen)), step, seed, batch_size)
            crops = [self._crop(rng, self._seen[i][0], self._seen[i][1], self._places[i]) for i in chosen]
            if self.augmentation is not None:
                crops = [self.augmentation(*crop, rng) for crop in crops]
        voxels, labels = (np.stack(part) for part in zip(*crops, strict=True))
        maps = torch.from_numpy(voxels).movedim(-1, 1), torch.from_numpy(labels.astype(np.int64))[:, None]
        inputs, targets = (cut(part, self.patch) for part in maps)
        return Batch(inputs, targets, grid=self.grid)

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """Whole volumes, one per batch, since their sides may differ."""
        check_integer("batch_size", batch_size, 1, 1 << 20)
        for voxels, labels in self._scored:
            inputs, grid = self.reader.tokens(self.reader.normalised(voxels))
            yield Batch(inputs, self.reader.targets(labels), grid=grid)

    def answer(self, run: Callable[[Batch], Tensor], batch: Batch) -> Float[Tensor, "b n pk"]:
        assert batch.grid is not None  # set by evaluation_batches
        reader = self.reader

        def of_windows(inputs: Tensor) -> Tensor:
            return run(replace(batch, inputs=inputs, grid=reader.grid))

        return in_windows(of_windows, batch.inputs, batch.grid, reader.grid, self.patch, reader.overlap)

    def picture(self, batch: Batch) -> UInt8[np.ndarray, "h w c"]:
        """The slice with the most voxels of scored classes, with the nose up."""
        shades = self._slice(batch.inputs, batch)
        low, high = np.percentile(shades, (1, 99))
        bytes_ = (255 * (shades - low) / max(high - low, 1e-6)).clip(0, 255).astype(np.uint8)
        return bytes_[..., None]

    def mask(self, classes: Int[Tensor, "1 n p"], batch: Batch) -> Int[np.ndarray, "h w"]:
        return self._slice(classes, batch)

    def describe(self) -> str:
        scored = len(self._scored)
        (source, split), size = self._told, "x".join(map(str, self.size))
        training = "drawn afresh at each step" if self._scene else f"crops of {counted(len(self._seen), 'volume')}"
        smallest, largest = (how([labels.shape for _, labels in self._scored], key=np.prod) for how in (min, max))
        sides = " to ".join(dict.fromkeys("x".join(map(str, each)) for each in (smallest, largest)))
        lines = [
            f"segmentation_3d: {source}" + f", {self.reader.channels} channels" * (self.reader.channels > 1),
            f"crops of {size} voxels"
            + (f" of {self.reader.spacing:g} mm" if self.reader.spacing else "")
            + f": {self.length} tokens ({'x'.join(map(str, self.grid))}), cubes of {self.patch} voxels a side",
            self.classes_told(self._shares, self._having, self._measured),
            f"training: {training}; held out: {counted(self._held_out, 'volume')}, {scored:,} of them scored whole ({sides} "
            f"voxels), in windows that overlap by {self.reader.overlap:.0%}",
            *([] if self._scene else self.varied_told("crops")),
            *self.rest_told(split, self._ignored, self._notes),
        ]
        example = self._example[:, :, self._fullest(self._example)]
        return "\n".join([*lines, "slice of a mask:", *letters(np.rot90(example), self.reader.background)])

    def _read(
        self,
        data: str,
        validation: str | Path | None,
        spacing: float | None,
        values: Mapping[str, int | str | None],
        share: float,
        skip_unreadable: bool,
        classes: int | None,
    ) -> Volumes:
        if is_head(data):
            return read_blocks(data, self.size, spacing, share, self.seed)
        return read_volumes(
            Path(data),
            None if validation is None else Path(validation),
            self.size,
            self.patch,
            spacing,
            **values,
            skip_unreadable=skip_unreadable,
            known=self._known,
            merged=classes is not None,
        )

    def _drawn(self, rng: np.random.Generator, count: int) -> list[Labelled]:
        assert self._scene is not None
        draw, _, wide = SCENES[self._scene]
        sides = tuple(round(wide * side) for side in self.size)
        scenes = (draw(rng, sides) for _ in range(count))
        return [(voxels[..., None], labels) for voxels, labels in scenes]

    def _around(self, labels: Int[np.ndarray, "x y z"]) -> list[Int[np.ndarray, " n"]]:
        """Voxels of each class that occurs, without the background, around which crops are drawn."""
        flat = labels.ravel()
        there = (np.flatnonzero(flat == i) for i in range(self.num_classes) if i != self.reader.background)
        return [found[spread(len(found), PLACES)] for found in there if len(found)]

    def _crop(
        self,
        rng: np.random.Generator,
        voxels: Float[np.ndarray, "x y z c"],
        labels: Int[np.ndarray, "x y z"],
        places: list[Int[np.ndarray, " n"]],
    ) -> Labelled:
        size = np.array(self.size, dtype=np.int64)
        room = np.array(labels.shape, dtype=np.int64) - size
        corner = rng.integers(0, room + 1)
        if places and rng.random() < FOREGROUND:
            of_class = places[rng.integers(len(places))]
            middle = np.unravel_index(of_class[rng.integers(len(of_class))], labels.shape)
            corner = np.clip(np.array(middle, dtype=np.int64) - size // 2, 0, room)
        x, y, z = (slice(begin, begin + own) for begin, own in zip(corner, self.size, strict=True))
        return voxels[x, y, z], labels[x, y, z]

    def _slice(self, tokens: Tensor, batch: Batch) -> np.ndarray:
        assert batch.grid is not None  # set by evaluation_batches
        truth, volume = (joined(x.cpu(), batch.grid, self.patch)[0, 0].numpy() for x in (batch.targets, tokens))
        return np.rot90(volume[:, :, self._fullest(truth)])

    def _fullest(self, labels: Int[np.ndarray, "x y z"]) -> int:
        """The slice with the most voxels of scored classes."""
        return int(self._scored_voxels(labels).sum((0, 1)).argmax())

    def _scored_voxels(self, labels: Int[np.ndarray, "x y z"]) -> Bool[np.ndarray, "x y z"]:
        counted = labels != IGNORED
        return counted if self.reader.background is None else counted & (labels != self.reader.background)

    def _of_shades(self, seen: Sequence[Labelled]) -> Baseline:
        """The rule that answers with the commonest training class for each shade of the first channel."""
        some = [(v[..., 0].ravel()[pick], x.ravel()[pick]) for v, x in seen for pick in [spread(x.size, LOOKED_AT)]]
        shades, classes = (np.concatenate(part) for part in zip(*some, strict=True))
        edges = np.quantile(shades, np.linspace(0, 1, SHADES + 1)[1:-1])
        known = classes != IGNORED
        numbers = np.bincount(
            np.digitize(shades[known], edges) * self.num_classes + classes[known], minlength=SHADES * self.num_classes
        )
        best = numbers.reshape(SHADES, -1).argmax(1)
        items = []
        for voxels, labels in self._scored:
            shade = np.digitize(self.reader.normalised(voxels)[..., 0].ravel(), edges)
            found, truth = best[shade], labels.ravel().astype(np.int64)
            items.append(torch.cat(self.of_images(torch.from_numpy(found)[None], torch.from_numpy(truth)[None])))
        return Baseline("the commonest class of each shade", torch.stack(items).numpy())


def _scale(seen: Sequence[Labelled], background: int | None) -> tuple[tuple[float, ...], ...]:
    """Quantiles, mean and deviation of each channel over voxels of scored classes."""
    parts = [v[(x != IGNORED) & (True if background is None else x != background)] for v, x in seen]
    inside = np.concatenate([part[spread(len(part), LOOKED_AT)] for part in parts])
    if not len(inside):
        raise Unsupported(
            "normalise=data of training volumes without a voxel of any class",
            supported="masks with classes other than the background",
            nearest="normalise=volume",
        )
    low, high = np.quantile(inside, (0.005, 0.995), axis=0)
    within = inside.clip(low, high)
    return tuple(map(tuple, np.stack([low, high, within.mean(0), within.std(0)], 1).tolist()))


__all__ = ["Segmentation3DTask", "VolumeReader"]
