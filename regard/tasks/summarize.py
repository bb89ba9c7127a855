"""Summarising: Python functions to the first line of their docstrings, or your own pairs."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator

from regard.tasks.documents import Document, read_standard_library
from regard.tasks.pairs import Pair, TextPairsTask

_FEWEST_WORDS = 3


class SummarizeTask(TextPairsTask):
    """Write the first line of a function's docstring from its source: Python's standard library, split by module.

    The docstring is removed from the source. No package is needed, but the pairs differ between Python versions, so
    scores are comparable only within one installation. Scored in ROUGE-L (Lin, "ROUGE: a package for automatic
    evaluation of summaries", 2004), the F1 of the longest common subsequence of words.

    Args:
        data: JSON lines with two fields, or a table with two columns (tab-separated text needs no names); None for
            functions of the standard library.
        validation, source, target, tokenizer, length, source_length, held_out, evaluation_items, seed: as in
            :class:`regard.tasks.paraphrase.ParaphraseTask`.
    """

    name = "summarize"
    metric = "ROUGE-L"
    by = "module"
    lengths = (512, 96)

    def read(self) -> tuple[str, list[Pair]]:
        documents, notes = read_standard_library()
        self._notes += notes
        pairs = [pair for document in documents for pair in functions(document)]
        return "functions of Python's standard library to the first line of their docstring", pairs

    def judge(self, generated: str, reference: str) -> float:
        return rouge_l(generated, reference)

    @property
    def simple_name(self) -> str:
        return "the source itself" if self._own else "the function's name"

    def simple(self, source: str) -> str:
        name = None if self._own else re.search(r"\bdef (\w+)", source)
        if name is None:
            return source
        return " ".join(re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+", name[1]))


def functions(document: Document) -> Iterator[Pair]:
    """Functions of a module with the first line of their docstring (three words or more); none if it does not parse."""
    text = document.text.decode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old sources have escapes that newer Pythons warn about
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            return
    lines = re.split(r"(?<=\n)", text.replace("\r\n", "\n").replace("\r", "\n"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        first, after = node.body[:2]
        if not (isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)):
            continue
        summary = (ast.get_docstring(node) or "").partition("\n")[0].strip()
        last = first.end_lineno or first.lineno
        if len(rouge_words(summary)) < _FEWEST_WORDS or first.lineno == node.lineno or last >= after.lineno:
            continue
        source = "".join(lines[node.lineno - 1 : first.lineno - 1] + lines[last : node.end_lineno])
        yield Pair(textwrap.dedent(source).strip(), summary, document.name)


def rouge_words(text: str) -> list[str]:
    """Lower-case words, made of letters and digits as in ROUGE."""
    return re.findall(r"[^\W_]+", text.lower())


def rouge_l(generated: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, 0 to 100; 0 when either has no words."""
    one, other = rouge_words(generated), rouge_words(reference)
    common = [0] * (len(other) + 1)
    for word in one:
        previous = 0
        for i, against in enumerate(other, start=1):
            previous, common[i] = common[i], previous + 1 if word == against else max(common[i], common[i - 1])
    return 200 * common[-1] / (len(one) + len(other)) if common[-1] else 0.0


def rouge_n(generated: str, reference: str, n: int) -> float:
    """F1 of the n-grams, each counted as often as it occurs, 0 to 100; 0 when either text has none."""
    one, other = (
        Counter(zip(*(words[i:] for i in range(n)), strict=False))
        for words in (rouge_words(generated), rouge_words(reference))
    )
    common = (one & other).total()
    return 200 * common / (one.total() + other.total()) if common else 0.0
