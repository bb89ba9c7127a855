r"""AxFormer: find by trial what a fine-tuned model does better without (Nagarajan et al., arXiv 2010.03688).

No gradient is needed: each trial is an evaluation on items that the model was not trained on and will not be tested on.
With l_j the loss of item j, base_j that of the original model, and best the lowest mean loss so far, a change is
accepted if

    mean_j l_j < best   and   #{j : l_j <= base_j} > floor(fraction * items)

The second rule requires that most items are not harmed, so that a few outliers do not decide. Accepted changes stay in
effect in later trials, which come in this order:

1. for each layer, from the first to the last: hard attention (:mod:`regard.mechanisms.hard_softmax`);
2. for each layer, from the last to the first: its feed-forward network; if its removal is not accepted, but the loss is
   below `factor` * best, each group of its neurons; then its attention, and likewise each head.

| focus | accepted if | the branch that comes first | hard attention |
|---|---|---|---|
| ``accuracy`` | both rules hold | the feed-forward network, as in the authors' code | tried |
| ``size`` | mean loss <= (1 + slack) best; the second rule only if `fraction` is given | the one with more parameters | only if it lowers the loss |
| ``speed`` | as ``size`` | the one with more multiplications at the length of the data | not tried: it takes time here |

best is the lowest loss, so that what `slack` allows does not add up. A trial at a layer does not change the layer's
input, which is stored, and the layers before it do not run: the outputs are those of the whole model, which is verified
once.

Deviations: the mean is over items, not over batch means, in which a small last batch would weigh too much. Removed
parts are really removed, where the authors' code multiplies by 0. ``size`` and ``speed`` are this project's reading of
the paper's focus; the authors' code has only the first. A block whose output is 0 changes nothing and is not removed,
unless `ties` is set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.compression.layers import Run, run_batch
from regard.compression.pruning.anatomy import BRANCHES, Cut, Host, Layer
from regard.compression.pruning.losses import Losses, item_losses
from regard.compression.pruning.masks import masked, replace_forward
from regard.compression.pruning.steps import AxFormer
from regard.contract import Unsupported

if TYPE_CHECKING:
    from jaxtyping import Float

CLOSE = 1e-5
"""The largest relative difference between losses with stored activations and losses of the whole model."""


@dataclass(frozen=True)
class Trial:
    """A change that was tried.

    Attributes:
        name: what was changed, in words.
        loss: the mean loss with the change.
        unharmed: number of items whose loss is not above the original's.
        taken: whether the change stays.
    """

    name: str
    loss: float
    unharmed: int
    taken: bool


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        cuts: what is removed from each layer.
        before, after: mean loss on the items.
        items: number of items.
        trials: all trials, in order.
        most: the most evaluations that the search could have needed.
    """

    cuts: list[Cut]
    before: float
    after: float
    items: int
    trials: list[Trial]
    most: int

    @property
    def evaluations(self) -> int:
        """Number of evaluations of all items, including that of the original model."""
        return 1 + len(self.trials)

    def __str__(self) -> str:
        taken = sum(trial.taken for trial in self.trials)
        return (
            f"loss {self.before:.4g} to {self.after:.4g} on {self.items} items; {taken} of {len(self.trials)} changes taken, "
            f"in {self.evaluations} evaluations of {self.most} at the most"
        )


@torch.no_grad()
def search(
    host: Host,
    step: AxFormer,
    batches: Sequence[Any],
    *,
    run: Run = run_batch,
    losses: Losses = item_losses,
    kept: frozenset[int] = frozenset(),
    known: Sequence[Mapping[str, Any]] = (),
    on_trial: Callable[[str, int, int], None] = lambda name, done, most: None,
    remember: Callable[[Trial], None] = lambda trial: None,
) -> Found:
    """Search for parts that a model does better without. It must be in evaluation mode, and is restored afterwards.

    Args:
        batches: items to decide by.
        losses: see :data:`regard.compression.pruning.losses.Losses`.
        kept: numbers of layers that stay whole.
        known: trials of the same search before it was stopped, in order; they are not run again.
        on_trial: called with the name of each trial, the number of finished ones, and their maximum.
        remember: called with each trial that was run.

    Raises:
        Unsupported: without items, and if a loss is not finite.
    """
    work = _Search(host, step, list(batches), run, losses, list(known), on_trial, remember, kept)
    return work.search()


@dataclass
class _Search:
    host: Host
    step: AxFormer
    batches: list[Any]
    run: Run
    losses: Losses
    known: list[Mapping[str, Any]]
    on_trial: Callable[[str, int, int], None]
    remember: Callable[[Trial], None]
    kept: frozenset[int]
    trials: list[Trial] = field(default_factory=list)
    prefix: _Prefix = field(init=False)

    def search(self) -> Found:
        layers, step = self.host.layers, self.step
        numbers = [i for i in range(len(layers)) if i not in self.kept]
        self.cuts = [Cut() for _ in layers]
        self.prefix = _Prefix(self)
        self.base = self.evaluate(self.cuts)
        if not self.base.numel() or not bool(torch.isfinite(self.base).all()):
            raise Unsupported(
                "a search on items without a finite loss", supported="items that the model can be judged by"
            )
        self.best = before = float(self.base.mean())
        after = before
        self.most = 1 + sum(self._most(i) for i in numbers)
        self.prefix.check()
        if step.hard and step.focus != "speed":
            for i in numbers:
                if "attention" in layers[i].branches:
                    self.prefix.reach(i)
                    self.attempt(f"hard attention in {layers[i].name}", i, hard=step.hard)
        for i in reversed(numbers):
            self.prefix.reach(i)
            for branch in self._order(layers[i]):
                self._prune(i, branch)
        taken = [trial.loss for trial in self.trials if trial.taken]
        after = taken[-1] if taken else before
        return Found(self.cuts, before, after, len(self.base), self.trials, self.most)

    def _prune(self, i: int, branch: str) -> None:
        """Try to remove a branch, or else its parts."""
        layer = self.host.layers[i]
        if branch not in layer.fixed and not self._empties(i, branch):
            taken, loss = self.attempt(f"{branch.replace('_', '-')} of {layer.name}", i, **{branch: True})
            if taken or not loss < self.step.factor * self.best:
                return
        what = "heads" if branch == "attention" else "neurons"
        for number, part in enumerate(_parts(layer, what, self.step.groups)):
            name = f"head {number}" if what == "heads" else f"neurons {part[0]} to {part[-1]}"
            before = getattr(self.cuts[i], what)
            self.attempt(f"{name} of {layer.name}", i, **{what: (*before, *part)})

    def _empties(self, i: int, branch: str) -> bool:
        """Return whether no layer would be left without this branch."""
        cuts = [*self.cuts]
        cuts[i] = replace(cuts[i], **{branch: True})  # type: ignore[arg-type]
        return all(cut.settled(layer).layer for cut, layer in zip(cuts, self.host.layers, strict=True))

    def attempt(self, name: str, i: int, **change: Any) -> tuple[bool, float]:
        """Try a change; return whether it is accepted, and the loss with it."""
        self.on_trial(name, len(self.trials), self.most)
        cuts = [*self.cuts]
        cuts[i] = replace(cuts[i], **change)
        if len(self.trials) < len(self.known):
            trial = Trial(**self.known[len(self.trials)])
            if trial.name != name:
                raise Unsupported(
                    f"going on after {trial.name}, where {name} is tried", supported="trials of the same search"
                )
        else:
            found = self.evaluate(cuts)
            loss, unharmed = float(found.mean()), int((found <= self.base).sum())
            trial = Trial(name, loss, unharmed, self.accepts(loss, unharmed, hard="hard" in change))
            self.remember(trial)
        self.trials.append(trial)
        if trial.taken:
            self.cuts, self.best = cuts, min(self.best, trial.loss)
        return trial.taken, trial.loss

    def accepts(self, loss: float, unharmed: int, *, hard: bool = False) -> bool:
        """The rules of the module; hard attention, which makes nothing smaller, must lower the loss."""
        step = self.step
        lower = loss < self.best or (step.ties and loss == self.best)
        if step.focus != "accuracy" and not hard:
            assert step.slack is not None
            lower = loss <= (1 + step.slack) * self.best
        most = step.fraction is None or unharmed > int(step.fraction * len(self.base))
        return lower and most

    def evaluate(self, cuts: Sequence[Cut]) -> Float[Tensor, " items"]:
        """The loss of each item."""
        found = []
        with masked(self.host, cuts):
            for i, batch in enumerate(self.batches):
                with self.prefix.skipped(i):
                    found.append(self.losses(self.host.model, batch, self.run).double())
        return torch.cat(found) if found else torch.zeros(0)

    def _order(self, layer: Layer) -> list[str]:
        there = [branch for branch in reversed(BRANCHES) if branch in layer.branches]
        if self.step.focus == "accuracy":
            return there
        tokens = self.prefix.tokens if self.step.focus == "speed" else 0
        pairs = {"attention": 2 * tokens * layer.units * layer.group * layer.width, "feed_forward": 0}
        return sorted(there, key=lambda branch: -layer.parameters(branch) - pairs[branch])

    def _most(self, i: int) -> int:
        layer = self.host.layers[i]
        hard = bool(self.step.hard) and self.step.focus != "speed" and "attention" in layer.branches
        parts = [len(_parts(layer, what, self.step.groups)) for what in ("heads", "neurons")]
        return hard + len(layer.branches) + sum(parts)


def _parts(layer: Layer, what: str, groups: int) -> list[tuple[int, ...]]:
    """Single heads, or groups of consecutive neurons."""
    if what in layer.fixed:
        return []
    if what == "heads":
        return [(unit,) for unit in range(layer.units)]
    count = min(groups, layer.neurons)
    borders = [layer.neurons * i // count for i in range(count + 1)] if count else []
    return [tuple(range(start, end)) for start, end in pairwise(borders)]


class _Stop(Exception):
    """Raised once the required layers have run."""


class _Prefix:
    """Stored inputs of the layer where changes are tried, for each batch, so that earlier layers need not run."""

    def __init__(self, work: _Search) -> None:
        self.work, self.works = work, True
        self.layers, self.outputs = 0, list[Any]()
        self.tokens = 0

    def check(self) -> None:
        """Check that a model gives the same losses with stored activations; a model whose layers are not a chain does
        not, and then runs whole each time."""
        last = len(self.work.host.layers) - 1
        self.reach(last)
        if last and len(self.outputs) == len(self.work.batches):
            found, base = self.work.evaluate(self.work.cuts), self.work.base
            self.works = bool(((found - base).abs() <= CLOSE * (1 + base.abs())).all())
        else:
            self.works = last == 0
        self.layers, self.outputs = 0, []

    def reach(self, layer: int) -> None:
        """Store the inputs of this layer, with all changes accepted so far."""
        if not self.works or layer == self.layers:
            return
        if layer < self.layers:
            self.layers, self.outputs = 0, []
        if layer == 0:
            return
        outputs: list[Any] = []

        def stop(module: Any, given: Any, output: Any) -> None:
            outputs.append(output)
            raise _Stop

        work = self.work
        with masked(work.host, work.cuts):
            handle = work.host.layers[layer - 1].module.register_forward_hook(stop)
            try:
                for i, batch in enumerate(work.batches):
                    with self.skipped(i), suppress(_Stop):
                        work.losses(work.host.model, batch, work.run)
            finally:
                handle.remove()
        self.layers, self.outputs = layer, outputs
        first = outputs[0] if outputs else None
        hidden = getattr(first, "output", first)
        self.tokens = hidden.shape[1] if isinstance(hidden, Tensor) else 0

    @contextmanager
    def skipped(self, batch: int) -> Iterator[None]:
        """Skip the earlier layers for this batch, within the context."""
        with ExitStack() as changes:
            for layer in self.work.host.layers[: self.layers]:
                changes.callback(replace_forward(layer.module, lambda *_, **__: self.outputs[batch]))
            yield
