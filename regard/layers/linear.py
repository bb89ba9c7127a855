"""The factory that makes all linear projections.

A *kind* names a factory ``factory(in_features, out_features, *, bias, **options) -> nn.Module`` that maps the last axis
from `in_features` to `out_features`. ``dense`` is :class:`Linear`; other kinds are registered from outside (the
catalogue registers projection mechanisms), so that layers need not know them.

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
    """`torch.nn.Linear` with its matrix product computed by the route that is fastest on this machine.

    Parameters, their names and their initialisation are those of `torch.nn.Linear`. Routes other than torch's are used
    for plain float32 tensors on a CPU, without autocast, if the product is large enough; all else is left to torch. See
    :mod:`regard.engines.linear`.
    """

    def forward(self, input: Float[Tensor, "*b c"]) -> Float[Tensor, "*b out"]:
        """x W^T + b, by the fastest known route for a product of this shape."""
        return linear(input, self.weight, self.bias)


@dataclass(frozen=True)
class Acceleration:
    """The changes made by :func:`accelerate`.

    Attributes:
        changed: names of the modules that became :class:`Linear`; ``""`` is the model itself.
        kept: by name, the reason why a linear layer was left unchanged.
        modules: the changed modules themselves.
    """

    changed: tuple[str, ...]
    kept: dict[str, str]
    modules: tuple[nn.Module, ...]

    def undo(self) -> None:
        """Turn the changed modules back into `torch.nn.Linear`."""
        for module in self.modules:
            if type(module) is Linear:
                module.__class__ = nn.Linear  # type: ignore[assignment]

    def __str__(self) -> str:
        lines = [f"{len(self.changed)} linear layers changed, {len(self.kept)} kept"]
        return "\n".join(lines + [f"  kept {name or 'the model'}: {reason}" for name, reason in self.kept.items()])


def accelerate(model: nn.Module) -> Acceleration:
    """Turn every `torch.nn.Linear` in a model into a :class:`Linear`, in place.

    Modules keep their identity, parameters, hooks and names; only their class changes. Optimizers, tied weights,
    checkpoints and other references to them therefore stay valid. Layers that compute something else (subclasses,
    parametrized layers, a replaced `forward`) are left unchanged and reported. Before using tools that look for the
    exact class `torch.nn.Linear`, such as torch's quantization, call :meth:`Acceleration.undo`.

    Returns:
        The changed and the unchanged layers; its `undo` reverses the change.
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
"""Functions that register more kinds. They run when all kinds are listed, or when an unregistered one is requested."""


def register_linear(kind: str, factory: Callable[..., nn.Module], *, aliases: Sequence[str] = ()) -> None:
    """Register a kind of projection for :func:`make_linear`. Registering the same kind and factory again is harmless.

    Args:
        kind, factory: see the module's docstring.
        aliases: other names that :func:`make_linear` accepts.

    Raises:
        Unsupported: if the kind is registered with another factory.
    """
    if FACTORIES.setdefault(kind, factory) is not factory:
        raise Unsupported(f"a second factory for linear kind {kind!r}", supported="one factory a kind")
    ALIASES.update(dict.fromkeys(aliases, kind))


def list_linears() -> list[str]:
    """Names of the kinds."""
    _register_all()
    return list(FACTORIES)


def is_linear(name: Any) -> bool:
    """Return whether a name is a kind of linear layer or an alias of one."""
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
        in_features, out_features: input and output widths.
        bias: whether to add a learned vector; factories that cannot do so raise Unsupported.
        kind: one of :func:`list_linears`, or an alias; the aliases of a projection mechanism are aliases of its kind.
        options: options of the kind.

    Raises:
        Unsupported: for an unknown kind, or options that its factory does not take.
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
