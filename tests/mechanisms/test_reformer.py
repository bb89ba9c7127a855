"""What is peculiar to Reformer: what rounds see, exact merging, borders that the future does not move, and parity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from regard.apply import apply
from regard.backends import only
from regard.catalogue import get_mechanism
from regard.contract import Context, Mask, Pattern, Shape, Unsupported
from regard.create import create_layer
from regard.mechanisms.reformer import MECHANISM, Config, cost, draw_rounds, hash_tokens
from regard.mechanisms.reformer import forms as reformer
from regard.models import LanguageModel, LanguageModelConfig

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
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


def inputs(n: int, batch: int = 2, rounds: int = 3, buckets: int = 4, dim: int = 4) -> dict[str, Tensor]:
    return {
        "q": torch.randn(batch, 2, n, dim, dtype=torch.float64),
        "v": torch.randn(batch, 2, n, 5, dtype=torch.float64),
        "rotations": torch.randn(2, rounds, dim, buckets // 2, dtype=torch.float64),
    }


def run(tensors: dict[str, Tensor], pattern: str = "causal-self", options: dict | None = None, **call: Any) -> Tensor:
    return apply(MECHANISM, tensors, pattern=pattern, config=Config(**(options or {})), **call).output


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def seen_in_words(buckets: list[int], config: Config, *, causal: bool) -> Tensor:
    """Pairs of one row in one round."""
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


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pattern", SELF)
@pytest.mark.parametrize("n", [1, 8, 23])
def test_each_form_is_softmax_over_the_union_of_rounds(options, pattern, n):
    tensors = inputs(n)
    expected = in_words(tensors, pattern, options)
    close(run(tensors, pattern, options), expected)
    close(run(tensors, pattern, options, form="reference"), expected)
    if pattern == "causal-self":
        close(run(tensors, pattern, options, form="chunked"), expected)


@pytest.mark.parametrize("options", [{"chunk": 1}, {"chunk": 1, "same_bucket": True}])
@pytest.mark.parametrize("pattern", SELF)
def test_more_buckets_and_chunks_than_a_short_integer_counts(options, pattern):
    tensors = inputs(200, batch=1, buckets=100)
    close(run(tensors, pattern, options), run(tensors, pattern, options, form="reference"))


@pytest.mark.parametrize("pattern", SELF)
def test_one_bucket_and_one_chunk_is_dense_attention_without_oneself(pattern):
    tensors = inputs(11)
    tensors["rotations"] = torch.zeros(2, 1, 4, 1, dtype=torch.float64)
    k = tensors["q"] / (tensors["q"].square().sum(-1, keepdim=True) + 4e-6).sqrt()
    hidden = torch.eye(11, dtype=torch.bool)
    if pattern == "causal-self":
        hidden = ~torch.ones(11, 11, dtype=torch.bool).tril(-1)
    scores = (tensors["q"] @ k.mT).masked_fill(hidden, -torch.inf)
    expected = scores.softmax(-1) @ tensors["v"]
    found = run(tensors, pattern, {"chunk": 11})
    close(found[:, :, 1:], expected[:, :, 1:])
    if pattern == "causal-self":
        close(found[:, :, 0], tensors["v"][:, :, 0])


def test_a_later_token_moves_no_border_of_what_earlier_ones_see():
    """Sorting the whole row would shift the chunks of every bucket after the one that a later token falls in."""
    tensors = inputs(40, rounds=2, buckets=6)
    before = run(tensors, options={"chunk": 3})
    for bucket in range(3):
        altered = {name: x.clone() for name, x in tensors.items()}
        altered["q"][:, :, 30:] = 5 * tensors["rotations"][:, 0, :, bucket][:, None]
        close(run(altered, options={"chunk": 3})[:, :, :30], before[:, :, :30])


def test_later_rounds_of_the_same_rotations_add_nothing():
    for pattern in SELF:
        tensors = inputs(30, rounds=1)
        thrice = tensors | {"rotations": tensors["rotations"].expand(-1, 3, -1, -1)}
        for count in (False, True):
            options = {"chunk": 4, "count_duplicates": count}
            close(run(thrice, pattern, options), run(tensors, pattern, options))


def test_more_rounds_come_closer_to_full_attention():
    tensors = inputs(128, rounds=16, buckets=8)
    tensors["q"] *= 4
    full = run(tensors | {"rotations": torch.zeros(2, 1, 4, 1, dtype=torch.float64)}, options={"chunk": 200})
    errors = [
        float((run(tensors | {"rotations": tensors["rotations"][:, :r]}, options={"chunk": 16}) - full).norm())
        for r in (1, 4, 16)
    ]
    assert errors[2] < 0.7 * errors[1] < 0.5 * errors[0]


def test_a_step_attends_to_few_keys_and_equals_the_whole(monkeypatch):
    widths = []
    attention = reformer.attention

    def watched(q, k, *args, **options):
        widths.append(k.shape[2])
        return attention(q, k, *args, **options)

    tensors = inputs(60, rounds=2)
    whole = run(tensors, options={"chunk": 3})

    def cut(start: int, stop: int) -> dict[str, Tensor]:
        return {n: x if n == "rotations" else x[:, :, start:stop] for n, x in tensors.items()}

    state = apply(MECHANISM, cut(0, 50), config=Config(chunk=3), return_state=True).state
    monkeypatch.setattr(reformer, "attention", watched)
    for t in range(50, 60):
        result = apply(MECHANISM, cut(t, t + 1), config=Config(chunk=3), state=state)
        close(result.output, whole[:, :, t : t + 1])
        state = result.state
    assert max(widths) <= 2 * 2 * 3


def test_many_new_tokens_are_taken_in_parts(monkeypatch):
    tensors = inputs(40)
    whole = run(tensors, options={"chunk": 3})
    monkeypatch.setattr(reformer, "PAIRS_AT_ONCE", 2000)
    head, tail = (
        {n: x if n == "rotations" else x[:, :, p] for n, x in tensors.items()} for p in (slice(9), slice(9, 40))
    )
    state = apply(MECHANISM, head, config=Config(chunk=3), return_state=True).state
    close(apply(MECHANISM, tail, config=Config(chunk=3), state=state).output, whole[:, :, 9:])


def test_a_state_of_other_rotations_is_refused():
    state = apply(MECHANISM, inputs(9, buckets=4), return_state=True).state
    for other in ({"buckets": 6}, {"rounds": 2}):
        with pytest.raises(Unsupported, match="rounds"):
            apply(MECHANISM, inputs(1, **other), state=state)


def test_dropout_drops_each_weight_once():
    """Twice the values of what is kept, and zero on average in the difference."""
    tensors = inputs(24)
    tensors["v"] = torch.ones_like(tensors["v"])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([run(tensors, options={"chunk": 4}, dropout=0.5, generator=generator) for _ in range(400)])
    assert (drawn.mean(0) - 1).abs().max() < 0.25
    assert drawn[:, :, :, 8:].std(0).min() > 0.05


def test_rotations_are_drawn_in_training_only_and_saved():
    layer = create_layer("reformer", 8, 2, chunk=4, rounds=2, buckets=6).double()
    assert layer.projection.rotations.shape == (2, 2, 4, 3)
    x = torch.randn(2, 40, 8, dtype=torch.float64)
    layer.eval()
    assert torch.equal(layer(x).output, layer(x).output)
    layer.train()
    assert not torch.equal(layer(x).output, layer(x).output)
    drawn = [layer(x, context=Context(generator=torch.Generator().manual_seed(1))).output for _ in range(2)]
    assert torch.equal(*drawn)
    assert "projection.rotations" in layer.state_dict()
    fixed = create_layer("reformer", 8, 2, chunk=4, fresh=False).double().train()
    assert torch.equal(fixed(x).output, fixed(x).output)


def test_a_trained_model_is_read_with_more_rounds_or_fewer():
    plans = {rounds: [("reformer", {"chunk": 2, "buckets": 4, "rounds": rounds})] * 2 for rounds in (2, 7, 1)}
    models = {
        rounds: LanguageModel(LanguageModelConfig(vocab_size=11, dim=16, num_heads=2, plan=plan)).double()
        for rounds, plan in plans.items()
    }
    ids = torch.randint(11, (2, 20))
    trained = models[2].eval()
    first = trained.blocks[0].mixer.projection.rotations
    once = trained(ids).output
    assert draw_rounds(trained, 7, torch.Generator().manual_seed(0)) is trained
    more = trained.blocks[0].mixer.projection.rotations
    assert more.shape == (2, 7, 8, 2)
    assert torch.equal(more[:, :2], first)
    assert len(more.flatten().unique()) == more.numel()
    assert not torch.allclose(trained(ids).output, once)
    assert torch.equal(trained.generate(ids, 8), trained.generate(ids, 8, use_state=False))
    for rounds in (7, 1):
        models[rounds].load_state_dict(draw_rounds(trained, rounds).state_dict())
        assert torch.equal(models[rounds].eval()(ids).output, trained(ids).output)
    with pytest.raises(Unsupported, match="rounds=0"):
        draw_rounds(trained, 0)


def test_a_model_decodes_as_it_reads():
    plan = [("reformer", {"chunk": 4, "rounds": 2, "buckets": 4})] * 2
    model = LanguageModel(LanguageModelConfig(vocab_size=11, dim=16, num_heads=2, plan=plan)).double().eval()
    ids = torch.randint(11, (2, 20))
    assert torch.equal(model.generate(ids, 20), model.generate(ids, 20, use_state=False))


@pytest.mark.parametrize(
    ("name", "pattern", "options"),
    [
        ("reformer_transformers", "noncausal-self", {"lookback": 1}),
        ("reformer_transformers_rounds", "noncausal-self", {"lookback": 0, "count_duplicates": True}),
        ("reformer_transformers_causal", "causal-self", {"lookback": 0}),
    ],
)
def test_parity_with_transformers(name, pattern, options):
    with np.load(FIXTURES / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    x, heads = arrays["x"].requires_grad_(), arrays["rotations"].shape[0]
    q, v = ((x @ arrays[w].mT).unflatten(-1, (heads, -1)).transpose(1, 2) for w in ("query_key", "value"))
    rotations = arrays["rotations"].transpose(1, 2)
    buckets = 2 * rotations.shape[-1]
    assert torch.equal(hash_tokens(q, rotations), arrays["buckets"] % buckets)
    output = run({"q": q, "v": v, "rotations": rotations}, pattern, {"chunk": 4, **options})
    output = output.transpose(1, 2).flatten(2)
    close(output, arrays["out"], 1e-10)
    (gradient,) = torch.autograd.grad(output, x, arrays["grad_out"])
    close(gradient, arrays["grad_x"], 1e-10)


def test_the_card_counts_what_a_step_reads_and_the_state_holds():
    shape = Shape(1, 2, 64, 64, 4, 5)
    config = Config(chunk=4, rounds=3, buckets=6)
    state = apply(MECHANISM, inputs(64, batch=1, rounds=3, buckets=6), config=config, return_state=True).state
    assert cost(shape, config).state == sum(x.numel() for n, x in state.tensors().items() if n != "length")
    longer = cost(Shape(1, 2, 128, 128, 4, 5), config)
    assert longer.flops == 2 * cost(shape, config).flops
    assert longer.step_flops == cost(shape, config).step_flops


def test_the_native_kernel_runs_the_chunks():
    tensors = {name: x.float() for name, x in inputs(70, dim=8).items()}
    for pattern in SELF:
        with only("native"):
            found = run(tensors, pattern, {"chunk": 8})
        expected = run({n: x.double() for n, x in tensors.items()}, pattern, {"chunk": 8}, form="reference")
        close(found.double(), expected, 2e-6)


def test_what_it_lacks_is_refused_with_the_reason():
    for pattern in (Pattern.CAUSAL_CROSS, Pattern.NONCAUSAL_CROSS):
        with pytest.raises(Unsupported, match="same vectors"):
            create_layer("reformer", 8, 2, pattern=pattern)
    assert get_mechanism("lsh_attention") is MECHANISM
    with pytest.raises(Unsupported):
        run(inputs(5), mask=Mask(bias=torch.zeros(1, 1, 5, 5)))
    for options in (
        {"chunk": 0},
        {"lookback": -1},
        {"rounds": 0},
        {"buckets": 0},
        {"buckets": 5},
        {"eps": 0.0},
    ):
        with pytest.raises(Unsupported):
            Config(**options)
