"""The right-padded layout in which mechanisms see their tokens: rank equals index, and padding is zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.apply.sizes import Sizes
from regard.contract import Mask, Mechanism, Pattern
from regard.core.ragged import Gathering, check_pairs, gather_pairs, gathering, gathering_in_place


@dataclass(frozen=True)
class Layout:
    """How a call's tokens move to the right-padded layout, and its output back to the layout of the queries.

    Attributes:
        queries, keys: layouts of the queries and keys; the same object if they are the same tokens.
        in_place: whether tokens on a grid stay in their places, with padding among them.
    """

    queries: Gathering
    keys: Gathering
    in_place: bool = False

    def inputs(self, card: Mechanism, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move inputs to the right-padded layout."""
        if self.queries.whole and self.keys.whole:
            return tensors
        return {name: self._input(card.axes[name], tensor) for name, tensor in tensors.items()}

    def _input(self, axes: str, tensor: Tensor) -> Tensor:
        for letter, tokens in (("n", self.queries), ("m", self.keys)):
            if letter in axes:
                tensor = tokens.gather(tensor, axis=axes.index(letter), batch_axis=axes.index("b"))
        return tensor

    def output(self, card: Mechanism, output: Tensor) -> Tensor:
        """Move an output to the layout of the caller's queries."""
        if "n" not in card.output:
            return output
        return self.queries.scatter(output, axis=card.output.index("n"), batch_axis=card.output.index("b"))

    def bias(self, bias: Tensor | None, sizes: Sizes, *, continuing: bool) -> Tensor | None:
        """The bias on pairs, indexed by rank. Its size says how many keys a state holds, which is not checked."""
        if bias is None:
            return None
        known = sizes.m if sizes.has_memory and not continuing else None
        check_pairs(bias, self.queries.source_batch, 1 if sizes.heads is None else sizes.heads, sizes.n, known)
        queries = self.queries
        keys = self.keys if sizes.has_memory else gathering(None, queries.batch, bias.shape[-1], queries.device)
        return gather_pairs(bias, queries, keys)

    @property
    def more_queries(self) -> bool:
        """True if some row has more valid queries than valid keys (inside a graph only total lengths are compared)."""
        queries, keys = self.queries, self.keys
        if queries.lengths is keys.lengths or torch.compiler.is_compiling():
            return queries.length > keys.length
        valid_queries = queries.length if queries.lengths is None else queries.lengths
        valid_keys = keys.length if keys.lengths is None else keys.lengths
        more = valid_queries > valid_keys
        return bool(more.any()) if isinstance(more, Tensor) else more


def layout_of(
    card: Mechanism,
    pattern: Pattern,
    sizes: Sizes,
    batch: int,
    *,
    mask: Mask | None,
    memory_mask: Mask | None,
    grid: tuple[int, ...] | None,
    device: torch.device,
) -> Layout:
    """The layout of a call with `batch` rows; in self patterns with N = M one mask covers queries and keys."""
    n, m, self_even = sizes.n, sizes.m, not pattern.cross and sizes.n == sizes.m
    if card.keeps_places and pattern is Pattern.NONCAUSAL_SELF and grid is not None:
        places = gathering_in_place(mask, batch, n, grid, device)
        return Layout(places, places, in_place=True)
    queries = gathering(mask, batch, n, device)
    if self_even and (memory_mask is None or _same(mask, memory_mask)):
        return Layout(queries, queries)
    return Layout(queries, gathering(memory_mask, batch, m, device))


def _same(a: Mask | None, b: Mask | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.valid is b.valid and a.lengths is b.lengths and a.cu_seqlens is b.cu_seqlens


def expand_heads(card: Mechanism, tensors: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """Repeat inputs with fewer heads until they have `heads`."""
    expanded = {}
    for name, tensor in tensors.items():
        at = card.axes[name].find("h")
        if at >= 0 and tensor.shape[at] != heads:
            tensor = tensor.repeat_interleave(heads // tensor.shape[at], at)
        expanded[name] = tensor
    return expanded


def tied(output: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Tie an output to the inputs in the autograd graph even if no token reached it, as torch's own functions do."""
    if output.requires_grad or not torch.is_grad_enabled():
        return output
    for x in tensors.values():
        if x.requires_grad:
            output = output + x.flatten()[:0].sum().to(output.dtype)
    return output
