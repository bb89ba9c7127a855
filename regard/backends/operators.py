"""Functions of tensors as torch operators, with an overhead of microseconds.

An operator makes a kernel visible to graphs, exports, profilers and dispatch modes. `torch.library.custom_op` does so
too, but the overhead of a call, and even more of its gradient, is as long as a kernel takes for a short sequence.

This is the only module that uses private functions of torch, where there is no public one: for dispatch modes,
transforms of `torch.func`, the level of forward-mode derivatives, tracing, zero tensors, and the guard below autograd.
The module's tests cover each of them, so that a change in torch is noticed.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from regard.contract import Unsupported

_LIBRARY = torch.library.Library("regard", "FRAGMENT")


PLAIN = (Tensor, torch.nn.Parameter)

TRANSFORMS = "forward-mode derivatives or transforms of torch.func"
"""Kinds of derivatives that operators do not support; :func:`transformed` says when they would be needed."""


@dataclass(frozen=True)
class Packed:
    """Base of frozen dataclasses of tensors and numbers that group arguments of operators. Torch sees their fields as
    separate arguments."""

    @classmethod
    def places(cls) -> list[str]:
        """Names of the fields, in the order in which torch sees them."""
        return [field.name for field in fields(cls)]

    @property
    def learned(self) -> list[Tensor | None]:
        """The leading fields that may have gradients, all tensors; to be overridden by classes with such fields."""
        return []

    @property
    def records(self) -> bool:
        """True if one of these tensors requires a gradient."""
        return any(x is not None and x.requires_grad for x in self.learned)

    def empty_gradients(self, needed: Sequence[bool]) -> list[Tensor]:
        """Empty tensors for the gradients of :attr:`learned`: contiguous, whatever the inputs' strides; of size 0 where
        not needed."""
        like = next(x for x in self.learned if x is not None)
        return [
            x.new_empty(x.shape) if want and x is not None else like.new_empty(0)
            for x, want in zip(self.learned, needed, strict=True)
        ]

    def keep(self, ctx: Any, *results: Tensor | None) -> None:
        """Save this object and results of the operator for the backward function, which calls :meth:`kept`."""
        values = [getattr(self, name) for name in self.places()]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in values), *results)
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in values]

    @classmethod
    def kept(cls, ctx: Any) -> tuple[Self, list[Any]]:
        """The object and the results that :meth:`keep` saved."""
        saved, count = ctx.saved_tensors, len(ctx.numbers)
        values = (x if number is None else number for x, number in zip(saved, ctx.numbers, strict=False))
        return cls(*values), list(saved[count:])

    def needed(self, ctx: Any) -> list[bool]:
        """Which gradients of :attr:`learned` are needed, if this object is the operator's first argument."""
        return list(ctx.needs_input_grad[: len(self.learned)])

    def gradients(self, found: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """Gradients in the form that a backward function returns: None where not needed, and for all fields after
        :attr:`learned`."""
        grads = [x if need else None for x, need in zip(found, needed, strict=True)]
        return *grads, *[None] * (len(self.places()) - len(grads))


class Operator:
    """``torch.ops.regard.<name>``, with a faster way to call it.

    Args:
        name: name of the operator.
        run: computes it on the CPU. The schema is inferred from its annotations, where a :class:`Packed` stands for its
            fields; it must not change or return its inputs, has no defaults, and raises an exception for every bad
            call.

    Every operator needs :meth:`register_fake` and a gradient: :meth:`register_autograd` or :meth:`refuse_gradient`.
    """

    def __init__(self, name: str, run: Callable[..., Any]) -> None:
        self.name, self._run = name, run
        hints = {n: h for n, h in typing.get_type_hints(run).items() if n != "return"}
        self._packs = {at: (hint, hint.places()) for at, hint in enumerate(hints.values()) if _is_pack(hint)}
        prototype = _spread(run, hints) if self._packs else run
        schema = name + torch.library.infer_schema(prototype, mutates_args=())
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, self._of_flat(run), "CPU")
        self.overload = getattr(torch.ops.regard, name).default
        self._apply: Callable[..., Any] = self.overload

    def __call__(self, *arguments: Any) -> Any:
        if transformed():  # the dispatcher would lose tangents, and batch by a loop
            raise Unsupported(f"{TRANSFORMS} of the operator {self.name}", nearest="backend='torch'")
        flat = self._flat(arguments) if self._packs else arguments
        if _observed():
            return self.overload(*flat)
        if _differentiated(flat):
            return self._apply(*flat)
        if not _direct(flat):
            with torch._C._AutoDispatchBelowAutograd():
                return self.overload(*flat)
        return self._run(*arguments)  # where the dispatcher would end up

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator for the function that makes empty results of the right shapes, dtypes and strides."""
        torch.library.register_fake(f"regard::{self.name}", self._of_flat(function), lib=_LIBRARY)
        return function

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """Register a gradient, as in `torch.library.register_autograd`; for double backward, it must call operators.

        `setup_context` gets the inputs as `run` does. `backward` returns a gradient for each argument that torch sees;
        `ctx.needs_input_grad` has the same order: see :meth:`Packed.places`.
        """

        def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_context(ctx, self._packed(inputs), output)

        torch.library.register_autograd(f"regard::{self.name}", backward, setup_context=keep, lib=_LIBRARY)
        self._apply = _function(self.name, self.overload, backward, keep)

    def _flat(self, arguments: tuple[Any, ...]) -> list[Any]:
        """Arguments of `run` as torch sees them."""
        flat: list[Any] = []
        for at, argument in enumerate(arguments):
            if at in self._packs:
                flat += [getattr(argument, name) for name in self._packs[at][1]]
            else:
                flat.append(argument)
        return flat

    def _packed(self, flat: Sequence[Any]) -> tuple[Any, ...]:
        """Arguments that torch sees, as `run` takes them."""
        left, arguments = list(flat), list[Any]()
        while left:
            kind, names = self._packs.get(len(arguments), (None, ("",)))
            here, left = left[: len(names)], left[len(names) :]
            arguments.append(here[0] if kind is None else kind(*here))
        return tuple(arguments)

    def _of_flat(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return (lambda *flat: function(*self._packed(flat))) if self._packs else function

    def refuse_gradient(self, asked: str, *, supported: str = "", nearest: str = "backend='torch'") -> None:
        """Raise Unsupported with this message if a gradient through the operator is computed."""

        def refuse(ctx: Any, *grads: Any) -> None:
            raise Unsupported(asked, supported=supported, nearest=nearest)

        self.register_autograd(refuse, setup_context=lambda ctx, inputs, output: None)


def _is_pack(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Packed)


def _spread(run: Callable[..., Any], hints: dict[str, Any]) -> Callable[..., Any]:
    """A function with the fields of packed arguments in its signature, from which torch infers a schema."""
    flat: dict[str, Any] = {}
    for name, hint in hints.items():
        flat |= typing.get_type_hints(hint) if _is_pack(hint) else {name: hint}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=hint) for name, hint in flat.items()]

    def prototype(*arguments: Any) -> None: ...

    answer = typing.get_type_hints(run)["return"]
    prototype.__signature__ = inspect.Signature(parameters, return_annotation=answer)  # type: ignore[attr-defined]
    return prototype


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator that turns a function into an :class:`Operator`."""
    return lambda run: Operator(name, run)


def runs_plainly(*arguments: Any) -> bool:
    """Return whether calling an operator would do no more than run its function: no observer, no gradient."""
    watched = _observed() or forward_ad._current_level >= 0
    return not (watched or _differentiated(arguments)) and _direct(arguments)


def transformed() -> bool:
    """Return whether forward-mode derivatives or a transform of `torch.func` are active; False while compiling."""
    if torch.compiler.is_compiling():
        return False
    if not torch._C._are_functorch_transforms_active():
        return forward_ad._current_level >= 0
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() != TransformType.Functionalize for level in stack)


def in_transform() -> bool:
    """Return whether a transform of `torch.func` is active, including functionalization."""
    return torch._C._are_functorch_transforms_active()


def in_forward_mode() -> bool:
    """Return whether forward-mode derivatives are being computed."""
    return forward_ad._current_level >= 0


def _differentiated(arguments: Sequence[Any]) -> bool:
    """Return whether autograd records the call."""
    return torch.is_grad_enabled() and any([isinstance(x, Tensor) and x.requires_grad for x in arguments])


def _direct(arguments: Sequence[Any]) -> bool:
    """Return whether the dispatcher would call the CPU function directly, with no profiler active."""
    if torch.autograd._profiler_enabled():
        return False
    for x in arguments:
        # plain memory: no lazy negation, and no zero tensor without storage
        if isinstance(x, Tensor) and (type(x) not in PLAIN or not x.is_cpu or x.is_neg() or x._is_zerotensor()):
            return False
    return True


def _observed() -> bool:
    """Return whether something must see the operator before autograd does: a compiler, a mode, a transform,
    `torch.jit.trace`."""
    return torch.compiler.is_compiling() or bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
    )


def _function(
    name: str, overload: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., Any]
) -> Callable[..., Any]:
    """A function that calls the operator and records its gradient, without the dispatcher's layers of Python."""

    def forward(ctx: Any, *arguments: Any) -> Tensor | tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            output = overload(*arguments)
        setup_context(ctx, arguments, output)
        return tuple(output) if isinstance(output, list) else output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"regard_{name}", (torch.autograd.Function,), methods).apply  # type: ignore[attr-defined]
