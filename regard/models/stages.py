"""Encoders in stages, between which tokens become fewer and possibly wider, as in image pyramids and funnels.

Any layer can have any mechanism; the plan is divided into stages, each of which may begin with a shortening::

    stages = [{"layers": 2}, {"layers": 4, "shortening": "merge", "widen": 2}]
    config = PyramidEncoderConfig(num_classes=10, features=16, plan="large_kernel*2 + softmax*4", axes=2, stages=stages)
    logits = PyramidEncoder(config)(patches, context=Context(grid=(14, 14))).output      # (B, 10)

With ``pool="none"`` each token has an output: the vectors of a stage are upsampled to the positions that they were made
from and added to those of the stage before, back to the full length, where decoder layers may follow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from regard.contract import Context, Pattern, Result, Unsupported, at_least, check_options, check_types, one_of
from regard.create import create_layer
from regard.layers.checks import given_context
from regard.layers.linear import make_linear
from regard.layers.norms import make_norm
from regard.layers.shortening import SHORTENINGS, Shortening, Windows
from regard.mechanisms.funnel import FunnelPooling, upsample
from regard.models.blocks import Block, check_sequences, grid_axes
from regard.models.encoder import EncoderBase, check_input_kind, check_pool, count_slots, make_pool, pool_tokens
from regard.models.encoder_decoder import count_layers
from regard.models.layer_plan import read_plan
from regard.models.losses import add_losses
from regard.models.placing import SHARED_POSITIONS
from regard.models.stack import LayersConfig, Stack

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from regard.tasks.protocol import Task

PATTERN = Pattern.NONCAUSAL_SELF


@dataclass(frozen=True)
class StageConfig:
    """A stage of a :class:`PyramidEncoder`.

    Attributes:
        layers: number of plan entries in this stage, >= 0.
        shortening: how the stage's tokens are made from those before it: ``none``, ``merge``, ``convolution``,
            ``mean``, ``max`` (see :mod:`regard.layers.shortening`), or ``funnel``, the mechanism, whose layers halve a
            sequence.
        size: tokens of a window along each axis, >= 2; not for a funnel.
        widen: width of the stage's tokens as a multiple of the model's `dim`, >= 1; heads and feed-forward networks
            grow by the same factor.
        options: options of a funnel.
    """

    layers: int
    shortening: str = "none"
    size: int = 2
    widen: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self)
        at_least("layers", self.layers, 0)
        one_of("shortening", self.shortening, ("none", *SHORTENINGS, "funnel"))
        at_least("size", self.size, 2)
        at_least("widen", self.widen, 1)
        if self.options and self.shortening != "funnel":
            raise Unsupported(f"options of shortening={self.shortening!r}", supported="options of a funnel")

    @classmethod
    def read(cls, given: StageConfig | Mapping[str, Any]) -> StageConfig:
        """Make a config from a mapping of options; raises Unsupported for an unknown option or without `layers`."""
        if isinstance(given, StageConfig):
            return given
        check_options(cls, given, "a stage")
        if "layers" not in given:
            raise Unsupported("a stage without layers", supported="the number of its layers", nearest='{"layers": 2}')
        return cls(**given)


@dataclass(frozen=True)
class PyramidEncoderConfig(LayersConfig):
    """The configuration of a :class:`PyramidEncoder`.

    Attributes:
        num_classes: width of the output.
        vocab_size: number of tokens; None when the inputs are floats.
        features: width of float inputs; None when the inputs are tokens. Exactly one of the two is given.
        plan, num_layers: the layers of all stages, in order.
        stages: a :class:`StageConfig` or a mapping for each stage; their layers add up to the plan's. When empty, there
            are two halves, of which the second merges windows of two tokens along each axis and is twice as wide.
        axes: number of axes of the inputs: 1 for sequences; 2 or 3 for grids, which need the `grid` of every call.
        dim, num_heads, feed_forward, num_kv_heads: sizes of a stage with ``widen=1``.
        decoder_plan: layers at full length after the last stage, with ``pool="none"``; no layers when empty, two layers
            for a single name.
        pool, pool_options: as in :class:`regard.models.EncoderConfig`.
        stack: see :class:`regard.models.StackConfig`; applies to each stage and has no exits. Stochastic depth counts
            the layers of all stages.
        head_dim, positions, position_options, max_length, dropout, norm, embedding_norm, loss_weights: as in
            :class:`regard.models.LanguageModelConfig`.
    """

    num_classes: int
    vocab_size: int | None = None
    features: int | None = None
    dim: int = 128
    plan: Any = "softmax"
    num_layers: int | None = None
    stages: Any = ()
    axes: int = 1
    decoder_plan: Any = ()
    position_options: Mapping[str, Any] = field(default_factory=dict)
    max_length: int = 2048
    embedding_norm: str = "none"
    pool: str = "mean"
    pool_options: Mapping[str, Any] = field(default_factory=dict)
    serves: ClassVar = ((PATTERN, "classification"), (PATTERN, "regression"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stack.exits:
            raise Unsupported(
                f"exits={self.stack.exits} of stages", supported="exits of models with one stack", nearest="exits=()"
            )
        check_input_kind(self.vocab_size, self.features)
        check_pool(self.pool)
        one_of("axes", self.axes, (1, 2, 3))
        if self.positions in SHARED_POSITIONS:
            raise Unsupported(
                f"{self.positions} positions, which all layers share, in stages of other lengths",
                supported="positions of layers or of the input",
                nearest="positions='auto'",
            )
        object.__setattr__(self, "plan", read_plan(self.plan, self.num_layers))
        object.__setattr__(self, "num_layers", len(self.plan))
        object.__setattr__(self, "decoder_plan", self.decoder_plan or ())
        if self.decoder_plan:
            layers = count_layers(None, self.decoder_plan, default=2)
            object.__setattr__(self, "decoder_plan", read_plan(self.decoder_plan, layers))
        if self.decoder_plan and self.pool != "none":
            raise Unsupported(
                f"decoder_plan with pool={self.pool!r}", supported="pool='none', an output for each token"
            )
        stages = tuple(StageConfig.read(stage) for stage in self.stages) or _halves(len(self.plan))
        object.__setattr__(self, "stages", stages)
        if sum(stage.layers for stage in stages) != len(self.plan):
            raise Unsupported(
                f"stages of {' + '.join(str(stage.layers) for stage in stages)} layers for a plan of {len(self.plan)}",
                supported="stages whose layers add up to the plan's",
            )
        for stage in stages:
            if stage.shortening == "funnel" and self.axes > 1:
                raise Unsupported("a funnel on a grid", supported=", ".join(SHORTENINGS), nearest="shortening='merge'")

    @classmethod
    def for_task(cls, task: Task, plan: Any, **sizes: Any) -> PyramidEncoderConfig:
        """Return the config for a task (the hook of :func:`regard.models.registry.config_for`), with default stages."""
        axes = len(task.grid or (0,))
        if task.objective == "regression":
            width, pool = task.num_targets or 0, "none"
        else:
            width, pool = task.num_classes or 0, "mean"
        return cls(width, task.vocab_size, task.features, plan=plan, axes=axes, pool=pool, **sizes)


def _halves(layers: int) -> tuple[StageConfig, ...]:
    first = (layers + 1) // 2
    if first == layers:
        return (StageConfig(layers),)
    return StageConfig(first), StageConfig(layers - first, "merge", widen=2)


class Stage(nn.Module):
    """An optional shortening, blocks, and the norm through which their output is read.

    Args:
        config: the stage's config.
        sizes: the model's config, with the sizes of this stage.
        plan: the stage's layers.
        dim: width of the incoming tokens.
        before: number of layers before the stage, and of all the model's layers.
        axes: number of axes of the inputs.
    """

    def __init__(
        self,
        config: StageConfig,
        sizes: Any,
        plan: Sequence[Any],
        *,
        dim: int,
        before: tuple[int, int],
        axes: int,
    ) -> None:
        super().__init__()
        self.shortening = make_shortening(config, sizes, dim, axes)
        self.blocks = Stack([Block(entry, sizes, PATTERN) for entry in plan], sizes.stack, before=before)
        self.norm = make_norm(sizes.norm if plan else "none", sizes.dim)

    def forward(self, x: Float[Tensor, "b n c"], context: Context) -> tuple[Result, Context]:
        """Run the stage on right-padded tokens; returns the blocks' result and the context that they ran in."""
        if self.shortening is not None:
            x, context = self.shortening(x, context)
        return self.blocks.run(x, context, [None] * len(self.blocks)), context


class FunnelShortening(Shortening):
    """A funnel's layers as a shortening between two stages (:class:`regard.mechanisms.funnel.FunnelPooling`)."""

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        super().__init__()
        self.layer = cast(FunnelPooling, create_layer("funnel", dim, num_heads, pattern=PATTERN, **options))

    def shorten(
        self, x: Float[Tensor, "b n c"], lengths: Int[Tensor, " b"] | None, grid: tuple[int, ...] | None
    ) -> tuple[Float[Tensor, "b s c"], Int[Tensor, " b"] | None, tuple[int, ...] | None]:
        h, left = self.layer.shorten(x, lengths)
        whole = lengths is None and not self.layer.config.truncate
        return h, None if whole else left, None

    def back(
        self, y: Float[Tensor, "b s c"], n: int, lengths: Int[Tensor, " b"] | None, grid: tuple[int, ...] | None
    ) -> Float[Tensor, "b n c"]:
        if lengths is None:
            lengths = torch.full(y.shape[:1], y.shape[1], device=y.device)
        return upsample(y, lengths, n, self.layer.config)


def make_shortening(config: StageConfig, sizes: Any, dim: int, axes: int) -> Shortening | None:
    """Create the module that makes a stage's tokens from the previous ones, of width `dim`; None if there is none."""
    if config.shortening in SHORTENINGS:
        return Windows(config.shortening, dim, sizes.dim, size=config.size, axes=axes, norm=sizes.norm)
    if dim != sizes.dim:
        raise Unsupported(
            f"widen={config.widen} after tokens of width {dim} with shortening={config.shortening!r}",
            supported=f"{', '.join(SHORTENINGS)}, or the width of the stage before",
            nearest="shortening='merge'",
        )
    if config.shortening == "none":
        return None
    return FunnelShortening(dim, sizes.num_heads, **{"head_dim": sizes.head_dim, **config.options})


class PyramidEncoder(EncoderBase):
    """Embedding, stages, pool, head; see :class:`PyramidEncoderConfig`."""

    config: PyramidEncoderConfig

    def __init__(self, config: PyramidEncoderConfig) -> None:
        super().__init__(config, config.plan + config.decoder_plan)
        self.axes = config.axes
        self.stages, first, dim = nn.ModuleList(), 0, config.dim
        for stage in config.stages:
            sizes = _widened(config, stage.widen)
            plan, before = config.plan[first : first + stage.layers], (first, len(config.plan))
            self.stages.append(Stage(stage, sizes, plan, dim=dim, before=before, axes=config.axes))
            first, dim = first + stage.layers, sizes.dim
        widths = [config.dim * stage.widen for stage in config.stages]
        self.pooling = make_pool(_widened(config, config.stages[-1].widen))
        #: for outputs at full length: projections from each stage after the first to the width of the one before
        self.laterals = nn.ModuleList(
            nn.Identity() if outer == inner else make_linear(inner, outer, bias=False)
            for outer, inner in pairwise(widths if self.pooling is None else ())
        )
        sizes = _widened(config, config.stages[0].widen)
        self.decoder_blocks = Stack([Block(entry, sizes, PATTERN) for entry in config.decoder_plan], config.stack)
        self.decoder_norm = make_norm(config.norm if config.decoder_plan else "none", sizes.dim)
        slots = 0 if self.pooling is None else count_slots(self.pooling, dim)
        self.head = make_linear(slots * dim or sizes.dim, config.num_classes, bias=True)
        every = [*self.blocks, *self.decoder_blocks]
        grid_axes(every)
        if config.axes == 1:
            check_sequences(
                every, f"{type(self).__name__} for sequences", supported="axes=2 or 3, or layers for sequences"
            )

    @property
    def blocks(self) -> list[Block]:
        """The blocks of all stages, in the plan's order."""
        return [block for stage in self.stages for block in cast(Stage, stage).blocks]  # type: ignore[misc]

    def forward(self, inputs: Int[Tensor, "b n"] | Float[Tensor, "b n f"], *, context: Context | None = None) -> Result:
        """Compute the logits of the classes, for the whole input or for each token.

        Args:
            inputs: tokens or features, padded anywhere or packed, as `context.mask` says; grids must be whole or
                right-padded.
            context: mask, grid, generator, progress, and the extra results to request from the layers (`want`).

        Returns:
            output (B, num_classes), one row per document when packed; (B, N, num_classes) without a pool, zero at
            padding. Auxiliary losses summed over the layers; extras as lists with one entry for each layer that has
            them, with as many tokens as the layer's stage.

        Raises:
            Unsupported: for what shortened sequences cannot honour: masks on pairs, roles, explicit positions; and for
                a grid with another number of axes.
        """
        context = given_context(context)
        self._check_context(context)
        x, inner, layout, losses = self.embed(inputs, context)
        levels = [(x, inner)]  # the input of each stage, and the output of the last
        extras: dict[str, list[Any]] = {}

        def keep(result: Result) -> Tensor:
            add_losses(losses, result.losses)
            for name, values in result.extras.items():
                extras.setdefault(name, []).extend(values)
            return result.output

        for stage in self.stages:
            result, inner = stage(levels[-1][0], inner)
            levels.append((keep(result), inner))
        if self.pooling is not None:
            last = self.stages[-1].norm(levels[-1][0])  # type: ignore[operator]
            return Result(self.head(pool_tokens(self.pooling, last, inner, losses)), None, losses, extras)
        x = self._back(levels)
        if self.decoder_blocks:
            x = keep(self.decoder_blocks.run(x, levels[0][1], [None] * len(self.decoder_blocks)))
        return Result(layout.scatter(self.head(self.decoder_norm(x)), axis=1), None, losses, extras)

    def _back(self, levels: Sequence[tuple[Tensor, Context]]) -> Float[Tensor, "b n c"]:
        """Add up the outputs of all stages, from the last to the first, upsampled to the full length."""
        x: Any = 0
        for number in range(len(self.stages) - 1, -1, -1):
            stage = cast(Stage, self.stages[number])
            (before, outer), (after, inner) = levels[number : number + 2]
            x = stage.norm(after) + x
            if number > 0:
                x = self.laterals[number - 1](x)
            if stage.shortening is not None:
                lengths = None if inner.mask is None else inner.mask.lengths
                x = stage.shortening.back(x, before.shape[1], lengths, outer.grid)
        return x

    def _check_context(self, context: Context) -> None:
        name, mask = type(self).__name__, context.mask
        for what, given in (
            ("a bias or a block mask", mask is not None and (mask.bias is not None or mask.blocks is not None)),
            ("a grid", context.grid is not None and self.axes == 1),
            ("roles", context.roles is not None),
            ("explicit positions", context.positions is not None),
        ):
            if given:
                raise Unsupported(f"{what} in a {name}", supported="padding and packing", nearest="Encoder")
        if self.axes > 1 and len(context.grid or ()) != self.axes:
            raise Unsupported(
                f"grid={context.grid} in a {name} of axes={self.axes}",
                supported=f"context=Context(grid=...) with {self.axes} sides",
            )


def _widened(config: PyramidEncoderConfig, times: int) -> PyramidEncoderConfig:
    """Return the config with the sizes of a stage that is `times` times as wide."""
    sizes = {name: getattr(config, name) for name in ("dim", "num_heads", "num_kv_heads", "feed_forward")}
    grown: dict[str, Any] = {name: None if size is None else times * size for name, size in sizes.items()}
    return dataclasses.replace(config, **grown)
