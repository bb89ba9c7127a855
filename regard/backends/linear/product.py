"""The properties of a matrix product that the choice of a route depends on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FEW_ROWS = 16
"""Largest number of rows for which reading the weight dominates the time."""

FEW_ROWS_WEIGHT = 1 << 17
"""Smallest number of weight entries for a separate few-rows route: smaller weights are read quickly anyway."""

PROBED_WORK = 1 << 30
"""Number of operations of the largest product that is measured; larger ones are represented by a smaller one."""


def layout_of(rows: int, columns: int, strides: tuple[int, ...]) -> str:
    """A matrix's memory layout: contiguous ``rows`` or ``columns``, the same ``with gaps``, or ``scattered``."""
    down, along = strides
    if along == 1 or columns <= 1:
        return "rows" if down == columns or rows <= 1 else "rows with gaps"
    if down == 1 or rows <= 1:
        return "columns" if along == rows else "columns with gaps"
    return "scattered"


def _strides(layout: str, rows: int, columns: int, before: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a smaller matrix with the same layout."""
    return {"rows": (columns, 1), "columns": (1, rows)}.get(layout, before)


class Product(NamedTuple):
    """(m, k) times the transpose of (n, k), with the strides of both."""

    m: int
    n: int
    k: int
    x_strides: tuple[int, ...]
    weight_strides: tuple[int, ...]
    frozen: bool

    @classmethod
    def plain(cls, m: int, n: int, k: int, *, frozen: bool = False) -> Product:
        """A product of contiguous operands."""
        return cls(m, n, k, (k, 1), (k, 1), frozen)

    @property
    def work(self) -> int:
        """Number of operations; a multiply-add counts as two."""
        return 2 * self.m * self.n * self.k

    @property
    def x_layout(self) -> str:
        """Memory layout of the left operand."""
        return layout_of(self.m, self.k, self.x_strides)

    @property
    def weight_layout(self) -> str:
        """Memory layout of the right operand."""
        return layout_of(self.n, self.k, self.weight_strides)

    @property
    def reads_once(self) -> bool:
        """True if there are few rows and the weight has the layout that their kernel needs."""
        return self.m <= FEW_ROWS and self.weight_layout == "rows" and self.n * self.k >= FEW_ROWS_WEIGHT

    def size_class(self) -> tuple[int | str, ...]:
        """The class of products that share a choice: sizes up to a power of two, both layouts, and whether the weight
        is frozen."""
        sizes = (self.m.bit_length(), self.n.bit_length(), self.k.bit_length())
        return (*sizes, self.x_layout, self.weight_layout, self.frozen)

    def measured(self) -> Product:
        """The product that is measured in its place: a smaller one with the same layouts if it is large."""
        m, n, k = self.m, self.n, self.k
        while 2 * m * n * k > PROBED_WORK:
            m, n, k = (size // 2 if size == max(m, n, k) else size for size in (m, n, k))
        x_strides = _strides(self.x_layout, m, k, self.x_strides)
        weight_strides = _strides(self.weight_layout, n, k, self.weight_strides)
        return Product(m, n, k, x_strides, weight_strides, self.frozen)

    def operands(self) -> tuple[Tensor, Tensor]:
        """Example tensors for such a product."""

        def made(shape: tuple[int, int], strides: tuple[int, ...]) -> Tensor:
            last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
            return torch.full((last + 1,), 0.5, dtype=torch.float32, device="cpu").as_strided(shape, strides)

        return made((self.m, self.k), self.x_strides), made((self.n, self.k), self.weight_strides)

    def __str__(self) -> str:
        """The product's class, in words."""
        m, n, k = (f"2^{size.bit_length() - 1}" for size in (self.m, self.n, self.k))
        return f"{m}x{k} {self.x_layout}, {n}x{k} {self.weight_layout}{', frozen' if self.frozen else ''}"
