"""Every mechanism in modules of other libraries: does a swapped model compute what regard's own layers do with its
weights?

:func:`check_swap` fills one cell of that table: it swaps a mechanism into a small model of another library, replaces
the attention modules in a copy of the model by layers of :func:`regard.create_layer` with the same weights, and runs
both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regard.catalogue import get_mechanism, list_mechanisms
from regard.contract import Context, Kind, Loss, Mechanism, Pattern, Unsupported
from regard.create import create_layer
from regard.integrations import collect_losses, swap
from regard.models.losses import add_losses, auxiliary_loss
from regard.workbench.verification.swap_hosts import DIM, HEADS, HOSTS, TOKENS, Host, hosts

ROUNDINGS = 4
"""Allowed ratio of the gradients' difference to the change caused by the input's last digit, if above the tolerance."""
PROGRESS = 10.0
"""Training steps done so far, for schedules."""
SPREAD = 0.15
"""Standard deviation of all weights: scores of a few units, and states that stay finite in float32."""
TOLERANCES = {
    "float64": 1e-10,
    "float32": 1e-5,
    "padding": 1e-10,
    "training": 1e-8,
    "cache": 1e-10,
}
"""Largest difference allowed, as a fraction of the largest expected number."""

MEANINGS = {
    "float64": "the hidden states in float64",
    "float32": "and in float32",
    "padding": "with padding, at the tokens that exist",
    "training": "the gradient of the input in training mode, through auxiliary losses too",
    "cache": "the hidden states of pieces that follow one another in a cache, beside those of the whole",
}
SHELL = {
    "output_norm": None,
    "output_gate": None,
    "short_convolution": 0,
    "query_key_norm": None,
    "key_expand": 1.0,
    "value_expand": None,
    "bias": True,
}
"""Options that make regard's layers, apart from the mechanism, like the attention modules of other libraries."""

Losses = dict[str, Loss]


@dataclass
class SwapCell:
    """One mechanism in one model.

    Attributes:
        model: name of the model in :func:`hosts`.
        mechanism, variant: names of the mechanism and of its set of options; "" for the default options.
        refused: the reason why it cannot be swapped; "" if it can.
        errors: for each check, the largest difference as a fraction of the largest expected number.
        withheld: for each check that was refused, the reason.
        cache: what generation continues from: ``state``, ``keys``, or "" if it reads whole sequences.
    """

    model: str
    mechanism: str
    variant: str = ""
    refused: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    withheld: dict[str, str] = field(default_factory=dict)
    cache: str = ""

    @property
    def failures(self) -> list[str]:
        """The checks whose difference is too large."""
        return [name for name, error in self.errors.items() if not error <= TOLERANCES[name]]

    def row(self) -> dict[str, Any]:
        """The cell as JSON data, without empty fields."""
        return {name: value for name, value in asdict(self).items() if value or name in ("model", "mechanism")}


def check_swap(model: str, mechanism: str, variant: str = "", *, checks: Sequence[str] = tuple(TOLERANCES)) -> SwapCell:
    """Measure one cell.

    Args:
        model: name of the model in :func:`hosts`.
        mechanism: name of the mechanism.
        variant: one of the mechanism's variants; "" for the default options.
        checks: names in `MEANINGS`; those that apply to the model are made.
    """
    host, card = HOSTS[model], get_mechanism(mechanism)
    if host.package == "transformers":
        import regard.integrations.transformers  # noqa: F401
    cell = SwapCell(model, mechanism, variant)
    options = {n: x for n, x in card.variants[variant].items() if n != "num_heads"} if variant else {}
    torch.manual_seed(0)
    swapped = host.build().double().eval()
    try:
        report = swap(swapped, mechanism, pattern=host.pattern, only=host.only, **options)
    except Unsupported as error:
        cell.refused = _reason(error)
        return cell
    for parameter in swapped.parameters():
        nn.init.normal_(parameter, std=SPREAD)
    inner = get_mechanism("softmax") if card.kind is Kind.WRAPPER else card
    told = _Told(host, "roles" in inner.honours or (inner.keeps_places and not getattr(host, "before", 0)))
    try:
        own = _with_own_layers(swapped, card, inner, options, told)
    except Unsupported as error:
        raise AssertionError(f"{mechanism} is swapped into a {host.title} but has no layer there: {error}") from error
    cell.cache = _cache_of(host, report.notes)
    x = host.inputs()
    valid = torch.ones(3, TOKENS, dtype=torch.bool)
    valid[1, :3] = False
    valid[2, [0, 7] if host.pattern is not Pattern.CAUSAL_SELF else slice(0, 1)] = False
    made: dict[str, Callable[[], float]] = {
        "float64": lambda: _compare_outputs(swapped, own, told, x),
        "float32": lambda: _compare_outputs(_single(swapped), _single(own), told, x.float()),
        "padding": lambda: _compare_outputs(swapped, own, told, x, valid),
        "training": lambda: _compare_gradients(swapped, own, told, x),
        "cache": lambda: _compare_pieces(host, swapped, x, valid),
    }
    for name, check in made.items():
        if name not in checks or (name == "padding" and not host.pads) or (name == "cache" and not cell.cache):
            continue
        try:
            cell.errors[name] = check()
        except Unsupported as error:
            cell.withheld[name] = _reason(error)
    if "float64" in cell.withheld:
        cell.refused, cell.withheld = cell.withheld["float64"], {}
    return cell


@dataclass
class _Told:
    """The context that regard's layers get in a call, and the losses that they return.

    Attributes:
        host: the model that they are in.
        knows_tokens: whether they get the grid and the roles of the tokens.
        valid: True for tokens that are not padding; None if none are padding.
    """

    host: Host
    knows_tokens: bool
    valid: Tensor | None = None
    losses: Losses = field(default_factory=dict)

    def begin(self, valid: Tensor | None) -> None:
        """Start another call, with this padding."""
        self.valid, self.losses = valid, {}

    def context(self, x: Tensor) -> Context:
        """The context for a layer called on `x`."""
        found = self.host.context(self.valid, x)
        return found if self.knows_tokens else found.replace(grid=None, roles=None)


class _Own(nn.Module):
    """One of regard's layers, called like the module that it replaces."""

    batch_first = True
    _qkv_same_embed_dim = False
    in_proj_bias = None

    def __init__(self, layer: Any, told: _Told) -> None:
        super().__init__()
        self.layer, self.told, self.num_heads = layer, told, HEADS

    def forward(self, *args: Any, **given: Any) -> Any:
        def run(x: Tensor, memory: Tensor | None = None) -> Tensor:
            context = self.told.context(x)
            result = self.layer(x, memory, context=context.replace(progress=PROGRESS if self.training else None))
            add_losses(self.told.losses, result.losses)
            return result.output

        return self.told.host.call_own(run, args, given)


def _with_own_layers(
    swapped: nn.Module, card: Mechanism, inner: Mechanism, options: Mapping[str, Any], told: _Told
) -> nn.Module:
    """A copy of a swapped model with regard's layers as attention modules; `inner` is the mechanism in a wrapper."""
    host = told.host
    shell: dict[str, Any] = {n: x for n, x in SHELL.items() if n not in inner.config.__dataclass_fields__}  # type: ignore[attr-defined]
    shell["num_kv_heads"] = host.groups
    shell["positions"] = "rotary" if host.rotates and "rotary" in inner.accepts_positions else "none"
    if card.kind is Kind.WRAPPER:
        beside = ("num_kv_heads", "positions")
        outer = {n: shell.pop(n) for n in beside}
        shell = {**outer, "mechanism_options": shell}
    own = copy.deepcopy(swapped)
    for path, module in host.attention(own).items():
        layer: Any = create_layer(card.name, DIM, HEADS, pattern=host.pattern, **shell, **options).double()
        attention = layer.attention if card.kind is Kind.WRAPPER else layer
        with torch.no_grad():
            linears = (attention.query, attention.key, attention.value, attention.output)
            for linear, (weight, bias) in zip(linears, host.maps(module), strict=True):
                linear.weight.copy_(weight)
                linear.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
        for part in ("projection", "merge"):
            made, learned = getattr(attention, part), getattr(host.placed(module), part)
            if made is not None:  # biases that only regard's layers have are set to 0
                for name in made.load_state_dict(learned.state_dict(), strict=False).missing_keys:
                    nn.init.zeros_(made.get_parameter(name))
        parent, _, name = path.rpartition(".")
        setattr(own.get_submodule(parent), name, _Own(layer, told))
    return own.eval()


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _single(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).float()


def _run(host: Host, model: nn.Module, x: Tensor, valid: Tensor | None) -> Tensor:
    torch.manual_seed(1)  # some mechanisms draw random numbers in evaluation too
    return host.run(model, x, valid)


def _compare_outputs(swapped: nn.Module, own: nn.Module, told: _Told, x: Tensor, valid: Tensor | None = None) -> float:
    told.begin(valid)
    with torch.no_grad():
        found, expected = (_run(told.host, model, x, valid) for model in (swapped, own))
    if valid is not None and not told.host.pattern.cross:
        found, expected = found[valid], expected[valid]
    return _difference(found, expected)


def _compare_gradients(swapped: nn.Module, own: nn.Module, told: _Told, x: Tensor) -> float:
    """The relative difference of the input's gradients, in training mode.

    Raises:
        Unsupported: if they differ by more than the tolerance, but not by much more than a change in the last digit of
            the input causes.
    """
    told.begin(None)

    def gradient(model: nn.Module, given: Tensor) -> Tensor:
        model.train()
        torch.manual_seed(1)
        given = given.clone().requires_grad_()
        try:
            with collect_losses(model, progress=PROGRESS) as collected:
                output = told.host.run(model, given)
        finally:
            model.eval()
        losses: Losses = collected.losses if model is swapped else told.losses
        loss = output.square().mean() + auxiliary_loss(losses, dict.fromkeys(losses, 1.0))
        return torch.autograd.grad(loss, given)[0]

    expected = gradient(own, x)
    error = _difference(gradient(swapped, x), expected)
    if error > TOLERANCES["training"]:
        told.begin(None)
        rounding = _difference(gradient(own, x * (1 + torch.finfo(x.dtype).eps)), expected)
        if error <= ROUNDINGS * rounding:
            raise Unsupported(f"gradients of more digits: the last digit of the input changes them by {rounding:.0e}")
    return error


def _compare_pieces(host: Host, swapped: nn.Module, x: Tensor, valid: Tensor) -> float:
    from regard.integrations.transformers import CACHE

    with torch.no_grad():
        whole = _run(host, swapped, x, valid)
        if not torch.equal(whole, host.run(swapped, x, valid)):
            raise Unsupported("a comparison of pieces with the whole, where each draws for itself")
        cache, found = None, []
        start = 0
        positions = (valid.cumsum(-1) - 1).clamp(min=0)
        for size in (8, 1, 1, 1, 1, 5, 1, TOKENS - 18):
            piece = slice(start, start + size)
            result: Any = swapped(
                inputs_embeds=x[:, piece],
                attention_mask=valid[:, : start + size].long(),
                position_ids=positions[:, piece],
                use_cache=True,
                **{CACHE: cache},
            )
            cache, start = getattr(result, CACHE), start + size
            found.append(result.last_hidden_state)
    return _difference(torch.cat(found, 1)[valid], whole[valid])


def _cache_of(host: Host, notes: Sequence[str]) -> str:
    if not host.generates or any("use_cache is off" in note for note in notes):
        return ""
    return "state" if any("from the state of" in note for note in notes) else "keys"


def _reason(error: Unsupported) -> str:
    """What was refused, without the path of the module where it was refused first."""
    text = str(error)
    if text.count("not supported: ") > 1:
        text = text.split("not supported: ")[2]
    return text.removeprefix("not supported: ").split("; ")[0]


def swap_cells(
    models: Sequence[str] | None = None, mechanisms: Sequence[str] | None = None, *, variants: bool = True
) -> Iterator[SwapCell]:
    """All cells, one after the other.

    Args:
        models, mechanisms: names; all when None.
        variants: whether to yield a cell for each variant of a mechanism, too.
    """
    for mechanism in list_mechanisms() if mechanisms is None else mechanisms:
        for model in hosts() if models is None else models:
            for variant in ("", *(swap_variants(mechanism) if variants else ())):
                cell = check_swap(model, mechanism, variant)
                if not variant or not cell.refused:
                    yield cell


def swap_variants(mechanism: str) -> list[str]:
    """Variants of a mechanism with options of the mechanism only, which :func:`regard.swap` accepts."""
    card = get_mechanism(mechanism)
    own = {*card.config.__dataclass_fields__, "num_heads"}  # type: ignore[attr-defined]
    return [name for name, options in card.variants.items() if options.keys() <= own]
