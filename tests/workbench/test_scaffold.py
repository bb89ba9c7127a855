import dataclasses

import pytest
import torch

from regard import Mask, Pattern, Unsupported, get_mechanism
from regard.apply import apply
from regard.catalogue import load_plugin, unregister
from regard.workbench.scaffold import new_mechanism
from regard.workbench.verification.failures import CAUSES, grouped
from regard.workbench.verification.verify import PROGRAMS, PROPERTIES, Cell, Place, check, plan, unmeasured, verify


def verified(**chosen):
    """Failures of the plugin called mine, which is unregistered afterwards."""
    try:
        cells = verify(["mine"], **chosen)
    finally:
        unregister("mine")
    assert cells
    return grouped(cells)


def test_a_new_mechanism_fails_until_its_definition_is_written(tmp_path):
    path = new_mechanism("mine", tmp_path)
    assert load_plugin(path).MECHANISM.name == "mine"
    (group,) = verified(patterns=["causal-self"], properties=["causality", "step", "reference", "compile"])
    assert "the definition of mine is to be written" in str(group)
    unwritten = 'raise NotImplementedError("the definition of mine is to be written, in `reference`")'
    written = """scores = call.scale * q.double() @ k.double().mT
    scores = scores.tril(k.shape[2] - q.shape[2]) if call.pattern.causal else scores
    return (scores @ v.double()).to(v.dtype)"""
    path.write_text(path.read_text().replace(unwritten, written))
    load_plugin(path)
    assert verified() == [], "rows are padded, packed, empty and uneven: the definition knows none of it"


def test_a_definition_alone_has_no_cells_of_programs_and_is_told_why(tmp_path):
    load_plugin(new_mechanism("mine", tmp_path))
    try:
        (sentence,) = unmeasured(["mine"], [cell("padding", "", status="pass")])
        assert "before its card has a parallel or chunked form" in sentence
        assert not {place.prop.name for place in plan(["mine"])} & PROGRAMS
    finally:
        unregister("mine")


def branching(call, q, k, v):
    return v if q.sum() > 0 else -v


def failing(call, q, k, v):
    return [][len(v)]


@pytest.mark.parametrize(
    ("form", "says"), [(branching, "Data-dependent branching"), (failing, "IndexError: list index")]
)
def test_what_a_program_cannot_be_made_of_is_told_in_a_line_with_its_place(form, says):
    card = dataclasses.replace(get_mechanism("softmax"), name="mine", aliases=(), forms={"parallel": form})
    (compiled,) = (prop for prop in PROPERTIES if prop.name == "compile")
    found = check(Place(card, Pattern.CAUSAL_SELF, compiled, torch.float64))
    assert found.status == "fail" and says in found.detail and form.__name__ in found.detail
    assert "\n" not in found.detail


def test_a_card_without_a_form_that_could_run_is_refused_where_it_is_made():
    card = get_mechanism("linear")
    for forms, words in (
        ({}, "linear without a form for whole sequences.*try reference"),
        ({"step": card.forms["step"]}, "without a form for whole sequences"),
        ({"paralel": card.forms["parallel"]}, "form='paralel'.*try parallel"),
    ):
        with pytest.raises(Unsupported, match=words):
            dataclasses.replace(card, forms=forms)


def test_a_definition_alone_refuses_what_it_cannot_cut_by_rows():
    card = get_mechanism("softmax")
    card = dataclasses.replace(card, name="mine", aliases=(), forms={"reference": card.forms["reference"]})
    inputs = {name: torch.randn(2, 2, 5, 4) for name in ("q", "k", "v")}
    mask = Mask(lengths=torch.tensor([5, 3]), bias=torch.zeros(1, 1, 5, 5))
    with pytest.raises(Unsupported, match="padded or packed tokens with bias in mine, which has its definition alone"):
        apply(card, inputs, mask=mask)


@pytest.mark.parametrize(
    ("name", "words"), [("softmax", "my_softmax"), ("A b", "a_b"), ("class", "class"), ("", "my_mechanism")]
)
def test_a_name_that_cannot_be_is_refused_and_nothing_is_written(tmp_path, name, words):
    with pytest.raises(Unsupported, match=words):
        new_mechanism(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_exists_stays(tmp_path):
    new_mechanism("mine", tmp_path).write_text("mine")
    with pytest.raises(Unsupported, match="exists"):
        new_mechanism("mine", tmp_path)
    assert (tmp_path / "mine.py").read_text() == "mine"
    with pytest.raises(Unsupported, match="cannot be written"):
        new_mechanism("mine", tmp_path / "nowhere")


def cell(name, detail, status="fail", mechanism="mine"):
    return Cell(mechanism, "", "causal-self", name, "float64", "torch", status, None, 1e-9, detail, 0.0)


def test_equal_failures_are_one_with_their_likely_cause():
    cells = [
        cell("padding", "error 3.2e-01 above 1e-09"),
        cell("padding", "error 4.1e-02 above 1e-09"),
        cell("step", "error 4.1e-02 above 1e-09"),
        *(cell(name, "ValueError: no (f, line 3)") for name in ("step", "packing", "state")),
        cell("padding", "error 3.2e-01 above 1e-09", mechanism="other"),
        cell("padding", "", status="pass"),
    ]
    groups = grouped(cells)
    assert [len(group.cells) for group in groups] == [3, 2, 1, 1]
    assert "step, packing, state" in str(groups[0]) and "Likely" not in str(groups[0])
    assert CAUSES["padding"] in str(groups[1]) and "2 cells" in str(groups[1])
    assert set(CAUSES) <= {p.name for p in PROPERTIES}
