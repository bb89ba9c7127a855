"""The page of the mixing matrices of all mechanisms on one input."""

from __future__ import annotations

from collections.abc import Iterable

from regard.workbench.mixing import PHRASE, STRUCTURES, TOKENS, Mixing, as_svg, mixed_mechanisms, mixing_of


def mixing_page(names: Iterable[str]) -> list[str]:
    """The page as pieces of Markdown, one section for each quantity measured on the matrices."""
    drawn = [mixing_of(name) for name in names if name in mixed_mechanisms()]
    parts = [
        "---\nhide: [toc]\n---",
        "# Mixing matrices",
        f"All mechanisms on the same {TOKENS} tokens, a phrase of {PHRASE} that comes three times, slightly varied. A row is an "
        "output, a column a token; the darker, the more of that token's value is in the output, as a share of the largest "
        "weight in its row. Negative weights have another colour. Positions are not told to any mechanism beside its own; "
        "decays, gates and parameters are drawn, not trained.",
        "Where outputs are linear in the values, a column is what comes out for values that are a unit vector at that token. "
        "Under each picture is what is measured on it, not what a card says; *causal* and *noncausal* name its pattern. One in "
        "a terminal: `regard show linear --matrix`.",
    ]
    for structure, says in STRUCTURES.items():
        members = [one for one in drawn if one.structure == structure]
        if members:
            figures = "".join(map(_figure, members))
            parts += [f"## {structure.capitalize()}", says, f'<div class="mixing">{figures}</div>']
    return parts


def _figure(one: Mixing) -> str:
    told = ", ".join(["causal" if one.pattern.causal else "noncausal", *one.facts()])
    link = f'<a href="../mechanisms/{one.mechanism}/">{one.mechanism}</a>'
    return f"<figure>{as_svg(one)}<figcaption>{link}<br>{told}</figcaption></figure>"
