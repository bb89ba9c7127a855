r"""Linformer: learned matrices mix all keys, and all values, into a few, and softmax attention reads these mixtures.

When to pick it: encoders for inputs with a known maximum length, where a fixed number of token mixtures is enough.
When not: causal models (each mixture holds later tokens), lengths beyond those trained on, or inputs where what matters
may be anywhere: the mixtures depend on position, not on content. See `abc` for mixtures that depend on content.

Definition (Wang et al., arXiv 2006.04768, equation 7; survey arXiv 2103.14636, C1):

    K' = E^T K,   V' = F^T V,   O = softmax(s Q K'^T) V',     E, F of shape (N_max, k), of which the first M rows are used

| paper | here |
|---|---|
| E, F | `e`, `f` (S, L, P): S = 1 for all heads, or one matrix per key/value head; `projection.e`, `.f` of the layer |
| k, the projected dimension | `projected` (P) |
| n, the maximum length | `length` (L) |
| headwise sharing | `sharing="headwise"`: one E and one F for all heads of a layer |
| key-value sharing | `sharing="key-value"`: E = F; in the function, omit `f` |
| no sharing | `sharing="none"`: an E and an F for each key/value head |
| layerwise sharing | ``stack={"share": "tables"}`` of a model; in the function, pass the same `e` for every layer |

Layout: q (B, H, N, D), k and v (B, G, M, D). Row j of E belongs to the token of rank j among the valid tokens of its
row, so padding has no effect. Noncausal-self, and both cross patterns: queries do not interact, and streamed memory is
added to K' and V', which are the state.
Deviations: masked tokens are left out; the official code lets padding into E K. E and F are initialised uniformly in
+-P^-1/2, as in public code. Dropout is applied to the layer's output, not to the weights. The paper's convolution and
pooling as alternatives to E are not implemented.
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
    State,
    Tensors,
    Unsupported,
    at_least,
    one_of,
    state_field,
)
from regard.core.precision import wide_dtype, without_autocast
from regard.core.sampling import attention_shapes, normals
from regard.engines.attention import Visibility, attention, ranks
from regard.engines.recurrent_forms import length_after

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SHARING = ("headwise", "key-value", "none")


@dataclass(frozen=True)
class Config:
    """Options, all for the layer; a function reads them from the shapes of `e` and `f`.

    Attributes:
        length: L, the maximum number of keys in a sequence, >= 1.
        projected: P, the number of mixtures, >= 1.
        sharing: ``headwise``, ``key-value`` or ``none``.
    """

    length: int = 1024
    projected: int = 256
    sharing: str = "headwise"

    def __post_init__(self) -> None:
        at_least("length", self.length, 1)
        at_least("projected", self.projected, 1)
        one_of("sharing", self.sharing, SHARING)


@dataclass(frozen=True)
class ProjectedState(State):
    """K' and V' so far, in at least float32, and the number of tokens in them."""

    k: Float[Tensor, "b g p d"] = state_field()
    v: Float[Tensor, "b g p v"] = state_field()
    length: Int[Tensor, " b"] = state_field()


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    e: Float[Tensor, "s l p"],
    f: Float[Tensor, "s l p"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition."""
    _check(e, k.shape[1], k.shape[2])
    f, m, groups = e if f is None else f, k.shape[2], q.shape[1] // k.shape[1]
    keys, values = e[:, :m].mT @ k, f[:, :m].mT @ v
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    return (call.scale * q @ keys.mT).softmax(-1) @ values


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    e: Float[Tensor, "s l p"],
    f: Float[Tensor, "s l p"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """Mix keys and values into P rows each, then attend to these: N P pairs instead of N M."""
    return read(call.replace(state=absorb(call.replace(state=None), k, v, e, f)), q).output


def absorb(
    call: Call,
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    e: Float[Tensor, "s l p"],
    f: Float[Tensor, "s l p"] | None = None,
) -> ProjectedState:
    """Add memory to K' and V'; more may follow."""
    f, state = e if f is None else f, call.state
    after = length_after(call, k)
    _check(e, k.shape[1], k.shape[2], call.memory_lengths if state is None else after)
    k, v = _mix(call, e, k), _mix(call, f, v)
    return ProjectedState(k, v, after) if state is None else ProjectedState(state.k + k, state.v + v, after)


def read(
    call: Call,
    q: Float[Tensor, "b h n d"],
    e: Float[Tensor, "s l p"] | None = None,
    f: Float[Tensor, "s l p"] | None = None,
) -> Result:
    """Attend from queries to absorbed memory; `e` and `f` are ignored."""
    state: ProjectedState = call.state
    cross = call.replace(pattern=Pattern.NONCAUSAL_CROSS, state=None, memory_lengths=None)
    where = ranks(cross, q.shape[2], state.k.shape[2], q.device)
    output, _, _ = attention(
        q.to(state.k.dtype), state.k, state.v, where, visibility=Visibility(), scale=call.scale, backend=call.backend
    )
    return Result(output.to(q.dtype), state)


def _mix(call: Call, e: Float[Tensor, "s l p"], x: Float[Tensor, "b g m d"]) -> Float[Tensor, "b g p d"]:
    """E^T x, with the rows of E selected by the ranks of x; padded rows of x must be zero."""
    dtype = wide_dtype(x)
    m, longest = x.shape[2], e.shape[1]
    if call.state is None:
        x, rows = x[:, :, :longest], e[:, :m]
    else:
        rank = call.state.length[:, None] + torch.arange(m, device=x.device)
        rows = e[:, rank.clamp(max=longest - 1)].transpose(0, 1)
    with without_autocast(x.device):
        return rows.to(dtype).mT @ x.to(dtype)


def _check(e: Tensor, groups: int, m: int, lengths: Int[Tensor, " b"] | None = None) -> None:
    """Refuse more keys than E has rows for, or matrices for a different number of heads."""
    if e.shape[0] not in (1, groups):
        raise Unsupported(
            f"linformer with e for {e.shape[0]} heads and {groups} key/value heads", supported="1 or equal"
        )
    longest = e.shape[1]
    if lengths is not None and not torch.compiler.is_compiling():
        m = int(lengths.max()) if lengths.numel() else 0
    if m > longest:
        raise Unsupported(
            f"linformer on {m} keys", supported=f"at most {longest}, the rows of e", nearest=f"length={m} in the layer"
        )


class SequenceProjections(Projection):
    """Supplies E and F to the heads of a layer.

    Args:
        spec: the layer's specification.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config: Config = spec.config
        shape = (spec.kv_heads if config.sharing == "none" else 1, config.length, config.projected)
        bound = config.projected**-0.5
        self.e = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.f = None if config.sharing == "key-value" else nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        heads = {**heads, "e": self.e}
        return heads if self.f is None else {**heads, "f": self.f}


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
    """Random inputs for tests, with matrices that preserve scale: scores larger than those of a model would cost
    precision."""
    widths = {"h": 2, "g": 2, "d": 8, "v": 6, **(sizes or {})}
    matrix = (1, m + 3, min(config.projected, m + 1))
    shapes = attention_shapes(batch, n, m, widths) | {
        "e": matrix,
    }
    if config.sharing != "key-value":
        shapes["f"] = matrix
    found = normals(generator, shapes, torch.float64)
    for name in ("e", "f"):
        if name in found:
            found[name] = found[name] * max(m, 1) ** -0.5
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the P mixtures of all keys and values, and of softmax attention to them."""
    heads, width = shape.batch * shape.heads, shape.dim_key + shape.dim_value
    return Cost(
        flops=2.0 * heads * config.projected * (shape.n + shape.m) * width,
        memory=float(heads * (config.projected * width + shape.n)),
        state=float(shape.heads * config.projected * width),
        step_flops=2.0 * heads * config.projected * width,
    )


NO_CAUSAL = "each mixture of keys holds tokens that come later"

MECHANISM = Mechanism(
    name="linformer",
    kind=Kind.ATTENTION,
    summary="Learned matrices mix all keys, and all values, into a few, and softmax attention reads those.",
    paper=Paper("Linformer: Self-Attention with Linear Complexity", "2006.04768", 2020, 18),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv", "e": "slp", "f?": "slp"},
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS),
    refused={Pattern.CAUSAL_SELF: NO_CAUSAL},
    forms={"reference": reference, "parallel": parallel, "absorb": absorb, "read": read},
    config=Config,
    variants={
        "one mixture for keys and values": {"sharing": "key-value", "projected": 3, "length": 200},
        "mixtures of their own": {"sharing": "none", "projected": 5, "length": 200},
    },
    engine="attention",
    state=ProjectedState,
    cost=cost,
    weights="implicit",
    length="max",
    sample_inputs=sample_inputs,
    projection=SequenceProjections,
)
