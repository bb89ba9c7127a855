"""The definition of bidirectional_mamba: its options and a reference implementation written for readability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import (
    Call,
    Unsupported,
    at_least,
    one_of,
)
from regard.layers.state_space import check_range

if TYPE_CHECKING:
    from jaxtyping import Float, Int


ANY_AXES = ("forward", "reverse", "bidirectional")


TWO_AXES = ("columns", "columns_reverse", "snake", "strided", "windows", "cascade")


SCANS = (*ANY_AXES, "cross", "slices", *TWO_AXES)


COMBINATIONS = ("mean", "sum", "gate", "concat")


CONVOLUTIONS = ("path", "once", "grid")


SETS = ("conv", "x_proj", "dt", "A", "D")


@dataclass(frozen=True)
class Config:
    """Options. Functions use `scan`, `window`, `copies`, `combine` and `chunk_size`; the others belong to the layer.

    Attributes:
        scan: the paths; see the table of the package.
        window: rows and columns of the windows of ``windows``, >= 1, (7, 7) when None; windows at the border may be
            smaller.
        copies: number of copies of each path, with separate weights, >= 1 (VMamba's controls of equal size).
        combine: ``mean``, ``sum``, ``gate`` (weights for each token, softmax over paths), or ``concat`` (the output
            projection is P times as wide). Strided scans, whose paths share no token, need ``sum``.
        shared: the parameters that all paths share, of ``conv``, ``x_proj``, ``dt``, ``A`` and ``D``.
        convolution: ``path`` (each path convolves its own order, causally), ``once`` (one causal convolution, row by
            row), or ``grid`` (centred, along every axis).
        conv_width: taps of the convolution, or its side on a grid (odd there), >= 1; 0 for none.
        conv_bias: whether the convolution adds a learned vector.
        d_state: states per channel, >= 1.
        expand: ratio of the inner width to dim: E = expand * dim, > 0.
        dt_rank: features from which dt is projected, >= 1; None for dim / 16, rounded up.
        gate: whether silu(z) multiplies the combined output.
        skip: whether D x is added on each path.
        norm: norm of the combined output, before the gate: ``none``, ``layer``, ``rms``.
        dt_init: range of the initial dt, log-uniform, 0 < low <= high.
        symmetric_dt_init: whether the bias of dt is drawn for every path instead of only the first.
        chunk_size: tokens computed together, >= 1.
    """

    scan: str = "bidirectional"
    window: tuple[int, int] | None = None
    copies: int = 1
    combine: str = "mean"
    shared: tuple[str, ...] = ()
    convolution: str = "path"
    conv_width: int = 4
    conv_bias: bool = True
    d_state: int = 16
    expand: float = 2.0
    dt_rank: int | None = None
    gate: bool = True
    skip: bool = True
    norm: str = "none"
    dt_init: tuple[float, float] = (1e-3, 1e-1)
    symmetric_dt_init: bool = True
    chunk_size: int = 64

    def __post_init__(self) -> None:
        one_of("scan", self.scan, SCANS)
        one_of("combine", self.combine, COMBINATIONS)
        one_of("convolution", self.convolution, CONVOLUTIONS)
        one_of("norm", self.norm, ("none", "layer", "rms"))
        for name in ("copies", "d_state", "chunk_size"):
            at_least(name, getattr(self, name), 1)
        if self.window is not None:
            if self.scan != "windows":
                raise Unsupported(
                    f"window={self.window} with scan={self.scan!r}", supported="scan='windows'", nearest="window=None"
                )
            object.__setattr__(self, "window", tuple(self.window))
            if len(self.window) != 2:
                raise Unsupported(f"window={self.window}", supported="(rows, columns)", nearest="window=(7, 7)")
            for side in self.window:
                at_least("window", side, 1)
        if self.dt_rank is not None:
            at_least("dt_rank", self.dt_rank, 1)
        at_least("conv_width", self.conv_width, 0)
        for name in self.shared:
            one_of("shared", name, SETS)
        if not self.expand > 0:
            raise Unsupported(f"expand={self.expand}", supported="expand > 0")
        check_range(self, "dt_init")
        if self.scan == "strided" and self.combine != "sum":
            raise Unsupported(
                f"combine={self.combine!r} with scan='strided', where a token is on one path alone",
                supported="combine='sum'",
                nearest="combine='sum'",
            )
        if self.scan == "cascade" and (self.copies > 1 or self.combine in ("gate", "concat")):
            raise Unsupported(
                f"scan='cascade' with copies={self.copies} and combine={self.combine!r}",
                supported="copies=1 with combine='mean' or 'sum'",
                nearest="scan='cross'",
            )
        if self.convolution == "grid" and self.conv_width and self.conv_width % 2 == 0:
            raise Unsupported(
                f"conv_width={self.conv_width} with convolution='grid', which is centred",
                supported="an odd width, or 0",
                nearest=f"conv_width={self.conv_width - 1}",
            )
        if self.convolution == "path" and self.conv_width and self.scan == "cascade":
            raise Unsupported(
                "convolution='path' with scan='cascade', whose second paths have another input",
                supported="convolution='once' or 'grid', or conv_width=0",
                nearest="convolution='grid', conv_width=3",
            )


def scan_orders(
    config: Config, sides: Sequence[int], device: torch.device | None = None
) -> list[Int[Tensor, " visited"]]:
    """The places that each path visits, in order, on a grid whose tokens are numbered row by row.

    Args:
        config: its `scan` (see the table of the module; ``cascade`` has no paths through the whole grid), `window` and
            `copies`.
        sides: sides of the grid; (N,) for a sequence.

    Raises:
        Unsupported: for a grid on which the scan is not defined.
    """
    axes, scan = len(sides), config.scan
    if (scan in TWO_AXES and axes != 2) or (scan in ("cross", "slices") and axes < 2):
        raise Unsupported(
            f"scan={scan!r} on " + (f"a grid of {axes} axes" if axes > 1 else "a sequence"),
            supported="a grid of 2 axes" if scan in TWO_AXES else "a grid of 2 axes or more",
            nearest="scan='bidirectional'",
        )
    if scan == "cascade":
        raise Unsupported("the paths of scan='cascade'", supported="the layer", nearest="scan='cross'")
    places = torch.arange(math.prod(sides), device=device).view(*sides)
    lines = [places.movedim(axis, -1) for axis in reversed(range(axes))]  # the last axis first: rows, then columns
    if scan == "snake":
        odd = [torch.arange(x.shape[0], device=device)[:, None] % 2 == 1 for x in lines]
        lines = [torch.where(turned, x.flip(-1), x) for x, turned in zip(lines, odd, strict=True)]
    rows, *others = [x.flatten() for x in lines]
    if scan == "strided":
        grids = [places[i::2, j::2] for j in (0, 1) for i in (0, 1)]
        orders = [(x.mT if i % 2 else x).flatten() for i, x in enumerate(grids)]
    elif scan == "slices":
        orders = [rows, rows.flip(0), others[-1]]
    else:
        if scan in ("cross", "snake"):
            ahead = [rows, *others]
        elif scan == "windows":
            ahead = [_by_windows(places, config.window or (7, 7))]
        else:
            ahead = others if scan.startswith("columns") else [rows]
        back = [x.flip(0) for x in ahead]
        alone = {"forward": ahead, "columns": ahead, "reverse": back, "columns_reverse": back}
        orders = alone.get(scan, ahead + back)
    return [order for order in orders for _ in range(config.copies)]


def _by_windows(places: Int[Tensor, "h w"], window: tuple[int, int]) -> Int[Tensor, " visited"]:
    bands = places.split(window[0], 0)
    return torch.cat([part.flatten() for band in bands for part in band.split(window[1], 1)])


def reference(
    call: Call,
    x: Float[Tensor, "b u n e"],
    dt: Float[Tensor, "b w n e"],
    a: Float[Tensor, "s e k"],
    b: Float[Tensor, "b q n g k"],
    c: Float[Tensor, "b q n g k"],
    skip: Float[Tensor, "t e"] | None = None,
    dt_bias: Float[Tensor, "r e"] | None = None,
    z: Float[Tensor, "b n e"] | None = None,
    mix: Float[Tensor, "b p n"] | None = None,
) -> Float[Tensor, "b n f"]:
    """The recurrence along each path, token by token; invalid places of a grid are skipped."""
    n, channels = x.shape[2:]
    orders = scan_orders(call.config, (n,) if call.grid is None else call.grid, x.device)
    check_paths(call, len(orders), x, dt, a, b, c, skip, dt_bias, mix)
    b, c = (t.repeat_interleave(channels // t.shape[3], 3) for t in (b, call.scale * c))  # (b, q, n, e, k)
    outputs = []
    for p, order in enumerate(orders):
        x_p, dt_p, b_p, c_p = (of_path(t, p, 1) for t in (x, dt, b, c))
        steps = dt_p if dt_bias is None else F.softplus(dt_p + of_path(dt_bias, p, 0))
        h = x.new_zeros(x.shape[0], *a.shape[1:])
        found = {}
        for t in order.tolist():
            kept = (steps[:, t, :, None] * of_path(a, p, 0)).exp() * h
            after = kept + (steps[:, t] * x_p[:, t])[..., None] * b_p[:, t]
            h = after if call.valid is None else torch.where(call.valid[:, t, None, None], after, h)
            y = (h * c_p[:, t]).sum(-1)
            found[t] = y if skip is None else y + of_path(skip, p, 0) * x_p[:, t]
        nothing = x.new_zeros(x.shape[0], channels)
        outputs.append(torch.stack([found.get(t, nothing) for t in range(n)], 1) if n else x[:, 0])
    return _combine(call, outputs, z, mix)


def of_path(tensor: Tensor, p: int, axis: int) -> Tensor:
    """The entry of path `p` along an axis with one entry per path, or a single one for all paths."""
    return tensor.select(axis, p if tensor.shape[axis] > 1 else 0)


def _combine(call: Call, outputs: list[Tensor], z: Tensor | None, mix: Tensor | None) -> Float[Tensor, "b n f"]:
    gate = None if z is None else F.silu(z.to(outputs[0].dtype))
    if call.config.combine == "concat":
        return torch.cat(outputs if gate is None else [y * gate for y in outputs], -1)
    if mix is not None:
        weights = mix.to(outputs[0].dtype).softmax(1)
        outputs = [y * weights[:, p, :, None] for p, y in enumerate(outputs)]
    y = outputs[0]
    for other in outputs[1:]:
        y = y + other
    y = y / len(outputs) if call.config.combine == "mean" else y
    return y if gate is None else y * gate


def check_paths(call: Call, paths: int, *tensors: Tensor | None) -> None:
    """Raise Unsupported unless every tensor has one set for each path, or one for all."""
    names = ("x", "dt", "a", "b", "c", "skip", "dt_bias", "mix")
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is None:
            continue
        found = tensor.shape[0 if name in ("a", "skip", "dt_bias") else 1]
        if found != paths and (found != 1 or name == "mix"):
            raise Unsupported(
                f"bidirectional_mamba: {name} is given for {found} paths; the scan has {paths}",
                supported=f"{paths}" if name == "mix" else f"{paths}, or 1 for all",
            )
        if call.config.scan == "strided" and found > 1 and name in ("x", "dt", "b", "c"):
            raise Unsupported(
                f"bidirectional_mamba: {name} for {found} paths with scan='strided', where each token is on one",
                supported="1",
            )
    if (tensors[-1] is not None) != (call.config.combine == "gate"):
        raise Unsupported(
            f"combine={call.config.combine!r} {'without' if tensors[-1] is None else 'with'} mix",
            supported="mix with combine='gate', and only then",
        )
