r"""Local attention: softmax over the keys near the query only.

When to pick it: long sequences where most of what matters is close by, or most layers of a stack in which a few full
layers carry information further (MASFormer); time is linear in N and the state has a fixed size.
When not: recall beyond the combined reach of the layers, or cross attention (memory has no place near a query).

Definition (MASFormer, arXiv 2310.12442, section 3; the `local` baseline of CAB, arXiv 2210.07661):

    P_i = softmax over visible j of (tau q_i . k_j + bias_ij),   o_i = sum_j P_ij v_j

| form | causal: j <= i and | noncausal |
|---|---|---|
| `window` | j > i - w (w keys, the query's own included) | abs(i - j) <= w (2 w + 1 keys) |
| `block` | floor(j/b) >= floor(i/b) - p | abs(floor(i/b) - floor(j/b)) <= p |

| paper | here |
|---|---|
| w (CAB's wsize) | `window` |
| b, block size | `block` |
| p, previous blocks | `lookback` |
| tau | `scale`, D^-0.5 by default |

The two forms differ at block starts: the first query of a block sees p b + 1 keys, the last (p + 1) b. With p = 0
blocks are independent. Over L causal layers information travels at most L (w - 1) or L p b + b - 1 ranks.

Layout: (B, H, N, D); keys and values may have fewer heads (grouped queries). Ranks count valid tokens, so a window
covers w valid keys whatever padding lies between.
State: the keys the next token may reach, w - 1 or (p + 1) b - 1 of them, right-aligned; its size never changes.
Deviations: which layers of a stack use full attention is decided by the model (:func:`regard.models.masformer_plan`),
not by this mechanism. The CAB code combines window and padding with AND, so that padded keys leak; here both must allow
a key. A tensor bias over pairs (not a position bias) is refused with a state, because its columns could not refer to
cached keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.contract import (
    Call,
    Cost,
    Kind,
    Mechanism,
    Paper,
    Pattern,
    Result,
    Shape,
    TrainedModel,
    Unsupported,
    Waiver,
    at_least,
    one_of,
)
from regard.core.visibility import CountedRanks
from regard.engines import attention_forms
from regard.engines.attention import Visibility, attention_reference, masked_scores_bias, ranks
from regard.engines.cache import WindowState, extend_window, next_in_window

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        form: ``window`` or ``block``.
        window: w of the window form, >= 1.
        block: b of the block form, >= 1.
        lookback: p of the block form, >= 0: blocks seen before the query's own block (and after it, when noncausal).
    """

    form: str = "window"
    window: int = 15
    block: int = 64
    lookback: int = 1

    def __post_init__(self) -> None:
        one_of("form", self.form, ("window", "block"))
        at_least("window", self.window, 1)
        at_least("block", self.block, 1)
        at_least("lookback", self.lookback, 0)

    @property
    def cached(self) -> int:
        """The number of past keys to keep: all that the next token may reach."""
        return self.window - 1 if self.form == "window" else (self.lookback + 1) * self.block - 1

    def reached(self, count: int) -> int:
        """The number of keys that the last of `count` tokens attends to."""
        if self.form == "window":
            return min(count, self.window)
        return min(count, self.lookback * self.block + (count - 1) % self.block + 1)


def reference(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Float[Tensor, "b h n v"]:
    """The definition, with the full weight matrix."""
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    visible, bias = masked_scores_bias(where, _visibility(call), call.bias, call.position_bias, call.blocks, q.dtype)
    return attention_reference(q, k, v, visible, lambda scores: scores.softmax(-1), call.scale, bias)


def parallel(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Result:
    """Softmax attention that computes only visible blocks: time is proportional to N times the window."""
    return attention_forms.parallel(call, q, k, v, visibility=_visibility(call))


def chunked(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Result:
    """Continue from the cached keys by any number of tokens; also used as the step."""
    if call.state is not None and call.bias is not None:
        raise Unsupported("local attention with a bias of pairs and a state", supported="a position bias, or no state")
    if call.position_bias is call.blocks is None and not call.want:
        found = next_in_window(call, call.state, k, v, call.config.cached)
        if found is not None:
            state, keys, values, count = found
            seen = call.config.reached(count)
            keys, values = (x.narrow(2, x.shape[2] - seen, seen) for x in (keys, values))
            all_of_them = CountedRanks(1, seen, 0, True, k.device)
            return attention_forms.attend(call, q, keys, values, all_of_them, state, visibility=Visibility())
    state, keys, values, where = extend_window(call, k, v, q.shape[2], call.config.cached)
    return attention_forms.attend(call, q, keys, values, where, state, visibility=_visibility(call))


def _visibility(call: Call) -> Visibility:
    config: Config = call.config
    causal = call.pattern.causal
    if config.form == "block":
        ahead = 0 if causal else config.lookback
        return Visibility(causal=causal, block=config.block, lookback=config.lookback, lookahead=ahead)
    if causal:
        return Visibility(causal=True, left=config.window - 1)
    return Visibility(left=config.window, right=config.window)


def visible_pairs(config: Config, n: int) -> int:
    """The exact number of query-key pairs that causal local attention computes for a sequence of `n` tokens.

    Full causal attention has n (n + 1) / 2; the ratio of the two is the saving of a local layer.
    """
    if config.form == "window":
        full = min(config.window, n)
        return full * (full + 1) // 2 + (n - full) * full
    pairs = 0
    blocks, rest = divmod(n, config.block)
    for size, number in ((config.block, blocks), (rest, 1)):
        pairs += number * size * (size + 1) // 2
    # query block beta sees min(beta, p) whole blocks before its own
    earlier = sum(min(beta, config.lookback) for beta in range(min(blocks, config.lookback)))
    earlier += max(0, blocks - config.lookback) * config.lookback
    return pairs + earlier * config.block**2 + min(blocks, config.lookback) * config.block * rest


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the causal pattern with N = M (scaled in proportion for n < M queries)."""
    width = shape.dim_key + shape.dim_value
    heads = shape.batch * shape.heads
    pairs = visible_pairs(config, shape.m) * shape.n / max(shape.m, 1)
    return Cost(
        flops=2.0 * heads * pairs * width,
        memory=float(heads * shape.n),
        state=float(shape.heads * config.cached * width),
        step_flops=2.0 * heads * min(config.cached + 1, shape.m + 1) * width,
    )


def in_trained_models(model: TrainedModel) -> dict[str, Any]:
    """A layer that reads about half of a training text, at most 1024 tokens on a side, as MASFormer's blocks."""
    form = model.given.get("form", "window")
    reach = min(1024, max(1, model.length // (2 if model.pattern.causal else 4)))
    width = {"window": reach} if form == "window" else {"block": max(1, reach // 2)}
    return {name: value for name, value in width.items() if name not in model.given}


MECHANISM = Mechanism(
    name="local",
    aliases=("masformer", "sliding_window", "window", "block_local"),
    alias_options={"masformer": {"form": "block", "block": 512}, "block_local": {"form": "block"}},
    kind=Kind.ATTENTION,
    summary="Softmax over the keys near the query only.",
    paper=Paper(
        "Efficient Long-Range Transformers: You Need to Attend More, but Not Necessarily at Every Layer",
        "2310.12442",
        2023,
        27,
    ),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv"},
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
    refused={
        Pattern.NONCAUSAL_CROSS: "memory tokens have no position relative to a query",
        Pattern.CAUSAL_CROSS: "memory tokens have no position relative to a query",
    },
    forms={"reference": reference, "parallel": parallel, "chunked": chunked, "step": chunked},
    config=Config,
    variants={
        "short window": {"window": 3},
        "blocks": {"form": "block", "block": 4},
        "blocks alone": {"form": "block", "block": 5, "lookback": 0},
        "blocks, far back": {"form": "block", "block": 3, "lookback": 2},
    },
    engine="attention",
    state=WindowState,
    in_trained_models=in_trained_models,
    cost=cost,
    honours=frozenset({"bias", "blocks", "dropout", "weights", "lse"}),
    weights="exact",
    waivers=(
        Waiver(
            "reference",
            "PyTorch's kernel rounds weights to bfloat16, each by up to 2^-8 of it (0.0039), before the output is rounded too",
            patterns=(Pattern.NONCAUSAL_SELF,),
            variants=("short window",),
            dtypes=(torch.bfloat16,),
            backends=("torch",),
        ),
    ),
    accepts_positions=("none", "sinusoidal", "learned", "rotary", "alibi", "relative", "toeplitz"),
)
