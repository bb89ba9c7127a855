"""What is peculiar to agent attention: closed forms, pooling, grids, learned agents, DWC, and recorded outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from regard.apply import absorb, apply
from regard.contract import Call, Context, Mask, Pattern, Role, Unsupported
from regard.create import create_layer
from regard.functional import agent_attention
from regard.layers.parts import LayerCall
from regard.mechanisms.agent import MECHANISM, Config
from regard.mechanisms.agent.forms import _row_agents

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
WANT_STATE = Context(want=frozenset({"state"}))
PATTERNS = ["noncausal-self", "causal-self", "noncausal-cross", "causal-cross"]


def sample(n=12, m=None, *, batch=2, heads=2, d=4, v=3):
    m = n if m is None else m
    return tuple(torch.randn(batch, heads, *s, dtype=torch.float64) for s in ((n, d), (m, d), (m, v)))


def learned(number=5, heads=2, d=4):
    return torch.randn(heads, number, d, dtype=torch.float64)


def pooled(q, number, *, grid=None, lengths=None, roles=None):
    call = Call(Pattern.NONCAUSAL_SELF, Config(num_agents=number), grid=grid, lengths=lengths, roles=roles)
    return _row_agents(call, "pool_q", q)


def two_softmaxes(q, k, v, agents):
    scale = q.shape[-1] ** -0.5
    return (scale * q @ agents.mT).softmax(-1) @ ((scale * agents @ k.mT).softmax(-1) @ v)


def load(name):
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def test_as_many_agents_as_queries_are_the_queries_themselves():
    q, k, v = sample()
    found = agent_attention(q, k, v, pattern="noncausal-self", num_agents=12)
    torch.testing.assert_close(found, two_softmaxes(q, k, v, q), rtol=0, atol=1e-13)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_implied_weights_are_row_stochastic_with_the_rank_of_the_agents(pattern):
    q, k, v = sample()
    agents = learned(3)
    unit = torch.eye(12, dtype=torch.float64).expand(2, 2, -1, -1)
    weights = agent_attention(q, k, unit, agents, pattern=pattern)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 12).double(), rtol=0, atol=1e-13)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights @ v, agent_attention(q, k, v, agents, pattern=pattern), rtol=0, atol=1e-13)
    rank = torch.linalg.matrix_rank(weights)
    assert (rank > 3).all() if pattern == "causal-self" else (rank == 3).all()


def test_one_agent_gives_every_query_the_same():
    q, k, v = sample()
    found = agent_attention(q, k, v, pattern="noncausal-self", num_agents=1)
    mean = q.mean(2, keepdim=True)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(mean, k, v).expand_as(v), rtol=0, atol=1e-13)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_constant_values_come_out_as_they_are(pattern):
    q, k, v = sample()
    found = agent_attention(q, k, torch.full_like(v, 2.5), learned(), pattern=pattern)
    torch.testing.assert_close(found, torch.full_like(v, 2.5), rtol=0, atol=1e-13)


def test_learned_agents_see_keys_as_a_set():
    q, k, v = sample(8, 13)
    agents, rows, columns = learned(), torch.randperm(8), torch.randperm(13)
    found = agent_attention(q, k, v, agents, pattern="noncausal-cross")
    moved = agent_attention(q[:, :, rows], k[:, :, columns], v[:, :, columns], agents, pattern="noncausal-cross")
    torch.testing.assert_close(moved, found[:, :, rows], rtol=0, atol=1e-13)


@pytest.mark.parametrize("n", [1, 3, 7, 12, 49, 50])
@pytest.mark.parametrize("number", [1, 4, 5, 9])
def test_pooling_equals_adaptive_average_pooling(n, number):
    q = sample(n)[0]
    expected = F.adaptive_avg_pool1d(q.flatten(0, 1).mT, number).mT.unflatten(0, (2, 2))
    torch.testing.assert_close(pooled(q, number)[0], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("grid", [(5, 7), (7, 5), (2, 9), (1, 4), (6, 6)])
def test_pooling_on_a_grid_equals_adaptive_average_pooling_in_two_dimensions(grid):
    q = sample(grid[0] * grid[1])[0]
    expected = F.adaptive_avg_pool2d(q.flatten(0, 1).mT.unflatten(-1, grid), 3).flatten(2).mT.unflatten(0, (2, 2))
    torch.testing.assert_close(pooled(q, 9, grid=grid)[0], expected, rtol=0, atol=1e-14)


def test_pooling_after_the_head_split_equals_pooling_before():
    q = sample(15)[0]
    channels = q.transpose(1, 2).flatten(2)
    before = F.adaptive_avg_pool2d(channels.mT.unflatten(-1, (3, 5)), 2).flatten(2).mT
    torch.testing.assert_close(
        pooled(q, 4, grid=(3, 5))[0], before.unflatten(-1, (2, 4)).transpose(1, 2), rtol=0, atol=1e-14
    )


def test_bins_follow_the_valid_ranks_of_each_row():
    """Not a masked mean over the bins of the padded length, which would leave agents of short rows without tokens."""
    q = sample(12, batch=4)[0]
    lengths = torch.tensor([12, 7, 2, 0])
    agents, exists = pooled(q, 4, lengths=lengths)
    for row, length in enumerate(lengths[:3].tolist()):
        expected = F.adaptive_avg_pool1d(q[row, :, :length].mT, 4).mT
        torch.testing.assert_close(agents[row], expected, rtol=0, atol=1e-14)
    assert exists.tolist() == [[True] * 4] * 3 + [[False] * 4]


@pytest.mark.parametrize("pattern", ["noncausal-self", "noncausal-cross"])
def test_pooled_agents_of_padded_rows_equal_those_of_each_row_alone(pattern):
    q, k, v = sample()
    counts = [12, 5]
    mask = Mask(lengths=torch.tensor(counts))
    masks = {"mask": mask, "memory_mask": mask if "cross" in pattern else None}
    found = agent_attention(q, k, v, pattern=pattern, num_agents=4, agent_source="pool_q", **masks)
    for row, n in enumerate(counts):
        own = [x[row : row + 1, :, :n] for x in (q, k, v)]
        alone = agent_attention(*own, pattern=pattern, num_agents=4, agent_source="pool_q")
        torch.testing.assert_close(found[row : row + 1, :, :n], alone, rtol=0, atol=1e-13)


def test_a_grid_may_lie_anywhere_in_a_padded_row():
    q, k, v = sample(17)
    valid = torch.zeros(2, 17, dtype=torch.bool)
    valid[0, 2:17], valid[1, :15] = True, True
    options = {"pattern": "noncausal-self", "num_agents": 4, "grid": (3, 5)}
    found = agent_attention(q, k, v, mask=Mask(valid=valid), **options)
    for row in range(2):
        own = [x[row : row + 1, :, valid[row]] for x in (q, k, v)]
        torch.testing.assert_close(
            found[row : row + 1, :, valid[row]], agent_attention(*own, **options), rtol=0, atol=1e-13
        )


def test_places_without_a_token_belong_to_no_agent():
    """A grid of four rows of which the last two are missing: the lower agents do not exist."""
    q, k, v = sample(16)
    mask = Mask(lengths=torch.tensor([8, 16]))
    options = {"pattern": "noncausal-self", "num_agents": 4, "mask": mask, "grid": (4, 4)}
    found = agent_attention(q, k, v, **options)
    q, k, v = (x[:1, :, :8] for x in (q, k, v))
    upper = F.adaptive_avg_pool2d(q.flatten(0, 1).mT.unflatten(-1, (2, 4)), (1, 2)).flatten(2).mT.unflatten(0, (1, 2))
    torch.testing.assert_close(found[:1, :, :8], two_softmaxes(q, k, v, upper), rtol=0, atol=1e-13)


def test_a_class_token_is_a_key_and_a_query_but_is_not_pooled():
    q, k, v = sample(10)
    roles = torch.zeros(2, 10, dtype=torch.long)
    roles[:, 0] = Role.CLS
    found = agent_attention(q, k, v, pattern="noncausal-self", num_agents=4, grid=(3, 3), roles=roles)
    agents = F.adaptive_avg_pool2d(q[:, :, 1:].flatten(0, 1).mT.unflatten(-1, (3, 3)), 2).flatten(2).mT
    torch.testing.assert_close(found, two_softmaxes(q, k, v, agents.unflatten(0, (2, 2))), rtol=0, atol=1e-13)


@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_causal_agents_have_gathered_from_the_prefix_of_each_query(chunk_size):
    q, k, v = sample()
    agents = learned()
    found = agent_attention(q, k, v, agents, chunk_size=chunk_size)
    for t in range(12):
        expected = two_softmaxes(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], agents)
        torch.testing.assert_close(found[:, :, t : t + 1], expected, rtol=0, atol=1e-13)


def test_causal_agents_at_extreme_scores():
    q, k, v = sample()
    agents = 1e3 * learned()
    found = agent_attention(q, k, v, agents, chunk_size=4)
    assert (found - agent_attention(q, k, v, agents, form="reference")).abs().max() < 1e-12


def test_the_causal_state_has_a_maximum_a_sum_and_a_vector_for_each_agent():
    q, k, v = sample()
    state = agent_attention(q, k, v, learned(), return_state=True).state
    assert sum(x[0].numel() for x in (state.m, state.u, state.w)) == 2 * 5 * (2 + 3)


@pytest.mark.parametrize("pattern", ["noncausal-cross", "causal-cross"])
def test_learned_agents_absorb_memory_as_it_streams(pattern):
    q, k, v = sample(5, 13)
    agents, state = learned(), None
    for part in (slice(0, 1), slice(1, 6), slice(6, 13)):
        memory = {"k": k[:, :, part], "v": v[:, :, part], "agents": agents}
        state = absorb(MECHANISM, memory, pattern=pattern, state=state)
    found = apply(MECHANISM, {"q": q, "agents": agents}, pattern=pattern, state=state).output
    torch.testing.assert_close(found, agent_attention(q, k, v, agents, pattern=pattern), rtol=0, atol=1e-13)


def test_the_scale_multiplies_agents_and_queries():
    q, k, v = sample()
    agents = learned()
    found = agent_attention(q, k, v, agents, pattern="noncausal-self", scale=0.3)
    expected = (0.3 * q @ agents.mT).softmax(-1) @ ((0.3 * agents @ k.mT).softmax(-1) @ v)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("pattern", ["noncausal-self", "causal-self"])
def test_second_scale_and_shortcut_are_those_of_agent_sd(pattern):
    q, k, v = sample()
    agents = learned()
    options = {"second_scale_exponent": 0.3, "k_shortcut": 0.075}
    found = agent_attention(q, k, v, agents, pattern=pattern, **options)
    # softmax(d^-0.15 q A^T) is the plain second step for queries multiplied by d^0.35
    plain = agent_attention(4**0.35 * q, k, v, agents, pattern=pattern)
    torch.testing.assert_close(found, plain + 0.075 * v, rtol=0, atol=1e-13)


def test_a_shortcut_of_aligned_queries_takes_their_own_values():
    q, k, v = sample(4, 12)
    agents = learned()
    found = agent_attention(q, k, v, agents, k_shortcut=2.0)
    torch.testing.assert_close(found - agent_attention(q, k, v, agents), 2 * v[:, :, -4:], rtol=0, atol=1e-13)


@pytest.mark.parametrize("pattern", ["causal-self", "causal-cross"])
def test_pooled_agents_in_causal_patterns_are_refused_naming_learned_ones(pattern):
    q, k, v = sample()
    for options in ({}, {"agent_source": "pool_q"}):
        with pytest.raises(Unsupported, match="learned"):
            agent_attention(q, k, v, pattern=pattern, **options)
    with pytest.raises(Unsupported, match="learned"):
        create_layer("agent", 8, 2, pattern=pattern, agent_source="pool_q")


def test_pooled_agents_cannot_absorb_memory():
    layer = create_layer("agent", 8, 2, pattern="noncausal-cross", agent_source="pool_q", num_agents=3)
    assert layer(torch.randn(1, 4, 8), torch.randn(1, 6, 8)).output.shape == (1, 4, 8)
    with pytest.raises(Unsupported, match="learned"):
        layer.encode_memory(torch.randn(1, 6, 8))


@pytest.mark.parametrize(
    "options",
    [
        {"num_agents": 0},
        {"agent_source": "mean"},
        {"second_scale_exponent": 0.0},
        {"dwc": "all"},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(Unsupported):
        Config(**options)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        ({"agent_source": "learned"}, "without agents"),
        ({"agent_source": "pool_q", "agents": learned()}, "beside"),
        ({"grid": (3, 4), "num_agents": 5}, "square"),
        ({"grid": (3, 3), "num_agents": 4}, "grid"),
        ({"grid": (4, 4), "num_agents": 4}, "grid"),
        ({"grid": (3, 3), "num_agents": 4, "mask": Mask(lengths=torch.tensor([12, 3]))}, "grid"),
        ({"pattern": "noncausal-cross", "k_shortcut": 0.1, "agents": learned()}, "k_shortcut"),
        ({"pattern": "causal-self", "agents": learned(), "roles": torch.zeros(2, 12, dtype=torch.long)}, "roles"),
        ({"agents": learned(), "scale": -1.0, "second_scale_exponent": 0.3}, "scale"),
    ],
)
def test_what_cannot_be_honoured_is_refused(call, word):
    call = {"pattern": "noncausal-self", **call}
    with pytest.raises(Unsupported, match=word):
        agent_attention(*sample(), **call)


def heads_of(layer, x):
    return [f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (layer.query, layer.key, layer.value)]


@pytest.mark.parametrize("grid", [None, (3, 5), (5, 3)])
@pytest.mark.parametrize("of", ["auto", "input", "none"])
def test_the_layer_adds_the_convolution_before_the_output_projection(of, grid):
    layer = create_layer("agent", 8, 2, pattern="noncausal-self", num_agents=4, dwc=of).double()
    x = torch.randn(2, 15, 8, dtype=torch.float64)
    q, k, v = heads_of(layer, x)
    heads = agent_attention(q, k, v, pattern="noncausal-self", num_agents=4, grid=grid).transpose(1, 2).flatten(2)
    if of != "none":
        convolution = layer.merge.convolution
        image = (x if of == "input" else layer.value(x)).mT.unflatten(-1, grid or (1, 15))
        image = F.conv2d(image, convolution.weight, convolution.bias, padding=1, groups=8)
        heads = heads + image.flatten(2).mT
    found = layer(x, context=Context(grid=grid)).output
    torch.testing.assert_close(found, layer.output(heads), rtol=0, atol=1e-13)


def test_without_a_grid_the_convolution_is_one_dimensional():
    layer = create_layer("agent", 8, 2, pattern="noncausal-self", num_agents=4).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    convolution = layer.merge.convolution
    expected = F.conv1d(layer.value(x).mT, convolution.weight[:, :, 1], convolution.bias, padding=1, groups=8).mT
    without = create_layer("agent", 8, 2, pattern="noncausal-self", num_agents=4, dwc="none").double()
    without.load_state_dict({n: p for n, p in layer.state_dict().items() if "convolution" not in n})
    difference = layer(x).output - without(x).output
    torch.testing.assert_close(difference, F.linear(expected, layer.output.weight), rtol=0, atol=1e-13)


@pytest.mark.parametrize("grid", [None, (3, 4)])
def test_padding_of_any_shape_does_not_reach_the_convolution(grid):
    layer = create_layer("agent", 8, 2, pattern="noncausal-self", num_agents=4, bias=True).double()
    x = torch.randn(2, 15, 8, dtype=torch.float64)
    valid = torch.ones(2, 15, dtype=torch.bool)
    valid[0, :3], valid[1, [2, 7, 14]] = False, False
    found = layer(x.masked_fill(~valid[..., None], torch.nan), context=Context(Mask(valid=valid), grid=grid)).output
    for row in range(2):
        alone = layer(x[row : row + 1, valid[row]], context=Context(grid=grid)).output
        torch.testing.assert_close(found[row, valid[row]], alone[0], rtol=0, atol=1e-13)


def test_the_convolution_leaves_class_tokens_out():
    layer = create_layer("agent", 8, 2, pattern="noncausal-self", num_agents=4).double()
    x = torch.randn(2, 10, 8, dtype=torch.float64)
    roles = torch.zeros(2, 10, dtype=torch.long)
    roles[:, 4] = Role.CLS
    without = create_layer("agent", 8, 2, pattern="noncausal-self", num_agents=4, dwc="none").double()
    without.load_state_dict({n: p for n, p in layer.state_dict().items() if "convolution" not in n})
    context = Context(grid=(3, 3), roles=roles)
    difference = layer(x, context=context).output - without(x, context=context).output
    patches = [0, 1, 2, 3, 5, 6, 7, 8, 9]
    image = layer.merge.convolution(layer.value(x[:, patches]).mT.unflatten(-1, (3, 3))).flatten(2).mT
    torch.testing.assert_close(difference[:, patches], F.linear(image, layer.output.weight), rtol=0, atol=1e-13)
    assert difference[:, 4].abs().max() < 1e-14


@pytest.mark.parametrize("pattern", PATTERNS)
def test_learned_agents_and_the_convolution_exist_where_the_card_says(pattern):
    layer = create_layer("agent", 8, 2, pattern=pattern, num_agents=4)
    names = dict(layer.named_parameters())
    assert ("projection.agents" in names) == (pattern != "noncausal-self")
    assert ("merge.convolution.weight" in names) == (pattern == "noncausal-self")
    if pattern != "noncausal-self":
        assert names["projection.agents"].shape == (2, 4, 4)
        with pytest.raises(Unsupported, match="dwc"):
            create_layer("agent", 8, 2, pattern=pattern, dwc="value")


def test_decoding_a_layer_token_by_token_equals_the_whole():
    layer = create_layer("agent", 8, 2, num_agents=5).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    expected = layer(x).output
    state = layer(x[:, :3], context=WANT_STATE).state
    for t in range(3, 9):
        output, state = layer.step(x[:, t], state)
        torch.testing.assert_close(output, expected[:, t], rtol=0, atol=1e-13)


def test_grouped_values_are_convolved_as_the_heads_that_share_them():
    layer = create_layer("agent", 8, 4, num_kv_heads=2, pattern="noncausal-self", num_agents=3).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    without = create_layer("agent", 8, 4, num_kv_heads=2, pattern="noncausal-self", num_agents=3, dwc="none").double()
    without.load_state_dict({n: p for n, p in layer.state_dict().items() if "convolution" not in n})
    values = layer.value(x).unflatten(-1, (2, 2)).repeat_interleave(2, 2).flatten(2)
    image = layer.merge.convolution(values.mT[:, :, None]).flatten(2).mT
    difference = layer(x).output - without(x).output
    torch.testing.assert_close(difference, F.linear(image, layer.output.weight), rtol=0, atol=1e-13)


def recorded_layer(a, number):
    layer = create_layer("agent", 8, 2, pattern="noncausal-self", num_agents=number).double()
    layer.output.register_parameter("bias", torch.nn.Parameter(a["weight_proj_bias"]))
    weights = {"output": a["weight_proj_weight"], "query": a["weight_q_weight"]}
    weights["key"], weights["value"] = a["weight_kv_weight"].chunk(2)
    with torch.no_grad():
        for name, weight in weights.items():
            getattr(layer, name).weight.copy_(weight)
        for name in ("weight", "bias"):
            parameter = getattr(layer.merge.convolution, name)
            parameter.copy_(a.get(f"weight_dwc_{name}", torch.zeros_like(parameter)))
    return layer


@pytest.mark.parametrize("name", ["agent_core", "agent_core_nondivisible_pool", "agent_dwc"])
def test_layer_and_gradients_equal_the_official_code(name):
    a = load(name)
    grid, number = tuple(a["grid"].tolist()), a["agents"].shape[2]
    found = agent_attention(a["q"], a["k"], a["v"], pattern="noncausal-self", num_agents=number, grid=grid)
    torch.testing.assert_close(found.transpose(1, 2).flatten(2), a["attn_out"], rtol=0, atol=1e-10)  # observed 3.3e-16
    layer, x = recorded_layer(a, number), a["x"].requires_grad_()
    output = layer(x, context=Context(grid=grid)).output
    torch.testing.assert_close(output, a["out"], rtol=0, atol=1e-10)  # observed 5.3e-15
    (output * a["grad_out"]).sum().backward()
    torch.testing.assert_close(x.grad, a["grad_x"], rtol=0, atol=1e-10)  # observed 3.6e-15


def test_cross_attention_equals_the_official_code_with_spatial_reduction():
    """Keys and values of another length; agents pooled from the queries on their grid."""
    a = load("agent_spatial_reduction")
    found = agent_attention(
        a["q"], a["k"], a["v"], pattern="noncausal-cross", num_agents=4, agent_source="pool_q", grid=(6, 6)
    )
    torch.testing.assert_close(found.transpose(1, 2).flatten(2), a["attn_out"], rtol=0, atol=1e-10)  # observed 1.3e-15


def set_bias(layer, a):
    """The official code's tables, in whose names the first letter is what the bias is added for."""
    with torch.no_grad():
        for table, (block, rows, columns, other) in (
            (layer.projection.gather_bias, ("an", "ah", "aw", "ac")),
            (layer.projection.share_bias, ("na", "ha", "wa", "ca")),
        ):
            table.block.copy_(a[f"weight_{block}_bias"])
            for line, name in ((table.rows, rows), (table.columns, columns)):
                given = a[f"weight_{name}_bias"][0]
                line.copy_(given.flatten(2) if name[0] == "a" else given.flatten(1, 2).mT)
            if f"weight_{other}_bias" in a:
                table.other.copy_(a[f"weight_{other}_bias"].flatten().view(2, -1))


@pytest.mark.parametrize("name", ["agent_bias_dwc", "agent_bias_class_token"])
def test_agent_bias_and_convolution_equal_the_official_code(name):
    a = load(name)
    batch, n = a["x"].shape[:2]
    roles = torch.zeros(batch, n, dtype=torch.long)
    roles[:, : n - 36] = Role.CLS
    found = agent_attention(
        a["q"],
        a["k"],
        a["v"],
        gather_bias=a["bias1"].expand(batch, -1, -1, -1),
        share_bias=a["bias2"].expand(batch, -1, -1, -1),
        pattern="noncausal-self",
        num_agents=4,
        grid=(6, 6),
        roles=roles,
    )
    torch.testing.assert_close(found.transpose(1, 2).flatten(2), a["attn_out"], rtol=0, atol=1e-10)  # observed 6.7e-16
    options = {"num_agents": 4, "agent_bias": "all", "bias_grid": (6, 6)}
    layer = create_layer("agent", 8, 2, pattern="noncausal-self", **options).double()
    set_bias(layer, a)
    layer.output.register_parameter("bias", torch.nn.Parameter(a["weight_proj_bias"]))
    qkv = (
        a["weight_qkv_weight"] if "weight_qkv_weight" in a else torch.cat([a["weight_q_weight"], a["weight_kv_weight"]])
    )
    with torch.no_grad():
        for module, weight in zip((layer.query, layer.key, layer.value), qkv.chunk(3), strict=True):
            module.weight.copy_(weight)
        layer.output.weight.copy_(a["weight_proj_weight"])
        layer.merge.convolution.weight.copy_(a["weight_dwc_weight"])
        layer.merge.convolution.bias.copy_(a["weight_dwc_bias"])
    x = a["x"].requires_grad_()
    output = layer(x, context=Context(grid=(6, 6), roles=roles)).output
    torch.testing.assert_close(output, a["out"], rtol=0, atol=1e-10)  # observed 7.1e-15
    (output * a["grad_out"]).sum().backward()
    torch.testing.assert_close(x.grad, a["grad_x"], rtol=0, atol=1e-10)  # observed 5.3e-15


def biased_layer(**options):
    options = {"num_agents": 4, "agent_bias": "all", "bias_grid": (3, 5), "dwc": "none", **options}
    layer = create_layer("agent", 8, 2, pattern="noncausal-self", **options).double()
    with torch.no_grad():
        for table in layer.projection.parameters():
            table.normal_()
    return layer


def biases(layer, n, **context):
    heads = layer.projection.inputs({}, LayerCall(torch.zeros(1, n, 8, dtype=torch.float64), None, Context(**context)))
    return heads["gather_bias"], heads["share_bias"]


@pytest.mark.parametrize("grid", [(3, 5), (4, 6), (9, 2), (1, 30)])
def test_tables_are_read_as_images_are_resized(grid):
    layer = biased_layer()
    for bias, table, flat in zip(
        biases(layer, grid[0] * grid[1], grid=grid),
        (layer.projection.gather_bias, layer.projection.share_bias),
        (lambda b: b[0], lambda b: b[0].mT),
        strict=True,
    ):
        expected = F.interpolate(table.block, grid, mode="bilinear", align_corners=False)
        expected = expected + F.interpolate(table.rows, grid[0], mode="linear")[..., None]
        expected = expected + F.interpolate(table.columns, grid[1], mode="linear")[..., None, :]
        torch.testing.assert_close(flat(bias), expected.flatten(2))


def test_a_row_term_moves_whole_rows_of_a_grid_that_is_not_square():
    layer = biased_layer(agent_bias="lines")
    with torch.no_grad():
        for table in (layer.projection.gather_bias, layer.projection.share_bias):
            table.columns.zero_()
            table.rows.copy_(torch.arange(3.0))
    gather, share = biases(layer, 15, grid=(3, 5))
    expected = torch.arange(3.0, dtype=torch.float64).repeat_interleave(5)
    torch.testing.assert_close(gather, expected.expand(1, 2, 4, 15))
    torch.testing.assert_close(share, expected[:, None].expand(1, 2, 15, 4))


def test_the_bias_of_a_padded_sequence_or_grid_is_that_of_each_row_alone():
    layer, x = biased_layer(), torch.randn(3, 15, 8, dtype=torch.float64)
    lengths = torch.tensor([15, 6, 1])
    found = layer(x, context=Context(mask=Mask(lengths=lengths))).output
    for row, length in enumerate(lengths.tolist()):
        alone = layer(x[row : row + 1, :length]).output
        torch.testing.assert_close(found[row, :length], alone[0])
    valid = torch.ones(2, 17, dtype=torch.bool)
    valid[0, :2], valid[1, [3, 9]] = False, False
    wide = torch.randn(2, 17, 8, dtype=torch.float64)
    found = layer(wide, context=Context(mask=Mask(valid=valid), grid=(3, 5))).output
    for row in range(2):
        alone = layer(wide[row][valid[row]][None], context=Context(grid=(3, 5))).output[0]
        torch.testing.assert_close(found[row][valid[row]], alone)


def test_agents_and_their_bias_learn_and_are_saved():
    layer = biased_layer(agent_source="learned")
    again = biased_layer(agent_source="learned")
    again.load_state_dict(layer.state_dict())
    x = torch.randn(2, 15, 8, dtype=torch.float64)
    output = layer(x, context=Context(grid=(3, 5))).output
    torch.testing.assert_close(again(x, context=Context(grid=(3, 5))).output, output)
    output.square().sum().backward()
    for name, table in layer.projection.named_parameters():
        assert table.grad is not None, name
        assert float(table.grad.abs().max()) > 0 or name.endswith("other"), name


def test_an_agent_bias_that_cannot_be_is_refused():
    for options in ({"agent_bias": "all"}, {"agent_bias": "block", "bias_grid": (3, 3)}, {"bias_grid": (3, 3)}):
        with pytest.raises(Unsupported, match="bias_grid"):
            Config(**options)
    with pytest.raises(Unsupported, match="agent_bias"):
        create_layer("agent", 8, 2, pattern="causal-self", agent_bias="block")
    with pytest.raises(Unsupported, match="one or two sides"):
        biased_layer()(torch.randn(1, 8, 8, dtype=torch.float64), context=Context(grid=(2, 2, 2)))


@pytest.mark.parametrize("name", ["agent_bias_dwc", "agent_bias_class_token"])
def test_pooling_and_convolution_equal_the_official_code_where_it_has_a_bias(name):
    a = load(name)
    batch, n = a["x"].shape[:2]
    roles = torch.zeros(batch, n, dtype=torch.long)
    roles[:, : n - 36] = Role.CLS
    agents, _ = pooled(a["q"], 4, grid=(6, 6), roles=roles)
    torch.testing.assert_close(agents, a["agents"], rtol=0, atol=1e-10)  # observed 2.2e-16
    merge = create_layer("agent", 8, 2, pattern="noncausal-self").double().merge
    with torch.no_grad():
        merge.convolution.weight.copy_(a["weight_dwc_weight"])
        merge.convolution.bias.copy_(a["weight_dwc_bias"])
    heads = a["attn_out"].unflatten(-1, (2, 4)).transpose(1, 2)
    found = merge(heads, {"v": a["v"]}, LayerCall(a["x"], None, Context(grid=(6, 6), roles=roles)), None)
    torch.testing.assert_close(found.transpose(1, 2).flatten(2), a["core_out"], rtol=0, atol=1e-10)  # observed 1.8e-15
