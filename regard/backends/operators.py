"""Functions of tensors as operators of torch, at a cost of microseconds.

An operator is what graphs, exports, profilers and modes of dispatch see of a kernel. `torch.library.custom_op` is one too,
but spends on a call, and on its gradient more so, what a kernel takes for a short sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from regard.contract import Unsupported

_LIBRARY = torch.library.Library("regard", "FRAGMENT")


PLAIN = (Tensor, torch.nn.Parameter)

TRANSFORMS = "forward-mode derivatives or transforms of torch.func"
"""Derivatives that operators do not have; :func:`transformed` tells when they would be needed."""


class Operator:
    """``torch.ops.regard.<name>``, and the quick way to call it.

    Args:
        name: of the operator.
        run: computes it on the CPU. Its annotations are the schema; it neither changes its inputs nor returns them, has no
            defaults, and answers every bad call with an exception.

    Every operator wants :meth:`register_fake` and a gradient: :meth:`register_autograd` or :meth:`refuse_gradient`.
    """

    def __init__(self, name: str, run: Callable[..., Any]) -> None:
        self.name, self._run = name, run
        _LIBRARY.define(name + torch.library.infer_schema(run, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, run, "CPU")
        self.overload = getattr(torch.ops.regard, name).default
        self._apply: Callable[..., Any] = self.overload

    def __call__(self, *arguments: Any) -> Any:
        if transformed():  # the dispatcher would drop tangents, and batch by a loop
            raise Unsupported(f"{TRANSFORMS} of the operator {self.name}", nearest="backend='torch'")
        if _observed():
            return self.overload(*arguments)
        if _differentiated(arguments):
            return self._apply(*arguments)
        if not _direct(arguments):
            with torch._C._AutoDispatchBelowAutograd():
                return self.overload(*arguments)
        return self._run(*arguments)  # what the dispatcher would come to

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorates what makes empty results of the right shapes, dtypes and strides."""
        torch.library.register_fake(f"regard::{self.name}", function, lib=_LIBRARY)
        return function

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """The gradient, as in `torch.library.register_autograd`; to be differentiated again, it calls operators."""
        torch.library.register_autograd(f"regard::{self.name}", backward, setup_context=setup_context, lib=_LIBRARY)
        self._apply = _function(self.name, self.overload, backward, setup_context)

    def refuse_gradient(self, asked: str, *, supported: str = "", nearest: str = "backend='torch'") -> None:
        """Raise Unsupported, with these words, where a gradient through the operator is computed."""

        def refuse(ctx: Any, *grads: Any) -> None:
            raise Unsupported(asked, supported=supported, nearest=nearest)

        self.register_autograd(refuse, setup_context=lambda ctx, inputs, output: None)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Decorates the function that computes an :class:`Operator`."""
    return lambda run: Operator(name, run)


def runs_plainly(*arguments: Any) -> bool:
    """Whether an operator's call comes to nothing but its function: nobody sees it or wants its gradient."""
    return not transformed() and not _observed() and not _differentiated(arguments) and _direct(arguments)


def transformed() -> bool:
    """Whether forward-mode derivatives, or a function made from another by `torch.func`, are being computed; not asked of
    what a compiler sees."""
    if torch.compiler.is_compiling():
        return False
    if not torch._C._are_functorch_transforms_active():
        return forward_ad._current_level >= 0
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() != TransformType.Functionalize for level in stack)


def _differentiated(arguments: tuple[Any, ...]) -> bool:
    """Whether a gradient is recorded."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)


def _direct(arguments: tuple[Any, ...]) -> bool:
    """Whether the dispatcher would come to the function on the CPU, and no profiler wants to know of it."""
    return not torch.autograd._profiler_enabled() and all(map(_plain, arguments))


def _plain(argument: Any) -> bool:
    """Whether a tensor's numbers lie in memory as they are: no sign waits to be applied, no zeros to be written."""
    if not isinstance(argument, Tensor):
        return True
    return type(argument) in PLAIN and argument.is_cpu and not argument.is_neg() and not argument._is_zerotensor()


def _observed() -> bool:
    """Whether something is to see the operator before its gradient is recorded: a compiler, a mode, a transform,
    `torch.jit.trace`."""
    return torch.compiler.is_compiling() or bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
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
