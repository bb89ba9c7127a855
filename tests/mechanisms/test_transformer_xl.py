"""What is peculiar to Transformer-XL: its segments, distances, where gradients stop, its state, and parity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from regard.apply import apply
from regard.catalogue import get_mechanism
from regard.contract import Context, Mask, Pattern, Shape, Unsupported
from regard.create import create_layer
from regard.engines import segment_attention
from regard.mechanisms.transformer_xl import MECHANISM, Config, cost, sample_inputs, share_biases, visible_pairs
from regard.models import LanguageModel, LanguageModelConfig

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
OPTIONS = [
    {"segment": 4, "memory": 6},
    {"segment": 5, "memory": 0},
    {"segment": 1, "memory": 3},
    {"segment": 3, "memory": 7, "clamp": 2},
    {"segment": 8, "memory": 3, "clamp": 0},
]
STATE = Context(want=frozenset({"state"}))


def inputs(n: int, batch: int = 2, **sizes: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(int(torch.randint(1 << 30, ())))
    return sample_inputs(generator, batch=batch, n=n, m=n, dtype=torch.float64, sizes=sizes)


def run(tensors: dict[str, Tensor], options: dict, pattern: str = "causal-self", **call: Any) -> Tensor:
    return apply(MECHANISM, tensors, pattern=pattern, config=Config(**options), **call).output


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def seen(options: dict, pattern: str, i: int, n: int) -> range:
    """Tokens that token i sees, from the definition in words."""
    begin = i // options["segment"] * options["segment"]
    last = i if pattern == "causal-self" else min(begin + options["segment"], n) - 1
    return range(max(0, begin - options["memory"]), last + 1)


def expected(tensors: dict[str, Tensor], options: dict, pattern: str) -> Tensor:
    """Query by query, key by key."""
    q, k, v, u, w, relative = (tensors[name] for name in ("q", "k", "v", "u", "w", "relative"))
    batch, heads, n, d = q.shape
    width = relative.shape[1]
    outputs = torch.zeros(batch, heads, n, v.shape[-1], dtype=q.dtype)
    for i in range(n):
        keys = seen(options, pattern, i, n)
        scores = []
        for j in keys:
            most = options.get("clamp", 1000)
            turns = [max(-most, min(i - j, most)) / 10_000 ** (2 * c / width) for c in range(width // 2)]
            r = torch.from_numpy(np.concatenate([np.sin(turns), np.cos(turns)]))
            far = torch.einsum("c,hcd->hd", r, relative)
            score = ((q[:, :, i] + u) * k[:, :, j]).sum(-1) + ((q[:, :, i] + w) * far).sum(-1)
            scores.append(score / d**0.5)
        weights = torch.stack(scores, -1).softmax(-1)
        outputs[:, :, i] = torch.einsum("bhj,bhjv->bhv", weights, v[:, :, keys.start : keys.stop])
    return outputs


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
@pytest.mark.parametrize("n", [1, 4, 13, 26])
def test_equals_its_definition(options, pattern, n):
    tensors = inputs(n)
    for form in (None, "reference"):
        close(run(tensors, options, pattern, form=form), expected(tensors, options, pattern))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sizes", [[1] * 23, [23], [1, 7, 1, 0, 14], [8, 4, 8, 3], [2, 21]])
def test_decoding_equals_the_whole(options, sizes):
    """However a sequence is cut, at the borders of segments or not."""
    tensors, state, outputs = inputs(23), None, []
    for part in torch.arange(23).split(sizes):
        piece = {name: x[:, :, part] if name in "qkv" else x for name, x in tensors.items()}
        result = apply(MECHANISM, piece, state=state, return_state=True, config=Config(**options))
        outputs.append(result.output)
        state = result.state
    close(torch.cat(outputs, 2), run(tensors, options))
    kept = sum(x[0].numel() for name, x in state.tensors().items() if name != "length")
    assert kept == cost(Shape(1, 2, 1, 1000, 8, 6), Config(**options)).state


def test_rows_at_different_places_of_their_segments_go_on_alike():
    options, tensors = {"segment": 4, "memory": 5}, inputs(20, batch=3)
    lengths, names = torch.tensor([7, 4, 0]), ("q", "k", "v")
    head = {name: x[:, :, :7] if name in names else x for name, x in tensors.items()}
    state = apply(MECHANISM, head, mask=Mask(lengths=lengths), return_state=True, config=Config(**options)).state
    for more in (1, 3, 13):
        rest = {
            name: torch.stack([x[r, :, int(c) : int(c) + more] for r, c in enumerate(lengths)]) if name in names else x
            for name, x in tensors.items()
        }
        found = apply(MECHANISM, rest, state=state, config=Config(**options)).output
        whole = run(tensors, options)
        for row, count in enumerate(lengths.tolist()):
            close(found[row], whole[row, :, count : count + more])


def test_a_memory_of_everything_is_one_pass():
    tensors = inputs(30)
    close(run(tensors, {"segment": 4, "memory": 30}), run(tensors, {"segment": 30, "memory": 0}))


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_without_distances_a_memory_of_whole_segments_is_local_attention_by_blocks(pattern, blocks):
    tensors = {name: x for name, x in inputs(37).items() if name in "qkv"}
    found = run(tensors, {"segment": 5, "memory": 5 * blocks}, pattern)
    local = get_mechanism("local")
    if pattern == "causal-self":
        config = local.options(form="block", block=5, lookback=blocks)
        close(found, apply(local, tensors, config=config).output)
    else:  # blocks ahead are not seen, unlike there
        tokens = torch.arange(37) // 5
        ahead = tokens - tokens[:, None]
        bias = torch.zeros(1, 1, 37, 37, dtype=torch.float64).masked_fill((ahead > 0) | (ahead < -blocks), -torch.inf)
        close(found, apply(get_mechanism("softmax"), tensors, pattern=pattern, mask=Mask(bias=bias)).output)


def test_scores_know_distances_alone():
    """The same segment after the same memory gives the same, wherever it is."""
    options, tensors = {"segment": 4, "memory": 4}, inputs(8)
    repeated = {name: x.repeat(1, 1, 3, 1) if name in "qkv" else x for name, x in tensors.items()}
    found = run(repeated, options)
    close(found[:, :, 8 + 4 : 16], found[:, :, 4:8])
    assert not torch.allclose(found[:, :, 8:12], found[:, :, :4])  # which had no memory


@pytest.mark.parametrize("options", OPTIONS)
def test_weights_are_those_of_the_output(options):
    tensors = inputs(19)
    result = apply(MECHANISM, tensors, config=Config(**options), want={"weights"})
    weights = result.extras["weights"]
    close(weights @ tensors["v"], result.output)
    for i in range(19):
        visible = [j in seen(options, "causal-self", i, 19) for j in range(19)]
        assert ((weights[:, :, i] > 0) == torch.tensor(visible)).all()


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_long_sequences_are_read_in_parts_with_the_same_gradients(pattern, monkeypatch):
    tensors = {name: x.requires_grad_() for name, x in inputs(41).items()}
    options, found = {"segment": 4, "memory": 6}, []
    for most in (1 << 22, 300):
        monkeypatch.setattr(segment_attention, "PAIRS_AT_ONCE", most)
        output = run(tensors, options, pattern)
        found.append([output, *torch.autograd.grad(output.square().sum(), list(tensors.values()))])
    for one, other in zip(*found, strict=True):
        close(one, other)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cut", [0, 4, 6, 7])
def test_gradients_of_what_later_segments_read_go_where_they_are_told(options, cut):
    """`k_past` and `v_past` get those of later segments, k and v those of their own, with a state and without."""
    tensors = inputs(17)
    tensors |= {f"{name}_past": tensors[name].clone() for name in "kv"}
    tokens = ("q", "k", "v", "k_past", "v_past")
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    weight = torch.randn(2, 2, 17 - cut, 6, dtype=torch.float64)
    output = run(leaves, options, form="reference")[:, :, cut:]
    wanted = torch.autograd.grad((output * weight).sum(), list(leaves.values()), allow_unused=True)
    state = None
    if cut:
        head = {name: x[:, :, :cut] if name in tokens else x for name, x in tensors.items()}
        state = apply(MECHANISM, head, return_state=True, config=Config(**options)).state
    rest = {name: x[:, :, cut:] if name in tokens else x for name, x in tensors.items()}
    rest = {name: x.clone().requires_grad_() for name, x in rest.items()}
    found = torch.autograd.grad(
        (run(rest, options, state=state) * weight).sum(), list(rest.values()), allow_unused=True
    )
    for name, one, other in zip(rest, found, wanted, strict=True):
        other = torch.zeros_like(leaves[name]) if other is None else other
        one = torch.zeros_like(rest[name]) if one is None else one
        close(one, other[:, :, cut:] if name in tokens else other)


@pytest.mark.parametrize("training", [True, False])
def test_in_training_no_gradient_passes_into_an_earlier_segment(training):
    layer = create_layer("transformer_xl", 8, 2, segment=4, memory=6).double().train(training)
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
    assert different == list(range(4, 12))  # values pass on, as long as the memory lasts


def parameters_and_gradients(layer: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in layer.named_parameters()}


@pytest.mark.parametrize("sizes", [[4] * 5, [8, 12], [20], [5, 3, 1, 11]])
def test_training_a_segment_at_a_time_is_training_on_the_whole(sizes):
    """Where a call ends inside a segment, the segment's gradient ends there; weights learn from the memory across calls."""
    layer = create_layer("transformer_xl", 8, 2, segment=4, memory=6, bias=True).double()
    x, weight = torch.randn(2, 2, 20, 8, dtype=torch.float64)
    (layer(x).output * weight).sum().backward()
    whole = parameters_and_gradients(layer)
    layer.zero_grad()
    state, outputs = None, []
    for part in torch.arange(20).split(sizes):
        result = layer(x[:, part], context=STATE, state=state)
        (result.output * weight[:, part]).sum().backward()
        outputs.append(result.output.detach())
        state = result.state
        assert not any(t.requires_grad for t in state.tensors().values())
    close(torch.cat(outputs, 1), layer(x).output)
    found = parameters_and_gradients(layer)
    for name in whole:
        close(found[name], whole[name])


def test_in_training_the_memory_is_projected_by_the_weights_of_now():
    layer = create_layer("transformer_xl", 8, 2, segment=4, memory=4).double()
    x = torch.randn(1, 8, 8, dtype=torch.float64)
    state = layer(x[:, :4], context=STATE).state
    evaluated = layer.eval()(x[:, :4], context=STATE).state
    with torch.no_grad():
        layer.key.weight.mul_(-1)
        layer.value.weight.add_(0.1)
    whole = layer(x).output[:, 4:]
    close(layer.train()(x[:, 4:], state=state).output, whole)
    assert not torch.allclose(layer.eval()(x[:, 4:], state=evaluated).output, whole)


def test_a_state_without_inputs_is_refused_in_training():
    layer = create_layer("transformer_xl", 8, 2)
    x = torch.randn(1, 3, 8)
    state = layer.eval()(x, context=STATE).state
    with pytest.raises(Unsupported, match="begun in evaluation mode"):
        layer.train()(x, state=state)
    convolved = create_layer("transformer_xl", 8, 2, short_convolution=3)
    with pytest.raises(Unsupported, match="short convolutions"):
        convolved(x, state=convolved(x, context=STATE).state)


def test_short_convolutions_decode_and_learn():
    layer = create_layer("transformer_xl", 8, 2, segment=4, memory=6, short_convolution=3).double().eval()
    x = torch.randn(2, 15, 8, dtype=torch.float64)
    whole, state, outputs = layer(x).output, None, []
    for t in range(15):
        y, state = layer.step(x[:, t], state)
        outputs.append(y)
    close(torch.stack(outputs, 1), whole)


def test_a_model_decodes_past_its_memory_and_shares_biases():
    plan = [("transformer_xl", {"segment": 4, "memory": m}) for m in (5, 2)]
    model = LanguageModel(LanguageModelConfig(vocab_size=11, dim=16, num_heads=2, plan=plan)).double().eval()
    assert model.positions is None
    ids = torch.randint(11, (2, 6))
    assert torch.equal(model.generate(ids, 15), model.generate(ids, 15, use_state=False))
    before = len(list(model.parameters()))
    assert share_biases(model) is model
    assert len(list(model.parameters())) == before - 2
    first, second = (block.mixer.projection for block in model.blocks)
    assert first.u is second.u and first.w is second.w and first.relative is not second.relative
    plan = [("transformer_xl", {"num_heads": heads}) for heads in (2, 4)]
    with pytest.raises(Unsupported, match="equal heads"):
        share_biases(LanguageModel(LanguageModelConfig(vocab_size=11, dim=16, plan=plan)))


def test_weights_trained_with_a_short_memory_serve_a_longer_one():
    plans = ([("transformer_xl", {"segment": 4, "memory": memory})] * 2 for memory in (4, 12))
    short, long = (
        LanguageModel(LanguageModelConfig(vocab_size=11, dim=16, num_heads=2, plan=plan)).double() for plan in plans
    )
    long.load_state_dict(short.state_dict())
    ids = torch.randint(11, (2, 12))
    first, second = short.eval()(ids).output, long.eval()(ids).output
    close(first[:, :8], second[:, :8])
    assert not torch.allclose(first[:, 8:], second[:, 8:])


def test_information_travels_a_memory_further_with_each_layer():
    layers = [create_layer("transformer_xl", 8, 2, segment=4, memory=4).double().eval() for _ in range(3)]
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    changed = x.clone()
    changed[:, 3] += 1
    for count, last in ((1, 7), (2, 11), (3, 15)):
        one, other = x, changed
        for layer in layers[:count]:
            one, other = layer(one).output, layer(other).output
        assert ((one - other).abs().sum(-1)[0] > 1e-12).nonzero()[-1].item() == last


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n", [0, 1, 7, 12, 31])
def test_the_cost_counts_visible_pairs(options, n):
    config = Config(**options)
    pairs = sum(len(seen(options, "causal-self", i, n)) for i in range(n))
    assert visible_pairs(config, n) == pairs
    assert cost(Shape(2, 3, n, n, 4, 5), config).flops == 2 * 2 * 3 * 13 * pairs
    assert cost(Shape(2, 3, 1, n, 4, 5), config).step_flops == 2 * 2 * 3 * 13 * len(
        seen(options, "causal-self", n, n + 1)
    )


def test_dropout_keeps_the_mean():
    tensors = {name: x.expand(300, -1, -1, -1) if name in "qkv" else x for name, x in inputs(20, batch=1).items()}
    options = {"segment": 4, "memory": 6}
    exact = run(tensors, options)[0]
    dropped = run(tensors, options, dropout=0.3, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(dropped[0], dropped[1])
    assert (dropped.mean(0) - exact).abs().max() < 0.35 * exact.abs().max()
    assert torch.equal(dropped, run(tensors, options, dropout=0.3, generator=torch.Generator().manual_seed(0)))


def loaded(name: str) -> dict[str, Tensor]:
    with np.load(FIXTURES / f"transformer_xl_{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("equal", {"segment": 5, "memory": 5}),
        ("longer_memory", {"segment": 4, "memory": 7}),
        ("clamped", {"segment": 6, "memory": 3, "clamp": 4}),
    ],
)
@pytest.mark.parametrize("at_a_time", ["whole", "segments"])
def test_parity_with_the_authors_code(name, options, at_a_time):
    arrays = loaded(name)
    layer = create_layer("transformer_xl", 12, 2, **options).double()
    kinds = arrays["weight_qkv"].chunk(3)
    weights = {f"{kind}.weight": x for kind, x in zip(("query", "key", "value"), kinds, strict=True)}
    weights |= {"output.weight": arrays["weight_o"], "projection.u": arrays["u"], "projection.w": arrays["w"]}
    weights["projection.relative"] = arrays["weight_r"].view(2, 6, 12).mT
    layer.load_state_dict(weights)
    x = arrays["x"].requires_grad_()
    if at_a_time == "whole":
        output = layer(x).output
    else:
        state, outputs = None, []
        for part in x.split(options["segment"], 1):
            result = layer(part, context=STATE, state=state)
            outputs.append(result.output)
            state = result.state
        output = torch.cat(outputs, 1)
    close(output, arrays["out"])
    (output * arrays["grad_out"]).sum().backward()
    close(x.grad, arrays["grad_x"])
    close(torch.cat([layer.query.weight.grad, layer.key.weight.grad, layer.value.weight.grad]), arrays["grad_qkv"])
    close(layer.output.weight.grad, arrays["grad_o"])
    close(layer.projection.relative.grad.mT.flatten(0, 1), arrays["grad_r"])
    close(layer.projection.u.grad, arrays["grad_u"])
    close(layer.projection.w.grad, arrays["grad_w"])


@pytest.mark.parametrize("pattern", ["causal", "noncausal"])
def test_parity_with_xlnet_of_transformers(pattern):
    arrays = loaded(f"xlnet_{pattern}")
    layer = create_layer("transformer_xl", 12, 2, pattern=f"{pattern}-self", segment=5, memory=8).double()
    names = {"query": "q", "key": "k", "value": "v"}
    weights = {f"{kind}.weight": arrays[f"weight_{letter}"].flatten(1).T for kind, letter in names.items()}
    weights |= {"output.weight": arrays["weight_o"].flatten(1), "projection.u": arrays["u"]}
    weights |= {"projection.w": arrays["w"], "projection.relative": arrays["weight_r"].transpose(0, 1)}
    layer.load_state_dict(weights)
    x = arrays["x"].requires_grad_()
    output = layer(x).output
    close(output, arrays["out"])
    (output * arrays["grad_out"]).sum().backward()
    close(x.grad, arrays["grad_x"])
    for kind, letter in names.items():
        close(getattr(layer, kind).weight.grad.T, arrays[f"grad_{letter}"].flatten(1))
    close(layer.projection.relative.grad, arrays["grad_r"].transpose(0, 1))


@pytest.mark.parametrize("training", [True, False])
def test_empty_calls_leave_the_state_as_it_was(training):
    module = create_layer("transformer_xl", 8, 2, **OPTIONS[0]).double().train(training)
    x = torch.randn(2, 8, 8, dtype=torch.float64)
    state = module(x, context=STATE).state
    for before in (None, state):
        result = module(x[:, :0], context=STATE, state=before)
        assert result.output.shape == (2, 0, 8)
        close(module(x, state=result.state).output, module(x, state=before).output)
    assert module(x[:0]).output.shape == (0, 8, 8)


def test_what_it_lacks_is_refused_with_the_reason():
    for pattern in (Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS):
        with pytest.raises(Unsupported, match="no distance from a query"):
            create_layer("transformer_xl", 8, 2, pattern=pattern)
    for options in ({"segment": 0}, {"memory": -1}, {"clamp": -1}):
        with pytest.raises(Unsupported, match=next(iter(options))):
            Config(**options)
    with pytest.raises(Unsupported, match="rotary positions with transformer_xl"):
        create_layer("transformer_xl", 8, 2, positions="rotary")
    tensors = inputs(5)
    with pytest.raises(Unsupported, match="both or none"):
        run(tensors | {"k_past": tensors["k"]}, {})
    with pytest.raises(Unsupported, match="without relative"):
        run({name: x for name, x in tensors.items() if name != "relative"}, {})
    state = apply(MECHANISM, tensors, return_state=True).state
    with pytest.raises(Unsupported, match="a query for each key"):
        run(tensors | {"q": tensors["q"][:, :, :3]}, {}, state=state)
