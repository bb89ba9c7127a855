"""Residual branches of a pass through a stack: run in sequence, recomputed from checkpoints, or inverted backwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from regard.contract import Context, Loss, Result
from regard.models.blocks import Block, valid_tokens
from regard.models.losses import add_losses

Streams = tuple[Tensor, ...]
"""The residual stream, or the two streams of a reversible stack: the one added to, then the one read."""


@dataclass
class Branch:
    """The mixer of a block, or its feed-forward network, in one pass.

    Attributes:
        mixes: whether the branch is the mixer.
        scale: factor of the branch's output; 0 when the branch is skipped.
        state: the state that the mixer continues from.
    """

    block: Block
    mixes: bool
    scale: float = 1.0
    state: Any = None

    def run(self, x: Tensor, memory: Tensor | None, context: Context, active: Tensor | None = None) -> Result:
        """Return the branch's output, to be added to the stream."""
        continues = self.mixes and (self.state is not None or "state" in context.want)
        if self.scale == 0 and not continues:
            return Result(torch.zeros_like(x))
        if not self.mixes:
            result = Result(torch.zeros_like(x))
            if active is None:
                result.output = self.block.feed(x, context=context, losses=result.losses)
            elif bool(active.any()):
                valid = valid_tokens(context, x.shape[1])
                counted = active if valid is None else valid
                result.output[active] = self.block.feed(
                    x[active][None], context=context, valid=counted[active][None], losses=result.losses
                )[0].to(x.dtype)
        else:
            own = self.block.cross
            if memory is not None and not own:
                context = context.replace(memory_mask=None, memory_positions=None)
            if active is not None and continues and not (own and memory is not None) and not bool(active.any()):
                kept = self.block.take_up(x, context=context, state=self.state)
                if kept is not None:
                    return Result(torch.zeros_like(x), kept)
            result = self.block.mix(x, memory if own else None, context=context, state=self.state)
            if active is not None:
                result.output = result.output.where(active[..., None], 0)
        if self.scale != 1:
            result.output = self.scale * result.output
        return result


@dataclass
class Done:
    """The results of some branches: the streams, and the states, losses and extras of their mixers."""

    streams: Streams
    states: list[Any] = field(default_factory=list)
    losses: dict[str, Loss] = field(default_factory=dict)
    extras: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, branch: Branch, result: Result) -> None:
        """Collect the state, losses and extras of a branch's result."""
        if branch.mixes:
            self.states.append(result.state)
        add_losses(self.losses, result.losses)
        for name, value in result.extras.items():
            self.extras.setdefault(name, []).append(value)


def run_branches(
    branches: Sequence[Branch], streams: Streams, memory: Tensor | None, context: Context, active: Tensor | None
) -> Done:
    """Run the branches one after the other; `active` is that of :class:`regard.models.stack.Pass`."""
    done = Done(streams)
    for branch in branches:
        result = branch.run(done.streams[-1], memory, context, active)
        done.streams = (*done.streams[1:], done.streams[0] + result.output)
        done.add(branch, result)
    return done


def nothing_then_again(draws: Draws) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts for a checkpoint's forward pass and its recomputation, which repeats the random draws."""
    return nullcontext(), draws.again()


class Draws:
    """A snapshot of the random state (torch's and the generator's) from which draws can be repeated."""

    def __init__(self, generator: torch.Generator | None, device: torch.device) -> None:
        self.generator, self.device = generator, device
        self.states = self._read()

    def _read(self) -> tuple[Tensor | None, ...]:
        return (
            torch.get_rng_state(),
            torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            None if self.generator is None else self.generator.get_state(),
        )

    def _write(self, states: tuple[Tensor | None, ...]) -> None:
        cpu, cuda, own = states
        assert cpu is not None
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self.device)
        if self.generator is not None and own is not None:
            self.generator.set_state(own)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Repeat, inside the block, the draws that followed the snapshot; the random state is restored afterwards."""
        now = self._read()
        self._write(self.states)
        try:
            yield
        finally:
            self._write(now)


def distinct_parameters(branches: Sequence[Branch]) -> list[nn.Parameter]:
    """Return the parameters of all the branches' blocks, each once."""
    found = {id(p): p for branch in branches for p in branch.block.parameters()}
    return list(found.values())


class Inversion:
    """The values that the backward pass of a reversible stack needs in addition to its last streams."""

    def __init__(self, branches: Sequence[Branch], context: Context, device: torch.device) -> None:
        self.branches, self.context, self.device = branches, context, device
        self.done = Done(())
        self.draws: list[Draws] = []
        self.counts: list[tuple[str, Tensor]] = []  # counts of the losses, in the order of their sums
        self.losses_of: list[int] = []  # how many losses each branch has
        kind = device.type
        self.autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        self.dtype = torch.get_autocast_dtype(kind) if self.autocast else None

    def precision(self) -> Any:
        """The forward pass's autocast, without its weight cache, which may hold casts made without gradients."""
        if not self.autocast:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False)


class Invertible(torch.autograd.Function):
    """Branches of a reversible stack as one operation: (first, second, memory) -> (first, second, sums of losses)."""

    @staticmethod
    def forward(
        ctx: Any, work: Inversion, first: Tensor, second: Tensor, memory: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        streams, sums = (first.clone(), second.clone()), []
        with work.precision():
            for branch in work.branches:
                work.draws.append(Draws(work.context.generator, work.device))
                result = branch.run(streams[1], memory, work.context)
                streams = (streams[1], streams[0] + result.output)
                work.counts += [(name, count) for name, (_, count) in result.losses.items()]
                work.losses_of.append(len(result.losses))
                sums += [total for total, _ in result.losses.values()]
                work.done.add(branch, result)
        ctx.work, ctx.parameters = work, parameters
        ctx.save_for_backward(*streams, memory)
        return (*streams, *sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        work: Inversion = ctx.work
        first, second, memory = ctx.saved_tensors
        to_first, to_second, *to_sums = gradients
        found: dict[int, Tensor] = {}
        leaf_memory = memory
        if memory is not None and ctx.needs_input_grad[3]:
            leaf_memory = memory.detach().requires_grad_()
        steps = zip(reversed(work.branches), reversed(work.draws), reversed(work.losses_of), strict=True)
        for branch, draws, losses in steps:
            own, to_sums = to_sums[len(to_sums) - losses :], to_sums[: len(to_sums) - losses]
            read = first.detach().requires_grad_()
            with torch.enable_grad(), work.precision(), draws.again():
                result = branch.run(read, leaf_memory, work.context)
            outputs = [result.output, *(total for total, _ in result.losses.values())]
            pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, (to_second, *own), strict=True) if o.requires_grad]
            leaves = [read, *(p for p in distinct_parameters([branch]) if p.requires_grad)]
            if leaf_memory is not None and leaf_memory.requires_grad:
                leaves.append(leaf_memory)
            to_read = None
            if pairs:
                roots, to_roots = [o for o, _ in pairs], [g for _, g in pairs]
                to_read, *made = torch.autograd.grad(roots, leaves, to_roots, allow_unused=True)
                for leaf, gradient in zip(leaves[1:], made, strict=True):
                    if gradient is not None:
                        found[id(leaf)] = found[id(leaf)] + gradient if id(leaf) in found else gradient
            first, second = second - result.output.detach(), first
            to_first, to_second = to_second, to_first if to_read is None else to_first + to_read
        rest = [found.get(id(leaf)) for leaf in (leaf_memory, *ctx.parameters)]
        return (None, to_first, to_second, *rest)
