"""The common base of the tasks that classify every pixel or voxel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from regard.contract import Pattern, Unsupported, closest, one_of
from regard.measurement.units import counted
from regard.tasks.augmentation import AUGMENTATIONS
from regard.tasks.protocol import IGNORED, SPLIT, Batch, Task, check_fraction, check_integer, counter_generator
from regard.tasks.segmentation.augmentation import MaskAugmentation
from regard.tasks.segmentation.folders import Kind
from regard.tasks.segmentation.heads import is_head
from regard.tasks.segmentation.scores import overlap_by_image, predicted_classes

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt8

    Parts = tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"], str]

METRICS = {"dice": "mean Dice", "iou": "mean IoU"}


class MaskTask(Task):
    """Items with a class for each of their points, scored by the overlap between prediction and truth.

    Attributes:
        kind: kind of files that are read from folders.
        scenes: names of the data that are drawn.
        reader: holds names, values and colours of the classes, and which of them is the background.
        measure: ``dice`` or ``iou``, the score.
        augmentation: augmentation of training items; None for none.
        mirrored: axes along which items are mirrored, and their name in words.
        placed: whether items are shifted; unnecessary for random crops.
    """

    pattern = Pattern.NONCAUSAL_SELF
    objective = "segmentation"
    kind: Kind
    scenes: Mapping[str, Any]
    num_classes: int
    reader: Any
    measure: str
    augmentation: MaskAugmentation | None
    mirrored: tuple[tuple[int, ...], str]
    placed: bool

    def __init__(self, metric: str, held_out: float, evaluation_items: int, seed: int, augment: str) -> None:
        self.seed = check_integer("seed", seed, 0, (1 << 63) - 1)
        check_fraction("held_out", held_out, 0.01, 0.5)
        check_integer("evaluation_items", evaluation_items, 1, 1 << 16)
        one_of("metric", metric, METRICS)
        one_of("augment", augment, AUGMENTATIONS)
        self.measure, self.metric = metric, METRICS[metric]

    def check_data(
        self, data: str, values: Mapping[str, Any], of_folders: Mapping[str, Any], of_heads: Mapping[str, Any]
    ) -> None:
        """Raise Unsupported for data that are neither drawn nor present, and for options that do not apply to them.

        Args:
            values: options that are values in a folder's masks; ``auto`` where not given.
            of_folders, of_heads: options only for folders, and for folders and heads; None where not given.
        """
        for name, value in values.items():
            number = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255
            if not number and value not in ("auto", None):
                raise Unsupported(
                    f"{name}={value!r}", supported="a value of masks, 0 to 255, None or auto", nearest="auto"
                )
        given = [(name, value) for name, value in values.items() if value != "auto"]
        others = of_folders if is_head(data) else {**of_folders, **of_heads}
        given += [(name, value) for name, value in others.items() if value is not None]
        if given and (data in self.scenes or is_head(data)):
            name, value = given[0]
            raise Unsupported(
                f"{name}={value} for {data}, which comes as it is",
                supported=f"{name} with a folder of {self.kind.word}s and masks",
                nearest=f"no {name}",
            )
        near = closest(data, self.named)
        if near and data not in self.named and not Path(data).exists():
            raise Unsupported(
                f"data={data} for {self.name}, which does not exist",
                supported=", ".join(self.named) + ", or a folder with images and masks",
                nearest=near,
            )

    @property
    def _known(self) -> Any:
        """The reader of the trained model that is scored, whose classes masks may have; None without one."""
        return None if self.scored is None else self.scored.reader

    def augmentation_of(self, augment: str, flip: bool | None) -> MaskAugmentation | None:
        """The augmentation for the options `augment` and `flip` and the reader's classes."""
        if augment == "none" and not flip:
            return None
        shifted = self.placed and augment != "none"
        return MaskAugmentation(augment, self.reader.classes, flip=flip, mirrored=self.mirrored, shift=shifted)

    def told_apart(self, source: str, labelled: Bool[np.ndarray, " n"], parts: Parts | None, share: float) -> Parts:
        """Indices of the training items and of the held-out items, and the rule in words: as in `parts`, or drawn.

        Items that are not `labelled`, since all of their points are ignored, are left out of both.

        Raises:
            Unsupported: if no items are left for training or held out.
        """
        training, held, rule = self._split_of(source, len(labelled), parts, share)
        for name, part in (("training", training), ("held-out", held)):
            if not labelled[part].any():
                raise Unsupported(
                    f"{source}, whose {name} {self.kind.word}s have no labelled {self.kind.point}",
                    supported=f"masks with {self.kind.point}s that are not ignored",
                    nearest="ignore=None",
                )
        return training[labelled[training]], held[labelled[held]], rule

    def unlabelled_told(self, labelled: Bool[np.ndarray, " n"]) -> list[str]:
        """A note on the items that :meth:`told_apart` leaves out, if any."""
        if labelled.all():
            return []
        items = counted(len(labelled), self.kind.word)
        return [f"{(~labelled).sum()} of {items} without a labelled {self.kind.point} left out"]

    def _split_of(self, source: str, count: int, parts: Parts | None, share: float) -> Parts:
        what = f"different {self.kind.word}"
        if parts is not None:
            if not len(parts[0]):
                raise Unsupported(
                    f"held-out {self.kind.word}s that include every training {self.kind.word} of {source}",
                    supported=f"other {self.kind.word}s to hold out than to train on",
                )
            return parts
        order = counter_generator(self.seed, 0, SPLIT).permutation(count)
        held = max(1, round(share * count))
        if held >= count:
            raise Unsupported(
                f"{source} with {counted(count, what)}", supported=f"2 or more {what}s, one of which is held out"
            )
        return np.sort(order[held:]), np.sort(order[:held]), f"by {self.kind.word} (seed {self.seed})"

    def varied_told(self, what: str) -> list[str]:
        """A line that describes how items are augmented."""
        return [f"{what}: {self.augmentation or 'as they are (augment=light or standard varies them)'}"]

    def classes_told(self, shares: Float[np.ndarray, " k"], having: Int[np.ndarray, " k"], measured: int) -> str:
        """The share of points of each class, and how many of the measured training items have the class."""
        listed = ", ".join(
            f"{name} {share:.1%} in {count}" + (" (not scored)" if i == self.reader.background else "")
            for i, (name, share, count) in enumerate(zip(self.reader.classes, shares, having, strict=True))
            if i < 20
        )
        return (
            f"{self.num_classes} classes, with the share of the {self.kind.point}s and the number of {measured} training "
            f"{self.kind.word}s that have them: {listed}" + (", ..." if self.num_classes > 20 else "")
        )

    def rest_told(self, split: str, ignored: float, notes: Sequence[str]) -> list[str]:
        """Lines about the split, about ignored points, and further notes."""
        told = [f"ignored: {ignored:.1%} of the {self.kind.point}s"] if ignored else []
        return [f"split: {split}", *told, *(f"note: {note}" for note in notes)]

    def score(self, logits: Float[Tensor, "b n pk"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        return self.of_images(*predicted_classes(logits, batch))

    def figures(self, output: Float[Tensor, "b n pk"], batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        predicted, targets = predicted_classes(output, batch)
        return {told: self.of_images(predicted, targets, name) for name, told in METRICS.items()}

    def of_images(
        self, predicted: Int[Tensor, "b pixels"], targets: Int[Tensor, "b pixels"], measure: str | None = None
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """The score and weight of each item by ``dice`` or ``iou``; None for the task's own measure."""
        return overlap_by_image(predicted, targets, self.num_classes, self.reader.background, measure or self.measure)

    def picture(self, batch: Batch) -> UInt8[np.ndarray, "h w c"]:
        """A picture of the single item of a batch."""
        raise NotImplementedError

    def mask(self, classes: Int[Tensor, "1 n p"], batch: Batch) -> Int[np.ndarray, "h w"]:
        """Classes of the tokens of a one-item batch, arranged like its :meth:`picture`."""
        raise NotImplementedError


def letters(labels: Int[np.ndarray, "h w"], background: int | None) -> list[str]:
    """A mask as a few lines of letters."""
    stride = max(1, -(-max(labels.shape) // 28))
    signs = "abcdefghijklmnopqrstuvwxyz"

    def sign(value: int) -> str:
        return "?" if value == IGNORED else "." if value == background else signs[value % len(signs)]

    return ["  " + "".join(2 * sign(int(value)) for value in row) for row in labels[::stride, ::stride]]
