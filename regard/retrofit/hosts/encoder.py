"""Encoders of transformers: with a masked-language-model head, or without a head, compared by hidden states alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.contract import Pattern, Unsupported, an_instance
from regard.integrations.encoders import (
    UNASKED,
    architecture_of,
    auto_class,
    frame_of,
    framed,
    is_masked_lm,
    kind_of,
    masked,
    positions_of,
    read_config,
)
from regard.retrofit.corpus import Corpus, even_blocks
from regard.retrofit.hosts.base import Batch
from regard.retrofit.hosts.text import TextHost
from regard.retrofit.settings import RetrofitSettings
from regard.training.loop import step_seed

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from regard.tasks.documents import Paths

SUPPORTED = "causal language models, encoders with a head for masked tokens, and bare encoders (AutoModel)"


@dataclass(frozen=True)
class EncoderHost(TextHost):
    """An encoder, which reads a block of text at once, with the special tokens of its tokenizer around it."""

    kind: ClassVar[str] = "encoder"
    pattern: ClassVar[Pattern] = Pattern.NONCAUSAL_SELF
    usual_lengths: ClassVar[tuple[int, ...]] = (128, 512)

    @property
    def distributes(self) -> bool:
        """Whether it has a head that predicts masked tokens."""
        return is_masked_lm(self.model)

    @property
    def unit(self) -> str:
        return "nats a masked token" if self.distributes else super().unit

    @property
    def longest(self) -> int | None:
        return positions_of(self.model)

    @property
    def frame(self) -> tuple[int, int] | None:
        """The special tokens before and after a text; None if the tokenizer has none."""
        return frame_of(self.tokenizer)

    def extended(self, positions: int | None) -> Self:
        if positions is not None and not self.distributes:
            raise Unsupported(
                f"positions={positions} of {an_instance(self.model)}, which has no head that predicts tokens: it could "
                "only learn the hidden states of the original, which has not learned them",
                supported="language models, and encoders with a head for masked tokens",
            )
        return super().extended(positions)

    def settled(self, settings: RetrofitSettings) -> RetrofitSettings:
        if not self.distributes and settings.distil != 1:
            raise Unsupported(
                f"distil={settings.distil} of {an_instance(self.model)}, which has no head that predicts tokens",
                supported="distil=1, its own hidden states",
                nearest="distil=1",
            )
        if self.distributes and getattr(self.tokenizer, "mask_token_id", None) is None:
            raise Unsupported(
                f"{an_instance(self.model)} without a tokenizer that has a mask token",
                supported="a folder with its tokenizer, or tokenizer=...",
            )
        return super().settled(settings)

    def read(
        self, data: Paths | Tensor | None, validation: Paths | Tensor | None, settings: RetrofitSettings
    ) -> Corpus:
        if self._content(settings.block) < 2:
            raise Unsupported(
                f"blocks of {settings.block} tokens, of which two are the frame of a text",
                supported="length of 4 or more",
            )
        return super().read(data, validation, settings)

    def _content(self, length: int) -> int:
        """Number of text tokens in a block."""
        return length - (0 if self.frame is None else 2)

    def framed(self, ids: Int[Tensor, "b n"]) -> Int[Tensor, "b m"]:
        """Texts with the tokenizer's special tokens around them."""
        return framed(ids, self.tokenizer)

    def _batch(self, ids: Int[Tensor, "b n"], generator: torch.Generator) -> Batch:
        ids = self.framed(ids)
        return Batch(*masked(ids, self.tokenizer, generator)) if self.distributes else Batch(ids)

    def batch(self, data: Corpus, step: int, seed: int, settings: RetrofitSettings, rows: int | None = None) -> Batch:
        ids = data.blocks(step, seed, rows or settings.rows, self._content(settings.block))
        return self._batch(ids, torch.Generator().manual_seed(step_seed(seed + 1, step)))

    def held_out(self, data: Corpus, most: int, settings: RetrofitSettings) -> Batch:
        return self.of_text(data.held_out, most, settings)

    def of_text(self, ids: Int[Tensor, " n"], most: int, settings: RetrofitSettings) -> Batch:
        """Blocks of a text, evenly spread, with the same tokens masked each time."""
        blocks = even_blocks(ids, most, self._content(settings.block))
        return self._batch(blocks, torch.Generator().manual_seed(settings.seed))

    def answers(self, model: Any, batch: Batch) -> Float[Tensor, "m v"]:
        """The answers for the masked tokens, row by row, or the last hidden states of all tokens."""
        if batch.targets is None:
            return model(batch.inputs).last_hidden_state.float().flatten(0, 1)
        return model(batch.inputs).logits[batch.targets != UNASKED].float().log_softmax(-1)

    def own_loss(self, found: Float[Tensor, "m v"], batch: Batch) -> Tensor:
        assert batch.targets is not None
        return F.nll_loss(found, batch.targets[batch.targets != UNASKED])

    def body(self, inputs: Int[Tensor, "b n"]) -> None:
        self.model.base_model(inputs)

    def load(self, folder: Any) -> Any:
        from regard.integrations.transformers.folders import load_model

        return load_model(folder, of=class_of(Path(folder)))


def class_of(folder: Path) -> Any:
    """The class of transformers that loads all of an encoder in a folder; None if it is not an encoder.

    Raises:
        Unsupported: for an encoder with another head, which would be lost.
    """
    kind = kind_of(folder)
    if kind in ("classes", "other"):
        raise Unsupported(
            f"a retrofit of a {architecture_of(read_config(folder))}, whose head is of another kind",
            supported=SUPPORTED,
            nearest="regard.swap, in Python",
        )
    return auto_class(kind)
