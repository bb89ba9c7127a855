from __future__ import annotations

import dataclasses

import pytest
import torch
from model_checks import check_comes_back_from_disk, made, randomize_ends, read_by, small
from support import read_in_pieces
from torch import nn

from regard.contract import Context, Mask, Unsupported
from regard.models import Encoder, LanguageModel, count_parameters, set_exit_rule
from regard.models.exits import joint_loss
from regard.models.stack import Stack
from regard.training import peak_memory

PLANS = {
    "softmax": ["softmax"] * 4,
    "gated_linear": ["gated_linear"] * 4,
    "mamba": ["mamba"] * 4,
    "stochastic_subsampling": [
        ("stochastic_subsampling", {"ratio": 0.5}),
        ("stochastic_subsampling", {"mode": "local", "window": 3, "per_sample": True}),
        ("stochastic_subsampling", {"mode": "bernoulli", "dropout": 0.2}),
        ("stochastic_subsampling", {"ratio": 0.5, "per_head": True}),
    ],
    "hybrid": ["linear", ("softmax", {"dropout": 0.2}), ("mixture_of_heads", {"active_heads": 1}), "delta_rule"],
}
LEAVING = {"exits": (1, 3), "exit_rule": "confidence:0.5"}
ENDS = {"layer_scale": 0.3, "branch_norm": "all"}


def language_model(plan="softmax", **options) -> LanguageModel:
    plan = PLANS.get(plan, plan) if isinstance(plan, str) else plan
    return made("language model", plan=plan, **options).train()


def encoder(plan="softmax", **options) -> Encoder:
    return made("encoder", plan=PLANS[plan], features=None, vocab_size=11, **options).train()


def like(model: nn.Module, **stack) -> nn.Module:
    """A model with the same weights and another stack."""
    twin = type(model)(dataclasses.replace(model.config, stack=stack)).to(next(model.parameters()).dtype)
    twin.load_state_dict(model.state_dict(), strict=False)
    return twin


def separated(model: nn.Module, **stack) -> nn.Module:
    """A model with the same weights whose layers share nothing."""
    apart = like(model, **stack)
    for block, twin in zip(model.blocks, apart.blocks, strict=True):
        twin.load_state_dict(block.state_dict())
    return apart


def assert_same(first, second, exactly=False):
    assert first.keys() == second.keys()
    tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-9, "atol": 1e-11}
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(11, shape)


def let_half_leave(model: nn.Module, ids: torch.Tensor, **context) -> nn.Module:
    """The model in evaluation mode, with a threshold between the middle two confidences at its first exit."""
    _, logits = model.train()(ids, context=Context(**context)).extras["exits"][0]
    ordered = logits.detach().softmax(-1).amax(-1).flatten().unique()
    middle = len(ordered) // 2
    set_exit_rule(model, f"confidence:{float(ordered[middle - 1 : middle + 1].mean())}")
    return model.eval()


class TwoStreams:
    """The definition of reversible layers on a model's own blocks, with ordinary differentiation."""

    def __init__(self, stack):
        self.stack = stack

    def __call__(self, x, context, states, memory=None):
        first = second = x
        losses = {}
        for block in self.stack:
            result = block.mix(second, memory if block.cross else None, context=context)
            first, second = second, first + result.output
            for name, (total, count) in result.losses.items():
                before = losses.get(name, (0, 0))
                losses[name] = before[0] + total, before[1] + count
            if block.feed_forward is not None:
                first, second = second, first + block.feed(second, context=context)
        return type(result)((first + second) / 2, (), losses)


def differentiated_as_usual(model: nn.Module) -> nn.Module:
    """The same function and weights, without computing any layer twice."""
    plain = like(model, **dataclasses.asdict(model.config.stack) | {"checkpoint_layers": 0})
    for part in [part for part in plain.modules() if isinstance(part, Stack) and part.config.reversible]:
        part.run = TwoStreams(part)
    return plain


def gradients(model: nn.Module, inputs, *, seed: int) -> dict[str, torch.Tensor]:
    """Gradients of the model's output and losses in training, with draws from a generator and torch's global one."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    result = model.train()(*inputs, context=Context(mask=Mask(lengths=torch.tensor([9, 4, 0])), generator=generator))
    (result.output.square().sum() + sum(total for total, _ in result.losses.values())).backward()
    after = torch.rand((), generator=generator), torch.rand(())
    return {name: p.grad for name, p in model.named_parameters()} | {"draws": torch.stack(after)}


@pytest.mark.parametrize(
    "stack",
    [
        {"checkpoint_layers": 1, "stochastic_depth": 0.5},
        {"checkpoint_layers": 3, "stochastic_depth": 0.5},
        {"reversible": True},
        {"reversible": True, **ENDS},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *(("language model", {"plan": plan}) for plan in PLANS.values()),
        *(("encoder", {"plan": plan}) for name, plan in PLANS.items() if name != "mamba"),
        ("encoder-decoder", {"cross_plan": "linear", "num_layers": 2}),
        ("forecaster", {"num_layers": 2}),
    ],
)
def test_layers_that_are_computed_twice_have_the_gradients_of_others_dropout_included(kind, options, stack):
    model = randomize_ends(made(kind, dropout=0.1, stack=stack, **options))
    inputs, seed = read_by(model.config, n=9), int(torch.randint(1000, ()))
    expected = gradients(differentiated_as_usual(model), inputs, seed=seed)
    assert_same(expected, gradients(model, inputs, seed=seed), exactly="checkpoint_layers" in stack)


@pytest.mark.parametrize("options", [{"reversible": True}, {"checkpoint_layers": 1}, ENDS])
def test_exits_of_an_encoder_decoder_learn_with_every_stack(options):
    stack = options | {"share": "all", "stochastic_depth": 0.1, "exits": (1,)}
    model = made("encoder-decoder", num_layers=2, stack=stack).train()
    assert len(model.encoder_blocks[0].mixer_end) == len(model.blocks[1].mixer_end) == 2 * (options == ENDS)
    model.loss(*read_by(model.config)).backward()
    assert all(p.grad is not None for p in model.exits.parameters())


def training_memory(layers: int, **stack) -> int:
    """Peak memory of a training step, for parameters that do not grow with depth."""
    config = small("language model", dim=32, num_layers=layers, stack={"share": "all", **stack})
    model, ids = LanguageModel(config), random_ids(4, 128)
    return peak_memory(lambda: model.loss(ids).backward()).bytes


def test_memory_grows_not_with_the_depth_of_reversible_layers_and_as_its_root_with_checkpoints():
    few, many = (training_memory(n, reversible=True) for n in (2, 16))
    draws = 2 * 14 * 2 * 5056  # random states saved before each of the additional branches
    assert many <= few + draws + 1000
    plain, checkpointed = training_memory(16), training_memory(16, checkpoint_layers=4)
    assert 3 * many < plain and 2 * checkpointed < plain
    assert training_memory(16, checkpoint_layers=16) > checkpointed


@pytest.mark.parametrize("ends", [{}, ENDS], ids=["plain", "ends"])
@pytest.mark.parametrize("share", ["all", "mixer", "feed_forward"])
def test_shared_layers_equal_separate_ones_of_equal_weights(share, ends):
    shared = language_model(["gated_linear"] * 4, stack={"share": share, "share_groups": 2} | ends)
    randomize_ends(shared)
    apart, ids = separated(shared, **ends), random_ids(2, 7)
    torch.testing.assert_close(shared(ids).output, apart(ids).output)
    first, second, third, fourth = shared.blocks
    parts, shared_size = [part for part in ("mixer", "feed_forward") if share in ("all", part)], 0
    for part in ("mixer", "feed_forward"):
        for name in (part, f"{part}_norm", f"{part}_end"):
            assert (getattr(third, name) is getattr(fourth, name)) == (part in parts)
            shared_size += (part in parts) * count_parameters(getattr(first, name))
    assert count_parameters(apart) - count_parameters(shared) == 2 * shared_size
    assert getattr(first, parts[0]) is getattr(second, parts[0]) is not getattr(third, parts[0])


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("branch_norm", ["none", "mixer", "feed_forward", "all"])
@pytest.mark.parametrize("layer_scale", [None, 0.0])
def test_blocks_with_ends_equal_those_written_out(layer_scale, branch_norm, norm):
    stack = {"layer_scale": layer_scale, "branch_norm": branch_norm}
    model = language_model([("sigmoid", {"length": 9}), "gated_linear"], norm=norm, stack=stack)
    randomize_ends(model)
    ids = random_ids(2, 9)
    found = model.blocks.run(model.embedding(ids), Context(), [None] * 2).output
    x, weights = model.embedding(ids), dict(model.named_parameters())

    def end(name, y):
        if branch_norm != "none" and (branch_norm == "all" or name.endswith(branch_norm)):
            weight = weights[f"{name}_end.norm.weight"]
            if norm == "rms":
                y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
            else:
                y = nn.functional.layer_norm(y, (16,), weight, weights[f"{name}_end.norm.bias"], 1e-5)
        return y if layer_scale is None else weights[f"{name}_end.scale.factors"] * y

    for i, block in enumerate(model.blocks):
        x = x + end(f"blocks.{i}.mixer", block.mixer(block.mixer_norm(x)).output)
        x = x + end(f"blocks.{i}.feed_forward", block.feed_forward(block.feed_forward_norm(x)))
    torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("plan", "stack"), [("softmax", ENDS), ("mamba", {"share": "all", "reversible": True, **LEAVING, **ENDS})]
)
def test_a_model_is_saved_and_loaded_with_its_stack(plan, stack, tmp_path):
    model = randomize_ends(language_model(plan, stack=stack)).eval()
    again = check_comes_back_from_disk(model, (random_ids(2, 6),), tmp_path)
    assert (again.blocks[0].mixer is again.blocks[3].mixer) == ("share" in stack)
    assert not [name for name in language_model(plan).state_dict() if "_end" in name]


@pytest.mark.parametrize("groups", [1, 2])
def test_layers_that_share_tables_have_the_rest_for_themselves(groups):
    plan = [("universal_rpe", {"positions": "relative", "max_distance": 5})] * 4
    shared = language_model(plan, stack={"share": "tables", "share_groups": groups})
    for block in shared.blocks:
        for table in (*block.mixer.projection.parameters(), *block.mixer.positions.parameters()):
            nn.init.normal_(table)
    apart, ids = separated(shared), random_ids(2, 7)
    torch.testing.assert_close(shared(ids).output, apart(ids).output)
    tables = 2 * 11 + 2 * 32  # C for both heads, and the relative bias
    assert count_parameters(apart) - count_parameters(shared) == (4 - groups) * tables
    mixers = [block.mixer for block in shared.blocks]
    assert mixers[0].positions is mixers[1].positions and mixers[2].projection is mixers[3].projection
    assert (mixers[0].positions is mixers[2].positions) == (groups == 1)


def test_stochastic_depth_leaves_out_whole_layers_and_nothing_in_evaluation():
    model = language_model("gated_linear", stack={"stochastic_depth": 0.999})
    plain, ids = like(model), random_ids(2, 7)
    torch.testing.assert_close(model.eval()(ids).output, plain.eval()(ids).output)
    calls = []
    for i, block in enumerate(model.blocks):
        block.mixer.register_forward_hook(lambda *_, i=i: calls.append(i))
    model.train()
    generator = torch.Generator().manual_seed(int(torch.randint(1000, ())))
    for _ in range(200):
        model(ids, context=Context(generator=generator))
    share = torch.bincount(torch.tensor(calls), minlength=4) / 200
    torch.testing.assert_close(share, torch.tensor([0.75, 0.5, 0.25, 0.0]), atol=0.15, rtol=0)


def test_what_stays_of_stochastic_depth_is_scaled_by_its_chance():
    model = language_model(["linear"], feed_forward=0, norm="none", stack={"stochastic_depth": 0.4})
    x = model.embedding(random_ids(2, 7))
    added = like(model).blocks.run(x, Context(), [None]).output - x
    seen = [model.blocks.run(x, Context(), [None]).output - x for _ in range(40)]
    kept = [a for a in seen if a.any()]
    assert 5 < len(kept) < 40
    for one in kept:
        torch.testing.assert_close(one, added / 0.6)


DECODED = [ENDS, {"reversible": True} | ENDS]
DECODED += [{"exits": (1, 3)} | more for more in ({}, {"reversible": True}, ENDS)]


@pytest.mark.parametrize("stack", DECODED, ids=str)
@pytest.mark.parametrize("plan", [*PLANS, "sigmoid"])
def test_decoding_equals_reading_whole_wherever_the_padding_is(plan, stack):
    model, ids, passed = randomize_ends(language_model(plan, stack=stack)).eval(), random_ids(3, 12), []
    if "exits" in stack:
        let_half_leave(model, ids)
    whole = model(ids)
    handle = model.register_forward_hook(lambda _, given, result: passed.append(result.extras.get("exit_layer")))
    torch.testing.assert_close(read_in_pieces(model, ids, 1)[0], whole.output)
    handle.remove()
    if "exits" in stack:
        layers = whole.extras["exit_layer"]
        assert set(layers.unique().tolist()) <= {1, 3, 4} and len(layers.unique()) > 1
        assert torch.equal(torch.cat(passed, 1), layers)
    right = model(ids, context=Context(mask=Mask(lengths=torch.tensor([12, 5, 1]))))
    torch.testing.assert_close(right.output[1, :5], whole.output[1, :5])
    valid = torch.arange(15) >= 3
    left = model(nn.functional.pad(ids, (3, 0)), context=Context(mask=Mask(valid=valid.expand(3, -1))))
    torch.testing.assert_close(left.output[:, 3:], whole.output)
    assert torch.equal(model.generate(ids, 4), model.generate(ids, 4, use_state=False))


def test_a_token_that_leaves_is_read_at_its_exit_and_is_seen_unchanged_above():
    ids = random_ids(2, 10)
    model = let_half_leave(language_model("softmax", stack={"exits": (2,)}), ids)
    found = model(ids)
    left = found.extras["exit_layer"] == 2
    assert left.any() and not left.all()
    x = model.embedding(ids)
    for block in model.blocks[:2]:
        x = block(x, context=Context()).output
    at_exit = model.logits(model.exits[0].norm(x))
    assert torch.equal(left, at_exit.softmax(-1).amax(-1) >= model.config.stack.rule.value)
    for block in model.blocks[2:]:
        x = torch.where(left[..., None], x, block(x, context=Context()).output)
    expected = torch.where(left[..., None], at_exit, model.logits(model.norm(x)))
    torch.testing.assert_close(found.output, expected)


def test_feed_forward_networks_compute_only_tokens_that_have_not_left():
    ids = random_ids(3, 12)
    model = let_half_leave(language_model("gated_linear", stack={"exits": (1, 3)}), ids)
    seen = []
    for block in model.blocks:
        block.feed_forward.register_forward_pre_hook(lambda _, given: seen.append(given[0][..., 0].numel()))
    layers = model(ids).extras["exit_layer"]
    expected = [36, *[int((layers > n).sum()) for n in (1, 1, 3)]]
    assert seen == [n for n in expected if n]


def test_all_leave_at_a_confidence_of_zero_and_layers_above_are_not_run():
    model = language_model("mamba", stack=LEAVING).eval()
    ids = random_ids(2, 6)
    whole = like(model).eval()(ids).output
    for block in model.blocks[1:]:
        block.mixer.forward = None
    set_exit_rule(model, "confidence:0")
    assert (model(ids).extras["exit_layer"] == 1).all()
    twin = like(model, exits=(1, 3)).eval()
    torch.testing.assert_close(twin(ids).output, whole)
    assert "exit_layer" not in twin(ids).extras


@pytest.mark.parametrize("pool", ["mean", "last", "structured", "low_rank_pooling", "none"])
def test_an_encoder_is_left_alone_as_in_a_batch(pool):
    ids, lengths = random_ids(12, 6), torch.randint(1, 7, (12,))
    mask = Mask(lengths=lengths)
    model = let_half_leave(encoder(pool=pool, stack={"exits": (1, 2)}), ids, mask=mask)
    found, whole = model(ids, context=Context(mask=mask)), like(model).eval()
    assert len(found.extras["exit_layer"].unique()) > 1
    for row, length in enumerate(lengths.tolist()):
        alone = model(ids[row : row + 1, :length])
        part = slice(length) if pool == "none" else ...
        torch.testing.assert_close(alone.output[0], found.output[row][part])
        assert torch.equal(alone.extras["exit_layer"][0], found.extras["exit_layer"][row][part])
        if (alone.extras["exit_layer"] == 4).all():
            torch.testing.assert_close(alone.output, whole(ids[row : row + 1, :length]).output)


def test_the_loss_weighs_exits_by_their_layers_and_trains_them():
    model = language_model("softmax", stack={"exits": (1, 3)}).train()
    ids = random_ids(2, 9)
    result = model(ids)
    assert [share for share, _ in result.extras["exits"]] == [1 / 4, 3 / 4]

    def nats(logits):
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    (_, first), (_, second) = result.extras["exits"]
    expected = (nats(first) + 3 * nats(second) + 4 * nats(result.output)) / 8
    torch.testing.assert_close(model.loss(ids), expected)
    torch.testing.assert_close(joint_loss(result, nats), expected)
    model.loss(ids).backward()
    assert all(float(one.norm.weight.grad.abs().sum()) > 0 for one in model.exits)


@pytest.mark.parametrize("stack", [{"reversible": True}, {"checkpoint_layers": 2}])
def test_under_autocast_weights_and_gradients_stay_float32_and_agree(stack):
    """Both ways round to bfloat16, but the same function is differentiated."""
    model, ids, found = language_model(stack=stack).float(), random_ids(4, 16), []
    for one in (differentiated_as_usual(model).train(), model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = one.loss(ids)
        loss.backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in one.parameters())
        found.append(torch.cat([p.grad.flatten() for p in one.parameters()]))
    assert nn.functional.cosine_similarity(*found, dim=0) > 0.99


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("share", "norms"),
        ("reversible", "yes"),
        ("stochastic_depth", 1.0),
        *(("checkpoint_layers", layers) for layers in (-1, 1.5)),
        *(("exits", exits) for exits in ((0,), (4,), (2, 1), 1)),
        *(("layer_scale", scale) for scale in (-0.1, float("nan"), True)),
        ("exit_rule", "confidence:0.5"),
        ("exit_heads", "own"),
        ("branch_norm", "attention"),
        ("depth", 3),
    ],
)
def test_bad_options_are_refused(name, value):
    with pytest.raises(Unsupported, match=name):
        language_model(stack={name: value})


def test_layers_that_cannot_share_or_be_repeated_are_refused():
    narrow, leaving = ("softmax", {"feed_forward": 8}), encoder(stack=LEAVING).eval()
    for call, message in (
        (lambda: language_model(["softmax", "linear"], stack={"share": "all"}), "share their all"),
        (lambda: language_model(["softmax", "linear"], stack={"share": "tables"}), "share their tables"),
        (lambda: language_model([narrow, "softmax"], stack={"share": "feed_forward"}), "different widths"),
        (lambda: language_model("performer", stack={"reversible": True}), "redraw"),
        (lambda: language_model(stack={"share": "all", "share_groups": 3}), "share_groups"),
        (lambda: language_model(stack={"reversible": True, "checkpoint_layers": 2}), "reversible"),
        (lambda: language_model(stack={"exits": (1,), "exit_rule": "confidence:1.5"}), "confidence:1.5"),
        (lambda: small("forecaster", stack={"exits": (1,)}), "forecaster"),
        (lambda: language_model(norm="none", stack={"branch_norm": "mixer"}), "branch_norm='mixer' .* norm='none'"),
        (lambda: leaving(random_ids(2, 5), context=Context(want=frozenset({"weights"}))), "leave early"),
    ):
        with pytest.raises(Unsupported, match=message):
            call()
    language_model([("performer", {"redraw": 0})] * 2, stack={"reversible": True})


def test_tokens_that_leave_have_the_gradients_of_kept_layers_when_checkpointed():
    ids, found = random_ids(2, 10), []
    model = let_half_leave(language_model("gated_linear", stack={"exits": (1, 2)}), ids)
    for layers in (0, 1):
        twin = like(model, **dataclasses.asdict(model.config.stack) | {"checkpoint_layers": layers}).eval()
        twin(ids).output.square().sum().backward()
        found.append({name: p.grad for name, p in twin.named_parameters()})
    assert_same(*found)


def test_a_result_that_somebody_keeps_of_a_layer_stays_what_it_was():
    model, kept = language_model("softmax", stack=ENDS).eval(), []
    model.blocks[0].mixer.register_forward_hook(
        lambda module, given, result: kept.append((result, result.output.clone()))
    )
    model(torch.randint(11, (2, 5)))
    (result, output), *_ = kept
    assert torch.equal(result.output, output)
