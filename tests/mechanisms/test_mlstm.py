"""Tests specific to mLSTM: gates of any size, the normaliser, its state, its layer, and parity with another implementation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support import calls, close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from regard.contract import Context, LayerCall, Pattern
from regard.create import create_layer
from regard.mechanisms.mlstm import MECHANISM, MemoryState
from regard.workbench.verification.subjects import Subject, in_float64

run = calls(MECHANISM)


def sample(n: int = 21, **sizes: int) -> dict[str, Tensor]:
    return Subject(MECHANISM, Pattern.CAUSAL_SELF).inputs(n, n, **sizes)


def in_logarithms(q, k, v, log_input, log_forget):
    """The causal form as one weight matrix, each row divided by its largest exponential."""
    n = q.shape[2]
    later = torch.ones(n, n, dtype=torch.bool).triu(1)
    between = torch.zeros(*log_input.shape, n, dtype=torch.float64)
    for i, j in zip(*torch.tril_indices(n, n, -1).tolist(), strict=True):
        between[:, :, i, j] = log_forget[:, :, j + 1 : i + 1].sum(-1)
    logs = (between + log_input[:, :, None]).masked_fill(later, -torch.inf)
    m = logs.amax(-1, keepdim=True)
    weights = q @ k.mT * q.shape[-1] ** -0.5 * (logs - m).exp()
    return weights @ v / torch.maximum(weights.sum(-1, keepdim=True).abs(), (-m).exp()).clamp(min=1e-300)


@pytest.mark.parametrize("size", [1.0, 30.0, 3000.0])
@pytest.mark.parametrize("chunk_size", [4, 64])
def test_gates_of_any_size_stay_in_range_and_equal_the_weights_in_logarithms(size, chunk_size):
    x = sample()
    x |= {"log_input": size * x["log_input"], "log_forget": size * x["log_forget"]}
    leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
    found = run(leaves, chunk_size=chunk_size)
    close(found.output, in_logarithms(**x), 1e-10)
    assert torch.isfinite(run(x, return_state=True).state.memory).all()
    found.output.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in leaves.values())


def test_in_float32_sums_of_gates_over_thousands_of_tokens_keep_the_published_precision():
    """The recurrence's decays are differences of sums of gates, which float32 would round at every token."""
    n = 3000
    x = {name: t.float() for name, t in sample(n, k=4, v=3).items()}
    x |= {"k": x["k"].abs(), "q": x["q"].abs(), "log_input": 40 + x["log_input"], "log_forget": x["log_forget"] / 100}
    expected = run(in_float64(x)).output
    close(run(x).output.double(), expected, 2e-6)


def test_an_input_gate_of_minus_infinity_writes_nothing_and_such_a_forget_gate_forgets_all():
    x = sample(12)
    x["log_input"][:, :, 5] = -math.inf
    written = [t for t in range(12) if t != 5]
    x["log_forget"][:, :, 5] = 0.0
    close(run(x).output[:, :, written], run({n: t[:, :, written] for n, t in x.items()}).output)
    x["log_forget"][:, :, 7] = -math.inf
    close(run(x).output[:, :, 7:], run({n: t[:, :, 7:] for n, t in x.items()}).output)


def test_gradcheck_through_every_part_of_the_state():
    x = sample(5, h=1, k=3, v=2)
    memory, stabilizer = torch.randn(2, 1, 3, 3).double(), torch.rand(2, 1).double()

    def function(memory, stabilizer, *tensors):
        state = MemoryState(memory, stabilizer, torch.zeros(2, dtype=torch.long))
        result = run(dict(zip(x, tensors, strict=True)), state=state, chunk_size=3)
        true = result.state.memory * result.state.stabilizer[..., None, None].exp()
        return result.output, true

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in (memory, stabilizer, *x.values())])


def test_parity_with_transformers_and_its_state():
    modeling = pytest.importorskip("transformers.models.xlstm.modeling_xlstm")
    if modeling.external_xlstm:
        pytest.skip("transformers takes the xlstm package instead")
    x = sample(27)
    options = {"return_last_states": True, "eps": 0.0, "dtype_state": torch.float64}
    given = {"query": x["q"], "key": x["k"], "value": x["v"], "igate": x["log_input"], "fgate": x["log_forget"]}
    first, rest = ({name: t[:, :, part] for name, t in given.items()} for part in (slice(11), slice(11, None)))
    o1, (c, n, m) = modeling.mlstm_recurrent_sequence_native(**first, **options)
    o2, (c2, n2, m2) = modeling.mlstm_recurrent_sequence_native(
        **rest, c_initial=c, n_initial=n, m_initial=m, **options
    )
    x["log_forget"] = F.logsigmoid(x["log_forget"])
    found = run(x, return_state=True)
    close(found.output, torch.cat([o1, o2], 2))
    written = torch.cat([c2, n2[..., None]], -1) * m2[..., None].exp()
    close(found.state.memory * found.state.stabilizer[..., None, None].exp(), written)
    state = MemoryState(torch.cat([c, n[..., None]], -1), m[..., 0], torch.full((2,), 11))
    close(run({name: t[:, :, 11:] for name, t in x.items()}, state=state).output, o2)


@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
def test_layer_has_the_gates_of_its_equations(forget_gate):
    torch.manual_seed(0)
    layer = create_layer("mlstm", 16, 2, forget_gate=forget_gate, gate_cap=15.0).double()
    own, x = layer.projection, 9 * torch.randn(2, 7, 16).double()
    start = own.inputs({}, LayerCall(x, x, Context()))
    forget = start["log_forget"].exp()
    assert ((forget > 0.95) & (forget < 1)).all()
    assert start["log_input"].abs().max() < 0.5
    for gate in (own.input_gate, own.forget_gate):
        torch.nn.init.normal_(gate.weight)
    found = own.inputs({}, LayerCall(x, x, Context()))
    capped = {name: 15 * torch.tanh(gate(x).mT / 15) for name, gate in (("i", own.input_gate), ("f", own.forget_gate))}
    close(found["log_input"], capped["i"])
    close(found["log_forget"], capped["f"] if forget_gate == "exp" else F.logsigmoid(capped["f"]))

    def heads(y):
        return y.unflatten(-1, (2, -1)).transpose(1, 2)

    o = run({"q": heads(layer.query(x)), "k": heads(layer.key(x)), "v": heads(layer.value(x)), **found}).output
    expected = F.layer_norm(o, (8,)).transpose(1, 2).flatten(2) * torch.sigmoid(layer.gate(x))
    close(layer(x).output, layer.output(expected))


def test_gates_have_the_strides_that_a_compiled_program_expects():
    """torch's logsigmoid gives contiguous memory whatever it is given; its fake version keeps the strides."""
    gates = create_layer("mlstm", 12, num_heads=3).projection
    x = torch.randn(2, 5, 12)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        expected = gates.inputs({}, LayerCall(mode.from_tensor(x), mode.from_tensor(x), Context()))
    found = gates.inputs({}, LayerCall(x, x, Context()))
    assert {name: t.stride() for name, t in found.items()} == {name: t.stride() for name, t in expected.items()}
