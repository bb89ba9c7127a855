"""Which layers matter: the model's loss of quality when only one layer has the new attention.

What a retrofit measured is kept in ``$XDG_CACHE_HOME/regard/sensitivity/`` (``~/.cache`` if the variable is not set), for
others of the same model with the same data and mechanism; an unreadable file counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from regard.catalogue import plugin_code
from regard.contract import Unsupported
from regard.core.files import user_cache, write_text_atomically
from regard.measurement import provenance
from regard.retrofit.folder import Folder
from regard.retrofit.hiding import hiding, unlikeliness
from regard.retrofit.hosts import Host
from regard.retrofit.settings import RECALL, RetrofitSettings
from regard.retrofit.stage import Progress, Watch
from regard.version import VERSION

DECIDES = ("model", "data", "mechanism", "length", "batch_size", "transfer_rate", "shared_heads", "precision", "seed")
"""The parts of a folder's identity, where it has them, on which the sensitivity of its layers depends; the budget decides how long it is measured."""
METHOD = 2
"""Number of the way to measure; 1 measured layers that the first steps had made worse than they began."""
ENOUGH = 0.5
"""The least share of the planned steps, and of the blocks, with which a sensitivity from another folder was measured."""


@torch.no_grad()
def measure_sensitivity(
    host: Host,
    modules: Mapping[int, nn.Module],
    data: Any,
    tried: int,
    settings: RetrofitSettings,
    folder: Folder,
    watch: Watch,
    after: float,
) -> dict[int, float]:
    """What the model loses with one new module, for each module alone: the distance of its answers on held-out data from
    the original's, in nats or as a share of the squared hidden states.

    By recall: how much less likely it takes each token of what is hidden in a text, in nats, in rounds. After each the half
    that matters less is given up and stays new, so what layers can do for each other counts. A layer has what it was
    measured to lose in its last round, and more than any that was given up before, if only by rounding.

    Args:
        modules: new modules by layer number, after some training (untrained modules say nothing about the layer).
        tried: number of held-out blocks, or of texts that hide something.
        after: seconds planned for later stages.
    """
    known: dict[str, float] = folder.read("measured") or {}
    sizes, started, begun = rounds(len(modules), settings), time.monotonic(), len(known)
    found, given_up, left, least, lost = dict[int, float](), dict[int, nn.Module](), list(modules), -math.inf, None
    for turn, size in enumerate(sizes):
        for number in left:
            if (key := f"{turn}: {number}") in known:
                continue
            if lost is None:
                lost = (_forgotten if settings.by_recall else _changed)(host, data, tried, settings)
            with host.with_attention({**given_up, number: modules[number]}):
                known[key] = lost()
            folder.write("measured", known)
            pace = (time.monotonic() - started) / (len(known) - begun)
            remaining = (sum(sizes) - len(known)) * pace + after
            watch(Progress("sensitivity of each layer", known[key], len(known), sum(sizes), remaining))
        its = {number: known[f"{turn}: {number}"] for number in left}
        left = list(choose(its, size // 2))
        found |= {number: max(loss, math.nextafter(least, math.inf)) for number, loss in its.items()}
        given_up = {number: module for number, module in modules.items() if number not in left}
        least = max(found[number] for number in given_up)
    folder.write("sensitivity", found)
    return {number: found[number] for number in modules}


def rounds(layers: int, settings: RetrofitSettings) -> list[int]:
    """The number of layers that are measured in each round: all in one, or by recall half of those before, down to one."""
    return [layers >> turn for turn in range(layers.bit_length())] if settings.by_recall else [layers]


def _changed(host: Host, data: Any, tried: int, settings: RetrofitSettings) -> Callable[[], float]:
    """How far the answers of the host's model on held-out data are from what they are now."""
    rows = host.parts(host.held_out(data, tried, settings))
    expected = [host.answers(host.model, row) for row in rows]

    def lost() -> float:
        parts = [host.distance(host.answers(host.model, row), told) for row, told in zip(rows, expected, strict=True)]
        return float(torch.stack(parts).double().mean())

    return lost


def _forgotten(host: Host, data: Any, tried: int, settings: RetrofitSettings) -> Callable[[], float]:
    """How much less likely the host's model takes what is hidden in texts as long as a block than it does now."""
    texts = hiding(data.held_out, settings.block, tried, settings.seed)
    assert texts is not None, "blocks are long enough, as the host has checked"

    def told() -> float:
        return math.fsum(unlikeliness(host.model, *text) for text in texts) / len(texts)

    at_first = told()
    return lambda: told() - at_first


def choose(sensitivity: Mapping[int, float], kept: int) -> tuple[int, ...]:
    """Choose the layers that keep their attention: the ones with the largest loss."""
    lost = {number: loss if math.isfinite(loss) else math.inf for number, loss in sensitivity.items()}
    worst = sorted(lost, key=lambda number: (-lost[number], number))
    return tuple(sorted(worst[:kept]))


class Known:
    """The sensitivities that an earlier retrofit of the same model measured, with the same data and mechanism.

    Args:
        identity: the identity of a retrofit's folder.
        layers: the layers whose sensitivity is measured.
    """

    def __init__(self, identity: Mapping[str, Any], layers: Sequence[int]) -> None:
        self.identity = {
            **{name: identity[name] for name in DECIDES if name in identity},
            **({"by": RECALL} if str(identity.get("keep_layers")).startswith(RECALL) else {}),
            "layers": list(layers),
            "method": METHOD,
            "regard": VERSION,
            "revision": provenance.git_revision(),
            "plugins": plugin_code(identity["mechanism"]),
        }
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        self.path = user_cache() / "sensitivity" / f"{digest[:16]}.json"

    def read(self, steps: int, blocks: int) -> dict[int, float] | None:
        """The sensitivity of each layer; None if there is none, or if it was measured after less than half of the steps, or on
        less than half of the held-out blocks, that are planned."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if (
                found["identity"] != self.identity
                or found["steps"] < ENOUGH * steps
                or found["blocks"] < ENOUGH * blocks
            ):
                return None
            return {number: float(found["sensitivity"][str(number)]) for number in self.identity["layers"]}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, sensitivity: Mapping[int, float], steps: int, blocks: int) -> None:
        """Keep a sensitivity, unless the folder cannot be written."""
        found = {"identity": self.identity, "steps": steps, "blocks": blocks, "sensitivity": dict(sensitivity)}
        with suppress(Unsupported):
            write_text_atomically(self.path, json.dumps(found))
