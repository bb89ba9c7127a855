"""Mixing matrices: how much of each token's value goes into each output, for every mechanism on one input (arXiv
2302.06218).

If outputs are linear in the values, entry (i, j) is output i for values that are a unit vector at token j and 0
elsewhere: outputs are the matrix times the values. Otherwise it is the derivative of output i with respect to value j
at the given values, and is labelled as a derivative. All properties reported for a matrix are measured on it, not taken
from a card.

Tokens are the same for all mechanisms: a repeated phrase, slightly varied each time, so that mechanisms that look for
similar tokens show stripes. Inputs other than queries and keys are sampled as the card says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.catalogue import list_mechanisms, resolve
from regard.contract import Context, Kind, Mechanism, Pattern, Unsupported
from regard.create import create_layer
from regard.workbench.verification.subjects import Subject

TOKENS, PHRASE = 24, 8
"""Number of tokens in the input, and in the phrase that it repeats."""
SAMENESS = 0.3
"""Size of the variation between repetitions, relative to the repeated part."""
SHARPNESS = 4.0
"""Norm of queries and keys."""
EXACT = 1e-9
"""Relative size below which a number counts as a rounding error."""
SHORT = {
    **dict.fromkeys(("window", "segment", "memory", "projected"), 6),
    **dict.fromkeys(("block", "block_size", "group"), 3),
    **dict.fromkeys(("chunk", "stride", "landmarks", "slots", "keys", "top_k"), 4),
    **dict.fromkeys(("clusters", "buckets", "num_agents"), 4),
    **dict.fromkeys(("top", "compressed"), 2),
    **dict.fromkeys(("factor", "random_blocks", "columns"), 1),
    "estimate_length": 16,
}
"""Values for size options whose default is larger: few enough to matter with so few tokens."""

FIXED, SPARSE, SEMISEPARABLE, LOW_RANK, DENSE, NONLINEAR = (
    "the same for every input",
    "chosen pairs",
    "semiseparable: a state of fixed size",
    "low rank",
    "dense",
    "not linear in the values",
)
STRUCTURES = {
    DENSE: "Every visible pair has a weight of its own, and no few vectors stand for the matrix.",
    SPARSE: "Pairs that could be seen have no weight.",
    LOW_RANK: "The matrix is a product of two thin ones.",
    SEMISEPARABLE: "What a later piece takes of an earlier one goes through few numbers: every block below the diagonal has a low "
    "rank, which a recurrence computes with a state of that size.",
    FIXED: "Tokens do not change the weights, which are learned or given: convolutions, transforms, positions.",
    NONLINEAR: "Values decide about weights too, so that no matrix is the mechanism. Drawn is the derivative of each output by "
    "each value, at one input.",
}
"""The structures that a matrix can have, in the order in which they are shown."""


@dataclass(frozen=True)
class Mixing:
    """A mixing matrix and its measured properties.

    Attributes:
        mechanism, pattern: what the matrix belongs to.
        weights: (outputs, tokens), for the first head and feature; norms over features if it is a derivative.
        structure: one of `STRUCTURES`.
        linear: whether outputs are the matrix times the values.
        normalised: whether no weight is negative and rows add up to 1.
        per_feature: whether features have different matrices, or are mixed with each other.
        rank: rank of the matrix; in causal patterns, the largest rank of a block below its diagonal.
        seen: share of the visible pairs with a nonzero weight.
        options: options that differ from the default ones.
    """

    mechanism: str
    pattern: Pattern
    weights: Tensor
    structure: str
    linear: bool
    normalised: bool
    per_feature: bool
    rank: int
    seen: float
    options: Mapping[str, Any]

    def facts(self) -> list[str]:
        """The measured properties, in words."""
        causal = "blocks below the diagonal have rank" if self.pattern.causal else "rank"
        told = [f"{causal} {self.rank}", f"{self.seen:.0%} of the pairs"]
        told += [", ".join(f"{name} {value}" for name, value in self.options.items())] * bool(self.options)
        told += ["rows add up to 1"] * self.normalised + ["each feature its own"] * self.per_feature
        return told if self.linear else [*told, "derivative"]


def mixed_mechanisms() -> list[str]:
    """Mechanisms of the catalogue that mix tokens themselves: all except wrappers and linear layers."""
    return list_mechanisms(where=lambda card: card.kind not in (Kind.WRAPPER, Kind.PROJECTION))


def mixing_of(name: str, pattern: str | Pattern | None = None, *, seed: int = 0) -> Mixing:
    """Compute the mixing matrix of a mechanism in float64.

    Args:
        name: a mechanism, optionally with options, as in ``local:window=4``; other options are chosen for a short
            sequence.
        pattern: a self pattern; when None, causal-self if the mechanism has it.
        seed: seed of the input.

    Raises:
        Unsupported: for a mechanism that does not mix tokens itself, and for a pattern that it lacks or that reads a
            memory.
    """
    card, options = resolve(name)
    card.options(**options)
    if card.kind in (Kind.WRAPPER, Kind.PROJECTION):
        raise Unsupported(
            f"a mixing matrix of {card.name}, a {card.kind.value}",
            supported="attention, mixers and poolings, which mix tokens themselves",
        )
    causal = Pattern.CAUSAL_SELF if Pattern.CAUSAL_SELF in card.patterns else Pattern.NONCAUSAL_SELF
    wanted = card.require_pattern(causal if pattern is None else pattern)
    if wanted.cross:
        raise Unsupported(f"a mixing matrix in {wanted}", supported="causal-self, noncausal-self")
    subject = Subject(card, wanted, _short_options(card, options), seed=seed)
    values = _values(card)
    inputs, others = (_inputs(subject, phrase) for phrase in (0, 1))
    if values is None or not _is_linear(subject, inputs, values):
        return _derivative(subject, inputs, values)
    weights, features = _by_units(subject, inputs, values)
    elsewhere, _ = _by_units(subject, others, values)
    size = max(float(weights.abs().max()), 1e-300)
    fixed = float((weights - elsewhere).abs().max()) <= EXACT * size
    return _measured(subject, weights, linear=True, fixed=fixed, per_feature=features)


def _short_options(card: Mechanism, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given options and those of `SHORT` that the mechanism has and accepts together."""
    defaults, found = card.config(), dict(given)
    for name, value in SHORT.items():
        default = getattr(defaults, name, None)
        if name not in given and isinstance(default, int) and default > value:
            with suppress(Unsupported):
                card.options(**found, **{name: value})
                found[name] = value
    return found


def _values(card: Mechanism) -> str | None:
    """The name of the input that is mixed; None if no input has the layout tokens by features."""
    for name in ("v", "x"):
        axes = card.axes.get(name, "")
        if len(axes) in (3, 4) and axes[0] == "b" and axes[-2] in "nm" and all(axis in "hg" for axis in axes[1:-2]):
            return name
    return None


def _content(phrase: int, width: int) -> Tensor:
    """Vectors (tokens, width) for a phrase that is repeated with variations."""
    generator = torch.Generator().manual_seed(phrase)
    words = torch.randn(PHRASE, width, dtype=torch.float64, generator=generator)
    varied = torch.randn(TOKENS, width, dtype=torch.float64, generator=generator)
    tokens = (words[torch.arange(TOKENS) % PHRASE] + SAMENESS * varied).abs()  # positive: rectifiers change nothing
    return SHARPNESS * tokens / tokens.norm(dim=-1, keepdim=True)


def _inputs(subject: Subject, phrase: int) -> dict[str, Tensor]:
    """Inputs for one row and one head, or two heads if two make one map; parameters are the same for every phrase."""
    inputs = _inputs_of(subject, phrase, 1)
    try:
        subject.run(inputs)
    except Unsupported:
        return _inputs_of(subject, phrase, 2)
    return inputs


def _inputs_of(subject: Subject, phrase: int, heads: int) -> dict[str, Tensor]:
    found = subject.inputs(TOKENS, batch=1, h=heads, g=heads)
    drawn = subject.inputs(TOKENS, batch=1, seed=1 + phrase, h=heads, g=heads)
    for name in found:
        axes = subject.card.axes.get(name, "")
        if axes.startswith("b"):
            found[name] = drawn[name]
        if name.split("_")[0] in ("q", "k") and axes[-2:-1] in ("n", "m") and found[name].shape[-2] == TOKENS:
            found[name] = _content(phrase, found[name].shape[-1]).expand(found[name].shape).clone()
    # drop earlier segments (other tokens), null keys (no token) and inputs of options that are off
    return {
        name: x
        for name, x in found.items()
        if not (name.endswith("_past") or name.startswith("null_") or getattr(subject.config, name, x) is None)
    }


def _with_values(subject: Subject, inputs: dict[str, Tensor], name: str, values: Tensor) -> dict[str, Tensor]:
    """Inputs for rows of values (rows, tokens, features); other projections of the values are replaced too."""
    given = {}
    for other, x in inputs.items():
        axes = subject.card.axes.get(other, "b")
        if other == name or (other.startswith(f"{name}_") and axes == subject.card.axes[name]):
            heads = x.shape[1:-2]
            given[other] = values.view(len(values), *(1,) * len(heads), *values.shape[1:]).expand(-1, *heads, -1, -1)
            if x.shape[-2] != values.shape[-2]:  # belongs to an earlier segment, which has other tokens
                given[other] = x.new_zeros(len(values), *x.shape[1:])
        elif axes.startswith("b"):
            given[other] = x.expand(len(values), *x.shape[1:])
        else:
            given[other] = x
    return given


def _outputs(subject: Subject, inputs: dict[str, Tensor], name: str, values: Tensor) -> Tensor:
    """Outputs (rows, outputs, features) of the first head."""
    output = subject.run(_with_values(subject, inputs, name, values)).output
    return output[:, 0] if output.ndim == 4 else output


def _is_linear(subject: Subject, inputs: dict[str, Tensor], name: str) -> bool:
    a, b = torch.randn(2, *inputs[name].shape[-2:], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    first, second, both = _outputs(subject, inputs, name, torch.stack([a, b, 2 * a - 3 * b]))
    error = float((2 * first - 3 * second - both).abs().max())
    return error <= EXACT * max(float(both.abs().max()), float(first.abs().max()), 1e-300)


def _by_units(subject: Subject, inputs: dict[str, Tensor], name: str) -> tuple[Tensor, bool]:
    """The matrix of the first feature, and whether others have different matrices or are mixed with it."""
    count, width = inputs[name].shape[-2:]
    units = torch.zeros(2 * count, count, width, dtype=torch.float64)
    tokens = torch.arange(count)
    units[tokens, tokens, 0] = units[count + tokens, tokens, -1] = 1.0
    outputs = _outputs(subject, inputs, name, units)
    first, last = (half.movedim(0, 1) for half in outputs.split(count))  # (outputs, tokens, features)
    weights = first[..., 0]
    size = EXACT * max(float(weights.abs().max()), 1e-300)
    other = width > 1 and (
        float(first[..., 1:].abs().max()) > size or float((last[..., -1] - weights).abs().max()) > size
    )
    return weights.clone(), other


def _derivative(subject: Subject, inputs: dict[str, Tensor], name: str | None) -> Mixing:
    """Norms of the derivatives of outputs with respect to values, or to a layer's input if it has no values."""
    if name is None or subject.card.kind is not Kind.ATTENTION:
        return _of_layer(subject)
    values = inputs[name].flatten(0, -3)[0]
    slopes = _slopes(lambda rows: _outputs(subject, inputs, name, rows), values)
    return _measured(subject, slopes, linear=False, fixed=False, per_feature=False)


def _of_layer(subject: Subject) -> Mixing:
    card, width = subject.card, 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = create_layer(card.name, width, 1, pattern=subject.pattern, **subject.options).double().eval()
    context = Context(grid=subject.grid(TOKENS))
    slopes = _slopes(lambda rows: layer(rows, context=context).output, _content(0, width))
    return _measured(subject, slopes, linear=False, fixed=False, per_feature=False)


def _slopes(run: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Norms (outputs, tokens), over features, of the derivative; uses one batch row per output number."""
    with torch.no_grad():
        outputs, features = run(values[None]).shape[1:]
    rows = outputs * features
    x = values.expand(rows, *values.shape).clone().requires_grad_()
    each = run(x).flatten(1).diagonal()
    (slopes,) = torch.autograd.grad(each.sum(), x)
    return slopes.view(outputs, features, *values.shape).norm(dim=(1, 3))


def _measured(subject: Subject, weights: Tensor, *, linear: bool, fixed: bool, per_feature: bool) -> Mixing:
    size = max(float(weights.abs().max()), 1e-300)
    rows, columns = weights.shape
    causal = subject.pattern.causal and rows == columns
    visible = torch.ones_like(weights, dtype=torch.bool)
    blocks = [weights]
    if causal:
        visible = visible.tril()
        blocks = [weights[i:, :i] for i in range(1, rows)]
    rank = max(int(torch.linalg.matrix_rank(block, atol=EXACT * size, rtol=0.0)) for block in blocks)
    floor = EXACT * size if fixed or not linear else 0.0  # zeros of transforms and derivatives are rounded
    seen = float((weights[visible].abs() > floor).double().mean())
    sums = weights.sum(1)
    normalised = bool((weights >= -EXACT * size).all()) and float((sums - 1).abs().max()) < 1e-6
    structure = NONLINEAR
    if linear:
        full = min(rows, columns) // 2 if causal else min(rows, columns)
        low = rank <= 0.75 * full
        structure = FIXED if fixed else SPARSE if seen < 1 else DENSE
        if structure is DENSE and low:
            structure = SEMISEPARABLE if causal else LOW_RANK
    return Mixing(
        subject.card.name,
        subject.pattern,
        weights.detach(),
        structure,
        linear,
        normalised and linear,
        per_feature,
        rank,
        seen,
        subject.options,
    )


SHADES = " ░▒▓█"


def as_text(weights: Tensor) -> list[str]:
    """One line per output, two characters per token: the larger the weight relative to its row, the darker."""
    sizes = weights.abs()
    shares = sizes / sizes.amax(1, keepdim=True).clamp(min=1e-300)
    levels = (shares * (len(SHADES) - 1)).ceil().long()
    return ["".join(SHADES[level] * 2 for level in row) for row in levels.tolist()]


LEVELS: Sequence[float] = (0.02, 0.15, 0.35, 0.6, 0.85)
"""Shares of a row's largest weight at which the next darker shade begins."""


def as_svg(mixing: Mixing, side: int = 6) -> str:
    """The matrix as an SVG picture: rows are outputs, columns are tokens, shades are shares of the row's largest
    weight; negative weights have the class ``negative``."""
    weights = mixing.weights
    shares = weights / weights.abs().amax(1, keepdim=True).clamp(min=1e-300)
    rows, columns = shares.shape
    paths = []
    for sign, name in ((1.0, "positive"), (-1.0, "negative")):
        for level, low in enumerate(LEVELS):
            high = LEVELS[level + 1] if level + 1 < len(LEVELS) else 2.0
            at = ((sign * shares >= low) & (sign * shares < high)).nonzero().tolist()
            if at:
                squares = "".join(f"M{j * side} {i * side}h{side}v{side}h-{side}z" for i, j in at)
                opacity = (level + 1) / len(LEVELS)
                paths.append(f'<path class="{name}" fill-opacity="{opacity:.1f}" d="{squares}"/>')
    title = f"{mixing.mechanism}, {mixing.pattern.value}: {', '.join(mixing.facts())}"
    return (
        f'<svg viewBox="0 0 {columns * side} {rows * side}" role="img"><title>{title}</title>'
        f'<rect class="frame" width="{columns * side}" height="{rows * side}"/>{"".join(paths)}</svg>'
    )
