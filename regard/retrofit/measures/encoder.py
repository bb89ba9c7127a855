"""An encoder compared with the original: closeness of hidden states, predictions of masked tokens, and time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.integrations.encoders import UNASKED
from regard.measurement import units
from regard.measurement.timing import interleaved
from regard.retrofit.corpus import Corpus
from regard.retrofit.hosts import Batch, EncoderHost
from regard.retrofit.measures.shared import (
    CLOSE,
    MODELS,
    ORIGINAL,
    RETROFIT,
    Closeness,
    Loss,
    Models,
    Row,
    beside,
    change,
    judgement,
    kept,
    longer,
    operations,
    rise,
    source_notes,
    times,
    times_as_long,
)
from regard.retrofit.measures.verdict import WORTH
from regard.retrofit.pace import Plan
from regard.retrofit.settings import RetrofitSettings

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def parts(
    host: EncoderHost, student: Any, corpus: Corpus, settings: RetrofitSettings, plan: Plan
) -> dict[str, Callable[[], Any]]:
    """The measurements by name; see :class:`regard.retrofit.measures.Measures`."""
    models = {ORIGINAL: host.model, RETROFIT: student}
    found: dict[str, Callable[[], Any]] = {
        f"quality on {source}": partial(quality, models, host.of_text(ids, plan.windows, settings))
        for source, ids in corpus.sources.items()
    }
    for length in host.within(settings.spans, settings):
        found[f"time of {length}"] = partial(time_of, models, host, corpus.held_out, length)
    return found


def results(
    host: EncoderHost, student: Any, corpus: Corpus, settings: RetrofitSettings, found: Mapping[str, Any]
) -> dict[str, Any]:
    """All figures of the record, from the results of the parts."""
    lengths = host.within(settings.spans, settings)
    return {
        "quality": {source: found[f"quality on {source}"] for source in corpus.sources},
        "time": {str(length): found[f"time of {length}"] for length in lengths},
        "operations": {
            str(length): {ORIGINAL: operations(host, host.model, length), RETROFIT: operations(host, student, length)}
            for length in lengths
        },
        "left_out": [n for n in settings.spans if n not in lengths],
    }


@torch.no_grad()
def quality(models: Models, blocks: Batch) -> dict[str, Any]:
    """How close hidden states are to the original's, by layer, and whether texts keep their nearest neighbours; with a
    head for masked tokens also the perplexity of both models and how often they predict the same token.

    The standard error of the change is that of the mean difference over blocks.
    """
    layers: list[Closeness] = []
    means: dict[str, list[Tensor]] = {name: [] for name in MODELS}
    nats: dict[str, list[float]] = {name: [] for name in MODELS}
    same: list[Tensor] = []
    for block in blocks.split(1):
        said = {name: model(block.inputs, output_hidden_states=True) for name, model in models.items()}
        hidden = {name: [x.flatten(0, 1) for x in its.hidden_states[1:]] for name, its in said.items()}
        layers = layers or [Closeness() for _ in hidden[ORIGINAL]]
        for layer, found, expected in zip(layers, hidden[RETROFIT], hidden[ORIGINAL], strict=True):
            layer.add(found, expected)
        for name, its in hidden.items():
            means[name].append(its[-1].mean(0))
        if block.targets is not None:
            asked = block.targets != UNASKED
            logits = {name: its.logits[asked].float() for name, its in said.items()}
            for name, its in logits.items():
                nats[name].append(float(F.cross_entropy(its, block.targets[asked])))
            same.append(logits[ORIGINAL].argmax(-1) == logits[RETROFIT].argmax(-1))
    share, error = layers[-1].share()
    return {
        "blocks": len(blocks.inputs),
        "length": blocks.inputs.shape[1],
        "kept": share,
        "kept_error": error,
        "by_layer": [layer.share()[0] for layer in layers],
        "neighbours": neighbours(*(torch.stack(means[name]) for name in MODELS)),
        **(_masked(nats, torch.cat(same)) if same else {}),
    }


def _masked(nats: Mapping[str, list[float]], same: Tensor) -> dict[str, Any]:
    losses = {name: torch.tensor(its).double() for name, its in nats.items()}
    return {
        **{name: math.exp(min(float(its.mean()), 700.0)) for name, its in losses.items()},
        **rise(losses[RETROFIT] - losses[ORIGINAL]),
        "agreement": float(same.double().mean()),
    }


def neighbours(original: Float[Tensor, "w c"], found: Float[Tensor, "w c"]) -> float | None:
    """The share of texts whose nearest text, by cosine of mean hidden states, stays the same; None for under four."""
    if len(original) < 4:
        return None
    nearest = []
    for means in (original, found):
        unit = F.normalize(means.double() - means.double().mean(0), dim=-1)
        nearest.append((unit @ unit.T).fill_diagonal_(-torch.inf).argmax(-1))
    return float((nearest[0] == nearest[1]).double().mean())


@torch.no_grad()
def time_of(models: Models, host: EncoderHost, ids: Int[Tensor, " n"], length: int) -> dict[str, Any]:
    """Seconds to read a text of `length` tokens."""
    content = max(length - (0 if host.frame is None else 2), 1)
    text = host.framed(ids.repeat(math.ceil(content / len(ids)))[:content][None])
    found = interleaved({name: partial(model, text) for name, model in models.items()}, seconds=10.0, least=2)
    return {name: asdict(timing) for name, timing in found.items()}


def rows(results: Mapping[str, Any]) -> list[Row]:
    """Table rows of the figures: a label, the original's value, the retrofit's value."""
    found: list[Row] = []
    for source, its in results["quality"].items():
        if "change" in its:
            found.append(beside(f"perplexity of masked tokens, {source}", its, units.number))
            found.append((f"masked tokens predicted as by the original, {source}", "all", f"{its['agreement']:.1%}"))
        share = kept(its["kept"], its["kept_error"])
        found.append((f"variance of hidden states that is kept, {source}", "all", share))
        if its["neighbours"] is not None:
            found.append((f"texts whose nearest text is the same, {source}", "all", f"{its['neighbours']:.0%}"))
    for length, its in results["time"].items():
        found.append(times(f"time of {units.tokens(int(length))} tokens", its))
    for length, its in results["operations"].items():
        words = f"operations of attention over {units.tokens(int(length))} tokens, by definition"
        found.append(beside(words, its, units.count))
    return found


def loss(results: Mapping[str, Any]) -> Loss:
    """The rise of the perplexity of masked tokens, or the share of the hidden states' variance that is lost."""
    judged = list(results["quality"].values())[-1]
    if "change" in judged:
        return judged["change"], judged["standard_error"], f"perplexity of masked tokens is {change(judged)}"
    words = f"{kept(judged['kept'], judged['kept_error'])} of the variance of hidden states is kept"
    return 1 - judged["kept"], judged["kept_error"], words


def recommend(results: Mapping[str, Any]) -> dict[str, Any]:
    """The recommendation and notes on its limits: ``take`` (bool), ``text``, ``notes``."""
    source, judged = list(results["quality"].items())[-1]
    lost, _, words = loss(results)
    close, cost = lost <= (WORTH if "change" in judged else 1 - CLOSE), f"{words} on {source}"
    gain = delay = None
    for length, its in results["time"].items():
        faster, slower = longer(its, ORIGINAL, RETROFIT), longer(its, RETROFIT, ORIGINAL)
        told = f"a text of {units.tokens(int(length))} tokens takes"
        if faster is not None:
            gain = f"{told} {1 / faster:.0%} of the time"
        if slower is not None:
            delay = f"{told} {times_as_long(slower)}"
    notes = source_notes(results["quality"], min(its["blocks"] for its in results["quality"].values()), "blocks")
    if results["left_out"]:
        left_out = ", ".join(units.tokens(n) for n in results["left_out"])
        notes.append(f"lengths beyond the model's positions are left out: {left_out}.")
    return {**judgement(close, cost, gain, delay), "notes": notes}
