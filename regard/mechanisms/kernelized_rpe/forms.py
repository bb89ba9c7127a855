"""The fast forms of kernelized_rpe: parallel, chunked, and stepwise from a state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.contract import (
    Call,
    Mask,
    Pattern,
    Result,
    Unsupported,
    state_field,
)
from regard.core.precision import wide, without_autocast
from regard.core.ragged import gathering, place_queries, take_queries
from regard.engines.cache import KeyValueState, WindowState, extend, extend_window
from regard.engines.fourier import fast_size
from regard.engines.gated_recurrence import gated_recurrence
from regard.mechanisms.kernelized_rpe.definition import (
    Config,
    _grid,
    _keys,
    _queries,
    check_roles,
    index,
    offset_weights,
    with_place,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int


NUMBERS_AT_ONCE = 1 << 22
"""Largest number of elements of an intermediate tensor that is computed at once."""


@dataclass(frozen=True)
class KernelizedState(KeyValueState):
    """In causal-self, mapped keys and values (with a column of ones) of the last R - 1 tokens, right-aligned, and the
    sum `memory` of phi(k) v^T over earlier ones; on a grid, keys and values of every token. In cross patterns, the
    whole memory, and the number of queries that have read it."""

    memory: Float[Tensor, "b h f v"] = state_field()
    queries: Int[Tensor, " b"] = state_field()


def parallel(
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
    """Whole sequences, by FFT or by blocks."""
    causal = call.pattern is Pattern.CAUSAL_SELF
    n, m = q.shape[2], k.shape[2]
    with without_autocast(q.device):
        c, outside = offset_weights(call, q, offset_bias, grid_bias, class_bias)
        queries = _queries(call, q, random_features, log_temperature)
        keys, values = _keys(call, k, random_features, log_temperature), _with_ones(v)
        grid = _grid(call, c, m)
        aligned = not causal or (n == m and call.lengths is call.memory_lengths)
        if not aligned:
            queries = place_queries(queries, m, call.lengths, call.memory_lengths)
        if grid is not None:
            output = _on_grid(call, queries, keys, values, c, outside, grid)
        else:
            output = _on_sequence(call, n, queries, keys, values, c)
        if not aligned:
            output = take_queries(output, n, call.lengths, call.memory_lengths)
        return _divide(call, output, v)


def _on_sequence(
    call: Call,
    n: int,
    q: Float[Tensor, "b h slots f"],
    k: Float[Tensor, "b h m f"],
    v: Float[Tensor, "b h m v"],
    c: Float[Tensor, "h offsets"],
) -> Float[Tensor, "b h slots v"]:
    """Weighted sums of a call with n queries over a plain sequence, by the faster method."""
    m, causal = k.shape[2], call.pattern is Pattern.CAUSAL_SELF
    reach = min(c.shape[-1] // 2, max(n, m, 1))
    c = c[:, c.shape[-1] // 2 - reach : c.shape[-1] // 2 + reach + 1]  # no pair is farther apart
    reach = max(n, m) if call.pattern.cross else reach
    if fft_is_best(call.config, n, m, k.shape[-1], v.shape[-1], reach, causal=causal):
        return _by_fft(q, k, v, c, (max(q.shape[2], m),))
    if call.pattern.cross:
        offsets = torch.arange(m, device=q.device) - torch.arange(n, device=q.device)[:, None]
        return _by_pairs(q, k, v, c, index(offsets[None], c.shape[-1]))
    return _by_blocks(call, q, *_surrounded(k, v, c, causal), c, causal=causal)[0]


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    offset_bias: Float[Tensor, "h offsets"] | None = None,
    grid_bias: Float[Tensor, "h rows columns"] | None = None,
    random_features: Float[Tensor, "h f d"] | None = None,
    log_temperature: Float[Tensor, " h"] | None = None,
    class_bias: Float[Tensor, " h"] | None = None,
) -> Result:
    """Causal-self from state to state, by blocks; on a grid by pairs. Also the step."""
    n, m = q.shape[2], k.shape[2]
    if call.roles is not None:
        raise Unsupported(
            "kernelized_rpe with roles and a state, which does not know how many of its tokens have a place",
            supported="whole sequences",
            nearest="roles=None",
        )
    with without_autocast(q.device):
        c, _ = offset_weights(call, q, offset_bias, grid_bias, class_bias)
        queries = _queries(call, q, random_features, log_temperature)
        keys, values = _keys(call, k, random_features, log_temperature), _with_ones(v)
        if grid_bias is not None:
            output, state = _continued_on_grid(call, queries, keys, values, c)
            return Result(_divide(call, output, v), state)
        past = _past(call, keys, values, c.shape[-1] // 2 - 1)
        aligned = n == m and call.lengths is call.memory_lengths
        if not aligned:
            queries = place_queries(queries, m, call.lengths, call.memory_lengths)
        window = call.replace(state=WindowState(past.k, past.v, past.length))
        near, keys, values, _ = extend_window(window, keys, values, m, past.k.shape[2])
        output, memory = _by_blocks(call, queries, keys, values, c, causal=True, memory=past.memory)
        assert memory is not None
        if not aligned:
            output = take_queries(output, n, call.lengths, call.memory_lengths)
    ranks = near.length[:, None] + torch.arange(-near.k.shape[2], 0, device=q.device)
    state = KernelizedState(near.k, near.v, ranks.clamp(min=-1), near.length, memory, past.queries)
    return Result(_divide(call, output, v), state)


def absorb(
    call: Call,
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    random_features: Float[Tensor, "h f d"] | None = None,
    log_temperature: Float[Tensor, " h"] | None = None,
) -> KernelizedState:
    """Absorb mapped memory into a cache; may be called repeatedly."""
    check_roles(call)
    with without_autocast(k.device):
        keys, values = _keys(call, k, random_features, log_temperature), _with_ones(v)
    cache, _ = extend(call, keys, values, 0)
    queries = torch.zeros_like(cache.length) if call.state is None else call.state.queries
    return KernelizedState(cache.k, cache.v, cache.ranks, cache.length, keys[:, :, 0:0, :0], queries)


def read(
    call: Call,
    q: Float[Tensor, "b h n d"],
    offset_bias: Float[Tensor, "h offsets"] | None = None,
    grid_bias: Float[Tensor, "h rows columns"] | None = None,
    random_features: Float[Tensor, "h f d"] | None = None,
    log_temperature: Float[Tensor, " h"] | None = None,
    class_bias: Float[Tensor, " h"] | None = None,
) -> Result:
    """Attend to absorbed memory; queries are counted on from those that have read it before."""
    state: KernelizedState = call.state
    n = q.shape[2]
    with without_autocast(q.device):
        c, _ = offset_weights(call, q, offset_bias, grid_bias, class_bias)
        queries = _queries(call, q, random_features, log_temperature)
        where = torch.arange(n, device=q.device) + state.queries[:, None]
        offsets = state.ranks[:, None] - where[:, :, None]
        output = _by_pairs(queries, state.k, state.v, c, index(offsets, c.shape[-1]))
    after = state.queries + (n if call.lengths is None else call.lengths)
    state = KernelizedState(state.k, state.v, state.ranks, state.length, state.memory, after)
    return Result(_divide(call, output, q), state)


def _with_ones(v: Float[Tensor, "b h m v"]) -> Float[Tensor, "b h m v+1"]:
    return F.pad(wide(v), (0, 1), value=1.0)


def _divide(call: Call, output: Float[Tensor, "b h n v+1"], like: Tensor) -> Float[Tensor, "b h n v"]:
    return (output[..., :-1] / output[..., -1:].clamp(min=call.config.eps)).to(like.dtype)


def _past(call: Call, keys: Tensor, values: Tensor, width: int) -> KernelizedState:
    """The state that a call continues, or an empty one."""
    if call.state is not None:
        if call.state.memory.shape[2] != keys.shape[3]:
            raise Unsupported(
                "kernelized_rpe with the state of a grid but without grid_bias",
                supported="the grid_bias that the state was made with",
            )
        if call.state.k.shape[2] != width:
            raise Unsupported(
                f"kernelized_rpe with biases of {2 * width + 3} offsets and a state of {call.state.k.shape[2]} tokens",
                supported=f"the {2 * call.state.k.shape[2] + 3} offsets that the state was made with",
            )
        return call.state
    batch, heads, _, features = keys.shape
    none = torch.zeros(batch, dtype=torch.long, device=keys.device)
    return KernelizedState(
        keys.new_zeros(batch, heads, width, features),
        values.new_zeros(batch, heads, width, values.shape[-1]),
        none.new_full((batch, width), -1),
        none,
        keys.new_zeros(batch, heads, features, values.shape[-1]),
        none,
    )


def _surrounded(keys: Tensor, values: Tensor, c: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Keys and values with R - 1 empty slots before them, and as many after them unless causal."""
    reach = c.shape[-1] // 2 - 1
    sides = (0, 0, reach, 0 if causal else reach)
    return F.pad(keys, sides), F.pad(values, sides)


def _by_blocks(
    call: Call,
    q: Float[Tensor, "b h n f"],
    k: Float[Tensor, "b h slots f"],
    v: Float[Tensor, "b h slots v"],
    c: Float[Tensor, "h offsets"],
    *,
    causal: bool,
    memory: Float[Tensor, "b h f v"] | None = None,
) -> tuple[Float[Tensor, "b h n v"], Float[Tensor, "b h f v"] | None]:
    """Weighted sums over near keys by pairs, and over far ones, which share a weight, by recurrence; also the new
    memory.

    Args:
        k: keys, with query i at slot i + R - 1; `memory` is the sum over tokens before the first slot.
    """
    n, reach = q.shape[2], c.shape[-1] // 2 - 1
    if n == 0:
        return v.new_zeros(*q.shape[:3], v.shape[-1]), memory
    size = min(call.chunk_size or 64, n)
    extent, empty = size + reach * (1 if causal else 2), -n % size
    rows = F.pad(q, (0, 0, 0, empty)).unflatten(2, (-1, size))  # (b, h, blocks, size, f)
    keys, values = (F.pad(x, (0, 0, 0, empty)).unfold(2, extent, size) for x in (k, v))  # (b, h, blocks, width, extent)
    slots = torch.arange(extent, device=q.device)
    offsets = slots - reach - slots[:size, None]
    near = (offsets.abs() <= reach) & (offsets <= (0 if causal else reach))
    weights = torch.where(near, c[:, index(offsets, c.shape[-1])], 0)
    output = (rows @ keys * weights[:, None] @ values.mT).flatten(2, 3)[:, :, :n]
    if memory is None and n <= reach + 1:
        return output, None

    # the last key that is far from query i is in slot i - 1; a row's memory ends with its queries
    valid, past = call.valid_keys(n), k[:, :, :n]
    past = past if valid is None else torch.where(valid[:, None, :, None], past, 0)
    before, memory = gated_recurrence(q, past, v[:, :, :n], state=memory, inclusive=False, backend=call.backend)
    assert before is not None
    output = output + c[:, :1, None] * before
    if not causal:
        flipped = (x.flip(2)[:, :, :n] for x in (q, k, v))
        after, _ = gated_recurrence(*flipped, inclusive=False, backend=call.backend)
        assert after is not None
        output = output + c[:, -1:, None] * after.flip(2)
    return output, memory


def _by_pairs(
    q: Float[Tensor, "b h n f"],
    k: Float[Tensor, "b h m f"],
    v: Float[Tensor, "b h m v"],
    c: Float[Tensor, "h offsets"],
    at: Int[Tensor, "#b n m"],
) -> Float[Tensor, "b h n v"]:
    """Weighted sums over all pairs, some queries at a time; `at` is the index in c of each pair's weight."""
    rows = max(1, NUMBERS_AT_ONCE // max(1, q.shape[0] * q.shape[1] * k.shape[2]))

    def mix(q: Tensor, k: Tensor, v: Tensor, c: Tensor, at: Tensor) -> Tensor:
        return (q @ k.mT * c[:, at].transpose(0, 1)) @ v

    pieces = [
        _mixed(mix, rows < q.shape[2], a, k, v, c, o) for a, o in zip(q.split(rows, 2), at.split(rows, 1), strict=True)
    ]
    return torch.cat(pieces, 2)


def _mixed(mix: Callable[..., Tensor], again: bool, *tensors: Tensor) -> Tensor:
    """``mix(*tensors)``; with `again`, its intermediates are recomputed in the backward pass instead of stored."""
    if again and torch.is_grad_enabled():
        return checkpoint(mix, *tensors, use_reentrant=False)
    return mix(*tensors)


def _by_fft(
    q: Float[Tensor, "b h n f"],
    k: Float[Tensor, "b h m f"],
    v: Float[Tensor, "b h m v"],
    c: Float[Tensor, "h *offsets"],
    grid: Sequence[int],
) -> Float[Tensor, "b h n v"]:
    """Products with the Toeplitz matrix of c, embedded in a circulant one, for some value columns at a time.

    Tokens fill `grid` row by row; a sequence is a grid of one side.
    """
    n, places = q.shape[2], math.prod(grid)
    if v.numel() == 0 or q.numel() == 0:
        return v.new_zeros(*q.shape[:3], v.shape[-1])
    sizes = [fast_size(2 * side - 1) for side in grid]
    # an error of a transform is as large for a query that sees few keys as for one that sees all
    dtype = v.dtype if v.device.type == "mps" else torch.float64
    kernel = c.to(dtype)
    for axis, (size, side) in enumerate(zip(sizes, grid, strict=True), 1):
        t = torch.arange(size, device=c.device)
        offsets = torch.where(t < side, -t, size - t)
        kernel = kernel.index_select(axis, index(offsets, c.shape[axis]))
        kernel = torch.where((offsets < side).view(-1, *[1] * (c.ndim - 1 - axis)), kernel, 0)
    axes = tuple(range(-len(sizes), 0))
    spectrum = torch.fft.rfftn(kernel, dim=axes)[:, None, None]  # (h, 1 feature, 1 column, *grid)
    q, k, v = (F.pad(x, (0, 0, 0, places - x.shape[2])).mT.unflatten(-1, tuple(grid)) for x in (q, k, v))

    def mix(columns: Float[Tensor, "b h columns *grid"], q: Tensor, k: Tensor, spectrum: Tensor) -> Tensor:
        products = k[:, :, :, None] * columns[:, :, None].to(dtype)  # (b, h, f, columns, *grid)
        mixed = torch.fft.irfftn(torch.fft.rfftn(products, s=sizes, dim=axes) * spectrum, s=sizes, dim=axes)
        for axis, side in zip(axes, grid, strict=True):
            mixed = mixed.narrow(axis, 0, side)
        return (q[:, :, :, None] * mixed).sum(2).to(columns.dtype)

    width = max(1, NUMBERS_AT_ONCE // max(1, math.prod(q.shape[:3]) * math.prod(sizes)))
    pieces = [_mixed(mix, width < v.shape[2], part, q, k, spectrum) for part in v.split(width, 2)]
    return torch.cat(pieces, 2).flatten(3).mT[:, :, :n]


def _on_grid(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Float[Tensor, "h *offsets"],
    outside: Float[Tensor, " h"],
    grid: Sequence[int],
) -> Float[Tensor, "b h n v"]:
    """Weighted sums over tokens with a position by FFT; pairs with a token that has none have the weight `outside`."""
    token = with_place(call, grid, k)
    if call.roles is None:
        output = _by_fft(q, k, v, c, grid)
        return F.pad(output, (0, 0, 0, q.shape[2] - output.shape[2]))  # padding may need more places than the grid has
    batch, n = token.shape
    layout = gathering(Mask(valid=token), batch, n, q.device)
    placed = (layout.gather(x, axis=2)[:, :, : math.prod(grid)] for x in (q, k, v))
    queries, keys, values = placed
    inside = _by_fft(queries, keys, values, c, grid)
    inside = layout.scatter(F.pad(inside, (0, 0, 0, n - inside.shape[2])), axis=2)
    token = token[:, None, :, None]

    def read(q: Tensor, k: Tensor) -> Tensor:
        if call.pattern is not Pattern.CAUSAL_SELF:
            return q @ (k.mT @ v)
        output, _ = gated_recurrence(q, k, v, backend=call.backend)
        assert output is not None
        return output

    # all queries read the tokens without a position, and queries without one read the others too
    pairs = read(q, torch.where(token, 0, k)) + read(torch.where(token, 0, q), torch.where(token, k, 0))
    return inside + outside[:, None, None] * pairs


def _continued_on_grid(
    call: Call,
    q: Float[Tensor, "b h n f"],
    k: Float[Tensor, "b h m f"],
    v: Float[Tensor, "b h m v"],
    c: Float[Tensor, "h rows columns"],
) -> tuple[Float[Tensor, "b h n v"], KernelizedState]:
    """Weighted sums over every token of a grid so far, and the state that holds those tokens."""
    if call.state is not None and call.state.memory.shape[2] != 0:
        raise Unsupported(
            "kernelized_rpe with grid_bias and the state of a plain sequence", supported="the state of a grid"
        )
    grid = _grid(call, c, k.shape[2])
    assert grid is not None
    cache, where = extend(call, k, v, q.shape[2])
    if not torch.compiler.is_compiling() and cache.length.numel() and int(cache.length.max()) > math.prod(grid):
        raise Unsupported(
            f"kernelized_rpe with {int(cache.length.max())} tokens on a grid {tuple(grid)}",
            supported=f"at most {math.prod(grid)}",
        )

    def between(place: Callable[[Tensor], Tensor], size: int) -> Int[Tensor, "b n m"]:
        return index(place(where.keys)[:, None] - place(where.queries)[:, :, None], size)

    # an empty slot has a key of zeros, and a query before the first key has only offsets that are not seen
    rows = between(lambda rank: rank // grid[1], c.shape[1])
    at = rows * c.shape[2] + between(lambda rank: rank % grid[1], c.shape[2])
    output = _by_pairs(q, cache.k, cache.v, c.flatten(1), at)
    none = torch.zeros_like(cache.length)
    return output, KernelizedState(cache.k, cache.v, cache.ranks, cache.length, k[:, :, 0:0, :0], none)


FFT_SLOWNESS = 8.0
"""Time of an operation in an FFT relative to one in a matrix product, on one core."""


def fft_operations(size: int, f: int, v: int) -> float:
    """Operations (two per multiply-add) of one head's transforms of `size` points."""
    rounds = 0
    while 1 << rounds < size:  # the logarithm, which works for symbolic sizes too
        rounds += 1
    return f * v * (5.0 * size * rounds + 8.0 * size)


def operations(n: int, m: int, f: int, v: int, reach: int, *, causal: bool) -> tuple[float, float]:
    """Operations (two per multiply-add) of one head: by FFT, and by blocks."""
    longest = max(n, m, 1)
    fft = fft_operations(2 * longest, f, v)
    near = 64 + min(reach, longest) * (1 if causal else 2)
    far = 4.0 * m * f * v * (1 if causal else 2) if longest > reach else 0.0
    return fft, 2.0 * n * near * (f + v) + far


def fft_is_best(config: Config, n: int, m: int, f: int, v: int, reach: int, *, causal: bool) -> bool:
    """Return whether `method` is ``fft``, or ``auto`` and the transforms would be faster than blocks, for `f` features,
    `v` values and separate weights up to the offset `reach`."""
    if config.method != "auto":
        return config.method == "fft"
    fft, blocks = operations(n, m, f, v, reach, causal=causal)
    return FFT_SLOWNESS * fft < blocks
