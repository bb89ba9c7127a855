"""Export layers and models as programs: `torch.export` and ONNX.

An exported program consists of PyTorch operators only, without the native kernels, and takes and returns what the
module does: a :class:`regard.Result`, and states where they are given. Plain `torch.export.export` also works on every
module (on recurrences only within ``torch.no_grad()``). :func:`export` adds that every token axis, also in the caches
of a state, may have any length, and that a mechanism without such a program is refused with the reason. Networks for
images become programs for one image size and any batch size.
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
    """Export a layer or model as a program, called as the module is.

    Args:
        module: the module, in evaluation mode.
        inputs: example sequences: (B, N, C), or ids (B, N) for language models. The program is for batches of B. For a
            backbone or a segmentation network, images (B, C, H, W) or volumes; the program is for any number of that
            size.
        context: context of the call. Its tensors are inputs of the program; everything else (`want`, `grid`) is fixed.
        state: a state to continue from. The program takes states after any number of tokens.
        lengths: whether sequences may have any length but 1; an example of one token makes a program for one token.
            False fixes the lengths of the examples, as on a grid.

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
        if images and free:  # an example batch of one would make a program for batches of one
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
    """Export a module like :func:`export`, as a `torch.onnx.ONNXProgram`; ``save(path)`` writes the file.

    The inputs of the program are the tensors of the call, in the order of the arguments; its outputs are the output,
    then the tensors of the state, and losses and extras where there are any.

    Args:
        options: options of `torch.onnx.export`, such as ``opset_version``.

    Raises:
        Unsupported: as in :func:`export`; for a mechanism that uses an operator that ONNX lacks; if the packages are
            missing.
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
    """Silence PyTorch's exporters, which warn about their own code and log result parts and sizes that are None."""
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
    """The axes whose sizes differ between two calls, in the form that `torch.export` expects."""
    examples = torch.export.AdditionalInputs()
    examples.add(others, longer)
    sizes = examples.dynamic_shapes(module, inputs, given)

    def of_tensor(x: Any) -> bool:
        return isinstance(x, tuple) and torch.export.Dim.DYNAMIC in x

    def free(x: Any) -> Any:
        return {i: axis for i, axis in enumerate(x) if axis is not None} if isinstance(x, tuple) else x

    return pytree.tree_map(free, sizes, is_leaf=of_tensor)


def refuse_waived(module: nn.Module, property_name: str, asked: str, nearest: str) -> None:
    """Raise Unsupported, with the reason, for the first mechanism in `module` whose card waives the property."""
    for part in module.modules():
        card, pattern = getattr(part, "card", None), getattr(part, "pattern", None)
        if not isinstance(card, Mechanism) or pattern is None:
            continue
        for waiver in card.waivers:
            if not waiver.variants and waiver.concerns(property_name, pattern):
                raise Unsupported(f"{asked} with {card.name} ({waiver.reason})", nearest=nearest)


def _longer(x: Tensor | None, *axes: int) -> Tensor | None:
    """Add a token to the token axes, to show them to `torch.export`; an axis of one token is left as it is."""
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
