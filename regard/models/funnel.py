"""A Funnel-Transformer with an output for each token, most of whose layers see a progressively shortened sequence.

Layers at full length with any mechanism are followed by a funnel's blocks, each of which halves the sequence. Each
remaining token is then copied back to the positions that it was pooled from, and a decoder of a few layers adds the
detail (Dai et al., arXiv 2006.03236, section 2.3)::

    config = FunnelEncoderConfig(num_classes=9, vocab_size=256, plan="linear", num_layers=2, funnel={"blocks": 2})
    logits = FunnelEncoder(config)(ids, context=Context(mask=Mask(lengths=lengths))).output      # (B, N, 9)

For one output per sequence, leave out the decoder: ``EncoderConfig(pool="funnel")``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from regard.contract import Unsupported
from regard.models.encoder import check_input_kind
from regard.models.encoder_decoder import count_layers
from regard.models.layer_plan import read_plan
from regard.models.stack import LayersConfig
from regard.models.stages import PyramidEncoder, PyramidEncoderConfig, StageConfig

if TYPE_CHECKING:
    from regard.mechanisms.funnel import FunnelPooling


@dataclass(frozen=True)
class FunnelEncoderConfig(LayersConfig):
    """The configuration of a :class:`FunnelEncoder`.

    Attributes:
        num_classes: width of the output of each token.
        vocab_size: number of tokens; None when the inputs are floats.
        features: width of float inputs; None when the inputs are tokens. Exactly one of the two is given.
        plan, num_layers: the layers before the funnel, at full length; 4 if neither sets the number.
        funnel: options of the layer ``funnel``, such as ``blocks``, ``layers`` of each, ``separate_first``,
            ``truncate``.
        decoder_plan, decoder_layers: the layers after the funnel, at full length; 2 if neither sets the number.
        feed_forward: hidden width in the layers at full length; the funnel's is one of its options.
        stack: see :class:`regard.models.StackConfig`; applies to both stacks at full length and has no exits.
        dim, num_heads, head_dim, num_kv_heads, positions, position_options, max_length, dropout, norm, loss_weights: as
            in :class:`regard.models.LanguageModelConfig`; the funnel has no dropout.
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
    position_options: Mapping[str, Any] = field(default_factory=dict)
    max_length: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
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


class FunnelEncoder(PyramidEncoder):
    """Layers at full length, a funnel, and a decoder at full length; see :class:`FunnelEncoderConfig`.

    Attributes:
        config: a :class:`FunnelEncoderConfig`.
        funnel: the funnel layer.
    """

    config: Any

    def __init__(self, config: FunnelEncoderConfig) -> None:
        shared = {f.name: getattr(config, f.name) for f in fields(PyramidEncoderConfig) if hasattr(config, f.name)}
        stages = (StageConfig(len(config.plan)), StageConfig(0, "funnel", options=config.funnel))
        super().__init__(PyramidEncoderConfig(**shared, stages=stages, pool="none"))
        self.config = config

    @property
    def funnel(self) -> FunnelPooling:
        """The funnel layer between the two stages."""
        return self.stages[1].shortening.layer  # type: ignore[union-attr,return-value]
