"""Attention with explicit weights: a visibility rule on ranks and a rule that turns scores into weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.backends import Engine, add_engine, execute, prefers_native, which_backend
from regard.backends.operators import transformed
from regard.contract import BlockMask, Cost, Shape
from regard.core.ragged import check_pairs
from regard.core.visibility import CountedRanks, PositionBias, Ranks, Visibility, masked_scores_bias, ranks
from regard.engines.attention import native_form, torch_form
from regard.engines.attention.chosen import attend_in_chosen
from regard.engines.attention.problem import RULES, Problem
from regard.engines.attention.torch_form import only_largest

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    ranks: Ranks,
    *,
    visibility: Visibility,
    scale: float,
    rule: str = "softmax",
    shift: float = 0.0,
    softcap: float | None = None,
    sink: Float[Tensor, " h"] | None = None,
    stretch: tuple[float, float] | None = None,
    largest: int | None = None,
    bias: Float[Tensor, "#b #h #n #m"] | None = None,
    position_bias: PositionBias | None = None,
    blocks: BlockMask | None = None,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
    want_weights: bool = False,
    want_lse: bool = False,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b h n v"], Float[Tensor, "b h n m"] | None, Float[Tensor, "b h n"] | None]:
    """Compute the output and, if requested, the weights or the log-sum-exp of the scores.

    Args:
        ranks, visibility, scale, ...: see :class:`regard.engines.attention.problem.Problem`.
        backend: see :func:`regard.which_backend`.

    The output of a query that sees no key is 0.

    Raises:
        Unsupported: as in `Problem`, and for a bias that does not fit.
    """
    if bias is not None:
        check_pairs(bias, *q.shape[:3], k.shape[2])
    if (
        rule == "softmax"
        and softcap is sink is stretch is largest is bias is position_bias is blocks is backend is None
        and not (shift or dropout or want_weights or want_lse)
        and prefers_native()
    ):
        output = native_form.plain(q, k, v, ranks, visibility, scale)
        if output is not None:
            return output, None, None
    problem = Problem(
        ranks,
        visibility,
        scale,
        rule,
        shift,
        softcap,
        sink,
        stretch,
        largest,
        bias,
        position_bias,
        blocks,
        dropout,
        generator,
        want_weights,
        want_lse,
    )
    k, v = k.to(q.dtype), v.to(q.dtype)  # a cache keeps the dtype that it was created with
    return execute("attention", backend, q.device, q.dtype, q, k, v, problem)


def decode(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"], scale: float
) -> Float[Tensor, "b h n v"] | None:
    """Softmax :func:`attention` of few queries that see every key, by a faster path than the general one, whose
    overhead exceeds the work; None if there is no such path for the call."""
    if not prefers_native():
        return None
    where = CountedRanks(q.shape[2], k.shape[2], 0, True, q.device)
    return native_form.plain(q, k, v, where, Visibility(), scale)


def decode_part(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"], scale: float
) -> tuple[Float[Tensor, "b h n v"], Float[Tensor, "b h n"]] | None:
    """:func:`decode` with the log-sum-exp of the scores, if these are only some of the keys."""
    if not prefers_native():
        return None
    where = CountedRanks(q.shape[2], k.shape[2], 0, True, q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    output = native_form.plain(q, k, v, where, Visibility(), scale, lse)
    return None if output is None else (output, lse)


def has_kernel(q: Float[Tensor, "b h n d"], backend: str | None = None) -> bool:
    """Return whether a native kernel computes :func:`attention` of such queries. PyTorch's operators only give a
    log-sum-exp from explicit weights, which mechanisms can then just as well compute themselves.

    Raises:
        Unsupported: if the requested backend cannot run here, or not in this dtype.
    """
    return which_backend("attention", device=q.device, dtype=q.dtype, backend=backend).name != "torch"


def skips_blocks(q: Float[Tensor, "b h n d"], backend: str | None = None) -> bool:
    """Return whether :func:`attention` of such queries runs on a kernel that skips the hidden blocks of `blocks`: not
    in a graph, for forward-mode derivatives, or under transforms of `torch.func`.

    Raises:
        Unsupported: as in :func:`has_kernel`.
    """
    return q.is_cpu and not torch.compiler.is_compiling() and not transformed() and has_kernel(q, backend)


def part_gradients(
    grad: Float[Tensor, "b h n v"],
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    out: Float[Tensor, "b h n v"],
    lse: Float[Tensor, "b h n"],
    *,
    causal: bool,
    scale: float,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b g m d"], Float[Tensor, "b g m v"]]:
    """Gradients of softmax attention to all keys, for the queries and for the given part of the keys and values.

    Add up those of q over all parts of the keys; those of k and v are the contributions of these queries.

    Args:
        out, lse: results of attention to all keys, not just to these.
        causal: query i sees the keys 0 to i of this part; otherwise all of them.
    """
    visibility = Visibility(causal=causal)
    where = CountedRanks(q.shape[2], k.shape[2], 0, True, q.device)
    problem = Problem(where, visibility, scale, want_lse=True)
    return execute("attention_gradients", backend, q.device, q.dtype, q, k, v, problem, grad, out, lse)


def attention_reference(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    visible: Bool[Tensor, "#b #h #n m"],
    scores_to_weights: Callable[[Tensor], Tensor],
    scale: float,
    bias: Float[Tensor, "#b #h #n #m"] | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, with the whole score matrix: hidden scores are -inf before `scores_to_weights`, and the weights
    of a query that sees nothing are 0."""
    groups = q.shape[1] // k.shape[1]
    scores = scale * q @ k.repeat_interleave(groups, 1).mT
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    opened = visible | ~visible.any(-1, keepdim=True)  # a row of -inf only would have NaN gradients
    weights = torch.where(visible, scores_to_weights(scores.masked_fill(~opened, -torch.inf)), 0)
    return weights @ v.repeat_interleave(groups, 1)


def attention_cost(shape: Shape, keys: float | None = None) -> Cost:
    """The cost of two products of each query with `keys` keys (None for all), and of a cache of all keys and values."""
    keys = shape.m if keys is None else min(shape.m, keys)
    width = shape.dim_key + shape.dim_value
    heads = shape.batch * shape.heads
    return Cost(
        flops=2.0 * heads * shape.n * keys * width,
        memory=float(heads * shape.n),
        state=float(shape.heads * shape.m * width),
        step_flops=2.0 * heads * keys * width,
    )


add_engine("attention", torch=Engine(torch_form.run), native=Engine(native_form.run, native_form.refuses))
add_engine(
    "attention_gradients",
    torch=Engine(torch_form.part_gradients),
    native=Engine(native_form.part_gradients, lambda *call: native_form.refuses(*call[:4])),
)

__all__ = [
    "RULES",
    "Problem",
    "Ranks",
    "Visibility",
    "attend_in_chosen",
    "attention",
    "attention_cost",
    "attention_reference",
    "decode",
    "decode_part",
    "has_kernel",
    "masked_scores_bias",
    "only_largest",
    "part_gradients",
    "ranks",
    "skips_blocks",
]
