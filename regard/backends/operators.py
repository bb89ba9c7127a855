"""Functions of tensors as operators of torch, at a cost of microseconds.

An operator is what graphs, exports, profilers and modes of dispatch see of a kernel. `torch.library.custom_op` is one too,
but spends on a call, and on its gradient more so, what a kernel takes for a short sequence.

What torch has no public word for is asked of its private ones, here alone: modes of dispatch, transforms of `torch.func`,
the level of forward-mode derivatives, traces, zero tensors, and the guard below the recording of gradients. The tests of this
module have a case for each, so that a torch that changes one of them shows.
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
"""Derivatives that operators do not have; :func:`transformed` tells when they would be needed."""


@dataclass(frozen=True)
class Packed:
    """Arguments of operators that belong together: the base of frozen dataclasses of tensors and numbers, which an operator
    takes apart for torch."""

    @classmethod
    def places(cls) -> list[str]:
        """The names of its fields, in the order in which torch sees them."""
        return [field.name for field in fields(cls)]

    @property
    def learned(self) -> list[Tensor | None]:
        """The first fields, tensors that may have gradients; a class that has some names them."""
        return []

    @property
    def records(self) -> bool:
        """Whether some of them wants a gradient."""
        return any(x is not None and x.requires_grad for x in self.learned)

    def empty_gradients(self, needed: Sequence[bool]) -> list[Tensor]:
        """Room for the gradients of what is :attr:`learned`: contiguous, whatever the inputs' strides; empty where not
        needed."""
        like = next(x for x in self.learned if x is not None)
        return [
            x.new_empty(x.shape) if want and x is not None else like.new_empty(0)
            for x, want in zip(self.learned, needed, strict=True)
        ]

    def keep(self, ctx: Any, *results: Tensor | None) -> None:
        """Save it, and what an operator has found, for a backward function, which asks :meth:`kept` for them."""
        values = [getattr(self, name) for name in self.places()]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in values), *results)
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in values]

    @classmethod
    def kept(cls, ctx: Any) -> tuple[Self, list[Any]]:
        """What :meth:`keep` was given: the object, and the results."""
        saved, count = ctx.saved_tensors, len(ctx.numbers)
        values = (x if number is None else number for x, number in zip(saved, ctx.numbers, strict=False))
        return cls(*values), list(saved[count:])

    def needed(self, ctx: Any) -> list[bool]:
        """Which gradients of what is :attr:`learned` are asked for, where it is an operator's first argument."""
        return list(ctx.needs_input_grad[: len(self.learned)])

    def gradients(self, found: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """Gradients of what is :attr:`learned`, as a backward function returns them: None where not needed, and of the
        other fields."""
        grads = [x if need else None for x, need in zip(found, needed, strict=True)]
        return *grads, *[None] * (len(self.places()) - len(grads))


class Operator:
    """``torch.ops.regard.<name>``, and the quick way to call it.

    Args:
        name: of the operator.
        run: computes it on the CPU. Its annotations are the schema, in which a :class:`Packed` stands for its fields; it
            neither changes its inputs nor returns them, has no defaults, and answers every bad call with an exception.

    Every operator wants :meth:`register_fake` and a gradient: :meth:`register_autograd` or :meth:`refuse_gradient`.
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
        if transformed():  # the dispatcher would drop tangents, and batch by a loop
            raise Unsupported(f"{TRANSFORMS} of the operator {self.name}", nearest="backend='torch'")
        flat = self._flat(arguments) if self._packs else arguments
        if _observed():
            return self.overload(*flat)
        if _differentiated(flat):
            return self._apply(*flat)
        if not _direct(flat):
            with torch._C._AutoDispatchBelowAutograd():
                return self.overload(*flat)
        return self._run(*arguments)  # what the dispatcher would come to

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorates what makes empty results of the right shapes, dtypes and strides."""
        torch.library.register_fake(f"regard::{self.name}", self._of_flat(function), lib=_LIBRARY)
        return function

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """The gradient, as in `torch.library.register_autograd`; to be differentiated again, it calls operators.

        `setup_context` gets the inputs as `run` does. `backward` returns a gradient for each argument that torch sees, and
        `ctx.needs_input_grad` has their order: see :meth:`Packed.places`.
        """

        def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_context(ctx, self._packed(inputs), output)

        torch.library.register_autograd(f"regard::{self.name}", backward, setup_context=keep, lib=_LIBRARY)
        self._apply = _function(self.name, self.overload, backward, keep)

    def _flat(self, arguments: tuple[Any, ...]) -> list[Any]:
        """The arguments as torch sees them."""
        flat: list[Any] = []
        for at, argument in enumerate(arguments):
            if at in self._packs:
                flat += [getattr(argument, name) for name in self._packs[at][1]]
            else:
                flat.append(argument)
        return flat

    def _packed(self, flat: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments as `run` takes them."""
        left, arguments = list(flat), list[Any]()
        while left:
            kind, names = self._packs.get(len(arguments), (None, ("",)))
            here, left = left[: len(names)], left[len(names) :]
            arguments.append(here[0] if kind is None else kind(*here))
        return tuple(arguments)

    def _of_flat(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return (lambda *flat: function(*self._packed(flat))) if self._packs else function

    def refuse_gradient(self, asked: str, *, supported: str = "", nearest: str = "backend='torch'") -> None:
        """Raise Unsupported, with these words, where a gradient through the operator is computed."""

        def refuse(ctx: Any, *grads: Any) -> None:
            raise Unsupported(asked, supported=supported, nearest=nearest)

        self.register_autograd(refuse, setup_context=lambda ctx, inputs, output: None)


def _is_pack(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Packed)


def _spread(run: Callable[..., Any], hints: dict[str, Any]) -> Callable[..., Any]:
    """A function whose signature has the fields of packed arguments in their place, to read a schema from."""
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
    """Decorates the function that computes an :class:`Operator`."""
    return lambda run: Operator(name, run)


def runs_plainly(*arguments: Any) -> bool:
    """Whether an operator's call comes to nothing but its function: nobody sees it or wants its gradient."""
    watched = _observed() or forward_ad._current_level >= 0
    return not (watched or _differentiated(arguments)) and _direct(arguments)


def transformed() -> bool:
    """Whether forward-mode derivatives, or a function made from another by `torch.func`, are being computed; not asked of
    what a compiler sees."""
    if torch.compiler.is_compiling():
        return False
    if not torch._C._are_functorch_transforms_active():
        return forward_ad._current_level >= 0
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() != TransformType.Functionalize for level in stack)


def in_transform() -> bool:
    """Whether a function made from another by `torch.func` runs, functionalization among them."""
    return torch._C._are_functorch_transforms_active()


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are being computed."""
    return forward_ad._current_level >= 0


def _differentiated(arguments: Sequence[Any]) -> bool:
    """Whether a gradient is recorded."""
    return torch.is_grad_enabled() and any([isinstance(x, Tensor) and x.requires_grad for x in arguments])


def _direct(arguments: Sequence[Any]) -> bool:
    """Whether the dispatcher would come to the function on the CPU, and no profiler wants to know of it."""
    if torch.autograd._profiler_enabled():
        return False
    for x in arguments:
        # a tensor's numbers lie in memory as they are: no sign waits to be applied, no zeros to be written
        if isinstance(x, Tensor) and (type(x) not in PLAIN or not x.is_cpu or x.is_neg() or x._is_zerotensor()):
            return False
    return True


def _observed() -> bool:
    """Whether something is to see the operator before its gradient is recorded: a compiler, a mode, a transform,
    `torch.jit.trace`."""
    return torch.compiler.is_compiling() or bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
    )


def _function(
    name: str, overload: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., Any]
) -> Callable[..., Any]:
    """Calls the operator and records its gradient, as the dispatcher would after several layers of Python."""

    def forward(ctx: Any, *arguments: Any) -> Tensor | tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            output = overload(*arguments)
        setup_context(ctx, arguments, output)
        return tuple(output) if isinstance(output, list) else output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"regard_{name}", (torch.autograd.Function,), methods).apply  # type: ignore[attr-defined]
