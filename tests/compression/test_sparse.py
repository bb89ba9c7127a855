"""Sparse attention at inference: what methods select, that they compute exactly that, and models that run with them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from support import load, refused

from regard import Context, Mask, Unsupported, compress
from regard.compression.sparse import METHODS, Method, Place, at_compression, read_method, sparsely, sparsify, written
from regard.compression.sparse.cache import HeadCache
from regard.compression.sparse.catalogue import ALWAYS, block_share
from regard.compression.sparse.cost import (
    Sizes,
    decode_bytes,
    decode_flops,
    decode_index,
    prefill_flops,
    prefill_index,
)
from regard.compression.sparse.evicting import AdaSnapKV, PyramidKV, SnapKV
from regard.compression.sparse.fidelity import Beside
from regard.compression.sparse.method import call
from regard.compression.sparse.paging import Quest, bounds
from regard.compression.sparse.prefilling import BlockSparse, VerticalSlash
from regard.compression.sparse.scores import diagonal_sums, last_weights
from regard.compression.sparse.selection import Lines
from regard.engines.quest_attention import page_bounds
from regard.models import LanguageModel, LanguageModelConfig

SCALE = 0.4
PREFILLING = (
    "local_sinks:window=7,sinks=3",
    "block_sparse:size=16,blocks=4",
    "block_sparse:size=32,blocks=3",
    "block_sparse:size=20,blocks=3",
    "vertical_slash:vertical=9,slash=16,diagonals=8,window=8,size=16",
    "vertical_slash:vertical=9,slash=16,diagonals=8,window=8,granularity=token",
    "flex_prefill:least=6,window=8,diagonals=4,size=16,alpha=0.3",
)
FULL = (
    "local_sinks:window=90",
    "block_sparse:size=16,blocks=6",
    "vertical_slash:vertical=90,slash=90,diagonals=8",
    "vertical_slash:vertical=90,slash=90,diagonals=8,granularity=token",
    "flex_prefill:alpha=1.1,least=1,diagonals=4",
    "snapkv:capacity=90,local=8",
    "ada_snapkv:capacity=90,local=8",
    "pyramidkv:capacity=2000,local=8",
    "streaming:capacity=200",
    "tova:capacity=200",
    "h2o:capacity=200",
    "quest:budget=96",
    "block_sparse:blocks=6 + quest:budget=96",
)


def heads(n, dtype=torch.float64, batch=2, queries=4, groups=2, width=8):
    return tuple(
        torch.randn(batch, h, n, d, dtype=dtype) for h, d in ((queries, width), (groups, width), (groups, width + 2))
    )


def masked(q, k, v, mask, scale=SCALE):
    """The definition: softmax over the pairs of a mask."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return (scale * q @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def causal(n):
    return torch.ones(n, n, dtype=torch.bool).tril()


@pytest.mark.parametrize("text", PREFILLING)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_prompt_computes_the_pairs_that_were_selected(text, dtype, tolerance):
    for n in (1, 63, 64, 65, 150):
        q, k, v = heads(n, dtype)
        selection = read_method(text).select(q, k, Place(scale=SCALE))
        difference = selection.attend(q, k, v, SCALE) - masked(q, k, v, selection.mask())
        assert difference.abs().max() < tolerance


@pytest.mark.parametrize("text", FULL)
def test_a_full_budget_is_dense_attention(text):
    q, k, v = heads(91)
    prompt = [x[:, :, :90] for x in (q, k, v)]
    output, cache = call(read_method(text), *prompt, None, Place(scale=SCALE), keeps=True)
    token, _ = call(read_method(text), *(x[:, :, 90:] for x in (q, k, v)), cache, Place(scale=SCALE), keeps=True)
    expected = masked(q, k, v, causal(91))
    assert (torch.cat([output, token], 2) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("text", PREFILLING)
def test_selections_are_causal_but_look_at_the_last_queries(text):
    q, k, v = heads(96)
    method, place = read_method(text), Place(scale=SCALE)
    selection = method.select(q, k, place)
    assert not selection.mask().triu(1).any()
    output = selection.attend(q, k, v, SCALE)
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 60:], v2[:, :, 60:] = torch.randn_like(k[:, :, 60:]), torch.randn_like(v[:, :, 60:])
    assert torch.equal(output[:, :, :60], selection.attend(q, k2, v2, SCALE)[:, :, :60])
    q2 = q.clone()
    q2[:, :, -8:] = 3 * torch.randn_like(q[:, :, -8:])
    again = method.select(q2, k, place).mask()[..., :80, :80]
    same = torch.equal(again, selection.mask()[..., :80, :80])
    assert same == text.startswith(("local", "block"))  # the others depend on the last queries


def ranges_by_loop(offsets, row, size):
    """Blocks of a row of queries, by the rule in words: each distance gives a block; one that begins inside or right after
    a range extends that range by a block."""
    end, found = (row + 1) * size, []
    for offset in sorted((o for o in offsets if o < end), reverse=True):
        stop = max(end - offset, size)
        if not found or stop > found[-1][1] + size:
            found.append([stop - size, stop])
        elif stop > found[-1][1]:
            found[-1][1] += size
    return found


def test_blocks_and_columns_of_vertical_slash_are_counted_as_in_its_kernel():
    n, size = 150, 16
    vertical, slash = torch.rand(1, 2, n) < 0.1, torch.rand(1, 2, n) < 0.08
    slash[..., :4] = True
    lines, blocks, columns = Lines(vertical, slash, size), 0, 0
    expected = torch.zeros(1, 2, n, n, dtype=torch.bool)
    for head in range(2):
        for row in range(-(-n // size)):
            ranges = ranges_by_loop(slash[0, head].nonzero()[:, 0].tolist(), row, size)
            keys = {j for a, b in ranges for j in range(a, b)}
            single = {j for j in vertical[0, head].nonzero()[:, 0].tolist() if j < (row + 1) * size} - keys
            blocks, columns = blocks + sum((b - a) // size for a, b in ranges), columns + len(single)
            for i in range(row * size, min(n, (row + 1) * size)):
                expected[0, head, i, [j for j in keys | single if j <= i]] = True
    assert lines.pairs() == blocks * size**2 + columns * size
    assert torch.equal(lines.mask(), expected)
    exact = Lines(vertical, slash, 0)
    assert (exact.mask() & ~lines.mask()).sum() == 0 and exact.pairs() == exact.mask().sum()


def test_a_whole_number_of_blocks_gets_no_block_more():
    q, k, _ = heads(64)
    selection = BlockSparse(size=16, blocks=3).select(q, k, Place())
    assert selection.visible.shape[-2:] == (4, 4)
    assert Lines(torch.ones(1, 1, 64, dtype=torch.bool), torch.ones(1, 1, 64, dtype=torch.bool), 16).pairs() == 10 * 256


@pytest.mark.parametrize("blocks", [3, 5, 9])
def test_block_sparse_counts_its_formula(blocks):
    q, k, _ = heads(144)
    selection = BlockSparse(size=16, blocks=blocks).select(q, k, Place())
    assert selection.pairs() == float(selection.mask().sum())
    assert int(selection.visible.sum()) == round(block_share(blocks, 9) * 45) * 8
    i = torch.arange(9)
    forced = (i == 0) | (i == i[:, None]) | (i == i[:, None] - 1)
    assert selection.visible[..., forced & (i <= i[:, None])].all()


def test_diagonals_are_summed_by_distance():
    weights = torch.randn(2, 3, 5, 12)
    sums = diagonal_sums(weights)
    for distance in range(12):
        pairs = [(i, 7 + i - distance) for i in range(5) if 7 + i - distance >= 0]
        assert torch.allclose(sums[..., distance], sum(weights[..., i, j] for i, j in pairs) + torch.zeros(2, 3))


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_vertical_slash_at_a_ratio_stays_within_it_and_uses_it(ratio):
    q, k, _ = heads(512)
    selection = at_compression("vertical_slash", ratio, 512).select(q, k, Place(scale=SCALE))
    share = selection.pairs() / (8 * 512 * 513 / 2)
    assert 0.8 / ratio < share <= 1 / ratio


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("dense", "flex_prefill", *ALWAYS)])
def test_more_compression_computes_less_and_as_little_as_it_says(name):
    q, k, v = heads(512, torch.float32, batch=1)
    before = math.inf
    for ratio in (2, 4, 8, 16):
        place = Place(scale=SCALE)
        _, cache = call(at_compression(name, ratio, 512), q, k, v, None, place, keeps=True)
        token = [x[:, :, :1] for x in (q, k, v)]
        call(at_compression(name, ratio, 512), *token, cache, place, keeps=True)
        prefills = METHODS[name].phases == ("prefill",)
        kept = 1 - place.meter.sparsity("prefill" if prefills else "decode")
        assert kept < before
        before = kept
        # decoding also reads the newest page or token
        assert kept == pytest.approx(1 / ratio, rel=0.2, abs=0.0 if prefills else 17 / 512)


def test_snapkv_keeps_exactly_its_capacity_and_what_is_forced():
    q, k, _ = heads(200)
    kept = SnapKV(capacity=40, window=16, kernel=5, local=12, prefix=3).keep(q, k, Place(scale=SCALE))
    assert torch.equal(kept.sum(-1), torch.full((2, 2), 40))
    assert kept[..., :3].all() and kept[..., -12:].all()
    # fewer queries than the window, and the definition of importance by loops
    method = SnapKV(capacity=6, window=500, kernel=3, local=1, prefix=1)
    q, k, _ = heads(20)
    found = method.importance(q, k, Place(scale=SCALE))
    weights = (SCALE * q @ k.repeat_interleave(2, 1).mT).masked_fill(~causal(20), -torch.inf).softmax(-1)
    summed = weights.view(2, 2, 2, 20, 20).mean(2).sum(2)
    padded = torch.nn.functional.pad(summed, (1, 1))
    for j in range(1, 19):
        assert torch.allclose(found[..., j], padded[..., j : j + 3].sum(-1) / 3)


def test_ada_snapkv_divides_the_layers_budget_among_heads():
    q, k, _ = heads(200)
    q[:, :2] *= 6  # these attend to few tokens
    method = AdaSnapKV(capacity=40, window=16, kernel=5, local=12, prefix=3)
    kept = method.keep(q, k, Place(scale=SCALE))
    counts = kept.sum(-1)
    assert torch.equal(counts.sum(-1), torch.full((2,), 80))
    assert (counts >= 15).all() and (counts[:, 0] != 40).all()
    assert kept[..., :3].all() and kept[..., -12:].all()
    alike, same = q[:, :1].repeat(1, 4, 1, 1), k[:, :1].repeat(1, 2, 1, 1)
    assert (method.keep(alike, same, Place(scale=SCALE)).sum(-1) - 40).abs().max() <= 1


def test_pyramidkv_spends_its_budget_over_the_layers_exactly_and_less_in_each():
    method = PyramidKV(capacity=333, local=20, prefix=4)
    for layers in (1, 2, 7, 30):
        counts = [method.capacity_of(Place(layer, layers)) for layer in range(layers)]
        assert sum(counts) == 333 * layers and counts == sorted(counts, reverse=True)
        assert min(counts) > 24


def test_quest_keeps_bounds_of_whole_pages_while_the_cache_grows():
    q, k, v = heads(150)
    method, place = Quest(budget=16, page=8), Place(scale=1.0)
    cache = method.compress(q[:, :, :50], k[:, :, :50], v[:, :, :50], place)
    for i in range(50, 150):  # memory grows twice
        at = slice(i, i + 1)
        _, cache = method.decode(q[:, :, at], cache.appended(k[:, :, at], v[:, :, at]), place)
    low, high = bounds(k[:, :, :144], 8)
    assert torch.equal(cache.low[:, :, :18], low) and torch.equal(cache.high[:, :, :18], high)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_quest_reads_its_pages_and_the_newest_one_alone(share, dtype):
    q, k, v = heads(75, dtype)
    method, place = Quest(budget=24, page=8, share=share), Place(scale=SCALE)
    _, cache = call(method, q[:, :, :74], k[:, :, :74], v[:, :, :74], None, place, keeps=True)
    place.meter.kept["decode"] = place.meter.all["decode"] = 0
    output, cache = call(method, q[:, :, 74:], k[:, :, 74:], v[:, :, 74:], cache, place, keeps=True)
    upper = page_bounds(q[:, :, 74:], cache.low[:, :, :9], cache.high[:, :, :9])
    upper = (upper.sum(2, keepdim=True).expand_as(upper) if share else upper).flatten(1, 2)
    chosen = torch.zeros(2, 4, 10, dtype=torch.bool).scatter_(-1, upper.topk(3).indices, True)
    chosen[..., 9] = True
    mask = chosen.repeat_interleave(8, -1)[..., :75][:, :, None]
    assert (output - masked(q[:, :, 74:], k, v, mask)).abs().max() < (1e-12 if dtype == torch.float64 else 1e-5)
    assert place.meter.sparsity("decode") == pytest.approx(1 - (24 + 3) / 75)


def evicting_by_loops(name, q, k, v, prompt, capacity):
    """Outputs for the tokens after a prompt with H2O, TOVA or StreamingLLM, with an explicit token set for each head."""
    batch, queries, n, _ = q.shape
    groups = k.shape[1]
    each = queries // groups
    outputs = torch.zeros(batch, queries, n - prompt, v.shape[-1], dtype=q.dtype)
    full = (SCALE * q @ k.repeat_interleave(each, 1).mT).masked_fill(~causal(n), -torch.inf).softmax(-1)
    for b in range(batch):
        kept = [list(range(prompt)) for _ in range(groups)]
        total = full[b, :, :prompt].sum(-2).view(groups, each, n).sum(1)
        last = full[b, :, prompt - 1].mean(0)

        def shrink(g, newest, weights, b=b, kept=kept, total=total):
            while len(kept[g]) > capacity:
                if name == "streaming":
                    worth = {j: j if j >= 2 else math.inf for j in kept[g]}
                elif name == "tova":
                    worth = {j: float(weights[j]) for j in kept[g]}
                else:
                    recent = newest + 1 - capacity // 2
                    worth = {j: math.inf if j >= recent else float(total[g, j]) for j in kept[g]}
                kept[g].remove(min(worth, key=worth.get))

        for g in range(groups):
            shrink(g, prompt - 1, last)
        for i in range(prompt, n):
            weights = torch.zeros(queries, n, dtype=q.dtype)
            for g in range(groups):
                kept[g].append(i)
                if name == "streaming":
                    shrink(g, i, None)
                for h in range(g * each, (g + 1) * each):
                    scores = SCALE * k[b, g, kept[g]] @ q[b, h, i]
                    weights[h, kept[g]] = scores.softmax(0)
                    outputs[b, h, i - prompt] = weights[h] @ v[b, g]
                total[g] += weights[g * each : (g + 1) * each].sum(0)
            for g in range(groups):
                shrink(g, i, weights.mean(0))
    return outputs


@pytest.mark.parametrize("text", ["streaming:sinks=2", "tova", "h2o"])
def test_caches_that_evict_do_so_token_by_token(text):
    q, k, v = heads(48)
    method = read_method(f"{text}{',' if ':' in text else ':'}capacity=12")
    _, cache = call(method, *(x[:, :, :14] for x in (q, k, v)), None, Place(scale=SCALE), keeps=True)
    assert torch.equal(cache.counts, torch.full((2, 2), 12))
    output, cache = call(method, *(x[:, :, 14:] for x in (q, k, v)), cache, Place(scale=SCALE), keeps=True)
    expected = evicting_by_loops(text.partition(":")[0], q, k, v, 14, 12)
    assert (output - expected).abs().max() < 1e-12
    assert torch.equal(cache.counts, torch.full((2, 2), 12)) and torch.equal(cache.length, torch.full((2,), 48))


@pytest.mark.parametrize("options", ["capacity=12,recent=0", "capacity=2", "capacity=2,recent=1"])
def test_a_new_token_is_not_dropped_at_once(options):
    q, k, v = heads(30)
    method = read_method(f"h2o:{options}")
    _, cache = call(method, *(x[:, :, :14] for x in (q, k, v)), None, Place(scale=SCALE), keeps=True)
    for i in range(14, 30):
        _, cache = call(method, *(x[:, :, i : i + 1] for x in (q, k, v)), cache, Place(scale=SCALE), keeps=True)
        assert torch.equal(cache.ranks[..., : method.capacity].max(-1).values, torch.full((2, 2), i))
    refused("capacity=1", read_method, "h2o:capacity=1")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_heads_of_unequal_lengths_decode_what_each_kept(dtype):
    q, k, v = heads(90, dtype)
    kept = torch.rand(2, 2, 80) < torch.tensor([0.2, 0.7])[:, None]
    kept[..., 0] = True
    cache = HeadCache.of(k[:, :, :80], v[:, :, :80], kept)
    outputs = []
    for i in range(80, 90):
        output, cache = Method().decode(
            q[:, :, i : i + 1], cache.appended(k[:, :, i : i + 1], v[:, :, i : i + 1]), Place(scale=SCALE)
        )
        outputs.append(output)
    mask = torch.cat([kept, torch.ones(2, 2, 10, dtype=torch.bool)], -1).repeat_interleave(2, 1)
    expected = masked(q[:, :, 80:], k, v, mask[:, :, None] & causal(90)[80:])
    assert (torch.cat(outputs, 2) - expected).abs().max() < (1e-12 if dtype == torch.float64 else 1e-5)


def nearest(x, axis):
    """Round to 8 bits with one step size along an axis."""
    step = x.abs().amax(axis, keepdim=True) / 127
    return step * (x / step).round()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_cache_of_integers_attends_to_the_nearest_codes_and_rounds_what_grows_old(dtype, tolerance):
    method, place = read_method("int8:block=16,window=5"), Place(scale=SCALE)
    q, k, v = (
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in heads(90, dtype, batch=1)
    )  # the layout of projections
    _, cache = call(method, *(x[:, :, :50] for x in (q, k, v)), None, place, keeps=True)
    first = cache
    k[:, :, 0::16] *= 9  # a block's step sizes follow its own numbers
    _, cache = call(method, *(x[:, :, :50] for x in (q, k, v)), None, place, keeps=True)
    assert place.meter.cache / place.meter.prompts < 0.5 and not torch.equal(
        first.blocks[0].k_step, cache.blocks[0].k_step
    )
    assert all(x.is_contiguous() for block in cache.blocks for x in (block.k, block.v)), "products read rows"
    blocks, seen = [(0, 16), (16, 32), (32, 45)], 50
    for t in range(50, 90):
        output, cache = call(method, *(x[:, :, t : t + 1] for x in (q, k, v)), cache, place, keeps=True)
        seen += 1
        if seen - blocks[-1][1] >= 16 + 5:
            blocks.append((blocks[-1][1], blocks[-1][1] + 16))
        keys = [nearest(k[:, :, a:b], 2) for a, b in blocks] + [k[:, :, blocks[-1][1] : seen]]
        values = [nearest(v[:, :, a:b], 3) for a, b in blocks] + [v[:, :, blocks[-1][1] : seen]]
        mask = torch.ones(1, seen, dtype=torch.bool)
        expected = masked(q[:, :, t : t + 1], torch.cat(keys, 2), torch.cat(values, 2), mask)
        assert (output - expected).abs().max() < tolerance
    assert len(cache.blocks) == len(blocks) == 5


def test_selecting_rows_of_a_cache_copies_it():
    _, k, v = heads(20)
    cache = HeadCache.of(k, v)
    both = cache.select(torch.tensor([1, 1]))
    token = k[:, :, :1], v[:, :, :1]
    cache.appended(*token)
    assert not torch.equal(both.appended(*(x[[1, 0]] for x in token)).k, cache.appended(*token).k)
    assert torch.equal(both.k[0, :, :20], k[1]) and torch.equal(both.k[1, :, :20], k[1])


def test_a_needle_that_the_last_queries_look_at_survives_and_one_for_later_is_lost_by_snapkv_alone():
    n, ratio = 2048, 20
    q, k, v = heads(n, torch.float32, batch=1, width=32)
    place = Place(scale=32**-0.5)
    aim = torch.randn(32)
    later = torch.randn(32)
    later -= (1 + later @ aim) / (aim @ aim) * aim  # unattended by the last queries
    q[:, :, -256:] = 3 * aim + 0.3 * torch.randn(1, 4, 256, 32)
    k[:, :, 700] = 3 * aim
    k[:, :, 1180:1220] -= aim  # nor are its neighbours attended to
    k[:, :, 1200] = 3 * later
    lines = at_compression("vertical_slash", ratio, n).select(q, k, place)
    assert lines.vertical[..., 700].all()
    snap = at_compression("snapkv", ratio, n).keep(q, k, place)
    assert snap[..., 700].all() and not snap[..., 1200].any()
    query = (3 * later).expand(1, 4, 1, 32)
    exact = masked(query, k, v, torch.ones(n, dtype=torch.bool), place.scale)
    for name, found in (("snapkv", False), ("quest", True)):
        method = at_compression(name, ratio, n)
        cache = method.compress(q, k, v, place)
        output, _ = method.decode(query, cache.appended(torch.zeros(1, 2, 1, 32), torch.zeros(1, 2, 1, 34)), place)
        assert (float((output - exact).abs().max() / exact.abs().max()) < 0.05) == found


@pytest.mark.parametrize(
    "given",
    [
        "quest:budget=17",
        "snapkv:capacity=100",
        "quest + quest",
        "snapkv + block_sparse",
        "nothing",
        "quest:size=3",
        "quest:share=3",
        "vertical_slash:slash=8",
        "vertical_slash:granularity=page",
        "snapkv:kernel=4",
        "block_sparse:blocks=2",
    ],
)
def test_what_cannot_be_meant_is_refused(given):
    with pytest.raises(Unsupported):
        read_method(given)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_written_as_it_is_read(name):
    for method in (METHODS[name](), at_compression(name, 4, 777)):
        assert read_method(written(method)) == method
    if name in ALWAYS:
        with pytest.raises(Unsupported, match="which it always is"):
            at_compression(name, 8, 777)


def own_model():
    torch.manual_seed(3)
    sizes = {"vocab_size": 40, "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    return LanguageModel(LanguageModelConfig(plan="softmax", **sizes)).double().eval()


def causal_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def of_family(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    others = {"n_embd": 32, "n_layer": 2, "n_head": 4, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}
    others |= {"num_key_value_heads": 4, "word_embed_proj_dim": 32}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    config = getattr(transformers, f"{kind}Config")(vocab_size=40, **sizes, **others, **ends)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def continued(model, ids, count):
    if isinstance(model, LanguageModel):
        return model.generate(ids, count)
    return model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)[:, ids.shape[1] :]


def logits(model, ids):
    with torch.no_grad():
        found = model(ids)
    return found.output if isinstance(model, LanguageModel) else found.logits


@pytest.mark.parametrize("make", [own_model, causal_model])
def test_models_of_both_libraries_run_sparsely_and_as_before_when_undone(make):
    model = make()
    ids = torch.randint(1, 40, (2, 90))  # 0 pads
    before, tokens = logits(model, ids), continued(model, ids, 12)
    for text in ("dense", "block_sparse:blocks=6 + quest:budget=112", "ada_snapkv:capacity=90,local=8"):
        with sparsely(model, text) as sparse:
            assert (logits(model, ids) - before).abs().max() < 1e-10
            assert torch.equal(continued(model, ids, 12), tokens)
            assert sparse.sparsity("prefill") == 0 and sparse.layers == 2
    with sparsely(model, "block_sparse:size=8,blocks=3 + quest:budget=16,page=8") as sparse:
        assert (logits(model, ids) - before).abs().max() > 1e-6
        continued(model, ids, 12)
        assert 0.4 < sparse.sparsity("prefill") < 0.9 and 0.7 < sparse.sparsity("decode") < 0.9
    with sparsely(model, "int8:block=32,window=8") as sparse:
        assert torch.equal(logits(model, ids), before), "prompts are read as they are"
        assert continued(model, ids, 12).shape == tokens.shape and 0.1 < sparse.measured()["cache"] < 0.5
    assert torch.equal(logits(model, ids), before) and torch.equal(continued(model, ids, 12), tokens)


@pytest.mark.parametrize("kind", ["GPTNeoX", "GPT2", "OPT", "Phi", "StableLm", "Cohere", "GPTBigCode", "Bart"])
def test_families_of_transformers_decode_from_sparse_caches_as_from_their_own(kind):
    model, ids = of_family(kind), torch.randint(3, 40, (1, 12))
    settings = {"max_new_tokens": 3, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    expected = model.generate(ids, **settings)
    with sparsely(model, "quest:budget=64,page=4"):
        found = model.generate(ids, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_a_sparse_model_is_saved_as_without_the_method(tmp_path):
    model, ids = causal_model(), torch.randint(1, 40, (2, 30))
    before = logits(model, ids)
    with sparsely(model, "snapkv:capacity=12,window=3,kernel=1,local=3,prefix=1"):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).double().eval(), ids), before)


def test_a_module_that_attends_twice_in_a_call_is_refused():
    with sparsely(of_family("DiffLlama"), "quest") as sparse, pytest.raises(Unsupported, match="more than once"):
        sparse.model(torch.randint(3, 40, (1, 12)))


def test_beams_of_a_sparse_model_have_caches_of_their_own():
    model, ids = own_model(), torch.randint(40, (1, 60))
    expected = model.generate(ids, 8, beams=3)
    for text in ("quest:budget=64", "int8:window=60"):
        with sparsely(model, text):
            assert torch.equal(model.generate(ids, 8, beams=3), expected)


def test_models_that_are_more_than_softmax_are_refused_and_left_as_they_were():
    config = LanguageModelConfig(vocab_size=9, dim=16, plan=["softmax", "linear"], num_heads=2)
    model = LanguageModel(config)
    with pytest.raises(Unsupported, match="linear"):
        sparsify(model, "quest")
    assert [layer.card.name for layer in model.modules() if hasattr(layer, "card")] == ["softmax", "linear"]
    with pytest.raises(Unsupported, match="window"):
        sparsify(LanguageModel(LanguageModelConfig(9, dim=16, plan=[("softmax", {"window": (3, 0)})])), "quest")
    with pytest.raises(Unsupported, match="Linear"):
        sparsify(torch.nn.Linear(3, 3), "quest")
    with sparsely(own_model(), "quest") as sparse, pytest.raises(Unsupported, match="padded"):
        sparse.model(torch.randint(9, (2, 6)), context=Context(mask=Mask(lengths=torch.tensor([6, 4]))))


def test_what_is_selected_is_what_the_benchmarks_code_selects():
    found = load("softmax_sparse_frontier")
    q, k, place = found["q"], found["k"], Place(scale=16**-0.5)
    options = "capacity=60,window=32,kernel=7,local=16"
    for name in ("snapkv", "ada_snapkv"):
        assert torch.equal(read_method(f"{name}:{options}").keep(q, k, place)[0], found[name])
    lines = read_method("vertical_slash:vertical=40,slash=80,window=32").select(q, k, place)
    assert torch.equal(lines.vertical[0], found["vertical"]) and torch.equal(lines.slash[0], found["slash"])
    lines = read_method("flex_prefill:alpha=0.6,least=70,window=32").select(q, k, place)
    assert torch.equal(lines.vertical[0], found["flex_vertical"]) and torch.equal(lines.slash[0], found["flex_slash"])
    blocks = read_method("block_sparse:size=16,blocks=5").select(q, k, place)
    assert torch.equal(blocks.visible[0], found["blocks"])
    method = Quest(budget=64)
    cache = method.compress(q, k, k, place)
    upper = page_bounds(q[:, :, -1:], cache.low[:, :, :18], cache.high[:, :, :18])
    for name, scores in (("quest", upper.sum(2, keepdim=True).expand_as(upper)), ("quest_each", upper)):
        pages = torch.zeros(4, 19, dtype=torch.bool).scatter_(-1, scores[0].flatten(0, 1).topk(4).indices, True)
        pages[:, 18] = True
        assert torch.equal(pages, found[name])


def test_last_weights_are_those_of_the_whole_matrix():
    q, k, _ = heads(30)
    whole = (SCALE * q @ k.repeat_interleave(2, 1).mT).masked_fill(~causal(30), -torch.inf).softmax(-1)
    assert torch.allclose(last_weights(q, k, 7, SCALE), whole[:, :, -7:])
    assert VerticalSlash().window == 256


@pytest.mark.parametrize(
    "text",
    ["dense", "block_sparse:size=8,blocks=4", "vertical_slash:vertical=20,slash=20,diagonals=8,window=16,granularity=token",
     "snapkv:capacity=30,window=16,local=8", "h2o:capacity=30", "tova:capacity=30", "quest:budget=32,page=8"],
)  # fmt: skip
def test_costs_by_formula_are_those_that_were_counted(text):
    model, method, n, new = own_model(), read_method(text), 120, 5
    sizes, counted = Sizes.of(model), 0.0
    assert (sizes.layers, sizes.heads, sizes.kv_heads, sizes.width, sizes.bytes) == (2, 4, 2, 8, 8)

    def count(module, inputs, output):
        nonlocal counted
        counted += 2.0 * module.weight.numel() * output.numel() / output.shape[-1]

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    with sparsely(model, method) as sparse, torch.no_grad():
        ids = torch.randint(40, (1, n))
        state = model(ids, context=Context(want=frozenset({"state"}))).state

        def measured(phase):
            meters = sparse.meters
            return counted + sum(4 * 8 * m.kept[phase] + m.index[phase] for m in meters)

        formula = prefill_flops(sizes, n, sparse.sparsity("prefill"), prefill_index(method, sizes, n))
        assert measured("prefill") == pytest.approx(formula, rel=0.01)
        counted, formula, read = 0.0, 0.0, 0.0
        for i in range(new):
            before = [(m.kept["decode"], m.all["decode"]) for m in sparse.meters]
            state = model(ids[:, :1], state=state).state
            after = [(m.kept["decode"], m.all["decode"]) for m in sparse.meters]
            kept, of = (sum(x[i] for x in after) - sum(x[i] for x in before) for i in range(2))
            sparsity = 1 - kept / of
            formula += decode_flops(sizes, n + i + 1, sparsity, decode_index(method, sizes, n + i + 1))
            read += decode_bytes(method, sizes, n + i + 1, sparsity) - 8 * sizes.weights
        assert measured("decode") == pytest.approx(formula, rel=0.01)
        assert sparse.measured()["read"] == pytest.approx(read, rel=0.01)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("n", [5, 100])
@pytest.mark.parametrize("text", ["int8:block=32,window=20", "block_sparse:size=8,blocks=4 + int8:window=9"])
@pytest.mark.parametrize("make", [own_model, lambda: causal_model().float()])
def test_a_token_reads_the_codes_and_steps_of_a_cache_in_8_bits(make, text, n):
    model, method = make(), read_method(text)
    sizes, ids = Sizes.of(model), torch.randint(40, (1, n + 1))
    with sparsely(model, method) as sparse, torch.no_grad():
        if isinstance(model, LanguageModel):
            state = model(ids[:, :n], context=Context(want=frozenset({"state"}))).state
            state = model(ids[:, n:], state=state).state
            caches = [layer.mechanism for layer in state.layers]
        else:
            from regard.integrations.transformers import CACHE

            cache = getattr(model(ids[:, :n], use_cache=True), CACHE)
            model(ids[:, n:], **{CACHE: cache})
            caches = [layer.state.mechanism for layer in cache.layers]
        held = sum(block.nbytes for cache in caches for block in cache.blocks)
        held += sum(2 * 2 * 8 * cache.used * cache.k.element_size() for cache in caches)
    assert decode_bytes(method, sizes, n + 1) - sizes.weight_bytes == held == sparse.measured()["read"]
    dense = decode_bytes(Method(), sizes, n + 1) - sizes.weight_bytes
    assert dense == sizes.bytes * 2 * 2 * 2 * 8 * (n + 1) and (held == dense if n == 5 else held < 0.7 * dense)


@pytest.mark.parametrize("make", [own_model, causal_model])
@pytest.mark.parametrize(
    ("recipe", "each"),
    [
        ("int8", lambda rows, columns: rows * (columns + 2)),
        ("int4:group=32", lambda rows, columns: rows * -(-columns // 32) * (16 + 2)),
        ("int4:group=32,symmetric=false", lambda rows, columns: rows * -(-columns // 32) * (16 + 4)),
    ],
)
def test_weights_in_codes_count_like_others_and_take_the_bytes_of_their_format(make, recipe, each):
    model = make().float()
    before = Sizes.of(model)
    layers = {name: x.weight.shape for name, x in model.named_modules() if isinstance(x, torch.nn.Linear)}
    assert before.weight_bytes == 4 * before.weights == 4 * sum(map(math.prod, layers.values()))
    compress(model, recipe)
    head = next(layers.pop(name) for name in ("head", "lm_head") if name in layers)
    expected = sum(each(*shape) for shape in layers.values()) + head[0] * (head[1] + 2)
    assert Sizes.of(model) == dataclasses.replace(before, weight_bytes=expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_that_is_looked_up_counts_only_where_it_is_the_output_too(tied):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 40, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 50}
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(tie_word_embeddings=tied, **sizes))
    assert Sizes.of(gpt).weights == 12 * 32 * 32 + 40 * 32
    own = LanguageModel(LanguageModelConfig(40, dim=32, num_layers=1, num_heads=2, tie_embeddings=tied))
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_attention_heads=2, tie_word_embeddings=tied, **sizes)
    )
    for model in (own, llama.eval()):
        before = Sizes.of(model).weights
        assert before == sum(p.numel() for p in model.parameters() if p.ndim == 2) - (not tied) * 40 * 32
        compress(model, "int8")
        assert Sizes.of(model).weights == before


@pytest.mark.parametrize("model_of", [own_model, causal_model])
@pytest.mark.parametrize(
    "text", ["block_sparse:size=8,blocks=3", "quest:budget=16,page=4", "h2o:capacity=20", "streaming:capacity=20"]
)
def test_beside_a_method_a_model_runs_densely_and_the_method_has_the_error_of_its_own_attention(model_of, text):
    model, ids = model_of(), torch.randint(40, (1, 70))
    dense = model.generate(ids, max_new_tokens=6)
    full = Beside(at_compression("dense", 1, 70))
    beside = Beside(read_method(text))
    for method in (full, beside):
        with sparsely(model, method) as sparse:
            assert torch.equal(model.generate(ids, max_new_tokens=6), dense)
            assert sparse.sparsity("prefill") == sparse.sparsity("decode") == 0
    assert full.error("prefill") == full.error("decode") == 0
    (phase,) = read_method(text).phases
    (other,) = {"prefill", "decode"} - {phase}
    assert beside.error(phase) > 1e-3 and beside.error(other) < 1e-12


@pytest.mark.parametrize("model_of", [own_model, causal_model])
def test_beside_a_method_that_places_keys_both_rotate_them_to_places_of_their_own(model_of):
    model, ids = model_of(), torch.randint(40, (1, 70))
    dense, errors = model.generate(ids, max_new_tokens=6), []
    for text in ("capacity=100", "capacity=20", "capacity=20,positions=text"):
        beside = Beside(read_method(f"streaming:{text}"))
        with sparsely(model, beside):
            assert torch.equal(model.generate(ids, max_new_tokens=6), dense)
        errors.append(beside.error("decode"))
    assert errors[0] < 1e-5 and errors[1] > 1e-3 and abs(errors[1] - errors[2]) > 1e-4 * errors[2]


def test_the_error_beside_is_that_of_the_definition():
    q, k, v = heads(64)
    beside = Beside(read_method("local_sinks:window=16,sinks=2"))
    beside.prefill(q, k, v, Place(scale=SCALE))
    ranks = torch.arange(64)
    seen = causal(64) & ((ranks[:, None] - ranks < 16) | (ranks < 2))
    dense = masked(q, k, v, causal(64))
    error = (masked(q, k, v, seen) - dense).norm() / dense.norm()
    assert beside.error("prefill") == pytest.approx(float(error))
