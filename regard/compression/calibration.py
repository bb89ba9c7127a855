"""Statistics of the inputs of linear layers, streamed over calibration data, one group of layers at a time.

A *group* is the linear layers of one block of a model; a *stage* is the layers of a group that read the same tensor,
such as the query, key and value projections. Both come in execution order, and each sees the calibration data as
transformed by the layers before it in their quantized form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.compression.layers import Run
from regard.contract import Unsupported

if TYPE_CHECKING:
    from jaxtyping import Float

NUMBERED = re.compile(r"^(.*?\.?\d+)(\.|$)")
"""The name of a layer's block: everything up to the first number in the layer's name."""

MOST_STAGES = 8
"""The most stages per block: each stage costs a run of the data through part of the model."""


@dataclass
class Statistics:
    """Statistics of a layer's inputs.

    Attributes:
        rows: tokens seen.
        largest: max |x_j| of each column.
        total: sum of |x_j|.
        squares: sum of x_j^2.
        second: sum of x x^T, where it is requested.
    """

    columns: int
    wants_second: bool
    rows: int = 0
    largest: Float[Tensor, " k"] = field(init=False)
    total: Float[Tensor, " k"] = field(init=False)
    squares: Float[Tensor, " k"] = field(init=False)
    second: Float[Tensor, "k k"] | None = field(init=False)

    def __post_init__(self) -> None:
        self.largest = torch.zeros(self.columns)
        self.total, self.squares = (torch.zeros(self.columns, dtype=torch.float64) for _ in range(2))
        self.second = torch.zeros(self.columns, self.columns) if self.wants_second else None

    def update(self, x: Float[Tensor, "*b k"]) -> None:
        """Add a batch of input rows."""
        rows = x.detach().reshape(-1, self.columns).float()
        if not len(rows):
            return
        self.rows += len(rows)
        sizes = rows.abs()
        self.largest = torch.maximum(self.largest, sizes.amax(0))
        self.total += sizes.sum(0)
        self.squares += rows.square().sum(0)
        if self.second is not None:
            self.second.addmm_(rows.T, rows)

    @property
    def mean(self) -> Float[Tensor, " k"]:
        """Mean |x_j|."""
        return (self.total / max(self.rows, 1)).float()


class _Stop(Exception):
    """Raised once all the watched layers have run."""


@dataclass
class Chain:
    """The groups of a model's layers, and the means to run the data up to each group.

    Attributes:
        groups: names of layers by block and stage, in the order in which they run.
        blocks: the modules that the model runs one after another, each feeding the next; empty if the model is not such
            a chain, and then the whole model runs again for each group.
        calls: how often each layer runs for the first batch.
    """

    model: nn.Module
    batches: Sequence[Any]
    run: Run
    groups: list[tuple[str, list[list[str]]]]
    blocks: list[nn.Module]
    calls: Mapping[str, int]
    _outputs: list[Any] = field(default_factory=list)
    _reached: int = -1

    @classmethod
    def of(cls, model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Any], run: Run) -> Chain:
        """Build the chain of a model by running the first batch.

        Raises:
            Unsupported: without a batch, or where no layer runs.
        """
        if not batches:
            raise Unsupported("calibration without data", supported="a batch or more", nearest="data=[...]")
        given: dict[str, list[int]] = {}
        latest: list[Tensor] = []
        number = 0

        def note(module: nn.Module, args: tuple[Any, ...], name: str) -> None:
            nonlocal number
            if not latest or args[0] is not latest[0]:
                latest[:], number = [args[0]], number + 1
            given.setdefault(name, []).append(number)

        with ExitStack() as hooks, torch.no_grad():
            for name, module in layers.items():
                hooks.callback(module.register_forward_pre_hook(partial(note, name=name)).remove)
            run(model, batches[0])
        if not given:
            raise Unsupported("calibration data that reaches no linear layer", supported="data that the model reads")
        groups: dict[str, dict[tuple[int, ...], list[str]]] = {}
        for name, tensors in given.items():
            found = NUMBERED.match(name)
            groups.setdefault(found[1] if found else name, {}).setdefault(tuple(tensors), []).append(name)
        stages = [(block, _few(list(own.values()))) for block, own in groups.items()]
        calls = {name: len(tensors) for name, tensors in given.items()}
        return cls(model, batches, run, stages, _blocks(model, list(groups), batches[0], run), calls)

    def statistics(
        self, group: int, stage: int, layers: Mapping[str, nn.Linear], *, second: bool
    ) -> dict[str, Statistics]:
        """Statistics of the layers of a stage; groups must be requested in order."""
        names = self.groups[group][1][stage]
        found = {name: Statistics(layers[name].in_features, second) for name in names}
        with ExitStack() as hooks:
            for name in names:
                hooks.callback(layers[name].register_forward_pre_hook(partial(_count, found[name])).remove)
            for i, batch in enumerate(self.batches):
                with self._after(i), _stopping_after(self.model, {name: self.calls[name] for name in names}):
                    _until_stopped(self.run, self.model, batch)
        return found

    def finish(self, group: int) -> None:
        """Store a group's outputs as inputs of the next group, once the group is quantized."""
        if not self.blocks or group + 1 == len(self.groups):
            return
        outputs: list[Any] = []
        for i, batch in enumerate(self.batches):
            with self._after(i), _recording(self.blocks[group], outputs):
                _until_stopped(self.run, self.model, batch)
        self._outputs, self._reached = outputs, group

    @contextmanager
    def _after(self, batch: int) -> Iterator[None]:
        """Make the finished blocks return the stored output of the last of them for a batch."""
        with ExitStack() as changes, torch.no_grad():
            for block in self.blocks[: self._reached + 1]:
                changes.enter_context(_replaced(block, lambda *_, **__: self._outputs[batch]))
            yield


def _few(stages: list[list[str]]) -> list[list[str]]:
    """Return the stages, or all layers as one stage if there are too many, as with parallel experts."""
    return stages if len(stages) <= MOST_STAGES else [[name for stage in stages for name in stage]]


def all_statistics(
    model: nn.Module, layers: Mapping[str, nn.Linear], batches: Sequence[Any], run: Run, *, second: bool
) -> dict[str, Statistics]:
    """Statistics of all layers of a model as it is, in one pass; layers that no batch reaches have none."""
    if not batches:
        raise Unsupported("calibration without data", supported="a batch or more", nearest="data=[...]")
    found = {name: Statistics(module.in_features, second) for name, module in layers.items()}
    with ExitStack() as hooks, torch.no_grad():
        for name, module in layers.items():
            hooks.callback(module.register_forward_pre_hook(partial(_count, found[name])).remove)
        for batch in batches:
            run(model, batch)
    return {name: one for name, one in found.items() if one.rows}


def _count(statistics: Statistics, module: nn.Module, given: tuple[Any, ...]) -> None:
    statistics.update(given[0])


def _blocks(model: nn.Module, names: list[str], batch: Any, run: Run) -> list[nn.Module]:
    """The groups' modules, if each runs once, in order, and all outputs have one shape and dtype; else none."""
    modules = dict(model.named_modules())
    blocks = [modules[name] for name in names]
    if any(isinstance(block, nn.Linear) for block in blocks):
        blocks = blocks[: next(i for i, block in enumerate(blocks) if isinstance(block, nn.Linear))]
    if len({type(block) for block in blocks}) != 1 or len(blocks) != len(names):
        return []
    calls: list[tuple[nn.Module, Any]] = []
    with ExitStack() as hooks, torch.no_grad():
        for block in blocks:
            hooks.callback(block.register_forward_hook(lambda block, _, out: calls.append((block, _form(out)))).remove)
        run(model, batch)
    once = [block for block, _ in calls] == blocks
    return blocks if once and all(form == calls[0][1] is not None for _, form in calls) else []


def _form(output: Any) -> Any:
    """The shape and dtype of a block's output, which must agree between blocks; None if it is not a tensor."""
    output = getattr(output, "output", output)
    return (output.shape, output.dtype) if isinstance(output, Tensor) else None


@contextmanager
def _replaced(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(block).get("forward")
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if before is not None:
            block.forward = before


@contextmanager
def _recording(block: nn.Module, outputs: list[Any]) -> Iterator[None]:
    def stop(module: nn.Module, given: Any, output: Any) -> None:
        outputs.append(output)
        raise _Stop

    handle = block.register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _stopping_after(model: nn.Module, calls: Mapping[str, int]) -> Iterator[None]:
    left = sum(calls.values())

    def stop(module: nn.Module, given: Any, output: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise _Stop

    with ExitStack() as hooks:
        for name in calls:
            hooks.callback(model.get_submodule(name).register_forward_hook(stop).remove)
        yield


def _until_stopped(run: Run, model: nn.Module, batch: Any) -> None:
    try:
        run(model, batch)
    except _Stop:
        return
