"""Nine tasks on long contexts (The Sparse Frontier, arXiv 2504.17768): samples of any length, scores, and readers that
solve them.

Models answer in text, so any language model with a tokenizer can be tested::

    task = create_long_task("ruler_niah")
    sample = task.sample(0, 4096, count=lambda text: len(tokenizer(text)["input_ids"]))
    task.score(reply, sample)                       # 0 to 1; the gold `sample.answer` has 1

In the wording ``full``, prompts and counts follow the benchmark, in our own words. In ``brief``, which is for small
models, each key, value or name is one word, there are fewer questions, and the reply is only the answer.
"""

from __future__ import annotations

from typing import Any

from regard.contract import Unsupported, closest
from regard.tasks.long_context.facts import Facts
from regard.tasks.long_context.questions import LongDocument, ShortDocuments, SquadQuestions
from regard.tasks.long_context.ruler import CommonWords, Needles, Variables
from regard.tasks.long_context.samples import WORDINGS, LongTask, Sample, brief_words
from regard.tasks.long_context.story import StoryFiltering, StoryMultihop, StoryRetrieval

LONG_TASKS: dict[str, type[LongTask]] = {
    "ruler_niah": Needles,
    "ruler_vt": Variables,
    "ruler_cwe": CommonWords,
    "qa_squad": SquadQuestions,
    "qa_quality": LongDocument,
    "qa_toefl": ShortDocuments,
    "story_retrieval": StoryRetrieval,
    "story_multihop": StoryMultihop,
    "story_filtering": StoryFiltering,
}


def create_long_task(name: str, wording: str = "full", **options: Any) -> LongTask:
    """Create a task by name.

    Args:
        wording: ``full`` or ``brief``.
        options: options of the task; ``data`` for the three tasks about documents.

    Raises:
        Unsupported: for an unknown name or wording.
    """
    if name not in LONG_TASKS:
        raise Unsupported(f"long task {name!r}", supported=", ".join(LONG_TASKS), nearest=closest(name, LONG_TASKS))
    return LONG_TASKS[name](wording, **options)


__all__ = ["LONG_TASKS", "WORDINGS", "Facts", "LongTask", "Sample", "brief_words", "create_long_task"]
