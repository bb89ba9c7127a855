"""Conserved flows in C++ (`native/src/conserved_flows.cpp`): all in one pass over sinks and sources."""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.native.library import pointer, rows_contiguous
from regard.backends.operators import operator
from regard.contract import Unsupported
from regard.engines.conserved_flows.torch_form import Rule, Sums


class Flows(library.Arguments):
    kernel = "conserved_flows"
    _fields_ = (
        ("threads", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("sinks", ctypes.c_void_p),
        ("sources", ctypes.c_void_p),
        ("sinks_strides", ctypes.c_int64 * 3),
        ("sources_strides", ctypes.c_int64 * 3),
        ("lengths", ctypes.c_void_p),
        ("valid", ctypes.c_void_p),
        ("compete", ctypes.c_int64),
        ("allocate", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
        ("temperature", ctypes.c_float),
        ("totals", ctypes.c_void_p),
        ("maximum", ctypes.c_void_p),
        ("normalizer", ctypes.c_void_p),
        ("competition", ctypes.c_void_p),
        ("acceptance", ctypes.c_void_p),
        ("flows", ctypes.c_void_p),
        ("totals_out", ctypes.c_void_p),
        ("maximum_out", ctypes.c_void_p),
        ("normalizer_out", ctypes.c_void_p),
    )


class FlowsBackward(library.Arguments):
    kernel = "conserved_flows_backward"
    _fields_ = (
        ("forward", ctypes.POINTER(Flows)),
        ("grad_competition", ctypes.c_void_p),
        ("grad_acceptance", ctypes.c_void_p),
        ("grad_totals_out", ctypes.c_void_p),
        ("grad_normalizer_out", ctypes.c_void_p),
        ("grad_sinks", ctypes.c_void_p),
        ("grad_sources", ctypes.c_void_p),
        ("grad_totals", ctypes.c_void_p),
        ("grad_maximum", ctypes.c_void_p),
        ("grad_normalizer", ctypes.c_void_p),
    )


def run(sinks: Tensor, sources: Tensor, sums: Sums, rule: Rule, valid: Tensor | None) -> tuple[Tensor, Tensor, Sums]:
    """See :func:`regard.engines.conserved_flows.conserved_flows`."""
    low, high = rule.clamp or (-math.inf, math.inf)
    options = (rule.competition, rule.allocation, low, high, rule.temperature, rule.eps)
    competition, acceptance, _, totals, maximum, normalizer = _flows(sinks, sources, *sums, valid, *options)
    return competition, acceptance, Sums(totals, maximum.detach(), normalizer, sums.length)


def refuses(sinks: Tensor, sources: Tensor, sums: Sums, rule: Rule, valid: Tensor | None) -> str | None:
    """Why a call is left to another backend."""
    numbers = (sinks, sources, sums.totals, sums.maximum, sums.normalizer)
    counts = (sums.length,) if valid is None else (sums.length, valid)
    if any(x.dtype != torch.float32 for x in numbers) or any(x.dtype != torch.int64 for x in counts):
        return "tensors in another dtype than float32, or lengths in another than int64"
    if any(x.device.type != "cpu" for x in (*numbers, *counts)):
        return "tensors on several devices"
    if sinks.ndim != 4 or sources.shape != sinks.shape or any(x.shape != sinks.shape[:1] for x in counts):
        return "shapes that do not belong together"
    batch, heads, n, width = sinks.shape
    if max(n, width) > library.MOST:
        return f"more than {library.MOST} tokens or features"
    if sums.totals.shape != (4, batch, heads, width) or any(x.shape != (batch, heads) for x in sums[1:3]):
        return "sums that do not belong to the sinks"
    return None


class _Options(NamedTuple):
    competition: bool
    allocation: bool
    low: float
    high: float
    temperature: float
    eps: float


def _check(sinks: Tensor, sources: Tensor, sums: Sums, valid: Tensor | None) -> None:
    reason = refuses(sinks, sources, sums, Rule(True, True, None, 1.0, 1.0), valid)
    if reason is not None:
        raise Unsupported(f"native conserved flows with {reason}", nearest="backend='torch'")


def _arguments(
    sinks: Tensor, sources: Tensor, sums: Sums, valid: Tensor | None, options: _Options, flows: Tensor
) -> Flows:
    """The struct without outputs but the flows. The caller keeps the tensors."""
    batch, heads, n, width = sinks.shape
    return Flows(
        threads=torch.get_num_threads(),
        batch=batch,
        heads=heads,
        n=n,
        width=width,
        sinks=pointer(sinks),
        sources=pointer(sources),
        sinks_strides=sinks.stride()[:3],
        sources_strides=sources.stride()[:3],
        lengths=pointer(sums.length),
        valid=pointer(valid),
        compete=options.competition,
        allocate=options.allocation,
        eps=options.eps,
        low=options.low,
        high=options.high,
        temperature=options.temperature,
        totals=pointer(sums.totals),
        maximum=pointer(sums.maximum),
        normalizer=pointer(sums.normalizer),
        flows=pointer(flows),
    )


def _contiguous(sums: Sums, valid: Tensor | None) -> tuple[Sums, Tensor | None]:
    return Sums(*(x.contiguous() for x in sums)), None if valid is None else valid.contiguous()


def _empty_outputs(
    sinks: Tensor, totals: Tensor, maximum: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, shape = sinks.shape[:3], maximum.shape
    return (
        sinks.new_empty(tokens),
        sinks.new_empty(tokens),
        sinks.new_empty(4, *tokens),
        totals.new_empty(totals.shape),
        maximum.new_empty(shape),
        maximum.new_empty(shape),
    )


@operator("conserved_flows")
def _flows(
    sinks: Tensor,
    sources: Tensor,
    totals: Tensor,
    maximum: Tensor,
    normalizer: Tensor,
    length: Tensor,
    valid: Tensor | None,
    competition: bool,
    allocation: bool,
    low: float,
    high: float,
    temperature: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Competition, acceptance (B, H, N), flows (4, B, H, N), totals, maximum, normalizer."""
    sums = Sums(totals, maximum, normalizer, length)
    _check(sinks, sources, sums, valid)
    sinks, sources = rows_contiguous(sinks), rows_contiguous(sources)
    sums, valid = _contiguous(sums, valid)
    outputs = _empty_outputs(sinks, totals, maximum)
    options = _Options(competition, allocation, low, high, temperature, eps)
    arguments = _arguments(sinks, sources, sums, valid, options, outputs[2])
    names = ("competition", "acceptance", "flows", "totals_out", "maximum_out", "normalizer_out")
    for name, x in zip(names, outputs, strict=True):
        setattr(arguments, name, pointer(x))
    library.call(arguments)
    return outputs


@_flows.register_fake
def _(sinks, sources, totals, maximum, *rest):
    return _empty_outputs(sinks, totals, maximum)


def _empty_gradients(
    sinks: Tensor, sources: Tensor, totals: Tensor, maximum: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        sinks.new_empty(sinks.shape),
        sources.new_empty(sources.shape),
        totals.new_empty(totals.shape),
        maximum.new_empty(maximum.shape),
        maximum.new_empty(maximum.shape),
    )


@operator("conserved_flows_backward")
def _flows_backward(
    grad_competition: Tensor,
    grad_acceptance: Tensor,
    grad_totals: Tensor,
    grad_normalizer: Tensor,
    flows: Tensor,
    sinks: Tensor,
    sources: Tensor,
    totals: Tensor,
    maximum: Tensor,
    normalizer: Tensor,
    length: Tensor,
    valid: Tensor | None,
    competition: bool,
    allocation: bool,
    low: float,
    high: float,
    temperature: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of sinks, sources, totals, maximum and normalizer."""
    sums = Sums(totals, maximum, normalizer, length)
    _check(sinks, sources, sums, valid)
    outputs = _empty_outputs(sinks, totals, maximum)
    given = [grad_competition, grad_acceptance, flows, grad_totals, grad_normalizer]
    for x, y in zip(given, outputs[:5], strict=True):
        if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
            raise Unsupported("gradients or flows that are not the conserved flows'", nearest="backend='torch'")
    sinks, sources = rows_contiguous(sinks), rows_contiguous(sources)
    sums, valid = _contiguous(sums, valid)
    grad_competition, grad_acceptance, flows, grad_totals, grad_normalizer = (x.contiguous() for x in given)
    grads = _empty_gradients(sinks, sources, totals, maximum)
    options = _Options(competition, allocation, low, high, temperature, eps)
    forward = _arguments(sinks, sources, sums, valid, options, flows)
    arguments = FlowsBackward(
        forward=ctypes.pointer(forward),
        grad_competition=pointer(grad_competition),
        grad_acceptance=pointer(grad_acceptance),
        grad_totals_out=pointer(grad_totals),
        grad_normalizer_out=pointer(grad_normalizer),
        grad_sinks=pointer(grads[0]),
        grad_sources=pointer(grads[1]),
        grad_totals=pointer(grads[2]),
        grad_maximum=pointer(grads[3]),
        grad_normalizer=pointer(grads[4]),
    )
    library.call(arguments)
    return grads


@_flows_backward.register_fake
def _(grad_competition, grad_acceptance, grad_totals, grad_normalizer, flows, sinks, sources, totals, maximum, *rest):
    return _empty_gradients(sinks, sources, totals, maximum)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[2], *inputs[:7])
    ctx.options = inputs[7:]


def _differentiate(ctx, grad_competition, grad_acceptance, grad_flows, grad_totals, grad_maximum, grad_normalizer):
    grads = _flows_backward(
        grad_competition, grad_acceptance, grad_totals, grad_normalizer, *ctx.saved_tensors, *ctx.options
    )
    return (*grads, *(None,) * 8)


_flows.register_autograd(_differentiate, setup_context=_save)
_flows_backward.refuse_gradient("second derivatives of the native conserved flows")
