"""Attention transfer: each new layer learns the output that the old one has on the user's text.

The teacher runs once a batch; where one of its attention modules has answered, the new one answers the same call, learns from
the difference, and both are forgotten: nothing is stored, and no layer knows of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from regard.integrations.collecting import collect_losses
from regard.models.weights import write_atomically
from regard.retrofit.corpus import Corpus, even_blocks
from regard.retrofit.folder import Folder
from regard.retrofit.hosts import Host
from regard.retrofit.settings import RetrofitSettings
from regard.retrofit.stage import Stage, Watch, train_stage

if TYPE_CHECKING:
    from jaxtyping import Float, Int

LOSS_WEIGHTS = {"distillation": 1.0}
"""Of the losses that mechanisms have of their own, as of the map of sea; that of regard's models for others."""
JUDGED = 4
"""Held-out blocks that tell whether a module became better."""
SMALLEST_SHARE = 0.1
"""Of the size that an output should have, the least that it is begun with."""

Heard = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], None]
"""Called with a layer's number, its output, and the call that it answered."""


def transfer(
    host: Host,
    modules: Mapping[int, nn.Module],
    learned: Sequence[str],
    corpus: Corpus,
    settings: RetrofitSettings,
    stage: Stage,
    folder: Folder,
    watch: Watch,
    say: Callable[[str], None] = lambda sentence: None,
) -> list[list[float]]:
    """Train new attention modules, each alone, on the outputs of the teacher's; one whose loss on held-out text did not fall
    is as it began, as where a start is nearly exact and the steps are few.

    Args:
        modules: of a copy of the teacher, by the number of their layer.
        learned: names in the copy of parameters that are new.
        say: told which modules are as they began.

    Returns:
        Of each step the loss of each module: its squared distance from the teacher's output, as a share of that output's
        square.
    """
    together = nn.ModuleDict({str(number): module for number, module in modules.items()})
    names = [f"{n}.{name}" for n, module in modules.items() for name in _new_in(module, host.layers[n].path, learned)]
    if not folder.checkpoint(stage.name).exists() and stage.steps:
        begin_at_scale(host, modules, corpus.blocks(0, settings.seed, 1, settings.length))
    start = folder.checkpoint(f"{stage.name}-start")
    if not start.exists():
        write_atomically(start, lambda file: save_file(_copied(together), file))

    def step(number: int) -> list[float]:
        ids = corpus.blocks(number, stage.seed, settings.batch_size, settings.length)
        return transfer_losses(host, modules, ids)

    parts = list(modules.values())
    together.train()  # what mechanisms learn of themselves, they learn in training
    try:
        curve = train_stage(stage, folder, together, names, step, watch, clipped=parts)
    finally:
        together.eval()
    if not curve:
        return curve
    worse = _keep_better_starts(host, together, load_file(start), even_blocks(corpus.held_out, JUDGED, settings.length))
    if worse:
        say(
            f"{stage.doing}: {len(worse)} of {len(modules)} layers stay as they began, no better on held-out text for it"
        )
    return curve


def _keep_better_starts(
    host: Host, together: nn.ModuleDict, start: Mapping[str, Tensor], blocks: Int[Tensor, "w n"]
) -> list[int]:
    """Give modules their start again whose loss on these blocks is not below its; their numbers."""
    modules = {int(number): module for number, module in together.items()}
    trained = _copied(together)
    after = held_out_losses(host, modules, blocks)
    together.load_state_dict(start)
    before = held_out_losses(host, modules, blocks)
    worse = [number for number in modules if not after[number] < before[number]]
    beginnings = tuple(f"{number}." for number in worse)
    together.load_state_dict({name: start[name] if name.startswith(beginnings) else x for name, x in trained.items()})
    return worse


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone().contiguous() for name, x in module.state_dict().items()}


def held_out_losses(host: Host, modules: Mapping[int, nn.Module], blocks: Int[Tensor, "w n"]) -> dict[int, float]:
    """The loss of each module on blocks of text, the mean over them."""
    losses: dict[int, list[float]] = {number: [] for number in modules}

    def measure(number: int, expected: Tensor, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        losses[number].append(_apart(modules[number](*args, **given)[0], expected).item())

    with _listening(host, modules, measure):
        for block in blocks:
            host.body(block[None])
    return {number: sum(found) / max(len(found), 1) for number, found in losses.items()}


def _apart(found: Tensor, expected: Tensor) -> Tensor:
    """Squared distance as a share of the expected output's square."""
    return (found - expected).square().sum() / expected.square().sum().clamp(min=1e-30)


def transfer_losses(host: Host, modules: Mapping[int, nn.Module], ids: Int[Tensor, "b n"]) -> list[float]:
    """The loss of each module on some text; their parameters have its gradients afterwards."""
    losses: dict[int, float] = {}

    def learn(number: int, expected: Tensor, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        with torch.enable_grad(), collect_losses(modules[number]) as collected:
            found = modules[number](*args, **given)[0]
            loss = _apart(found, expected)
            (loss + collected.total(LOSS_WEIGHTS)).backward()
        losses[number] = loss.item()

    with _listening(host, modules, learn):
        host.body(ids)
    return [losses[number] for number in modules]


@torch.no_grad()
def begin_at_scale(host: Host, modules: Mapping[int, nn.Module], ids: Int[Tensor, "b n"]) -> None:
    """Multiply the output projection of each new module by what brings its outputs nearest to the teacher's.

    Attention without a normaliser sums over the past, and its outputs may be a hundred times too large at first.
    """

    def rescale(number: int, expected: Tensor, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        found, projection = _output_projection(modules[number], args, given)
        if projection is None:
            return
        size = expected.norm() / found.norm().clamp(min=1e-30)
        nearest = (found * expected).sum() / found.square().sum().clamp(min=1e-30)
        projection.weight.mul_(torch.maximum(nearest, SMALLEST_SHARE * size))  # type: ignore[operator]

    with _listening(host, modules, rescale):
        host.body(ids)


def _output_projection(
    module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
) -> tuple[Float[Tensor, "b n c"], nn.Module | None]:
    """The output of an attention module, and the part of it that made that tensor."""
    made: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        part.register_forward_hook(lambda part, _, output: made.append((part, output)))
        for part in module.modules()
        if "weight" in part._parameters
    ]
    try:
        output = module(*args, **given)[0]
    finally:
        for hook in hooks:
            hook.remove()
    last = [part for part, its in made if isinstance(its, Tensor) and its.data_ptr() == output.data_ptr()]
    return output, last[-1] if last and getattr(last[-1], "bias", None) is None else None


def _new_in(module: nn.Module, path: str, learned: Sequence[str]) -> list[str]:
    return [name for name, _ in module.named_parameters() if f"{path}.{name}" in set(learned)]


@contextmanager
def _listening(host: Host, modules: Mapping[int, nn.Module], heard: Heard) -> Iterator[None]:
    """Within the context, `heard` is called for each of these layers when the teacher's has answered."""

    def hook(number: int) -> Callable[..., None]:
        def listen(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
            heard(number, output[0], args, given)

        return listen

    hooks = [host.attention(n).register_forward_hook(hook(n), with_kwargs=True) for n in modules]
    try:
        with torch.no_grad():
            yield
    finally:
        for each in hooks:
            each.remove()
