"""The one place through which every projection is built.

A *kind* names a factory ``factory(in_features, out_features, *, bias, **options) -> nn.Module`` that maps the last axis
from `in_features` to `out_features`. ``dense`` is :class:`Linear`; whoever has other kinds registers them
(the catalogue its projection mechanisms), so that layers need not know them.

:func:`accelerate` gives the linear layers of any other model the same speed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from regard.contract import Unsupported, an_instance, at_least, closest
from regard.engines.linear import linear

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Linear(nn.Linear):
    """`torch.nn.Linear` with its product computed by the route that is fastest on this machine.

    Parameters, their names and their initialisation are those of `torch.nn.Linear`. Other routes than torch's are for
    plain float32 tensors on a CPU, without autocast, in products that are large enough; everything else is torch's own.
    See :mod:`regard.engines.linear`.
    """

    def forward(self, input: Float[Tensor, "*b c"]) -> Float[Tensor, "*b out"]:
        """x W^T + b, by the fastest route that is known for such a product."""
        return linear(input, self.weight, self.bias)


@dataclass(frozen=True)
class Acceleration:
    """The changes made by :func:`accelerate`.

    Attributes:
        changed: names of the modules that became :class:`Linear`; ``""`` is the model itself.
        kept: the reason for each linear layer that was left as it was, by name.
        modules: the changed modules.
    """

    changed: tuple[str, ...]
    kept: dict[str, str]
    modules: tuple[nn.Module, ...]

    def undo(self) -> None:
        """Make the changed modules `torch.nn.Linear` again."""
        for module in self.modules:
            if type(module) is Linear:
                module.__class__ = nn.Linear  # type: ignore[assignment]

    def __str__(self) -> str:
        lines = [f"{len(self.changed)} linear layers changed, {len(self.kept)} kept"]
        return "\n".join(lines + [f"  kept {name or 'the model'}: {reason}" for name, reason in self.kept.items()])


def accelerate(model: nn.Module) -> Acceleration:
    """Make every `torch.nn.Linear` in a model a :class:`Linear`, in place.

    The modules stay the objects they are, with their parameters, hooks and names; only their class changes. So optimizers,
    tied weights, checkpoints and references from elsewhere stay valid. Layers that compute something of their own
    (subclasses, parametrized layers, a replaced `forward`) are kept and reported. Tools that look for the exact class
    `torch.nn.Linear`, as torch's quantization does, want :meth:`Acceleration.undo` first.

    Returns:
        What was changed and what was not; its `undo` reverses.
    """
    changed: dict[str, nn.Module] = {}
    kept: dict[str, str] = {}
    for name, module in model.named_modules():
        reason = _reason_to_keep(module)
        if reason:
            kept[name] = reason
        elif type(module) is nn.Linear:
            module.__class__ = Linear
            changed[name] = module
    return Acceleration(tuple(changed), kept, tuple(changed.values()))


def _reason_to_keep(module: nn.Module) -> str:
    if isinstance(module, nn.MultiheadAttention):
        return "its projections are inside torch's own function; regard.create_layer has attention with routes"
    if not isinstance(module, nn.Linear) or type(module) is Linear:
        return ""
    if type(module) is not nn.Linear:
        return f"{an_instance(module)} may compute something else"
    if "forward" in vars(module):
        return "its forward was replaced"
    return ""


def _dense(in_features: int, out_features: int, *, bias: bool) -> nn.Module:
    return Linear(in_features, out_features, bias=bias)


FACTORIES: dict[str, Callable[..., nn.Module]] = {"dense": _dense}

ALIASES: dict[str, str] = {}
"""Other names of kinds."""

SOURCES: list[Callable[[], None]] = []
"""Functions that register more kinds, called when all kinds, or one that is not registered, are asked for."""


def register_linear(kind: str, factory: Callable[..., nn.Module], *, aliases: Sequence[str] = ()) -> None:
    """Make projections of a kind available to :func:`make_linear`. The same kind and factory may be given again.

    Args:
        kind, factory: see above.
        aliases: other names that :func:`make_linear` takes.

    Raises:
        Unsupported: when the kind belongs to another factory.
    """
    if FACTORIES.setdefault(kind, factory) is not factory:
        raise Unsupported(f"a second factory for linear kind {kind!r}", supported="one factory a kind")
    ALIASES.update(dict.fromkeys(aliases, kind))


def list_linears() -> list[str]:
    """Names of the kinds."""
    _register_all()
    return list(FACTORIES)


def is_linear(name: Any) -> bool:
    """Whether it names a kind, or is an alias of one."""
    if name not in FACTORIES and name not in ALIASES:
        _register_all()
    return name in FACTORIES or name in ALIASES


def _register_all() -> None:
    for register in SOURCES:
        register()


def make_linear(
    in_features: int, out_features: int, *, bias: bool = False, kind: str = "dense", **options: Any
) -> nn.Module:
    """A projection (..., in_features) -> (..., out_features).

    Args:
        in_features, out_features: widths.
        bias: whether it adds a learned vector; a factory that cannot refuses.
        kind: one of :func:`list_linears`, or an alias: those of a mechanism are its kind's.
        options: the kind's own.

    Raises:
        Unsupported: for an unknown kind or options that its factory does not take.
    """
    if not is_linear(kind):
        known = (*FACTORIES, *ALIASES)
        raise Unsupported(
            f"linear kind {kind!r}", supported=", ".join(FACTORIES), nearest=closest(str(kind), known) or "dense"
        )
    kind = kind if kind in FACTORIES else ALIASES[kind]
    at_least("in_features", in_features, 1)
    at_least("out_features", out_features, 1)
    factory = FACTORIES[kind]
    parameters = inspect.signature(factory).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        own = [p for p in list(parameters)[2:] if p != "bias"]
        for option in options:
            if option not in own:
                raise Unsupported(
                    f"option {option!r} of linear kind {kind!r}",
                    supported=", ".join(own) or "no options",
                    nearest=closest(option, own),
                )
    return factory(in_features, out_features, bias=bias, **options)
