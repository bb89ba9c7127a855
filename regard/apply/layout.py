"""The right-padded layout, in which a mechanism sees its tokens: rank equals index there, and padding is zero."""

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
    """How the tokens of a call come to the right-padded layout, and its output back to where the queries are.

    Attributes:
        queries, keys: the same object where both are the same tokens.
        in_place: whether tokens on a grid stay in their places, with padding among them.
    """

    queries: Gathering
    keys: Gathering
    in_place: bool = False

    def inputs(self, card: Mechanism, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs in the right-padded layout."""
        if self.queries.whole and self.keys.whole:
            return tensors
        return {name: self._input(card.axes[name], tensor) for name, tensor in tensors.items()}

    def _input(self, axes: str, tensor: Tensor) -> Tensor:
        for letter, tokens in (("n", self.queries), ("m", self.keys)):
            if letter in axes:
                tensor = tokens.gather(tensor, axis=axes.index(letter), batch_axis=axes.index("b"))
        return tensor

    def output(self, card: Mechanism, output: Tensor) -> Tensor:
        """An output in the layout of the caller's queries."""
        if "n" not in card.output:
            return output
        return self.queries.scatter(output, axis=card.output.index("n"), batch_axis=card.output.index("b"))

    def bias(self, bias: Tensor | None, sizes: Sizes, *, continuing: bool) -> Tensor | None:
        """Additive scores of pairs on ranks; of a state's tokens no more is known than the bias says."""
        if bias is None:
            return None
        known = sizes.m if sizes.has_memory and not continuing else None
        check_pairs(bias, self.queries.source_batch, 1 if sizes.heads is None else sizes.heads, sizes.n, known)
        queries = self.queries
        keys = self.keys if sizes.has_memory else gathering(None, queries.batch, bias.shape[-1], queries.device)
        return gather_pairs(bias, queries, keys)

    @property
    def more_queries(self) -> bool:
        """Whether some row has more valid queries than valid keys (of unequal lengths only known outside a graph)."""
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
    """The layout of a call of `batch` rows; in self patterns with N = M one mask speaks for queries and keys."""
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
    """Inputs with fewer heads repeated to have `heads` of them."""
    expanded = {}
    for name, tensor in tensors.items():
        at = card.axes[name].find("h")
        if at >= 0 and tensor.shape[at] != heads:
            tensor = tensor.repeat_interleave(heads // tensor.shape[at], at)
        expanded[name] = tensor
    return expanded


def tied(output: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """An output that no token reached depends on the inputs all the same, as that of torch's functions does."""
    if output.requires_grad or not torch.is_grad_enabled():
        return output
    for x in tensors.values():
        if x.requires_grad:
            output = output + x.flatten()[:0].sum().to(output.dtype)
    return output
