"""What the stages of a retrofit need from a model of any kind."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.contract import Pattern, Unsupported, an_instance
from regard.integrations.collecting import collect_losses
from regard.integrations.swap import mechanism_in, reader_of, swap
from regard.models.evaluating import evaluation_mode
from regard.retrofit.settings import AUTO, RECALL, RetrofitSettings, as_papers_begin, check_mechanism

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from regard.integrations.heads import HeadAttention

SAME, EQUAL = 1e-3, 1e-5
"""Largest differences of answers, as a share of the largest answer: between a model and its copy with regard's softmax,
and between equal models with rounding errors."""


@dataclass(frozen=True)
class Layer:
    """An attention module of a model: its number in order, and its path."""

    number: int
    path: str


@dataclass(frozen=True)
class Batch:
    """A batch of inputs for a model.

    Attributes:
        inputs: tokens or images, one per row.
        targets: the right answers, if known: token ids (b, n), or classes (b,); -100 for positions
            to ignore.
    """

    inputs: Tensor
    targets: Int[Tensor, "b ..."] | None = None

    def split(self, size: int) -> list[Batch]:
        """Split into batches of at most `size` rows."""
        parts = self.inputs.split(size)
        answers = [None] * len(parts) if self.targets is None else self.targets.split(size)
        return [Batch(*part) for part in zip(parts, answers, strict=True)]


@dataclass(frozen=True)
class Host(ABC):
    """A model in evaluation mode and without gradients, with its properties.

    Attributes:
        model: the original.
        name: name for the report.
        layers: its attention modules, in order.
        tokenizer: a tokenizer of transformers; None if there is none.
        kind: kind of model, which determines how it is measured.
        pattern: pattern of its attention.
        counts: the unit in which training steps are counted, in words.
        rows: rows to process at once; 1 if the answers of a row are large, None for all.
        evaluated: passes over data of the usual size that the evaluation makes for each block (or batch) of a source.
        recalls: whether it can be asked for what is hidden in its context.
    """

    model: Any
    name: str
    layers: tuple[Layer, ...]
    tokenizer: Any = None

    kind: ClassVar[str]
    pattern: ClassVar[Pattern]
    counts: ClassVar[str] = "tokens"
    rows: ClassVar[int | None] = 1
    evaluated: ClassVar[int] = 2
    recalls: ClassVar[bool] = False

    @property
    @abstractmethod
    def distributes(self) -> bool:
        """Whether its answers are log-probabilities; otherwise hidden states are compared."""

    @property
    def unit(self) -> str:
        """Unit of the distance between answers, in words."""
        return "of the outputs' square"

    @abstractmethod
    def settled(self, settings: RetrofitSettings) -> RetrofitSettings:
        """Fill in the settings that are None with the defaults for the model.

        Raises:
            Unsupported: for settings that do not apply to the model, or for which it is too small.
        """

    @abstractmethod
    def read(self, data: Any, validation: Any, settings: RetrofitSettings) -> Any:
        """Read the user's data, with `name`, `other_name`, `size` and a `digest()`."""

    @abstractmethod
    def batch(self, data: Any, step: int, seed: int, settings: RetrofitSettings, rows: int | None = None) -> Batch:
        """The batch of a training step, with that many rows, determined by the arguments alone."""

    @abstractmethod
    def held_out(self, data: Any, most: int, settings: RetrofitSettings) -> Batch:
        """At most `most` rows (or batches of images) that are not trained on."""

    @abstractmethod
    def answers(self, model: Any, batch: Batch) -> Float[Tensor, "m v"]:
        """A model's answers for a batch: log-probabilities, or hidden states."""

    @abstractmethod
    def own_loss(self, found: Float[Tensor, "m v"], batch: Batch) -> Tensor:
        """The distance of answers from the right ones, without a teacher."""

    @abstractmethod
    def body(self, inputs: Tensor) -> None:
        """Run all layers of the original."""

    @abstractmethod
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model and its files to a folder."""

    @abstractmethod
    def load(self, folder: str | os.PathLike[str]) -> Any:
        """Load a model that :meth:`save` has written."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash the model's settings and weights to twelve hexadecimal digits."""

    @abstractmethod
    def heads(self, number: int) -> tuple[int, int, int, int]:
        """The number of heads and key/value heads of a layer's attention, and the widths of a key and of a value."""

    @abstractmethod
    def timed(self, settings: RetrofitSettings) -> float:
        """The amount of data read for timing and the like, in blocks or batches of the usual size."""

    def probed(self, settings: RetrofitSettings) -> float:
        """The amount of data in one text of each length and probe, as both models read it, likewise; 0 without probes."""
        return 0.0

    @abstractmethod
    def reads(self, settings: RetrofitSettings) -> int:
        """Tokens of a row."""

    def reads_at_most(self, settings: RetrofitSettings) -> int:
        """Tokens of the longest row that training or the evaluation may read, whatever the data are."""
        return self.reads(settings)

    def work(self, settings: RetrofitSettings) -> int:
        """Tokens (or other units, see :attr:`counts`) of a training step."""
        return settings.rows * self.reads(settings)

    def knows_answers(self, data: Any) -> bool:
        """Whether :meth:`own_loss` can judge answers for the data."""
        return self.distributes

    def distance(self, found: Float[Tensor, "m v"], expected: Float[Tensor, "m v"]) -> Tensor:
        """Distance of answers from the original's: KL(original, found) in nats, or the relative squared difference."""
        if self.distributes:
            return F.kl_div(found, expected, reduction="sum", log_target=True) / len(expected)
        return (found - expected).square().sum() / expected.square().sum().clamp(min=1e-30)

    def parts(self, batch: Batch) -> list[Batch]:
        """Split a batch into parts of as many rows as :attr:`rows` says."""
        return batch.split(self.rows or len(batch.inputs))

    def attention(self, number: int) -> nn.Module:
        """The attention module of a layer."""
        return self.model.get_submodule(self.layers[number].path)

    def placed(self, model: Any, number: int) -> HeadAttention | None:
        """The mechanism in a layer of a model; None if the layer has its own attention."""
        return mechanism_in(model.get_submodule(self.layers[number].path))

    @cached_property
    def by_regard(self) -> Any:
        """The original with regard's own softmax attention: the same answers, on the same weights, with regard's timing,
        and attention weights for those who collect them."""
        return self.on_same_weights(dict.fromkeys(range(len(self.layers)), "softmax"))

    def on_same_weights(self, mechanisms: Mapping[int, str]) -> Any:
        """A copy with other mechanisms in layers, by number, that has the weights of the original and not copies of them."""
        shared = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        made = copy.deepcopy(self.model, shared)
        swap(made, {self.layers[number].path: mechanism for number, mechanism in mechanisms.items()})
        return made.eval()

    def kind_of_layer(self, number: int) -> Hashable:
        """What sets a layer apart from others but its weights and its place: the classes and plain settings of its
        attention module and of the block around it, such as a window."""
        path = self.layers[number].path
        around = self.model.get_submodule(path.rpartition(".")[0])
        return tuple(
            (type(part), *sorted((name, repr(its)) for name, its in vars(part).items() if _is_setting(name, its)))
            for part in (self.model.get_submodule(path), around)
        )

    def with_model(self, model: Any) -> Self:
        """The same host with another model."""
        return replace(self, model=model)

    def extended(self, positions: int | None) -> Self:
        """The host of the model with a table of so many learned positions; itself when None."""
        if positions is None:
            return self
        raise Unsupported(
            f"positions={positions} of {an_instance(self.model)}", supported="models of text with learned positions"
        )

    def begun(self, settings: RetrofitSettings) -> RetrofitSettings:
        """The settings with the options that the mechanism's card has for trained models.

        Raises:
            Unsupported: for a mechanism without the model's pattern, layers that do not exist, and settings that
                :meth:`settled` refuses.
        """
        check_mechanism(settings.mechanism, self.pattern)
        settings.kept(len(self.layers))
        if settings.by_recall and not self.recalls:
            raise Unsupported(
                f"keep_layers={settings.keep_layers!r} of {an_instance(self.model)}, which predicts no next tokens",
                supported="the choice by recall in causal language models",
                nearest=f"keep_layers={settings.spelled_keep().replace(RECALL, AUTO)!r}",
            )
        settings = self.settled(settings)
        return replace(settings, mechanism=self.begin(settings, self.reads_at_most(settings)))

    def begin(self, settings: RetrofitSettings, longest: int = 0) -> str:
        """The mechanism with the options that its card has for the model; see
        :func:`regard.retrofit.settings.as_papers_begin`."""
        return as_papers_begin(settings.mechanism, self.reads(settings), self.heads(0)[0], self.pattern, longest)

    def copy_with(self, numbers: Sequence[int], mechanism: str | Mapping[int, str], seed: int) -> tuple[Any, list[str]]:
        """A copy with another mechanism in some layers, the same or by their numbers, and the names of the parameters that
        `seed` initialises."""
        each = dict.fromkeys(numbers, mechanism) if isinstance(mechanism, str) else mechanism
        made = copy.deepcopy(self.model).requires_grad_(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            report = swap(made, {self.layers[number].path: each[number] for number in numbers})
        return made.eval(), report.learned

    @contextmanager
    def with_attention(self, modules: Mapping[int, nn.Module]) -> Iterator[None]:
        """Within the context, the model's layers have the given attention modules."""
        own = {number: self.attention(number) for number in modules}
        try:
            for number, module in modules.items():
                self.model.set_submodule(self.layers[number].path, module)
            yield
        finally:
            for number, module in own.items():
                self.model.set_submodule(self.layers[number].path, module)

    @torch.no_grad()
    def check(self, batch: Batch, mechanism: str, numbers: Sequence[int]) -> float:
        """Relative distance of the answers from the original's if layers are new and untrained.

        Args:
            batch: a row of the training data, or a few.
            numbers: numbers of the new layers.

        Raises:
            Unsupported: if the model's attention is not one that the mechanism can learn to replace.
        """
        with evaluation_mode(self.model):
            self._check_calls(batch)
            expected = self.answers(self.model, batch)
            made, _ = self.copy_with(range(len(self.layers)), "softmax", 0)
            difference = apart(self.answers(made, batch), expected)
            if not difference <= SAME:
                raise Unsupported(
                    f"{an_instance(self.model)} whose attention is not softmax of its queries and keys (with it the "
                    f"answers differ by {difference:.2g} of the largest)",
                    supported="models that regard.swap(model, 'softmax') leaves as they are",
                )
            return self.check_answers(batch, expected, mechanism, numbers)

    def check_answers(self, batch: Batch, expected: Tensor, mechanism: str, numbers: Sequence[int]) -> float:
        """See :meth:`check`.

        Args:
            expected: the original's answers for the batch.

        Raises:
            Unsupported: if the mechanism cannot be used, as with masks that it does not support.
        """
        made, _ = self.copy_with(numbers, mechanism, 0)
        difference = apart(self.answers(made, batch), expected)
        self.check_training(made, batch)
        return difference

    def check_training(self, made: Any, batch: Batch) -> None:
        """Call a model with new layers once as training does.

        Raises:
            Unsupported: if a mechanism cannot be trained so.
        """
        with torch.random.fork_rng(devices=[]), collect_losses(made, progress=0):
            self.answers(made.train(), batch)
        made.eval()

    @abstractmethod
    def check_longest(self, data: Any, settings: RetrofitSettings, numbers: Sequence[int]) -> float:
        """Check that new layers can read what the evaluation reads, which may be longer than a row of the training.

        Returns:
            Relative distance of the outputs there from the original's; 0 if nothing is longer.

        Raises:
            Unsupported: if they cannot, as beyond the window of the old ones.
        """

    def _check_calls(self, batch: Batch) -> None:
        calls = dict.fromkeys(range(len(self.layers)), 0)

        def count(number: int) -> Any:
            def counted(*_: Any) -> None:
                calls[number] += 1

            return counted

        hooks = [self.attention(n).register_forward_hook(count(n)) for n in calls]
        try:
            self.body(batch.inputs)
        finally:
            for hook in hooks:
                hook.remove()
        for number, times in calls.items():
            if times != 1:
                raise Unsupported(
                    f"a retrofit of {an_instance(self.model)}, which calls {self.layers[number].path} {times} times",
                    supported="layers with weights of their own, each called once",
                )


def _is_setting(name: str, value: Any) -> bool:
    """Whether an attribute of a module is a plain setting, and not the module's place among others."""
    return value is None or (isinstance(value, (bool, int, float, str)) and not name.endswith(("idx", "index")))


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


def layers_of(model: nn.Module, what: str, supported: str) -> tuple[Layer, ...]:
    """The attention modules of a model.

    Raises:
        Unsupported: if none is recognised, or their weights are shared or not in floating point.
    """
    paths = [path for path, module in model.named_modules() if reader_of(module) is not None]
    if not paths:
        raise Unsupported(f"{what}, which has no attention modules that are known", supported=supported)
    layers = tuple(Layer(number, path) for number, path in enumerate(paths))
    _check_shared(model, layers)
    return layers


def _check_shared(model: Any, layers: Sequence[Layer]) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for layer in layers:
        for name, parameter in model.get_submodule(layer.path).named_parameters():
            if len(names[id(parameter)]) > 1:
                raise Unsupported(
                    f"a retrofit of layers with shared weights ({' = '.join(names[id(parameter)])})",
                    supported="layers with weights of their own",
                )
            if not parameter.is_floating_point():
                raise Unsupported(
                    f"a retrofit of {layer.path}.{name} in {parameter.dtype}", supported="weights in floating point"
                )


__all__ = ["Batch", "Host", "Layer", "apart", "layers_of"]
