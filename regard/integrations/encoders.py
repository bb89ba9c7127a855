"""Encoders of transformers: the kind of model in a folder, the special tokens around a text, and masked tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.contract import Unsupported

if TYPE_CHECKING:
    from jaxtyping import Int

MASKED = 0.15
"""Fraction of a block's tokens that are masked and predicted."""
UNASKED = -100
"""The target at positions that are not predicted."""

CLASSES = {"masked": "AutoModelForMaskedLM", "bare": "AutoModel", "classes": "AutoModelForSequenceClassification"}
"""Kinds returned by :func:`kind_of`, with the transformers class that loads each with its head."""


def kind_of(folder: Path) -> str:
    """The kind of transformers model in a folder, by its ``config.json``.

    Returns:
        ``masked`` for an encoder that predicts masked tokens, ``bare`` for one that returns hidden states, ``classes``
        for a text classifier; ``other`` for an encoder with another head; ``language`` for a model that is not an
        encoder.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = read_config(folder)
    name = architecture_of(config)
    if name.endswith("ForSequenceClassification"):
        return "classes"
    if config.get("model_type") not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or name.endswith(
        ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    ):
        return "language"
    if name.endswith("Model") and not name.endswith("WithLMHeadModel"):
        return "bare"
    return "masked" if name.endswith(("ForMaskedLM", "ForPreTraining", "WithLMHeadModel")) or not name else "other"


def architecture_of(config: dict[str, Any]) -> str:
    """Name of the class from which a config was saved; empty where the config does not say."""
    return str(next(iter(config.get("architectures") or ()), ""))


def read_config(folder: Path) -> dict[str, Any]:
    """Contents of ``config.json``; raises Unsupported where it cannot be read."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError("it holds no object")
    except (OSError, ValueError, TypeError) as error:
        raise Unsupported(
            f"{folder / 'config.json'}, which cannot be read ({error})", supported="a file of save_pretrained"
        ) from None
    return found


def auto_class(kind: str) -> Any:
    """The transformers class that loads a kind of :data:`CLASSES`; None for other kinds."""
    import transformers

    return getattr(transformers, CLASSES[kind]) if kind in CLASSES else None


def is_masked_lm(model: Any) -> bool:
    """Return whether a model is an encoder with a head that predicts masked tokens."""
    return type(model).__name__.endswith("ForMaskedLM")


def positions_of(model: Any) -> int | None:
    """Number of tokens that a model's positions cover, without those that models like RoBERTa reserve for padding; None
    where unknown."""
    known = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and known is not None:
            return known if module.padding_idx is None else known - module.padding_idx - 1
    return known


def frame_of(tokenizer: Any) -> tuple[int, int] | None:
    """The special tokens before and after a text; None where the tokenizer has none."""
    first, last = (getattr(tokenizer, name, None) for name in ("cls_token_id", "sep_token_id"))
    return None if first is None or last is None else (first, last)


def framed(ids: Int[Tensor, "b n"], tokenizer: Any) -> Int[Tensor, "b m"]:
    """Add the tokenizer's special tokens around texts."""
    frame = frame_of(tokenizer)
    if frame is None:
        return ids
    first, last = (ids.new_full((len(ids), 1), token) for token in frame)
    return torch.cat([first, ids, last], 1)


def masked(
    ids: Int[Tensor, "b n"], tokenizer: Any, generator: torch.Generator
) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"]]:
    """Mask the same number of tokens in each text, never special ones. Returns the masked texts and the targets: the
    original tokens, and :data:`UNASKED` elsewhere."""
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids, dtype=ids.dtype))
    chance = torch.rand(ids.shape, generator=generator) + special
    count = max(round(MASKED * ids.shape[1]), 1)
    asked = torch.zeros_like(special).scatter_(1, chance.topk(count, 1, largest=False).indices, True)
    return ids.masked_fill(asked, tokenizer.mask_token_id), ids.masked_fill(~asked, UNASKED)
