r"""Transformer-XL: segments that read a memory of the preceding segment, with scores that depend on distance.

When to pick it: language models over texts longer than the training window, where a state of fixed size should carry
information from earlier segments: over l layers information travels about l M tokens. Relative scores need no positions
and extrapolate to lengths never trained on.
When not: exact recall beyond the combined reach of the layers; on a CPU, `local` with rotary positions reaches as far
and is faster, since its scores need no second product.

Definition (Dai et al., arXiv 1901.02860, section 3), for a segment of L tokens with inputs h, given the earlier
segments:

    m    = SG(the last M inputs of this layer before the segment)
    q    = h W_q^T,     k, v = [m; h] W_k^T, [m; h] W_v^T
    A_ij = tau ((q_i + u) . k_j + (q_i + w) . W_r r_{i-j}),     r_d = [sin, cos](d 10000^(-2 c / C)), c = 0 ... C/2 - 1
    o_i  = softmax over j of A_ij, j <= i, times v_j

SG stops gradients. So token i sees the tokens from M before the start of its segment up to itself, at most M + L of
them. A whole sequence read at once gives the same as its segments one after the other: a layer's memory depends only on
that layer's inputs, so all segments of a call are computed in parallel.

| paper | here |
|---|---|
| L, segment length | `segment` |
| M, memory length | `memory` |
| SG(h) W_k^T, SG(h) W_v^T | `k_past`, `v_past`: read by later segments in place of `k` and `v` (with equal values) |
| u, v (biases of the two parts) | `u`, `w`: (H, D) |
| W_{k,R} | `relative`: (H, C, D), a matrix per head that maps sinusoids of width C |
| clamp_len (of the authors' code) | `clamp` |
| tau | `scale`, D^-0.5 by default |

Layout: (B, H, N, D); keys and values may have fewer heads (grouped queries). Ranks count valid tokens. Segments begin
at ranks 0, L, 2 L, ..., however a sequence is split into calls. The function does not stop gradients itself: pass
detached `k_past` and `v_past`. In noncausal-self a token sees its whole segment (the two-way attention of XLNet, arXiv
1906.08237, of which this is the content stream).
State: keys and values of the last M + L - 1 tokens, so that any number of tokens may follow; no gradient passes through
a layer's state. In training it also holds the layer's inputs, as in the paper, and the next call projects them with its
own weights. No weight depends on L, M or `clamp`: as in the paper, a model may be rebuilt with a longer memory for
evaluation and load the trained weights. A layer stops gradients only in training mode: in evaluation mode gradients
show what an output depends on.
Deviations: the memory of a layer in a model is the input of its mixer, after the norm. The authors' models share u and
w among layers; for this, use :func:`share_biases`. Sinusoids have no dropout. Relative scores are computed in at least
float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
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
    Tensors,
    Unsupported,
    Waiver,
    at_least,
)
from regard.core.sampling import attention_shapes, normals
from regard.engines.cache import WindowState
from regard.engines.segment_attention import Distances, Reach, segment_attention
from regard.layers.segment_recurrence import SegmentLayer

if TYPE_CHECKING:
    from jaxtyping import Float

STD = 0.02


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        segment: L, the segment length, >= 1.
        memory: M, the memory length, >= 0.
        clamp: >= 0, distances beyond this count as this distance; None for no clamping.
    """

    segment: int = 32
    memory: int = 64
    clamp: int | None = None

    def __post_init__(self) -> None:
        at_least("segment", self.segment, 1)
        at_least("memory", self.memory, 0)
        if self.clamp is not None:
            at_least("clamp", self.clamp, 0)

    @property
    def cached(self) -> int:
        """The number of past tokens to keep: all that the next token may see."""
        return self.reach.cached

    @property
    def reach(self) -> Reach:
        """Segment and memory lengths for the engine."""
        return Reach(self.segment, self.memory)


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    u: Float[Tensor, "h d"] | None = None,
    w: Float[Tensor, "h d"] | None = None,
    relative: Float[Tensor, "h c d"] | None = None,
    k_past: Float[Tensor, "b g m d"] | None = None,
    v_past: Float[Tensor, "b g m v"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, one segment at a time."""
    config: Config = call.config
    groups = q.shape[1] // k.shape[1]
    k_past, v_past = k if k_past is None else k_past, v if v_past is None else v_past
    k, v, k_past, v_past = (x.repeat_interleave(groups, 1) for x in (k, v, k_past, v_past))
    outputs = []
    for start in range(0, q.shape[2], config.segment):
        own, past = slice(start, start + config.segment), slice(max(0, start - config.memory), start)
        keys, values = (
            torch.cat([k_past[:, :, past], k[:, :, own]], 2),
            torch.cat([v_past[:, :, past], v[:, :, own]], 2),
        )
        queries = q[:, :, own]
        content = queries if u is None else queries + u[:, None]
        scores = content @ keys.mT
        size, seen = queries.shape[2], keys.shape[2]
        distance = torch.arange(size, device=q.device)[:, None] - torch.arange(seen, device=q.device) + seen - size
        if relative is not None:
            rows = relative_rows(distance, relative, config.clamp)  # h i j d
            asking = queries if w is None else queries + w[:, None]
            scores = scores + torch.einsum("bhid,hijd->bhij", asking, rows)
        if call.pattern.causal:
            scores = scores.masked_fill(distance < 0, -torch.inf)
        outputs.append((call.scale * scores).softmax(-1) @ values)
    return torch.cat(outputs, 2) if outputs else v.new_zeros(*q.shape[:3], v.shape[-1])


def relative_rows(
    distance: Tensor, relative: Float[Tensor, "h c d"], clamp: int | None = None
) -> Float[Tensor, "h *distance d"]:
    """W_r r for each head, at distances of any shape."""
    width = relative.shape[1]
    distance = distance if clamp is None else distance.clamp(-clamp, clamp)
    frequency = 10_000.0 ** (-torch.arange(0, width, 2, device=relative.device, dtype=relative.dtype) / width)
    turns = distance[..., None] * frequency
    r = torch.cat([turns.sin(), turns.cos()], -1)[..., :width]
    return torch.einsum("...c,hcd->h...d", r, relative)


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    u: Float[Tensor, "h d"] | None = None,
    w: Float[Tensor, "h d"] | None = None,
    relative: Float[Tensor, "h c d"] | None = None,
    k_past: Float[Tensor, "b g m d"] | None = None,
    v_past: Float[Tensor, "b g m v"] | None = None,
) -> Result:
    """All segments in parallel; in causal-self with state in and out, for any number of tokens."""
    config: Config = call.config
    distances, past = read_optional("transformer_xl", q, k, w, relative, k_past, v_past, config.clamp)
    return segment_attention(call, q, k, v, config.reach, u=u, distances=distances, past=past)


def read_optional(
    name: str,
    q: Tensor,
    k: Tensor,
    w: Tensor | None,
    relative: Tensor | None,
    k_past: Tensor | None,
    v_past: Tensor | None,
    clamp: int | None,
) -> tuple[Distances | None, tuple[Tensor, Tensor] | None]:
    """The distance part of the scores, and the keys and values for later segments, from the inputs of the mechanism
    `name`.

    Raises:
        Unsupported: for inconsistent inputs.
    """
    if q.shape[2] != k.shape[2]:
        raise Unsupported(f"{name} with {q.shape[2]} queries and {k.shape[2]} keys", supported="a query for each key")
    if (k_past is None) != (v_past is None):
        raise Unsupported(f"{name} with k_past or v_past alone", supported="both or none")
    if w is not None and relative is None:
        raise Unsupported(f"{name} with w but without relative", supported="both, or relative alone")
    distances = None if relative is None else Distances(relative, w, clamp)
    return distances, None if k_past is None or v_past is None else (k_past, v_past)


class RelativeScores(Projection):
    """A layer's u, w and W_r. Sinusoids have the layer's width."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.empty(spec.heads, spec.head_dim))
        self.w = nn.Parameter(torch.empty(spec.heads, spec.head_dim))
        self.relative = nn.Parameter(torch.empty(spec.heads, spec.dim, spec.head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for bias in (self.u, self.w):
            nn.init.normal_(bias, std=STD)
        bound = self.relative.shape[1] ** -0.5
        nn.init.uniform_(self.relative, -bound, bound)  # as a linear layer of sinusoids

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        return heads | {"u": self.u, "w": self.w, "relative": self.relative}


def share_biases(model: nn.Module) -> nn.Module:
    """Share the first layer's u and w among all layers of a model that have them, as in the authors' models.

    Returns:
        The model, changed in place.
    """
    layers = [module for module in model.modules() if isinstance(module, RelativeScores)]
    for layer in layers[1:]:
        if layer.u.shape != layers[0].u.shape:
            raise Unsupported(
                f"biases shared by layers of {tuple(layers[0].u.shape)} and {tuple(layer.u.shape)}",
                supported="equal heads and head widths",
            )
        layer.u, layer.w = layers[0].u, layers[0].w
    return model


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    sizes: dict[str, int] | None = None,
    **_: object,
) -> Tensors:
    """Inputs for tests and timings, without `k_past` and `v_past`, which default to k and v."""
    size = {"h": 2, "g": 2, "d": 8, "v": 6, "c": 12} | (sizes or {})
    heads, width = size["h"], size["d"]
    shapes = attention_shapes(batch, n, m, size) | {"u": (heads, width), "w": (heads, width)}
    found = normals(generator, shapes | {"relative": (heads, size["c"], width)}, dtype)
    return found | {"relative": found["relative"] / size["c"] ** 0.5}


def visible_pairs(config: Config, n: int) -> int:
    """The exact number of query-key pairs for a causal sequence of `n` tokens."""
    whole, rest = divmod(n, config.segment)
    sizes = [config.segment] * whole + [rest]
    own = sum(size * (size + 1) // 2 for size in sizes)
    return own + sum(size * min(config.memory, s * config.segment) for s, size in enumerate(sizes))


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the causal pattern with N = M (scaled in proportion for n < M queries); W_r r counts as a projection."""
    width, heads = 2 * shape.dim_key + shape.dim_value, shape.batch * shape.heads
    pairs = visible_pairs(config, shape.m) * shape.n / max(shape.m, 1)
    start = shape.m // config.segment * config.segment
    return Cost(
        flops=2.0 * heads * pairs * width,
        memory=float(heads * shape.n * (config.memory + config.segment)),
        state=float(shape.heads * config.cached * (shape.dim_key + shape.dim_value)),
        step_flops=2.0 * heads * width * (shape.m + 1 - start + min(config.memory, start)),
    )


NO_PLACE = "memory tokens have no distance to a query and belong to no segment"

MECHANISM = Mechanism(
    name="transformer_xl",
    aliases=("segment_recurrence", "txl", "xlnet"),
    kind=Kind.ATTENTION,
    summary="Segments that read a memory of the one before them, with scores that depend on distances.",
    paper=Paper("Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context", "1901.02860", 2019),
    inputs={
        "q": "bhnd",
        "k": "bgmd",
        "v": "bgmv",
        "u?": "hd",
        "w?": "hd",
        "relative?": "hcd",
        "k_past?": "bgmd",
        "v_past?": "bgmv",
    },
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
    refused={Pattern.NONCAUSAL_CROSS: NO_PLACE, Pattern.CAUSAL_CROSS: NO_PLACE},
    forms={"reference": reference, "parallel": parallel, "chunked": parallel, "step": parallel},
    config=Config,
    variants={
        "short": {"segment": 4, "memory": 6},
        "no memory": {"segment": 5, "memory": 0},
        "clamped": {"segment": 3, "memory": 7, "clamp": 2},
    },
    engine="attention",
    state=WindowState,
    cost=cost,
    uneven=False,
    honours=frozenset({"dropout", "weights"}),
    weights="exact",
    accepts_positions=("none",),
    refused_positions="its scores already encode distances, and its memory is read by distance",
    module=SegmentLayer,
    projection=RelativeScores,
    sample_inputs=sample_inputs,
    waivers=(Waiver("layer_lengths", "its number of segments is fixed when the program is compiled"),),
)
