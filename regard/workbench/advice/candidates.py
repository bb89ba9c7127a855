"""The candidates: mechanisms with the right pattern whose layers can have the size, and the needs that they meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from regard.catalogue import get_mechanism, list_mechanisms
from regard.contract import Kind, Unsupported
from regard.models.variants import known_name
from regard.workbench.advice.layer_work import MIXING
from regard.workbench.advice.needs import Finding, find, reach
from regard.workbench.advice.quality import Quality
from regard.workbench.advice.samples import LayerMeasure
from regard.workbench.advice.settings import AdviseSettings
from regard.workbench.comparison.cost import REFERENCE

FEW = 64
"""Tokens at which mixers are checked for mixing tokens at all."""


def candidates_of(settings: AdviseSettings) -> tuple[list[str], dict[str, str]]:
    """The candidates, and the reason for each other mechanism that was named or has the pattern."""
    excluded = {known_name(name) for name in settings.exclude}
    if settings.mechanisms is None:
        names = list_mechanisms(pattern=settings.pattern, where=lambda c: c.kind in MIXING)
    else:
        names = list(dict.fromkeys(known_name(name) for name in settings.mechanisms))
    chosen, rejected = [], {}
    for name in names:
        card = get_mechanism(name)
        if name in excluded:
            rejected[name] = "excluded by you"
        elif card.kind not in MIXING:
            replaced = {Kind.POOLING: "the pool of an encoder", Kind.PROJECTION: "a linear layer"}[card.kind]
            raise Unsupported(
                f"advice on {name}, a {card.kind.value}, which takes the place of {replaced}",
                supported="mechanisms that mix tokens: attention, mixers and wrappers",
                nearest=REFERENCE,
            )
        elif settings.pattern not in card.patterns:
            rejected[name] = f"lacks {settings.pattern.value}: {card.refused.get(settings.pattern, 'not defined')}"
        elif not card.forms:
            rejected[name] = "a module without a card, whose costs are not declared"
        elif card.kind is Kind.MIXER and reach(name, settings.pattern, FEW)[0] < 2:
            rejected[name] = "mixes no tokens: an output depends on its own token alone (measured)"
        else:
            chosen.append(name)
    if not chosen:
        why = "; ".join(f"{name} {reason}" for name, reason in rejected.items())
        raise Unsupported(
            f"advice with no candidate left ({why or 'none was named'})",
            supported="other mechanisms, fewer exclusions",
            nearest=REFERENCE,
        )
    return chosen, rejected


def able_mechanisms(settings: AdviseSettings) -> tuple[dict[str, list[str]], dict[str, str], LayerMeasure]:
    """The candidates that can do each kind of work, the reasons why others cannot, and the layers.

    The deciding work comes first, in case the time runs out before the rest.
    """
    names, rejected = candidates_of(settings)
    layers = LayerMeasure(settings.layer)
    built, decoding = [], []
    for name in names:
        try:
            work = layers.work(name)
        except Unsupported as error:
            rejected[name] = f"its layer cannot have this size: {error}"
            continue
        built.append(name)
        if work.decodes:
            decoding.append(name)
    if not built:
        raise Unsupported(
            f"layers of dim={settings.dim}, heads={settings.heads}, head_dim={settings.head_dim}",
            supported="; ".join(f"{name}: {reason}" for name, reason in rejected.items()),
        )
    order = sorted(settings.what, key=lambda what: what != settings.deciding)
    return {what: decoding if what == "decode" else built for what in order}, rejected, layers


Findings = dict[str, dict[str, Finding]]
"""Findings by mechanism and need."""


def findings_of(settings: AdviseSettings, names: Sequence[str], quality: Quality) -> Findings:
    """Find out whether each of these mechanisms meets each need."""
    longest = settings.lengths[-1]
    return {
        name: {
            need: find(need, name, settings.pattern, longest, quality.solved, settings.short_convolution)
            for need in settings.needs
        }
        for name in names
    }


def lack(findings: Mapping[str, Finding], needs: Sequence[str]) -> str | None:
    """The first need that a mechanism does not meet, with the reason; None if it meets all."""
    missing = next((need for need in needs if not findings[need].holds), None)
    return missing and f"{missing}: {findings[missing].reason} ({findings[missing].source})"


def likely(settings: AdviseSettings, findings: Findings, quality: Quality) -> list[str]:
    """The mechanisms that may be picked, whatever their times: those that qualify, with known results if there are any."""
    able = [n for n in findings if lack(findings[n], settings.needs) is None and n not in quality.behind]
    return [name for name in able if name in quality.said] or able
