r"""Attention with bounded-memory control (ABC): each token writes itself into a few slots by softmax, and queries read the slots.

When to pick it: long sequences where softmax over a few learned summaries is enough; it has all four patterns, and a state
whose size does not depend on the length.
When not: exact recall. A slot is a mean of everything ever written to it, weighted once and for all; see `gated_linear`,
`delta_rule`.

Definition (Peng et al., arXiv 2110.02488, section 3; benchmark arXiv 2210.07661, CAB). With c slots, s the scale:

    K~ = softmax_j(K C_k)^T K,   V~ = softmax_j(V C_v)^T V     over the tokens j seen,     O = softmax(s Q K~^T) V~

in causal-self over j <= i, for every query i: with a = K C_k, K~_i = sum_{j<=i} e^{a_j} k_j^T / sum_{j<=i} e^{a_j}, a running
softmax for each slot: :mod:`regard.engines.softmax_scan`.

| paper | here |
|---|---|
| n slots (CAB: c = 16 landmarks) | c; `slots` of a layer |
| W_phi, control vectors phi | `slots_k` (D, c), `slots_v` (V, c): shared by all heads of a layer |
| K~, V~ | `SlotState`: for each slot the largest score so far, the sums of exponentials and of exponentials times vectors |

Layout: q (B, H, N, D), k and v (B, G, M, D). In cross patterns queries see all of the memory, which may stream in.
Deviations: keys and values have separate control vectors, as in the benchmark's code. That code does not accumulate
over the past in causal attention (only the current token's share of each slot enters), so its results there are not
comparable. Dropout is applied to the layer's output. The paper's other controls (windows, clusters, Linformer) are
separate mechanisms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from regard.contract import (
    ALL_PATTERNS,
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
    Waiver,
    at_least,
    state_field,
)
from regard.core.precision import wide, without_autocast
from regard.core.ragged import place_queries, take_queries
from regard.core.sampling import attention_shapes, normals
from regard.engines import softmax_scan as scan
from regard.engines.attention import Visibility, attention, ranks
from regard.engines.recurrent_forms import length_after
from regard.engines.softmax_scan import Carry

if TYPE_CHECKING:
    from jaxtyping import Float, Int

BLOCK = 256
"""Tokens per block of a causal pass: the slots of a block, c vectors per token, are in memory at the same time."""


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        slots: c of a layer, >= 1; functions take it from the shapes of `slots_k` and `slots_v`.
    """

    slots: int = 16

    def __post_init__(self) -> None:
        at_least("slots", self.slots, 1)


@dataclass(frozen=True)
class SlotState(State):
    """The running softmaxes over keys and values, in at least float32, and the number of tokens in them."""

    key_m: Float[Tensor, "b g c"] = state_field(fill=-torch.inf)
    key_u: Float[Tensor, "b g c"] = state_field()
    key_w: Float[Tensor, "b g c d"] = state_field()
    value_m: Float[Tensor, "b g c"] = state_field(fill=-torch.inf)
    value_u: Float[Tensor, "b g c"] = state_field()
    value_w: Float[Tensor, "b g c v"] = state_field()
    length: Int[Tensor, " b"] = state_field()

    @property
    def keys(self) -> Carry:
        """The running softmax over keys, in the engine's form."""
        return Carry(self.key_m, self.key_u, self.key_w)

    @property
    def values(self) -> Carry:
        """The running softmax over values."""
        return Carry(self.value_m, self.value_u, self.value_w)


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    slots_k: Float[Tensor, "d c"],
    slots_v: Float[Tensor, "v c"],
) -> Float[Tensor, "b h n v"]:
    """The definition, one query after the other."""
    n, m, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    outputs = []
    for i in range(n):
        seen = max(i + m - n + 1, 0) if call.pattern is Pattern.CAUSAL_SELF else m
        past_k, past_v = k[:, :, :seen], v[:, :, :seen]
        keys = (past_k @ slots_k).softmax(2).mT @ past_k
        values = (past_v @ slots_v).softmax(2).mT @ past_v
        outputs.append((call.scale * q[:, :, i, None] @ keys.mT).softmax(-1) @ values)
    return torch.cat(outputs, 2) if outputs else v.new_zeros(*q.shape[:2], 0, v.shape[3])


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    slots_k: Float[Tensor, "d c"],
    slots_v: Float[Tensor, "v c"],
) -> Float[Tensor, "b h n v"]:
    """Noncausal patterns fill the slots, then read them; causal-self uses the chunked form."""
    if call.pattern is Pattern.CAUSAL_SELF:
        return chunked(call, q, k, v, slots_k, slots_v).output
    return read(call.replace(state=absorb(call.replace(state=None), k, v, slots_k, slots_v)), q).output


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    slots_k: Float[Tensor, "d c"],
    slots_v: Float[Tensor, "v c"],
) -> Result:
    """Causal-self from state to state. Also the step."""
    state: SlotState | None = call.state
    n, m, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    aligned = n == m and call.lengths is call.memory_lengths
    if not aligned:
        q = place_queries(q, m, call.lengths, call.memory_lengths)
    shares, keys = _shares(call, q, k, slots_k)
    carry = None if state is None else Carry(*(x.repeat_interleave(groups, 1) for x in state.values))
    output, values = scan.softmax_scan(
        _scores(call, v, slots_v).repeat_interleave(groups, 1),
        _float(v).repeat_interleave(groups, 1),
        state=carry,
        mix=shares,
        chunk_size=call.chunk_size or 16,
        backend=call.backend,
    )
    if not aligned:
        output = take_queries(output, n, call.lengths, call.memory_lengths)
    values = Carry(*(x[:, ::groups] for x in values))  # all heads of a group hold the same
    return Result(output.to(v.dtype), SlotState(*keys, *values, length_after(call, k)))


def absorb(
    call: Call,
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    slots_k: Float[Tensor, "d c"],
    slots_v: Float[Tensor, "v c"],
) -> SlotState:
    """Absorb memory into the slots; may be called repeatedly, in any order."""
    state: SlotState | None = call.state
    keys = scan.absorb(_scores(call, k, slots_k), k, state=None if state is None else state.keys)
    values = scan.absorb(_scores(call, v, slots_v), v, state=None if state is None else state.values)
    return SlotState(*keys, *values, length_after(call, k))


def read(
    call: Call,
    q: Float[Tensor, "b h n d"],
    slots_k: Float[Tensor, "d c"] | None = None,
    slots_v: Float[Tensor, "v c"] | None = None,
) -> Result:
    """Attend to the slots; the control vectors are no longer needed."""
    state: SlotState = call.state
    keys = scan.normalized(state.key_u, state.key_w)
    values = scan.normalized(state.value_u, state.value_w)
    cross = call.replace(pattern=Pattern.NONCAUSAL_CROSS, state=None, memory_lengths=None)
    where = ranks(cross, q.shape[2], keys.shape[2], q.device)
    with without_autocast(q.device):
        output, _, _ = attention(
            q.to(keys.dtype), keys, values, where, visibility=Visibility(), scale=call.scale, backend=call.backend
        )
    return Result(output.to(q.dtype), state)


def _shares(
    call: Call, q: Float[Tensor, "b h m d"], k: Float[Tensor, "b g m d"], slots_k: Float[Tensor, "d c"]
) -> tuple[Float[Tensor, "b h m c"], Carry]:
    """Slot weights for the query aligned with each key, block by block, and the keys' running softmax at the end."""
    scores, groups = _scores(call, k, slots_k), k.shape[1]
    carry = scan.empty_carry(scores, k) if call.state is None else call.state.keys
    found = []
    for start in range(0, k.shape[2], BLOCK):
        block = slice(start, start + BLOCK)
        keys, carry = scan.softmax_scan(
            scores[:, :, block],
            _float(k[:, :, block]),
            state=carry,
            chunk_size=call.chunk_size or 64,
            backend=call.backend,
        )
        keys = keys.transpose(2, 3)[:, :, None]  # b g 1 c n d, as the engine computes them
        queries = call.scale * _float(q[:, :, block]).unflatten(1, (groups, -1))[:, :, :, None]
        found.append((queries * keys).sum(-1).softmax(3).mT.flatten(1, 2))
    return (torch.cat(found, 2) if found else scores.new_zeros(*q.shape[:3], scores.shape[3])), carry


def _scores(call: Call, x: Float[Tensor, "b g m d"], slots: Float[Tensor, "d c"]) -> Float[Tensor, "b g m c"]:
    """Log weights with which tokens enter the slots; -inf at padding."""
    with without_autocast(x.device):
        scores = _float(x) @ _float(slots)
    valid = call.valid_keys(x.shape[2])
    return scores if valid is None else scores.masked_fill(~valid[:, None, :, None], -torch.inf)


def _float(x: Tensor) -> Tensor:
    return wide(x)


class SlotControl(Projection):
    """Gives the heads of a layer the control vectors of its slots.

    Args:
        spec: the layer's specification.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.slots_k = nn.Parameter(torch.empty(spec.head_dim, spec.config.slots))
        self.slots_v = nn.Parameter(torch.empty(spec.value_dim, spec.config.slots))
        for slots in (self.slots_k, self.slots_v):
            nn.init.xavier_uniform_(slots, gain=2**-0.5)

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        return {**heads, "slots_k": self.slots_k, "slots_v": self.slots_v}


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
    """Normal inputs for tests, with the configured number of slots."""
    widths = {"h": 2, "g": 2, "d": 8, "v": 6, **(sizes or {})}
    shapes = attention_shapes(batch, n, m, widths) | {
        "slots_k": (widths["d"], config.slots),
        "slots_v": (widths["v"], config.slots),
    }
    return normals(generator, shapes, dtype)


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of causal-self: c slots of keys and of values are written at each key and read by each query."""
    heads, width, c = shape.batch * shape.heads, shape.dim_key + shape.dim_value, config.slots
    return Cost(
        flops=2.0 * heads * c * width * (2 * shape.m + shape.n),
        memory=float(heads * c * (4 * shape.m + min(shape.m, BLOCK) * shape.dim_key)),
        state=float(shape.heads * c * (4 + width)),
        step_flops=6.0 * heads * c * width,
    )


MECHANISM = Mechanism(
    name="abc",
    aliases=("bounded_memory_control", "abc_mlp"),
    kind=Kind.ATTENTION,
    summary="Each token writes itself into a few slots by softmax, and queries read the slots.",
    paper=Paper("ABC: Attention with Bounded-memory Control", "2110.02488", 2021, 34),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv", "slots_k": "dc", "slots_v": "vc"},
    patterns=ALL_PATTERNS,
    forms={
        "reference": reference,
        "parallel": parallel,
        "chunked": chunked,
        "step": chunked,
        "absorb": absorb,
        "read": read,
    },
    config=Config,
    variants={
        "few slots": {"slots": 3},
    },
    engine="softmax_scan",
    state=SlotState,
    combines="softmax",
    cost=cost,
    weights="implicit",
    sample_inputs=sample_inputs,
    projection=SlotControl,
    waivers=(
        Waiver(
            "layer_lengths",
            "its number of blocks of tokens is fixed when the program is compiled",
            patterns=(Pattern.CAUSAL_SELF,),
        ),
    ),
)
