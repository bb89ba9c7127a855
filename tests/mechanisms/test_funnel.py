"""Tests specific to funnel pooling: pairs, the separate first token, distances between lengths, and parity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import calls, close, load, refused
from torch import Tensor

from regard import Context, Mask, create_layer
from regard.contract import Pattern
from regard.mechanisms.funnel import MECHANISM, Config, sample_inputs, upsample, weight_shapes
from regard.models import Encoder, EncoderConfig


def sample(n: int = 9, batch: int = 2, **options: Any) -> dict[str, Tensor]:
    made = {"batch": batch, "n": n, "m": n, "dtype": torch.float64, "pattern": Pattern.NONCAUSAL_SELF}
    return sample_inputs(torch.default_generator, config=Config(**options), **made)


def run(tensors: dict[str, Tensor], options: dict | None = None, **call: Any) -> Tensor:
    return calls(MECHANISM, "noncausal-self")(tensors, options, **call).output


def make_layer(dim: int = 8, heads: int = 2, **options: Any) -> torch.nn.Module:
    return create_layer("funnel", dim, heads, **{"pattern": "noncausal-self", **options}).double()


def recorded_weights(f: dict[str, Tensor]) -> dict[str, Tensor]:
    """The recorded weights in the mechanism's form, without the key bias, which has no effect."""

    def stack(name: str, change=lambda w: w) -> Tensor:
        return torch.stack([change(f[f"weight_blocks_{layer}_{name}"]) for layer in ("1_0", "1_1", "2_0", "2_1")])

    found = {n: stack(f"attention_{n}_head_weight", lambda w: w.view(2, 3, 8).mT) for n in "qkv"}
    found["v_bias"] = stack("attention_v_head_bias", lambda w: w.view(2, 3))
    found["content_bias"], found["distance_bias"] = stack("attention_r_w_bias"), stack("attention_r_r_bias")
    found["r"] = stack("attention_r_kernel", lambda w: w.transpose(0, 1))
    found["o"] = stack("attention_post_proj_weight", lambda w: w.mT.reshape(2, 3, 8))
    found["o_bias"] = stack("attention_post_proj_bias")
    for own, other in (("up", "linear_1"), ("down", "linear_2")):
        found[own], found[f"{own}_bias"] = stack(f"ffn_{other}_weight", lambda w: w.mT), stack(f"ffn_{other}_bias")
    for name in ("weight", "bias"):
        norms = [stack(f"{part}_layer_norm_{name}") for part in ("attention", "ffn")]
        found[f"norm_{name}"] = torch.stack(norms, 1)
    return found


@pytest.mark.parametrize(
    ("case", "n", "options"),
    [
        ("even", 12, {"truncate": True}),
        ("odd", 13, {"truncate": True}),
        ("factorized", 13, {"truncate": True}),
        ("even_whole", 12, {}),
        ("odd_whole_max", 13, {"pool": "max"}),
        ("even_joint", 12, {"separate_first": False}),
        ("odd_joint", 13, {"separate_first": False}),
        ("odd_keys_too", 13, {"query_only": False}),
    ],
)
def test_parity_of_two_blocks_of_two_layers(case, n, options):
    f = load("funnel_transformers")
    x, hidden = f[f"x_{n}"].requires_grad_(), f[f"out_{case}"]
    expected = hidden[:, :1] if Config(**options).separate_first else hidden.mean(1, keepdim=True)
    found = run({"x": x} | recorded_weights(f), {"layers": 2, **options})
    close(found, expected, 1e-13)  # observed 7e-16
    if case == "odd":
        (found[:, 0] * f["grad_out"]).sum().backward()
        close(x.grad, f["grad_x"], 1e-13)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("truncated_even", {"truncate": True}),
        ("truncated_odd", {"truncate": True}),
        ("truncated_short", {"truncate": True}),
        ("whole_even", {}),
        ("whole_odd", {}),
        ("whole_padded", {}),
        ("joint_even", {"separate_first": False}),
        ("joint_odd", {"separate_first": False, "pool": "max"}),
    ],
)
def test_parity_from_the_first_block_to_the_decoder(case, options):
    f = load("funnel_upsampled_transformers")
    layer = make_layer(head_dim=3, feed_forward=6, layers=2, **options)
    layer.weights.update(recorded_weights(f))
    first = f[f"first_{case}"].requires_grad_()
    lengths = torch.tensor([first.shape[1], 9]) if case == "whole_padded" else None
    h, left = layer.shorten(first, lengths)
    found, expected = first + upsample(h, left, first.shape[1], layer.config), f[f"out_{case}"]
    if lengths is not None:  # the places after them hold outputs of padding
        found, expected = (torch.cat([t[0], t[1, :9]]) for t in (found, expected))
    close(found, expected, 1e-13)  # observed 4e-15
    if case == "truncated_odd":
        (found * f["grad_out"]).sum().backward()
        close(first.grad, f["grad_first"], 1e-13)


@pytest.mark.parametrize("options", [{}, {"truncate": True}, {"separate_first": False}], ids=str)
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_each_place_gets_back_the_token_that_it_was_pooled_into(blocks, options):
    config = Config(blocks=blocks, **options)
    apart = int(config.separate_first)
    for n in range(20):
        groups = [{place} for place in range(n)]
        for _ in range(blocks):
            rest = groups[apart : len(groups) - int(config.truncate and len(groups) > 2)]
            groups = groups[:apart] + [set().union(*rest[i : i + 2]) for i in range(0, len(rest), 2)]
        # a truncated token belongs to the pair or group that it would have completed
        span = 2**blocks
        expected = [0.0] * n
        for number, group in enumerate(groups):
            places = group if number < apart else range(min(group), min(min(group) + span, n))
            for place in places:
                expected[place] = number + 1.0
        h = torch.arange(1.0, n + 3)[None, :, None]
        found = upsample(h, torch.tensor([len(groups)]), n, config)
        assert found.flatten().tolist() == expected


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_pairs_begin_after_the_first_token(pool):
    """If keys are pooled too and positions are off, the order within a pair does not matter."""
    options = {"pool": pool, "positions": False, "query_only": False, "blocks": 1}
    x = sample(n=6, **options)  # pairs (1, 2), (3, 4); token 5 alone
    expected = run(x, options)

    def swapped(i: int, j: int) -> Tensor:
        order = list(range(6))
        order[i], order[j] = j, i
        return run(x | {"x": x["x"][:, order]}, options)

    for pair in ((1, 2), (3, 4)):
        close(swapped(*pair), expected)
    for pair in ((0, 1), (2, 3), (4, 5)):
        assert not torch.allclose(swapped(*pair), expected)


@pytest.mark.parametrize(("query_only", "seen"), [(True, True), (False, False)])
def test_a_truncated_token_is_still_read_by_pooled_queries(query_only, seen):
    options = {"blocks": 1, "truncate": True, "query_only": query_only}
    x = sample(n=8, **options)
    x["x"].requires_grad_()
    (gradient,) = torch.autograd.grad(run(x, options).sum(), x["x"])
    assert bool((gradient[:, 7] != 0).any()) == seen
    assert (gradient[:, 6] != 0).any()


@pytest.mark.parametrize("options", MECHANISM.variants.values(), ids=str)
def test_rows_of_every_length_are_pooled_as_if_alone(options):
    x = sample(n=9, batch=10, **options)
    found = run(x, options, mask=Mask(lengths=torch.arange(10)))
    for n in range(10):
        alone = x | {"x": x["x"][n : n + 1, :n]}
        close(found[n : n + 1], run(alone, options, form="reference"))


def test_far_places_keep_their_digits_in_single_precision():
    narrow = {name: t.float() for name, t in sample(n=3001).items()}
    exact = run({name: t.double() for name, t in narrow.items()})
    close(run(narrow).double(), exact, 2e-6)


def test_an_encoder_pools_with_it():
    config = EncoderConfig(
        num_classes=3, vocab_size=11, dim=8, num_heads=2, num_layers=1, pool="funnel", pool_options={"blocks": 2}
    )
    model, ids = Encoder(config).double(), torch.randint(0, 11, (2, 9))
    logits = model(ids, context=Context(mask=Mask(lengths=torch.tensor([9, 5])))).output
    assert logits.shape == (2, 3)
    close(logits[1:], model(ids[1:, :5]).output)


@pytest.mark.parametrize("options", [*({x: 0} for x in ("heads", "head_dim", "feed_forward")), {"heads": 3}], ids=str)
def test_wrong_sizes_of_a_layer_are_refused(options):
    refused("head|feed_forward", make_layer, **options)
    refused("9", make_layer, dim=9, heads=1)


def test_calls_that_cannot_be_honoured_are_refused():
    layer, x = make_layer(), torch.randn(1, 4, 8, dtype=torch.float64)
    refused("memory", layer, x, x)
    refused(r"x of dtype torch.int64; supported: a tensor of floats", layer, torch.ones(1, 4, 8, dtype=torch.long))
    refused("roles", layer, x, context=Context(roles=torch.zeros(1, 4, dtype=torch.long)))
    refused("state", layer, x, context=Context(want=frozenset({"state"})))


def test_weights_that_do_not_fit_are_refused():
    refused("2 layers", run, sample(blocks=2), {"blocks": 3})
    for positions, left_out in ((True, "r"), (True, "distance_bias"), (False, None)):
        tensors = {name: t for name, t in sample().items() if name != left_out}
        refused("distance_bias", run, tensors, {"positions": positions})
    odd = {name: torch.randn(shape) for name, shape in weight_shapes(Config(), 9, 2, 4, 6).items()}
    refused("9 features", run, odd | {"x": torch.randn(1, 4, 9)})
