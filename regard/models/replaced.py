"""Pre-training by replaced token detection (ELECTRA, Clark et al., arXiv 2003.10555).

A small generator replaces tokens of the input; an encoder, which is kept, detects the replaced ones.

::

    model = ReplacedTokenModel(ReplacedTokenConfig(vocab_size=257, plan="linear", num_layers=4))
    regard.training.train(model, create_task("replaced", data="my_corpus.txt"), TrainConfig(steps=1000))
    save_pretrained(model.discriminator, folder)            # an Encoder: the generator is no longer needed
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.contract import Context, Pattern, Result, Unsupported, check_types
from regard.core.precision import wide
from regard.core.ragged import gathering
from regard.layers.checks import given_context
from regard.layers.linear import make_linear
from regard.models.encoder import Encoder, EncoderConfig
from regard.models.inputs import check_ids
from regard.models.losses import add_losses
from regard.models.stack import StackConfig

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

    from regard.tasks.protocol import Task

GENERATOR = "generator"
"""The name of the generator's loss."""


@dataclass(frozen=True)
class ReplacedTokenConfig:
    """The configuration of a :class:`ReplacedTokenModel`.

    Attributes:
        vocab_size: number of tokens; the last one is the mask token, which does not occur in text.
        share: share of the tokens that are masked and replaced by the generator, above 0 and at most 1.
        generator: the generator's width as a share of `dim`, above 0 and at most 1; it has as many layers and heads.
        dim, plan, num_layers, num_heads, feed_forward, positions, max_length, dropout, norm, stack: options of the
            encoder, as in :class:`regard.models.EncoderConfig`; `feed_forward` does not apply to the generator, whose
            networks follow its width. Exits are not supported.
        loss_weights: likewise; the loss ``generator`` has a default weight of 0.02, the inverse of the paper's weight
            of 50 for the discriminator.
    """

    vocab_size: int
    dim: int = 128
    plan: Any = "softmax"
    num_layers: int | None = None
    num_heads: int = 4
    feed_forward: int | None = None
    positions: str = "auto"
    max_length: int = 2048
    dropout: float = 0.0
    norm: str = "rms"
    share: float = 0.15
    generator: float = 0.25
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    stack: Any = StackConfig()
    serves: ClassVar = ((Pattern.NONCAUSAL_SELF, "replaced-token"),)

    def __post_init__(self) -> None:
        check_types(self)
        for name, most in (("share", 1.0), ("generator", 1.0)):
            value = getattr(self, name)
            if not 0 < value <= most:
                raise Unsupported(f"{name}={value}", supported="above 0, at most 1", nearest=f"{name}=0.25")
        if self.vocab_size < 2:
            raise Unsupported(f"vocab_size={self.vocab_size}", supported="a token and one that masks, or more")
        own = self.encoder()
        if own.stack.exits:
            raise Unsupported(f"exits={own.stack.exits} of a model that detects replaced tokens", supported="exits=()")
        for name in ("plan", "num_layers", "stack"):
            object.__setattr__(self, name, getattr(own, name))

    @classmethod
    def for_task(cls, task: Task, plan: Any, **sizes: Any) -> ReplacedTokenConfig:
        """Return the config for a task (the hook of :func:`regard.models.registry.config_for`)."""
        return cls(task.vocab_size or 0, plan=plan, **sizes)

    def encoder(self) -> EncoderConfig:
        """The config of the encoder that is kept, with one logit for each token."""
        return self._of(1, self.dim, self.feed_forward)

    def small(self) -> EncoderConfig:
        """The generator's config, with logits for all tokens but the mask token and an even width for each head."""
        step = 2 * self.num_heads
        width = max(step, round(self.generator * self.dim / step) * step)
        return self._of(self.vocab_size - 1, width, None)

    def _of(self, outputs: int, dim: int, feed_forward: int | None) -> EncoderConfig:
        same = (
            "plan",
            "num_layers",
            "num_heads",
            "positions",
            "max_length",
            "dropout",
            "norm",
            "loss_weights",
            "stack",
        )
        given = {name: getattr(self, name) for name in same}
        return EncoderConfig(outputs, self.vocab_size, dim=dim, feed_forward=feed_forward, pool="none", **given)


class ReplacedTokenModel(nn.Module):
    """An encoder that detects replaced tokens, and a generator that replaces them in training.

    See :class:`ReplacedTokenConfig`. Both share the encoder's token embedding, which is projected to the generator's
    width.

    Attributes:
        discriminator: the encoder that is kept.
        generator: predicts masked tokens.
    """

    def __init__(self, config: ReplacedTokenConfig) -> None:
        super().__init__()
        self.config = config
        self.discriminator, self.generator = Encoder(config.encoder()), Encoder(config.small())
        narrow = make_linear(config.dim, config.small().dim)
        nn.init.normal_(narrow.weight, std=config.dim**-0.5)  # type: ignore[arg-type]
        self.generator.embedding = nn.Sequential(self.discriminator.embedding, narrow)

    def forward(self, inputs: Int[Tensor, "b n"], *, context: Context | None = None) -> Result:
        """Compute the logit of each token having been replaced.

        Args:
            inputs: in evaluation, tokens of which some were replaced; in training, the original tokens, a share of
                which is replaced by samples from the generator, without gradients. A sample that equals the original
                token does not count as replaced.
            context: as for :meth:`regard.models.Encoder.forward`.

        Returns:
            output (B, N, 1), above 0 for replaced tokens. In training the sign is flipped where a token was replaced,
            so that the target is "not replaced" everywhere; and there is the loss ``generator``, the cross entropy of
            the masked tokens.
        """
        if not self.training:
            return self.discriminator(inputs, context=context)
        context = given_context(context)
        check_ids(inputs)
        hidden = self._hidden(inputs, context)
        told = self.generator(inputs.masked_fill(hidden, self.config.vocab_size - 1), context=context)
        answers = wide(told.output[hidden])  # (masked, V - 1)
        replaced = inputs.clone()
        replaced[hidden] = _drawn(answers.detach(), context.generator)
        found = self.discriminator(replaced, context=context)
        other = (replaced != inputs)[..., None]
        losses = dict(found.losses)
        add_losses(losses, told.losses)
        nats = F.cross_entropy(answers, inputs[hidden], reduction="sum")
        add_losses(losses, {GENERATOR: (nats, hidden.sum())})
        return Result(torch.where(other, -found.output, found.output), None, losses, found.extras)

    def _hidden(self, inputs: Int[Tensor, "b n"], context: Context) -> Bool[Tensor, "b n"]:
        """Choose the tokens to mask; never padding."""
        draws = torch.rand(inputs.shape, generator=context.generator, device=inputs.device)
        hidden = draws < self.config.share
        valid = gathering(context.mask, inputs.shape[0], inputs.shape[1], inputs.device).valid
        return hidden if valid is None else hidden & valid


def _drawn(logits: Tensor, generator: torch.Generator | None) -> Int[Tensor, " m"]:
    """Sample a token from the softmax of each row by the Gumbel-max trick."""
    noise = torch.empty_like(logits).exponential_(generator=generator).log()
    return (logits - noise).argmax(-1)
