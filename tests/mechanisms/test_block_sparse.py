"""What is peculiar to block-sparse attention: its layouts, how they meet masks, caches and memory, and parity."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard.engines.attention.torch_form as backend
from regard import get_mechanism
from regard.apply import absorb, apply
from regard.contract import ALL_PATTERNS, BlockMask, Context, Mask, Pattern, Shape, Unsupported
from regard.create import create_layer
from regard.engines.block_patterns import butterfly_blocks, local_global_blocks
from regard.functional import block_sparse_attention
from regard.mechanisms.block_sparse import MECHANISM, Config, cost, visible_blocks, visible_pairs
from regard.models import LanguageModel, LanguageModelConfig, from_pretrained, save_pretrained
from regard.workbench.subjects import Subject

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
HEADS = 2
USER = (torch.rand(HEADS, 40, 40, generator=torch.Generator().manual_seed(4)) < 0.4).tolist()
OPTIONS: list[dict[str, Any]] = [
    {"block_size": 3},
    {"block_size": 2, "global_blocks": 0},
    {"block_size": 3, "softcap": 0.8, "learn_sink": True},
    {"layout": "local_global", "block_size": 2, "neighbours": 0, "global_blocks": 0},
    {"layout": "local_global", "block_size": 3, "neighbours": 1, "global_blocks": 2, "learn_sink": True},
    {"layout": "random", "block_size": 2, "density": 0.3, "seed": 5},
    {"layout": "user", "block_size": 2, "visible": USER, "softcap": 2.0},
    {"layout": "user", "block_size": 5, "visible": USER[0]},
]


def inputs(n: int, m: int | None = None, batch: int = 2, heads: int = HEADS, groups: int = HEADS) -> dict[str, Tensor]:
    m = n if m is None else m
    shapes = {"q": (heads, n), "k": (groups, m), "v": (groups, m)}
    return {name: torch.randn(batch, *shape, 4, dtype=torch.float64) for name, shape in shapes.items()}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def run(tensors: dict[str, Tensor], pattern: str = "causal-self", options: dict | None = None, **call: Any) -> Tensor:
    return apply(MECHANISM, tensors, pattern=pattern, config=Config(**(options or {})), **call).output


def layout_in_words(config: Config, beta: int, gamma: int, causal: bool) -> Tensor:
    """Whether block beta of queries may see block gamma of keys, by head: from the docstring's table."""
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
    """Visible pairs (heads, n, m), from the definition in words."""
    config, visible = Config(**options), torch.zeros(HEADS, n, m, dtype=torch.bool)
    for i, j in itertools.product(range(n), range(m)):
        at = i if pattern.endswith("cross") else i + m - n
        if at >= 0 and (pattern != "causal-self" or j <= at):
            visible[:, i, j] = layout_in_words(
                config, at // config.block_size, j // config.block_size, pattern == "causal-self"
            )
    return visible


def dense(tensors: dict[str, Tensor], visible: Tensor, options: dict, bias: Tensor | float = 0.0) -> Tensor:
    """The formula with exponentials written out."""
    k, v = (tensors[x].repeat_interleave(tensors["q"].shape[1] // tensors[x].shape[1], 1) for x in "kv")
    scores = tensors["q"] @ k.mT / tensors["q"].shape[-1] ** 0.5
    if options.get("softcap"):
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    odds = torch.where(visible, (scores + bias).exp(), 0)
    total = odds.sum(-1, keepdim=True)
    if "sink" in tensors:
        total = total + tensors["sink"].exp()[:, None, None]
    return odds / torch.where(total > 0, total, 1) @ v


def problem(options: dict, n: int, m: int, groups: int = HEADS) -> dict[str, Tensor]:
    tensors = inputs(n, m, groups=groups)
    if options.get("learn_sink"):
        tensors["sink"] = torch.randn(HEADS, dtype=torch.float64)
    return {name: x.requires_grad_() for name, x in tensors.items()}


def same_with_gradients(found: Tensor, expected: Tensor, tensors: dict[str, Tensor]) -> None:
    close(found, expected)
    cotangent, leaves = torch.randn_like(expected), list(tensors.values())
    for a, b in zip(
        torch.autograd.grad(found, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent), strict=True
    ):
        close(a, b)


# exactness


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("options", OPTIONS)
def test_output_and_gradients_equal_the_dense_formula(monkeypatch, options, pattern):
    for n, m, cut in ((23, 23, 1 << 22), (13, 29, 1), (23, 11, 1), (1, 6, 1 << 22)):
        if pattern == "noncausal-self" and n != m:
            continue
        monkeypatch.setattr(backend, "PAIRS_AT_ONCE", cut)
        monkeypatch.setattr(backend, "SMALLEST_BLOCK", 5)
        tensors = problem(options, n, m, groups=1)
        expected = dense(tensors, seen(options, pattern, n, m), options)
        same_with_gradients(run(tensors, pattern, options), expected, tensors)
        close(run(tensors, pattern, options, form="reference"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small_blocks_keep_the_published_tolerances(dtype):
    for options in (OPTIONS[0], OPTIONS[2], OPTIONS[5]):
        subject = Subject(MECHANISM, Pattern.CAUSAL_SELF, options)
        tensors = subject.inputs(65, dtype=dtype)
        found, expected = subject.run(tensors).output, subject.reference(tensors)
        assert found.dtype == dtype
        assert (found - expected).abs().max() <= MECHANISM.tolerances[dtype] * expected.abs().max()


def test_log_sum_exp_and_weights_are_those_of_the_visible_pairs():
    for options in OPTIONS:
        tensors = problem(options, 17, 17)
        result = apply(MECHANISM, tensors, config=Config(**options), want={"weights", "lse"})
        close(result.extras["weights"] @ tensors["v"], result.output)
        assert torch.equal(result.extras["weights"] > 0, seen(options, "causal-self", 17, 17).expand(2, -1, -1, -1))
        scores = tensors["q"] @ tensors["k"].mT / 2
        if options.get("softcap"):
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        hidden = ~seen(options, "causal-self", 17, 17)
        close(result.extras["lse"], scores.masked_fill(hidden, -torch.inf).logsumexp(-1))


def test_large_scores_stay_finite():
    tensors = {name: (1e4 * x).float().requires_grad_() for name, x in inputs(12).items()}
    output = run(tensors, options={"block_size": 2, "global_blocks": 0})
    output.sum().backward()
    assert output.isfinite().all() and all(x.grad.isfinite().all() for x in tensors.values())


def test_seeded_dropout_drops_visible_weights_only():
    tensors = inputs(24) | {"v": torch.eye(24, dtype=torch.float64).expand(2, HEADS, 24, 24)}
    options = OPTIONS[5]
    whole = run(tensors, options=options)
    dropped = run(tensors, options=options, dropout=0.3, generator=torch.Generator().manual_seed(1))
    again = run(tensors, options=options, dropout=0.3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(dropped, again)
    kept = dropped != 0
    close(dropped, whole * kept / 0.7)
    assert 0.6 < kept.sum() / (whole != 0).sum() < 0.8


# layouts


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_all_blocks_visible_is_softmax_attention(pattern):
    tensors = inputs(19)
    expected = apply(get_mechanism("softmax"), tensors, pattern=pattern).output
    for options in (
        {"layout": "random", "density": 1.0, "block_size": 4},
        {"layout": "local_global", "neighbours": 9, "block_size": 4},
        {"layout": "user", "visible": torch.ones(5, 5, dtype=torch.bool), "block_size": 4},
        {"block_size": 64},
    ):
        close(run(tensors, pattern, options), expected)


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_the_diagonal_alone_makes_blocks_independent(pattern):
    tensors = inputs(18)
    alone = [
        apply(get_mechanism("softmax"), {x: t[:, :, s : s + 5] for x, t in tensors.items()}, pattern=pattern).output
        for s in range(0, 18, 5)
    ]
    for options in (
        {"layout": "local_global", "neighbours": 0, "global_blocks": 0, "block_size": 5},
        {"layout": "user", "visible": torch.eye(4), "block_size": 5},
    ):
        close(run(tensors, pattern, options), torch.cat(alone, 2))


def test_causality_as_a_layout_is_the_causal_pattern():
    tensors = inputs(14)
    triangle = {"layout": "user", "visible": torch.ones(14, 14).tril(), "block_size": 1}
    close(run(tensors, "noncausal-self", triangle), apply(get_mechanism("softmax"), tensors).output)


def test_layouts_are_those_of_the_block_patterns():
    block = torch.arange(21)[None]
    for causal, g in itertools.product((False, True), (0, 1, 3)):
        found = visible_blocks(Config(global_blocks=g), block, block, heads=HEADS, causal=causal)
        expected = butterfly_blocks(21, 1, causal=causal, global_blocks=g).visible
        assert torch.equal(found.tril(), expected.tril()) if causal else torch.equal(found, expected)
        config = Config(layout="local_global", neighbours=2, global_blocks=g)
        found = visible_blocks(config, block, block, heads=HEADS, causal=causal)
        assert torch.equal(found, local_global_blocks(21, 1, neighbours=2, global_blocks=g).visible)


def test_butterfly_layers_carry_the_first_token_to_the_last_within_log2_of_the_blocks():
    options = {"block_size": 2, "global_blocks": 0}
    x = torch.randn(1, 1, 32, 4, dtype=torch.float64, requires_grad=True)
    for layers in (3, 4):  # 16 blocks; the first is 15 away, a sum of four powers of two
        y = x
        for _ in range(layers):
            y = y + run(dict.fromkeys("qkv", y), options=options)
        (gradient,) = torch.autograd.grad(y[0, 0, 31].sum(), x)
        assert bool((gradient[0, 0, 0] != 0).any()) == (layers == 4)


def test_random_blocks_have_their_density_and_differ_by_head_and_seed():
    block, n = torch.arange(200)[None], 200
    for density in (0.0, 0.125, 0.7, 1.0):
        config = Config(layout="random", density=density, global_blocks=0)
        drawn = visible_blocks(config, block, block, heads=4, causal=False)
        assert drawn.diagonal(dim1=-2, dim2=-1).all()
        share = (drawn.sum() - 4 * n) / (4 * n * (n - 1))
        assert abs(share - density) < 5 * math.sqrt(density * (1 - density) / (4 * n * n)) + 1e-9
        # neither rows nor columns nor heads follow each other
        x = drawn.double() - density
        for a, b in ((x[:, :, 1:], x[:, :, :-1]), (x[..., 1:], x[..., :-1]), (x[:, 1:], x[:, :-1]), (x, x.mT)):
            off = ~(torch.eye(n, dtype=torch.bool)[: a.shape[-2], : a.shape[-1]])
            if 0 < density < 1:
                assert abs((a * b)[..., off].mean()) < 0.02
    seeds = [visible_blocks(Config(layout="random", seed=s), block, block, heads=1, causal=False) for s in (0, 1, -7)]
    assert not torch.equal(seeds[0], seeds[1]) and not torch.equal(seeds[0], seeds[2])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_padding_beside_a_row_does_not_move_its_blocks(options, pattern):
    tensors = problem(options, 20, 20)
    valid = torch.rand(2, 20) > 0.4
    found = run(tensors, pattern, options, mask=Mask(valid=valid))
    for row in range(2):
        own = {n: x if n == "sink" else x[row : row + 1, :, valid[row]] for n, x in tensors.items()}
        count = int(valid[row].sum())
        close(found[row : row + 1, :, valid[row]], dense(own, seen(options, pattern, count, count), options))


# the call's own blocks


@pytest.mark.parametrize("size", [2, 3, 4, 6, 12])
@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_blocks_of_the_mask_hide_further_pairs_whatever_their_size(pattern, size):
    n = 25
    options = {"block_size": 4, "layout": "random", "density": 0.5}
    blocks = BlockMask(torch.rand(2, HEADS, 24 // size, 24 // size) < 0.7, size)  # the last token is beyond them
    own = F.pad(blocks.visible.repeat_interleave(size, -1).repeat_interleave(size, -2), (0, 1, 0, 1))
    tensors = problem(options, n, n)
    same_with_gradients(
        run(tensors, pattern, options, mask=Mask(blocks=blocks)),
        dense(tensors, seen(options, pattern, n, n) & own, options),
        tensors,
    )


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_a_user_layout_may_come_with_the_call_alone(pattern):
    tensors, mask = inputs(15), Mask(blocks=BlockMask(torch.rand(2, 1, 4, 4) < 0.6, 4))
    expected = apply(get_mechanism("softmax"), tensors, pattern=pattern, mask=mask).output
    close(run(tensors, pattern, {"layout": "user"}, mask=mask), expected)
    with pytest.raises(Unsupported, match="visible"):
        run(tensors, pattern, {"layout": "user"})


def test_blocks_of_the_mask_hold_in_every_step():
    options, tensors = {"block_size": 4}, inputs(21)
    mask = Mask(blocks=BlockMask(torch.rand(2, HEADS, 4, 4) < 0.5, 6))
    whole = run(tensors, options=options, mask=mask)
    state, outputs = None, []
    for part in torch.arange(21).split([5, 1, 1, 7, 1, 6]):
        piece = {name: x[:, :, part] for name, x in tensors.items()}
        result = apply(MECHANISM, piece, state=state, return_state=True, config=Config(**options), mask=mask)
        state = result.state
        outputs.append(result.output)
    close(torch.cat(outputs, 2), whole)


# state and memory


@pytest.mark.parametrize("options", OPTIONS)
def test_rows_of_different_lengths_continue_each_from_its_own_block(options):
    lengths = [torch.tensor([0, 3, 9]), torch.tensor([1, 0, 1]), torch.tensor([8, 2, 0]), torch.tensor([1, 1, 1])]
    total = sum(lengths)
    whole = inputs(int(total.max()), batch=3)
    extra = {"sink": torch.randn(HEADS, dtype=torch.float64)} if options.get("learn_sink") else {}
    expected = run(whole | extra, options=options, mask=Mask(lengths=total))
    state, done = None, torch.zeros(3, dtype=torch.long)
    for new in lengths:
        slots = (done[:, None] + torch.arange(int(new.max()))).clamp(max=int(total.max()) - 1)
        piece = {name: torch.stack([x[b, :, slots[b]] for b in range(3)]) for name, x in whole.items()} | extra
        result = apply(
            MECHANISM, piece, mask=Mask(lengths=new), state=state, return_state=True, config=Config(**options)
        )
        state = result.state
        for b in range(3):
            close(result.output[b, :, : new[b]], expected[b, :, done[b] : done[b] + new[b]])
        done = done + new
    assert torch.equal(state.length, total)
    assert (state.queries == 0).all()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pattern", ["noncausal-cross", "causal-cross"])
def test_queries_that_read_a_memory_count_on_row_by_row(options, pattern):
    tensors = inputs(19, 14)
    extra = {"sink": torch.randn(HEADS, dtype=torch.float64)} if options.get("learn_sink") else {}
    expected = run(tensors | extra, pattern, options)
    config = Config(**options)
    state = None
    for part in torch.arange(14).split([1, 8, 5]):
        memory = {x: tensors[x][:, :, part] for x in "kv"}
        state = absorb(MECHANISM, memory, pattern=pattern, state=state, config=config)
    done = torch.zeros(2, dtype=torch.long)
    for new in (torch.tensor([5, 1]), torch.tensor([0, 1]), torch.tensor([7, 4]), torch.tensor([1, 1])):
        slots = (done[:, None] + torch.arange(int(new.max()))).clamp(max=18)
        q = torch.stack([tensors["q"][b, :, slots[b]] for b in range(2)])
        result = apply(MECHANISM, {"q": q} | extra, pattern=pattern, mask=Mask(lengths=new), state=state, config=config)
        state = result.state
        for b in range(2):
            close(result.output[b, :, : new[b]], expected[b, :, done[b] : done[b] + new[b]])
        done = done + new
        assert torch.equal(state.queries, done)
    assert (state.reset(torch.tensor([True, False])).queries == torch.tensor([0, int(done[1])])).all()


@pytest.mark.parametrize("positions", ["alibi", "relative", "rotary"])
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-cross"])
def test_positions_and_blocks_agree_in_every_step(pattern, positions):
    torch.manual_seed(0)
    layer = create_layer("block_sparse", 8, 2, pattern=pattern, positions=positions, block_size=2).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 15, 8, dtype=torch.float64)
    memory = torch.randn(2, 11, 8, dtype=torch.float64) if pattern.endswith("cross") else None
    whole = layer(x, memory).output
    state = None if memory is None else layer.encode_memory(memory)
    outputs = []
    for part in torch.arange(15).split([4, 1, 1, 6, 1, 1, 1]):
        result = layer(x[:, part], state=state, context=Context(want=frozenset({"state"})))
        state = result.state
        outputs.append(result.output)
    close(torch.cat(outputs, 1), whole)


def test_one_row_of_blocks_is_made_for_a_step(monkeypatch):
    """Not the square of all blocks, which at long caches would cost more than the attention."""
    import regard.mechanisms.block_sparse as module

    shapes = []
    original = module.attention

    def watched(*args: Any, blocks: BlockMask, **options: Any) -> Any:
        shapes.append(tuple(blocks.visible.shape))
        return original(*args, blocks=blocks, **options)

    monkeypatch.setattr(module, "attention", watched)
    config = Config(block_size=2)
    state = apply(MECHANISM, inputs(40), return_state=True, config=config).state
    apply(MECHANISM, inputs(1), state=state, config=config)
    assert shapes == [(1, 1, 20, 20), (2, 1, 1, 21)]


@pytest.mark.parametrize("pattern", ["causal-self", "causal-cross"])
def test_continuing_compiles_whole(pattern):
    options = {"layout": "user", "block_size": 2, "visible": USER}
    q, memory = inputs(1, 9)["q"], inputs(0, 9)
    if pattern == "causal-self":
        state = apply(MECHANISM, inputs(9), return_state=True, config=Config(**options)).state
        new = inputs(1)
    else:
        state, new = absorb(MECHANISM, memory, pattern=pattern, config=Config(**options)), {"q": q}

    def function(tensors: dict[str, Tensor], state: Any) -> Any:
        result = apply(MECHANISM, tensors, pattern=pattern, state=state, config=Config(**options))
        return result.output, result.state

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        (found, found_state), (expected, state) = compiled(new, state), function(new, state)
        close(found, expected)
        for name, tensor in state.tensors().items():
            assert torch.equal(found_state.tensors()[name], tensor), name


@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[5], OPTIONS[6]])
def test_no_matrix_of_all_pairs_is_kept_for_backward(monkeypatch, options):
    n = 1024
    options = options | {"block_size": 32}
    monkeypatch.setattr(backend, "PAIRS_AT_ONCE", 1 << 16)
    tensors = {name: x.float().requires_grad_() for name, x in inputs(n, batch=1).items()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run(tensors, options=options)
    assert sum(storages.values()) < n * n


# options, models, cost


def test_a_saved_model_keeps_its_layout(tmp_path):
    visible = [[True, False, False], [True, True, False], [False, True, True]]
    plan = [("block_sparse", {"layout": "user", "visible": visible, "block_size": 4}), "block_sparse"]
    model = LanguageModel(LanguageModelConfig(11, dim=8, num_heads=2, plan=plan)).eval()
    save_pretrained(model, tmp_path)
    ids = torch.randint(11, (2, 12))
    assert torch.equal(from_pretrained(tmp_path)(ids).output, model(ids).output)
    grown = model.generate(ids[:, :7], 5, temperature=0)
    expected = ids[:, :7]
    for _ in range(5):
        expected = torch.cat([expected, model(expected).output[:, -1:].argmax(-1)], 1)
    assert torch.equal(grown[:, -5:], expected[:, -5:])


def test_a_layout_is_kept_as_plain_data_however_it_is_written():
    table = torch.rand(4, 4) < 0.5
    kept = Config(layout="user", visible=table)
    for same in (table.tolist(), table.int(), table[None].numpy(), tuple(map(tuple, table.tolist())), kept.visible):
        assert Config(layout="user", visible=same) == kept
    assert hash(kept) == hash(Config(layout="user", visible=table))


def test_the_function_takes_layouts_as_options():
    tensors = inputs(12)
    found = block_sparse_attention(*tensors.values(), layout="local_global", block_size=3, neighbours=0)
    expected = run(tensors, options={"layout": "local_global", "block_size": 3, "neighbours": 0})
    assert torch.equal(found, expected)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n", [0, 1, 7, 12, 31])
def test_the_cost_counts_visible_pairs(options, n):
    config = Config(**options)
    if config.layout != "random":
        assert visible_pairs(config, n) == pytest.approx(seen(options, "causal-self", n, n).double().sum() / HEADS)
    shape = Shape(2, HEADS, n, n, 4, 5)
    assert cost(shape, config).flops == pytest.approx(2 * 2 * HEADS * 9 * visible_pairs(config, n))
    step = visible_pairs(config, n + 1) - visible_pairs(config, n)
    assert cost(shape, config).step_flops == pytest.approx(2 * 2 * HEADS * 9 * step)


def test_the_cost_of_random_blocks_is_that_of_the_mean_draw():
    options = {"layout": "random", "block_size": 4, "density": 0.3}
    block = torch.arange(64)[None]
    drawn = visible_blocks(Config(**options), block, block, heads=500, causal=True).tril().double().sum() / 500
    expected = (drawn - 64) * 16 + 64 * 10
    assert visible_pairs(Config(**options), 256) == pytest.approx(float(expected), rel=0.01)


def test_a_butterfly_costs_a_share_of_the_pairs_that_falls_with_length():
    shares = [visible_pairs(Config(), n) / (n * (n + 1) / 2) for n in (1 << 12, 1 << 14, 1 << 16)]
    assert shares[2] < shares[1] / 3 < shares[0] / 7
    assert not MECHANISM.recurrent


# parity


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("options", [o for o in OPTIONS if not o.get("learn_sink") and "softcap" not in o])
def test_parity_with_masked_scaled_dot_product_attention(options, pattern):
    n = 33
    tensors = {name: x.requires_grad_() for name, x in inputs(n).items()}
    expected = F.scaled_dot_product_attention(*tensors.values(), attn_mask=seen(options, pattern, n, n))
    empty = ~seen(options, pattern, n, n).any(-1)
    expected = expected.masked_fill(empty[:, :, None], 0)
    same_with_gradients(run(tensors, pattern, options), expected, tensors)  # observed 7e-16


@pytest.mark.parametrize("causal", [False, True])
def test_parity_with_flex_attention(causal):
    """Blocks of 128 as flex attention has them, computed with its own block masks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n = 640
    layout = butterfly_blocks(n, 128, causal=causal).visible[0, 0]

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        allowed = layout[i // 128, j // 128]
        return allowed & (j <= i) if causal else allowed

    tensors = inputs(n, batch=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of being run without torch.compile
        mask = create_block_mask(visible, None, None, n, n, device="cpu")
        expected = flex_attention(*tensors.values(), block_mask=mask)
    pattern = "causal-self" if causal else "noncausal-self"
    close(run(tensors, pattern, {"block_size": 128}), expected, 1e-10)


@pytest.mark.parametrize("given", ["option", "mask"])
def test_parity_with_the_authors_blocks_of_16_by_256(given):
    """With padding, and with a block of queries that sees nothing."""
    with np.load(FIXTURES / "block_sparse_16_by_256.npz") as arrays:
        fixture = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    tensors = {name: fixture[name].clone().requires_grad_() for name in "qkv"}
    visible, lengths = fixture["blocks"].repeat_interleave(16, -1), fixture["lengths"]
    options: dict[str, Any] = {"layout": "user", "block_size": 16}
    if given == "option":
        options["visible"], mask = visible, Mask(lengths=lengths)
    else:
        mask = Mask(lengths=lengths, blocks=BlockMask(visible[None, None], 16))
    output = run(tensors, "noncausal-self", options, mask=mask)
    torch.testing.assert_close(output, fixture["out"], rtol=1e-12, atol=1e-12)
    assert (output[:, :, 48:64] == 0).all()
    output.backward(fixture["grad_out"])
    for name, x in tensors.items():
        torch.testing.assert_close(x.grad, fixture[f"grad_{name}"], rtol=1e-12, atol=1e-12)
    for row, length in enumerate(lengths.tolist()):
        part = {name: x[row : row + 1, :, :length] for name, x in tensors.items()}
        defined = run(part, "noncausal-self", options, mask=Mask(blocks=mask.blocks), form="reference")
        torch.testing.assert_close(defined, fixture["out"][row : row + 1, :, :length], rtol=1e-12, atol=1e-12)


def test_blocks_of_unequal_sides_are_written_with_the_smaller_size():
    """The official kernel's masks are (N / 16, N / 256)."""
    n = 512
    official = torch.rand(HEADS, n // 16, n // 256) < 0.6
    tensors = inputs(n, batch=1)
    options = {"layout": "user", "visible": official.repeat_interleave(16, -1), "block_size": 16}
    visible = official.repeat_interleave(16, -2).repeat_interleave(256, -1)
    close(run(tensors, "noncausal-self", options), dense(tensors, visible, {}))


# refusals


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "diagonal"},
        {"block_size": 0},
        {"global_blocks": -1},
        {"neighbours": -1},
        {"density": 1.5},
        {"density": float("nan")},
        {"softcap": 0.0},
        {"visible": [[True]]},
        {"layout": "user", "visible": [[True], [True, False]]},
        {"layout": "user", "visible": [[0.5, 1.0]]},
        {"layout": "user", "visible": [True, False]},
        {"layout": "user", "visible": []},
        {"layout": "user", "visible": "full"},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(Unsupported):
        Config(**options)


def test_sequences_beyond_a_users_layout_are_refused():
    options = {"layout": "user", "visible": torch.ones(3, 2), "block_size": 4}
    assert run(inputs(8), options=options).shape[2] == 8
    assert run(inputs(9, batch=1), options=options, mask=Mask(lengths=torch.tensor([8]))).shape[2] == 9
    for tensors, pattern in (
        (inputs(9), "causal-self"),
        (inputs(9), "noncausal-self"),
        (inputs(13, 8), "causal-cross"),
    ):
        with pytest.raises(Unsupported, match="covers"):
            run(tensors, pattern, options)
    config = Config(**options)
    state = apply(MECHANISM, inputs(8), return_state=True, config=config).state
    with pytest.raises(Unsupported, match="9 tokens"):
        apply(MECHANISM, inputs(1), state=state, config=config)
    memory = absorb(MECHANISM, inputs(0, 8), pattern="causal-cross", config=config)
    memory = apply(MECHANISM, {"q": inputs(12)["q"]}, pattern="causal-cross", state=memory, config=config).state
    with pytest.raises(Unsupported, match="13 queries"):
        apply(MECHANISM, {"q": inputs(1)["q"]}, pattern="causal-cross", state=memory, config=config)


def test_a_layout_of_other_heads_is_refused():
    options = {"layout": "user", "visible": torch.ones(3, 4, 4)}
    with pytest.raises(Unsupported, match="3 heads"):
        run(inputs(5), options=options)
    with pytest.raises(Unsupported, match="3 heads"):
        create_layer("block_sparse", 8, 2, **options)
