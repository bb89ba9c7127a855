"""The CAB study on the user's data: every task reads some, cells belong to their content, and no claim is judged by them."""

import math
from datetime import datetime, timedelta

import numpy as np
import pytest
from command_line import answer, run
from recordings import write_recordings
from support import refused

from regard.contract import Pattern
from regard.reproductions.framework import runs
from regard.studies.cab import STUDY, cells
from regard.studies.cab.benches import NAMED
from regard.studies.cab.own_data import READERS, OwnData, own_data, score_files
from regard.studies.framework.protocol import Chosen

NS, CS, NC, CC = Pattern
SMOKE = {"steps": 2, "items": 2, "dim": 16, "heads": 2, "batch_size": 2}
SMALLER = {
    "LM": {"length": 64},
    "MLM": {"length": 64},
    "LSTF": {"length": 12, "history": 24, "start": 12},
    "SR": {"size": 16},
    "Sum": {"length": 32, "history": 48, "tokenizer": "bytes"},
    "PCC": {"length": 32, "history": 24},
    "FastSpeech": {"length": 48, "digits": 3},
    "Transformer-TTS": {"length": 48, "digits": 3},
}


def prose(count, seed=None):
    letters = np.random.default_rng(seed).integers(97, 123, (count, 4))
    return " ".join("".join(map(chr, word)) for word in letters) + "\n"


@pytest.fixture
def novel(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text(prose(2000))
    return path


@pytest.fixture
def load(tmp_path):
    path, rng = tmp_path / "load.csv", np.random.default_rng()
    times = (datetime(2024, 1, 1) + timedelta(hours=i) for i in range(400))
    rows = [f"{time},{np.sin(i / 4) + rng.normal():.4f},{rng.normal():.4f}" for i, time in enumerate(times)]
    path.write_text("\n".join(["date,load,wind", *rows]) + "\n")
    return path


@pytest.fixture
def given(tmp_path, novel, load):
    """What the user writes for every task."""
    for name in ("photos", "meshes", "digits"):
        (tmp_path / name).mkdir()
    (tmp_path / "pairs.csv").write_text("long,short\n" + "".join(f"{prose(9).strip()},word {i}\n" for i in range(30)))
    corners = "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\n"
    for i, faces in enumerate(("f 1 2 3\nf 1 2 4\n", "f 1 3 4\nf 2 3 4\n")):
        (tmp_path / "meshes" / f"{i}.obj").write_text(corners + faces)
    write_recordings(tmp_path / "digits")
    return {
        "LM": f"LM={novel}",
        "MLM": f"MLM={novel}",
        "LSTF": f"LSTF={load},target=load,past_covariates=wind",
        "SR": f"SR={tmp_path / 'photos'}",
        "Sum": f"Sum={tmp_path / 'pairs.csv'},source=long,target=short",
        "PCC": f"PCC={tmp_path / 'meshes'}",
        "TTS": f"TTS={tmp_path / 'digits'}",
    }


@pytest.mark.parametrize("name", NAMED)
def test_every_task_is_trained_and_scored_on_the_user_s_data(given, tmp_path, name):
    bench = NAMED[name]
    if name == "SR":
        image = pytest.importorskip("PIL.Image")
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    data = own_data([given[bench.task]])[bench.task]
    sizes = cells.PRESETS["small"][name] | SMOKE | SMALLER[name] | {"bench": name, "data": data.setting()}
    assert data.path.rpartition("/")[2] in bench.data(sizes).describe()
    measured = cells.run_cell(sizes | {"mechanism": "abc", "pattern": bench.patterns[-1].value}, 0)
    assert all(math.isfinite(measured[metric]) for metric in bench.metrics), measured


def test_the_user_s_data_reach_the_cells_of_their_task_alone(given):
    chosen = Chosen("tiny", ("softmax", "abc"), (given["LM"], given["Sum"]))
    for one in cells.settings(chosen).values():
        read = one.get("data")
        assert (read is not None) == (one.get("bench") in ("LM", "Sum"))
        if one.get("bench") == "Sum":
            assert read["options"] == {"source": "long", "target": "short"}


def test_data_of_the_user_need_no_package(given, monkeypatch):
    monkeypatch.setattr("regard.studies.cab.benches.find_spec", lambda _: None)
    names = {bench.name for bench in cells.benches_of(Chosen("small", (), (given["LSTF"], given["TTS"])))}
    assert {"LSTF", "FastSpeech", "Transformer-TTS"} <= names and "SR" not in names


def test_a_file_that_changed_is_read_anew_for_cells_of_its_own(novel):
    chosen = Chosen("tiny", ("softmax",), (f"LM={novel}",))
    first = cells.settings(chosen)["LM: softmax"]
    held_out = [batch.targets for batch in NAMED["LM"].data(first).evaluation_batches(4)]
    assert cells.settings(chosen)["LM: softmax"] == first
    stale = {**first, "data": {**first["data"], "options": {"field": "words"}}}
    novel.write_text(prose(2000))
    second = cells.settings(chosen)["LM: softmax"]
    assert second["data"]["digest"] != first["data"]["digest"] and second["data"]["path"] == first["data"]["path"]
    again = [batch.targets for batch in NAMED["LM"].data(second).evaluation_batches(4)]
    assert any(not one.equal(other) for one, other in zip(held_out, again, strict=True))
    refused("has changed since the study began", NAMED["LM"].data, stale)


def test_a_folder_has_another_digest_when_a_file_in_it_is_changed_added_or_renamed(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "1.txt").write_text("one")

    def digest():
        return OwnData("LM", str(tmp_path / "a"), {}).setting()["digest"]

    seen = [digest()]
    (tmp_path / "a" / "b" / "1.txt").write_text("two")
    seen.append(digest())
    (tmp_path / "a" / "2.txt").write_text("")
    seen.append(digest())
    (tmp_path / "a" / "2.txt").rename(tmp_path / "a" / "3.txt")
    seen.append(digest())
    assert len(set(seen)) == 4 and digest() == seen[-1]


def test_no_claim_is_judged_by_the_user_s_data(given):
    mechanisms = ("softmax", "local", "abc")

    def judged(*data):
        made = STUDY.make(Chosen("tiny", mechanisms, data))
        return {one.says.partition(":")[0] for one in made.checks}, made

    whole, standard = judged()
    assert {"language modelling", "noncausal-self", "causal-cross", "completed point clouds without attention"} & whole
    assert standard.needs
    found, made = judged(given["LM"])
    assert whole - found == {"language modelling", "softmax"} and not made.needs
    assert any("the paper claims of LM" in one for one in made.left_out) and "LM: on your data" in made.instead
    found, _ = judged(given["Sum"])
    assert whole - found == {"noncausal-self", "causal-cross"}
    parts = {part.title: part for part in STUDY.sections(Chosen("tiny", mechanisms, (given["Sum"],)), {})}
    assert {row["pattern"] for row in parts["Beside the published leaderboards"].rows} == {NC.value}


def test_scores_stand_beside_data(novel, tmp_path):
    odd = tmp_path / "seed=1.txt"
    odd.write_text("")
    assert score_files([f"LM={novel}", "scores.txt", str(odd)]) == ["scores.txt", str(odd)]


def test_a_path_may_have_commas(tmp_path):
    path = tmp_path / "a,b=c.txt"
    path.write_text("")
    assert OwnData.read(f"LM={path}") == OwnData("LM", str(path), {})
    assert OwnData.read(f"LM={tmp_path},field=words") == OwnData("LM", str(tmp_path), {"field": "words"})


def test_bad_data_are_told_before_anything_is_run(novel, load, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text(prose(100))

    def told(preset, *data):
        code, _, said = run(
            capsys, f"study cab --preset {preset} --mechanisms softmax --output {tmp_path / 'o'}", *data
        )
        assert code == 2 and not (tmp_path / "o").exists()
        return " ".join(said.split())

    said = told("tiny", f"lm={novel}")
    assert "data for 'lm'" in said and ", ".join(READERS) in said and f"try LM={novel}" in said
    assert "data for 'poetry'" in told("tiny", f"poetry={novel}")
    said = told("tiny", f"LM={tmp_path / 'nowel.txt'}")
    assert "nowel.txt, which does not exist" in said and f"try LM={novel}" in said
    assert "LM= without a path" in told("tiny", "LM=")
    assert "LM given twice" in told("tiny", f"LM={novel}", f"LM={short}")
    said = told("tiny", f"LM={short}")
    assert "in the preset tiny: length=256 with only" in said and "another preset" in said and "try length" not in said
    short.write_text("a word or two")
    assert (
        f"LM={short}: length=256 with only" in (said := told("tiny", f"LM={short}")) and "supported: more text" in said
    )
    said = told("tiny", f"LSTF={load}")
    assert (
        "data for LSTF in the preset tiny" in said
        and "supported: LM, MLM, Sum, PCC" in said
        and "--preset small" in said
    )
    said = told("small", f"LSTF={load}")
    assert f"LSTF={load}: a table with 2 columns that could be the target" in said and "try target=load" in said
    assert "option 'length' of data for LSTF" in told("small", f"LSTF={load},length=12")
    assert "option 'target' of data for LM; supported: field" in told("tiny", f"LM={novel},target=x")
    assert "data for a task as LM=novel.txt" in told("tiny", novel)


def test_the_command_runs_cells_again_for_a_changed_file_alone(novel, tmp_path, capsys, monkeypatch):
    sizes = cells.PRESETS["tiny"]["LM"] | SMOKE | {"length": 32}
    monkeypatch.setitem(cells.PRESETS, "tiny", {"LM": sizes})
    line = f"study cab LM={novel} --mechanisms softmax --seeds 1 --output {tmp_path / 'o'}"
    ran, whole = [], runs.run_cell
    monkeypatch.setattr(runs, "run_cell", lambda *cell: ran.append(cell) or whole(*cell))
    first = answer(capsys, line)
    assert (first["done"], first["planned"], len(ran)) == (1, 1, 1) and first["data"] == [f"LM={novel}"]
    assert answer(capsys, line)["cells"] == first["cells"] and len(ran) == 1
    novel.write_text(prose(2000))
    second = answer(capsys, line)
    assert len(ran) == 2 and second["done"] == 1 and second["cells"][0]["PPL"] != first["cells"][0]["PPL"]
