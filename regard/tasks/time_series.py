"""Classify measured series: sktime's packaged data sets, or your own files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from regard.contract import Pattern, Unsupported, closest
from regard.measurement.units import counted
from regard.tasks.documents import Paths, names_of, overlap_note, printable
from regard.tasks.protocol import (
    SPLIT,
    Baseline,
    Batch,
    Task,
    check_fraction,
    check_integer,
    counter_generator,
    in_batches,
)
from regard.tasks.sampling import in_epochs
from regard.tasks.ts_files import SETS, Measured, read_set, read_ts

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SCALE = ("mean", "deviation")
LONGEST = 1 << 11
"""Default limit on the number of steps per series."""
CENTROID_LENGTH = 128
"""Largest number of steps of the centroids."""


class TimeSeriesTask(Task):
    """Classify a series of measurements (as in arXiv 2405.13956, section 4.4; the UEA and UCR archives).

    A token is one step with the values of all channels, standardised by the training series. Missing values are
    replaced by the previous ones; series longer than `length` are resampled to it. The baseline is the class of the
    nearest mean series, after resampling all series to one length.

    Args:
        data: one of the data sets `SETS` in sktime's package, such as ``JapaneseVowels``, with its own split; or files
            in the archives' format (``.ts``).
        validation: files to hold out; series that also occur in `data` are not trained on.
        length: largest number of steps per series, 2 to 65536; None for that of the longest series, at most 2048.
        held_out: share of each class to hold out when there is no `validation`, 0.01 to 0.5.
        evaluation_items: largest number of held-out series that are scored, 1 to 65536.
        seed: seed of the split, and of the choice of the held-out series that are scored.
    """

    name = "time_series"
    pattern = Pattern.NONCAUSAL_SELF
    objective = "classification"
    named = SETS

    def __init__(
        self,
        *,
        data: Paths = SETS[0],
        validation: Paths | None = None,
        length: int | None = None,
        held_out: float = 0.2,
        evaluation_items: int = 1000,
        seed: int = 0,
    ) -> None:
        self.seed = check_integer("seed", seed, 0, (1 << 63) - 1)
        check_integer("evaluation_items", evaluation_items, 1, 1 << 16)
        check_fraction("held_out", held_out, 0.01, 0.5)
        if length is not None:
            check_integer("length", length, 2, 1 << 16)
        self._notes: list[str] = []
        if isinstance(data, list) and len(data) == 1:
            data = data[0]
        if data in SETS:
            if validation is not None:
                raise Unsupported(
                    f"validation together with {data}, which comes with its own", supported="no validation"
                )
            training, scored = self._apart(*read_set(str(data), f"the task time_series with data={data}"))
            self._named, self._rule = str(data), "as the set comes"
        else:
            items = _read(data)
            self._named = names_of(data)
            if validation is None:
                training, scored = self._split(self._distinct(items), held_out)
            else:
                training, scored = self._apart(items, _read(validation), validation)
                self._rule = "held-out series as given"
        self._prepare(training, scored, length, evaluation_items)

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        chosen = in_epochs(np.arange(len(self._training)), step, seed, batch_size)
        return self._batch(self._training, self._training_labels, chosen)

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        for rows in in_batches(len(self._scored), batch_size):
            yield self._batch(self._held_out, self._held_out_labels, self._scored[rows])

    def describe(self) -> str:
        counts = np.bincount(self._training_labels)
        classes = ", ".join(f"{name} {counts[i]}" for i, name in enumerate(self.classes[:20]))
        lengths = [len(one) for one in (*self._training, *self._held_out)]
        channels = "1 channel" if self.features == 1 else f"{self.features} channels"
        steps = f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else str(max(lengths))
        assert self.baseline is not None
        lines = [
            f"time_series: {printable(self._named)}, {channels}, {steps} steps",
            f"training: {len(self._training):,} series of {self.num_classes} classes ({printable(classes)}"
            + (", ...)" if self.num_classes > 20 else ")"),
            f"held out: {len(self._held_out):,} series, {len(self._scored):,} of them scored; chance {self.chance:.3f}; "
            f"{self.baseline.name} {self.baseline.score:.3f}",
            f"split: {self._rule}",
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self._notes)])

    def _distinct(self, items: list[Measured]) -> list[Measured]:
        first: dict[bytes, Measured] = {}
        for item in items:
            first.setdefault(item.values.tobytes(), item)
        if repeated := len(items) - len(first):
            self._notes.append(f"{counted(repeated, 'repeated series')} left out")
        return list(first.values())

    def _split(self, items: list[Measured], share: float) -> tuple[list[Measured], list[Measured]]:
        """Split series with the same share of each class."""
        held_out: set[int] = set()
        for number, label in enumerate(sorted({item.label for item in items})):
            members = [i for i, item in enumerate(items) if item.label == label]
            if len(members) < 2:
                raise Unsupported(
                    f"the class {printable(label)} with {len(members)} different series",
                    supported="2 or more in each class, to train on and to hold out",
                )
            order = counter_generator(self.seed, number, SPLIT).permutation(members)
            held_out.update(order[: max(1, round(share * len(members)))].tolist())
        self._rule = f"by series, the same share of each class (seed {self.seed})"
        return [item for i, item in enumerate(items) if i not in held_out], [items[i] for i in sorted(held_out)]

    def _apart(
        self, training: list[Measured], held_out: list[Measured], validation: Paths | None = None
    ) -> tuple[list[Measured], list[Measured]]:
        """Remove training series that are also held out, unless a trained model is scored."""
        scored = self._distinct(held_out)
        taken = {item.values.tobytes() for item in scored}
        distinct = self._distinct(training)
        kept = [item for item in distinct if item.values.tobytes() not in taken]
        self.shared: int = len(distinct) - len(kept)
        if self.scored is not None:
            return distinct, scored
        if not kept:
            raise Unsupported(
                "held-out data that holds all of the training data",
                supported="separate held-out series, or no validation: a part is then split off",
            )
        if self.shared:
            first = next(item for item in distinct if item.values.tobytes() in taken)
            self._notes.append(overlap_note(self.shared, "series", validation, f"class {first.label}"))
        return kept, scored

    def _prepare(
        self, training: list[Measured], scored: list[Measured], length: int | None, evaluation_items: int
    ) -> None:
        self.classes = tuple(sorted({item.label for item in training}))
        if len(self.classes) < 2:
            raise Unsupported(
                f"{self._named} with {counted(len(self.classes), 'class')}", supported="2 or more classes"
            )
        self.num_classes: int = len(self.classes)
        self.features: int = training[0].values.shape[1]
        for item in (*training, *scored):
            if item.label not in self.classes or item.values.shape[1] != self.features:
                raise Unsupported(
                    f"a series of the class {printable(item.label)} with {item.values.shape[1]} channels",
                    supported=f"the classes {printable(', '.join(self.classes))}, with {self.features} channels",
                )
        known = {} if self.scored is None else self.scored.fitted
        longest = max(len(item.values) for item in (*training, *scored))
        self.length = known.get("length", min(max(longest, 2), LONGEST)) if length is None else length
        mean, deviation = (np.array(known[name]) for name in SCALE) if known else _scale(training)
        self.fitted = {"length": self.length, **dict(zip(SCALE, (mean.tolist(), deviation.tolist()), strict=True))}
        if missing := sum(int(np.isnan(item.values).sum()) for item in (*training, *scored)):
            self._notes.append(f"{missing:,} missing values are those before them")
        if longest > self.length:
            cut = sum(len(item.values) > self.length for item in (*training, *scored))
            self._notes.append(f"{cut} series of up to {longest:,} steps resampled to {self.length:,}")

        def prepared(items: list[Measured]) -> list[Float[np.ndarray, "n c"]]:
            found = [(filled(item.values, mean) - mean) / deviation for item in items]
            return [resampled(one, self.length) if len(one) > self.length else one for one in found]

        number = {label: i for i, label in enumerate(self.classes)}
        self._training, self._held_out = prepared(training), prepared(scored)
        self._training_labels, self._held_out_labels = (
            np.array([number[item.label] for item in items], dtype=np.int64) for items in (training, scored)
        )
        order = counter_generator(self.seed, self.num_classes, SPLIT).permutation(len(scored))
        self._scored = order[:evaluation_items]
        labels = self._held_out_labels[self._scored]
        self.chance = float(np.bincount(labels).max() / len(labels))
        right = self._nearest_centroid() == labels
        self.baseline: Baseline | None = Baseline.of_answers("nearest mean series", right)

    def _nearest_centroid(self) -> Int[np.ndarray, " k"]:
        """The class of the nearest class mean of the training series, for each scored series."""
        steps = min(self.length, CENTROID_LENGTH)
        training = np.stack([resampled(one, steps) for one in self._training])
        means = np.stack([training[self._training_labels == label].mean(0) for label in range(self.num_classes)])
        scored = np.stack([resampled(self._held_out[i], steps) for i in self._scored])
        return np.stack([((scored - mean) ** 2).sum((1, 2)) for mean in means], 1).argmin(1)

    def _batch(
        self, series: Sequence[Float[np.ndarray, "n c"]], labels: Int[np.ndarray, " n"], chosen: Int[np.ndarray, " b"]
    ) -> Batch:
        inputs = np.zeros((len(chosen), self.length, self.features), dtype=np.float32)
        lengths = np.array([[len(series[i])] for i in chosen])
        for row, i in enumerate(chosen):
            inputs[row, : len(series[i])] = series[i]
        valid = torch.from_numpy(np.arange(self.length) < lengths)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(labels[chosen]), valid)


def _scale(training: list[Measured]) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]]:
    """Mean and standard deviation of each channel over all steps of all series, without missing values."""
    steps = np.concatenate([item.values for item in training])
    known = ~np.isnan(steps)
    mean = np.nansum(steps, 0) / np.maximum(known.sum(0), 1)
    deviation = np.sqrt(np.nansum((steps - mean) ** 2, 0) / np.maximum(known.sum(0), 1))
    deviation[deviation == 0] = 1
    return mean, deviation


def filled(values: Float[np.ndarray, "n c"], otherwise: Float[np.ndarray, " c"]) -> Float[np.ndarray, "n c"]:
    """Replace missing values by the previous ones, or by `otherwise` if there are none before."""
    known = ~np.isnan(values)
    last = np.maximum.accumulate(np.where(known, np.arange(len(values))[:, None], -1), 0)
    return np.where(last < 0, otherwise, np.take_along_axis(values, np.maximum(last, 0), 0))


def resampled(values: Float[np.ndarray, "n c"], steps: int) -> Float[np.ndarray, "s c"]:
    """Resample to `steps` positions, evenly spread from the first value to the last, by linear interpolation."""
    places = np.linspace(0, len(values) - 1, steps)
    before = np.floor(places).astype(int)
    after, share = np.minimum(before + 1, len(values) - 1), (places - before)[:, None]
    return values[before] * (1 - share) + values[after] * share


def _read(data: Paths) -> list[Measured]:
    paths = [data] if isinstance(data, str | Path) else list(data)
    for path in paths:
        if Path(path).suffix.lower() != ".ts":
            raise Unsupported(
                f"data={path} for the task time_series",
                supported=f"{', '.join(SETS)}, or .ts files",
                nearest=_closest_set(str(path)),
            )
    return [item for path in paths for item in read_ts(Path(path))]


def _closest_set(name: str) -> str:
    found = closest(name, SETS)
    return f"data={found}" if found else ""
