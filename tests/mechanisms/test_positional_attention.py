"""What is peculiar to positional attention: weights that no content reaches, closed forms, tables and encodings, hybrid heads,
the paper's network, and parity with the authors' layer and networks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from regard.apply import absorb, apply
from regard.contract import ALL_PATTERNS, BlockMask, Context, Mask, Shape, Unsupported
from regard.core.visibility import DistanceBias
from regard.create import create_layer
from regard.functional import positional_attention, softmax_attention
from regard.layers.parts import LayerCall
from regard.mechanisms.positional_attention import MECHANISM, Config, cost
from regard.mechanisms.positional_attention import forms as module
from regard.positions import Sinusoidal
from regard.reproductions.positional_attention import TASKS, AlgorithmicNetwork, draw
from regard.workbench.subjects import Subject

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"


def load(name: str) -> dict[str, Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def inputs(n: int, m: int | None = None, rows: int = 20, heads: int = 2) -> dict[str, Tensor]:
    shapes = {
        "query_map": (heads, 6, 4),
        "key_map": (heads, 6, 4),
        "v": (3, heads, n if m is None else m, 5),
        "query_bias": (heads, 4),
        "encodings": (rows, 6),
    }
    found = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return found | ({} if m is None else {"slots": torch.zeros(3, n, dtype=torch.long)})


def run(tensors: dict[str, Tensor], pattern: str = "noncausal-self", **call: Any) -> Any:
    return apply(MECHANISM, tensors, pattern=pattern, **call)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def content(tensors: dict[str, Tensor], n: int, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Encodings as queries and keys of softmax attention; query i has the position first + i."""
    encodings, v = tensors["encodings"], tensors["v"]
    queries = encodings[first : first + n] @ tensors["query_map"] + tensors["query_bias"][:, None]
    bias = torch.randn(2, 1, 4, dtype=torch.float64)  # of keys: it changes nothing
    keys = encodings[: v.shape[2]] @ tensors["key_map"] + bias
    return queries.expand(3, -1, -1, -1), keys.expand(3, -1, -1, -1), v


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_it_is_softmax_attention_with_encodings_in_place_of_content(pattern):
    for n, m in ((9, None), (6, 13)) if pattern != "noncausal-self" else ((9, None),):
        tensors = inputs(n, m)
        first = 0 if m is None or pattern.cross else m - n
        expected = softmax_attention(*content(tensors, n, first), pattern=pattern)
        for form in ("parallel", "reference"):
            found = run(tensors, pattern, form=form)
            close(found.output, expected if not pattern.cross or m is not None else expected[:, :, :1])


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_a_weight_depends_on_no_value_and_an_output_is_linear_in_them(pattern):
    tensors = inputs(7, 7)
    other = torch.randn_like(tensors["v"])
    found = [run(tensors | {"v": v}, pattern, want={"weights"}).extras["weights"] for v in (tensors["v"], other)]
    assert torch.equal(*found) and torch.equal(found[0][0], found[0][1])
    mixed = run(tensors | {"v": 2 * tensors["v"] - 3 * other}, pattern).output
    close(mixed, 2 * run(tensors, pattern).output - 3 * run(tensors | {"v": other}, pattern).output)


def test_maps_of_zero_give_the_mean_and_running_sums_after_counting():
    tensors = inputs(9)
    tensors |= {name: torch.zeros_like(tensors[name]) for name in ("query_map", "query_bias")}
    mean = tensors["v"].mean(2, keepdim=True).expand(-1, -1, 9, -1)
    close(run(tensors).output, mean)
    count = torch.arange(1.0, 10, dtype=torch.float64)[:, None]
    close(count * run(tensors, "causal-self").output, tensors["v"].cumsum(2))


def test_tokens_move_with_their_rows_and_not_without():
    tensors, order = inputs(8, rows=8), torch.randperm(8)
    moved = {"v": tensors["v"][:, :, order]}
    rows = {"encodings": tensors["encodings"][order]}
    expected = run(tensors).output[:, :, order]
    close(run(tensors | moved | rows).output, expected)
    assert (run(tensors | moved).output - expected).abs().max() > 1e-2


def test_one_weight_matrix_serves_all_rows(monkeypatch):
    """Only what differs between rows goes to the engine, which computes a matrix for each."""
    calls = []
    engine = module.attention
    monkeypatch.setattr(module, "attention", lambda *args, **options: calls.append(1) or engine(*args, **options))
    tensors, lengths = inputs(8), torch.tensor([8, 3, 0])
    for pattern in ("noncausal-self", "causal-self"):
        run(tensors, pattern)
    run(tensors, "causal-self", mask=Mask(lengths=lengths))
    run(inputs(5, 8), "noncausal-cross")
    assert not calls
    run(tensors, mask=Mask(lengths=lengths))
    run(tensors, dropout=0.5)
    run(tensors, mask=Mask(bias=torch.zeros(1, 1, 8, 8, dtype=torch.float64)))
    assert len(calls) == 3
    shape = Shape(1, 2, 8, 8, 4, 5)
    more = Shape(10, 2, 8, 8, 4, 5)
    assert cost(more, Config()).flops <= 6 * cost(shape, Config()).flops


@pytest.mark.parametrize("pattern", ["noncausal-self", "causal-self", "noncausal-cross"])
def test_weights_that_are_stored_and_weights_that_are_made_again_agree(pattern, monkeypatch):
    tensors = inputs(9, 9)
    leaves = {name: x.requires_grad_() for name, x in tensors.items() if x.is_floating_point()}
    found = []
    for most in (0, 81):
        monkeypatch.setattr(module, "SHARED_PAIRS", most)
        output = run(tensors, pattern).output
        found.append((output, *torch.autograd.grad(output.square().sum(), list(leaves.values()))))
    for made, stored in zip(*found, strict=True):
        close(made, stored)


@pytest.mark.parametrize("pattern", ["noncausal-self", "causal-self"])
def test_positions_are_ranks_of_valid_tokens(pattern):
    tensors = inputs(12)
    valid = torch.rand(3, 12) > 0.4
    valid[2] = False
    padded = tensors | {"v": tensors["v"].masked_fill(~valid[:, None, :, None], torch.nan)}
    found = run(padded, pattern, mask=Mask(valid=valid)).output
    for row in range(3):
        own = tensors | {"v": tensors["v"][row : row + 1, :, valid[row]]}
        close(found[row : row + 1, :, valid[row]], run(own, pattern).output)
    # the weights that all rows share are not those of the first, which may be the shortest
    short_first = Mask(lengths=torch.tensor([2, 12, 7]))
    close(run(tensors, pattern, mask=short_first).output[1], run(tensors, pattern).output[1])


@pytest.mark.parametrize("options", [{}, {"encoding": "learned"}, {"content_heads": 1}])
@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_gradients_reach_the_maps_even_from_one_row(pattern, options):
    subject = Subject(MECHANISM, pattern, options)
    tensors = subject.inputs(4, batch=1, d=3, v=2)
    leaves = {name: x.requires_grad_() for name, x in tensors.items() if x.is_floating_point()}

    def function(*given: Tensor) -> Tensor:
        return subject.run(tensors | dict(zip(leaves, given, strict=True))).output

    for gradient in torch.autograd.grad(function(*leaves.values()).square().sum(), list(leaves.values())):
        assert (gradient != 0).any()
    small = {name: x[:8].detach().requires_grad_() if name == "encodings" else x for name, x in leaves.items()}
    assert torch.autograd.gradcheck(function, list(small.values()))


def test_the_state_holds_values_alone():
    state = run(inputs(15), "causal-self", return_state=True).state
    assert state.k.numel() == 0
    assert state.v[:1].numel() == cost(Shape(1, 2, 1, 15, 4, 5), Config()).state


def test_a_memory_may_stream_and_its_queries_are_counted_on():
    tensors = inputs(9, 14)
    whole = run(tensors, "causal-cross").output
    state = None
    for part in torch.arange(14).split([3, 11]):
        state = absorb(MECHANISM, {"v": tensors["v"][:, :, part]}, pattern="causal-cross", state=state)
    outputs = []
    for part in torch.arange(9).split([1, 1, 5, 2]):
        queries = tensors | {"v": None, "slots": tensors["slots"][:, part]}
        result = run(queries, "causal-cross", state=state)
        state = result.state
        outputs.append(result.output)
    close(torch.cat(outputs, 2), whole)


# hybrid heads


def test_content_heads_come_last_and_see_their_own_biases():
    tensors = inputs(8, heads=3)
    alone = {name: x[:2] if name.startswith("query") or name == "key_map" else x for name, x in tensors.items()}
    alone["v"] = tensors["v"][:, :2]
    q, k = torch.randn(2, 3, 1, 8, 6, dtype=torch.float64)
    hybrid = alone | {"v": tensors["v"], "content_query": q, "content_key": k}
    bias = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    blocks = BlockMask(torch.rand(1, 3, 4, 4) > 0.3, 2)
    for mask in (Mask(), Mask(bias=bias), Mask(blocks=blocks)):
        found = run(hybrid, mask=mask, want={"weights"})

        def own(heads: slice, mask: Mask = mask) -> Mask:
            visible = None if mask.blocks is None else BlockMask(mask.blocks.visible[:, heads], 2)
            return Mask(bias=None if mask.bias is None else mask.bias[:, heads], blocks=visible)

        close(found.output[:, :2], run(alone, mask=own(slice(0, 2))).output)
        expected = softmax_attention(q, k, tensors["v"][:, 2:], pattern="noncausal-self", mask=own(slice(2, 3)))
        close(found.output[:, 2:], expected)
        close(found.extras["weights"] @ tensors["v"], found.output)


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
        close(run(tensors | {"encodings": None}, pattern).output, run(tensors | {"encodings": waves}, pattern).output)
    learned = layer(encoding="learned", encoding_dim=6)
    learned(torch.randn(2, 5, 16, dtype=torch.float64)).output.square().sum().backward()
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


def test_a_layers_maps_are_those_of_one_linear_for_queries_and_keys():
    made = layer(encoding="one_hot").projection
    nn.init.normal_(made.bias)
    product = nn.functional.linear(made.encodings(), made.weight, made.bias).view(10, 4, 20).transpose(0, 1)
    heads = made.inputs({}, LayerCall(None, None, Context()))
    close(heads["query_map"] + heads["query_bias"][:, None], product[..., :10])
    queries, keys = product.split(10, -1)
    a = (queries @ keys.mT / math.sqrt(10)).softmax(-1)
    v = torch.randn(1, 4, 10, 3, dtype=torch.float64)
    close(run(heads | {"v": v}).output, a @ v)


def test_no_input_reaches_the_weights_of_a_layer():
    made, x = layer(), torch.randn(2, 8, 16, dtype=torch.float64, requires_grad=True)
    want = Context(want=frozenset({"weights"}))
    weights = made(x, context=want).extras["weights"]
    assert torch.equal(weights, made(torch.randn_like(x), context=want).extras["weights"])
    (gradient,) = torch.autograd.grad(weights.square().sum(), x, allow_unused=True)
    assert gradient is None
    hybrid = layer(content_heads=1)(x, context=want).extras["weights"]
    (gradient,) = torch.autograd.grad(hybrid[:, 3].square().sum(), x)
    assert gradient.any()


def test_positions_without_an_encoding_are_refused_and_sinusoids_have_all():
    made = layer("causal-self", encoding="one_hot")
    x = torch.randn(1, 11, 16, dtype=torch.float64)
    with pytest.raises(Unsupported, match="try max_length=11"):
        made(x)
    state = made(x[:, :10], context=Context(want=frozenset({"state"}))).state
    with pytest.raises(Unsupported, match="position 10"):
        made.step(x[:, 10], state)
    assert layer("causal-self")(torch.randn(1, 300, 16, dtype=torch.float64)).output.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [{"encoding": "rotary"}, {"max_length": 0}, {"encoding_dim": 0}, {"key_width": "head"}, {"content_heads": -1}],
)
def test_bad_options_are_refused(options):
    with pytest.raises(Unsupported):
        Config(**options)


def test_what_does_not_fit_is_refused():
    with pytest.raises(Unsupported, match="content_heads=4 of 4"):
        layer(content_heads=4)
    with pytest.raises(Unsupported, match="split"):
        layer(encoding="one_hot", key_width="split")
    tensors = inputs(5)
    with pytest.raises(Unsupported, match="2 positional heads, 1 of content and 2 of values"):
        run(tensors | {"content_query": torch.zeros(3, 1, 5, 4), "content_key": torch.zeros(3, 1, 5, 4)})
    with pytest.raises(Unsupported, match="rotary positions"):
        layer(positions="rotary")
    with pytest.raises(Unsupported, match="max_length=5"):
        positional_attention(**tensors | {"encodings": tensors["encodings"][:4]})


# the paper's network


def test_the_network_has_the_parameters_of_the_papers():
    counts = [sum(p.numel() for p in AlgorithmicNetwork(8, positional=p).parameters()) for p in (True, False)]
    assert counts == [84_577, 150_273]


@torch.no_grad()
def growth_error(model: nn.Module) -> float:
    """How far f(10 x) is from 10 f(x)."""
    x = torch.randn(4, 8)
    return float((model(10 * x) - 10 * model(x)).abs().max() / model(x).abs().max())


def test_without_biases_the_positional_network_scales_with_its_input_and_the_standard_one_does_not():
    for positional in (True, False):
        error = growth_error(AlgorithmicNetwork(8, positional=positional, bias=False))
        assert (error < 1e-4) == positional


class WithPositionsInValues(nn.Module):
    """An attention layer that reads x + P, of which only its values see anything."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Any:
        return self.mixer(x + torch.eye(*x.shape[1:], dtype=x.dtype))


class ResidualWithNorm(nn.Module):
    """x + LN(y) in place of MLP([x ; y])."""

    def __init__(self, _: nn.Module) -> None:
        super().__init__()

    def forward(self, both: Tensor) -> Tensor:
        x, y = both.chunk(2, -1)
        return x + nn.functional.layer_norm(y, y.shape[-1:])


class Residual(ResidualWithNorm):
    """x + y."""

    def forward(self, both: Tensor) -> Tensor:
        return sum(both.chunk(2, -1))


@pytest.mark.parametrize(
    ("part", "changed", "scales"),
    [
        ("mixers", WithPositionsInValues, False),
        ("forwards", ResidualWithNorm, False),
        ("forwards", Residual, True),  # so that it is the norm
    ],
)
def test_positions_in_the_values_and_a_norm_each_destroy_the_scaling_of_the_positional_network(part, changed, scales):
    model = AlgorithmicNetwork(8, positional=True, bias=False)
    setattr(model, part, nn.ModuleList(changed(module) for module in getattr(model, part)))
    error = growth_error(model)
    assert error < 1e-4 if scales else error > 1e-2


def test_shorter_inputs_take_the_first_rows():
    model = AlgorithmicNetwork(8, positional=True)
    assert model(torch.randn(3, 5)).shape == (3, 5)


def test_targets_and_test_ranges_are_those_of_the_paper():
    x = draw(200, 8, 6.0, torch.Generator().manual_seed(1))
    for name, expected in (("min", min), ("sum", sum)):
        for row in range(3):
            wanted = torch.stack([torch.tensor(float(expected(x[row, : i + 1].tolist()))) for i in range(8)])
            torch.testing.assert_close(TASKS[name](x)[row], wanted)
    assert TASKS["sort"](x)[0].tolist() == sorted(x[0].tolist())
    assert x.abs().max() <= 6.0 and draw(500, 8, 2.0, torch.Generator()).abs().max() <= 2.0
    # bounds inside [-2, 2] would give rows inside; rows with a bound outside are inside only by chance
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
    close(output, fixture["out"])
    output.backward(fixture["grad_out"])
    close(x.grad, fixture["grad_x"])
    for own, parameter in made.named_parameters():
        close(parameter.grad, fixture[f"grad_{theirs[own]}"])


def network_of(fixture: dict[str, Tensor], positional: bool) -> AlgorithmicNetwork:
    """The network with the authors' weights: their additional node is the last one, here it is the first."""
    weights = {name.removeprefix("weight_"): x for name, x in fixture.items() if name.startswith("weight_")}
    model = AlgorithmicNetwork(5, positional=positional, dim=8, heads=2, layers=2).double()
    parts = {"embedding": "encoding", "head": "decoding", "value": "attn_v_proj", "output": "attn_o_proj"}
    found = {}
    for own in model.state_dict():
        *path, kind = own.split(".")
        if len(path) == 1:
            found[own] = weights[f"{parts[path[0]]}_{kind}"]
            continue
        layer = f"transformer_layers_{path[1]}_"
        if path[0] == "forwards":
            found[own] = weights[f"{layer}mlp_mlp_{path[2]}_{kind}"]
        elif path[2] in parts:
            found[own] = weights[f"{layer}{parts[path[2]]}_{kind}"]
        else:
            both = weights[f"{layer}attn_qk_proj_{kind}"]  # of each head, first for queries and then for keys
            apart = both.unflatten(0, (2, 2, -1))
            found[own] = both if positional else apart[:, int(path[2] == "key")].flatten(0, 1)
    read_positions = (
        [name for name in found if name.endswith("projection.weight")] if positional else ["embedding.weight"]
    )
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
    output = model(x)
    close(output, fixture["out"])
    output.backward(fixture["grad_out"])
    close(x.grad, fixture["grad_x"])
    close(model(fixture["x_short"]), fixture["out_short"])


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("stored", [True, False])
def test_padding_needs_no_encodings(pattern, stored, monkeypatch):
    monkeypatch.setattr(module, "SHARED_PAIRS", 81 if stored else 0)
    tensors = inputs(5, 5, rows=5)
    padded = {n: torch.nn.functional.pad(tensors[n], (0, 0, 0, 3)) for n in ("v", "slots")}
    padded["slots"] = torch.zeros(3, 8)
    lengths = torch.tensor([5, 3, 0])
    masks = {"mask": Mask(lengths=lengths)} | ({"memory_mask": Mask(lengths=lengths)} if pattern.cross else {})
    found = run(tensors | padded, pattern, **masks).output
    for row, length in enumerate(lengths.tolist()):
        alone = tensors | {
            "v": tensors["v"][row : row + 1, :, :length],
            "slots": tensors["slots"][row : row + 1, :length],
        }
        close(found[row, :, :length], run(alone, pattern).output[0])


@pytest.mark.parametrize("by_distance", [True, False])
def test_hybrid_heads_have_the_position_biases_of_their_own_heads(by_distance):
    n, table = 7, torch.randn(3, 13, dtype=torch.float64)
    tensors = inputs(n) | {
        name: torch.randn(3, 1, n, 4, dtype=torch.float64) for name in ("content_query", "content_key")
    }
    tensors["v"] = torch.randn(3, 3, n, 5, dtype=torch.float64)

    def told(heads: slice) -> Any:
        bias = DistanceBias(lambda distances: table[heads][:, distances + 6])
        return bias if by_distance else lambda i, j: bias(i, j)

    found = run(tensors, "causal-self", position_bias=told(slice(None))).output
    first = {n: x for n, x in tensors.items() if not n.startswith("content")} | {"v": tensors["v"][:, :2]}
    close(found[:, :2], run(first, "causal-self", position_bias=told(slice(2))).output)
    last = softmax_attention(
        tensors["content_query"], tensors["content_key"], tensors["v"][:, 2:], position_bias=told(slice(2, None))
    )
    close(found[:, 2:], last)
