"""Which tokens a model's attention heads look at during training, and when that settles; for any run of any model here.

At certain steps of the run the same held-out items are read, and the weights of every attention layer that returns them
are taken as shares of each query's attention (:func:`attention_shares`). For each head, with w the shares that a query
gives to the n keys it may see:

- entropy: the mean of H(w) / log n over queries: 1 for equal weights on all keys, 0 for all weight on one.
- lift of a token: the share of all weights that goes to it, divided by its share under equal weights. A token with lift
  above 1 is attended to, one below 1 is avoided.
- change: the mean of |w - w before| / 2 over queries, per step: how fast the head's attention moves.

A query may see all tokens of its item, in causal layers those up to itself. Keys that a mechanism leaves out by itself
(by a window, in blocks, or by clipping) have weight 0, and count among the n: so figures mean the same for every
mechanism, and the entropy of a layer with a window of w keys is at most about log w / log n. A query that gives no
weight at all counts in the change only. In a model with early exits all layers are looked at, as if nothing left.

A head has snapped at the first look from which its change stays below a tenth of the fastest one. (A run that is resumed
does not know the change up to its first look, unless it had been there before; it is left out. With learning rates
that decay to 0 every head settles in the end; what matters is the time at which it does.)

Beside it stands how far the layers drift from what gradient flow conserves (:mod:`regard.workbench.trained.conservation`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard.contract import Context, Result, Unsupported, valid_from_lengths
from regard.core.ragged import gathering
from regard.layers.attention import AttentionLayer
from regard.models.evaluating import evaluation_mode
from regard.models.exits import all_layers
from regard.tasks import Task
from regard.training.step import batch_context, run_model
from regard.workbench.reports.sections import Curves, Heat, Section
from regard.workbench.trained.conservation import Laws, attention_layers
from regard.workbench.trained.monitoring import RunMonitor

ITEMS, TOKENS = 8, 40
"""Items that are read, and tokens for which the lift is reported: the most frequent ones in the items."""
STILL = 0.1
"""Share of the fastest change below which attention counts as settled."""
MOST_HEADS, MOST_TOKENS = 12, 24
"""Most heads and tokens in a picture."""


def attention_shares(weights: Tensor) -> Tensor:
    """Attention weights (..., n, m) as shares of each query's attention.

    Negative weights count as 0, and the weights of a query are divided by their sum; a query without weight has shares 0.
    """
    weights = weights.clamp(min=0)
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def snapped(changes: Sequence[float], share: float = STILL) -> int | None:
    """The first index after the fastest change from which all changes stay below a share of it; None if none exists."""
    fastest = max(changes, default=0.0)
    if not fastest > 0:
        return None
    fast = [i for i, change in enumerate(changes) if change >= share * fastest]
    return fast[-1] + 1 if fast[-1] + 1 < len(changes) else None


class AttentionMonitor(RunMonitor):
    """Records during a run a model's attention, and how far what gradient flow would conserve in its layers drifts.

    Args:
        task: the task whose first held-out items are read.
        items: number of items.
        path: file for the records, with which a resumed run continues; None to write none.

    Raises:
        Unsupported: for a task whose inputs are not tokens, or that reads a memory.
    """

    name = "attention"
    lede = "Which tokens the heads attend to during training, and when that settles."

    def __init__(self, task: Task, *, items: int = ITEMS, path: Path | None = None) -> None:
        super().__init__(path)
        self.batch = next(iter(task.evaluation_batches(items))).items(0, items)
        if self.batch.inputs.is_floating_point() or self.batch.memory is not None:
            raise Unsupported(
                f"--monitor attention of the task {task.name}",
                supported="tasks whose models read tokens, without a memory",
            )
        rows, n = self.batch.inputs.shape
        layout = gathering(batch_context(self.batch).mask, rows, n, self.batch.inputs.device)
        self.ids = layout.gather(self.batch.inputs, axis=1)  # right-padded, as the layers see them
        n = self.ids.shape[1]
        full = torch.ones(self.ids.shape, dtype=torch.bool)
        self.valid = full if layout.lengths is None else valid_from_lengths(layout.lengths, n)
        found, counts = self.ids[self.valid].unique(return_counts=True)
        self.tokens = found[counts.argsort(descending=True, stable=True)][:TOKENS]
        self.names = [_name(task, int(token)) for token in self.tokens]
        self.laws: Laws | None = None
        self._before: dict[str, Tensor] = {}
        self.restore(tokens=self.names)

    def check(self, model: nn.Module) -> None:
        """Find the laws of a model at the start of its training. Raise Unsupported if no layer returns attention weights."""
        layers = _layers(model)
        if not self._weights(model, layers):
            inserts = " between the tokens that it reads" if layers else ""
            raise Unsupported(
                f"--monitor attention of a model without attention weights{inserts}",
                supported="mechanisms that give their weights, in one layer or more, and insert no tokens",
                nearest="softmax",
            )
        self.laws = Laws(layers, self.ids.shape[1])

    def look(self, model: nn.Module, step: int) -> None:
        """Read the items with the current weights, after `step` steps; laws are measured since the check or, without one,
        since the first look."""
        heads: dict[str, dict[str, Any]] = {}
        layers = _layers(model)
        # what a run saw here that was stopped later, and goes on from before
        known = self.looks.get(step, {"heads": {}})["heads"]
        for number, found in self._weights(model, layers).items():
            visible = self._visible(layers[number])
            for head in range(found.shape[1]):
                name = f"{number}.{head}"
                heads[name] = self._of_head(found[:, head], visible, self._before.get(name))
                if heads[name]["change"] is None:
                    heads[name]["change"] = known.get(name, {}).get("change")
                self._before[name] = found[:, head]
        self.laws = self.laws or Laws(layers, self.ids.shape[1])
        self.keep(step, {"heads": heads, "laws": self.laws.drifts(layers)})

    @torch.no_grad()
    def _weights(self, model: nn.Module, layers: Mapping[int, AttentionLayer]) -> dict[int, Tensor]:
        """Attention weights (B, H, N, N) by number of the layer, as shares."""
        found: dict[int, Tensor] = {}
        device = next(model.parameters()).device
        with evaluation_mode(model), all_layers(model), ExitStack() as hooks:
            for number, layer in layers.items():
                hooks.callback(layer.register_forward_pre_hook(_ask, with_kwargs=True).remove)
                hooks.callback(layer.register_forward_hook(partial(_take, found, number)).remove)
            run_model(model, self.batch.to(device), batch_context(self.batch.to(device)))
        n = self.ids.shape[1]
        return {number: attention_shares(w.float().cpu()) for number, w in found.items() if w.shape[-2:] == (n, n)}

    def _visible(self, layer: AttentionLayer) -> Tensor:
        """The keys (B, N, N) that causality and padding let each query of a layer see."""
        pairs = self.valid[:, :, None] & self.valid[:, None, :]
        return pairs.tril() if layer.pattern.causal else pairs

    def _of_head(self, w: Tensor, visible: Tensor, before: Tensor | None) -> dict[str, Any]:
        """Entropy, lift and change for a head's weights (B, N, N)."""
        rows = self.valid & (w.sum(-1) > 0)
        count = visible.sum(-1)
        told = rows & (count > 1)
        entropy = torch.special.entr(w).sum(-1)[told] / count[told].log()
        shares, equal = (self._by_token(one, rows) for one in (w, visible / count.clamp(min=1)[..., None]))
        change = (
            None
            if before is None or before.shape != w.shape
            else float((w - before).abs().sum(-1)[self.valid].mean() / 2)
        )
        return {
            "entropy": float(entropy.mean()) if entropy.numel() else None,
            "lift": [float(a / b) if b > 0 else None for a, b in zip(shares, equal, strict=True)],
            "change": change,
        }

    def _by_token(self, w: Tensor, rows: Tensor) -> list[float]:
        """The share of the weights that goes to each of the tokens."""
        of_keys = torch.where(rows[..., None], w, 0).sum(1)  # (B, M)
        total = of_keys.sum().clamp(min=1e-12)
        return [float(of_keys[self.ids == token].sum() / total) for token in self.tokens]

    def as_record(self) -> dict[str, Any]:
        return {"tokens": self.names, **super().as_record()}

    def summary(self) -> dict[str, Any]:
        looks = self.as_record()["looks"]
        return {"heads": self.heads(), "laws": self.laws.rows(looks) if self.laws else []}

    def says(self) -> str:
        return self.laws.says(self.as_record()["looks"]) if self.laws else ""

    def heads(self) -> list[dict[str, Any]]:
        """A row for each head: entropy at the first and the last look, when it snapped, and what it attends to."""
        looks = self.as_record()["looks"]
        rows = []
        for name in looks[-1]["heads"] if looks else ():
            course = [look["heads"][name] for look in looks if name in look["heads"]]
            last = course[-1]
            known = sorted(
                (lift, token) for lift, token in zip(last["lift"], self.names, strict=True) if lift is not None
            )
            changes = [(step, change) for step, change in self._changes(name) if change is not None]
            at = snapped([change for _, change in changes])
            rows.append(
                {
                    "head": name,
                    "entropy at first": course[0]["entropy"],
                    "entropy at last": last["entropy"],
                    "snapped after step": None if at is None else changes[at][0],
                    "looks at": " ".join(token for _, token in reversed(known[-5:])),
                    "looks away from": " ".join(token for _, token in known[:5]),
                }
            )
        return rows

    def _changes(self, name: str) -> list[tuple[int, float | None]]:
        """Change per step of a head, with the step of each look except the first."""
        looks = self.as_record()["looks"]
        found = [(look, look["heads"].get(name, {}).get("change")) for look in looks[1:]]
        return [
            (look["step"], None if change is None else change / max(1, look["step"] - look["since"]))
            for look, change in found
        ]

    def sections(self) -> list[Section]:
        looks, rows = self.as_record()["looks"], self.heads()
        shown = [row["head"] for row in rows][:MOST_HEADS]
        entropies = {
            name: [(float(look["step"]), look["heads"][name]["entropy"]) for look in looks if look["step"] > 0]
            for name in shown
        }
        changes = {
            name: [(float(step), value if value and value > 0 else None) for step, value in self._changes(name)]
            for name in shown
        }
        over = "" if len(rows) <= MOST_HEADS else f" The pictures have the first {MOST_HEADS} of {len(rows)} heads."
        course = Section(
            "When attention settles",
            "Heads are named layer.head. Entropy 1 looks alike at all tokens that causality and padding let it see, 0 at one; "
            f"a head has snapped where its change stays below a tenth of the fastest.{over}",
            (
                Curves("Entropy of the heads", "step", "entropy", entropies, log_x=True),
                Curves(
                    "How fast they change", "step", "share of the weights per step", changes, log_x=True, log_y=True
                ),
            ),
            rows,
        )
        laws = [] if self.laws is None else [self.laws.section(looks)]
        return [course, *self._scanned(shown, looks), *laws]

    def _scanned(self, names: Sequence[str], looks: Sequence[dict[str, Any]]) -> Iterator[Section]:
        if not names:
            return
        width = min(MOST_TOKENS, len(self.names))
        last = [[looks[-1]["heads"][name]["lift"][i] for name in names] for i in range(width)]
        first = names[0]
        moments = [look for look in looks if first in look["heads"]]
        course = [[look["heads"][first]["lift"][i] for look in moments] for i in range(width)]
        yield Section(
            "Which tokens are looked at",
            f"Lift of the {width} most frequent tokens, the most frequent first: the share of the weights that goes to a token, "
            "over what equal weights would give it. Dark is looked at.",
            (
                Heat("At the last look, by head", self.names[:width], list(names), last),
                Heat(
                    f"Head {first}, step by step", self.names[:width], [str(look["step"]) for look in moments], course
                ),
            ),
        )


def _name(task: Task, token: int) -> str:
    tokenizer = getattr(task, "tokenizer", None)
    if tokenizer is None:
        return str(token)
    text = tokenizer.decode([token]) if token < tokenizer.vocab_size else ""
    if not text:
        return f"[{token}]"  # of the task, such as the mask
    return {" ": "␣", "\n": "⏎"}.get(text) or "".join(
        c if c.isprintable() else f"\\x{ord(c):02x}" for c in text.replace(" ", "␣")
    )


def _layers(model: nn.Module) -> dict[int, AttentionLayer]:
    """The layers whose weights are looked at, by number."""
    return {
        number: layer
        for number, layer in attention_layers(model).items()
        if "weights" in layer.card.honours and not layer.pattern.cross
    }


def _ask(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    context = named.get("context") or Context()
    return given, {**named, "context": context.replace(want=context.want | {"weights"})}


def _take(found: dict[int, Tensor], number: int, layer: nn.Module, given: tuple[Any, ...], result: Result) -> None:
    weights = result.extras.get("weights")
    if weights is not None:
        found[number] = weights
