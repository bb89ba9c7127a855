"""A forecaster with any mechanism between the horizon to be predicted and the past that has been observed.

The past of a series is embedded point by point or in patches (as in PatchTST, arXiv 2211.14730) and encoded. Each point
of the horizon, embedded from its time and the features known in advance, then attends to the encoded past through cross
attention, so that all points are predicted at once. With ``ordered=False`` both are sets, such as clouds of points::

    config = ForecasterConfig(features=4, memory_features=5, target_features=(0,), patch=8, quantiles=(0.1, 0.5, 0.9))
    forecast = Forecaster(config)(calendar, past).output      # (B, H, targets, quantiles)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.contract import Context, Loss, Mask, Pattern, Result, Unsupported, at_least, one_of, valid_from_lengths
from regard.core.precision import wide
from regard.core.ragged import gathering, inner_mask, place_queries, take_queries
from regard.layers.checks import check_memory_mask, check_tokens, given_context
from regard.layers.feed_forward import dropout
from regard.layers.linear import make_linear
from regard.layers.norms import make_norm
from regard.layers.patches import FeatureEmbedding
from regard.models.blocks import Block, check_sequences
from regard.models.encoder_decoder import count_layers
from regard.models.layer_plan import check_plan, read_plan
from regard.models.losses import add_losses, auxiliary_loss
from regard.models.placing import SHARED_POSITIONS, input_positions
from regard.models.stack import LayersConfig, Stack
from regard.positions import Sinusoidal

if TYPE_CHECKING:
    from jaxtyping import Float

    from regard.tasks.protocol import Task

LEVELS = ("mean", "last", "none")
SMALLEST_SCALE = 1e-5
"""A window whose targets have a standard deviation below this counts as constant: it is centred, not scaled."""


@dataclass(frozen=True)
class ForecasterConfig(LayersConfig):
    """The configuration of a :class:`Forecaster`.

    Attributes:
        features: number of features known in advance for each point of the horizon, 0 for none.
        memory_features: number of features observed at each point of the past.
        target_features: indices of the memory features that are predicted, in the order of the output; empty where the
            memory has no past of the targets.
        num_targets: number of values to predict when `target_features` is empty, else None.
        patch: number of past points that make up a token. The last patch ends with the last point; the first may be
            incomplete.
        quantiles: increasing levels between 0 and 1 to predict, which never cross; when empty, a single number is
            predicted.
        normalize: the targets are read and predicted relative to the window's ``mean`` or its ``last`` value, in units
            of its standard deviation (reversible instance normalisation, Kim et al., ICLR 2022, without its learned
            scale); ``none`` takes the numbers as they are.
        dim: width of the residual streams.
        encoder_plan: noncausal-self mechanisms that encode the past, as for `plan` of
            :class:`regard.models.LanguageModelConfig`.
        cross_plan: noncausal-cross mechanisms through which the horizon reads the past.
        num_layers: number of cross layers; when None, the length of a plan given as a list, else 4.
        encoder_layers: number of encoder layers; when None, the length of a plan given as a list, else that of the
            cross layers.
        ordered: whether the memory is a series. If not, no point gets a time, and the points to predict differ by their
            features alone; layers have no positions unless a plan names a scheme, `patch` is 1, and `normalize` not ``last``.
        positions: the scheme inside the encoder's layers: one of :mod:`regard.positions` or ``auto``, as in
            :class:`regard.models.LanguageModelConfig`. Sinusoids of the time, which is 0 at the first point of the
            horizon and negative in the past, are added to both inputs of a series. Cross layers have no positions unless
            their plan names a scheme.
        num_heads, head_dim, num_kv_heads, feed_forward, dropout, norm, loss_weights, stack: as in
            :class:`regard.models.LanguageModelConfig`; `stack` applies to both stacks and has no exits.
    """

    features: int
    memory_features: int
    target_features: tuple[int, ...] = (0,)
    num_targets: int | None = None
    patch: int = 1
    quantiles: tuple[float, ...] = ()
    normalize: str = "mean"
    dim: int = 128
    encoder_plan: Any = "softmax"
    cross_plan: Any = "softmax"
    num_layers: int | None = None
    encoder_layers: int | None = None
    ordered: bool = True
    serves: ClassVar = ((Pattern.NONCAUSAL_CROSS, "regression"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stack.exits:
            raise Unsupported(f"exits={self.stack.exits} of a forecaster", supported="exits of models with classes")
        for name, low in (("features", 0), ("memory_features", 1), ("patch", 1)):
            at_least(name, getattr(self, name), low)
        targets, quantiles = tuple(self.target_features), tuple(self.quantiles)
        if self.num_targets is not None:
            at_least("num_targets", self.num_targets, 1)
            if targets:
                raise Unsupported(
                    f"num_targets={self.num_targets} with target_features={targets}",
                    supported="target_features for values that the memory holds too, or num_targets for others",
                )
        in_range = all(0 <= index < self.memory_features for index in targets)
        if not (targets or self.num_targets) or not in_range or len(set(targets)) < len(targets):
            raise Unsupported(
                f"target_features={targets} of {self.memory_features} memory features",
                supported=f"different numbers from 0 to {self.memory_features - 1}, at least one; or num_targets",
            )
        if not all(0 < q < 1 for q in quantiles) or list(quantiles) != sorted(set(quantiles)):
            raise Unsupported(
                f"quantiles={quantiles}",
                supported="rising levels between 0 and 1, or none",
                nearest="quantiles=(0.1, 0.5, 0.9)",
            )
        one_of("normalize", self.normalize, LEVELS)
        if not self.ordered:
            self._check_set()
            object.__setattr__(self, "positions", "none")
        if self.positions in ("learned", "seqpe", *SHARED_POSITIONS):
            raise Unsupported(
                f"{self.positions} positions in a forecaster", supported="positions of its encoder's layers"
            )
        layers = count_layers(self.num_layers, self.cross_plan)
        encoder_layers = count_layers(self.encoder_layers, self.encoder_plan, default=layers)
        for name, count, pattern, where in (
            ("encoder_plan", encoder_layers, Pattern.NONCAUSAL_SELF, "the encoder of a forecaster"),
            ("cross_plan", layers, Pattern.NONCAUSAL_CROSS, "the cross layers of a forecaster"),
        ):
            plan = read_plan(getattr(self, name), count)
            check_plan(plan, pattern, where)
            object.__setattr__(self, name, plan)
        input_positions(self.encoder_plan, self.positions)  # refuses an unknown scheme
        object.__setattr__(self, "target_features", targets)
        object.__setattr__(self, "quantiles", quantiles)
        object.__setattr__(self, "num_layers", layers)
        object.__setattr__(self, "encoder_layers", encoder_layers)

    def _check_set(self) -> None:
        wrong = [
            f"{name}={given!r}"
            for name, given, fits in (
                ("patch", self.patch, self.patch == 1),
                ("normalize", self.normalize, self.normalize != "last"),
                ("features", self.features, self.features > 0),
                ("positions", self.positions, self.positions in ("auto", "none")),
            )
            if not fits
        ]
        if wrong:
            raise Unsupported(
                f"ordered=False with {', '.join(wrong)}",
                supported="patch=1, normalize='mean' or 'none', positions='none', and features that tell the points to "
                "predict apart",
            )

    @classmethod
    def for_task(cls, task: Task, plan: Any, *, positions: str, max_length: int, **sizes: Any) -> ForecasterConfig:
        """Return the config for a task, see :func:`regard.models.registry.config_for`; `plan` is the cross layers'."""
        targets = task.target_features
        if targets is None:
            targets = tuple(range(task.num_targets or 0))
        known, past = task.features or 0, task.memory_features or 0
        others = None if targets else task.num_targets
        sizes |= {"num_targets": others, "ordered": task.memory_ordered}
        return cls(known, past, target_features=targets, cross_plan=plan, **sizes)

    @property
    def width(self) -> int:
        """Number of values that are predicted at each point, not counting quantiles."""
        return self.num_targets or len(self.target_features)


class Forecaster(nn.Module):
    """Embeddings, encoder blocks, cross blocks, norms, head; see :class:`ForecasterConfig`."""

    targets: Tensor

    def __init__(self, config: ForecasterConfig) -> None:
        super().__init__()
        self.config = config
        width = config.memory_features if config.patch == 1 else (config.memory_features + 1) * config.patch
        self.memory_embedding = FeatureEmbedding(width, config.dim)
        self.embedding = FeatureEmbedding(config.features, config.dim) if config.features else None
        self.positions = Sinusoidal(dim=config.dim)
        self.register_buffer("targets", torch.tensor(config.target_features, dtype=torch.long), persistent=False)
        encoder_blocks = [Block(entry, config, Pattern.NONCAUSAL_SELF) for entry in config.encoder_plan]
        self.encoder_blocks = Stack(encoder_blocks, config.stack)
        check_sequences(encoder_blocks, "a forecaster, which has no grids", supported="layers for sequences")
        self.encoder_norm = make_norm(config.norm, config.dim)
        self.blocks = Stack(
            [Block(entry, config, Pattern.NONCAUSAL_CROSS) for entry in config.cross_plan], config.stack
        )
        self.norm = make_norm(config.norm, config.dim)
        self.head = make_linear(config.dim, config.width * max(1, len(config.quantiles)), bias=True)

    def forward(
        self, inputs: Float[Tensor, "b h f"], memory: Float[Tensor, "b m g"], *, context: Context | None = None
    ) -> Result:
        """Forecast a horizon.

        Args:
            inputs: the features known in advance for each point of the horizon, padded anywhere or packed, as
                `context.mask` says; (B, H, 0) without features.
            memory: the past, oldest point first, padded anywhere or packed, as `context.memory_mask` says. The time of
                a point is its rank among the valid points, so a shorter past can be padded; mark single missing values
                by a feature.
            context: masks, generator, progress.

        Returns:
            output (B, H, targets), or (B, H, targets, quantiles) in increasing order, zero at padding, in at least
            float32; auxiliary losses summed over the layers; extras of the cross layers as lists.
        """
        context = given_context(context)
        check_tokens(inputs, self.config.features, "inputs")
        check_tokens(memory, self.config.memory_features, "memory")
        check_memory_mask(context)
        _check_context(context)
        layout = gathering(context.mask, inputs.shape[0], inputs.shape[1], inputs.device)
        past = gathering(context.memory_mask, memory.shape[0], memory.shape[1], memory.device)
        inputs, memory = layout.gather(inputs, axis=1), past.gather(memory, axis=1)
        if inputs.shape[0] != memory.shape[0]:
            raise Unsupported(
                f"{inputs.shape[0]} horizons with {memory.shape[0]} pasts", supported="a past for each horizon"
            )
        losses: dict[str, Loss] = {}
        level, scale = self._level_and_scale(memory, past.lengths)  # (rows, 1, targets)
        if self.config.target_features:
            seen = (memory.index_select(-1, self.targets).to(level.dtype) - level) / scale
            memory = memory.index_copy(-1, self.targets, seen.to(memory.dtype))
        keys, lengths, time = self._tokens(memory, past.lengths)  # (rows, tokens, dim)
        keys = self._dropout(keys, context)
        mask = None if lengths is None else Mask(lengths=lengths)
        shared = Context(generator=context.generator, progress=context.progress)
        encoded = self.encoder_blocks.run(keys, shared.replace(mask=mask), [None] * len(self.encoder_blocks))
        add_losses(losses, encoded.losses)
        horizon = torch.arange(inputs.shape[1], device=inputs.device)[None]
        x = inputs.new_zeros(*inputs.shape[:2], self.config.dim) if self.embedding is None else self.embedding(inputs)
        inner = shared.replace(mask=inner_mask(layout), memory_mask=mask, want=context.want)
        if self.config.ordered:
            x = self.positions.embed(x, horizon)
            inner = inner.replace(positions=horizon.expand(inputs.shape[0], -1), memory_positions=time)
        x = self._dropout(x, context)
        result = self.blocks.run(x, inner, [None] * len(self.blocks), self.encoder_norm(encoded.output))
        add_losses(losses, result.losses)
        y = self.head(self.norm(result.output)).to(level.dtype)  # (rows, H, targets * quantiles)
        if self.config.quantiles:
            y = _rising(y.unflatten(-1, (self.config.width, -1)))
            level, scale = level[..., None], scale[..., None]
        return Result(layout.scatter(y * scale + level, axis=1), None, losses, result.extras)

    def _dropout(self, x: Tensor, context: Context) -> Tensor:
        return dropout(x, self.config.dropout, training=self.training, generator=context.generator)

    def _level_and_scale(self, memory: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """The level and the scale by which each row's targets are normalised; (rows, 1, targets), or (rows, 1, 1) for
        values that the memory does not hold."""
        x = memory.index_select(-1, self.targets)
        x = wide(x)
        rows, m, width = x.shape
        if self.config.normalize == "none" or m == 0 or not width:
            return x.new_zeros(rows, 1, width or 1), x.new_ones(rows, 1, width or 1)
        if lengths is None:
            lengths = torch.full((rows,), m, device=x.device)
        count = lengths.clamp(min=1)[:, None, None]
        mean = x.sum(1, keepdim=True) / count  # padding is zero
        deviation = torch.where(valid_from_lengths(lengths, m)[..., None], x - mean, 0)
        spread = (deviation.square().sum(1, keepdim=True) / count).sqrt()
        level = mean
        if self.config.normalize == "last":
            level = x.gather(1, (count - 1).expand(-1, 1, width))
        return level, torch.where(spread > SMALLEST_SCALE, spread, 1.0)

    def _tokens(self, memory: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """The past as right-padded tokens, their valid lengths (None for all), and the time at each token's end."""
        rows, m, _ = memory.shape
        patch = self.config.patch
        if patch > 1:
            m = -(-m // patch)
            points = torch.cat([memory, memory.new_ones(rows, memory.shape[1], 1)], -1)
            if lengths is not None:
                points = torch.where(valid_from_lengths(lengths, points.shape[1])[..., None], points, 0)
            if lengths is not None or m * patch > points.shape[1]:
                points = place_queries(points, m * patch, lengths, None, axis=1)  # the last point ends a patch
            memory = points.reshape(rows, m, patch * points.shape[2])
            if lengths is not None:
                lengths = (lengths + patch - 1) // patch
                memory = take_queries(memory, m, lengths, None, axis=1)
        count = m if lengths is None else lengths[:, None]
        rank = torch.arange(m, device=memory.device)
        time = ((rank - count) * patch + patch - 1).expand(rows, -1)
        if lengths is not None:
            time = torch.where(valid_from_lengths(lengths, m), time, 0)
        x = self.memory_embedding(memory)
        return self.positions.embed(x, time) if self.config.ordered else x, lengths, time

    def loss(
        self,
        inputs: Float[Tensor, "b h f"],
        memory: Float[Tensor, "b m g"],
        targets: Float[Tensor, "b h t"],
        *,
        context: Context | None = None,
    ) -> Float[Tensor, ""]:
        """Mean squared error, or mean pinball loss of the quantiles, plus the weighted auxiliary losses.

        Args:
            targets: values to predict, nan where there is none.
        """
        result = self(inputs, memory, context=context)
        expected = result.output.shape[:3]
        if targets.shape != expected:
            raise Unsupported(f"targets of shape {tuple(targets.shape)}", supported=str(tuple(expected)))
        counted = ~targets.isnan()
        if self.config.quantiles:
            error = quantile_loss(result.output, targets, self.config.quantiles)
        else:
            error = (result.output - targets.to(result.output.dtype)).square()
        mean = torch.where(counted, error, 0).sum() / counted.sum().clamp(min=1)
        return mean + auxiliary_loss(result.losses, self.config.loss_weights)


def quantile_loss(
    output: Float[Tensor, "*b quantiles"], targets: Float[Tensor, "*b"], quantiles: tuple[float, ...]
) -> Float[Tensor, "*b"]:
    """The pinball loss (Koenker and Bassett, 1978), averaged over the quantiles: least if a share q is below."""
    levels = torch.tensor(quantiles, dtype=output.dtype, device=output.device)
    above = targets.to(output.dtype)[..., None] - output
    return torch.maximum(levels * above, (levels - 1) * above).mean(-1)


def _rising(x: Float[Tensor, "*b quantiles"]) -> Float[Tensor, "*b quantiles"]:
    """Make quantiles increase: each exceeds the one before it by the softplus of its own number."""
    return torch.cat([x[..., :1], x[..., :1] + F.softplus(x[..., 1:]).cumsum(-1)], -1)


def _check_context(context: Context) -> None:
    mask = context.mask
    for what, given in (
        ("a grid", context.grid is not None),
        ("roles", context.roles is not None),
        ("explicit positions", context.positions is not None or context.memory_positions is not None),
        ("a bias or a block mask", mask is not None and (mask.bias is not None or mask.blocks is not None)),
    ):
        if given:
            raise Unsupported(f"{what} in a forecaster", supported="padding and packing")
