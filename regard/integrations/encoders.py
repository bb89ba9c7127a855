"""Encoders of transformers: what is in a folder, how a text is laid before one, and tokens that are hidden and asked for."""

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
"""Share of a block's tokens that are hidden and asked for."""
UNASKED = -100
"""A target that is none."""

CLASSES = {"masked": "AutoModelForMaskedLM", "bare": "AutoModel", "classes": "AutoModelForSequenceClassification"}
"""Kinds of :func:`kind_of`, with the class of transformers that loads them whole."""


def kind_of(folder: Path) -> str:
    """What the model of transformers in a folder gives, by its ``config.json``.

    Returns:
        ``masked`` tokens, ``bare`` hidden states, or ``classes`` of a text; ``other`` for an encoder with another head;
        ``language`` for what is no encoder.
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
    """The name of the class that a config was saved of; nothing where it does not say."""
    return str(next(iter(config.get("architectures") or ()), ""))


def read_config(folder: Path) -> dict[str, Any]:
    """What ``config.json`` says; raises Unsupported where it cannot be read."""
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
    """The class of transformers that loads a kind of :data:`CLASSES`; None for another."""
    import transformers

    return getattr(transformers, CLASSES[kind]) if kind in CLASSES else None


def is_masked_lm(model: Any) -> bool:
    """Whether it is an encoder with a head that says masked tokens."""
    return type(model).__name__.endswith("ForMaskedLM")


def positions_of(model: Any) -> int | None:
    """Tokens that its positions reach, without those that models of the kind of RoBERTa keep for padding; None where nothing
    says so."""
    known = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and known is not None:
            return known if module.padding_idx is None else known - module.padding_idx - 1
    return known


def frame_of(tokenizer: Any) -> tuple[int, int] | None:
    """The tokens before and after a text; None where the tokenizer has none."""
    first, last = (getattr(tokenizer, name, None) for name in ("cls_token_id", "sep_token_id"))
    return None if first is None or last is None else (first, last)


def framed(ids: Int[Tensor, "b n"], tokenizer: Any) -> Int[Tensor, "b m"]:
    """Texts as the tokenizer frames them."""
    frame = frame_of(tokenizer)
    if frame is None:
        return ids
    first, last = (ids.new_full((len(ids), 1), token) for token in frame)
    return torch.cat([first, ids, last], 1)


def masked(
    ids: Int[Tensor, "b n"], tokenizer: Any, generator: torch.Generator
) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"]]:
    """Texts with some tokens hidden, as many in each row and no frames, and these as targets, :data:`UNASKED` elsewhere."""
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids, dtype=ids.dtype))
    chance = torch.rand(ids.shape, generator=generator) + special
    count = max(round(MASKED * ids.shape[1]), 1)
    asked = torch.zeros_like(special).scatter_(1, chance.topk(count, 1, largest=False).indices, True)
    return ids.masked_fill(asked, tokenizer.mask_token_id), ids.masked_fill(~asked, UNASKED)
