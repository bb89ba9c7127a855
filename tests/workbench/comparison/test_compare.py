import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import answer

from regard import Context, Unsupported
from regard.measurement.budget import Budget
from regard.measurement.statistics import FEWEST_ITEMS
from regard.measurement.store import Store
from regard.models import StackConfig, count_parameters, from_pretrained
from regard.tasks import create_task
from regard.workbench.comparison.compare import compare, render_report, train_share
from regard.workbench.comparison.cost import model_costs
from regard.workbench.comparison.planning import OF_SOLVABLE, share_steps
from regard.workbench.comparison.settings import MORE_RATES, CompareSettings
from regard.workbench.comparison.task_models import build, fitting
from regard.workbench.comparison.trainer import Trainer, further_rate
from regard.workbench.comparison.work import Work
from regard.workbench.trained.folder import open_trained

MECHANISMS = ("softmax", "linear", "gated_linear")


def settings(**changes):
    small = {"dim": 16, "layers": 1, "heads": 2, "seeds": 2, "batch_tokens": 256, "lengths": (16,), "at_length": 32}
    small |= {"frames": ("bare",), "rates": (3e-3,)}
    return CompareSettings(**{"mechanisms": MECHANISMS, "budget": Budget.parse("20 steps"), **small, **changes})


def recall(items=32):
    return create_task("recall", length=16, pairs=2, queries=4, vocab_size=16, evaluation_items=items)


def rows(outcome, kind="quality"):
    with Store(outcome.store) as store:
        return [row.payload for row in store.rows(kind)]


def test_tasks_of_one_name_are_refused_where_one_would_hide_the_other(tmp_path):
    with pytest.raises(Unsupported, match="two tasks named recall in one comparison"):
        compare([recall(), recall(8)], settings(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stack_and_a_precision_reach_models_training_and_rows(tmp_path):
    stack = StackConfig(reversible=True, share="all")
    chosen = settings(mechanisms=("softmax", "linear"), stack=stack, precision="bfloat16", layers=2, seeds=1)
    work, plain = Work(recall(), chosen), Work(recall(), settings(mechanisms=("softmax",)))
    assert all(build(config, 0).blocks.config == stack for config in work.configs.values())
    assert work.train_config(1e-3, 0, 1).precision == "bfloat16"
    assert plain.identity.keys() == work.identity.keys() - {"stack", "precision"}
    (run,) = rows(compare([recall()], chosen, tmp_path), "run")
    assert run["settings"]["stack"] == "share=all, reversible=True"


@pytest.mark.parametrize(("items", "deciding"), [(1, 1), (6, 5), (9, 7)])
def test_few_held_out_items_are_said_when_it_begins_and_in_the_report(tmp_path, items, deciding):
    said, chosen = [], settings(mechanisms=("softmax",), rates=(1e-3, 1e-2), seeds=1)
    outcome = compare([recall(items)], chosen, tmp_path, say=said.append)
    warned = [sentence for sentence in said if "held-out item" in sentence]
    if deciding >= FEWEST_ITEMS:
        assert not warned and not any("held-out item" in note for note in outcome.recommendation.notes)
        return
    number = "a single held-out item decides" if deciding == 1 else f"only {deciding} held-out items decide"
    assert number in warned[0] and said[0] == warned[0] == outcome.recommendation.notes[0]
    assert ("chosen on the same" in warned[0]) == (items == 1)
    assert number in outcome.report.read_text()


def test_seeds_count_as_work_to_come_when_more_rates_were_tried_than_planned(tmp_path, monkeypatch):
    monkeypatch.setattr(Work, "runs", 0)
    seen = []
    compare([recall()], settings(), tmp_path, watch=lambda p: seen.append((p.doing, p.done, p.total)))
    planned = next(total for doing, _, total in seen if "seed 1" in doing)
    assert planned > 0.999 * max(done for _, done, _ in seen)


def test_a_comparison_ends_with_summary_recommendation_and_report(tmp_path):
    shown = []
    chosen = settings(keep_models=True, rates=(1e-3, 1e-2))
    outcome = compare([recall()], chosen, tmp_path, watch=lambda p: shown.append(p.done))
    assert "<svg" in outcome.report.read_text()
    assert shown == sorted(shown)
    (entry,) = [e for e in outcome.summary["recall"] if e["mechanism"] == outcome.recommendation.winner]
    costs = ("inference_ms", "decode_tokens_per_second", "tokens_per_second", "state_bytes", "training_memory_bytes")
    assert all(entry[cost] > 0 for cost in (*costs, "inference_memory_bytes"))
    assert [folder.name for folder in (tmp_path / "models").iterdir()] == [outcome.models["recall"].name]
    model = from_pretrained(outcome.models["recall"])
    assert count_parameters(model) == entry["parameters"]
    kept = open_trained(outcome.models["recall"])
    assert len(kept.score().items) == 24  # those not used to choose a learning rate
    assert kept.record["score"] == pytest.approx(kept.score().score)
    assert {len(row["items"]) for row in rows(outcome)} == {24}
    with Store(outcome.store) as store:
        render_report(store, tmp_path / "again.html")
    assert (tmp_path / "again.html").exists()


def test_leaders_are_trained_in_the_other_frame_with_the_same_steps_and_size(tmp_path):
    chosen = settings(mechanisms=("linear", "softmax"), frames=("bare", "convolution"), leaders=1)
    outcome = compare([recall()], chosen, tmp_path)
    runs = rows(outcome)
    assert {run["mechanism"] for run in runs if run["frame"] == "convolution"} == {outcome.recommendation.winner}
    assert len({run["steps"] for run in runs}) == 1
    assert max(run["parameters"] for run in runs) <= 1.02 * min(run["parameters"] for run in runs)
    (entry,) = outcome.beside["recall"]
    assert entry["first"] == next(e["mean"] for e in outcome.summary["recall"] if e["mechanism"] == entry["mechanism"])
    assert "In the frame convolution instead of bare" in " ".join(outcome.recommendation.notes)
    assert "another frame" in outcome.report.read_text()


def test_frames_beyond_the_second_are_trained_where_time_is_left_and_each_that_is_not_is_told_once(
    tmp_path, monkeypatch
):
    frames = ("bare", "convolution", "unnormed")
    kept = {
        unit: Work(recall(), settings(budget=Budget(unit, 60), frames=frames)).all_runs for unit in ("seconds", "steps")
    }
    assert kept["steps"] - kept["seconds"] == kept["seconds"] - Work(recall(), settings()).all_runs
    monkeypatch.setattr(Trainer, "affords", lambda _, works, __: works[0].frame == "convolution")
    outcome = compare([recall()], settings(mechanisms=("linear", "softmax"), frames=frames), tmp_path)
    assert {entry["frame"] for entry in outcome.beside["recall"]} == {"convolution"}
    explained = re.search(r"another frame</h3>(.*?)</p>", outcome.report.read_text(), re.DOTALL)
    assert re.findall(r"<b>(\w+)</b>", explained[1]) == ["convolution"]
    late = [note for note in outcome.recommendation.notes if "No time was left" in note]
    assert len(late) == 1 and re.search("for .* and .* in the frame unnormed; use a larger --budget", late[0])
    monkeypatch.setattr(Trainer, "affords", lambda *_: False)
    outcome = compare([recall()], settings(mechanisms=("linear", "softmax"), frames=frames), tmp_path / "late")
    late = [note for note in outcome.recommendation.notes if "No time was left" in note]
    assert [note.partition("in the frame ")[2].partition(";")[0] for note in late] == ["convolution", "unnormed"]


def test_rates_go_on_beyond_an_end_until_the_best_lies_between(tmp_path):
    outcome = compare([recall()], settings(mechanisms=("softmax",), rates=(1e-5, 3e-5), seeds=1), tmp_path)
    losses = {row["lr"]: row["loss"] for row in rows(outcome, "search")}
    assert sorted(losses) == [1e-5, 3e-5, 1e-4, 3e-4, 1e-3][: 2 + MORE_RATES]
    best = min(losses, key=losses.get)
    assert (best == max(losses)) == ("may do better than shown" in outcome.recommendation.text)


@pytest.mark.parametrize(
    ("scores", "losses", "following"),
    [
        ((0.51, 0.49, 0.5), (0.694, 0.692, 0.693), 1e-3),  # chance: the losses are noise
        ((0.51, 0.49, None), (0.694, 0.693, None), 1e-3),  # diverged at the highest
        ((None, None, None), (None, None, None), 1e-3),
        ((0.51, 0.49, 0.5), (0.9, 0.8, 0.7), 1e-1),  # not yet above chance, but falling with the rate
        ((0.5, 0.7, 0.5), (0.694, 0.6, 0.693), None),
        ((0.8, 0.7, 0.5), (0.5, 0.6, 0.693), 1e-3),
        ((0.5, 0.7, 0.8), (0.693, 0.6, 0.5), 1e-1),
    ],
)
def test_where_no_rate_is_above_chance_the_next_lower_one_is_tried(scores, losses, following):
    task = create_task("pathfinder", size=16, dashes=2, distractors=0, evaluation_items=256)
    work = Work(task, settings(mechanisms=("softmax",), rates=(3e-3, 1e-2, 3e-2)))
    found = zip(work.settings.rates, scores, losses, strict=True)
    tried = [{"lr": rate, "search": {"score": score, "loss": loss}} for rate, score, loss in found]
    for order in itertools.permutations(tried):
        assert further_rate(work, order) == following


def test_mechanisms_that_no_time_was_left_for_share_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_affords", lambda *_: False)
    rising = settings(mechanisms=("softmax", "linear"), rates=(1e-6, 1e-5), seeds=1)
    (note,) = [n for n in compare([recall()], rising, tmp_path).recommendation.notes if "no time" in n]
    assert note == "recall: no time was left to try softmax and linear at a rate of 3e-05."


def test_what_no_time_was_left_for_is_made_where_others_took_less_than_was_kept_for_them(tmp_path, monkeypatch):
    """Time is reserved for further frames until those are done."""
    monkeypatch.setattr(Trainer, "_affords", lambda trainer, *_: not trainer.reserved)
    chosen = settings(mechanisms=("softmax", "linear"), rates=(1e-6, 1e-5), seeds=2)
    outcome = compare([recall()], chosen, tmp_path)
    assert not [note for note in outcome.recommendation.notes if "no time" in note]
    (run,) = rows(outcome, "run")
    tried = [(key["mechanism"], key["lr"]) for key in run["cells"]["search"]]
    assert len(set(tried)) == len(tried) == len(rows(outcome, "search")) > 4
    kept = [(key["mechanism"], key["seed"]) for key in run["cells"]["quality"]]
    assert sorted(kept) == [(name, seed) for name in ("linear", "softmax") for seed in (0, 1)]


def test_tasks_that_can_be_solved_are_trained_on_first_and_longer(tmp_path):
    (tmp_path / "corpus.txt").write_text("".join(f"line {i * i} of many\n" for i in range(200)))
    solvable, open_ended = recall(), create_task("text", data=tmp_path / "corpus.txt", length=16, evaluation_items=8)
    outcome = compare([open_ended, solvable], settings(mechanisms=("linear",), seeds=1), tmp_path)
    assert [row["task"] for row in rows(outcome)] == ["recall", "text"]
    assert list(outcome.summary) == ["text", "recall"], "told in the order asked for"
    works = [Work(task, settings(mechanisms=("linear",))) for task in (open_ended, solvable)]
    for work in works:
        work.step_seconds, work.evaluation_seconds = {"linear": 0.1}, {"linear": 0.0}
    share_steps(works, 1000.0)
    assert works[1].steps["linear"] == pytest.approx(OF_SOLVABLE * works[0].steps["linear"], rel=0.01)


def test_a_busy_moment_tells_nothing_of_the_pace_a_minute_later(tmp_path, monkeypatch):
    taken = iter((300.0, *[10.0] * 12))
    clock = [0.0]

    def measured(self, work, name, rate, seed):
        clock[0] += next(taken)
        return {"search": {"loss": 1.0}}

    monkeypatch.setattr(Trainer, "_measure", measured)
    monkeypatch.setattr("regard.workbench.comparison.trainer.time.monotonic", lambda: clock[0])
    work = Work(recall(), settings(mechanisms=("linear",)))
    work.steps, work.step_seconds, work.evaluation_seconds = {"linear": 10}, {"linear": 1.0}, {"linear": 0.0}
    with Store(tmp_path / "results.db") as store:
        trainer = Trainer(store, work.settings, tmp_path, "", lambda _: None, lambda _: None, None)
        trainer.run(work, "linear", 1e-3, 0)
        assert trainer.pace == 30
        for seed in range(1, 13):
            trainer.run(work, "linear", 1e-3, seed)
    assert 1 < trainer.pace < 2


def test_runs_get_more_steps_where_others_of_their_mechanism_solve_the_task(tmp_path, monkeypatch):
    """Here softmax solves the task with one seed of three, linear with none."""
    measure = Trainer._measure

    def lucky(self, work, name, rate, seed):
        row = measure(self, work, name, rate, seed)
        return {**row, "solved": name == "softmax" and (seed == 1 or row["steps"] > 20)}

    monkeypatch.setattr(Trainer, "_measure", lucky)
    chosen = settings(mechanisms=("softmax", "linear"), budget=Budget.parse("20 steps"), seeds=3)
    outcome = compare([recall()], chosen, tmp_path)
    steps = {(row["mechanism"], row["seed"], row["steps"]) for row in rows(outcome)}
    assert steps == {(n, s, 20) for n in chosen.names for s in range(3)} | {("softmax", 0, 40), ("softmax", 2, 40)}
    solved = {entry["mechanism"]: entry["solved"] for entry in outcome.summary["recall"]}
    assert solved == {"softmax": True, "linear": False}
    told = "recall: softmax solves it in some runs of 20 steps; seeds 0 and 2 did not and had 40."
    assert told in outcome.recommendation.notes
    (run,) = rows(outcome, "run")
    assert sorted(key["steps"] for key in run["cells"]["quality"]) == [20] * 4 + [40] * 2


def test_another_lowest_seed_repeats_the_comparison_by_other_draws(tmp_path):
    scores = {}
    for first in (0, 7):
        outcome = compare([recall()], settings(mechanisms=("linear",), seeds=1, first_seed=first), tmp_path)
        scores |= {row["seed"]: row["items"] for row in rows(outcome)}
    assert sorted(scores) == [0, 7]
    assert scores[0] != scores[7]


def test_a_slower_machine_gets_fewer_steps(tmp_path, monkeypatch):
    """If steps take longer than in the calibration, the remaining work is planned again, which is reported."""
    monkeypatch.setattr("regard.workbench.comparison.planning.FEWEST_STEPS", 1)
    monkeypatch.setattr("regard.workbench.comparison.trainer.FEWEST_STEPS", 1)
    slow, clock, lost = Trainer._measure, time.monotonic, [0.0]

    def slowed(self, work, name, rate, seed):
        started = clock()
        measured = slow(self, work, name, rate, seed)
        lost[0] += 2 * (clock() - started)
        return measured

    monkeypatch.setattr(Trainer, "_measure", slowed)
    monkeypatch.setattr(time, "monotonic", lambda: clock() + lost[0])
    said = []
    tasks = [recall(), create_task("copying", length=17, tokens=4, evaluation_items=16)]
    chosen = settings(mechanisms=("softmax", "linear"), budget=Budget.parse("16s"), lengths=())
    outcome = compare(tasks, chosen, tmp_path, say=said.append)
    (fewer,) = (sentence for sentence in said if "instead of" in sentence)
    again = compare(tasks, chosen, tmp_path)
    assert all(f"{fewer}." in found.recommendation.notes for found in (outcome, again))
    steps = {row["task"]: row["steps"] for row in rows(outcome)}
    assert steps["copying"] < steps["recall"]


def test_variants_and_hybrids_are_compared_by_their_names(tmp_path):
    file = tmp_path / "near.toml"
    file.write_text('name = "near, then far"\nlayers = ["local:window=4", "softmax"]\n')
    names = ("softmax", "local:window=8", "linear+softmax", str(file))
    outcome = compare([recall()], settings(mechanisms=names, layers=2, seeds=1), tmp_path / "out")
    assert {e["mechanism"] for e in outcome.summary["recall"]} == {*names[:3], "near, then far"}
    plan = Work(recall(), settings(mechanisms=names, layers=2)).configs[names[1]].plan
    assert [options["window"] for _, options in plan] == [8, 8]


def test_shares_train_what_the_whole_then_finds(tmp_path, monkeypatch):
    chosen = settings(seeds=1)
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
    chosen = settings(mechanisms=("softmax", "cosformer", "synthesizer"), seeds=1, lengths=(32, 80), at_length=80)
    outcome = compare([recall()], chosen, tmp_path)
    assert all(entry["inference_ms"] > 0 for entry in outcome.summary["recall"])


def test_what_cannot_be_matched_is_left_out_of_all_with_the_reason():
    task = create_task("listops", length=64, evaluation_items=16)
    names, left_out = fitting([task], settings(mechanisms=("linear", "linformer", "softmax")))
    assert names == ("linear", "softmax")
    assert "parameters" in left_out["linformer"]


def test_a_time_budget_is_planned_once_so_that_a_resumed_comparison_agrees(tmp_path, monkeypatch):
    monkeypatch.setattr("regard.workbench.comparison.planning.FEWEST_STEPS", 1)
    chosen = settings(mechanisms=("softmax", "linear"), budget=Budget.parse("12s"), seeds=1)
    compare([recall()], chosen, tmp_path)
    outcome = compare([recall()], chosen, tmp_path)
    first, second = rows(outcome)
    assert first["steps"] == second["steps"] and len(rows(outcome, "plan")) == 1


def test_the_budget_that_a_refusal_names_is_enough(tmp_path):
    chosen = settings(mechanisms=("linear",), seeds=1, lengths=(), budget=Budget.parse("10 tokens"))
    with pytest.raises(Unsupported, match="fewer than 20 steps") as refused:
        compare([recall()], chosen, tmp_path)
    _, named = shlex.split(refused.value.nearest)
    assert rows(compare([recall()], replace(chosen, budget=Budget.parse(named)), tmp_path))


def test_equal_flops_give_the_dearer_mechanism_fewer_steps(tmp_path):
    chosen = settings(mechanisms=("softmax", "gated_linear"), budget=Budget.parse("1e9 flops"), seeds=1)
    outcome = compare([recall()], chosen, tmp_path)
    steps = {row["mechanism"]: row["steps"] for row in rows(outcome)}
    assert steps["softmax"] != steps["gated_linear"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mechanisms": ("softmax", "softmax")}, "twice"),
        ({"frames": ("bare", "bare")}, "frames"),
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


LINE = """compare --task recall:pairs=2,queries=4,vocab_size=16,evaluation_items=32 --length 16 --mechanisms softmax,linear
--budget '20 steps' --seeds 2 --dim 16 --layers 1 --heads 2 --lengths 16,32 --at-length 32 --frame convolution
--rates 0.003,0.01 --output"""
KILLED = """
import os, signal
from regard.cli import main
from regard.workbench.comparison import planning, work
from regard.workbench.comparison.trainer import Trainer

planning.CALIBRATION_SECONDS, work.LEAST_SECONDS = 0.4, 0.02
whole, begun = Trainer._on_step, []

def on_step(trainer, work, name):
    begun.append(name)
    told = whole(trainer, work, name)

    def step(point):
        told(point)
        if len(begun) == 3 and point.step == 9:
            os.kill(os.getpid(), signal.SIGKILL)

    return step

Trainer._on_step = on_step
main()
"""
SCHEMA = Path(__file__).parents[3] / "docs" / "schema" / "compare.json"
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
TYPES |= {"null": type(None)}


def differences(value, schema, path="."):
    """Differences between a value and a schema, for the keywords that the published schema uses, and unknown names."""
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


@pytest.fixture
def one_thread():
    """Use one thread here and in the other process, since sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {**os.environ, "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(before)


def test_killed_and_resumed_equals_undisturbed(tmp_path, capsys, one_thread):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-c", KILLED, *shlex.split(LINE), str(killed)]
    process = subprocess.run(command, env=one_thread, capture_output=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    before = quality(killed)
    answer(capsys, LINE, killed)
    assert differences(answer(capsys, LINE, whole), json.loads(SCHEMA.read_text())) == []
    assert len(before) == 2 < len(quality(whole)), "it was killed in the third run"
    assert quality(killed) == quality(whole)
    assert all(quality(killed)[cell] == row for cell, row in before.items())


def test_lengths_that_are_too_long_for_the_memory_are_left_out_and_said(tmp_path):
    chosen = settings(mechanisms=("softmax", "linear"), seeds=1, lengths=(16, 10**15))
    outcome = compare([recall()], chosen, tmp_path)
    told = "recall: no costs of softmax and linear at 1,000,000,000,000,000 tokens, which need more memory than was available."
    assert told in outcome.recommendation.notes
    assert outcome.report.is_file()
    assert [[length for length, *_ in row["latency"]] for row in rows(outcome, "cost")] == [[16, 32], [16, 32]]


class Costly(torch.nn.Module):
    """A model that fails for more than `most` tokens."""

    def __init__(self, most, error):
        super().__init__()
        self.most, self.error = most, error

    def forward(self, x, context):
        if x.shape[1] > self.most:
            raise self.error
        return x


def costs_of(model_for, names=("softmax", "linear")):
    return model_costs(names, model_for, (32, 128), lambda n: ((torch.randn(1, n, 4),), Context()))


@pytest.mark.parametrize("when", ["built", "run"])
def test_a_model_that_a_length_is_too_long_for_leaves_its_costs_to_the_others(when):
    def model_for(name, length):
        if when == "built" and name == "softmax" and length > 64:
            raise MemoryError
        return Costly(64 if name == "softmax" else 1000, MemoryError())

    costs = costs_of(model_for)
    for kind in ("latency", "memory"):
        assert [[row[0] for row in costs[name][kind]] for name in costs] == [[32], [32, 128]]
    assert [costs[name]["too_long"] for name in costs] == [[128], []]


def test_a_state_that_does_not_fit_costs_the_decoding_alone(monkeypatch):
    model = build(Work(recall(), settings(mechanisms=("softmax",))).configs["softmax"], 0)
    whole = model.forward

    def forward(x, context):
        if "state" in context.want:
            raise RuntimeError("CUDA out of memory")
        return whole(x, context=context)

    monkeypatch.setattr(model, "forward", forward)
    costs = model_costs(("softmax",), lambda *_: model, (8,), lambda n: ((torch.randint(9, (1, n)),), Context()))
    assert costs["softmax"]["latency"] and not costs["softmax"]["decode"] and not costs["softmax"]["too_long"]


def test_an_error_that_is_not_about_memory_is_not_hidden():
    with pytest.raises(RuntimeError, match="shapes differ"):
        costs_of(lambda *_: Costly(0, RuntimeError("shapes differ")))


def test_a_moment_in_which_the_machine_is_busy_does_not_count_in_the_calibration(monkeypatch):
    work = Work(recall(), settings(mechanisms=("softmax", "linear")))
    times = iter([(9.0, 0.1), (0.2, 5.0), (0.2, 0.3), (0.1, 0.2)])  # order: softmax, linear, linear, softmax
    monkeypatch.setattr(Work, "_timed", lambda self, config, seconds: next(times))
    work.calibrate(1.0)
    assert work.step_seconds == {"softmax": 0.1, "linear": 0.2}
    assert work.evaluation_seconds == {"softmax": 0.1, "linear": 0.3}
