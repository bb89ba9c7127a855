"""A product of matrices as far as the choice of a route depends on it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FEW_ROWS = 16
"""Rows of the largest product for which reading the weight is what takes the time."""

FEW_ROWS_WEIGHT = 1 << 17
"""Entries of the smallest weight that few rows may take a route of their own to: smaller ones are soon read."""

PROBED_WORK = 1 << 30
"""Operations of the largest product that is measured; of larger ones a smaller one speaks for."""


def layout_of(rows: int, columns: int, strides: tuple[int, ...]) -> str:
    """How a matrix lies in memory: ``rows`` or ``columns`` one after another, with ``gaps`` between them, or ``scattered``."""
    down, along = strides
    if along == 1 or columns <= 1:
        return "rows" if down == columns or rows <= 1 else "rows with gaps"
    if down == 1 or rows <= 1:
        return "columns" if along == rows else "columns with gaps"
    return "scattered"


def _strides(layout: str, rows: int, columns: int, before: tuple[int, ...]) -> tuple[int, ...]:
    """The layout of a part of a matrix that lies as the whole does."""
    return {"rows": (columns, 1), "columns": (1, rows)}.get(layout, before)


class Product(NamedTuple):
    """(m, k) times the transpose of (n, k), with the strides of both: what a choice depends on."""

    m: int
    n: int
    k: int
    x_strides: tuple[int, ...]
    weight_strides: tuple[int, ...]
    frozen: bool

    @classmethod
    def plain(cls, m: int, n: int, k: int, *, frozen: bool = False) -> Product:
        """The layouts of contiguous operands."""
        return cls(m, n, k, (k, 1), (k, 1), frozen)

    @property
    def work(self) -> int:
        """Multiply-adds, counted twice."""
        return 2 * self.m * self.n * self.k

    @property
    def x_layout(self) -> str:
        """How the left operand lies in memory, as far as choices tell layouts apart."""
        return layout_of(self.m, self.k, self.x_strides)

    @property
    def weight_layout(self) -> str:
        """How the right operand lies in memory."""
        return layout_of(self.n, self.k, self.weight_strides)

    @property
    def reads_once(self) -> bool:
        """Whether few rows meet a weight that lies as the kernel for them reads it."""
        return self.m <= FEW_ROWS and self.weight_layout == "rows" and self.n * self.k >= FEW_ROWS_WEIGHT

    def size_class(self) -> tuple[int | str, ...]:
        """The class of products that share a choice: sizes up to a power of two, both layouts, and whether the weight
        lasts."""
        sizes = (self.m.bit_length(), self.n.bit_length(), self.k.bit_length())
        return (*sizes, self.x_layout, self.weight_layout, self.frozen)

    def measured(self) -> Product:
        """The product that is measured for it: a smaller one of the same layouts where it is large."""
        m, n, k = self.m, self.n, self.k
        while 2 * m * n * k > PROBED_WORK:
            m, n, k = (size // 2 if size == max(m, n, k) else size for size in (m, n, k))
        x_strides = _strides(self.x_layout, m, k, self.x_strides)
        weight_strides = _strides(self.weight_layout, n, k, self.weight_strides)
        return Product(m, n, k, x_strides, weight_strides, self.frozen)

    def operands(self) -> tuple[Tensor, Tensor]:
        """Tensors of such a product."""

        def made(shape: tuple[int, int], strides: tuple[int, ...]) -> Tensor:
            last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
            return torch.full((last + 1,), 0.5, dtype=torch.float32, device="cpu").as_strided(shape, strides)

        return made((self.m, self.k), self.x_strides), made((self.n, self.k), self.weight_strides)

    def __str__(self) -> str:
        """Its class, in words."""
        m, n, k = (f"2^{size.bit_length() - 1}" for size in (self.m, self.n, self.k))
        return f"{m}x{k} {self.x_layout}, {n}x{k} {self.weight_layout}{', frozen' if self.frozen else ''}"
