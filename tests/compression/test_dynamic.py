"""DynamicViT: the official outputs and losses, attention under a policy, and dropping for real and by masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import close, load, recorded_state, refused
from torch import Tensor

from regard import Context
from regard.compression.tokens import dynamic
from regard.compression.tokens.dynamic import (
    DynamicTransformer,
    KeepPredictor,
    LossWeights,
    draw,
    dynamic_loss,
    softmax_under,
    train_dynamic,
)
from regard.models.vision.tnt import TNT, TNTConfig
from regard.models.vision.vit import VisionTransformer, VisionTransformerConfig

SMALL: dict[str, Any] = {"image_size": 32, "patch": 8, "dim": 16, "num_layers": 4, "num_heads": 2, "num_classes": 5}
RECORDED = SMALL | {"image_size": 28, "patch": 2, "num_layers": 3, "expansion": 2}
PATCHES = 16


ROUTED = [("mixture_of_heads", {"shared_heads": 1, "active_heads": 2, "mechanism_options": {"bias": True}})] * 4
TINY_TNT: dict[str, Any] = {
    "image_size": 32,
    "patch": 8,
    "stride": 4,
    "width": 16,
    "heads": 2,
    "inner_width": 6,
    "inner_heads": 2,
    "depth": 4,
    "num_classes": 5,
}
KINDS: dict[str, Any] = {
    "plain": {},
    "a mixture of heads": {"plan": ROUTED, "num_heads": 4},
    "norms, and keys for two heads each": {"plan": [("softmax", {"query_key_norm": "rms", "num_kv_heads": 1})] * 4},
    "rotary": {"positions": "rotary"},
    "rotary of rows and columns": {"positions": "rotary", "position_options": {"axes": 2}},
    "encoded positions": {"positions": "seqpe_mul"},
    "distillation": {"distillation_token": True},
    "mean": {"pool": "mean"},
    "mean, rotary": {"pool": "mean", "positions": "rotary", "position_options": {"axes": 2}},
    "mean beside a class token": {},
    "TNT": TNTConfig(**TINY_TNT, vanilla=(1,)),
    "TNT, mean": TNTConfig(**TINY_TNT, pool="mean"),
}


def pruned(kind: str = "plain", **options: Any) -> DynamicTransformer:
    """A model whose predictors distinguish patches."""
    config, host = KINDS[kind], None
    if isinstance(config, TNTConfig):
        host = TNT(config)
        for parameter in host.blocks.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    else:
        host = VisionTransformer(VisionTransformerConfig(**SMALL | config))
    if "beside" in kind:
        host.reset_classifier(5, "avg")
    model = DynamicTransformer(host, **options).double().eval()
    for predictor in model.predictors:
        for linear in (predictor.inner, *predictor.outer):
            torch.nn.init.normal_(linear.weight, std=0.5)
    return model


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64)


def test_outputs_losses_and_gradients_of_the_official_code(monkeypatch: pytest.MonkeyPatch) -> None:
    recording, state = load("vision_dynamicvit"), recorded_state("vision_dynamicvit")
    model = DynamicTransformer(VisionTransformer(VisionTransformerConfig(**RECORDED)), blocks=[0, 1, 2]).double().eval()
    model.load_released(state)
    given = recording["images"].double()
    close(model(given), recording["output"])
    noise = iter([recording[f"noise_{stage}"].double() for stage in range(3)])
    monkeypatch.setattr(dynamic, "gumbel", lambda like, generator: next(noise))
    found = model.forward_masked(given)
    close(found.logits, recording["train_output"])
    for stage, decision in enumerate(found.decisions):
        assert torch.equal(decision > 0.5, recording[f"decision_{stage}"])
    with torch.no_grad():
        features = model.model.forward_features(given)
        teacher = model.model.forward_head(features), features[:, 1:]
    loss, _ = dynamic_loss(found, recording["labels"], model.shares, *teacher)
    close(loss, recording["loss"])
    loss.backward()
    predictor, projection = model.predictors[1].inner.weight, model.model.blocks[0].mixer.output.weight
    close(predictor.grad, recording["grad_score_predictor.1.in_conv.1.weight"], 1e-10)
    close(projection.grad, recording["grad_blocks.0.attn.proj.weight"], 1e-10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    refused("predictors", model.load_released, {k: v for k, v in state.items() if "predictor.2" not in k})
    refused("without norm.weight", model.load_released, {k: v for k, v in state.items() if k != "norm.weight"})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_policy_of_ones_is_softmax_and_a_masked_key_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(2, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    policy = torch.ones(2, 6, dtype=torch.float64)
    close(softmax_under(scores, policy), scores.softmax(-1), 1e-5)
    monkeypatch.setattr(dynamic, "EPS", 0.0)
    close(softmax_under(scores, policy), scores.softmax(-1))
    policy[:, 4] = 0
    weights = softmax_under(scores, policy)
    others = [0, 1, 2, 3, 5]
    assert (weights[..., others, 4] == 0).all() and (weights[..., 4, 4] > 0).all()
    (gradient,) = torch.autograd.grad(weights[..., others, :].square().sum(), scores)
    assert gradient[..., 4].abs().max() < 1e-15 and (gradient[..., others, :][..., others] != 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_patches_left_out_and_patches_masked_give_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = pruned(kind), images()
    found = model.forward_masked(x, sampled=False)
    logits, places = model.forward_dropping(x)
    close(logits, found.logits, 1e-4)
    monkeypatch.setattr(dynamic, "EPS", 0.0)
    found = model.forward_masked(x, sampled=False)
    close(model(x), found.logits)
    assert model(x[:0]).shape == model.forward_masked(x[:0]).logits.shape == (0, 5)
    counts = [int(PATCHES * 0.7**i) for i in (1, 2, 3)]
    assert [p.shape[1] for p in places] == counts
    for place, decision in zip(places, found.decisions, strict=True):
        assert torch.equal(torch.zeros_like(decision).scatter(1, place, 1.0), decision)
    model.shares = 1.0
    close(model(x), model.model(x))


@pytest.mark.parametrize("kind", ["mean", "mean beside a class token", "TNT", "TNT, mean"])
def test_the_logits_are_those_of_blocks_run_on_the_patches_that_are_left(kind: str) -> None:
    model, x = pruned(kind), images()
    found, places = model.forward_dropping(x)
    host: Any = model.model
    first = model.host.protected
    for row in range(len(x)):
        own = x[row : row + 1]
        words, tokens = host.embed(own) if isinstance(host, TNT) else (None, host.embed(own))
        left = torch.arange(PATCHES)
        for number, block in enumerate(host.blocks):
            if number in model.stages:
                kept = places[model.stages.index(number)][row]
                chosen = torch.searchsorted(left, kept)
                left, tokens = kept, torch.cat([tokens[:, :first], tokens[:, first:][:, chosen]], 1)
                words = None if words is None else words[chosen]
            if words is None:
                tokens = block(tokens, context=Context()).output
            else:
                words, tokens = block(words, tokens, Context())
        features = host.norm(tokens)
        pooled = features[:, first:].mean(1) if host.global_pool == "avg" else features[:, 0]
        close(found[row : row + 1], host.head(pooled))


def test_where_patches_are_averaged_predictors_learn_from_the_average_too() -> None:
    model, x = pruned("mean", blocks=[3]), images()
    for parameter in model.model.blocks[3].parameters():
        torch.nn.init.zeros_(parameter)  # no attention: patches that are not kept count in the average alone
    logits = model.forward_masked(x, generator=torch.Generator().manual_seed(0)).logits
    gradients = torch.autograd.grad(logits.square().sum(), [predictor.norm.weight for predictor in model.predictors])
    assert all((gradient != 0).any() for gradient in gradients)


def test_keeping_more_drops_none_kept_before_and_shares_may_change() -> None:
    model, x = pruned(keep=[0.5, 0.5, 0.25]), images()
    few = model.forward_dropping(x)[1][0]
    model.shares = [0.75, 0.5, 0.25]
    more = model.forward_dropping(x)[1][0]
    assert (few.shape[1], more.shape[1]) == (8, 12)
    assert (few[:, :, None] == more[:, None]).any(-1).all()
    model.shares = 0.01
    assert [place.shape[1] for place in model.forward_dropping(x)[1]] == [1, 1, 1]


def test_scores_follow_their_patches_and_read_only_those_that_are_left() -> None:
    predictor, x = KeepPredictor(16).double(), torch.randn(2, 9, 16, dtype=torch.float64)
    torch.nn.init.normal_(predictor.outer[0].weight)
    kept = (torch.rand(2, 9) > 0.3).double()
    kept[:, 0] = 1
    order = torch.randperm(9)
    close(predictor(x[:, order], kept[:, order]), predictor(x, kept)[:, order])
    close(predictor(x, kept).exp().sum(-1), torch.ones(2, 9, dtype=torch.float64))
    other = torch.where(kept[..., None] > 0, x, torch.randn_like(x))
    close(predictor(other, kept)[kept > 0], predictor(x, kept)[kept > 0])
    assert predictor(x, torch.zeros_like(kept)).isfinite().all()


def test_draws_have_their_probabilities_and_the_gradient_of_the_soft_draw() -> None:
    chances = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    logs = torch.stack([chances, 1 - chances], -1).log().expand(20_000, -1, -1).clone().requires_grad_()
    drawn = draw(logs, torch.Generator().manual_seed(0))
    assert ((drawn - drawn.round()).abs() < 1e-12).all() and torch.equal(
        drawn.detach().round().unique(), torch.tensor([0.0, 1.0]).double()
    )
    assert (drawn.mean(0) - chances).abs().max() < 0.02
    (gradient,) = torch.autograd.grad(drawn.sum(), logs)
    assert (gradient[..., 0] > 0).all()
    close(gradient[..., 0], -gradient[..., 1])


def test_the_loss_is_the_sum_of_its_parts() -> None:
    model, x = pruned(), images()
    labels = torch.tensor([0, 1, 2])
    features = model.model.forward_features(x)
    teacher = model.model.forward_head(features), features[:, 1:]
    made = model.forward_masked(x, generator=torch.Generator().manual_seed(0))
    loss, parts = dynamic_loss(made, labels, model.shares, *teacher)
    close(loss, parts["task"] + 2 * parts["ratio"] + 0.5 * parts["logits"] + 0.5 * parts["tokens"])
    alone, _ = dynamic_loss(made, labels, model.shares, *teacher, LossWeights(0, 1, 0, 0))
    shares = torch.stack([d.mean(1) for d in made.decisions]) - torch.tensor(model.shares, dtype=torch.float64)[:, None]
    close(alone, shares.square().mean())
    _, own = dynamic_loss(made, labels, model.shares, made.logits, made.features)
    assert own["logits"].abs() < 1e-12 and own["tokens"] == 0


def batches(step: int) -> tuple[Tensor, Tensor]:
    """Noise images, with a corner that encodes the class."""
    draws = torch.Generator().manual_seed(step)
    labels = torch.randint(2, (16,), generator=draws)
    pictures = 0.1 * torch.randn(16, 3, 32, 32, generator=draws)
    pictures[:, :, :8, :8] += (2.0 * labels - 1).view(-1, 1, 1, 1)
    return pictures, labels


def test_training_meets_the_shares_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    begin = pruned(keep=0.25).float().state_dict()

    def run(checkpoint: Path | None, stop: int | None = None, **changed: Any) -> tuple[DynamicTransformer, list[Any]]:
        model, steps = pruned(keep=0.25).float(), []
        model.load_state_dict(begin)

        def stopped(step: int) -> tuple[Tensor, Tensor]:
            if step == stop:
                raise KeyboardInterrupt
            return batches(step)

        options: dict[str, Any] = {"steps": 25, "predictor_rate": 1e-2, "block_rate": 1e-3} | changed
        train_dynamic(model, stopped, checkpoint=checkpoint, on_step=steps.append, **options)
        return model, steps

    file = tmp_path / "checkpoint.safetensors"
    whole, steps = run(None)
    assert steps[-1].parts["ratio"] < 0.015 < 0.03 < steps[0].parts["ratio"] and steps[-1].loss < steps[0].loss
    for stop in (1, 20):
        with pytest.raises(KeyboardInterrupt):
            run(file, stop)
    for name, tensor in run(file)[0].state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
    refused("other settings", run, file, predictor_rate=1e-3)


def test_what_does_not_fit_is_refused() -> None:
    refused("an excitation", DynamicTransformer, TNT(TNTConfig(**TINY_TNT, excitation=True)))
    refused("plain softmax, also", DynamicTransformer, TNT(TNTConfig(**TINY_TNT, mixer="linear")))
    refused("0 to 3", pruned, blocks=[4])
    refused("a share for each", pruned, keep=[0.5, 0.4])
    refused("a share for each", pruned, keep=0.0)
    refused("rises", pruned, keep=[0.5, 0.6, 0.1])
    refused("4 divides", KeepPredictor, 6)
    for changed in (
        {"plan": "linear"},
        {"plan": [("softmax", {"softcap": 3.0})] * 4},
        {"plan": [("softmax", {"short_convolution": 3})] * 4},
        {"positions": "alibi"},
    ):
        model = VisionTransformer(VisionTransformerConfig(**SMALL | changed))
        refused("plain softmax, also in a mixture of heads", DynamicTransformer, model)
