"""The layer of a model, a pre-norm residual block, and a function that runs blocks in sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.catalogue import get_mechanism
from regard.contract import (
    Context,
    Loss,
    Mechanism,
    Pattern,
    Result,
    Unsupported,
    closest,
    valid_from_lengths,
)
from regard.core.ragged import right_padded
from regard.create import create_layer
from regard.layers.attention import AttentionLayer
from regard.layers.feed_forward import (
    FEED_FORWARDS,
    MixtureOfExperts,
    check_dropout,
    dropout,
    feed_forward_options,
    make_feed_forward,
)
from regard.layers.norms import LayerScale, make_norm
from regard.layers.residual import fused_attention, fused_feed_forward, may_be_fused
from regard.models.layer_plan import layer_accepts, mixing_card
from regard.models.losses import add_losses
from regard.models.placing import SHARED_POSITIONS, layer_positions

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

FEED_FORWARD_OPTIONS = ("feed_forward_kind", "feed_forward_options")
"""Options of a plan's entry for its feed-forward network, other than the hidden width."""


class Block(nn.Module):
    """A pre-norm residual block: x + mix(norm(x)), then x + feed_forward(norm(x)).

    The output of each branch first passes the norm and layer scale that the model's stack config asks for, then
    dropout. In a cross pattern the mixer reads the memory as it is given, without a norm, and without positions unless
    the plan names a scheme. A memory may hold the outputs of an encoder's last layers side by side, (B, M, layers * C),
    the last layer at the end; of these the block reads as many as its plan's option ``memory_layers`` says.

    Args:
        entry: mechanism and options from the plan. The options ``positions``, ``feed_forward``, ``num_heads``,
            ``head_dim`` and ``num_kv_heads`` override the model's; a block without heads (``num_heads=0``, as in pruned
            models) has no mixer; ``feed_forward_kind`` and ``feed_forward_options`` are passed to
            :func:`regard.layers.feed_forward.make_feed_forward`; ``memory_layers`` is that of a cross pattern;
            all other options are the layer's. The model's
            positions, head_dim and num_kv_heads apply to layers that have such an option, its feed_forward to networks
            that have a hidden width.
        config: the model's config, with dim, num_heads, head_dim, num_kv_heads, feed_forward, positions, dropout, norm,
            stack.
        pattern: the attention pattern of the mechanism.
        feed_forward: hidden width if the plan's entry names none; the model's when None.
        memory_dim: width of a layer of the memory, in a cross pattern; the model's `dim` when None.
        memory_layers: how many layers a memory may hold, in a cross pattern.
    """

    def __init__(
        self,
        entry: tuple[str, Mapping[str, Any]],
        config: Any,
        pattern: Pattern,
        *,
        feed_forward: int | None = None,
        memory_dim: int | None = None,
        memory_layers: int = 1,
    ) -> None:
        super().__init__()
        name, options = entry[0], dict(entry[1])
        card = get_mechanism(name)
        network = _take_feed_forward(options, config.feed_forward if feed_forward is None else feed_forward)
        num_heads = options.pop("num_heads", config.num_heads)
        _set_positions(card, name, options, config, pattern)
        for option in ("head_dim", "num_kv_heads"):
            value = getattr(config, option)
            if value is not None and layer_accepts(card, option):
                options.setdefault(option, value)
        self.memory_layers = _take_memory_layers(options, name, memory_layers if pattern.cross else 0)
        if memory_dim not in (None, config.dim):
            options["memory_dim"] = memory_dim
        self.memory_dim = options.get("memory_dim", config.dim)
        check_dropout(config.dropout)
        self.entry = entry
        self.cross = pattern.cross
        #: whether a sequence can be continued from a state
        self.continues = mixing_card(name, entry[1]).state is not None
        self.takes_roles = "roles" in card.honours
        self.dropout = config.dropout
        self.mixer_norm: nn.Module
        self.mixer: Any
        if num_heads == 0:
            self.mixer_norm, self.mixer, self.mixer_end = nn.Identity(), NoMixer(), nn.Sequential()
        else:
            self.mixer_norm = make_norm(config.norm, config.dim)
            self.mixer = create_layer(name, config.dim, num_heads, pattern=pattern, **options)
            self.mixer_end = _branch_end("mixer", config)
        self.feed_forward_norm = None if network is None else make_norm(config.norm, config.dim)
        self.feed_forward = None if network is None else network(config.dim)
        self.feed_forward_end = None if network is None else _branch_end("feed_forward", config)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        memory: Float[Tensor, "b m c"] | None = None,
        *,
        context: Context,
        state: Any = None,
    ) -> Result:
        """Apply the block to right-padded `x` (and memory, in a cross pattern whose state has not absorbed it)."""
        mixed = self.add_mixed(x, memory, context=context, state=state)
        x = mixed.output
        if self.feed_forward is not None:
            x = self.add_fed(x, context=context, losses=mixed.losses)
        return Result(x, mixed.state, mixed.losses, mixed.extras)

    def add_mixed(
        self,
        x: Float[Tensor, "b n c"],
        memory: Float[Tensor, "b m c"] | None = None,
        *after: nn.Module,
        context: Context,
        state: Any = None,
    ) -> Result:
        """Add the mixer's output, passed through the `after` modules, to `x`."""
        if memory is None and state is None and may_be_fused(x) and not (self.training and self.dropout):
            found = fused_attention(x, self.mixer_norm, self.mixer, self.mixer_end, *after, context=context)
            if found is not None:
                return Result(found)
        mixed = self.mix(x, memory, context=context, state=state)
        update = mixed.output
        for module in after:
            update = module(update)
        return Result(x + update, mixed.state, mixed.losses, mixed.extras)

    def add_fed(
        self,
        x: Float[Tensor, "b n c"],
        *after: nn.Module,
        context: Context,
        losses: dict[str, Loss] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Add the output of the block's feed-forward network, passed through the `after` modules, to `x`."""
        if may_be_fused(x) and not (self.training and self.dropout):
            norm, network, end = self.feed_forward_norm, self.feed_forward, self.feed_forward_end
            assert norm is not None and network is not None and end is not None
            found = fused_feed_forward(x, norm, network, end, *after)
            if found is not None:
                return found
        update = self.feed(x, context=context, losses=losses)
        for module in after:
            update = module(update)
        return x + update

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        memory: Float[Tensor, "b m c"] | None = None,
        *,
        context: Context,
        state: Any = None,
    ) -> Result:
        """Return the mixer's output, to be added to `x`."""
        if context.roles is not None and not self.takes_roles:
            context = context.replace(roles=None)
        if memory is not None:
            memory, context = self._reached(memory, context)
        mixed = self.mixer(self.mixer_norm(x), memory, context=context, state=state)
        update = self.mixer_end(mixed.output)
        update = dropout(update, self.dropout, training=self.training, generator=context.generator)
        return Result(update, mixed.state, mixed.losses, mixed.extras)

    def encode_memory(self, memory: Float[Tensor, "b m c"], *, context: Context) -> Any:
        """The mixer's state that has absorbed a right-padded memory."""
        memory, context = self._reached(memory, context)
        return self.mixer.encode_memory(memory, context=context)

    def _reached(self, memory: Tensor, context: Context) -> tuple[Tensor, Context]:
        """The layers of a right-padded memory that the mixer reads, as (B, M * layers, C), with masks and positions.

        The tokens of the layers alternate, so that the padding stays on the right and the order that of the tokens.
        """
        count, m = self.memory_layers, memory.shape[1]
        memory = memory[..., -count * self.memory_dim :]
        if count == 1:
            return memory, context
        lengths = None if context.memory_mask is None else context.memory_mask.lengths
        where = context.memory_positions
        if where is None:
            where = torch.arange(m, device=memory.device).expand(memory.shape[0], -1)
        context = context.replace(
            memory_mask=None if lengths is None else right_padded(lengths * count, m * count),
            memory_positions=where.repeat_interleave(count, dim=1),
        )
        return memory.unflatten(-1, (count, self.memory_dim)).flatten(1, 2), context

    def take_up(self, x: Float[Tensor, "b n c"], *, context: Context, state: Any = None) -> Any:
        """The mixer's state after tokens whose output is not needed; None if that is no cheaper than :meth:`mix`."""
        mixer = self.mixer
        return (
            mixer.take_up(self.mixer_norm(x), context=context, state=state)
            if isinstance(mixer, AttentionLayer)
            else None
        )

    def feed(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Context,
        valid: Bool[Tensor, "b n"] | None = None,
        losses: dict[str, Loss] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Return the output of the block's feed-forward network, to be added to `x`.

        Tokens are independent of each other, except where experts have a limited capacity.

        Args:
            valid: tokens that are not padding; taken from the context's mask when None.
            losses: receives the auxiliary losses of a network that has any.
        """
        norm, network, end = self.feed_forward_norm, self.feed_forward, self.feed_forward_end
        assert norm is not None and network is not None and end is not None
        if isinstance(network, MixtureOfExperts):
            valid = valid_tokens(context, x.shape[1]) if valid is None else valid
            own: dict[str, Loss] = {}
            update = end(network(norm(x), valid=valid, losses=own))
            add_losses({} if losses is None else losses, own)
        else:
            update = end(network(norm(x)))
        return dropout(update, self.dropout, training=self.training, generator=context.generator)


def _set_positions(card: Mechanism, name: str, options: dict[str, Any], config: Any, pattern: Pattern) -> None:
    """Set the position scheme in a layer's options, with the model's position options if it is the model's scheme."""
    own = options.pop("positions", None)
    if own is None and not layer_accepts(card, "positions"):
        return
    default = "none" if pattern.cross else config.positions
    scheme = options["positions"] = layer_positions(mixing_card(name, options), own or default)
    shared = getattr(config, "position_options", {})
    if shared and config.positions == "auto":
        raise Unsupported(
            "position_options of positions='auto'", supported="a scheme by name", nearest="positions='rotary'"
        )
    if own is None and scheme == config.positions:
        part = {"part": "layer"} if scheme in SHARED_POSITIONS else {}
        if shared or part:
            options["position_options"] = {**shared, **options.get("position_options", {}), **part}


def _take_memory_layers(options: dict[str, Any], name: str, most: int) -> int:
    """Pop the number of the memory's layers that a cross layer reads, 1 by default; `most` is 0 without a memory."""
    given = options.pop("memory_layers", None)
    if given is None:
        return 1
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= most:
        where = f"whose memory has {most} layer{'s' * (most > 1)}" if most else "without a memory"
        raise Unsupported(
            f"memory_layers={given!r} in a layer of {name} {where}",
            supported="cross layers of an encoder-decoder, from 1 to the number of layers of its encoder",
        )
    return given


def _take_feed_forward(options: dict[str, Any], width: int | None) -> Callable[[int], nn.Module] | None:
    """Pop the feed-forward options of a plan's entry and return a factory (dim -> network), or None for no network.

    `width` is the hidden width if the entry names none.
    """
    named = "feed_forward" in options
    width = options.pop("feed_forward", width)
    given = {name: options.pop(name) for name in FEED_FORWARD_OPTIONS if name in options}
    kind, own = given.get("feed_forward_kind", "swiglu"), given.get("feed_forward_options", {})
    if width == 0:
        if given:
            raise Unsupported(
                f"{', '.join(f'{name}={value!r}' for name, value in given.items())} in a block without a feed-forward "
                "network",
                supported="a feed_forward other than 0; in an encoder-decoder the entries of encoder_plan and cross_plan",
            )
        return None
    if kind in FEED_FORWARDS:
        taken = [option for option in feed_forward_options(kind) if option not in ("dropout", "linear")]
        for option in own:
            if option not in taken:  # dropout inside the network would not draw from the context's generator
                raise Unsupported(
                    f"option {option!r} of feed-forward {kind!r} in a model",
                    supported=", ".join(taken),
                    nearest=closest(option, taken),
                )
    elif not named:
        width = None
    return lambda dim: make_feed_forward(kind, dim, width, **own)


def _branch_end(branch: str, config: Any) -> nn.Sequential:
    """Modules applied to the output of the ``mixer`` or ``feed_forward`` branch before it is added to the stream."""
    stack, end = config.stack, nn.Sequential()
    if stack.branch_norm in ("all", branch):
        if config.norm == "none":
            raise Unsupported(
                f"branch_norm={stack.branch_norm!r} in a model with norm='none'",
                supported="models with a norm",
                nearest="branch_norm='none'",
            )
        end.add_module("norm", make_norm(config.norm, config.dim))
    if stack.layer_scale is not None:
        end.add_module("scale", LayerScale(config.dim, stack.layer_scale))
    return end


class NoMixer(nn.Module):
    """The stand-in for a mixer that was pruned away: its output is 0, and it has no state."""

    def forward(self, x: Tensor, memory: Tensor | None = None, *, context: Context, state: None = None) -> Result:
        return Result(torch.zeros_like(x))


def valid_tokens(context: Context, n: int) -> Bool[Tensor, "b n"] | None:
    """Return which of `n` right-padded tokens are valid in each row; None when all are."""
    lengths = None if context.mask is None else context.mask.lengths
    return None if lengths is None else valid_from_lengths(lengths, n)


def run_blocks(
    blocks: Sequence[Block] | nn.ModuleList,
    x: Float[Tensor, "b n c"],
    context: Context,
    states: Sequence[Any],
    memory: Float[Tensor, "b m c"] | None = None,
) -> Result:
    """Run all blocks in sequence; returns states as a tuple, losses summed by name, extras as a list for each name.

    Only blocks with a cross pattern receive the memory, with its mask and positions. Only layers that honour roles
    receive them; other layers treat tokens with a role as ordinary tokens.
    """
    after: list[Any] = []
    losses: dict[str, Loss] = {}
    extras: dict[str, Any] = {}
    check_roles(blocks, context)
    alone = context if memory is None else context.replace(memory_mask=None, memory_positions=None)
    for block, state in zip(blocks, states, strict=True):
        if block.cross:
            result = block(x, memory, context=context, state=state)
        else:
            result = block(x, context=alone, state=state)
        x = result.output
        after.append(result.state)
        add_losses(losses, result.losses)
        for name, value in result.extras.items():
            extras.setdefault(name, []).append(value)
    return Result(x, tuple(after), losses, extras)


def check_roles(blocks: Iterable[Any], context: Context) -> None:
    """Raise Unsupported for roles that no block honours."""
    if context.roles is not None and not any(block.takes_roles for block in blocks):
        raise Unsupported("roles of tokens in a model without a layer that honours them", supported="roles=None")


def grid_axes(blocks: Iterable[Any]) -> int | None:
    """Return the number of axes of the layers' inputs: 1 for sequences, 2 or 3 for grids; None if any will do.

    Raises:
        Unsupported: if no input suits all layers.
    """
    first = None
    for block in blocks:
        axes = getattr(block.mixer, "grid_axes", None)
        if first is None or axes is None:
            first = first if axes is None else block
        elif axes != first.mixer.grid_axes:
            raise Unsupported(
                f"a layer of {block.entry[0]} for {_inputs(axes)} next to a layer of {first.entry[0]} for "
                f"{_inputs(first.mixer.grid_axes)}",
                supported="layers that take the same inputs",
                nearest=f"{_sequence_entry(block if axes > 1 else first)} in the plan",
            )
    return None if first is None else first.mixer.grid_axes


def check_sequences(blocks: Iterable[Any], where: str, *, supported: str) -> None:
    """Raise Unsupported for a layer that only takes grids; `where` names the model and what it lacks."""
    for block in blocks:
        axes = getattr(block.mixer, "grid_axes", None) or 1
        if axes > 1:
            raise Unsupported(
                f"a layer of {block.entry[0]} for {_inputs(axes)} in {where}",
                supported=supported,
                nearest=f"{_sequence_entry(block)} in the plan, for sequences",
            )


def _inputs(axes: int) -> str:
    return "sequences" if axes == 1 else f"grids of {axes} axes"


def _sequence_entry(block: Any) -> tuple[str, dict[str, Any]]:
    """The plan's entry for the same mechanism on sequences."""
    return block.entry[0], {**block.entry[1], **block.mixer.for_sequences}
