r"""mLSTM, the matrix memory of xLSTM: gated linear attention with an exponential input gate and a normaliser.

When to pick it: streams in which one token may have to outweigh all earlier ones; linear time, a state of fixed size.
When not: overwriting the value stored under a key (`delta_rule`); gates that differ between key features
(`gated_linear`).

Definition (Beck et al., arXiv 2405.04517, section 2.3):

    C_t = f_t C_{t-1} + i_t k_t v_t^T,   n_t = f_t n_{t-1} + i_t k_t,   i_t = exp(i~_t),   f_t = sigmoid(f~_t) or exp(f~_t)
    o_t = C_t^T q_t / max(|n_t . q_t|, 1)

It is computed with C and n divided by exp(m_t), m_t = max(log f_t + m_{t-1}, log i_t), which leaves the output
unchanged but keeps every number in range (section 2.2; 1 becomes exp(-m_t)). The result is a gated recurrence with
decay log f_t + m_{t-1} - m_t <= 0 and keys exp(log i_t - m_t) k_t. An exponential forget gate, which may exceed 1,
needs no separate code.

| paper | here |
|---|---|
| log i_t, i~_t | `log_input` (B, H, M), any real number; -inf writes nothing |
| log f_t | `log_forget` (B, H, M), natural logarithm of the forget gate; -inf forgets all |
| C, n (times exp(-m)) | `MemoryState.memory`, (B, H, K, V + 1): n is the last column |
| m | `MemoryState.stabilizer`, (B, H) |
| q / sqrt(d) or k / sqrt(d) | `scale`, on the queries |
| o_t, output gate | `output_gate="sigmoid"` of the layer |

Layout: (B, H, N, D), heads before time. Noncausal-self adds a forward pass that reads after writing and a backward pass
that reads before writing, numerators and normalisers alike, and divides once. In cross patterns the memory is absorbed
in order and every query reads the final state: the order of the memory matters.

Deviations: m_0 is -1e30 in place of minus infinity (official code: 0, with the same outputs). No 1e-6 is added to the
normaliser. The layer computes its gates from its input, as in xLSTM-7B, with that model's soft cap as an option; the
paper's block computes them from the convolved q, k and v. Heads share the weights of their norm. sLSTM, which is not a
map of queries and keys, is not implemented.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
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
    Projection,
    Result,
    Shape,
    State,
    Tensors,
    Unsupported,
    Waiver,
    one_of,
    state_field,
)
from regard.core.precision import wide
from regard.core.ragged import flip_rows
from regard.engines import recurrent_forms
from regard.engines.gated_recurrence import gated_recurrence
from regard.layers.linear import make_linear

if TYPE_CHECKING:
    from jaxtyping import Float, Int

FORGET_GATES = ("sigmoid", "exp")
NOTHING = -1e30
"""m of an empty memory: lower than any gate, but finite, so that it can be subtracted from itself."""


@dataclass(frozen=True)
class MemoryState(State):
    """C with n as its last column, both times exp(-m), in at least float32; m, in float64; and the token count."""

    memory: Float[Tensor, "b h k v+1"] = state_field()
    stabilizer: Float[Tensor, "b h"] = state_field()
    length: Int[Tensor, " b"] = state_field()


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        forget_gate: forget gate of the layer: ``sigmoid``, or ``exp`` (which may exceed 1).
        gate_cap: c of the layer's soft cap c tanh(x / c) on the gates' pre-activations, > 0; None for no cap.
    """

    forget_gate: str = "sigmoid"
    gate_cap: float | None = None

    def __post_init__(self) -> None:
        one_of("forget_gate", self.forget_gate, FORGET_GATES)
        if self.gate_cap is not None and not self.gate_cap > 0:
            raise Unsupported(f"gate_cap={self.gate_cap}", supported="gate_cap > 0, or None", nearest="gate_cap=15.0")


def reference(
    call: Call,
    q: Float[Tensor, "b h n k"],
    k: Float[Tensor, "b h m k"],
    v: Float[Tensor, "b h m v"],
    log_input: Float[Tensor, "b h m"],
    log_forget: Float[Tensor, "b h m"],
) -> Float[Tensor, "b h n v"]:
    """The recurrence, token by token, without a stabiliser: for gates whose exponentials fit the dtype."""
    n, m = q.shape[2], k.shape[2]
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    empty = torch.zeros_like(k[..., None] * values[..., None, :]).sum(2)  # (b, h, k, v + 1): C and n

    def write(order: range) -> list[tuple[Tensor, Tensor]]:
        """For each token, the decayed memory before its write and the memory after it."""
        memory, memories = empty, []
        for t in order:
            before = log_forget[:, :, t, None, None].exp() * memory
            memory = before + log_input[:, :, t, None, None].exp() * k[:, :, t, :, None] * values[:, :, t, None]
            memories.append((before, memory))
        return memories

    forward = write(range(m))
    if call.pattern.cross:
        seen = [forward[-1][1] if forward else empty] * n
    elif call.pattern.causal:
        seen = [forward[i + m - n][1] if i + m >= n else empty for i in range(n)]
    else:
        backward = write(range(m - 1, -1, -1))[::-1]
        seen = [after + before for (_, after), (before, _) in zip(forward, backward, strict=True)]
    outputs = [(call.scale * q[:, :, i, None] @ seen[i])[:, :, 0] for i in range(n)]
    o = torch.stack(outputs, 2) if n else q @ empty
    return o[..., :-1] / o[..., -1:].abs().clamp(min=1)


def parallel(
    call: Call,
    q: Float[Tensor, "b h n k"],
    k: Float[Tensor, "b h m k"],
    v: Float[Tensor, "b h m v"],
    log_input: Float[Tensor, "b h m"],
    log_forget: Float[Tensor, "b h m"],
) -> Result:
    """Whole sequences, from an empty state."""
    call = call if call.state is None else call.replace(state=None)
    if call.pattern.cross:
        return read(call.replace(state=absorb(call, k, v, log_input, log_forget)), q)
    if call.pattern.causal:
        return chunked(call, q, k, v, log_input, log_forget)
    q, size = _queries(call, q), call.chunk_size or 64

    def turned(x: Tensor) -> Tensor:
        return flip_rows(x, call.lengths, axis=2)

    writes, m = _writes(call, k, v, log_input, log_forget)
    forward, _ = gated_recurrence(q, *writes, chunk_size=size, backend=call.backend)
    writes, later = _writes(call, *map(turned, (k, v, log_input, log_forget)))
    backward, _ = gated_recurrence(turned(q), *writes, chunk_size=size, inclusive=False, backend=call.backend)
    assert forward is not None and backward is not None
    later = turned(later)
    most = torch.maximum(m, later)
    o = forward * _exp(m - most, forward) + turned(backward) * _exp(later - most, backward)
    return Result(_normalized(o, most).to(v.dtype))


def chunked(
    call: Call,
    q: Float[Tensor, "b h n k"],
    k: Float[Tensor, "b h m k"],
    v: Float[Tensor, "b h m v"],
    log_input: Float[Tensor, "b h m"],
    log_forget: Float[Tensor, "b h m"],
) -> Result:
    """Causal-self with state in and out, computed as a gated recurrence with a running stabiliser."""
    writes, m = _writes(call, k, v, log_input, log_forget)
    o, memory = gated_recurrence(
        recurrent_forms.beside_keys(call, _queries(call, q), k.shape[2]),
        *writes,
        state=recurrent_forms.memory_of(call),
        chunk_size=call.chunk_size or 64,
        backend=call.backend,
    )
    assert o is not None
    output = recurrent_forms.of_queries(call, _normalized(o, m), q.shape[2])
    state = recurrent_forms.MatrixState(memory, recurrent_forms.length_after(call, k))
    return Result(output.to(v.dtype), _state(call, state, m))


def step(
    call: Call,
    q: Float[Tensor, "b h 1 k"],
    k: Float[Tensor, "b h 1 k"],
    v: Float[Tensor, "b h 1 v"],
    log_input: Float[Tensor, "b h 1"],
    log_forget: Float[Tensor, "b h 1"],
) -> Result:
    """One token of :func:`chunked` computed by the recurrence itself."""
    writes, m = _writes(call, k, v, log_input, log_forget)
    o, state = recurrent_forms.step(call, _queries(call, q), *writes)
    return Result(_normalized(o, m).to(v.dtype), _state(call, state, m))


def absorb(
    call: Call,
    k: Float[Tensor, "b h m k"],
    v: Float[Tensor, "b h m v"],
    log_input: Float[Tensor, "b h m"],
    log_forget: Float[Tensor, "b h m"],
) -> MemoryState:
    """Write memory to C and n, in order; more may follow."""
    writes, m = _writes(call, k, v, log_input, log_forget)
    return _state(call, recurrent_forms.absorb(call, *writes), m)


def read(call: Call, q: Float[Tensor, "b h n k"]) -> Result:
    """Read absorbed memory with queries."""
    o = recurrent_forms.read(call, _queries(call, q))
    return Result(_normalized(o, call.state.stabilizer[..., None]).to(q.dtype), call.state)


def _queries(call: Call, q: Tensor) -> Tensor:
    return call.scale * wide(q)


def _writes(
    call: Call, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Float[Tensor, "b h m"]]:
    """Inputs of the gated recurrence, and m: keys times exp(log i - m), values with a column of ones, and log decays.

    The outputs do not depend on m, so it is a constant for derivatives. It is accumulated in float64 where available,
    because the decays are differences of it.
    """
    gates = torch.float32 if k.device.type == "mps" else torch.float64
    write, forget = log_input.to(gates), log_forget.to(gates)
    valid = call.valid_keys(k.shape[2])
    if valid is not None:
        write = torch.where(valid[:, None], write, -torch.inf)
    start = write.new_full(write.shape[:2], NOTHING) if call.state is None else call.state.stabilizer.to(gates)
    m = _stabilizer(write.detach(), forget.detach(), start.detach())
    decay = forget + (torch.cat([start[..., None], m[..., :-1]], -1) - m)
    decay = decay - decay.detach().clamp(min=0)  # positive only through rounding
    k, v = wide(k), wide(v)
    keys = k * (write - m).exp().to(k.dtype)[..., None]
    return (keys, torch.cat([v, torch.ones_like(v[..., :1])], -1), decay.to(k.dtype)[..., None]), m


def _stabilizer(
    write: Float[Tensor, "b h m"], forget: Float[Tensor, "b h m"], start: Float[Tensor, "b h"]
) -> Float[Tensor, "b h m"]:
    """m_t = max(log f_t + m_{t-1}, log i_t), in log2(M) doublings: if log f is -inf, differences of sums are NaN."""
    m, sums, reach = write.clamp(min=NOTHING), forget, 1
    while reach < m.shape[-1]:
        m = torch.maximum(m, F.pad(m[..., :-reach] + sums[..., reach:], (reach, 0), value=-torch.inf))
        sums = sums + F.pad(sums[..., :-reach], (reach, 0))
        reach *= 2
    return torch.maximum(m, start[..., None] + sums)


def _exp(x: Tensor, like: Tensor) -> Tensor:
    return x.exp().to(like.dtype)[..., None]


def _normalized(o: Float[Tensor, "b h n v+1"], m: Float[Tensor, "b h n"]) -> Float[Tensor, "b h n v"]:
    least = _exp(-m, o).clamp(min=torch.finfo(o.dtype).tiny)
    return o[..., :-1] / torch.maximum(o[..., -1:].abs(), least)


def _state(call: Call, state: recurrent_forms.MatrixState, m: Float[Tensor, "b h m"]) -> MemoryState:
    if m.shape[-1]:
        last = m[..., -1]
    else:
        last = m.new_full(m.shape[:2], NOTHING) if call.state is None else call.state.stabilizer
    return MemoryState(state.memory, last, state.length)


class Gates(Projection):
    """The layer's gates: computes `log_input` and `log_forget` from the sequence that is written.

    Both are affine in x, under a soft cap if there is one. Their weights are initialised to 0; the input gate starts
    near 1 and the forget gates between sigmoid(3) and sigmoid(6), as in the official code; exponential forget gates
    start at the same values. There is one pair of gates per key/value head, shared by the query heads of its group.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.config: Config = spec.config
        self.input_gate, self.forget_gate = (make_linear(spec.memory_dim, spec.kv_heads, bias=True) for _ in range(2))
        forget = torch.linspace(3.0, 6.0, spec.kv_heads)
        if self.config.forget_gate == "exp":
            forget = F.logsigmoid(forget)
        for module, bias in ((self.input_gate, 0.1 * torch.randn(spec.kv_heads)), (self.forget_gate, forget)):
            nn.init.zeros_(module.weight)  # type: ignore[arg-type]
            with torch.no_grad():
                module.bias.copy_(bias)  # type: ignore[operator]

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        source = call.memory
        if source is None:
            return heads
        forget = self._capped(self.forget_gate(source))
        heads["log_input"] = self._capped(self.input_gate(source)).mT
        heads["log_forget"] = (forget if self.config.forget_gate == "exp" else F.logsigmoid(forget)).mT
        return heads

    def _capped(self, x: Float[Tensor, "b m h"]) -> Float[Tensor, "b m h"]:
        x, cap = wide(x), self.config.gate_cap
        return x if cap is None else cap * torch.tanh(x / cap)


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the causal pattern in chunks of 64; the normaliser is one more column of the memory."""
    matrix = shape.dim_key * (shape.dim_value + 1)
    tokens = shape.batch * shape.heads * shape.m
    return Cost(
        flops=4.0 * tokens * (matrix + 32 * (shape.dim_key + shape.dim_value + 1)),
        memory=float(tokens * (64 + 2 * shape.dim_key + 2 * shape.dim_value)),
        state=float(shape.heads * (matrix + 1)),
        step_flops=5.0 * shape.batch * shape.heads * matrix,
    )


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    sizes: dict[str, int] | None = None,
    **_: Any,
) -> Tensors:
    """Inputs for tests, with both gates below and above 1.

    Stronger gates make terms of n . q cancel: float32 then loses more than 2e-6 in the definition itself.
    """
    size = {"h": 2, "k": 8, "v": 6} | (sizes or {})

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, size["h"], *shape, generator=generator, dtype=torch.float64)

    tensors = {"q": normal(n, size["k"]), "k": normal(m, size["k"]), "v": normal(m, size["v"])}
    tensors |= {"log_input": normal(m), "log_forget": normal(m) - 1}
    return {name: x.to(dtype) for name, x in tensors.items()}


MECHANISM = Mechanism(
    name="mlstm",
    aliases=("xlstm", "matrix_lstm"),
    kind=Kind.ATTENTION,
    summary="Gated linear attention with exponential input gates and a normaliser: one token can outweigh the past.",
    paper=Paper("xLSTM: Extended Long Short-Term Memory", "2405.04517", 2024),
    inputs={"q": "bhnk", "k": "bhmk", "v": "bhmv", "log_input": "bhm", "log_forget": "bhm"},
    patterns=ALL_PATTERNS,
    forms={
        "reference": reference,
        "parallel": parallel,
        "chunked": chunked,
        "step": step,
        "absorb": absorb,
        "read": read,
    },
    config=Config,
    variants={
        "exponential": {"forget_gate": "exp", "gate_cap": 15.0},
    },
    engine="gated_recurrence",
    state=MemoryState,
    cost=cost,
    weights="implicit",
    sample_inputs=sample_inputs,
    projection=Gates,
    layer_defaults={"output_norm": "layer", "output_gate": "sigmoid"},
    waivers=(
        Waiver(
            "layer_lengths",
            "its stabiliser doubles steps up to the length, which is fixed when the program is compiled",
        ),
    ),
)
