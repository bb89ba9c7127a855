"""What layers are given: statistics of their inputs, streamed over calibration data, one group of layers after another.

A *group* is the linear layers of one block of a model. Groups come in the order in which they run, and where that is asked for
each sees the data through the groups before it as they are by then: quantized.
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
"""A block's name: up to the first number in the name of a layer."""


@dataclass
class Statistics:
    """Statistics of a layer's inputs.

    Attributes:
        rows: tokens seen.
        largest: max |x_j| of each column.
        total: sum of |x_j|.
        squares: sum of x_j^2.
        second: sum of x x^T, where it is asked for.
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
        """Count some rows."""
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
    """The layers that are watched have run."""


@dataclass
class Chain:
    """The groups of a model's layers, and how to run the data up to one of them.

    Attributes:
        groups: names of layers by block, in the order in which they run.
        blocks: the modules that the model runs one after another, each giving the next its inputs; empty where that is not
            so, and everything runs again for each group.
    """

    model: nn.Module
    batches: Sequence[Any]
    run: Run
    groups: list[tuple[str, list[str]]]
    blocks: list[nn.Module]
    _outputs: list[Any] = field(default_factory=list)
    _reached: int = -1

    @classmethod
    def of(cls, model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Any], run: Run) -> Chain:
        """The chain of a model, found by running the first batch.

        Raises:
            Unsupported: without a batch, or where no layer runs.
        """
        if not batches:
            raise Unsupported("calibration without data", supported="a batch or more", nearest="data=[...]")
        order: list[str] = []
        with ExitStack() as hooks, torch.no_grad():
            for name, module in layers.items():
                hooks.callback(module.register_forward_pre_hook(lambda *_, name=name: order.append(name)).remove)
            run(model, batches[0])
        groups: dict[str, list[str]] = {}
        for name in dict.fromkeys(order):
            found = NUMBERED.match(name)
            groups.setdefault(found[1] if found else name, []).append(name)
        if not groups:
            raise Unsupported("calibration data that no linear layer is given", supported="data that the model reads")
        return cls(model, batches, run, list(groups.items()), _blocks(model, list(groups), batches[0], run))

    def statistics(self, group: int, layers: Mapping[str, nn.Module], *, second: bool) -> dict[str, Statistics]:
        """Statistics of a group's layers; groups may be asked for in order, each once."""
        names = self.groups[group][1]
        found = {name: Statistics(layers[name].in_features, second) for name in names}  # type: ignore[arg-type]
        with ExitStack() as hooks:
            for name in names:
                hooks.callback(layers[name].register_forward_pre_hook(partial(_count, found[name])).remove)
            self._advance(group)
        return found

    def finish(self, group: int) -> None:
        """Keep what a group gives to the next, once it is quantized."""
        if self.blocks and group + 1 < len(self.groups):
            self._outputs, self._reached = self._advance(group), group

    def _advance(self, group: int) -> list[Any]:
        """Run all batches through a group; what its block returned, where there are blocks."""
        if not self.blocks:
            last = self.groups[group][1]
            for batch in self.batches:
                with _stopping_after(self.model, last), torch.no_grad():
                    _until_stopped(self.run, self.model, batch)
            return []
        outputs: list[Any] = []
        for i, batch in enumerate(self.batches):
            with ExitStack() as changes:
                for block in self.blocks[: self._reached + 1]:
                    changes.enter_context(_replaced(block, lambda *_, i=i, **__: self._outputs[i]))
                changes.enter_context(_recording(self.blocks[group], outputs))
                with torch.no_grad():
                    _until_stopped(self.run, self.model, batch)
        return outputs


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
    """The modules of these groups, where each runs once, in order, and all return what has the same form."""
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
    """What of a block's output has to be alike; None for what is not a tensor."""
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
def _stopping_after(model: nn.Module, names: list[str]) -> Iterator[None]:
    left = set(names)

    def stop(module: nn.Module, given: Any, output: Any, name: str) -> None:
        left.discard(name)
        if not left:
            raise _Stop

    with ExitStack() as hooks:
        for name in names:
            hooks.callback(model.get_submodule(name).register_forward_hook(partial(stop, name=name)).remove)
        yield


def _until_stopped(run: Run, model: nn.Module, batch: Any) -> None:
    try:
        run(model, batch)
    except _Stop:
        return
