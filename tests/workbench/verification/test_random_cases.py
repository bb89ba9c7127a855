"""Random cases: a fixed sample for every mechanism, and the search on a mechanism that is wrong."""

import dataclasses
import json
import sys

import pytest
import torch

from regard import Unsupported, get_mechanism, list_mechanisms
from regard.catalogue import register
from regard.contract import Pattern, Waiver
from regard.workbench.verification import random_cases
from regard.workbench.verification.properties import Broken
from regard.workbench.verification.random_cases import Case, drawn_from, run_case, search, unreached_options
from regard.workbench.verification.subjects import Subject
from regard.workbench.verification.verify import PROPERTIES, Place, check, verified_backends

SAMPLE = 4


@pytest.mark.parametrize("backend", verified_backends())
@pytest.mark.parametrize("name", list_mechanisms())
def test_a_sample_of_cases_holds(name, backend):
    found = search(get_mechanism(name), SAMPLE, backend=backend)
    assert found.case is None, f"{found.detail}: {found.case.command}"
    assert found.ran >= SAMPLE / 2


@pytest.fixture
def from_seven_on(monkeypatch):
    """Softmax attention that is wrong from seven tokens on, in the catalogue as ``wrong``."""
    softmax = get_mechanism("softmax")

    def parallel(call, *tensors, **more):
        result = softmax.forms["parallel"](call, *tensors, **more)
        if tensors[0].shape[2] >= 7 if tensors else more["q"].shape[2] >= 7:
            result.output = result.output + 1
        return result

    monkeypatch.setattr("regard.catalogue._plugins", {})
    card = dataclasses.replace(softmax, name="wrong", aliases=(), forms={**softmax.forms, "parallel": parallel})
    register(card, sys.modules[__name__])
    return card


def test_the_smallest_case_that_fails_is_found_and_fails_again(from_seven_on):
    found = search(from_seven_on, 100)
    assert found.case is not None
    assert max(found.case.lengths) + (found.case.room if found.case.padding != "none" else 0) == 7
    assert found.case.options == {}
    with pytest.raises(Broken, match="error"):
        run_case(Case.read(str(found.case)))
    assert str(found.case) in found.case.command


def test_the_same_seed_draws_the_same_cases():
    drawn = [[], [], []]
    for cases, seed in zip(drawn, (3, 3, 4), strict=True):
        search(get_mechanism("local"), 8, seed=seed, on_case=cases.append)
    assert drawn[0] == drawn[1] != drawn[2]


NO_CASES = ["no case", "[1]", '{"mechanism": "softmax"}']


@pytest.mark.parametrize("text", [*NO_CASES, '{"mechanism": "softmax", "pattern": "causal-self", "length": 3}'])
def test_what_is_no_case_is_refused(text):
    with pytest.raises(Unsupported, match="as `regard verify --random` prints it"):
        Case.read(text)


def test_a_case_keeps_its_tuples():
    case = Case("softmax", "causal-self", {"window": (3, 0)}, lengths=(2, 4))
    assert Case.read(str(case)) == case
    assert json.loads(str(case))["options"] == {"window": [3, 0]}


def test_options_that_no_variant_has_are_told():
    card = dataclasses.replace(get_mechanism("local"), variants={"blocks": {"form": "block", "lookback": 2}})
    assert unreached_options(card) == ["window", "block"]
    bare = dataclasses.replace(card, variants={})
    assert unreached_options(bare) == ["form", "form=block", "window", "block", "lookback"]


def test_a_waiver_of_one_dtype_leaves_the_others_to_be_tried():
    subject = Subject.of(get_mechanism("nystrom"), Pattern.NONCAUSAL_SELF, "exact")
    assert random_cases._waived(subject, random_cases.WAIVERS["rows"], torch.float32, "torch")
    assert not random_cases._waived(subject, random_cases.WAIVERS["rows"], torch.float64, "torch")


def test_a_waiver_of_one_backend_leaves_the_others_to_be_tried():
    waiver = Waiver("step", "for once", backends=("torch",))
    subject = Subject(dataclasses.replace(get_mechanism("linear"), waivers=(waiver,)), Pattern.CAUSAL_SELF)
    tried = {b: random_cases._waived(subject, ["step"], torch.float32, b) for b in ("torch", "native")}
    assert tried == {"torch": True, "native": False}
    step = next(prop for prop in PROPERTIES if prop.name == "step")
    places = [Place(subject.card, subject.pattern, step, torch.float32, backend) for backend in verified_backends()]
    assert [cell and cell.status for cell in map(check, places)] == ["waived", "pass"][: len(places)]


def test_gradients_that_cancel_are_not_measured_by_what_is_left_of_them():
    """A single number divided by its own norm has a gradient of 0 up to the norm's eps."""
    options = {"block": 4, "activation": "relu"}
    case = Case("diagonal", "noncausal-self", options, "relu", lengths=(1,), value_width=1, backend="native")
    assert run_case(case) < 1e-5


@pytest.mark.parametrize(("name", "factor"), [("diagonal", 1.01), ("softmax", 1.001)])
def test_a_wrong_gradient_is_still_found(name, factor):
    card = get_mechanism(name)

    def parallel(call, q, k, v):
        return card.forms["parallel"](call, q, k, factor * v - (factor - 1) * v.detach())

    subject = Subject(dataclasses.replace(card, forms={**card.forms, "parallel": parallel}), Pattern.NONCAUSAL_SELF)
    assert random_cases.check_gradients(Case(name, "noncausal-self"), subject, torch.float64) > 1e-4


def test_cases_begin_with_the_variants_that_are_asked_for():
    drawn = []
    search(get_mechanism("local"), 8, variants=["blocks"], on_case=drawn.append)
    assert {case.variant for case in drawn} == {"blocks"}
    card = get_mechanism("local")
    assert drawn_from(card, variants=["blocks", "no such"])[Pattern.CAUSAL_SELF] == ["blocks"]
    assert drawn_from(card, variants=["all"]) == drawn_from(card)
    with pytest.raises(Unsupported, match="random cases of local"):
        search(card, 8, variants=["no such"])
