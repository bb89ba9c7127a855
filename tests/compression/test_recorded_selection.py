"""Which tokens sparse attention keeps and reads, against recordings of the authors' code of each method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import close, load
from torch import Tensor

from regard.compression.sparse import Place, read_method
from regard.compression.sparse.method import Method, call


def place(width: int, layer: int = 0, layers: int = 1) -> Place:
    return Place(layer, layers, width**-0.5)


def masks(cache: Any) -> Tensor:
    """(B, G, N) tokens of the sequence that are in a cache."""
    found = torch.zeros(*cache.counts.shape, int(cache.length.max()), dtype=torch.bool)
    used = int(cache.counts.max())
    assert bool((cache.counts == used).all())
    return found.scatter_(-1, cache.ranks[..., :used], True)


def steps(method: Method, q: Tensor, k: Tensor, v: Tensor, prompt: int) -> Any:
    """Yield cache and output after a prompt and after each further token."""
    where, cache = place(q.shape[-1]), None
    for piece in [slice(0, prompt), *(slice(t, t + 1) for t in range(prompt, q.shape[2]))]:
        output, cache = call(method, *(x[:, :, piece] for x in (q, k, v)), cache, where, keeps=True)
        yield cache, output


def test_h2o_keeps_the_tokens_and_adds_up_the_scores_of_the_authors_cache():
    found = load("compression_h2o")
    q, k, n = found["q"], found["k"], found["q"].shape[2]
    run = steps(read_method("h2o:capacity=16,recent=0.4375"), q, k, k, n + 1 - len(found["kept"]))
    for (cache, _), kept, scores in zip(run, found["kept"], found["scores"], strict=True):
        tokens = masks(cache)[0]
        assert torch.equal(tokens, kept[:, : tokens.shape[-1]])
        order = cache.ranks[0, :, :16].argsort(-1)
        close(cache.weight[0, :, :16].gather(-1, order), scores, 1e-12)


def test_tova_drops_the_token_that_the_authors_cache_drops():
    found = load("compression_tova")
    q, k, n = found["q"], found["k"], found["q"].shape[2]
    for (cache, _), kept in zip(
        steps(read_method("tova:capacity=14"), q, k, k, n + 1 - len(found["kept"])), found["kept"], strict=True
    ):
        tokens = masks(cache)
        assert torch.equal(tokens, kept[:, None, : tokens.shape[-1]].expand_as(tokens))


@pytest.mark.parametrize("length", ["short", "long"])
def test_streaming_holds_the_first_and_the_last_tokens_of_the_authors_cache(length):
    kept = load("compression_streaming")[length]
    n = kept.shape[1]
    x = torch.randn(1, 2, n, 4)
    run = steps(read_method("streaming:capacity=13,sinks=3"), x, x, x, n + 1 - len(kept))
    for (cache, _), expected in zip(run, kept, strict=True):
        tokens = masks(cache)[0]
        assert torch.equal(tokens, expected[: tokens.shape[-1]].expand_as(tokens))


def chosen(importance: Tensor, window: int, count: int) -> Tensor:
    """The `count` most important tokens before the window, in order of importance."""
    return importance[..., :-window].topk(count).indices


def test_snapkv_keeps_the_tokens_of_the_authors_code_but_for_the_border_of_the_window():
    """With pooling, the authors average zeros at the window's border, where this project and sparse-frontier average
    the importance of keys in the window: two tokens of each head may be ranked otherwise."""
    found = load("compression_snapkv")
    q, k, where = found["q"], found["k"], place(8)
    options = "capacity=48,window=16,local=16,prefix=0"
    plain = read_method(f"snapkv:{options},kernel=1")
    kept = plain.keep(q, k, where)[0]
    expected = torch.zeros_like(kept).scatter_(1, found["ranked_1"], True)
    expected[:, -16:] = True
    assert torch.equal(kept, expected)
    assert torch.equal(chosen(plain.importance(q, k, where), 16, 32)[0], found["ranked_1"])
    mean = read_method(f"snapkv:{options},kernel=5").importance(q, k, where)
    assert inside(chosen(mean, 16, 34)[0], found["ranked_5"], 150 - 16 - 2)


def inside(ranked: Tensor, expected: Tensor, border: int) -> bool:
    """Whether two rankings of (G, tokens) agree on the tokens before a border."""
    pairs = ((a[a < border], b[b < border]) for a, b in zip(ranked, expected, strict=True))
    return all(len(b) and torch.equal(a[: len(b)], b) for a, b in pairs)


def test_pyramidkv_gives_each_layer_the_tokens_of_the_authors_code():
    """Budgets are the authors' where the step between layers is a whole number; else they round it down, so that
    their later layers keep more than the total allows, by less than a token for each layer."""
    found = load("compression_pyramidkv")
    q, k = found["q"], found["k"]
    options = "window=8,local=8,prefix=0,beta=4"
    for layer in range(4):
        where, expected = place(8, layer, 4), found[f"ranked_{layer}"]
        method: Any = read_method(f"pyramidkv:capacity=40,kernel=1,{options}")
        kept = method.keep(q, k, where)[0]
        assert method.capacity_of(where) == expected.shape[1] + 8
        mask = torch.zeros_like(kept).scatter_(1, expected, True)
        mask[:, -8:] = True
        assert torch.equal(kept, mask)
        mean = read_method(f"pyramidkv:capacity=40,kernel=5,{options}").importance(q, k, where)
        pooled = found[f"pooled_{layer}"]
        assert inside(chosen(mean, 8, pooled.shape[1] + 2)[0], pooled, 160 - 8 - 2)
    uneven: Any = read_method(f"pyramidkv:capacity=38,kernel=1,{options}")
    own = torch.tensor([uneven.capacity_of(place(8, layer, 4)) for layer in range(4)])
    more = found["uneven"] - own
    assert int(own.sum()) == 4 * 38 and bool(((more >= 0) & (more < 4)).all()) and int(more.sum()) > 0


NANO = {
    "local": "local_sinks:window=9,sinks=3",
    "lines": "vertical_slash:vertical=11,slash=14,window=12,columns=2,diagonals=5,granularity=token",
    "blocks": "block_sparse:size=8,blocks=4",
}


@pytest.mark.parametrize("name", NANO)
def test_prompts_are_read_at_the_pairs_of_nano_sparse_attention(name):
    found = load("compression_nano")
    q, k = (found[f"blocks_{x}" if name == "blocks" else x] for x in "qk")
    selection = read_method(NANO[name]).select(q, k, place(q.shape[-1]))
    assert torch.equal(selection.mask()[0], found[name].expand(selection.mask()[0].shape))
    close(selection.attend(q, k, found["v"], q.shape[-1] ** -0.5), found[f"{name}_out"])


@pytest.mark.parametrize("name", ["snapkv", "tova"])
def test_tokens_after_a_prompt_read_what_those_of_nano_sparse_attention_read(name):
    found = load("compression_nano")
    q, k, v = (found[x] for x in "qkv")
    options = {"snapkv": "capacity=30,window=10,local=10,prefix=0,kernel=7", "tova": "capacity=20"}[name]
    caches, outputs = zip(*steps(read_method(f"{name}:{options}"), q, k, v, 60), strict=True)
    close(torch.cat(outputs[1:], 2), found[f"{name}_out"])
    if name == "snapkv":
        assert torch.equal(masks(caches[0])[0, :, :60], found["snapkv"])
