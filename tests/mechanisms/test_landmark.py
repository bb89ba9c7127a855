"""Tests specific to landmark attention: the grouped softmax, inserted tokens, the retrieval cache, and parity."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import GRAPH, calls, close, cut, in_pieces, load, qkv, refused
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import regard.mechanisms.landmark.forms as landmark_module
from regard.catalogue import get_mechanism
from regard.contract import ALL_PATTERNS, Context, Mask, Role, Shape
from regard.create import create_layer
from regard.engines.retrieved_attention import torch_form
from regard.mechanisms.landmark import MECHANISM, SELECTIONS, Config, cost, prepare
from regard.positions import Rotary, create_positions

run, softmax = calls(MECHANISM), calls(get_mechanism("softmax"))
sample = functools.partial(qkv, groups=2, dim=8, value_dim=6)
in_every_pattern = pytest.mark.parametrize("pattern", ALL_PATTERNS)


def marks(*rows: list[int], m: int, batch: int = 2) -> Tensor:
    """Roles with landmarks at the given places, either of each row or of all rows."""
    roles = torch.zeros(batch, m, dtype=torch.long)
    for row in range(batch):
        roles[row, rows[row % len(rows)]] = int(Role.LANDMARK)
    return roles


def regular(m: int, block: int, *phases: int, batch: int = 2) -> Tensor:
    """Roles of streams in which each row's first block lacks its first `phase` tokens."""
    rows = ([j for j in range(m) if (j + phase) % (block + 1) == block] for phase in phases or (0,))
    return marks(*rows, m=m, batch=batch)


def row(r: int, inputs: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    return {name: x[r : r + 1, :, :n] for name, x in inputs.items()}


def weights_of(inputs: dict[str, Tensor], options: dict | None = None, **call: Any) -> Tensor:
    return run(inputs, options, want={"weights"}, **call).extras["weights"]


def trained(inputs: dict[str, Tensor], options: dict | None = None, seed: int = 0, **call: Any):
    generator = torch.Generator().manual_seed(seed)
    return run(inputs, options, **{"form": "parallel", "training": True, "generator": generator, **call})


def with_miss(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs | {"miss": torch.randn(2, 8, dtype=torch.float64)}


def rotary():
    return create_positions("rotary", dim=8, heads=1, head_dim=8).rotate


def bias_of(m: int, columns: dict[int, float]) -> Tensor:
    """A bias that depends only on the key: the values of `columns`, and 0 for other keys."""
    bias = torch.zeros(1, 1, m, m, dtype=torch.float64)
    for key, value in columns.items():
        bias[..., key] = value
    return bias


# The grouped softmax


@pytest.mark.parametrize("name", ["landmark_regular", "landmark_irregular", "landmark_none"])
@pytest.mark.parametrize("form", ["reference", "parallel", "chunked"])
def test_equals_the_official_code(name, form):
    fixture = load(name)
    inputs, roles = {n: fixture[n].requires_grad_() for n in "qkv"}, fixture["is_landmark"].long()
    output = run(inputs, roles=roles, form=form).output
    close(output.transpose(1, 2).flatten(2), fixture["core_out"], 1e-10)  # observed 5e-16
    cotangent = (fixture["grad_out"] @ fixture["weight_c_proj_weight"]).unflatten(-1, (2, 8)).transpose(1, 2)
    output.backward(cotangent)
    for n, x in inputs.items():
        close(x.grad, fixture[f"grad_{n}"], 1e-10)  # observed 2e-15
    if form == "parallel":
        close(weights_of(inputs, roles=roles), fixture["attn"], 1e-10)  # observed 4e-16


def test_empty_blocks_lose_the_share_that_the_official_code_leaves_them():
    fixture = load("landmark_adjacent")
    share = fixture["attn"].sum(-1, keepdim=True)
    assert share.min() < 0.9
    found = weights_of({n: fixture[n] for n in "qkv"}, roles=fixture["is_landmark"].long())
    close(found, torch.where(share > 0, fixture["attn"] / share, 0.0), 1e-10)  # observed 5e-16


@in_every_pattern
def test_rows_sum_to_one_and_landmarks_get_nothing_and_give_nothing(pattern):
    inputs, roles = sample(20), marks([3, 4, 11], [0, 6, 18], m=20)
    landmark = (roles == Role.LANDMARK)[:, None, :, None].expand(-1, 2, -1, -1)
    other = inputs | {"v": torch.where(landmark, 1e6, inputs["v"])}
    close(run(other, roles=roles, pattern=pattern).output, run(inputs, roles=roles, pattern=pattern).output)
    weights = weights_of(inputs, roles=roles, pattern=pattern)
    assert (weights.mT[landmark[..., 0]] == 0).all()
    total = weights.sum(-1)
    if pattern == "causal-self":
        assert weights.triu(1).abs().max() == 0
        assert (total[1, :, 0] == 0).all()  # the only token is a landmark, so there is no key
        total[1, :, 0] = 1
    close(total, torch.ones_like(total))


@in_every_pattern
def test_landmarks_that_sum_up_their_blocks_give_plain_softmax_over_normal_tokens(pattern):
    n, places = 20, [4, 9, 19]
    inputs, call = sample(n), {"roles": marks(places, m=n), "pattern": pattern}
    scores = inputs["q"] @ inputs["k"].mT * 8**-0.5
    bias = torch.zeros_like(scores)
    for first, last in zip([0, 5, 10], places, strict=True):
        bias[..., last] = scores[..., first:last].logsumexp(-1) - scores[..., last]
    close(run(inputs, mask=Mask(bias=bias), **call).output, run(inputs, {"softmax": "ignore"}, **call).output)


def test_gates_close_and_open_blocks():
    inputs, call = sample(15), {"roles": regular(15, 4)}
    shut, wide = bias_of(15, dict.fromkeys((4, 9, 14), -torch.inf)), bias_of(15, {4: 1e4})
    weights, block = weights_of(inputs, mask=Mask(bias=shut), **call), torch.arange(15) // 5
    assert (weights[:, :, block[:, None] != block] == 0).all()
    weights = weights_of(inputs, mask=Mask(bias=wide), **call)
    close(weights[:, :, 5:, :4].sum(-1), torch.ones(2, 2, 10, dtype=torch.float64))


@pytest.mark.parametrize("form", ["reference", "parallel"])
def test_a_block_hidden_by_a_bias_loses_its_landmark(form):
    inputs, roles = sample(12), marks([3, 7], m=12)
    bias = bias_of(12, dict.fromkeys((0, 1, 2), -torch.inf))
    found = run(inputs, roles=roles, form=form, mask=Mask(bias=bias)).output
    close(found[:, :, 4:], run(cut(inputs, slice(4, None)), roles=roles[:, 4:]).output)
    assert (found[:, :, :4] == 0).all()


@pytest.mark.parametrize("form", ["reference", "parallel", None])
def test_memory_after_the_last_landmark_cannot_be_reached_across(form):
    inputs, roles = sample(5, 14), marks([3, 9], m=14)
    found = run(inputs, roles=roles, pattern="noncausal-cross", form=form).output
    reached = cut(inputs, slice(0, 10), ("k", "v"))
    close(found, run(reached, roles=roles[:, :10], pattern="noncausal-cross").output)


@pytest.mark.parametrize("kind", ["ignore", "plain"])
@pytest.mark.parametrize("form", ["reference", "parallel", "chunked"])
def test_other_softmaxes_hide_landmarks_or_treat_them_as_tokens(form, kind):
    inputs, roles = sample(12), regular(12, 3)
    bias = torch.zeros(2, 1, 12, 12, dtype=torch.float64)
    if kind == "ignore":
        bias = bias.masked_fill((roles == Role.LANDMARK)[:, None, None], -torch.inf)
    found = run(inputs, {"softmax": kind}, roles=roles, form=form).output
    close(found, softmax(inputs, mask=Mask(bias=bias)).output)


def test_large_scores_and_extreme_gates_stay_exact():
    inputs, roles = sample(20), regular(20, 4)
    inputs["q"] = 300 * inputs["q"]
    close(run(inputs, roles=roles).output, run(inputs, roles=roles, form="reference").output, 1e-11)
    bias = bias_of(12, {3: 500.0, 4: -700.0, 5: -700.0, 6: -700.0, 7: -500.0})
    inputs, call = sample(12), {"roles": regular(12, 3), "mask": Mask(bias=bias)}
    close(run(inputs, **call).output, run(inputs, form="reference", **call).output)


# Random options of training


def test_dropped_gates_and_weights_are_those_of_the_definition_under_one_generator():
    inputs, roles = sample(16), regular(16, 4)
    expected, *found = (
        trained(inputs, {"group_dropout": 0.5}, seed=3, roles=roles, form=form, dropout=0.3).output
        for form in ("reference", "parallel", "chunked")
    )
    for x in found:
        close(x, expected)
    assert (expected - run(inputs, roles=roles).output).abs().max() > 0.1


def test_group_dropout_drops_whole_blocks_but_not_the_own_one_and_only_in_training():
    inputs, call = sample(15), {"options": {"group_dropout": 0.5}, "roles": regular(15, 4)}
    plain = weights_of(inputs, roles=call["roles"])
    close(weights_of(inputs, **call), plain)
    ratio = (weights_of(inputs, training=True, **call) / plain)[:, :, 14]
    close(ratio[..., 10:14], torch.ones_like(ratio[..., 10:14]))
    for block in (ratio[..., :4], ratio[..., 5:9]):
        assert ((block < 1e-12).all(-1) | ((block - 2).abs() < 1e-9).all(-1)).all()
    assert (ratio[..., :9] < 1e-12).any()


def test_position_jump_moves_what_follows_a_landmark_in_training_only():
    inputs, call = sample(12), {"roles": regular(12, 4), "rotate": rotary()}
    unmoved = run(inputs, **call).output
    close(run(inputs, {"position_jump": 50}, **call).output, unmoved)
    jumped, expected = (
        trained(inputs, {"position_jump": 50}, form=form, **call).output for form in ("parallel", "reference")
    )
    close(jumped, expected)
    close(jumped[:, :, :5], unmoved[:, :, :5])
    assert (jumped[:, :, 5:] - unmoved[:, :, 5:]).abs().max() > 1e-3


# Retrieval


def naive_retrieval(inputs, roles, chunks: list[int], config: Config, rotate=None) -> Tensor:
    """The definition of retrieval for one row, token by token and head by head."""
    q, k, v = (inputs[name][0] for name in "qkv")
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    miss = inputs["miss"].repeat_interleave(len(q) // 2, 0)[:, None] if "miss" in inputs else None
    size, top_k, scale = config.block + 1, config.top_k, q.shape[-1] ** -0.5
    output = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype)

    def turned(x: Tensor, places: list[int]) -> Tensor:
        return x if rotate is None or not places else rotate(x[None, None], torch.tensor([places]))[0, 0]

    def split(tokens: Iterable[int]) -> list[list[int]]:
        """The blocks, each with its landmark, followed by the incomplete one."""
        blocks = [[]]
        for j in tokens:
            blocks[-1].append(j)
            if roles[0, j]:
                blocks.append([])
        return blocks

    for start, stop in itertools.pairwise(itertools.accumulate(chunks, initial=0)):
        *blocks, unfinished = split(range(start))
        blocks = [block for block in blocks[-(config.cache_blocks or start) :] if len(block) > 1]
        count, chunk = len(blocks), range(start, stop)
        first = min(count, top_k + 1) * size
        near = {j: first + place for place, j in enumerate([*unfinished, *chunk])}
        queries = torch.stack([turned(x[start:stop], [near[i] for i in chunk]) for x in q])
        ends = [(b if count <= top_k else max(0, b - (count - top_k) + 1)) * size + config.block for b in range(count)]
        gates = torch.stack([turned(x[[block[-1] for block in blocks]], ends) for x in k])
        shares = scale * queries @ gates.mT
        if config.selection != "per_token_and_head" and shares.numel():
            axis = 0 if config.selection == "max_over_heads" else 1
            shares = shares.softmax(-1).amax(axis, keepdim=True).expand_as(shares)
        for h, i in itertools.product(range(len(q)), chunk):
            chosen, places = sorted(shares[h, i - start].argsort(descending=True)[:top_k].tolist()), dict(near)
            for order, b in enumerate(chosen):
                slot = b if count <= top_k else order + (b >= count - top_k)
                places |= {j: (slot + 1) * size - len(blocks[b]) + place for place, j in enumerate(blocks[b])}
            tokens, query = [j for j in places if j <= i], scale * queries[h, i - start]
            scores = dict(zip(tokens, turned(k[h, tokens], [places[j] for j in tokens]) @ query, strict=True))
            *closed, local = split([*unfinished, *range(start, i)])
            local, retrieved = local if roles[0, i] else [*local, i], [blocks[b] for b in chosen]
            if miss is not None:
                scores["miss"] = (turned(miss[h], [-1]) @ query)[0]
                output[h, i] = grouped(scores, v[h], local, closed, retrieved, config.miss_cutoff)
            else:
                output[h, i] = grouped(scores, v[h], local, retrieved + closed)
    return output[None]


def grouped(scores: dict, v: Tensor, local: list[int], gates: list, held: list | None = None, cutoff=0.0) -> Tensor:
    """Softmax over tokens and gates, each of which stands for the block it ends; the miss key is the gate of `held`."""
    gates, held = ([block for block in blocks or [] if len(block) > 1] for blocks in (gates, held))
    top = [*local, *(block[-1] for block in gates), *(["miss"] if "miss" in scores else [])]
    found = torch.zeros_like(v[0])

    def shares(keys: list) -> dict:
        return dict(zip(keys, torch.stack([scores[key] for key in keys]).softmax(0), strict=True)) if keys else {}

    def read(tokens: list[int]) -> Tensor:
        return sum(share * v[j] for j, share in shares(tokens).items())

    share = shares(top)
    for j in local:
        found = found + share[j] * v[j]
    for block in gates:
        found = found + share[block[-1]] * read(block[:-1])
    if held and share["miss"] >= cutoff:
        opened = shares([block[-1] for block in held])
        for block in held:
            found = found + share["miss"] * opened[block[-1]] * read(block[:-1])
    return found


RETRIEVALS = [  # options, tokens missing from the first block, tokens in a chunk
    ({"top_k": 1}, 0, 6),
    ({"top_k": 2}, 2, 7),
    ({"top_k": 2}, 3, 1),
    ({"top_k": 2, "cache_blocks": 4}, 1, 5),
    ({"top_k": 3, "cache_blocks": 2}, 0, 4),
    ({"top_k": 4, "cache_blocks": 5}, 3, 13),
    ({"top_k": 2, "miss_cutoff": 0.0}, 0, 6),
    ({"top_k": 2, "miss_cutoff": 0.4}, 0, 6),
]


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(("options", "phase", "chunk"), RETRIEVALS)
def test_retrieval_equals_its_definition_token_by_token(options, phase, chunk, selection, monkeypatch):
    rotated = (RETRIEVALS.index((options, phase, chunk)) + SELECTIONS.index(selection)) % 2  # every other case
    n, options = 34, {"block": 3, "selection": selection, **options}
    inputs, call = sample(n, batch=1, heads=4), {"roles": regular(n, 3, phase, batch=1)}
    inputs = with_miss(inputs) if "miss_cutoff" in options else inputs
    call["rotate"] = rotary() if rotated else None
    found = run(inputs, options, form="chunked", chunk_size=chunk, **call).output
    chunks = [min(chunk, n - s) for s in range(0, n, chunk)]
    close(found, naive_retrieval(inputs, chunks=chunks, config=Config(**options), **call))
    assert (found - run(inputs, {"block": 3}, **call).output).abs().max() > 1e-3
    monkeypatch.setattr(torch_form, "NUMBERS_AT_ONCE", 600)  # few queries at a time
    close(run(inputs, options, form="chunked", chunk_size=chunk, **call).output, found)


@pytest.mark.parametrize("cache_blocks", [None, 3])
@pytest.mark.parametrize(
    ("selection", "offload"),
    [("per_token_and_head", None), ("max_over_tokens", None), ("max_over_tokens", "cpu"), ("max_over_tokens", "disk")],
)
def test_rows_that_advance_unequally_retrieve_what_they_retrieve_alone(selection, offload, cache_blocks):
    """Some rows wait, bounded caches have empty blocks, and blocks may be kept in any place."""
    options = {"block": 3, "top_k": 2, "cache_blocks": cache_blocks, "selection": selection, "offload": offload}
    roles = regular(30, 3, 0, 3)
    if cache_blocks is not None:
        roles[1] = marks([0, 3, 4, 5, 9, 12, 15, 16, 20, 24], m=30, batch=1)
    inputs, rotate = sample(30), rotary()
    advances = [(5, 2), (0, 7), (9, 0), (3, 3), (1, 1), (12, 13)]
    state, done, outputs = None, [0, 0], [[], []]
    for counts in advances:
        index = torch.stack([done[r] + torch.arange(max(counts)) for r in range(2)]).clamp(max=29)
        part = {n: x.gather(2, index[:, None, :, None].expand(-1, 2, -1, x.shape[3])) for n, x in inputs.items()}
        call = {"roles": roles.gather(1, index), "mask": Mask(lengths=torch.tensor(counts)), "state": state}
        result = run(part, options, rotate=rotate, return_state=True, **call)
        state = result.state
        for r, count in enumerate(counts):
            outputs[r].append(result.output[r : r + 1, :, :count])
            done[r] += count
    assert state.length.tolist() == done == [30, 26]
    for r in range(2):
        chunks = [counts[r] for counts in advances]
        expected = naive_retrieval(row(r, inputs, done[r]), roles[r : r + 1], chunks, Config(**options), rotate)
        close(torch.cat(outputs[r], 2), expected)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(("dtype", "apart"), [(torch.float64, 1e-15), (torch.float32, 2e-7), (torch.bfloat16, 0.0)])
def test_the_newest_of_blocks_that_tie_are_read(selection, dtype, apart):
    """All landmarks have the same key but for rounding: a cache of two blocks holds what retrieval of two blocks reads."""
    inputs, roles, options = sample(300), regular(300, 3), {"block": 3, "selection": selection}
    same = inputs["k"][:, :, :1] * (1 + apart * torch.randn_like(inputs["k"]))
    inputs["k"] = torch.where(roles[:, None, :, None] == Role.LANDMARK, same, inputs["k"])
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    past, (q, k, v) = cut(inputs, slice(0, 280)), (inputs[name][:, :, 280:] for name in "qkv")
    for new in (1, 20):
        found, expected = (
            run(
                {"q": q[:, :, :new], "k": k[:, :, :new], "v": v[:, :, :new]},
                each,
                roles=roles[:, 280 : 280 + new],
                state=run(past, each, roles=roles[:, :280], return_state=True, chunk_size=280).state,
            ).output
            for each in ({**options, "top_k": 2}, {"block": 3, "cache_blocks": 2})
        )
        close(found, expected, {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype])


@pytest.mark.parametrize("pattern", ["noncausal-cross", "causal-cross"])
@pytest.mark.parametrize("selection", SELECTIONS[:2])
def test_the_newest_of_blocks_that_tie_are_read_across(pattern, selection):
    inputs, roles = sample(60), regular(60, 3)
    same = inputs["k"][:, :, :1] * (1 + 1e-15 * torch.randn_like(inputs["k"]))
    inputs["k"] = torch.where(roles[:, None, :, None] == Role.LANDMARK, same, inputs["k"])
    options = {"block": 3, "top_k": 2, "selection": selection}
    expected = run(inputs, {"block": 3, "cache_blocks": 2}, roles=roles, pattern=pattern, form="reference").output
    for form in ("reference", "parallel"):
        close(run(inputs, options, roles=roles, pattern=pattern, form=form).output, expected)


def test_a_retrieving_state_keeps_as_many_numbers_as_the_card_says():
    inputs, roles = sample(30, batch=1), regular(30, 3, batch=1)  # seven whole blocks of four
    state = run(inputs, {"block": 3, "top_k": 2}, pattern="causal-self", roles=roles, return_state=True).state
    b, g, n, d = inputs["k"].shape
    numbers = sum(x.numel() for x in state.tensors().values() if x.is_floating_point())
    assert cost(Shape(b, g, n, n, d, inputs["v"].shape[-1]), Config(block=3, top_k=2)).state == numbers


@pytest.mark.parametrize(
    ("kind", "rotated"), [("grouped", False), ("grouped", True), ("ignore", False), ("plain", False)]
)
@pytest.mark.parametrize("top_k", [8, 50])
def test_retrieving_all_blocks_equals_the_whole(top_k, kind, rotated):
    inputs, options = sample(40, heads=4), {"block": 4, "softmax": kind}
    call = {"roles": regular(40, 4, 0, 2), "rotate": rotary() if rotated else None}
    expected = run(inputs, options, form="reference", **call).output
    for chunk in (1, 3, 12, 40):
        close(run(inputs, options | {"top_k": top_k}, form="chunked", chunk_size=chunk, **call).output, expected)


def test_a_full_cache_drops_its_oldest_block_only():
    inputs, roles, options = sample(24), regular(24, 3), {"block": 3, "cache_blocks": 2}
    result = run(inputs, options, roles=roles, chunk_size=1, form="chunked", return_state=True)
    # token 23 is the landmark of its block; the cache holds blocks 12-15 and 16-19
    last = run(cut(inputs, slice(12, None)), roles=roles[:, 12:]).output
    close(result.output[:, :, 23], last[:, :, 11])
    assert result.state.k.shape[2] == 2 * 4 + 3
    assert result.state.cached.tolist() == [8, 8]
    assert (result.state.k[:, :, 3:] == inputs["k"][:, :, 16:]).all()


@pytest.mark.parametrize("n", [40, 80])
def test_attended_tokens_stay_bounded_as_the_context_grows(n):
    inputs, roles, options = sample(n, batch=1), regular(n, 3, batch=1), {"block": 3, "top_k": 2}
    value = inputs["v"].requires_grad_()
    state = run(cut(inputs, slice(0, n - 1)), options, roles=roles[:, :-1], return_state=True).state
    output = run(cut(inputs, slice(n - 1, n)), options, roles=roles[:, -1:], state=state).output
    gradient = torch.autograd.grad(output.sum(), value)[0]
    assert ((gradient.abs().sum(-1) > 0).sum(-1) == 2 * 3 + 3).all()


UNEVEN = [(n, m, {}, padded) for n, m in ((1, 1), (4, 4), (0, 3), (1, 0), (2, 5), (5, 2)) for padded in (False, True)]


@pytest.mark.parametrize(("n", "m", "options", "padded"), [*UNEVEN, (4, 4, {"cache_blocks": 40}, False)])
def test_rotated_keys_go_on_from_a_state_with_more_or_fewer_queries(n, m, options, padded):
    """Two calls, the second with unequal numbers of queries and keys, equal one call on all keys."""
    whole, roles, options = sample(9 + m), regular(9 + m, 3), {"block": 3, **options}
    queries, rotate = {"q": torch.randn(2, 2, n, 8, dtype=torch.float64)}, rotary()
    expected = run(whole | queries, roles=roles, rotate=rotate).output
    first, past, mask = cut(whole, slice(0, 9)), roles[:, :9], None
    if padded:  # with two slots that are never seen
        first = {name: F.pad(x, (0, 0, 0, 2), value=torch.nan) for name, x in first.items()}
        past, mask = F.pad(past, (0, 2)), Mask(lengths=torch.tensor([9, 9]))
    state = run(first, options, roles=past, rotate=rotate, return_state=True, mask=mask).state
    then = cut(whole, slice(9, None)) | queries
    close(run(then, options, roles=roles[:, 9:], rotate=rotate, state=state).output, expected, 1e-11)


def test_gradients_flow_through_retrieval():
    call = {"roles": regular(9, 2, batch=1), "form": "chunked", "chunk_size": 4}

    def function(*tensors: Tensor) -> Tensor:
        return run(dict(zip("qkv", tensors, strict=True)), {"block": 2, "top_k": 1}, **call).output

    inputs = qkv(9, batch=1, heads=1, dim=3)
    torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs.values()])


def test_dropped_gates_in_retrieval_keep_the_expected_weight():
    inputs = {n: x.expand(400, -1, -1, -1) for n, x in sample(20, batch=1).items()}
    inputs["v"] = torch.ones_like(inputs["v"])
    call = {"roles": regular(20, 3, batch=400), "form": "chunked", "chunk_size": 4, "training": True}
    found = run(inputs, {"block": 3, "top_k": 2, "group_dropout": 0.5}, **call).output[:, :, -1]
    assert found.std(0).max() > 0.1
    assert (found.mean(0) - 1).abs().max() < 0.1


def test_retrieval_compiles_whole():
    options, roles = {"block": 3, "top_k": 2, "cache_blocks": 4}, regular(20, 3)
    call = {"rotate": rotary(), "return_state": True}
    state = run(sample(19), options, roles=roles[:, :19], **call).state
    token, mask = sample(1), Mask(lengths=torch.tensor([1, 0]))

    def step(tensors, state):
        result = run(tensors, options, roles=roles[:, 19:], state=state, mask=mask, **call)
        return result.output, result.state

    torch.compiler.reset()
    output, after = torch.compile(step, fullgraph=True, backend=GRAPH)(token, state)
    expected, wanted = step(token, state)
    close(output, expected)
    for name, tensor in wanted.tensors().items():
        assert torch.equal(after.tensors()[name], tensor)


def test_the_option_chunk_reads_as_chunks_of_a_call_do():
    inputs, call = sample(34), {"roles": regular(34, 3), "form": "chunked"}
    found = run(inputs, {"block": 3, "top_k": 2, "chunk": 6}, **call).output
    close(found, run(inputs, {"block": 3, "top_k": 2}, chunk_size=6, **call).output)
    assert (found - run(inputs, {"block": 3, "top_k": 2}, **call).output).abs().max() > 1e-3


def test_cost_of_a_step_is_bounded_by_retrieval():
    near, far = (cost(Shape(1, 1, n, n, 64, 64), Config(top_k=4, cache_blocks=500)) for n in (100_000, 200_000))
    assert near.step_flops == far.step_flops and near.state == far.state
    assert cost(Shape(1, 1, 1, 50_000, 64, 64), Config(top_k=4)).step_flops < 2 * 128 * 2_000


def pairs(scheme):
    """Adapt a scheme that pairs feature halves to rotate features 2i and 2i + 1, as the official code does."""
    halves = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def rotate(x: Tensor, positions: Tensor) -> Tensor:
        return scheme(x[..., halves], positions)[..., halves.argsort()]

    return rotate


RECORDED = [*((f"retrieval_{x}", {"selection": x}) for x in SELECTIONS), ("miss_token", {"miss_cutoff": 0.3})]


@pytest.mark.parametrize(("name", "options"), RECORDED)
def test_retrieval_equals_the_official_code(name, options):
    """Keys are rotated by the places of retrieved blocks, so blocks and places must both agree."""
    fixture, options = load(f"landmark_{name}"), {"block": 3, "top_k": 2, "cache_blocks": 4, **options}
    inputs = {n: fixture[n] for n in ("q", "k", "v", "miss") if n in fixture}
    roles, call = fixture["is_landmark"].long(), {"rotate": pairs(rotary()), "return_state": True}
    parts = torch.arange(inputs["q"].shape[2]).split(fixture["chunks"].tolist())
    found, _ = in_pieces(lambda p, s: run(cut(inputs, p), options, roles=roles[:, p], state=s, **call), parts)
    close(found.transpose(1, 2).flatten(2), fixture["core_out"])


# The miss token


@pytest.mark.parametrize(
    ("options", "rotated"),
    [(o, r) for o in ({}, {"miss_share": 1.0}, {"group_dropout": 0.3}) for r in (False, True)]
    + [({"position_jump": 5}, True)],
)
def test_a_miss_key_in_training_equals_the_definition(options, rotated, monkeypatch):
    inputs, options = with_miss(sample(23, heads=4)), {"block": 3, **options}
    call = {"roles": regular(23, 3, 0, 1), "rotate": rotary() if rotated else None}
    expected = trained(inputs, options, form="reference", **call).output
    close(trained(inputs, options, **call).output, expected)
    if "group_dropout" not in options:
        monkeypatch.setattr(landmark_module, "PAIRS_AT_ONCE", 400)
        close(trained(inputs, options, **call).output, expected)
    without = {name: inputs[name] for name in "qkv"}
    assert (trained(without, options, **call).output - expected).abs().max() > 1e-3


def test_a_miss_key_lets_a_query_close_the_blocks_that_it_controls():
    inputs = with_miss(sample(16))
    options, call = {"block": 3, "miss_share": 1.0}, {"roles": regular(16, 3), "want": {"weights"}}
    weights = trained(inputs, options, **call).extras["weights"]
    seen = torch.cat([inputs["miss"][None, :, None].expand(2, -1, -1, -1), inputs["k"][:, :, 12:14]], 2)
    beside = (8**-0.5 * inputs["q"] @ seen.mT)[:, :, 13].softmax(-1)  # token 13 is in the fourth block
    close(weights[:, :, 13, 12:14], beside[..., 1:])
    close(weights[:, :, 13, :12].sum(-1), beside[..., 0])
    gates = (8**-0.5 * inputs["q"] @ inputs["k"][:, :, 3:12:4].mT)[:, :, 13].softmax(-1)
    close(weights[:, :, 13, :12].unflatten(-1, (3, 4)).sum(-1), beside[..., :1] * gates)


def test_a_miss_key_that_controls_nothing_is_a_token_without_a_value():
    plain, roles = sample(20), regular(20, 3)
    inputs = with_miss(plain)
    found = weights_of(inputs, roles=roles)
    first = (8**-0.5 * inputs["q"][:, :, 0] * (inputs["k"][:, :, 0] - inputs["miss"])).sum(-1)
    close(found[:, :, 0, 0], torch.sigmoid(first))  # it sees itself and the miss key
    total = found.sum(-1, keepdim=True)
    assert (total < 1).all()
    close(found / total, weights_of(plain, roles=roles))
    for call in ({}, {"form": "reference"}, *({"form": "chunked", "chunk_size": size} for size in (1, 7))):
        close(run(inputs, roles=roles, **call).output, found @ inputs["v"])
    close(trained(inputs, {"miss_share": 0.0}, roles=roles).output, found @ inputs["v"])


@pytest.mark.parametrize("form", ["reference", "parallel"])
def test_a_miss_key_in_training_equals_the_official_code(form):
    fixture = load("landmark_miss_token_training")
    inputs = {n: fixture[n].requires_grad_() for n in ("q", "k", "v", "miss")}
    call = {"roles": fixture["is_landmark"].long(), "rotate": pairs(rotary()), "form": form}
    output = trained(inputs, {"miss_share": 1.0}, **call).output
    close(output.transpose(1, 2).flatten(2), fixture["core_out"])
    output.backward(fixture["grad_core_out"].unflatten(-1, (2, 8)).transpose(1, 2))
    for n, x in inputs.items():
        close(x.grad, fixture[f"grad_{n}"])


# Retrieval from a memory

MEMORIES = [
    {"top_k": 1, "block": 3},
    {"top_k": 2, "block": 3, "selection": "max_over_heads"},
    {"top_k": 2, "block": 9, "cache_blocks": 3},
    {"block": 9, "cache_blocks": 2},
]


@pytest.mark.parametrize("pattern", ["noncausal-cross", "causal-cross"])
@pytest.mark.parametrize("options", MEMORIES)
def test_each_query_reads_the_blocks_of_a_memory_whose_landmarks_it_scores_highest(options, pattern, monkeypatch):
    config, inputs = Config(**options), sample(5, 30, heads=4)
    places = [3, 7, 11, 15, 19, 23, 27] if config.block == 3 else [0, 4, 8, 9, 18, 22, 28]
    call = {"roles": marks(places, m=30), "pattern": pattern}
    scores = inputs["q"] @ inputs["k"].repeat_interleave(2, 1).mT * 8**-0.5
    starts = [0, *(p + 1 for p in places[:-1])]
    held = [(a, b) for a, b in zip(starts, places, strict=True)][-(config.cache_blocks or 9) :]
    held = [(a, b) for a, b in held if a < b]
    share = torch.stack([scores[..., b] for _, b in held], -1).softmax(-1)
    if config.selection == "max_over_heads":
        share = share.amax(1, keepdim=True).expand(-1, 4, -1, -1)
    hidden = torch.full((2, 4, 5, 30), -torch.inf, dtype=torch.float64)
    for index in share.topk(config.top_k or len(held)).indices.unbind(-1):
        for c, (a, b) in enumerate(held):
            hidden[..., a : b + 1] = torch.where((index == c)[..., None], 0.0, hidden[..., a : b + 1])
    expected = run(inputs, mask=Mask(bias=hidden), **call).output
    assert (expected - run(inputs, **call).output).abs().max() > 1e-3
    for form in ("reference", "parallel", "absorb+read"):
        close(run(inputs, options, form=form, **call).output, expected)
    monkeypatch.setattr(torch_form, "NUMBERS_AT_ONCE", 600)  # few queries at a time
    close(run(inputs, options, **call).output, expected)


@pytest.mark.parametrize("options", [{}, {"block": 3, "top_k": 1}])
def test_a_cross_layer_with_rotary_positions_takes_the_roles_of_the_memory(options):
    layer = create_layer("landmark", 16, 2, pattern="noncausal-cross", positions="rotary", **options).double()
    x, memory = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 11, 16, dtype=torch.float64)
    roles, lengths = marks([3, 6, 10], m=11), torch.tensor([11, 7])
    context = Context(roles=roles, memory_mask=Mask(lengths=lengths))
    whole = layer(x, memory, context=context).output
    close(layer(x, state=layer.encode_memory(memory, context=context)).output, whole)
    close(whole[1:], layer(x[1:], memory[1:, :7], context=Context(roles=roles[1:, :7])).output)


# Inserted tokens


def test_a_landmark_follows_every_block():
    ids, roles = prepare(torch.arange(1, 8)[None], Config(block=3), landmark_id=99)
    assert ids.tolist() == [[1, 2, 3, 99, 4, 5, 6, 99, 7]]
    assert roles.tolist() == [[0, 0, 0, 1, 0, 0, 0, 1, 0]]
    ids, _ = prepare(torch.arange(1, 7)[None], Config(block=3), landmark_id=99)
    assert ids.tolist() == [[1, 2, 3, 99, 4, 5, 6, 99]]


@pytest.mark.parametrize("block", [1, 3, 5])
def test_a_stream_prepared_in_pieces_equals_the_whole(block):
    config, ids = Config(block=block), torch.randint(1, 50, (2, 17))
    borders = ((0, 1), (1, 1), (1, 6), (6, 12), (12, 17))
    pieces = [prepare(ids[:, a:b], config, landmark_id=60, phase=a % block) for a, b in borders]
    for whole, *parts in zip(prepare(ids, config, landmark_id=60), *pieces, strict=True):
        assert torch.equal(torch.cat(parts, 1), whole)


def test_ragged_rows_are_prepared_as_alone():
    config, ids = Config(block=3), torch.randint(1, 50, (4, 8))
    lengths, phase = torch.tensor([8, 3, 0, 5]), torch.tensor([2, 0, 1, 1])
    found = prepare(ids, config, landmark_id=60, lengths=lengths, phase=phase)
    for r in range(4):
        valid = int(lengths[r] + (phase[r] + lengths[r]) // 3)
        alone = prepare(ids[r : r + 1, : lengths[r]], config, landmark_id=60, phase=int(phase[r]))
        for x, expected in zip(found, alone, strict=True):
            assert torch.equal(x[r, :valid], expected[0]) and (x[r, valid:] == 0).all()


# Refusals

ROLES, BOUNDED, STATE = regular(9, 3), {"block": 3, "top_k": 2}, {"return_state": True}
NONCAUSAL, ACROSS = {"pattern": "noncausal-self"}, {"pattern": "causal-cross"}
BIAS, JUMP, MISS = {"mask": Mask(bias=bias_of(9, {}))}, {"position_jump": 5}, {"miss": torch.zeros(2, 8).double()}


@pytest.mark.parametrize(
    ("words", "changed", "options", "call"),
    [
        ("2 rows of 9 tokens", {}, {}, {"roles": ROLES[:1]}),
        ("noncausal-self, where nothing is cached", {}, BOUNDED, NONCAUSAL),
        ("'max_over_tokens' in causal-cross", {}, {**BOUNDED, "selection": "max_over_tokens"}, ACROSS),
        ("top_k and softmax='plain' in causal-cross", {}, {**BOUNDED, "softmax": "plain"}, ACROSS),
        ("a bias.* under top_k", {}, BOUNDED, {**ACROSS, **BIAS}),
        ("a block of 4 tokens", {}, BOUNDED, {**ACROSS, "roles": marks([4], m=9)}),
        ("without roles", {}, {}, {"pattern": "noncausal-cross", "roles": None}),
        ("landmark with rotate in causal-cross", {}, {}, {**ACROSS, "rotate": rotary()}),
        ("weights under top_k", {}, BOUNDED, {**STATE, "want": {"weights"}}),
        ("a block of 9 tokens", {}, BOUNDED, {**STATE, "roles": None}),
        ("blocks of fewer than", {}, BOUNDED, {**STATE, "roles": marks([1, 3, 5, 7], m=9)}),
        ("queries that do not match the keys", {"q": torch.zeros(2, 2, 5, 8).double()}, BOUNDED, STATE),
        ("position_jump", {}, JUMP, {"training": True}),
        ("position_jump", {}, JUMP, {"training": True, "rotate": rotary(), **STATE}),
        ("miss key", MISS, {}, NONCAUSAL),
        ("miss key", MISS, {"softmax": "plain"}, {}),
        ("with a state", MISS, {}, {"training": True, **STATE}),
    ],
)
def test_what_cannot_be_honoured_is_refused(words, changed, options, call):
    refused(words, run, sample(9) | changed, options, **{"roles": ROLES, **call})


def test_other_calls_that_cannot_be_honoured_are_refused():
    state = run(sample(9), roles=ROLES, return_state=True).state
    refused("together with a state", run, sample(9), roles=ROLES, state=state, **BIAS)
    full, plain = {"block": 4, "top_k": 2}, torch.zeros(2, 9, dtype=torch.long)
    state = run(cut(sample(9), slice(0, 4)), full, roles=plain[:, :4], return_state=True).state
    refused("a block of 5 tokens", run, cut(sample(9), slice(4, 5)), full, roles=plain[:, 4:5], state=state)
    refused("phase", prepare, torch.zeros(1, 4, dtype=torch.long), Config(block=3), phase=3)
    refused("miss=True", create_layer, "landmark", 16, 2, pattern="noncausal-self", miss=True)
    layer, positions = create_layer("landmark", 16, 2, positions="rotary"), torch.arange(9).expand(2, -1)
    refused("explicit positions", layer, torch.randn(2, 9, 16), context=Context(roles=ROLES, positions=positions))


class _Copies(TorchDispatchMode):
    """Counts the bytes of operator outputs that are not views of the inputs."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
                self.bytes += made.nbytes
        return result


@pytest.mark.parametrize("positions", ["none", "rotary"])
def test_a_decoded_token_does_not_copy_the_cache(positions):
    layer = create_layer("landmark", 256, 2, positions=positions).eval()
    tokens, context = torch.randn(1, 4000, 256), Context(want=frozenset({"state"}), roles=regular(4000, 50, batch=1))
    with torch.no_grad():
        state = layer(tokens, context=context).state
        _, state = layer.step(tokens[:, 0], state)  # the first step copies, and reserves room for more
        copies = _Copies()
        for _ in range(4):
            before = state
            with copies:
                _, state = layer.step(tokens[:, 0], state)
            assert state.mechanism.k.data_ptr() == before.mechanism.k.data_ptr()
            assert state.mechanism.v.data_ptr() == before.mechanism.v.data_ptr()
    assert copies.bytes / 4 < 0.1 * state.nbytes


def test_what_a_retrieving_step_makes_grows_with_the_blocks_alone():
    layer = create_layer("landmark", 64, 2, positions="rotary", top_k=2).eval()
    made, held = [], []
    for n in (4000, 12000):
        tokens, context = torch.randn(1, n, 64), Context(want=frozenset({"state"}), roles=regular(n, 50, batch=1))
        with torch.no_grad():
            state, copies = layer(tokens[:, :1], context=context.replace(roles=context.roles[:, :1])).state, _Copies()
            for part, roles in zip(tokens[:, 1:].split(500, 1), context.roles[:, 1:].split(500, 1), strict=True):
                state = layer(part, context=context.replace(roles=roles), state=state).state
            _, state = layer.step(tokens[:, 0], state)
            with copies:
                _, state = layer.step(tokens[:, 0], state)
        made.append(copies.bytes)
        held.append(state.nbytes)
    assert made[1] - made[0] < 0.05 * (held[1] - held[0])


def test_retrieval_uses_as_many_positions_as_its_card_says_however_long_the_sequence_is(monkeypatch):
    options, rotate, seen = {"block": 3, "top_k": 2, "chunk": 8}, Rotary.rotate, set()

    def recorded(self, x, positions):
        seen.update(positions.unique().tolist())
        return rotate(self, x, positions)

    monkeypatch.setattr(Rotary, "rotate", recorded)
    layer, state = create_layer("landmark", 16, 2, positions="rotary", **options), None
    roles = regular(300, 3, batch=1)
    pieces = (x.split([19, 8, 1, 272], 1) for x in (torch.randn(1, 300, 16), roles))
    for part, its in zip(*pieces, strict=True):
        state = layer(part, context=Context(want=frozenset({"state"}), roles=its), state=state).state
    assert seen == set(range(MECHANISM.most_positions(Config(**options))))
    for missing in ({"top_k": None}, {"chunk": None}):
        assert MECHANISM.most_positions(Config(**options | missing)) is None
