"""Calls of tensors alone take a shorter way to the kernels: the results are those of the general way."""

from __future__ import annotations

import pytest
import torch
from support import close, qkv

from regard import Mask, functional
from regard.contract import Unsupported
from regard.engines.attention import native_form as attention
from regard.engines.linear_attention import native_form as linear_attention

SIZES = [(4, 4), (3, 9), (9, 3), (1, 70), (70, 70), (300, 300)]
FUNCTIONS = {
    "softmax": (functional.softmax_attention, {}),
    "softmax, both ways": (functional.softmax_attention, {"pattern": "noncausal-self"}),
    "a window": (functional.softmax_attention, {"window": (5, 0)}),
    "a window on both sides": (functional.softmax_attention, {"window": (2, 6), "pattern": "noncausal-self"}),
    "linear": (functional.linear_attention, {}),
    "linear without a denominator": (functional.linear_attention, {"feature_map": "silu", "normalize": False}),
}


@pytest.fixture
def taken(monkeypatch):
    """How often each engine's shorter way was the way."""
    counts = {}
    for form in (attention, linear_attention):

        def counting(*arguments, plain=form.plain, name=form.__name__):
            found = plain(*arguments)
            counts[name] = counts.get(name, 0) + (found is not None)
            return found

        monkeypatch.setattr(form, "plain", counting)
    return counts


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_those_of_float64(taken, name, dtype):
    function, options = FUNCTIONS[name]
    for n, m in SIZES if options.get("pattern") != "noncausal-self" else [(n, n) for n, _ in SIZES]:
        inputs = qkv(n, m, heads=4, groups=2 if "softmax" in name else None, dim=8, value_dim=5, dtype=dtype)
        inputs["q"] = inputs["q"].transpose(1, 2).contiguous().transpose(1, 2)  # any strides but that of features
        expected = function(**{x: t.double() for x, t in inputs.items()}, **options)
        close(function(**inputs, **options).double(), expected, 4e-6 if dtype == torch.float32 else 1e-2)
    general = function(**inputs, **options, mask=Mask(lengths=torch.full((2,), n)))
    close(function(**inputs, **options), general, 0.0 if "softmax" in name else 1e-6)
    assert sum(taken.values()) >= len(SIZES) - 2 * (
        "linear" in name
    )  # uneven recurrences lay their queries beside keys


@pytest.mark.parametrize("function", [functional.softmax_attention, functional.linear_attention])
def test_what_somebody_watches_or_differentiates_goes_the_general_way(taken, function):
    inputs = qkv(6, dtype=torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        function(**inputs)
    torch.func.vmap(function)(*(x[None] for x in inputs.values()))
    torch.func.jvp(lambda q: function(q, inputs["k"], inputs["v"]), (inputs["q"],), (inputs["q"],))
    learning = {name: x.requires_grad_() for name, x in inputs.items()}
    function(**learning).sum().backward()
    assert sum(taken.values()) == 0
    with torch.no_grad():
        function(**learning)
    assert sum(taken.values()) == 1


def test_a_call_is_checked_whatever_calls_of_its_shape_came_before():
    q, k, v = qkv(6, dtype=torch.float32).values()
    for _ in range(2):
        functional.linear_attention(q, k, v)
        for wrong in ({"k": k[..., :3]}, {"v": v[:, :, :5]}, {"k": k.long()}, {"q": q[0]}):
            with pytest.raises(Unsupported):
                functional.linear_attention(**{"q": q, "k": k, "v": v, **wrong})
