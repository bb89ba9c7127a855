"""Tests specific to the Sparse Transformer's patterns: both layouts, their combinations, and steps that read few keys.

There is no parity test, since the paper's kernels run only on GPUs.
"""

from __future__ import annotations

import pytest
import torch
from support import calls, close, qkv, watched
from torch import Tensor

from regard.create import create_layer
from regard.engines import attention_forms
from regard.engines.cache import KeyValueState
from regard.mechanisms.sparse_strided import MECHANISM, Config

OPTIONS = [
    {"stride": 4},
    {"stride": 5, "combine": "heads"},
    {"stride": 3, "combine": "second"},
    {"stride": 1},
    {"stride": 1, "combine": "second"},  # sees all tokens
    {"layout": "fixed", "stride": 4, "columns": 1},
    {"layout": "fixed", "stride": 6, "columns": 2, "head_columns": True},
    {"layout": "fixed", "stride": 5, "columns": 2, "combine": "heads", "head_columns": True},
    {"layout": "fixed", "stride": 4, "columns": 3, "combine": "second"},
    {"layout": "fixed", "stride": 4, "combine": "first", "columns": 4},
    {"stride": 100},
]
run = calls(MECHANISM)


def allowed(options: dict, pattern: str, n: int, m: int, heads: int = 3) -> Tensor:
    """Visible pairs (heads, n, m), by the definition in words; the last query is aligned with the last key."""
    config = Config(**options)
    s, c = config.stride, config.columns
    seen = torch.zeros(heads, n, m, dtype=torch.bool)
    for h in range(heads):
        kind = config.combine
        if kind == "heads":
            kind = "first" if h < (heads + 1) // 2 else "second"
        back = c * (1 + (h % (s // c) if config.head_columns else 0))
        for i in range(n):
            at = i + m - n
            for j in range(m):
                if config.layout == "strided":
                    first, second = abs(at - j) < s, (at - j) % s == 0
                else:
                    first, second = at // s == j // s, s - back <= j % s < s - back + c
                both = {"first": first, "second": second, "union": first or second}[kind]
                seen[h, i, j] = both and (pattern == "noncausal-self" or j <= at)
    return seen


def masked(tensors: dict[str, Tensor], seen: Tensor) -> Tensor:
    scores = (tensors["q"] @ tensors["k"].mT / 2).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ tensors["v"]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_equals_masked_dense_attention(options, pattern):
    for n, m in ((1, 1), (4, 4), (13, 13), (30, 30), (9, 14), (14, 9), (1, 12)):
        if pattern == "causal-self" or n == m:
            tensors = qkv(n, m, heads=3)
            expected = masked(tensors, allowed(options, pattern, n, m))
            for form in ("reference", None):
                close(run(tensors, options, pattern=pattern, form=form).output, expected, 1e-11)


@pytest.mark.parametrize("options", [{"stride": 20}, {"layout": "fixed", "stride": 20, "columns": 3}])
def test_a_step_reads_the_keys_that_it_sees(options, monkeypatch):
    """After 400 tokens a step reads a window or block of 20, and 20 other keys or 20 times 3."""
    state = run(qkv(400, batch=1), options, return_state=True).state
    read = watched(monkeypatch, attention_forms, "attention", lambda q, k, *rest, **options: k.shape[2])
    run(qkv(1, batch=1), options, state=state)
    assert isinstance(state, KeyValueState)
    assert len(read) == 1 and read[0] <= 20 + 21 * options.get("columns", 1)


@pytest.mark.parametrize("layout", ["strided", "fixed"])
def test_two_layers_connect_any_two_tokens(layout):
    """As in the paper, with one column of each block."""
    layers = [create_layer("sparse_strided", 6, 1, layout=layout, stride=5, columns=1).double() for _ in range(2)]
    x = torch.randn(1, 30, 6, dtype=torch.float64, requires_grad=True)
    once = layers[0](x).output
    (near,) = torch.autograd.grad(once[0, 29].sum(), x, retain_graph=True)
    (far,) = torch.autograd.grad(layers[1](once).output[0, 29].sum(), x)
    assert (near[0].abs().sum(-1) > 0).sum() == 10
    assert (far[0].abs().sum(-1) > 0).all()
