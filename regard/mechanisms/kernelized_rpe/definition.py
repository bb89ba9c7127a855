"""The definition of kernelized_rpe: its options and a reference implementation written for readability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import (
    Call,
    Pattern,
    Role,
    Unsupported,
    at_least,
    one_of,
)
from regard.core.precision import wide_dtype
from regard.engines.feature_maps import FEATURE_MAPS, NONNEGATIVE

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


POSITIVE_RANDOM = "positive_random"


NORM_EPS = 1e-6


OFFSETS = ("learned", "bucketed", "alibi", "power", "none")


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        feature_map: ``positive_random``, or a map that is never negative: ``elu``, ``relu``, ``relu_squared``,
            ``sigmoid``, ``exp``.
        normalize: whether to divide each query and key by its norm.
        eps: smallest denominator, > 0 and finite.
        method: how whole sequences are computed: ``fft``, ``blocks`` (near keys by pairs, far keys by a running sum),
            or ``auto``. Grids and sequences with roles are always computed by FFT.
        features: F, number of a layer's random features, >= 1; the width of a head when None.
        orthogonal: whether random features of a layer are orthogonal, D at a time.
        share_features: whether all heads of a layer have the same random features.
        redraw: number of training calls after which a layer draws new features; 0 for never.
        offsets: b of a layer: ``learned`` (one number per offset, initially 0), ``bucketed`` (T5's buckets), ``alibi``
            (fixed slopes), ``power`` (e^b = (1 + distance)^-a with a learned a >= 0 for each head, initially 1) or
            ``none``.
        share_offsets: whether all heads of a layer have the same ``learned`` b.
        max_offset: R of a layer, >= 1; or (R_y, R_x) for learned offsets on a grid.
        learn_temperature: whether a layer learns log_temperature, initially 0.
        learn_class_bias: whether a layer learns class_bias, initially 0.
    """

    feature_map: str = POSITIVE_RANDOM
    normalize: bool = True
    eps: float = 1e-6
    method: str = "auto"
    features: int | None = None
    orthogonal: bool = False
    share_features: bool = False
    redraw: int = 0
    offsets: str = "learned"
    share_offsets: bool = False
    max_offset: int | tuple[int, int] = 128
    learn_temperature: bool = False
    learn_class_bias: bool = False

    def __post_init__(self) -> None:
        one_of("feature_map", self.feature_map, (POSITIVE_RANDOM, *NONNEGATIVE))
        one_of("method", self.method, ("auto", "fft", "blocks"))
        one_of("offsets", self.offsets, OFFSETS)
        if not 0 < self.eps < math.inf:
            raise Unsupported(f"eps={self.eps}", supported="a finite eps > 0", nearest="eps=1e-6")
        if self.features is not None:
            at_least("features", self.features, 1)
        at_least("redraw", self.redraw, 0)
        sides = self.max_offset if isinstance(self.max_offset, tuple) else (self.max_offset,)
        for side in sides:
            at_least("max_offset", side, 1)
        if len(sides) > 1 and (len(sides) != 2 or self.offsets not in ("learned", "none")):
            raise Unsupported(
                f"max_offset={self.max_offset} with offsets={self.offsets!r}",
                supported="a number, or (rows, columns) with offsets='learned'",
                nearest=f"max_offset={max(sides)}",
            )
        if self.offsets == "bucketed" and sides[0] < 17:
            raise Unsupported(
                f"max_offset={self.max_offset} with offsets='bucketed' (32 buckets)",
                supported="max_offset >= 17",
                nearest="offsets='learned'",
            )


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    offset_bias: Float[Tensor, "h offsets"] | None = None,
    grid_bias: Float[Tensor, "h rows columns"] | None = None,
    random_features: Float[Tensor, "h f d"] | None = None,
    log_temperature: Float[Tensor, " h"] | None = None,
    class_bias: Float[Tensor, " h"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, with the full weight matrix."""
    n, m = q.shape[2], k.shape[2]
    c, outside = offset_weights(call, q, offset_bias, grid_bias, class_bias)
    i, j = torch.arange(n, device=q.device), torch.arange(m, device=q.device)
    if call.pattern is Pattern.CAUSAL_SELF:
        i = i + m - n
    grid = _grid(call, c, m)
    if grid is None:
        by_offset = c[:, None, index(j - i[:, None], c.shape[-1])]  # (h, 1, n, m)
    else:
        token = with_place(call, grid, k)
        places: tuple[Tensor, ...] = torch.unravel_index((token.cumsum(-1) - 1).clamp(min=0), tuple(grid))
        sides = zip(places, c.shape[1:], strict=True)
        i = i.clamp(min=0)  # queries before the first key see nothing
        at: tuple[Any, ...] = (slice(None), *(index(p[:, None] - p[:, i, None], size) for p, size in sides))
        both = token[:, None] & token[:, i, None]
        by_offset = torch.where(both, c[at], outside[:, None, None, None])  # (h, b, n, m)
    weights = by_offset.transpose(0, 1) * (
        _queries(call, q, random_features, log_temperature) @ _keys(call, k, random_features, log_temperature).mT
    )
    if call.pattern is Pattern.CAUSAL_SELF:
        weights = weights.tril(m - n)
    return weights @ v / weights.sum(-1, keepdim=True).clamp(min=call.config.eps)


def _mapped(
    call: Call, x: Tensor, random_features: Tensor | None, log_temperature: Tensor | None
) -> tuple[Float[Tensor, "b h n f"], Float[Tensor, "b h n 1"]]:
    """Projections on the random features, and |x|^2 / 2; for other maps phi itself. In at least float32."""
    config: Config = call.config
    if call.scale < 0:
        raise Unsupported(f"kernelized_rpe with scale={call.scale}", supported="scale >= 0", nearest="scale=1.0")
    dtype = wide_dtype(x)
    x = x.to(dtype)
    x = F.normalize(x, dim=-1, eps=NORM_EPS) if config.normalize else x
    x = x if call.scale == 1 else math.sqrt(call.scale) * x
    if log_temperature is not None:
        x = (log_temperature.to(dtype) / 2).exp()[:, None, None] * x
    if config.feature_map != POSITIVE_RANDOM:
        return FEATURE_MAPS[config.feature_map](x), x[..., :1]
    if random_features is None:
        raise Unsupported(
            "kernelized_rpe with positive random features but without random_features",
            supported="random_features=draw_features(features, head_dim) of regard.mechanisms.kernelized_rpe",
            nearest="feature_map='elu'",
        )
    return x @ random_features.to(dtype).mT, x.square().sum(-1, keepdim=True) / 2


def _queries(call: Call, q: Tensor, random_features: Tensor | None, log_temperature: Tensor | None) -> Tensor:
    """phi(q); random features are relative to the largest of each query."""
    found, _ = _mapped(call, q, random_features, log_temperature)
    if call.config.feature_map != POSITIVE_RANDOM:
        return found
    return (found - found.detach().amax(-1, keepdim=True)).exp()


def _keys(call: Call, k: Tensor, random_features: Tensor | None, log_temperature: Tensor | None) -> Tensor:
    """phi(k), zero at padding."""
    found, half_square = _mapped(call, k, random_features, log_temperature)
    if call.config.feature_map == POSITIVE_RANDOM:
        found = (found - half_square).exp() / found.shape[-1]
    valid = call.valid_keys(k.shape[2])
    return found if valid is None else torch.where(valid[:, None, :, None], found, 0)


def check_roles(call: Call) -> None:
    """Raise Unsupported for roles in cross patterns."""
    if call.roles is not None and call.pattern.cross:
        raise Unsupported(
            f"kernelized_rpe with roles in {call.pattern.value}",
            supported="noncausal-self, causal-self",
            nearest="roles=None",
        )


def offset_weights(
    call: Call, q: Tensor, offset_bias: Tensor | None, grid_bias: Tensor | None, class_bias: Tensor | None
) -> tuple[Float[Tensor, "h *offsets"], Float[Tensor, " h"]]:
    """e^b for each offset, and e^a, relative to the largest used; 0 for offsets that the pattern does not see."""
    check_roles(call)
    table = offset_bias if grid_bias is None else grid_bias
    if grid_bias is not None and (call.grid is None or call.pattern.cross):
        raise Unsupported(
            f"kernelized_rpe with grid_bias in {call.pattern.value} {'without' if call.grid is None else 'with'} a grid",
            supported="noncausal-self and causal-self with grid=(rows, columns)",
            nearest="offset_bias",
        )
    if table is None:
        table = q.new_zeros(q.shape[1], 3)
    if any(size < 3 or size % 2 == 0 for size in table.shape[1:]):
        raise Unsupported(
            f"kernelized_rpe with biases of {tuple(table.shape[1:])} offsets", supported="2 R + 1 of them, with R >= 1"
        )
    dtype = wide_dtype(q)
    flat = table.to(dtype).flatten(1)
    if call.pattern is Pattern.CAUSAL_SELF:
        # in a table, as in a sequence or on a grid, entries after the middle are of later keys
        later = torch.arange(flat.shape[1], device=flat.device) > flat.shape[1] // 2
        flat = flat.masked_fill(later, -torch.inf)
    outside = flat.new_zeros(1) if class_bias is None else class_bias.to(dtype)
    largest = flat.amax(-1)
    if call.roles is not None:
        largest = torch.maximum(largest, outside)
    largest = largest.detach()
    return (flat - largest[:, None]).exp().unflatten(1, table.shape[1:]), (outside - largest).exp()


def index(offsets: Int[Tensor, "..."], size: int) -> Int[Tensor, "..."]:
    """Index of each offset in a table of `size` offsets."""
    return (offsets + size // 2).clamp(0, size - 1)


def _grid(call: Call, c: Float[Tensor, "h *offsets"], n: int) -> tuple[int, ...] | None:
    """Sides of the grid that tokens fill: (rows, columns), or (n,) if some tokens have no position; None for a plain
    sequence."""
    if c.ndim == 2:
        return None if call.roles is None else (n,)
    if call.grid is None or len(call.grid) != 2:
        raise Unsupported(f"kernelized_rpe on a grid {call.grid}", supported="(rows, columns)")
    return call.grid


def with_place(call: Call, grid: Sequence[int], k: Float[Tensor, "b h m d"]) -> Bool[Tensor, "b m"]:
    """Mask of the tokens that have a place on the grid."""
    batch, m = k.shape[0], k.shape[2]
    token = k.new_ones(batch, m, dtype=torch.bool) if call.roles is None else call.roles == int(Role.TOKEN)
    valid = call.valid_keys(m)
    token = token if valid is None else token & valid
    if not torch.compiler.is_compiling() and token.numel():
        most = int(token.sum(-1).max())
        if most > math.prod(grid):
            raise Unsupported(
                f"kernelized_rpe with {most} tokens on a grid {tuple(grid)}", supported=f"at most {math.prod(grid)}"
            )
    return token
