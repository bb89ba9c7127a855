"""A Funnel-Transformer that answers for each token: most of its layers see a sequence that is shorter and shorter.

Layers at full length with any mechanism, then a funnel's blocks, each of which halves the sequence; each token that is
left goes back to the places that it was pooled from, and a decoder of a few layers adds the detail (Dai et al., arXiv
2006.03236, section 2.3)::

    config = FunnelEncoderConfig(num_classes=9, vocab_size=256, plan="linear", num_layers=2, funnel={"blocks": 2})
    logits = FunnelEncoder(config)(ids, context=Context(mask=Mask(lengths=lengths))).output      # (B, N, 9)

For one output a sequence the decoder is left out: ``EncoderConfig(pool="funnel")``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from regard.contract import Context, Pattern, Result, Unsupported
from regard.create import create_layer
from regard.layers.checks import given_context
from regard.layers.linear import make_linear
from regard.layers.norms import make_norm
from regard.mechanisms.funnel import FunnelPooling
from regard.models.blocks import Block, add_losses, check_sequences, read_plan
from regard.models.encoder import EncoderBase, check_input_kind
from regard.models.encoder_decoder import count_layers
from regard.models.stack import Stack, StackConfig

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class FunnelEncoderConfig:
    """The configuration of a :class:`FunnelEncoder`.

    Attributes:
        num_classes: width of the output of each token.
        vocab_size: number of tokens; None when the inputs are floats.
        features: width of float inputs; None when the inputs are tokens. Exactly one of the two is given.
        plan, num_layers: of the layers before the funnel, at full length; 4 where neither says how many.
        funnel: options of the layer ``funnel``, as ``blocks``, ``layers`` of each, ``separate_first``, ``truncate``.
        decoder_plan, decoder_layers: of the layers behind it, at full length; 2 where neither says how many.
        feed_forward: hidden width of the layers at full length; the funnel's own is among its options.
        stack: see :class:`regard.models.StackConfig`; of both stacks at full length, without exits.
        dim, num_heads, head_dim, num_kv_heads, positions, position_options, max_length, dropout, norm, loss_weights: as
            in :class:`regard.models.LanguageModelConfig`; dropout is not in the funnel.
    """

    num_classes: int
    vocab_size: int | None = None
    features: int | None = None
    dim: int = 128
    plan: Any = "softmax"
    num_layers: int | None = None
    funnel: Mapping[str, Any] = field(default_factory=dict)
    decoder_plan: Any = "softmax"
    decoder_layers: int | None = None
    num_heads: int = 4
    head_dim: int | None = None
    num_kv_heads: int | None = None
    feed_forward: int | None = None
    positions: str = "auto"
    position_options: Mapping[str, Any] = field(default_factory=dict)
    max_length: int = 2048
    dropout: float = 0.0
    norm: str = "rms"
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    stack: Any = StackConfig()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stack", StackConfig.read(self.stack))
        if self.stack.exits:
            raise Unsupported(
                f"exits={self.stack.exits} of a FunnelEncoder", supported="exits of models with one stack", nearest="()"
            )
        check_input_kind(self.vocab_size, self.features)
        object.__setattr__(self, "plan", read_plan(self.plan, self.num_layers))
        object.__setattr__(self, "num_layers", len(self.plan))
        layers = count_layers(self.decoder_layers, self.decoder_plan, default=2)
        object.__setattr__(self, "decoder_plan", read_plan(self.decoder_plan, layers))
        object.__setattr__(self, "decoder_layers", layers)


class FunnelEncoder(EncoderBase):
    """Embedding, blocks, norm, funnel, decoder blocks, norm, head; see :class:`FunnelEncoderConfig`."""

    config: FunnelEncoderConfig

    def __init__(self, config: FunnelEncoderConfig) -> None:
        super().__init__(config, config.plan + config.decoder_plan)
        pattern = Pattern.NONCAUSAL_SELF
        self.blocks = Stack([Block(entry, config, pattern) for entry in config.plan], config.stack)
        self.norm = make_norm(config.norm, config.dim)
        options = {"head_dim": config.head_dim, **config.funnel}
        layer = create_layer("funnel", config.dim, config.num_heads, pattern=pattern, **options)
        self.funnel = cast(FunnelPooling, layer)
        self.decoder_blocks = Stack([Block(entry, config, pattern) for entry in config.decoder_plan], config.stack)
        for blocks in (self.blocks, self.decoder_blocks):
            check_sequences(blocks, "a funnel encoder, which has no grids", supported="layers for sequences")
        self.decoder_norm = make_norm(config.norm, config.dim)
        self.head = make_linear(config.dim, config.num_classes, bias=True)

    def forward(self, inputs: Int[Tensor, "b n"] | Float[Tensor, "b n f"], *, context: Context | None = None) -> Result:
        """Logits of each token.

        Args:
            inputs: tokens or features, padded anywhere or packed, as `context.mask` says.
            context: its mask, generator, progress, and what is wanted of the layers at full length.

        Returns:
            output (B, N, num_classes), zero at padding; auxiliary losses summed over the layers; extras as lists with
            one entry for each layer at full length that has them.

        Raises:
            Unsupported: for what the funnel cannot honour: masks on pairs, a grid, roles, explicit positions.
        """
        context = given_context(context)
        _check_context(context)
        x, inner, layout, losses = self.embed(inputs, context)
        result = self.blocks.run(x, inner, [None] * len(self.blocks))
        first = self.norm(result.output)
        x = first + self.funnel.round_trip(first, layout.lengths)
        decoded = self.decoder_blocks.run(x, inner, [None] * len(self.decoder_blocks))
        for more in (result.losses, decoded.losses):
            add_losses(losses, more)
        for name, values in decoded.extras.items():
            result.extras.setdefault(name, []).extend(values)
        output = layout.scatter(self.head(self.decoder_norm(decoded.output)), axis=1)
        return Result(output, None, losses, result.extras)


def _check_context(context: Context) -> None:
    mask = context.mask
    for what, given in (
        ("a bias or a block mask", mask is not None and (mask.bias is not None or mask.blocks is not None)),
        ("a grid", context.grid is not None),
        ("roles", context.roles is not None),
        ("explicit positions", context.positions is not None),
    ):
        if given:
            raise Unsupported(f"{what} in a FunnelEncoder", supported="padding and packing", nearest="Encoder")
