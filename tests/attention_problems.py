"""Calls of the attention engine and their expected results: the definition, with the full score matrix, in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regard.contract import BlockMask, Call, Pattern
from regard.core.visibility import DistanceBias, Ranks, Visibility, masked_scores_bias, ranks
from regard.engines.attention import attention, attention_reference

ACTIVATIONS = {"sigmoid": torch.sigmoid, "relu": torch.relu, "relu_squared": lambda s: torch.relu(s) ** 2}
TENSORS = ("q", "k", "v", "sink", "bias", "table")
CAUSAL = Visibility(causal=True)


@dataclass
class Problem:
    """One call of the engine.

    Attributes:
        table: biases by distance, (heads or 1, distances), with distance 0 in the middle.
        valid: which queries are not padding, (B, N); None if all are valid.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    ranks: Ranks
    visibility: Visibility = CAUSAL
    scale: float = 0.7
    rule: str = "softmax"
    shift: float = 0.0
    softcap: float | None = None
    sink: Tensor | None = None
    bias: Tensor | None = None
    table: Tensor | None = None
    blocks: BlockMask | None = None
    stretch: tuple[float, float] | None = None
    valid: Tensor | None = None

    @property
    def pairs(self) -> tuple[int, int, int, int]:
        return (*self.q.shape[:3], self.k.shape[2])

    def leaves(self, dtype: torch.dtype | None = None) -> tuple[Problem, dict[str, Tensor]]:
        """The problem on leaf tensors that require gradients, optionally in another dtype, and these leaves."""
        given = {name: x for name in TENSORS if (x := getattr(self, name)) is not None}
        found = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in given.items()}
        return replace(self, **found), found

    def position_bias(self) -> DistanceBias | None:
        table = self.table
        return None if table is None else DistanceBias(lambda d: table[:, d + table.shape[1] // 2])

    def found(self, backend: str, **wanted: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """A backend's output, weights (if wanted) and log-sum-exp (for softmax)."""
        options = {"want_lse": self.rule == "softmax", "backend": backend, **wanted}
        return attention(
            self.q, self.k, self.v, self.ranks, visibility=self.visibility, scale=self.scale, rule=self.rule,
            shift=self.shift, softcap=self.softcap, sink=self.sink, stretch=self.stretch, bias=self.bias,
            position_bias=self.position_bias(), blocks=self.blocks, **options,
        )  # fmt: skip

    def activation(self, scores: Tensor) -> Tensor:
        """Weights for scores, which are -inf for hidden pairs."""
        if self.rule != "softmax":
            return ACTIVATIONS[self.rule](scores + self.shift)
        if self.stretch is not None:
            low, high = self.stretch
            return ((high - low) * scores.softmax(-1) + low).clip(0, 1)
        if self.sink is None:
            return scores.softmax(-1)
        column = self.sink[None, :, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1]

    def expected(self, added: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Output, weights and log-sum-exp by the definition, in float64; `added` is added to the scores of all pairs."""
        visible, bias = masked_scores_bias(
            self.ranks, self.visibility, self.bias, self.position_bias(), self.blocks, torch.float64
        )
        if added is not None:
            bias = added if bias is None else bias + added
        visible, seen = visible.expand(self.pairs), {}

        def activation(scores: Tensor) -> Tensor:
            seen["lse"], seen["weights"] = scores.logsumexp(-1), self.activation(scores)
            return seen["weights"]

        output = attention_reference(self.q, self.k, self.v, visible, activation, self.scale, bias, self.softcap)
        weights = torch.where(visible, seen["weights"], 0)
        return output, weights, torch.where(visible.any(-1), seen["lse"], -math.inf)


def tensors(
    batch: int, heads: int, groups: int, n: int, m: int, width: int, values: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    shapes = {"q": (batch, heads, n, width), "k": (batch, groups, m, width), "v": (batch, groups, m, values)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def counted(n: int, m: int, pattern: Pattern = Pattern.CAUSAL_SELF, lengths: Sequence[int] | None = None) -> Ranks:
    valid = None if lengths is None else torch.tensor(lengths)
    return ranks(Call(pattern, lengths=valid, memory_lengths=valid), n, m, torch.device("cpu"))


def plain(
    n: int, m: int | None = None, *, width: int = 16, values: int | None = None, heads: int = 2, groups: int | None = None,
    batch: int = 1, visibility: Visibility = CAUSAL, dtype: torch.dtype = torch.float32, **options: Any,
) -> Problem:  # fmt: skip
    """Causal attention of the last n of m tokens, or of n queries to all m keys if nothing is hidden."""
    m = n if m is None else m
    given = tensors(batch, heads, groups or heads, n, m, width, values or width, dtype)
    where = counted(n, m, Pattern.NONCAUSAL_CROSS if visibility.everything and n != m else Pattern.CAUSAL_SELF)
    options = {"scale": width**-0.5, **options}
    return Problem(**given, ranks=where, visibility=visibility, **options)


def gaps(batch: int, n: int, m: int, queries: str = "counted", unordered: bool = True) -> Ranks:
    """Ranks of keys that fill some places of a cache, in any order; the queries are the last of their row, or of any rank."""
    there = torch.rand(batch, m) < 0.6
    keys = torch.where(there, there.cumsum(-1) - 1, -1)
    keys = keys[:, torch.randperm(m)] if unordered else keys
    last = there.sum(-1, keepdim=True) - n + torch.arange(n)
    return Ranks(last if queries == "counted" else torch.randint(-n, m + 1, (batch, n)), keys, None, None, False)


def random_problem(
    seed: int, dtype: torch.dtype, tokens: Sequence[int] = (1, 5, 16, 37, 48, 49, 64, 97, 130),
    others: Sequence[int] = (1, 7, 40, 64, 65, 200), widths: Sequence[int] = (8, 5, 17, 64, 33), block: int = 64,
) -> Problem:  # fmt: skip
    """A random problem: any pattern, shared heads or not, unequal widths, and any mix of rules, masks and biases."""
    torch.manual_seed(seed)
    pick = random.Random(seed)
    choice = pick.choice
    side = torch.float64 if dtype is torch.float64 else torch.float32
    batch, groups, heads = choice([1, 2, 3]), choice([1, 2, 4]), 4
    n, pattern = choice(tokens), choice([Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS])
    m = n if pattern is Pattern.NONCAUSAL_SELF else choice([n, n, *others])
    given = tensors(batch, heads, groups, n, m, choice(widths), choice([*widths, 3]), dtype)
    lengths = memory_lengths = valid = None
    if pick.random() < 0.5:
        lengths = torch.randint(0, n + 1, (batch,))
        together = n == m and pick.random() < 0.7
        memory_lengths = lengths if together else torch.randint(0, m + 1, (batch,))
        valid = torch.arange(n) < lengths[:, None]
    where = ranks(Call(pattern, lengths=lengths, memory_lengths=memory_lengths), n, m, torch.device("cpu"))
    if not pattern.cross and pick.random() < 0.2:
        where, valid = gaps(batch, n, m, choice(["counted", "any"])), None
    if valid is not None and dtype is not torch.float64:
        where = replace(where, plain=False)  # otherwise kernels need not hide anything from padding
    rule = choice(["softmax", "softmax", *ACTIVATIONS])
    problem = Problem(**given, ranks=where, visibility=Visibility(), rule=rule, valid=valid)
    problem.shift = 0.0 if rule == "softmax" else -0.5
    if not pattern.cross:
        kind = choice(["none", "left", "both", "block", "all"])
        left = choice([0, 1, 4, 9, 50]) if kind in ("left", "both", "all") else None
        right = choice([0, 2, 5, 60]) if kind in ("both", "all") else None
        size = choice([1, 3, 8, block // 2, 50, block]) if kind in ("block", "all") else None
        near = (choice([0, 1, 2]), choice([0, 1])) if size else (0, 0)
        problem.visibility = Visibility(pattern.causal, left, right, size, *near)
    if pick.random() < 0.5:
        shape = [choice([1, batch]), choice([1, heads]), choice([1, n]), choice([1, m])]
        problem.bias = torch.randn(shape).to(side)
        problem.bias[torch.rand(shape) < 0.2] = -math.inf
    if pick.random() < 0.4:
        problem.table = torch.randn(choice([1, heads]), 2 * (n + m) + 1).to(side)
    if pick.random() < 0.4:
        visible = torch.rand(choice([1, batch]), choice([1, heads]), 3, 4) > 0.4
        problem.blocks = BlockMask(visible, choice([5, block // 2, block]))
    problem.softcap = choice([None, None, 2.0])
    problem.sink = torch.randn(heads).to(side) if rule == "softmax" and pick.random() < 0.3 else None
    return problem
