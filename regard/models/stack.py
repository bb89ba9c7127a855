"""The stack of a model's blocks: layer scale, weight sharing, checkpointing, reversibility, stochastic depth, exits.

Every model has a config field ``stack``, a :class:`StackConfig` or a mapping of its options::

    config = LanguageModelConfig(vocab_size=256, plan="mamba2", num_layers=12, stack={"checkpoint_layers": 3})
    config = EncoderConfig(num_classes=10, features=1, stack={"share": "all", "reversible": True})

The options can be combined, except that a reversible stack has nothing to checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regard.contract import Context, Loss, Mask, Result, Unsupported, at_least, check_options, check_types, one_of
from regard.layers.attention import AttentionLayer
from regard.layers.checks import check_repeatable
from regard.models.blocks import FEED_FORWARD_OPTIONS, Block, check_roles, run_blocks
from regard.models.branches import (
    Branch,
    Done,
    Draws,
    Inversion,
    Invertible,
    Streams,
    distinct_parameters,
    nothing_then_again,
    run_branches,
)
from regard.models.exit_rules import ExitRule
from regard.models.losses import add_losses

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

PARTS = ("none", "all", "mixer", "feed_forward")
SHARES = (*PARTS, "tables")

KINDS: dict[str, tuple[type, ...]] = {
    "share_groups": (int,),
    "reversible": (bool,),
    "checkpoint_layers": (int,),
    "stochastic_depth": (float, int),
    "exits": (tuple, list),
    "exit_rule": (str, type(None)),
    "layer_scale": (float, int, type(None)),
}
"""The accepted types of options that may come from a file or a command line."""


@dataclass(frozen=True)
class StackConfig:
    """Options of a stack of L layers.

    Attributes:
        share: what layers share: ``none``, ``all``, the ``mixer`` or the ``feed_forward`` network, each with its norms
            and layer scale (ALBERT, Lan et al., arXiv 1909.11942); or the ``tables`` of attention layers: the position
            scheme and the module that makes inputs other than queries, keys and values, such as B and C of
            `universal_rpe` and E and F of `linformer`. Layers that share their mixer or tables must have equal entries
            in the plan.
        share_groups: number of groups of neighbouring layers that share, a divisor of L.
        reversible: use two streams, both x at first; each branch reads the second and adds to the first, then the two
            swap, so that a layer is y1 = x1 + mix(x2), y2 = x2 + feed_forward(y1). The output is the mean of the
            streams (RevNet, Gomez et al., arXiv 1707.04585; Reformer, arXiv 2001.04451). The backward pass recomputes
            each branch's input from its output, so that activations need memory for one branch, whatever the depth.
            With a state, requested extras or a learned bias, the same function is differentiated as usual.
        checkpoint_layers: number of layers in a segment of which only the input is kept for the backward pass, which
            recomputes the rest (Chen et al., arXiv 1604.06174); about sqrt(L) needs the least memory. 0 keeps all
            activations.
        stochastic_depth: probability p of skipping the last layer in a training step, for the whole batch; layer l of L
            is skipped with probability p l / L, and its branches are scaled by the inverse of their survival
            probability (Huang et al., arXiv 1603.09382, scaled in training instead of afterwards).
        exits: numbers of layers, from 1 to L - 1, after which tokens (in a pooled encoder, sequences) may leave (see
            :mod:`regard.models.exits`): there the output can be read through the exit's own norm, or a halting unit
            decides. Training weights the loss of each exit by its number of layers, as in PABEE (Zhou et al., arXiv
            2006.04152).
        exit_rule: when tokens or sequences leave in evaluation, such as ``confidence:0.9``; see
            :mod:`regard.models.exit_rules`. None evaluates all layers. With ``halting:0.01`` the model has halting
            units, which decide in training too.
        exit_heads: ``shared``, the head of the model, or ``own``, a head for each exit, in an encoder of whole
            sequences.
        layer_scale: initial value, >= 0, of learned factors that multiply each feature of a branch's output; 1e-4 in
            deep networks (LayerScale, Touvron et al., arXiv 2103.17239). None for no factors.
        branch_norm: branches whose output is normed, by the model's kind of norm, before it is added: ``none``,
            ``all``, the ``mixer`` or the ``feed_forward`` network. With ``mixer`` an attention layer is
            x + norm(attend(norm(x))), the hybrid norm of sigmoid attention (Ramapuram et al., arXiv 2409.04431). Layer
            scale comes after this norm.
    """

    share: str = "none"
    share_groups: int = 1
    reversible: bool = False
    checkpoint_layers: int = 0
    stochastic_depth: float = 0.0
    exits: tuple[int, ...] = ()
    exit_rule: str | None = None
    exit_heads: str = "shared"
    layer_scale: float | None = None
    branch_norm: str = "none"

    def __post_init__(self) -> None:
        check_types(self)
        one_of("share", self.share, SHARES)
        one_of("branch_norm", self.branch_norm, PARTS)
        if self.layer_scale is not None:
            at_least("layer_scale", self.layer_scale, 0)
        at_least("share_groups", self.share_groups, 1)
        at_least("checkpoint_layers", self.checkpoint_layers, 0)
        object.__setattr__(self, "exits", tuple(self.exits))
        if not 0 <= self.stochastic_depth < 1:
            raise Unsupported(f"stochastic_depth={self.stochastic_depth}", supported="0 <= stochastic_depth < 1")
        if self.reversible and self.checkpoint_layers:
            raise Unsupported(
                "checkpoint_layers with reversible=True",
                supported="one of them: a reversible stack keeps no layer's activations",
                nearest="checkpoint_layers=0",
            )
        if list(self.exits) != sorted(set(self.exits)):
            raise Unsupported(f"exits={self.exits}", supported="rising numbers of layers", nearest="exits=(1, 2)")
        one_of("exit_heads", self.exit_heads, ("shared", "own"))
        for name, value, default in (("exit_rule", self.exit_rule, None), ("exit_heads", self.exit_heads, "shared")):
            if value != default and not self.exits:
                raise Unsupported(f"{name}={value!r} without exits", supported="exits=(1, ...)")
        if self.halts and self.exit_heads == "own":
            raise Unsupported(
                "exit_heads='own' with halting units, which read no classes", supported="exit_heads='shared'"
            )

    @property
    def changed(self) -> dict[str, Any]:
        """The options that differ from the defaults."""
        found = {option.name: (getattr(self, option.name), option.default) for option in dataclasses.fields(self)}
        return {name: value for name, (value, default) in found.items() if value != default}

    @property
    def rule(self) -> ExitRule | None:
        """The rule for when tokens or sequences leave; None for never."""
        return None if self.exit_rule is None else ExitRule.read(self.exit_rule)

    @property
    def halts(self) -> bool:
        """Whether the model has halting units at its exits."""
        return self.rule is not None and self.rule.halts

    @classmethod
    def read(cls, given: StackConfig | Mapping[str, Any]) -> StackConfig:
        """Make a config from a mapping of options; raises Unsupported for an unknown option."""
        if isinstance(given, StackConfig):
            return given
        check_options(cls, given, "stack")
        for name, value in given.items():
            expected = KINDS.get(name, (type(value),))
            if type(value) not in expected:
                raise Unsupported(f"{name}={value!r} of stack", supported=" or ".join(k.__name__ for k in expected))
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class LayersConfig:
    """Fields shared by the configs of models with a layer plan; see :class:`regard.models.LanguageModelConfig`."""

    num_heads: int = 4
    head_dim: int | None = None
    num_kv_heads: int | None = None
    feed_forward: int | None = None
    positions: str = "auto"
    dropout: float = 0.0
    norm: str = "rms"
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    stack: Any = StackConfig()

    def __post_init__(self) -> None:
        check_types(self)
        object.__setattr__(self, "stack", StackConfig.read(self.stack))


class Stack(nn.ModuleList):
    """The blocks of a model, run as its :class:`StackConfig` says.

    Args:
        blocks: the blocks, in order.
        config: see :class:`StackConfig`.
        blocks_in_layer: number of blocks that make up a layer.
        before: number of the model's layers before this stack, and in total, which determine stochastic depth; None if
            the stack has all layers.

    Raises:
        Unsupported: for options that do not fit the number of layers, layers that cannot share, and layers that redraw
            random features every few calls in a stack that recomputes calls.
    """

    def __init__(
        self,
        blocks: Sequence[Block] = (),
        config: StackConfig | None = None,
        *,
        blocks_in_layer: int = 1,
        before: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(blocks)
        self.config = StackConfig() if config is None else config
        self.blocks_in_layer = blocks_in_layer
        self.layers = len(self) // blocks_in_layer
        self.before = (0, self.layers) if before is None else before
        self.told: Callable[[Tensor], None] | None = None
        """A callback given the number of layers that tokens (B, N) or sequences (B) have passed, 0 at padding."""
        if self.config.exits and not 1 <= self.config.exits[0] <= self.config.exits[-1] < self.layers:
            raise Unsupported(
                f"exits={self.config.exits} of {self.layers} layers", supported=f"from 1 to {self.layers - 1}"
            )
        if self.config.share != "none":
            self._share()
        if self.config.reversible or self.config.checkpoint_layers:
            check_repeatable(self)

    def tell(self, passed: Tensor) -> None:
        """Pass the numbers of layers passed to the callback `told`, if there is one."""
        if self.told is not None:
            self.told(passed)

    def _share(self) -> None:
        groups = self.config.share_groups
        if self.layers % groups:
            raise Unsupported(f"share_groups={groups} of {self.layers} layers", supported="a divisor of the layers")
        period = len(self) // groups
        for i, block in enumerate(self):
            first: Any = self[i - i % period + i % self.blocks_in_layer]
            if block is first:
                continue
            if self.config.share != "feed_forward" and block.entry != first.entry:
                raise Unsupported(
                    f"layers of {first.entry} and {block.entry} that share their {self.config.share}",
                    supported="equal entries of the plan in a group",
                    nearest="share='feed_forward', or more share_groups",
                )
            if self.config.share == "tables" and isinstance(block.mixer, AttentionLayer):
                block.mixer.positions, block.mixer.projection = first.mixer.positions, first.mixer.projection
            if self.config.share in ("all", "mixer"):
                block.mixer, block.mixer_norm, block.mixer_end = first.mixer, first.mixer_norm, first.mixer_end
            if self.config.share in ("all", "feed_forward"):
                if _network(block) != _network(first):
                    raise Unsupported(
                        "feed-forward networks of different widths or kinds that are shared",
                        supported="one width, one kind with the same options",
                    )
                block.feed_forward, block.feed_forward_norm = first.feed_forward, first.feed_forward_norm
                block.feed_forward_end = first.feed_forward_end

    def run(
        self,
        x: Float[Tensor, "b n c"],
        context: Context,
        states: Sequence[Any],
        memory: Float[Tensor, "b m c"] | None = None,
    ) -> Result:
        """Run all blocks in sequence; arguments and result as for :func:`regard.models.blocks.run_blocks`."""
        config = self.config
        skips = self.training and config.stochastic_depth > 0
        if not (config.reversible or skips or (config.checkpoint_layers and torch.is_grad_enabled())):
            return run_blocks(self, x, context, states, memory)
        work = Pass(self, x, context, states, memory)
        work.advance(self.layers)
        return work.result()

    def run_last(
        self, count: int, x: Float[Tensor, "b n c"], context: Context
    ) -> tuple[list[Float[Tensor, "b n c"]], dict[str, Loss]]:
        """Run all blocks without states; returns the hidden states after each of the last `count` layers, and the losses."""
        states = [None] * len(self)
        if count == 1:
            result = self.run(x, context, states)
            return [result.output], result.losses
        work, found = Pass(self, x, context, states), []
        for layer in range(self.layers - count + 1, self.layers + 1):
            work.advance(layer)
            found.append(work.hidden)
        return found, work.losses


def _network(block: Any) -> tuple[Any, ...]:
    """A key that is equal for blocks whose feed-forward networks can be shared."""
    shapes = [] if block.feed_forward is None else [parameter.shape for parameter in block.feed_forward.parameters()]
    return shapes, *(block.entry[1].get(name) for name in FEED_FORWARD_OPTIONS)


class Pass:
    """One pass through a stack, which can pause between layers.

    Args:
        stack, x, context, states, memory: as for :meth:`Stack.run`.

    Attributes:
        active: (B, N) tokens that have not left yet; None when none has left. The hidden states of tokens that have
            left are frozen: mixers still see them, so that states stay complete, but feed-forward networks skip them.
            Once all have left, attention only computes their keys and values.
    """

    def __init__(
        self, stack: Stack, x: Tensor, context: Context, states: Sequence[Any], memory: Tensor | None = None
    ) -> None:
        check_roles(stack, context)
        self.stack, self.context, self.states, self.memory = stack, context, list(states), memory
        self.streams: Streams = (x, x) if stack.config.reversible else (x,)
        self.active: Bool[Tensor, "b n"] | None = None
        self.layer = 0
        before, every = stack.before
        self.scales = [self._scale((before + layer + 1) / every) for layer in range(stack.layers)]
        self.after: list[Any] = []
        self.losses: dict[str, Loss] = {}
        self.extras: dict[str, Any] = {}

    @property
    def hidden(self) -> Float[Tensor, "b n c"]:
        """The hidden states after the layers so far."""
        return self.streams[0] if len(self.streams) == 1 else (self.streams[0] + self.streams[1]) / 2

    def result(self) -> Result:
        """Return the hidden states, mixers' states, losses and extras of the layers so far."""
        return Result(self.hidden, tuple(self.after), self.losses, self.extras)

    def advance(self, layer: int) -> None:
        """Run the remaining layers up to number `layer`."""
        config = self.stack.config
        mask = self.context.mask
        as_usual = (
            bool(self.context.want)
            or self.active is not None
            or any(state is not None for state in self.states)
            or (mask is not None and mask.bias is not None and mask.bias.requires_grad)
        )
        if not torch.is_grad_enabled() or (config.reversible and as_usual):
            self._keep(run_branches(self._branches(self.layer, layer), *self._given()))
        elif config.reversible:
            self._invert(self._branches(self.layer, layer))
        else:
            size = config.checkpoint_layers or max(layer - self.layer, 1)
            for start in range(self.layer, layer, size):
                branches = self._branches(start, min(start + size, layer))
                if config.checkpoint_layers:
                    draws = Draws(self.context.generator, self.streams[0].device)
                    done = checkpoint(
                        run_branches,
                        branches,
                        *self._given(),
                        use_reentrant=False,
                        preserve_rng_state=False,
                        context_fn=partial(nothing_then_again, draws),
                    )
                else:
                    done = run_branches(branches, *self._given())
                self._keep(done)
        self.layer = layer

    def keep_rows(self, rows: Bool[Tensor, " b"]) -> None:
        """Continue with the marked rows only. Memory and states are not supported."""
        self.streams = tuple(stream[rows] for stream in self.streams)
        mask, changes = self.context.mask, {}
        if mask is not None:
            bias, blocks = mask.bias, mask.blocks
            if bias is not None and bias.shape[0] > 1:
                bias = bias[rows]
            if blocks is not None and blocks.visible.shape[0] > 1:
                blocks = dataclasses.replace(blocks, visible=blocks.visible[rows])
            lengths = None if mask.lengths is None else mask.lengths[rows]
            changes["mask"] = Mask(lengths=lengths, bias=bias, blocks=blocks)
        for name in ("positions", "roles"):
            value = getattr(self.context, name)
            if value is not None and value.shape[0] > 1:
                changes[name] = value[rows]
        self.context = self.context.replace(**changes)

    def _branches(self, start: int, stop: int) -> list[Branch]:
        """The residual branches of the layers from `start` to `stop`."""
        stack, found = self.stack, []
        for layer in range(start, stop):
            scale = self.scales[layer]
            for i in range(layer * stack.blocks_in_layer, (layer + 1) * stack.blocks_in_layer):
                block: Any = stack[i]
                found.append(Branch(block, True, scale, self.states[i]))
                if block.feed_forward is not None:
                    found.append(Branch(block, False, scale))
        return found

    def _scale(self, share: float) -> float:
        """Draw the factor of a layer's branches at depth `share`; 0 skips the layer."""
        chance = self.stack.config.stochastic_depth * share
        if not self.stack.training or chance == 0:
            return 1.0
        generator = self.context.generator
        draw = torch.rand((), generator=generator, device=None if generator is None else generator.device)
        return 0.0 if float(draw) < chance else 1 / (1 - chance)

    def _given(self) -> tuple[Streams, Tensor | None, Context, Tensor | None]:
        """The arguments for the next layers as they are now, since a checkpoint uses them again later."""
        return self.streams, self.memory, self.context, self.active

    def _keep(self, done: Done) -> None:
        self.streams = done.streams
        self.after += done.states
        add_losses(self.losses, done.losses)
        for name, values in done.extras.items():
            self.extras.setdefault(name, []).extend(values)

    def _invert(self, branches: list[Branch]) -> None:
        work = Inversion(branches, self.context, self.streams[0].device)
        parameters = [p for p in distinct_parameters(branches) if p.requires_grad]
        first, second, *sums = Invertible.apply(work, *self.streams, self.memory, *parameters)
        self.streams = (first, second)
        self.after += work.done.states
        for (name, count), total in zip(work.counts, sums, strict=True):
            add_losses(self.losses, {name: (total, count)})
        for name, values in work.done.extras.items():
            self.extras.setdefault(name, []).extend(values)
