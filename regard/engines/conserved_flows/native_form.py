"""Conserved flows in C++ (`native/src/conserved_flows.cpp`), in a single pass over sinks and sources."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.native.library import pointer, rows_contiguous
from regard.backends.operators import operator
from regard.contract import Unsupported
from regard.engines.conserved_flows.problem import Problem, Rule, Sums


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


def run(problem: Problem, rule: Rule) -> tuple[Tensor, Tensor, Sums]:
    """See :func:`regard.engines.conserved_flows.conserved_flows`."""
    competition, acceptance, _, totals, maximum, normalizer = _flows(problem, rule)
    return competition, acceptance, Sums(totals, maximum.detach(), normalizer, problem.length)


def refuses(problem: Problem, rule: Rule) -> str | None:
    """The reason to leave a call to another backend; None if there is none."""
    return _refusal(problem)


def _refusal(p: Problem) -> str | None:
    numbers = (p.sinks, p.sources, p.totals, p.maximum, p.normalizer)
    counts = (p.length,) if p.valid is None else (p.length, p.valid)
    if any(x.dtype != torch.float32 for x in numbers) or any(x.dtype != torch.int64 for x in counts):
        return "tensors in another dtype than float32, or lengths in another than int64"
    if any(x.device.type != "cpu" for x in (*numbers, *counts)):
        return "tensors on several devices"
    if p.sinks.ndim != 4 or p.sources.shape != p.sinks.shape or any(x.shape != p.sinks.shape[:1] for x in counts):
        return "shapes that do not belong together"
    batch, heads, n, width = p.sinks.shape
    if max(n, width) > library.MOST:
        return f"more than {library.MOST} tokens or features"
    if p.totals.shape != (4, batch, heads, width) or not p.maximum.shape == p.normalizer.shape == (batch, heads):
        return "sums that do not belong to the sinks"
    return None


def _check(p: Problem) -> None:
    reason = _refusal(p)
    if reason is not None:
        raise Unsupported(f"native conserved flows with {reason}", nearest="backend='torch'")


def _arguments(p: Problem, rule: Rule, flows: Tensor) -> tuple[Flows, list[Tensor | None]]:
    """The struct, with the flows as its only outputs, and the tensors that it points to."""
    batch, heads, n, width = p.sinks.shape
    sinks, sources = rows_contiguous(p.sinks), rows_contiguous(p.sources)
    rest = [None if x is None else x.contiguous() for x in (p.totals, p.maximum, p.normalizer, p.length, p.valid)]
    totals, maximum, normalizer, lengths, valid = map(pointer, rest)
    low, high = rule.clamp or (-math.inf, math.inf)
    arguments = Flows(
        threads=torch.get_num_threads(),
        batch=batch,
        heads=heads,
        n=n,
        width=width,
        **library.strided(sinks=sinks, sources=sources),
        lengths=lengths,
        valid=valid,
        compete=rule.competition,
        allocate=rule.allocation,
        eps=rule.eps,
        low=low,
        high=high,
        temperature=rule.temperature,
        totals=totals,
        maximum=maximum,
        normalizer=normalizer,
        flows=pointer(flows),
    )
    return arguments, [sinks, sources, *rest]


def _empty_outputs(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens = p.sinks.shape[:3]
    shapes = (tokens, tokens, (4, *tokens), p.totals.shape, p.maximum.shape, p.maximum.shape)
    competition, acceptance, flows, totals, maximum, normalizer = (p.sinks.new_empty(shape) for shape in shapes)
    return competition, acceptance, flows, totals, maximum, normalizer


@operator("conserved_flows")
def _flows(problem: Problem, rule: Rule) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Competition, acceptance (B, H, N), flows (4, B, H, N), totals, maximum, normalizer."""
    _check(problem)
    outputs = _empty_outputs(problem)
    arguments, _inputs = _arguments(problem, rule, outputs[2])
    names = ("competition", "acceptance", "flows", "totals_out", "maximum_out", "normalizer_out")
    for name, x in zip(names, outputs, strict=True):
        setattr(arguments, name, pointer(x))
    library.call(arguments)
    return outputs


@_flows.register_fake
def _(problem: Problem, rule: Rule) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(problem)


def _empty_gradients(p: Problem) -> list[Tensor]:
    return p.empty_gradients([True] * len(p.learned))


@operator("conserved_flows_backward")
def _flows_backward(
    grad_competition: Tensor,
    grad_acceptance: Tensor,
    grad_totals: Tensor,
    grad_normalizer: Tensor,
    flows: Tensor,
    problem: Problem,
    rule: Rule,
) -> list[Tensor]:
    """Gradients of the problem's learned tensors."""
    _check(problem)
    given = [grad_competition, grad_acceptance, flows, grad_totals, grad_normalizer]
    for x, y in zip(given, _empty_outputs(problem)[:5], strict=True):
        if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
            raise Unsupported("gradients or flows that are not the conserved flows'", nearest="backend='torch'")
    given = [x.contiguous() for x in given]
    grads = _empty_gradients(problem)
    forward, _inputs = _arguments(problem, rule, given[2])
    outer = [pointer(x) for x in (*given[:2], *given[3:], *grads)]
    library.call(FlowsBackward(ctypes.pointer(forward), *outer))
    return grads


@_flows_backward.register_fake
def _(
    grad_competition: Tensor,
    grad_acceptance: Tensor,
    grad_totals: Tensor,
    grad_normalizer: Tensor,
    flows: Tensor,
    problem: Problem,
    rule: Rule,
) -> list[Tensor]:
    return _empty_gradients(problem)


def _save(ctx: Any, inputs: tuple[Problem, Rule], output: tuple[Tensor, ...]) -> None:
    problem, ctx.rule = inputs
    problem.keep(ctx, output[2])


def _differentiate(
    ctx: Any,
    competition: Tensor,
    acceptance: Tensor,
    flows: Tensor,
    totals: Tensor,
    maximum: Tensor,
    normalizer: Tensor,
) -> tuple[Tensor | None, ...]:
    """The arguments are gradients of the results."""
    problem, (kept,) = Problem.kept(ctx)
    grads = _flows_backward(competition, acceptance, totals, normalizer, kept, problem, ctx.rule)
    return *problem.gradients(grads, problem.needed(ctx)), *[None] * len(Rule.places())


_flows.register_autograd(_differentiate, setup_context=_save)
_flows_backward.refuse_gradient("second derivatives of the native conserved flows")
