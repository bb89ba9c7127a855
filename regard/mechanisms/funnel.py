r"""Funnel pooling: attention layers that repeatedly halve the sequence and return its first token.

When to pick it: classifying long texts, where pooling should keep mixing tokens while it reduces their number: each
block costs half as much as the one before.
When not: pooling that should cost next to nothing (`low_rank_pooling`, the mean). For one output per token,
`regard.models.FunnelEncoder` has a decoder that returns to the full length, and `regard.models.PyramidEncoder` has
funnels between stages of any mechanism.

Definition (Dai et al., arXiv 2006.03236, section 2; survey arXiv 2103.14636, D3). Each block begins with

    h' = pool(h) by pairs of tokens, the first token (cls) apart:  h'_0 = h_0,  h'_j = mean(h_{2j-1}, h_{2j})
    h  = FF(LN(h' + Attention(Q = h', K = V = h)))                 (pool query only; the residual is the pooled h')

and continues with layers in which K = V = h'. FF(x) = LN(x + W_2 gelu(W_1 x)). Scores, with R_t the sinusoid of a
distance,

    a_ij = tau ((W_Q h'_i + u) . W_K h_j + (W_Q h'_i + w) . (W_R R_{t_i - t_j})),    R_t = [sin(t f), cos(t f)]

where t is the position of the first of the tokens pooled into one, and pairs with cls have no second term. The output
is the last h_0.

| paper | here |
|---|---|
| h (B, N, D) | `x` |
| W_Q, W_K, W_V, W_R (D, H, E) of each layer | `q`, `k`, `v`, `r` (L, H, D, E), `v_bias` (L, H, E) |
| u, w | `content_bias`, `distance_bias` (L, H, E) |
| projection after attention | `o` (L, H, E, D), `o_bias` (L, D) |
| W_1, W_2 | `up` (L, D, F), `down` (L, F, D) and their biases |
| both LN | `norm_weight`, `norm_bias` (L, 2, D): after attention, after the feed-forward part |
| blocks, layers of each | `blocks`, `layers`; L = blocks layers |

Layout: the output (B, 1, D) has no token axis; packed documents give one row each. A sequence without tokens gives 0.
Padding is gathered away, and each row is pooled at its own length: the last token may be alone in its pair.
Distances cost O(N D) at any length: sin and cos of a difference are sums of products, which widen queries and keys by
D.
Deviations: the paper's first block, before any pooling, belongs to the encoder. `truncate=True` drops the last token of
each sequence that is pooled, as the authors' code does when the first is kept apart; by default it is kept. There are
no segment embeddings, and no bias of keys, which would add the same to all scores of a query. Without `separate_first`
the output is the mean of the remaining tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
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
    valid_from_lengths,
)
from regard.core.precision import wide_dtype
from regard.core.sampling import normals
from regard.core.visibility import block_numbers
from regard.engines.attention import Ranks, Visibility, attention
from regard.layers.checks import check_tokens, given_context

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        blocks: number of blocks, each of which halves the sequence, >= 1.
        layers: layers per block, >= 1.
        pool: ``mean`` or ``max`` of two tokens.
        query_only: whether the first layer of a block reads the sequence before pooling.
        separate_first: whether the first token is kept apart and is the output.
        truncate: whether to drop the last token; needs `separate_first`.
        positions: whether scores depend on distances.
        norm_eps: added to the variance, > 0.
    """

    blocks: int = 2
    layers: int = 1
    pool: str = "mean"
    query_only: bool = True
    separate_first: bool = True
    truncate: bool = False
    positions: bool = True
    norm_eps: float = 1e-9

    def __post_init__(self) -> None:
        at_least("blocks", self.blocks, 1)
        at_least("layers", self.layers, 1)
        one_of("pool", self.pool, ("mean", "max"))
        if not self.norm_eps > 0:
            raise Unsupported(f"norm_eps={self.norm_eps}", supported="norm_eps > 0", nearest="norm_eps=1e-09")
        if self.truncate and not self.separate_first:
            raise Unsupported(
                "truncate without separate_first", supported="separate_first=True", nearest="truncate=False"
            )


def reference(call: Call, x: Float[Tensor, "b n d"], **weights: Tensor) -> Float[Tensor, "b 1 d"]:
    """The definition, with a sinusoid for each pair."""
    config, width = _checked(call, x, weights), x.shape[2]
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0], 1, width)
    apart = int(config.separate_first)
    frequency = 10000 ** (-torch.arange(width // 2, dtype=x.dtype, device=x.device) / (width // 2))
    h, place = x, torch.arange(x.shape[1], device=x.device)

    def paired(tokens: Tensor) -> Tensor:
        found = [tokens[:, i] for i in range(apart)]
        last = tokens.shape[1] - int(config.truncate and tokens.shape[1] > 2)
        for i in range(apart, last, 2):
            pair = tokens[:, i : min(i + 2, last)]
            found.append(pair.mean(1) if config.pool == "mean" else pair.amax(1))
        return torch.stack(found, 1)

    for index in range(config.blocks * config.layers):
        w = {name: tensor[index] for name, tensor in weights.items()}
        source, known = h, place
        if index % config.layers == 0:
            h = paired(h)
            place = torch.cat([place[:apart], place[apart::2]])[: h.shape[1]]
            source, known = (source, known) if config.query_only else (h, place)
        q = torch.einsum("bnd,hde->bhne", h, w["q"])
        k = torch.einsum("bnd,hde->bhne", source, w["k"])
        v = torch.einsum("bnd,hde->bhne", source, w["v"]) + w["v_bias"][:, None]
        scores = (q + w["content_bias"][:, None]) @ k.mT
        if config.positions:
            angle = (place[:, None] - known)[..., None] * frequency
            distances = torch.einsum("ijd,hde->hije", torch.cat([angle.sin(), angle.cos()], -1), w["r"])
            by_place = torch.einsum("bhie,hije->bhij", q + w["distance_bias"][:, None], distances)
            by_place[:, :, :apart] = 0
            by_place[..., :apart] = 0
            scores = scores + by_place
        attended = (call.scale * scores).softmax(-1) @ v
        y = torch.einsum("bhne,hed->bnd", attended, w["o"]) + w["o_bias"]
        h = _layer_norm(config, h + y, w, 0)
        inner = F.gelu(h @ w["up"] + w["up_bias"], approximate="tanh")
        h = _layer_norm(config, h + inner @ w["down"] + w["down_bias"], w, 1)
    return h[:, :1] if config.separate_first else h.mean(1, keepdim=True)


def parallel(call: Call, x: Float[Tensor, "b n d"], **weights: Tensor) -> Float[Tensor, "b 1 d"]:
    """All blocks on gathered rows, each half as long as the one before; distances enter by products of sines and
    cosines, so that no N x N x D tensor is made. The output (B, 1, D) is the first token, or the mean of the remaining
    ones."""
    h, lengths = _shortened(call, x, weights)
    if h.shape[1] == 0:
        return x.new_zeros(x.shape[0], 1, x.shape[2])
    if call.config.separate_first:
        pooled = h[:, :1]
    else:
        valid = valid_from_lengths(lengths, h.shape[1])[..., None]
        pooled = torch.where(valid, h, 0).sum(1, keepdim=True) / lengths.clamp(min=1)[:, None, None]
    return torch.where(lengths[:, None, None] > 0, pooled, 0).to(x.dtype)


def _shortened(
    call: Call, x: Float[Tensor, "b n d"], weights: Tensors
) -> tuple[Float[Tensor, "b s d"], Int[Tensor, " b"]]:
    """The output of all layers for right-padded sequences, in at least float32, and the number of tokens in each row."""
    config, wide = _checked(call, x, weights), wide_dtype(x)
    batch, n, _ = x.shape
    lengths = torch.full((batch,), n, device=x.device) if call.lengths is None else call.lengths
    h, place = x.to(wide), torch.arange(n, device=x.device)
    if x.numel() == 0:
        return h, lengths
    weights = {name: tensor.to(wide) for name, tensor in weights.items()}
    for index in range(config.blocks * config.layers):
        w = {name: tensor[index] for name, tensor in weights.items()}
        source, known, sources = h, place, lengths
        if index % config.layers == 0:
            h, place, lengths = _pooled(config, h, place, lengths)
            source, known, sources = (source, known, sources) if config.query_only else (h, place, lengths)
        y = _attended(call, w, h, place, source, known, sources)
        h = _layer_norm(config, h + y, w, 0)
        inner = F.gelu(h @ w["up"] + w["up_bias"], approximate="tanh")
        h = _layer_norm(config, h + inner @ w["down"] + w["down_bias"], w, 1)
    return h, lengths


def upsample(h: Float[Tensor, "b s d"], lengths: Int[Tensor, " b"], n: int, config: Config) -> Float[Tensor, "b n d"]:
    """Repeat the tokens of pooled sequences to their full length.

    Args:
        h: right-padded tokens after all blocks.
        lengths: number of tokens in each row of `h`.
        n: number of tokens before the first block.
        config: options of the funnel; `blocks` and `separate_first` are used.

    Returns:
        Each token 2^blocks times, at the positions that it was pooled from; the first only once if it is apart. Zero at
        the last positions if `truncate` has dropped them, and arbitrary in the padding.
    """
    apart = int(config.separate_first)
    source = apart + block_numbers(torch.arange(n, device=h.device) - apart, 2**config.blocks)
    return torch.where((source < lengths[:, None])[..., None], h[:, source], 0)


def _checked(call: Call, x: Tensor, weights: Tensors) -> Config:
    config: Config = call.config
    check_tokens(x, weights["q"].shape[2])
    if len(weights["q"]) != config.blocks * config.layers:
        raise Unsupported(
            f"funnel with the weights of {len(weights['q'])} layers",
            supported=f"blocks * layers = {config.blocks * config.layers}",
        )
    given = {"r", "distance_bias"} & set(weights)
    if len(given) != (2 if config.positions else 0):
        raise Unsupported(
            f"funnel with positions={config.positions} and {' and '.join(sorted(given)) or 'neither r nor distance_bias'}",
            supported="r and distance_bias with positions, neither without",
        )
    if config.positions and x.shape[-1] % 2:
        raise Unsupported(
            f"funnel with positions on {x.shape[-1]} features", supported="an even number", nearest="positions=False"
        )
    return config


def _layer_norm(config: Config, x: Float[Tensor, "b n d"], w: Tensors, which: int) -> Float[Tensor, "b n d"]:
    return F.layer_norm(x, x.shape[-1:], w["norm_weight"][which], w["norm_bias"][which], config.norm_eps)


def _pooled(
    config: Config, h: Float[Tensor, "b n d"], place: Int[Tensor, " n"], lengths: Int[Tensor, " b"]
) -> tuple[Float[Tensor, "b s d"], Int[Tensor, " s"], Int[Tensor, " b"]]:
    """Pool pairs of each row's valid tokens; return them, the positions of their first tokens, and the new lengths."""
    apart, n = int(config.separate_first), h.shape[1]
    end = lengths - 1 if config.truncate else lengths
    end = torch.where(lengths > 2, end, lengths) if config.truncate else end
    pairs = (n - apart + 1) // 2
    tokens = F.pad(h[:, apart:], (0, 0, 0, 2 * pairs - (n - apart))).unflatten(1, (pairs, 2))
    valid = (apart + torch.arange(2 * pairs, device=h.device) < end[:, None]).unflatten(1, (pairs, 2))
    if config.pool == "mean":
        pooled = torch.where(valid[..., None], tokens, 0).sum(2) / valid.sum(2).clamp(min=1)[..., None]
    else:
        lowest = torch.finfo(h.dtype).min
        pooled = torch.where(valid.any(2)[..., None], tokens.where(valid[..., None], lowest).amax(2), 0)
    new = torch.where(lengths > apart, apart + (end - apart + 1) // 2, lengths)
    return torch.cat([h[:, :apart], pooled], 1), torch.cat([place[:apart], place[apart::2]]), new


def _attended(
    call: Call, w: Tensors, h: Tensor, place: Tensor, source: Tensor, known: Tensor, lengths: Tensor
) -> Float[Tensor, "b s d"]:
    """The attention of a layer with its projections; distances enter as features of queries and keys."""
    config: Config = call.config
    q = torch.einsum("bnd,hde->bhne", h, w["q"])
    k = torch.einsum("bnd,hde->bhne", source, w["k"])
    v = torch.einsum("bnd,hde->bhne", source, w["v"]) + w["v_bias"][:, None]
    queries = q + w["content_bias"][:, None]
    if config.positions:
        half = h.shape[2] // 2
        here, there = _angles(place, half), _angles(known, half)
        sine, cosine = here.sin().to(h.dtype), here.cos().to(h.dtype)
        told = torch.cat([there.cos(), there.sin()], -1).to(h.dtype)
        by_place = torch.einsum("bhne,hde->bhnd", q + w["distance_bias"][:, None], w["r"])
        of_sine, of_cosine = by_place[..., :half], by_place[..., half:]
        # sin and cos of a difference: the factors of the cos and sin of the key's position
        asked = torch.cat([of_sine * sine + of_cosine * cosine, of_cosine * sine - of_sine * cosine], -1)
        if config.separate_first:
            asked, told = (F.pad(t[..., 1:, :], (0, 0, 1, 0)) for t in (asked, told))
        queries = torch.cat([queries, asked], -1)
        k = torch.cat([k, told.expand(*k.shape[:2], -1, -1)], -1)
    slots = torch.arange(source.shape[1], device=h.device)
    exists = torch.where(slots < lengths[:, None], slots, -1)
    where = Ranks(torch.arange(h.shape[1], device=h.device)[None], exists, None, None, plain=False)
    y, _, _ = attention(queries, k, v, where, visibility=Visibility(), scale=call.scale, backend=call.backend)
    return torch.einsum("bhne,hed->bnd", y, w["o"]) + w["o_bias"]


def _angles(places: Int[Tensor, " n"], half: int) -> Float[Tensor, "n half"]:
    """t f for each position and frequency, in float64 if available: phases must be exact to a fraction of a turn."""
    dtype = torch.float32 if places.device.type == "mps" else torch.float64
    exponent = -torch.arange(half, dtype=dtype, device=places.device) / half
    return places[:, None] * torch.pow(torch.full_like(exponent, 10000.0), exponent)


class FunnelPooling(nn.Module):
    """Funnel pooling as a layer, (B, N, D) -> (B, 1, D).

    Args:
        card: the mechanism.
        dim: width D of the tokens, even with positions.
        num_heads: heads H of all layers.
        pattern: noncausal-self.
        head_dim: width E of a head; dim / num_heads when None.
        feed_forward: hidden width F; 4 dim when None.
        config: the mechanism's options.
    """

    def __init__(
        self,
        card: Mechanism,
        dim: int,
        num_heads: int,
        *,
        pattern: str | Pattern = Pattern.NONCAUSAL_SELF,
        head_dim: int | None = None,
        feed_forward: int | None = None,
        config: Any = None,
    ) -> None:
        super().__init__()
        self.card, self.pattern = card, card.require_pattern(pattern)
        self.config: Config = card.options() if config is None else config
        at_least("num_heads", num_heads, 1)
        if head_dim is None and dim % num_heads:
            raise Unsupported(f"dim={dim} over num_heads={num_heads}", supported="a multiple, or head_dim")
        width = dim // num_heads if head_dim is None else head_dim
        inner = 4 * dim if feed_forward is None else feed_forward
        at_least("head_dim", width, 1)
        at_least("feed_forward", inner, 1)
        if self.config.positions and dim % 2:
            raise Unsupported(f"funnel with positions and dim={dim}", supported="even", nearest="positions=False")
        shapes = weight_shapes(self.config, dim, num_heads, width, inner)
        self.weights = nn.ParameterDict({name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise matrices as normal with variance 1 / fan-in, norms to 1, all biases to 0."""
        for name, parameter in self.weights.items():
            if name == "norm_weight":
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=_fan_in(name, parameter.shape) ** -0.5)

    def forward(
        self, x: Float[Tensor, "b n d"], memory: None = None, *, context: Context | None = None, state: None = None
    ) -> Result:
        """Pool each sequence.

        Args:
            x: tokens, padded anywhere or packed, as `context.mask` says.

        Returns:
            output (B, 1, D), one row per document when packed.

        Raises:
            Unsupported: for memory, a state, roles, or masks on pairs.
        """
        context = given_context(context)
        if memory is not None:
            raise Unsupported(f"memory with {self.card.name}", supported="layer(x)", nearest="softmax")
        return apply(
            self.card,
            {"x": x, **self.weights},
            pattern=self.pattern,
            mask=context.mask,
            config=self.config,
            state=state,
            return_state="state" in context.want,
            roles=context.roles,
            want=context.want - {"state"},
        )

    def shorten(
        self, x: Float[Tensor, "b n d"], lengths: Int[Tensor, " b"] | None = None
    ) -> tuple[Float[Tensor, "b s d"], Int[Tensor, " b"]]:
        """Pool right-padded tokens by all blocks; return them and their number in each row. See :func:`upsample`.

        Args:
            x: right-padded tokens.
            lengths: number of tokens in each row; None when all are valid.
        """
        scale = self.weights["k"].shape[-1] ** -0.5
        h, left = _shortened(Call(self.pattern, self.config, scale=scale, lengths=lengths), x, {**self.weights})
        return h.to(x.dtype), left


def weight_shapes(config: Config, dim: int, heads: int, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all inputs but x, by name."""
    count = config.blocks * config.layers
    matrix, bias = (count, heads, dim, width), (count, heads, width)
    shapes = {name: matrix for name in "qkv"} | {"v_bias": bias, "content_bias": bias}
    if config.positions:
        shapes |= {"distance_bias": bias, "r": matrix}
    return shapes | {
        "o": (count, heads, width, dim),
        "o_bias": (count, dim),
        "up": (count, dim, inner),
        "up_bias": (count, inner),
        "down": (count, inner, dim),
        "down_bias": (count, dim),
        "norm_weight": (count, 2, dim),
        "norm_bias": (count, 2, dim),
    }


def _fan_in(name: str, shape: Sequence[int]) -> int:
    return shape[1] * shape[2] if name == "o" else shape[-2]


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
    """Random inputs for tests, of an even width, with weights like those of a layer: biases small, norms near 1."""
    widths = {"d": 8, "h": 2, "e": 4, "f": 6} | (sizes or {})
    dim = widths["d"] + widths["d"] % 2
    shapes = weight_shapes(config, dim, widths["h"], widths["e"], widths["f"])
    found = normals(generator, {"x": (batch, n, dim)} | shapes, torch.float64)
    for name in shapes:
        if name == "norm_weight":
            found[name] = 1 + 0.3 * found[name]
        elif name.endswith("bias"):
            found[name] = 0.1 * found[name]
        else:
            found[name] = found[name] * _fan_in(name, shapes[name]) ** -0.5
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    """Hidden width of the feed-forward part: four times the width of a token."""
    return {"f": 4 * shape.heads * shape.dim_value}


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of all layers with projections; heads are as wide as values, the feed-forward part 4 times as wide as x."""
    heads, dim = shape.heads, shape.heads * shape.dim_value
    flops, memory, n = 0.0, 0.0, float(shape.n)
    for _ in range(config.blocks):
        for layer in range(config.layers):
            source, n = (n, (n + 1) / 2) if layer == 0 else (n, n)
            source = source if config.query_only else n
            extra = dim if config.positions else 0
            flops += 2 * n * source * (2 * dim + heads * extra)  # scores and weighted sums of values
            flops += 2 * dim * dim * ((3 if config.positions else 2) * n + 2 * source + 8 * n)
            memory += (n + source) * (2 * dim + heads * extra) + 4 * n * dim
    return Cost(flops=shape.batch * flops, memory=shape.batch * memory, state=0.0, step_flops=0.0)


_WITHOUT_TOKENS = "the output has no token axis, and pairs of tokens see all others"
_WITHOUT_MEMORY = "queries are pooled from the sequence that they read"

MECHANISM = Mechanism(
    name="funnel",
    aliases=("funnel_transformer", "funnel_pooling"),
    kind=Kind.POOLING,
    summary="Attention layers whose queries are pooled in pairs halve a sequence block by block, until its first token is left.",
    paper=Paper(
        "Funnel-Transformer: Filtering out Sequential Redundancy for Efficient Language Processing",
        "2006.03236",
        2020,
        18,
    ),
    inputs={
        "x": "bnd",
        "q": "lhde",
        "k": "lhde",
        "v": "lhde",
        "v_bias": "lhe",
        "content_bias": "lhe",
        "o": "lhed",
        "o_bias": "ld",
        "up": "ldf",
        "up_bias": "lf",
        "down": "lfd",
        "down_bias": "ld",
        "norm_weight": "lzd",
        "norm_bias": "lzd",
        "distance_bias?": "lhe",
        "r?": "lhde",
    },
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
        "truncated": {"blocks": 3, "truncate": True},
        "maxima": {"blocks": 1, "layers": 2, "pool": "max"},
        "all tokens pooled": {"separate_first": False, "norm_eps": 1e-5},
        "no positions": {"query_only": False, "positions": False},
    },
    engine="attention",
    cost=cost,
    axis_sizes=axis_sizes,
    weights="implicit",
    accepts_positions=("none",),
    sample_inputs=sample_inputs,
    module=FunnelPooling,
)
