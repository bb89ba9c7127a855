"""Tests specific to block-sparse attention: its layouts, how they meet masks, caches and memory, and parity."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import (
    GRAPH,
    calls,
    check_recorded,
    close,
    close_gradients,
    cut,
    in_pieces,
    load,
    qkv,
    read_in_pieces,
    refused,
    shaken,
    watched,
)
from torch import Tensor

import regard.engines.attention.torch_form as backend
from regard import get_mechanism
from regard.apply import absorb
from regard.contract import ALL_PATTERNS, BlockMask, Mask, Pattern
from regard.create import create_layer
from regard.engines import attention_forms
from regard.mechanisms.block_sparse import MECHANISM, Config, visible_blocks, visible_pairs
from regard.models import LanguageModel, LanguageModelConfig, from_pretrained, save_pretrained
from regard.workbench.verification.properties import FUNCTION_PROPERTIES
from regard.workbench.verification.verify import PROGRAMS, Place, check

HEADS = 2
USER = (torch.rand(HEADS, 40, 40, generator=torch.Generator().manual_seed(4)) < 0.4).tolist()
BY_HEAD = {"layout": "user", "block_size": 2, "visible": USER, "softcap": 2.0}
OPTIONS: list[dict[str, Any]] = [
    {"block_size": 3},
    {"block_size": 2, "global_blocks": 0},
    {"block_size": 3, "softcap": 0.8, "learn_sink": True},
    {"layout": "local_global", "block_size": 2, "neighbours": 0, "global_blocks": 0},
    {"layout": "local_global", "block_size": 3, "neighbours": 1, "global_blocks": 2, "learn_sink": True},
    {"layout": "random", "block_size": 2, "density": 0.3, "seed": 5},
    BY_HEAD,
    {"layout": "user", "block_size": 5, "visible": USER[0]},
]

run = calls(MECHANISM)
softmax = calls(get_mechanism("softmax"))


def layout_in_words(config: Config, beta: int, gamma: int, causal: bool) -> Tensor:
    """A mask over heads: whether query block beta may see key block gamma, by the table in the mechanism's docstring."""
    if config.layout == "user":
        return torch.tensor([head[beta][gamma] for head in config.visible]).expand(HEADS)
    if min(beta, gamma) < config.global_blocks or (beta == gamma):
        return torch.ones(HEADS, dtype=torch.bool)
    if config.layout == "random":
        drawn = visible_blocks(config, torch.tensor([[beta]]), torch.tensor([[gamma]]), heads=HEADS, causal=causal)
        return drawn[0, :, 0, 0]
    if config.layout == "local_global":
        near = abs(beta - gamma) <= config.neighbours
    elif causal:
        near = beta - gamma in (1, 2, 4, 8, 16, 32)
    else:
        near = bin(beta ^ gamma).count("1") == 1
    return torch.full((HEADS,), near)


def seen(options: dict, pattern: str, n: int, m: int) -> Tensor:
    """Visible pairs (heads, n, m), by the definition in words."""
    config, visible = Config(**options), torch.zeros(HEADS, n, m, dtype=torch.bool)
    for i, j in itertools.product(range(n), range(m)):
        at = i if pattern.endswith("cross") else i + m - n
        if at >= 0 and (pattern != "causal-self" or j <= at):
            blocks = at // config.block_size, j // config.block_size
            visible[:, i, j] = layout_in_words(config, *blocks, pattern == "causal-self")
    return visible


def scores_of(tensors: dict[str, Tensor], options: dict) -> Tensor:
    scores = tensors["q"] @ tensors["k"].repeat_interleave(HEADS // tensors["k"].shape[1], 1).mT / 2
    bound = options.get("softcap")
    return bound * torch.tanh(scores / bound) if bound else scores


def dense(tensors: dict[str, Tensor], visible: Tensor, options: dict) -> Tensor:
    """Dense attention, with the exponentials written out."""
    odds = torch.where(visible, scores_of(tensors, options).exp(), 0)
    total = odds.sum(-1, keepdim=True)
    if "sink" in tensors:
        total = total + tensors["sink"].exp()[:, None, None]
    return odds / torch.where(total > 0, total, 1) @ tensors["v"].repeat_interleave(HEADS // tensors["v"].shape[1], 1)


def problem(options: dict, n: int, m: int, groups: int = HEADS) -> dict[str, Tensor]:
    tensors = qkv(n, m, groups=groups)
    if options.get("learn_sink"):
        tensors["sink"] = torch.randn(HEADS, dtype=torch.float64)
    return {name: x.requires_grad_() for name, x in tensors.items()}


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("options", OPTIONS)
def test_output_and_gradients_equal_the_dense_formula(monkeypatch, options, pattern):
    for n, m, pairs in ((23, 23, 1 << 22), (13, 29, 1), (23, 11, 1), (1, 6, 1 << 22)):
        if pattern == "noncausal-self" and n != m:
            continue
        monkeypatch.setattr(backend, "PAIRS_AT_ONCE", pairs)
        monkeypatch.setattr(backend, "SMALLEST_BLOCK", 5)
        tensors = problem(options, n, m, groups=1)
        expected = dense(tensors, seen(options, pattern, n, m), options)
        close_gradients(run(tensors, options, pattern=pattern).output, expected, tensors)
        close(run(tensors, options, pattern=pattern, form="reference").output, expected)


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_layouts_by_head_have_the_properties_of_the_matrix(pattern):
    card = dataclasses.replace(MECHANISM, variants={"by head": BY_HEAD})
    for prop in FUNCTION_PROPERTIES:
        if prop.name not in {*PROGRAMS, "grouped_heads"}:  # it has four heads
            cell = check(Place(card, Pattern(pattern), prop, torch.float64, variant="by head"))
            assert cell is None or cell.status != "fail", (prop.name, cell.detail)


@pytest.mark.parametrize("options", OPTIONS)
def test_log_sum_exp_and_weights_are_those_of_the_visible_pairs(options):
    tensors, visible = problem(options, 17, 17), seen(options, "causal-self", 17, 17)
    result = run(tensors, options, want={"weights", "lse"})
    close(result.extras["weights"] @ tensors["v"], result.output)
    assert torch.equal(result.extras["weights"] > 0, visible.expand(2, -1, -1, -1))
    expected = scores_of(tensors, options).masked_fill(~visible, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(result.extras["lse"], expected, rtol=1e-12, atol=1e-12)  # -inf where nothing is seen


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (19, {"layout": "random", "density": 1.0, "block_size": 4}),
        (19, {"layout": "user", "visible": torch.ones(5, 5, dtype=torch.bool), "block_size": 4}),
        (5, {"layout": "local_global", "neighbours": 0, "global_blocks": 0, "block_size": 5}),
    ],
)
def test_all_blocks_are_softmax_attention_and_the_diagonal_alone_makes_blocks_independent(pattern, size, options):
    tensors = qkv(19)
    alone = [softmax(cut(tensors, slice(s, s + size)), pattern=pattern).output for s in range(0, 19, size)]
    close(run(tensors, options, pattern=pattern).output, torch.cat(alone, 2))


def test_butterfly_layers_carry_the_first_token_to_the_last_within_log2_of_the_blocks():
    x = torch.randn(1, 1, 32, 4, dtype=torch.float64, requires_grad=True)
    for layers in (3, 4):  # 16 blocks: the first is 15 away, which is a sum of four powers of two
        y = x
        for _ in range(layers):
            y = y + run(dict.fromkeys("qkv", y), OPTIONS[1]).output
        (gradient,) = torch.autograd.grad(y[0, 0, 31].sum(), x)
        assert bool((gradient[0, 0, 0] != 0).any()) == (layers == 4)


@pytest.mark.parametrize("density", [0.0, 0.125, 0.7, 1.0])
def test_random_blocks_have_their_density_and_no_row_column_or_head_follows_another(density):
    block, n = torch.arange(200)[None], 200
    config = Config(layout="random", density=density, global_blocks=0)
    drawn = visible_blocks(config, block, block, heads=4, causal=False)
    assert drawn.diagonal(dim1=-2, dim2=-1).all()
    share = (drawn.sum() - 4 * n) / (4 * n * (n - 1))
    assert abs(share - density) < 5 * math.sqrt(density * (1 - density) / (4 * n * n)) + 1e-9
    x = drawn.double() - density
    for a, b in ((x[:, :, 1:], x[:, :, :-1]), (x[..., 1:], x[..., :-1]), (x[:, 1:], x[:, :-1]), (x, x.mT)):
        off = ~(torch.eye(n, dtype=torch.bool)[: a.shape[-2], : a.shape[-1]])
        assert density in (0.0, 1.0) or abs((a * b)[..., off].mean()) < 0.02
    seeds = [
        visible_blocks(dataclasses.replace(config, seed=s), block, block, heads=1, causal=False) for s in (0, 1, -7)
    ]
    assert density in (0.0, 1.0) or not (torch.equal(seeds[0], seeds[1]) or torch.equal(seeds[0], seeds[2]))


@pytest.mark.parametrize("size", [2, 3, 4, 6, 12])
@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_blocks_of_the_mask_hide_further_pairs_whatever_their_size(pattern, size):
    options, tensors = {"block_size": 4, "layout": "random", "density": 0.5}, problem({}, 25, 25)
    blocks = BlockMask(torch.rand(2, HEADS, 24 // size, 24 // size) < 0.7, size)  # without the last token
    own = F.pad(blocks.visible.repeat_interleave(size, -1).repeat_interleave(size, -2), (0, 1, 0, 1))
    found = run(tensors, options, pattern=pattern, mask=Mask(blocks=blocks)).output
    close_gradients(found, dense(tensors, seen(options, pattern, 25, 25) & own, options), tensors)


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_a_user_layout_may_come_with_the_call_alone(pattern):
    tensors, mask = qkv(15), Mask(blocks=BlockMask(torch.rand(2, 1, 4, 4) < 0.6, 4))
    found = run(tensors, {"layout": "user"}, pattern=pattern, mask=mask).output
    close(found, softmax(tensors, pattern=pattern, mask=mask).output)
    refused("visible", run, tensors, {"layout": "user"}, pattern=pattern)


def test_blocks_of_the_mask_hold_in_every_step():
    call = {"options": {"block_size": 4}, "mask": Mask(blocks=BlockMask(torch.rand(2, HEADS, 4, 4) < 0.5, 6))}
    tensors, parts = qkv(21), torch.arange(21).split([5, 1, 1, 7, 1, 6])
    found, _ = in_pieces(lambda part, s: run(cut(tensors, part), state=s, return_state=True, **call), parts)
    close(found, run(tensors, **call).output)


@pytest.mark.parametrize("positions", ["alibi", "relative", "rotary"])
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-cross"])
def test_positions_and_blocks_agree_in_every_step(pattern, positions):
    layer = shaken(create_layer("block_sparse", 8, 2, pattern=pattern, positions=positions, block_size=2), 0.3).eval()
    x, memory = torch.randn(2, 15, 8, dtype=torch.float64), torch.randn(2, 11, 8, dtype=torch.float64)
    cross = pattern == "noncausal-cross"
    state = layer.encode_memory(memory) if cross else None
    found, _ = read_in_pieces(layer, x, [4, 1, 1, 6, 1, 1, 1], state)
    close(found, layer(x, memory if cross else None).output)


def test_one_row_of_blocks_is_made_for_a_step(monkeypatch):
    """The full square of blocks would cost more than the attention for long caches."""
    shape = lambda *given, blocks, **options: tuple(blocks.visible.shape)  # noqa: E731
    shapes = watched(monkeypatch, attention_forms, "attention", shape)
    state = run(qkv(40), {"block_size": 2}, return_state=True).state
    run(qkv(1), {"block_size": 2}, state=state)
    assert shapes == [(1, 1, 20, 20), (2, 1, 1, 21)]


@pytest.mark.parametrize("pattern", ["causal-self", "causal-cross"])
def test_continuing_compiles_whole(pattern):
    options = {**BY_HEAD, "visible": [[row[:6] for row in head[:6]] for head in USER]}
    if pattern == "causal-self":
        state, new = run(qkv(9), options, return_state=True).state, qkv(1)
    else:
        state = absorb(MECHANISM, qkv(0, 9), pattern=pattern, config=Config(**options))
        new = {"q": qkv(1)["q"]}

    def function(tensors: dict[str, Tensor], state: Any) -> Any:
        result = run(tensors, options, pattern=pattern, state=state)
        return result.output, result.state

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=GRAPH)
    for _ in range(2):
        (found, found_state), (expected, state) = compiled(new, state), function(new, state)
        close(found, expected)
        for name, tensor in state.tensors().items():
            assert torch.equal(found_state.tensors()[name], tensor), name


def test_a_saved_model_keeps_its_layout(tmp_path):
    visible = [[True, False, False], [True, True, False], [False, True, True]]
    plan = [("block_sparse", {"layout": "user", "visible": visible, "block_size": 4}), "block_sparse"]
    model = LanguageModel(LanguageModelConfig(11, dim=8, num_heads=2, plan=plan)).eval()
    save_pretrained(model, tmp_path)
    ids = torch.randint(11, (2, 12))
    assert torch.equal(from_pretrained(tmp_path)(ids).output, model(ids).output)


def test_a_layout_is_kept_as_plain_data_however_it_is_written():
    table = torch.rand(4, 4) < 0.5
    kept = Config(layout="user", visible=table)
    for same in (table.tolist(), table.int(), table[None].numpy(), tuple(map(tuple, table.tolist())), kept.visible):
        assert Config(layout="user", visible=same) == kept
    assert hash(kept) == hash(Config(layout="user", visible=table))


def test_the_cost_of_random_blocks_is_that_of_the_mean_draw():
    config, block = Config(layout="random", block_size=4, density=0.3), torch.arange(64)[None]
    drawn = visible_blocks(config, block, block, heads=500, causal=True).tril().double().sum() / 500
    assert visible_pairs(config, 256) == pytest.approx(float((drawn - 64) * 16 + 64 * 10), rel=0.01)


@pytest.mark.parametrize("given", ["option", "mask"])
def test_parity_with_the_authors_blocks_of_16_by_256(given):
    """The recording has padding, and a block of queries that sees nothing."""
    fixture = load("block_sparse_16_by_256")
    tensors = {name: fixture[name].requires_grad_() for name in "qkv"}
    visible, lengths = fixture["blocks"].repeat_interleave(16, -1), fixture["lengths"]
    by_option = {"visible": visible} if given == "option" else {}
    blocks = BlockMask(visible[None, None], 16) if given == "mask" else None
    options = {"layout": "user", "block_size": 16, **by_option}
    output = run(tensors, options, pattern="noncausal-self", mask=Mask(lengths=lengths, blocks=blocks)).output
    check_recorded(fixture, output, tensors)
    assert (output[:, :, 48:64] == 0).all()


def test_sequences_beyond_a_users_layout_are_refused():
    options = {"layout": "user", "visible": torch.ones(3, 2), "block_size": 4}
    state = run(qkv(8), options, return_state=True).state
    assert run(qkv(9, batch=1), options, mask=Mask(lengths=torch.tensor([8]))).output.shape[2] == 9
    for tensors, pattern in ((qkv(9), "causal-self"), (qkv(9), "noncausal-self"), (qkv(13, 8), "causal-cross")):
        refused("covers", run, tensors, options, pattern=pattern)
    refused("9 tokens", run, qkv(1), options, state=state)
    memory = absorb(MECHANISM, qkv(0, 8), pattern="causal-cross", config=Config(**options))
    memory = run({"q": qkv(12)["q"]}, options, pattern="causal-cross", state=memory).state
    assert memory.reset(torch.tensor([True, False])).queries.tolist() == [0, 12]
    refused("13 queries", run, {"q": qkv(1)["q"]}, options, pattern="causal-cross", state=memory)


def test_a_layout_of_other_heads_is_refused():
    options = {"layout": "user", "visible": torch.ones(3, 4, 4)}
    refused("3 heads", run, qkv(5), options)
    refused("3 heads", create_layer, "block_sparse", 8, 2, **options)
