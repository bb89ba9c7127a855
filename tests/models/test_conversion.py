"""Trained models made others: other layers with the same weights, and more learned positions."""

from __future__ import annotations

import pytest
import torch

from regard.contract import Context, Unsupported
from regard.models import (
    Encoder,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    LanguageModel,
    LanguageModelConfig,
    change_plan,
    extend_positions,
    from_pretrained,
    masformer_plan,
    masformer_schedule,
    save_pretrained,
)
from regard.positions import Learned
from regard.training import make_optimizer, parameter_groups

WANT_STATE = Context(want=frozenset({"state"}))


def model(plan="softmax", **options) -> LanguageModel:
    sizes = {"vocab_size": 11, "dim": 16, "num_heads": 2, "num_layers": 3} | options
    return LanguageModel(LanguageModelConfig(plan=plan, **sizes)).double().eval()


def learned(length: int = 8, **options) -> LanguageModel:
    return model(positions="learned", max_length=length, **options)


@pytest.mark.parametrize("stack", [{}, {"share": "mixer", "share_groups": 1}])
def test_another_plan_is_another_function_of_the_same_parameters(stack, tmp_path):
    changed, plan = model(stack=stack), ["local"] * 3 if stack else masformer_plan(3, "bottom:1", block=3)
    fresh = model(plan, stack=stack)
    fresh.load_state_dict(changed.state_dict())
    ids, before = torch.randint(11, (2, 15)), dict(changed.named_parameters())
    before["blocks.0.mixer.query.weight"].requires_grad_(False)
    full, random_state = changed(ids).output, torch.random.get_rng_state()
    change_plan(changed, plan)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    after = dict(changed.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert [name for name, p in after.items() if not p.requires_grad] == ["blocks.0.mixer.query.weight"]
    assert not changed.training and not any(module.training for module in changed.modules())
    assert torch.equal(changed(ids).output, fresh(ids).output)
    assert stack or not torch.allclose(changed(ids).output, full)
    save_pretrained(changed, tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(ids).output, changed(ids).output)


def test_an_encoder_takes_another_plan_and_the_positions_that_it_needs():
    sizes = {"num_classes": 3, "vocab_size": 11, "dim": 16, "num_heads": 2}
    encoder = Encoder(EncoderConfig(plan=["softmax", "softmax"], **sizes)).double().eval()
    plan = [("softmax", {"positions": "alibi"}), ("local", {"window": 3})]
    expected = Encoder(EncoderConfig(plan=plan, **sizes)).double().eval()
    expected.load_state_dict(encoder.state_dict())
    change_plan(encoder, plan)
    ids = torch.randint(11, (2, 9))
    assert torch.equal(encoder(ids).output, expected(ids).output)


def test_a_schedule_removes_full_layers_one_by_one_while_one_optimizer_goes_on():
    trained, ids = model(), torch.randint(11, (2, 15))
    schedule = masformer_schedule(3, "bottom:1", 9, block=3)
    assert [step for step, _ in schedule] == [0, 3, 6]
    names = [[name[0] for name, _ in plan] for _, plan in schedule]
    assert names == [["s", "s", "s"], ["s", "s", "l"], ["s", "l", "l"]]
    assert schedule[-1][1] == masformer_plan(3, "bottom:1", block=3)
    assert [step for step, _ in masformer_schedule(5, [4], 2)] == [0, 0, 0, 1, 1]
    plans, losses = dict(schedule), []
    optimizer = make_optimizer(trained, learning_rate=1e-2, weight_decay=0.0)
    for step in range(9):
        if step in plans:
            change_plan(trained, plans[step])
        optimizer.zero_grad()
        loss = trained.loss(ids)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert [name for name, _ in trained.config.plan] == ["softmax", "local", "local"]
    assert losses[-1] < losses[0] - 0.5
    assert all(optimizer.state[p]["step"] == 9 for p in trained.parameters())


def test_plans_of_other_parameters_are_refused_and_change_nothing():
    kept = model()
    before = kept.state_dict(keep_vars=True)
    for plan, message in (
        (["softmax", "gated_linear", "softmax"], "another blocks.1.mixer"),
        ([("softmax", {"num_kv_heads": 1}), "softmax", "softmax"], "another blocks.0.mixer.key.weight"),
        (["softmax"] * 2, "num_layers=3"),
        (["landmark", "softmax", "softmax"], "another embedding.weight"),
    ):
        with pytest.raises(Unsupported, match=message):
            change_plan(kept, plan)
    assert all(tensor is before[name] for name, tensor in kept.state_dict(keep_vars=True).items())
    landmarks = model(["landmark", "softmax", "softmax"])
    with pytest.raises(Unsupported, match="insert other tokens"):
        change_plan(landmarks, [("landmark", {"block": 3}), "softmax", "softmax"])
    with pytest.raises(Unsupported, match="LanguageModel, Encoder"):
        change_plan(torch.nn.Linear(2, 2), "softmax")


@pytest.mark.parametrize("how", ["tile", "interpolate"])
def test_a_longer_model_reads_decodes_and_comes_back_from_disk_beyond_its_old_length(how, tmp_path):
    longer, ids = learned(8), torch.randint(11, (2, 21))
    with pytest.raises(Unsupported, match="0 to max_length - 1 = 7"):
        longer(ids)
    assert extend_positions(longer, 24, how) == ("positions",)
    assert longer.config.max_length == 24
    whole = longer(ids).output
    state, outputs = None, []
    for part in ids.split([6, 1, 1, 1, 12], 1):
        result = longer(part, state=state, context=WANT_STATE)
        state = result.state
        outputs.append(result.output)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=0, atol=1e-12)
    save_pretrained(longer, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).output, whole)
    with pytest.raises(Unsupported, match="0 to max_length - 1 = 23"):
        longer(torch.randint(11, (1, 25)))


def test_a_tiled_table_leaves_old_positions_as_they_were_and_repeats_them():
    longer, ids = learned(8), torch.randint(11, (2, 8))
    before, table = longer(ids).output, longer.positions.table.detach().clone()
    extend_positions(longer, 20)
    assert torch.equal(longer(ids).output, before)
    assert torch.equal(longer.positions.table.detach(), torch.cat([table, table, table[:4]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_interpolated_table_keeps_its_ends_and_lies_on_lines_between_its_rows(dtype):
    scheme = Learned(dim=3, max_length=5).to(dtype)
    table = scheme.table.detach().double()
    scheme.extend(13, "interpolate")
    found = scheme.table.detach()
    assert found.dtype == dtype and scheme.max_length == 13
    expected = torch.stack(
        [table[i // 3] + (i % 3) / 3 * (table[min(i // 3 + 1, 4)] - table[i // 3]) for i in range(13)]
    )
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-15 if dtype == torch.float64 else 1e-3)
    assert torch.equal(found[[0, -1]].double(), table[[0, -1]])


def test_a_table_extended_before_its_training_is_that_of_a_converted_model():
    """Positions first, then the layers, or the other way round: what MASFormer asks for before long sequences."""
    one, ids = learned(8), torch.randint(11, (2, 30))
    other = learned(8)
    other.load_state_dict(one.state_dict())
    plan = masformer_plan(3, "bottom:1", block=4)
    change_plan(one, plan)
    with pytest.raises(Unsupported, match="a table extended to it"):
        one.loss(ids)
    extend_positions(one, 30)
    extend_positions(other, 30)
    change_plan(other, plan)
    assert one.config == other.config
    assert torch.equal(one(ids).output, other(ids).output)
    one.loss(ids).backward()
    assert (one.positions.table.grad.abs().sum(-1)[:29] > 0).all()


def test_longer_tables_train_and_decay_as_before():
    longer = learned(8)
    longer.positions.table.requires_grad_(False)
    extend_positions(longer, 9)
    assert not longer.positions.table.requires_grad
    longer.positions.table.requires_grad_(True)
    kept = next(group for group in parameter_groups(longer, 0.1) if group["weight_decay"] == 0)
    assert any(p is longer.positions.table for p in kept["params"])


def test_both_sides_of_an_encoder_decoder_are_lengthened():
    sizes = {"vocab_size": 11, "memory_vocab_size": 7, "dim": 16, "num_heads": 2}
    config = EncoderDecoderConfig(positions="learned", max_length=4, **sizes)
    longer = EncoderDecoder(config).double().eval()
    assert set(extend_positions(longer, 9)) == {"memory_positions", "positions"}
    found = longer(torch.randint(11, (2, 9)), torch.randint(7, (2, 9))).output
    assert found.isfinite().all()


def test_what_cannot_be_lengthened_is_refused():
    with pytest.raises(Unsupported, match="sinusoidal and rotary positions have no end"):
        extend_positions(model(), 4000)
    for length, how, message in ((8, "tile", "a greater length"), (9, "stretch", "tile, interpolate")):
        fixed = learned(8)
        with pytest.raises(Unsupported, match=message):
            extend_positions(fixed, length, how)
        assert fixed.config.max_length == fixed.positions.max_length == 8
