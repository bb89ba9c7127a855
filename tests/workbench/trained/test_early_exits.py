"""Exits on the command line: trained, frozen, reported next to all layers, and used in decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import answer, run

from regard.models import exit_layers, from_pretrained, set_exit_rule
from regard.workbench.trained.folder import open_trained

SIZES = "--budget '24 steps' --dim 16 --heads 2 --frame bare --batch-tokens 128"
LISTS = f"--task listops:length=16,depth=2,evaluation_items=32 --layers 3 --mechanism linear {SIZES}"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regard.workbench.trained.early_exits.SECONDS", 0.0)


def test_a_classifier_learns_exits_alone_and_each_rule_is_told_with_its_depth(quick, tmp_path, capsys):
    whole, exits = tmp_path / "whole", tmp_path / "exits"
    answer(capsys, f"train {LISTS} --output {whole}")
    record = answer(
        capsys, f"train --exits all:own --frozen {whole} --budget '24 steps' --batch-tokens 128 --output {exits}"
    )
    assert record["settings"]["frozen"] == str(whole.resolve())
    before, after = (from_pretrained(folder) for folder in (whole, exits))
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
    assert all(float(one.head.weight.detach().std()) > 0 and one.norm.weight.ne(1).any() for one in after.exits)
    found = answer(capsys, f"evaluate {exits} --exit layer:2 --exit entropy:0 --exit entropy:9")
    assert (found["score"], found["baseline"]) == (record["score"], record["baseline"])
    middle, never, at_once = found["exits"]
    assert (middle["depth"], middle["passed"]) == (2.0, {"2": 1.0})
    assert never["depth"] == 3.0 and never["score"] == found["score"]
    assert at_once["depth"] == 1.0 and at_once["loss"] != found["loss"]
    assert all(one["seconds"]["early"] > 0 and one["layers"] == 3 for one in found["exits"])
    code, said, _ = run(capsys, f"evaluate {exits} --exit patience:1")
    assert code == 0 and "of 3 layers on average" in said and "times as fast" in said
    assert "--exit entropy:0.3" in (exits / "README.md").read_text()


def test_text_is_decoded_by_a_rule_as_it_would_be_read_whole(tmp_path, capsys):
    corpus, folder = tmp_path / "corpus.txt", tmp_path / "model"
    corpus.write_text("Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 60)
    answer(
        capsys, f"train {corpus} --layers 3 --exits 1+2 --mechanism gated_linear --length 16 {SIZES} --output {folder}"
    )
    generate = f"generate {folder} Zwölf --tokens 12 --temperature 0"
    for rule, low, high in (("confidence:0.05", 1.0, 3.0), ("layer:2", 2.0, 2.0), ("confidence:1", 3.0, 3.0)):
        found = answer(capsys, f"{generate} --exit {rule}")
        assert low <= found["exits"]["depth"] <= high and found["exits"]["layers"] == 3
        model, tokenizer = from_pretrained(folder), open_trained(folder).tokenizer
        set_exit_rule(model, rule)
        ids = torch.from_numpy(tokenizer.encode(["Zwölf".encode()]).astype("int64"))[None]
        new = model.generate(ids, 12, use_state=False)
        assert found["text"] == tokenizer.decode(new[0].tolist())
        with exit_layers(model) as passed:
            model(torch.cat([ids, new[:, :-1]], 1))
        assert found["exits"]["depth"] == pytest.approx(passed[0][-12:].double().mean().item())
    assert answer(capsys, generate)["text"] == answer(capsys, f"{generate} --exit confidence:1 --draft lookup")["text"]
    assert "layers on average" in run(capsys, f"{generate} --exit layer:1")[2]


def test_a_model_that_halts_is_told_as_it_is_and_with_another_patience(quick, tmp_path, capsys):
    record = answer(capsys, f"train {LISTS} --exits all:halting --output {tmp_path}")
    assert record["settings"]["stack"] == {"exits": [1, 2], "exit_rule": "halting:0.01"}
    found = answer(capsys, f"evaluate {tmp_path} --exit halting:0.01 --exit halting:0.9")
    own, sooner = found["exits"]
    assert own["score"] == found["score"] and sooner["depth"] == 1.0 < own["depth"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train {lists} --exits 1+3 --output {out}", ("--exits 1+3", "1 to 2")),
        ("train {lists} --exits all:mine --output {out}", ("mine", "halting")),
        ("train --task recall --exits all:own --output {out}", ("next-token", "--exits all")),
        ("train --task images --model vit_nano --exits all:own --output {out}", ("backbone vit_nano", "--mechanism")),
        ("train --task images --model vit_nano --stack exits=1 --output {out}", ("--stack with the backbone",)),
        ("train --frozen {folder} --output {out}", ("--exits all",)),
        ("train --frozen {folder} --exits all --dim 8 --output {out}", ("--dim",)),
        ("train --frozen {folder} --exits all:halting --output {out}", ("halting",)),
        ("train --frozen {folder}/none --exits all --output {out}", ("does not exist", "regard train")),
        ("evaluate {folder} --exit entropy:0.3", ("without exits", "--exits all")),
        ("evaluate {folder} --exit entropi:0.3", ("entropi", "entropy:0.3")),
        ("generate {folder} a --exit entropy:0.3", ("Encoder",)),
    ],
)
def test_what_does_not_fit_is_one_sentence_and_leaves_nothing(line, words, tmp_path, capsys, trained_lists):
    out = tmp_path / "out"
    code, _, said = run(capsys, line.format(lists=LISTS, folder=trained_lists, out=out))
    assert code == 2 and all(word in said for word in words), said
    assert not out.exists()


@pytest.fixture(scope="module")
def trained_lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from regard.measurement.budget import Budget
    from regard.tasks import create_task
    from regard.workbench.comparison.settings import CompareSettings
    from regard.workbench.trained.run import train_model

    folder = tmp_path_factory.mktemp("lists")
    settings = CompareSettings(
        ("linear",),
        Budget.parse("24 steps"),
        seeds=1,
        frames=("bare",),
        dim=16,
        layers=3,
        heads=2,
        rates=(1e-2,),
        lengths=(16,),
        batch_tokens=128,
    )
    train_model(create_task("listops", length=16, depth=2, evaluation_items=32), settings, folder)
    return folder
