"""Tests specific to agent attention: closed forms, sources of agents, biases, DWC, dropout, and recorded outputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import check_recorded, close, close_gradients, load, qkv, refused, shaken

from regard.contract import ALL_PATTERNS, Context, LayerCall, Mask, Pattern, Role, Shape
from regard.create import create_layer
from regard.functional import agent_attention
from regard.mechanisms.agent import MECHANISM, BiasTables, Config, biases_on_map
from regard.workbench.verification.properties.layers import layer_padding
from regard.workbench.verification.subjects import Subject

SELF = "noncausal-self"
NONCAUSAL = ["noncausal-self", "noncausal-cross"]
SOURCES = ["pool_q", "conv", "token_merge"]


def sample(n=12, m=None):
    return qkv(n, m, value_dim=3).values()


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def two_softmaxes(q, k, v, agents, gather=0.0, share=0.0, scale=0.5):
    return (scale * q @ agents.mT + share).softmax(-1) @ ((scale * agents @ k.mT + gather).softmax(-1) @ v)


def joined(heads):
    return heads.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("size", [1.0, 1e3])
@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_learned_agents_gather_by_softmax_from_what_each_query_sees(pattern, size):
    """In causal-self, agents gather from each query's prefix; the scale applies to agents and queries."""
    q, k, v = sample(12, 9 if pattern.cross else 12)
    agents, gather, share = size * randn(2, 5, 4), randn(2, 2, 5, k.shape[2]), randn(2, 2, 12, 5)
    found = agent_attention(q, k, v, agents, gather, share, pattern=pattern, scale=0.3, chunk_size=5)
    for t in range(12):
        row, seen = slice(t, t + 1), slice(0, t + 1 if pattern is Pattern.CAUSAL_SELF else None)
        biases = gather[..., seen], share[:, :, row]
        expected = two_softmaxes(q[:, :, row], k[:, :, seen], v[:, :, seen], agents, *biases, scale=0.3)
        close(found[:, :, row], expected)


def test_as_many_agents_as_queries_are_the_queries_themselves_and_one_is_their_mean():
    q, k, v = sample()
    close(agent_attention(q, k, v, pattern=SELF, num_agents=12), two_softmaxes(q, k, v, q), 1e-13)
    expected = F.scaled_dot_product_attention(q.mean(2, keepdim=True), k, v).expand_as(v)
    close(agent_attention(q, k, v, pattern=SELF, num_agents=1), expected, 1e-13)


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_the_implied_weights_are_row_stochastic_with_the_rank_of_the_agents(pattern):
    """Constant values therefore come out unchanged, whatever the biases."""
    q, k, v = sample()
    given = {"agents": randn(2, 3, 4), "gather_bias": randn(2, 2, 3, 12), "share_bias": randn(2, 2, 12, 3)}
    unit = torch.eye(12, dtype=torch.float64).expand(2, 2, -1, -1)
    weights = agent_attention(q, k, unit, **given, pattern=pattern)
    close(weights.sum(-1), torch.ones(2, 2, 12, dtype=torch.float64), 1e-13)
    assert (weights >= 0).all()
    close(weights @ v, agent_attention(q, k, v, **given, pattern=pattern), 1e-13)
    rank = torch.linalg.matrix_rank(weights)
    assert (rank > 3).all() if pattern is Pattern.CAUSAL_SELF else (rank == 3).all()


def test_places_without_a_token_belong_to_no_agent():
    """If the last two of a grid's four rows are missing, the lower agents do not exist."""
    q, k, v = sample(16)
    mask = Mask(lengths=torch.tensor([8, 16]))
    found = agent_attention(q, k, v, pattern=SELF, num_agents=4, mask=mask, grid=(4, 4))
    q, k, v = (x[:1, :, :8] for x in (q, k, v))
    upper = F.adaptive_avg_pool2d(q.flatten(0, 1).mT.unflatten(-1, (2, 4)), (1, 2)).flatten(2).mT.unflatten(0, (1, 2))
    close(found[:1, :, :8], two_softmaxes(q, k, v, upper), 1e-13)


@pytest.mark.parametrize(("pattern", "n"), [("noncausal-self", 12), ("causal-self", 12), ("causal-self", 4)])
def test_second_scale_and_shortcut_are_those_of_agent_sd(pattern, n):
    q, k, v = sample(n, 12)
    agents = randn(2, 5, 4)
    found = agent_attention(q, k, v, agents, pattern=pattern, second_scale_exponent=0.3, k_shortcut=0.075)
    # softmax(d^-0.15 q A^T) is the plain second step with queries multiplied by d^0.35
    plain = agent_attention(4**0.35 * q, k, v, agents, pattern=pattern)
    close(found, plain + 0.075 * v[:, :, -n:], 1e-13)


def make_layer(*, heads=2, pattern=SELF, **options):
    return create_layer("agent", 8, heads, pattern=pattern, **{"num_agents": 4, **options}).double()


@pytest.mark.parametrize("grid", [None, (3, 5), (5, 3)])
@pytest.mark.parametrize("of", ["auto", "input", "none"])
def test_the_layer_adds_the_convolution_before_the_output_projection(of, grid):
    """Without a grid the convolution is one-dimensional."""
    layer, x = make_layer(dwc=of), randn(2, 15, 8)
    q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (layer.query, layer.key, layer.value))
    heads = joined(agent_attention(q, k, v, pattern=SELF, num_agents=4, grid=grid))
    if of != "none":
        convolution = layer.merge.convolution
        image = (x if of == "input" else layer.value(x)).mT.unflatten(-1, grid or (1, 15))
        image = F.conv2d(image, convolution.weight, convolution.bias, padding=1, groups=8)
        heads = heads + image.flatten(2).mT
    close(layer(x, context=Context(grid=grid)).output, layer.output(heads), 1e-13)


def test_grouped_values_are_convolved_as_the_heads_that_share_them():
    layer, x = make_layer(heads=4, num_kv_heads=2), randn(2, 7, 8)
    whole = layer(x).output
    values = layer.value(x).unflatten(-1, (2, 2)).repeat_interleave(2, 2).flatten(2)
    image = layer.merge.convolution(values.mT[:, :, None]).flatten(2).mT
    for parameter in layer.merge.convolution.parameters():
        parameter.data.zero_()
    close(whole - layer(x).output, F.linear(image, layer.output.weight), 1e-13)


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_learned_agents_and_the_convolution_exist_where_the_card_says(pattern):
    shapes = {name: tuple(x.shape) for name, x in make_layer(pattern=pattern).named_parameters()}
    assert shapes.get("projection.agents") == (None if pattern == SELF else (2, 4, 4))
    assert ("merge.convolution.weight" in shapes) == (pattern == SELF)


OFFICIAL_TABLES = {"gather_bias": ("an", "ah", "aw", "ac"), "share_bias": ("na", "ha", "wa", "ca")}
"""The official names of the tables; in those that begin with "a" the agents' axis comes first."""


def official_layer(a, number):
    """A layer with the recorded weights."""
    options = {"agent_bias": "all", "bias_grid": (6, 6)} if "bias1" in a else {}
    layer = make_layer(num_agents=number, bias=True, **options)
    state = {name: torch.zeros_like(x) for name, x in layer.state_dict().items()}
    parts = [a["weight_qkv_weight"]] if "weight_qkv_weight" in a else [a["weight_q_weight"], a["weight_kv_weight"]]
    for name, weight in zip(("query", "key", "value"), torch.cat(parts).chunk(3), strict=True):
        state[f"{name}.weight"] = weight
    state |= {"output.weight": a["weight_proj_weight"], "output.bias": a["weight_proj_bias"]}
    for name in ("weight", "bias") if "weight_dwc_weight" in a else ():
        state[f"merge.convolution.{name}"] = a[f"weight_dwc_{name}"]
    for table, (block, rows, columns, other) in OFFICIAL_TABLES.items() if options else ():
        state[f"projection.{table}.block"] = a[f"weight_{block}_bias"]
        for line, name in (("rows", rows), ("columns", columns)):
            given = a[f"weight_{name}_bias"][0]
            state[f"projection.{table}.{line}"] = given.flatten(2) if name[0] == "a" else given.flatten(1, 2).mT
        if f"weight_{other}_bias" in a:
            state[f"projection.{table}.other"] = a[f"weight_{other}_bias"].flatten().view(2, -1)
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize(
    "name",
    ["agent_core", "agent_core_nondivisible_pool", "agent_dwc", "agent_bias_dwc", "agent_bias_class_token"],
)
def test_layer_and_gradients_equal_the_official_code(name):
    a = load(name)
    grid, number, x = tuple(a["grid"].tolist()), a["agents"].shape[2], a["x"].requires_grad_()
    roles = torch.zeros(x.shape[:2], dtype=torch.long)
    roles[:, : x.shape[1] - math.prod(grid)] = Role.CLS
    call = {"grid": grid, "roles": roles if roles.any() else None}
    recorded = {"gather_bias": a.get("bias1"), "share_bias": a.get("bias2")}
    biases = {name: b if b is None else b.expand(len(x), -1, -1, -1) for name, b in recorded.items()}
    found = agent_attention(a["q"], a["k"], a["v"], **biases, pattern=SELF, num_agents=number, **call)
    close(joined(found), a["attn_out"], 1e-10)  # observed 6.7e-16
    output = official_layer(a, number)(x, context=Context(**call)).output
    check_recorded(a, output, {"x": x}, 1e-10)  # observed 7.1e-15


def test_cross_attention_equals_the_official_code_with_spatial_reduction():
    """Keys and values have another length; agents are pooled from the queries on their grid."""
    a = load("agent_spatial_reduction")
    options = {"num_agents": 4, "agent_source": "pool_q", "grid": (6, 6)}
    found = agent_attention(a["q"], a["k"], a["v"], pattern="noncausal-cross", **options)
    close(joined(found), a["attn_out"], 1e-10)  # observed 1.3e-15


@pytest.mark.parametrize("grid", [(3, 5), (4, 6), (9, 2), (1, 30)])
def test_tables_are_read_as_images_are_resized(grid):
    """A row term shifts whole rows of the grid, also when it is not square."""
    projection = make_layer(agent_bias="all", bias_grid=(3, 5)).projection
    for parameter in projection.parameters():
        parameter.data.normal_()
    x = torch.zeros(1, math.prod(grid), 8, dtype=torch.float64)
    heads = projection.inputs({}, LayerCall(x, None, Context(grid=grid)))
    for bias, table in (
        (heads["gather_bias"], projection.gather_bias),
        (heads["share_bias"].mT, projection.share_bias),
    ):
        expected = F.interpolate(table.block, grid, mode="bilinear", align_corners=False)
        expected = expected + F.interpolate(table.rows, grid[0], mode="linear")[..., None]
        expected = expected + F.interpolate(table.columns, grid[1], mode="linear")[..., None, :]
        close(bias[0], expected.flatten(2))


def test_places_are_told_apart_in_bfloat16():
    projection = make_layer(agent_bias="lines", bias_grid=(1, 90)).projection.bfloat16()
    x = torch.zeros(1, 90, 8, dtype=torch.bfloat16)
    heads = projection.inputs({}, LayerCall(x, None, Context(grid=(1, 90))))
    table = projection.gather_bias
    assert torch.equal(heads["gather_bias"][0], table.columns + table.rows)


def attended(layer, x, agents):
    """The output by the definition of a layer without a convolution of values."""
    q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (layer.query, layer.key, layer.value))
    return layer.output(two_softmaxes(q, k, v, agents).transpose(1, 2).flatten(2))


def merged_one_by_one(q, number):
    """Merge tokens (n, width) pair by pair into size-weighted means until `number` are left."""
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


def merged(q, number):
    """The merged agents of each row, (B, H, number, D); similarity is that of all heads together."""
    rows = [merged_one_by_one(x, number) for x in q.transpose(1, 2).flatten(2)]
    return torch.stack(rows).unflatten(-1, q.shape[1::2]).transpose(1, 2)


@pytest.mark.parametrize("pattern", NONCAUSAL)
@pytest.mark.parametrize("n", [1, 2, 7, 12, 13, 40])
@pytest.mark.parametrize("number", [1, 2, 5, 12])
def test_merged_agents_are_pairs_merged_one_by_one_with_their_sizes(n, number, pattern):
    """If there are no more tokens than agents, the agents are the tokens themselves."""
    q, k, v = sample(n, n if pattern == SELF else 9)
    options = {"pattern": pattern, "num_agents": number, "agent_source": "token_merge"}
    expected = two_softmaxes(q, k, v, merged(q, number))
    for form in (None, "reference"):
        close(agent_attention(q, k, v, form=form, **options), expected)


def test_a_class_token_is_a_key_and_a_query_but_is_not_merged():
    q, k, v = sample(11)
    roles = torch.zeros(2, 11, dtype=torch.long)
    roles[:, 3] = Role.CLS
    expected = two_softmaxes(q, k, v, merged(q[:, :, [i for i in range(11) if i != 3]], 4))
    options = {"pattern": SELF, "num_agents": 4, "roles": roles, "agent_source": "token_merge"}
    for form in (None, "reference"):
        close(agent_attention(q, k, v, form=form, **options), expected)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("form", [None, "reference"])
def test_rows_without_a_token_to_make_agents_of_give_zero(source, form):
    roles = torch.full((2, 5), int(Role.CLS))
    roles[1, 2] = Role.TOKEN
    options = {"row_agents": randn(2, 2, 4, 4)} if source == "conv" else {}
    found = agent_attention(
        *sample(5), pattern=SELF, num_agents=4, agent_source=source, form=form, roles=roles, **options
    )
    assert (found[0] == 0).all()
    assert (found[1] != 0).all()


def test_merging_costs_the_cosines_of_its_rounds():
    shape = Shape(2, 3, 64, 64, 8, 8)
    plain, merging = (MECHANISM.cost(shape, Config(num_agents=16, agent_source=s)) for s in ("pool_q", "token_merge"))
    assert merging.flops - plain.flops == 2 * 2 * (32 * 32 + 16 * 16) * 3 * 8
    assert merging.memory - plain.memory == 2 * 32 * 32


@pytest.mark.parametrize("grid", [(3, 3), (6, 6), (5, 7), (2, 9), (1, 3), (18,), (3,), None])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_convolved_agents_are_those_of_a_strided_convolution_of_adaptive_means(stride, grid):
    """If the grid is exactly stride times the agents, it is a plain convolution of tokens. A sequence is a one-row grid."""
    layer = make_layer(agent_source="conv", num_agents=9, conv_stride=stride, dwc="none")
    sides, places = ((3, 3), grid) if grid and len(grid) == 2 else ((1, 9), (1, *(grid or (12,))))
    x, convolved = randn(2, math.prod(places), 8), layer.projection.convolved
    means = F.adaptive_avg_pool2d(x.mT.unflatten(-1, places), [stride * side for side in sides])
    image = F.conv2d(means, convolved.convolution.weight, stride=stride, groups=8)
    agents = convolved.linear(image.flatten(2).mT).unflatten(-1, (2, 4)).transpose(1, 2)
    close(layer(x, context=Context(grid=grid)).output, attended(layer, x, agents))


def test_convolved_agents_of_missing_places_do_not_exist():
    """If the last two of a grid's four rows are missing, no query reads the lower agents."""
    layer, x = make_layer(agent_source="conv", dwc="none"), randn(1, 16, 8)
    found = layer(x, context=Context(Mask(lengths=torch.tensor([8])), grid=(4, 4))).output[:, :8]
    convolved = layer.projection.convolved
    image = convolved.convolution(x[:, :8].mT.unflatten(-1, (2, 4)))
    agents = convolved.linear(image.flatten(2).mT).unflatten(-1, (2, 4)).transpose(1, 2)
    close(found, attended(layer, x[:, :8], agents))


def test_class_tokens_are_not_convolved():
    convolved, x = make_layer(agent_source="conv").projection.convolved, randn(2, 13, 8)
    roles = torch.zeros(2, 13, dtype=torch.long)
    roles[:, 5] = Role.CLS
    others = [i for i in range(13) if i != 5]
    expected = convolved(x[:, others], Context(grid=(3, 4)), None)
    close(convolved(x, Context(grid=(3, 4), roles=roles), None), expected)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("bias", [{}, {"agent_bias": "all", "bias_grid": (3, 5)}], ids=["", "bias"])
@pytest.mark.parametrize("grid", [None, (4, 3)])
def test_padding_and_class_tokens_anywhere_leave_a_layer_as_on_each_row_alone(source, bias, grid):
    """The tokens of a row fill the grid wherever they are, and the convolution of values sees only them."""
    layer, x = shaken(make_layer(agent_source=source, bias=True, **bias)), randn(3, 16, 8)
    valid = torch.ones(3, 16, dtype=torch.bool)
    valid[0, :3], valid[1, [2, 7, 14]], valid[2, 13:] = False, False, False
    roles = torch.zeros(3, 16, dtype=torch.long)
    roles[[0, 1, 2], [5, 0, 12]] = Role.CLS
    given = x.masked_fill(~valid[..., None], torch.nan)
    found = layer(given, context=Context(Mask(valid=valid), grid=grid, roles=roles)).output
    for row in range(3):
        own = Context(grid=grid, roles=roles[row : row + 1, valid[row]])
        close(found[row, valid[row]], layer(x[row : row + 1, valid[row]], context=own).output[0])


def test_a_layer_on_a_grid_has_shapes_on_the_meta_device():
    layer, x = make_layer(agent_bias="all", bias_grid=(2, 3)).to("meta"), randn(2, 7, 8).to("meta")
    roles = torch.zeros(2, 7, dtype=torch.long, device="meta")
    assert layer(x, context=Context(grid=(2, 3), roles=roles)).output.shape == x.shape
    assert layer(x[:, 1:], context=Context(grid=(2, 3))).output.shape == (2, 6, 8)


def test_padded_rows_of_a_cross_layer_are_convolved_at_their_own_length():
    subject = Subject(MECHANISM, Pattern.NONCAUSAL_CROSS, {"agent_source": "conv", "num_agents": 4})
    assert layer_padding(subject, torch.float64) < 1e-12


@pytest.mark.parametrize("source", SOURCES)
def test_agents_of_the_whole_sequence_are_refused_where_queries_come_one_by_one(source):
    given = {"row_agents": randn(2, 2, 4, 4)} if source == "conv" else {}
    for pattern in ("causal-self", "causal-cross"):
        own = {"pattern": pattern, "agent_source": source}
        refused(f"{source}.*learned' and agents=", agent_attention, *sample(), **own, **given)
        refused(f"{source}.*agent_source='learned'", make_layer, **own)
    layer, x, memory = make_layer(agent_source=source, pattern="noncausal-cross"), randn(2, 4, 8), randn(2, 6, 8)
    assert layer(x, memory).output.shape == (2, 4, 8)
    refused("learned", layer.encode_memory, memory)
    state = make_layer(agent_source="learned", pattern="noncausal-cross").encode_memory(memory)
    refused(f"{source} agents in noncausal-cross with a state", layer, x, state=state)
    refused("roles", layer, x, memory, context=Context(roles=torch.zeros(2, 6, dtype=torch.long)))


def kept(shape, generator):
    """Multipliers of dropout with rate 0.4."""
    return (torch.rand(shape, generator=generator, dtype=torch.float64) >= 0.4).double() / 0.6


@pytest.mark.parametrize("pattern", NONCAUSAL)
@pytest.mark.parametrize("form", [None, "reference"])
def test_dropout_falls_on_both_weight_matrices(pattern, form):
    q, k, v = sample(7, 7 if pattern == SELF else 9)
    agents, draws = randn(2, 5, 4), torch.Generator().manual_seed(3)
    gather = (agents @ k.mT / 2).softmax(-1)
    gather = gather * kept(gather.shape, draws)
    share = (q @ agents.mT / 2).softmax(-1)
    expected = (share * kept(share.shape, draws)) @ (gather @ v)
    again = torch.Generator().manual_seed(3)
    close(agent_attention(q, k, v, agents, pattern=pattern, dropout=0.4, generator=again, form=form), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_agents_without_a_key_give_nothing_and_finite_gradients_and_nan_is_passed_on(dropout: float) -> None:
    q, k, v = (x.requires_grad_() for x in sample(7, 9))
    agents = randn(2, 5, 4).requires_grad_()
    options = {"pattern": "noncausal-cross", "dropout": dropout, "generator": torch.Generator().manual_seed(3)}
    found = agent_attention(q, k, v, agents, memory_mask=Mask(lengths=torch.tensor([9, 0])), **options)
    assert bool((found[1] == 0).all()) and bool(found[0].any())
    for gradient in torch.autograd.grad(found.sum(), (q, k, v, agents)):
        assert bool(gradient.isfinite().all())
    with torch.no_grad():
        k[0, :, 0] = torch.nan
        assert bool(agent_attention(q, k, v, agents, **options)[0].isnan().any())


@pytest.mark.parametrize("form", [None, "reference", "chunked"])
def test_a_running_softmax_keeps_all_weights_but_those_of_the_queries(form):
    q, k, v = sample(7)
    agents = randn(2, 5, 4)
    share = (q @ agents.mT / 2).softmax(-1) * kept((2, 2, 7, 5), torch.Generator().manual_seed(3))
    outputs = [
        share[:, :, t, None] @ ((agents @ k[:, :, : t + 1].mT / 2).softmax(-1) @ v[:, :, : t + 1]) for t in range(7)
    ]
    again = torch.Generator().manual_seed(3)
    close(agent_attention(q, k, v, agents, dropout=0.4, generator=again, form=form), torch.cat(outputs, 2))


def test_options_that_a_layer_s_pattern_or_grid_lacks_are_refused():
    for pattern in ("causal-self", "noncausal-cross", "causal-cross"):
        for options in ({"dwc": "value"}, {"agent_bias": "block"}):
            refused(next(iter(options)), make_layer, **{"pattern": pattern, **options})
    layer = make_layer(agent_bias="block", dwc="none")
    refused("one or two sides", layer, randn(1, 8, 8), context=Context(grid=(2, 2, 2)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"agent_source": "learned"}, "without agents"),
        ({"agent_source": "pool_q", "agents": randn(2, 5, 4)}, "together"),
        ({"grid": (3, 4), "num_agents": 5}, "square"),
        ({"grid": (3, 3), "num_agents": 4}, "grid"),
        ({"grid": (4, 4), "num_agents": 4}, "grid"),
        ({"grid": (3, 3), "num_agents": 4, "mask": Mask(lengths=torch.tensor([12, 3]))}, "grid"),
        ({"pattern": "noncausal-cross", "k_shortcut": 0.1, "agents": randn(2, 5, 4)}, "k_shortcut"),
        ({"pattern": "causal-self", "agents": randn(2, 5, 4), "roles": torch.zeros(2, 12, dtype=torch.long)}, "roles"),
        ({"agents": randn(2, 5, 4), "scale": -1.0, "second_scale_exponent": 0.3}, "scale"),
        ({"agent_source": "conv"}, "without row_agents"),
        ({"agent_source": "pool_q", "row_agents": randn(2, 2, 5, 4)}, "together"),
        ({"agent_source": "learned", "agents": randn(2, 5, 4), "row_agents": randn(2, 2, 5, 4)}, "row_agents together"),
        ({"agent_source": "token_merge", "agents": randn(2, 5, 4)}, "agents together"),
        ({"agent_source": "conv", "row_agents": randn(2, 2, 5, 4), "grid": (3, 4)}, "square"),
    ],
)
def test_calls_that_do_not_fit_are_refused(call, words):
    refused(words, agent_attention, *sample(), **{"pattern": SELF, **call})


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize(
    ("source", "bias", "grid"), [("pool_q", "all", (5, 7)), ("conv", "block", (4, 4)), ("pool_q", "lines", (3, 5))]
)
def test_class_tokens_may_come_first_or_elsewhere(source: str, bias: str, grid: tuple[int, int], first: int) -> None:
    """Class tokens that come first take a fast path that ignores token places, with the same result."""
    n = math.prod(grid)
    lines = {} if bias == "block" else {"bias_grid": grid}
    layer = shaken(make_layer(agent_source=source, num_agents=4, agent_bias=bias, **lines))
    x = randn(2, first + n, 8)
    order = torch.cat([torch.arange(first, first + n - 3), torch.arange(first), torch.arange(first + n - 3, first + n)])
    roles = torch.zeros(2, first + n, dtype=torch.long)
    roles[:, :first] = Role.CLS
    found = layer(x, context=Context(grid=grid, roles=roles if first else None)).output
    elsewhere = Context(Mask(lengths=torch.full((2,), first + n)), grid=grid, roles=roles[:, order])
    close(found[:, order], layer(x[:, order], context=elsewhere).output)


def test_more_tokens_than_the_grid_has_places_are_not_taken_for_class_tokens():
    roles = torch.zeros(2, 13, dtype=torch.long)
    refused("grid", make_layer(), randn(2, 13, 8), context=Context(grid=(3, 4), roles=roles))


@pytest.mark.parametrize("kind", ["block", "lines", "all"])
def test_biases_of_a_whole_map_are_those_of_its_places(kind: str) -> None:
    """For maps smaller and larger than the tables, also of one row; entries of tokens off the map get zero gradients."""
    tables = [shaken(BiasTables(2, 3, kind, None if kind == "block" else (4, 6))) for _ in range(2)]
    parameters = [parameter for table in tables for parameter in table.parameters()]
    for rows, columns in ((4, 6), (3, 11), (1, 5)):
        index = torch.arange(rows * columns)[None]
        extents = [torch.full((1, 1), side) for side in (rows, columns)]
        nowhere = torch.zeros_like(index, dtype=torch.bool)
        shares = tables[0].shares([index // columns, index % columns], extents, nowhere)
        expected = torch.stack([table(shares)[0] for table in tables])
        close_gradients(biases_on_map(tables, rows, columns), expected, parameters)
