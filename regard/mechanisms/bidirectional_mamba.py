r"""Bidirectional Mamba: the selective scan along several paths through a sequence or a grid, which are then combined.

When to pick it: encoders of long sequences, images at high resolution and volumes, at a cost linear in the tokens.
When not: generation (`mamba`, the forward path alone, decodes with a state); short inputs, where softmax attention
costs no more and finds single tokens exactly.

Definition (survey arXiv 2406.03430; Vim, arXiv 2401.09417, algorithm 1; VMamba, arXiv 2401.10166, section 4). A path p
visits the tokens in the order pi_p. With the selective scan S6 of `mamba`, its own skip D included,

    y_p[pi_p(t)] = S6(x_p[pi_p(1 ... t)]; dt_p, A_p, B_p, C_p, D_p),     y = combine(y_1, ..., y_P)

All paths include the token itself, so with two of them it is counted twice (`mean` halves the sum); `mamba` in
noncausal-self counts it once.

| `scan` | paths | from |
|---|---|---|
| ``forward`` | row by row | Mamba |
| ``reverse`` | row by row, from the last token; after a layer of forward: pairs of layers | Vim |
| ``bidirectional`` | row by row, and that reversed | Vim |
| ``columns``, ``columns_reverse`` | column by column, and from the last; layers alternate; two axes | Mamba-ND |
| ``cross`` | with each axis as the fastest (rows; columns), and these reversed: 2 for each axis of the grid | VMamba |
| ``snake`` | as cross, with every second line reversed, so that each token follows a neighbour; two axes | PlainMamba |
| ``slices`` | row by row, that reversed, and across the slices of the first axis | SegMamba |
| ``strided`` | four interleaved grids, two by rows and two by columns, each token on one; two axes | EfficientVMamba |
| ``windows`` | window by window, row by row in each, and that reversed; two axes | LocalMamba |
| ``cascade`` | every row in both directions, then every column of the result; two axes; the layer only | VMamba |

The block around (Vim version 2, the default; VMamba's SS2D is `scan="cross", combine="sum", convolution="grid",
conv_width=3, norm="layer"`):

    [x, z] = W_in u,   x_p = silu(conv_p(x)),   [delta, B, C]_p = W_p x_p,   dt_p = softplus(W_{dt,p} delta_p + bias_p)
    out = W_out (norm(y) * silu(z))

| paper | here |
|---|---|
| x, Delta, B, C of a path | `x` (B, U, N, E), `dt` (B, W, N, E), `b`, `c` (B, Q, N, G, K): tokens in their own order |
| A, D, bias of Delta | `a` (S, E, K), `skip` (T, E), `dt_bias` (R, E) |
| z | `z` (B, N, E) |
| weights of paths | `mix` (B, P, N): y = sum_p softmax_p(mix) y_p, with `combine="gate"` |

U, W, Q, S, T, R are each the number of paths P, or 1 where the paths share the tensor.
Layout: tokens (B, N, E), channels last, row by row on the `grid` of the call. Without a grid they are a sequence.
Padding is skipped, on a grid too: every path goes from valid token to valid token, and its convolution sees these only.
So the reversed path starts at the last valid token, and a grid with masked rows or columns at its border equals the
smaller grid.
Patterns: noncausal-self. Deviations: the originals take no masks. In VMamba's code the reversed scans of a cascade are
added without being turned back; here they are turned back. dt's bias is drawn alike for all paths, unless
`symmetric_dt_init=False` (Vim's code leaves it 0 but for the first). PlainMamba's direction vectors and Mamba-2 in the
place of S6 are left out, and a class token is the host's affair.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.apply import apply
from regard.contract import (
    Call,
    Context,
    Cost,
    Kind,
    Mask,
    Mechanism,
    Paper,
    Pattern,
    Result,
    Shape,
    Tensors,
    Unsupported,
    at_least,
    one_of,
)
from regard.core.precision import wide
from regard.engines.selective_scan import selective_scan
from regard.layers.attention import LayerState
from regard.layers.convolution import ShortConvolution
from regard.layers.linear import make_linear
from regard.layers.mixer import Tokens
from regard.layers.norms import make_norm
from regard.layers.state_space import StateSpaceLayer, check_range, draw_dt_bias, split, without_weight_decay

if TYPE_CHECKING:
    from jaxtyping import Float, Int

ANY_AXES = ("forward", "reverse", "bidirectional")
TWO_AXES = ("columns", "columns_reverse", "snake", "strided", "windows", "cascade")
SCANS = (*ANY_AXES, "cross", "slices", *TWO_AXES)
ROWS_FIRST = ("forward", "bidirectional", "cross", "slices")
"""Scans whose first path takes the tokens as they are numbered."""
COMBINATIONS = ("mean", "sum", "gate", "concat")
CONVOLUTIONS = ("path", "once", "grid")
SETS = ("conv", "x_proj", "dt", "A", "D")
GRID_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Config:
    """Options. Functions use `scan`, `window`, `copies`, `combine` and `chunk_size`; the rest is the layer's.

    Attributes:
        scan: the paths: see the table.
        window: rows and columns of the windows of ``windows``, >= 1, (7, 7) when None; those at the border are what is left.
        copies: how often each path is there, with weights of its own, >= 1 (VMamba's controls of equal size).
        combine: ``mean``, ``sum``, ``gate`` (weights for each token, softmax over paths), or ``concat`` (the output
            projection is P times as wide). ``sum`` with strided scans, whose paths share no token.
        shared: of ``conv``, ``x_proj``, ``dt``, ``A``, ``D``: the parameters that all paths have in common.
        convolution: ``path`` (each path convolves its own order, causally), ``once`` (one causal convolution, row by
            row), or ``grid`` (centred, along every axis).
        conv_width: taps of the convolution, or its side on a grid (odd there), >= 1; 0 for none.
        d_state: states of a channel, >= 1.
        expand: width of the block's inside, E = expand * dim, > 0.
        dt_rank: features from which the steps are projected, >= 1; None for dim / 16, rounded up.
        gate: whether silu(z) multiplies the combined output.
        skip: whether D x is added on each path.
        norm: of the combined output, before the gate: ``none``, ``layer``, ``rms``.
        dt_init: range of dt at the start, log-uniform, 0 < low <= high.
        symmetric_dt_init: whether the bias of dt is drawn for every path, instead of for the first alone.
        chunk_size: tokens computed together, >= 1.
    """

    scan: str = "bidirectional"
    window: tuple[int, int] | None = None
    copies: int = 1
    combine: str = "mean"
    shared: tuple[str, ...] = ()
    convolution: str = "path"
    conv_width: int = 4
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
    """The places that each path visits, in its order, on a grid whose tokens are numbered row by row.

    Args:
        config: its `scan` (see the table of the module; ``cascade`` has no paths through the whole grid), `window` and
            `copies`.
        sides: of the grid; (N,) for a sequence.

    Raises:
        Unsupported: for a grid that the scan does not have.
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
    lines = [places.movedim(axis, -1) for axis in reversed(range(axes))]  # of the last axis first: rows, then columns
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


def count_paths(config: Config, axes: int) -> int:
    """P on grids of so many axes; for a cascade those of both of its stages."""
    if config.scan == "cascade":
        return 4
    return len(scan_orders(config, (2,) * (1 if config.scan in ANY_AXES else axes)))


@dataclass(frozen=True)
class Path:
    """The places that a path visits: valid ones first, in order.

    Attributes:
        places: (L,), or (B, L) where the rows of a batch differ; None for all tokens as they are.
        lengths: valid ones of each row; None when all are.
    """

    places: Int[Tensor, "..."] | None
    lengths: Int[Tensor, " b"] | None

    def take(self, x: Float[Tensor, "b n ..."]) -> Float[Tensor, "b visited ..."]:
        """Tokens in the order of the path."""
        if self.places is None:
            return x
        if self.places.ndim == 1:
            return x.index_select(1, self.places)
        return x.gather(1, self._index(x)) if x.shape[1] else x

    def put(self, y: Float[Tensor, "b visited ..."], n: int) -> Float[Tensor, "b n ..."]:
        """Back to the order of the tokens; 0 for those that the path does not visit."""
        if self.places is None:
            return y
        empty = y.new_zeros(y.shape[0], n, *y.shape[2:])
        if self.places.ndim == 1:
            return empty.index_copy(1, self.places, y)
        return empty.scatter(1, self._index(y), y)

    def _index(self, x: Tensor) -> Tensor:
        assert self.places is not None
        shape = *self.places.shape, *[1] * (x.ndim - 2)
        return self.places.view(shape).expand(-1, -1, *x.shape[2:])


def find_paths(
    config: Config,
    n: int,
    grid: tuple[int, ...] | None,
    lengths: Tensor | None,
    valid: Tensor | None,
    device: torch.device,
) -> list[Path]:
    """The paths through a sequence with `lengths`, or a grid with `valid` places."""
    sides = (n,) if grid is None else grid
    orders = scan_orders(config, sides, device)
    if lengths is not None:
        valid = torch.arange(n, device=device) < lengths[:, None]
    found = []
    for i, order in enumerate(orders):
        forward = i < config.copies and config.scan in ROWS_FIRST
        if valid is None:
            found.append(Path(None if forward else order, None))
        elif forward and lengths is not None:
            found.append(Path(None, lengths))
        else:
            ordered = valid[:, order]
            first = torch.argsort(~ordered, dim=1, stable=True)
            found.append(Path(order[first], ordered.sum(1)))
    return found


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
    """The recurrence along each path, token by token; invalid places of a grid are passed over."""
    n, channels = x.shape[2:]
    orders = scan_orders(call.config, (n,) if call.grid is None else call.grid, x.device)
    _check_paths(call, len(orders), x, dt, a, b, c, skip, dt_bias, mix)
    b, c = (t.repeat_interleave(channels // t.shape[3], 3) for t in (b, call.scale * c))  # (b, q, n, e, k)
    outputs = []
    for p, order in enumerate(orders):
        x_p, dt_p, b_p, c_p = (_of_path(t, p, 1) for t in (x, dt, b, c))
        steps = dt_p if dt_bias is None else F.softplus(dt_p + _of_path(dt_bias, p, 0))
        h = x.new_zeros(x.shape[0], *a.shape[1:])
        found = {}
        for t in order.tolist():
            kept = (steps[:, t, :, None] * _of_path(a, p, 0)).exp() * h
            after = kept + (steps[:, t] * x_p[:, t])[..., None] * b_p[:, t]
            h = after if call.valid is None else torch.where(call.valid[:, t, None, None], after, h)
            y = (h * c_p[:, t]).sum(-1)
            found[t] = y if skip is None else y + _of_path(skip, p, 0) * x_p[:, t]
        nothing = x.new_zeros(x.shape[0], channels)
        outputs.append(torch.stack([found.get(t, nothing) for t in range(n)], 1) if n else x[:, 0])
    return _combine(call, outputs, z, mix)


def parallel(
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
    """A scan for each path, on tokens in its order."""
    n = x.shape[2]
    paths = find_paths(call.config, n, call.grid, call.lengths, call.valid, x.device)
    _check_paths(call, len(paths), x, dt, a, b, c, skip, dt_bias, mix)
    precise = wide(x)  # each path would be rounded on its own
    c = call.scale * c
    outputs = []
    for p, path in enumerate(paths):
        taken = [path.take(_of_path(t, p, 1)) for t in (precise, dt, b, c)]
        y, _ = selective_scan(
            taken[0],
            taken[1],
            _of_path(a, p, 0),
            taken[2],
            taken[3],
            skip=None if skip is None else _of_path(skip, p, 0),
            dt_bias=None if dt_bias is None else _of_path(dt_bias, p, 0),
            lengths=path.lengths,
            chunk_size=call.chunk_size or call.config.chunk_size,
            backend=call.backend,
        )
        assert y is not None  # there is a c
        outputs.append(path.put(y, n))
    return _combine(call, outputs, z, mix).to(x.dtype)


def _of_path(tensor: Tensor, p: int, axis: int) -> Tensor:
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


def _check_paths(call: Call, paths: int, *tensors: Tensor | None) -> None:
    """Raise Unsupported unless every tensor has one set for each path, or one for all."""
    names = ("x", "dt", "a", "b", "c", "skip", "dt_bias", "mix")
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is None:
            continue
        found = tensor.shape[0 if name in ("a", "skip", "dt_bias") else 1]
        if found != paths and (found != 1 or name == "mix"):
            raise Unsupported(
                f"bidirectional_mamba: {name} for {found} paths, of which there are {paths}",
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


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    return {"e": shape.heads * shape.dim_value, "g": 1, "k": config.d_state}


def cost(shape: Shape, config: Config) -> Cost:
    """The channels are H heads of dim_value features; grids have two axes. Without a kernel three numbers for each state
    and token of a chunk come on top of the memory."""
    channels, paths = shape.heads * shape.dim_value, count_paths(config, 2)
    visits = shape.batch * shape.n * (1 if config.scan == "strided" else paths)
    state = channels * config.d_state
    return Cost(
        flops=7.0 * visits * state,
        memory=2.0 * visits * channels,
        state=0.0,
        step_flops=0.0,
    )


class BidirectionalMambaLayer(StateSpaceLayer):
    """The block with scans along several paths, (B, N, C) -> (B, N, C), without its outer norm and residual.

    A_log, D and dt_bias stay in float32 when the layer is cast to a narrower dtype, and have no weight decay.

    Args:
        card: the mechanism.
        dim: width C of the input and output.
        num_heads: accepted for the catalogue's sake; every channel has a state of its own.
        pattern: noncausal-self.
        axes: axes of the grids it will be given (1 for sequences), where the number of its weights depends on them:
            ``cross`` scans and the convolution on a grid. None for those of its scan: 2, or 1 for ``forward``,
            ``reverse`` and ``bidirectional``, which take any grid where the convolution does.
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
            self.grid_conv = GridConvolution(inner, config.conv_width, self.axes)
        elif config.conv_width:
            count = sets["conv"] if config.convolution == "path" else 1
            self.convs.extend(ShortConvolution(inner, config.conv_width, bias=True) for _ in range(count))
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
        """A = -1, -2, ..., -d_state (S4D-real), D, dt, and equal weights of paths; the rest has its own."""
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
            n = tokens.x.shape[1]
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
        """silu of the convolution, for each path that has its own."""
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
        inputs = {name: torch.stack(t, 1) for name, t in (("x", xs), ("dt", dt), ("b", b), ("c", c))}
        chosen = {name: t if t.shape[0] == 1 else t[sets[0] : sets[-1] + 1] for name, t in own.items() if t is not None}
        return {**inputs, **chosen}

    def _project(self, x: Float[Tensor, "b n e"], p: int) -> tuple[Tensor, ...]:
        """dt without its bias, B and C of a path, these with an axis of one group."""
        x_proj, dt_proj = (modules[p if len(modules) > 1 else 0] for modules in (self.x_proj, self.dt_proj))
        parts = split(x_proj, self.selected, x)
        return dt_proj(parts["dt"]), parts["B"].unsqueeze(2), parts["C"].unsqueeze(2)

    def _cascade(
        self, x: Float[Tensor, "b n e"], tokens: Tokens, grid: tuple[int, ...] | None
    ) -> Float[Tensor, "b n e"]:
        """Every row as a sequence of its own, then every column; each stage is normalised first, without weights."""
        assert grid is not None  # checked with its axes
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
    """silu of a depthwise convolution along every axis of a grid, centred, with zeros around it and at invalid places.

    Args:
        channels: E.
        side: taps along each axis, odd.
        axes: of the grid, 1 to 3.
    """

    def __init__(self, channels: int, side: int, axes: int) -> None:
        super().__init__()
        self.side, self.axes = side, axes
        self.weight = nn.Parameter(torch.empty(channels, side**axes))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "b n e"], sides: tuple[int, ...], tokens: Tokens) -> Float[Tensor, "b n e"]:
        """x has zeros at invalid places already; what the bias and neighbours write there is taken out again."""
        if x.numel() == 0:
            return x
        image, filters = x.mT.unflatten(2, sides), self.weight.to(x.dtype).unflatten(1, (self.side,) * self.axes)
        convolve = GRID_CONVOLUTIONS[self.axes]
        y = convolve(image, filters[:, None], self.bias.to(x.dtype), padding=self.side // 2, groups=x.shape[-1])
        return F.silu(y.flatten(2).mT)


def _total(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    pattern: Pattern,
    config: Config,
    sizes: dict[str, int] | None = None,
    grid: tuple[int, ...] = (0,),
) -> Tensors:
    """Random inputs for tests, with weights of its own for each path: steps like those of trained layers."""
    widths = {"e": 8, "g": 2, "k": 4, **(sizes or {}), "b": batch, "n": n}
    widths["e"] = max(widths["e"], 2 * widths["g"])  # groups may be doubled and still divide the channels
    paths = count_paths(config, len(grid))
    of_tokens = 1 if config.scan == "strided" else paths
    widths |= {"u": of_tokens, "w": of_tokens, "q": of_tokens, "p": paths, "s": paths, "t": paths, "r": paths}
    found = {}
    for name, letters in MECHANISM.inputs.items():
        if name == "mix?" and config.combine != "gate":
            continue
        shape = [widths[letter] for letter in letters]
        found[name.rstrip("?")] = torch.randn(shape, generator=generator, dtype=torch.float64)
    found["dt_bias"] -= 1
    found["a"] = -F.softplus(2 * found["a"])
    return {name: tensor.to(dtype) for name, tensor in found.items()}


SELF_ONLY = (
    "a path reads the tokens that it writes, and no source defines one for another sequence's queries; `mamba` does"
)

SS2D = {"scan": "cross", "combine": "sum", "convolution": "grid", "conv_width": 3, "norm": "layer"}
"""Options of VMamba's block."""

MECHANISM = Mechanism(
    name="bidirectional_mamba",
    aliases=("vim", "vision_mamba", "vmamba", "ss2d", "bimamba"),
    alias_options={"vmamba": SS2D, "ss2d": SS2D},
    kind=Kind.MIXER,
    summary="The selective scan along several paths through a sequence or a grid, forward and reversed, combined.",
    paper=Paper(
        "Computation-Efficient Era: A Comprehensive Survey of State Space Models in Medical Image Analysis",
        "2406.03430",
        2024,
        52,
    ),
    inputs={
        "x": "bune",
        "dt": "bwne",
        "a": "sek",
        "b": "bqngk",
        "c": "bqngk",
        "skip?": "te",
        "dt_bias?": "re",
        "z?": "bne",
        "mix?": "bpn",
    },
    output="bnf",
    patterns=(Pattern.NONCAUSAL_SELF,),
    refused={
        Pattern.CAUSAL_SELF: "the reversed paths see the tokens that follow; the forward path alone is `mamba`",
        Pattern.NONCAUSAL_CROSS: SELF_ONLY,
        Pattern.CAUSAL_CROSS: SELF_ONLY,
    },
    forms={"reference": reference, "parallel": parallel},
    config=Config,
    variants={
        "forward": {"scan": "forward", "d_state": 1, "dt_rank": 5, "chunk_size": 8},
        "backward": {"scan": "reverse", "conv_width": 0, "expand": 1.0},
        "two copies, concatenated": {"copies": 2, "combine": "concat", "norm": "rms"},
        "gated sum": {"combine": "gate", "gate": False, "skip": False},
        "shared": {"shared": ("conv", "x_proj", "dt", "A", "D"), "combine": "sum"},
        "one convolution": {"convolution": "once", "shared": ("x_proj", "A"), "dt_init": (0.01, 0.02)},
        "on a grid": {"convolution": "grid", "conv_width": 3},
        "cross": {"scan": "cross", "norm": "layer"},
        "slices": {"scan": "slices", "symmetric_dt_init": False},
        "columns": {"scan": "columns"},
        "columns, backward": {"scan": "columns_reverse"},
        "snake": {"scan": "snake"},
        "strided": {"scan": "strided", "combine": "sum", "shared": ("conv", "x_proj")},
        "windows": {"scan": "windows", "window": (2, 3)},
        "cascade": {"scan": "cascade", "convolution": "once", "combine": "sum"},
    },
    layer_variants=frozenset({"cascade"}),
    grid_variants=frozenset(
        {"on a grid", "cross", "slices", "columns", "columns, backward", "snake", "strided", "windows", "cascade"}
    ),
    engine="selective_scan",
    cost=cost,
    axis_sizes=axis_sizes,
    default_scale=1.0,
    honours=frozenset({"grid"}),
    weights="implicit",
    accepts_positions=("none", "sinusoidal", "learned"),
    domains={"a": "negative"},
    sample_inputs=sample_inputs,
    module=BidirectionalMambaLayer,
)
