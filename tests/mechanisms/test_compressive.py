"""What is peculiar to the Compressive Transformer: what it compresses and when, what learns, its state, and parity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from regard.apply import apply
from regard.catalogue import get_mechanism
from regard.contract import Context, Mask, Pattern, Shape, Unsupported
from regard.create import create_layer
from regard.engines import segment_attention
from regard.mechanisms.compressive import MECHANISM, Config, cost, sample_inputs, visible_pairs
from regard.models import LanguageModel, LanguageModelConfig

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
OPTIONS = [
    {"segment": 4, "memory": 6, "compressed": 3, "ratio": 2},
    {"segment": 4, "memory": 4, "compressed": 1, "ratio": 4},
    {"segment": 3, "memory": 3, "compressed": 4, "ratio": 1, "clamp": 3},
    {"segment": 6, "memory": 9, "compressed": 2, "ratio": 3},
]
STATE = Context(want=frozenset({"state"}))
COMPRESSIONS = ["conv", "mean", "max"]


def inputs(n: int, batch: int = 2, **sizes: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(int(torch.randint(1 << 30, ())))
    return sample_inputs(generator, batch=batch, n=n, m=n, dtype=torch.float64, sizes=sizes)


def run(tensors: dict[str, Tensor], options: dict, pattern: str = "causal-self", **call: Any) -> Tensor:
    return apply(MECHANISM, tensors, pattern=pattern, config=Config(**options), **call).output


def is_token(name: str) -> bool:
    return name[0] in "qkv"


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def layer(options: dict, **more: Any) -> torch.nn.Module:
    return create_layer("compressive", 8, 2, **options, **more).double()


def by_hand(module: torch.nn.Module, x: Tensor, options: dict) -> tuple[Tensor, Tensor]:
    """The outputs and the mean reconstruction loss as in the paper: queues of inputs, a segment after the other."""
    size, memory, slots, ratio = (options[name] for name in ("segment", "memory", "compressed", "ratio"))
    told = module.projection
    empty = x.detach()[:, :0]
    queue, compressed, outputs, squares = empty, empty, [], []

    def heads(linear: torch.nn.Module, y: Tensor, detached: bool = False) -> Tensor:
        weight = linear.weight.detach() if detached else linear.weight
        return (y @ weight.T).unflatten(-1, (2, 4)).transpose(1, 2)

    for h in x.split(size, 1):
        seen = torch.cat([compressed, queue, h], 1)
        n, m = h.shape[1], seen.shape[1]
        q, k, v = heads(module.query, h), heads(module.key, seen), heads(module.value, seen)
        distance = torch.arange(n)[:, None] + m - n - torch.arange(m)
        turns = distance.clamp(max=options.get("clamp"))[..., None] if "clamp" in options else distance[..., None]
        turns = turns * 10_000.0 ** (-torch.arange(0, 8, 2).double() / 8)
        rows = torch.einsum("ijc,hcd->hijd", torch.cat([turns.sin(), turns.cos()], -1), told.relative)
        scores = (q + told.u[:, None]) @ k.mT + torch.einsum("bhid,hijd->bhij", q + told.w[:, None], rows)
        weights = (scores / 2).masked_fill(distance < 0, -torch.inf).softmax(-1)
        outputs.append(module.output((weights @ v).transpose(1, 2).flatten(2)))
        queue = torch.cat([queue, h.detach()], 1)
        old = queue[:, : max(0, queue.shape[1] - memory)]
        queue = queue[:, old.shape[1] :]
        if old.shape[1] == 0:
            continue
        groups = old.unflatten(1, (-1, ratio))
        if options.get("compression", "conv") == "conv":
            new = told.convolution(groups.flatten(2))
        else:
            new = groups.mean(2) if options["compression"] == "mean" else groups.amax(2)
        compressed = torch.cat([compressed, new.detach()], 1)[:, -slots:]
        q = q.detach()
        read = []
        for source in (old, new):
            k, v = heads(module.key, source, True), heads(module.value, source, True)
            read.append((q @ k.mT / 2).softmax(-1) @ v)
        squares.append((read[0] - read[1]).square())
    return torch.cat(outputs, 1), torch.cat(squares, 2).mean() if squares else x.new_zeros(())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
@pytest.mark.parametrize("n", [1, 4, 13, 37])
def test_forms_equal_the_definition(options, pattern, n):
    tensors = inputs(n)
    close(run(tensors, options, pattern), run(tensors, options, pattern, form="reference"))


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n", [24, 36])
def test_a_layer_equals_queues_of_inputs(options, compression, n):
    options = options | {"compression": compression}
    module, x = layer(options), torch.randn(2, n, 8, dtype=torch.float64)
    output, loss = by_hand(module, x, options)
    result = module(x)
    close(result.output, output)
    close(module.eval()(x).output, output)
    if compression == "conv":
        total, count = result.losses["reconstruction"]
        close(total / count, loss)
    else:
        assert result.losses == {}


@pytest.mark.parametrize("options", OPTIONS)
def test_a_layer_learns_as_queues_of_inputs_do(options):
    """The task's gradient stops at the memory and at f_c, that of the reconstruction reaches f_c alone."""
    module, x = layer(options), torch.randn(2, 24, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 24, 8, dtype=torch.float64)
    leaves = {"x": x, **dict(module.named_parameters())}
    result = module(x)
    total, count = result.losses["reconstruction"]
    found = []
    for output, loss in (by_hand(module, x, options), (result.output, total / count)):
        for learned in ((output * weight).sum(), loss):
            found.append(torch.autograd.grad(learned, list(leaves.values()), retain_graph=True, allow_unused=True))
    for name, task, own, found_task, found_own in zip(leaves, *found, strict=True):
        learns, other = (own, task) if "convolution" in name else (task, own)
        found_learns, found_other = (found_own, found_task) if "convolution" in name else (found_task, found_own)
        close(found_learns, learns)
        assert other is None and found_other is None


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sizes", [[1] * 37, [37], [1, 7, 1, 0, 28], [12, 24, 1], [2, 35]])
def test_decoding_equals_the_whole(options, sizes):
    """However a sequence is cut, at the borders of segments or not; the layer too, with the inputs of open groups."""
    tensors, state, outputs = inputs(37), None, []
    for part in torch.arange(37).split(sizes):
        piece = {name: t[:, :, part] if is_token(name) else t for name, t in tensors.items()}
        result = apply(MECHANISM, piece, state=state, return_state=True, config=Config(**options))
        outputs.append(result.output)
        state = result.state
    close(torch.cat(outputs, 2), run(tensors, options))
    kept = sum(t[0].numel() for name, t in state.tensors().items() if name != "length")
    assert kept == cost(Shape(1, 2, 1, 1000, 8, 6), Config(**options)).state
    module, x, state, outputs = layer(options).eval(), torch.randn(2, 37, 8, dtype=torch.float64), None, []
    for part in x.split(sizes, 1):
        result = module(part, context=STATE, state=state)
        outputs.append(result.output)
        state = result.state
    close(torch.cat(outputs, 1), module(x).output)


@pytest.mark.parametrize("options", OPTIONS)
def test_rows_at_different_places_of_their_segments_go_on_alike(options):
    module, x = layer(options).eval(), torch.randn(4, 40, 8, dtype=torch.float64)
    lengths = torch.tensor([19, 12, 0, 5])
    state = module(x[:, :19], context=Context(mask=Mask(lengths=lengths), want=STATE.want)).state
    whole = module(x).output
    for more in (1, 3, 20):
        rest = torch.stack([x[row, count : count + more] for row, count in enumerate(lengths.tolist())])
        found = module(rest, state=state).output
        for row, count in enumerate(lengths.tolist()):
            close(found[row], whole[row, count : count + more])


def test_scores_without_distances_go_on_from_anywhere_in_a_segment():
    tensors = {name: x for name, x in inputs(23).items() if name not in ("relative", "w")}
    whole = run(tensors, OPTIONS[0])
    first, second = (
        {n: x[:, :, p] if is_token(n) else x for n, x in tensors.items()} for p in (slice(9), slice(9, 23))
    )
    config = Config(**OPTIONS[0])
    state = apply(MECHANISM, first, config=config, return_state=True).state
    close(apply(MECHANISM, second, config=config, state=state).output, whole[:, :, 9:])


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_groups_of_one_token_are_a_longer_memory(pattern):
    """c = 1 and f_c the identity: Transformer-XL with a memory of M + C."""
    tensors = inputs(41)
    tensors |= {"k_compressed": tensors["k"], "v_compressed": tensors["v"]}
    options = {"segment": 4, "memory": 6, "compressed": 7, "ratio": 1}
    card = get_mechanism("transformer_xl")
    tokens = {name: t for name, t in tensors.items() if "compressed" not in name}
    expected = apply(card, tokens, pattern=pattern, config=card.options(segment=4, memory=13)).output
    close(run(tensors, options, pattern), expected)


@pytest.mark.parametrize("training", [False, True])
def test_norms_of_keys_and_values_act_on_compressed_inputs_too(training):
    options = {"segment": 4, "memory": 6, "compressed": 7, "ratio": 1, "compression": "mean"}
    norms = {"query_key_norm": "layer", "value_norm": "layer"}
    module, x = layer(options, **norms).train(training), torch.randn(2, 37, 8, dtype=torch.float64)
    longer = create_layer("transformer_xl", 8, 2, segment=4, memory=13, **norms).double().train(training)
    for norm in (module.query_norm, module.key_norm, module.value_norm):
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter)
    longer.load_state_dict(module.state_dict())
    close(module(x).output, longer(x).output)


def test_a_mean_of_keys_is_the_key_of_a_mean():
    options = {"segment": 4, "memory": 4, "compressed": 2, "ratio": 4, "compression": "mean"}
    module, x = layer(options).eval(), torch.randn(1, 24, 8, dtype=torch.float64)
    told = module.projection
    projections = {"q": module.query, "k": module.key, "v": module.value}
    heads = {name: linear(x).unflatten(-1, (2, 4)).transpose(1, 2) for name, linear in projections.items()}
    for name in "kv":
        means = heads[name].unflatten(2, (6, 4)).mean(3).repeat_interleave(4, 2)
        heads[f"{name}_compressed"] = means
    heads |= {"u": told.u, "w": told.w, "relative": told.relative}
    close(module.output(run(heads, options).transpose(1, 2).flatten(2)), module(x).output)


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_what_stands_where_no_group_ends_is_not_looked_at(pattern):
    options, tensors = OPTIONS[0], inputs(23)
    before = run(tensors, options, pattern)
    for name in ("k_compressed", "v_compressed"):
        tensors[name] = tensors[name].clone()
        tensors[name][:, :, ::2] = 100.0
    close(run(tensors, options, pattern), before)


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_long_sequences_are_read_in_parts_with_the_same_gradients(pattern, monkeypatch):
    tensors = {name: t.requires_grad_() for name, t in inputs(41).items()}
    found = []
    for most in (1 << 22, 300):
        monkeypatch.setattr(segment_attention, "PAIRS_AT_ONCE", most)
        output = run(tensors, OPTIONS[0], pattern)
        found.append([output, *torch.autograd.grad(output.square().sum(), list(tensors.values()))])
    for one, other in zip(*found, strict=True):
        close(one, other)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("segments", [[1] * 6, [2, 4], [6], [1, 3, 2]])
def test_training_some_segments_at_a_time_is_training_on_the_whole(options, segments):
    module = layer(options)
    x, weight = torch.randn(2, 2, 6 * options["segment"], 8, dtype=torch.float64)

    def learn(result: Any, part: slice) -> tuple[Tensor, Tensor]:
        total, count = result.losses["reconstruction"]
        ((result.output * weight[:, part]).sum() + total).backward()
        return total.detach(), count

    whole_loss = learn(module(x), slice(None))
    whole = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    state, outputs, losses, start = None, [], [], 0
    for count in segments:
        part = slice(start, start + count * options["segment"])
        result = module(x[:, part], context=STATE, state=state)
        losses.append(learn(result, part))
        outputs.append(result.output.detach())
        state, start = result.state, part.stop
        assert not any(t.requires_grad for t in state.tensors().values())
    close(torch.cat(outputs, 1), module(x).output)
    for one, other in zip(map(sum, zip(*losses, strict=True)), whole_loss, strict=True):
        close(torch.as_tensor(one), other)
    for name, p in module.named_parameters():
        close(p.grad, whole[name])


def test_in_training_what_the_state_holds_is_projected_by_the_weights_of_now():
    options = OPTIONS[0]
    module, x = layer(options), torch.randn(1, 24, 8, dtype=torch.float64)
    state = module(x[:, :20], context=STATE).state
    with torch.no_grad():
        module.key.weight.mul_(-1)
        module.value.weight.add_(0.1)
    close(module(x[:, 20:], state=state).output, module(x).output[:, 20:])


def test_the_loss_counts_valid_queries_whose_segment_pushes_something_out():
    options = {"segment": 4, "memory": 4, "compressed": 2, "ratio": 2}
    module, x = layer(options), torch.randn(3, 14, 8, dtype=torch.float64)
    lengths = torch.tensor([14, 9, 3])
    total, count = module(x, context=Context(mask=Mask(lengths=lengths))).losses["reconstruction"]
    assert count == (10 + 5 + 0) * 8
    alone = [module(x[row : row + 1, : int(n)]).losses["reconstruction"] for row, n in enumerate(lengths)]
    close(total, sum(one for one, _ in alone))
    assert "reconstruction" not in module.eval()(x).losses


@pytest.mark.parametrize("sizes", [[3, 4, 5, 12], [1] * 24, [8, 1, 15], [9, 15]])
def test_calls_in_training_that_begin_inside_a_segment_go_on_without_the_loss(sizes):
    module, x, state = layer(OPTIONS[0]), torch.randn(2, 24, 8, dtype=torch.float64), None
    whole, start = module(x).output, 0
    for size in sizes:
        result = module(x[:, start : start + size], context=STATE, state=state)
        close(result.output, whole[:, start : start + size])
        assert ("reconstruction" in result.losses) == (start % 4 == 0)
        state, start = result.state, start + size


def test_a_state_from_evaluation_is_refused_in_training_but_not_the_other_way_round():
    module, x = layer(OPTIONS[0]), torch.randn(1, 9, 8, dtype=torch.float64)
    inside = module(x[:, :3], context=STATE).state
    whole = module.eval()(x)
    result = module(x[:, 3:], state=inside)
    close(result.output, whole.output[:, 3:])
    with pytest.raises(Unsupported, match="begun in evaluation mode"):
        module.train()(x, state=result.state)


def test_a_model_decodes_past_its_memories_and_learns_to_compress():
    plan = [
        ("compressive", {"segment": 4, "memory": 4, "compressed": 2, "ratio": 2, "compression": c})
        for c in COMPRESSIONS
    ]
    config = LanguageModelConfig(vocab_size=11, dim=16, num_heads=2, plan=plan)
    model = LanguageModel(config).double()
    ids = torch.randint(11, (2, 30))
    model.loss(ids).backward()
    result = model(ids)
    total, count = result.losses["reconstruction"]
    task = cross_entropy(result.output[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    close(model.loss(ids), task + total / count)
    assert model.blocks[0].mixer.projection.convolution.weight.grad.abs().max() > 0
    model.eval()
    assert torch.equal(model.generate(ids[:, :6], 20), model.generate(ids[:, :6], 20, use_state=False))


def test_information_lasts_ratio_times_as_long_as_its_slots():
    """One layer: a token is seen in its segment, through the memory, then through its group until that is pushed out."""
    options = {"segment": 4, "memory": 4, "compressed": 4, "ratio": 2}
    for compression in COMPRESSIONS:
        module = layer(options, compression=compression).eval()
        x = torch.randn(1, 32, 8, dtype=torch.float64)
        changed = x.clone()
        changed[:, 3] += 10
        different = ((module(changed).output - module(x).output).abs().sum(-1)[0] > 1e-12).nonzero()[:, 0].tolist()
        assert different == list(range(3, 16))  # groups 0 to 3 are read by tokens 12 to 15 for the last time


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n", [0, 1, 7, 12, 31])
def test_the_cost_counts_visible_pairs(options, n):
    config = Config(**options)

    def seen(i: int) -> int:
        begin = i // config.segment * config.segment
        past = min(begin, config.memory)
        return i - begin + 1 + past + min(config.compressed, (begin - past) // config.ratio)

    assert visible_pairs(config, n) == sum(map(seen, range(n)))
    assert cost(Shape(2, 3, n, n, 4, 5), config).flops == 2 * 2 * 3 * 13 * visible_pairs(config, n)
    assert cost(Shape(2, 3, 1, n, 4, 5), config).step_flops == 2 * 2 * 3 * 13 * seen(n)


def test_parity_with_public_code():
    with np.load(FIXTURES / "compressive_conv.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    options = {"segment": 8, "memory": 8, "compressed": 3, "ratio": 4}
    module = layer(options)
    key, value = arrays["weight_kv"].chunk(2)
    weights = {"query.weight": arrays["weight_q"], "key.weight": key, "value.weight": value}
    weights |= {"output.weight": arrays["weight_o"], "projection.relative": arrays["relative"]}
    weights |= {f"projection.{name}": torch.zeros(2, 4) for name in "uw"}
    weights["projection.convolution.weight"] = arrays["weight_conv"].transpose(1, 2).flatten(1)
    weights["projection.convolution.bias"] = arrays["bias_conv"]
    module.load_state_dict(weights)
    x = arrays["x"].requires_grad_()
    result = module(x)
    close(result.output + arrays["bias_o"], arrays["out"])
    (result.output * arrays["grad_out"]).sum().backward(retain_graph=True)
    close(x.grad, arrays["grad_x"])
    close(module.query.weight.grad, arrays["grad_q"])
    close(torch.cat([module.key.weight.grad, module.value.weight.grad]), arrays["grad_kv"])
    close(module.output.weight.grad, arrays["grad_o"])
    total, count = result.losses["reconstruction"]
    close(4 * total / count, arrays["losses"].sum())  # four segments push out as much each
    (4 * total / count).backward()
    convolution = module.projection.convolution
    close(convolution.weight.grad.unflatten(1, (4, 8)).transpose(1, 2), arrays["grad_conv"])
    close(convolution.bias.grad, arrays["grad_bias_conv"])


@pytest.mark.parametrize("training", [True, False])
def test_empty_calls_leave_the_state_as_it_was(training):
    module = create_layer("compressive", 8, 2, **OPTIONS[0]).double().train(training)
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
            create_layer("compressive", 8, 2, pattern=pattern)
    for options, message in (
        ({"segment": 6}, "try segment=8"),
        ({"memory": 34}, "try memory=36"),
        ({"memory": 16}, "memory >= 32"),
        ({"compressed": 0}, "compressed >= 1"),
        ({"ratio": 0}, "ratio >= 1"),
        ({"compression": "men"}, "try mean"),
        ({"clamp": -1}, "clamp >= 0"),
    ):
        with pytest.raises(Unsupported, match=message):
            Config(**options)
    with pytest.raises(Unsupported, match="single tokens"):
        create_layer("compressive", 8, 2, short_convolution=4)
    with pytest.raises(Unsupported, match="rotary positions with compressive"):
        create_layer("compressive", 8, 2, positions="rotary")
    tensors = inputs(5)
    with pytest.raises(Unsupported, match="both or none"):
        run(tensors | {"k_past": tensors["k"]}, {})
    with pytest.raises(Unsupported, match="without relative"):
        run({name: t for name, t in tensors.items() if name != "relative"}, {})
    with pytest.raises(Unsupported, match="without k_compressed"):
        run({name: t for name, t in tensors.items() if name != "k_compressed"}, {})
