"""A language model compared with the original: perplexity by position, recall, time and state."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.contract import Shape
from regard.measurement import units
from regard.measurement.timing import Timing, interleaved
from regard.retrofit.corpus import Corpus, even_blocks
from regard.retrofit.hosts import LanguageHost
from regard.retrofit.hosts.language import log_likelihoods
from regard.retrofit.inserting import placed_in, reads_by_state
from regard.retrofit.measures.probes import found_by, needles, pairs, probed
from regard.retrofit.measures.shared import (
    MODELS,
    ORIGINAL,
    RETROFIT,
    SOFTMAX,
    Loss,
    Models,
    Row,
    change,
    kept,
    mean_and_error,
    rise,
    times,
)
from regard.retrofit.measures.verdict import recommend
from regard.retrofit.pace import Plan
from regard.retrofit.settings import RetrofitSettings

if TYPE_CHECKING:
    from jaxtyping import Float, Int

STATE_LENGTHS = (2048, 8192, 32768)


def parts(
    host: LanguageHost, student: Any, corpus: Corpus, settings: RetrofitSettings, plan: Plan
) -> dict[str, Callable[[], Any]]:
    """The measurements by name; see :class:`regard.retrofit.measures.Measures`."""
    models = {ORIGINAL: host.model, RETROFIT: student}
    lengths, reach = host.within(settings.spans, settings), host.reach(settings)
    found: dict[str, Callable[[], Any]] = {}
    for source, ids in corpus.sources.items():
        length, judged = (host.evaluation_length(ids, settings.block, most) for most in (reach, host.longest))
        found[f"perplexity on {source}"] = partial(perplexity, models, even_blocks(ids, plan.windows, length), judged)
    for length in lengths:
        for probe in (needles, pairs):
            sizes = (length, plan.probes, settings.seed)
            found[f"{probe.__name__} in {length}"] = partial(probe, models, corpus.held_out, *sizes)
    timed = {**models, SOFTMAX: host.by_regard}
    for length in lengths:
        found[f"prefill of {length}"] = partial(prefill, timed, corpus.held_out, length)
        found[f"decoding after {length}"] = partial(decoding, timed, corpus.held_out, _with_room(length, reach))
    return found


def results(
    host: LanguageHost, student: Any, corpus: Corpus, settings: RetrofitSettings, found: Mapping[str, Any]
) -> dict[str, Any]:
    """All figures of the record, from the results of the parts."""
    lengths = host.within(settings.spans, settings)
    return {
        "perplexity": {source: found[f"perplexity on {source}"] for source in corpus.sources},
        "needles": {str(length): found[f"needles in {length}"] for length in lengths},
        "pairs": {str(length): found[f"pairs in {length}"] for length in lengths},
        "prefill": {str(length): found[f"prefill of {length}"] for length in lengths},
        "decoding": {str(length): found[f"decoding after {length}"] for length in lengths},
        "state": {
            str(length): {ORIGINAL: state_bytes(host, host.model, length), RETROFIT: state_bytes(host, student, length)}
            for length in sorted({*lengths, *state_lengths(host, settings)})
        },
        "generates_with_cache": bool(getattr(student.config, "use_cache", False)),
        "left_out": [n for n in settings.spans if n not in lengths],
        "positions": host.longest,
        "stretched": settings.positions is not None,
    }


def state_lengths(host: LanguageHost, settings: RetrofitSettings) -> list[int]:
    """The lengths for which the state is told: those that the retrofit can read, and the longest that the original can."""
    longest = STATE_LENGTHS[-1] if host.longest is None else min(host.longest, STATE_LENGTHS[-1])
    return [*host.within(STATE_LENGTHS, settings), longest]


@torch.no_grad()
def perplexity(models: Models, blocks: Int[Tensor, "w n"], judged: int | None = None) -> dict[str, Any]:
    """Perplexity of each model on the same blocks, also by position, and its relative rise in the retrofit.

    Standard errors are over the blocks: ``standard_errors`` those of each model, ``standard_error`` that of the rise, from the
    differences of blocks.

    Args:
        judged: number of first tokens of each block that count, except by position: the original was not made for
            those beyond them. All when None.
    """
    losses = {name: token_losses(model, blocks) for name, model in models.items()}
    counted = {name: loss[:, : (judged or blocks.shape[1]) - 1] for name, loss in losses.items()}
    gaps = (counted[RETROFIT] - counted[ORIGINAL]).mean(1)
    borders = [0, *(b for b in (2**e for e in range(4, 24)) if b < blocks.shape[1] - 1), blocks.shape[1] - 1]
    return {
        "blocks": len(blocks),
        "length": blocks.shape[1],
        **_perplexities(counted),
        **rise(gaps),
        "by_position": [
            {"first": a + 1, "last": b, **_perplexities({name: loss[:, a:b] for name, loss in losses.items()})}
            for a, b in itertools.pairwise(borders)
        ],
    }


def _perplexities(losses: Mapping[str, Float[Tensor, "w m"]]) -> dict[str, Any]:
    """The perplexity of each model from its losses in blocks, and ``standard_errors`` over the blocks."""
    found = {name: mean_and_error(loss.mean(1)) for name, loss in losses.items()}
    values = {name: math.exp(min(mean, 700.0)) for name, (mean, _) in found.items()}
    errors = {name: None if error is None else error * values[name] for name, (_, error) in found.items()}
    return {**values, "standard_errors": errors}


@torch.no_grad()
def token_losses(model: Any, blocks: Int[Tensor, "w n"]) -> Float[Tensor, "w n-1"]:
    """A model's loss of each token of each block but the first, in nats."""
    return torch.cat(
        [-log_likelihoods(model(row, use_cache=reads_by_state(model)).logits, row) for row in blocks.split(1)]
    ).double()


@torch.no_grad()
def prefill(models: Models, ids: Int[Tensor, " n"], length: int) -> dict[str, Any]:
    """Seconds to read a prompt."""
    prompt = _prompt(ids, length)
    times = interleaved({name: partial(_read, model, prompt) for name, model in models.items()}, seconds=10.0, least=2)
    return {name: asdict(timing) for name, timing in times.items()}


@torch.no_grad()
def decoding(models: Models, ids: Int[Tensor, " n"], length: int) -> dict[str, Any]:
    """Seconds to decode one token after a prompt, as `generate` does: with the model's cache, and the bytes that the
    cache then holds, or without a cache by reading everything again. Models alternate, token by token. All but the
    original decode in few native calls, as in `regard generate`, and regard's softmax has a cache that is not copied at
    each token."""
    from regard.integrations.transformers import fuse_layers, unfuse_layers

    prompt, own = _prompt(ids, length), [model for name, model in models.items() if name != ORIGINAL]
    for model in own:
        fuse_layers(model)
    try:
        going = {name: _GoingOn(model, prompt, grows=name == SOFTMAX) for name, model in models.items()}
        for step in range(LanguageHost.decoded):
            for each in list(going.values())[:: 1 if step % 2 else -1]:
                each.step(step)
    finally:
        for model in own:
            unfuse_layers(model)
    return {name: each.found() for name, each in going.items()}


class _GoingOn:
    """A model that continues after a prompt."""

    def __init__(self, model: Any, prompt: Int[Tensor, "1 n"], *, grows: bool = False) -> None:
        from regard.integrations.transformers import GrowingCache

        self.model, self.prompt, self.seconds = model, prompt, list[float]()
        self.cached = bool(getattr(model.config, "use_cache", False))
        self.cache = self._after(prompt, GrowingCache(model.config) if grows else None) if self.cached else None

    def _after(self, ids: Int[Tensor, "1 n"], cache: Any = None) -> Any:
        from regard.integrations.transformers import CACHE

        return getattr(self.model(ids, use_cache=True, logits_to_keep=1, **{CACHE: cache}), CACHE)

    def step(self, number: int) -> None:
        if not self.cached and number >= 2:  # one pass over a whole prompt is enough after a warm-up
            return
        token = self.prompt[:, number % self.prompt.shape[1], None]
        started = time.perf_counter()
        if self.cached:
            self.cache = self._after(token, self.cache)
        else:
            _read(self.model, self.prompt)
        self.seconds.append(time.perf_counter() - started)

    def found(self) -> dict[str, Any]:
        return {
            **asdict(Timing.of(self.seconds)),
            "from": "cache" if self.cached else "whole sequence",
            "held": held_bytes(self.cache) if self.cached else None,
        }


def held_bytes(cache: Any) -> int:
    """Bytes of all tensors in a cache of transformers, without the spare room of growing ones."""
    from regard.integrations.transformers.caches import GrowingLayer

    if isinstance(cache, GrowingLayer):
        return held_bytes((cache.keys, cache.values))
    if isinstance(cache, Tensor):
        return cache.numel() * cache.element_size()
    if isinstance(cache, (list, tuple)):
        return sum(map(held_bytes, cache))
    if isinstance(cache, dict):
        return sum(map(held_bytes, cache.values()))
    return held_bytes(vars(cache)) if hasattr(cache, "__dict__") and not isinstance(cache, type) else 0


def _read(model: Any, prompt: Int[Tensor, "1 n"]) -> Float[Tensor, "1 1 v"]:
    return model(prompt, use_cache=reads_by_state(model), logits_to_keep=1).logits


def _with_room(length: int, reach: int | None) -> int:
    """`length`, or as many tokens as leave positions for those that are decoded after them."""
    return length if reach is None else min(length, reach - LanguageHost.decoded)


def _prompt(ids: Int[Tensor, " n"], length: int) -> Int[Tensor, "1 n"]:
    """The first `length` tokens of a text, which is repeated if it is shorter."""
    return ids.repeat(math.ceil(length / len(ids)))[:length][None]


def state_bytes(host: LanguageHost, model: Any, length: int) -> int:
    """The bytes needed to continue a sequence of `length` tokens: the keys and values of softmax layers, in the
    weights' dtype, and the state of other layers as their mechanism defines it, whose accumulators have at least four
    bytes per number."""
    total = 0.0
    width = next(model.parameters()).element_size()
    for layer in host.layers:
        heads, groups, dim_key, dim_value = host.heads(layer.number)
        placed = placed_in(model, layer.path, layer.number)
        if placed is None:
            total += groups * length * (dim_key + dim_value) * width
            continue
        card, config = placed
        shared = "g" in card.inputs["k"]
        cost = card.cost(Shape(1, groups if shared else heads, length, length, dim_key, dim_value), config)
        growing = not card.is_recurrent(config)
        total += cost.state * (width if growing else max(width, 4))
    return round(total)


def loss(results: Mapping[str, Any]) -> Loss:
    """The rise of perplexity."""
    judged = list(results["perplexity"].values())[-1]
    return judged["change"], judged["standard_error"], f"perplexity is {change(judged)}"


def rows(results: Mapping[str, Any]) -> list[Row]:
    """Table rows of the figures: a label, the original's value, the retrofit's value."""
    found: list[Row] = []
    for source, its in results["perplexity"].items():
        before, after = (_with_error(its, model) for model in MODELS)
        found.append((f"perplexity on {source}", before, after))
    said = {"needles": "needles in {} tokens, said", "pairs": "pairs in {} tokens, right values the likeliest there"}
    for what, length, its in probed(results):
        found.append(_found(said[what], length, its))
    for length, its in results.get("pairs", {}).items():
        if its is not None:
            found.append(
                _found("pairs in {} tokens, values less likely than the right one (50% by chance)", length, its["rank"])
            )
    for length, its in results["state"].items():
        found.append(
            (
                f"state at {units.tokens(int(length))} tokens, by definition",
                units.size(its["original"]),
                units.size(its["retrofit"]),
            )
        )
    for length, its in results["decoding"].items():
        held = [its[model]["held"] for model in ("original", "retrofit")]
        before, after = ("nothing" if each is None else units.size(each) for each in held)
        found.append((f"cache that generate holds after {units.tokens(int(length))} tokens", before, after))
    for what, words in (("prefill", "time of a prompt of"), ("decoding", "time of a token after")):
        for length, its in results[what].items():
            found.append(times(f"{words} {units.tokens(int(length))} tokens", its))
    return found


def _found(words: str, length: str, its: Mapping[str, Any]) -> Row:
    """A row of what both models found in texts of a length, with standard errors."""
    before, after = (kept(*found_by(its, model)) for model in MODELS)
    return words.format(units.tokens(int(length))), before, after


def _with_error(its: Mapping[str, Any], model: str) -> str:
    """A perplexity with its standard error, which records of earlier versions lack."""
    error = its.get("standard_errors", {}).get(model)
    return units.number(its[model]) if error is None else units.told(its[model], error)


__all__ = [
    "decoding",
    "loss",
    "parts",
    "perplexity",
    "prefill",
    "recommend",
    "results",
    "rows",
    "state_bytes",
    "token_losses",
]
