"""Needs of applications, and how to tell whether a mechanism meets them.

Nothing here is an opinion: each need is read from the card, or measured on a small layer with random weights.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from regard.catalogue import get_mechanism
from regard.contract import Kind, Mechanism, Pattern, Role, Unsupported, closest
from regard.integrations.chosen import Chosen
from regard.integrations.heads import HeadAttention
from regard.models.layer_plan import layer_accepts
from regard.tasks.recall import RecallTask
from regard.workbench.advice.layer_work import LayerSettings, LayerWork
from regard.workbench.verification.subjects import Subject

NEEDS = {
    "exact": "computes the same function of queries, keys and values as softmax attention (measured)",
    "recall": "learns to look up what it has read: it sees every token (measured), and a small model of it solves the recall "
    "task of regard compare, with the same short convolution or none (measured); or it solved that task in your results",
    "keep-all": "can find any earlier token, however many there are: it sees every token (measured), looks tokens up by what "
    "they hold (measured) and keeps all of them, not a summary of fixed size (card)",
    "order": "tells the order of its tokens without positions added to the input (measured)",
    "any-length": "takes sequences of every length, and of different lengths in a batch, without a grid (card)",
    "constant-state": "decodes from a state that does not grow with the sequence (card)",
    "weights": "its attention weights can be looked at (card)",
    "bias": "takes an additive score, or a mask, for each pair of tokens (card)",
}
"""The closed list of needs with their meanings."""

LONGEST = 1024
"""The most tokens at which reach and equality are measured."""

SMALL = {"dim": 32, "heads": 2, "dtype": "float64"}
EQUAL = 1e-9


@dataclass(frozen=True)
class Finding:
    """Whether a mechanism meets a need, why, and the source: ``card``, ``measured`` or ``results``."""

    holds: bool
    reason: str
    source: str


def parse_needs(needs: str | tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """Parse needs, given as a sequence or a comma-separated string; an unknown one raises Unsupported."""
    parts = needs.split(",") if isinstance(needs, str) else list(needs)
    names = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
    for name in names:
        if name not in NEEDS:
            raise Unsupported(f"need {name!r}", supported=", ".join(NEEDS), nearest=closest(name, NEEDS))
    return names


RECALL_TABLE = Path(__file__).with_name("recall.json")
SOLVED = RecallTask.solved


def _read_table() -> dict[str, dict[str, float]]:
    return json.loads(RECALL_TABLE.read_text()) if RECALL_TABLE.is_file() else {}


RECALL = _read_table()
"""Each mechanism's accuracy on the recall task in its best run, ``without`` and ``with`` a short convolution
(``benchmarks/recall.py``)."""


def convolved(card: Mechanism, width: int | None = None) -> bool:
    """Whether a mechanism's layers have short convolutions, given a width, or by the layer's default when None."""
    if width is None or not layer_accepts(card, "short_convolution"):
        return bool(card.layer_defaults.get("short_convolution", 0))
    return width > 0


def find(
    need: str,
    name: str,
    pattern: Pattern,
    length: int,
    solved: Mapping[str, bool] | None = None,
    convolution: int | None = None,
) -> Finding:
    """Find out whether a mechanism meets a need at a length.

    Args:
        need: one of `NEEDS`.
        solved: for each mechanism trained on a recall task in stored results, whether it solved the task.
        convolution: width of the layers' short convolutions; the layer's default when None.
    """
    card, measured_at = get_mechanism(name), min(length, LONGEST)
    if need == "exact":
        error = difference_from_softmax(name, pattern, measured_at)
        if error is None:
            return Finding(False, "it is not a function of the queries, keys and values of softmax attention", "card")
        if error < EQUAL:
            return Finding(True, f"equals softmax attention at {measured_at} tokens", "measured")
        return Finding(False, f"differs from softmax attention by {error:.0%} of the largest output", "measured")
    if need == "recall":
        return _recall(card, pattern, measured_at, solved or {}, convolved(card, convolution))
    if need == "keep-all":
        return _keeps_all(card, pattern, measured_at)
    if need == "order":
        told = tells_order(name, pattern)
        said = "tells the order of its tokens" if told else "gives the same output when tokens change places"
        return Finding(told, said, "measured")
    if need == "any-length":
        free = card.length == "any" or (card.length == "grid" and pattern is not Pattern.NONCAUSAL_SELF)
        said = "takes any length" if free else f"takes lengths of the kind {card.length!r} only"
        return Finding(free, said, "card")
    if need == "constant-state":
        said = "its state keeps its size" if card.recurrent else "its state grows with every token"
        return Finding(card.recurrent, said, "card")
    if need == "weights":
        shown = card.weights == "exact" and "weights" in card.honours
        return Finding(shown, "it returns its weights" if shown else f"its weights are {card.weights}", "card")
    assert need == "bias"  # parse_needs knows no other
    taken = "bias" in card.honours
    return Finding(taken, "takes a bias on pairs" if taken else "takes no bias on pairs", "card")


def _recall(card: Mechanism, pattern: Pattern, length: int, solved: Mapping[str, bool], convolution: bool) -> Finding:
    if card.name in solved:
        won = solved[card.name]
        return Finding(won, f"{'solved' if won else 'did not solve'} the recall task of your results", "results")
    known = RECALL.get(card.name, {})
    frames = {"with": "with a short convolution", "without": "without a short convolution"}
    own, other = ("with", "without") if convolution else ("without", "with")
    if pattern is not Pattern.CAUSAL_SELF or own not in known:  # the recall task says nothing about this case
        return _keeps_all(card, pattern, length)
    seen, total = reach(card.name, pattern, length)
    if seen < total and length > RecallTask().length:  # up to its own length, the task has already shown this
        return Finding(False, f"a token sees {seen} of {total} tokens", "measured")
    said = f"accuracy {known[own]:.2f} on the recall task {frames[own]}"
    if known[own] < SOLVED <= known.get(other, 0.0):
        said += f", {known[other]:.2f} {frames[other]}"
    if known[own] >= SOLVED and card.recurrent:
        said += "; its state has a fixed size, which bounds how much"
    return Finding(known[own] >= SOLVED, said, "measured")


def _keeps_all(card: Mechanism, pattern: Pattern, length: int) -> Finding:
    seen, total = reach(card.name, pattern, length)
    if seen < total:
        return Finding(False, f"a token sees {seen} of {total} tokens", "measured")
    if not looks_up(card.name, pattern):
        return Finding(False, "how much it takes of a token does not depend on what both tokens hold", "measured")
    if card.recurrent:
        return Finding(False, "its state has a fixed size, which bounds what it can recall", "card")
    return Finding(True, f"sees all of {total} tokens (measured) and keeps every one", "card")


@functools.cache
def difference_from_softmax(name: str, pattern: Pattern, length: int) -> float | None:
    """Largest difference from softmax attention on the same random q, k, v, in float64, relative to its largest output.

    The optional inputs that the card samples are passed too, and training mode, where some mechanisms differ, is
    included. None if the mechanism does not take queries, keys and values for every head, or if its layer learns more
    than these.
    """
    card = get_mechanism(name)
    taken = {n: card.inputs.get(n, "") for n in ("q", "k", "v")}
    shaped = all(len(axes) == 4 and axes[0] == "b" for axes in taken.values())
    required = {n for n in card.inputs if not n.endswith("?")}
    if card.kind is not Kind.ATTENTION or not shaped or required != set(taken) or _learns_more(card, pattern):
        return None
    generator = torch.Generator().manual_seed(0)
    inputs = {n: torch.randn(1, 2, length, 16, generator=generator, dtype=torch.float64) for n in taken}
    optional = Subject(card, pattern).inputs(length, batch=1, d=16, k=16, v=16)  # what makes it more than softmax
    inputs |= {n: x for n, x in optional.items() if n in card.axes and n not in taken}
    if card.prepare is not None:
        roles = card.prepare(torch.zeros(1, length, dtype=torch.long), card.options())[1]
        inputs["roles"] = roles.expand(1, -1)[:, :length]
    with torch.no_grad():
        try:
            found = [Subject(card, pattern).run(inputs, training=training).output for training in (False, True)]
        except Unsupported:  # it needs more than q, k and v here
            return None
        expected = Subject(get_mechanism("softmax"), pattern).run({n: inputs[n] for n in taken}).output
    return max(float((output - expected).abs().max() / expected.abs().max()) for output in found)


def _learns_more(card: Mechanism, pattern: Pattern) -> bool:
    """Whether a layer with this mechanism has parameters beyond its projections."""
    try:
        heads = HeadAttention(Chosen.of(card), dim=32, heads=2, head_dim=16, pattern=pattern)
    except Unsupported:  # needs an input that only a layer can give
        return card.projection is not None
    return heads.adds


def _small(name: str, pattern: Pattern) -> LayerWork:
    work = LayerWork(get_mechanism(name), LayerSettings(pattern, **SMALL))  # type: ignore[arg-type]
    work.layer.eval()
    return work


def _query(pattern: Pattern, count: int) -> int:
    """The position to look at: the last, or the middle one when tokens see in both directions."""
    return count // 2 if pattern is Pattern.NONCAUSAL_SELF else count - 1


@functools.cache
def reach(name: str, pattern: Pattern, length: int) -> tuple[int, int]:
    """How many tokens (memory tokens in cross patterns) one output of a layer depends on, and how many there are.

    Counts nonzero gradients of the sequence's own tokens. The output is that of the last token, or of the middle one in
    noncausal-self.
    """
    work = _small(name, pattern)
    x, memory, context = work.inputs(length)
    source = x if memory is None else memory
    source.requires_grad_()
    output = work.layer(x, memory, context=context).output
    at = _query(pattern, output.shape[1])
    (gradient,) = torch.autograd.grad(output[0, at].sum(), source)
    own = (
        torch.ones(source.shape[1], dtype=torch.bool) if context.roles is None else context.roles[0] == int(Role.TOKEN)
    )
    return int(((gradient[0].abs().sum(-1) > 0) & own).sum()), int(own.sum())


@functools.cache
def looks_up(name: str, pattern: Pattern) -> bool:
    """Whether what a token takes from other tokens depends jointly on its own content and on theirs.

    Both inputs are changed, separately and together. The joint effect beyond the two separate ones must be nonzero, and
    not linear in the change of the other tokens: weights that depend only on positions or on the reader take twice as
    much from a token twice as large. This is necessary, not sufficient: a fixed mixture inside an activation passes,
    and so does a normaliser that both share.
    """
    work = _small(name, pattern)
    x, memory, context = work.inputs(12)
    at = _query(pattern, x.shape[1])
    reader = torch.zeros_like(x)
    others = torch.randn(x.shape if memory is None else memory.shape, generator=torch.Generator().manual_seed(1))
    others = others.to(x)
    reader[:, at] = x[:, at].flip(-1)
    if memory is None:
        others[:, at] = 0

    def output(read: float, written: float) -> Tensor:
        first, second = x + read * reader, memory
        if memory is None:
            first = first + written * others
        else:
            second = memory + written * others
        with torch.no_grad():
            return work.layer(first, second, context=context).output[0, at]

    def together(written: float) -> Tensor:
        return output(1, written) - output(1, 0) - output(0, written) + output(0, 0)

    once, twice = together(1), together(2)
    least = EQUAL * float(output(0, 0).abs().max())
    return float(once.abs().max()) > least and float((twice - 2 * once).abs().max()) > least


@functools.cache
def tells_order(name: str, pattern: Pattern) -> bool:
    """Whether a layer's output changes when two tokens just before the one looked at are swapped."""
    work = _small(name, pattern)
    x, memory, context = work.inputs(12)

    def output(first: Tensor, second: Tensor | None) -> Tensor:
        with torch.no_grad():
            found = work.layer(first, second, context=context).output
        return found[0, _query(pattern, found.shape[1])]

    def swapped(source: Tensor) -> Tensor:
        at = _query(pattern, source.shape[1])
        order = torch.arange(source.shape[1])
        order[[at - 2, at - 1]] = order[[at - 1, at - 2]]
        return source[:, order]

    before = output(x, memory)
    after = output(swapped(x), None) if memory is None else output(x, swapped(memory))
    return float((after - before).abs().max()) > EQUAL * float(before.abs().max())
