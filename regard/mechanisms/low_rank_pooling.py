r"""Low-rank pooling (LAMA): m attention heads pool a sequence into m vectors, scoring tokens by rank-1 bilinear forms.

When to pick it: a small classifier of texts or time series that should look at several aspects of its input with almost
no parameters (2 D m, plus D for the context), and show which tokens it used.
When not: mixing tokens with each other (it is a pooler, not self-attention), or long inputs where single tokens matter:
scores are in [-1, 1], so no weight exceeds e^2 times another; a learned `temperature` lifts this limit.

Definition (Mehta et al., arXiv 1912.00835; version 1, equation 3.13), for context c and tokens h_t:

    f_t = tanh((P^T c) * (Q^T h_t)),   f_t <- f_t / ||f_t||_2 (over heads),   A = softmax over t of f,   M = A H

| paper | here |
|---|---|
| H, rows h_t (B, N, D) | `x` |
| P, Q (D, m) | `p` (E, m, r), `q` (D, m, r), with r = 1 |
| c | `c` (E,), learned; or computed from the tokens with `context="mean"` (LAMA + ctx), `"max"`, `"last"` |
| A (B, m, N) | `extras["weights"]` with `want={"weights"}`, on right-padded tokens |
| M (B, m, D) | the output |

Layout: the output (B, m, D) has no token axis; packed documents give one row each. A sequence without tokens gives 0.
With m = 1 the norm over heads is omitted: it would make every score +-1 with zero gradient.
With a learned context each head is an online softmax with a state of m (D + 2) numbers in all: `stream`, and the
layer's `state`, pool a sequence in pieces. Other contexts change with every token, so the past would have to be scored
again.
Deviations: f is divided by max(||f||, eps) (a token of zeros has ||f|| = 0); rank r > 1 sums r products before
the tanh (low-rank bilinear pooling); `temperature` divides f and `scale` multiplies it; `norm="tokens"` divides by the
norm over tokens; `diversity=True` returns ||A A^T - I||_F^2, averaged over sequences (structured self-attention, Lin et
al., arXiv 1703.03130). The context is pooled from `x` itself, not from word embeddings below an encoder.
The paper's baselines (the mean, one head of additive attention, structured self-attention) are in
:mod:`regard.layers.pooling`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.apply import apply
from regard.contract import (
    Call,
    Context,
    Cost,
    Kind,
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
from regard.core.precision import wide_dtype
from regard.core.ragged import gathering
from regard.engines import softmax_scan as scan
from regard.engines.softmax_scan import Carry, ScanState
from regard.layers.checks import check_state, check_tokens, given_context
from regard.layers.pooling import pool_by_scores

if TYPE_CHECKING:
    from jaxtyping import Float

CONTEXTS = ("learned", "mean", "max", "last")
ACTIVATIONS = ("tanh", None)
NORMS = ("heads", "tokens", None)
INITS = ("kaiming", "dim")


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        context: c is ``learned``, or the ``mean``, ``max`` or ``last`` of the valid tokens.
        activation: ``tanh``, or None to use the bilinear form itself.
        norm: divide f by its norm over ``heads`` (for each token), over ``tokens`` (for each head), or not at all
            (None).
        diversity: return each sequence's penalty ||A A^T - I||_F^2 as the loss ``diversity``.
        eps: lower bound of the norm in the division, > 0.
    """

    context: str = "learned"
    activation: str | None = "tanh"
    norm: str | None = "heads"
    diversity: bool = False
    eps: float = 1e-6

    def __post_init__(self) -> None:
        one_of("context", self.context, CONTEXTS)
        one_of("activation", self.activation, ACTIVATIONS)
        one_of("norm", self.norm, NORMS)
        if self.eps <= 0:
            raise Unsupported(f"eps={self.eps}", supported="eps > 0", nearest="eps=1e-6")


def reference(
    call: Call,
    x: Float[Tensor, "b n d"],
    p: Float[Tensor, "e s r"],
    q: Float[Tensor, "d s r"],
    c: Float[Tensor, " e"] | None = None,
    temperature: Float[Tensor, " s"] | None = None,
) -> Float[Tensor, "b s d"]:
    """The definition, with each head's full bilinear matrix P_i Q_i^T (E, D)."""
    config: Config = call.config
    _check(config, x, p, q, c)
    batch, n, dim = x.shape
    slots = p.shape[1]
    if n == 0:
        return x.new_zeros(batch, slots, dim)
    contexts = {"mean": x.mean(1), "max": x.amax(1), "last": x[:, -1]}
    context = contexts[config.context] if c is None else c.expand(batch, -1)
    f = torch.stack([torch.einsum("be,ed,bnd->bn", context, p[:, i] @ q[:, i].T, x) for i in range(slots)], 1)
    f = f.tanh() if config.activation == "tanh" else f
    if config.norm == "heads" and slots > 1:
        f = f / f.norm(dim=1, keepdim=True).clamp(min=config.eps)
    if config.norm == "tokens":
        f = f / f.norm(dim=2, keepdim=True).clamp(min=config.eps)
    f = call.scale * f if temperature is None else call.scale * f / temperature[:, None]
    return f.softmax(-1) @ x


def parallel(
    call: Call,
    x: Float[Tensor, "b n d"],
    p: Float[Tensor, "e s r"],
    q: Float[Tensor, "d s r"],
    c: Float[Tensor, " e"] | None = None,
    temperature: Float[Tensor, " s"] | None = None,
) -> Result:
    """Score every token, then one softmax over the tokens: O(m N D), with the weights (B, m, N) in memory."""
    scores, valid = _scores(call, x, p, q, c, temperature), call.valid_queries(x.shape[1])
    return pool_by_scores(x, scores, valid, diversity=call.config.diversity, want=call.want)


def stream(
    call: Call,
    x: Float[Tensor, "b n d"],
    p: Float[Tensor, "e s r"],
    q: Float[Tensor, "d s r"],
    c: Float[Tensor, " e"] | None = None,
    temperature: Float[Tensor, " s"] | None = None,
) -> Result:
    """Continue with any number of tokens after those of `call.state`: return the pool of all tokens so far and the new
    state.

    Raises:
        Unsupported: unless the context is learned and the norm is not over tokens, or if extras need all weights.
    """
    config: Config = call.config
    if config.context != "learned" or config.norm == "tokens":
        raise Unsupported(
            f"streaming with context={config.context!r} and norm={config.norm!r}, which need the whole sequence",
            supported='context="learned" and norm="heads" or None',
        )
    if config.diversity or "weights" in call.want:
        raise Unsupported("the diversity loss or the weights of a stream", supported="a whole sequence")
    scores = _scores(call, x, p, q, c, temperature)
    valid = call.valid_queries(x.shape[1])
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None], -torch.inf)
    carry: Carry | None = None if call.state is None else call.state.carry
    after = scan.absorb(scores.mT[:, None], x[:, None], state=carry)
    length = torch.full(x.shape[:1], x.shape[1], device=x.device) if call.lengths is None else call.lengths
    length = length if call.state is None else call.state.length + length
    return Result(scan.normalized(after.u, after.w)[:, 0].to(x.dtype), ScanState(*after, length))


def _scores(call: Call, x: Tensor, p: Tensor, q: Tensor, c: Tensor | None, temperature: Tensor | None) -> Tensor:
    """f for each head and token, (B, m, N), in at least float32."""
    config: Config = call.config
    _check(config, x, p, q, c)
    dtype = wide_dtype(x)
    x, p, q = x.to(dtype), p.to(dtype), q.to(dtype)
    context = _pool_context(call, x) if c is None else c.to(dtype).expand(x.shape[0], -1)
    projected = torch.einsum("be,esr->bsr", context, p)
    f = torch.einsum("bsr,dsr,bnd->bsn", projected, q, x).to(dtype)  # autocast narrows it
    if config.activation == "tanh":
        f = f.tanh()
    # Clamping the squared norm gives gradient 0 at f = 0, where the gradient of the norm is undefined.
    if config.norm == "heads" and f.shape[1] > 1:
        f = f * f.square().sum(1, keepdim=True).clamp(min=config.eps**2).rsqrt()
    if config.norm == "tokens":
        f = f * f.square().sum(2, keepdim=True).clamp(min=config.eps**2).rsqrt()  # padding is 0, and f(0) = 0
    f = call.scale * f
    return f if temperature is None else f / temperature.to(dtype)[:, None]


def _check(config: Config, x: Tensor, p: Tensor, q: Tensor, c: Tensor | None) -> None:
    check_tokens(x, q.shape[0])
    if (c is None) == (config.context == "learned"):
        raise Unsupported(
            f"context={config.context!r} with" + (" no c" if c is None else " c"),
            supported='c (E,) with context="learned", and no c otherwise',
        )
    if c is None and p.shape[0] != x.shape[-1]:
        raise Unsupported(f"p of {p.shape[0]} rows for a context of {x.shape[-1]} features", supported="equal numbers")


def _pool_context(call: Call, x: Tensor) -> Tensor:
    """The mean, maximum or last of each row's valid tokens; zero for a row without tokens."""
    batch, n, dim = x.shape
    if n == 0:
        return x.new_zeros(batch, dim)
    lengths = call.lengths
    if call.config.context == "mean":
        return x.mean(1) if lengths is None else x.sum(1) / lengths.clamp(min=1)[:, None]
    if lengths is None:
        return x.amax(1) if call.config.context == "max" else x[:, -1]
    some = (lengths > 0)[:, None]
    if call.config.context == "last":
        rows = torch.arange(batch, device=x.device)
        return torch.where(some, x[rows, (lengths - 1).clamp(min=0)], 0)
    valid = call.valid_queries(n)
    assert valid is not None
    return torch.where(some, x.masked_fill(~valid[..., None], torch.finfo(x.dtype).min).amax(1), 0)


class LowRankPooling(nn.Module):
    """Low-rank pooling as a layer, (B, N, D) -> (B, slots, D).

    Args:
        card: the mechanism.
        dim: width D of the tokens.
        num_heads: number of slots m, unless `slots` is given.
        pattern: noncausal-self.
        slots: number of slots; `num_heads` when None.
        rank: r of each head's bilinear form.
        temperature: whether to learn a temperature for each slot, initially 1.
        init: bound of the uniform initialisation of P and Q: ``kaiming``, 1 / sqrt(m r) (the bound of the known
            implementation, whose fan-in is m), or ``dim``, 1 / sqrt(D), which keeps the scale of scores at every width.
        config: the mechanism's options.
    """

    def __init__(
        self,
        card: Mechanism,
        dim: int,
        num_heads: int,
        *,
        pattern: str | Pattern = Pattern.NONCAUSAL_SELF,
        slots: int | None = None,
        rank: int = 1,
        temperature: bool = False,
        init: str = "kaiming",
        config: Any = None,
    ) -> None:
        super().__init__()
        self.card, self.pattern = card, card.require_pattern(pattern)
        self.config: Config = card.options() if config is None else config
        slots = num_heads if slots is None else slots
        at_least("slots", slots, 1)
        at_least("rank", rank, 1)
        one_of("init", init, INITS)
        bound = (slots * rank if init == "kaiming" else dim) ** -0.5
        self.p = nn.Parameter(torch.empty(dim, slots, rank).uniform_(-bound, bound))
        self.q = nn.Parameter(torch.empty(dim, slots, rank).uniform_(-bound, bound))
        self.c = nn.Parameter(0.1 * torch.randn(dim)) if self.config.context == "learned" else None
        self.log_temperature = nn.Parameter(torch.zeros(slots)) if temperature else None

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        memory: None = None,
        *,
        context: Context | None = None,
        state: ScanState | None = None,
    ) -> Result:
        """Pool each sequence.

        Args:
            x: tokens, padded anywhere or packed, as described by `context.mask`.
            state: state to continue from. The output is then the pool of all tokens so far, and the result has the new
                state; ``want={"state"}`` starts one.

        Returns:
            output (B, slots, D), one row per document when packed.
        """
        context = given_context(context)
        check_state(state, ScanState, self.card.name)
        if memory is not None:
            raise Unsupported(f"memory with {self.card.name}", supported="layer(x)", nearest="softmax")
        weights = {"x": x, "p": self.p, "q": self.q, "c": self.c}
        weights["temperature"] = None if self.log_temperature is None else self.log_temperature.exp()
        inputs = {name: tensor for name, tensor in weights.items() if tensor is not None}
        want = context.want - {"state"}
        if state is None and "state" not in context.want:
            return apply(
                self.card,
                inputs,
                pattern=self.pattern,
                mask=context.mask,
                config=self.config,
                roles=context.roles,
                want=want,
            )
        mask = context.mask
        if context.roles is not None or (mask is not None and (mask.bias is not None or mask.blocks is not None)):
            raise Unsupported(
                f"{self.card.name} with roles, a bias or a block mask", supported="valid, lengths and cu_seqlens masks"
            )
        layout = gathering(mask, x.shape[0], x.shape[1], x.device)
        inputs["x"] = layout.gather(x, axis=1)
        return stream(Call(self.pattern, self.config, lengths=layout.lengths, state=state, want=want), **inputs)


def slot_logits(pooled: Float[Tensor, "b s d"], head: nn.Linear) -> Float[Tensor, "b s classes"]:
    """Each slot's contribution to the logits of a linear classifier on concatenated slots, without the bias."""
    weight = head.weight.unflatten(1, pooled.shape[1:])  # (classes, s, d)
    return torch.einsum("bsd,csd->bsc", pooled, weight)


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    pattern: Pattern,
    config: Config,
    sizes: dict[str, int],
) -> Tensors:
    """Inputs for tests: three slots of rank 2, and a context if the options need one."""
    dim, slots, rank = sizes.get("d", 8), sizes.get("s", 3), sizes.get("r", 2)
    width = dim if config.context != "learned" else dim + 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = {"x": normal(batch, n, dim), "p": normal(width, slots, rank), "q": normal(dim, slots, rank)}
    if config.context == "learned":
        inputs["c"] = normal(width)
    return inputs | {"temperature": normal(slots).abs() + 0.5}


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    """Axis sizes: as many slots as heads, with rank 1."""
    return {"s": shape.heads, "r": 1}


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of scores and pooled sums; when streaming, of a running softmax for each slot."""
    work = shape.batch * shape.heads * shape.dim_value
    return Cost(
        flops=4.0 * work * shape.n,
        memory=2.0 * shape.batch * shape.heads * shape.n,
        state=float(shape.heads * (shape.dim_value + 2)),
        step_flops=4.0 * work,
    )


_WITHOUT_TOKENS = "the output has no token axis; layer(x, state=state) pools a sequence in pieces"
_WITHOUT_MEMORY = "the context is one vector, not a sequence of queries"

MECHANISM = Mechanism(
    name="low_rank_pooling",
    aliases=("lama", "low_rank_attention", "compact_attention"),
    kind=Kind.POOLING,
    summary="Heads pool a sequence into as many vectors, each scoring tokens by a rank-1 bilinear form with one context.",
    paper=Paper("Low Rank Factorization for Compact Multi-Head Self-Attention", "1912.00835", 2019, 49),
    inputs={"x": "bnd", "p": "esr", "q": "dsr", "c?": "e", "temperature?": "s"},
    output="bsd",
    patterns=(Pattern.NONCAUSAL_SELF,),
    refused={
        Pattern.CAUSAL_SELF: _WITHOUT_TOKENS,
        Pattern.NONCAUSAL_CROSS: _WITHOUT_MEMORY,
        Pattern.CAUSAL_CROSS: _WITHOUT_MEMORY,
    },
    forms={"reference": reference, "parallel": parallel},
    config=Config,
    variants={
        "bilinear": {"activation": None, "norm": "tokens"},
        "mean": {"context": "mean", "eps": 1e-3},
        "maximum": {"context": "max", "norm": None},
        "last token": {"context": "last", "diversity": True},
    },
    cost=cost,
    axis_sizes=axis_sizes,
    default_scale=1.0,
    honours=frozenset({"weights"}),
    weights="exact",
    accepts_positions=("none",),
    domains={"temperature": "positive"},
    sample_inputs=sample_inputs,
    module=LowRankPooling,
)
