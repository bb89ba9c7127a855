"""Tests specific to Transformer-XL: segments, distances, where gradients stop, its state, and parity."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from support import WANT_STATE, calls, close, cut, load, read_in_pieces, refused
from torch import Tensor

from regard.contract import Pattern
from regard.create import create_layer
from regard.mechanisms.transformer_xl import MECHANISM, share_biases
from regard.models import LanguageModel, LanguageModelConfig
from regard.workbench.verification.subjects import Subject

OPTIONS: list[dict[str, Any]] = [
    {"segment": 4, "memory": 6},
    {"segment": 5, "memory": 0},
    {"segment": 1, "memory": 3},
    {"segment": 3, "memory": 7, "clamp": 2},
    {"segment": 8, "memory": 3, "clamp": 0},
]
SELF = ["causal-self", "noncausal-self"]
run = calls(MECHANISM)
inputs = Subject(MECHANISM, Pattern.CAUSAL_SELF).inputs


def make(**options: Any) -> torch.nn.Module:
    return create_layer("transformer_xl", 8, 2, **{"segment": 4, "memory": 6, **options}).double()


def joined(gradients: Iterable[Tensor]) -> Tensor:
    """Join gradients into one vector, since some are 0 up to rounding."""
    return torch.cat([x.flatten() for x in gradients])


def seen(options: dict, pattern: str, i: int, n: int) -> range:
    """The tokens that token i sees, by the definition in words."""
    begin = i // options["segment"] * options["segment"]
    last = i if pattern == "causal-self" else min(begin + options["segment"], n) - 1
    return range(max(0, begin - options["memory"]), last + 1)


def in_words(tensors: dict[str, Tensor], options: dict, pattern: str) -> Tensor:
    """The weights, query by query and key by key."""
    q, k = tensors["q"], tensors["k"]
    n = q.shape[2]
    weights = torch.zeros(*q.shape[:2], n, n, dtype=q.dtype)
    for i in range(n):
        keys, scores = seen(options, pattern, i, n), []
        for j in keys:
            score = ((q[:, :, i] + tensors.get("u", 0)) * k[:, :, j]).sum(-1)
            if "relative" in tensors:
                width, most = tensors["relative"].shape[1], options.get("clamp", 1000)
                turns = max(-most, min(i - j, most)) / 10_000 ** (torch.arange(0, width, 2).double() / width)
                far = torch.einsum("c,hcd->hd", torch.cat([turns.sin(), turns.cos()]), tensors["relative"])
                score = score + ((q[:, :, i] + tensors.get("w", 0)) * far).sum(-1)
            scores.append(score / q.shape[3] ** 0.5)
        weights[:, :, i, keys.start : keys.stop] = torch.stack(scores, -1).softmax(-1)
    return weights


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("pattern", SELF)
@pytest.mark.parametrize("names", [("q", "k", "v"), ("q", "k", "v", "u", "w", "relative")], ids=str)
def test_equals_its_definition(options, pattern, names):
    for n in (1, 13, 26):
        tensors = {name: x for name, x in inputs(n).items() if name in names}
        expected = in_words(tensors, options, pattern)
        for form in ("reference", None):
            close(run(tensors, options, pattern=pattern, form=form).output, expected @ tensors["v"], 1e-11)
        close(run(tensors, options, pattern=pattern, want={"weights"}).extras["weights"], expected, 1e-11)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("start", [0, 4, 6, 7])
def test_gradients_of_what_later_segments_read_go_where_they_are_told(options, start):
    """`k_past` and `v_past` get gradients from later segments, k and v from their own, with and without a state."""
    tokens = ("q", "k", "v", "k_past", "v_past")
    tensors = inputs(17)
    tensors |= {f"{name}_past": tensors[name].clone() for name in "kv"}
    state = None
    if start:
        state = run(cut(tensors, slice(0, start), tokens), options, return_state=True).state
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    rest = {name: x.detach().requires_grad_() for name, x in cut(leaves, slice(start, None), tokens).items()}
    expected = run(leaves, options, form="reference").output[:, :, start:]
    found = run(rest, options, state=state).output
    close(found, expected, 1e-11)
    weight = torch.randn_like(expected)
    gradients, wanted = (
        torch.autograd.grad(x, list(y.values()), weight, materialize_grads=True)
        for x, y in ((found, rest), (expected, leaves))
    )
    wanted = cut(dict(zip(leaves, wanted, strict=True)), slice(start, None), tokens).values()
    close(joined(gradients), joined(wanted), 1e-11)


@pytest.mark.parametrize("training", [True, False])
def test_in_training_no_gradient_passes_into_an_earlier_segment(training):
    layer = make().train(training)
    x = torch.randn(1, 14, 8, dtype=torch.float64, requires_grad=True)
    output = layer(x).output
    for i in (0, 3, 4, 9, 13):
        (gradient,) = torch.autograd.grad(output[0, i].sum(), x, retain_graph=True)
        reached = (gradient[0].abs().sum(-1) > 0).nonzero()[:, 0].tolist()
        first = i // 4 * 4
        assert reached == list(range(first if training else max(0, first - 6), i + 1))
    changed = x.detach().clone()
    changed[:, 4] += 1
    different = ((layer(changed).output - output).abs().sum(-1)[0] > 1e-9).nonzero()[:, 0].tolist()
    assert different == list(range(4, 12))  # values reach as far as the memory does


@pytest.mark.parametrize("sizes", [[4] * 5, [0, 8, 0, 12], [20], [5, 3, 1, 11]], ids=str)
def test_training_a_segment_at_a_time_is_training_on_the_whole(sizes):
    """A call that ends inside a segment cuts the segment's gradient; weights still learn from the memory across calls."""
    layer = make(bias=True)
    x, weight = torch.randn(2, 2, 20, 8, dtype=torch.float64)
    whole = layer(x).output
    expected = torch.autograd.grad((whole * weight).sum(), list(layer.parameters()))
    state, outputs = None, []
    for part in torch.arange(20).split(sizes):
        result = layer(x[:, part], context=WANT_STATE, state=state)
        (result.output * weight[:, part]).sum().backward()
        outputs.append(result.output.detach())
        state = result.state
        assert not any(t.requires_grad for t in state.tensors().values())
    close(torch.cat(outputs, 1), whole, 1e-11)
    found = joined(p.grad for p in layer.parameters())
    close(found, joined(expected), 1e-11)


def test_in_training_the_memory_is_projected_by_the_weights_of_now():
    layer, x = make(memory=4), torch.randn(1, 8, 8, dtype=torch.float64)
    state = layer(x[:, :4], context=WANT_STATE).state
    evaluated = layer.eval()(x[:, :4], context=WANT_STATE).state
    with torch.no_grad():
        layer.key.weight.mul_(-1)
        layer.value.weight.add_(0.1)
    whole = layer(x).output[:, 4:]
    close(layer.train()(x[:, 4:], state=state).output, whole, 1e-11)
    assert not torch.allclose(layer.eval()(x[:, 4:], state=evaluated).output, whole)


def test_a_state_without_inputs_is_refused_in_training():
    layer, x = make(), torch.randn(1, 3, 8, dtype=torch.float64)
    state = layer.eval()(x, context=WANT_STATE).state
    refused("begun in evaluation mode", lambda: layer.train()(x, state=state))
    convolved = make(short_convolution=3)
    refused("short convolutions", convolved, x, state=convolved(x, context=WANT_STATE).state)


def model_of(*plan: dict) -> LanguageModel:
    plan = [("transformer_xl", options) for options in plan]
    return LanguageModel(LanguageModelConfig(vocab_size=11, dim=16, num_heads=2, plan=plan)).double()


def test_layers_of_a_model_may_share_biases():
    model = model_of({}, {})
    assert model.positions is None
    before = len(list(model.parameters()))
    assert share_biases(model) is model
    assert len(list(model.parameters())) == before - 2
    first, second = (block.mixer.projection for block in model.blocks)
    assert first.u is second.u and first.w is second.w and first.relative is not second.relative
    refused("equal heads", share_biases, model_of({}, {"num_heads": 4}))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("equal", {"segment": 5, "memory": 5}),
        ("longer_memory", {"segment": 4, "memory": 7}),
        ("clamped", {"segment": 6, "memory": 3, "clamp": 4}),
    ],
)
@pytest.mark.parametrize("in_segments", [False, True])
def test_parity_with_the_authors_code(name, options, in_segments):
    arrays = load(f"transformer_xl_{name}")
    layer = create_layer("transformer_xl", 12, 2, **options).double()
    weights = dict(zip(("query.weight", "key.weight", "value.weight"), arrays["weight_qkv"].chunk(3), strict=True))
    weights |= {"output.weight": arrays["weight_o"], "projection.u": arrays["u"], "projection.w": arrays["w"]}
    weights["projection.relative"] = arrays["weight_r"].view(2, 6, 12).mT
    layer.load_state_dict(weights)
    x = arrays["x"].requires_grad_()
    output, _ = read_in_pieces(layer, x, options["segment"] if in_segments else x.shape[1])
    close(output, arrays["out"], 1e-11)
    (output * arrays["grad_out"]).sum().backward()
    found = {
        "x": x.grad,
        "qkv": torch.cat([layer.query.weight.grad, layer.key.weight.grad, layer.value.weight.grad]),
        "o": layer.output.weight.grad,
        "r": layer.projection.relative.grad.mT.flatten(0, 1),
        "u": layer.projection.u.grad,
        "w": layer.projection.w.grad,
    }
    for kind, gradient in found.items():
        close(gradient, arrays[f"grad_{kind}"], 1e-11)


@pytest.mark.parametrize("pattern", ["causal", "noncausal"])
def test_parity_with_xlnet_of_transformers(pattern):
    arrays = load(f"transformer_xl_xlnet_{pattern}")
    layer = create_layer("transformer_xl", 12, 2, pattern=f"{pattern}-self", segment=5, memory=8).double()
    names = {"query": "q", "key": "k", "value": "v"}
    weights = {f"{kind}.weight": arrays[f"weight_{letter}"].flatten(1).T for kind, letter in names.items()}
    weights |= {"output.weight": arrays["weight_o"].flatten(1), "projection.u": arrays["u"]}
    weights |= {"projection.w": arrays["w"], "projection.relative": arrays["weight_r"].transpose(0, 1)}
    layer.load_state_dict(weights)
    x = arrays["x"].requires_grad_()
    output = layer(x).output
    close(output, arrays["out"], 1e-11)
    (output * arrays["grad_out"]).sum().backward()
    close(x.grad, arrays["grad_x"], 1e-11)
    for kind, letter in names.items():
        close(getattr(layer, kind).weight.grad.T, arrays[f"grad_{letter}"].flatten(1), 1e-11)
    close(layer.projection.relative.grad, arrays["grad_r"].transpose(0, 1), 1e-11)


def test_inputs_that_do_not_go_together_are_refused():
    tensors = inputs(5)
    refused("both or none", run, tensors | {"k_past": tensors["k"]})
    refused("without relative", run, {name: x for name, x in tensors.items() if name != "relative"})
    state = run(tensors, return_state=True).state
    refused("a query for each key", run, tensors | {"q": tensors["q"][:, :, :3]}, state=state)
    refused("rotary positions with transformer_xl", make, positions="rotary")
