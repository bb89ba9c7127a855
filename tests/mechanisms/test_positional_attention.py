"""Tests specific to positional attention: weights independent of content, closed forms, tables and encodings, hybrid heads,
the paper's network, and parity with the authors' layer and networks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import calls, check_recorded, close, close_gradients, load, refused, watched
from torch import Tensor, nn

from regard.contract import ALL_PATTERNS, BlockMask, Context, Mask, Shape
from regard.core.visibility import DistanceBias
from regard.create import create_layer
from regard.engines import attention_forms
from regard.functional import softmax_attention
from regard.mechanisms.positional_attention import MECHANISM, Config, cost
from regard.mechanisms.positional_attention import forms as module
from regard.positions import Sinusoidal
from regard.reproductions.positional_attention import TASKS, answers, draw, network

run = calls(MECHANISM, "noncausal-self")


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def inputs(n: int, m: int | None = None, rows: int = 20) -> dict[str, Tensor]:
    found = {"query_map": normal(2, 6, 4), "key_map": normal(2, 6, 4), "v": normal(3, 2, n if m is None else m, 5)}
    found |= {"query_bias": normal(2, 4), "encodings": normal(rows, 6)}
    return found | ({} if m is None else {"slots": torch.zeros(3, n, dtype=torch.long)})


def content(tensors: dict[str, Tensor], n: int, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Encodings as queries and keys of softmax attention; query i has the position first + i."""
    encodings, v = tensors["encodings"], tensors["v"]
    queries = encodings[first : first + n] @ tensors["query_map"] + tensors["query_bias"][:, None]
    keys = encodings[: v.shape[2]] @ tensors["key_map"] + normal(2, 1, 4)  # a key bias changes nothing
    return queries.expand(3, -1, -1, -1), keys.expand(3, -1, -1, -1), v


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("stored", [True, False])
def test_it_is_softmax_attention_with_encodings_in_place_of_content(pattern, stored, monkeypatch):
    """Both when the weights of all rows are stored and when each row recomputes them."""
    monkeypatch.setattr(module, "SHARED_PAIRS", 100 if stored else 0)
    for n, m in ((9, None), (6, 13)) if pattern != "noncausal-self" else ((9, None),):
        tensors = inputs(n, m)
        leaves = [x.requires_grad_() for x in tensors.values() if x.is_floating_point()]
        first = 0 if m is None or pattern.cross else m - n
        expected = softmax_attention(*content(tensors, n, first), pattern=pattern)
        expected = expected if not pattern.cross or m is not None else expected[:, :, :1]
        found = run(tensors, pattern=pattern).output
        close_gradients(found, expected, leaves)


def test_maps_of_zero_give_the_mean_and_running_sums_after_counting():
    tensors = inputs(9)
    tensors |= {name: torch.zeros_like(tensors[name]) for name in ("query_map", "query_bias")}
    close(run(tensors).output, tensors["v"].mean(2, keepdim=True).expand(-1, -1, 9, -1))
    count = torch.arange(1.0, 10, dtype=torch.float64)[:, None]
    close(count * run(tensors, pattern="causal-self").output, tensors["v"].cumsum(2))


def test_tokens_move_with_their_rows_and_not_without():
    tensors, order = inputs(8, rows=8), torch.randperm(8)
    moved = {"v": tensors["v"][:, :, order]}
    rows = {"encodings": tensors["encodings"][order]}
    expected = run(tensors).output[:, :, order]
    close(run(tensors | moved | rows).output, expected)
    assert (run(tensors | moved).output - expected).abs().max() > 1e-2


def test_one_weight_matrix_serves_all_rows(monkeypatch):
    """Only calls whose weights differ between rows go to the engine, which computes a matrix for each row."""
    counted = watched(monkeypatch, attention_forms, "attention", lambda *given, **options: 1)
    tensors, lengths = inputs(8), torch.tensor([8, 3, 0])
    for pattern in ("noncausal-self", "causal-self"):
        run(tensors, pattern=pattern)
    run(tensors, pattern="causal-self", mask=Mask(lengths=lengths))
    run(inputs(5, 8), pattern="noncausal-cross")
    assert not counted
    run(tensors, mask=Mask(lengths=lengths))
    run(tensors, dropout=0.5)
    run(tensors, mask=Mask(bias=torch.zeros(1, 1, 8, 8, dtype=torch.float64)))
    assert len(counted) == 3
    one, ten = (cost(Shape(batch, 2, 8, 8, 4, 5), Config()).flops for batch in (1, 10))
    assert ten <= 6 * one


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("stored", [True, False])
def test_padding_needs_no_encodings_whichever_row_is_the_longest(pattern, stored, monkeypatch):
    monkeypatch.setattr(module, "SHARED_PAIRS", 81 if stored else 0)
    tensors, lengths = inputs(5, 5, rows=5), torch.tensor([3, 5, 0])
    padded = {"v": nn.functional.pad(tensors["v"], (0, 0, 0, 3)), "slots": torch.zeros(3, 8)}
    masks = {"mask": Mask(lengths=lengths)} | ({"memory_mask": Mask(lengths=lengths)} if pattern.cross else {})
    found = run(tensors | padded, pattern=pattern, **masks).output
    for row, length in enumerate(lengths.tolist()):
        alone = {"v": tensors["v"][row : row + 1, :, :length], "slots": tensors["slots"][row : row + 1, :length]}
        close(found[row, :, :length], run(tensors | alone, pattern=pattern).output[0])


# hybrid heads


@pytest.mark.parametrize("told", ["nothing", "bias", "blocks", "distances", "pairs"])
@pytest.mark.parametrize("pattern", ["noncausal-self", "causal-self"])
def test_content_heads_come_last_and_see_their_own_biases(pattern, told):
    bias, blocks, table = normal(1, 3, 8, 8), torch.rand(1, 3, 4, 4) > 0.3, normal(3, 15)

    def of(heads: slice) -> dict[str, Any]:
        distances = DistanceBias(lambda distances: table[heads][:, distances + 7])
        return {
            "nothing": {},
            "bias": {"mask": Mask(bias=bias[:, heads])},
            "blocks": {"mask": Mask(blocks=BlockMask(blocks[:, heads], 2))},
            "distances": {"position_bias": distances},
            "pairs": {"position_bias": lambda i, j: distances(i, j)},
        }[told] | {"pattern": pattern}

    tensors, v, q, k = inputs(8), normal(3, 3, 8, 5), normal(3, 1, 8, 6), normal(3, 1, 8, 6)
    hybrid = tensors | {"v": v, "content_query": q, "content_key": k}
    found = run(hybrid, want={"weights"}, **of(slice(None)))
    first = run(tensors | {"v": v[:, :2]}, **of(slice(2))).output
    last = softmax_attention(q, k, v[:, 2:], **of(slice(2, None)))
    close(found.output, torch.cat([first, last], 1))
    close(found.extras["weights"] @ v, found.output)


# the layer


def layer(pattern: str = "noncausal-self", **options: Any) -> Any:
    return create_layer("positional_attention", 16, 4, pattern=pattern, max_length=10, **options).double()


def test_encodings_are_what_they_are_called():
    made = {
        name: layer(encoding=name, encoding_dim=6).projection for name in ("one_hot", "binary", "sinusoidal", "learned")
    }
    close(made["one_hot"].encodings(), torch.eye(10, dtype=torch.float64))
    bits = made["binary"].encodings()
    assert bits.shape == (10, 4) and bits.unique(dim=0).shape[0] == 10
    assert bits[6].tolist() == [-1.0, 1.0, 1.0, -1.0]
    assert made["sinusoidal"].encodings() is None
    tensors = inputs(9)
    waves = Sinusoidal(dim=6).embed(torch.zeros(1, 9, 6, dtype=torch.float64), torch.arange(9)[None])[0]
    for pattern in ("noncausal-self", "causal-self"):
        found, expected = (run(tensors | {"encodings": rows}, pattern=pattern).output for rows in (None, waves))
        close(found, expected)
    learned = layer(encoding="learned", encoding_dim=6)
    learned(normal(2, 5, 16)).output.square().sum().backward()
    gradient = learned.projection.encoding.grad
    assert gradient.shape == (10, 6) and (gradient[:5] != 0).all() and not gradient[5:].any()


def test_widths_of_keys_and_parameters():
    def maps(**options: Any) -> tuple[int, int]:
        made = layer(**options).projection
        return made.width, sum(p.numel() for p in made.parameters())

    assert maps(encoding="one_hot") == (10, 10 * 80 + 80)
    assert maps(encoding_dim=12, key_width="split") == (3, 12 * 24 + 24)
    assert maps(encoding="binary", content_heads=2) == (4, 4 * 16 + 16 + 2 * (16 * 8 + 8))
    start = layer(encoding="one_hot").projection
    bound = math.sqrt(6 / (10 + 80))
    assert not start.bias.any() and 0.9 * bound < start.weight.abs().max() <= bound


def test_no_input_reaches_the_weights_of_a_layer_whose_output_is_affine_in_it():
    made, x, other = layer(), normal(2, 8, 16).requires_grad_(), normal(2, 8, 16)
    want = Context(want=frozenset({"weights"}))
    first, second = made(x, context=want), made(other, context=want)
    assert torch.equal(first.extras["weights"], second.extras["weights"])
    assert torch.equal(first.extras["weights"][0], first.extras["weights"][1])
    assert torch.autograd.grad(first.extras["weights"].square().sum(), x, allow_unused=True) == (None,)
    close(made(3 * x - 2 * other).output, 3 * first.output - 2 * second.output)
    hybrid = layer(content_heads=1)(x, context=want).extras["weights"]
    (gradient,) = torch.autograd.grad(hybrid[:, 3].square().sum(), x)
    assert gradient.any()


def test_positions_without_an_encoding_are_refused_and_sinusoids_have_all():
    made, x = layer("causal-self", encoding="one_hot"), normal(1, 11, 16)
    refused("try max_length=11", made, x)
    state = made(x[:, :10], context=Context(want=frozenset({"state"}))).state
    refused("position 10", made.step, x[:, 10], state)
    assert layer("causal-self")(normal(1, 300, 16)).output.isfinite().all()


def test_what_does_not_fit_is_refused():
    for options, message in (
        ({"content_heads": 4}, "content_heads=4 of 4"),
        ({"encoding": "one_hot", "key_width": "split"}, "split"),
        ({"positions": "rotary"}, "rotary positions"),
    ):
        refused(message, layer, **options)
    tensors, q = inputs(5), torch.zeros(3, 1, 5, 4)
    refused("2 positional heads, 1 of content and 2 of values", run, tensors | {"content_query": q, "content_key": q})
    refused("max_length=5", run, tensors | {"encodings": tensors["encodings"][:4]})


# the paper's network


def test_the_network_has_the_parameters_of_the_papers():
    counts = [sum(p.numel() for p in network(8, positional=p).parameters()) for p in (True, False)]
    assert counts == [84_577, 150_273]


def with_positions(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
    """Input hook: take values from x + P."""
    return (given[0] + torch.eye(*given[0].shape[1:]),)


def residual(_: nn.Module, given: tuple[Tensor], __: Tensor) -> Tensor:
    """Output hook: x + y in place of MLP([x ; y])."""
    return sum(given[0].chunk(2, -1))


def residual_with_norm(_: nn.Module, given: tuple[Tensor], __: Tensor) -> Tensor:
    x, y = given[0].chunk(2, -1)
    return x + nn.functional.layer_norm(y, y.shape[-1:])


@pytest.mark.parametrize(
    ("positional", "changes", "scales"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"mixer": with_positions}, False),
        (True, {"network": residual_with_norm}, False),
        (True, {"network": residual}, True),  # so it was the norm
    ],
)
@torch.no_grad()
def test_a_network_without_biases_scales_with_its_input_unless_values_hold_positions_or_a_norm_follows(
    positional, changes, scales
):
    model = network(8, positional=positional, bias=False)
    for part, changed in changes.items():
        for child in (getattr(block, part) for block in model.blocks):
            (child.register_forward_pre_hook if part == "mixer" else child.register_forward_hook)(changed)
    x = torch.randn(4, 8)
    found = answers(model, x)
    error = float((answers(model, 10 * x) - 10 * found).abs().max() / found.abs().max())
    assert error < 1e-4 if scales else error > 1e-2


def test_targets_and_test_ranges_are_those_of_the_paper():
    x = draw(200, 8, 6.0, torch.Generator().manual_seed(1))
    for name, expected in (("min", min), ("sum", sum)):
        for row in range(3):
            wanted = torch.stack([torch.tensor(float(expected(x[row, : i + 1].tolist()))) for i in range(8)])
            torch.testing.assert_close(TASKS[name](x)[row], wanted)
    assert TASKS["sort"](x)[0].tolist() == sorted(x[0].tolist())
    assert x.abs().max() <= 6.0 and draw(500, 8, 2.0, torch.Generator()).abs().max() <= 2.0
    # bounds drawn within [-2, 2] give rows within; with a bound outside, rows are within only by chance
    inside = (draw(4000, 8, 2.5, torch.Generator().manual_seed(2)).abs() <= 2.0).all(-1).double().mean()
    assert inside < 0.4


# parity


def test_a_layer_equals_the_authors_with_gradients():
    fixture = load("positional_attention_layer")
    made = create_layer(
        "positional_attention", 8, 2, pattern="noncausal-self", encoding="one_hot", max_length=7, bias=True
    ).double()
    names = {"projection": "qk_proj", "value": "v_proj", "output": "o_proj"}
    theirs = {name: "_".join((names[name.split(".")[0]], name.split(".")[1])) for name, _ in made.named_parameters()}
    made.load_state_dict({own: fixture[f"weight_{name}"] for own, name in theirs.items()})
    x = fixture["x"].requires_grad_()
    output = made(x).output
    check_recorded(fixture, output, {"x": x} | {theirs[own]: p for own, p in made.named_parameters()})


def network_of(fixture: dict[str, Tensor], positional: bool) -> nn.Module:
    """The network with the authors' weights; their additional node is the last one, ours is the first."""
    weights = {name.removeprefix("weight_"): x for name, x in fixture.items() if name.startswith("weight_")}
    model = network(5, positional=positional, dim=8, heads=2, layers=2).double()
    parts = {"embedding.projection": "encoding", "head": "decoding", "value": "attn_v_proj", "output": "attn_o_proj"}
    found = {}
    for own in model.state_dict():
        *path, kind = own.split(".")
        if path[0] != "blocks":
            found[own] = weights[f"{parts['.'.join(path)]}_{kind}"]
            continue
        layer = f"transformer_layers_{path[1]}_"
        if path[2] == "network":
            found[own] = weights[f"{layer}mlp_mlp_{path[3]}_{kind}"]
        elif path[3] in parts:
            found[own] = weights[f"{layer}{parts[path[3]]}_{kind}"]
        else:
            both = weights[f"{layer}attn_qk_proj_{kind}"]  # for each head, first queries, then keys
            apart = both.unflatten(0, (2, 2, -1))
            found[own] = both if positional else apart[:, int(path[3] == "key")].flatten(0, 1)
    read_positions = [
        n for n in found if n.startswith("blocks" if positional else "embedding") and n.endswith("projection.weight")
    ]
    for own in read_positions:
        rest, columns = found[own][:, :-6], found[own][:, -6:]
        found[own] = torch.cat([rest, columns.roll(1, -1)], -1)
    model.load_state_dict(found)
    return model


@pytest.mark.parametrize("name", ["positional", "standard"])
def test_the_networks_equal_the_authors_at_full_and_shorter_lengths(name):
    fixture = load(f"positional_attention_network_{name}")
    model = network_of(fixture, name == "positional")
    x = fixture["x"].requires_grad_()
    output = answers(model, x)
    check_recorded(fixture, output, {"x": x})
    close(answers(model, fixture["x_short"]), fixture["out_short"])
