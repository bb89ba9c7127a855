r"""NiNformer: an MLP-Mixer block inside a gating unit; the Mixer's output multiplies a projection of the tokens.

When to pick it: images of one small size without attention, where a static mixture of positions is not enough: here,
how much a position receives from another depends on the contents of both.
When not: inputs of many lengths, causal models, or comparisons at equal width: it contains a Mixer, so the right
baseline is a Mixer with as many parameters.

Definition (Abdullah & Aydin, NiNformer, arXiv 2403.02411, section 3), with the feed-forward networks T along the tokens
of each channel (`mlp_mixer`) and C along the channels of each token:

    X_1 = X + T(LN(X)),   M = X_1 + C(LN(X_1)),   Y = (X W_p + b_p) * M

The gate M is unbounded and signed; without a norm before it, its residual streams make Y grow with the square of X.

| paper | here |
|---|---|
| X W_p + b_p | `value` (B, N, C): an argument of the function; a layer computes it with `project` |
| Mixer | `token_norm`, `token_up`, `token_down`, `channel_norm`, `channel_up`, `channel_down`, each with its `..._bias` |
| sequence length | `length` (L): the columns of `token_up` |
| token_dim, channel_dim (both d_ffn) | `token_hidden`, `channel_hidden` |

Layout: tokens (B, N, C), with N at most L, placed as in `mlp_mixer`: the tokens that a shorter row lacks, and masked
places on a `grid`, count as zeros after the first norm. `x` produces the gate; `value` may come from another sequence
of the same length.
Deviations: inputs of fewer than L tokens, and masks. `gate`, `inner`, `combine` and `activation` are ablations: with
``inner="channel"`` tokens do not mix, with ``combine="add"`` mixing is as static as in a Mixer. In the function, a
network that is not passed is omitted, and so is a norm. The norm that the official block applies before the unit and
before its feed-forward network (one shared module) belongs to the block (`regard.models.vision.mixer`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
)
from regard.core.precision import wide
from regard.layers.feed_forward import check_dropout
from regard.layers.linear import make_linear
from regard.layers.mixer import MixerLayer, Tokens
from regard.mechanisms.mlp_mixer import (
    ACTIVATIONS,
    STATIC,
    check_length,
    dropped,
    feed_forward,
    feed_forward_shapes,
    mix_tokens,
    scaled_normals,
)

if TYPE_CHECKING:
    from jaxtyping import Float

EPS = 1e-5
"""The eps of both norms."""

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda m: m,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}
INNER = {"mixer": ("token", "channel"), "token": ("token",), "channel": ("channel",)}
COMBINATIONS = ("multiply", "add")


@dataclass(frozen=True)
class Config:
    """Options. Functions use `gate`, `combine` and `activation`, and the networks passed to them.

    Attributes:
        length: L, the maximum number of tokens in a sequence or grid, >= 1.
        token_hidden, channel_hidden: widths of the networks along tokens and along channels, >= 1; twice the channels
            when None, as published.
        inner: the networks of the gate: ``mixer`` (both), ``token``, or ``channel``, with which no tokens mix.
        gate: function applied to the gate: ``none``, ``sigmoid``, ``tanh`` or ``gelu``.
        combine: ``multiply`` the projection by the gate, or ``add`` it.
        activation: activation of the networks: ``gelu``, ``relu`` or ``none``.
    """

    length: int = 1024
    token_hidden: int | None = None
    channel_hidden: int | None = None
    inner: str = "mixer"
    gate: str = "none"
    combine: str = "multiply"
    activation: str = "gelu"

    def __post_init__(self) -> None:
        at_least("length", self.length, 1)
        for name, hidden in zip(("token_hidden", "channel_hidden"), self.hidden_of(1), strict=True):
            at_least(name, hidden, 1)
        one_of("inner", self.inner, INNER)
        one_of("gate", self.gate, GATES)
        one_of("combine", self.combine, COMBINATIONS)
        one_of("activation", self.activation, ACTIVATIONS)

    def hidden_of(self, width: int) -> tuple[int, int]:
        """Hidden widths of the networks along tokens and along channels, for `width` channels."""
        along, across = (2 * width if hidden is None else hidden for hidden in (self.token_hidden, self.channel_hidden))
        return along, across

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the gate's weights by name, for `width` channels."""
        found: dict[str, tuple[int, ...]] = {}
        along, across = self.hidden_of(width)
        sizes = {"token": (self.length, along), "channel": (width, across)}
        for network in INNER[self.inner]:
            found |= {f"{network}_norm": (width,), f"{network}_norm_bias": (width,)}
            found |= {f"{network}_{name}": shape for name, shape in feed_forward_shapes(*sizes[network]).items()}
        return found


def reference(
    call: Call, x: Float[Tensor, "b n d"], value: Float[Tensor, "b n d"], **weights: Tensor
) -> Float[Tensor, "b n d"]:
    """The definition."""
    _check(call, x, weights)
    places = torch.ones_like(x) if call.valid is None else call.valid[..., None].to(x.dtype)
    act, n, m = ACTIVATIONS[call.config.activation], x.shape[1], x
    if "token_up" in weights:
        up, down = weights["token_up"][:, :n], weights["token_down"][:n]
        hidden = up @ (places * _norm(m, weights, "token")) + weights["token_up_bias"][:, None]
        mixed = down @ dropped(call, act(hidden)) + weights["token_down_bias"][:n, None]
        m = m + dropped(call, mixed)
    if "channel_up" in weights:
        hidden = _norm(m, weights, "channel") @ weights["channel_up"].mT + weights["channel_up_bias"]
        mixed = dropped(call, act(hidden)) @ weights["channel_down"].mT + weights["channel_down_bias"]
        m = m + dropped(call, mixed)
    return _combined(call, value, m)


def parallel(
    call: Call, x: Float[Tensor, "b n d"], value: Float[Tensor, "b n d"], **weights: Tensor
) -> Float[Tensor, "b n d"]:
    """Compute in at least float32, since the product of two residual streams overflows first."""
    _check(call, x, weights)
    valid = call.valid_queries(x.shape[1]) if call.valid is None else call.valid
    m = wide(x)
    if "token_up" in weights:
        normed = _norm(m, weights, "token")
        normed = normed if valid is None else torch.where(valid[..., None], normed, normed.new_zeros(()))
        m = m + mix_tokens(call, normed, *_network(weights, "token"))
    if "channel_up" in weights:
        m = m + feed_forward(call, _norm(m, weights, "channel"), *_network(weights, "channel"))
    return _combined(call, wide(value), m).to(x.dtype)


def _combined(call: Call, value: Tensor, m: Tensor) -> Tensor:
    gate = GATES[call.config.gate](m)
    return value * gate if call.config.combine == "multiply" else value + gate


def _norm(x: Tensor, weights: Tensors, network: str) -> Tensor:
    """The norm before a network; `x` itself if no norm is given."""
    weight, bias = weights.get(f"{network}_norm"), weights.get(f"{network}_norm_bias")
    if weight is None and bias is None:
        return x
    weight, bias = (None if given is None else given.to(x.dtype) for given in (weight, bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def _network(weights: Tensors, network: str) -> list[Tensor]:
    return [weights[f"{network}_{name}"] for name in feed_forward_shapes(1, 1)]


def _check(call: Call, x: Tensor, weights: Tensors) -> None:
    """Refuse an incomplete network, no network at all, or more tokens than places."""
    for network in INNER["mixer"]:
        names = [f"{network}_{name}" for name in feed_forward_shapes(1, 1)]
        missing = [name for name in names if name not in weights]
        if missing and any(name.startswith(network) for name in weights):
            raise Unsupported(
                f"ninformer without {', '.join(missing)}", supported=f"all of {', '.join(names)}, or none"
            )
    if not any(name in weights for name in ("token_up", "channel_up")):
        raise Unsupported("ninformer without a gate", supported="token_up or channel_up, with what belongs to it")
    if "token_up" in weights:
        check_length("ninformer", call, x.shape[1], weights["token_up"].shape[1])


class NiNformerLayer(MixerLayer):
    """The gating unit as a layer, (B, N, C) -> (B, N, C), without the block's norm or residual.

    Args:
        card: the mechanism.
        dim: width C of the input and output.
        num_heads: accepted for a uniform signature; has no effect.
        pattern: noncausal-self.
        dropout: dropout probability after each matrix of both networks, in training.
        linear: kind of the gated projection (``dense`` or a projection mechanism).
        config: see :class:`Config`.
    """

    def __init__(
        self,
        card: Mechanism,
        dim: int,
        num_heads: int,
        *,
        pattern: str | Pattern = Pattern.NONCAUSAL_SELF,
        dropout: float = 0.0,
        linear: str = "dense",
        config: Config | None = None,
    ) -> None:
        super().__init__(card, dim, pattern=pattern, config=config)
        check_dropout(dropout)
        self.dropout = dropout
        self.project = make_linear(dim, dim, bias=True, kind=linear)
        shapes = self.config.shapes(dim)
        self.weights = nn.ParameterDict({name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as torch does for linear layers and norms; the projection initialises itself."""
        initialise_as_torch(self.weights)

    def mix(self, tokens: Tokens, memory: Tokens | None, context: Context, state: Any) -> Result:
        inputs = {"x": tokens.x, "value": self.project(tokens.x), **self.weights}
        return self.call(inputs, tokens, context, state, dropout=self.dropout if self.training else 0.0)


def initialise_as_torch(weights: nn.ParameterDict) -> None:
    """Initialise matrices and their biases uniformly in +-fan-in^-1/2, as `torch.nn.Linear` does, norms with 1."""
    for name, parameter in weights.items():
        matrix = parameter if parameter.ndim == 2 else weights.get(name.removesuffix("_bias"))
        if matrix is not None and matrix.ndim == 2:
            bound = matrix.shape[1] ** -0.5
            nn.init.uniform_(parameter, -bound, bound)
        else:
            nn.init.constant_(parameter, 0.0 if name.endswith("_bias") else 1.0)


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the inner Mixer's products along tokens and along channels, as far as the options include them; the
    projection is not counted."""
    width, inner = shape.heads * shape.dim_value, INNER[config.inner]
    along, across = config.hidden_of(width)
    hidden = ("token" in inner) * along + ("channel" in inner) * across
    numbers = shape.batch * shape.n * width
    return Cost(
        flops=4.0 * numbers * hidden,
        memory=float(4 * numbers + shape.batch * (width * along + shape.n * across)),
        state=0.0,
        step_flops=0.0,
    )


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    """Axis sizes: hidden features along tokens and along channels, places, and features of the tokens."""
    width = shape.heads * shape.dim_value
    along, across = config.hidden_of(width)
    return {"j": along, "f": across, "l": shape.n, "d": width}


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
    grid: tuple[int, ...] | None = None,
) -> Tensors:
    """Random inputs for tests, with a token network that has places for a few extra tokens."""
    size = {"d": 8, "j": 5, "f": 7, "l": n + 3, **(sizes or {})}
    small = Config(max(size["l"], n, 1), size["j"], size["f"], inner=config.inner)
    tokens = {name: (batch, n, size["d"]) for name in ("x", "value")}
    found = scaled_normals(generator, small.shapes(size["d"]), dtype)
    return {**scaled_normals(generator, tokens, dtype), **found}


MECHANISM = Mechanism(
    name="ninformer",
    aliases=("mixer_gating_unit", "network_in_network_transformer"),
    kind=Kind.MIXER,
    summary="A block of MLP-Mixer multiplies a projection of the tokens, so that mixing depends on their content.",
    paper=Paper(
        "NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function",
        "2403.02411",
        2024,
        37,
    ),
    inputs={
        "x": "bnd",
        "value": "bnd",
        "token_norm?": "d",
        "token_norm_bias?": "d",
        "token_up?": "jl",
        "token_up_bias?": "j",
        "token_down?": "lj",
        "token_down_bias?": "l",
        "channel_norm?": "d",
        "channel_norm_bias?": "d",
        "channel_up?": "fd",
        "channel_up_bias?": "f",
        "channel_down?": "df",
        "channel_down_bias?": "d",
    },
    output="bnd",
    patterns=(Pattern.NONCAUSAL_SELF,),
    refused={
        Pattern.CAUSAL_SELF: "the gate of a token depends on all tokens, including later ones",
        Pattern.NONCAUSAL_CROSS: STATIC,
        Pattern.CAUSAL_CROSS: STATIC,
    },
    forms={"reference": reference, "parallel": parallel},
    config=Config,
    variants={
        "tokens alone": {"inner": "token", "gate": "sigmoid", "activation": "relu", "length": 150, "token_hidden": 6},
        "channels alone": {"inner": "channel", "gate": "tanh", "combine": "add", "channel_hidden": 24},
        "on a grid": {"gate": "gelu", "activation": "none", "length": 40},
    },
    grid_variants=frozenset({"on a grid"}),
    honours=frozenset({"dropout", "grid"}),
    cost=cost,
    default_scale=1.0,
    accepts_positions=("none", "sinusoidal", "learned"),
    length="max",
    axis_sizes=axis_sizes,
    sample_inputs=sample_inputs,
    module=NiNformerLayer,
)
