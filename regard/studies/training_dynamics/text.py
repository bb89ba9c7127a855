"""One layer with one head on real text, trained like the paper's on WikiText: SGD, feed-forward at a higher rate.

The head is softmax, as in the paper, or another mechanism's. The model has no positions; :class:`AttentionMonitor` records its attention during training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from regard.catalogue import get_mechanism
from regard.contract import Context, Pattern, Unsupported
from regard.create import create_layer
from regard.layers.attention import AttentionLayer
from regard.models import LanguageModel, LanguageModelConfig
from regard.models.variants import known_name, read_variant
from regard.reproductions.framework.protocol import Setting
from regard.reproductions.framework.training import cached_task
from regard.studies.framework.protocol import lacks, refused
from regard.tasks.protocol import mean_loss
from regard.workbench.trained.attention_monitor import AttentionMonitor, snapped

FREQUENT = 10
"""How many of the most frequent tokens count as common: on real text no token occurs with a single next token only."""

CONTROL = "softmax"
"""The paper's mechanism, which always reads the text."""


def on_text_of(mechanism: str) -> str:
    """The name of a mechanism's setting."""
    return "text" if mechanism == CONTROL else f"text, {mechanism}"


def refuses(mechanism: str) -> str | None:
    """Why a mechanism cannot read the text with one monitored head, or None where it can."""
    card = get_mechanism(known_name(mechanism))
    if not card.forms:  # a module of a user's file
        return "a torch module has no card that says how it returns its weights: write it with a MECHANISM (regard new)"
    reason = lacks(card, Pattern.CAUSAL_SELF)
    if reason is not None:
        return reason
    if "weights" not in card.honours:
        return "it returns no attention weights: `honours` of its card lacks `weights`"
    try:
        layer = create_layer(known_name(mechanism), 8, 1, pattern=Pattern.CAUSAL_SELF)
        asked = Context(want=frozenset({"weights"}))
        with torch.random.fork_rng():
            weights = layer(torch.randn(1, 6, 8), context=asked).extras.get("weights")
    except Unsupported as error:
        return refused(error)
    if isinstance(layer, AttentionLayer) and weights is not None and weights.shape == (1, 1, 6, 6):
        return None
    return "it does not return a weight for each pair of tokens"


def on_text(setting: Setting, seed: int) -> dict[str, Any]:
    """Attention entropy, lift of the most frequent and of the other recorded tokens, and change per step."""
    task = cached_task(
        "text",
        data=tuple(setting["data"]) or None,
        length=setting["length"],
        tokenizer=setting["tokenizer"],
        evaluation_items=64,
    )
    torch.manual_seed(seed)
    model = LanguageModel(
        LanguageModelConfig(
            task.vocab_size or 0,
            dim=setting["dim"],
            plan=read_variant(setting.get("mechanism", CONTROL)).plan(1),
            num_heads=1,
            feed_forward=setting["dim"],
            positions="none",
        )
    )
    monitor, steps = AttentionMonitor(task), setting["steps"]
    network = [p for name, p in model.named_parameters() if "feed_forward" in name]
    own = {id(p) for p in network}
    rest = [p for p in model.parameters() if id(p) not in own]
    groups = [{"params": rest, "lr": setting["rate"]}, {"params": network, "lr": setting["ratio"] * setting["rate"]}]
    optimizer = torch.optim.SGD(groups)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(1, steps // setting["epochs"]), gamma=0.95)
    due, losses = monitor.due(steps), []
    monitor.look(model, 0)
    for step in range(steps):
        batch = task.training_batch(step, seed, setting["batch_size"])
        loss = mean_loss(task, model(batch.inputs).output, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        if step + 1 in due:
            monitor.look(model, step + 1)
            losses.append(float(loss.detach()))
    looks = monitor.as_record()["looks"]
    heads = [look["heads"]["0.0"] for look in looks]
    changes = [
        0.0 if head["change"] is None else head["change"] / max(1, look["step"] - look["since"])
        for look, head in zip(looks, heads, strict=True)
    ]
    frozen = snapped(changes)
    lifts = [[lift for lift in head["lift"] if lift is not None] for head in heads]
    return {
        "moments": [float(look["step"]) for look in looks],
        "losses": losses,
        "entropy": [head["entropy"] for head in heads],
        "frequent": [sum(row[:FREQUENT]) / len(row[:FREQUENT]) for row in lifts],
        "others": [sum(row[FREQUENT:]) / max(1, len(row[FREQUENT:])) for row in lifts],
        "change": changes,
        "last entropy": heads[-1]["entropy"],
        "last frequent over others": _over(lifts[-1]),
        "snapped": float("nan") if frozen is None else float(looks[frozen]["step"]),
        "first loss": losses[0],
        "last loss": losses[-1],
    }


def _over(row: list[float]) -> float:
    frequent, others = row[:FREQUENT], row[FREQUENT:]
    return sum(frequent) / len(frequent) / (sum(others) / len(others)) if sum(others) > 0 else float("nan")
