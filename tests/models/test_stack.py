from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from regard.contract import Context, Mask, Unsupported
from regard.models import (
    Encoder,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    Forecaster,
    ForecasterConfig,
    LanguageModel,
    LanguageModelConfig,
    count_parameters,
    from_pretrained,
    save_pretrained,
    set_exit_threshold,
)
from regard.models.stack import joint_loss
from regard.training import peak_memory

PLANS = {
    "softmax": ["softmax"] * 4,
    "gated_linear": ["gated_linear"] * 4,
    "mamba": ["mamba"] * 4,
    "hybrid": ["linear", ("softmax", {"dropout": 0.2}), ("mixture_of_heads", {"active_heads": 1}), "delta_rule"],
}
LEAVING = {"exits": (1, 3), "exit_threshold": 0.5}
ENDS = {"layer_scale": 0.3, "branch_norm": "all"}


def language_model(plan="softmax", **options) -> LanguageModel:
    config = LanguageModelConfig(
        vocab_size=11,
        dim=16,
        num_heads=2,
        plan=PLANS[plan] if isinstance(plan, str) and plan in PLANS else plan,
        dropout=options.pop("dropout", 0.1),
        **options,
    )
    return LanguageModel(config).double()


def encoder(plan="softmax", **options) -> Encoder:
    plan = PLANS.get(plan, plan)
    config = EncoderConfig(num_classes=3, vocab_size=11, dim=16, num_heads=2, plan=plan, **{"dropout": 0.1} | options)
    return Encoder(config).double()


def encoder_decoder(**options) -> EncoderDecoder:
    config = EncoderDecoderConfig(
        vocab_size=11,
        memory_vocab_size=11,
        dim=16,
        num_heads=2,
        num_layers=2,
        dropout=0.1,
        cross_plan="linear",
        **options,
    )
    return EncoderDecoder(config).double()


def like(model: nn.Module, **stack) -> nn.Module:
    """The same weights in a model with another stack."""
    twin = type(model)(dataclasses.replace(model.config, stack=stack)).double()
    twin.load_state_dict(model.state_dict(), strict=False)
    return twin


def gradients(model: nn.Module, loss, *, seed: int) -> dict[str, torch.Tensor]:
    """Of a loss of the model in training, with draws from a generator and from torch's own state."""
    model.train().zero_grad()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    loss(model, Context(mask=Mask(lengths=torch.tensor([9, 4, 0])), generator=generator)).backward()
    after = torch.rand((), generator=generator), torch.rand(())
    return {name: p.grad for name, p in model.named_parameters()} | {"draws": torch.stack(after)}


def randomize_ends(model: nn.Module) -> nn.Module:
    """Random norms and factors at the ends of all branches."""
    ends = [module for name, module in model.named_modules() if name.endswith("_end")]
    parameters = [parameter for end in ends for parameter in end.parameters()]
    assert parameters
    for parameter in parameters:
        nn.init.normal_(parameter)
    return model


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(11, shape)


def let_half_leave(model: nn.Module, ids: torch.Tensor, **context) -> nn.Module:
    """The model in evaluation, with a threshold between the middle two confidences at its first exit."""
    _, logits = model.train()(ids, context=Context(**context)).extras["exits"][0]
    ordered = logits.detach().softmax(-1).amax(-1).flatten().unique()
    middle = len(ordered) // 2
    set_exit_threshold(model, float(ordered[middle - 1 : middle + 1].mean()))
    return model.eval()


def losses_of(ids):
    """A loss of each kind of model."""

    def of_language(model, context):
        return model.loss(ids, context=context)

    def of_encoder(model, context):
        result = model(ids, context=context)
        return result.output.square().sum() + sum(total for total, _ in result.losses.values())

    return {LanguageModel: of_language, Encoder: of_encoder}


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("plan", PLANS)
def test_checkpointed_layers_have_the_gradients_of_kept_ones_dropout_included(plan, layers):
    model, ids, seed = language_model(plan), random_ids(3, 9), int(torch.randint(1000, ()))
    loss = losses_of(ids)[LanguageModel]
    stack = {"checkpoint_layers": layers, "stochastic_depth": 0.5}
    expected = gradients(like(model, stochastic_depth=0.5), loss, seed=seed)
    assert_same(expected, gradients(like(model, **stack), loss, seed=seed))


class TwoStreams:
    """The definition of reversible layers on a model's own blocks, differentiated as usual."""

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


@pytest.mark.parametrize("ends", [{}, ENDS], ids=["plain", "ends"])
@pytest.mark.parametrize("make", [language_model, encoder])
@pytest.mark.parametrize("plan", PLANS)
def test_inverted_layers_have_the_gradients_of_the_definition_dropout_included(plan, make, ends):
    if make is encoder and plan == "mamba":
        plan = "gated_linear"
    model, ids, seed = make(plan, stack={"reversible": True} | ends), random_ids(3, 9), int(torch.randint(1000, ()))
    if ends:
        randomize_ends(model)
    loss = losses_of(ids)[type(model)]
    found = gradients(model, loss, seed=seed)
    model.blocks.run = TwoStreams(model.blocks)
    assert_same(gradients(model, loss, seed=seed), found)


def test_a_decoder_and_its_memory_are_inverted_exactly():
    model, ids, memory = encoder_decoder(stack={"reversible": True}), random_ids(3, 9), random_ids(3, 7)

    def loss(model, context):
        return model.loss(ids, memory, context=context)

    seed = int(torch.randint(1000, ()))
    found = gradients(model, loss, seed=seed)
    model.blocks.run, model.encoder_blocks.run = TwoStreams(model.blocks), TwoStreams(model.encoder_blocks)
    assert_same(gradients(model, loss, seed=seed), found)


@pytest.mark.parametrize("options", [{"reversible": True}, {"checkpoint_layers": 1}, ENDS])
def test_an_encoder_decoder_and_a_forecaster_learn_with_every_stack(options):
    calendar, past = torch.randn(2, 5, 2), torch.randn(2, 9, 3)
    config = ForecasterConfig(2, 3, dim=16, num_heads=2, num_layers=2, stack=options)
    forecaster = Forecaster(config)
    forecaster(calendar, past).output.sum().backward()
    assert all(p.grad is not None for p in forecaster.parameters())
    model = encoder_decoder(stack=options | {"share": "all", "stochastic_depth": 0.1, "exits": (1,)})
    model.loss(random_ids(2, 6), random_ids(2, 5)).backward()
    assert all(p.grad is not None for p in model.exit_norms.parameters())


def training_memory(layers: int, **stack) -> int:
    """Peak of a step whose parameters do not grow with the depth."""
    config = LanguageModelConfig(
        vocab_size=11, dim=32, num_heads=2, plan="softmax", num_layers=layers, stack={"share": "all", **stack}
    )
    model, ids = LanguageModel(config), random_ids(4, 128)
    return peak_memory(lambda: model.loss(ids).backward()).bytes


def test_memory_of_a_reversible_stack_does_not_grow_with_depth():
    few, many = (training_memory(n, reversible=True) for n in (2, 16))
    draws = 2 * 14 * 2 * 5056  # the random state before each branch that the deeper one has more
    assert many <= few + draws + 1000
    assert training_memory(16) > 3 * many


def test_checkpointed_layers_need_memory_as_the_root_of_the_depth():
    plain, checkpointed = training_memory(16), training_memory(16, checkpoint_layers=4)
    assert checkpointed < 0.5 * plain
    assert training_memory(16, checkpoint_layers=16) > checkpointed


def test_a_continued_reversible_model_equals_reading_whole():
    for plan in PLANS:
        model = language_model(plan, stack={"reversible": True, "share": "none"}).eval()
        ids = random_ids(2, 9)
        whole = model(ids).output
        first = model(ids[:, :4], context=Context(want=frozenset({"state"})))
        second = model(ids[:, 4:], state=first.state)
        torch.testing.assert_close(torch.cat([first.output, second.output], 1), whole)


@pytest.mark.parametrize("ends", [{}, ENDS], ids=["plain", "ends"])
@pytest.mark.parametrize("share", ["all", "mixer", "feed_forward"])
def test_shared_layers_equal_separate_ones_of_equal_weights(share, ends):
    shared = language_model(["gated_linear"] * 4, stack={"share": share, "share_groups": 2} | ends, dropout=0.0)
    if ends:
        randomize_ends(shared)
    apart = like(shared, **ends)
    for block, twin in zip(shared.blocks, apart.blocks, strict=True):
        twin.load_state_dict(block.state_dict())
    assert len({id(p) for p in apart.parameters()}) > len({id(p) for p in shared.parameters()})
    ids = random_ids(2, 7)
    torch.testing.assert_close(shared(ids).output, apart(ids).output)
    block = count_parameters(apart.blocks[0])
    if share == "all":
        assert count_parameters(apart) - count_parameters(shared) == 2 * block
        assert shared.blocks[0].mixer is shared.blocks[1].mixer is not shared.blocks[2].mixer
    parts = {"all": ("mixer", "feed_forward"), "mixer": ("mixer",), "feed_forward": ("feed_forward",)}[share]
    for part in ("mixer", "feed_forward"):
        for module in (part, f"{part}_norm", f"{part}_end"):
            assert (getattr(shared.blocks[2], module) is getattr(shared.blocks[3], module)) == (part in parts)


@pytest.mark.parametrize("plan", [*PLANS, "sigmoid"])
def test_branches_add_nothing_at_factors_of_zero_and_learn_from_there(plan):
    model, ids = language_model(plan, stack={"layer_scale": 0}), random_ids(2, 7)
    x = model.embedding(ids)
    assert torch.equal(model.blocks.run(x, Context(), [None] * 4).output, x)
    model.loss(ids).backward()
    for block in model.blocks:
        for end in (block.mixer_end, block.feed_forward_end):
            assert end.scale.factors.grad.abs().min() > 0


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("branch_norm", ["none", "mixer", "feed_forward", "all"])
@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_blocks_with_ends_equal_those_written_out(layer_scale, branch_norm, norm):
    stack = {"layer_scale": layer_scale, "branch_norm": branch_norm}
    plan = [("sigmoid", {"length": 9}), "gated_linear"]
    model = language_model(plan, dropout=0.0, norm=norm, stack=stack)
    if layer_scale is not None or branch_norm != "none":
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


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("plan", [*PLANS, "sigmoid"])
def test_decoding_with_ends_equals_reading_whole_wherever_the_padding_is(plan, reversible):
    model = randomize_ends(language_model(plan, stack={"reversible": reversible} | ENDS)).eval()
    ids, state, outputs = random_ids(2, 9), None, []
    whole = model(ids).output
    for i in range(9):
        one = model(ids[:, i : i + 1], context=Context(want=frozenset({"state"})), state=state)
        outputs.append(one.output)
        state = one.state
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    assert torch.equal(model.generate(ids, 4), model.generate(ids, 4, use_state=False))
    valid = torch.arange(12) >= 3
    padded = model(nn.functional.pad(ids, (3, 0)), context=Context(mask=Mask(valid=valid.expand(2, -1)))).output
    torch.testing.assert_close(padded[:, 3:], whole)


def test_a_decoder_of_memory_decodes_with_ends_as_it_reads_whole():
    model = randomize_ends(encoder_decoder(stack=ENDS)).eval()
    assert len(model.encoder_blocks[0].mixer_end) == len(model.blocks[1].mixer_end) == 2
    ids, memory = random_ids(2, 6), random_ids(2, 5)
    whole = model(ids, memory).output
    first = model(ids[:, :1], memory, context=Context(want=frozenset({"state"})))
    outputs, state = [first.output], first.state
    for i in range(1, 6):
        one = model(ids[:, i : i + 1], context=Context(want=frozenset({"state"})), state=state)
        outputs.append(one.output)
        state = one.state
    torch.testing.assert_close(torch.cat(outputs, 1), whole)


def test_a_model_with_ends_is_saved_and_loaded_and_plain_ones_have_no_more_weights(tmp_path):
    model = randomize_ends(language_model("softmax", stack=ENDS)).eval()
    save_pretrained(model, tmp_path)
    again, ids = from_pretrained(tmp_path), random_ids(2, 6)
    assert again.config == model.config
    torch.testing.assert_close(again(ids).output, model(ids).output)
    assert not [name for name in language_model("softmax").state_dict() if "_end" in name]


def test_a_shared_reversible_model_with_exits_is_saved_and_loaded(tmp_path):
    model = language_model("mamba", stack={"share": "all", "reversible": True, **LEAVING, **ENDS}).eval()
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.blocks[0].mixer is again.blocks[3].mixer
    ids = random_ids(2, 6)
    torch.testing.assert_close(again(ids).output, model(ids).output)


def test_stochastic_depth_leaves_out_whole_layers_and_nothing_in_evaluation():
    model = language_model("gated_linear", dropout=0.0, stack={"stochastic_depth": 0.999})
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
    model = language_model(
        ["linear"], dropout=0.0, feed_forward=0, norm="none", stack={"stochastic_depth": 0.4}
    ).train()
    plain, ids = like(model), random_ids(2, 7)
    x = model.embedding(ids)
    added = plain.blocks.run(x, Context(), [None]).output - x
    seen = [model.blocks.run(x, Context(), [None]).output - x for _ in range(40)]
    kept = [a for a in seen if bool((a != 0).any())]
    assert 5 < len(kept) < 40
    for one in kept:
        torch.testing.assert_close(one, added / 0.6)


@pytest.mark.parametrize("options", [{}, {"reversible": True}, ENDS], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_decoding_with_exits_equals_reading_whole(plan, options):
    ids = random_ids(3, 12)
    model = language_model(plan, dropout=0.0, stack={"exits": (1, 3)} | options)
    let_half_leave(model, ids)
    whole = model(ids)
    layers = whole.extras["exit_layer"]
    assert set(layers.unique().tolist()) <= {1, 3, 4}
    assert len(layers.unique()) > 1, "tokens leave at different places"
    outputs, passed, state = [], [], None
    for i in range(12):
        one = model(ids[:, i : i + 1], context=Context(want=frozenset({"state"})), state=state)
        outputs.append(one.output)
        passed.append(one.extras["exit_layer"])
        state = one.state
    torch.testing.assert_close(torch.cat(outputs, 1), whole.output)
    assert torch.equal(torch.cat(passed, 1), layers)
    padded = model(ids, context=Context(mask=Mask(lengths=torch.tensor([12, 5, 1]))))
    torch.testing.assert_close(padded.output[1, :5], whole.output[1, :5])
    tokens = model.generate(ids, 5)
    assert torch.equal(tokens, model.generate(ids, 5, use_state=False))


def test_a_token_that_leaves_is_read_at_its_exit_and_is_seen_unchanged_above():
    ids = random_ids(2, 10)
    model = let_half_leave(language_model("softmax", dropout=0.0, stack={"exits": (2,)}), ids)
    found = model(ids)
    left = found.extras["exit_layer"] == 2
    assert left.any() and not left.all()
    x = model.embedding(ids)
    for block in model.blocks[:2]:
        x = block(x, context=Context()).output
    at_exit = model.logits(model.exit_norms[0](x))
    assert torch.equal(left, at_exit.softmax(-1).amax(-1) >= model.config.stack.exit_threshold)
    for block in model.blocks[2:]:
        x = torch.where(left[..., None], x, block(x, context=Context()).output)
    expected = torch.where(left[..., None], at_exit, model.logits(model.norm(x)))
    torch.testing.assert_close(found.output, expected)


def test_feed_forward_networks_compute_only_tokens_that_have_not_left():
    ids = random_ids(3, 12)
    model = let_half_leave(language_model("gated_linear", dropout=0.0, stack={"exits": (1, 3)}), ids)
    seen = []
    for block in model.blocks:
        block.feed_forward.register_forward_pre_hook(lambda _, given: seen.append(given[0][..., 0].numel()))
    layers = model(ids).extras["exit_layer"]
    expected = [36, *[int((layers > n).sum()) for n in (1, 1, 3)]]
    assert seen == [n for n in expected if n]


def test_all_leave_at_a_threshold_of_zero_and_layers_above_are_not_run():
    model = language_model("mamba", stack=LEAVING).eval()
    ids = random_ids(2, 6)
    whole = like(model).eval()(ids).output
    for block in model.blocks[1:]:
        block.mixer.forward = None
    set_exit_threshold(model, 0.0)
    assert (model(ids).extras["exit_layer"] == 1).all()
    twin = like(model, exits=(1, 3)).eval()
    torch.testing.assert_close(twin(ids).output, whole)
    assert "exit_layer" not in twin(ids).extras


@pytest.mark.parametrize("pool", ["mean", "last", "structured", "low_rank_pooling"])
def test_sequences_of_an_encoder_leave_alone_as_in_a_batch(pool):
    ids, lengths = random_ids(24, 8), torch.randint(1, 9, (24,))
    model = encoder("softmax", pool=pool, dropout=0.0, stack={"exits": (1, 2)})
    let_half_leave(model, ids, mask=Mask(lengths=lengths))
    found = model(ids, context=Context(mask=Mask(lengths=lengths)))
    assert len(found.extras["exit_layer"].unique()) > 1
    whole = like(model).eval()
    for row, length in enumerate(lengths.tolist()):
        alone = model(ids[row : row + 1, :length])
        torch.testing.assert_close(alone.output[0], found.output[row])
        assert alone.extras["exit_layer"] == found.extras["exit_layer"][row]
        if alone.extras["exit_layer"] == 4:
            torch.testing.assert_close(alone.output, whole(ids[row : row + 1, :length]).output)


def test_tokens_of_an_encoder_without_a_pool_leave_alone():
    model = encoder("gated_linear", pool="none", stack={"exits": (1, 2), "exit_threshold": 0.45}).eval()
    found = model(random_ids(4, 9), context=Context(mask=Mask(lengths=torch.tensor([9, 3, 0, 1]))))
    assert found.output.shape == (4, 9, 3)
    assert found.extras["exit_layer"].shape == (4, 9)


def test_the_loss_weighs_exits_by_their_layers_and_trains_them():
    model = language_model("softmax", dropout=0.0, stack={"exits": (1, 3)}).train()
    ids = random_ids(2, 9)
    result = model(ids)
    assert [share for share, _ in result.extras["exits"]] == [1 / 4, 3 / 4]
    targets = ids[:, 1:]

    def nats(logits):
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())

    (_, first), (_, second) = result.extras["exits"]
    expected = (nats(first) + 3 * nats(second) + 4 * nats(result.output)) / 8
    torch.testing.assert_close(model.loss(ids), expected)
    torch.testing.assert_close(joint_loss(result, nats), expected)
    model.loss(ids).backward()
    assert all(float(norm.weight.grad.abs().sum()) > 0 for norm in model.exit_norms)


@pytest.mark.parametrize("kind", [{"reversible": True}, {"checkpoint_layers": 2}])
def test_under_autocast_weights_and_gradients_stay_float32_and_agree(kind):
    torch.manual_seed(int(torch.randint(1000, ())))
    plain = language_model("softmax", dropout=0.0, stack={"reversible": "reversible" in kind}).float().train()
    model = copy.deepcopy(plain) if "reversible" in kind else like(plain, **kind).float().train()
    if "reversible" in kind:
        plain.blocks.run = TwoStreams(plain.blocks)
    ids, found = random_ids(4, 16), []
    for one in (plain, model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = one.loss(ids)
        loss.backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in one.parameters())
        found.append(torch.cat([p.grad.flatten() for p in one.parameters()]))
    cosine = nn.functional.cosine_similarity(*found, dim=0)
    assert cosine > 0.99, "bfloat16 rounds either way, but the same function is differentiated"


@pytest.mark.parametrize(
    "stack",
    [
        {"share": "norms"},
        {"share": "all", "share_groups": 3},
        {"reversible": True, "checkpoint_layers": 2},
        {"stochastic_depth": 1.0},
        {"checkpoint_layers": -1},
        {"exits": (0,)},
        {"exits": (4,)},
        {"exits": (2, 1)},
        {"exit_threshold": 0.5},
        {"exits": (1,), "exit_threshold": 1.5},
        {"depth": 3},
        {"reversible": "yes"},
        {"checkpoint_layers": 1.5},
        {"exits": 1},
        {"layer_scale": -0.1},
        {"layer_scale": float("nan")},
        {"layer_scale": True},
        {"branch_norm": "attention"},
    ],
)
def test_bad_options_are_refused(stack):
    with pytest.raises(Unsupported):
        language_model("softmax", stack=stack)


def test_layers_that_cannot_share_or_be_repeated_are_refused():
    with pytest.raises(Unsupported, match="share their all"):
        language_model(["softmax", "linear"], stack={"share": "all"})
    with pytest.raises(Unsupported, match="different widths"):
        language_model([("softmax", {"feed_forward": 8}), "softmax"], stack={"share": "feed_forward"})
    with pytest.raises(Unsupported, match="redraw"):
        language_model("performer", stack={"reversible": True})
    language_model([("performer", {"redraw": 0})] * 2, stack={"reversible": True})
    with pytest.raises(Unsupported, match="forecaster"):
        ForecasterConfig(2, 3, stack={"exits": (1,)})
    with pytest.raises(Unsupported, match="branch_norm='mixer' in a model with norm='none'"):
        language_model("softmax", norm="none", stack={"branch_norm": "mixer"})
    with pytest.raises(Unsupported, match="leave early"):
        encoder(stack=LEAVING).eval()(random_ids(2, 5), context=Context(want=frozenset({"weights"})))


def test_tokens_that_leave_have_the_gradients_of_kept_layers_when_checkpointed():
    ids, found = random_ids(2, 10), []
    model = let_half_leave(language_model("gated_linear", dropout=0.0, stack={"exits": (1, 2)}), ids)
    stack = dataclasses.asdict(model.config.stack)
    for layers in (0, 1):
        twin = like(model, **stack | {"checkpoint_layers": layers}).eval()
        twin(ids).output.square().sum().backward()
        found.append({name: p.grad for name, p in twin.named_parameters()})
    assert_same(*found)
