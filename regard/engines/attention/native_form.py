"""Blocked attention in C++ (see `native/src/attention.cpp` and `native/src/attention_backward.cpp`).

Scores are computed tile by tile and never stored; tiles with all pairs hidden are skipped. Stretched and clipped
softmax weights take another pass, for the normalisers. Inputs are read in place: grouped heads, any strides with
contiguous features, broadcast biases.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.operators import operator, runs_plainly
from regard.core.visibility import CountedRanks, DistanceBias, Ranks, Visibility
from regard.engines.attention.packed import SOFTMAX, WITH_LSE, PackedProblem, check, check_results, limits_of
from regard.engines.attention.problem import Problem
from regard.engines.attention.torch_form import of_no_pairs
from regard.engines.heads import HEADS, Strides, by_row, empty_output, heads_arguments

KEPT_RANKS = 1 << 14
"""Number of ranks that are precomputed."""

FIRST_RANKS = (ctypes.c_int64 * KEPT_RANKS)(*range(KEPT_RANKS))
"""A ctypes array, since a tensor would depend on torch's default device and modes."""

DECODED, DECODED_LONG, LONG = 8, 16, 4096
"""Softmax runs on the decoding kernel, which reads keys once for all heads that share them and splits them among
threads, for up to DECODED queries per head, or DECODED_LONG with at least LONG keys."""


class VisibilityArguments(ctypes.Structure):
    """The struct `regard_visibility`."""

    _fields_ = (
        ("query_ranks", ctypes.c_void_p),
        ("key_ranks", ctypes.c_void_p),
        ("query_ranks_stride", ctypes.c_int64),
        ("key_ranks_stride", ctypes.c_int64),
        ("causal", ctypes.c_int64),
        ("left", ctypes.c_int64),
        ("right", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("lookback", ctypes.c_int64),
        ("lookahead", ctypes.c_int64),
        ("blocks", ctypes.c_void_p),
        ("blocks_strides", Strides),
        ("blocks_rows", ctypes.c_int64),
        ("blocks_columns", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
    )


class BiasArguments(ctypes.Structure):
    """The struct `regard_score_biases`."""

    _fields_ = (
        ("bias", ctypes.c_void_p),
        ("bias_strides", ctypes.c_int64 * 4),
        ("distance", ctypes.c_void_p),
        ("distance_stride", ctypes.c_int64),
        ("distance_zero", ctypes.c_int64),
        ("distances", ctypes.c_int64),
    )


class Attention(library.Arguments):
    kernel = "attention"
    _fields_ = (
        *HEADS,
        ("scale", ctypes.c_float),
        ("shift", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("rule", ctypes.c_int32),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
        ("sink", ctypes.c_void_p),
        ("visibility", VisibilityArguments),
        ("biases", BiasArguments),
    )


class AttentionBackward(library.Arguments):
    kernel = "attention_backward"
    _fields_ = (
        ("forward", ctypes.POINTER(Attention)),
        ("grad_out", ctypes.c_void_p),
        ("grad_out_strides", Strides),
        ("grad_lse", ctypes.c_void_p),
        ("grad_q", ctypes.c_void_p),
        ("grad_k", ctypes.c_void_p),
        ("grad_v", ctypes.c_void_p),
        ("grad_q_strides", Strides),
        ("grad_k_strides", Strides),
        ("grad_v_strides", Strides),
        ("grad_sink", ctypes.c_void_p),
        ("grad_bias", ctypes.c_void_p),
        ("grad_distance", ctypes.c_void_p),
        ("grad_bias_queries", ctypes.c_int64),
        ("grad_bias_keys", ctypes.c_int64),
    )


class AttentionDecode(library.Arguments):
    kernel = "attention_decode"
    _fields_ = (
        ("forward", ctypes.c_void_p),
        ("pages", ctypes.c_void_p),
        ("pages_stride", ctypes.c_int64),
        ("page_size", ctypes.c_int64),
        ("lengths", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
    )


def refuses(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> str | None:
    """The reason why the kernel cannot run a call; None if it can."""
    if problem.dropout > 0:
        return "it has no dropout"
    if problem.want_weights:
        return "it does not store the weights"
    if problem.largest is not None:
        return "it does not choose the largest weights"
    if problem.stretch is not None and problem.sink is not None:
        return "it does not support clipped weights together with a sink"
    if problem.stretch is not None and q.shape[2] < DECODED and k.shape[2] >= LONG:
        return f"its kernel for few queries on {LONG} keys or more does not clip weights"
    if problem.position_bias is not None and not isinstance(problem.position_bias, DistanceBias):
        return "it takes position biases by distance alone (regard.core.visibility.DistanceBias)"
    heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads < 1 or heads % kv_heads or v.shape[1] != kv_heads:
        return f"{heads} query heads do not share {kv_heads} key heads"
    if q.shape[3] < 1 or v.shape[3] < 1 or k.shape[3] != q.shape[3]:
        return "heads without features, or queries and keys of different widths"
    if k.shape[0] != q.shape[0] or v.shape[0] != q.shape[0] or v.shape[2] != k.shape[2]:
        return "q, k and v do not have the same rows and tokens"
    if max(q.shape[2:] + v.shape[2:]) > library.MOST:
        return f"it takes at most {library.MOST} tokens and features"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return "q, k and v have different dtypes"
    masks = None if problem.blocks is None else problem.blocks.visible
    places = None if isinstance(problem.ranks, CountedRanks) else problem.ranks.keys
    others = {"sink": problem.sink, "bias": problem.bias, "blocks": masks, "ranks": places}
    for name, x in {"k": k, "v": v, **others}.items():
        if x is not None and not x.is_cpu:
            return f"it runs on cpu, and {name} is on {x.device.type}"
    if masks is not None and masks.numel() == 0:
        return "the block mask has no blocks"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See :func:`regard.engines.attention.attention`."""
    if q.shape[0] * q.shape[1] * q.shape[2] == 0 or k.shape[2] == 0:
        return of_no_pairs(q, k, v, problem.want_weights, problem.want_lse)
    out, lse = _attention(PackedProblem.of(q, k, v, problem))
    return out, None, lse if problem.want_lse else None


def part_gradients(
    q: Tensor, k: Tensor, v: Tensor, problem: Problem, grad: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`regard.engines.attention.part_gradients`."""
    needed = [True, True, True, False, False, False]
    dq, dk, dv, *_ = _attention_backward(grad, None, PackedProblem.of(q, k, v, problem), out, lse, needed)
    return dq, dk, dv


def _broadcast_strides(x: Tensor) -> list[int]:
    return [stride if size > 1 else 0 for stride, size in zip(x.stride(), x.shape, strict=True)]


def _counted(first: int, count: int) -> tuple[Tensor | None, int | None]:
    """A tensor of the ranks first, first + 1, ..., and its address; no tensor if the precomputed ranks contain them."""
    if first >= 0 and first + count <= KEPT_RANKS:
        return None, ctypes.addressof(FIRST_RANKS) + ctypes.sizeof(ctypes.c_int64) * first
    ranks = torch.arange(first, first + count, device="cpu")
    return ranks, library.pointer(ranks)


def _arguments(p: PackedProblem, out: Tensor, lse: Tensor) -> tuple[Attention, tuple[Any, ...]]:
    """The forward struct, and the tensors that it points to. The tensors have been checked before."""
    q, k, v = map(library.rows_contiguous, (p.q, p.k, p.v))
    sink = None if p.sink is None else p.sink.contiguous()
    distance = None if p.distance is None else library.rows_contiguous(p.distance)
    query_ranks, key_ranks, blocks, bias = p.query_ranks, p.key_ranks, p.blocks, p.bias
    if query_ranks is None or key_ranks is None:
        query_ranks, first_query = _counted(p.first_rank, q.shape[2])
        key_ranks, first_key = _counted(0, k.shape[2])
        visibility = VisibilityArguments(first_query, first_key, 0, 0, *p.limits)
    else:
        query_ranks, key_ranks = library.rows_contiguous(query_ranks), library.rows_contiguous(key_ranks)
        places = library.pointer(query_ranks), library.pointer(key_ranks)
        visibility = VisibilityArguments(*places, by_row(query_ranks), by_row(key_ranks), *p.limits)
    if blocks is not None:
        blocks = library.rows_contiguous(blocks)
        visibility.blocks = library.pointer(blocks)
        strides = _broadcast_strides(blocks)
        visibility.blocks_strides = Strides(strides[0], strides[1], blocks.stride(2))
        visibility.blocks_rows, visibility.blocks_columns = blocks.shape[2], blocks.shape[3]
        visibility.block_size = p.block_size
    biases = BiasArguments()
    if bias is not None:
        biases.bias = library.pointer(bias)
        biases.bias_strides = (ctypes.c_int64 * 4)(*_broadcast_strides(bias))
    if distance is not None:
        biases.distance = library.pointer(distance)
        biases.distance_stride = by_row(distance)
        biases.distance_zero, biases.distances = p.distance_zero, distance.shape[-1]
    arguments = Attention(
        **heads_arguments(q, k, v, out, lse),
        scale=p.scale,
        shift=p.shift,
        softcap=p.softcap,
        rule=p.rule,
        low=p.stretch[0] if p.stretch else 0.0,
        high=p.stretch[1] if p.stretch else 1.0,
        sink=library.pointer(sink),
        visibility=visibility,
        biases=biases,
    )
    return arguments, (q, k, v, query_ranks, key_ranks, sink, bias, distance, blocks, out, lse)


def _empty_results(p: PackedProblem) -> tuple[Tensor, Tensor]:
    lse = p.q.new_empty(p.q.shape[:3] if p.rule in WITH_LSE else (0,), dtype=torch.float32)
    return empty_output(p.q, p.v), lse


@operator("attention")
def _attention(problem: PackedProblem) -> tuple[Tensor, Tensor]:
    """Output and, for softmax, clipped or not, the log-sum-exp (an empty tensor for other rules)."""
    check(problem)
    out, lse = _empty_results(problem)
    arguments, kept = _arguments(problem, out, lse)
    if problem.rule == SOFTMAX and problem.blocks is None:
        _run_forward(arguments, problem.q.shape[2], problem.k.shape[2])
    else:
        library.call(arguments)
    del kept
    return out, lse


@lru_cache(maxsize=256)
def _template(
    query_shape: torch.Size,
    kv_heads: int,
    value_width: int,
    dtype: torch.dtype,
    causal: bool,
    left: int | None,
    right: int | None,
    threads: int,
) -> bytes:
    """The forward struct of a plain call, except for the fields that differ from call to call."""
    batch, heads, n, width = query_shape
    where = ctypes.addressof(FIRST_RANKS)
    limits = limits_of(Visibility(causal, left, right))
    return bytes(
        Attention(
            threads=threads,
            dtype=library.DTYPES[dtype],
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            n=n,
            width=width,
            value_width=value_width,
            out_strides=Strides(heads * n * value_width, value_width, heads * value_width),
            low=0.0,
            high=1.0,
            visibility=VisibilityArguments(where, where, 0, 0, *limits),
        )
    )


def plain(
    q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, visibility: Visibility, scale: float, lse: Tensor | None = None
) -> Tensor | None:
    """Softmax attention without options and with consecutive ranks, by a direct kernel call; None for all other calls,
    including those that autograd, a profiler or a mode must see.

    For few tokens, the general path through Python takes longer than the kernel.

    Args:
        lse: tensor for the log-sum-exp, (B, H, N) in float32, contiguous.
    """
    if not isinstance(ranks, CountedRanks) or not runs_plainly(q, k, v):
        return None
    batch, heads, n, width = q.shape
    _, kv_heads, m, value_width = v.shape
    dtype, first = q.dtype, ranks.first
    if (
        not 0 < n <= KEPT_RANKS - first <= KEPT_RANKS
        or not 0 < m <= KEPT_RANKS
        or k.shape != (batch, kv_heads, m, width)
        or v.shape[0] != batch
        or min(batch, heads, kv_heads, width, value_width) < 1
        or heads % kv_heads
        or dtype not in library.DTYPES
        or not k.dtype == v.dtype == dtype
        or not q.stride(3) == k.stride(3) == v.stride(3) == 1
        or visibility.block is not None
    ):
        return None
    near = visibility.within(first, n, m)
    template = _template(
        q.shape, kv_heads, value_width, dtype, near.causal, near.left, near.right, torch.get_num_threads()
    )
    arguments = Attention.from_buffer_copy(template)
    out = empty_output(q, v)
    arguments.q, arguments.k, arguments.v = library.pointer(q), library.pointer(k), library.pointer(v)
    arguments.out, arguments.lse = library.pointer(out), library.pointer(lse)
    arguments.m, arguments.scale = m, scale
    arguments.q_strides, arguments.k_strides, arguments.v_strides = (x.stride()[:3] for x in (q, k, v))
    if first:
        arguments.visibility.query_ranks = ctypes.addressof(FIRST_RANKS) + ctypes.sizeof(ctypes.c_int64) * first
    _run_forward(arguments, n, m)
    return out


def _run_forward(arguments: Attention, n: int, m: int) -> None:
    """Run the decoding kernel for few queries, otherwise the general one; for softmax without a block mask."""
    if n <= (DECODED if m < LONG else DECODED_LONG):
        library.call(AttentionDecode(forward=ctypes.addressof(arguments)))
    else:
        library.call(arguments)


@_attention.register_fake
def _(problem: PackedProblem) -> tuple[Tensor, Tensor]:
    return _empty_results(problem)


@operator("attention_backward")
def _attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    problem: PackedProblem,
    out: Tensor,
    lse: Tensor,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of q, k, v (whether needed or not), sink, bias (B, H, N|1, M|1) and distances (H, distances); empty
    tensors for those of the last three that are not needed."""
    check(problem)
    check_results(problem, grad_out, grad_lse, out, lse)
    out, lse = library.rows_contiguous(out), lse.contiguous()
    grads = problem.empty_gradients(needed)
    grad_q, grad_k, grad_v, *learned = grads
    grad_sink, grad_bias, grad_distance = (x if x.numel() else None for x in learned)
    forward, kept = _arguments(problem, out, lse)
    grad_out = library.rows_contiguous(grad_out)
    grad_lse = None if grad_lse is None or problem.rule not in WITH_LSE else grad_lse.contiguous()
    library.call(
        AttentionBackward(
            forward=ctypes.pointer(forward),
            **library.strided(grad_out=grad_out, grad_q=grad_q, grad_k=grad_k, grad_v=grad_v),
            grad_lse=library.pointer(grad_lse),
            grad_sink=library.pointer(grad_sink),
            grad_bias=library.pointer(grad_bias),
            grad_distance=library.pointer(grad_distance),
            grad_bias_queries=0 if grad_bias is None else grad_bias.shape[2],
            grad_bias_keys=0 if grad_bias is None else grad_bias.shape[3],
        )
    )
    del kept
    return grads


@_attention_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    problem: PackedProblem,
    out: Tensor,
    lse: Tensor,
    needed: list[bool],
) -> list[Tensor]:
    return problem.empty_gradients(needed)


def _keep(ctx: Any, inputs: tuple[PackedProblem], output: tuple[Tensor, Tensor]) -> None:
    inputs[0].keep(ctx, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None and grad_lse is None:
        return (None,) * len(ctx.needs_input_grad)
    problem, (out, lse) = PackedProblem.kept(ctx)
    needed = problem.needed(ctx)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = _attention_backward(grad_out, grad_lse, problem, out, lse, needed)
    # sum over the rows, heads or tokens that share an input
    summed = [
        grad.sum_to_size(x.shape) if x is not None and need else grad
        for grad, x, need in zip(grads, problem.learned, needed, strict=True)
    ]
    return problem.gradients(summed, needed)


_attention.register_autograd(_backward, setup_context=_keep)
_attention_backward.refuse_gradient("gradients of gradients of native attention", supported="first gradients")
