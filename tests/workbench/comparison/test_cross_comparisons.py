"""Comparisons on tasks with a memory, end to end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from regard.cli.arguments import read_mechanisms
from regard.contract import Pattern, Unsupported
from regard.measurement.budget import Budget
from regard.measurement.store import Store
from regard.models import EncoderDecoder, EncoderDecoderConfig, Forecaster, ForecasterConfig, from_pretrained
from regard.models import count_parameters as count
from regard.models.variants import read_variant
from regard.tasks import Baseline, Batch, Task, absolute_error, counter_generator, create_task, squared_error_by_item
from regard.training import TrainConfig, evaluate, train
from regard.workbench.comparison.compare import compare
from regard.workbench.comparison.settings import CompareSettings
from regard.workbench.comparison.task_models import build, model_config
from regard.workbench.comparison.work import Work

MECHANISMS = ("softmax", "linear")


class Recite(Task):
    """Repeat the memory's tokens in order."""

    name, pattern, objective = "recite", Pattern.CAUSAL_CROSS, "next-token"
    length, memory_length, vocab_size, memory_vocab_size = 4, 4, 6, 5
    generates, metric = 4, "tokens right"

    def training_batch(self, step, seed, batch_size):
        memory = torch.from_numpy(counter_generator(seed, step).integers(0, 5, (batch_size, 4)))
        inputs = torch.cat([torch.full((batch_size, 1), 5), memory[:, :-1]], 1)
        return Batch(inputs, memory, memory=memory)

    def evaluation_batches(self, batch_size):
        yield self.training_batch(0, 99, 16)

    def score_generated(self, tokens, batch):
        right = (tokens == batch.targets).sum(1)
        return right.double(), torch.full((len(right),), 4.0).double()

    def describe(self):
        return "made up"


class Carry(Task):
    """Carry the last level of the past, in the thousands, to each point of the horizon."""

    name, pattern, objective = "carry", Pattern.NONCAUSAL_CROSS, "regression"
    length, memory_length, features, memory_features, num_targets = 3, 6, 1, 2, 1
    target_features, metric, higher_is_better = (1,), "MAE", False

    def training_batch(self, step, seed, batch_size):
        rng = counter_generator(seed, step)
        past = torch.from_numpy(rng.normal(3000, 500, (batch_size, 6, 2))).float()
        known = torch.from_numpy(rng.normal(size=(batch_size, 3, 1))).float()
        return Batch(known, past[:, -1:, 1:].expand(-1, 3, -1).contiguous(), memory=past)

    def evaluation_batches(self, batch_size):
        yield self.training_batch(0, 99, 16)

    def score(self, output, batch):
        return absolute_error(output, batch)

    def describe(self):
        return "made up"


TASKS = {
    "listops": lambda: create_task("listops", evaluation_items=8, length=32),
    "images": lambda: create_task("images", evaluation_items=8),
    "recall": lambda: create_task("recall", evaluation_items=8, length=16, pairs=2, queries=4),
    "recite": Recite,
    "carry": Carry,
}


def settings(**changes):
    small = {"dim": 16, "layers": 1, "heads": 2, "seeds": 1, "batch_tokens": 64, "lengths": (16, 32), "at_length": 32}
    small |= {"frames": ("bare",), "rates": (1e-2,), "budget": Budget.parse("24 steps")}
    return CompareSettings(**{"mechanisms": MECHANISMS, **small, **changes})


def test_the_mechanism_is_put_between_the_sequences_alone():
    def config(name, task):
        return model_config(read_variant(name), task, settings(), "own")

    translation, forecast = config("linear", Recite()), config("sigmoid", Carry())
    assert isinstance(translation, EncoderDecoderConfig) and isinstance(forecast, ForecasterConfig)
    plans = (translation.encoder_plan, translation.decoder_plan, translation.cross_plan)
    assert [plan[0][0] for plan in plans] == ["softmax", "softmax", "linear"]
    assert (forecast.encoder_plan[0][0], forecast.target_features) == ("softmax", (1,))
    assert forecast.cross_plan == (("sigmoid", {"length": 6}),)
    assert config("token_parameter", Recite()).cross_plan == (("softmax", {"linear": "token_parameter"}),)


def test_a_comparison_of_both_kinds_measures_each_and_keeps_models(tmp_path):
    said: list[str] = []
    outcome = compare([Recite(), Carry()], settings(keep_models=True, seeds=2), tmp_path, say=said.append)
    assert any("4 + 4 tokens" in line for line in said) and any("6 + 3 tokens" in line for line in said)
    for task, decodes in (("recite", True), ("carry", False)):
        for entry in outcome.summary[task]:
            assert entry["mean"] is not None and entry["inference_ms"] > 0
            assert (entry["decode_tokens_per_second"] is not None) == decodes
            assert (entry["state_bytes"] is not None) == decodes
    means = [entry["mean"] for entry in outcome.summary["carry"]]
    assert means == sorted(means) and means[0] > 1
    assert outcome.recommendation.winner in MECHANISMS
    page = outcome.report.read_text()
    assert "length of the memory" in page and "low is up" in page
    models = {name: type(from_pretrained(folder)) for name, folder in outcome.models.items()}
    assert models == {"recite": EncoderDecoder, "carry": Forecaster}


def test_the_same_objective_has_costs_of_each_pattern_which_grow_with_the_memory_but_not_in_a_recurrence(tmp_path):
    recall = create_task("recall", length=16, pairs=2, queries=4, vocab_size=16, evaluation_items=16)
    outcome = compare([recall, Recite()], settings(lengths=(32, 256), at_length=256), tmp_path)
    with Store(outcome.store) as store:
        patterns = [row.payload["pattern"] for row in store.rows("cost")]
    assert sorted(patterns) == ["causal-cross"] * 2 + ["causal-self"] * 2
    for entries in outcome.summary.values():
        assert all(entry["inference_ms"] > 0 and entry["state_bytes"] > 0 for entry in entries)
    state = {e["mechanism"]: e["state_bytes"] for e in outcome.summary["recite"]}
    assert state["softmax"] > 256 * 2 * 16 * 4
    assert state["linear"] < state["softmax"] / 4


def carry_with_a_rule(items):
    task = Carry()
    task.baseline = Baseline("a rule", items)
    return task


@pytest.mark.parametrize(("error", "standing"), [(1e-3, "behind"), (1e6, "ahead")])
def test_a_rule_is_compared_on_the_items_that_are_the_result(tmp_path, error, standing):
    """The rule's errors on the four items that choose the learning rate do not count."""
    task = carry_with_a_rule(np.array([[3 * 12345.0, 3.0]] * 4 + [[3 * error, 3.0]] * 12))
    outcome = compare([task], settings(rates=(1e-3, 1e-2)), tmp_path)
    assert outcome.baselines == {"carry": {"name": "a rule", "score": pytest.approx(error), "higher_is_better": False}}
    assert [entry["beside_baseline"] for entry in outcome.summary["carry"]] == [standing] * 2
    note = outcome.recommendation.notes[0]
    assert note.startswith(f"On carry a rule without training, a rule, scores {error:.4g}.")
    names = ", ".join(entry["mechanism"] for entry in outcome.summary["carry"])
    better, worse = (names, "none") if standing == "ahead" else ("none", names)
    assert f"Better: {better}" in note
    assert (f"Worse: {worse}. So {outcome.recommendation.winner} is not shown to beat it" in note) == (better == "none")
    assert "a rule without training" in outcome.report.read_text()


def test_a_rule_near_the_models_is_not_told_apart(tmp_path):
    chosen = settings(mechanisms=("softmax",), rates=(1e-3, 1e-2))
    outcome = compare([Carry()], chosen, tmp_path / "a")
    with Store(outcome.store) as store:
        items = np.array(store.rows("quality")[0].payload["items"])
    task = carry_with_a_rule(np.concatenate([np.ones((4, 2)), items + [[3, 0], [-3, 0]] * 6]))
    outcome = compare([task], chosen, tmp_path / "b")
    assert [entry["beside_baseline"] for entry in outcome.summary["carry"]] == ["level"]
    assert "Not told apart from it: softmax" in outcome.recommendation.notes[0]


def test_scores_in_another_metric_are_measured_again(tmp_path):
    class Squared(Carry):
        metric = "MSE"

        def score(self, output, batch):
            return squared_error_by_item(output.double(), batch)

    first, second = (
        compare([task], settings(mechanisms=("softmax",)), tmp_path).summary["carry"][0]["mean"]
        for task in (Carry(), Squared())
    )
    assert second > 100 * first


def test_generated_answers_are_scored_many_at_once_and_the_same():
    work = Work(Recite(), settings())
    assert (work.batch_size, work.scored_at_once) == (8, 32)
    assert Work(Carry(), settings()).scored_at_once == 7
    model = build(work.configs["linear"], 0)
    scores = [evaluate(model, work.task, size).items for size in (work.batch_size, work.scored_at_once)]
    assert scores[0] == scores[1]


class Backwards(Carry):
    pattern = Pattern.CAUSAL_CROSS


@pytest.mark.parametrize(
    ("task", "mechanism", "words"),
    [
        (Backwards(), "softmax", "causal-cross and objective regression"),
        (Recite(), "flow_attention", "flow_attention in the pattern causal-cross"),
        (Recite(), "landmark", "inserts tokens"),
        (Recite(), "low_rank_pooling", "classification tasks"),
        (carry_with_a_rule(np.ones((15, 2))), "softmax", "15 scores of its baseline for 16 held-out items"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, task, mechanism, words):
    with pytest.raises(Unsupported, match=words):
        compare([task], settings(mechanisms=(mechanism,)), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", TASKS)
def test_all_mechanisms_of_a_pattern_are_matched_within_two_percent_train_and_are_scored(name):
    if name == "images":
        pytest.importorskip("sklearn")
    task = TASKS[name]()
    names = read_mechanisms("all", [task])
    assert len(names) > 8
    work = Work(task, settings(mechanisms=tuple(names), dim=96, heads=4))
    for mechanism, config in work.configs.items():
        model = build(config, 0)
        assert abs(count(model) - work.target) <= 0.02 * work.target, mechanism
        train(model, task, TrainConfig(steps=1, batch_size=2, learning_rate=1e-3, measure_memory=False))
        assert torch.isfinite(torch.tensor(evaluate(model, task, work.scored_at_once).loss)), mechanism


def test_a_mechanism_that_is_too_large_to_match_the_others_is_named():
    with pytest.raises(Unsupported, match=r"mamba2 with 7,\d+ parameters with dim=16.*without mamba2"):
        Work(TASKS["listops"](), settings(mechanisms=("softmax", "mamba2"), dim=16, layers=2))
