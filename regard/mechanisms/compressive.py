r"""Compressive Transformer: inputs that leave the memory of earlier segments are compressed, not forgotten.

When to pick it: like `transformer_xl`, but where each slot of state should summarise c times as many tokens.
When not: where exact recall of far tokens matters (a group of c tokens has one key), or where there is no distant
context.

Definition (Rae et al., arXiv 1911.05507, section 3), for a segment of L tokens with inputs h:

    m    = SG(the last M inputs of this layer before the segment)
    z    = SG of the last C of f_c(groups of c inputs, one after the other, that lie before the memory)
    q    = h W_q^T,     k, v = [z; m; h] W_k^T, [z; m; h] W_v^T
    A_ij = tau ((q_i + u) . k_j + (q_i + w) . W_r r_{i-j})
    o_i  = softmax over j of A_ij, j <= i, times v_j

SG stops gradients; i - j counts slots of [z; m; h], and r is the sinusoid of `transformer_xl`. At the end of each segment
the L oldest inputs o of the memory are compressed into L / c slots. f_c is a convolution of width and stride c, a mean, or a
maximum. The convolution learns only to reconstruct what attention would have read from the inputs
(`losses["reconstruction"]`, in training):

    mean over queries and features of (a(q, o W_k^T, o W_v^T) - a(q, f_c(o) W_k^T, f_c(o) W_v^T))^2,
    a(q, k, v) = softmax(tau q k^T) v,     with q, o, W_k and W_v detached

| paper | here |
|---|---|
| n_s | `segment` |
| n_m | `memory`, at least `segment` |
| n_cm | `compressed`: slots |
| c | `ratio`, a divisor of `segment` and `memory` |
| f_c | `compression`: ``conv``, ``mean`` or ``max`` |
| cm W_k^T, cm W_v^T | `k_compressed`, `v_compressed`: at each token, the slot of the c tokens that end there; read only where these are a group |
| SG(h) W_k^T, SG(h) W_v^T | `k_past`, `v_past`: read by later segments in place of `k` and `v` (with equal values) |
| tau | `scale`, D^-0.5 by default |

Layout: (B, H, N, D); keys and values may have fewer heads (grouped queries). Groups are ranks 0 to c - 1, c to 2 c - 1,
..., and are never cut by borders of segments or of the memory. In noncausal-self a token sees all of its segment.
State: keys and values of the last M + L - 1 tokens, and of the C + (M + L) / c - 1 groups that may yet be read; the
layer adds the inputs of the unfinished group and, in training, the inputs of all of these, as `transformer_xl` does.
Deviations: each group is compressed when it is complete; it is read, and its reconstruction is learned, when it leaves
the memory. In a model, the memory of a layer holds inputs of its mixer, after the norm. Queries whose segment pushes
nothing out of the memory do not contribute to the loss, nor does a training call that begins inside a segment. Models
add the loss with weight 1, as the paper does; it trains only f_c. Dilated convolutions and most-used tokens as f_c, and
the paper's reconstruction of inputs, are left out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from regard.contract import (
    Call,
    Cost,
    Kind,
    LayerCall,
    LayerSpec,
    Loss,
    Mechanism,
    Paper,
    Pattern,
    Result,
    Shape,
    State,
    Tensors,
    Unsupported,
    Waiver,
    at_least,
    one_of,
    state_field,
)
from regard.core.padding import pad_tokens
from regard.core.precision import wide
from regard.core.visibility import block_numbers
from regard.engines.attention import Ranks, Visibility, attention
from regard.engines.cache import take
from regard.engines.segment_attention import GroupState, Reach, segment_attention, windows
from regard.layers.attention import LayerState
from regard.layers.segment_recurrence import InputState, SegmentLayer, last_inputs
from regard.mechanisms.transformer_xl import NO_PLACE, RelativeScores, read_optional, relative_rows
from regard.mechanisms.transformer_xl import sample_inputs as sample_tokens

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        segment: L >= 1, a multiple of `ratio`.
        memory: M >= L, a multiple of `ratio`.
        compressed: C >= 1, slots of the compressed memory.
        ratio: c >= 1, tokens per slot.
        compression: f_c of a layer: ``conv``, ``mean`` or ``max``.
        clamp: >= 0, slots farther away count as if at this distance; None for no clamp.
    """

    segment: int = 32
    memory: int = 32
    compressed: int = 16
    ratio: int = 4
    compression: str = "conv"
    clamp: int | None = None

    def __post_init__(self) -> None:
        for name in ("segment", "compressed", "ratio"):
            at_least(name, getattr(self, name), 1)
        at_least("memory", self.memory, self.segment)
        for name in ("segment", "memory"):
            if getattr(self, name) % self.ratio:
                raise Unsupported(
                    f"{name}={getattr(self, name)} with ratio={self.ratio}",
                    supported="a multiple of the ratio",
                    nearest=f"{name}={-(-getattr(self, name) // self.ratio) * self.ratio}",
                )
        one_of("compression", self.compression, ("conv", "mean", "max"))
        if self.clamp is not None:
            at_least("clamp", self.clamp, 0)

    @property
    def cached(self) -> int:
        """Number of past tokens that the next token may see."""
        return self.reach.cached

    @property
    def reach(self) -> Reach:
        """Segment, memory and compressed memory, in the engine's form."""
        return Reach(self.segment, self.memory, self.compressed, self.ratio)


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    k_compressed: Float[Tensor, "b g m d"],
    v_compressed: Float[Tensor, "b g m v"],
    u: Float[Tensor, "h d"] | None = None,
    w: Float[Tensor, "h d"] | None = None,
    relative: Float[Tensor, "h c d"] | None = None,
    k_past: Float[Tensor, "b g m d"] | None = None,
    v_past: Float[Tensor, "b g m v"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, one segment after the other."""
    config: Config = call.config
    heads = q.shape[1] // k.shape[1]
    sources = [(k_compressed, v_compressed), (k if k_past is None else k_past, v if v_past is None else v_past), (k, v)]
    outputs = []
    for start in range(0, q.shape[2], config.segment):
        first = max(0, start - config.memory)
        ends = range(config.ratio - 1, first, config.ratio)[-config.compressed :]
        parts = [
            torch.tensor(ends, dtype=torch.long, device=q.device),
            torch.arange(first, start, device=q.device),
            torch.arange(start, min(start + config.segment, k.shape[2]), device=q.device),
        ]
        taken = [(a[:, :, part], b[:, :, part]) for (a, b), part in zip(sources, parts, strict=True)]
        keys, values = (torch.cat(x, 2).repeat_interleave(heads, 1) for x in zip(*taken, strict=True))
        queries = q[:, :, start : start + config.segment]
        size, seen = queries.shape[2], keys.shape[2]
        distance = torch.arange(size, device=q.device)[:, None] - torch.arange(seen, device=q.device) + seen - size
        scores = (queries if u is None else queries + u[:, None]) @ keys.mT
        if relative is not None:
            asking = queries if w is None else queries + w[:, None]
            rows = relative_rows(distance, relative, config.clamp)
            scores = scores + torch.einsum("bhid,hijd->bhij", asking, rows)
        if call.pattern.causal:
            scores = scores.masked_fill(distance < 0, -torch.inf)
        outputs.append((call.scale * scores).softmax(-1) @ values)
    return torch.cat(outputs, 2) if outputs else v.new_zeros(*q.shape[:3], v.shape[-1])


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    k_compressed: Float[Tensor, "b g m d"],
    v_compressed: Float[Tensor, "b g m v"],
    u: Float[Tensor, "h d"] | None = None,
    w: Float[Tensor, "h d"] | None = None,
    relative: Float[Tensor, "h c d"] | None = None,
    k_past: Float[Tensor, "b g m d"] | None = None,
    v_past: Float[Tensor, "b g m v"] | None = None,
) -> Result:
    """All segments in parallel; in causal-self from state to state, by any number of tokens."""
    config: Config = call.config
    distances, past = read_optional("compressive", q, k, w, relative, k_past, v_past, config.clamp)
    groups = (k_compressed, v_compressed)
    return segment_attention(call, q, k, v, config.reach, u=u, distances=distances, past=past, groups=groups)


class Compression(RelativeScores):
    """A layer's u, w, W_r, and f_c."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        config: Config = spec.config
        self.compression, width = config.compression, config.ratio * spec.dim
        # on a group's inputs side by side, which is a convolution as wide as its stride
        self.convolution = spec.linear(width, spec.dim, bias=True) if config.compression == "conv" else None

    def compress(self, groups: Float[Tensor, "b e c d"]) -> Float[Tensor, "b e d"]:
        """f_c of groups of inputs."""
        if self.convolution is not None:
            return self.convolution(groups.flatten(2))
        return groups.mean(2) if self.compression == "mean" else groups.amax(2)


@dataclass(frozen=True)
class TrainingState(InputState):
    """The last M + L - 1 inputs, and the last compressed groups of inputs, as many as the mechanism's state has."""

    compressed: Float[Tensor, "b groups c"] = state_field()


class CompressiveLayer(SegmentLayer):
    """A layer that compresses its inputs. In training, calls that begin inside a segment add nothing to the loss."""

    takes_convolutions = False
    projection: Compression

    def _project(
        self, heads: Tensors, call: LayerCall, state: LayerState | None
    ) -> tuple[Tensors, State | None, dict[str, Loss]]:
        heads, kept, losses = super()._project(heads, call, state)
        x, lengths = call.x, call.lengths
        assert x is not None
        old: InputState | None = None if state is None else state.projection  # type: ignore[assignment]
        if not self.training:
            heads = heads | self._new_heads(heads, x, old)
            return heads, last_inputs(old, x, lengths, self.config.ratio - 1), losses
        assert isinstance(kept, InputState)
        if self._begins_with_a_segment(old):
            seen = x.detach() if old is None else torch.cat([self._memory(old), x.detach()], 1)
            compressed = self.projection.compress(_groups(seen, self.config.ratio))
            first = (seen.shape[1] - x.shape[1]) // self.config.ratio
            if self.projection.convolution is not None:
                groups = self._compressed_heads(compressed, frozen=True)
                losses = losses | {"reconstruction": self._reconstruction(heads, groups, first, lengths, state)}
            in_memory, new = compressed.detach().tensor_split([first], 1)
        else:
            in_memory, new = None, self._new_groups(x.detach(), old).detach()
        queue = torch.cat([self._queue(x, old, in_memory), new], 1)
        before = 0 if old is None else old.length // self.config.ratio
        last = (kept.length // self.config.ratio - before)[:, None]
        last = last + torch.arange(self.config.reach.queued, device=x.device)
        kept = TrainingState(kept.inputs, kept.length, take(queue[:, None], last)[:, 0])
        return heads | self._compressed_heads(self._at_ends(new, x.shape[1], old)), kept, losses

    def _begins_with_a_segment(self, old: InputState | None) -> bool:
        if old is None:
            return True
        if torch.compiler.is_compiling():
            raise Unsupported(
                "compressive in training, compiled, with a state", supported="whole sequences, or eager calls"
            )
        return bool((old.length % self.config.segment == 0).all())

    def _new_heads(self, heads: dict[str, Tensor], x: Tensor, old: InputState | None) -> dict[str, Tensor]:
        """Keys and values of the groups that end within a call; zeros if none does, as in most steps."""
        if old is not None and not torch.compiler.is_compiling():
            ratio = self.config.ratio
            if not bool((old.length % ratio + x.shape[1] >= ratio).any()):
                return {f"{name}_compressed": torch.zeros_like(heads[name]) for name in ("k", "v")}
        return self._compressed_heads(self._at_ends(self._new_groups(x, old), x.shape[1], old))

    def _new_groups(self, x: Float[Tensor, "b n c"], old: InputState | None) -> Float[Tensor, "b e c"]:
        """Compressed groups that end within a call; entries after a row's last group are meaningless."""
        ratio, n = self.config.ratio, x.shape[1]
        if old is None:
            return self.projection.compress(_groups(x, ratio))
        x = torch.cat([old.inputs[:, old.inputs.shape[1] - (ratio - 1) :], x.to(old.inputs.dtype)], 1)
        begin = ratio - 1 - old.length % ratio  # start of the unfinished group
        place = begin[:, None] + torch.arange(-(-n // ratio) * ratio, device=x.device)
        return self.projection.compress(_groups(take(x[:, None], place.clamp(max=max(x.shape[1] - 1, 0)))[:, 0], ratio))

    def _at_ends(self, compressed: Float[Tensor, "b e c"], n: int, old: InputState | None) -> Float[Tensor, "b n c"]:
        """Repeat each group that ends within a call at all of its tokens in the call."""
        ratio, device = self.config.ratio, compressed.device
        if compressed.shape[1] == 0:
            return compressed.new_zeros(compressed.shape[0], n, compressed.shape[2])
        token = torch.arange(n, device=device)[None]
        group = block_numbers(token if old is None else old.length[:, None] % ratio + token, ratio)
        index = group.expand(compressed.shape[0], -1).clamp(max=compressed.shape[1] - 1)
        return take(compressed[:, None], index)[:, 0]

    def _compressed_heads(self, compressed: Float[Tensor, "b e c"], *, frozen: bool = False) -> dict[str, Tensor]:
        """Keys and values of compressed inputs; with `frozen`, no gradient reaches the projections."""
        found = {}
        for name, module, norm in (("k", self.key, self.key_norm), ("v", self.value, self.value_norm)):
            assert module is not None
            y = _frozen(module, compressed) if frozen else module(compressed)
            y = y.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
            if norm is not None:
                y = _frozen(norm, y) if frozen else norm(y)
            found[f"{name}_compressed"] = y
        return found

    def _memory(self, old: InputState) -> Float[Tensor, "b memory c"]:
        return old.inputs[:, old.inputs.shape[1] - self.config.memory :]

    def _queue(
        self, x: Tensor, old: InputState | None, in_memory: Float[Tensor, "b e c"] | None
    ) -> Float[Tensor, "b groups c"]:
        """The compressed groups of a state; `in_memory`, if given, replaces those in the memory."""
        queued = self.config.reach.queued
        if old is None:
            return x.new_zeros(x.shape[0], queued, x.shape[2])
        assert isinstance(old, TrainingState)
        if in_memory is None:
            return old.compressed
        return torch.cat([old.compressed[:, : queued - in_memory.shape[1]], in_memory], 1)

    def _projected_again(self, state: LayerState) -> LayerState:
        old = state.projection
        if not isinstance(old, TrainingState):
            return super()._projected_again(dataclasses.replace(state, projection=None))  # refuses it
        state = super()._projected_again(state)
        in_memory = None
        if self._begins_with_a_segment(old):
            with torch.no_grad():
                in_memory = self.projection.compress(_groups(self._memory(old), self.config.ratio))
        groups = self._compressed_heads(self._queue(old.inputs, old, in_memory))
        mechanism = dataclasses.replace(state.mechanism, group_k=groups["k_compressed"], group_v=groups["v_compressed"])
        return dataclasses.replace(state, mechanism=mechanism)

    def _reconstruction(
        self,
        heads: Tensors,
        groups: Tensors,
        first: int,
        lengths: Int[Tensor, " b"] | None,
        state: LayerState | None,
    ) -> Loss:
        """Squared error between queries' attention to the inputs that leave the memory, and to their groups.

        Args:
            groups: keys and values of the `first` groups in the memory, then of the call's groups.
        """
        config: Config = self.config
        reach, ratio, size = config.reach, config.ratio, config.segment
        q, memory = heads["q"].detach(), config.memory
        n = q.shape[2]
        count = max(1, -(-n // size))
        missing = memory // ratio - first
        pairs = []
        for name in ("k", "v"):
            old = heads[name].detach()
            if state is not None:
                old = torch.cat([getattr(state.mechanism, name)[:, :, reach.cached - memory :].detach(), old], 2)
            old = pad_tokens(old, memory + n - old.shape[2], count * size - n)
            new = groups[f"{name}_compressed"]
            new = pad_tokens(new, missing, max(0, count * size // ratio - (new.shape[2] - first)))
            pairs.append((windows(old, size, size, count), windows(new, size // ratio, size // ratio, count)))
        start = q.new_zeros(q.shape[0], dtype=torch.long) if state is None else state.length
        begin = start[:, None] + torch.arange(0, count * size, size, device=q.device) - memory  # b count
        queries = pad_tokens(q, 0, count * size - n).unflatten(2, (count, size))
        exact, summary = (
            _content(queries, keys, values, begin[..., None] + step * torch.arange(keys.shape[3], device=q.device) >= 0)
            for (keys, values), step in zip(zip(*pairs, strict=True), (1, ratio), strict=True)
        )
        token = torch.arange(count * size, device=q.device).view(1, count, size)
        valid = token < (n if lengths is None else lengths[:, None, None])
        counted = (valid & (begin + size > 0)[..., None])[:, None, ..., None]
        squares = (exact - summary).square().masked_fill(~counted, 0)
        return squares.sum(), counted.sum() * q.shape[1] * exact.shape[-1]


def _groups(x: Float[Tensor, "b n d"], ratio: int) -> Float[Tensor, "b e c d"]:
    """Split tokens into complete groups."""
    return x[:, : x.shape[1] // ratio * ratio].unflatten(1, (x.shape[1] // ratio, ratio))


def _frozen(module: nn.Module, x: Tensor) -> Tensor:
    return functional_call(module, {name: p.detach() for name, p in module.named_parameters()}, (x,))


def _content(
    q: Float[Tensor, "b h s n d"],
    k: Float[Tensor, "b g s m d"],
    v: Float[Tensor, "b g s m v"],
    exists: Bool[Tensor, "b s m"],
) -> Float[Tensor, "b h s n v"]:
    """softmax(tau q k^T) v of each segment, over the slots that exist."""
    queries, keys, values = (wide(x).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    slots = torch.arange(k.shape[3], device=k.device)
    present = torch.where(exists, slots, -1).flatten(0, 1)
    where = Ranks(torch.arange(q.shape[3], device=q.device)[None], present, None, None, plain=False)
    output = attention(queries, keys, values, where, visibility=Visibility(), scale=q.shape[-1] ** -0.5)[0]
    return output.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


def sample_inputs(
    generator: torch.Generator, *, batch: int, n: int, m: int, dtype: torch.dtype, **more: object
) -> Tensors:
    """Inputs for tests and timings, without `k_past` and `v_past`, which equal k and v."""
    found = sample_tokens(generator, batch=batch, n=n, m=m, dtype=dtype, **more)  # type: ignore[arg-type]
    for name in ("k", "v"):
        shape = found[name].shape
        found[f"{name}_compressed"] = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return found


def visible_slots(config: Config, i: int) -> int:
    """Number of slots that token i of a causal sequence sees."""
    start = i // config.segment * config.segment
    return i + 1 - max(0, start - config.memory) + min(config.compressed, max(0, start - config.memory) // config.ratio)


def visible_pairs(config: Config, n: int) -> int:
    """Exact number of pairs of query and slot in a causal sequence of `n` tokens."""
    pairs = 0
    for start in range(0, n, config.segment):
        size = min(config.segment, n - start)
        pairs += size * (visible_slots(config, start) - 1) + size * (size + 1) // 2
    return pairs


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the causal pattern with N = M (n of M queries in proportion); W_r r and f_c count as projections."""
    width, heads = 2 * shape.dim_key + shape.dim_value, shape.batch * shape.heads
    pairs = visible_pairs(config, shape.m) * shape.n / max(shape.m, 1)
    reach = config.reach
    return Cost(
        flops=2.0 * heads * pairs * width,
        memory=float(heads * shape.n * (config.compressed + config.memory + config.segment)),
        state=float(shape.heads * (reach.cached + reach.queued) * (shape.dim_key + shape.dim_value)),
        step_flops=2.0 * heads * width * visible_slots(config, shape.m),
    )


MECHANISM = Mechanism(
    name="compressive",
    aliases=("compressive_transformer", "compressive_memory"),
    kind=Kind.ATTENTION,
    summary="Tokens that leave the memory of earlier segments are compressed instead of forgotten.",
    paper=Paper("Compressive Transformers for Long-Range Sequence Modelling", "1911.05507", 2019),
    inputs={
        "q": "bhnd",
        "k": "bgmd",
        "v": "bgmv",
        "k_compressed": "bgmd",
        "v_compressed": "bgmv",
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
        "convolution": {"segment": 4, "memory": 6, "compressed": 3, "ratio": 2},
        "means": {"segment": 4, "memory": 4, "compressed": 1, "ratio": 4, "compression": "mean"},
        "maxima": {"segment": 3, "memory": 3, "compressed": 4, "ratio": 1, "clamp": 3, "compression": "max"},
    },
    engine="attention",
    state=GroupState,
    cost=cost,
    uneven=False,
    honours=frozenset({"dropout"}),
    weights="implicit",
    accepts_positions=("none",),
    refused_positions="its scores already encode distances, and its memory is read by distance",
    module=CompressiveLayer,
    projection=Compression,
    sample_inputs=sample_inputs,
    waivers=(Waiver("layer_lengths", "its number of segments is fixed when the program is compiled"),),
)
