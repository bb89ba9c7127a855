"""The pattern detector: the catalogue is as its cards say, planted leaks are found, and unfit modules are refused."""

import json
from pathlib import Path

import pytest
import torch
from command_line import run
from torch import nn

from regard.catalogue import get_mechanism, list_mechanisms
from regard.contract import Pattern, Unsupported
from regard.workbench.advice.layer_work import MIXING
from regard.workbench.detection.patterns import Finding, Suspect, detect
from regard.workbench.detection.suspects import suspect

FILE = Path(__file__).with_name("somebodys_modules.py")
NS, CS, NC, CC = Pattern
MECHANISMS = [name for name in list_mechanisms() if get_mechanism(name).kind in MIXING]


def found(name: str, **options: object) -> dict[Pattern, Finding]:
    return {one.pattern: one for one in detect(suspect(f"{FILE}:{name}", options))}


def patterns(name: str, **options: object) -> list[Pattern]:
    return [pattern for pattern, one in found(name, **options).items() if one.has]


@pytest.mark.parametrize("name", MECHANISMS)
def test_what_is_detected_of_a_mechanism_is_what_its_card_says(name: str) -> None:
    findings = detect(suspect(name, {}))
    assert [one.pattern for one in findings if one.has] == [p for p in Pattern if p in get_mechanism(name).patterns]
    assert all(one.agrees for one in findings)
    assert all(one.query_padding is True for one in findings if one.has and one.pattern.cross)
    assert all(one.rows for one in findings if one.has)


@pytest.mark.parametrize("name", ["softmax", "gated_linear", "local:window=3", "mamba2", "mixture_of_heads"])
def test_a_mechanism_that_decodes_gives_the_outputs_of_the_whole_call(name: str) -> None:
    assert [one.steps for one in detect(suspect(name, {})) if one.pattern is CS] == [True]


def test_a_right_module_has_all_patterns_and_keeps_padding_out() -> None:
    findings = found("Right")
    assert [one.has for one in findings.values()] == [True] * 4
    assert [one.padding for one in findings.values()] == [True] * 4


@pytest.mark.parametrize(
    ("name", "has"),
    [("FutureMean", [NS, NC]), ("KnowsLength", [NS]), ("OneAhead", [NS]), ("FutureGradient", [CS])],
)
def test_planted_leaks_are_found(name: str, has: list[Pattern]) -> None:
    findings = found(name)
    if name == "FutureGradient":
        assert not findings[CS].has
        assert "gradient" in findings[CS].why
    else:
        assert patterns(name) == has
        assert findings[CS].leak is not None
        assert findings[CS].leak > 1e-5


def test_a_prefix_whose_outputs_are_no_numbers_is_not_unchanged() -> None:
    assert not found("NaNAlone")[CS].has


def test_padding_that_is_seen_is_told() -> None:
    assert not found("PaddingSeen")[NS].agrees
    assert found("PaddingSeen")[NS].padding is False


def test_padded_queries_that_are_seen_are_told() -> None:
    for name, note in (
        ("MixesQueries", "for which it takes no query_padding_mask"),
        ("IgnoresQueryMask", "padded que"),
    ):
        one = found(name)[NC]
        assert (one.has, one.padding, one.query_padding, one.agrees) == (True, True, False, False)
        assert note in one.why
    assert found("MixesQueries")[NS].padding is False
    kept = found("HonoursQueryMask")
    assert (kept[NC].padding, kept[NC].query_padding, kept[NC].agrees) == (True, True, True)
    assert (kept[NS].padding, kept[NS].query_padding) == (True, None)
    assert found("Right")[NC].query_padding is True, "it keeps queries apart, and so needs no mask"
    assert (found("FutureMean")[NC].query_padding, found("FutureMean")[NC].agrees) == (None, True), "no mask, no claim"


@pytest.mark.parametrize(
    ("name", "steps", "note"),
    [
        ("Sums", True, ""),
        ("NeedsItsState", True, ""),
        ("ReturnsItsStateOnDemand", True, ""),
        ("FillsItsState", True, ""),
        ("Steps", True, ""),
        ("Right", None, ""),
        ("KeepsItsState", None, "it takes a state, and returns none"),
        ("ForgetsInItsState", False, "token by token, with its state, it gives other outputs than the whole call"),
        ("NeverFillsItsState", False, "token by token"),
        ("StepsRaise", False, "with a state it raises RuntimeError: no step yet"),
    ],
)
def test_decoding_with_a_state_is_compared_with_the_whole_call(name: str, steps: bool | None, note: str) -> None:
    findings = found(name)
    assert (findings[CS].has, findings[CS].steps, findings[CS].agrees) == (True, steps, steps is not False)
    assert note in findings[CS].why
    assert [one.steps for pattern, one in findings.items() if pattern is not CS] == [None] * 3


def test_a_triangular_mask_over_the_memory_is_no_cross_pattern() -> None:
    findings = found("Triangle")
    assert not findings[NC].has
    assert not findings[CC].has
    assert "triangular" in findings[CC].why


def test_a_module_that_does_not_read_its_memory_has_no_cross_pattern() -> None:
    assert patterns("IgnoresMemory") == [CS]
    assert "no output depends on the memory" in found("IgnoresMemory")[NC].why


def test_a_module_of_single_precision_is_probed_in_it() -> None:
    assert patterns("SinglePrecision") == [CS]


def test_a_constructor_gets_what_it_is_given() -> None:
    assert patterns("NeedsWindow", window=3) == [CS]
    with pytest.raises(Unsupported, match=r"NeedsWindow without window.*--option window="):
        suspect(f"{FILE}:NeedsWindow", {})
    with pytest.raises(Unsupported, match=r"option 'windows'.*try window"):
        suspect(f"{FILE}:NeedsWindow", {"windows": 3})


def test_a_module_that_draws_is_probed_when_it_is_seeded() -> None:
    findings = detect(suspect(f"{FILE}:Random", {}, seeded=True), [NS])
    assert "no output sees another token" in findings[0].why


@pytest.mark.parametrize(
    ("name", "layout"), [("MixesRows", True), ("TokensFirst", True), ("MeanOfTheBatch", False), ("tokens_first", True)]
)
def test_a_module_whose_rows_change_each_other_has_no_pattern(name: str, layout: bool) -> None:
    tried = [one for one in found(name).values() if one.rows is not None]
    assert len(tried) >= 2
    for one in tried:
        assert (one.has, one.rows, one.agrees) == (False, False, False)
        assert "other rows of a batch" in one.why
        assert ("tokens first?" in one.why) == layout
        assert "no output depends" not in one.why or not layout, "nothing is said of tokens that are not told apart"


def test_a_mask_that_raises_is_told_as_what_raised() -> None:
    one = found("RaisesWithAMask")[NS]
    assert (one.has, one.padding, one.query_padding, one.agrees) == (True, False, None, False)
    assert one.raised == {"padding": "with a padding mask it raises AssertionError: no masks yet"}
    assert "with a padding mask it raises AssertionError" in found("tokens_first")[NS].why
    assert found("StepsRaise")[CS].raised.keys() == {"steps"}
    assert not found("PaddingSeen")[NS].raised


def test_a_module_of_whole_blocks_is_tried_with_prefixes_of_whole_blocks() -> None:
    with pytest.raises(Unsupported, match=r"runs in no pattern .*multiple of 16.*try .*--length 32 --memory-length 32"):
        found("WholeBlocks")
    with pytest.raises(Unsupported, match="--length 64"):
        found("OneLength")
    for name, length, has, prefixes in (
        ("WholeBlocks", 48, True, 2),
        ("KnowsBlocks", 48, False, 2),
        ("WholeBlocks", 16, True, 0),
        ("OneLength", 64, True, 0),
        ("Sums", 48, True, 6),
    ):
        probed = suspect(f"{FILE}:{name}", {})
        assert probed.make(CS).dtype == torch.float64
        findings = {one.pattern: one for one in detect(probed, length=length, memory_length=length)}
        assert (findings[CS].has, findings[CS].prefixes) == (has, prefixes), name
        assert ("takes no prefix" in findings[CS].why) == (prefixes == 0)
        assert ("those of 16, 32 tokens" in findings[CS].why) == (has and prefixes == 2)
        assert findings[NS].prefixes is None


def test_what_a_constructor_hands_on_is_known() -> None:
    assert patterns("HandsOn") == [NS, CS, NC, CC]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Random", "draws random numbers"),
        ("Remembers", "keeps something from call to call"),
        ("AddsTheLastOne", "keeps something from call to call"),
        ("Raises", "runs in no pattern .*RuntimeError: sizes of tensors must match\\)"),
        ("RaisesWhenMade", "runs in no pattern .*RuntimeError: no weights here"),
        ("Overwrites", "changes its input in place"),
        ("Shorter", r"shape \(1, 12, 32\)"),
        ("Nowhere", "'Nowhere' in .*supported: .*Right"),
    ],
)
def test_a_module_that_cannot_be_probed_is_refused_in_a_sentence(name: str, why: str) -> None:
    with pytest.raises(Unsupported, match=why) as refusal:
        found(name)
    assert "\n" not in str(refusal.value)


def test_a_leak_of_a_mechanism_is_found_against_its_card() -> None:
    """The detector does not trust cards: a causal softmax that adds the mean of all tokens is caught."""
    honest = suspect("softmax", {})

    class Leaky:
        dtype, takes_padding, takes_query_padding, takes_state = torch.float64, False, False, False

        def __init__(self, pattern: Pattern) -> None:
            self.inner = honest.make(pattern)

        def __call__(self, x, memory=None, **padded):
            return self.inner(x, memory) + 1e-5 * x.mean(1, keepdim=True)

    findings = detect(Suspect("leaky", honest.dim, Leaky, honest.claims))
    assert [(one.pattern, one.agrees) for one in findings] == [(NS, True), (CS, False), (NC, True), (CC, False)]


def test_verdicts_are_those_of_cabs_own_rule_where_it_says_no() -> None:
    """CAB accepts f(X)[i] = f(X[:i + 1])[i] for i from n / 2 on, to a total of 1e-4; what it rejects is rejected here."""
    torch.manual_seed(0)

    def cab(module: nn.Module) -> bool:
        x = torch.randn(4, 50, 32)
        with torch.no_grad():
            whole = first(module(x))
            return all(
                float((first(module(x[:, : i + 1]))[:, i] - whole[:, i]).abs().sum()) <= 1e-4 for i in range(25, 50)
            )

    def first(output: object) -> torch.Tensor:
        return output[0] if isinstance(output, tuple) else output  # type: ignore[return-value]

    space: dict[str, object] = {}
    exec(compile(FILE.read_text(), str(FILE), "exec"), space)
    for name, arguments in (
        ("Right", (32, 4, True)),
        ("FutureMean", (32, 4, True)),
        ("KnowsLength", ()),
        ("OneAhead", ()),
    ):
        made = space[name](*arguments).eval()  # type: ignore[operator]
        assert found(name)[CS].has == cab(made), name


def test_the_command_tells_and_ends_with_its_codes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run(capsys, "detect-patterns --expect causal-self --json", f"{FILE}:FutureMean")
    rows = json.loads(out)
    assert code == 1
    assert rows["disagreements"] == 1
    assert [row["has"] for row in rows["findings"]] == [True, False, True, False]
    assert run(capsys, "detect-patterns", f"{FILE}:Right")[0] == 0
    for name, words in (
        ("PaddingSeen", ("leaks", "what padding holds changes other outputs")),
        ("MixesQueries", ("queries leak", "what padded queries hold changes other outputs")),
        ("ForgetsInItsState", ("not equal", "does not give the outputs of the whole call")),
        ("tokens_first", ("raises", "tokens first?", "with a padding mask it raises AssertionError")),
        ("MeanOfTheBatch", ("its output for a row changes with the other rows of a batch",)),
        ("RaisesWithAMask", ("raises", "causal-self: with a padding mask it raises AssertionError: no masks yet")),
    ):
        code, out, _ = run(capsys, "detect-patterns", f"{FILE}:{name}")
        assert code == 1
        assert all(word in " ".join(out.split()) for word in words)
    assert "what padding holds" not in out
    monkeypatch.setenv("COLUMNS", "300")
    code, out, _ = run(capsys, "detect-patterns --length 64 --memory-length 64", f"{FILE}:OneLength")
    assert (code, "at one length" in out) == (0, True)
    code, out, _ = run(capsys, "detect-patterns --json", f"{FILE}:MeanOfTheBatch")
    assert [(row["has"], row["rows"]) for row in json.loads(out)["findings"]] == [(False, False)] * 4
    for refused in ("low_rank_pooling", str(FILE), "nowhere.py:A", f"{FILE}:Right --option window"):
        code, _, told = run(capsys, "detect-patterns", *refused.split())
        assert code == 2
        assert len(told.strip().splitlines()) == 1
