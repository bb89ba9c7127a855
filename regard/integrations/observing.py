"""Call a transformers model and record what a student learns from: logits, hidden states, weights, head outputs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from regard.contract import Context, Loss, Unsupported, an_instance
from regard.core.ragged import gathering
from regard.integrations.collecting import collect_losses

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


KNOWN = ("mask", "generator", "progress")
"""Fields of a context that a transformers model can honour."""
NO_EXTRAS: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Observed:
    """The results of a model on a batch of tokens.

    Attributes:
        logits: (B, N, V), at the places of the tokens.
        hidden: hidden states after each layer, (B, N, C).
        valid: positions of `hidden` that hold tokens.
        teachers: for each layer or module that returns them, its ``weights`` (B, H, N, M) and head ``output`` (B, H, N,
            V), right-padded: what a layer of a student learns from.
        losses: auxiliary losses by name, each (sum, count).
    """

    logits: Float[Tensor, "b n v"]
    hidden: list[Tensor]
    valid: Bool[Tensor, "b n"]
    teachers: Mapping[Any, Mapping[str, Tensor]]
    losses: Mapping[str, Loss]


def is_transformers_model(model: Any) -> bool:
    """Return whether a model is one of Hugging Face transformers, without importing the library."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(model, library.PreTrainedModel)


def observe(
    model: Any,
    ids: Int[Tensor, "b n"],
    context: Context,
    *,
    teachers: Mapping[Any, Mapping[str, Tensor]] | None = None,
    want: frozenset[str] = frozenset(),
) -> Observed:
    """Call a transformers model and record what it computes.

    Args:
        context: its token mask, generator and progress are used.
        teachers: what its swapped modules learn from, by path.
        want: ``weights``, to get those of the modules that attend through regard.

    Raises:
        Unsupported: for a context with other fields, and for a model without logits.
    """
    mask = context.mask
    pairs = mask is not None and (mask.bias is not None or mask.blocks is not None or mask.cu_seqlens is not None)
    others = [
        f.name for f in fields(context) if f.name not in KNOWN and getattr(context, f.name) not in (None, NO_EXTRAS)
    ]
    if pairs or others:
        raise Unsupported(
            f"a context with {', '.join(others) or 'a mask of pairs or documents'} for a transformers model",
            supported="Context(mask=Mask(valid=...), generator=..., progress=...)",
        )
    layout = gathering(mask, ids.shape[0], ids.shape[1], ids.device)
    valid = layout.scatter(layout.gather(ids.new_ones(ids.shape), axis=1), axis=1).bool()
    options: dict[str, Any] = {"attention_mask": valid.long()}
    accepted = inspect.signature(model.forward).parameters
    if "position_ids" in accepted:
        options["position_ids"] = layout.ranks
    if "use_cache" in accepted:
        options["use_cache"] = False
    with collect_losses(
        model, generator=context.generator, progress=context.progress, teachers=teachers, want=want
    ) as collected:
        output = model(input_ids=ids, output_hidden_states=True, **options)
    if getattr(output, "logits", None) is None:
        raise Unsupported(
            f"{an_instance(model)}, which gives no logits",
            supported="models with a language modelling head",
            nearest="AutoModelForCausalLM",
        )
    given = {path: extras for path, extras in collected.extras.items() if "weights" in extras}
    return Observed(output.logits, list(output.hidden_states[1:]), valid, given, collected.losses)


def swapped_paths(model: nn.Module) -> list[str]:
    """Paths of the modules of a transformers model that :func:`regard.swap` changed."""
    from regard.integrations.transformers import is_swapped

    return [path for path, module in model.named_modules() if is_swapped(module)]


__all__ = ["Observed", "is_transformers_model", "observe", "swapped_paths"]
