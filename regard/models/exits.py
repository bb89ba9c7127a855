"""Early exit: reading the output after only some layers, token by token if need be.

A model's ``stack`` names the layers that have an exit (`exits`) and the rule that decides in evaluation which tokens
leave there (`exit_rule`, see :mod:`regard.models.exit_rules`). There are two kinds of exits:

- an :class:`Exit` reads classes from the hidden state. Training adds its loss (:func:`joint_loss`), and any rule about
  classes can be set afterwards (:func:`set_exit_rule`).
- a :class:`HaltingUnit` gives each token a probability of halting. Halting units act in training as in evaluation, and
  the output is the mean of the hidden states after the layers passed, weighted by these probabilities.

With both kinds, the hidden state of a token that has left is frozen, and the mixers of the layers above still see it.
In a layer that a token did not pass, its keys and values are that layer's own projections of the frozen hidden state
(Confident Adaptive Language Modeling, Schuster et al., arXiv 2207.07061, propagates states likewise), and a recurrence
absorbs it like any other token. So decoding with states equals reading the whole sequence at once. Once all tokens of a
call have left, attention only projects their keys and values; as long as one token remains, attention is computed for
all rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.contract import Context, Result, Unsupported, an_instance
from regard.core.precision import wide
from regard.layers.norms import make_norm
from regard.models.blocks import valid_tokens
from regard.models.exit_rules import HALTING, ExitRule, Leaving
from regard.models.stack import Pass, Stack, StackConfig

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

PONDER = "ponder"
"""The loss of halting units: the number of places that a token has passed, plus the probability left at the last."""


class Exit(nn.Module):
    """A place where the output can be read.

    Args:
        norm: the norm of the hidden state.
        head: maps the normed hidden state to classes; None for the model's own head.
    """

    def __init__(self, norm: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.norm, self.head = norm, head


class HaltingUnit(nn.Module):
    """The probability of each token to halt at an exit: sigmoid(w . h + b).

    Args:
        dim: width of the hidden state h.
        places: number of places where a token may halt, including the last layer. At initialisation each has the same
            share of the output.
    """

    def __init__(self, dim: int, places: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, -math.log(places - 1))

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n"]:
        return wide(self.linear(x)).sigmoid().squeeze(-1)


def make_exits(config: Any, head: Callable[[], nn.Module] | None = None) -> nn.ModuleList:
    """Create the exits of a model.

    Args:
        config: the model's config, with dim, norm and stack.
        head: creates the head of an exit; None for models whose exits can only use the model's head.

    Raises:
        Unsupported: for ``exit_heads="own"`` when `head` is None.
    """
    stack = config.stack
    if stack.halts:
        return nn.ModuleList(HaltingUnit(config.dim, len(stack.exits) + 1) for _ in stack.exits)
    own = stack.exit_heads == "own"
    if own and head is None:
        raise Unsupported(
            "exit_heads='own' of a model that reads every token, or that has no pool",
            supported="encoders that classify whole sequences",
            nearest="exit_heads='shared'",
        )
    return nn.ModuleList(
        Exit(make_norm(config.norm, config.dim), head() if own and head else None) for _ in stack.exits
    )


def run_with_exits(
    stack: Stack,
    exits: nn.ModuleList,
    norm: nn.Module,
    logits: Callable[[Tensor], Tensor],
    x: Float[Tensor, "b n c"],
    context: Context,
    states: Sequence[Any],
    memory: Float[Tensor, "b m c"] | None = None,
    *,
    place: Callable[[Tensor], Tensor],
) -> Result:
    """Run a stack and its final norm, letting each token leave where the stack's exit rule says so.

    Without a state, the remaining layers are skipped once all tokens have left.

    Args:
        stack: the stack. In training all its layers are run, unless halting units decide.
        exits: the modules made by :func:`make_exits`.
        norm: the norm after the last layer.
        logits: maps normed hidden states (..., C) to logits of the classes.
        x, context, states, memory: as for :meth:`Stack.run`.
        place: maps from the layers' layout (B, N, ...) to the layout that is returned.

    Returns:
        As :meth:`Stack.run`, with a normed output: each token is normed by the exit where it left; with halting units
        the weighted mean is normed by the last layer's norm. In training, ``extras["exits"]`` has each exit's share of
        the layers and its normed hidden states (B, N, C); where tokens leave, ``extras["exit_layer"]`` (B, N) has the
        number of layers that each has passed, 0 at padding. Halting units add the loss ``ponder``, a mean over tokens.
    """
    config, rule = stack.config, stack.config.rule
    leaves = rule is not None and (rule.halts or not stack.training)
    if not (leaves or (config.exits and stack.training)):
        result = stack.run(x, context, states, memory)
        result.output = place(norm(result.output))
        return result
    work = Pass(stack, x, context, states, memory)
    if not leaves:
        read = []
        for layer, one in zip(config.exits, exits, strict=True):
            work.advance(layer)
            read.append((layer / stack.layers, place(one.norm(work.hidden))))  # type: ignore[operator]
        work.advance(stack.layers)
        result = work.result()
        result.output = place(norm(result.output))
        result.extras["exits"] = read
        return result
    assert rule is not None
    way = _Halting(work, rule) if rule.halts else _Leaving(work, rule, logits)
    goes_on = "state" in context.want or any(state is not None for state in states)
    for layer, one in zip(config.exits, exits, strict=True):
        work.advance(layer)
        way.leave(one)
        if not bool(way.active.any()):
            break
    else:
        work.advance(stack.layers)
        way.end(norm)
    if goes_on and work.layer < stack.layers:
        work.advance(stack.layers)  # later tokens will attend to the tokens that have left
    output = way.output(norm)
    result = work.result()
    result.output = place(output)
    valid = valid_tokens(context, x.shape[1])
    passed = way.passed if valid is None else way.passed.where(valid, 0)
    result.extras["exit_layer"] = place(passed[..., None])[..., 0]
    stack.tell(result.extras["exit_layer"])
    return result


class _Way:
    """The tokens of a pass, and which of them have left.

    Attributes:
        active: (B, N) the tokens that have not left.
        passed: (B, N) the number of layers that each token has passed.
    """

    def __init__(self, work: Pass) -> None:
        self.work = work
        self.active: Bool[Tensor, "b n"] = work.hidden.new_ones(work.hidden.shape[:2], dtype=torch.bool)
        self.passed = torch.full(work.hidden.shape[:2], work.stack.layers, device=work.hidden.device)

    def _let(self, done: Bool[Tensor, "b n"]) -> None:
        """Let the tokens marked in `done` leave."""
        self.passed = torch.where(done, self.work.layer, self.passed)
        self.active = self.active & ~done
        self.work.active = None if bool(self.active.all()) else self.active


class _Leaving(_Way):
    """Tokens that leave by a rule about their classes; the output of each is read where it left."""

    def __init__(self, work: Pass, rule: ExitRule, logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__(work)
        self.rule, self.logits = Leaving(rule), logits
        self.read = torch.zeros_like(work.hidden)

    def leave(self, one: Any) -> None:
        normed, done = one.norm(self.work.hidden), self.active.clone()
        done[self.active] = self.rule.decide(self.logits(normed[self.active]), self.work.layer)
        self.read = normed.where(done[..., None], self.read)
        self._let(done)

    def end(self, norm: nn.Module) -> None:
        self.read = norm(self.work.hidden).where(self.active[..., None], self.read)

    def output(self, norm: nn.Module) -> Float[Tensor, "b n c"]:
        return self.read


class _Halting(_Way):
    """Tokens that leave once their halting probabilities have added up to nearly 1."""

    def __init__(self, work: Pass, rule: ExitRule) -> None:
        super().__init__(work)
        self.enough = 1 - rule.value
        self.mean = torch.zeros_like(wide(work.hidden))
        self.spent = self.mean.new_zeros(self.active.shape)
        self.ponder = torch.zeros_like(self.spent)

    def leave(self, one: Any) -> None:
        chance = one(self.work.hidden)
        done = self.active & (self.spent + chance >= self.enough)
        self._weigh(torch.where(done, 1 - self.spent, chance), done)
        self._let(done)

    def end(self, norm: nn.Module) -> None:
        self._weigh(1 - self.spent, self.active)

    def _weigh(self, share: Float[Tensor, "b n"], last: Bool[Tensor, "b n"]) -> None:
        """Add the active tokens' hidden states, weighted by `share`; `last` marks the tokens that end here."""
        share = share.where(self.active, 0)
        self.mean = self.mean + share[..., None] * self.work.hidden
        self.ponder = self.ponder + self.active + share.where(last, 0)
        self.spent = self.spent + share

    def output(self, norm: nn.Module) -> Float[Tensor, "b n c"]:
        valid = valid_tokens(self.work.context, self.ponder.shape[1])
        ponder = self.ponder if valid is None else self.ponder.where(valid, 0)
        count = torch.tensor(ponder.numel(), device=ponder.device) if valid is None else valid.sum()
        self.work.losses[PONDER] = (ponder.sum(), count)
        return norm(self.mean.to(self.work.hidden.dtype))


def apply_head(result: Result, head: Callable[..., Tensor], exits: nn.ModuleList) -> Result:
    """Turn the hidden states in a result of :func:`run_with_exits`, and those of its exits, into outputs.

    Args:
        head: called with hidden states, and with the exit's own head as a second argument where it has one.
    """
    result.output = head(result.output)
    if "exits" in result.extras:
        own = [() if one.head is None else (one.head,) for one in exits]
        read = result.extras["exits"]
        result.extras["exits"] = [(share, head(x, *given)) for (share, x), given in zip(read, own, strict=True)]
    return result


def joint_loss(result: Result, loss: Callable[[Tensor], Tensor]) -> Float[Tensor, ""]:
    """The mean `loss` of a model's output and its exits' outputs, weighted by the number of layers each has passed."""
    total, weights = loss(result.output), 1.0
    for share, output in result.extras.get("exits", ()):
        total, weights = total + share * loss(output), weights + share
    return total / weights


def set_exit_rule(model: nn.Module, rule: str | None) -> None:
    """Set another exit rule, such as ``entropy:0.3``, in a trained model; None evaluates all layers.

    Raises:
        Unsupported: for a model without exits, an unknown rule, a rule about classes for a model with halting units, or
            a halting rule for a model without.
    """
    asked = None if rule is None else ExitRule.read(rule)
    if asked is not None and not len(getattr(model, "exits", ())):
        raise Unsupported(
            f"the exit rule {rule} of {an_instance(model)} without exits",
            supported="models with exits in their stack",
            nearest="regard train --exits all",
        )
    config: Any = model.config
    units = config.stack.halts
    if units != (asked is not None and asked.halts):
        raise Unsupported(
            f"the exit rule {rule} of a model {'with learned halting units' if units else 'without halting units'}",
            supported=f"{HALTING}:VALUE" if units else "rules about classes, or a model trained to halt",
            nearest=f"{HALTING}:0" if units else "confidence:0.9",
        )
    _take_stack(model, dataclasses.replace(config.stack, exit_rule=rule))


@contextmanager
def all_layers(model: nn.Module) -> Iterator[None]:
    """Evaluate all layers of a model inside the block, whatever its exit rule: nothing leaves, and halting units are not
    asked. The model, which may be of any kind, has to be in evaluation mode."""
    if not len(getattr(model, "exits", ())):
        yield
        return
    before: StackConfig = model.config.stack  # type: ignore[union-attr, assignment]
    _take_stack(model, dataclasses.replace(before, exit_rule=None))
    try:
        yield
    finally:
        _take_stack(model, before)


def _take_stack(model: Any, stack: StackConfig) -> None:
    model.config, model.blocks.config = dataclasses.replace(model.config, stack=stack), stack


@contextmanager
def exit_layers(model: nn.Module) -> Iterator[list[Tensor]]:
    """Record, inside the block, how many layers the tokens (or whole sequences) of each call of a model have passed.

    Each call of a model with early exits appends one tensor to the list, in order and without padding.
    """
    stack: Any = model.blocks
    found: list[Tensor] = []
    before, stack.told = stack.told, lambda passed: found.append(passed[passed > 0])
    try:
        yield found
    finally:
        stack.told = before
