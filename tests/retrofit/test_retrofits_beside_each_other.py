"""`regard compare --from`: several retrofits of one model, one after the other, on one page."""

import copy
import json

import pytest
from command_line import run
from small_llama import SIZES, WORK, llama, tokens, transformers

from regard import Unsupported
from regard.cli.retrofits import OF_RETROFITS
from regard.measurement.budget import Budget
from regard.models.variants import read_variants
from regard.retrofit.measures import verdict
from regard.workbench.retrofits import RECORD, compare_retrofits, recommend, render, rows


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A comparison of two retrofits, its folder and the call that made it."""
    model, ids, folder = llama(2, loud=(0,)), tokens(), tmp_path_factory.mktemp("beside")

    def call():
        return compare_retrofits(
            model,
            read_variants("gated_linear,local:window=4"),
            data=ids,
            output=folder,
            budget=Budget.parse("28 steps"),
            keep_layers=(0,),
            **WORK,
        )

    return call(), folder, call


def test_each_has_a_folder_that_loads_and_all_have_one_page(two):
    told, folder, _ = two
    assert list(told["retrofits"]) == ["gated_linear", "local:window=4"]
    for name in ("gated_linear", "local-window=4"):
        assert json.loads((folder / name / "retrofit.json").read_text())["from"]["class"] == "LlamaForCausalLM"
        assert (folder / name / "model.safetensors").is_file()
    assert json.loads((folder / RECORD).read_text())["recommendation"] == told["recommendation"]
    page = (folder / "report.html").read_text()
    assert page.count("<svg") >= 2 and "local:window=4" in page and "original" in page
    assert "keeps these layers: 0." in page


def test_the_page_is_written_again(two, capsys, tmp_path):
    _, folder, _ = two
    page = (folder / "report.html").read_text()
    code, out, _ = run(capsys, f"report {folder} --output {tmp_path}/again.html")
    assert code == 0 and "again.html" in "".join(out.split()) and (tmp_path / "again.html").read_text() == page


def test_a_second_call_trains_nothing_and_tells_the_same(two, monkeypatch):
    told, _, call = two
    monkeypatch.setattr("regard.retrofit.transfer.transfer_losses", None)
    monkeypatch.setattr("regard.retrofit.measures.language.perplexity", None)
    assert call() == told


def test_the_original_stands_in_the_first_row(two):
    told, _, _ = two
    table = rows(told["retrofits"])
    assert [row["attention"] for row in table] == ["original", "gated_linear", "local:window=4"]
    assert table[0]["new layers"] == "none" and table[0]["change"] is None and table[1]["new layers"] == "1"
    assert len({tuple(row) for row in table}) == 1
    shown = [value for row in table for name, value in row.items() if name.startswith("perplexity")]
    assert shown and all(len(value.replace(".", "").replace(",", "").lstrip("0")) <= 4 for value in shown)


def test_lengths_that_only_some_mechanisms_read_are_left_open_for_the_others(two):
    told, _, _ = two
    records = copy.deepcopy(told["retrofits"])
    results = records["local:window=4"]["results"]
    for what in ("needles", "pairs", "prefill", "decoding"):
        results[what]["256"] = results[what]["32"]
    results["state"]["8192"] = results["state"]["256"]
    (judged,) = results["perplexity"].values()
    judged["length"] *= 2
    judged["by_position"].append({"first": 64, "last": 127, "original": 40.0, "retrofit": 41.0})
    original, recurrent, window = rows(records)
    assert original.keys() == recurrent.keys() == window.keys() and "state at 256" in original
    for column in ("needles in 256", "pairs in 256", "prompt of 256", "token after 256"):
        assert recurrent[column] is None and original[column] and window[column]
    assert "127" in render({**told, "retrofits": records})


def made(change, take, error=0.001):
    its = {"change": change, "standard_error": error}
    return {
        "results": {"perplexity": {"text": its}},
        "recommendation": {"take": take, "text": "Take the retrofit: it."},
    }


def test_the_one_that_loses_least_of_those_worth_it_is_recommended():
    records = {"a": made(0.05, True), "b": made(0.02, True), "c": made(0.01, False)}
    assert recommend(records) == "b: take the retrofit: it."
    assert "a cannot be told apart" in recommend({"a": made(0.021, True), "b": made(0.02, True)})
    none = recommend({"a": made(0.5, False), "b": made(0.2, False)})
    assert none.startswith("Keep the original: the nearest is b") and "20.0% higher" in none


def test_what_takes_longer_is_said_where_a_retrofit_is_recommended():
    def results(before, after):
        return {
            "perplexity": {"text": {"change": 0.01, "standard_error": 0.0, "blocks": 9}},
            "state": {"8192": {"original": 100, "retrofit": 50}},
            "prefill": {"64": {"original": {"median": 1.0}, "retrofit": {"median": 1.0}}},
            "decoding": {
                "64": {
                    "original": {"median": before, "held": 100},
                    "retrofit": {"median": after, "held": 50},
                }
            },
            "recall": {},
            "left_out": (),
            "generates_with_cache": True,
        }

    slow, even = verdict.recommend(results(1.0, 3.6)), verdict.recommend(results(1.0, 1.01))
    assert slow["take"] and slow["text"].endswith(
        "50% of the original's, but a token after 64 tokens takes 3.6 times the time."
    )
    assert even["take"] and even["text"].endswith("50% of the original's.")


@pytest.mark.parametrize(
    ("mechanisms", "said"),
    [
        ("gated_linear,mamba", "mamba"),
        ("linear,long_short", "long_short"),
        ("linear,landmark:block=7,top_k=4", "positions up to"),
        ("linear,mixture_of_heads:active_heads=9", "active_heads=9"),
    ],
)
def test_a_mechanism_that_cannot_enter_is_refused_before_anything_is_trained(tmp_path, mechanisms, said):
    with pytest.raises(Unsupported, match=said):
        compare_retrofits(
            llama(2),
            read_variants(mechanisms),
            data=tokens(),
            output=tmp_path / "out",
            budget=Budget.parse("60 steps"),
            **WORK,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mechanisms", ["linear,landmark", "landmark,linear"])
def test_a_text_shorter_than_the_longest_block_is_refused_whatever_the_order(tmp_path, mechanisms):
    sizes = {**SIZES, "max_position_embeddings": 1024, "sliding_window": 64, "num_hidden_layers": 2}
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes)).eval()  # landmark's blocks: the window
    with pytest.raises(Unsupported, match="shorter than a block of 512"):
        compare_retrofits(
            model,
            read_variants(mechanisms),
            data=tokens(400),
            output=tmp_path / "out",
            budget=Budget.parse("60 steps"),
            keep_layers=(),
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("budget", "said"),
    [("12 steps", "a budget of 12 steps.*attention transfer"), ("60 steps", r"linear, which holds other files")],
)
def test_what_a_later_mechanism_lacks_is_refused_before_anything_is_trained_or_written(
    tmp_path, monkeypatch, budget, said
):
    (tmp_path / "out" / "linear").mkdir(parents=True)
    (tmp_path / "out" / "linear" / "letter.txt").write_text("dear")
    mechanisms = "landmark:block=7,top_k=1,chunk=8," + ("gated_linear" if budget == "12 steps" else "linear")
    monkeypatch.setattr("regard.retrofit.run.tune", None)
    files = sorted(tmp_path.rglob("*"))
    with pytest.raises(Unsupported, match=said):
        compare_retrofits(
            llama(2),
            read_variants(mechanisms),
            data=tokens(),
            output=tmp_path / "out",
            budget=Budget.parse(budget),
            keep_layers=(),
            **WORK,
        )
    assert sorted(tmp_path.rglob("*")) == files


def test_the_command_takes_the_options_of_a_retrofit(capsys, monkeypatch):
    def taken(*_, **settings):
        raise Unsupported(json.dumps({name: settings.get(name) for name in (*OF_RETROFITS, "length", "data")}))

    monkeypatch.setattr("regard.workbench.retrofits.compare_retrofits", taken)
    line = "compare --from folder --mechanisms masformer --keep-layers 0,1 --distil 0 --train new --rate 0.1"
    more = "--transfer-rate 0.2 --batch-size 3 --evaluation-blocks 5 --positions 64 --shared-heads important"
    code, _, message = run(capsys, f"{line} {more}")
    assert code == 2 and json.loads(message[message.index("{") :].replace("\n", " ")) == {
        "keep_layers": "0,1",
        "distil": 0.0,
        "train": "new",
        "rate": 0.1,
        "transfer_rate": 0.2,
        "batch_size": 3,
        "evaluation_blocks": 5,
        "positions": 64,
        "shared_heads": "important",
        "length": None,
        "data": None,
    }


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("compare --from folder --mechanisms local", "does not exist"),
        ("compare text.txt --keep-layers none", "--keep-layers without --from"),
        ("compare text.txt --positions 64", "--positions without --from"),
        ("compare text.txt --shared-heads important", "--shared-heads without --from"),
        ("compare text.txt --from folder", "without --mechanisms"),
        ("compare text.txt --from folder --mechanisms local --dim 8", "--dim together with --from"),
        ("compare text.txt --from folder --mechanisms local", "does not exist"),
    ],
)
def test_what_a_pretrained_model_has_no_use_for_is_said(capsys, tmp_path, monkeypatch, line, said):
    monkeypatch.chdir(tmp_path)
    code, _, message = run(capsys, line)
    assert code == 2 and said in " ".join(message.split())
    assert not (tmp_path / "runs").exists()
