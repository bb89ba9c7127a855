"""The page of the studies' findings."""

import json
from pathlib import Path

from studied import studies_page

from regard.studies import Chosen, Curves, Section, get_study, opened

PUBLISHED = Path(__file__).parents[2] / "docs" / "data" / "studies.json"


def test_the_page_tells_questions_sections_and_verdicts():
    study = get_study("attention-passes")
    record = opened(study, Chosen("tiny", ("softmax",)), None)
    shown = Section("Lines", "of two", [Curves("c", "x", "y", {"a|b": [(1, 2.0), (2, 3.0)]})], [{"a|b": 1, "c": None}])
    page = "\n\n".join(studies_page({"measured": "this", "studies": [{**record, "sections": [shown.plain()]}]}))
    assert study.question in page and "### Lines" in page and "<svg" in page
    assert "preset `tiny`, 1 mechanism, 0 of " in page
    assert "| a\\|b | c |" in page and "| 1 | — |" in page
    assert record["findings"][0]["says"] in page
    assert "Not measured" in "\n".join(studies_page(None))


def test_published_cells_are_those_of_studies_that_there_are():
    for record in json.loads(PUBLISHED.read_text())["studies"]:
        study = get_study(record["study"])
        assert record["preset"] in study.presets and record["done"] > 0
        assert "\n".join(studies_page({"measured": "this", "studies": [record]})).count("### ") >= 2
