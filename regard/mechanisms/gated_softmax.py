r"""Gated softmax attention: a gate, computed from the query's token, decides how much of a head's output to keep.

When to pick it: a model that will be quantized after training or fine-tuning. A head that should do nothing closes its
gate, so it has no reason to grow the outliers that ruin 8-bit activations. Any softmax kernel can run it.
When not: exact zeros in the weights (`clipped_softmax`); a plain baseline (`softmax`).

Definition (Bondarenko, Nagel, Blankevoort, arXiv 2306.12929, equations 5-6), for each head h and query i:

    o_i = s pi_i sum_j softmax_j(tau q_i . k_j + bias_ij) v_j,   pi_i = sigmoid(G_h(x_i))

| paper | here |
|---|---|
| log pi_i | `log_gate` (B, H, N), natural logarithms <= 0; without it every gate is open |
| G_h | `predictor`: `linear`, `mlp`, `mlp2`, `all_features`, `head` or `head_mean`; the module :class:`GatePredictor` |
| b_init, pi_init (the initial gate) | `initial_gate`: the last bias is its logit |
| 1 / pi_init, for fine-tuning (appendix B) | s: 1 / `initial_gate` with `fine_tune`, else 1 |

x is the layer's input (after the block's norm if it has one); gates read it, not the attention's output. The predictor
of head h reads features h D/H ... (h + 1) D/H - 1 of x: an arbitrary slice, as in the authors' code. A gate depends on
its own token only, so decoding caches keys and values and nothing else. In cross patterns gates come from the queries.
Extra parameters of a layer: H (D/H + 1) for `linear`, H (D + 1) for `all_features`.

:func:`regard.compression.quantize` simulates 8-bit weights and activations, and leaves the gate predictors as they are.

Layout: (B, H, N, D); keys and values may have fewer heads (grouped queries). A query that sees no key gives 0.
Deviations: gates are passed as natural logarithms, as everywhere in regard. Returned weights include the gate and s.
The authors' code sets the initial bias for `linear` only; here all predictors have it. With `fine_tune` the output is
divided by the initial gate for every predictor; theirs leaves this out for a gate of the head alone (`head`).
`head_mean` averages over the valid tokens of a call, where theirs counts padding too (as does this one after
`regard.swap`, which does not pass padding to layers); it looks ahead, so it is refused in causal patterns, and on
previously absorbed memory, where queries may come in pieces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import (
    ALL_PATTERNS,
    Call,
    Context,
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
    one_of,
    valid_from_lengths,
)
from regard.core.precision import wide_dtype
from regard.engines import attention_forms
from regard.engines.attention import attention_reference, masked_scores_bias, ranks
from regard.engines.attention_forms import by_pattern
from regard.engines.cache import KeyValueState, absorb
from regard.layers.linear import make_linear

if TYPE_CHECKING:
    from jaxtyping import Float

PREDICTORS = ("linear", "mlp", "mlp2", "all_features", "head", "head_mean")


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        predictor: a layer's G: ``linear`` (one map per head, from its slice of x), ``mlp`` (the same with one hidden
            layer of a quarter of the slice's features, at least 1), ``mlp2`` (a hidden layer as wide as the slice),
            ``all_features`` (one map from all of x), ``head`` (one number per head, independent of x), ``head_mean``
            (``linear``, averaged over tokens before the sigmoid; noncausal patterns only). Functions use the gates that
            they are given.
        initial_gate: initial pi, between 0 and 1; if None, biases start as in torch's linear layers, and ``head`` at a
            gate of one half.
        fine_tune: whether to multiply gates by 1 / `initial_gate`, which must be given, so that a layer with the
            weights of softmax attention starts out equal to it.
        initial_std: initial standard deviation of the weights of the gate logits, >= 0; if None, 0.01 with `fine_tune`
            (the paper's for BERT; 0.001 for OPT), else torch's initialisation. With 0, `fine_tune` starts exactly
            equal.
    """

    predictor: str = "linear"
    initial_gate: float | None = None
    fine_tune: bool = False
    initial_std: float | None = None

    def __post_init__(self) -> None:
        one_of("predictor", self.predictor, PREDICTORS)
        if self.initial_gate is not None and not 0 < self.initial_gate < 1:
            raise Unsupported(
                f"initial_gate={self.initial_gate}", supported="0 < initial_gate < 1", nearest="initial_gate=None"
            )
        if self.fine_tune and self.initial_gate is None:
            raise Unsupported(
                "fine_tune without initial_gate", supported="0 < initial_gate < 1", nearest="initial_gate=0.5"
            )
        if self.initial_std is not None and not 0 <= self.initial_std < math.inf:
            raise Unsupported(
                f"initial_std={self.initial_std}", supported="a finite initial_std >= 0", nearest="initial_std=0.01"
            )

    @property
    def gate_scale(self) -> float:
        """The factor s."""
        return 1 / self.initial_gate if self.fine_tune and self.initial_gate is not None else 1.0


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    log_gate: Float[Tensor, "b h n"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, with the full weight matrix."""
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    visible, bias = masked_scores_bias(where, by_pattern(call), call.bias, call.position_bias, call.blocks, q.dtype)
    output = attention_reference(q, k, v, visible, lambda scores: scores.softmax(-1), call.scale, bias)
    gate = torch.ones_like(q[..., 0]) if log_gate is None else log_gate.exp()
    return call.config.gate_scale * gate[..., None] * output


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    log_gate: Float[Tensor, "b h n"] | None = None,
) -> Result:
    """Softmax attention, block by block, with outputs multiplied by the gates."""
    return _gated(call, attention_forms.parallel(call, q, k, v), log_gate)


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    log_gate: Float[Tensor, "b h n"] | None = None,
) -> Result:
    """Continue a cached sequence by any number of tokens; also the step."""
    return _gated(call, attention_forms.chunked(call, q, k, v), log_gate)


def read(call: Call, q: Float[Tensor, "b h n d"], log_gate: Float[Tensor, "b h n"] | None = None) -> Result:
    """Attend to absorbed memory, with outputs multiplied by the gates."""
    return _gated(call, attention_forms.read(call, q), log_gate)


def _gated(call: Call, result: Result, log_gate: Float[Tensor, "b h n"] | None) -> Result:
    """Multiply the output and the weights by the gates."""
    gate: float | Tensor = call.config.gate_scale
    if log_gate is not None:
        gate = (gate * log_gate.to(wide_dtype(result.output)).exp())[..., None]
    elif gate == 1:
        return result
    result.output = (gate * result.output).to(result.output.dtype)
    if "weights" in result.extras:
        result.extras["weights"] = (gate * result.extras["weights"]).to(result.extras["weights"].dtype)
    return result


class GatePredictor(Projection):
    """Computes a layer's gates from the tokens of its queries: adds `log_gate` (B, H, N) to the heads.

    The maps of all heads are stacked in one tensor, head axis first, and initialised like separate linear layers.

    Raises:
        Unsupported: if the heads do not divide `dim` for a predictor that reads slices; for ``head_mean`` in a causal
            pattern and on absorbed memory.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config: Config = spec.config
        self.predictor, self.heads, self.cross = config.predictor, spec.heads, spec.pattern.cross
        if config.predictor == "head_mean" and spec.pattern.causal:
            raise Unsupported(
                f"predictor='head_mean' in {spec.pattern.value} (the mean looks at later tokens)",
                supported="noncausal patterns",
                nearest="predictor='linear'",
            )
        if config.predictor not in ("all_features", "head") and spec.dim % spec.heads:
            raise Unsupported(
                f"predictor={config.predictor!r} with dim={spec.dim} and num_heads={spec.heads}",
                supported="a slice of dim / num_heads features for each head",
                nearest="predictor='all_features'",
            )
        bias = None if config.initial_gate is None else math.log(config.initial_gate / (1 - config.initial_gate))
        self.maps = nn.ModuleList()
        self.logit: nn.Parameter | None = None
        if config.predictor == "head":
            self.logit = nn.Parameter(torch.full((spec.heads,), 0.0 if bias is None else bias))
            return
        width = spec.dim // spec.heads
        last: nn.Module
        if config.predictor == "all_features":
            last = make_linear(spec.dim, spec.heads, bias=True)
        else:
            hidden = {"mlp": max(width // 4, 1), "mlp2": width}.get(config.predictor)
            if hidden is not None:
                self.maps.append(HeadLinear(spec.heads, width, hidden))
            last = HeadLinear(spec.heads, width if hidden is None else hidden, 1)
        std = 0.01 if config.initial_std is None and config.fine_tune else config.initial_std
        with torch.no_grad():
            if bias is not None:
                last.bias.fill_(bias)  # type: ignore[operator]
            if std is not None:
                last.weight.normal_(std=std)  # type: ignore[operator]
        self.maps.append(last)

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        x, source, context = call.x, call.memory, call.context
        if x is None:
            return heads
        logits = self._logits(x)
        if self.predictor == "head_mean":
            if self.cross and source is None:
                raise Unsupported(
                    "predictor='head_mean' on absorbed memory, whose queries may come in pieces without a common mean",
                    supported="whole calls, layer(x, memory)",
                    nearest="predictor='linear'",
                )
            logits = _mean_over_tokens(logits, context)
        dtype = wide_dtype(logits)
        # a compiler takes the result of logsigmoid for contiguous, whatever its argument was
        return heads | {"log_gate": F.logsigmoid(logits.to(dtype).contiguous())}

    def _logits(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n"]:
        if self.logit is not None:
            return self.logit[None, :, None].expand(x.shape[0], -1, x.shape[1])
        if self.predictor == "all_features":
            return self.maps[0](x).mT
        y = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (b, h, n, dim / h)
        for i, linear in enumerate(self.maps):
            y = linear(y if i == 0 else F.relu(y))
        return y[..., 0]


class HeadLinear(nn.Module):
    """A separate linear map for each head, (B, H, N, in) -> (B, H, N, out), initialised as in torch's linear layers."""

    def __init__(self, heads: int, in_features: int, out_features: int) -> None:
        super().__init__()
        bound = in_features**-0.5
        self.weight = nn.Parameter(torch.empty(heads, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(heads, 1, out_features).uniform_(-bound, bound))
        self.bias._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, x: Float[Tensor, "b h n i"]) -> Float[Tensor, "b h n o"]:
        return x @ self.weight + self.bias


def _mean_over_tokens(logits: Float[Tensor, "b h n"], context: Context) -> Float[Tensor, "b h n"]:
    """The mean over each row's valid tokens, which come first, repeated for every token."""
    n, mask = logits.shape[-1], context.mask
    if mask is None or not mask.ragged or n == 0:
        return logits.mean(-1, keepdim=True).expand_as(logits)
    if mask.cu_seqlens is not None:
        lengths = mask.cu_seqlens.diff()
    elif mask.lengths is not None:
        lengths = mask.lengths
    else:
        assert mask.valid is not None  # `ragged` says that one of the three is given
        lengths = mask.valid.sum(-1)
    lengths = lengths.to(logits.device)
    total = torch.where(valid_from_lengths(lengths, n)[:, None], logits, 0).sum(-1, keepdim=True)
    return (total / lengths[:, None, None].clamp(min=1)).expand_as(logits)


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of softmax attention, plus one product per output number."""
    width = shape.dim_key + shape.dim_value
    heads = shape.batch * shape.heads
    return Cost(
        flops=heads * shape.n * (2.0 * shape.m * width + shape.dim_value),
        memory=float(heads * shape.n),
        state=float(shape.heads * shape.m * width),
        step_flops=heads * (2.0 * shape.m * width + shape.dim_value),
    )


MECHANISM = Mechanism(
    name="gated_softmax",
    aliases=("gated_attention",),
    kind=Kind.ATTENTION,
    summary="A gate, learned from the query's token, decides how much of a head's output to keep.",
    paper=Paper(
        "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing", "2306.12929", 2023, 8
    ),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv", "log_gate?": "bhn"},
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
        "hidden layer": {"predictor": "mlp", "initial_gate": 0.3},
        "wide hidden layer": {"predictor": "mlp2", "initial_gate": 0.3, "fine_tune": True},
        "all features": {"predictor": "all_features", "initial_std": 0.1},
        "one gate a head": {"predictor": "head", "initial_gate": 0.9},
        "mean gate": {"predictor": "head_mean"},
    },
    variant_patterns={
        "mean gate": (Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS),
    },
    layer_defaults={"output_norm": None},  # the size of an output shows how much of the head is kept
    in_trained_models=lambda model: {"initial_gate": 0.25, "fine_tune": True, "initial_std": 0.001},
    engine="attention",
    state=KeyValueState,
    cost=cost,
    honours=frozenset({"bias", "blocks", "dropout", "weights", "lse"}),
    weights="exact",
    accepts_positions=("none", "sinusoidal", "learned", "rotary", "alibi", "relative"),
    domains={"log_gate": "log_decay"},
    projection=GatePredictor,
    waivers=(
        *(
            Waiver(
                name,
                "the mean of all queries is not known while they come in pieces",
                patterns=(Pattern.NONCAUSAL_CROSS,),
                variants=("mean gate",),
            )
            for name in ("memory", "layer_decoding")
        ),
        Waiver(
            "step",
            "an output is rounded before its gate and after it, each time by up to 2^-8 of it (0.0039)",
            patterns=(Pattern.CAUSAL_SELF,),
            variants=("wide hidden layer",),
            dtypes=(torch.bfloat16,),
        ),
    ),
)
