r"""Nystrom attention: a few mean queries and keys act as landmarks, from whose rows and columns the softmax matrix is
rebuilt.

When to pick it: long noncausal inputs, with softmax weights that vary smoothly along the sequence; a trained softmax
encoder that should become linear with little fine-tuning.
When not: causal models (a mean contains later tokens), or lookups of single tokens, which a mean blurs.

Definition (Xiong et al., arXiv 2102.03902, equations 9-15; survey arXiv 2103.14636, C2). With segment means Q~ and K~
of c segments of queries and keys, and the scale s:

    O = softmax(s Q K~^T) Z softmax(s Q~ K^T) V (+ DWC(V)),      A = softmax(s Q~ K~^T),   Z ≈ A^+
    Z_0 = A^T / (max_j sum_i |A_ij| max_i sum_j |A_ij|),   Z <- 0.25 Z (13 I - A Z (15 I - A Z (7 I - A Z))),  six times

With c tokens or fewer the output is exact softmax attention. The second factor of Z_0 is 1, since rows of A sum to 1.

| paper | here |
|---|---|
| m landmarks | `landmarks` (c) |
| segment means | segments of a row's valid tokens whose sizes differ by at most one, the shorter ones first |
| Z^* after 6 iterations | `iterations`; None for the exact pseudoinverse |
| skip connection, depthwise convolution of V | `convolution` (H, W), one odd kernel per head; `projection.convolution` of the layer |

Layout: q (B, H, N, D), k and v (B, G, M, D). Noncausal patterns only; in noncausal-cross (not in the paper) queries and
keys are segmented separately, each within its row. Padding enters neither means nor Z. Whether a row has c tokens or
fewer is decided for each row. The convolution exists only in noncausal-self.
Deviations: Z_0 of each matrix has its own factor; the original code shares the largest one over the batch and the
heads, so that rows of a batch affect each other. The benchmark's code scales scores by 1 / D instead of s. Dropout is
applied to the layer's output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    Shape,
    Tensors,
    Unsupported,
    Waiver,
    at_least,
)
from regard.core.precision import wide_dtype, without_autocast
from regard.core.sampling import attention_shapes, normals
from regard.engines.attention import Visibility, attention, ranks
from regard.engines.segments import segment_means

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        landmarks: c, the number of segments of the queries and of the keys, >= 1; the paper has 32 to 64.
        iterations: iterations for the pseudoinverse, >= 1; None for the exact one, which is slower and has unstable
            gradients.
        convolution: width of the layer's convolution over the values, odd, or 0 for none; None for 33 in noncausal-self
            and none elsewhere.
    """

    landmarks: int = 16
    iterations: int | None = 6
    convolution: int | None = None

    def __post_init__(self) -> None:
        at_least("landmarks", self.landmarks, 1)
        if self.iterations is not None:
            at_least("iterations", self.iterations, 1)
        if self.convolution is not None and (self.convolution < 0 or (self.convolution and self.convolution % 2 == 0)):
            raise Unsupported(
                f"convolution={self.convolution}",
                supported="an odd width, or 0",
                nearest=f"convolution={max(self.convolution, -1) + 1}",
            )


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    convolution: Float[Tensor, "h w"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition."""
    config: Config = call.config
    _check(call, convolution)
    k, v = _repeat_groups(k, q.shape[1]), _repeat_groups(v, q.shape[1])
    n, m, c = q.shape[2], k.shape[2], config.landmarks

    def softmax(queries: Tensor, keys: Tensor) -> Tensor:
        return (call.scale * queries @ keys.mT).softmax(-1)

    def means(x: Tensor) -> Tensor:
        size, longer = divmod(x.shape[2], c)
        parts = x.split([size] * (c - longer) + [size + 1] * longer, 2)
        return torch.stack([part.mean(2) for part in parts], 2)

    if n <= c or m <= c:
        output = softmax(q, k) @ v
    else:
        queries, keys = means(q), means(k)
        inverse = pseudoinverse(softmax(queries, keys), config.iterations)
        output = softmax(q, keys) @ inverse @ softmax(queries, k) @ v
    if convolution is not None:
        half = convolution.shape[1] // 2
        padded = F.pad(v, (0, 0, half, half))
        for place in range(convolution.shape[1]):
            output = output + convolution[:, place, None, None] * padded[:, :, place : place + n]
    return output


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    convolution: Float[Tensor, "h w"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """Softmax attention to c keys and from c queries, with the pseudoinverse between the two."""
    _check(call, convolution)
    dtype, heads = wide_dtype(q), q.shape[1]
    out_dtype, q, k, v = v.dtype, q.to(dtype), k.to(dtype), v.to(dtype)
    if min(q.shape[2], k.shape[2]) <= call.config.landmarks:
        output = _attend(call, q, k, v, call.memory_lengths)
    else:
        output = _rebuilt(call, q, k, v)
    if convolution is not None and q.shape[2]:
        kernel = convolution.to(dtype)[:, None, :, None]
        output = output + F.conv2d(_repeat_groups(v, heads), kernel, padding=(kernel.shape[2] // 2, 0), groups=heads)
    return output.to(out_dtype)


def _rebuilt(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "b h n v"]:
    """The output for more than c queries and keys; padded rows with c or fewer get exact softmax attention.

    A row of c keys or fewer has a landmark for each key: attention from queries to landmarks is then exact, with the
    values in place of Z softmax(s Q~ K^T) V. For a row of c queries or fewer, the output is that of its landmarks.
    """
    config: Config = call.config
    c, heads = config.landmarks, q.shape[1]
    queries = segment_means(q, c, call.lengths)
    keys = _repeat_groups(segment_means(k, c, call.memory_lengths), heads)
    read = _attend(call, queries, k, v, call.memory_lengths)
    present = None if call.memory_lengths is None else call.memory_lengths.clamp(max=c)
    with without_autocast(q.device):
        scores = call.scale * queries @ keys.mT
        if present is not None:
            missing = torch.arange(c, device=q.device) >= present[:, None, None, None]
            scores = scores.masked_fill(missing, torch.finfo(scores.dtype).min)
        values = pseudoinverse(scores.softmax(-1), config.iterations) @ read
    if call.memory_lengths is not None:
        few = (call.memory_lengths <= c)[:, None, None, None]
        values = torch.where(few, _repeat_groups(v[:, :, :c], heads), values)
    output = _attend(call, q, keys, values, present)
    if call.lengths is not None:
        few = (call.lengths <= c)[:, None, None, None]
        output = torch.where(few, F.pad(read, (0, 0, 0, q.shape[2] - c)), output)
    return output


def pseudoinverse(a: Float[Tensor, "b h c c"], iterations: int | None) -> Float[Tensor, "b h c c"]:
    """Z for row-stochastic matrices, by a third-order iteration from A^T over its largest column sum."""
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    if iterations is None:
        finite = a.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)  # decompositions need finite entries
        return torch.where(finite, torch.linalg.pinv(torch.where(finite, a, identity)), torch.nan)
    z = a.mT / a.sum(-2, keepdim=True).amax(-1, keepdim=True)
    for _ in range(iterations):
        product = a @ z
        z = z / 4 @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product)))
    return z


def _attend(call: Call, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Float[Tensor, "b h n v"]:
    """Softmax attention to the first `lengths` keys of each row."""
    cross = call.replace(pattern=Pattern.NONCAUSAL_CROSS, memory_lengths=lengths)
    where = ranks(cross, q.shape[2], k.shape[2], q.device)
    return attention(q, k, v, where, visibility=Visibility(), scale=call.scale, backend=call.backend)[0]


def _repeat_groups(x: Float[Tensor, "b g m d"], heads: int) -> Float[Tensor, "b h m d"]:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _check(call: Call, convolution: Tensor | None) -> None:
    if convolution is None:
        return
    if call.pattern is not Pattern.NONCAUSAL_SELF:
        raise Unsupported(f"nystrom with a convolution in {call.pattern.value}", supported="noncausal-self")
    if convolution.shape[1] % 2 == 0:
        raise Unsupported(f"a convolution of width {convolution.shape[1]}", supported="an odd width")


class ValueConvolution(Projection):
    """Supplies a layer's heads with their convolution kernels, if there are any.

    Args:
        spec: the layer's specification.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        width, noncausal_self = spec.config.convolution, spec.pattern is Pattern.NONCAUSAL_SELF
        if width is None:
            width = 33 if noncausal_self else 0
        if width and not noncausal_self:
            raise Unsupported(
                f"convolution={width} in {spec.pattern.value}", supported="noncausal-self", nearest="convolution=0"
            )
        self.convolution = None
        if width:
            bound = width**-0.5
            self.convolution = nn.Parameter(torch.empty(spec.heads, width).uniform_(-bound, bound))

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        return heads if self.convolution is None else {**heads, "convolution": self.convolution}


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
    """Normal inputs for tests, with convolution kernels if the options have them."""
    widths = {"h": 2, "g": 2, "d": 8, "v": 6, **(sizes or {})}
    shapes = attention_shapes(batch, n, m, widths)
    if pattern is Pattern.NONCAUSAL_SELF and config.convolution != 0:
        shapes["convolution"] = (widths["h"], 3)
    return normals(generator, shapes, dtype)


def cost(shape: Shape, config: Any) -> Cost:
    """Cost of three softmax products with c landmarks, and of the iterations for the pseudoinverse: four products of c
    x c matrices each."""
    heads, width = shape.batch * shape.heads, shape.dim_key + shape.dim_value
    c = min(config.landmarks, shape.n, shape.m)
    steps = 6 if config.iterations is None else config.iterations
    return Cost(
        flops=heads * (2.0 * c * (shape.n + shape.m) * width + 8.0 * steps * c**3),
        memory=float(heads * (c * (2 * width + 4 * c) + shape.n)),
        state=0.0,
        step_flops=0.0,
    )


LATER = "a mean of queries or keys holds later tokens"

MECHANISM = Mechanism(
    name="nystrom",
    aliases=("nystromformer", "nystrom_attention"),
    kind=Kind.ATTENTION,
    summary=(
        "A few mean queries and keys stand for all, and the softmax matrix is rebuilt from its rows and columns there."
    ),
    paper=Paper("Nystromformer: A Nystrom-Based Algorithm for Approximating Self-Attention", "2102.03902", 2021, 18),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv", "convolution?": "hw"},
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS),
    refused={Pattern.CAUSAL_SELF: LATER, Pattern.CAUSAL_CROSS: LATER},
    forms={"reference": reference, "parallel": parallel},
    config=Config,
    variants={
        "exact": {"landmarks": 3, "iterations": None},
        "convolution": {"landmarks": 4, "convolution": 5},
    },
    variant_patterns={
        "convolution": (Pattern.NONCAUSAL_SELF,),
    },
    engine="attention",
    cost=cost,
    weights="implicit",
    sample_inputs=sample_inputs,
    projection=ValueConvolution,
    waivers=(
        Waiver("layer_lengths", "the borders of its landmarks are fixed when the program is compiled"),
        *(
            Waiver(name, "the exact pseudoinverse's gradient loses a digit (6e-12 in float64)", variants=("exact",))
            for name in ("gradient", "second_derivative")
        ),
        *(
            Waiver(
                name,
                "the exact pseudoinverse of a nearly singular kernel has few right digits in float32 (up to 2e-5 off)",
                variants=("exact",),
                dtypes=(torch.float32,),
            )
            for name in ("padding", "packing", "grouped_heads")
        ),
    ),
)
