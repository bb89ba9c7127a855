"""A task made from a user's own PyTorch data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from regard.contract import Pattern, Unsupported, one_of
from regard.measurement.units import counted
from regard.tasks.protocol import (
    IGNORED,
    Batch,
    Task,
    counter_generator,
    in_batches,
)
from regard.tasks.sampling import in_epochs, spread

if TYPE_CHECKING:
    from jaxtyping import Float

Score = Callable[[Tensor, Batch], tuple[Tensor, Tensor]]
_LENGTH_OF = {
    "inputs": "length",
    "targets": "length",
    "valid": "length",
    "memory": "memory_length",
    "memory_valid": "memory_length",
}


DatasetObjective = Literal["next-token", "classification", "regression"]


class DatasetTask(Task):
    """A task from map-style data sets (``len(data)`` and ``data[i]``) of training and held-out items; no collate
    function.

    An item is ``(inputs, targets)``, or a mapping with the field names of :class:`regard.tasks.Batch`, without the
    batch axis: tensors, arrays or numbers. Sequences shorter than `length` (for the memory, `memory_length`) are padded
    at the end, and padding has no target. One integer per position is a token; several numbers are features.

    Each epoch shows each training item once, in an order drawn from the seed. Random numbers that a data set draws from
    torch depend only on the seed and the step, so that a resumed run sees the same batches; random numbers from
    elsewhere (numpy, the system) do not.

    Args:
        training: training items.
        held_out: items to score on, always in the same order; they are read again for each evaluation.
        name: name of the task, as shown.
        objective: ``classification``, ``next-token`` or ``regression``.
        pattern: pattern that the model needs.
        length, memory_length: tokens per item and per memory, padding included; None for those of the first training
            item.
        vocab_size, memory_vocab_size: number of tokens, for integer inputs.
        num_classes: number of classes in classification.
        score: function of (output, batch) that returns sum and weight for each item, like
            :meth:`regard.tasks.Task.score`; None for accuracy, or for the squared error in regression.
        metric: what `score` measures.
        higher_is_better: whether a higher value of that metric is better.
        evaluation_items: largest number of held-out items to score, evenly spread; None for all.
        chance, solved, grid: as in :class:`regard.tasks.Task`.

    Raises:
        Unsupported: for data sets without a length, and for items that do not fit, naming the item's index.
    """

    def __init__(
        self,
        training: Any,
        held_out: Any,
        *,
        name: str,
        objective: DatasetObjective,
        pattern: Pattern | str = Pattern.NONCAUSAL_SELF,
        length: int | None = None,
        vocab_size: int | None = None,
        memory_length: int | None = None,
        memory_vocab_size: int | None = None,
        num_classes: int | None = None,
        score: Score | None = None,
        metric: str | None = None,
        higher_is_better: bool | None = None,
        evaluation_items: int | None = None,
        chance: float | None = None,
        solved: float | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> None:
        self.name, self.pattern, self.objective = name, Pattern.parse(pattern), objective
        one_of("objective", objective, get_args(DatasetObjective))
        self._told = f"the task {name!r}"
        if score is not None and (metric is None or higher_is_better is None):
            raise Unsupported(
                f"{self._told} with a score but metric={metric!r} and higher_is_better={higher_is_better!r}",
                supported="what the score measures, and whether more of it is better",
                nearest='metric="F1", higher_is_better=True',
            )
        self._score = score
        self._training, self._held_out = training, held_out
        for part, data in (("training", training), ("held-out", held_out)):
            if isinstance(data, IterableDataset) or not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
                raise Unsupported(
                    f"{self._told} whose {part} data is of type {type(data).__name__}",
                    supported="map-style data sets: len(data) and data[i]",
                    nearest="list(data), where that fits in memory",
                )
            if not len(data):
                raise Unsupported(f"{self._told} without {part} items", supported="1 or more")
        regression = objective == "regression"
        self.metric = metric or ("squared error" if regression else "accuracy")
        self.higher_is_better = not regression if higher_is_better is None else higher_is_better
        self.chance, self.solved, self.grid = chance, solved, grid
        self.vocab_size, self.memory_vocab_size, self.num_classes = vocab_size, memory_vocab_size, num_classes

        first = self._item("training", training, 0)
        self.length = first["inputs"].shape[0] if length is None else length
        self.features = self._width(first, "inputs", vocab_size)
        if self.pattern.cross:
            if "memory" not in first:
                raise Unsupported(
                    f"{self._told} of pattern {self.pattern} without a memory", supported="items with one"
                )
            self.memory_length = first["memory"].shape[0] if memory_length is None else memory_length
            self.memory_features = self._width(first, "memory", memory_vocab_size)
        if regression:
            self.num_targets = first["targets"].shape[-1]
        self._scored = spread(len(held_out), evaluation_items or len(held_out))
        for part, data in (("training", training), ("held-out", held_out)):
            self._fit(part, 0, self._item(part, data, 0))

    def describe(self) -> str:
        first = self._item("training", self._training, 0)
        shapes = ", ".join(f"{name} {tuple(x.shape)} {str(x.dtype)[6:]}" for name, x in first.items())
        chance = "" if self.chance is None else f"; chance {self.chance:.3f}"
        return "\n".join(
            [
                f"{self.name}: {type(self._training).__name__}, {self.length} tokens, {self.objective}",
                f"training: {counted(len(self._training), 'item')}; held out: {counted(len(self._held_out), 'item')}, "
                f"{len(self._scored):,} of them scored in {self.metric}{chance}",
                "split: as the data sets come",
                f"sample: {shapes}",
            ]
        )

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        chosen = in_epochs(np.arange(len(self._training)), step, seed, batch_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(counter_generator(seed, step).integers(1 << 62)))
            return self._batch("training", self._training, chosen)

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        for rows in in_batches(len(self._scored), batch_size):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(rows.start)
                batch = self._batch("held-out", self._held_out, self._scored[rows])
            yield batch

    def score(self, logits: Float[Tensor, "b *n c"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        if self._score is not None:
            return self._score(logits, batch)
        if self.objective == "regression":
            return self.loss(logits.double(), batch)
        return super().score(logits, batch)

    def _item(self, part: str, data: Any, i: int) -> dict[str, Tensor]:
        """The tensors of an item, by name."""
        given = data[i]
        if not isinstance(given, Mapping):
            if not isinstance(given, tuple | list) or len(given) != 2:
                raise Unsupported(
                    f"{self._told} whose {part} item {i} is of type {type(given).__name__}",
                    supported="(inputs, targets), or a mapping with the names of regard.tasks.Batch",
                )
            given = {"inputs": given[0], "targets": given[1]}
        known = [f.name for f in fields(Batch) if f.name not in ("grid", "class_shares")]
        if odd := [str(name) for name in given if name not in known]:
            raise Unsupported(f"{self._told} whose {part} item {i} has {odd[0]!r}", supported=", ".join(known))
        if missing := [name for name in ("inputs", "targets") if given.get(name) is None]:
            raise Unsupported(f"{self._told} whose {part} item {i} has no {missing[0]}", supported="both")
        item = {}
        for name, value in given.items():
            if value is None:
                continue
            try:
                x = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise Unsupported(
                    f"{self._told} whose {part} item {i} has {name} of type {type(value).__name__} ({error})",
                    supported="tensors, arrays or numbers",
                ) from None
            if name.endswith("valid"):
                item[name] = x.bool()
            else:
                regression = name == "targets" and self.objective == "regression"
                features = name in ("inputs", "memory") and x.ndim == 2
                item[name] = x.float() if x.dtype.is_floating_point or regression or features else x.long()
        if self.objective == "regression" and item["targets"].ndim == 1:
            item["targets"] = item["targets"][:, None]
        return item

    def _width(self, item: dict[str, Tensor], name: str, vocab_size: int | None) -> int | None:
        x, option = item[name], "vocab_size" if name == "inputs" else "memory_vocab_size"
        tokens = not x.dtype.is_floating_point
        if tokens != (vocab_size is not None) or x.ndim != (1 if tokens else 2):
            raise Unsupported(
                f"{self._told} with {option}={vocab_size} and {name} of shape {tuple(x.shape)}, {str(x.dtype)[6:]}",
                supported=f"integers (n,) with {option}, or numbers (n, features) without",
                nearest=f"{option}={int(x.max()) + 1} or more" if tokens and vocab_size is None and x.numel() else "",
            )
        return None if tokens else x.shape[1]

    def _fit(self, part: str, i: int, item: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pad an item to the task's lengths; raises Unsupported if it does not fit."""
        told = f"{self._told} whose {part} item {i} has"
        one_target = self.objective == "classification"
        expected: dict[str, tuple[int | None, ...]] = {
            "inputs": (None,) if self.features is None else (None, self.features),
            "targets": () if one_target else (None, self.num_targets) if self.objective == "regression" else (None,),
            "valid": (None,),
            "memory": (None,) if self.memory_features is None else (None, self.memory_features),
            "memory_valid": (None,),
        }
        counts = {"length": item["inputs"].shape[0]}
        if self.pattern.cross:
            if "memory" not in item:
                raise Unsupported(f"{told} no memory", supported=f"one, for the pattern {self.pattern}")
            counts["memory_length"] = item["memory"].shape[0]
        padded = {}
        for name, x in item.items():
            axis = _LENGTH_OF[name]
            if axis not in counts:
                raise Unsupported(f"{told} a {name} in the pattern {self.pattern}", supported="cross patterns")
            shape = tuple(counts[axis] if size is None else size for size in expected[name])
            if tuple(x.shape) != shape:
                raise Unsupported(f"{told} {name} of shape {tuple(x.shape)}", supported=f"{shape}")
            most = getattr(self, axis)
            if shape and shape[0] > most:
                raise Unsupported(f"{told} {name} of length {shape[0]}", supported=f"{axis} up to {most}")
            tokens = {"inputs": self.vocab_size, "memory": self.memory_vocab_size}.get(name)
            classes = {"classification": self.num_classes, "next-token": self.vocab_size}.get(self.objective)
            limit = tokens if name != "targets" else classes
            allowed = x if name != "targets" or one_target else x[x != IGNORED]
            if limit is not None and allowed.numel() and not 0 <= int(allowed.min()) <= int(allowed.max()) < limit:
                raise Unsupported(
                    f"{told} {name} from {int(allowed.min())} to {int(allowed.max())}", supported=f"0 to {limit - 1}"
                )
            fill = (IGNORED if x.dtype == torch.long else torch.nan) if name == "targets" else 0
            if shape and shape[0] < most:
                x = torch.cat([x, x.new_full((most - shape[0], *shape[1:]), fill)])
            padded[name] = x
        for axis, name in (("length", "valid"), ("memory_length", "memory_valid")):
            if axis in counts and name not in padded:
                padded[name] = torch.arange(getattr(self, axis)) < counts[axis]
        return padded

    def _batch(self, part: str, data: Any, chosen: np.ndarray) -> Batch:
        items = [self._fit(part, i, self._item(part, data, i)) for i in chosen.tolist()]
        stacked: dict[str, Any] = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        for name in ("valid", "memory_valid"):
            if name in stacked and bool(stacked[name].all()):
                stacked[name] = None
        return Batch(**stacked, grid=self.grid)
