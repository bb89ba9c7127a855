"""Attention to parts of the keys, merged by the log-sum-exps."""

from __future__ import annotations

import pytest
import torch
from support import close, qkv

from regard.core.visibility import CountedRanks
from regard.engines.attention import Visibility, attention
from regard.engines.merging import merge


def parts(sizes: list[int]) -> tuple[list, list, torch.Tensor, list]:
    """Outputs and log-sum-exps of attention to each part, attention to all keys, and the tensors of both."""
    q, outputs, lses, pairs = qkv(5)["q"].requires_grad_(), [], [], []
    for size in sizes:
        k, v = (qkv(size)[name].requires_grad_() for name in "kv")
        where = CountedRanks(5, size, 0, True, q.device)
        output, _, lse = attention(q, k, v, where, visibility=Visibility(), scale=0.5, want_lse=True)
        outputs.append(output)
        lses.append(lse)
        pairs.append((k, v))
    keys, values = (torch.cat(x, 2) for x in zip(*pairs, strict=True))
    return outputs, lses, (0.5 * q @ keys.mT).softmax(-1) @ values, [q, *(x for pair in pairs for x in pair)]


def same_gradients(found: torch.Tensor, expected: torch.Tensor, leaves: list) -> None:
    close(found, expected)
    weight = torch.randn_like(expected)
    one, other = (
        torch.autograd.grad((x * weight).sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        for x in (found, expected)
    )
    for a, b in zip(one, other, strict=True):
        close(a, b)


@pytest.mark.parametrize("sizes", [[3], [3, 4], [1, 0, 6], [2, 2, 2, 2]])
def test_merged_parts_equal_attention_to_all_keys_with_their_gradients(sizes):
    outputs, lses, whole, leaves = parts(sizes)
    same_gradients(merge(outputs, lses), whole, leaves)
    with torch.no_grad():  # large scores do not overflow
        close(merge([o.clone() for o in outputs], [lse + 2000 for lse in lses]), whole, 1e-9)


def test_a_query_that_no_part_shows_a_key_gives_zero_with_finite_gradients():
    outputs, lses, *_ = parts([0, 3])
    hidden = torch.tensor([True, False, True, False, False])
    leaves = [x.detach().masked_fill(hidden[:, None], 0).requires_grad_() for x in outputs]
    sums = [lse.detach().masked_fill(hidden, -torch.inf).requires_grad_() for lse in lses]
    merged = merge(leaves, sums)
    assert (merged[:, :, hidden] == 0).all() and (merged[:, :, ~hidden] != 0).all()
    gradients = torch.autograd.grad(merged.sum(), [*leaves, *sums])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all((gradient[:, :, hidden] == 0).all() for gradient in gradients[2:])


def test_factors_multiply_the_weights_of_their_parts_and_not_the_normaliser():
    outputs = [torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    factors = [torch.randn(3, 1, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    shares = torch.stack(lses).exp() / torch.stack(lses).exp().sum(0)
    expected = sum(c[..., None] * s[..., None] * o for c, s, o in zip(factors, shares, outputs, strict=True))
    same_gradients(merge(outputs, lses, factors), expected, [*outputs, *lses, *factors])
    with torch.no_grad():
        close(merge([o.clone() for o in outputs], lses, factors), expected)
        close(merge(outputs[:1], lses[:1], factors[:1]), factors[0][..., None] * outputs[0])


def test_a_program_made_without_gradients_runs_with_them():
    class Merged(torch.nn.Module):
        def forward(self, outputs, lses):
            return merge(outputs.unbind(0), lses.unbind(0))

    outputs, lses = torch.randn(2, 1, 2, 3, 4), torch.randn(2, 1, 2, 3)
    program = torch.export.export(Merged(), (outputs, lses)).module()
    given = outputs.clone().requires_grad_()
    found = program(given, lses)
    close(found, merge([part.clone() for part in outputs], list(lses)), 1e-6)
    found.sum().backward()
    assert given.grad is not None and given.grad.abs().sum() > 0
