"""Tests specific to flow attention: conservation, closed forms, its options, and recorded outputs."""

from __future__ import annotations

import pytest
import torch
from support import check_recorded, close, load, qkv, refused
from torch import Tensor, nn

from regard.contract import Unsupported
from regard.create import create_layer
from regard.functional import flow_attention, linear_attention

OFF = {"competition": False, "allocation": False}


def sample(n: int = 14, m: int | None = None, **sizes: int) -> tuple[Tensor, ...]:
    return tuple(qkv(n, m, **{"value_dim": 3, **sizes}).values())


def weights(q: Tensor, k: Tensor, **options) -> Tensor:
    """The implied weights: outputs for unit vectors as values."""
    values = torch.eye(k.shape[2], dtype=k.dtype).expand(*k.shape[:2], -1, -1)
    return flow_attention(q, k, values, **{"pattern": "noncausal-self", **options})


def filled(x: Tensor, value: float) -> Tensor:
    return torch.full_like(x, value)


def test_the_causal_recurrence_in_the_papers_order():
    """The order: sums of keys and queries, I and O, the conserved sums, E, C, and the matrix."""
    q, k, v = sample(heads=1, batch=1)
    expected = flow_attention(q, k, v)
    eps, sums = 1e-6, [torch.zeros(4, dtype=torch.float64) for _ in range(4)]
    total, matrix = 0.0, torch.zeros(4, 3, dtype=torch.float64)
    for t in range(14):
        a, b, c = q[0, 0, t].sigmoid(), k[0, 0, t].sigmoid(), t + 1
        sums[0], sums[1] = sums[0] + b, sums[1] + a
        i, o = c / ((a + eps) @ (sums[0] + eps)), c / ((b + eps) @ (sums[1] + eps))
        sums[2], sums[3] = sums[2] + b * o, sums[3] + a * i
        sink = (a + eps) @ (sums[2] + eps) / c
        source = ((b + eps) @ (sums[3] + eps) / c).clamp(-1, 1).exp()
        total = total + source
        matrix = matrix + torch.outer(b, c * source / total * v[0, 0, t])
        close(sink.sigmoid() * (a * i / c) @ matrix, expected[0, 0, t], 1e-14)


@pytest.mark.parametrize(("n", "m"), [(14, 14), (9, 17), (17, 9)])
def test_flow_is_conserved(n, m):
    q, k, _ = sample(n, m)
    cross = {"pattern": "noncausal-cross", "eps": 1e-12}
    off = weights(q, k, **cross, **OFF)
    close(off.sum(-1), filled(off[..., 0], 1), 1e-9)
    allocation = (weights(q, k, competition=False, **cross) / off)[..., 0]
    close((allocation.logit() * m / n).sum(-1), filled(q[:, :, 0, 0], m), 1e-10)
    competition = weights(q, k, allocation=False, clamp=None, **cross) / off
    close(competition, competition[:, :, :1].expand_as(competition), 1e-10)  # one factor for each source
    competition = competition[:, :, 0]
    close(competition.sum(-1), filled(q[:, :, 0, 0], m), 1e-10)
    # softmax determines its logits up to a constant: choose the one for which the conserved sources sum to L
    logits = competition.log()
    logits = logits + (n - logits.sum(-1, keepdim=True)) / m
    sinks, sources = q.sigmoid(), k.sigmoid()
    expected = (sources @ (sinks / (sinks @ sources.sum(2)[..., None])).sum(2)[..., None])[..., 0]
    close(logits, expected, 1e-9)


def test_identical_tokens_do_not_compete_and_accept_sigmoid_of_one():
    q, _, v = sample(11)
    q = q[:, :, :1].expand_as(q)
    accepted = filled(v, 1).sigmoid()
    close(flow_attention(q, q, v, pattern="noncausal-self", eps=1e-12), accepted * v.mean(2, keepdim=True), 1e-10)
    close(flow_attention(q, q, v, eps=1e-12), accepted * v.cumsum(2) / torch.arange(1, 12)[:, None], 1e-10)


def test_equal_keys_pass_constant_values_on_without_allocation():
    q, k, v = sample()
    options = {"pattern": "noncausal-self", "allocation": False, "eps": 1e-14}
    close(flow_attention(q, k[:, :, :1].expand_as(k), filled(v, 3), **options), filled(v, 3), 1e-11)


def test_noncausal_is_equivariant_in_queries_and_invariant_in_the_order_of_keys():
    q, k, v = sample(8, 13)
    rows, columns = torch.randperm(8), torch.randperm(13)
    found = flow_attention(q, k, v, pattern="noncausal-cross")
    moved = flow_attention(q[:, :, rows], k[:, :, columns], v[:, :, columns], pattern="noncausal-cross")
    close(moved, found[:, :, rows], 1e-13)


@pytest.mark.parametrize(("factor", "inside"), [(True, 1.0), (False, 15 / 6)])
def test_the_sigmoid_of_allocation_has_the_factor_of_lengths(factor, inside):
    """With identical tokens each sink takes S / L: allocation is sigmoid(1) with the factor, sigmoid(S / L) without."""
    q, memory = (torch.ones(1, 1, n, 4, dtype=torch.float64) for n in (6, 15))
    found = flow_attention(q, memory, memory, pattern="noncausal-cross", length_factor=factor, eps=1e-12)
    close(found, filled(q, inside).sigmoid(), 1e-7)


@pytest.mark.parametrize("pattern", ["noncausal-self", "causal-self"])
@pytest.mark.parametrize("phi", ["sigmoid", "elu"])
def test_without_competition_and_allocation_it_is_normalized_linear_attention(pattern, phi):
    q, k, v = sample()
    found = flow_attention(q, k, v, pattern=pattern, phi=phi, eps=1e-14, **OFF)
    close(found, linear_attention(q, k, v, pattern=pattern, feature_map=phi, eps=1e-14), 1e-11)


def test_temperature_divides_inside_the_competition():
    q, k, _ = sample()
    off = weights(q, k, **OFF)
    warm, cold = (
        (weights(q, k, allocation=False, clamp=None, temperature=temperature) / off)[:, :, 0].log()
        for temperature in (1.0, 0.25)
    )
    close(cold - cold[..., :1], 4 * (warm - warm[..., :1]), 1e-10)


def test_the_default_clamp_cuts_many_sources_and_can_be_widened_or_left_out():
    bounds = ((-1.0, 1.0), (-10.0, 10.0), None)
    inputs = sample(40)
    narrow, wide, none = (flow_attention(*inputs, pattern="noncausal-self", clamp=bound) for bound in bounds)
    assert torch.equal(wide, none)
    assert (narrow - none).abs().max() > 1e-3


def test_an_unclamped_competition_does_not_overflow():
    q, k, v = (x.float() for x in sample(30))
    found = flow_attention(60 * q, 60 * k, v, phi="relu", clamp=None, temperature=1e-3)
    assert torch.isfinite(found).all()


def test_what_it_lacks_is_refused_with_the_reason():
    q, k, v = sample(5, 9)
    state = flow_attention(*sample(), return_state=True).state
    for call, words in (
        ({"state": state}, "N = M"),
        ({"pattern": "causal-cross"}, "competition"),
        ({"pattern": "noncausal-cross", "return_state": True}, "state"),
    ):
        refused(words, flow_attention, q, k, v, **call)
    with pytest.raises(Unsupported, match="absorbing"):
        create_layer("flow_attention", 8, 2, pattern="noncausal-cross").encode_memory(torch.randn(1, 3, 8))


def test_projections_have_biases_by_default():
    assert create_layer("flow_attention", 8, 2).query.bias is not None
    assert create_layer("flow_attention", 8, 2, bias=False).query.bias is None


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("noncausal", "noncausal-self"),
        ("cross", "noncausal-cross"),
        ("cross_more_queries", "noncausal-cross"),
        ("causal", "causal-self"),
        ("causal_clamp10", "causal-self"),
    ],
)
def test_function_layer_and_gradients_equal_the_official_code(name, pattern):
    recorded = load(f"flow_attention_{name}")
    options = {"pattern": pattern, "clamp": (-float(recorded["clamp"]), float(recorded["clamp"]))}
    core = flow_attention(*(recorded[x] for x in "qkv"), **options)
    close(core.transpose(1, 2).flatten(2), recorded["core_out"], 1e-10)  # observed 6.3e-16
    leaves = {x: recorded[x].requires_grad_() for x in ("x", "memory") if x in recorded}
    cross = {"memory_dim": recorded["memory"].shape[-1]} if "memory" in recorded else {}
    layer = create_layer("flow_attention", recorded["x"].shape[-1], 2, head_dim=8, **options, **cross).double()
    # the recorded output may be narrower than the input, but a layer has one width
    layer.output = nn.Linear(*reversed(recorded["weight_out_projection_weight"].shape)).double()
    for module, its in ((layer.query, "query"), (layer.key, "key"), (layer.value, "value"), (layer.output, "out")):
        module.load_state_dict({x: recorded[f"weight_{its}_projection_{x}"] for x in ("weight", "bias")})
    found = layer(*leaves.values()).output
    check_recorded(recorded, found, leaves, 1e-11)  # observed 5.3e-15
