"""Everything that accompanies the tensors of a call: masks, positions, and the extras to return."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.contract.errors import Unsupported, at_least
from regard.contract.trees import register_pytree
from regard.contract.types import Types

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class BlockMask:
    """Block-sparse visibility on token *ranks* (True = may attend).

    Query rank i is in block ``i // block_size``. In causal-self, query ranks start at the row's offset M - N.

    Attributes:
        visible: which blocks may attend to which; broadcast over batch and heads.
        block_size: tokens per block, for queries and keys alike.
    """

    visible: Bool[Tensor, "#b #h q_blocks k_blocks"]
    block_size: int

    def __post_init__(self) -> None:
        _BLOCK_MASK_TYPES.check("BlockMask", self.__dict__)
        at_least("block_size", self.block_size, 1)
        if self.visible.dtype != torch.bool or self.visible.ndim != 4:
            raise Unsupported(
                f"visible blocks of dtype {self.visible.dtype} and {self.visible.ndim} axes",
                supported="a boolean (B or 1, H or 1, query blocks, key blocks) tensor, True where blocks may attend",
                nearest="visible.bool()" if self.visible.ndim == 4 else "",
            )


register_pytree(BlockMask, {"block_size": int})


@dataclass(frozen=True)
class Mask:
    """Which tokens of one sequence axis are valid, and which pairs of them may attend. True = may attend.

    Give at most one of `valid`, `lengths`, `cu_seqlens`. `bias` and `blocks` describe pairs and belong to the query
    side's mask; a mechanism that cannot honour them raises Unsupported.

    Attributes:
        valid: key padding mask of any layout (left, right, inside).
        lengths: number of valid tokens in each right-padded row.
        cu_seqlens: boundaries of the documents packed into one row (batch size 1), starting with 0.
        max_length: length of the longest document, as a Python int; computed from `cu_seqlens` when None.
        bias: added to the scores of exact mechanisms; -inf hides a pair.
        blocks: block-sparse visibility.
        layout: the layout of the tokens, in a mask that a model or layer makes for its inner modules, so that it is
            neither checked nor computed again (:func:`regard.core.ragged.inner_mask`). None in masks that callers make.
    """

    valid: Bool[Tensor, "b n"] | None = None
    lengths: Int[Tensor, " b"] | None = None
    cu_seqlens: Int[Tensor, " documents+1"] | None = None
    max_length: int | None = None
    bias: Float[Tensor, "#b #h n m"] | None = None
    blocks: BlockMask | None = None
    layout: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        _MASK_TYPES.check("Mask", self.__dict__)
        if self.layout is not None and not hasattr(self.layout, "dense_index"):
            raise Unsupported("mask.layout", supported="None: models and layers set it", nearest="valid or lengths")
        given = [n for n in ("valid", "lengths", "cu_seqlens") if getattr(self, n) is not None]
        if len(given) > 1:
            raise Unsupported(
                f"a mask with both {given[0]} and {given[1]}", supported="one of valid, lengths, cu_seqlens"
            )
        if self.valid is not None and (self.valid.dtype != torch.bool or self.valid.ndim != 2):
            raise Unsupported(
                f"mask.valid of dtype {self.valid.dtype} and {self.valid.ndim} axes",
                supported="a boolean (B, N) tensor, True where a token is valid",
                nearest="Mask(bias=...) for a score for each pair" if self.valid.ndim > 2 else "valid.bool()",
            )
        if self.lengths is not None and (self.lengths.is_floating_point() or self.lengths.ndim != 1):
            raise Unsupported("mask.lengths that is not an integer (B,) tensor", supported="an integer (B,) tensor")
        if self.cu_seqlens is not None and (self.cu_seqlens.is_floating_point() or self.cu_seqlens.ndim != 1):
            raise Unsupported(
                "mask.cu_seqlens that is not an integer (documents + 1,) tensor", supported="0, end of document 1, ..."
            )
        if self.max_length is not None and self.cu_seqlens is None:
            raise Unsupported(f"max_length={self.max_length} without cu_seqlens", supported="max_length=None")
        if self.bias is not None and (not self.bias.is_floating_point() or self.bias.ndim != 4):
            raise Unsupported(
                f"mask.bias of dtype {self.bias.dtype} and {self.bias.ndim} axes",
                supported="scores to add, (B or 1, H or 1, N or 1, M or 1)",
                nearest="torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf), for booleans",
            )

    @property
    def ragged(self) -> bool:
        """True if some tokens may be missing (as opposed to pairs being hidden)."""
        return self.valid is not None or self.lengths is not None or self.cu_seqlens is not None


register_pytree(Mask, {"max_length": int})


def check_mask(name: str, mask: Any) -> None:
    """Raise Unsupported for anything but a :class:`Mask` or None, and suggest the mask that was probably meant."""
    if mask is None or isinstance(mask, Mask):
        return
    meant = "Mask(valid=...)"
    if isinstance(mask, Tensor):
        field_of = {1: "lengths", 2: "valid"}.get(mask.ndim, "bias")
        boolean = mask.dtype == torch.bool
        meant = f"Mask({field_of}={name}{'' if boolean or field_of != 'valid' else '.bool()'})"
        if field_of == "bias" and boolean:
            meant = f"Mask(bias=torch.zeros({name}.shape).masked_fill(~{name}, -torch.inf))"
    raise Unsupported(
        f"{name} of type {type(mask).__name__}",
        supported="a regard.Mask of valid (B, N), lengths (B,), cu_seqlens, bias (B, H, N, M) or blocks",
        nearest=meant,
    )


class Role(enum.IntEnum):
    """The purpose of an inserted token; ordinary tokens have role 0."""

    TOKEN = 0
    LANDMARK = 1
    CLS = 2
    SINK = 3
    REFERENCE = 4


WANTS = ("state", "weights", "lse", "gates")
"""Extras that a call can be asked to return in addition to its output."""


@dataclass(frozen=True)
class Context:
    """Everything that accompanies the tensors of one call.

    Attributes:
        mask: mask of the queries (and of the keys, in self patterns).
        memory_mask: mask of the memory, in cross patterns.
        positions: position of each token; None for its rank among the valid tokens. Schemes of several axes (`rotary` with
            ``axes=2``) also take coordinates on a grid, (B, N, axes).
        memory_positions: likewise for the memory.
        position_vectors: position encodings that a model computed once for all its layers, if its position scheme
            allows that.
        grid: sides of the image or volume whose tokens are laid out row by row.
        roles: :class:`Role` of each token; in cross patterns, of each token of the memory.
        generator: random generator for every draw of the call.
        progress: training step or diffusion time, for mechanisms that follow a schedule.
        teacher: a teacher's tensors, for distillation losses.
        want: extras to compute, from `WANTS`: ``"state"`` (to continue later), ``"weights"`` (attention weights),
            ``"lse"`` (their log-sum-exp), ``"gates"`` (of a wrapper's routers).
    """

    mask: Mask | None = None
    memory_mask: Mask | None = None
    positions: Int[Tensor, "b n"] | Int[Tensor, "b n axes"] | None = None
    memory_positions: Int[Tensor, "b m"] | Int[Tensor, "b m axes"] | None = None
    position_vectors: Float[Tensor, "#b n c"] | None = None
    grid: tuple[int, ...] | None = None
    roles: Int[Tensor, "b n"] | None = None
    generator: torch.Generator | None = None
    progress: float | None = None
    teacher: Any = None
    want: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name in ("mask", "memory_mask"):
            check_mask(name, getattr(self, name))
        if isinstance(self.want, str):
            given = f"want={self.want!r}"
            raise Unsupported(given, supported="a set of names", nearest=f"want={{{self.want!r}}}")
        _CONTEXT_TYPES.check("Context", self.__dict__)
        for name in ("positions", "memory_positions", "roles"):
            numbers = getattr(self, name)
            shaped = numbers is None or numbers.ndim == 2 or (numbers.ndim == 3 and name != "roles")
            if numbers is not None and (not shaped or numbers.is_floating_point()):
                raise Unsupported(
                    f"{name} of dtype {numbers.dtype} and shape {tuple(numbers.shape)}", supported="integers (B, N)"
                )

    def replace(self, **changes: Any) -> Context:
        """A copy of this context with some fields changed."""
        return dataclasses.replace(self, **changes)


register_pytree(Context, {"grid": tuple, "generator": torch.Generator, "progress": float, "want": frozenset})


_BLOCK_MASK_TYPES = Types({"visible": Tensor, "block_size": int})


_MASK_TYPES = Types(
    dict.fromkeys(("valid", "lengths", "cu_seqlens", "bias"), Tensor | None) | {"blocks": BlockMask | None}
)


_CONTEXT_TYPES = Types(
    dict.fromkeys(("positions", "memory_positions", "position_vectors", "roles"), Tensor | None)
    | {"want": Set, "grid": tuple[int, ...] | None}
)
