"""What is peculiar to landmark attention: the grouped softmax, inserted tokens, the retrieval cache, and parity."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import regard.mechanisms.landmark.forms as landmark_module
from regard.apply import absorb, apply
from regard.catalogue import get_mechanism
from regard.contract import Context, Mask, Pattern, Role, Shape, Unsupported
from regard.create import create_layer
from regard.engines.grouped_attention import torch_form as torch_backend
from regard.mechanisms.landmark import MECHANISM, SELECTIONS, Config, cost, prepare, sample_context
from regard.models.language_model import LanguageModel, LanguageModelConfig
from regard.positions import create_positions

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
PATTERNS = [p.value for p in Pattern]
WANT_STATE = Context(want=frozenset({"state"}))


def load(name: str) -> dict[str, Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def sample(n: int, m: int | None = None, *, batch: int = 2, heads: int = 2, groups: int = 2, dim: int = 8):
    m = n if m is None else m
    make = {"q": (batch, heads, n, dim), "k": (batch, groups, m, dim), "v": (batch, groups, m, 6)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in make.items()}


def marks(places: list[int] | list[list[int]], m: int, batch: int = 2) -> Tensor:
    """Roles with landmarks at the given places, of all rows or of each."""
    rows = places if places and isinstance(places[0], list) else [places] * batch
    roles = torch.zeros(len(rows), m, dtype=torch.long)
    for row, at in enumerate(rows):
        roles[row, at] = Role.LANDMARK
    return roles


def regular(m: int, block: int, *, phase: int = 0, batch: int = 2) -> Tensor:
    """Roles of a stream whose first block lacks its first `phase` tokens."""
    return marks([j for j in range(m) if (j + phase) % (block + 1) == block], m, batch)


def run(inputs, roles, *, pattern="causal-self", form=None, config=None, **call) -> Tensor:
    return apply(MECHANISM, inputs, pattern=pattern, roles=roles, form=form, config=config, **call).output


def weights_of(inputs, roles, **call) -> Tensor:
    return apply(MECHANISM, inputs, roles=roles, want={"weights"}, **call).extras["weights"]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert found.shape == expected.shape
    if expected.numel():
        assert (found - expected).abs().max().item() <= tolerance * max(1.0, expected.abs().max().item())


def rotary(dim: int = 8):
    return create_positions("rotary", dim=dim, heads=1, head_dim=dim).rotate


# The grouped softmax


@pytest.mark.parametrize("name", ["landmark_regular", "landmark_irregular", "landmark_none"])
@pytest.mark.parametrize("form", ["reference", "parallel", "chunked"])
def test_equals_the_official_code(name: str, form: str) -> None:
    fixture = load(name)
    inputs = {n: fixture[n].clone().requires_grad_() for n in "qkv"}
    output = run(inputs, fixture["is_landmark"].long(), form=form)
    close(output.transpose(1, 2).flatten(2), fixture["core_out"], 1e-10)  # observed 5e-16
    cotangent = (fixture["grad_out"] @ fixture["weight_c_proj_weight"]).unflatten(-1, (2, 8)).transpose(1, 2)
    output.backward(cotangent)
    for n, x in inputs.items():
        close(x.grad, fixture[f"grad_{n}"], 1e-10)  # observed 2e-15
    if form == "parallel":
        close(weights_of(inputs, fixture["is_landmark"].long()), fixture["attn"], 1e-10)  # observed 4e-16


def test_empty_blocks_lose_the_share_that_the_official_code_leaves_them() -> None:
    fixture = load("landmark_adjacent")
    share = fixture["attn"].sum(-1, keepdim=True)
    assert share.min() < 0.9
    found = weights_of({n: fixture[n] for n in "qkv"}, fixture["is_landmark"].long())
    close(found, torch.where(share > 0, fixture["attn"] / share, 0.0), 1e-10)  # observed 5e-16


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_sum_to_one_and_landmarks_get_nothing(pattern: str) -> None:
    roles = marks([[3, 4, 11], [0, 6, 18]], 20)
    weights = weights_of(sample(20), roles, pattern=pattern)
    assert (weights.transpose(-1, -2)[(roles == Role.LANDMARK)[:, None].expand(-1, 2, -1)] == 0).all()
    total = weights.sum(-1)
    if pattern == "causal-self":
        assert weights.triu(1).abs().max() == 0
        assert (total[1, :, 0] == 0).all()  # a landmark alone has no key
        total[1, :, 0] = 1
    close(total, torch.ones_like(total))


def test_without_landmarks_it_is_softmax() -> None:
    inputs = sample(17)
    for pattern in ("causal-self", "noncausal-self"):
        expected = apply(get_mechanism("softmax"), inputs, pattern=pattern).output
        for form in ("reference", "parallel"):
            close(run(inputs, None, pattern=pattern, form=form), expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_landmarks_that_sum_up_their_blocks_give_plain_softmax_over_normal_tokens(pattern: str) -> None:
    n, places = 20, [4, 9, 19]
    inputs, roles = sample(n), marks(places, n)
    scores = inputs["q"] @ inputs["k"].mT * 8**-0.5
    bias = torch.zeros_like(scores)
    for first, last in zip([0, 5, 10], places, strict=True):
        bias[..., last] = scores[..., first:last].logsumexp(-1) - scores[..., last]
    expected = run(inputs, roles, pattern=pattern, config=Config(softmax="ignore"))
    close(run(inputs, roles, pattern=pattern, mask=Mask(bias=bias)), expected)


def test_gates_close_and_open_blocks() -> None:
    n = 15
    inputs, roles = sample(n), regular(n, 4)
    shut = torch.zeros(1, 1, n, n, dtype=torch.float64)
    shut[..., [4, 9, 14]] = -torch.inf
    weights = weights_of(inputs, roles, mask=Mask(bias=shut))
    block = torch.arange(n) // 5
    assert (weights[:, :, block[:, None] != block] == 0).all()
    wide = torch.zeros(1, 1, n, n, dtype=torch.float64)
    wide[..., 4] = 1e4
    weights = weights_of(inputs, roles, mask=Mask(bias=wide))
    close(weights[:, :, 5:, :4].sum(-1), torch.ones(2, 2, 10, dtype=torch.float64))


def test_a_landmark_reads_its_own_block_and_earlier_gates_only() -> None:
    weights = weights_of(sample(10), regular(10, 4))
    assert (weights[:, :, 4, :4] > 0).all() and (weights[:, :, 4, 4:] == 0).all()
    assert (weights[:, :, 9, [0, 1, 2, 3, 5, 6, 7, 8]] > 0).all() and (weights[:, :, 9, [4, 9]] == 0).all()


def test_the_first_token_of_a_block_sees_itself_beside_the_gates() -> None:
    inputs = sample(6)
    weights = weights_of(inputs, regular(6, 4))[:, :, 5]
    scores = (inputs["q"][:, :, 5:] @ inputs["k"].mT * 8**-0.5)[:, :, 0]
    close(weights[..., 5], scores[..., [4, 5]].softmax(-1)[..., 1])


@pytest.mark.parametrize("form", ["reference", "parallel"])
def test_a_block_hidden_by_a_bias_loses_its_landmark(form: str) -> None:
    inputs, roles = sample(12), marks([3, 7], 12)
    bias = torch.zeros(1, 1, 12, 12, dtype=torch.float64)
    bias[..., :3] = -torch.inf
    found = run(inputs, roles, form=form, mask=Mask(bias=bias))
    rest = {n: x[:, :, 4:] for n, x in inputs.items()}
    close(found[:, :, 4:], run(rest, roles[:, 4:]))
    assert (found[:, :, :4] == 0).all()


def test_the_landmarks_value_is_never_read() -> None:
    inputs, roles = sample(18), regular(18, 4)
    before = run(inputs, roles)
    inputs["v"][:, :, 4::5] = torch.nan
    kept = {**inputs, "v": torch.where((roles == Role.LANDMARK)[:, None, :, None], 1e6, inputs["v"])}
    close(run(kept, roles), before)


def test_memory_after_the_last_landmark_cannot_be_reached_across() -> None:
    inputs, roles = sample(5, 14), marks([3, 9], 14)
    for form in ("reference", "parallel", None):
        expected = run(
            {**inputs, "k": inputs["k"][:, :, :10], "v": inputs["v"][:, :, :10]},
            roles[:, :10],
            pattern="noncausal-cross",
        )
        close(run(inputs, roles, pattern="noncausal-cross", form=form), expected)


def test_streaming_memory_joins_an_unfinished_block() -> None:
    inputs, roles = sample(5, 14), marks([3, 12], 14)
    state = None
    for part in (slice(0, 6), slice(6, 14)):
        piece = {n: inputs[n][:, :, part] for n in "kv"}
        state = absorb(MECHANISM, piece, pattern="causal-cross", state=state, roles=roles[:, part])
    found = apply(MECHANISM, {"q": inputs["q"]}, pattern="causal-cross", state=state).output
    close(found, run(inputs, roles, pattern="causal-cross", form="reference"))


@pytest.mark.parametrize("softmax", ["ignore", "plain"])
def test_other_softmaxes_hide_landmarks_or_treat_them_as_tokens(softmax: str) -> None:
    inputs, roles = sample(12), regular(12, 3)
    bias = torch.zeros(2, 1, 12, 12, dtype=torch.float64)
    if softmax == "ignore":
        bias = bias.masked_fill((roles == Role.LANDMARK)[:, None, None], -torch.inf)
    expected = apply(get_mechanism("softmax"), inputs, mask=Mask(bias=bias)).output
    for form in ("reference", "parallel", "chunked"):
        close(run(inputs, roles, form=form, config=Config(softmax=softmax)), expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_queries_taken_block_by_block_equal_the_whole(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = sample(19, 23 if pattern != "noncausal-self" else 19)
    roles = sample_context(
        torch.Generator().manual_seed(1), batch=2, n=19, m=inputs["k"].shape[2], pattern=Pattern.parse(pattern)
    )["roles"]
    bias = torch.randn(1, 2, 19, inputs["k"].shape[2], dtype=torch.float64)

    def gradients() -> list[Tensor]:
        leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
        output = run(leaves, roles, pattern=pattern, mask=Mask(bias=bias))
        return [output, *torch.autograd.grad(output.square().sum(), list(leaves.values()))]

    expected, weights = gradients(), weights_of(inputs, roles, pattern=pattern)
    monkeypatch.setattr(torch_backend, "PAIRS_AT_ONCE", 100)
    for found, wanted in zip(gradients(), expected, strict=True):
        close(found, wanted)
    close(weights_of(inputs, roles, pattern=pattern), weights)


def test_large_scores_stay_exact() -> None:
    inputs, roles = sample(20), regular(20, 4)
    inputs["q"] = 300 * inputs["q"]
    found, expected = run(inputs, roles), run(inputs, roles, form="reference")
    close(found, expected, 1e-11)
    assert found.isfinite().all()


# Random options of training


def test_dropped_gates_and_weights_are_those_of_the_definition_under_one_generator() -> None:
    inputs, roles = sample(16), regular(16, 4)

    def found(form: str) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        config = Config(group_dropout=0.5)
        return run(inputs, roles, form=form, config=config, training=True, dropout=0.3, generator=generator)

    close(found("parallel"), found("reference"))
    close(found("chunked"), found("reference"))
    assert (found("parallel") - run(inputs, roles)).abs().max() > 0.1


def test_group_dropout_drops_whole_blocks_but_not_the_own_one_and_only_in_training() -> None:
    inputs, roles, config = sample(15), regular(15, 4), Config(group_dropout=0.5)
    plain = weights_of(inputs, roles)
    close(weights_of(inputs, roles, config=config), plain)
    dropped = weights_of(inputs, roles, config=config, training=True)
    ratio = (dropped / plain)[:, :, 14]
    close(ratio[..., 10:14], torch.ones_like(ratio[..., 10:14]))
    for block in (ratio[..., :4], ratio[..., 5:9]):
        assert ((block < 1e-12).all(-1) | ((block - 2).abs() < 1e-9).all(-1)).all()
    assert (ratio[..., :9] < 1e-12).any()


def test_position_jump_moves_what_follows_a_landmark_in_training_only() -> None:
    inputs, roles, config, rotate = sample(12), regular(12, 4), Config(position_jump=50), rotary()
    unmoved = run(inputs, roles, rotate=rotate)
    close(run(inputs, roles, rotate=rotate, config=config), unmoved)

    def jumped(form: str) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        return run(inputs, roles, rotate=rotate, config=config, training=True, generator=generator, form=form)

    close(jumped("parallel"), jumped("reference"))
    close(jumped("parallel")[:, :, :5], unmoved[:, :, :5])
    assert (jumped("parallel")[:, :, 5:] - unmoved[:, :, 5:]).abs().max() > 1e-3
    with pytest.raises(Unsupported, match="position_jump"):
        run(inputs, roles, config=config, training=True)
    with pytest.raises(Unsupported, match="position_jump"):
        run(inputs, roles, rotate=rotate, config=config, training=True, return_state=True)


# Retrieval


def naive_retrieval(inputs, roles, chunks: list[int], config: Config, rotate=None, miss=None) -> Tensor:
    """One row, token by token and head by head, as written in the definition of retrieval."""
    q, k, v = (inputs[n][0] for n in "qkv")
    heads, n, size, top_k = q.shape[0], q.shape[1], config.block + 1, config.top_k
    output = torch.zeros(heads, n, v.shape[-1], dtype=q.dtype)

    def turned(x: Tensor, position: int) -> Tensor:
        return x if rotate is None else rotate(x[None, None, None], torch.tensor([[position]]))[0, 0, 0]

    start = 0
    for length in chunks:
        blocks, unfinished = [], []
        for j in range(start):
            unfinished.append(j)
            if roles[0, j]:
                blocks.append(unfinished)
                unfinished = []
        if config.cache_blocks is not None:
            blocks = blocks[-config.cache_blocks :]
        blocks = [members for members in blocks if len(members) > 1]
        count = len(blocks)
        base = min(count, top_k + 1)
        queries, shares = {}, torch.zeros(heads, length, count, dtype=q.dtype)
        for h in range(heads):
            group = h * k.shape[0] // heads
            for i in range(length):
                at = base * size + len(unfinished) + i
                queries[h, start + i] = turned(q[h, start + i], at)
                for b, members in enumerate(blocks):
                    slot = b if count <= top_k else max(0, b - (count - top_k) + 1)
                    shares[h, i, b] = queries[h, start + i] @ turned(k[group, members[-1]], slot * size + config.block)
        if config.selection != "per_token_and_head" and shares.numel():
            shares = (shares * q.shape[-1] ** -0.5).softmax(-1)
            axis = 0 if config.selection == "max_over_heads" else 1
            shares = shares.amax(axis, keepdim=True).expand(heads, length, count)
        for h in range(heads):
            group = h * k.shape[0] // heads
            for i in range(start, start + length):
                query = queries[h, i]
                chosen = sorted(shares[h, i - start].argsort(descending=True)[:top_k].tolist())
                groups, now = [], [(j, base * size + place) for place, j in enumerate(unfinished)]
                for order, b in enumerate(chosen):
                    slot = b if count <= top_k else order + (b >= count - top_k)
                    ends = slot * size + size - len(blocks[b])
                    groups.append([(j, ends + place) for place, j in enumerate(blocks[b])])
                for j in range(start, i + 1):
                    now.append((j, base * size + len(unfinished) + j - start))
                    if roles[0, j] and j < i:
                        groups.append(now)
                        now = []
                key = None if miss is None else turned(miss[group], -1)
                output[h, i] = _grouped(query, groups, now, roles, k[group], v[group], turned, key, len(chosen), config)
        start += length
    return output[None]


def _grouped(query, groups, now, roles, k, v, turned, miss=None, retrieved=0, config=None) -> Tensor:
    """With a miss key the first `retrieved` groups are under its control."""
    scale = query.shape[-1] ** -0.5

    def scored(members):
        return torch.stack([scale * (query @ turned(k[j], position)) for j, position in members])

    def read(members):
        return scored(members[:-1]).softmax(0) @ torch.stack([v[j] for j, _ in members[:-1]])

    held = [members for members in groups[:retrieved] if len(members) > 1] if miss is not None else []
    local = [(j, position) for j, position in now if not roles[0, j]]
    gates = [members for members in groups[retrieved if miss is not None else 0 :] if len(members) > 1]
    top = torch.cat([scored(local) if local else query[:0], *(scored(members[-1:]) for members in gates)])
    if miss is not None:
        top = torch.cat([top, scale * (query @ miss)[None]])
    found = torch.zeros_like(v[0])
    if not len(top):
        return found
    top = top.softmax(0)
    for t, (j, _) in zip(top, local, strict=False):
        found = found + t * v[j]
    for t, members in zip(top[len(local) :], gates, strict=False):
        found = found + t * read(members)
    if held and top[-1] >= config.miss_cutoff:
        shares = torch.cat([scored(members[-1:]) for members in held]).softmax(0)
        for share, members in zip(shares, held, strict=True):
            found = found + top[-1] * share * read(members)
    return found


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(
    ("top_k", "cache_blocks", "phase", "chunk"),
    [(1, None, 0, 6), (2, None, 2, 7), (2, 4, 1, 5), (3, 2, 0, 4), (2, None, 3, 1), (4, 5, 3, 13)],
)
def test_retrieval_equals_its_definition_token_by_token(rotated, top_k, cache_blocks, phase, chunk) -> None:
    n, config = 34, Config(block=3, top_k=top_k, cache_blocks=cache_blocks)
    inputs = sample(n, batch=1, heads=4)
    roles, rotate = regular(n, 3, phase=phase, batch=1), rotary() if rotated else None
    found = run(inputs, roles, config=config, form="chunked", chunk_size=chunk, rotate=rotate)
    chunks = [min(chunk, n - s) for s in range(0, n, chunk)]
    close(found, naive_retrieval(inputs, roles, chunks, config, rotate))
    assert (found - run(inputs, roles, rotate=rotate)).abs().max() > 1e-3


# The miss token


def trained(inputs, roles, *, form="parallel", seed=0, **call):
    return apply(
        MECHANISM, inputs, roles=roles, form=form, training=True, generator=torch.Generator().manual_seed(seed), **call
    )


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("options", [{}, {"miss_share": 1.0}, {"position_jump": 5}, {"group_dropout": 0.3}])
def test_a_miss_key_in_training_equals_the_definition(options, rotated, monkeypatch) -> None:
    inputs = sample(23, heads=4) | {"miss": torch.randn(2, 8, dtype=torch.float64)}
    roles = torch.cat([regular(23, 3, batch=1), regular(23, 3, phase=1, batch=1)])
    if options.get("position_jump") and not rotated:
        return
    call = {"config": Config(block=3, **options), "rotate": rotary() if rotated else None}
    seed = int(torch.randint(1000, ()))
    expected = trained(inputs, roles, form="reference", seed=seed, **call).output
    close(trained(inputs, roles, seed=seed, **call).output, expected)
    if not options.get("group_dropout"):
        monkeypatch.setattr(landmark_module, "PAIRS_AT_ONCE", 400)
        close(trained(inputs, roles, seed=seed, **call).output, expected)
    without = {name: x for name, x in inputs.items() if name != "miss"}
    assert (trained(without, roles, seed=seed, **call).output - expected).abs().max() > 1e-3


def test_a_miss_key_lets_a_query_close_the_blocks_that_it_controls() -> None:
    inputs, roles = sample(16), regular(16, 3)
    inputs["miss"] = torch.randn(2, 8, dtype=torch.float64)
    config = Config(block=3, miss_share=1.0)
    weights = trained(inputs, roles, config=config, want={"weights"}).extras["weights"]
    seen = torch.cat([inputs["miss"][None, :, None].expand(2, -1, -1, -1), inputs["k"][:, :, 12:14]], 2)
    beside = (8**-0.5 * inputs["q"] @ seen.mT)[:, :, 13].softmax(-1)  # token 13 lies in the fourth block
    close(weights[:, :, 13, 12:14], beside[..., 1:])
    close(weights[:, :, 13, :12].sum(-1), beside[..., 0])
    gates = (8**-0.5 * inputs["q"] @ inputs["k"][:, :, 3:12:4].mT)[:, :, 13].softmax(-1)
    close(weights[:, :, 13, :12].unflatten(-1, (3, 4)).sum(-1), beside[..., :1] * gates)


def test_a_miss_key_that_controls_nothing_is_a_token_without_a_value() -> None:
    inputs, roles = sample(20), regular(20, 3)
    miss = {"miss": torch.randn(2, 8, dtype=torch.float64)}
    found = weights_of(inputs | miss, roles)
    without = weights_of(inputs, roles)
    first = found[:, :, 0, 0]  # which sees itself and the key
    close(first, torch.sigmoid(8**-0.5 * ((inputs["q"][:, :, 0] * (inputs["k"][:, :, 0] - miss["miss"])).sum(-1))))
    total = found.sum(-1, keepdim=True)
    assert (total < 1).all()
    close(found / total, without)
    close(run(inputs | miss, roles), found @ inputs["v"])
    close(run(inputs | miss, roles, form="reference"), found @ inputs["v"])
    for size in (1, 7):
        close(run(inputs | miss, roles, form="chunked", chunk_size=size), found @ inputs["v"])
    close(trained(inputs | miss, roles, config=Config(miss_share=0.0)).output, found @ inputs["v"])


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("cutoff", [0.0, 0.4])
@pytest.mark.parametrize("rotated", [False, True])
def test_retrieved_blocks_are_controlled_by_a_miss_key(rotated, cutoff, selection) -> None:
    n, config = 34, Config(block=3, top_k=2, miss_cutoff=cutoff, selection=selection)
    inputs, roles, rotate = sample(n, batch=1, heads=4), regular(n, 3, batch=1), rotary() if rotated else None
    miss = torch.randn(2, 8, dtype=torch.float64)
    found = run(inputs | {"miss": miss}, roles, config=config, form="chunked", chunk_size=6, rotate=rotate)
    chunks = [min(6, n - s) for s in range(0, n, 6)]
    close(found, naive_retrieval(inputs, roles, chunks, config, rotate, miss))


def test_a_layer_learns_its_miss_key_and_decodes_with_it() -> None:
    plan = [("landmark", {"block": 3, "top_k": 2, "miss": True, "miss_share": 1.0})] * 2
    model = LanguageModel(LanguageModelConfig(vocab_size=11, dim=16, plan=plan, num_heads=2)).double().train()
    model.loss(torch.randint(11, (2, 14))).backward()
    keys = [p for name, p in model.named_parameters() if name.endswith("miss")]
    assert len(keys) == 2
    assert all(float(p.grad.abs().max()) > 0 for p in keys)
    assert model.eval().generate(torch.randint(11, (2, 14)), 5).shape == (2, 5)
    with pytest.raises(Unsupported, match="miss=True"):
        create_layer("landmark", 16, 2, pattern="noncausal-self", miss=True)


def test_a_miss_key_where_it_means_nothing_is_refused() -> None:
    inputs, roles = sample(8), regular(8, 3)
    inputs["miss"] = torch.randn(2, 8, dtype=torch.float64)
    for call in ({"pattern": "noncausal-self"}, {"config": Config(softmax="plain")}):
        with pytest.raises(Unsupported, match="miss key"):
            run(inputs, roles, **call)
    with pytest.raises(Unsupported, match="with a state"):
        trained(inputs, roles, form=None, return_state=True)
    for options in ({"miss_share": 1.5}, {"miss_cutoff": -0.1}):
        with pytest.raises(Unsupported, match="miss_"):
            Config(**options)


def pairs(scheme):
    """Rotates planes of features 2i and 2i + 1, as the official code does, by positions of planes of halves."""
    halves = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def rotate(x: Tensor, positions: Tensor) -> Tensor:
        return scheme(x[..., halves], positions)[..., halves.argsort()]

    return rotate


def retrieved(fixture: dict[str, Tensor], config: Config, monkeypatch) -> tuple[Tensor, Tensor, Tensor]:
    """The recording's chunks read one by one: output, blocks chosen (from the oldest cached) and their slots."""
    chosen, slots = [], []
    choose, gather = landmark_module._chosen, landmark_module._gathered

    def choosing(call, q, cached):
        columns = choose(call, q, cached)
        oldest = cached.ends.shape[1] - cached.count[:, None, None, None]
        chosen.append((columns - oldest).expand(-1, -1, q.shape[2], -1))
        return columns

    def gathering(call, block, past, cached):
        def placing(x: Tensor, positions: Tensor) -> Tensor:
            slots.append(positions[:, ::4] // 4)
            return call.rotate(x, positions)

        return gather(call.replace(rotate=placing), block, past, cached)

    monkeypatch.setattr(landmark_module, "_chosen", choosing)
    monkeypatch.setattr(landmark_module, "_gathered", gathering)
    names = [name for name in ("q", "k", "v", "miss") if name in fixture]
    roles, state, outputs, start = fixture["is_landmark"].long(), None, [], 0
    for length in fixture["chunks"].tolist():
        chunk = slice(start, start + length)
        part = {name: fixture[name] if name == "miss" else fixture[name][:, :, chunk] for name in names}
        call = {"roles": roles[:, chunk], "config": config, "rotate": pairs(rotary()), "state": state}
        result = apply(MECHANISM, part, **call, return_state=True)
        outputs.append(result.output)
        state = result.state
        start += length
    places = [x.view(2, 2, -1, 2).expand(-1, -1, c.shape[2], -1) for x, c in zip(slots, chosen, strict=True)]
    return torch.cat(outputs, 2).transpose(1, 2).flatten(2), torch.cat(chosen, 2), torch.cat(places, 2)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_retrieval_equals_the_official_code(selection: str, monkeypatch) -> None:
    fixture = load(f"landmark_retrieval_{selection}")
    config = Config(block=3, top_k=2, cache_blocks=4, selection=selection)
    output, chosen, slots = retrieved(fixture, config, monkeypatch)
    assert torch.equal(chosen, fixture["chosen"]) and torch.equal(slots, fixture["slot"])
    close(output, fixture["core_out"], 1e-12)


def test_a_miss_key_controls_retrieved_blocks_as_in_the_official_code(monkeypatch) -> None:
    fixture = load("landmark_miss_token")
    config = Config(block=3, top_k=2, cache_blocks=4, miss_cutoff=0.3)
    output, chosen, slots = retrieved(fixture, config, monkeypatch)
    assert torch.equal(chosen, fixture["chosen"]) and torch.equal(slots, fixture["slot"])
    close(output, fixture["core_out"], 1e-12)


@pytest.mark.parametrize("form", ["reference", "parallel"])
def test_a_miss_key_in_training_equals_the_official_code(form: str) -> None:
    fixture = load("landmark_miss_token_training")
    inputs = {n: fixture[n].clone().requires_grad_() for n in ("q", "k", "v", "miss")}
    call = {"config": Config(miss_share=1.0), "rotate": pairs(rotary())}
    output = trained(inputs, fixture["is_landmark"].long(), form=form, **call).output
    close(output.transpose(1, 2).flatten(2), fixture["core_out"], 1e-12)
    output.backward(fixture["grad_core_out"].unflatten(-1, (2, 8)).transpose(1, 2))
    for n, x in inputs.items():
        close(x.grad, fixture[f"grad_{n}"], 1e-12)


SHARED = ["max_over_heads", "max_over_tokens"]


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("selection", SHARED)
@pytest.mark.parametrize(("top_k", "cache_blocks", "phase", "chunk"), [(1, None, 0, 6), (2, 4, 1, 5), (3, 4, 3, 1)])
def test_shared_choices_equal_their_definition(selection, rotated, top_k, cache_blocks, phase, chunk) -> None:
    n, config = 34, Config(block=3, top_k=top_k, cache_blocks=cache_blocks, selection=selection)
    inputs = sample(n, batch=1, heads=4)
    roles, rotate = regular(n, 3, phase=phase, batch=1), rotary() if rotated else None
    found = run(inputs, roles, config=config, form="chunked", chunk_size=chunk, rotate=rotate)
    chunks = [min(chunk, n - s) for s in range(0, n, chunk)]
    close(found, naive_retrieval(inputs, roles, chunks, config, rotate))
    alone = dataclasses.replace(config, selection="per_token_and_head")
    if chunk > 1 or selection == "max_over_heads":
        other = run(inputs, roles, config=alone, form="chunked", chunk_size=chunk, rotate=rotate)
        assert (found - other).abs().max() > 1e-3


@pytest.mark.parametrize("cache_blocks", [None, 3])
@pytest.mark.parametrize("offload", [None, "cpu"])
def test_rows_share_choices_among_their_own_tokens_wherever_blocks_are_kept(offload, cache_blocks) -> None:
    """Unequal rows, empty blocks and rows that wait; offloaded landmarks are those of the cache."""
    config = Config(block=3, top_k=2, cache_blocks=cache_blocks, selection="max_over_tokens", offload=offload)
    if cache_blocks is None:
        roles = torch.cat([regular(30, 3, batch=1), regular(30, 3, phase=1, batch=1)])
    else:
        roles = torch.cat([regular(30, 3, batch=1), marks([0, 3, 4, 5, 9, 12, 15, 16, 20, 24], 30, 1)])
    inputs, total, rotate = sample(30), (30, 26), rotary()
    advances = [(5, 2), (0, 7), (9, 0), (3, 3), (1, 1), (12, 13)]
    state, done, outputs = None, [0, 0], [[], []]
    for counts in advances:
        width = max(counts)
        index = torch.stack([done[r] + torch.arange(width) for r in range(2)]).clamp(max=29)
        part = {n: x.gather(2, index[:, None, :, None].expand(-1, 2, -1, x.shape[3])) for n, x in inputs.items()}
        call = {"roles": roles.gather(1, index), "mask": Mask(lengths=torch.tensor(counts)), "state": state}
        result = apply(MECHANISM, part, **call, return_state=True, config=config, rotate=rotate)
        state = result.state
        if offload is not None:
            check_marks(state)
        for r, count in enumerate(counts):
            outputs[r].append(result.output[r, :, :count])
            done[r] += count
    for r in range(2):
        row = {n: x[r : r + 1, :, : total[r]] for n, x in inputs.items()}
        expected = naive_retrieval(row, roles[r : r + 1], [a[r] for a in advances], config, rotate)
        close(torch.cat(outputs[r], 1), expected[0])
    if offload is not None:
        twice = state.select(torch.tensor([1, 1])).reset(torch.tensor([True, False]))
        assert twice.cached.tolist() == [0, int(state.cached[1])]
        check_marks(twice)


def check_marks(state) -> None:
    token = state.present() & ~state.landmark
    closes = state.landmark & F.pad(token[:, :-1], (1, 0))
    for row in range(len(closes)):
        keys = state.k[row][:, closes[row]]
        assert torch.equal(state.marks[row, :, state.marks.shape[2] - keys.shape[1] :], keys)


def test_retrieval_with_irregular_blocks_in_a_bounded_cache_equals_its_definition() -> None:
    n, config = 30, Config(block=5, top_k=2, cache_blocks=4)
    inputs, roles = sample(n, batch=1), marks([0, 3, 4, 9, 12, 18, 19, 22, 27], n, 1)
    for rotate in (None, rotary()):
        found = run(inputs, roles, config=config, form="chunked", chunk_size=4, rotate=rotate)
        close(found, naive_retrieval(inputs, roles, [4] * 7 + [2], config, rotate))


@pytest.mark.parametrize("rotated", [False, True])
def test_retrieving_all_blocks_equals_the_whole(rotated: bool) -> None:
    n, rotate = 40, rotary() if rotated else None
    inputs, roles = sample(n, heads=4), torch.cat([regular(n, 4, batch=1), regular(n, 4, phase=2, batch=1)])
    expected = run(inputs, roles, rotate=rotate, form="reference")
    for top_k in (8, 50):
        for chunk in (1, 3, 12, 40):
            config = Config(block=4, top_k=top_k)
            close(run(inputs, roles, config=config, form="chunked", chunk_size=chunk, rotate=rotate), expected)


def test_rows_that_advance_unequally_retrieve_what_they_retrieve_alone() -> None:
    config, total, rotate = Config(block=3, top_k=2), (30, 26), rotary()
    inputs, roles = sample(30), torch.cat([regular(30, 3, batch=1), regular(30, 3, phase=1, batch=1)])
    advances = [(5, 2), (0, 7), (9, 0), (3, 3), (1, 1), (12, 13)]
    alone = [
        naive_retrieval(
            {n: x[r : r + 1, :, : total[r]] for n, x in inputs.items()},
            roles[r : r + 1],
            [a[r] for a in advances],
            config,
            rotate,
        )
        for r in range(2)
    ]
    state, done = None, [0, 0]
    for counts in advances:
        width = max(counts)
        index = torch.stack([done[r] + torch.arange(width) for r in range(2)]).clamp(max=29)
        part = {n: x.gather(2, index[:, None, :, None].expand(-1, 2, -1, x.shape[3])) for n, x in inputs.items()}
        result = apply(
            MECHANISM,
            part,
            roles=roles.gather(1, index),
            mask=Mask(lengths=torch.tensor(counts)),
            state=state,
            return_state=True,
            config=config,
            rotate=rotate,
        )
        state = result.state
        for r, count in enumerate(counts):
            close(result.output[r : r + 1, :, :count], alone[r][:, :, done[r] : done[r] + count])
            assert (result.output[r, :, count:] == 0).all()
            done[r] += count
    assert state.length.tolist() == list(total)


def test_a_row_that_waits_keeps_its_blocks() -> None:
    inputs, config = sample(13), Config(block=3, top_k=2)
    roles = marks([0, 4, 8, 12], 13)
    call = {"roles": roles[:, :1], "config": config, "return_state": True}
    first = {n: x[:, :, :1] for n, x in inputs.items()}
    state = apply(MECHANISM, first, **call).state
    for _ in range(9):
        state = apply(
            MECHANISM, first, mask=Mask(lengths=torch.tensor([0, 1])), state=state, **{**call, "roles": None}
        ).state
        state = state.select(torch.tensor([0, 0]))
    rest = {n: x[:, :, 1:] for n, x in inputs.items()}
    found = apply(MECHANISM, rest, **{**call, "roles": roles[:, 1:]}, state=state).output
    close(found[:1], run(inputs, roles)[:1, :, 1:])


def test_a_full_cache_drops_its_oldest_block_only() -> None:
    n, config = 24, Config(block=3, cache_blocks=2)
    inputs, roles = sample(n), regular(n, 3)
    result = apply(MECHANISM, inputs, roles=roles, config=config, chunk_size=1, form="chunked", return_state=True)
    last = {name: x[:, :, 12:] for name, x in inputs.items()}
    # Token 23 is the landmark of its block, with the blocks 12-15 and 16-19 in the cache.
    close(result.output[:, :, 23], run(last, roles[:, 12:])[:, :, 11])
    assert result.state.k.shape[2] == 2 * 4 + 3
    assert result.state.cached.tolist() == [8, 8]
    assert (result.state.k[:, :, 3:] == inputs["k"][:, :, 16:]).all()


def test_a_bounded_cache_keeps_its_size_while_decoding() -> None:
    config = Config(block=3, top_k=2, cache_blocks=4)
    state, sizes = None, []
    for t in range(40):
        result = apply(
            MECHANISM, sample(1), roles=regular(40, 3)[:, t : t + 1], state=state, return_state=True, config=config
        )
        state = result.state
        sizes.append(state.nbytes)
    assert len(set(sizes[20:])) == 1


def test_attended_tokens_stay_bounded_as_the_context_grows() -> None:
    config = Config(block=3, top_k=2)
    for n in (40, 80):
        inputs, roles = sample(n, batch=1, heads=1, groups=1), regular(n, 3, batch=1)
        value = inputs["v"].clone().requires_grad_()
        head = {name: x[:, :, : n - 1] for name, x in {**inputs, "v": value}.items()}
        state = apply(MECHANISM, head, roles=roles[:, :-1], return_state=True, config=config).state
        tail = {name: x[:, :, n - 1 :] for name, x in {**inputs, "v": value}.items()}
        output = apply(MECHANISM, tail, roles=roles[:, -1:], state=state, config=config).output
        gradient = torch.autograd.grad(output.sum(), value)[0]
        assert int((gradient.abs().sum((0, 1, 3)) > 0).sum()) == 2 * 3 + 3


def test_keys_of_which_blocks_are_retrieved_are_cached_before_their_rotation() -> None:
    inputs, roles = sample(9), regular(9, 3)
    state = apply(
        MECHANISM, inputs, roles=roles, rotate=rotary(), return_state=True, config=Config(block=3, top_k=2)
    ).state
    assert (state.k == inputs["k"]).all()


UNEVEN = [(n, m, {}, padded) for n, m in ((1, 1), (4, 4), (0, 3), (1, 0), (2, 5), (5, 2)) for padded in (False, True)]


@pytest.mark.parametrize(("n", "m", "options", "padded"), [*UNEVEN, (4, 4, {"cache_blocks": 40}, False)])
def test_rotated_keys_go_on_from_a_state_with_more_or_fewer_queries(n, m, options, padded) -> None:
    """Two calls of which the last has other queries than keys, against one call on all keys."""
    roles, config = regular(9 + m, 3), Config(block=3, **options)
    whole = sample(9 + m)
    queries = torch.randn(2, 2, n, 8, dtype=torch.float64)
    expected = run({**whole, "q": queries}, roles, rotate=rotary())
    first = {name: x[:, :, :9] for name, x in whole.items()}
    mask = None
    if padded:  # by two slots that nobody sees
        first = {name: F.pad(x, (0, 0, 0, 2), value=torch.nan) for name, x in first.items()}
        mask = Mask(lengths=torch.tensor([9, 9]))
    past = F.pad(roles[:, :9], (0, 2 if padded else 0))
    state = apply(MECHANISM, first, roles=past, rotate=rotary(), return_state=True, config=config, mask=mask).state
    then = {"q": queries, "k": whole["k"][:, :, 9:], "v": whole["v"][:, :, 9:]}
    found = apply(MECHANISM, then, roles=roles[:, 9:], rotate=rotary(), state=state, config=config).output
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_retrieval_in_small_groups_of_queries_equals_retrieval_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, roles, config = sample(30), regular(30, 3), Config(block=3, top_k=2)
    call = {"config": config, "form": "chunked", "chunk_size": 11, "rotate": rotary()}
    expected = run(inputs, roles, **call)
    monkeypatch.setattr(landmark_module, "NUMBERS_AT_ONCE", 600)
    close(run(inputs, roles, **call), expected)


@pytest.mark.parametrize("softmax", ["ignore", "plain"])
def test_other_softmaxes_retrieve_too(softmax: str) -> None:
    inputs, roles = sample(30), regular(30, 3)
    expected = run(inputs, roles, config=Config(softmax=softmax))
    whole = Config(block=3, top_k=20, softmax=softmax)
    close(run(inputs, roles, config=whole, form="chunked", chunk_size=7), expected)


def test_gradients_flow_through_retrieval() -> None:
    inputs, roles = sample(9, batch=1, heads=1, groups=1, dim=3), regular(9, 2, batch=1)
    config = Config(block=2, top_k=1)

    def function(*tensors: Tensor) -> Tensor:
        named = dict(zip("qkv", tensors, strict=True))
        return run(named, roles, config=config, form="chunked", chunk_size=4)

    torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs.values()])


def test_dropped_gates_in_retrieval_keep_the_expected_weight() -> None:
    inputs, roles = sample(20, batch=1), regular(20, 3, batch=400)
    inputs = {n: x.expand(400, -1, -1, -1) for n, x in inputs.items()}
    inputs["v"] = torch.ones_like(inputs["v"])
    config = Config(block=3, top_k=2, group_dropout=0.5)
    found = run(inputs, roles, config=config, form="chunked", chunk_size=4, training=True)[:, :, -1]
    assert found.std(0).max() > 0.1
    assert (found.mean(0) - 1).abs().max() < 0.1


def test_retrieval_compiles_whole() -> None:
    inputs, roles = sample(19), regular(20, 3)
    config, rotate = Config(block=3, top_k=2, cache_blocks=4), rotary()
    call = {"config": config, "rotate": rotate, "return_state": True}
    state = apply(MECHANISM, inputs, roles=roles[:, :19], **call).state
    token, lengths = sample(1), torch.tensor([1, 0])

    def step(tensors, state):
        result = apply(MECHANISM, tensors, roles=roles[:, 19:], state=state, mask=Mask(lengths=lengths), **call)
        return result.output, result.state

    torch.compiler.reset()
    output, after = torch.compile(step, fullgraph=True, backend="aot_eager")(token, state)
    expected, wanted = step(token, state)
    close(output, expected)
    for name, tensor in wanted.tensors().items():
        assert torch.equal(after.tensors()[name], tensor)


def test_cost_of_a_step_is_bounded_by_retrieval() -> None:
    near, far = (cost(Shape(1, 1, n, n, 64, 64), Config(top_k=4, cache_blocks=500)) for n in (100_000, 200_000))
    assert near.step_flops == far.step_flops and near.state == far.state
    assert cost(Shape(1, 1, 1, 50_000, 64, 64), Config(top_k=4)).step_flops < 2 * 128 * 2_000


# Retrieval from a memory

MEMORIES = [
    {"top_k": 1, "block": 3},
    {"top_k": 2, "block": 3, "selection": "max_over_heads"},
    {"top_k": 2, "block": 9, "cache_blocks": 3},
    {"block": 9, "cache_blocks": 2},
]


@pytest.mark.parametrize("pattern", ["noncausal-cross", "causal-cross"])
@pytest.mark.parametrize("options", MEMORIES)
def test_each_query_reads_the_blocks_of_a_memory_whose_landmarks_it_scores_highest(options, pattern) -> None:
    config = Config(**options)
    inputs = sample(5, 30, heads=4)
    places = [3, 7, 11, 15, 19, 23, 27] if config.block == 3 else [0, 4, 8, 9, 18, 22, 28]
    roles, scores = marks(places, 30), inputs["q"] @ inputs["k"].repeat_interleave(2, 1).mT * 8**-0.5
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
    expected = run(inputs, roles, pattern=pattern, mask=Mask(bias=hidden))
    assert (expected - run(inputs, roles, pattern=pattern)).abs().max() > 1e-3
    for form in ("reference", "parallel", "absorb+read"):
        close(run(inputs, roles, pattern=pattern, config=config, form=form), expected)


def test_a_memory_that_streams_is_chosen_from_as_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in MEMORIES:
        config, inputs, roles = Config(**options), sample(6, 30), regular(30, 3)
        expected = run(inputs, roles, pattern="causal-cross", config=config, form="reference")
        state = None
        for part in torch.arange(30).split([2, 11, 1, 16]):
            piece = {n: inputs[n][:, :, part] for n in "kv"}
            call = {"pattern": "causal-cross", "state": state, "roles": roles[:, part], "config": config}
            state = absorb(MECHANISM, piece, **call)
        with monkeypatch.context() as patch:
            patch.setattr(landmark_module, "NUMBERS_AT_ONCE", 600)
            for part in torch.arange(6).split([1, 3, 2]):
                queries = {"q": inputs["q"][:, :, part]}
                found = apply(MECHANISM, queries, pattern="causal-cross", state=state, config=config).output
                close(found, expected[:, :, part])


# Layers and models


def test_a_layer_with_rotary_positions_decodes_as_it_reads() -> None:
    for options in ({}, {"top_k": 20}):
        layer = create_layer("landmark", 16, 2, positions="rotary", block=3, num_kv_heads=1, **options).double()
        x, roles = torch.randn(2, 17, 16, dtype=torch.float64), regular(17, 3, phase=1)
        expected = layer(x, context=Context(roles=roles)).output
        state, outputs = None, []
        for first, last in ((0, 6), *((t, t + 1) for t in range(6, 17))):
            result = layer(x[:, first:last], context=WANT_STATE.replace(roles=roles[:, first:last]), state=state)
            outputs.append(result.output)
            state = result.state
        close(torch.cat(outputs, 1), expected)
        with pytest.raises(Unsupported, match="explicit positions"):
            layer(x, context=Context(roles=roles, positions=torch.arange(17).expand(2, -1)))


@pytest.mark.parametrize("options", [{}, {"block": 3, "top_k": 1}])
def test_a_cross_layer_takes_the_roles_of_the_memory(options) -> None:
    layer = create_layer("landmark", 16, 2, pattern="noncausal-cross", positions="rotary", **options).double()
    x, memory = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 11, 16, dtype=torch.float64)
    roles, lengths = marks([3, 6, 10], 11), torch.tensor([11, 7])
    context = Context(roles=roles, memory_mask=Mask(lengths=lengths))
    whole = layer(x, memory, context=context).output
    close(layer(x, state=layer.encode_memory(memory, context=context)).output, whole)
    close(whole[1:], layer(x[1:], memory[1:, :7], context=Context(roles=roles[1:, :7])).output)


@pytest.mark.parametrize("options", [{}, {"top_k": 10}])
def test_a_language_model_inserts_landmarks_and_may_be_split_anywhere(options) -> None:
    model = LanguageModel(
        LanguageModelConfig(20, dim=16, num_heads=2, plan=[("landmark", {"block": 3, **options})] * 2)
    )
    model = model.double().eval()
    ids = torch.randint(20, (2, 19))
    expected = model(ids).output
    state, outputs = None, []
    for first, last in ((0, 1), (1, 8), (8, 9), (9, 19)):
        result = model(ids[:, first:last], state=state, context=WANT_STATE)
        outputs.append(result.output)
        state = result.state
    close(torch.cat(outputs, 1), expected)
    assert state.layers[0].mechanism.length.tolist() == [19 + 6] * 2
    cached = model.generate(ids, 9)
    assert torch.equal(cached, model.generate(ids, 9, use_state=False))


# Inserted tokens


def test_a_landmark_follows_every_block() -> None:
    ids, roles = prepare(torch.arange(1, 8)[None], Config(block=3), landmark_id=99)
    assert ids.tolist() == [[1, 2, 3, 99, 4, 5, 6, 99, 7]]
    assert roles.tolist() == [[0, 0, 0, 1, 0, 0, 0, 1, 0]]
    ids, _ = prepare(torch.arange(1, 7)[None], Config(block=3), landmark_id=99)
    assert ids.tolist() == [[1, 2, 3, 99, 4, 5, 6, 99]]


@pytest.mark.parametrize("block", [1, 3, 5])
def test_a_stream_prepared_in_pieces_equals_the_whole(block: int) -> None:
    config, ids = Config(block=block), torch.randint(1, 50, (2, 17))
    whole, roles = prepare(ids, config, landmark_id=60)
    pieces = [
        prepare(ids[:, a:b], config, landmark_id=60, phase=a % block)
        for a, b in ((0, 1), (1, 1), (1, 6), (6, 12), (12, 17))
    ]
    assert torch.equal(torch.cat([p[0] for p in pieces], 1), whole)
    assert torch.equal(torch.cat([p[1] for p in pieces], 1), roles)


def test_ragged_rows_are_prepared_as_alone() -> None:
    config, ids = Config(block=3), torch.randint(1, 50, (4, 8))
    lengths, phase = torch.tensor([8, 3, 0, 5]), torch.tensor([2, 0, 1, 1])
    found, roles = prepare(ids, config, landmark_id=60, lengths=lengths, phase=phase)
    for row in range(4):
        valid = int(lengths[row] + (phase[row] + lengths[row]) // 3)
        alone = prepare(ids[row : row + 1, : lengths[row]], config, landmark_id=60, phase=int(phase[row]))
        assert torch.equal(found[row, :valid], alone[0][0]) and torch.equal(roles[row, :valid], alone[1][0])
        assert (found[row, valid:] == 0).all() and (roles[row, valid:] == 0).all()


# Refusals


@pytest.mark.parametrize(
    "options",
    [
        {"block": 0},
        {"top_k": 0},
        {"cache_blocks": 0},
        {"group_dropout": 1.0},
        {"softmax": "soft"},
        {"position_jump": -1},
        {"selection": "max_over_blocks", "top_k": 2},
        {"selection": "max_over_heads"},
        {"offload": "cpu", "top_k": 2},
        {"offload": "cpu", "top_k": 2, "selection": "max_over_heads"},
    ],
)
def test_options_out_of_range_are_refused(options) -> None:
    with pytest.raises(Unsupported):
        Config(**options)


def test_what_cannot_be_honoured_is_refused() -> None:
    inputs, roles, bounded = sample(9), regular(9, 3), Config(block=3, top_k=2)
    bias = Mask(bias=torch.zeros(1, 1, 9, 9, dtype=torch.float64))
    state = apply(MECHANISM, inputs, roles=roles, return_state=True).state
    refused = {
        "2 rows of 9 tokens": lambda: run(inputs, roles[:1]),
        "noncausal-self, where nothing is cached": lambda: run(inputs, roles, pattern="noncausal-self", config=bounded),
        "'max_over_tokens' in causal-cross": lambda: run(
            inputs, roles, pattern="causal-cross", config=dataclasses.replace(bounded, selection="max_over_tokens")
        ),
        "top_k and softmax='plain' in causal-cross": lambda: run(
            inputs, roles, pattern="causal-cross", config=dataclasses.replace(bounded, softmax="plain")
        ),
        "a bias.* under top_k": lambda: run(inputs, roles, pattern="causal-cross", config=bounded, mask=bias),
        "a block of 4 tokens": lambda: run(inputs, marks([4], 9), pattern="causal-cross", config=bounded),
        "without roles": lambda: run(inputs, None, pattern="noncausal-cross"),
        "rotates in causal-cross": lambda: run(inputs, roles, pattern="causal-cross", rotate=rotary()),
        "beside a state": lambda: run(inputs, roles, mask=bias, state=state),
        "weights under top_k": lambda: run(inputs, roles, config=bounded, return_state=True, want={"weights"}),
        "other queries than keys": lambda: run(
            {**inputs, "q": inputs["q"][:, :, 4:]}, roles, config=bounded, return_state=True
        ),
        "a block of 9 tokens": lambda: run(inputs, None, config=bounded, return_state=True),
        "blocks of fewer than": lambda: run(inputs, marks([1, 3, 5, 7], 9), config=bounded, return_state=True),
        "phase": lambda: prepare(torch.zeros(1, 4, dtype=torch.long), Config(block=3), phase=3),
    }
    for message, action in refused.items():
        with pytest.raises(Unsupported, match=message):
            action()


def test_the_log_sum_exp_form_survives_extreme_gates() -> None:
    inputs, roles = sample(12), regular(12, 3)
    bias = torch.zeros(1, 1, 12, 12, dtype=torch.float64)
    bias[..., 3], bias[..., 7] = 500.0, -500.0
    bias[..., 4:7] = -700.0
    mask = Mask(bias=bias)
    close(run(inputs, roles, mask=mask), run(inputs, roles, mask=mask, form="reference"))
    assert math.isfinite(float(run(inputs, roles, mask=mask).sum()))


class _Copies(TorchDispatchMode):
    """Counts the bytes of what operators make that is no view of what they are given."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
                self.bytes += made.nbytes
        return result


@pytest.mark.parametrize("positions", ["none", "rotary"])
def test_a_decoded_token_does_not_copy_the_cache(positions: str) -> None:
    layer = create_layer("landmark", 256, 2, positions=positions).eval()
    tokens, roles = torch.randn(1, 4000, 256), regular(4000, 50, batch=1)
    with torch.no_grad():
        state = layer(tokens, context=dataclasses.replace(WANT_STATE, roles=roles)).state
        _, state = layer.step(tokens[:, 0], state)  # the first copies, and leaves room for others
        copies = _Copies()
        for _ in range(4):
            before = state
            with copies:
                _, state = layer.step(tokens[:, 0], state)
            assert state.mechanism.k.data_ptr() == before.mechanism.k.data_ptr()
            assert state.mechanism.v.data_ptr() == before.mechanism.v.data_ptr()
    assert copies.bytes / 4 < 0.1 * state.nbytes
