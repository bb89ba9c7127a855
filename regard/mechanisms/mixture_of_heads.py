r"""Mixture of heads (MoH): each token keeps a few of the attention heads, chosen and weighted by routers.

When to pick it: attention whose heads should specialise; a trained model that is to use fewer heads a token; with
`compute="gather"` long sequences read whole, of which a query is computed only in the heads that its token chose.
When not: for memory, or for time in decoding, which computes and caches all heads, since a later token may choose any.

Definition (Jin et al., arXiv 2410.11842), for the head outputs o_i of a token x, H heads of which the first h_s are shared
and E = H - h_s routed, k of them active:

    (a_1, a_2) = 2 softmax(x W_0),   shared: g_i = a_1 h_s softmax(x W_s)_i
    p = softmax(x W_r),   T = top-k(p),   routed: g_i = a_2 k p_i / sum_{j in T} p_j for i in T, else 0
    y = concat_i(g_i o_i) W_o,   L_b = E sum_e mean(p_e) mean(1[e in T]), means over the tokens

| paper | here |
|---|---|
| o_i | `o` (B, H, N, V), the head outputs of any attention mechanism |
| x W_r, x W_s, x W_0 | `routed` (B, N, E), `shared` (B, N, h_s), `balance` (B, N, 2) |
| h_s, k | `shared_heads`, `active_heads`; which heads are shared: the first, or those that `shared_heads` names |
| L_b, k when balanced and E when collapsed | `losses["load_balance"]`, averaged over layers; the paper's weight is 0.01 |

Gates depend on the token alone, the query token in cross attention, so patterns, caches and states are those of the wrapped
mechanism; padding counts neither in a gate nor in L_b. With equal logits every active head has gate 1. One shared head has
no W_s; without shared heads, or without routed ones, there is no W_0. Ties in a top-k go to the first head.
`router="query_norm"` (continued training of a dense model) has no parameters: the score of a routed head is the norm of its
query over the (unbiased) standard deviation of the routed heads' norms, and the gates are 0 or 1, so the head outputs keep
their scale; p gets its gradient as if the gates were p (straight-through).
`compute="gather"`, of a layer of softmax attention, takes for each routed head the tokens that chose it as queries: their
projection, scores, weights and share of the output projection are all that is computed. Keys and values are of all tokens,
since any may be read. It is the same function; with a state, for wanted weights, and for straight-through gates in training
(whose gradient asks for the heads that were not chosen) all heads are computed as usual. Saved are 1 - (h_s + k) / H of the
work of queries, scores and outputs; within a batch a head's scores are padded to the row of most tokens.
It pays from about 2000 tokens on: with 2 shared and 4 of 14 routed heads of 32, forward on one thread takes 1.3 to 1.45 times
as long as all heads at 512 tokens, 0.8 to 0.95 at 2048, 0.5 to 0.65 at 8192 (`benchmarks/mixture_of_heads.py`).
`want={"gates"}` gives (B, N, H) on right-padded tokens in `extras["gates"]`; see `head_usage`.
Deviations: L_b is returned in evaluation too, and is of the local batch when training is distributed. The standard deviation
is at least eps. `rescale_gates=False` leaves out the factors 2, h_s, k and the division by the sum over T: plain softmax
products, as the paper's formulas have it. `scale` multiplies the logits of the routers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.contract import (
    ALL_PATTERNS,
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
    Waiver,
    at_least,
    one_of,
)
from regard.core.precision import wide, wide_dtype
from regard.layers.attention import AttentionLayer, LayerState
from regard.layers.base import Layer
from regard.layers.checks import given_context
from regard.layers.chosen_heads import attend_in_chosen_heads, check_choosable
from regard.layers.linear import make_linear

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

ROUTERS = ("input", "query_norm")
GATES = ("weighted", "binary", "straight_through")


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        shared_heads: h_s, the first heads, active for every token; from 0 to H, a quarter of H (rounded down) when None.
            Or the numbers of the shared heads, as those of most importance in a trained model
            (:func:`regard.training.mix_heads`).
        active_heads: k, routed heads active for a token; from 1 to E, two thirds of E (rounded down, at least 1) when
            None, and 0 when all heads are shared.
        router: the routed heads' scores are logits of the ``input`` token, or the ``query_norm``.
        gates: ``weighted``; ``binary``, 0 or 1 (the router then learns from L_b alone); ``straight_through``, 0 or 1 with
            the gradient of p. None: weighted with the input router, straight_through with query norms.
        two_stage: weight the two groups of heads by a_1 and a_2; otherwise by 1.
        rescale_gates: multiply softmaxes by the number of their entries; see Deviations.
        noise: standard deviation of normal noise on the routed logits in training, >= 0.
        z_loss: return the mean squared log-sum-exp of the routed logits as the loss ``router_z``.
        eps: smallest standard deviation that query norms are divided by, > 0.
        compute: of the layer: ``dense``, all heads and then the gates, or ``gather``, chosen heads alone.
    """

    shared_heads: int | tuple[int, ...] | None = None
    active_heads: int | None = None
    router: str = "input"
    gates: str | None = None
    two_stage: bool = True
    rescale_gates: bool = True
    noise: float = 0.0
    z_loss: bool = False
    eps: float = 1e-6
    compute: str = "dense"

    def __post_init__(self) -> None:
        one_of("router", self.router, ROUTERS)
        one_of("gates", self.gates, (None, *GATES))
        one_of("compute", self.compute, ("dense", "gather"))
        if isinstance(self.shared_heads, (tuple, list)):
            named = tuple(sorted(self.shared_heads))
            if len(set(named)) < len(named) or (named and named[0] < 0):
                raise Unsupported(f"shared_heads={self.shared_heads}", supported="different numbers of heads, from 0")
            object.__setattr__(self, "shared_heads", named)
        elif self.shared_heads is not None:
            at_least("shared_heads", self.shared_heads, 0)
        if self.active_heads is not None:
            at_least("active_heads", self.active_heads, 0)
        at_least("noise", self.noise, 0.0)
        if self.eps <= 0:
            raise Unsupported(f"eps={self.eps}", supported="eps > 0", nearest="eps=1e-6")
        if self.router == "query_norm" and self.gates == "weighted":
            raise Unsupported(
                'weighted gates with router="query_norm", which has no parameters',
                supported="binary, straight_through",
                nearest="straight_through",
            )

    @property
    def weighted(self) -> bool:
        return self.gates == "weighted" or (self.gates is None and self.router == "input")

    def groups(self, heads: int) -> tuple[int, int, int]:
        """Shared, routed and active routed heads of `heads`.

        Raises:
            Unsupported: when they do not fit, or some head could never be active.
        """
        if isinstance(self.shared_heads, tuple):
            if self.shared_heads and self.shared_heads[-1] >= heads:
                raise Unsupported(f"shared_heads={self.shared_heads}", supported=f"heads 0 to {heads - 1}")
            shared = len(self.shared_heads)
        else:
            shared = heads // 4 if self.shared_heads is None else self.shared_heads
        routed = heads - shared
        if routed < 0:
            raise Unsupported(f"shared_heads={shared} of {heads} heads", supported=f"0 to {heads}")
        active = min(routed, max(1, 2 * routed // 3)) if self.active_heads is None else self.active_heads
        if not min(routed, 1) <= active <= routed:
            raise Unsupported(
                f"active_heads={active} of {routed} routed heads",
                supported=f"{min(routed, 1)} to {routed}",
                nearest=f"shared_heads={heads}" if active == 0 else f"active_heads={routed}",
            )
        return shared, routed, active

    def order(self, heads: int) -> list[int]:
        """The shared heads, then the routed ones."""
        shared = self.shared_heads if isinstance(self.shared_heads, tuple) else range(self.groups(heads)[0])
        return [*shared, *(head for head in range(heads) if head not in shared)]

    def routers(self, heads: int) -> dict[str, int]:
        """Width of each router's logits, by name."""
        shared, routed, active = self.groups(heads)
        widths = {"routed": routed}
        if self.weighted:
            widths["shared"] = shared if shared > 1 else 0
            widths["balance"] = 2 if self.two_stage and shared and active else 0
        return {name: width for name, width in widths.items() if width}


def reference(
    call: Call,
    o: Float[Tensor, "b h n v"],
    routed: Float[Tensor, "b n e"] | None = None,
    shared: Float[Tensor, "b n s"] | None = None,
    balance: Float[Tensor, "b n t"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, token by token and head by head."""
    config: Config = call.config
    batch, heads, n, _ = o.shape
    _check_logits(config, heads, {"routed": routed, "shared": shared, "balance": balance})
    h_s, e, k = config.groups(heads)
    rescale = config.rescale_gates
    routed = _prepare_logits(call, routed)
    output = torch.zeros_like(o)
    for b in range(batch):
        for t in range(n):
            gates: list[Any] = [1.0] * h_s + [0.0] * e
            groups: Any = (1.0, 1.0)
            if balance is not None:
                groups = (2 if rescale else 1) * (call.scale * balance[b, t]).softmax(0)
            if shared is not None:
                gates[:h_s] = (h_s if rescale else 1) * (call.scale * shared[b, t]).softmax(0)
            if routed is not None:
                p = routed[b, t].softmax(0)
                chosen = sorted(range(e), key=routed[b, t].tolist().__getitem__, reverse=True)[:k]
                total = sum(p[i] for i in chosen)
                for i in range(e):
                    one = float(i in chosen)
                    weight = k * p[i] / total if rescale else p[i]
                    soft = one * weight if config.weighted else one
                    gates[h_s + i] = soft + p[i] - p[i].detach() if _straight_through(config) else soft
            for i, head in enumerate(config.order(heads)):
                output[b, head, t] = groups[0 if i < h_s else 1] * gates[i] * o[b, head, t]
    return output


def parallel(
    call: Call,
    o: Float[Tensor, "b h n v"],
    routed: Float[Tensor, "b n e"] | None = None,
    shared: Float[Tensor, "b n s"] | None = None,
    balance: Float[Tensor, "b n t"] | None = None,
) -> Result:
    """Every head's output times its gate, 0 where it is not active; the losses beside it."""
    result = Result(o)
    gates = gates_of(call, o.shape[1], {"routed": routed, "shared": shared, "balance": balance}, o[:, 0, :, :0], result)
    result.output = (o.to(gates.dtype) * gates.transpose(1, 2)[..., None]).to(o.dtype)
    return result


def gates_of(
    call: Call, heads: int, logits: Mapping[str, Tensor | None], tokens: Float[Tensor, "b n c"], result: Result
) -> Float[Tensor, "b n h"]:
    """Gates of all heads in at least float32, 0 where one is not active; losses and wanted gates are added to `result`.

    Args:
        heads: H.
        logits: of the routers, by name.
        tokens: for their number, dtype and device.
    """
    config: Config = call.config
    batch, n, _ = tokens.shape
    _check_logits(config, heads, logits)
    routed, shared, balance = (logits.get(name) for name in ("routed", "shared", "balance"))
    h_s, _, k = config.groups(heads)
    dtype = wide_dtype(tokens)
    rescale = config.rescale_gates
    parts = []
    if h_s:
        always = tokens.new_ones(batch, n, h_s, dtype=dtype)
        parts.append(
            always if shared is None else (h_s if rescale else 1) * (call.scale * shared.to(dtype)).softmax(-1)
        )
    scores = _prepare_logits(call, routed)
    if scores is not None:
        p = scores.softmax(-1)
        active = _top(scores, k)
        parts.append(_routed_gates(config, p, active, k))
        valid = call.valid_queries(n)
        result.losses["load_balance"] = _load_balance(p, active, valid)
        if config.z_loss:
            squares = scores.logsumexp(-1).square()
            count = torch.tensor(batch * n, device=tokens.device) if valid is None else valid.sum()
            result.losses["router_z"] = (squares.sum() if valid is None else squares.where(valid, 0).sum(), count)
    if balance is not None:
        weights = (2 if rescale else 1) * (call.scale * balance.to(dtype)).softmax(-1)
        parts = [weights[..., i : i + 1] * part for i, part in enumerate(parts)]
    gates = torch.cat(parts, -1)  # (B, N, H), shared heads first
    order = config.order(heads)
    if order != sorted(order):
        gates = gates[..., torch.tensor(order, device=gates.device).argsort()]
    if "gates" in call.want:
        result.extras["gates"] = gates
    return gates


def _straight_through(config: Config) -> bool:
    return config.gates == "straight_through" or (config.gates is None and config.router == "query_norm")


def _check_logits(config: Config, heads: int, given: Mapping[str, Tensor | None]) -> None:
    expected = config.routers(heads)
    widths = {name: logits.shape[-1] for name, logits in given.items() if logits is not None}
    if widths != expected:
        raise Unsupported(
            f"routers of widths {widths} for {heads} heads", supported=f"widths {expected} with these options"
        )


def _prepare_logits(call: Call, routed: Tensor | None) -> Tensor | None:
    """Scores of the routed heads in at least float32: scaled, noisy in training, query norms standardised."""
    if routed is None:
        return None
    config: Config = call.config
    logits = wide(routed)
    if config.router == "query_norm":
        centred = logits - logits.mean(-1, keepdim=True)
        variance = centred.square().sum(-1, keepdim=True) / max(logits.shape[-1] - 1, 1)
        logits = logits * variance.clamp(min=config.eps**2).rsqrt()
    logits = call.scale * logits
    if config.noise and call.training:
        draw = torch.randn(logits.shape, generator=call.generator, dtype=logits.dtype, device=logits.device)
        logits = logits + config.noise * draw
    return logits


def _top(logits: Tensor, k: int) -> Bool[Tensor, "b n e"]:
    """True at the k largest of the last axis; the first of equal ones."""
    order = logits.detach().argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order[..., :k], True)


def _routed_gates(config: Config, p: Tensor, active: Tensor, k: int) -> Tensor:
    if not config.weighted:
        hard = active.to(p.dtype)
        return hard + (p - p.detach()) if _straight_through(config) else hard
    chosen = torch.where(active, p, 0)
    if not config.rescale_gates:
        return chosen
    return k * chosen / chosen.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).eps)


def _load_balance(p: Tensor, active: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """E sum_e mean(p_e) mean(active_e) over valid tokens, counted as one layer (none when there is no token)."""
    routed = p.shape[-1]
    used = active.to(p.dtype)
    if valid is None:
        count = torch.tensor(p.shape[0] * p.shape[1], device=p.device)
    else:
        count = valid.sum()
        p, used = torch.where(valid[..., None], p, 0), torch.where(valid[..., None], used, 0)
    tokens = count.clamp(min=1)
    loss = routed * ((p.sum((0, 1)) / tokens) * (used.sum((0, 1)) / tokens)).sum()
    return loss, (count > 0).to(torch.int64)


class HeadRouter(nn.Module):
    """The routers: a merge of the attention shell, called as ``merge(output, heads, x, context, lengths, result)``.

    Args:
        config: the mechanism's options.
        pattern: of the layer.
        dim: width of the tokens x.
        heads: H.
        inner: the wrapped mechanism's own merge, which comes first.
    """

    def __init__(self, config: Config, pattern: Pattern, dim: int, heads: int, inner: nn.Module | None) -> None:
        super().__init__()
        self.config, self.pattern, self.inner = config, pattern, inner
        self.routed = config.order(heads)[config.groups(heads)[0] :]
        logits = config.routers(heads)
        if config.router == "query_norm":
            logits = {}
        self.logits = nn.ModuleDict({name: make_linear(dim, width) for name, width in logits.items()})

    def forward(
        self,
        output: Float[Tensor, "b h n v"],
        heads: Tensors,
        x: Float[Tensor, "b n c"],
        context: Context,
        lengths: Int[Tensor, " b"] | None,
        result: Result,
    ) -> Float[Tensor, "b h n v"]:
        """Gate the head outputs; losses and wanted gates are added to `result`."""
        if self.inner is not None:
            output = self.inner(output, heads, x, context, lengths, result)
        gates = self.gates(heads.get("q"), output.shape[1], x, context, lengths, result)
        return (output.to(gates.dtype) * gates.transpose(1, 2)[..., None]).to(output.dtype)

    def gates(
        self,
        q: Float[Tensor, "b h n d"] | None,
        heads: int,
        x: Float[Tensor, "b n c"],
        context: Context,
        lengths: Int[Tensor, " b"] | None,
        result: Result,
    ) -> Float[Tensor, "b n h"]:
        """See :func:`gates_of`; `q` is asked for by query norms alone."""
        logits: dict[str, Tensor | None] = {name: module(x) for name, module in self.logits.items()}
        if self.config.router == "query_norm" and self.routed:
            assert q is not None
            q = q[:, self.routed]
            q = wide(q)
            smallest = torch.finfo(q.dtype).tiny  # the norm of a zero query, in padding, has no gradient
            logits["routed"] = q.square().sum(-1).clamp(min=smallest).sqrt().transpose(1, 2)
        call = Call(
            self.pattern,
            self.config,
            lengths=lengths,
            generator=context.generator,
            training=self.training,
            want=context.want,
        )
        return gates_of(call, heads, logits, x, result)


class MixtureOfHeads(Layer):
    """An attention layer whose heads are routed, (B, N, C) -> (B, N, C).

    Args:
        card: the mechanism.
        dim: width C of the input and output.
        num_heads: H, query heads.
        pattern: one that the wrapped mechanism has too.
        create: makes a layer from the name of a mechanism.
        mechanism: name of the attention mechanism whose heads are routed.
        positions, position_options, head_dim, num_kv_heads, memory_dim, dropout: of the wrapped layer, see
            :class:`regard.layers.attention.AttentionLayer`; its own defaults when None.
        mechanism_options: any other options of the wrapped layer and mechanism.
        config: the mechanism's options.
    """

    def __init__(
        self,
        card: Mechanism,
        dim: int,
        num_heads: int,
        *,
        create: Callable[..., nn.Module],
        pattern: str | Pattern = Pattern.CAUSAL_SELF,
        mechanism: str = "softmax",
        positions: str | None = None,
        position_options: dict[str, Any] | None = None,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        memory_dim: int | None = None,
        dropout: float | None = None,
        mechanism_options: Mapping[str, Any] | None = None,
        config: Any = None,
    ) -> None:
        super().__init__()
        self.card, self.pattern = card, card.require_pattern(pattern)
        self.config: Config = card.options() if config is None else config
        named = {
            "positions": positions,
            "position_options": position_options,
            "head_dim": head_dim,
            "num_kv_heads": num_kv_heads,
            "memory_dim": memory_dim,
            "dropout": dropout,
        }
        options = {name: value for name, value in named.items() if value is not None} | dict(mechanism_options or {})
        attention = create(mechanism, dim, num_heads, pattern=self.pattern, **options)
        if not isinstance(attention, AttentionLayer):
            raise Unsupported(
                f"{card.name} of {mechanism}, which has no heads to route",
                supported="mechanisms of kind attention",
                nearest="softmax",
            )
        if self.config.router == "query_norm" and attention.query is None:
            raise Unsupported(
                f'router="query_norm" with {mechanism}, whose queries are not made of tokens',
                supported='router="input"',
                nearest='router="input"',
            )
        if self.config.compute == "gather":
            check_choosable(attention)
        attention.merge = HeadRouter(self.config, self.pattern, dim, num_heads, attention.merge)
        self.attention = attention

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        memory: Float[Tensor, "b m c2"] | None = None,
        *,
        context: Context | None = None,
        state: LayerState | None = None,
    ) -> Result:
        """As :meth:`regard.layers.attention.AttentionLayer.forward`; the result has the loss ``load_balance``."""
        context = given_context(context)
        gathers = self.config.compute == "gather" and state is None and context.want <= {"gates"}
        if _straight_through(self.config) and torch.is_grad_enabled():
            gathers = False  # the gradient of a score that was not chosen asks for its head's output
        if not gathers:
            return self.attention(x, memory, context=context, state=state)
        router: HeadRouter = self.attention.merge  # type: ignore[assignment]

        def gates_of(q: Tensor | None, x: Tensor, lengths: Tensor | None, result: Result) -> Tensor:
            return router.gates(q, self.attention.num_heads, x, context, lengths, result)

        by_query = self.config.router == "query_norm" and bool(router.routed)
        return attend_in_chosen_heads(self.attention, x, memory, context, gates_of, needs_queries=by_query)

    def step(
        self, x_t: Float[Tensor, "b c"], state: LayerState | None = None
    ) -> tuple[Float[Tensor, "b c"], LayerState]:
        """One token: the output and the state after it. Without a state it is the first of its sequence."""
        return self.attention.step(x_t, state)

    def encode_memory(
        self, memory: Float[Tensor, "b m c2"], *, context: Context | None = None, state: LayerState | None = None
    ) -> LayerState:
        """Absorb memory once, for decoding in a cross pattern."""
        return self.attention.encode_memory(memory, context=context, state=state)


def head_usage(gates: Float[Tensor, "b n h"], tokens: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, " h"]:
    """Share of the tokens for which each head is active; `tokens` picks them (not padding, or those of one class)."""
    active = (gates != 0).double()
    if tokens is None:
        return active.mean((0, 1))
    return active[tokens].mean(0)


def usage_entropy(usage: Float[Tensor, " e"]) -> Float[Tensor, ""]:
    """Entropy of how the active places spread over routed heads, as a fraction of log E: 1 even, log k / log E collapsed."""
    share = usage / usage.sum()
    return torch.special.entr(share).sum() / math.log(len(usage))


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    pattern: Pattern,
    config: Config,
    sizes: dict[str, int],
) -> Tensors:
    """Inputs for tests: eight heads, and the logits that the options ask for."""
    heads = 8

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = {"o": normal(batch, heads, n, sizes.get("v", 6))}
    for name, width in config.routers(heads).items():
        logits = normal(batch, n, width)
        inputs[name] = logits.abs() if config.router == "query_norm" else logits
    return inputs


def cost(shape: Shape, config: Config) -> Cost:
    """Softmax attention with all heads (whole sequences: with the chosen ones, if they are gathered), and the gates."""
    heads = shape.batch * shape.heads
    width = shape.dim_key + shape.dim_value
    used = 1.0
    if config.compute == "gather":
        shared, _, active = config.groups(shape.heads)
        used = (shared + active) / shape.heads
    return Cost(
        flops=heads * (2.0 * used * shape.n * shape.m * width + shape.n * (shape.dim_value + 8)),
        memory=float(heads * shape.n * (shape.dim_value + 2)),
        state=float(shape.heads * shape.m * width),
        step_flops=heads * (2.0 * shape.m * width + shape.dim_value + 8),
    )


MECHANISM = Mechanism(
    name="mixture_of_heads",
    aliases=("moh", "mixture_of_head_attention", "routed_heads"),
    kind=Kind.WRAPPER,
    summary="Each token keeps a few of the attention heads, chosen and weighted by routers.",
    paper=Paper("MoH: Multi-Head Attention as Mixture-of-Head Attention", "2410.11842", 2024, 54),
    inputs={"o": "bhnv", "routed?": "bne", "shared?": "bns", "balance?": "bnt"},
    patterns=ALL_PATTERNS,
    forms={"reference": reference, "parallel": parallel},
    config=Config,
    variants={
        "none shared": {"num_heads": 8, "shared_heads": 0, "active_heads": 3},
        "nearly all active": {"num_heads": 8, "shared_heads": 1, "active_heads": 7, "rescale_gates": False},
        "all shared": {"num_heads": 4, "shared_heads": 4, "two_stage": False},
        "named": {"num_heads": 8, "shared_heads": (1, 6), "active_heads": 2, "z_loss": True, "noise": 0.5},
        "binary": {"num_heads": 8, "gates": "binary"},
        "straight through": {"num_heads": 8, "gates": "straight_through"},
        "query norms": {"num_heads": 8, "router": "query_norm", "shared_heads": (0, 3, 7), "eps": 1e-3},
        "query norms, binary": {"num_heads": 8, "router": "query_norm", "shared_heads": 4, "gates": "binary"},
        "gathered": {"num_heads": 8, "gates": "weighted", "compute": "gather", "shared_heads": (5,), "active_heads": 3},
    },
    state=LayerState,
    cost=cost,
    default_scale=1.0,
    honours=frozenset(),
    accepts_positions=("none", "sinusoidal", "learned", "rotary", "alibi", "relative", "toeplitz"),
    sample_inputs=sample_inputs,
    module=MixtureOfHeads,
    layer_defaults={"output_norm": None},  # routers scale the heads' outputs
    waivers=(
        Waiver("layer_onnx", "ONNX has no stable sort"),
        Waiver(
            "gradient",
            "gates of 0 and 1 have the gradient of probabilities, which numerical derivatives do not see",
            variants=("straight through", "query norms"),
        ),
    ),
)
