"""The routes, which compute a product by various libraries, and the packed weights that one of them needs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.backends.linear.product import Product, layout_of
from regard.backends.native import library
from regard.backends.native.few_rows import few_rows
from regard.contract import Unsupported, closest

PACKED_ROWS = 64
"""Largest number of rows for which packed weights are used."""


@dataclass(frozen=True)
class Route:
    """One way to compute the product.

    Attributes:
        run: (x (m, k), weight (n, k), bias (n,) or None) -> (m, n), a new contiguous tensor; operands may have any
            strides.
        available: returns whether this build of torch and this processor support it.
        applies: returns whether it supports a product.
    """

    run: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    available: Callable[[], bool] = lambda: True
    applies: Callable[[Product], bool] = lambda product: True


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Copies weights with gaps first: oneDNN only has a plain loop for them, thousands of times slower."""
    n, k = weight.shape
    if layout_of(n, k, weight.stride()) not in ("rows", "columns"):
        weight = weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def _onednn_packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    packs = LOCAL.frozen
    if packs is None:
        return _onednn(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise.default(x, packs.packed(weight), bias, "none", [], "")


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return few_rows(x.contiguous(), weight, None if bias is None else bias.contiguous())


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


ROUTES: dict[str, Route] = {
    "torch": Route(F.linear),
    "onednn": Route(_onednn, _has_onednn),
    # Packing pays off if few rows are multiplied by a large weight again and again, as in decoding: up to twice as fast
    # at 8 rows, 5% at 1024.
    "onednn_packed": Route(
        _onednn_packed,
        _has_onednn,
        lambda product: product.frozen and product.m <= PACKED_ROWS and product.weight_layout.startswith("rows"),
    ),
    "native": Route(_few_rows, lambda: library.why_missing() is None, lambda product: product.reads_once),
}
"""Routes by name. Torch comes first, as the one to beat."""


class FrozenWeights:
    """Keeps copies of weights in a library's own layout, as long as the weights do not change.

    ``with packs:`` enables packed routes for products in the block, in this thread. The copies live as long as this
    object, and take as much memory as the weights; a weight changed by an operation of torch is packed again. Do not
    change weights behind torch's back (through ``weight.data`` or shared memory) while the object is in use.
    """

    def __init__(self) -> None:
        self._packs: dict[tuple[Any, ...], tuple[int, Tensor, Tensor]] = {}
        self._outer: list[FrozenWeights | None] = []

    def __enter__(self) -> FrozenWeights:
        self._outer.append(LOCAL.frozen)
        LOCAL.frozen = self
        return self

    def __exit__(self, *_: object) -> None:
        LOCAL.frozen = self._outer.pop()

    def packed(self, weight: Tensor) -> Tensor:
        """The packed copy of a weight, for which :func:`lasting` must be true."""
        where = (weight.data_ptr(), tuple(weight.shape), weight.stride())
        # the entry holds the weight too, so that its address is not reused
        known = self._packs.get(where)
        if known is not None and known[0] == weight._version:
            return known[2]
        copy = torch.ops.mkldnn._reorder_linear_weight.default(weight.detach().contiguous(), PACKED_ROWS)
        self._packs[where] = (weight._version, weight, copy)
        return copy


class _Local(threading.local):
    frozen: FrozenWeights | None = None


LOCAL = _Local()


def lasting(weight: Tensor) -> bool:
    """Return whether a weight is (part of) a parameter whose changes torch counts: others are not worth a copy."""
    owner = weight._base if weight._is_view() else weight
    return isinstance(owner, nn.Parameter) and not weight.is_inference()


def available_routes() -> tuple[str, ...]:
    """Names of the routes that this build of torch and this processor support, torch first."""
    return tuple(name for name, route in ROUTES.items() if route.available())


def checked_route(name: str | None) -> str | None:
    """Check the name of a route; None means that routes are chosen by measuring.

    Raises:
        Unsupported: for an unknown route, or one that this machine lacks.
    """
    if name in (None, "", "auto"):
        return None
    if name not in ROUTES:
        raise Unsupported(
            f"linear route {name!r}",
            supported="auto, " + ", ".join(ROUTES),
            nearest=closest(str(name), ROUTES) or "auto",
        )
    if not ROUTES[name].available():
        raise Unsupported(
            f"linear route {name!r} on this machine", supported=", ".join(available_routes()), nearest="torch"
        )
    return name
