"""The layer of bidirectional_mamba and its modules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.apply import apply
from regard.contract import (
    Context,
    Mask,
    Mechanism,
    Pattern,
    Result,
    Tensors,
    Unsupported,
    at_least,
    one_of,
)
from regard.core.grids import image_of, tokens_of
from regard.core.precision import wide
from regard.layers.attention import LayerState
from regard.layers.convolution import ShortConvolution
from regard.layers.linear import make_linear
from regard.layers.mixer import Tokens
from regard.layers.norms import make_norm
from regard.layers.state_space import StateSpaceLayer, draw_dt_bias, split, without_weight_decay
from regard.mechanisms.bidirectional_mamba.definition import ANY_AXES, SETS, TWO_AXES, Config, scan_orders
from regard.mechanisms.bidirectional_mamba.forms import Path, find_paths

if TYPE_CHECKING:
    from jaxtyping import Float


GRID_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def count_paths(config: Config, axes: int) -> int:
    """Number of paths P on grids of `axes` axes; a cascade counts the paths of both of its stages."""
    if config.scan == "cascade":
        return 4
    return len(scan_orders(config, (2,) * (1 if config.scan in ANY_AXES else axes)))


class BidirectionalMambaLayer(StateSpaceLayer):
    """The block with scans along several paths, (B, N, C) -> (B, N, C), without its outer norm and residual.

    A_log, D and dt_bias stay in float32 when the layer is cast to a narrower dtype, and have no weight decay.

    Args:
        card: the mechanism.
        dim: width C of the input and output.
        num_heads: unused, accepted for a uniform signature; every channel has its own state.
        pattern: noncausal-self.
        axes: number of axes of the grids that it will be given (1 for sequences), which sets the number of weights of
            ``cross`` scans and of the convolution on a grid. None for the scan's default: 2, or 1 for ``forward``,
            ``reverse`` and ``bidirectional``, which take any grid if the convolution does.
        linear: kind of the projections (``dense`` or a projection mechanism).
        config: see :class:`Config`.
    """

    def __init__(
        self,
        card: Mechanism,
        dim: int,
        num_heads: int,
        *,
        pattern: str | Pattern = Pattern.NONCAUSAL_SELF,
        axes: int | None = None,
        linear: str = "dense",
        config: Config | None = None,
    ) -> None:
        super().__init__(card, dim, pattern=pattern, config=config)
        config = self.config
        plain = config.scan in ANY_AXES
        self.axes = (1 if plain else 2) if axes is None else axes
        one_of("axes", self.axes, (2,) if config.scan in TWO_AXES else (1, 2, 3) if plain else (2, 3))
        if not plain or (config.conv_width and config.convolution == "grid"):
            self.grid_axes = self.axes
            self.for_sequences = {"axes": 1} if plain else {"scan": "bidirectional", "axes": 1}
        self.paths = count_paths(config, self.axes)
        self.inner = inner = round(config.expand * dim)
        at_least("expand * dim", inner, 1)
        rank = math.ceil(dim / 16) if config.dt_rank is None else config.dt_rank
        self.selected = {"dt": rank, "B": config.d_state, "C": config.d_state}
        self.widths = {"x": inner, "z": inner if config.gate else 0}
        sets = {name: 1 if name in config.shared else self.paths for name in SETS}
        self.in_proj = make_linear(dim, sum(self.widths.values()), kind=linear)
        self.conv, self.convs, self.grid_conv = None, nn.ModuleList(), None
        if config.conv_width and config.convolution == "grid":
            self.grid_conv = GridConvolution(inner, config.conv_width, self.axes, bias=config.conv_bias)
        elif config.conv_width:
            count = sets["conv"] if config.convolution == "path" else 1
            self.convs.extend(ShortConvolution(inner, config.conv_width, bias=config.conv_bias) for _ in range(count))
        self.x_proj = nn.ModuleList(
            make_linear(inner, sum(self.selected.values()), kind=linear) for _ in range(sets["x_proj"])
        )
        self.dt_proj = nn.ModuleList(make_linear(rank, inner, kind=linear) for _ in range(sets["dt"]))
        self.dt_bias = nn.Parameter(torch.empty(sets["dt"], inner))
        self.A_log = nn.Parameter(torch.empty(sets["A"], inner, config.d_state))
        self.D = nn.Parameter(torch.empty(sets["D"], inner)) if config.skip else None
        self.mix_proj = nn.Linear(dim, self.paths) if config.combine == "gate" else None
        width = inner * (self.paths if config.combine == "concat" else 1)
        self.norm = None if config.norm == "none" else make_norm(config.norm, width)
        self.out_proj = make_linear(width, dim, kind=linear)
        without_weight_decay(self.A_log, self.dt_bias, self.D)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise A = -1, -2, ..., -d_state (S4D-real), D, dt and equal path weights; submodules do the rest."""
        draw_dt_bias(self.dt_bias, *self.config.dt_init)
        with torch.no_grad():
            if not self.config.symmetric_dt_init:
                self.dt_bias[1:] = 0
            self.A_log.copy_(torch.arange(1, self.config.d_state + 1).log().expand_as(self.A_log))
            for projection in self.dt_proj:
                if isinstance(projection, nn.Linear):
                    bound = self.selected["dt"] ** -0.5
                    projection.weight.uniform_(-bound, bound)
            if self.D is not None:
                self.D.fill_(1.0)
            if self.mix_proj is not None:
                self.mix_proj.weight.zero_()
                self.mix_proj.bias.zero_()

    def mix(self, tokens: Tokens, memory: Tokens | None, context: Context, state: LayerState | None) -> Result:
        if state is not None or "state" in context.want:
            raise Unsupported(
                "a state of bidirectional_mamba, whose reversed paths start at the last token",
                supported="whole sequences",
                nearest="mamba",
            )
        grid, config = context.grid, self.config
        self._check_grid(grid)
        parts = split(self.in_proj, self.widths, tokens.x)
        z = parts["z"] if config.gate else None
        inside = z if self.norm is None and config.scan != "cascade" else None
        if config.scan == "cascade":
            y = self._cascade(parts["x"], tokens, grid)
        else:
            n, paths = tokens.x.shape[1], []
            if config.scan == "strided" or (self.convs and config.convolution == "path"):
                paths = find_paths(config, n, grid, tokens.lengths, tokens.valid, tokens.x.device)
            xs = self._convolve(parts["x"], tokens, grid, paths)
            weights = None if self.mix_proj is None else self.mix_proj(tokens.x).mT
            inputs = {**self._inputs(xs, range(self.paths), paths), "z": inside, "mix": weights}
            y = self._apply_scans(inputs, tokens.mask, grid, config)
        y = y if self.norm is None else self.norm(y)
        if z is not None and inside is None:
            gate = F.silu(z)
            y = y * (gate if y.shape[-1] == gate.shape[-1] else gate.repeat(1, 1, self.paths))
        return Result(self.out_proj(y.to(tokens.x.dtype)))

    def _apply_scans(
        self, inputs: Mapping[str, Tensor | None], mask: Mask | None, grid: tuple[int, ...] | None, config: Config
    ) -> Tensor:
        return apply(self.card, inputs, pattern=self.pattern, mask=mask, grid=grid, config=config).output

    def _convolve(self, x: Tensor, tokens: Tokens, grid: tuple[int, ...] | None, paths: list[Path]) -> list[Tensor]:
        """SiLU of the convolution: one result per path, or a single one for all."""
        if self.grid_conv is not None:
            return [self.grid_conv(x, (x.shape[1],) if grid is None else grid, tokens)]
        if not self.convs:
            return [F.silu(x)]
        if self.config.convolution == "once":
            forward = dataclasses.replace(self.config, scan="forward", copies=1)
            paths = find_paths(forward, x.shape[1], grid, tokens.lengths, tokens.valid, x.device)
        convolved = []
        for p, path in enumerate(paths):
            convolution = self.convs[p if len(self.convs) > 1 else 0]
            convolved.append(path.put(convolution(path.take(x), path.lengths)[0], x.shape[1]))
        return [_total(convolved)] if self.config.scan == "strided" else convolved

    def _inputs(self, xs: list[Tensor], sets: Sequence[int], paths: list[Path] | None = None) -> Tensors:
        """The inputs of the scans, in the order of the tokens, from the weights of the chosen sets."""
        n, strided = xs[0].shape[1], self.config.scan == "strided"
        alone = len(xs) == len(self.x_proj) == len(self.dt_proj) == 1
        found: list[tuple[Tensor, ...]] = []
        for i, p in enumerate(sets[:1] if alone else sets):
            x = xs[i if len(xs) > 1 else 0]
            if strided and not alone:
                assert paths is not None
                found.append(tuple(paths[i].put(t, n) for t in self._project(paths[i].take(x), p)))
            else:
                found.append(self._project(x, p))
        dt, b, c = ([_total(t)] if strided else t for t in map(list, zip(*found, strict=True)))
        a = -wide(self.A_log).exp()
        own: dict[str, Tensor | None] = {"a": a, "skip": self.D, "dt_bias": self.dt_bias}
        # stacked along the first axis, so that each path's part is contiguous, which scans read fastest
        inputs = {name: torch.stack(t).transpose(0, 1) for name, t in (("x", xs), ("dt", dt), ("b", b), ("c", c))}
        chosen = {name: t if t.shape[0] == 1 else t[sets[0] : sets[-1] + 1] for name, t in own.items() if t is not None}
        return {**inputs, **chosen}

    def _project(self, x: Float[Tensor, "b n e"], p: int) -> tuple[Tensor, ...]:
        """dt (without its bias), B and C of a path, the latter two with a group axis of size 1."""
        x_proj, dt_proj = (modules[p if len(modules) > 1 else 0] for modules in (self.x_proj, self.dt_proj))
        parts = split(x_proj, self.selected, x)
        return dt_proj(parts["dt"]), parts["B"].unsqueeze(2), parts["C"].unsqueeze(2)

    def _cascade(
        self, x: Float[Tensor, "b n e"], tokens: Tokens, grid: tuple[int, ...] | None
    ) -> Float[Tensor, "b n e"]:
        """Scan every row as a sequence, then every column; each stage starts with a layer norm without weights."""
        assert grid is not None  # checked by _check_grid
        y = self._convolve(x, tokens, grid, [])[0]
        config = dataclasses.replace(self.config, scan="bidirectional")
        valid = None if tokens.valid is None else tokens.valid.view(-1, *grid)
        for axis, sets in ((2, range(2)), (1, range(2, 4))):
            lines = F.layer_norm(y, y.shape[-1:]).unflatten(1, grid)
            lines = lines if axis == 2 else lines.transpose(1, 2)
            crossed = lines.shape[:3]
            mask = None
            if valid is not None:
                mask = Mask(valid=(valid if axis == 2 else valid.mT).flatten(0, 1))
            y = self._apply_scans(self._inputs([lines.flatten(0, 1)], sets), mask, None, config).view(*crossed, -1)
            y = (y if axis == 2 else y.transpose(1, 2)).flatten(1, 2)
        return y

    def _check_grid(self, grid: tuple[int, ...] | None) -> None:
        axes = 1 if grid is None else len(grid)
        if self.grid_axes not in (None, axes):
            raise Unsupported(
                f"bidirectional_mamba for {self.axes} axes on "
                + ("a sequence" if grid is None else f"a grid {tuple(grid)}"),
                supported=f"grids of {self.axes} axes",
                nearest=f"axes={axes}",
            )


class GridConvolution(nn.Module):
    """SiLU of a centred depthwise convolution over all axes of a grid, with zeros around it and at invalid places.

    Args:
        channels: E.
        side: taps along each axis, odd.
        axes: number of axes of the grid, 1 to 3.
        bias: whether it adds a learned vector (E,).
    """

    def __init__(self, channels: int, side: int, axes: int, *, bias: bool = True) -> None:
        super().__init__()
        self.side, self.axes = side, axes
        self.weight = nn.Parameter(torch.empty(channels, side**axes))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "b n e"], sides: tuple[int, ...], tokens: Tokens) -> Float[Tensor, "b n e"]:
        """Convolve `x`, which is 0 at invalid places; the scans ignore what the bias and neighbours write there."""
        if x.numel() == 0:
            return x
        image, filters = image_of(x, sides), self.weight.to(x.dtype).unflatten(1, (self.side,) * self.axes)
        convolve = GRID_CONVOLUTIONS[self.axes]
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = convolve(image, filters[:, None], bias, padding=self.side // 2, groups=x.shape[-1])
        return F.silu(tokens_of(y))


def _total(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total
