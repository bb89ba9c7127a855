import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from regard import Unsupported
from regard.measurement.statistics import FEWEST_ITEMS
from regard.measurement.store import Store
from regard.models import StackConfig, count_parameters, from_pretrained
from regard.tasks import create_task
from regard.workbench.budget import Budget
from regard.workbench.compare import compare, render_report, train_share
from regard.workbench.settings import MORE_RATES, CompareSettings
from regard.workbench.trained import open_trained
from regard.workbench.trainer import Trainer, beyond
from regard.workbench.work import Work, build, fitting

MECHANISMS = ("softmax", "linear", "gated_linear")


@pytest.fixture(autouse=True)
def _short_calibration(monkeypatch):
    monkeypatch.setattr("regard.workbench.work.CALIBRATION_SECONDS", 2.0)


def settings(**changes):
    small = {"dim": 16, "layers": 1, "heads": 2, "seeds": 2, "batch_tokens": 256, "lengths": (16,), "at_length": 32}
    small |= {"frames": ("bare",), "rates": (3e-3,)}
    return CompareSettings(**{"mechanisms": MECHANISMS, "budget": Budget.parse("8k tokens"), **small, **changes})


def recall():
    return create_task("recall", length=16, pairs=2, queries=4, vocab_size=16, evaluation_items=32)


def test_models_are_matched_within_two_percent():
    work = Work(recall(), settings(dim=32, layers=2))
    counts = [count_parameters(build(config, 0)) for config in work.configs.values()]
    assert max(counts) <= 1.02 * work.target
    assert min(counts) >= 0.98 * work.target


def test_a_stack_and_a_precision_reach_models_training_and_rows(tmp_path):
    stack = StackConfig(reversible=True, share="all")
    chosen = settings(mechanisms=("softmax", "linear"), rates=(1e-3,), stack=stack, precision="bfloat16", layers=2)
    work = Work(recall(), chosen)
    assert all(build(config, 0).blocks.config == stack for config in work.configs.values())
    assert work.train_config(1e-3, 0, 1).precision == "bfloat16"
    assert Work(recall(), settings(mechanisms=("softmax",))).identity.keys() == work.identity.keys() - {
        "stack",
        "precision",
    }
    outcome = compare([recall()], chosen, tmp_path)
    with Store(outcome.store) as store:
        assert store.rows("run")[-1].payload["settings"]["stack"] == "share=all, reversible=True"


@pytest.mark.parametrize(("items", "deciding"), [(1, 1), (6, 5), (9, 7)])
def test_few_held_out_items_are_said_when_it_begins_and_in_the_report(tmp_path, items, deciding):
    task = create_task("recall", length=16, pairs=2, queries=4, vocab_size=16, evaluation_items=items)
    said = []
    chosen = settings(mechanisms=("softmax", "linear"), rates=(1e-3, 1e-2))
    outcome = compare([task], chosen, tmp_path, say=said.append)
    warned = [sentence for sentence in said if "held-out item" in sentence]
    if deciding >= FEWEST_ITEMS:
        assert not warned and not any("held-out item" in note for note in outcome.recommendation.notes)
        return
    number = "a single held-out item decides" if deciding == 1 else f"only {deciding} held-out items decide"
    assert number in warned[0] and said[0] == warned[0] == outcome.recommendation.notes[0]
    assert ("chosen on the same" in warned[0]) == (items == 1)
    assert number in outcome.report.read_text()


def test_rates_are_chosen_on_other_items_than_those_that_score(tmp_path):
    outcome = compare([recall()], settings(mechanisms=("softmax",), rates=(1e-3, 1e-2)), tmp_path)
    with Store(outcome.store) as store:
        row = store.rows("quality")[0]
    first, last = json.loads(row.key)["items"] if isinstance(row.key, str) else row.key["items"]
    assert len(row.payload["items"]) == last - first == 24


def test_a_comparison_ends_with_summary_recommendation_and_report(tmp_path):
    said, shown = [], []
    outcome = compare(
        [recall()],
        settings(keep_models=True, rates=(1e-3, 1e-2)),
        tmp_path,
        say=said.append,
        watch=lambda p: shown.append(p.done),
    )
    assert [e["mechanism"] for e in outcome.summary["recall"]]
    assert outcome.recommendation.winner in MECHANISMS
    assert outcome.report.read_text().count("<svg")
    assert shown == sorted(shown)
    entry = next(e for e in outcome.summary["recall"] if e["mechanism"] == outcome.recommendation.winner)
    for measured in (
        "inference_ms",
        "decode_tokens_per_second",
        "state_bytes",
        "training_memory_bytes",
        "inference_memory_bytes",
        "tokens_per_second",
    ):
        assert entry[measured] > 0
    assert [folder.name for folder in (tmp_path / "models").iterdir()] == [outcome.models["recall"].name]
    model = from_pretrained(outcome.models["recall"])
    assert count_parameters(model) == entry["parameters"]
    kept = open_trained(outcome.models["recall"])
    assert len(kept.score().items) == 24  # those that chose no learning rate
    assert kept.record["score"] == pytest.approx(kept.score().score)
    with Store(outcome.store) as store:
        render_report(store, tmp_path / "again.html")
    assert (tmp_path / "again.html").exists()


def test_leaders_are_trained_in_the_other_frame_with_the_same_steps_and_size(tmp_path):
    chosen = settings(mechanisms=("linear", "softmax"), frames=("bare", "convolution"), leaders=1)
    outcome = compare([recall()], chosen, tmp_path)
    with Store(outcome.store) as store:
        rows = [row.payload for row in store.rows("quality")]
    beside = [row for row in rows if row["frame"] == "convolution"]
    assert {row["mechanism"] for row in beside} == {outcome.recommendation.winner}
    assert len({row["steps"] for row in rows}) == 1
    assert max(row["parameters"] for row in rows) <= 1.02 * min(row["parameters"] for row in rows)
    (entry,) = outcome.beside["recall"]
    assert entry["first"] == next(e["mean"] for e in outcome.summary["recall"] if e["mechanism"] == entry["mechanism"])
    assert "In the frame convolution instead of bare" in " ".join(outcome.recommendation.notes)
    assert "another frame" in outcome.report.read_text()


def test_rates_go_on_beyond_an_end_until_the_best_lies_between(tmp_path):
    outcome = compare([recall()], settings(mechanisms=("softmax",), rates=(1e-5, 3e-5), seeds=1), tmp_path)
    with Store(outcome.store) as store:
        losses = {row.payload["lr"]: row.payload["loss"] for row in store.rows("search")}
    assert sorted(losses)[:2] == [1e-5, 3e-5] and len(losses) == 2 + MORE_RATES
    best = min(losses, key=losses.get)
    assert (best == max(losses)) == ("may do better than shown" in outcome.recommendation.text)


def test_mechanisms_that_no_time_was_left_for_share_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_affords", lambda *_: False)
    rising = settings(mechanisms=("softmax", "linear"), rates=(1e-6, 1e-5), seeds=1)
    notes = compare([recall()], rising, tmp_path).recommendation.notes
    assert [n for n in notes if "no time" in n] == [
        "recall: no time was left to try softmax and linear at a rate of 3e-05."
    ]


@pytest.mark.parametrize(
    ("rate", "up", "after"), [(1e-2, True, 3e-2), (1e-2, False, 3e-3), (2e-3, True, 3e-3), (2e-3, False, 1e-3)]
)
def test_the_next_rate_is_on_the_ladder_of_ones_and_threes(rate, up, after):
    assert beyond(rate, up=up) == after


def test_another_lowest_seed_repeats_the_comparison_by_other_draws(tmp_path):
    scores = {}
    for first in (0, 7):
        outcome = compare([recall()], settings(mechanisms=("linear",), first_seed=first), tmp_path)
        with Store(outcome.store) as store:
            scores |= {row.payload["seed"]: row.payload["items"] for row in store.rows("quality")}
    assert sorted(scores) == [0, 1, 7, 8]
    assert scores[0] != scores[7]


def test_a_slower_machine_gets_fewer_steps_and_the_budget_is_kept(tmp_path, monkeypatch):
    """Every step takes longer than in the calibration: what is left is planned again, and said."""
    monkeypatch.setattr("regard.workbench.work.FEWEST_STEPS", 1)
    monkeypatch.setattr("regard.workbench.trainer.FEWEST_STEPS", 1)
    slow = Trainer._measure

    def slowed(self, work, name, rate, seed):
        started = time.monotonic()
        measured = slow(self, work, name, rate, seed)
        time.sleep(2 * (time.monotonic() - started))
        return measured

    monkeypatch.setattr(Trainer, "_measure", slowed)
    said = []
    tasks = [recall(), create_task("copying", length=17, tokens=4, evaluation_items=16)]
    chosen = settings(mechanisms=("softmax", "linear"), budget=Budget.parse("16s"), lengths=())
    started = time.monotonic()
    outcome = compare(tasks, chosen, tmp_path, say=said.append)
    assert any("instead of" in sentence for sentence in said)
    with Store(outcome.store) as store:
        steps = {row.payload["task"]: row.payload["steps"] for row in store.rows("quality")}
    assert steps["copying"] < steps["recall"]
    assert time.monotonic() - started < 60  # twice the budget, for machines that are busy


def test_variants_and_hybrids_are_compared_by_their_names(tmp_path):
    file = tmp_path / "near.toml"
    file.write_text('name = "near, then far"\nlayers = ["local:window=4", "softmax"]\n')
    names = ("softmax", "local:window=8", "linear+softmax", str(file))
    outcome = compare([recall()], settings(mechanisms=names, layers=2, seeds=1), tmp_path / "out")
    assert {e["mechanism"] for e in outcome.summary["recall"]} == {*names[:3], "near, then far"}
    windows = [
        options["window"] for _, options in Work(recall(), settings(mechanisms=names, layers=2)).configs[names[1]].plan
    ]
    assert windows == [8, 8]


def test_the_same_command_measures_nothing_again(tmp_path):
    compare([recall()], settings(), tmp_path)
    started = time.monotonic()
    outcome = compare([recall()], settings(), tmp_path)
    with Store(outcome.store) as store:
        assert len(store.rows("quality")) == 3 * 2
        assert len(store.rows("run")) == 2
    assert time.monotonic() - started < 60


def test_shares_train_what_the_whole_then_finds(tmp_path, monkeypatch):
    chosen = settings()
    second, first = (train_share([recall()], chosen, tmp_path / "shared", f"{i}/2") for i in (2, 1))
    assert sorted(first + second) == sorted(MECHANISMS)
    undisturbed = compare([recall()], chosen, tmp_path / "alone").summary["recall"]

    def trained_again(*_, **__):
        raise AssertionError("a run of a share is made again")

    monkeypatch.setattr("regard.training.Supervised.train", trained_again)
    shared = compare([recall()], chosen, tmp_path / "shared").summary["recall"]
    assert {e["mechanism"]: e["mean"] for e in shared} == {e["mechanism"]: e["mean"] for e in undisturbed}
    with pytest.raises(Unsupported, match="shard '3/2'"):
        train_share([recall()], chosen, tmp_path, "3/2")


def test_costs_are_measured_beyond_a_mechanism_s_training_length(tmp_path):
    chosen = settings(mechanisms=("softmax", "cosformer", "synthesizer"), seeds=1, rates=(3e-3,), lengths=(32, 80))
    outcome = compare([recall()], replace(chosen, at_length=80), tmp_path)
    assert all(entry["inference_ms"] > 0 for entry in outcome.summary["recall"])


def test_what_cannot_be_matched_is_left_out_of_all_with_the_reason():
    task = create_task("listops", length=64, evaluation_items=16)
    names, left_out = fitting([task], settings(mechanisms=("linear", "linformer", "softmax")))
    assert names == ("linear", "softmax")
    assert "parameters" in left_out["linformer"]


def test_a_time_budget_is_planned_once_so_that_a_resumed_comparison_agrees(tmp_path, monkeypatch):
    monkeypatch.setattr("regard.workbench.work.FEWEST_STEPS", 1)
    chosen = settings(mechanisms=("softmax", "linear"), budget=Budget.parse("12s"), seeds=1, rates=(1e-3,))
    compare([recall()], chosen, tmp_path)
    outcome = compare([recall()], chosen, tmp_path)
    with Store(outcome.store) as store:
        assert len(store.rows("plan")) == 1
        assert len({row.payload["steps"] for row in store.rows("quality")}) == 1
        assert len(store.rows("quality")) == 2


def test_equal_flops_give_the_dearer_mechanism_fewer_steps(tmp_path):
    outcome = compare(
        [recall()],
        settings(mechanisms=("softmax", "gated_linear"), budget=Budget.parse("1e9 flops"), seeds=1, rates=(1e-3,)),
        tmp_path,
    )
    with Store(outcome.store) as store:
        steps = {row.payload["mechanism"]: row.payload["steps"] for row in store.rows("quality")}
    assert steps["softmax"] != steps["gated_linear"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": Budget.parse("10 tokens")}, "budget"),
        ({"mechanisms": ("softmax", "softmax")}, "twice"),
        ({"mechanisms": ("softmax", "nosuch")}, "nosuch"),
        ({"at_length": 0}, "length"),
        ({"frames": ("bare", "bare")}, "frames"),
        ({"frames": ("gilded",)}, "frame='gilded'"),
        ({"mechanisms": ("softmax", "local:windw=8")}, "windw"),
        ({"mechanisms": ("softmax", "linear+softmax")}, "a pattern of 2 layers"),
        ({"prefer": "beauty"}, "beauty"),
        ({"seeds": 0}, "seeds"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_trained(tmp_path, changes, words):
    with pytest.raises(Unsupported, match=words) as caught:
        compare([recall()], settings(**changes), tmp_path)
    assert caught.value.supported
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("mechanisms", "sizes"),
    [(("softmax",), {"dim": 32, "heads": 3}), (("softmax", "complex_rotary"), {"dim": 10, "heads": 2})],
)
def test_a_size_that_a_mechanism_refuses_is_refused_with_sizes_it_takes(mechanisms, sizes):
    with pytest.raises(Unsupported, match=rf"--dim {sizes['dim']} and --heads {sizes['heads']}") as caught:
        Work(recall(), settings(mechanisms=mechanisms, **sizes))
    proposed = re.findall(r"--(\w+) (\d+)", caught.value.nearest)
    assert [name for name, _ in proposed] == ["heads", "dim"]
    for name, value in proposed:
        Work(recall(), settings(mechanisms=mechanisms, **{**sizes, name: int(value)}))


def test_a_mechanism_without_the_pattern_is_refused_with_the_task(tmp_path):
    with pytest.raises(Unsupported, match="low_rank_pooling"):
        compare([recall()], settings(mechanisms=("softmax", "low_rank_pooling")), tmp_path)
    assert not list(tmp_path.iterdir())


COMMAND = [
    *(
        sys.executable,
        "-m",
        "regard",
        "compare",
        "--task",
        "recall:pairs=2,queries=4,vocab_size=16,evaluation_items=32",
    ),
    *("--length", "16", "--mechanisms", "softmax,linear", "--budget", "60k tokens", "--seeds", "2"),
    *("--dim", "16", "--layers", "1", "--heads", "2", "--lengths", "16,32", "--at-length", "32", "--json"),
    *("--frame", "convolution", "--rates", "0.003,0.01"),
]


SCHEMA = Path(__file__).parents[2] / "docs" / "schema" / "compare.json"
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
TYPES |= {"null": type(None)}


def differences(value, schema, path="."):
    """Where a value is not what a schema says, of the words that the published schema uses; unknown names too."""
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(isinstance(value, TYPES[kind]) for kind in kinds):
        return [f"{path}: {value!r} is none of {kinds}"]
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return [f"{path}: {value!r}"]
    found = [f"{path}: no {name}" for name in schema.get("required", []) if name not in value]
    if isinstance(value, list):
        return found + [d for i, v in enumerate(value) for d in differences(v, schema["items"], f"{path}[{i}]")]
    if isinstance(value, dict) and ("properties" in schema or "additionalProperties" in schema):
        named, others = schema.get("properties", {}), schema.get("additionalProperties")
        for name, one in value.items():
            known = named.get(name, others)
            found += [f"{path}.{name}: unknown"] if known is None else differences(one, known, f"{path}.{name}")
    return found


def quality(folder):
    with Store(folder / "results.db") as store:
        rows = store.rows("quality")
    kept = ("score", "items", "curve", "parameters", "tokens", "steps")
    return {(r.payload["mechanism"], r.payload["lr"], r.payload["seed"]): {k: r.payload[k] for k in kept} for r in rows}


def test_killed_twice_and_resumed_equals_undisturbed(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for wanted in (1, 3):
        process = subprocess.Popen([*COMMAND, "--output", str(killed)], env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (killed / "results.db").exists() and len(quality(killed)) >= wanted:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = quality(killed)
    subprocess.run([*COMMAND, "--output", str(killed)], env=environment, check=True, stdout=subprocess.DEVNULL)
    told = subprocess.run(
        [*COMMAND, "--output", str(whole)], env=environment, check=True, stdout=subprocess.PIPE
    ).stdout
    assert differences(json.loads(told), json.loads(SCHEMA.read_text())) == []
    assert 1 <= len(before) < len(quality(whole))
    assert quality(killed) == quality(whole)
    assert all(quality(killed)[cell] == row for cell, row in before.items())


def test_a_moment_in_which_the_machine_is_busy_does_not_count_in_the_calibration(monkeypatch):
    work = Work(recall(), settings(mechanisms=("softmax", "linear")))
    times = iter([(9.0, 0.1), (0.2, 5.0), (0.2, 0.3), (0.1, 0.2)])  # softmax, linear, linear, softmax
    monkeypatch.setattr(Work, "_timed", lambda self, config, seconds: next(times))
    work.calibrate(1.0)
    assert work.step_seconds == {"softmax": 0.1, "linear": 0.2}
    assert work.evaluation_seconds == {"softmax": 0.1, "linear": 0.3}
