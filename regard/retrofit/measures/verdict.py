"""One sentence on whether to take the retrofit of a language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regard.measurement import units
from regard.retrofit.measures.shared import LESS, ORIGINAL, RETROFIT, change, longer

WORTH = 0.08
"""Largest rise of perplexity at which a retrofit is recommended."""
STATE_AT = 8192
FORGETS = 0.25


def recommend(results: Mapping[str, Any]) -> dict[str, Any]:
    """The sentence, and notes on what it does not say.

    Args:
        results: of :func:`regard.retrofit.evaluate.evaluate`.

    Returns:
        ``take`` (bool), ``text``, ``notes``.
    """
    source, judged = list(results["perplexity"].items())[-1]
    state = results["state"][str(STATE_AT)]
    share = state[RETROFIT] / state[ORIGINAL]
    faster = _speed(results)
    slower = _delay(results)
    gains = []
    if share < LESS and _holds_less(results):
        gains.append(f"the state at {units.tokens(STATE_AT)} tokens is {share:.0%} of the original's")
    if faster is not None:
        gains.append(faster)
    cost = f"perplexity is {change(judged)} on {source}"
    close = judged["change"] <= WORTH
    take = close and bool(gains)
    if take:
        text = f"Take the retrofit: {cost}, and {' and '.join(gains)}" + (f", but {slower}." if slower else ".")
    elif close:
        text = f"Keep the original: {cost}, but neither its state nor its time is smaller at these lengths."
    else:
        text = f"Keep the original, or train the retrofit longer: {cost}" + (f", though {gains[0]}." if gains else ".")
    return {"take": take, "text": text, "notes": _notes(results, share)}


def _speed(results: Mapping[str, Any]) -> str | None:
    """Where the retrofit clearly takes less time; None where nowhere."""
    found = _clearly_longer(results, ORIGINAL, RETROFIT)
    return None if found is None else f"{found[0]} takes {1 / found[1]:.0%} of the time"


def _delay(results: Mapping[str, Any]) -> str | None:
    """Where the retrofit clearly takes more time; None where nowhere."""
    found = _clearly_longer(results, RETROFIT, ORIGINAL)
    return None if found is None else f"{found[0]} takes {found[1]:.2g} times the time"


def _clearly_longer(results: Mapping[str, Any], model: str, other: str) -> tuple[str, float] | None:
    """The longest of the lengths at which a token, or else a prompt, clearly takes one model longer, in words, and how many
    times as long; None where it never does."""
    for what, words in (("decoding", "a token after"), ("prefill", "a prompt of")):
        for length, found in reversed(list(results[what].items())):
            ratio = longer(found, model, other)
            if ratio is not None:
                return f"{words} {units.tokens(int(length))} tokens", ratio
    return None


def _holds_less(results: Mapping[str, Any]) -> bool:
    """Whether what generation holds is smaller in fact, at the longest length that was measured."""
    last = list(results["decoding"].values())[-1:]
    return all(
        f[RETROFIT]["held"] is not None and f[RETROFIT]["held"] < LESS * f[ORIGINAL]["held"] for f in last
    ) and bool(last)


def _notes(results: Mapping[str, Any], share: float) -> list[str]:
    notes = []
    if share < LESS and not _holds_less(results):
        how = (
            "reads everything again at each token"
            if not results["generates_with_cache"]
            else "holds all keys and values"
        )
        notes.append(
            f"the mechanism's own state would be {share:.0%} of the original's at {units.tokens(STATE_AT)} tokens, but inside "
            f"transformers generate does not go on from it: it {how}."
        )
    for length, found in results["recall"].items():
        if found is None:
            continue
        before, after = (sum(found[model]) / len(found[model]) for model in (ORIGINAL, RETROFIT))
        if before - after >= FORGETS:
            notes.append(
                f"of needles in {units.tokens(int(length))} tokens it says {after:.0%} where the original says {before:.0%}."
            )
    if len(results["perplexity"]) == 1:
        notes.append("measured on text of the source that it was trained on; --validation gives text of another.")
    blocks = min(found["blocks"] for found in results["perplexity"].values())
    if blocks < 8:
        notes.append(f"perplexity is that of {blocks} blocks; a larger budget or text measures it more closely.")
    if results["left_out"]:
        left_out = ", ".join(units.tokens(n) for n in results["left_out"])
        notes.append(f"lengths beyond the model's positions are left out: {left_out}.")
    return notes
