"""The attention monitor: its numbers, and monitored runs."""

import json
from types import SimpleNamespace

import pytest
import torch
from command_line import answer, run
from support import close, refused

from regard.measurement.budget import Budget
from regard.models import Encoder, EncoderConfig, LanguageModel, LanguageModelConfig
from regard.tasks import Batch, create_task
from regard.workbench.comparison.settings import CompareSettings
from regard.workbench.trained.attention_monitor import AttentionMonitor, attention_shares, snapped
from regard.workbench.trained.run import train_model

RECALL = {"pairs": 3, "queries": 4, "length": 14, "vocab_size": 8, "evaluation_items": 16}


@pytest.fixture
def recall():
    return create_task("recall", **RECALL)


def model_of(task, plan):
    return LanguageModel(LanguageModelConfig(task.vocab_size, dim=16, plan=plan, num_heads=2, positions="none"))


def test_shares_are_of_positive_weights_and_0_for_a_query_without_any():
    weights = torch.tensor([[3.0, -1.0, 1.0], [0.0, 0.0, 0.0], [-2.0, -1.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[0.75, 0.0, 0.25], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    close(attention_shares(weights), expected)


def test_equal_weights_have_entropy_and_lift_1(recall):
    model, monitor = model_of(recall, ["softmax"]), AttentionMonitor(recall)
    torch.nn.init.zeros_(model.blocks[0].mixer.query.weight)
    monitor.look(model, 0)
    for head in monitor.as_record()["looks"][0]["heads"].values():
        assert head["entropy"] == pytest.approx(1, abs=1e-5)
        assert head["lift"] == [pytest.approx(1, abs=1e-4)] * len(monitor.names)


def test_a_head_that_looks_for_one_token_is_known_by_it(recall):
    model, monitor = model_of(recall, ["softmax"]), AttentionMonitor(recall)
    block, token = model.blocks[0], int(monitor.tokens[0])
    with torch.no_grad():
        model.embedding.weight.zero_()
        model.embedding.weight[:, 0] = 1
        model.embedding.weight[:, 1] = -1
        model.embedding.weight[token, 1] = 1  # distinguishes it from the others
        for weight in (block.mixer.query.weight, block.mixer.key.weight):
            weight.zero_()
        for row, sign in ((0, 3), (8, -3)):  # head 1 looks for it, head 2 for the others
            block.mixer.query.weight[row, 0], block.mixer.key.weight[row, 1] = sign, 1
    monitor.look(model, 0)
    first, second = monitor.heads()
    name = monitor.names[0]
    assert first["looks at"].split()[0] == name and second["looks away from"].split()[0] == name
    assert first["entropy at last"] < 0.7


def test_how_fast_attention_moves_is_told_and_stops_with_the_weights(recall):
    model, monitor = model_of(recall, ["softmax"]), AttentionMonitor(recall)
    monitor.look(model, 0)
    for step in (2, 4):
        torch.nn.init.normal_(model.blocks[0].mixer.query.weight)
        monitor.look(model, step)
    for step in (6, 8):
        monitor.look(model, step)
    changes = [look["heads"]["0.0"]["change"] for look in monitor.as_record()["looks"]]
    assert changes[0] is None and changes[1] > 0.05 and changes[2] > 0.05 and changes[3:] == [0, 0]
    assert monitor.heads()[0]["snapped after step"] == 6


def test_layers_without_weights_are_left_out_and_models_without_any_are_refused(recall):
    monitor = AttentionMonitor(recall)
    mixed = model_of(recall, ["gated_linear", "softmax", "sigmoid"])
    monitor.check(mixed)
    monitor.look(mixed, 0)
    assert list(monitor.as_record()["looks"][0]["heads"]) == ["0.0", "0.1", "1.0", "1.1"]
    assert all(0 < row["entropy at last"] <= 1 for row in monitor.heads())
    refused("without attention weights", monitor.check, model_of(recall, ["gated_linear"]))
    features = Batch(torch.randn(2, 5, 3), torch.zeros(2, dtype=torch.int64))
    refused(
        "read tokens", AttentionMonitor, SimpleNamespace(name="shapes", evaluation_batches=lambda _: iter([features]))
    )


def test_padding_is_neither_looked_at_nor_counted():
    task = create_task("listops", length=64, evaluation_items=8)
    monitor = AttentionMonitor(task, items=4)
    batch = next(iter(task.evaluation_batches(4)))
    counts = batch.inputs[batch.valid].bincount()
    assert not bool(batch.valid.all()) and monitor.names[0] == str(int(counts.argmax()))
    assert int(monitor.valid.sum()) == int(batch.valid.sum())
    model = Encoder(EncoderConfig(num_classes=10, vocab_size=task.vocab_size, dim=16, plan=["softmax"], num_heads=2))
    torch.nn.init.zeros_(model.blocks[0].mixer.query.weight)
    monitor.look(model, 0)
    for head in monitor.as_record()["looks"][0]["heads"].values():
        assert head["entropy"] == pytest.approx(1, abs=1e-5)
        assert head["lift"] == [pytest.approx(1, abs=1e-4)] * len(monitor.names)


def settings(**changes):
    small = {"mechanisms": ("softmax",), "budget": Budget.parse("24 steps"), "dim": 16, "layers": 1, "heads": 2}
    small |= {"seeds": 1, "frames": ("bare",), "rates": (1e-2,), "lengths": (14,), "batch_tokens": 56}
    return CompareSettings(**(small | changes))


def test_a_watched_run_ends_in_the_same_weights_and_goes_on_where_it_was_stopped(recall, tmp_path):
    alone = train_model(recall, settings(), tmp_path / "alone", best_of=0)

    def stop(point, total, left):
        if point.step == 9:
            raise KeyboardInterrupt

    folder = tmp_path / "watched"
    file = folder / "attention.json"
    with pytest.raises(KeyboardInterrupt):
        train_model(recall, settings(), folder, best_of=0, monitor=AttentionMonitor(recall, path=file), on_step=stop)
    before = json.loads(file.read_text())["looks"]
    assert before[0]["step"] == 0 and before[-1]["step"] <= 10
    monitor = AttentionMonitor(recall, path=file)
    watched = train_model(recall, settings(), folder, best_of=0, monitor=monitor)
    steps = [look["step"] for look in json.loads(file.read_text())["looks"]]
    assert steps == sorted(monitor.due(24)) and max(steps) == 24
    assert monitor.as_record()["looks"][0]["heads"] == before[0]["heads"]
    expected = alone.model().state_dict()
    for name, tensor in watched.model().state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_the_command_writes_a_page(capsys, tmp_path):
    task = "--task recall:pairs=3,queries=4,length=14,vocab_size=8,evaluation_items=16"
    sizes = '--dim 16 --layers 1 --heads 2 --batch-tokens 56 --budget "24 steps" --best-of 0'
    told = answer(capsys, f"train {task} {sizes} --monitor attention --output", tmp_path / "a")
    assert [row["head"] for row in told["attention"]["heads"]] == ["0.0", "0.1"]
    page = (tmp_path / "a" / "attention.html").read_text()
    assert "When attention settles" in page and page.count("<svg") == 6
    assert "What gradient flow would conserve" in page and {row["layer"] for row in told["attention"]["laws"]} == {0}
    for options, words in (
        ("--monitor loss", "attention"),
        ("--monitor attention --mechanism linear", "without attention weights"),
    ):
        code, _, said = run(capsys, f"train {task} {sizes} {options} --output", tmp_path / "b")
        assert code == 2 and words in " ".join(said.split())
        assert not (tmp_path / "b").exists()


def test_snapping_is_the_last_fall_below_a_tenth():
    assert snapped([0, 1, 10, 2, 0.5, 3, 0.9, 0.1]) == 6
    assert snapped([1, 2, 3]) is None and snapped([0, 0]) is None and snapped([]) is None
