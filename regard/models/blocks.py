"""Parts that the models share: the layer plan, the pre-norm block, and how a call's padding reaches the layers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from regard.catalogue import get_mechanism, resolve
from regard.contract import (
    Context,
    Kind,
    Loss,
    Mask,
    Mechanism,
    Pattern,
    Result,
    Unsupported,
    closest,
    valid_from_lengths,
)
from regard.core.ragged import Gathering, inner_mask
from regard.create import create_layer
from regard.layers.attention import AttentionLayer, why_refused
from regard.layers.embedding import FactorisedEmbedding
from regard.layers.feed_forward import (
    FEED_FORWARDS,
    MixtureOfExperts,
    check_dropout,
    dropout,
    feed_forward_options,
    make_feed_forward,
)
from regard.layers.norms import LayerScale, make_norm
from regard.layers.options import shell_options
from regard.models.variants import read_variant
from regard.positions import Positions, create_positions, list_positions

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Plan = tuple[tuple[str, Mapping[str, Any]], ...]
"""Mechanism and options of each layer."""

EMBEDDED_POSITIONS = ("sinusoidal", "learned", "seqpe")
"""Schemes that act on the model's input rather than inside a layer."""

SHARED_POSITIONS = ("seqpe_mul", "seqpe_add", "seqpe_scalar")
"""Schemes that act inside the layers, by vectors which the model makes of positions once for all of them."""

LOSS_WEIGHT = 0.01
"""Weight of an auxiliary loss that a config does not name, as is usual for the balance of routers (arXiv 2101.03961)."""

LOSS_WEIGHTS = {"position_contrast": 0.1, "position_transfer": 0.1, "commitment": 1e-4, "reconstruction": 1.0}
LOSS_WEIGHTS |= {"generator": 0.02}
"""Other weights of losses that a config does not name: of sequential position encoding (arXiv 2506.13277), of routing (public
code), of compressive memory (arXiv 1911.05507), whose loss reaches the compression alone, and of the generator beside a
discriminator, which weighs 50 times as much (arXiv 2003.10555)."""

FEED_FORWARD_OPTIONS = ("feed_forward_kind", "feed_forward_options")
"""Options of a plan's entry for its feed-forward network beside the hidden width."""

GATES = {"log_decay", "beta"}
"""Inputs through which a recurrence knows the order of its tokens."""


def read_plan(plan: str | Sequence[Any], num_layers: int | None) -> Plan:
    """The plan of a model, one (name, options) a layer.

    Args:
        plan: a mechanism for all layers or a pattern of several, as :func:`regard.models.variants.read_variant` reads it, or
            a list with such a text or a (name, options) for each layer.
        num_layers: how often to repeat a single name (4 when None), or a multiple of the pattern; must agree with a list's
            length when given.

    Raises:
        Unsupported: for an entry of another form, an unknown name, or a length that disagrees.
    """
    entries: list[Any]
    if isinstance(plan, str):
        variant = read_variant(plan)
        repeated = 4 if len(variant.layers) == 1 else len(variant.layers)
        entries = list(variant.plan(repeated if num_layers is None else num_layers))
    elif not isinstance(plan, Sequence):
        raise Unsupported(f"plan={plan!r}", supported="a mechanism, or a list with one (and options) for each layer")
    else:
        entries = [
            part for entry in plan for part in (read_variant(entry).layers if isinstance(entry, str) else [entry])
        ]
    if not entries or (num_layers is not None and len(entries) != num_layers):
        raise Unsupported(
            f"a plan of {len(entries)} layers with num_layers={num_layers}",
            supported="one name for all layers, or as many entries as layers (at least one)",
            nearest=f"num_layers={max(len(entries), 1)}",
        )
    layers = []
    for entry in entries:
        name, options = _read_entry(entry)
        card, options = resolve(name, options)
        stands_alone = name in card.aliases and name not in card.alias_options
        name, kind = name if stands_alone else card.name, card.kind
        if kind in (Kind.POOLING, Kind.PROJECTION):
            elsewhere = {
                Kind.PROJECTION: f'("softmax", {{"linear": "{name}"}})',
                Kind.POOLING: f'EncoderConfig(pool="{name}")',
            }
            raise Unsupported(
                f"{name}, a {kind.value}, as a layer of a model",
                supported="kinds attention, mixer and wrapper",
                nearest=elsewhere[kind],
            )
        layers.append((name, dict(options)))
    return tuple(layers)


def _read_entry(entry: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(entry, Sequence) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], Mapping):
        return entry[0], entry[1]
    raise Unsupported(f"plan entry {entry!r}", supported='"name" or ("name", {"option": value})')


def check_ids(ids: Int[Tensor, "b n"]) -> None:
    """Raise Unsupported unless `ids` are integers (B, N)."""
    if not isinstance(ids, Tensor):
        raise Unsupported(f"ids of type {type(ids).__name__}", supported="a tensor of integers (B, N)")
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise Unsupported(f"ids of dtype {ids.dtype} and shape {tuple(ids.shape)}", supported="integers (B, N)")


def embed_tokens(table: nn.Module, tokens: Tensor) -> Float[Tensor, "b n c"]:
    """Rows of an embedding, or projected features; an id that has no row raises Unsupported (on a CPU, outside a graph)."""
    if torch.compiler.is_compiling():
        return table(tokens)
    try:
        return table(tokens)
    except IndexError as error:
        raise Unsupported(
            f"token ids from {int(tokens.min())} to {int(tokens.max())}",
            supported=f"0 to {table.num_embeddings - 1}"
            if isinstance(table, nn.Embedding | FactorisedEmbedding)
            else "ids of the vocabulary",
        ) from error


def layer_positions(card: Mechanism, asked: str) -> str:
    """The position scheme inside a layer, for the scheme asked of the model.

    ``auto`` is rotary where the mechanism accepts it, and none for recurrences with gates (which know the order of
    their tokens) and for kinds with a structure of their own; a card may name another default. A scheme of the model's
    input is none inside the layers.
    """
    if asked in EMBEDDED_POSITIONS:
        return "none"
    if asked != "auto":
        return asked
    if "positions" in card.layer_defaults:
        return card.layer_defaults["positions"] or "none"
    rotates = layer_accepts(card, "positions") and "rotary" in card.accepts_positions and not _knows_order(card)
    return "rotary" if rotates else "none"


def check_plan(plan: Plan, pattern: Pattern, where: str) -> None:
    """Raise Unsupported for a mechanism of the plan that lacks the pattern or inserts tokens; `where` names the place."""
    for name, options in plan:
        for card in (get_mechanism(name), mixing_card(name, options)):
            card.require_pattern(pattern)
            if card.prepare is not None:
                raise Unsupported(f"{card.name}, which inserts tokens, in {where}", supported="language models")


def grid_axes(blocks: Iterable[Any]) -> int | None:
    """Axes of the inputs that the layers take: 1 for sequences, 2 or 3 for grids; None where they take any.

    Raises:
        Unsupported: where no input suits all of them.
    """
    first = None
    for block in blocks:
        axes = getattr(block.mixer, "grid_axes", None)
        if first is None or axes is None:
            first = first if axes is None else block
        elif axes != first.mixer.grid_axes:
            raise Unsupported(
                f"a layer of {block.entry[0]} for {_inputs(axes)} beside one of {first.entry[0]} for "
                f"{_inputs(first.mixer.grid_axes)}",
                supported="layers that take the same inputs",
                nearest=f"{_sequence_entry(block if axes > 1 else first)} in the plan",
            )
    return None if first is None else first.mixer.grid_axes


def check_sequences(blocks: Iterable[Any], where: str, *, supported: str) -> None:
    """Raise Unsupported for a layer that takes grids alone; `where` names the model and what it lacks."""
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


def mixing_card(name: str, options: Mapping[str, Any]) -> Mechanism:
    """The card that decides about positions: that of the wrapped mechanism, where a wrapper's options name one."""
    card = get_mechanism(name)
    return resolve(options["mechanism"])[0] if card.kind is Kind.WRAPPER and "mechanism" in options else card


def layer_accepts(card: Mechanism, option: str) -> bool:
    """Whether the mechanism's layer has an option of the attention shell (kinds of their own structure may not)."""
    return card.module is None or option in shell_options(card.module)


def _knows_order(card: Mechanism) -> bool:
    return card.kind is Kind.MIXER or bool(GATES & {name.rstrip("?") for name in card.inputs})


def input_positions(plan: Plan, asked: str) -> str:
    """The position scheme of a model's input, for the scheme asked of the model.

    ``auto`` adds sinusoidal positions when no layer of the plan would know the order of its tokens otherwise.
    """
    if asked not in ("auto", *list_positions()):
        supported = ("auto", *list_positions())
        raise Unsupported(f"positions {asked!r}", supported=", ".join(supported), nearest=closest(asked, supported))
    cards = [(mixing_card(name, options), options.get("positions", asked)) for name, options in plan]
    for card, own in cards:
        if own in EMBEDDED_POSITIONS and own != asked:
            raise Unsupported(
                f"{own} positions for one layer ({card.name})",
                supported=f"{', '.join(EMBEDDED_POSITIONS)} for the whole model, since they act on its input",
                nearest=f"positions={own!r} in the model's config",
            )
        if own in EMBEDDED_POSITIONS and own not in card.accepts_positions:
            raise Unsupported(
                f"{own} positions with {card.name}{why_refused(card, own)}",
                supported=", ".join(card.accepts_positions),
                nearest="auto",
            )
    if asked in EMBEDDED_POSITIONS:
        return asked
    if asked in SHARED_POSITIONS:
        used = [layer_accepts(get_mechanism(name), "positions") and "positions" not in own for name, own in plan]
        return asked if any(used) else "none"
    if asked != "auto":
        return "none"
    blind = all(not _knows_order(card) and layer_positions(card, own) == "none" for card, own in cards)
    explicit = any(own == "none" for _, own in cards)
    accepted = all("sinusoidal" in card.accepts_positions for card, _ in cards)
    return "sinusoidal" if blind and accepted and not explicit else "none"


def make_input_positions(name: str, config: Any) -> Positions | None:
    """The module that adds positions to a model's input, or encodes them for all layers; None where neither is done."""
    if name not in (*EMBEDDED_POSITIONS, *SHARED_POSITIONS):
        return None
    options = dict(config.position_options) if name == config.positions else {}
    positions = create_positions(
        name,
        dim=config.dim,
        heads=config.num_heads,
        head_dim=config.head_dim or config.dim // config.num_heads,
        kv_heads=config.num_kv_heads,
        max_length=config.max_length,
        **options,
        **({"part": "encoder"} if name in SHARED_POSITIONS else {}),
    )
    if name == "learned":
        for table in positions.parameters():
            table._no_weight_decay = True  # type: ignore[attr-defined]
    return positions


def place_input(
    scheme: Positions | None, x: Float[Tensor, "b n c"], where: Int[Tensor, "#b n"], context: Context, *, movable: bool
) -> tuple[Float[Tensor, "b n c"], Context, dict[str, Loss]]:
    """A model's right-padded input with its positions, the context of its layers, and the losses of its scheme.

    Args:
        movable: whether `where` are the ranks of whole sequences, which a scheme may move in training.
    """
    losses: dict[str, Loss] = {}
    if scheme is None:
        return x, context, losses
    if scheme.prepare is not None:
        where = torch.arange(x.shape[1], device=x.device)[None] if movable else where  # one row for all
        where, losses = scheme.prepare(where, context.grid, context.generator, movable=movable)
    if scheme.embed is None:
        return x, context.replace(position_vectors=where), losses
    return scheme.embed(x, where), context, losses


def _take_feed_forward(options: dict[str, Any], width: int | None) -> Callable[[int], nn.Module] | None:
    """Take the feed-forward network out of the options of a plan's entry: what makes it of the model's dim, None for none.

    `width` is the hidden width where the entry names none.
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
            if option not in taken:  # hidden dropout would not follow the context's generator
                raise Unsupported(
                    f"option {option!r} of feed-forward {kind!r} in a model",
                    supported=", ".join(taken),
                    nearest=closest(option, taken),
                )
    elif not named:
        width = None
    return lambda dim: make_feed_forward(kind, dim, width, **own)


class Block(nn.Module):
    """A pre-norm residual block: x + mix(norm(x)), then x + feed_forward(norm(x)).

    What a branch adds passes its end first: the norm and the factors that the model's stack asks for, then the dropout.
    In a cross pattern the mixer reads the memory as it is given, without a norm and without positions unless the plan
    names a scheme.

    Args:
        entry: mechanism and options from the plan. The options ``positions``, ``feed_forward``, ``num_heads``,
            ``head_dim`` and ``num_kv_heads`` override the model's; without heads (``num_heads=0``) the block has no mixer,
            as pruned models have them; ``feed_forward_kind`` and ``feed_forward_options`` are
            of :func:`regard.layers.feed_forward.make_feed_forward`; the others belong to the layer. The model's
            positions, head_dim and num_kv_heads apply to layers that have such an option, its feed_forward to networks
            that have a hidden width.
        config: the model's, with dim, num_heads, head_dim, num_kv_heads, feed_forward, positions, dropout, norm and
            stack.
        pattern: of the mechanism.
        feed_forward: hidden width where the plan names none; the model's when None.
    """

    def __init__(
        self, entry: tuple[str, Mapping[str, Any]], config: Any, pattern: Pattern, *, feed_forward: int | None = None
    ) -> None:
        super().__init__()
        name, options = entry[0], dict(entry[1])
        card = get_mechanism(name)
        network = _take_feed_forward(options, config.feed_forward if feed_forward is None else feed_forward)
        num_heads = options.pop("num_heads", config.num_heads)
        positions = options.pop("positions", None)
        if positions is not None or layer_accepts(card, "positions"):
            default = "none" if pattern.cross else config.positions
            scheme = options["positions"] = layer_positions(mixing_card(name, options), positions or default)
            shared = getattr(config, "position_options", {})
            if shared and config.positions == "auto":
                raise Unsupported(
                    "position_options of positions='auto'", supported="a scheme by name", nearest="positions='rotary'"
                )
            if positions is None and scheme == config.positions:
                own = {"part": "layer"} if scheme in SHARED_POSITIONS else {}
                if shared or own:
                    options["position_options"] = {**shared, **options.get("position_options", {}), **own}
        for option in ("head_dim", "num_kv_heads"):
            value = getattr(config, option)
            if value is not None and layer_accepts(card, option):
                options.setdefault(option, value)
        check_dropout(config.dropout)
        self.entry = entry
        self.cross = pattern.cross
        #: whether a sequence can go on from a state
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
        """Right-padded `x` (and memory, in a cross pattern whose state has not absorbed it); the output is (B, N, C)."""
        mixed = self.mix(x, memory, context=context, state=state)
        x = x + mixed.output
        if self.feed_forward is not None:
            x = x + self.feed(x, context=context, losses=mixed.losses)
        return Result(x, mixed.state, mixed.losses, mixed.extras)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        memory: Float[Tensor, "b m c"] | None = None,
        *,
        context: Context,
        state: Any = None,
    ) -> Result:
        """The mixer's addition to `x`, as its output."""
        if context.roles is not None and not self.takes_roles:
            context = context.replace(roles=None)
        mixed = self.mixer(self.mixer_norm(x), memory, context=context, state=state)
        update = self.mixer_end(mixed.output)
        mixed.output = dropout(update, self.dropout, training=self.training, generator=context.generator)
        return mixed

    def take_up(self, x: Float[Tensor, "b n c"], *, context: Context, state: Any = None) -> Any:
        """The mixer's state after tokens of which it adds nothing to the stream, where that takes less than :meth:`mix`; None
        where it does not."""
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
        """The addition to `x` of the feed-forward network, in a block that has one; each token alone, but for a capacity.

        Args:
            valid: tokens that are no padding; those that the context's mask says when None.
            losses: gets those of a network that has some.
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


def valid_tokens(context: Context, n: int) -> Bool[Tensor, "b n"] | None:
    """Which of `n` right-padded tokens a row has; None where it has all."""
    lengths = None if context.mask is None else context.mask.lengths
    return None if lengths is None else valid_from_lengths(lengths, n)


class NoMixer(nn.Module):
    """In the place of a mixer that is no more: adds 0, and has no state."""

    def forward(self, x: Tensor, memory: Tensor | None = None, *, context: Context, state: None = None) -> Result:
        return Result(torch.zeros_like(x))


def _branch_end(branch: str, config: Any) -> nn.Sequential:
    """Modules that the output of the ``mixer`` or the ``feed_forward`` network passes before it is added to the stream."""
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


def run_blocks(
    blocks: Sequence[Block] | nn.ModuleList,
    x: Float[Tensor, "b n c"],
    context: Context,
    states: Sequence[Any],
    memory: Float[Tensor, "b m c"] | None = None,
) -> Result:
    """All blocks in turn: states as a tuple, losses added by name, extras as one list by name.

    Memory, with its mask and positions, goes to the blocks of a cross pattern. Roles go to the layers that honour them; the others see tokens with a role as ordinary tokens.
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


def add_losses(losses: dict[str, Loss], more: Mapping[str, Loss]) -> None:
    """Add auxiliary losses, each (sum, count), to those of the same name."""
    for name, (total, count) in more.items():
        before = losses.get(name)
        losses[name] = (total, count) if before is None else (before[0] + total, before[1] + count)


def right_padded_mask(mask: Mask | None, layout: Gathering) -> Mask | None:
    """The mask that the layers see once tokens are gathered to the right-padded layout."""
    bias = None if mask is None else mask.bias
    blocks = None if mask is None else mask.blocks
    if bias is not None and layout.lengths is not None:
        rows = bias.expand(layout.source_batch, -1, -1, -1)
        for axis in (-2, -1):
            rows = layout.gather(rows, axis=axis) if rows.shape[axis] > 1 else rows
        bias = rows
    return inner_mask(layout, bias=bias, blocks=blocks)


def auxiliary_loss(losses: Mapping[str, Loss], weights: Mapping[str, float]) -> Tensor | float:
    """The layers' auxiliary losses (each a mean, sum / count), weighted by name."""
    known = {**LOSS_WEIGHTS, **weights}
    return sum(known.get(name, LOSS_WEIGHT) * total / count.clamp(min=1) for name, (total, count) in losses.items())


_EVALUATING: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""In how many blocks of :func:`evaluation_mode` each module is that was in training mode before the first."""
_LOCK = threading.Lock()


@contextmanager
def evaluation_mode(model: nn.Module, modules: Sequence[nn.Module] | None = None) -> Iterator[None]:
    """The model without dropout inside the block, and as it was after it, or after the last of several threads' blocks.

    Args:
        modules: all of the model's, if they are known.
    """
    with _LOCK:
        every = model.modules() if modules is None else modules
        elsewhere = len(_EVALUATING) > 0
        held = [module for module in every if module.training or (elsewhere and module in _EVALUATING)]
        if any(module.training for module in held):
            model.eval()
        for module in held:
            _EVALUATING[module] = _EVALUATING.get(module, 0) + 1
    try:
        yield
    finally:
        with _LOCK:
            for module in held:
                _EVALUATING[module] -= 1
                if not _EVALUATING[module]:
                    del _EVALUATING[module]
                    module.training = True
