from __future__ import annotations

import pytest
import torch

from regard.contract import Call, Pattern
from regard.core.visibility import CountedRanks
from regard.engines.attention import Ranks, Visibility, attention, ranks
from regard.engines.merging import merge


def parts(sizes: list[int], **options) -> tuple[list, list, list]:
    tensors = [torch.randn(2, 2, n, 4, dtype=torch.float64, **options) for n in (5, *sizes, *sizes)]
    q, keys, values = tensors[0], tensors[1 : 1 + len(sizes)], tensors[1 + len(sizes) :]
    found = []
    for k, v in zip(keys, values, strict=True):
        where = CountedRanks(5, k.shape[2], 0, True, q.device)
        found.append(attention(q, k, v, where, visibility=Visibility(), scale=0.5, want_lse=True))
    whole = (0.5 * q @ torch.cat(keys, 2).mT).softmax(-1) @ torch.cat(values, 2)
    return [o for o, _, _ in found], [lse for _, _, lse in found], [whole, tensors]


@pytest.mark.parametrize("sizes", [[3], [3, 4], [1, 0, 6], [2, 2, 2, 2]])
def test_merged_parts_equal_attention_to_all_keys(sizes):
    outputs, lses, (whole, _) = parts(sizes)
    torch.testing.assert_close(merge(outputs, lses), whole)


def test_gradients_pass_through_outputs_and_sums():
    outputs, lses, (whole, tensors) = parts([3, 4], requires_grad=True)
    weight = torch.randn_like(whole)
    found = torch.autograd.grad((merge(outputs, lses) * weight).sum(), tensors)
    for one, other in zip(found, torch.autograd.grad((whole * weight).sum(), tensors), strict=True):
        torch.testing.assert_close(one, other)


def test_a_query_without_keys_gives_zero_with_finite_gradients():
    outputs, lses, _ = parts([0, 3])
    hidden = torch.tensor([True, False, True, False, False])
    leaves = [x.masked_fill(hidden[:, None], 0).requires_grad_() for x in outputs]
    sums = [lse.masked_fill(hidden, -torch.inf).requires_grad_() for lse in lses]
    merged = merge(leaves, sums)
    assert (merged[:, :, hidden] == 0).all() and (merged[:, :, ~hidden] != 0).all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(merged.sum(), [*leaves, *sums]))


def test_large_scores_do_not_overflow():
    outputs, lses, _ = parts([3, 4])
    shifted = merge([o.clone() for o in outputs], [lse + 2000 for lse in lses])
    torch.testing.assert_close(shifted, merge(outputs, lses))


def test_attentions_to_parts_of_the_keys_join_to_attention_to_all():
    q, k, v = torch.randn(3, 2, 2, 7, 8, dtype=torch.float64).requires_grad_()
    whole = ranks(Call(Pattern.CAUSAL_SELF), 7, 7, q.device)
    rule = Visibility(causal=True)
    outputs, lses = [], []
    for own in (slice(0, 3), slice(3, 7)):  # the first queries see no key of the second part
        where = Ranks(whole.queries, whole.keys[:, own], None, None, plain=False)
        output, _, lse = attention(q, k[:, :, own], v[:, :, own], where, visibility=rule, scale=0.3, want_lse=True)
        outputs.append(output)
        lses.append(lse)
    expected = attention(q, k, v, whole, visibility=rule, scale=0.3)[0]
    found = merge(outputs, lses)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    for one, other in zip(
        *(torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_query_that_neither_part_shows_a_key_gives_zero():
    zero, hidden = torch.zeros(1, 1, 2, 3), torch.full((1, 1, 2), -torch.inf).requires_grad_()
    output = merge([zero, zero], [hidden, hidden])
    output.sum().backward()
    assert (output == 0).all()
    assert (hidden.grad == 0).all()


def test_factors_multiply_the_weights_of_their_parts_and_not_the_normaliser():
    outputs = [torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    factors = [torch.randn(3, 1, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    shares = torch.stack(lses).exp() / torch.stack(lses).exp().sum(0)
    expected = sum(c[..., None] * s[..., None] * o for c, s, o in zip(factors, shares, outputs, strict=True))
    found = merge(outputs, lses, factors)
    torch.testing.assert_close(found, expected)
    leaves = [*outputs, *lses, *factors]
    weight = torch.randn_like(expected)
    of = [torch.autograd.grad((x * weight).sum(), leaves, retain_graph=True) for x in (found, expected)]
    for a, b in zip(*of, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(merge([o.clone() for o in outputs], lses, factors), expected)
        torch.testing.assert_close(merge(outputs[:1], lses[:1], factors[:1]), factors[0][..., None] * outputs[0])
