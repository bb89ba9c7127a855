"""What is peculiar to flow attention: conservation, closed forms, its options, padding counts, and recorded outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from regard.contract import Context, Mask, Unsupported
from regard.create import create_layer
from regard.functional import flow_attention, linear_attention
from regard.mechanisms.flow_attention import PHI, Config

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
WANT_STATE = Context(want=frozenset({"state"}))
OFF = {"competition": False, "allocation": False}


def sample(n=14, m=None, *, batch=2, heads=2, d=4, v=3):
    m = n if m is None else m
    return tuple(torch.randn(batch, heads, *s, dtype=torch.float64) for s in ((n, d), (m, d), (m, v)))


def weights(q, k, **options):
    """The implied weights: the output for values that are unit vectors."""
    values = torch.eye(k.shape[2], dtype=k.dtype).expand(*k.shape[:2], -1, -1)
    return flow_attention(q, k, values, **options)


def load(name):
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_recurrent_steps_equal_the_causal_form(chunk_size):
    q, k, v = sample()
    expected = flow_attention(q, k, v, chunk_size=chunk_size)
    state, outputs = None, []
    for t in range(14):
        part = slice(t, t + 1)
        result = flow_attention(q[:, :, part], k[:, :, part], v[:, :, part], state=state, return_state=True)
        outputs.append(result.output)
        state = result.state
    torch.testing.assert_close(torch.cat(outputs, 2), expected, rtol=0, atol=1e-13)


def test_the_causal_recurrence_in_the_papers_order():
    """Sums of keys and queries, then I and O, then the conserved sums, then E, then C, then the matrix."""
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
        found = sink.sigmoid() * (a * i / c) @ matrix
        torch.testing.assert_close(found, expected[0, 0, t], rtol=0, atol=1e-14)


@pytest.mark.parametrize(("n", "m"), [(14, 14), (9, 17), (17, 9)])
def test_flow_is_conserved(n, m):
    q, k, _ = sample(n, m)
    cross = {"pattern": "noncausal-cross", "eps": 1e-12}
    off = weights(q, k, **cross, **OFF)
    torch.testing.assert_close(off.sum(-1), torch.ones(2, 2, n, dtype=torch.float64), rtol=0, atol=1e-9)
    allocation = (weights(q, k, competition=False, **cross) / off)[..., 0]
    conserved_sinks = allocation.logit() * m / n
    torch.testing.assert_close(conserved_sinks.sum(-1), torch.full((2, 2), float(m)).double(), rtol=0, atol=1e-8)
    competition = (weights(q, k, allocation=False, clamp=None, **cross) / off)[:, :, 0]
    torch.testing.assert_close(competition.sum(-1), torch.full((2, 2), float(m)).double(), rtol=0, atol=1e-8)
    # softmax knows its logits up to a constant: the one that makes the conserved sources sum to L
    logits = competition.log()
    logits = logits + (n - logits.sum(-1, keepdim=True)) / m
    sinks, sources = q.sigmoid(), k.sigmoid()
    expected = (sources @ (sinks / (sinks @ sources.sum(2)[..., None])).sum(2)[..., None])[..., 0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-8)


def test_identical_tokens_do_not_compete_and_accept_sigmoid_of_one():
    q = torch.randn(1, 2, 1, 4, dtype=torch.float64).expand(-1, -1, 11, -1)
    _, _, v = sample(11, batch=1)
    accepted = torch.tensor(1.0, dtype=torch.float64).sigmoid()
    found = flow_attention(q, q, v, pattern="noncausal-self", eps=1e-12)
    torch.testing.assert_close(found, (accepted * v.mean(2, keepdim=True)).expand_as(v), rtol=0, atol=1e-10)
    running = v.cumsum(2) / torch.arange(1, 12)[:, None]
    torch.testing.assert_close(flow_attention(q, q, v, eps=1e-12), accepted * running, rtol=0, atol=1e-10)


def test_the_sigmoid_of_allocation_has_the_factor_of_lengths():
    """Identical tokens: each sink takes S / L, so the allocation is sigmoid(1) with the factor, sigmoid(S / L) without."""
    q = torch.ones(1, 1, 6, 4, dtype=torch.float64)
    k, v = torch.ones(1, 1, 15, 4, dtype=torch.float64), torch.ones(1, 1, 15, 2, dtype=torch.float64)
    for factor, inside in ((True, 1.0), (False, 15 / 6)):
        found = flow_attention(q, k, v, pattern="noncausal-cross", length_factor=factor, eps=1e-12)
        torch.testing.assert_close(found, torch.full_like(found, torch.tensor(inside).double().sigmoid().item()))


@pytest.mark.parametrize("pattern", ["noncausal-self", "causal-self"])
@pytest.mark.parametrize("phi", ["sigmoid", "elu"])
def test_without_competition_and_allocation_it_is_normalized_linear_attention(pattern, phi):
    q, k, v = sample()
    found = flow_attention(q, k, v, pattern=pattern, phi=phi, eps=1e-14, **OFF)
    expected = linear_attention(q, k, v, pattern=pattern, feature_map=phi, eps=1e-14)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    rows = weights(q, k, pattern=pattern, phi=phi, eps=1e-14, **OFF).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=1e-11)


def test_constant_values_give_the_weighted_mean_of_the_competition():
    q, k, v = sample()
    constant = torch.ones_like(v) * 3
    found = flow_attention(q, k, constant, pattern="noncausal-self", allocation=False, eps=1e-12)
    sinks, sources = q.sigmoid(), k.sigmoid()
    share = sinks @ sources.mT
    conserved = (sources @ (sinks / share.sum(-1, keepdim=True)).sum(2)[..., None])[..., 0].clamp(-1, 1)
    c = 14 * conserved.softmax(-1)
    expected = 3 * (share * c[:, :, None]).sum(-1) / share.sum(-1)
    torch.testing.assert_close(found, expected[..., None].expand_as(v), rtol=0, atol=1e-9)
    same = flow_attention(q, k[:, :, :1].expand_as(k), constant, pattern="noncausal-self", allocation=False, eps=1e-14)
    torch.testing.assert_close(same, constant, rtol=0, atol=1e-10)


def test_the_competition_is_over_sources_and_sums_to_their_number():
    q, k, _ = sample()
    with_c = weights(q, k, pattern="noncausal-self", allocation=False)
    without = weights(q, k, pattern="noncausal-self", **OFF)
    c = with_c / without
    torch.testing.assert_close(c, c[:, :, :1].expand_as(c), rtol=1e-12, atol=0)
    torch.testing.assert_close(c[:, :, 0].sum(-1), torch.full((2, 2), 14.0).double(), rtol=1e-12, atol=0)


def test_temperature_divides_inside_the_competition():
    q, k, _ = sample()

    def competition(temperature):
        one = weights(q, k, pattern="noncausal-self", allocation=False, clamp=None, temperature=temperature)
        return (one / weights(q, k, pattern="noncausal-self", **OFF))[:, :, 0].log()

    warm, cold = competition(1.0), competition(0.25)
    torch.testing.assert_close(cold - cold[..., :1], 4 * (warm - warm[..., :1]), rtol=1e-9, atol=1e-10)


def test_the_default_clamp_cuts_many_sources_and_can_be_widened_or_left_out():
    q, k, v = sample(40)
    narrow, wide, none = (
        flow_attention(q, k, v, pattern="noncausal-self", clamp=c) for c in ((-1.0, 1.0), (-10.0, 10.0), None)
    )
    torch.testing.assert_close(wide, none, rtol=0, atol=0)
    assert (narrow - none).abs().max() > 1e-3


def test_noncausal_is_equivariant_in_queries_and_invariant_in_the_order_of_keys():
    q, k, v = sample(8, 13)
    rows, columns = torch.randperm(8), torch.randperm(13)
    found = flow_attention(q, k, v, pattern="noncausal-cross")
    moved = flow_attention(q[:, :, rows], k[:, :, columns], v[:, :, columns], pattern="noncausal-cross")
    torch.testing.assert_close(moved, found[:, :, rows], rtol=0, atol=1e-13)


def test_later_tokens_do_not_change_earlier_outputs_bit_for_bit():
    q, k, v = sample()
    other = [torch.cat([x[:, :, :9], 5 * torch.randn_like(x[:, :, 9:])], 2) for x in (q, k, v)]
    found, changed = flow_attention(q, k, v, chunk_size=4), flow_attention(*other, chunk_size=4)
    assert torch.equal(found[:, :, :9], changed[:, :, :9])


def test_causal_is_not_noncausal_on_each_prefix():
    q, k, v = sample()
    last = flow_attention(q[:, :, :9], k[:, :, :9], v[:, :, :9], pattern="noncausal-self")[:, :, -1]
    assert (flow_attention(q, k, v)[:, :, 8] - last).abs().max() > 1e-3


@pytest.mark.parametrize("phi", list(PHI))
def test_padding_equals_unpadded_with_valid_counts(phi):
    q, k, v = sample(8, 13)
    counts, keys = [8, 3], [5, 13]
    masks = {"mask": Mask(lengths=torch.tensor(counts)), "memory_mask": Mask(lengths=torch.tensor(keys))}
    found = flow_attention(q, k, v, pattern="noncausal-cross", phi=phi, **masks)
    for row, (n, m) in enumerate(zip(counts, keys, strict=True)):
        own = slice(row, row + 1)
        alone = flow_attention(q[own, :, :n], k[own, :, :m], v[own, :, :m], pattern="noncausal-cross", phi=phi)
        torch.testing.assert_close(found[own, :, :n], alone, rtol=0, atol=1e-12)
        assert (found[own, :, n:] == 0).all()


@pytest.mark.parametrize("pattern", ["noncausal-self", "causal-self"])
def test_an_empty_row_gives_zero_with_finite_gradients(pattern):
    inputs = [x.requires_grad_() for x in sample()]
    found = flow_attention(*inputs, pattern=pattern, mask=Mask(lengths=torch.tensor([14, 0])))
    assert (found[1] == 0).all()
    found.square().sum().backward()
    assert all(torch.isfinite(x.grad).all() and (x.grad[1] == 0).all() for x in inputs)


def test_an_unclamped_competition_does_not_overflow():
    q, k, v = (x.float() for x in sample(30))
    found = flow_attention(60 * q, 60 * k, v, phi="relu", clamp=None, temperature=1e-3)
    assert torch.isfinite(found).all()


def test_float32_stays_accurate_over_long_sequences():
    q, k, v = sample(2000, batch=1, d=8, v=8)
    expected = flow_attention(q, k, v)
    found = flow_attention(q.float(), k.float(), v.float())
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()  # observed 1.4e-7


def test_the_state_has_a_matrix_and_four_vectors_and_two_numbers_a_head():
    q, k, v = sample()
    state = flow_attention(q, k, v, return_state=True).state
    numbers = sum(x.numel() for name, x in state.tensors().items() if name != "length")
    assert numbers == 2 * 2 * (4 * 3 + 4 * 4 + 2)
    assert state.length.tolist() == [14, 14]


def test_causal_with_other_queries_than_keys_is_refused():
    q, k, v = sample(5, 9)
    with pytest.raises(Unsupported, match="N = M"):
        flow_attention(q, k, v)
    state = flow_attention(*sample(), return_state=True).state
    with pytest.raises(Unsupported, match="N = M"):
        flow_attention(q, k, v, state=state)


def test_causal_cross_and_a_state_in_cross_are_refused_with_a_reason():
    q, k, v = sample(5, 9)
    with pytest.raises(Unsupported, match="competition"):
        flow_attention(q, k, v, pattern="causal-cross")
    with pytest.raises(Unsupported, match="state"):
        flow_attention(q, k, v, pattern="noncausal-cross", return_state=True)
    layer = create_layer("flow_attention", 8, 2, pattern="noncausal-cross")
    with pytest.raises(Unsupported, match="absorbing"):
        layer.encode_memory(torch.randn(1, 3, 8))


@pytest.mark.parametrize(
    "options",
    [{"phi": "exp"}, {"clamp": (1.0, -1.0)}, {"clamp": (1.0,)}, {"temperature": 0.0}, {"eps": 0.0}, {"eps": -1.0}],
)
def test_bad_options_are_refused(options):
    with pytest.raises(Unsupported):
        Config(**options)


def test_projections_have_biases_by_default():
    assert create_layer("flow_attention", 8, 2).query.bias is not None
    assert create_layer("flow_attention", 8, 2, bias=False).query.bias is None


def test_decoding_a_layer_token_by_token_equals_the_whole():
    layer = create_layer("flow_attention", 8, 2).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    expected = layer(x).output
    state = layer(x[:, :3], context=WANT_STATE).state
    for t in range(3, 9):
        output, state = layer.step(x[:, t], state)
        torch.testing.assert_close(output, expected[:, t], rtol=0, atol=1e-13)


RECORDED = {
    "flow_attention_noncausal": "noncausal-self",
    "flow_attention_cross": "noncausal-cross",
    "flow_attention_cross_more_queries": "noncausal-cross",
    "flow_attention_causal": "causal-self",
    "flow_attention_causal_clamp10": "causal-self",
}


def recorded_layer(a, pattern):
    """A layer with the recorded weights. The recorded output may be narrower than the input, ours has one width."""
    bound = float(a["clamp"])
    cross = {"memory_dim": a["memory"].shape[-1]} if "memory" in a else {}
    layer = create_layer(
        "flow_attention", a["x"].shape[-1], 2, head_dim=8, pattern=pattern, clamp=(-bound, bound), **cross
    ).double()
    layer.output = nn.Linear(*reversed(a["weight_out_projection_weight"].shape)).double()
    for module, name in ((layer.query, "query"), (layer.key, "key"), (layer.value, "value"), (layer.output, "out")):
        module.load_state_dict(
            {"weight": a[f"weight_{name}_projection_weight"], "bias": a[f"weight_{name}_projection_bias"]}
        )
    return layer


@pytest.mark.parametrize("name", RECORDED)
def test_function_equals_the_official_code(name):
    a = load(name)
    bound = float(a["clamp"])
    found = flow_attention(a["q"], a["k"], a["v"], pattern=RECORDED[name], clamp=(-bound, bound))
    tolerance = 1e-10 * float(a["core_out"].abs().max())
    torch.testing.assert_close(
        found.transpose(1, 2).flatten(2), a["core_out"], rtol=0, atol=tolerance
    )  # observed 6.3e-16


@pytest.mark.parametrize("name", RECORDED)
def test_layer_and_gradients_equal_the_official_code(name):
    a = load(name)
    layer = recorded_layer(a, RECORDED[name])
    x = a["x"].requires_grad_()
    memory = a["memory"].requires_grad_() if "memory" in a else None
    found = layer(x, memory).output
    torch.testing.assert_close(found, a["out"], rtol=0, atol=1e-10)  # observed 5.3e-15
    (found * a["grad_out"]).sum().backward()
    torch.testing.assert_close(x.grad, a["grad_x"], rtol=0, atol=1e-10)  # observed 8.0e-15
    if memory is not None:
        torch.testing.assert_close(memory.grad, a["grad_memory"], rtol=0, atol=1e-10)  # observed 8.9e-16
