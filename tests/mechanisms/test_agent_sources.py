"""Agents made by a strided convolution and by merging tokens, and the dropout of both weight matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from regard.contract import Call, Context, Mask, Pattern, Role, Shape, Unsupported
from regard.create import create_layer
from regard.functional import agent_attention
from regard.mechanisms.agent import MECHANISM, Config
from regard.mechanisms.agent.forms import _row_agents

NONCAUSAL = ["noncausal-self", "noncausal-cross"]
CAUSAL = ["causal-self", "causal-cross"]
MERGE = {"agent_source": "token_merge"}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def sample(n=12, m=None, *, batch=2, heads=2, d=4, v=3):
    m = n if m is None else m
    return tuple(torch.randn(batch, heads, *s, dtype=torch.float64) for s in ((n, d), (m, d), (m, v)))


def two_softmaxes(q, k, v, agents):
    scale = q.shape[-1] ** -0.5
    return (scale * q @ agents.mT).softmax(-1) @ ((scale * agents @ k.mT).softmax(-1) @ v)


def layer_of(source, *, pattern="noncausal-self", **options):
    return create_layer("agent", 8, 2, pattern=pattern, agent_source=source, **{"num_agents": 4, **options}).double()


def merged_one_by_one(q, number):
    """Tokens (n, width) with sizes, merged pair by pair by the weighted mean of two."""
    tokens = [(x, 1) for x in q.numpy()]
    while len(tokens) > number:
        first, second = tokens[0::2], tokens[1::2]
        similar = np.array([[a @ b / np.sqrt(a @ a * (b @ b)) for b, _ in second] for a, _ in first])
        best, link = similar.max(1), similar.argmax(1)
        chosen = set(np.argsort(-best)[: min(len(tokens) // 2, len(tokens) - number)].tolist())
        sums = [(size * x, size) for x, size in second]
        for i in chosen:
            x, size = first[i]
            total, count = sums[link[i]]
            sums[link[i]] = (total + size * x, count + size)
        left = []
        for i in range(len(first)):
            left += [] if i in chosen else [first[i]]
            left += [(sums[i][0] / sums[i][1], sums[i][1])] if i < len(second) else []
        tokens = left
    return torch.from_numpy(np.stack([x for x, _ in tokens]))


def heads_together(q):
    return q.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("n", [1, 2, 7, 12, 13, 40])
@pytest.mark.parametrize("number", [1, 2, 5, 12])
def test_merging_equals_pairs_merged_one_by_one_with_their_sizes(n, number):
    q = sample(n)[0]
    call = Call(Pattern.NONCAUSAL_SELF, Config(num_agents=number, **MERGE))
    agents, exists = _row_agents(call, "token_merge", q)
    for row, expected in enumerate(merged_one_by_one(x, number) for x in heads_together(q)):
        count = min(n, number)
        close(heads_together(agents[:, :, :count])[row], expected)
        assert (exists is None) == (n >= number)
        assert exists is None or exists[row].tolist() == [i < n for i in range(number)]


@pytest.mark.parametrize("pattern", NONCAUSAL)
@pytest.mark.parametrize("number", [1, 3, 7])
def test_merged_agents_are_attended_as_any_others(pattern, number):
    q, k, v = sample(13, 13 if "self" in pattern else 9)
    agents = torch.stack([merged_one_by_one(x, number) for x in heads_together(q)]).unflatten(-1, (2, 4))
    expected = two_softmaxes(q, k, v, agents.transpose(1, 2))
    for form in (None, "reference"):
        close(agent_attention(q, k, v, pattern=pattern, num_agents=number, form=form, **MERGE), expected)


def test_pairs_that_point_the_same_way_become_their_means():
    directions = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q[:6]
    q = torch.stack([directions, 3 * directions + 1e-3 * torch.randn(6, 8, dtype=torch.float64)], 1).flatten(0, 1)
    q = q.view(1, 12, 2, 4).transpose(1, 2)
    call = Call(Pattern.NONCAUSAL_SELF, Config(num_agents=6, **MERGE))
    agents, _ = _row_agents(call, "token_merge", q)
    close(agents, q.unflatten(2, (6, 2)).mean(3))


def test_with_as_many_agents_as_tokens_or_more_the_tokens_are_the_agents():
    q, k, v = sample(6)
    for number in (6, 9):
        found = agent_attention(q, k, v, pattern="noncausal-self", num_agents=number, **MERGE)
        close(found, two_softmaxes(q, k, v, q))


def test_similarity_is_that_of_all_heads_together():
    """Two heads that would merge different tokens; the one with longer queries decides for both."""
    one, two = torch.eye(4, dtype=torch.float64)[[0, 0, 1]], torch.eye(4, dtype=torch.float64)[[0, 1, 1]]
    for sizes, pair in (((5.0, 1.0), (0, 1)), ((1.0, 5.0), (2, 1))):
        q = torch.stack([sizes[0] * one, sizes[1] * two])[None]
        call = Call(Pattern.NONCAUSAL_SELF, Config(num_agents=2, **MERGE))
        agents, _ = _row_agents(call, "token_merge", q)
        mean = q[:, :, list(pair)].mean(2)
        assert any(torch.equal(agents[:, :, i], mean) for i in range(2))


@pytest.mark.parametrize("pattern", NONCAUSAL)
def test_padding_of_any_shape_does_not_reach_merged_agents(pattern):
    q, k, v = sample(15, batch=4)
    valid = torch.ones(4, 15, dtype=torch.bool)
    valid[0, :6], valid[1, [2, 7, 14]], valid[2, 3:] = False, False, False
    empty = [x.masked_fill(~valid[:, None, :, None], torch.nan) for x in (q, k, v)]
    options = {"pattern": pattern, "num_agents": 5, **MERGE}
    mask = Mask(valid=valid)
    found = agent_attention(*empty, mask=mask, memory_mask=mask if "cross" in pattern else None, **options)
    for row in range(4):
        own = [x[row : row + 1, :, valid[row]] for x in (q, k, v)]
        close(found[row : row + 1, :, valid[row]], agent_attention(*own, **options))


def test_a_class_token_is_a_key_and_a_query_but_is_not_merged():
    q, k, v = sample(11)
    roles = torch.zeros(2, 11, dtype=torch.long)
    roles[:, 3] = Role.CLS
    there = [i for i in range(11) if i != 3]
    agents = torch.stack([merged_one_by_one(x, 4) for x in heads_together(q)[:, there]]).unflatten(-1, (2, 4))
    expected = two_softmaxes(q, k, v, agents.transpose(1, 2))
    options = {"pattern": "noncausal-self", "num_agents": 4, "roles": roles, **MERGE}
    for form in (None, "reference"):
        close(agent_attention(q, k, v, form=form, **options), expected)


def test_rows_without_a_token_to_make_agents_of_give_zero_in_every_form():
    q, k, v = sample(5)
    roles = torch.full((2, 5), int(Role.CLS))
    roles[1, 2] = Role.TOKEN
    for source in ("pool_q", "token_merge", "conv"):
        more = {"row_agents": torch.randn(2, 2, 4, 4, dtype=torch.float64)} if source == "conv" else {}
        for form in (None, "reference"):
            options = {"pattern": "noncausal-self", "num_agents": 4, "agent_source": source, "form": form}
            found = agent_attention(q, k, v, roles=roles, **options, **more)
            assert (found[0] == 0).all()
            assert (found[1] != 0).all()


def test_gradients_reach_every_token_of_a_merged_agent():
    q, k, v = sample(9, batch=1)

    def run(q):
        return agent_attention(q, k, v, pattern="noncausal-self", num_agents=3, **MERGE)

    assert torch.autograd.gradcheck(run, q.requires_grad_())


def test_merging_costs_the_cosines_of_its_rounds():
    shape = Shape(2, 3, 64, 64, 8, 8)
    plain, merging = (MECHANISM.cost(shape, Config(num_agents=16, agent_source=s)) for s in ("pool_q", "token_merge"))
    assert merging.flops - plain.flops == 2 * 2 * (32 * 32 + 16 * 16) * 3 * 8
    assert merging.memory - plain.memory == 2 * 32 * 32


@pytest.mark.parametrize(("stride", "grid"), [(1, (3, 3)), (2, (6, 6)), (3, (9, 9)), (2, (12,)), (2, None)])
def test_on_a_grid_of_stride_times_the_agents_it_is_a_strided_convolution(stride, grid):
    two = grid is not None and len(grid) == 2
    layer = layer_of("conv", num_agents=9 if two else 6, conv_stride=stride, dwc="none")
    convolved = layer.projection.convolved
    sides = grid if two else (1, 12)
    x = torch.randn(2, sides[0] * sides[1], 8, dtype=torch.float64)
    weight = convolved.convolution.weight if two else convolved.convolution.weight.sum(2, keepdim=True)
    image = F.conv2d(x.mT.unflatten(-1, sides), weight, stride=(stride if two else 1, stride), groups=8)
    agents = convolved.linear(image.flatten(2).mT).unflatten(-1, (2, 4)).transpose(1, 2)
    q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (layer.query, layer.key, layer.value))
    expected = layer.output(two_softmaxes(q, k, v, agents).transpose(1, 2).flatten(2))
    close(layer(x, context=Context(grid=grid)).output, expected)


@pytest.mark.parametrize("grid", [(5, 7), (2, 9), (1, 3), (11, 11)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_on_any_grid_it_convolves_adaptive_means(stride, grid):
    layer = layer_of("conv", num_agents=9, conv_stride=stride)
    convolved = layer.projection.convolved
    x = torch.randn(2, grid[0] * grid[1], 8, dtype=torch.float64)
    image = F.adaptive_avg_pool2d(x.mT.unflatten(-1, grid), 3 * stride)
    image = F.conv2d(image, convolved.convolution.weight, stride=stride, groups=8)
    expected = convolved.linear(image.flatten(2).mT).unflatten(-1, (2, 4)).transpose(1, 2)
    close(convolved(x, Context(grid=grid), None), expected)


@pytest.mark.parametrize("n", [1, 3, 8, 50])
def test_there_are_as_many_convolved_agents_on_any_length(n):
    layer = layer_of("conv", num_agents=5)
    convolved = layer.projection.convolved
    x = torch.randn(2, n, 8, dtype=torch.float64)
    means = F.adaptive_avg_pool1d(x.mT, 10)
    image = F.conv1d(means, convolved.convolution.weight.sum(2), stride=2, groups=8)
    expected = convolved.linear(image.mT).unflatten(-1, (2, 4)).transpose(1, 2)
    close(convolved(x, Context(), None), expected)
    assert expected.shape[2] == 5


@pytest.mark.parametrize("source", ["conv", "token_merge"])
@pytest.mark.parametrize("grid", [None, (3, 4)])
def test_padding_and_class_tokens_do_not_reach_the_agents_of_a_layer(source, grid):
    layer = layer_of(source, bias=True)
    x = torch.randn(3, 16, 8, dtype=torch.float64)
    valid = torch.ones(3, 16, dtype=torch.bool)
    valid[0, :3], valid[1, [2, 7, 14]], valid[2, 13:] = False, False, False
    roles = torch.zeros(3, 16, dtype=torch.long)
    roles[[0, 1, 2], [5, 0, 12]] = Role.CLS
    given = x.masked_fill(~valid[..., None], torch.nan)
    found = layer(given, context=Context(Mask(valid=valid), grid=grid, roles=roles)).output
    for row in range(3):
        own = Context(grid=grid, roles=roles[row : row + 1, valid[row]])
        alone = layer(x[row : row + 1, valid[row]], context=own).output
        close(found[row, valid[row]], alone[0])
    if source == "conv":
        tokens = (roles == Role.TOKEN) & valid
        expected = layer.projection.convolved(x[tokens].view(3, 12, 8), Context(grid=grid), None)
        dense = torch.stack([x[row, valid[row]] for row in range(3)])
        dense_roles = torch.stack([roles[row, valid[row]] for row in range(3)])
        close(layer.projection.convolved(dense, Context(grid=grid, roles=dense_roles), None), expected)


@pytest.mark.parametrize("pattern", NONCAUSAL)
def test_a_short_row_is_convolved_at_its_own_length(pattern):
    layer = layer_of("conv", pattern=pattern)
    x, lengths = torch.randn(4, 12, 8, dtype=torch.float64), [12, 7, 1, 0]
    memory = (torch.randn(4, 5, 8, dtype=torch.float64),) if "cross" in pattern else ()
    padded = x.clone()
    for row, length in enumerate(lengths):
        padded[row, length:] = torch.nan
    found = layer(padded, *memory, context=Context(Mask(lengths=torch.tensor(lengths)))).output
    for row, length in enumerate(lengths):
        alone = layer(x[row : row + 1, :length], *(y[row : row + 1] for y in memory)).output
        close(found[row, :length], alone[0])
        assert (found[row, length:] == 0).all()


def test_packed_documents_are_convolved_and_merged_apart():
    for source in ("conv", "token_merge"):
        layer = layer_of(source)
        x = torch.randn(1, 20, 8, dtype=torch.float64)
        found = layer(x, context=Context(Mask(cu_seqlens=torch.tensor([0, 9, 9, 20])))).output
        for part in (slice(0, 9), slice(9, 20)):
            close(found[:, part], layer(x[:, part]).output)


def test_convolved_agents_of_missing_places_do_not_exist():
    """A grid of four rows of which the last two are missing: no query reads the lower agents."""
    layer = layer_of("conv", dwc="none")
    x = torch.randn(1, 16, 8, dtype=torch.float64)
    mask = Mask(lengths=torch.tensor([8]))
    found = layer(x, context=Context(mask, grid=(4, 4))).output[:, :8]
    x = x[:, :8]
    convolved = layer.projection.convolved
    image = convolved.convolution(x.mT.unflatten(-1, (2, 4)))
    agents = convolved.linear(image.flatten(2).mT).unflatten(-1, (2, 4)).transpose(1, 2)
    q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (layer.query, layer.key, layer.value))
    close(found, layer.output(two_softmaxes(q, k, v, agents).transpose(1, 2).flatten(2)))


def test_the_convolution_learns_and_is_saved():
    layer, again = layer_of("conv", conv_stride=3), layer_of("conv", conv_stride=3)
    again.load_state_dict(layer.state_dict())
    x = torch.randn(2, 10, 8, dtype=torch.float64)
    output = layer(x).output
    close(again(x).output, output)
    output.square().sum().backward()
    for name, parameter in layer.projection.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("pattern", CAUSAL)
@pytest.mark.parametrize("source", ["conv", "token_merge"])
def test_agents_of_the_whole_sequence_are_refused_in_causal_patterns(source, pattern):
    more = {"row_agents": torch.randn(2, 2, 4, 4, dtype=torch.float64)} if source == "conv" else {}
    with pytest.raises(Unsupported, match=source) as caught:
        agent_attention(*sample(), pattern=pattern, agent_source=source, **more)
    assert caught.value.nearest == "agent_source='learned' and agents=..."
    with pytest.raises(Unsupported, match=source) as caught:
        layer_of(source, pattern=pattern)
    assert caught.value.nearest == "agent_source='learned'"


@pytest.mark.parametrize("source", ["conv", "token_merge"])
def test_agents_of_the_whole_sequence_cannot_absorb_memory(source):
    layer = layer_of(source, pattern="noncausal-cross")
    x, memory = torch.randn(2, 4, 8, dtype=torch.float64), torch.randn(2, 6, 8, dtype=torch.float64)
    assert layer(x, memory).output.shape == (2, 4, 8)
    with pytest.raises(Unsupported, match="learned"):
        layer.encode_memory(memory)
    state = layer_of("learned", pattern="noncausal-cross").encode_memory(memory)
    with pytest.raises(Unsupported, match=f"{source} agents in noncausal-cross with a state"):
        layer(x, state=state)
    with pytest.raises(Unsupported, match="roles"):
        layer(x, memory, context=Context(roles=torch.zeros(2, 6, dtype=torch.long)))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"agent_source": "conv"}, "without row_agents"),
        ({"agent_source": "pool_q", "row_agents": True}, "beside"),
        ({"agent_source": "learned", "agents": True, "row_agents": True}, "row_agents beside"),
        ({"agent_source": "token_merge", "agents": True}, "agents beside"),
        ({"agent_source": "conv", "row_agents": True, "grid": (3, 4)}, "square"),
        ({"conv_stride": 3}, "conv_stride"),
        ({"agent_source": "conv", "row_agents": True, "conv_stride": 0}, "conv_stride"),
    ],
)
def test_what_does_not_fit_the_source_is_refused(options, word):
    given = {"agents": torch.randn(2, 5, 4).double(), "row_agents": torch.randn(2, 2, 5, 4).double()}
    options = {name: given[name] if value is True else value for name, value in options.items()}
    with pytest.raises(Unsupported, match=word):
        agent_attention(*sample(), pattern="noncausal-self", **options)


def kept(shape, generator, probability):
    return (torch.rand(shape, generator=generator, dtype=torch.float64) >= probability).double() / (1 - probability)


@pytest.mark.parametrize("pattern", NONCAUSAL)
@pytest.mark.parametrize("form", [None, "reference"])
def test_dropout_falls_on_both_weight_matrices(pattern, form):
    q, k, v = sample(7, 7 if "self" in pattern else 9)
    agents = torch.randn(2, 5, 4, dtype=torch.float64)
    draws = torch.Generator().manual_seed(3)
    gather = (agents @ k.mT / 2).softmax(-1)
    gather = gather * kept(gather.shape, draws, 0.4)
    share = (q @ agents.mT / 2).softmax(-1)
    expected = (share * kept(share.shape, draws, 0.4)) @ (gather @ v)
    again = torch.Generator().manual_seed(3)
    close(agent_attention(q, k, v, agents, pattern=pattern, dropout=0.4, generator=again, form=form), expected)


@pytest.mark.parametrize("form", [None, "reference", "chunked"])
def test_a_running_softmax_keeps_all_weights_but_those_of_the_queries(form):
    q, k, v = sample(7)
    agents = torch.randn(2, 5, 4, dtype=torch.float64)
    share = (q @ agents.mT / 2).softmax(-1) * kept((2, 2, 7, 5), torch.Generator().manual_seed(3), 0.4)
    outputs = [
        share[:, :, t, None] @ ((agents @ k[:, :, : t + 1].mT / 2).softmax(-1) @ v[:, :, : t + 1]) for t in range(7)
    ]
    again = torch.Generator().manual_seed(3)
    close(agent_attention(q, k, v, agents, dropout=0.4, generator=again, form=form), torch.cat(outputs, 2))


@pytest.mark.parametrize("source", ["pool_q", "conv", "token_merge", "learned"])
def test_a_layer_drops_weights_in_training_alone_and_not_its_output(source):
    layer = layer_of(source, dropout=0.5, dwc="none")
    x = torch.randn(2, 9, 8, dtype=torch.float64)

    @torch.no_grad()
    def run(seed):
        return layer(x, context=Context(generator=torch.Generator().manual_seed(seed))).output

    layer.eval()
    assert torch.equal(run(0), run(1))
    layer.train()
    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    mean = torch.stack([run(seed) for seed in range(2000)]).mean(0)
    layer.eval()
    assert float((mean - run(0)).abs().max() / run(0).abs().max()) < 0.2
    layer.train()
    assert (torch.stack([run(seed) for seed in range(3)]) != 0).all()
