"""The network of positional attention for algorithms on numbers, without residual connections or norms.

A layer is x = MLP([x ; attention(x)]) (Back de Luca et al., arXiv 2410.01686). With ``positional_attention`` and no biases
the network is positively homogeneous, f(a x) = a f(x) for a > 0, which is why it generalises to larger numbers::

    entry = ("positional_attention", {"encoding": "one_hot", "max_length": 9, "bias": False})
    config = AlgorithmicNetworkConfig(num_classes=1, features=1, plan=[entry] * 4, bias=False)
    outputs = AlgorithmicNetwork(config)(numbers).output        # (B, N, 1) -> (B, N, 1)

Any mechanism can take the place of ``positional_attention``. Mechanisms that attend by content receive an encoding of
each token's position next to its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from regard.contract import Context, Pattern, Result, Unsupported, at_least, check_types, one_of
from regard.layers.checks import given_context
from regard.layers.linear import make_linear
from regard.models.blocks import Block, check_sequences, run_blocks
from regard.models.encoder import EncoderBase
from regard.models.layer_plan import mixing_card, read_plan
from regard.models.losses import add_losses
from regard.models.placing import EMBEDDED_POSITIONS, SHARED_POSITIONS
from regard.models.stack import StackConfig
from regard.positions.sinusoidal import Sinusoidal

if TYPE_CHECKING:
    from jaxtyping import Float

    from regard.tasks.protocol import Task

ENCODINGS = ("auto", "one_hot", "sinusoidal", "none")


@dataclass(frozen=True)
class AlgorithmicNetworkConfig:
    """The configuration of an :class:`AlgorithmicNetwork`.

    Attributes:
        num_classes: number of outputs of each token.
        features: number of input features of each token.
        encoding: the position encoding concatenated to a token's numbers: ``one_hot`` (one of `places` positions),
            ``sinusoidal`` (`places` features, any position) or ``none``; ``auto`` is sinusoidal, or none if a mechanism
            of the plan refuses positions in its input, as ``positional_attention`` does.
        places: width of the encoding, >= 1; with ``one_hot`` also the length of the longest sequence.
        plan, num_layers, dim, num_heads, head_dim, num_kv_heads: as in :class:`regard.models.LanguageModelConfig`.
        feed_forward: hidden width of each layer's MLP; `dim` when None.
        bias: whether the embedding, MLPs and head have biases; the mechanisms' biases are options of their own.
        positions, position_options: the position scheme inside the layers, none by default; schemes of a model's input
            are not accepted.
        max_length: length of position tables, for schemes that have one.
        dropout: probability of dropout on the mechanism's output.
        loss_weights: as in :class:`regard.models.LanguageModelConfig`.
    """

    num_classes: int
    features: int
    encoding: str = "auto"
    places: int = 64
    dim: int = 64
    plan: Any = "positional_attention"
    num_layers: int | None = None
    num_heads: int = 2
    head_dim: int | None = None
    num_kv_heads: int | None = None
    feed_forward: int | None = None
    bias: bool = True
    positions: str = "none"
    position_options: Mapping[str, Any] = field(default_factory=dict)
    max_length: int = 2048
    dropout: float = 0.0
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    stack: ClassVar = StackConfig()
    norm: ClassVar = "none"
    vocab_size: ClassVar = None
    serves: ClassVar = ((Pattern.NONCAUSAL_SELF, "regression"),)

    def __post_init__(self) -> None:
        check_types(self)
        one_of("encoding", self.encoding, ENCODINGS)
        at_least("features", self.features, 1)
        at_least("places", self.places, 1)
        if self.positions in ("auto", *EMBEDDED_POSITIONS, *SHARED_POSITIONS):
            raise Unsupported(
                f"positions={self.positions!r} of an AlgorithmicNetwork, where nothing is added to the input",
                supported="none and schemes inside the layers, such as rotary; encoding sets what is concatenated to the input",
                nearest="encoding='sinusoidal'",
            )
        object.__setattr__(self, "plan", read_plan(self.plan, self.num_layers))
        object.__setattr__(self, "num_layers", len(self.plan))

    @classmethod
    def for_task(cls, task: Task, plan: Any, **sizes: Any) -> AlgorithmicNetworkConfig:
        """Return the config for a task of numbers (the hook of :func:`regard.models.registry.config_for`)."""
        if task.features is None or task.grid is not None:
            raise Unsupported(
                f"an AlgorithmicNetwork for the task {task.name}",
                supported="tasks of sequences of numbers, as algorithmic",
                nearest="the model Encoder",
            )
        if StackConfig.read(sizes.pop("stack", StackConfig())) != StackConfig():
            raise Unsupported(
                "an AlgorithmicNetwork with --stack", supported="the layers that it has, which add nothing to a stream"
            )
        sizes.pop("positions", None)  # the scheme of a model's input; the layers' schemes are in the plan
        return cls(task.num_targets or 0, task.features, plan=plan, **sizes)


class PlacedFeatures(nn.Module):
    """(B, N, features) -> (B, N, dim): project each token's numbers, concatenated with an encoding of its position.

    Args:
        config: the network's config.
        encoding: one of `ENCODINGS` except ``auto``.
    """

    def __init__(self, config: AlgorithmicNetworkConfig, encoding: str) -> None:
        super().__init__()
        self.encoding, self.features, self.places = encoding, config.features, config.places
        width = config.features + (0 if encoding == "none" else config.places)
        self.projection = make_linear(width, config.dim, bias=config.bias)

    def forward(self, x: Float[Tensor, "b n f"]) -> Float[Tensor, "b n c"]:
        if x.shape[-1] != self.features:
            raise Unsupported(f"an input of {x.shape[-1]} features", supported=f"{self.features} features")
        if self.encoding == "none":
            return self.projection(x)
        return self.projection(torch.cat([x, self._places(x).expand(x.shape[0], -1, -1)], -1))

    def _places(self, x: Tensor) -> Float[Tensor, "1 n p"]:
        n = x.shape[1]
        if self.encoding == "sinusoidal":
            where = torch.arange(n, device=x.device)[None]
            return Sinusoidal(dim=self.places).embed(x.new_zeros(1, n, self.places), where)
        if n > self.places:
            raise Unsupported(
                f"{n} tokens with one-hot places of {self.places}",
                supported=f"up to {self.places} tokens",
                nearest=f"places={n}, or encoding='sinusoidal'",
            )
        return torch.eye(n, self.places, dtype=x.dtype, device=x.device)[None]


class ConcatenatingBlock(Block):
    """MLP([x ; mix(x)]): the mixer's output is concatenated to x instead of being added to it."""

    def __init__(self, entry: tuple[str, Mapping[str, Any]], config: AlgorithmicNetworkConfig) -> None:
        options = dict(entry[1])
        width = options.pop("feed_forward", config.feed_forward)
        super().__init__((entry[0], options), config, Pattern.NONCAUSAL_SELF, feed_forward=0)
        self.entry = entry
        hidden = config.dim if width is None else width
        at_least("feed_forward", hidden, 1)
        self.network = nn.Sequential(
            make_linear(2 * config.dim, hidden, bias=config.bias),
            nn.ReLU(),
            make_linear(hidden, config.dim, bias=config.bias),
        )

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        memory: Tensor | None = None,
        *,
        context: Context,
        state: Any = None,
    ) -> Result:
        """Apply the block to right-padded `x`; the output is (B, N, C), without a state."""
        mixed = self.mix(x, context=context)
        return Result(self.network(torch.cat([x, mixed.output], -1)), None, mixed.losses, mixed.extras)


class AlgorithmicNetwork(EncoderBase):
    """Embedding, layers, head; see :class:`AlgorithmicNetworkConfig`."""

    config: AlgorithmicNetworkConfig

    def __init__(self, config: AlgorithmicNetworkConfig) -> None:
        super().__init__(config, config.plan)
        self.blocks = nn.ModuleList(ConcatenatingBlock(entry, config) for entry in config.plan)
        check_sequences(self.blocks, "an AlgorithmicNetwork, which has no grids", supported="layers for sequences")
        self.head = make_linear(config.dim, config.num_classes, bias=config.bias)

    def make_embedding(self, config: AlgorithmicNetworkConfig) -> nn.Module:
        encoding = config.encoding
        if encoding == "auto":
            cards = [mixing_card(name, options) for name, options in config.plan]
            encoding = "sinusoidal" if all("sinusoidal" in card.accepts_positions for card in cards) else "none"
        return PlacedFeatures(config, encoding)

    def forward(self, inputs: Float[Tensor, "b n f"], *, context: Context | None = None) -> Result:
        """Predict the outputs of each token.

        Args:
            inputs: numbers, padded anywhere or packed, as `context.mask` says.
            context: mask, generator, progress, and the extra results to request from the layers (`want`).

        Returns:
            output (B, N, num_classes), zero at padding; auxiliary losses summed over the layers; extras as lists with
            one entry for each layer that has them.

        Raises:
            Unsupported: for a grid, roles or explicit positions.
        """
        context = given_context(context)
        for what in ("grid", "roles", "positions"):
            if getattr(context, what) is not None:
                raise Unsupported(
                    f"{what} in an AlgorithmicNetwork", supported="padding and packing", nearest="Encoder"
                )
        x, inner, layout, losses = self.embed(inputs, context)
        result = run_blocks(self.blocks, x, inner, [None] * len(self.blocks))
        add_losses(losses, result.losses)
        output = layout.scatter(self.head(result.output), axis=1)
        return Result(output, None, losses, result.extras)
