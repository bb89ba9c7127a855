"""Causal language models of transformers in the form that :mod:`regard.models.speculation` expects."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from regard.contract import Unsupported, an_instance
from regard.integrations.transformers.caches import CACHE, StateLayer

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


class ReadCausalModel:
    """A causal language model with its cache, which is cut back to the point where the next call continues.

    Args:
        model: a transformers model in evaluation mode.
        purpose: what needs the cache to be cut back, for error messages.
    """

    def __init__(self, model: Any, purpose: str = "speculation") -> None:
        self.model, self.purpose, self.cache = model, purpose, None
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self.keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(
        self, ids: Int[Tensor, "1 n"], state: int | None, last: int | None = None
    ) -> tuple[Float[Tensor, "m vocab"], int]:
        options: dict[str, Any] = {"logits_to_keep": last} if last is not None and self.keeps else {}
        cache: Any = None if state is None else self.cache
        if cache is not None and cache.get_seq_length() > state:
            cache.crop(state - cache.get_seq_length())
        with torch.inference_mode():
            found = self.model(ids, **options, **{CACHE: cache}, use_cache=True)
        self.cache = getattr(found, CACHE)
        if state is None:
            self._check()
        return found.logits[0, -(last or 0) :], self.cache.get_seq_length()  # type: ignore[attr-defined]

    def cut(self, state: int, read: int, kept: int) -> int:
        """Number of tokens to keep; the cache itself is cut at the next call."""
        return state - read + kept

    def _check(self) -> None:
        layers: Any = getattr(self.cache, "layers", ())
        fixed = [layer for layer in layers if isinstance(layer, StateLayer) or getattr(layer, "is_sliding", False)]
        if fixed or not hasattr(self.cache, "crop"):
            what = type(fixed[0]).__name__ if fixed else type(self.cache).__name__
            raise Unsupported(
                f"{self.purpose} with {an_instance(self.model)} whose cache ({what}) cannot be cut back",
                supported="models whose layers all keep keys and values, and every language model of regard",
            )
