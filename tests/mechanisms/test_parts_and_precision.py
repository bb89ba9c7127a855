"""Computing in parts, summing over thousands of tokens and vanishing values do not change the results."""

from __future__ import annotations

import math

import pytest
import torch
from support import close

from regard import get_mechanism
from regard.backends import only
from regard.contract import Pattern
from regard.workbench.verification.subjects import Subject, in_float64

SEGMENTS = "regard.engines.segment_attention.PAIRS_AT_ONCE"
TOEPLITZ = "regard.mechanisms.kernelized_rpe.forms.NUMBERS_AT_ONCE"
PARTS = [  # name, options, the constant that limits a part's size, its value here, number of tokens
    ("compressive", {"segment": 4, "memory": 6, "compressed": 3, "ratio": 2}, SEGMENTS, 300, 41),
    ("kernelized_rpe", {"method": "blocks"}, TOEPLITZ, 1, 15),
    ("kernelized_rpe", {"method": "fft"}, TOEPLITZ, 1, 15),
    ("landmark", {}, "regard.engines.grouped_attention.torch_form.PAIRS_AT_ONCE", 100, 19),
    ("transformer_xl", {"segment": 4, "memory": 6}, SEGMENTS, 300, 41),
]


@pytest.mark.parametrize(("name", "options", "bound", "most", "n"), PARTS)
def test_what_is_computed_in_parts_equals_the_whole_with_its_gradients(name, options, bound, most, n, monkeypatch):
    def results(subject, inputs):
        leaves = [x.requires_grad_() for x in inputs.values() if x.is_floating_point()]
        output = subject.run(inputs).output
        return [output, *torch.autograd.grad(output.square().sum(), leaves, materialize_grads=True)]

    for pattern in get_mechanism(name).patterns:
        subject = Subject(get_mechanism(name), pattern, options)
        inputs = subject.inputs(n)
        whole = results(subject, inputs)
        with monkeypatch.context() as patch:
            patch.setattr(bound, most)
            parts = results(subject, inputs)
        for found, expected in zip(parts, whole, strict=True):
            close(found, expected)


LONG = [
    ("cosformer", [{}, {"length": 4096}]),
    ("flow_attention", [{}]),
    ("lara", [{"landmarks": 4}]),
    ("linear", [{}, {"feature_map": "sigmoid"}, {"feature_map": "identity", "normalize": False}]),
    ("nystrom", [{"landmarks": 64}]),
    ("performer", [{}, {"feature_eps": 0.1, "eps": 0.3}, {"kernel": "relu"}]),
    ("performer", [{"feature_eps": 0.0, "least_denominator": 0.1}]),
]


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, several in LONG for o in several])
def test_thousands_of_tokens_stay_precise_in_float32(name, options):
    card = get_mechanism(name)
    pattern = Pattern.CAUSAL_SELF if Pattern.CAUSAL_SELF in card.patterns else Pattern.NONCAUSAL_SELF
    subject = Subject(card, pattern, options)
    inputs = subject.inputs(4000, batch=1, dtype=torch.float32)
    exact = subject.run(in_float64(inputs)).output
    close(subject.run(inputs).output.double(), exact, card.tolerances[torch.float32])


@pytest.mark.parametrize(("name", "options"), [("reformer", {"chunk": 8}), ("routing", {}), ("sinkhorn", {"block": 8})])
@pytest.mark.parametrize("pattern", [Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF])
def test_the_native_kernel_runs_the_blocks(name, options, pattern):
    subject = Subject(get_mechanism(name), pattern, options)
    inputs = subject.inputs(70, dtype=torch.float32)
    with only("native"):
        found = subject.run(inputs).output
    close(found.double(), subject.reference(inputs), 5e-6)


@pytest.mark.parametrize("pattern", [Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF])
@pytest.mark.parametrize(("name", "options"), [("cosformer", {}), ("linear", {"feature_map": "relu"})])
def test_features_that_are_all_zero_give_zero_with_finite_gradients(name, options, pattern):
    subject = Subject(get_mechanism(name), pattern, options)
    inputs = {key: (-x.abs() if key in "qk" else x).requires_grad_() for key, x in subject.inputs(6).items()}
    output = subject.run(inputs).output
    assert (output == 0).all()
    output.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs.values())


@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize("gate", [-50.0, -1e4, -math.inf])
@pytest.mark.parametrize("name", ["delta_rule", "gated_linear"])
def test_strong_gates_leave_the_current_token_only(name, gate, width):
    plain = {"normalize_queries": False, "normalize_keys": False} if name == "delta_rule" else {}
    subject = Subject(get_mechanism(name), Pattern.CAUSAL_SELF, plain)
    inputs = subject.inputs(70)
    q, k, v = (inputs[key] for key in "qkv")
    k = torch.nn.functional.normalize(k, dim=-1)
    log_decay = torch.full((2, 2, 70, width), gate, dtype=torch.float64, requires_grad=True)
    output = subject.run({**inputs, "k": k, "log_decay": log_decay}, chunk_size=16).output
    written = inputs["beta"][..., None] * v if "beta" in inputs else v
    close(output, 8**-0.5 * (q * k).sum(-1, keepdim=True) * written)
    output.sum().backward()
    assert torch.isfinite(log_decay.grad).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize(("name", "options"), [("delta_rule", {"gated": True}), ("gated_linear", {})])
def test_four_thousand_gated_steps_are_finite_and_equal_the_recurrence(name, options, dtype, tolerance):
    """The exponential of the sum of all gates would underflow; all but the last 64 tokens have faded below 1e-27."""
    subject = Subject(get_mechanism(name), Pattern.CAUSAL_SELF, options)
    inputs = subject.inputs(4096, dtype=dtype, k=4, v=3)
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], -1.0)
    result = subject.run(inputs, return_state=True)
    assert result.output.isfinite().all() and result.state.memory.isfinite().all()
    last = subject.run(subject.cut(inputs, slice(-64, None)), form="reference").output
    close(result.output[:, :, -1], last[:, :, -1], tolerance)
