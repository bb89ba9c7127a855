"""Tests specific to the Compressive Transformer: what it compresses and when, what learns, its state, and parity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import WANT_STATE, calls, close, cut, load, read_in_pieces, refused
from torch import Tensor

from regard.catalogue import get_mechanism
from regard.contract import Context, Mask, Shape
from regard.create import create_layer
from regard.mechanisms.compressive import MECHANISM, Config, cost, sample_inputs, visible_pairs

OPTIONS = [
    {"segment": 4, "memory": 6, "compressed": 3, "ratio": 2},
    {"segment": 4, "memory": 4, "compressed": 1, "ratio": 4},
    {"segment": 3, "memory": 3, "compressed": 4, "ratio": 1, "clamp": 3},
    {"segment": 6, "memory": 9, "compressed": 2, "ratio": 3},
]
SELF = ["causal-self", "noncausal-self"]
TOKENS = ("q", "k", "v", "k_compressed", "v_compressed")

run = calls(MECHANISM)


def inputs(n: int) -> dict[str, Tensor]:
    return sample_inputs(torch.default_generator, batch=2, n=n, m=n, dtype=torch.float64)


def sequence(n: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, n, 8, dtype=torch.float64)


def layer(options: dict, **more: Any) -> torch.nn.Module:
    return create_layer("compressive", 8, 2, **options, **more).double()


def by_hand(module: torch.nn.Module, x: Tensor, options: dict) -> tuple[Tensor, Tensor]:
    """Outputs and mean reconstruction loss as in the paper: queues of inputs, one segment at a time."""
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
        turns = distance.clamp(max=options.get("clamp", m))[..., None]
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
        if options["compression"] == "conv":
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
    return torch.cat(outputs, 1), torch.cat(squares, 2).mean()


@pytest.mark.parametrize("compression", ["conv", "mean", "max"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_layer_equals_queues_of_inputs_and_learns_as_they_do(options, compression):
    """The task's gradient stops at the memory and at f_c; the reconstruction's gradient reaches only f_c."""
    options = options | {"compression": compression}
    module, x = layer(options), sequence(36).requires_grad_()
    leaves = {"x": x, **dict(module.named_parameters())}
    by_task, by_loss = ([p for name, p in leaves.items() if ("convolution" in name) == own] for own in (False, True))
    output, loss = by_hand(module, x, options)
    result = module(x)
    close(module.eval()(x).output, output)
    compared = [(result.output, output, by_task, by_loss)]
    if compression == "conv":
        total, count = result.losses["reconstruction"]
        compared.append((total / count, loss, by_loss, by_task))
    else:
        assert result.losses == {}
    for found, expected, learned, others in compared:
        close(found, expected)
        weight = torch.randn_like(expected)
        gradients = [torch.autograd.grad((y * weight).sum(), learned, retain_graph=True) for y in (found, expected)]
        for one, other in zip(*gradients, strict=True):
            close(one, other)
        reached = torch.autograd.grad(found.sum(), others, retain_graph=True, allow_unused=True) if others else ()
        assert all(gradient is None for gradient in reached)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sizes", [[1] * 37, [1, 7, 1, 0, 28], [12, 24, 1]])
def test_a_layer_decodes_however_a_sequence_is_cut(options, sizes):
    """Cuts may be anywhere in a segment, since the state holds the inputs of incomplete groups."""
    module, x = layer(options).eval(), sequence(37)
    found, state = read_in_pieces(module, x, sizes)
    close(found, module(x).output)
    kept = sum(t[0].numel() for name, t in state.mechanism.tensors().items() if name != "length")
    assert kept == cost(Shape(1, 2, 1, 1000, 4, 4), Config(**options)).state


def test_scores_without_distances_go_on_from_anywhere_in_a_segment():
    tensors = {name: x for name, x in inputs(23).items() if name not in ("relative", "w")}
    state = run(cut(tensors, slice(9), TOKENS), OPTIONS[0], return_state=True).state
    found = run(cut(tensors, slice(9, 23), TOKENS), OPTIONS[0], state=state).output
    close(found, run(tensors, OPTIONS[0]).output[:, :, 9:])


@pytest.mark.parametrize("pattern", SELF)
def test_groups_of_one_token_are_a_longer_memory(pattern):
    """With c = 1 and f_c the identity, it is Transformer-XL with a memory of M + C."""
    tokens = {name: x for name, x in inputs(41).items() if "compressed" not in name}
    own = tokens | {"k_compressed": tokens["k"], "v_compressed": tokens["v"]}
    found = run(own, {"segment": 4, "memory": 6, "compressed": 7, "ratio": 1}, pattern=pattern)
    expected = calls(get_mechanism("transformer_xl"))(tokens, {"segment": 4, "memory": 13}, pattern=pattern)
    close(found.output, expected.output)


@pytest.mark.parametrize("training", [False, True])
def test_norms_of_keys_and_values_act_on_compressed_inputs_too(training):
    options = {"segment": 4, "memory": 6, "compressed": 7, "ratio": 1, "compression": "mean"}
    norms = {"query_key_norm": "layer", "value_norm": "layer"}
    module, x = layer(options, **norms).train(training), sequence(37)
    longer = create_layer("transformer_xl", 8, 2, segment=4, memory=13, **norms).double().train(training)
    for norm in (module.query_norm, module.key_norm, module.value_norm):
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter)
    longer.load_state_dict(module.state_dict())
    close(module(x).output, longer(x).output)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("segments", [[1] * 6, [1, 3, 2]])
def test_training_some_segments_at_a_time_is_training_on_the_whole(options, segments):
    module = layer(options)
    x, weight = torch.randn(2, 2, 6 * options["segment"], 8, dtype=torch.float64)

    def learn(result: Any, part: slice) -> Tensor:
        total, count = result.losses["reconstruction"]
        ((result.output * weight[:, part]).sum() + total).backward()
        return torch.stack([total.detach(), torch.as_tensor(count, dtype=torch.float64)])

    result = module(x)
    loss = learn(result, slice(None))
    whole = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    state, outputs, losses, start = None, [], [], 0
    for count in segments:
        part = slice(start, start + count * options["segment"])
        piece = module(x[:, part], context=WANT_STATE, state=state)
        losses.append(learn(piece, part))
        outputs.append(piece.output)
        state, start = piece.state, part.stop
        assert not any(t.requires_grad for t in state.tensors().values())
    close(torch.cat(outputs, 1), result.output)
    close(sum(losses), loss)
    for name, p in module.named_parameters():
        close(p.grad, whole[name])


@pytest.mark.parametrize("sizes", [[3, 4, 0, 5, 12], [1] * 24, [0, 8, 0, 1, 15], [9, 15]])
def test_calls_in_training_that_begin_inside_a_segment_go_on_without_the_loss(sizes):
    module, x, state = layer(OPTIONS[0]), sequence(24), None
    whole, start = module(x).output, 0
    for size in sizes:
        result = module(x[:, start : start + size], context=WANT_STATE, state=state)
        close(result.output, whole[:, start : start + size])
        assert ("reconstruction" in result.losses) == (start % 4 == 0)
        state, start = result.state, start + size


def test_in_training_what_the_state_holds_is_projected_by_the_weights_of_now():
    module, x = layer(OPTIONS[0]), sequence(24)
    state = module(x[:, :20], context=WANT_STATE).state
    with torch.no_grad():
        module.key.weight.mul_(-1)
        module.value.weight.add_(0.1)
    close(module(x[:, 20:], state=state).output, module(x).output[:, 20:])


def test_the_loss_counts_valid_queries_whose_segment_pushes_something_out():
    module, x = layer({"segment": 4, "memory": 4, "compressed": 2, "ratio": 2}), sequence(14, batch=3)
    lengths = torch.tensor([14, 9, 3])
    total, count = module(x, context=Context(mask=Mask(lengths=lengths))).losses["reconstruction"]
    assert count == (10 + 5 + 0) * 8
    alone = [module(x[row : row + 1, : int(n)]).losses["reconstruction"] for row, n in enumerate(lengths)]
    close(total, sum(one for one, _ in alone))
    assert "reconstruction" not in module.eval()(x).losses


def test_a_state_from_evaluation_is_refused_in_training_but_not_the_other_way_round():
    module, x = layer(OPTIONS[0]), sequence(9)
    inside = module(x[:, :3], context=WANT_STATE).state
    whole = module.eval()(x)
    result = module(x[:, 3:], state=inside)
    close(result.output, whole.output[:, 3:])
    refused("begun in evaluation mode", lambda: module.train()(x, state=result.state))


@pytest.mark.parametrize("options", OPTIONS)
def test_the_cost_counts_visible_pairs(options):
    config = Config(**options)

    def seen(i: int) -> int:
        begin = i // config.segment * config.segment
        past = min(begin, config.memory)
        return i - begin + 1 + past + min(config.compressed, (begin - past) // config.ratio)

    for n in (0, 1, 7, 12, 31):
        assert visible_pairs(config, n) == sum(map(seen, range(n)))
        assert cost(Shape(2, 3, n, n, 4, 5), config).flops == 2 * 2 * 3 * 13 * visible_pairs(config, n)
        assert cost(Shape(2, 3, 1, n, 4, 5), config).step_flops == 2 * 2 * 3 * 13 * seen(n)


def test_parity_with_public_code():
    recorded = load("compressive_conv")
    module = layer({"segment": 8, "memory": 8, "compressed": 3, "ratio": 4})
    key, value = recorded["weight_kv"].chunk(2)
    weights = {"query.weight": recorded["weight_q"], "key.weight": key, "value.weight": value}
    weights |= {"output.weight": recorded["weight_o"], "projection.relative": recorded["relative"]}
    weights |= {f"projection.{name}": torch.zeros(2, 4) for name in "uw"}
    weights["projection.convolution.weight"] = recorded["weight_conv"].transpose(1, 2).flatten(1)
    weights["projection.convolution.bias"] = recorded["bias_conv"]
    module.load_state_dict(weights)
    x = recorded["x"].requires_grad_()
    result = module(x)
    close(result.output + recorded["bias_o"], recorded["out"])
    (result.output * recorded["grad_out"]).sum().backward(retain_graph=True)
    close(x.grad, recorded["grad_x"])
    close(module.query.weight.grad, recorded["grad_q"])
    close(torch.cat([module.key.weight.grad, module.value.weight.grad]), recorded["grad_kv"])
    close(module.output.weight.grad, recorded["grad_o"])
    total, count = result.losses["reconstruction"]
    close(4 * total / count, recorded["losses"].sum())  # each of four segments evicts as many tokens
    (4 * total / count).backward()
    convolution = module.projection.convolution
    close(convolution.weight.grad.unflatten(1, (4, 8)).transpose(1, 2), recorded["grad_conv"])
    close(convolution.bias.grad, recorded["grad_bias_conv"])


def test_layers_that_it_lacks_are_refused():
    refused("single tokens", create_layer, "compressive", 8, 2, short_convolution=4)
    refused("rotary positions with compressive", create_layer, "compressive", 8, 2, positions="rotary")


def test_inputs_without_their_companions_are_refused():
    tensors = inputs(5)
    refused("both or none", run, tensors | {"k_past": tensors["k"]})
    for name in ("relative", "k_compressed"):
        refused(f"without {name}", run, {other: x for other, x in tensors.items() if other != name})
