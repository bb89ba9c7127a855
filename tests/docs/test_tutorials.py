"""The tutorials run as printed: files are written, snippets and commands executed, in the order of the page."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
from command_line import run
from support import ALL

from regard import catalogue
from regard.workbench.verification.verify import PROGRAMS, PROPERTIES

TUTORIALS = sorted((Path(__file__).parents[2] / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(r'^```(python|sh)(?: title="([\w.]+)")?\n(.*?)^```', re.DOTALL | re.MULTILINE)
NEEDS = {"swap": ("timm", "transformers")}
PLUGINS = ("relu",)
SHOWN_ONLY = {"report"}
"""Pages whose commands read an output folder that another page creates."""


@pytest.mark.parametrize("page", [p for p in TUTORIALS if p.stem not in SHOWN_ONLY], ids=lambda p: p.stem)
def test_a_tutorial_runs_as_it_stands(page, tmp_path, monkeypatch, capsys):
    for module in NEEDS.get(page.stem, ()):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    if not ALL:  # programs of a single-file mechanism are tested with the page for authors (test_documents.py)
        calls = [prop for prop in PROPERTIES if prop.name not in PROGRAMS]
        monkeypatch.setattr("regard.workbench.verification.verify.PROPERTIES", calls)
    names: dict[str, object] = {}
    for language, title, code in BLOCK.findall(page.read_text()):
        if title:
            Path(title).write_text(code)
        elif language == "python":
            with warnings.catch_warnings():
                exec(compile(code, page.name, "exec"), names)
        else:
            for line in code.splitlines():
                code, _, messages = run(capsys, line.split("  #")[0].removeprefix("regard "))
                assert code == 0, line + messages
                for name in PLUGINS:
                    catalogue.unregister(name)  # for readers each command is a new process
