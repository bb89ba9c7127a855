"""IA-RED²: the official scores, dropping for real and by masks, and an unbiased policy gradient."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import close, load, recorded_state, refused
from torch import Tensor

from regard import Context, Mask
from regard.backends.native import library
from regard.compression.tokens.hosts import Host, OwnHost
from regard.compression.tokens.interpreters import (
    START,
    Decision,
    InterpretedTransformer,
    Interpreter,
    policy_loss,
    reward,
    train_interpreters,
)
from regard.models.vision.tnt import TNT, Block, TNTConfig
from regard.models.vision.vit import VisionTransformer, VisionTransformerConfig
from regard.positions.none import NoPositions

SMALL: dict[str, Any] = {"image_size": 32, "patch": 8, "dim": 12, "num_layers": 3, "num_heads": 6, "num_classes": 5}
TOKENS = 17


ROUTED = ("mixture_of_heads", {"shared_heads": 2, "active_heads": 2, "mechanism_options": {"bias": True}})
TINY_TNT: dict[str, Any] = {
    "image_size": 32,
    "patch": 8,
    "stride": 4,
    "width": 12,
    "heads": 3,
    "inner_width": 6,
    "inner_heads": 2,
    "depth": 3,
    "num_classes": 5,
}
AVERAGING: dict[str, Any] = {
    "mean": {"pool": "mean"},
    "mean, rotary": {"pool": "mean", "positions": "rotary", "position_options": {"axes": 2}, "num_heads": 3},
    "mean, agents": {"pool": "mean", "plan": [("agent", {"num_agents": 4}), "softmax", "universal_rpe"]},
    "mean beside a class token": {},
    "TNT, mean": TNTConfig(**TINY_TNT, pool="mean"),
    "TNT, mean beside a class token": TNTConfig(**TINY_TNT),
}
KINDS: dict[str, Any] = AVERAGING | {
    "TNT": TNTConfig(**TINY_TNT, vanilla=(1,)),
    "TNT, rotary": TNTConfig(**TINY_TNT, mixer_options={"positions": "rotary"}),
    "a mixture of heads": {"plan": [ROUTED] * 3},
    "agents": {"plan": [("agent", {"num_agents": 4})] * 3},
    "agents with biases": {"plan": [("agent", {"num_agents": 4, "agent_bias": "all"}), "softmax", "softmax"]},
    "linear and recurrent": {"plan": ["linear", "bidirectional_mamba", "softmax"]},
    "rotary": {"positions": "rotary"},
    "rotary of rows and columns": {"positions": "rotary", "position_options": {"axes": 2}, "num_heads": 3},
    "encoded positions": {"positions": "seqpe_mul"},
    "a bias for distances": {"positions": "alibi"},
    "distillation": {"distillation_token": True},
}


def interpreted(kind: str = "plain", **changed: Any) -> InterpretedTransformer:
    """A model with scores on both sides of the threshold."""
    config, host = KINDS.get(kind, {}), None
    if isinstance(config, TNTConfig):
        host = TNT(config)
        for parameter in host.blocks.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    else:
        host = VisionTransformer(VisionTransformerConfig(**SMALL | config))
    if "beside" in kind:
        host.reset_classifier(5, "avg")
    query = "class" if host.pools[0] == "token" else "policy"
    model = InterpretedTransformer(host, **{"query": query, **changed}).double().eval()
    for interpreter in model.interpreters:
        for linear in (interpreter.query, interpreter.key):
            torch.nn.init.normal_(linear.weight)
            torch.nn.init.normal_(linear.bias, std=0.1)
    return model


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64)


def test_outputs_of_the_released_code() -> None:
    recording, state = load("vision_ia_red2"), recorded_state("vision_ia_red2")
    model = (
        InterpretedTransformer(VisionTransformer(VisionTransformerConfig(**SMALL)), groups=[1, 1, 1]).double().eval()
    )
    model.load_released(state)
    given = recording["images"].double()
    logits, decisions = model.forward_masked(given)
    for number, decision in enumerate(decisions):
        close(decision.scores, recording[f"scores_{number}"])
    assert 1 < int(decisions[-1].stays.sum(1).float().mean()) < TOKENS
    close(logits, recording["output"])
    close(model.usage(decisions), recording["usage"])
    close(model(given), recording["output"])


def repeated(state: dict[str, Tensor], sizes: list[int]) -> dict[str, Tensor]:
    """A whole state dict of the official code, which has each block once more inside its group."""
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    firsts = [sum(sizes[:group]) for group in groups]
    whole = dict(state)
    for name, value in state.items():
        if name.startswith("blocks."):
            _, number, part = name.split(".", 2)
            group = groups[int(number)]
            whole[f"groups.{group}.block_list.{int(number) - firsts[int(number)]}.{part}"] = value
    return whole


def test_released_weights_fit_whole_or_not_at_all() -> None:
    state = recorded_state("vision_ia_red2")
    for sizes in ([1, 1, 1], [2, 1]):
        model = interpreted(groups=sizes)
        own = {name: value for name, value in state.items() if len(sizes) == 3 or not name.startswith("groups.2")}
        model.load_released({"model": repeated(own, sizes)})
        weight = model.state_dict()["interpreters.1.key.weight"]
        assert torch.equal(weight, state["groups.1.agent.qk.weight"].chunk(3)[1])
    model = interpreted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    qk = state["groups.1.agent.qk.weight"]
    for words, changed in (
        ("36 rows: queries, keys and an unused", state | {"groups.1.agent.qk.weight": qk[:24]}),
        (r"interpreters with None for 2.key.bias", {n: v for n, v in state.items() if n != "groups.2.agent.qk.bias"}),
        ("with groups.1.agent.norm.weight", state | {"groups.1.agent.norm.weight": qk[0]}),
        ("interpreters with .* for 3.key.weight", state | {"groups.3.agent.qk.weight": qk}),
        (r"groups of \[1, 1, 1\]", repeated(state, [2, 1])),
        ("without norm.weight", {n: v for n, v in state.items() if n != "norm.weight"}),
    ):
        refused(words, model.load_released, changed)
    refused("0.policy", interpreted(query="policy").load_released, state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("query", ["class", "policy"])
def test_tokens_left_out_and_tokens_masked_give_the_same_logits(query: str) -> None:
    model, x = interpreted(query=query), images()
    logits, decisions = model.forward_masked(x)
    assert len(set(decisions[0].stays.sum(1).tolist())) > 1 and not decisions[0].stays.all()
    close(model(x), logits)
    for before, after in itertools.pairwise(decisions):
        assert (after.stays <= before.stays).all() and after.stays[:, 0].all()
        assert (after.scores[~before.stays] == 0).all() and (after.scores[before.stays] > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_any_kind_are_the_same_on_tokens_left_out_and_masked(kind: str) -> None:
    model, x = interpreted(kind), images(8)
    logits, decisions = model.forward_masked(x)
    assert len(set(decisions[0].stays.sum(1).tolist())) > 1 and not decisions[0].stays.all()
    close(model(x), logits)
    close(model(x[2:3]), logits[2:3])
    assert model(x[:0]).shape == model.forward_masked(x[:0])[0].shape == (0, 5)
    model.threshold = 0.0
    close(model(x), model.model(x))
    close(model.forward_masked(x)[0], model.model(x))


def by_hand(model: InterpretedTransformer, x: Tensor, stays: Sequence[Tensor]) -> Tensor:
    """Logits of one image: the blocks, one each decision, called on the tokens that stay (N,) alone."""
    host: Any = model.model
    words, tokens = host.embed(x) if isinstance(host, TNT) else (torch.zeros(TOKENS), host.embed(x))
    left, first = torch.arange(tokens.shape[1]), model.host.protected
    for block, kept in zip(host.blocks, stays, strict=True):
        here, left = kept[left], left[kept[left]]
        tokens, context = tokens[:, here], Context(grid=(4, 4), positions=left[None])
        if isinstance(block, Block):
            plain = isinstance(block.outer.attention.positions, NoPositions)
            context = Context() if plain else context.replace(grid=None)
            words, tokens = block(words[here[first:]], tokens, context)
        else:
            tokens = block(tokens, context=context).output
    features = host.norm(tokens)
    return host.head(features[:, first:].mean(1) if host.global_pool == "avg" else features[:, 0])


ALONE = ["mean", "mean, rotary", "mean beside a class token", *(kind for kind in KINDS if "TNT" in kind)]


@pytest.mark.parametrize("kind", ALONE)
def test_a_row_is_the_blocks_run_on_its_tokens_alone(kind: str) -> None:
    model, x = interpreted(kind), images()
    model.threshold = float(model.heat_map(x, 0).detach().mean())
    _, decisions = model.forward_masked(x)
    assert len(set(decisions[0].stays.sum(1).tolist())) > 1
    found = model(x)
    for row in range(4):
        close(found[row : row + 1], by_hand(model, x[row : row + 1], [made.stays[row] for made in decisions]))


@pytest.mark.parametrize("kind", AVERAGING)
def test_where_patches_are_averaged_the_best_one_stays(kind: str) -> None:
    model, x = interpreted(kind, threshold=1.0), images()
    logits, decisions = model.forward_masked(x)
    first = model.host.protected
    best = decisions[0].scores[:, first:].argmax(1) + first
    for made in decisions:
        assert (made.stays.sum(1) == first + 1).all() and made.stays.gather(1, best[:, None]).all()
    close(model(x), logits)
    _, drawn = model.forward_masked(x, sampled=0, generator=torch.Generator().manual_seed(0))
    stays, chances = drawn[0].stays[:, first:], drawn[0].scores[:, first:]
    each = torch.where(stays, chances, 1 - chances).log().scatter(1, best[:, None] - first, 0.0)
    close(drawn[0].log_probability, each.sum(1), 1e-6)


@pytest.mark.parametrize("kind", [*KINDS, "softmax"])
def test_rows_of_unequal_lengths_are_packed_without_padding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, seen = interpreted(kind), images(8), list[tuple[int, ...]]()
    _, decisions = model.forward_masked(x)
    for block in model.model.blocks:
        network = block.outer.mlp if isinstance(block, Block) else block.feed_forward
        network.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape)))
    packed = model(x)
    counts = [made.stays.sum(1) for made in decisions]
    assert len(counts[0].unique()) > 1
    assert seen == [
        (1, int(count.sum()), 12) if len(count.unique()) > 1 else (8, int(count[0]), 12) for count in counts
    ]
    monkeypatch.setattr(OwnHost, "run_ragged", Host.run_ragged)
    close(model(x), packed)
    assert seen[len(counts)] == (8, int(counts[0].max()), 12)


@torch.no_grad()
def test_packed_rows_of_softmax_attention_go_to_the_native_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, kernels, call = interpreted(), images(16), list[str](), library.call
    logits, decisions = model.forward_masked(x)
    assert len(decisions[0].stays.sum(1).unique()) > 1
    monkeypatch.setattr(library, "call", lambda arguments: (kernels.append(arguments.kernel), call(arguments)))
    close(model.float()(x.float()), logits.float(), 1e-5)
    assert kernels.count("residual_attention") == 3


@pytest.mark.parametrize("kind", ["rotary", "rotary of rows and columns", "encoded positions"])
def test_tokens_keep_their_positions(kind: str) -> None:
    model, x = interpreted(kind, groups=1), images()
    logits, (decision,) = model.forward_masked(x)
    hidden = torch.zeros(decision.stays.shape, dtype=torch.float64).masked_fill(~decision.stays, -torch.inf)
    tokens, context, _ = model.model.place(x)
    for block in model.model.blocks:
        tokens = block(tokens, context=context.replace(mask=Mask(bias=hidden[:, None, None]))).output
    close(logits, model.model.forward_head(model.model.norm(tokens)))
    close(model(x), logits)


def test_a_distillation_token_stays_and_is_no_part_of_a_decision() -> None:
    model, x = interpreted("distillation", threshold=1.0), images()
    _, decisions = model.forward_masked(x)
    assert decisions[-1].stays.sum(1).tolist() == [2] * 4 and model.heat_map(x).shape == (4, 4, 4)
    _, drawn = model.forward_masked(x, sampled=0, generator=torch.Generator().manual_seed(0))
    stays, chances = drawn[0].stays[:, 2:], drawn[0].scores[:, 2:]
    close(drawn[0].log_probability, torch.where(stays, chances, 1 - chances).log().sum(1), 1e-6)


def test_decisions_may_be_given() -> None:
    model, x = interpreted(), images()
    logits, decisions = model.forward_masked(x)
    again, followed = model.forward_masked(x, stays=[made.stays for made in decisions])
    close(again, logits)
    every = torch.ones(4, TOKENS, dtype=torch.bool)
    whole, followed = model.forward_masked(x, stays=[every, decisions[1].stays, every])
    assert torch.equal(followed[2].stays, decisions[1].stays) and not torch.allclose(whole, logits)


def test_a_threshold_of_zero_is_the_plain_model_and_one_keeps_the_class_token_alone() -> None:
    model, x = interpreted(threshold=0.0), images()
    close(model(x), model.model(x))
    model.threshold = 1.0
    alone = model.model.embed(x)[:, :1]
    for block in model.model.blocks:
        alone = block(alone, context=Context()).output
    close(model(x), model.model.head(model.model.norm(alone)[:, 0]))
    _, decisions = model.forward_masked(x)
    close(model.usage(decisions), torch.full((4,), 1 / TOKENS, dtype=torch.float64))


def test_work_is_left_by_the_last_decision_in_the_groups_after_it() -> None:
    model = interpreted()
    x = images()
    _, decisions = model.forward_masked(x, groups=1)
    assert decisions[0].share.mean() < 1
    close(model.usage(decisions), decisions[0].share)
    _, decisions = model.forward_masked(x, groups=2)
    close(model.usage(decisions), (decisions[0].share + 2 * decisions[1].share) / 3)


def test_scores_follow_their_patches_and_are_constant_without_weights() -> None:
    interpreter = Interpreter(12, 6).double()
    x, alive = torch.randn(2, 9, 12, dtype=torch.float64), torch.rand(2, 9) > 0.3
    alive[:, 0] = True
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(8)])
    close(interpreter(x[:, order], alive[:, order]), interpreter(x, alive)[:, order])
    for linear in (interpreter.query, interpreter.key):
        torch.nn.init.zeros_(linear.weight)
    scores = interpreter(x, alive)[alive]
    close(scores, scores[:1].expand_as(scores))


@pytest.mark.parametrize("query", ["class", "policy"])
@pytest.mark.parametrize(("dim", "heads"), [(12, 6), (24, 1), (64, 4), (192, 3), (6, 6)])
def test_every_token_starts_with_the_same_chance_at_any_width_and_scale(dim: int, heads: int, query: str) -> None:
    for scale, offset in ((1e-2, 0.0), (1.0, 5.0), (1e3, -2e3)):
        interpreter = Interpreter(dim, heads, query).double()
        x, alive = scale * torch.randn(3, 9, dim, dtype=torch.float64) + offset, torch.rand(3, 9) > 0.3
        alive[:, 0] = True
        scores = interpreter(x, alive)
        close(scores, torch.where(alive, START, 0.0).double(), 1e-6)
        scores.square().sum().backward()
        for linear in (interpreter.query, interpreter.key):
            assert linear.weight.grad.abs().max() > 0 and linear.bias.grad.abs().max() > 0
        if dim > heads:  # rows of heads, and within a head, learn apart
            grad = interpreter.key.weight.grad
            assert (grad - grad.mean(0)).norm() > 0.1 * grad.norm()


def test_an_untrained_policy_keeps_all_tokens_and_draws_most() -> None:
    vit = VisionTransformer(VisionTransformerConfig(**SMALL | {"image_size": 64})).double().eval()
    model, x = InterpretedTransformer(vit).double().eval(), 3 * torch.randn(16, 3, 64, 64, dtype=torch.float64)
    close(model(x), vit(x))
    _, drawn = model.forward_masked(x, groups=1, sampled=0, generator=torch.Generator().manual_seed(0))
    assert 0.6 < drawn[0].stays[:, 1:].double().mean() < 0.7


def decided(stays: Tensor, scores: Tensor) -> Decision:
    patches = torch.arange(stays.shape[1]).expand_as(stays) > 0
    return Decision(scores.expand(len(stays), -1), stays, patches)


def test_rewards_at_their_extremes() -> None:
    stays = torch.tensor([[True] * 4, [True, False, False, False], [True] * 4])
    found = reward(decided(stays, torch.full((4,), 0.5)), torch.tensor([True, True, False]), error_penalty=0.3)
    close(found, torch.tensor([0, 1 - 1 / 16, -0.3]), 1e-6)


def test_the_policy_gradient_is_unbiased_with_its_baseline() -> None:
    raw = torch.randn(3, dtype=torch.float64, requires_grad=True)
    scores = torch.cat([torch.ones(1, dtype=torch.float64), raw.sigmoid()])
    patches = torch.tensor(list(itertools.product([False, True], repeat=3)))
    stays = torch.cat([torch.ones(8, 1, dtype=torch.bool), patches], 1)
    made = decided(stays, scores)
    right = torch.rand(8) > 0.4
    rewards = reward(made, right).double()
    chances = torch.where(patches, scores[1:], 1 - scores[1:]).prod(1)
    close(made.log_probability, chances.log(), 1e-6)
    (exact,) = torch.autograd.grad((chances * rewards).sum(), raw, retain_graph=True)
    for baseline in (0.0, rewards[5].item()):
        weighted = chances.detach() * (rewards - baseline) * made.log_probability
        (estimated,) = torch.autograd.grad(weighted.sum(), raw, retain_graph=True)
        close(estimated, exact, 1e-5)


def test_the_loss_moves_the_policy_alone_and_draws_are_the_generators() -> None:
    model, x = interpreted(), images()
    labels = model.model(x).argmax(-1)
    loss, _ = policy_loss(model, x, labels, 1, generator=torch.Generator().manual_seed(0))
    again, _ = policy_loss(model, x, labels, 1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loss, again)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    moved = {name for name, g in zip(parameters, gradients, strict=True) if g is not None and g.abs().max() > 0}
    assert {name for name in moved if name.startswith("interpreters")} == {
        f"interpreters.1.{part}.{kind}" for part in ("query", "key") for kind in ("weight", "bias")
    }


def marked_corners(step: int) -> tuple[Tensor, Tensor]:
    """Noise images, with a corner that encodes the class."""
    draws = torch.Generator().manual_seed(step)
    labels = torch.randint(2, (32,), generator=draws)
    pictures = 0.1 * torch.randn(32, 3, 32, 32, generator=draws)
    pictures[:, :, :8, :8] += (2.0 * labels - 1).view(-1, 1, 1, 1)
    return pictures, labels


def trained_on_corners() -> InterpretedTransformer:
    torch.manual_seed(1)
    model = InterpretedTransformer(VisionTransformer(VisionTransformerConfig(**{**SMALL, "num_classes": 2})), groups=3)
    optimizer = torch.optim.Adam(model.model.parameters(), lr=3e-3)
    for step in range(80):
        pictures, labels = marked_corners(1000 + step)
        torch.nn.functional.cross_entropy(model.model(pictures), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_the_curriculum_trains_policies_then_blocks_and_drops_what_says_nothing() -> None:
    model, steps = trained_on_corners(), []
    train_interpreters(model, marked_corners, policy_steps=20, block_steps=2, policy_rate=1e-2, on_step=steps.append)
    assert [(s.group, s.part) for s in steps[:23]] == [(0, "policy")] * 20 + [(0, "blocks")] * 2 + [(1, "policy")]
    pictures, labels = marked_corners(2000)
    logits, decisions = model.eval().forward_masked(pictures)
    assert (logits.argmax(-1) == labels).float().mean() > 0.9
    assert model.usage(decisions).mean() < 0.8
    assert model.heat_map(pictures).shape == (32, 4, 4)


def test_a_curriculum_that_was_stopped_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    begin = interpreted().float().state_dict()

    def run(checkpoint: Path | None, stop: int | None = None, **changed: Any) -> InterpretedTransformer:
        model = interpreted().float()
        model.load_state_dict(begin)

        def batches(step: int) -> tuple[Tensor, Tensor]:
            if step == stop:
                raise KeyboardInterrupt
            return marked_corners(step)

        train_interpreters(model, batches, policy_steps=2, block_steps=1, **{"checkpoint": checkpoint, **changed})
        return model

    whole, file = run(None), tmp_path / "checkpoint.safetensors"
    for stop in (1, 2, 7):
        with pytest.raises(KeyboardInterrupt):
            run(file, stop)
    for model in (run(file), run(file, 0)):  # the second run is already finished and needs no batch
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, whole.state_dict()[name]), name
    refused("other settings", run, file, error_penalty=0.5)


def test_a_curriculum_of_other_groups_is_another_run(tmp_path: Path) -> None:
    given: dict[str, Any] = {"policy_steps": 1, "block_steps": 1, "checkpoint": tmp_path / "checkpoint.safetensors"}
    train_interpreters(interpreted(groups=[1, 2]).float(), marked_corners, **given)
    refused("other settings", train_interpreters, interpreted(groups=[2, 1]).float(), marked_corners, **given)


def test_models_and_groups_that_do_not_fit_are_refused() -> None:
    refused("groups 0 to 0", interpreted(groups=1).heat_map, images())
    refused("add up to 3", interpreted, groups=[1, 1])
    refused("add up to 3", interpreted, groups=2)
    refused("query", interpreted, query="patch")
    refused("try query='policy'", interpreted, "mean", query="class")
    for kind in ("large_kernel", "bidirectional_mamba", "bilevel_routing"):
        other: Any = VisionTransformer(VisionTransformerConfig(**SMALL | {"pool": "mean", "plan": kind}))
        refused(f"{kind}, which reads the grid", InterpretedTransformer, other, query="policy")
    other = TNT(TNTConfig(**TINY_TNT, pool="mean", mixer="large_kernel"))
    refused("large_kernel, which reads the grid", InterpretedTransformer, other, query="policy")
    refused("an excitation", InterpretedTransformer, TNT(TNTConfig(**TINY_TNT, excitation=True)))
