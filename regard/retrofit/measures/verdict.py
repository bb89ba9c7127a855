"""The recommendation of whether to take the retrofit of a language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regard.measurement import units
from regard.retrofit.measures.probes import found_by, more, probed
from regard.retrofit.measures.shared import LESS, ORIGINAL, RETROFIT, SOFTMAX, change, longer, times_as_long

WORTH = 0.08
"""The largest rise of perplexity at which a retrofit is recommended."""
STATE_AT = 8192
"""The length at which states are compared, or the longest that the model can read if that is less."""
FORGETS = 0.25
"""The least difference of the shares of needles, or of pairs, that is reported, if it is also twice its standard error."""
LOWER = 0.01
"""The least relative fall of perplexity that is a reason on its own."""
ROOM = 1.25
"""How many times its definition a state may take up, to allow for spare room in caches."""


def recommend(results: Mapping[str, Any]) -> dict[str, Any]:
    """The recommendation, and notes on its limits.

    Args:
        results: the results of :func:`regard.retrofit.measures.evaluate`.

    Returns:
        ``take`` (bool), ``text``, ``notes``.
    """
    source, judged = list(results["perplexity"].items())[-1]
    share, at = _share_of_state(results), units.tokens(state_at(results))
    slower = _delay(results)
    gains = []
    if share < LESS and _goes_on_from_state(results):
        gains.append(f"the state at {at} tokens is {share:.0%} of the original's")
    gains += filter(None, (_speed(results), *_finds_more(results, RETROFIT, ORIGINAL)[:1]))
    cost = f"perplexity is {change(judged)} on {source}"
    close = judged["change"] <= WORTH
    take = close and bool(gains)
    if take:
        text = f"Take the retrofit: {cost}, and {' and '.join(gains)}" + (f", but {slower}." if slower else ".")
    elif judged["change"] < -max(LOWER, 2 * (judged["standard_error"] or 0.0)):
        text = (
            f"Take the retrofit for its perplexity alone, which is {change(judged)} on {source}: neither its state nor its time is "
            "smaller at these lengths, and the original may gain as much from training on the same text."
        )
        take = True
    elif close:
        text = f"Keep the original: {cost}, and neither state nor time is smaller at these lengths."
    else:
        text = f"Keep the original, or train the retrofit longer: {cost}" + (f", though {gains[0]}." if gains else ".")
    return {"take": take, "text": text, "notes": _notes(results)}


def state_at(*results: Mapping[str, Any]) -> int:
    """The length at which states are compared, one that all results have."""
    shared = set.intersection(*(set(map(int, each["state"])) for each in results))
    return max(length for length in shared if length <= STATE_AT)


def _share_of_state(results: Mapping[str, Any]) -> float:
    state = results["state"][str(state_at(results))]
    return state[RETROFIT] / state[ORIGINAL]


def _speed(results: Mapping[str, Any]) -> str | None:
    """Where the retrofit clearly takes less time, than with regard's softmax too, in words; None if nowhere."""
    found = _clearly_longer(results, ORIGINAL, RETROFIT, SOFTMAX)
    return None if found is None else f"{found[0]} takes {1 / found[1]:.0%} of the time"


def _delay(results: Mapping[str, Any]) -> str | None:
    """Where the retrofit clearly takes more time, in words; None if nowhere."""
    found = _clearly_longer(results, RETROFIT, ORIGINAL)
    return None if found is None else f"{found[0]} takes {times_as_long(found[1])}"


def _finds_more(results: Mapping[str, Any], model: str, other: str) -> list[str]:
    """Where one model finds clearly more needles or values of keys than another, in words, the longest texts first."""
    found = []
    for what, length, its in sorted(probed(results), key=lambda one: -int(one[1])):
        gap, error = more(its, model, other)
        if gap >= FORGETS and gap >= 2 * (error or 0.0):
            before, after = (found_by(its, name)[0] for name in (ORIGINAL, RETROFIT))
            words = f"of the {what} in {units.tokens(int(length))} tokens it finds {after:.0%}"
            found.append(f"{words} where the original finds {before:.0%}")
    return found


def _clearly_longer(results: Mapping[str, Any], model: str, other: str, likewise: str = "") -> tuple[str, float] | None:
    """The longest length at which a token, or else a prompt, clearly takes one model longer than another, in words, and
    how many times as long; None if it never does. A third model (`likewise`), where it was timed, must take longer
    too."""
    for what, words in (("decoding", "a token after"), ("prefill", "a prompt of")):
        for length, found in reversed(list(results[what].items())):
            ratio = longer(found, model, other)
            if likewise in found and longer(found, likewise, other) is None:
                continue
            if ratio is not None:
                return f"{words} {units.tokens(int(length))} tokens", ratio
    return None


def _goes_on_from_state(results: Mapping[str, Any]) -> bool:
    """Return whether the memory that generation holds is really smaller, or about as small as defined, at the longest
    measured length."""
    if not results["decoding"]:
        return False
    length, found = list(results["decoding"].items())[-1]
    held, defined = found[RETROFIT]["held"], results["state"].get(length)
    if held is None:
        return False
    return held < LESS * found[ORIGINAL]["held"] or (defined is not None and held < ROOM * defined[RETROFIT])


def _notes(results: Mapping[str, Any]) -> list[str]:
    notes, share = [], _share_of_state(results)
    if share < LESS and not _goes_on_from_state(results):
        how = (
            "reads everything again at each token"
            if not results["generates_with_cache"]
            else "holds all keys and values"
        )
        notes.append(
            f"the mechanism's own state would be {share:.0%} of the original's at {units.tokens(state_at(results))} tokens, but inside "
            f"transformers generate does not continue from it: it {how}."
        )
    notes += [f"{sentence}." for sentence in reversed(_finds_more(results, ORIGINAL, RETROFIT))]
    own = [found for found in results["prefill"].values() if SOFTMAX in found]
    if own and (ratio := longer(own[-1], ORIGINAL, SOFTMAX)) is not None:
        length = list(results["prefill"])[-1]
        notes.append(
            f"a prompt of {units.tokens(int(length))} tokens takes the original {1 / ratio:.0%} of the time without a retrofit, "
            'where it has regard\'s softmax: attn_implementation="regard:softmax".'
        )
    if len(results["perplexity"]) == 1:
        notes.append("measured only on the training source; use --validation for text from another.")
    blocks = min(found["blocks"] for found in results["perplexity"].values())
    if blocks < 8:
        notes.append(f"perplexity comes from {blocks} blocks; a larger budget or more text makes it more precise.")
    if results["left_out"]:
        left_out = ", ".join(units.tokens(n) for n in results["left_out"])
        notes.append(f"lengths beyond the model's positions are left out: {left_out}.")
    positions, lengths = results.get("positions"), [int(length) for length in results["prefill"]]  # newer records alone
    if positions is not None and max(lengths, default=0) > positions:
        notes.append(
            f"the original has {units.tokens(positions)} positions and was not made for longer texts; its figures there show "
            "what it does all the same, and its perplexity is compared within them."
        )
    if results.get("stretched"):
        notes.append(
            f"the original was measured with its table stretched to {units.tokens(results['positions'])} positions, with "
            "which it was not trained."
        )
    return notes
