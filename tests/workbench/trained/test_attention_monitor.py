"""The attention monitor: its numbers, and monitored runs."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from command_line import answer, run
from support import close, refused

from regard.contract import Context, Mask
from regard.measurement.budget import Budget
from regard.models import Encoder, EncoderConfig, LanguageModel, LanguageModelConfig
from regard.tasks import Batch, create_task
from regard.workbench.comparison.settings import CompareSettings
from regard.workbench.trained.attention_monitor import AttentionMonitor, attention_shares, snapped
from regard.workbench.trained.conservation import ConservationMonitor
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
    assert list(monitor.as_record()["looks"][0]["heads"]) == ["1.0", "1.1", "2.0", "2.1"]
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


def told(monitor, model):
    monitor.look(model, 0)
    return monitor.as_record()["looks"][-1]["heads"]


@pytest.mark.parametrize(
    "mechanism", [("clipped_softmax", {"gamma": -0.3}), "hard_softmax", ("local", {"window": 2}), "softmax"]
)
@pytest.mark.parametrize("name", ["recall", "listops"])
def test_entropy_and_lift_are_over_all_keys_that_masks_let_a_query_see(recall, mechanism, name):
    task = recall if name == "recall" else create_task("listops", length=24, evaluation_items=8)
    monitor = AttentionMonitor(task, items=4)
    if name == "recall":
        model = model_of(task, [mechanism])
    else:
        sizes = {"dim": 16, "plan": [mechanism], "num_heads": 2}
        model = Encoder(EncoderConfig(num_classes=10, vocab_size=task.vocab_size, **sizes))
    layer = model.blocks[0].mixer
    for weight in (layer.query.weight, layer.key.weight):
        torch.nn.init.normal_(weight)
    batch = next(iter(task.evaluation_batches(4)))
    context = Context(mask=None if batch.valid is None else Mask(valid=batch.valid), want=frozenset({"weights"}))
    (weights,) = model.eval()(batch.inputs, context=context).extras["weights"]
    heads = told(monitor, model)
    for head in range(2):
        entropies, given, equal = [], torch.zeros(100), torch.zeros(100)
        for row, ids in enumerate(monitor.ids):
            n = len(ids) if batch.valid is None else int(batch.valid[row].sum())
            for query in range(n):
                sees = ids[: query + 1] if name == "recall" else ids[:n]
                w = weights[row, head, query, : len(sees)].detach().double()
                if w.sum() == 0:
                    continue
                w = w / w.sum()
                if len(sees) > 1:
                    entropies.append(float(-(w * w.clamp(min=1e-300).log()).sum()) / math.log(len(sees)))
                given.index_add_(0, sees, w.float())
                equal.index_add_(0, sees, torch.full((len(sees),), 1 / len(sees)))
        found = heads[f"0.{head}"]
        assert found["entropy"] == pytest.approx(sum(entropies) / len(entropies), abs=1e-5)
        expected = (given / given.sum())[monitor.tokens] / (equal / equal.sum())[monitor.tokens]
        assert found["lift"] == pytest.approx(expected.tolist(), abs=1e-4)


def test_heads_and_laws_are_numbered_by_the_layers_of_the_model(recall):
    model, monitor = model_of(recall, ["gated_linear", "mamba2", "softmax"]), AttentionMonitor(recall)
    assert list(told(monitor, model)) == ["2.0", "2.1"]
    laws = ConservationMonitor(recall)
    laws.check(model)
    assert {row["layer"] for row in laws.laws.rows([])} >= {2} and 1 not in {row["layer"] for row in laws.laws.rows([])}
    assert {row["layer"] for row in monitor.laws.rows([])} == {2}


def test_a_model_that_inserts_tokens_is_refused(recall):
    words = "without attention weights between the tokens that it reads"
    refused(words, AttentionMonitor(recall).check, model_of(recall, [("landmark", {"block": 4}), "softmax"]))
    refused("without attention weights; supported", AttentionMonitor(recall).check, model_of(recall, ["mamba2"]))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_tokens_of_a_task_that_no_text_has_are_named_by_number(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("a cat sat on a mat, and a rat ran past it. " * 80)
    task = create_task("masked", data=str(tmp_path / "text.txt"), length=32, tokenizer=tokenizer)
    names = AttentionMonitor(task).names
    assert sum(name.startswith("[") and name[1:-1].isdecimal() for name in names) == 1 and all(names)


def test_all_weight_on_one_key_has_entropy_0(recall):
    model, monitor = model_of(recall, [("local", {"window": 1})]), AttentionMonitor(recall)
    for head in told(monitor, model).values():
        assert head["entropy"] == pytest.approx(0, abs=1e-6)
        assert max(head["lift"]) > 1 > min(head["lift"])


def test_a_head_whose_weights_are_all_clipped_has_no_entropy_and_no_lift_and_does_not_change():
    task = create_task("listops", length=24, evaluation_items=8)
    sizes = {"vocab_size": task.vocab_size, "dim": 16, "num_heads": 2}
    model = Encoder(EncoderConfig(num_classes=10, plan=[("clipped_softmax", {"gamma": -1e6})], **sizes))
    torch.nn.init.zeros_(model.blocks[0].mixer.query.weight)
    monitor = AttentionMonitor(task)
    monitor.look(model, 0)
    monitor.look(model, 2)
    for head in monitor.as_record()["looks"][1]["heads"].values():
        assert head["entropy"] is None and set(head["lift"]) == {None} and head["change"] == 0


@pytest.mark.parametrize("rule", ["confidence:0.05", "confidence:0.13", "layer:1", "halting:0.9"])
@pytest.mark.parametrize("reads", ["classes", "tokens"])
def test_models_with_early_exits_are_looked_at_with_all_layers(rule, reads, recall):
    task = recall if reads == "tokens" else create_task("listops", length=24, evaluation_items=8)
    sizes = {"vocab_size": task.vocab_size, "dim": 16, "plan": ["softmax"] * 3, "num_heads": 2}

    def model(**stack):
        if reads == "tokens":
            return LanguageModel(LanguageModelConfig(stack=stack, **sizes))
        return Encoder(EncoderConfig(num_classes=10, stack=stack, **sizes))

    early, plain = model(exits=(1, 2), exit_rule=rule), model()
    plain.load_state_dict(early.state_dict(), strict=False)
    assert told(AttentionMonitor(task), early) == told(AttentionMonitor(task), plain)
    assert early.config.stack.exit_rule == early.blocks.config.exit_rule == rule


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
    whole = AttentionMonitor(recall)
    train_model(recall, settings(), tmp_path / "whole", best_of=0, monitor=whole)
    unknown = set()
    for one, other in zip(monitor.as_record()["looks"], whole.as_record()["looks"], strict=True):
        for name, head in other["heads"].items():
            told = dict(one["heads"][name])
            if told["change"] is None and head["change"] is not None:
                unknown.add(one["step"])
                told["change"] = head["change"]
            assert told == head
        assert one["laws"] == other["laws"]
    assert unknown == {min(step for step in steps if step > before[-1]["step"])}
    assert all(row["snapped after step"] not in unknown for row in monitor.heads())
    expected = alone.model().state_dict()
    for name, tensor in watched.model().state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_change_that_was_seen_before_a_run_was_stopped_stays_known(recall, tmp_path):
    model, file = model_of(recall, ["softmax"]), tmp_path / "attention.json"
    first = AttentionMonitor(recall, path=file)
    for step in (0, 1, 2):
        first.look(model, step)
        torch.nn.init.normal_(model.blocks[0].mixer.query.weight)
    known = first.as_record()["looks"]
    again = AttentionMonitor(recall, path=file)
    again.look(model, 2)
    found = again.as_record()["looks"][2]["heads"]
    assert [head["change"] for head in found.values()] == [head["change"] for head in known[2]["heads"].values()]
    again.look(model, 3)
    assert all(head["change"] == 0 for head in again.as_record()["looks"][3]["heads"].values())


def test_the_command_writes_a_page(capsys, tmp_path):
    task = "--task recall:pairs=3,queries=4,length=14,vocab_size=8,evaluation_items=16"
    sizes = '--dim 16 --layers 1 --heads 2 --batch-tokens 56 --budget "24 steps" --best-of 0'
    told = answer(capsys, f"train {task} {sizes} --monitor attention --output", tmp_path / "a")
    assert [row["head"] for row in told["attention"]["heads"]] == ["0.0", "0.1"]
    page = (tmp_path / "a" / "attention.html").read_text()
    assert "When attention settles" in page and page.count("<svg") == 6
    assert "What gradient flow would conserve" in page and {row["layer"] for row in told["attention"]["laws"]} == {0}
    again = f"train {task} {sizes} --monitor attention --output {tmp_path / 'a'}"
    assert answer(capsys, again)["attention"]["heads"] == told["attention"]["heads"]
    code, _, said = run(capsys, again.replace("attention", "conservation"))
    assert code == 2 and "which has ended and was not monitored" in " ".join(said.split())
    assert not (tmp_path / "a" / "conservation.html").exists()
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
