r"""Linear attention with learned feature maps plus a softmax window: what pretrained softmax layers can become.

When to pick it: to give the layers of a pretrained model a state of fixed size (`regard retrofit`): near tokens keep
their softmax, far ones are read through feature maps that learn to imitate it.
When not: training from scratch, where `gated_linear` and `delta_rule` learn what to forget.

Definition (LoLCATs, Zhang et al., arXiv 2410.10254, section 3; feature maps of Hedgehog, arXiv 2402.04347):

    a_ij = gamma exp(tau q_i . k_j - c_i)       for i - w < j <= i,       c_i = max of tau q_i . k_j over these j
    a_ij = phi(W_q q_i) . phi(W_k k_j)          for j <= i - w
    o_i  = sum_j a_ij v_j / sum_j a_ij,         phi(x) = [softmax(x), softmax(-x)] over the features

| paper | here |
|---|---|
| w | `window`; 0 for the linear state alone, which is Hedgehog |
| gamma, per head | `window_weight` (H,), positive; 1 when not given. The layer learns its logarithm, 0 at the start |
| W_q, W_k | `q_map`, `k_map` (H, D, F); the identity when not given. The layer learns them, from the identity |
| F | `features` per head, before the two signs; D when None |
| sum of phi(k) v^T and of phi(k) | `WindowedState.memory`, (B, H, 2F, V + 1); the sum of phi(k) is its last column |
| tau | `scale`, D^-0.5 by default |

Layout: (B, H, N, D). If the model rotates queries and keys, it does so in both parts. Ranks count valid
tokens. With a window of N or more the weights are those of softmax. Only causal-self: a token is written into the state
when it leaves the window, and other patterns have no such order.
State: the last w keys and values, right-aligned, and the sums over all tokens before them.
Deviations: every query head has its own maps, even where heads share keys. The official code trains with windows that
grow inside blocks for speed; here each query has its w keys, as in the paper's equation.
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
    Recurrence,
    Result,
    Shape,
    State,
    Tensors,
    Waiver,
    at_least,
    state_field,
)
from regard.core.precision import wide, without_autocast
from regard.engines import recurrent_forms
from regard.engines.cache import last_slots
from regard.engines.gated_recurrence import gated_recurrence

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

SMALLEST_BLOCK = 16
"""The smallest number of queries whose windows are computed together."""


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        window: w, the keys in the softmax, including the query's own; 0 for none.
        features: F, the output width of the layer's learned maps, >= 1; the head width when None.
    """

    window: int = 64
    features: int | None = None

    def __post_init__(self) -> None:
        at_least("window", self.window, 0)
        if self.features is not None:
            at_least("features", self.features, 1)


@dataclass(frozen=True)
class WindowedState(State):
    """The state from which a sequence continues.

    Attributes:
        memory: sums over the tokens before the window, in at least float32.
        k, v: keys and values of the window, right-aligned: the last slot holds the row's last token; slots before its
            first token are zero.
        length: number of tokens in each row.
    """

    memory: Float[Tensor, "b h f v"] = state_field()
    k: Float[Tensor, "b h w d"] = state_field()
    v: Float[Tensor, "b h w v"] = state_field()
    length: Int[Tensor, " b"] = state_field()


def phi(x: Float[Tensor, "b h n d"], map_: Float[Tensor, "h d f"] | None) -> Float[Tensor, "b h n g"]:
    """Hedgehog's feature map, applied to queries or keys after their learned linear map."""
    mapped = x if map_ is None else x @ map_.to(x.dtype)
    return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], -1)


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    q_map: Float[Tensor, "h d f"] | None = None,
    k_map: Float[Tensor, "h d f"] | None = None,
    window_weight: Float[Tensor, " h"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, with the full weight matrix."""
    n, m = q.shape[2], k.shape[2]
    pairs = torch.ones(n, m, dtype=torch.bool, device=q.device)
    far = pairs.tril(m - n - call.config.window)
    near = pairs.tril(m - n) & ~far
    weights = torch.where(far, phi(q, q_map) @ phi(k, k_map).mT, 0)
    some = near.any(-1, keepdim=True)
    if n and m and call.config.window:
        scores = (call.scale * q @ k.mT).masked_fill(~near & some, -torch.inf)
        gamma = 1 if window_weight is None else window_weight[:, None, None]
        weights = weights + torch.where(near, gamma * (scores - scores.amax(-1, keepdim=True)).exp(), 0)
    total = weights.sum(-1, keepdim=True)
    return weights @ v / torch.where(total > 0, total, 1)


def parallel(call: Call, q: Tensor, k: Tensor, v: Tensor, **learned: Tensor) -> Result:
    """Whole sequences, from an empty state."""
    return chunked(call if call.state is None else call.replace(state=None), q, k, v, **learned)


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    **learned: Tensor,
) -> Result:
    """Continue from the window and the sums by any number of tokens."""
    return _continued(call, q, k, v, max(call.config.window, SMALLEST_BLOCK), **learned)


def step(
    call: Call, q: Float[Tensor, "b h 1 d"], k: Float[Tensor, "b h 1 d"], v: Float[Tensor, "b h 1 v"], **learned: Tensor
) -> Result:
    """One token: softmax over the window; the token that leaves the window is added to the sums."""
    return _continued(call, q, k, v, 1, **learned)


def _continued(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    q_map: Float[Tensor, "h d f"] | None = None,
    k_map: Float[Tensor, "h d f"] | None = None,
    window_weight: Float[Tensor, " h"] | None = None,
) -> Result:
    past: WindowedState | None = call.state
    window, n, m = call.config.window, q.shape[2], k.shape[2]
    with without_autocast(q.device):
        if past is None:
            keys, values = (F.pad(x, (0, 0, window, 0)) for x in (k, v))
        else:
            keys, values = torch.cat([past.k, k.to(past.k.dtype)], 2), torch.cat([past.v, v.to(past.v.dtype)], 2)
        queries = wide(recurrent_forms.beside_keys(call, q, m))
        exists = _exists(call, window, m, k)  # for cached and new slots
        written = exists[:, :m] & _among(call, m, k)
        features = torch.where(written[:, None, :, None], phi(wide(keys[:, :, :m]), k_map), 0)
        ones = values.new_ones(*values.shape[:2], m, 1)
        sums, memory = gated_recurrence(
            phi(queries, q_map),
            features,
            wide(torch.cat([values[:, :, :m], ones], -1)),
            state=None if past is None else past.memory,
            chunk_size=call.chunk_size or 64,
            backend=call.backend,
        )
        assert sums is not None
        numerator, denominator = sums[..., :-1], sums[..., -1:]
        if window:
            near, total = _window(
                queries, wide(keys[:, :, 1:]), wide(values[:, :, 1:]), exists[:, 1:], window, block, call.scale
            )
            gamma = 1 if window_weight is None else wide(window_weight)[:, None, None]
            numerator, denominator = numerator + gamma * near, denominator + gamma * total
        output = numerator / torch.where(denominator > 0, denominator, 1)
    kept = [last_slots(x, call.memory_lengths, window, cached=True) for x in (keys, values)]
    state = WindowedState(memory, kept[0], kept[1], recurrent_forms.length_after(call, k))
    return Result(recurrent_forms.of_queries(call, output, n).to(v.dtype), state)


def _exists(call: Call, window: int, m: int, k: Tensor) -> Bool[Tensor, "b slots"]:
    """Return, for each cached and new slot, whether it is at or after the row's first token."""
    slots = torch.arange(-window, m, device=k.device)
    before = torch.zeros(k.shape[0], dtype=torch.long, device=k.device) if call.state is None else call.state.length
    return slots + before[:, None] >= 0


def _among(call: Call, m: int, k: Tensor) -> Bool[Tensor, "b m"]:
    """Return whether each new slot holds a valid token; each valid token moves another out of the window."""
    valid = call.valid_keys(m)
    return torch.ones(k.shape[0], m, dtype=torch.bool, device=k.device) if valid is None else valid


def _window(
    q: Float[Tensor, "b h m d"],
    k: Float[Tensor, "b h slots d"],
    v: Float[Tensor, "b h slots v"],
    exists: Bool[Tensor, "b slots"],
    window: int,
    block: int,
    scale: float,
) -> tuple[Float[Tensor, "b h m v"], Float[Tensor, "b h m 1"]]:
    """Sums over each query's window of exp(score - largest score), with and without values as factors.

    Query i attends to slots i to i + window - 1. A block of queries shares the keys that any of them sees, so memory
    grows only with N.
    """
    m, reach = q.shape[2], block + window - 1
    after = -m % block if m else block
    if torch.compiler.is_compiling():  # a program for all lengths needs at least two blocks
        after += 2 * block
    q = F.pad(q, (0, 0, 0, after)).unflatten(2, (-1, block))
    k, v = (F.pad(x, (0, 0, 0, after)).unfold(2, reach, block) for x in (k, v))  # (b, h, blocks, features, reach)
    shown = F.pad(exists, (0, after)).unfold(1, reach, block)[:, None, :, None]  # (b, 1, blocks, 1, reach)
    rows, columns = torch.arange(block, device=q.device)[:, None], torch.arange(reach, device=q.device)
    shown = shown & (rows <= columns) & (columns < rows + window)
    some = shown.any(-1, keepdim=True)
    scores = (scale * (q @ k)).masked_fill(~shown & some, -torch.inf)
    weights = torch.where(shown, (scores - scores.amax(-1, keepdim=True)).exp(), 0)
    near, total = weights @ v.mT, weights.sum(-1, keepdim=True)
    return near.flatten(2, 3)[:, :, :m], total.flatten(2, 3)[:, :, :m]


class FeatureMaps(Projection):
    """A layer's learned maps, initialised to the identity (its first columns if there are fewer features), and the
    logarithm of the window's weight, initialised to 0."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        width = spec.config.features or spec.head_dim
        start = torch.eye(spec.head_dim, width).expand(spec.heads, -1, -1)
        self.q_map, self.k_map = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        self.log_window_weight = nn.Parameter(torch.zeros(spec.heads)) if spec.config.window else None
        for parameter in self.parameters():
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        heads |= {"q_map": self.q_map, "k_map": self.k_map}
        if self.log_window_weight is not None:
            heads["window_weight"] = self.log_window_weight.exp()
        return heads


def recurrence(config: Config, maps: FeatureMaps) -> Recurrence[nn.Module]:
    """Describe the layer as a recurrence over its state, preceded by the window."""
    return Recurrence(
        maps=(maps.q_map, maps.k_map),
        scale=1.0,
        divisor=0.0,
        window=config.window,
        log_window_weights=maps.log_window_weight,
    )


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the window's softmax and of linear attention with 2 F mapped features and a normaliser."""
    features = 2 * (config.features or shape.dim_key)
    heads = shape.batch * shape.heads
    token = 4.0 * features * (shape.dim_value + 1) + 2.0 * features * shape.dim_key
    near = 2.0 * min(config.window, shape.m + 1) * (shape.dim_key + shape.dim_value)
    return Cost(
        flops=heads * shape.m * (token + near),
        memory=float(heads * shape.m * (2 * features + 3 * config.window + shape.dim_value)),
        state=float(
            shape.heads * (features * (shape.dim_value + 1) + config.window * (shape.dim_key + shape.dim_value))
        ),
        step_flops=heads * (token + near),
    )


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    config: Config,
    sizes: dict[str, int] | None = None,
    **_: Any,
) -> Tensors:
    """Inputs for tests: maps of a scale that keeps features distinct, and window weights on both sides of 1."""
    size = {"h": 2, "d": 8, "v": 6} | (sizes or {})
    heads, width = size["h"], size["d"]
    features = config.features or size.get("f", width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {
        "q": normal(batch, heads, n, width),
        "k": normal(batch, heads, m, width),
        "v": normal(batch, heads, m, size["v"]),
        "q_map": normal(heads, width, features) * width**-0.5,
        "k_map": normal(heads, width, features) * width**-0.5,
    }
    if config.window:
        tensors["window_weight"] = normal(heads).exp()
    return {name: x.to(dtype) for name, x in tensors.items()}


NO_WINDOW = "a token is written into the state when it leaves the window behind its query"

MECHANISM = Mechanism(
    name="lolcats",
    aliases=("windowed_linear", "hedgehog"),
    alias_options={"hedgehog": {"window": 0}},
    kind=Kind.ATTENTION,
    summary="Softmax over a window, and beyond it linear attention whose feature maps learn to copy softmax.",
    paper=Paper("LoLCATs: On Low-Rank Linearizing of Large Language Models", "2410.10254", 2024),
    inputs={"q": "bhnd", "k": "bhmd", "v": "bhmv", "q_map?": "hdf", "k_map?": "hdf", "window_weight?": "h"},
    patterns=(Pattern.CAUSAL_SELF,),
    refused=dict.fromkeys((Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS), NO_WINDOW),
    forms={"reference": reference, "parallel": parallel, "chunked": chunked, "step": step},
    config=Config,
    variants={"short window": {"window": 3}, "no window": {"window": 0}, "few features": {"features": 3, "window": 5}},
    engine="gated_recurrence",
    state=WindowedState,
    cost=cost,
    weights="implicit",
    domains={"window_weight": "positive"},
    sample_inputs=sample_inputs,
    projection=FeatureMaps,
    recurrence=recurrence,
    waivers=(
        Waiver(
            "gradient",
            "the weight of a window that holds all tokens changes nothing, and its derivative is rounding alone",
            holds_with={"window": 5},
            variants=("",),
        ),
    ),
)
