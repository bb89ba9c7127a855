"""Tests specific to LoLCATs: softmax in a window, combined with a linear state whose features are learned."""

from __future__ import annotations

import torch

import regard
from regard.functional import lolcats_attention, softmax_attention


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def heads(n=23):
    return random(2, 3, n, 8), random(2, 3, n, 8), random(2, 3, n, 5)


def test_a_window_that_holds_every_token_is_softmax():
    q, k, v = heads()
    expected = softmax_attention(q, k, v)
    torch.testing.assert_close(lolcats_attention(q, k, v, window=23, window_weight=random(3).exp()), expected)


def test_without_a_window_it_is_linear_attention_on_hedgehog_features():
    q, k, v = heads()
    maps = random(3, 8, 4), random(3, 8, 4)

    def features(x, w):
        return torch.cat([(x @ w).softmax(-1), (-x @ w).softmax(-1)], -1)

    weights = (features(q, maps[0]) @ features(k, maps[1]).mT).tril()
    expected = weights @ v / weights.sum(-1, keepdim=True)
    found = lolcats_attention(q, k, v, q_map=maps[0], k_map=maps[1], window=0)
    torch.testing.assert_close(found, expected)


def test_the_weight_of_the_window_moves_the_output_between_its_two_parts():
    q, k, v = heads()
    near = softmax_attention(q, k, v, window=(3, 0))
    far = lolcats_attention(q, k, v, window=4, window_weight=torch.full((3,), 1e-12, dtype=torch.float64))
    found = lolcats_attention(q, k, v, window=4, window_weight=torch.full((3,), 1e12, dtype=torch.float64))
    torch.testing.assert_close(found, near)
    assert not torch.allclose(far[:, :, 6:], near[:, :, 6:], atol=1e-3)


def test_a_layer_learns_its_maps_from_the_identity_and_its_state_stays_small():
    layer = regard.create_layer("lolcats", 24, 3, window=4).double().eval()
    maps = layer.projection.q_map, layer.projection.k_map
    assert all(torch.equal(m, torch.eye(8, dtype=m.dtype).expand(3, -1, -1)) for m in maps)
    x = random(2, 30, 24)
    short, long = (layer(x[:, :n], context=regard.Context(want=frozenset({"state"}))).state for n in (6, 30))
    assert short.nbytes == long.nbytes
    layer(x).output.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.projection.parameters())
