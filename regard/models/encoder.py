"""An encoder with any mechanism in any layer, and a classification head.

Pre-norm residual blocks over tokens or float features, a pool over the valid tokens, and a linear head::

    model = Encoder(EncoderConfig(num_classes=10, features=1, plan="flow_attention", num_layers=2))
    logits = model(x, context=Context(mask=Mask(valid=valid))).output        # (B, 10)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from regard.catalogue import get_mechanism, list_mechanisms
from regard.contract import Context, Kind, Loss, Mask, Pattern, Result, Unsupported, closest
from regard.core.ragged import Gathering, gathering
from regard.create import create_layer
from regard.layers.checks import given_context
from regard.layers.embedding import make_embedding
from regard.layers.feed_forward import dropout
from regard.layers.linear import make_linear
from regard.layers.norms import make_norm
from regard.layers.patches import FeatureEmbedding
from regard.layers.pooling import POOLINGS, SIMPLE, make_pooling
from regard.models.blocks import Block, check_sequences, grid_axes
from regard.models.evaluating import evaluation_mode
from regard.models.exit_rules import ExitRule, Leaving
from regard.models.exits import apply_head, make_exits, run_with_exits
from regard.models.inputs import embed_tokens, right_padded_mask
from regard.models.layer_plan import Plan, check_plan, read_plan
from regard.models.losses import add_losses
from regard.models.placing import input_positions, make_input_positions, place_input
from regard.models.stack import LayersConfig, Pass, Stack

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from regard.tasks.protocol import Task

POOLS = (*POOLINGS, "none")
"""Pools that are not mechanisms."""


@dataclass(frozen=True)
class EncoderConfig(LayersConfig):
    """The configuration of an :class:`Encoder`.

    Attributes:
        num_classes: width of the output.
        vocab_size: number of tokens; None when the inputs are floats.
        features: width of float inputs; None when the inputs are tokens. Exactly one of the two is given.
        pool: one of :mod:`regard.layers.pooling` over the valid tokens (``mean``, ``max``, ``first``, ``last``,
            ``additive``, ``structured``), or a pooling mechanism, whose slots are concatenated. ``none``: an output for
            each token.
        pool_options: options of ``additive`` (`hidden`), ``structured`` (`slots`, `hidden`, `diversity`), or the
            mechanism.
        causal: whether tokens only attend to themselves and earlier tokens. With ``pool="none"`` each output then
            depends on the tokens read so far, as in a language model, but float features are accepted too.
        plan: as in :class:`regard.models.LanguageModelConfig`. Layers that only take grids (``large_kernel`` unless
            ``axes=1``) need the `grid` of every call, so all of them must take the same number of axes.
        dim, num_layers, num_heads, head_dim, num_kv_heads, feed_forward, positions, position_options: as in
            :class:`regard.models.LanguageModelConfig`.
        max_length, dropout, norm, embedding_norm, embedding_dim, loss_weights, stack: as in
            :class:`regard.models.LanguageModelConfig`.
    """

    num_classes: int
    vocab_size: int | None = None
    features: int | None = None
    dim: int = 128
    plan: Any = "softmax"
    num_layers: int | None = None
    position_options: Mapping[str, Any] = field(default_factory=dict)
    max_length: int = 2048
    embedding_norm: str = "none"
    embedding_dim: int | None = None
    pool: str = "mean"
    pool_options: Mapping[str, Any] = field(default_factory=dict)
    causal: bool = False
    serves: ClassVar = (
        *((Pattern.NONCAUSAL_SELF, name) for name in ("classification", "regression", "segmentation", "masked-token")),
        (Pattern.CAUSAL_SELF, "regression"),
        (Pattern.CAUSAL_SELF, "events"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_input_kind(self.vocab_size, self.features)
        if self.embedding_dim is not None and self.vocab_size is None:
            raise Unsupported(
                f"embedding_dim={self.embedding_dim} of an encoder of measured features",
                supported="embedding_dim of tokens",
            )
        check_pool(self.pool)
        if self.pool in (*SIMPLE, "none") and self.pool_options:
            raise Unsupported(
                f"pool_options with pool={self.pool!r}",
                supported="pool_options of additive, structured, or a pooling mechanism",
            )
        object.__setattr__(self, "plan", read_plan(self.plan, self.num_layers))
        object.__setattr__(self, "num_layers", len(self.plan))

    @classmethod
    def for_task(cls, task: Task, plan: Any, **sizes: Any) -> EncoderConfig:
        """Return the config for a task (the hook of :func:`regard.models.registry.config_for`)."""
        if task.objective == "masked-token":
            return cls(task.vocab_size or 0, task.vocab_size, plan=plan, pool="none", **sizes)
        if task.objective in ("regression", "events"):
            causal = task.pattern.causal
            return cls(
                task.num_targets or 0, task.vocab_size, task.features, plan=plan, pool="none", causal=causal, **sizes
            )
        if task.objective == "segmentation":
            width = (task.num_targets or 0) * (task.num_classes or 0)
            return cls(width, task.vocab_size, task.features, plan=plan, pool="none", **sizes)
        return cls(task.num_classes or 0, task.vocab_size, task.features, plan=plan, **sizes)


class EncoderBase(nn.Module):
    """The input side of every encoder: embeds tokens or features and adds positions.

    Args:
        config: a config with vocab_size, features, dim, positions, dropout and optionally embedding_norm.
        plan: all layers that read the positions.
    """

    def __init__(self, config: Any, plan: Plan) -> None:
        super().__init__()
        self.config = config
        self.pattern = Pattern.CAUSAL_SELF if getattr(config, "causal", False) else Pattern.NONCAUSAL_SELF
        check_plan(plan, self.pattern, "an encoder")
        self.embedding: nn.Module = self.make_embedding(config)
        self.positions = make_input_positions(input_positions(plan, config.positions), config)
        self.embedding_norm = make_norm(getattr(config, "embedding_norm", "none"), config.dim)

    def make_embedding(self, config: Any) -> nn.Module:
        """Create the module that embeds the inputs as vectors (B, N, dim)."""
        if config.vocab_size is None:
            return FeatureEmbedding(config.features or 0, config.dim)
        return make_embedding(config.vocab_size, config.dim, getattr(config, "embedding_dim", None))

    def embed(self, inputs: Tensor, context: Context) -> tuple[Tensor, Context, Gathering, dict[str, Loss]]:
        """Return the first layer's right-padded input (B, N, dim), the layers' context, the layout and position losses.

        The layout maps the tokens back to their original places. Raises Unsupported for inputs of another kind or
        shape.
        """
        axes = 2 if self.config.features is None else 3
        if inputs.ndim != axes or inputs.is_floating_point() != (axes == 3):
            expected = "integers (B, N)" if axes == 2 else f"floats (B, N, {self.config.features})"
            raise Unsupported(f"inputs of dtype {inputs.dtype} and shape {tuple(inputs.shape)}", supported=expected)
        layout = gathering(context.mask, inputs.shape[0], inputs.shape[1], inputs.device)
        if context.grid is not None and layout.dense_index is not None:
            raise Unsupported("padding left or inside, or packing, of a grid", supported="whole or right-padded grids")
        inputs = layout.gather(inputs, axis=1)  # right-padded, a row for each sequence
        inner = context.replace(
            mask=right_padded_mask(context.mask, layout),
            positions=None if context.positions is None else layout.gather(context.positions, axis=1),
            roles=None if context.roles is None else layout.gather(context.roles, axis=1),
        )
        x = embed_tokens(self.embedding, inputs)  # (B, N, dim)
        where = torch.arange(x.shape[1], device=x.device)[None] if inner.positions is None else inner.positions
        x, inner, losses = place_input(self.positions, x, where, inner, movable=inner.positions is None)
        x = self.embedding_norm(x)
        x = dropout(x, self.config.dropout, training=self.training, generator=context.generator)
        return x, inner, layout, losses


class Encoder(EncoderBase):
    """Embedding, blocks, norm, pool, head; see :class:`EncoderConfig`."""

    config: EncoderConfig

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config, config.plan)
        self.blocks = Stack([Block(entry, config, self.pattern) for entry in config.plan], config.stack)
        grid_axes(self.blocks)
        self.norm = make_norm(config.norm, config.dim)
        self.pooling, slots = make_pool(config), 1
        if self.pooling is not None:
            slots = count_slots(self.pooling, config.dim)

        def head() -> nn.Module:
            return make_linear(slots * config.dim, config.num_classes, bias=True)

        self.head = head()
        self.exits = make_exits(config, None if self.pooling is None else head)

    def forward(self, inputs: Int[Tensor, "b n"] | Float[Tensor, "b n f"], *, context: Context | None = None) -> Result:
        """Compute the logits of the classes.

        Args:
            inputs: tokens or features, padded anywhere or packed, as `context.mask` says.
            context: mask, positions, grid, generator, progress.

        Returns:
            output (B, num_classes), one row per document when packed; (B, N, num_classes) without a pool, zero at
            padding. Auxiliary losses summed over the layers; extras as lists with one entry for each layer that has
            them. In training with exits, ``extras["exits"]`` has each exit's share of the layers and its logits; where
            sequences (or tokens, without a pool or with halting units) leave early, ``extras["exit_layer"]`` has the
            number of layers that each has passed, 0 at padding.
        """
        context = given_context(context)
        if context.grid is None:
            check_sequences(
                self.blocks, "an encoder that is called without a grid", supported="context=Context(grid=sides)"
            )
        x, inner, layout, losses = self.embed(inputs, context)
        states = [None] * len(self.blocks)
        rule, pooled = self.config.stack.rule, self.config.pool != "none"
        if pooled and rule is not None and not rule.halts and not self.training:
            return self._leave_early(Pass(self.blocks, x, inner, states), rule)
        result = run_with_exits(
            self.blocks,
            self.exits,
            self.norm,
            self.head,
            x,
            inner,
            states,
            place=(lambda x: x) if pooled else (lambda x: layout.scatter(x, axis=1)),
        )
        add_losses(result.losses, losses)
        result.state = None

        def read(x: Tensor, head: nn.Module = self.head) -> Tensor:
            if pooled:
                return head(pool_tokens(self.pooling, x, inner, result.losses))
            logits = head(x)  # the head's bias at padding
            return logits if layout.valid is None else logits.where(layout.valid[..., None], 0)

        return apply_head(result, read, self.exits)

    def _leave_early(self, work: Pass, rule: ExitRule) -> Result:
        """Run the layers, dropping each sequence from the batch at the exit where the rule lets it leave."""
        if work.context.want:
            raise Unsupported(
                f"want={set(work.context.want)} of sequences that leave early",
                supported="exit_rule=None",
                nearest="regard.models.set_exit_rule(model, None)",
            )
        x, leaving = work.hidden, Leaving(rule)
        rows = torch.arange(x.shape[0], device=x.device)  # sequences still being computed
        output = x.new_zeros(x.shape[0], self.config.num_classes)
        passed = torch.full_like(rows, self.blocks.layers)
        places: list[tuple[Any, Any]] = [(one.norm, self.head if one.head is None else one.head) for one in self.exits]
        layers = (*self.config.stack.exits, self.blocks.layers)
        for layer, (norm, head) in zip(layers, [*places, (self.norm, self.head)], strict=True):
            work.advance(layer)
            logits = head(pool_tokens(self.pooling, norm(work.hidden), work.context, work.losses))
            last = layer == self.blocks.layers
            done = torch.ones_like(rows, dtype=torch.bool) if last else leaving.decide(logits, layer)
            output[rows[done]] = logits[done].to(output.dtype)
            passed[rows[done]] = layer
            rows = rows[~done]
            if not rows.numel():
                break
            work.keep_rows(~done)
        self.blocks.tell(passed)
        return Result(output, None, work.losses, {"exit_layer": passed})


def make_pool(config: Any) -> nn.Module | None:
    """Create the layer that pools an encoder's tokens; None with ``pool="none"``."""
    if config.pool == "none":
        return None
    if config.pool in POOLINGS:
        return make_pooling(config.pool, config.dim, config.num_heads, **config.pool_options)
    card = get_mechanism(config.pool)
    pattern = Pattern.NONCAUSAL_SELF if Pattern.NONCAUSAL_SELF in card.patterns else card.patterns[0]
    return create_layer(config.pool, config.dim, config.num_heads, pattern=pattern, **config.pool_options)


def pool_tokens(
    pooling: nn.Module | None, x: Float[Tensor, "b n c"], context: Context, losses: dict[str, Loss]
) -> Float[Tensor, "b c2"]:
    """Pool right-padded sequences into a head's input; the pool's losses are added to `losses`."""
    assert pooling is not None  # pool="none" has nothing to pool
    mask = context.mask
    padding = None if mask is None or mask.lengths is None else Mask(lengths=mask.lengths, layout=mask.layout)
    pooled = pooling(x, context=Context(mask=padding, generator=context.generator, progress=context.progress))
    add_losses(losses, pooled.losses)
    return pooled.output.flatten(1)  # (B, slots * dim)


def check_input_kind(vocab_size: int | None, features: int | None) -> None:
    """Raise Unsupported unless exactly one of `vocab_size` and `features` is given."""
    if (vocab_size is None) == (features is None):
        raise Unsupported(
            f"vocab_size={vocab_size} and features={features}",
            supported="vocab_size for tokens or features for floats, and None for the other",
        )


def check_pool(name: str) -> None:
    """Raise Unsupported unless `name` is one of `POOLS` or a pooling mechanism."""
    if name in POOLS:
        return
    choices = (*POOLS, *list_mechanisms(kind=Kind.POOLING))
    words = [word for choice in choices[len(POOLS) :] for word in (choice, *get_mechanism(choice).aliases)]
    if name not in words:
        raise Unsupported(f"pool {name!r}", supported=", ".join(choices), nearest=closest(name, [*POOLS, *words]))


def count_slots(pooling: nn.Module, dim: int) -> int:
    """Return a pooling layer's number of slots; raises Unsupported if it depends on the number of tokens."""
    with torch.no_grad(), evaluation_mode(pooling):
        few, many = (pooling(torch.zeros(1, n, dim)).output.shape[1] for n in (8, 16))
    if few != many:
        raise Unsupported(
            "a pool whose number of slots depends on the number of tokens",
            supported="a fixed number of slots",
            nearest='pool="mean"',
        )
    return few
