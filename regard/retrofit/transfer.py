"""Attention transfer: each new layer learns the output of the old one on the user's data.

The teacher runs once per batch; after each of its attention modules, the new one answers the same call, learns from
the difference, and both outputs are discarded: nothing is stored, and layers are independent. A mechanism with a loss
from a teacher's attention (sea) learns from the weights and heads of that module too, which is called once more for
them; they are discarded with the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.precision import mixed, wide, without_autocast
from regard.integrations.collecting import collect_losses
from regard.integrations.swap import mechanism_in
from regard.models.evaluating import evaluation_mode
from regard.retrofit.best import Best
from regard.retrofit.folder import Folder
from regard.retrofit.hosts import Host
from regard.retrofit.settings import RetrofitSettings
from regard.retrofit.stage import Stage, Watch, train_stage
from regard.retrofit.teaching import learns_from_attention, original_attention

LOSS_WEIGHTS = {"distillation": 1.0}
"""Weights of auxiliary losses: sea's ``distillation`` from the teacher's attention; other losses have the weight of regard's models."""
SMALLEST_SHARE = 0.1
"""The least initial size of an output, as a share of the size that it should have."""

Heard = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], None]
"""Callback that takes a layer's number, its output, and the arguments that it was called with."""


def transfer(
    host: Host,
    modules: Mapping[int, nn.Module],
    learned: Sequence[str],
    data: Any,
    settings: RetrofitSettings,
    stage: Stage,
    folder: Folder,
    watch: Watch,
    best: Best | None = None,
) -> list[list[float]]:
    """Train new attention modules, independently, on the outputs of the teacher's.

    Args:
        modules: modules of a copy of the teacher, by layer number.
        learned: names of the new parameters in the copy.
        best: keeps the modules' best weights on held-out data, which they end with.

    Returns:
        For each step the loss of each module: its squared distance from the teacher's output, relative to that output's
        square.
    """
    together = nn.ModuleDict({str(number): module for number, module in modules.items()})
    names = [f"{n}.{name}" for n, module in modules.items() for name in _new_in(module, host.layers[n].path, learned)]
    if not folder.checkpoint(stage.name).exists() and stage.steps:
        begin_at_scale(host, modules, host.batch(data, 0, settings.seed, settings, rows=1).inputs)

    def step(number: int) -> list[float]:
        inputs = host.batch(data, number, stage.seed, settings).inputs
        return transfer_losses(host, modules, inputs, stage.before + number, precision=settings.precision)

    parts = list(modules.values())
    together.train()  # mechanisms compute their auxiliary losses in training mode
    try:
        with _without_dropout(together):
            return train_stage(stage, folder, together, names, step, watch, clipped=parts, best=best)
    finally:
        together.eval()


def held_out_losses(host: Host, modules: Mapping[int, nn.Module], inputs: Sequence[Tensor]) -> list[float]:
    """The mean loss of each module, in evaluation mode, over some inputs."""
    losses: dict[int, list[float]] = {number: [] for number in modules}

    def compare(number: int, expected: Tensor, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        losses[number].append(_distance(_first(modules[number](*args, **given)), expected).item())

    together = nn.ModuleList(modules.values())
    with torch.no_grad(), evaluation_mode(together), _listening(host, modules, compare):
        for each in inputs:
            host.body(each)
    return [math.fsum(found) / len(found) for found in losses.values()]


def _distance(found: Tensor, expected: Tensor) -> Tensor:
    """The squared difference, relative to the square of the expected output."""
    found, expected = wide(found), wide(expected)
    return (found - expected).square().sum() / expected.square().sum().clamp(min=1e-30)


def transfer_losses(
    host: Host, modules: Mapping[int, nn.Module], inputs: Tensor, progress: int = 0, *, precision: str = "float32"
) -> list[float]:
    """The loss of each module on some inputs, without the mechanisms' auxiliary losses; leaves the gradients of both in
    their parameters.

    Args:
        progress: number of the training step, for mechanisms with a schedule.
        precision: that of the settings.
    """
    losses: dict[int, float] = {}
    originals = {n: original_attention(host, n) for n, module in modules.items() if learns_from_attention(module)}

    def learn(number: int, expected: Tensor, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        module = modules[number]
        teachers = {"": originals[number](args, given)} if number in originals else None
        with torch.enable_grad(), collect_losses(module, teachers=teachers, progress=progress) as collected:
            found = _first(module(*args, **given))
            loss = _distance(found, expected)
            with without_autocast(inputs.device):
                (loss + collected.total(LOSS_WEIGHTS)).backward()
        losses[number] = loss.item()

    with _listening(host, modules, learn), mixed(precision, inputs.device):
        host.body(inputs)
    return [losses[number] for number in modules]


@torch.no_grad()
def begin_at_scale(host: Host, modules: Mapping[int, nn.Module], inputs: Tensor) -> None:
    """Rescale the output projection of each new module so that its outputs come nearest to the teacher's; or the value
    projection if the module outputs its heads directly, as in BERT.

    Attention without a normaliser sums over tokens, so its initial outputs may be a hundred times too large.
    """

    def rescale(number: int, expected: Tensor, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        called = _Called(modules[number], args, given)
        if called.last is not None:
            parts, shift = [called.last.weight], getattr(called.last, "bias", None)
        elif called.values is not None:
            parts, shift = list(called.values.parameters()), None
        else:
            return
        found = called.output if shift is None else called.output - shift
        expected = expected if shift is None else expected - shift
        size = expected.norm() / found.norm().clamp(min=1e-30)
        nearest = (found * expected).sum() / found.square().sum().clamp(min=1e-30)
        for part in parts:
            part.mul_(torch.maximum(nearest, SMALLEST_SHARE * size))

    with _listening(host, modules, rescale):
        host.body(inputs)


class _Called:
    """The call of an attention module, and the submodules that produced its output and its values.

    Attributes:
        output: output of the module.
        last: the submodule that produced that tensor; None if none did.
        values: the submodule that produced the values of the heads and nothing else.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        made: list[tuple[Any, Tensor]] = []
        heads: list[Tensor] = []
        hooks = [
            part.register_forward_hook(lambda part, _, output: made.append((part, output)))
            for part in module.modules()
            if "weight" in part._parameters
        ]
        attend = mechanism_in(module)
        if attend is not None:
            hooks.append(attend.register_forward_pre_hook(lambda _, called: heads.append(called[2])))
        try:
            self.output = _first(module(*args, **given))
        finally:
            for hook in hooks:
                hook.remove()
        self.last = self._maker(made, self.output)
        self.values = self._maker(made, heads[0]) if heads else None

    @staticmethod
    def _maker(made: list[tuple[Any, Tensor]], of: Tensor) -> Any:
        found = [
            part
            for part, its in made
            if isinstance(its, Tensor) and its.data_ptr() == of.data_ptr() and its.numel() == of.numel()
        ]
        return found[-1] if found else None


def _first(output: Any) -> Tensor:
    """The output of an attention module, without attention weights if it returns those too."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _without_dropout(modules: nn.Module) -> Iterator[None]:
    """Disable dropout within the context: the target is a tensor, not a random sample of it. Attention modules of
    transformers keep the probability as a number."""
    rates = [
        (part, name, value)
        for part in modules.modules()
        for name, value in vars(part).items()
        if isinstance(value, float) and ("dropout" in name or (name == "p" and isinstance(part, nn.Dropout)))
    ]
    try:
        for part, name, _ in rates:
            setattr(part, name, 0.0)
        yield
    finally:
        for part, name, value in rates:
            setattr(part, name, value)


def _new_in(module: nn.Module, path: str, learned: Sequence[str]) -> list[str]:
    return [name for name, _ in module.named_parameters() if f"{path}.{name}" in set(learned)]


@contextmanager
def _listening(host: Host, modules: Mapping[int, nn.Module], heard: Heard) -> Iterator[None]:
    """Within the context, `heard` is called for each of these layers after the teacher's layer has run."""

    def hook(number: int) -> Callable[..., None]:
        def listen(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
            heard(number, _first(output), args, given)

        return listen

    hooks = [host.attention(n).register_forward_hook(hook(n), with_kwargs=True) for n in modules]
    try:
        with torch.no_grad():
            yield
    finally:
        for each in hooks:
            each.remove()
