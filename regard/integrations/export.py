"""Layers and models as programs for elsewhere: `torch.export`, and ONNX.

A program has PyTorch's operators alone, none of the native kernels, and takes and returns what the module does: a
:class:`regard.Result`, and states where they are given. Plain `torch.export.export` works on every module too (on recurrences
within ``torch.no_grad()``, else they are refused); what :func:`export` adds is that every axis of tokens, those of a state's
caches among them, may have any length, and a reason where a mechanism has no such program. Networks for images have programs
for images of one size and batches of any.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from regard.contract import Context, Mask, Mechanism, State, Unsupported, an_instance
from regard.integrations.onnx_forms import as_onnx
from regard.models.vision import Backbone
from regard.models.vision.segmentation import Segmenter

PACKAGES = ("onnx", "onnxscript")


def export(
    module: nn.Module,
    *inputs: Tensor,
    context: Context | None = None,
    state: State | None = None,
    lengths: bool = True,
) -> torch.export.ExportedProgram:
    """A layer or model as a program, called as the module is.

    Args:
        module: in evaluation mode.
        inputs: examples of its sequences: (B, N, C), of language models ids (B, N). The program is for B of them. Of a
            backbone or a network that segments, images (B, C, H, W) or volumes; the program is for any number of that size.
        context: of the call. Its tensors are inputs of the program; all else (`want`, `grid`) is fixed.
        state: to continue from. The program takes states after any number of tokens.
        lengths: whether sequences may have any length but 1; an example of one token makes a program for one token.
            False for the lengths of the examples, as on a grid.

    Raises:
        Unsupported: for a module in training mode, or a mechanism that has no program for every length.
    """
    if module.training:
        raise Unsupported(
            "a program of a module in training mode", supported="evaluation mode", nearest="module.eval()"
        )
    for x in inputs:
        if not isinstance(x, Tensor | None):
            raise Unsupported(
                f"an input of type {type(x).__name__}",
                supported="tensors, one after another",
                nearest="export(module, x)",
            )
    given: dict[str, Any] = {}
    longer: dict[str, Any] = {}
    images = isinstance(module, Backbone | Segmenter)
    free = lengths and (images or context is None or context.grid is None)
    if free and not images:
        refuse_waived(module, "layer_lengths", "a program for every length", "lengths=False")
    with torch.no_grad(), without_warnings():
        if context is not None:
            given["context"], longer["context"] = context, _longer_context(context)
        if state is not None:
            given["state"] = state
            longer["state"] = module(*inputs, **given).state if free else state
        more = tuple(map(_longer, inputs))
        if images and free:  # a batch of one would be the only one that the program takes
            inputs, more = tuple(torch.cat([x, x]) for x in inputs), tuple(torch.cat([x, x, x]) for x in inputs)
        shapes = _differing(module, inputs, given, more, longer) if free else None
        # a view would bring its base into the program
        inputs, given = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), (inputs, given))
        return torch.export.export(module, inputs, given, dynamic_shapes=shapes, strict=False)


def export_onnx(
    module: nn.Module,
    *inputs: Tensor,
    context: Context | None = None,
    state: State | None = None,
    lengths: bool = True,
    **options: Any,
) -> Any:
    """The same as a `torch.onnx.ONNXProgram`, whose ``save(path)`` writes the file.

    Its inputs are the tensors of the call in the order of the arguments; its outputs the output, then those of the state,
    and of losses and extras where there are any.

    Args:
        options: of `torch.onnx.export`, such as ``opset_version``.

    Raises:
        Unsupported: as :func:`export`; for a mechanism with an operator that ONNX lacks; without the packages.
    """
    check_packages()
    refuse_waived(module, "layer_onnx", "an ONNX program", "regard.integrations.export.export")
    program = export(module, *inputs, context=context, state=state, lengths=lengths)
    try:
        with without_warnings():
            return as_onnx(program, **options)
    except torch.onnx.OnnxExporterError as error:
        why: BaseException = error
        while why.__cause__ is not None:
            why = why.__cause__
        reason = str(why).strip().partition("\n")[0]
        raise Unsupported(
            f"an ONNX program of {an_instance(module)} ({reason})",
            supported="torch.export",
            nearest="regard.integrations.export.export",
        ) from error


def check_packages() -> None:
    """Raise Unsupported where the packages for ONNX are missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise Unsupported(f"ONNX without {' and '.join(missing)}", supported="pip install 'regard[onnx]'")


@contextmanager
def without_warnings() -> Iterator[None]:
    """PyTorch's exporters warn of what their own code does, and log that a result has parts, and sizes, that are None."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _differing(
    module: nn.Module, inputs: tuple[Any, ...], given: dict[str, Any], others: tuple[Any, ...], longer: dict[str, Any]
) -> Any:
    """The axes whose sizes differ between two calls, as `torch.export` wants to be told."""
    examples = torch.export.AdditionalInputs()
    examples.add(others, longer)
    sizes = examples.dynamic_shapes(module, inputs, given)

    def of_tensor(x: Any) -> bool:
        return isinstance(x, tuple) and torch.export.Dim.DYNAMIC in x

    def free(x: Any) -> Any:
        return {i: axis for i, axis in enumerate(x) if axis is not None} if isinstance(x, tuple) else x

    return pytree.tree_map(free, sizes, is_leaf=of_tensor)


def refuse_waived(module: nn.Module, property_name: str, asked: str, nearest: str) -> None:
    """Raise Unsupported with the reason of the first mechanism in `module` whose card waives the property."""
    for part in module.modules():
        card, pattern = getattr(part, "card", None), getattr(part, "pattern", None)
        if not isinstance(card, Mechanism) or pattern is None:
            continue
        for waiver in card.waivers:
            if not waiver.variants and waiver.concerns(property_name, pattern):
                raise Unsupported(f"{asked} with {card.name} ({waiver.reason})", nearest=nearest)


def _longer(x: Tensor | None, *axes: int) -> Tensor | None:
    """One more token on the axes of tokens, which tells `torch.export` which they are; one token stays one."""
    for axis in axes or (1,):
        if x is not None and x.shape[axis] > 1:
            x = torch.cat([x, x.narrow(axis, 0, 1)], axis)
    return x


def _longer_context(context: Context) -> Context:
    names = ("positions", "memory_positions", "position_vectors", "roles")
    return context.replace(
        mask=_longer_mask(context.mask),
        memory_mask=_longer_mask(context.memory_mask),
        **{name: _longer(getattr(context, name)) for name in names},
    )


def _longer_mask(mask: Mask | None) -> Mask | None:
    return None if mask is None else dataclasses.replace(mask, valid=_longer(mask.valid), bias=_longer(mask.bias, 2, 3))
