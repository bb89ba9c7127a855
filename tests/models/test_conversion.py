"""Converting trained models: other layers with the same weights, and more learned positions."""

from __future__ import annotations

import pytest
import torch
from model_checks import check_comes_back_from_disk, made
from support import read_in_pieces

from regard.contract import Unsupported
from regard.models import LanguageModel, change_plan, extend_positions, masformer_plan, masformer_schedule
from regard.positions import Learned
from regard.training import make_optimizer, parameter_groups


def model(plan="softmax", **options) -> LanguageModel:
    return made("language model", plan=plan, **options)


def three(**options) -> LanguageModel:
    """A model with three softmax layers."""
    return model(num_layers=3, **options)


def learned(length: int = 8) -> LanguageModel:
    return three(positions="learned", max_length=length)


@pytest.mark.parametrize("stack", [{}, {"share": "mixer", "share_groups": 1}])
def test_another_plan_is_another_function_of_the_same_parameters(stack, tmp_path):
    changed, plan = three(stack=stack), ["local"] * 3 if stack else masformer_plan(3, "bottom:1", block=3)
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
    check_comes_back_from_disk(changed, (ids,), tmp_path)


def test_an_encoder_takes_another_plan_and_the_positions_that_it_needs():
    plan = [("softmax", {"positions": "alibi"}), ("local", {"window": 3})]
    words = {"features": None, "vocab_size": 11}
    encoder, expected = made("encoder", plan=["softmax"] * 2, **words), made("encoder", plan=plan, **words)
    expected.load_state_dict(encoder.state_dict())
    change_plan(encoder, plan)
    ids = torch.randint(11, (2, 9))
    assert torch.equal(encoder(ids).output, expected(ids).output)


def test_a_schedule_removes_full_layers_one_by_one_while_one_optimizer_goes_on():
    schedule = masformer_schedule(3, "bottom:1", 9, block=3)
    assert ["".join(name[0] for name, _ in plan) for _, plan in schedule] == ["sss", "ssl", "sll"]
    assert [step for step, _ in schedule] == [0, 3, 6] and schedule[-1][1] == masformer_plan(3, "bottom:1", block=3)
    assert [step for step, _ in masformer_schedule(5, [4], 2)] == [0, 0, 0, 1, 1]
    trained, ids, losses = three(), torch.randint(11, (2, 15)), []
    optimizer = make_optimizer(trained, learning_rate=1e-2, weight_decay=0.0)
    for step in range(9):
        change_plan(trained, dict(schedule).get(step, trained.config.plan))
        optimizer.zero_grad()
        losses.append(trained.loss(ids))
        losses[-1].backward()
        optimizer.step()
    assert [name for name, _ in trained.config.plan] == ["softmax", "local", "local"]
    assert losses[-1] < losses[0] - 0.5
    assert all(optimizer.state[p]["step"] == 9 for p in trained.parameters())


def test_plans_of_other_parameters_are_refused_and_change_nothing():
    kept, landmarks = three(), model(["landmark", "softmax", "softmax"])
    before = kept.state_dict(keep_vars=True)
    for changed, plan, message in (
        (kept, ["softmax", "gated_linear", "softmax"], "another blocks.1.mixer"),
        (kept, [("softmax", {"num_kv_heads": 1}), "softmax", "softmax"], "another blocks.0.mixer.key.weight"),
        (kept, ["softmax"] * 2, "num_layers=3"),
        (kept, ["landmark", "softmax", "softmax"], "another embedding.weight"),
        (landmarks, [("landmark", {"block": 3}), "softmax", "softmax"], "insert other tokens"),
        (torch.nn.Linear(2, 2), "softmax", "LanguageModel, Encoder"),
    ):
        with pytest.raises(Unsupported, match=message):
            change_plan(changed, plan)
    assert all(tensor is before[name] for name, tensor in kept.state_dict(keep_vars=True).items())


@pytest.mark.parametrize("how", ["tile", "interpolate"])
def test_a_longer_model_reads_decodes_and_comes_back_from_disk_beyond_its_old_length(how, tmp_path):
    longer, ids = learned(8), torch.randint(11, (2, 21))
    with pytest.raises(Unsupported, match="0 to max_length - 1 = 7"):
        longer(ids)
    assert extend_positions(longer, 24, how) == ("positions",)
    assert longer.config.max_length == 24
    output, _ = read_in_pieces(longer, ids, [6, 1, 1, 1, 12])
    torch.testing.assert_close(output, longer(ids).output, rtol=0, atol=1e-12)
    check_comes_back_from_disk(longer, (ids,), tmp_path)
    with pytest.raises(Unsupported, match="0 to max_length - 1 = 23"):
        longer(torch.randint(11, (1, 25)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_tiled_table_is_repeated_and_an_interpolated_one_lies_on_lines_between_its_rows(dtype):
    tiled, interpolated = (Learned(dim=3, max_length=5).to(dtype) for _ in range(2))
    old, ends = tiled.table.detach().clone(), interpolated.table.detach().double()
    tiled.extend(13)
    interpolated.extend(13, "interpolate")
    assert torch.equal(tiled.table.detach(), old.repeat(3, 1)[:13])
    found = interpolated.table.detach()
    assert found.dtype == dtype and interpolated.max_length == 13
    share = torch.arange(13, dtype=torch.float64)[:, None] % 3 / 3
    first, second = torch.arange(13) // 3, (torch.arange(13) // 3 + 1).clamp(max=4)
    expected = ends[first] + share * (ends[second] - ends[first])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-15 if dtype == torch.float64 else 1e-3)
    assert torch.equal(found[[0, -1]].double(), ends[[0, -1]])


def test_a_table_extended_before_its_training_is_that_of_a_converted_model():
    """Positions first and then layers, or vice versa: the conversion of MASFormer for long sequences."""
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


def test_longer_tables_are_frozen_as_before_and_do_not_decay():
    longer = learned(8)
    longer.positions.table.requires_grad_(False)
    extend_positions(longer, 9)
    assert not longer.positions.table.requires_grad
    longer.positions.table.requires_grad_(True)
    decay = {id(p): group["weight_decay"] for group in parameter_groups(longer, 0.1) for p in group["params"]}
    assert decay[id(longer.positions.table)] == 0


def test_both_sides_of_an_encoder_decoder_are_lengthened():
    longer = made("encoder-decoder", positions="learned", max_length=4, num_layers=1)
    assert set(extend_positions(longer, 9)) == {"memory_positions", "positions"}
    assert longer(torch.randint(11, (2, 9)), torch.randint(9, (2, 9))).output.isfinite().all()


def test_what_cannot_be_lengthened_is_refused():
    with pytest.raises(Unsupported, match="sinusoidal and rotary positions have no end"):
        extend_positions(model(), 4000)
    for length, how, message in ((8, "tile", "a greater length"), (9, "stretch", "tile, interpolate")):
        fixed = learned(8)
        with pytest.raises(Unsupported, match=message):
            extend_positions(fixed, length, how)
        assert fixed.config.max_length == fixed.positions.max_length == 8
