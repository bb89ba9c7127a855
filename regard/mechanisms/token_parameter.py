r"""Token-parameter attention (Pattention): a linear layer replaced by attention to learned parameter tokens.

When to pick it: models that grow. The number n of parameter tokens does not depend on the layer's widths, so a trained
model gains capacity by adding rows. Also if a projection should be modular (masked or routed rows).
When not: for speed. At n = D a projection D -> D has twice the parameters and twice the time of a linear layer.

Definition (TokenFormer, Wang et al., arXiv 2410.23168), for each token x alone:

    s = K_P x,   y = V_P^T Theta(s)

with Theta named by the option `theta`:

    Theta(s) = gelu(tau s / ||s||_2)             with `l2_norm_gelu`
    Theta(s) = tau gelu(s) / ||gelu(s)||_2       with `gelu_l2_norm`
    Theta(s) = tau^2 exp(s) / (sum_j exp(s_j))   with `softmax`
    Theta(s) = s                                 with `identity`

| paper | here |
|---|---|
| X (B, N, D_in) | `x` |
| K_P (n, D_in), V_P (n, D_out) | `keys`, `values`; `key_tokens`, `value_tokens` of the module |
| tau | `tau`, sqrt(n) by default: then the entries of Theta are of order 1 |
| the scale of the scores in the authors' code, 1 | `scale`; it is not tau |

Tokens do not mix: causal and noncausal are the same, and cross attention uses it on both sides. The GELU is exact
(erf). If `token_mask` is False for a parameter token, its score is multiplied by 0, which adds nothing to a GELU or a
norm; under softmax its score is -inf. A token whose parameter tokens are all masked gives 0. `top_k` masks all but the
k largest scores of a token.
`tau_mode="fixed"` keeps tau in a buffer, so rows with zero keys that are added later have no effect (with softmax,
masked rows); ``"sqrt_n"`` uses the square root of the number of rows in the call, as the authors' code does: then
growing changes the function. :meth:`TokenParameter.grow` appends rows, :meth:`TokenParameter.shrink` keeps the most
important ones; :func:`regard.training.grow` and :func:`regard.training.shrink` do so in a whole model. For a model
built entirely from this layer, see :func:`regard.models.tokenformer_plan`.
Deviations: norms are at least eps (a token of zeros gives 0, not NaN) and are computed in at least float32. In terms of
tau the softmax is multiplied by tau^2, which is n. `identity` can express any linear layer
(`TokenParameter.from_linear`). There are no heads, as in the released models: h heads would be h modules on separate
slices of the features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.contract import (
    Call,
    Cost,
    Kind,
    Mechanism,
    Paper,
    Pattern,
    Shape,
    Tensors,
    Unsupported,
    at_least,
    one_of,
)
from regard.core.precision import wide, wide_dtype
from regard.engines.linear import linear

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

TAU_MODES = ("fixed", "sqrt_n")
INIT_STD = 0.02


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        theta: function from scores to weights, one of `THETAS`.
        eps: lower bound of the norm in divisions, > 0.
        num_tokens: number of parameter tokens of the module, >= 1; its out_features when None.
        tau_mode: ``fixed``, a buffer with the initial sqrt(num_tokens), or ``sqrt_n``, computed in each call.
        num_layers: depth L of the model, for values initialised with the standard deviation 2 / (L sqrt(out_features));
            when None 0.02, as for keys.
        frozen_tokens: number of first parameter tokens that are not trained; fewer than `num_tokens`.
        top_k: number of parameter tokens that each token uses, those with the largest scores, >= 1; all when None.
            Every score is still computed, so this saves no time.
    """

    theta: str = "l2_norm_gelu"
    eps: float = 1e-6
    num_tokens: int | None = None
    tau_mode: str = "fixed"
    num_layers: int | None = None
    frozen_tokens: int = 0
    top_k: int | None = None

    def __post_init__(self) -> None:
        one_of("theta", self.theta, THETAS)
        one_of("tau_mode", self.tau_mode, TAU_MODES)
        if self.eps <= 0:
            raise Unsupported(f"eps={self.eps}", supported="eps > 0", nearest="eps=1e-6")
        for name in ("num_tokens", "num_layers", "top_k"):
            value = getattr(self, name)
            if value is not None:
                at_least(name, value, 1)
        at_least("frozen_tokens", self.frozen_tokens, 0)


def _divide_by_norm(s: Tensor, eps: float) -> Tensor:
    # A clamped squared norm has a gradient at s = 0, where that of the norm is undefined. Under autocast scores are
    # narrow whatever their inputs, and squares below 6e-8 are 0 in float16.
    s = wide(s)
    return s * s.square().sum(-1, keepdim=True).clamp(min=eps**2).rsqrt()


def _gelu(s: Tensor) -> Tensor:
    # torch's 1 + erf cancels for negative scores; if all scores are negative, the norm would divide by the residue
    return s * torch.erfc(-math.sqrt(0.5) * s) / 2


def _softmax(s: Tensor, kept: Tensor | None) -> Tensor:
    if kept is None:
        return s.softmax(-1)
    opened = kept | ~kept.any(-1, keepdim=True)  # a row of only -inf would have NaN gradients
    return torch.where(kept, s.masked_fill(~opened, -torch.inf).softmax(-1), 0)


def _largest(s: Tensor, kept: Tensor | None, count: int | None) -> Tensor | None:
    """A mask of the kept scores that are among the `count` largest; `kept` itself when `count` is None."""
    if count is None or count >= s.shape[-1]:
        return kept
    places = (s if kept is None else s.masked_fill(~kept, -torch.inf)).topk(count, dim=-1).indices
    largest = torch.zeros_like(s, dtype=torch.bool).scatter(-1, places, True)
    return largest if kept is None else largest & kept


def _hide(s: Tensor, kept: Tensor | None) -> Tensor:
    return s if kept is None else torch.where(kept, s, 0)


THETAS: dict[str, Callable[[Tensor, Tensor | float, Tensor | None, float], Tensor]] = {
    "l2_norm_gelu": lambda s, tau, kept, eps: F.gelu(tau * _divide_by_norm(_hide(s, kept), eps)),
    "gelu_l2_norm": lambda s, tau, kept, eps: tau * _divide_by_norm(_gelu(_hide(s, kept)), eps),
    "softmax": lambda s, tau, kept, eps: tau**2 * _softmax(s, kept),
    "identity": lambda s, tau, kept, eps: _hide(s, kept),
}


def reference(
    call: Call,
    x: Float[Tensor, "b n d"],
    keys: Float[Tensor, "t d"],
    values: Float[Tensor, "t e"],
    tau: Float[Tensor, ""] | None = None,
    token_mask: Bool[Tensor, "b n t"] | None = None,
) -> Float[Tensor, "b n e"]:
    """The definition, token by token, written with elementary functions."""
    config: Config = call.config
    tau = x.new_tensor(keys.shape[0]).sqrt() if tau is None else tau

    def gelu(s: Tensor) -> Tensor:
        return s * (1 + torch.erf(s / math.sqrt(2))) / 2

    def one_token(row: int, place: int) -> Tensor:
        s = call.scale * (keys * x[row, place]).sum(-1)
        kept = torch.ones_like(s) if token_mask is None else token_mask[row, place].to(s.dtype)
        if config.top_k is not None and kept.sum() > config.top_k:
            kept = kept * (s >= s[kept > 0].sort(descending=True).values[config.top_k - 1])
        if config.theta == "softmax":
            exponentials = kept * torch.exp(s - s.detach().max())
            weights = tau**2 * exponentials / exponentials.sum().clamp(min=1e-300)
        elif config.theta == "l2_norm_gelu":
            weights = gelu(tau * kept * s / (kept * s).norm().clamp(min=config.eps))
        elif config.theta == "gelu_l2_norm":
            weights = tau * gelu(kept * s) / gelu(kept * s).norm().clamp(min=config.eps)
        else:
            weights = kept * s
        return (weights[:, None] * values).sum(0)

    batch, n, _ = x.shape
    outputs = [one_token(row, place) for row in range(batch) for place in range(n)]
    return torch.stack(outputs).unflatten(0, (batch, n)) if outputs else x.new_zeros(batch, n, values.shape[1])


def parallel(
    call: Call,
    x: Float[Tensor, "b n d"],
    keys: Float[Tensor, "t d"],
    values: Float[Tensor, "t e"],
    tau: Float[Tensor, ""] | None = None,
    token_mask: Bool[Tensor, "b n t"] | None = None,
) -> Float[Tensor, "b n e"]:
    """Two products, with the keys and with the values, around the normalised activation."""
    return attend_to_parameters(x, keys, values, call.config, tau=tau, token_mask=token_mask, scale=call.scale)


def attend_to_parameters(
    x: Float[Tensor, "... d"],
    keys: Float[Tensor, "t d"],
    values: Float[Tensor, "t e"],
    config: Config,
    *,
    tau: Float[Tensor, ""] | float | None = None,
    token_mask: Bool[Tensor, "*#batch t"] | None = None,
    scale: float = 1.0,
) -> Float[Tensor, "... e"]:
    """Apply the mechanism with any leading axes; `tau` is sqrt(t) when None.

    Raises:
        Unsupported: for a `token_mask` that is not boolean.
    """
    weights = parameter_weights(x, keys, config, tau=tau, token_mask=token_mask, scale=scale)
    return linear(weights, values.to(wide_dtype(x)).mT).to(x.dtype)


def parameter_weights(
    x: Float[Tensor, "... d"],
    keys: Float[Tensor, "t d"],
    config: Config,
    *,
    tau: Float[Tensor, ""] | float | None = None,
    token_mask: Bool[Tensor, "*#batch t"] | None = None,
    scale: float = 1.0,
) -> Float[Tensor, "... t"]:
    """Theta of each token, in at least float32; arguments as for :func:`attend_to_parameters`."""
    if token_mask is not None and token_mask.dtype != torch.bool:
        raise Unsupported(f"token_mask of dtype {token_mask.dtype}", supported="booleans, True where a row is used")
    dtype = wide_dtype(x)
    tau = math.sqrt(keys.shape[0]) if tau is None else tau
    tau = tau.to(dtype) if isinstance(tau, Tensor) else tau
    scores = scale * linear(x.to(dtype), keys.to(dtype))
    return THETAS[config.theta](scores, tau, _largest(scores, token_mask, config.top_k), config.eps)


class TokenParameter(nn.Module):
    """A projection (..., in_features) -> (..., out_features) by attention to parameter tokens.

    Keys are drawn from N(0, 0.02^2); for values see `num_layers` of :class:`Config`.

    Args:
        in_features, out_features: widths.
        bias: must be False; the mechanism has none.
        config: the mechanism's options.

    Raises:
        Unsupported: with a bias.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = False, config: Config | None = None
    ) -> None:
        super().__init__()
        if bias:
            raise Unsupported("token_parameter with bias=True", supported="bias=False", nearest="dense")
        self.config = Config() if config is None else config
        self.in_features, self.out_features = in_features, out_features
        tokens = out_features if self.config.num_tokens is None else self.config.num_tokens
        frozen = self.config.frozen_tokens
        if frozen >= tokens:
            raise Unsupported(
                f"frozen_tokens={frozen} of {tokens}", supported="fewer than all", nearest=f"frozen_tokens={tokens - 1}"
            )
        self.frozen_keys: Tensor | None
        self.frozen_values: Tensor | None
        self.tau: Tensor | None
        self._set_rows(INIT_STD * torch.randn(tokens, in_features), self._draw_values(tokens), frozen)
        self.register_buffer("tau", torch.tensor(math.sqrt(tokens)) if self.config.tau_mode == "fixed" else None)

    def _draw_values(self, count: int) -> Float[Tensor, "t out"]:
        layers, width = self.config.num_layers, self.out_features
        return (INIT_STD if layers is None else 2 / (layers * math.sqrt(width))) * torch.randn(count, width)

    def _set_rows(self, keys: Float[Tensor, "t c"], values: Float[Tensor, "t out"], frozen: int) -> None:
        self.key_tokens, self.value_tokens = nn.Parameter(keys[frozen:]), nn.Parameter(values[frozen:])
        self.register_buffer("frozen_keys", keys[:frozen] if frozen else None)
        self.register_buffer("frozen_values", values[:frozen] if frozen else None)

    @property
    def keys(self) -> Float[Tensor, "t c"]:
        """K_P: the frozen rows, then the trainable ones."""
        return self.key_tokens if self.frozen_keys is None else torch.cat([self.frozen_keys, self.key_tokens])

    @property
    def values(self) -> Float[Tensor, "t out"]:
        """V_P, in the order of :attr:`keys`."""
        return self.value_tokens if self.frozen_values is None else torch.cat([self.frozen_values, self.value_tokens])

    @torch.no_grad()
    def grow(self, num_tokens: int, *, preserve: bool = True, freeze: bool = False) -> None:
        """Append parameter tokens in place until there are `num_tokens`.

        The parameters are new objects: rebuild the optimizer. Values are drawn as at initialisation, keys are zero: the
        output does not change, the gradient of a new key is nonzero, and so is that of a new value once its key is.

        Args:
            num_tokens: new number of parameter tokens, more than the current one.
            preserve: whether to preserve the function. Possible with a fixed tau, or if the weights are proportional to
                tau (gelu_l2_norm, whose old values are then scaled); not with softmax or a `top_k`. False draws the new
                keys as well.
            freeze: whether to train only the new rows; otherwise all rows are trained, even those frozen before.

        Raises:
            Unsupported: if the function cannot be preserved, or `num_tokens` is not larger than the current number.
        """
        self.check_growth(num_tokens, preserve=preserve)
        keys, values, config = self.keys, self.values, self.config
        count = keys.shape[0]
        if preserve:
            values = values * self._rescaling(num_tokens)
        new_values = self._draw_values(num_tokens - count).to(values)
        new_keys = torch.zeros(num_tokens - count, self.in_features).to(keys)
        if not preserve:
            new_keys.normal_(std=INIT_STD)
        self._set_rows(torch.cat([keys, new_keys]), torch.cat([values, new_values]), count if freeze else 0)
        self.config = replace(config, num_tokens=num_tokens, frozen_tokens=count if freeze else 0)

    def check_growth(self, num_tokens: int, *, preserve: bool = True) -> None:
        """Raise Unsupported if :meth:`grow` would."""
        count, config = self.keys.shape[0], self.config
        if num_tokens <= count:
            raise Unsupported(f"growing {count} tokens to {num_tokens}", supported=f"more than {count}")
        if preserve and config.theta == "softmax":
            raise Unsupported(
                "growing softmax weights without changing the function: a score of 0 still gets a weight",
                supported="preserve=False, or the other thetas",
                nearest="preserve=False",
            )
        if preserve and config.theta == "l2_norm_gelu" and config.tau_mode == "sqrt_n":
            raise Unsupported(
                'growing l2_norm_gelu with tau_mode="sqrt_n" without changing the function',
                supported='preserve=False, or tau_mode="fixed"',
                nearest='tau_mode="fixed"',
            )
        if preserve and config.top_k is not None and config.top_k < num_tokens:
            raise Unsupported(
                f"growing to {num_tokens} tokens with top_k={config.top_k} without changing the function, since new scores "
                "of 0 are larger than negative ones",
                supported="preserve=False, or no top_k",
                nearest="preserve=False",
            )

    @torch.no_grad()
    def shrink(self, num_tokens: int, *, importance: Float[Tensor, " t"] | None = None) -> None:
        """Keep the `num_tokens` most important parameter tokens, in their order, in place.

        The parameters are new objects, and all rows are trained, even those frozen before. A fixed tau stays, so that
        dropping rows whose keys are zero has no effect; if tau follows the number of rows and the weights are
        proportional to it (gelu_l2_norm), values are scaled, as in :meth:`grow`.

        Args:
            num_tokens: new number of parameter tokens, >= 1 and smaller than the current one.
            importance: importance of each parameter token, such as :func:`regard.training.token_usage`; the norm of its
                key when None.

        Raises:
            Unsupported: if `num_tokens` is out of range, or `importance` has another shape.
        """
        self.check_shrinking(num_tokens, importance=importance)
        importance = self.keys.norm(dim=1) if importance is None else importance.to(self.keys.device)
        kept = importance.topk(num_tokens).indices.sort().values
        values = self.values * self._rescaling(num_tokens)
        self._set_rows(self.keys[kept], values[kept], 0)
        self.config = replace(self.config, num_tokens=num_tokens, frozen_tokens=0)

    def check_shrinking(self, num_tokens: int, *, importance: Float[Tensor, " t"] | None = None) -> None:
        """Raise Unsupported if :meth:`shrink` would."""
        count = self.keys.shape[0]
        if not 1 <= num_tokens < count:
            raise Unsupported(f"shrinking {count} tokens to {num_tokens}", supported=f"from 1 to {count - 1}")
        if importance is not None and importance.shape != (count,):
            raise Unsupported(f"an importance of shape {tuple(importance.shape)}", supported=f"({count},)")

    def _rescaling(self, num_tokens: int) -> float:
        """The factor for values: not 1 if tau follows the number of rows and the weights are proportional to it."""
        follows = self.config.theta == "gelu_l2_norm" and self.config.tau_mode == "sqrt_n"
        return math.sqrt(self.keys.shape[0] / num_tokens) if follows else 1.0

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> TokenParameter:
        """Convert a linear layer, one parameter token per input feature: K_P = I, V_P = W^T, Theta the identity."""
        config = Config(theta="identity", num_tokens=linear.in_features)
        made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, config=config)
        made.to(linear.weight)
        with torch.no_grad():
            nn.init.eye_(made.key_tokens)
            made.value_tokens.copy_(linear.weight.T)
        return made

    def forward(
        self,
        x: Float[Tensor, "... c"],
        *,
        token_mask: Bool[Tensor, "*#batch t"] | None = None,
        rows: Int[Tensor, " t"] | None = None,
    ) -> Float[Tensor, "... out"]:
        """Project each token.

        Args:
            x: (..., in_features).
            token_mask: parameter tokens that each token may use, (t,) or (..., t).
            rows: indices of the parameter tokens that the call uses; all when None. `token_mask` then refers to them.
        """
        keys, values = self.keys, self.values
        if rows is not None:
            keys, values = keys[rows], values[rows]
        return attend_to_parameters(x, keys, values, self.config, tau=self.tau, token_mask=token_mask)

    def weights(
        self,
        x: Float[Tensor, "... c"],
        *,
        token_mask: Bool[Tensor, "*#batch t"] | None = None,
        rows: Int[Tensor, " t"] | None = None,
    ) -> Float[Tensor, "... t"]:
        """Theta of each token, the weights of the values in :meth:`forward`; same arguments."""
        keys = self.keys if rows is None else self.keys[rows]
        return parameter_weights(x, keys, self.config, tau=self.tau, token_mask=token_mask)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, num_tokens={self.keys.shape[0]}, {self.config.theta}"


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
    """Inputs for tests, with about a quarter of the parameter tokens masked for each token."""
    tokens, dim, out = sizes.get("t", 5), sizes.get("d", 8), sizes.get("e", 6)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": normal(batch, n, dim),
        "keys": normal(tokens, dim),
        "values": normal(tokens, out),
        "tau": torch.rand((), generator=generator, dtype=torch.float64).add(1).to(dtype),
        "token_mask": torch.rand(batch, n, tokens, generator=generator) < 0.75,
    }


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    """Axis sizes: the number of parameter tokens."""
    return {"t": shape.dim_value if config.num_tokens is None else config.num_tokens}


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of two products with all parameter tokens for each token."""
    rows = shape.dim_value if config.num_tokens is None else config.num_tokens
    token = 2.0 * shape.batch * rows * (shape.dim_key + shape.dim_value)
    return Cost(flops=token * shape.n, memory=2.0 * shape.batch * shape.n * rows, state=0.0, step_flops=token)


_NOTHING_TO_ATTEND_TO = "each token attends to parameters only; use it as the projection of a cross-attention layer"

MECHANISM = Mechanism(
    name="token_parameter",
    aliases=("pattention", "tokenformer", "token_parameter_attention"),
    kind=Kind.PROJECTION,
    summary="A linear layer replaced by attention from each token to learned parameter tokens, whose number can grow.",
    paper=Paper("TokenFormer: Rethinking Transformer Scaling with Tokenized Model Parameters", "2410.23168", 2024, 50),
    inputs={"x": "bnd", "keys": "td", "values": "te", "tau?": "", "token_mask?": "bnt"},
    output="bne",
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
    refused={Pattern.NONCAUSAL_CROSS: _NOTHING_TO_ATTEND_TO, Pattern.CAUSAL_CROSS: _NOTHING_TO_ATTEND_TO},
    forms={"reference": reference, "parallel": parallel},
    config=Config,
    variants={
        "gelu first": {"theta": "gelu_l2_norm", "num_tokens": 6, "eps": 1e-3},
        "softmax": {"theta": "softmax", "tau_mode": "sqrt_n", "num_layers": 4},
        "softmax of the largest": {"theta": "softmax", "top_k": 2},
        "identity": {"theta": "identity", "frozen_tokens": 2},
        "largest": {"top_k": 2},
    },
    cost=cost,
    axis_sizes=axis_sizes,
    default_scale=1.0,
    accepts_positions=("none",),
    domains={"tau": "positive"},
    sample_inputs=sample_inputs,
    module=TokenParameter,
)
