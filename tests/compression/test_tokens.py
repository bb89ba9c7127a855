"""Fewer tokens: the official code's outputs, invariants of merging, and no change if nothing is removed."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import itertools
import math
import pickle
from contextlib import suppress
from typing import Any

import pytest
import torch
from support import close, load, recorded_state, refused
from torch import Tensor, nn

from regard import Context, create_layer
from regard.compression.tokens import METHODS, Evidence, Tokens, annealed_keep, reduce_tokens
from regard.compression.tokens.reduction import Projected, watched
from regard.compression.tokens.schedules import removals
from regard.models.vision.vit import VisionTransformer, VisionTransformerConfig

SMALL: dict[str, Any] = {
    "image_size": 32,
    "patch": 8,
    "dim": 16,
    "num_layers": 3,
    "num_heads": 2,
    "expansion": 2,
    "num_classes": 5,
}
PATCHES = 16


def small(**changed: object) -> VisionTransformer:
    return VisionTransformer(VisionTransformerConfig(**{**SMALL, **changed})).double().eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64)


def tokens(batch: int = 2, n: int = 13, protected: int = 1) -> tuple[Tokens, Evidence]:
    """Tokens that have been merged before, with the evidence of an attention layer about them."""
    made = Tokens.begin(torch.randn(batch, n, 6, dtype=torch.float64), protected)
    sizes = torch.randint(1, 4, (batch, n)).double()
    evidence = Evidence(torch.randn(batch, n, 4, dtype=torch.float64), torch.randn(batch, n).double().softmax(-1))
    return dataclasses.replace(made, sizes=sizes), evidence


def test_outputs_of_the_official_token_merging() -> None:
    recording = load("vision_tome")
    model = small()
    model.load_released(recorded_state("vision_tome"))
    reduction = reduce_tokens(model, "tome", remove=3)
    close(model(recording["images"].double()), recording["output"])
    assert reduction.counts == [14, 11, 8]
    for found, expected in zip(reduction.tokens.places, recording["source"], strict=True):
        assert torch.equal(found[:, None] == found, expected[:, None] == expected)


def test_outputs_of_the_official_evit() -> None:
    recording = load("vision_evit")
    model = small()
    model.load_released(recorded_state("vision_evit"))
    chosen = {1: 0.7, 2: 0.6}
    kept = [PATCHES, math.ceil(0.7 * PATCHES) + 1]
    removed = [0, PATCHES - (kept[1] - 1), kept[1] - math.ceil(chosen[2] * kept[1])]
    reduction = reduce_tokens(model, "evit", remove=removed)
    close(model(recording["images"].double()), recording["output"])
    reduction.undo()
    reduction = reduce_tokens(model, "evit", keep=0.7, blocks=[1])
    model(recording["images"].double())
    assert reduction.counts == [1 + PATCHES, 1 + kept[1], 1 + kept[1]]


@pytest.mark.parametrize("method", METHODS)
def test_where_nothing_is_removed_the_output_is_the_same_and_undo_gives_the_model_back(method: str) -> None:
    model, x = small(), images()
    whole = model(x)
    state = set(model.state_dict())
    reduction = reduce_tokens(model, method, remove=0)
    assert torch.equal(model(x), whole)
    reduction.undo()
    reduction = reduce_tokens(model, method, keep=0.5, blocks=[0])
    assert not torch.allclose(model(x), whole) and set(model.state_dict()) == state
    left = PATCHES // 2 + (method == "evit")
    assert reduction.counts == [1 + left] * 3
    places = reduction.tokens.places
    assert (places[:, 0] == 0).all() and int(places.max()) == left
    reduction.undo()
    assert torch.equal(model(x), whole) and type(model.blocks[0]).__name__ == "VisionBlock"


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("evit", "attention")])
def test_a_model_without_a_class_token_can_have_fewer_tokens(method: str) -> None:
    model, x = small(pool="mean"), images()
    whole = model(x)
    reduction = reduce_tokens(model, method, remove=0)
    assert torch.equal(model(x), whole)
    reduction.change(remove=[4, 0, 3])
    found = model(x)
    assert reduction.counts == [12, 12, 9]
    reduction.undo()
    assert torch.equal(model(x), whole) and not torch.allclose(found, whole)


def test_a_model_without_a_class_token_averages_what_its_tokens_stand_for() -> None:
    model, x = small(pool="mean"), images(1)
    with torch.no_grad():
        model.positions[:] = model.positions.mean(0)
    x[..., 8:16], x[..., 24:] = x[..., :8], x[..., 16:24]  # each patch is there twice
    whole = model(x)
    reduction = reduce_tokens(model, "tome", remove=[3, 0, 0])
    close(model(x), whole)
    assert sorted(reduction.tokens.sizes[0].tolist()) == [1.0] * 10 + [2.0] * 3


@pytest.mark.parametrize("method", ["tome", "tome_stride", "tome_random", "mean"])
def test_merging_keeps_what_all_tokens_stand_for_and_their_sum(method: str) -> None:
    before, evidence = tokens()
    after = METHODS[method](before, evidence, 5)
    assert after.x.shape[1] == 8
    close(after.sizes.sum(1), before.sizes.sum(1))
    close((after.sizes[..., None] * after.x).sum(1), (before.sizes[..., None] * before.x).sum(1))
    close(after.x[:, 0], before.x[:, 0])


@pytest.mark.parametrize("protected", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_class_tokens_stay_first_and_alone(method: str, protected: int) -> None:
    before, evidence = tokens(protected=protected)
    after = METHODS[method](before, evidence, 5)
    close(after.x[:, :protected], before.x[:, :protected])
    assert torch.equal(after.places[:, :protected], torch.arange(protected).expand(2, -1))
    assert (after.places[:, protected:] != 0).all()


def test_merged_duplicates_with_proportional_attention_are_what_they_were_alone() -> None:
    model = small(num_layers=2)
    twice = images(1)
    twice[..., 8:16] = twice[..., :8]  # the second column of patches repeats the first, the fourth the third
    twice[..., 24:] = twice[..., 16:24]
    with torch.no_grad():
        model.positions[1:] = model.positions[1:].mean(0)
    whole = model(twice)
    reduction = reduce_tokens(model, "tome", remove=[8, 0])
    close(model(twice), whole)
    assert reduction.counts == [9, 9] and reduction.tokens.sizes[0].tolist() == [1.0] + [2.0] * 8
    reduction.undo()
    reduce_tokens(model, "tome", remove=[8, 0], proportional=False)
    assert not torch.allclose(model(twice), whole)


@pytest.mark.parametrize("compute", ["dense", "gather"])
def test_twins_in_a_mixture_of_heads_are_merged_without_a_trace(compute: str) -> None:
    options = {"shared_heads": 1, "active_heads": 2, "compute": compute, "mechanism_options": {"bias": True}}
    model, twice = small(plan=[("mixture_of_heads", options)] * 3, num_heads=4), images(1)
    twice[..., 8:16], twice[..., 24:] = twice[..., :8], twice[..., 16:24]
    with torch.no_grad():
        model.positions[1:] = model.positions[1:].mean(0)
    whole = model(twice)
    reduction = reduce_tokens(model, "tome", remove=[8, 0, 0])
    close(model(twice), whole)
    assert reduction.counts == [9, 9, 9]
    reduction.undo()
    kept = []
    for method in ("attention", "evit"):
        reduction = reduce_tokens(model, method, remove=[4, 0, 0])
        model(images(1))
        kept.append(reduction.counts)
        reduction.undo()
    assert kept == [[13] * 3, [14] * 3]


def test_what_the_class_token_attends_to_is_told_by_normed_queries_and_shared_keys() -> None:
    options = {"query_key_norm": "rms", "num_kv_heads": 2}
    model, x = small(plan=[("softmax", options)] * 3, num_heads=4), images()
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.query_norm.weight.normal_()
    tokens = model.embed(x)
    weights = model.blocks[0](tokens, context=Context(want=frozenset({"weights"}))).extras["weights"]
    kept = weights.mean(1)[:, 0, 1:].topk(6, dim=1).indices + 1
    reduction = reduce_tokens(model, "attention", remove=[10, 0, 0])
    model(x)
    assert torch.equal((reduction.tokens.places > 0).nonzero()[:, 1].view(2, 6), kept.sort(1).values)


@pytest.mark.parametrize("options", [{"bias": True}, {"num_kv_heads": 2}])
def test_what_is_read_of_weights_is_what_a_call_tells(options: dict[str, Any]) -> None:
    layer = create_layer("softmax", 16, 4, pattern="noncausal-self", **options).double()
    norm, x = nn.LayerNorm(16).double(), torch.randn(3, 9, 16, dtype=torch.float64)
    for parameter in (*layer.parameters(), *norm.parameters()):
        nn.init.normal_(parameter)
    with watched(layer) as told:
        layer(norm(x))
    read = Projected(layer, norm, x)
    for name in "qk":
        close(read.mean(name), told.mean(name))
    close(read.from_first(), told.from_first())


def test_the_fused_token_is_the_sum_weighted_by_attention_and_keeping_more_drops_none_kept_before() -> None:
    before, evidence = tokens()
    few, more = (METHODS["evit"](before, evidence, remove) for remove in (8, 4))
    for row in range(2):
        lost = few.places[row] == few.x.shape[1] - 1
        assert int(lost.sum()) == 8
        close(few.x[row, -1], (evidence.scores[row, lost, None] * before.x[row, lost]).sum(0))
        assert not ((few.places[row] < few.x.shape[1] - 1) & (more.places[row] == more.x.shape[1] - 1)).any()


def test_uniform_scores_keep_the_asked_share_and_attention_alone_adds_no_token() -> None:
    before, evidence = tokens(n=11)
    even = Evidence(evidence.metric, torch.full((2, 11), 1 / 11, dtype=torch.float64))
    (removal,) = removals(1, keep=0.65, blocks=[0])
    assert removal(10) == 3
    fused, dropped = (METHODS[name](before, even, removal(10)) for name in ("evit", "attention"))
    assert (fused.x.shape[1], dropped.x.shape[1]) == (1 + 7 + 1, 1 + 7)
    close(fused.x[:, :-1], dropped.x)


def test_merged_tokens_are_with_the_most_similar_of_those_that_stay() -> None:
    before, evidence = tokens(batch=1, n=9)
    keys = torch.nn.functional.normalize(evidence.metric[0], dim=-1)
    for method in ("tome_stride", "tome_random"):
        after = METHODS[method](before, evidence, 5)
        place = after.places[0]
        groups = [set((place == g).nonzero()[:, 0].tolist()) for g in range(1, 4)]
        for stays in itertools.product(*groups):
            nearest = [1 + int((keys[t] @ keys[list(stays)].mT).argmax()) for t in range(1, 9)]
            if nearest == place[1:].tolist():
                break
        else:
            pytest.fail("a token is not with the most similar one")


def test_tokens_are_spread_to_where_they_came_from() -> None:
    before, evidence = tokens()
    for method in ("tome", "attention"):
        after = METHODS[method](before, evidence, 5)
        found = after.spread(after.x)
        for row in range(2):
            for place, token in zip(after.places[row].tolist(), found[row], strict=True):
                close(token, torch.zeros_like(token) if place < 0 else after.x[row, place])
        assert (found == 0).all(-1).any() == (method == "attention")


def test_the_share_falls_along_half_a_cosine_and_a_schedule_may_change() -> None:
    shares = [annealed_keep(step, begin=10, end=30, keep=0.5) for step in range(40)]
    assert shares[:11] == [1.0] * 11 and shares[30:] == [0.5] * 10 and shares[20] == pytest.approx(0.75)
    assert all(after <= before for before, after in itertools.pairwise(shares))
    refused("begin", annealed_keep, 0, begin=3, end=2, keep=0.5)
    model = small()
    reduction = reduce_tokens(model, "evit", keep=1.0)
    for keep, left in ((1.0, PATCHES), (0.5, PATCHES // 2 + 1)):
        reduction.change(keep=keep, blocks=[0])
        model(images())
        assert reduction.counts[0] == 1 + left
    refused("one of the two", reduction.change, keep=0.5, remove=1)


def test_what_tokens_are_compared_by_is_the_callers_choice() -> None:
    model, x, found = small(), images(), {}
    for metric in ("keys", "queries", "tokens"):
        reduction = reduce_tokens(model, "tome", remove=4, metric=metric)
        found[metric] = model(x)
        reduction.undo()
    assert not torch.allclose(found["keys"], found["queries"]) and not torch.allclose(found["keys"], found["tokens"])
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.query.load_state_dict(block.mixer.key.state_dict())
    same = []
    for metric in ("keys", "queries"):
        reduction = reduce_tokens(model, "tome", remove=4, metric=metric)
        same.append(model(x))
        reduction.undo()
    close(same[0], same[1])
    refused("metric", reduce_tokens, model, "tome", metric="values")


def test_a_row_of_a_batch_is_reduced_as_it_is_alone() -> None:
    model, x = small(), images(3)
    for method in ("tome", "tome_stride", "evit", "attention", "stride", "mean"):
        reduction = reduce_tokens(model, method, remove=(3, 0.5))
        close(model(x)[1:2], model(x[1:2]))
        reduction.undo()


def test_a_model_of_timm_is_reduced_as_the_same_model_here() -> None:
    timm = pytest.importorskip("timm.models.vision_transformer")
    other = timm.VisionTransformer(
        img_size=32, patch_size=8, num_classes=5, embed_dim=16, depth=3, num_heads=2, mlp_ratio=2
    ).double()
    model, x = small(), images()
    model.load_released(other.eval().state_dict())
    for method in ("tome", "evit"):
        reductions = [reduce_tokens(each, method, remove=3) for each in (model, other)]
        close(other(x), model(x))
        assert torch.equal(*(reduction.tokens.places for reduction in reductions))
        for reduction in reductions:
            reduction.undo()


def test_registers_of_timm_are_no_class_token() -> None:
    timm = pytest.importorskip("timm.models.vision_transformer")
    sizes: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "num_classes": 5,
        "embed_dim": 16,
        "depth": 3,
        "num_heads": 2,
    }
    given = {**sizes, "mlp_ratio": 2, "class_token": False, "global_pool": "avg", "fc_norm": False}
    registers = timm.VisionTransformer(**given, reg_tokens=4).double().eval()
    for method in ("evit", "attention"):
        refused("without a class token", reduce_tokens, registers, method, keep=0.5)
    reduction = reduce_tokens(registers, "tome", remove=3)
    assert registers.forward_features(images()).shape[1] == 4 + PATCHES and reduction.counts == [17, 14, 11]
    other = timm.VisionTransformer(**given).double().eval()
    model, x = small(pool="mean"), images()
    model.load_released(other.state_dict())
    for each in (model, other):
        reduce_tokens(each, "tome", remove=3)
    close(other(x), model(x))


def test_merged_tokens_count_as_often_as_they_stand_for_in_a_mean_beside_a_class_token() -> None:
    model, x = small(), images()
    model.reset_classifier(5, "avg")
    reduction = reduce_tokens(model, "tome", remove=3)
    features = model.forward_features(x)
    assert features.shape[1] == 1 + PATCHES and reduction.counts[-1] < 1 + PATCHES
    close(model(x), model.head(features[:, 1:].mean(1)))


@torch.no_grad()
def test_torch_compile_follows_blocks_that_output_fewer_tokens() -> None:
    model = small(plan=[("softmax", {"feed_forward": 0})], num_layers=1)
    reduce_tokens(model, "stride", remove=4)
    tokens, context, _ = model.place(images())
    block = model.blocks[0]
    compiled = torch.compile(lambda tokens: block(tokens, context=context).output, backend="eager", fullgraph=True)
    close(compiled(tokens), block(tokens, context=context).output)


def test_draws_are_the_generators_and_gradients_reach_what_is_merged() -> None:
    model, x = small(), images()
    found = []
    for seed in (0, 0, 1):
        reduction = reduce_tokens(model, "random", remove=4, generator=torch.Generator().manual_seed(seed))
        found.append(model(x).detach())
        reduction.undo()
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    reduce_tokens(model, "tome", remove=4)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
    assert (gradient.flatten(1).abs().amax(1) > 0).all() and gradient.isfinite().all()


def test_blocks_that_are_computed_again_in_the_backward_pass_are_refused() -> None:
    models: list[Any] = [small()]
    with suppress(ImportError):
        models.append(
            importlib.import_module("timm").create_model("vit_tiny_patch16_224", img_size=32, depth=2).double()
        )
    for model in models:
        model.set_grad_checkpointing(True)
        reduce_tokens(model.train(), "tome", remove=1)
        refused("gradient checkpointing", model(images()).sum().backward)
        model.set_grad_checkpointing(False)
        model(images()).sum().backward()


def test_copies_of_a_model_with_fewer_tokens_are_independent_of_it() -> None:
    timm = pytest.importorskip("timm")
    for model in (small(), timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).double().eval()):
        x = images()
        whole = model(x)
        reduction = reduce_tokens(model, "tome", remove=1)
        fewer = model(x)
        for copied, own in (copy.deepcopy((model, reduction)), pickle.loads(pickle.dumps((model, reduction)))):
            assert torch.equal(copied(x), fewer) and own.counts == reduction.counts
            own.undo()
            assert torch.equal(copied(x), whole)
        assert torch.equal(model(x), fewer)


def test_what_cannot_be_reduced_is_refused() -> None:
    model = small()
    refused("tome", reduce_tokens, model, "tom")
    refused("keep", reduce_tokens, model, "tome", keep=0.5, remove=3)
    refused("0 < keep", reduce_tokens, model, "tome", keep=1.5)
    refused("one a block", reduce_tokens, model, "tome", remove=[1, 2])
    refused("0 to 2", reduce_tokens, model, "evit", keep=0.5, blocks=[3])
    refused("class token", reduce_tokens, small(pool="mean"), "evit", remove=1)
    refused("softmax", reduce_tokens, small(plan="linear"), "evit", remove=1)
    refused("Linear", reduce_tokens, nn.Linear(2, 2), "tome", remove=1)
    reduce_tokens(model, "tome", remove=1)
    refused("second", reduce_tokens, model, "evit", remove=1)
    refused("a map of", model.forward_intermediates, images())
