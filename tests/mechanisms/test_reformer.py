"""Tests specific to Reformer: the pairs each round sees, exact merging, few keys in a step, and parity."""

from __future__ import annotations

import pytest
import torch
from support import calls, check_recorded, close, cut, load, refused, watched
from torch import Tensor

from regard.contract import Shape
from regard.create import create_layer
from regard.mechanisms.reformer import MECHANISM, Config, cost, draw_rounds, hash_tokens
from regard.mechanisms.reformer import forms as reformer
from regard.models import LanguageModel, LanguageModelConfig

OPTIONS = [
    {"chunk": 3},
    {"chunk": 4, "lookback": 0},
    {"chunk": 2, "lookback": 3, "count_duplicates": True},
    {"chunk": 1},
    {"chunk": 5, "same_bucket": True},
    {"chunk": 3, "lookback": 1000},
    {"chunk": 100},
]
SELF = ["causal-self", "noncausal-self"]
run = calls(MECHANISM)


def inputs(n: int, batch: int = 2, rounds: int = 3, buckets: int = 4, dim: int = 4) -> dict[str, Tensor]:
    shapes = {"q": (batch, 2, n, dim), "v": (batch, 2, n, 5), "rotations": (2, rounds, dim, buckets // 2)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def seen_in_words(buckets: list[int], config: Config, *, causal: bool) -> Tensor:
    """The pairs of one row that a single round sees."""
    n = len(buckets)
    seen = torch.zeros(n, n, dtype=torch.bool)
    if causal:
        members: dict[int, list[int]] = {}
        for i, bucket in enumerate(buckets):
            earlier = members.setdefault(bucket, [])
            first = max(0, (len(earlier) // config.chunk - config.lookback) * config.chunk)
            seen[i, earlier[first:]] = True
            earlier.append(i)
        return seen
    order = sorted(range(n), key=lambda i: (buckets[i], i))
    chunks = [order[start : start + config.chunk] for start in range(0, n, config.chunk)]
    for c, chunk in enumerate(chunks):
        for back in range(min(config.lookback + 1, len(chunks))):
            for i in chunk:
                for j in chunks[(c - back) % len(chunks)]:
                    seen[i, j] = i != j and (not config.same_bucket or buckets[i] == buckets[j])
    return seen


def in_words(tensors: dict[str, Tensor], pattern: str, options: dict) -> Tensor:
    config = Config(**options)
    q, v, rotations = tensors["q"], tensors["v"], tensors["rotations"]
    k = q / (q.square().sum(-1, keepdim=True) + 1e-6 * q.shape[-1]).sqrt()
    output = torch.empty_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            times = torch.zeros(q.shape[2], q.shape[2], dtype=torch.long)
            for rotation in rotations[h]:
                turned = q[b, h] @ rotation
                buckets = torch.cat([turned, -turned], -1).argmax(-1).tolist()
                times += seen_in_words(buckets, config, causal=pattern == "causal-self")
            for i in range(q.shape[2]):
                if not times[i].any():
                    output[b, h, i] = v[b, h, i]
                    continue
                weights = (k[b, h] @ q[b, h, i]).exp() * (times[i] if config.count_duplicates else times[i] > 0)
                output[b, h, i] = weights @ v[b, h] / weights.sum()
    return output


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("pattern", SELF)
@pytest.mark.parametrize("n", [1, 8, 23])
def test_each_form_is_softmax_over_the_union_of_rounds(options, pattern, n):
    tensors = inputs(n)
    expected = in_words(tensors, pattern, options)
    for form in ("parallel", "reference", *(["chunked"] if pattern == "causal-self" else [])):
        close(run(tensors, options, pattern=pattern, form=form).output, expected)


@pytest.mark.parametrize("options", [{"chunk": 1}, {"chunk": 1, "same_bucket": True}], ids=str)
@pytest.mark.parametrize("pattern", SELF)
def test_more_buckets_and_chunks_than_a_short_integer_counts(options, pattern):
    tensors = inputs(200, batch=1, buckets=100)
    found, expected = (run(tensors, options, pattern=pattern, form=form).output for form in ("parallel", "reference"))
    close(found, expected)


def test_a_step_attends_to_few_keys(monkeypatch):
    tensors, options = inputs(60, rounds=2), {"chunk": 3}
    state = run(cut(tensors, slice(59), "qv"), options, return_state=True).state
    widths = watched(monkeypatch, reformer, "attention", lambda q, k, *rest, **options: k.shape[2])
    run(cut(tensors, slice(59, 60), "qv"), options, state=state)
    assert widths and max(widths) <= 2 * 2 * 3


def test_many_new_tokens_are_taken_in_parts(monkeypatch):
    tensors, options = inputs(40), {"chunk": 3}
    whole = run(tensors, options).output
    monkeypatch.setattr(reformer, "PAIRS_AT_ONCE", 2000)
    state = run(cut(tensors, slice(9), "qv"), options, return_state=True).state
    close(run(cut(tensors, slice(9, 40), "qv"), options, state=state).output, whole[:, :, 9:])


def test_dropout_drops_each_weight_once():
    """Kept weights are doubled, so the mean over draws is unchanged."""
    tensors = inputs(24, batch=1)
    many = {"q": tensors["q"].expand(400, -1, -1, -1), "v": torch.ones(400, 2, 24, 5, dtype=torch.float64)}
    drawn = run(tensors | many, {"chunk": 4}, dropout=0.5, generator=torch.Generator().manual_seed(0)).output
    assert (drawn.mean(0) - 1).abs().max() < 0.25
    assert drawn[:, :, 8:].std(0).min() > 0.05


def test_rotations_are_saved_and_may_be_fixed():
    layer = create_layer("reformer", 8, 2, chunk=4, rounds=2, buckets=6).double()
    assert layer.projection.rotations.shape == (2, 2, 4, 3)
    assert "projection.rotations" in layer.state_dict()
    x = torch.randn(2, 40, 8, dtype=torch.float64)
    fixed = create_layer("reformer", 8, 2, chunk=4, fresh=False).double().train()
    assert torch.equal(fixed(x).output, fixed(x).output)


def test_a_trained_model_is_read_with_more_rounds_or_fewer():
    def language_model(rounds: int) -> LanguageModel:
        plan = [("reformer", {"chunk": 2, "buckets": 4, "rounds": rounds})] * 2
        return LanguageModel(LanguageModelConfig(vocab_size=11, dim=16, num_heads=2, plan=plan)).double().eval()

    trained, ids = language_model(2), torch.randint(11, (2, 20))
    first, once = trained.blocks[0].mixer.projection.rotations, trained(ids).output
    assert draw_rounds(trained, 7, torch.Generator().manual_seed(0)) is trained
    more = trained.blocks[0].mixer.projection.rotations
    assert more.shape == (2, 7, 8, 2)
    assert torch.equal(more[:, :2], first)
    assert len(more.flatten().unique()) == more.numel()
    assert not torch.allclose(trained(ids).output, once)
    assert torch.equal(trained.generate(ids, 8), trained.generate(ids, 8, use_state=False))
    for rounds in (7, 1):
        other = language_model(rounds)
        other.load_state_dict(draw_rounds(trained, rounds).state_dict())
        assert torch.equal(other(ids).output, trained(ids).output)
    refused("rounds=0", draw_rounds, trained, 0)


@pytest.mark.parametrize(
    ("name", "pattern", "options"),
    [
        ("reformer_transformers", "noncausal-self", {"lookback": 1}),
        ("reformer_transformers_rounds", "noncausal-self", {"lookback": 0, "count_duplicates": True}),
        ("reformer_transformers_causal", "causal-self", {"lookback": 0}),
    ],
)
def test_parity_with_transformers(name, pattern, options):
    arrays = load(name)
    x, heads = arrays["x"].requires_grad_(), arrays["rotations"].shape[0]
    q, v = ((x @ arrays[w].mT).unflatten(-1, (heads, -1)).transpose(1, 2) for w in ("query_key", "value"))
    rotations = arrays["rotations"].transpose(1, 2)
    assert torch.equal(hash_tokens(q, rotations), arrays["buckets"] % (2 * rotations.shape[-1]))
    output = run({"q": q, "v": v, "rotations": rotations}, {"chunk": 4, **options}, pattern=pattern).output
    output = output.transpose(1, 2).flatten(2)
    check_recorded(arrays, output, {"x": x}, 1e-10)


def test_the_card_counts_what_a_step_reads_and_the_state_holds():
    options = {"chunk": 4, "rounds": 3, "buckets": 6}
    short, long = (cost(Shape(1, 2, n, n, 4, 5), Config(**options)) for n in (64, 128))
    state = run(inputs(64, batch=1, rounds=3, buckets=6), options, return_state=True).state
    assert short.state == sum(x.numel() for name, x in state.tensors().items() if name != "length")
    assert long.flops == 2 * short.flops
    assert long.step_flops == short.step_flops


def test_a_state_of_other_rounds_is_refused():
    state = run(inputs(9, buckets=4), return_state=True).state
    for other in ({"buckets": 6}, {"rounds": 2}):
        refused("rounds", run, inputs(1, **other), state=state)
