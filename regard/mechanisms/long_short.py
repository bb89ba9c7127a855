r"""Long-short attention: one softmax over nearby tokens and landmarks, weighted means of all tokens or of segments.

When to pick it: long texts where detail matters nearby and the rest can be summarised in a few vectors; time is linear
in N (noncausal), or N times the few landmarks of the past (causal).
When not: exact recall of far tokens (a landmark is a mean, weighted before the query is known), or cross attention.

Definition (Zhu et al., arXiv 2107.02192, section 3; the `LongShort` of CAB, arXiv 2210.07661). With scores p_j for r
landmarks per head, linear in token j,

    K~ = sum_j softmax_j(p_j) k_j,   V~ = sum_j softmax_j(p_j) v_j             over all j, or over the j of each segment
    o_i = softmax of tau q_i . k over { LN(k_j), j near i } and { LN'(K~) }, with LN(v_j) and LN'(V~)

| | noncausal-self | causal-self |
|---|---|---|
| near i | its segment of w tokens and max(1, floor(w / 2)) tokens on each side | the last w tokens, i included |
| landmarks | r of all tokens (`landmarks`) | r of each segment of l tokens (`rank`, `segment`) before the segment of i |

| paper | here |
|---|---|
| w, l | `window` (None for CAB's 15 and 256), `segment` |
| r of each | `landmarks`, `rank` |
| logits of P (dynamic projection) | `p` (B, H, M, r) |
| LN_L, LN_G (DualLN) | norms of tokens, applied by the layer, and of landmarks: `norm_weight`, `norm_bias` (H, D) |
| K, V before LN_L | `k_raw`, `v_raw`, from which landmarks are computed; k and v when omitted |

Layout: (B, H, N, D). Both norms are over all heads together, with one set of weights for keys and values, so values
must be as wide as keys when there is a norm. Ranks and segments count valid tokens.
State: the last w - 1 tokens, the landmarks of complete segments, and the sums of the incomplete one.
Deviations: scores are a linear map of the layer's input, as in the authors' code; in the paper, of the keys.
The authors' noncausal code normalises tokens before it computes landmarks from them: `normalize_first`. Their causal
code begins with a memory of zeros, which are keys with weights of their own; here nothing precedes the first token. Its
Transformer-XL relative positions are not implemented: positions are added to tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import (
    Call,
    Cost,
    Kind,
    LayerCall,
    LayerSpec,
    Mechanism,
    Paper,
    Pattern,
    Projection,
    Result,
    Shape,
    State,
    Tensors,
    Unsupported,
    Waiver,
    at_least,
    lengths_after,
    state_field,
    valid_from_lengths,
)
from regard.core.padding import pad_tokens
from regard.core.precision import wide, without_autocast
from regard.core.ragged import values_known
from regard.core.sampling import normals
from regard.core.visibility import block_numbers
from regard.engines.attention import Ranks, Visibility, attention_reference
from regard.engines.attention_forms import attend_to_part
from regard.engines.cache import WindowState, append_rows, extend_window
from regard.engines.merging import merge

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        window: w >= 1; None for 15 in noncausal-self and 256 in causal-self.
        landmarks: r for the whole sequence in noncausal-self, >= 1.
        segment: l >= 1, tokens per segment in causal-self.
        rank: r for each segment in causal-self, >= 1.
        dual_norm: whether the layer normalises tokens and landmarks.
        normalize_first: whether landmarks are computed from normalised tokens.
        norm_eps: added to the variance, > 0.
    """

    window: int | None = None
    landmarks: int = 16
    segment: int = 32
    rank: int = 1
    dual_norm: bool = True
    normalize_first: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("landmarks", "segment", "rank"):
            at_least(name, getattr(self, name), 1)
        if self.window is not None:
            at_least("window", self.window, 1)
        if not self.norm_eps > 0:
            raise Unsupported(f"norm_eps={self.norm_eps}", supported="norm_eps > 0", nearest="norm_eps=1e-05")
        if self.normalize_first and not self.dual_norm:
            raise Unsupported(
                "normalize_first without norms", supported="dual_norm=True", nearest="normalize_first=False"
            )

    def width(self, pattern: Pattern) -> int:
        """w, the window width for a pattern."""
        if self.window is not None:
            return self.window
        return 256 if pattern.causal else 15

    def count(self, pattern: Pattern) -> int:
        """r, the number of landmarks for a pattern."""
        return self.rank if pattern.causal else self.landmarks


@dataclass(frozen=True)
class Segment(State):
    """Sums over an incomplete segment's tokens of exp(p - top), alone and times keys and values."""

    top: Float[Tensor, "b h r"] = state_field(fill=-torch.inf)
    weight: Float[Tensor, "b h r"] = state_field()
    k: Float[Tensor, "b h r d"] = state_field()
    v: Float[Tensor, "b h r v"] = state_field()


@dataclass(frozen=True)
class LongShortState(WindowState):
    """The last tokens, the landmarks of complete segments in each row's first slots, and the incomplete segment."""

    segment: Segment = state_field()
    keys: Float[Tensor, "b h slots d"] = state_field()
    values: Float[Tensor, "b h slots v"] = state_field()


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    p: Float[Tensor, "b h m r"],
    k_raw: Float[Tensor, "b h m d"] | None = None,
    v_raw: Float[Tensor, "b h m v"] | None = None,
    norm_weight: Float[Tensor, "h d"] | None = None,
    norm_bias: Float[Tensor, "h d"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, with one matrix of weights over tokens and landmarks."""
    config, w = _checked(call, v, p, norm_weight, norm_bias), call.config.width(call.pattern)
    n, m, size = q.shape[2], k.shape[2], call.config.segment
    i, j = torch.arange(m - n, m, device=q.device)[:, None], torch.arange(m, device=q.device)
    if call.pattern.causal:
        near = (j <= i) & (j > i - w)
        segments = [slice(start, start + size) for start in range(0, m - m % size, size)]
        number = torch.arange(len(segments) * config.rank, device=q.device) // config.rank
        far = i >= (number + 1) * size
    else:
        start, side = i.div(w, rounding_mode="floor") * w, max(1, w // 2)
        near = (j >= start - side) & (j < start + w + side)
        segments = [slice(0, m)] if m else []
        far = torch.ones(n, len(segments) * config.landmarks, dtype=torch.bool, device=q.device)
    both = []
    for tokens, raw in ((k, k_raw), (v, v_raw)):
        raw = tokens if raw is None else raw
        means = [p[:, :, part].softmax(2).mT @ raw[:, :, part] for part in segments]
        landmarks = torch.cat(means, 2) if means else tokens[:, :, :0]
        both.append(torch.cat([tokens, _normalized(config, landmarks, norm_weight, norm_bias)], 2))
    visible = torch.cat([near, far], 1)
    return attention_reference(q, both[0], both[1], visible, lambda scores: scores.softmax(-1), call.scale)


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    p: Float[Tensor, "b h m r"],
    k_raw: Float[Tensor, "b h m d"] | None = None,
    v_raw: Float[Tensor, "b h m v"] | None = None,
    norm_weight: Float[Tensor, "h d"] | None = None,
    norm_bias: Float[Tensor, "h d"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """Two attentions merged by their log-sum-exps: segments with their surroundings, and landmarks."""
    if call.pattern.causal:
        return chunked(call, q, k, v, p, k_raw, v_raw, norm_weight, norm_bias).output
    config, n = _checked(call, v, p, norm_weight, norm_bias), q.shape[2]
    lengths = lengths_after(None, call.lengths, q.shape[0], n, q.device)
    if q.numel() == 0:
        return torch.zeros_like(v)
    near = _near(call, q, k, v, lengths)
    scores = wide(p).masked_fill(~valid_from_lengths(lengths, n)[:, None, :, None], -torch.inf)
    open_ = torch.where((lengths > 0)[:, None, None, None], scores, 0)  # a softmax over -inf alone has no gradient
    weights = open_.softmax(2).mT
    keys, values = (
        _normalized(config, weights @ wide(tokens if raw is None else raw), norm_weight, norm_bias)
        for tokens, raw in ((k, k_raw), (v, v_raw))
    )
    slots = torch.arange(keys.shape[2], device=q.device)
    exists = torch.where((lengths > 0)[:, None], slots, -1)
    where = Ranks(torch.arange(n, device=q.device)[None], exists, None, None, plain=False)
    far = attend_to_part(call, wide(q), keys, values, where, Visibility())
    return merge(*zip(near, far, strict=True)).to(q.dtype)


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    p: Float[Tensor, "b h m r"],
    k_raw: Float[Tensor, "b h m d"] | None = None,
    v_raw: Float[Tensor, "b h m v"] | None = None,
    norm_weight: Float[Tensor, "h d"] | None = None,
    norm_bias: Float[Tensor, "h d"] | None = None,
) -> Result:
    """Causal-self with state in and out, for any number of tokens; also used as the step."""
    config, w = _checked(call, v, p, norm_weight, norm_bias), call.config.width(call.pattern)
    window, keys, values, where = extend_window(call, k, v, q.shape[2], w - 1)
    raw = (k if k_raw is None else k_raw), (v if v_raw is None else v_raw)
    landmarks, segment = _extend_landmarks(call, *raw, p, norm_weight, norm_bias)
    state = LongShortState(window.k, window.v, window.length, segment, *landmarks)
    near = attend_to_part(call, wide(q), keys, values, where, Visibility(causal=True, left=w - 1))
    slots = torch.arange(state.keys.shape[2], device=q.device)[None]
    opened = (block_numbers(slots, config.rank) + 1) * config.segment  # the first rank that reads each landmark
    there = Ranks(where.queries, opened, None, None, plain=False)
    far = attend_to_part(call, wide(q), state.keys, state.values, there, Visibility(causal=True))
    return Result(merge(*zip(near, far, strict=True)).to(q.dtype), state)


def _checked(call: Call, v: Tensor, p: Tensor, weight: Tensor | None, bias: Tensor | None) -> Config:
    config: Config = call.config
    if p.shape[-1] != config.count(call.pattern):
        raise Unsupported(
            f"long_short with scores of {p.shape[-1]} landmarks in {call.pattern.value}",
            supported=f"{config.count(call.pattern)}, the option {'rank' if call.pattern.causal else 'landmarks'}",
        )
    if (weight is None) != (bias is None):
        raise Unsupported("long_short with one of norm_weight and norm_bias", supported="both, or neither")
    if weight is not None and weight.shape[-1] != v.shape[-1]:
        raise Unsupported(
            f"long_short with values of {v.shape[-1]} features and a norm of {weight.shape[-1]}",
            supported="values as wide as keys, or no norm",
        )
    return config


def _normalized(
    config: Config, x: Float[Tensor, "b h s d"], weight: Tensor | None, bias: Tensor | None
) -> Float[Tensor, "b h s d"]:
    """LayerNorm of each landmark over all heads together."""
    if weight is None or bias is None:
        return x
    heads = x.shape[1]
    flat = x.transpose(1, 2).flatten(2)
    flat = F.layer_norm(flat, flat.shape[2:], weight.flatten().to(x.dtype), bias.flatten().to(x.dtype), config.norm_eps)
    return flat.unflatten(2, (heads, -1)).transpose(1, 2)


def _near(
    call: Call, q: Tensor, k: Tensor, v: Tensor, lengths: Int[Tensor, " b"]
) -> tuple[Float[Tensor, "b h n v"], Float[Tensor, "b h n"]]:
    """Each segment of w tokens attends to itself and the tokens around it; segments are batched as rows."""
    w = call.config.width(call.pattern)
    side, n = max(1, w // 2), q.shape[2]
    count = -(-n // w)
    queries = wide(pad_tokens(q, 0, count * w - n)).unflatten(2, (count, w)).transpose(1, 2).flatten(0, 1)
    keys, values = (
        F.pad(x, (0, 0, side, count * w - n + side)).unfold(2, w + 2 * side, w).permute(0, 2, 1, 4, 3).flatten(0, 1)
        for x in (k, v)
    )
    rank = torch.arange(count, device=q.device)[:, None] * w + torch.arange(-side, w + side, device=q.device)
    exists = (rank >= 0) & (rank < lengths[:, None, None])
    slots = torch.arange(w + 2 * side, device=q.device)
    where = Ranks(slots[None, :w], torch.where(exists, slots, -1).flatten(0, 1), None, None, plain=False)
    output, lse = attend_to_part(call, queries, keys, values, where, Visibility())

    def together(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3)[:, :, :n]

    return together(output), together(lse)


def _extend_landmarks(
    call: Call, k: Tensor, v: Tensor, p: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[tuple[Tensor, Tensor], Segment]:
    """Landmarks of all segments complete after the new tokens, and the sums of the incomplete segment."""
    config: Config = call.config
    past: LongShortState | None = call.state
    size, r, m = config.segment, config.rank, k.shape[2]
    new = lengths_after(None, call.memory_lengths, k.shape[0], m, k.device)
    before = torch.zeros_like(new) if past is None else past.length
    complete = before // size
    closed = (before + new) // size - complete
    count = (m + size - 1) // size + 1  # segments that may have new tokens, and one not yet begun
    place = complete[:, None] * size + torch.arange(count * size, device=k.device) - before[:, None]
    inside = ((place >= 0) & (place < new[:, None]))[:, None, :, None]
    index = place.clamp(0, max(m - 1, 0))

    def segments(x: Tensor) -> Tensor:
        if m == 0:
            return wide(x).new_zeros(*x.shape[:2], count, size, x.shape[3])
        taken = x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
        return torch.where(inside, wide(taken), 0).unflatten(2, (count, size))

    scores = segments(p).masked_fill(~inside.unflatten(2, (count, size)), -torch.inf).mT  # (b, h, count, r, size)
    top = scores.detach().amax(-1)
    known = None if past is None else past.segment
    if known is not None:
        top = torch.cat([torch.maximum(top[:, :, :1], known.top[:, :, None]), top[:, :, 1:]], 2)
    safe = torch.where(top != -torch.inf, top, 0)
    weights = (scores - safe[..., None]).exp()
    with without_autocast(k.device):
        sums = [weights.sum(-1, keepdim=True), weights @ segments(k), weights @ segments(v)]
    if known is not None:
        share = (known.top - safe[:, :, 0]).exp()[..., None]
        old = (known.weight[..., None], known.k, known.v)
        sums = [
            torch.cat([x[:, :, :1] + (share * y)[:, :, None], x[:, :, 1:]], 2) for x, y in zip(sums, old, strict=True)
        ]
    total = torch.where(sums[0] > 0, sums[0], 1)
    landmarks = [_normalized(config, (x / total).flatten(2, 3), weight, bias) for x in sums[1:]]
    if past is not None:
        landmarks = [
            append_rows(x, complete * r, y, closed * r)
            for x, y in zip((past.keys, past.values), landmarks, strict=True)
        ]
    elif values_known(closed):
        # at least one segment, even if no query sees it yet, so that scores get a zero gradient rather than None
        most = max(int(closed.max()) if closed.numel() else 0, 1)
        landmarks = [x[:, :, : most * r] for x in landmarks]

    def last(x: Tensor) -> Tensor:
        where = closed.view(-1, 1, 1, *[1] * (x.ndim - 3)).expand(-1, x.shape[1], 1, *x.shape[3:])
        return x.gather(2, where)[:, :, 0]

    return (landmarks[0], landmarks[1]), Segment(last(top), last(sums[0])[..., 0], last(sums[1]), last(sums[2]))


class DualNorm(Projection):
    """Supplies a layer's heads with landmark scores and both norms.

    Args:
        spec: the layer's specification.
    """

    for_one_pattern = True  # the pattern decides how many landmarks there are

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config: Config = spec.config
        self.heads = spec.kv_heads
        self.scores = spec.linear(spec.dim, spec.kv_heads * config.count(spec.pattern))
        self.normalize_first = config.normalize_first
        self.token_norm = self.landmark_norm = None
        if config.dual_norm:
            if spec.value_dim != spec.head_dim:
                raise Unsupported(
                    f"long_short with head_dim={spec.head_dim} and value_dim={spec.value_dim}, which share norms",
                    supported="equal widths, or dual_norm=False",
                    nearest=f"value_dim={spec.head_dim}",
                )
            width = spec.kv_heads * spec.head_dim
            self.token_norm = nn.LayerNorm(width, eps=config.norm_eps)
            self.landmark_norm = nn.LayerNorm(width, eps=config.norm_eps)

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        source = call.memory
        assert source is not None  # self patterns have it
        heads = heads | {"p": self.scores(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)}
        if self.token_norm is None or self.landmark_norm is None:
            return heads
        if not self.normalize_first:
            heads |= {"k_raw": heads["k"], "v_raw": heads["v"]}
        for name in ("k", "v"):
            flat = self.token_norm(heads[name].transpose(1, 2).flatten(2))
            heads[name] = flat.unflatten(2, (self.heads, -1)).transpose(1, 2)
        weight, bias = self.landmark_norm.weight, self.landmark_norm.bias
        return heads | {
            "norm_weight": weight.unflatten(0, (self.heads, -1)),
            "norm_bias": bias.unflatten(0, (self.heads, -1)),
        }


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
) -> Tensors:
    """Random inputs for tests, optional ones included; values are as wide as keys."""
    widths = {"h": 2, "d": 8} | (sizes or {})
    heads, width = widths["h"], widths["d"]
    keys = (batch, heads, m, width)
    shapes = {
        "q": (batch, heads, n, width),
        "k": keys,
        "v": keys,
        "p": (*keys[:3], config.count(pattern)),
        "k_raw": keys,
        "v_raw": keys,
        "norm_weight": (heads, width),
        "norm_bias": (heads, width),
    }
    return normals(generator, shapes, dtype)


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the causal pattern with N = M (scaled in proportion for n < M queries)."""
    width, heads, m = shape.dim_key + shape.dim_value, shape.batch * shape.heads, shape.m
    w = config.width(Pattern.CAUSAL_SELF)
    full = min(w, m)
    near = (full * (full + 1) / 2 + (m - full) * full) / max(m, 1)
    landmarks = m // config.segment * config.rank
    return Cost(
        flops=2.0 * heads * width * (shape.n * (near + landmarks / 2) + m * config.rank),
        memory=float(heads * (shape.n * (shape.dim_value + 2) + landmarks * width)),
        state=float(shape.heads * (width * (w - 1 + landmarks + config.rank) + 2 * config.rank)),
        step_flops=2.0 * heads * width * (min(w, m + 1) + landmarks + config.rank),
    )


NO_PLACE = "memory tokens have no position relative to a query"

MECHANISM = Mechanism(
    name="long_short",
    aliases=("transformer_ls", "long_short_transformer", "dual_norm_window"),
    kind=Kind.ATTENTION,
    summary="One softmax over the tokens near a query and over landmarks, weighted means of all tokens or of segments.",
    paper=Paper(
        "Long-Short Transformer: Efficient Transformers for Language and Vision",
        "2107.02192",
        2021,
        34,
    ),
    inputs={
        "q": "bhnd",
        "k": "bhmd",
        "v": "bhmv",
        "p": "bhmr",
        "k_raw?": "bhmd",
        "v_raw?": "bhmv",
        "norm_weight?": "hd",
        "norm_bias?": "hd",
    },
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
    refused={Pattern.NONCAUSAL_CROSS: NO_PLACE, Pattern.CAUSAL_CROSS: NO_PLACE},
    forms={"reference": reference, "parallel": parallel, "chunked": chunked, "step": chunked},
    config=Config,
    variants={
        "narrow": {"window": 1, "segment": 1, "landmarks": 1},
        "several landmarks": {"window": 3, "segment": 4, "rank": 2, "landmarks": 3},
        "no norms": {"window": 8, "segment": 5, "dual_norm": False},
        "norms first": {"window": 2, "segment": 3, "rank": 3, "normalize_first": True, "norm_eps": 0.1},
    },
    engine="attention",
    state=LongShortState,
    cost=cost,
    honours=frozenset({"dropout"}),
    weights="implicit",
    accepts_positions=("none", "sinusoidal", "learned"),
    refused_positions="its landmarks are mixtures of keys at many positions",
    projection=DualNorm,
    sample_inputs=sample_inputs,
    waivers=(
        Waiver(
            "layer_lengths",
            "its number of blocks is fixed when the program is compiled",
            patterns=(Pattern.NONCAUSAL_SELF,),
        ),
    ),
)
