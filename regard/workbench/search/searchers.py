"""Searchers: each looks for the highest-scoring network within a budget, with a limited number of scores.

`evolution` is the search of the Hardware-Aware Transformer (Wang et al., arXiv 2005.14187): parents, mutants,
crossovers. `random` draws networks at random. `optuna` is that library's tree-structured Parzen estimator over the same
genes (``pip install 'regard[search]'``).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regard.contract import Unsupported
from regard.workbench.search.space import Genes, Space

POPULATION, LEAST_POPULATION = 125, 10
"""Size of a generation: a fifth are parents, the rest half mutants and half crossovers. Smaller if few scores are
allowed, so that there are eight generations."""
MUTATION = 0.3
TRIES = 40
"""Draws per requested network before giving up on the full number."""
PATIENCE = 10
"""Trials of optuna in a row that score nothing new, after which the next one is a network drawn at random."""

DRAWN_OUT = f"random draws, {TRIES} for each network, gave no further one within the budget"

Score = Callable[[Sequence[Genes]], np.ndarray]
Fits = Callable[[Genes], bool]


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        best: networks and their scores, best first, without duplicates.
        scored: how many networks were scored.
        fewer: why they are fewer than allowed; "" if they are not.
    """

    best: list[tuple[Genes, float]]
    scored: int
    fewer: str = ""


class Scored:
    """Scores of networks, each computed once, up to a maximum number."""

    def __init__(self, score: Score, fits: Fits, most: int) -> None:
        self.score, self.fits, self.most = score, fits, most
        self.known: dict[Genes, float] = {}

    @property
    def left(self) -> int:
        """Number of networks that may still be scored."""
        return self.most - len(self.known)

    def add(self, networks: Sequence[Genes]) -> None:
        """Score the networks that are new and fit the budget, up to the number left."""
        new = [genes for genes in dict.fromkeys(networks) if genes not in self.known and self.fits(genes)][: self.left]
        if new:
            self.known |= dict(zip(new, map(float, self.score(new)), strict=True))

    def found(self, fewer: str = "") -> Found:
        """All scored networks, best first; `fewer` says why no more were scored."""
        best = sorted(self.known.items(), key=lambda item: (-item[1], item[0]))
        return Found(best, len(self.known), fewer if self.left else "")


def evolution(
    space: Space, score: Score, fits: Fits, evaluations: int, seed: int, start: Sequence[Genes] = ()
) -> Found:
    """Generations of the best networks so far, their mutants (each gene redrawn with probability 0.3) and crossovers
    (each gene from either of two parents)."""
    rng, scored = random.Random(seed), Scored(score, fits, evaluations)
    population = min(POPULATION, max(LEAST_POPULATION, evaluations // 8))
    kept, made = population // 5, 2 * population // 5
    scored.add([*start, *_drawn(lambda: space.draw(rng), scored, population)])

    def mutant() -> Genes:
        return space.nearest(
            tuple(
                rng.choice(left) if rng.random() < MUTATION else number
                for number, left in zip(rng.choice(parents), space.allowed, strict=True)
            )
        )

    def crossover() -> Genes:
        both = [rng.choice(parents) for _ in range(2)]
        return space.nearest(tuple(rng.choice(pair) for pair in zip(*both, strict=True)))

    while scored.left and scored.known:
        parents, before = [genes for genes, _ in scored.found().best[:kept]], len(scored.known)
        scored.add([*_drawn(mutant, scored, made), *_drawn(crossover, scored, made)])
        if len(scored.known) == before:
            break  # the space, or all that the parents lead to, is exhausted
    return scored.found("a generation had no new network within the budget")


def at_random(
    space: Space, score: Score, fits: Fits, evaluations: int, seed: int, start: Sequence[Genes] = ()
) -> Found:
    """Networks drawn uniformly."""
    rng, scored = random.Random(seed), Scored(score, fits, evaluations)
    scored.add([*start, *_drawn(lambda: space.draw(rng), scored, evaluations)])
    return scored.found(DRAWN_OUT)


def with_optuna(
    space: Space, score: Score, fits: Fits, evaluations: int, seed: int, start: Sequence[Genes] = ()
) -> Found:
    """Optuna's sampler, with one categorical parameter per active gene.

    Networks beyond the budget and repeated ones are pruned trials and use up no scores, so that as many networks are
    scored as by the other searchers. After `PATIENCE` such trials in a row a network within the budget is drawn at
    random, and the search ends early only if none is found.

    Raises:
        Unsupported: if optuna is not installed.
    """
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rng, scored = random.Random(seed), Scored(score, fits, evaluations)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))

    def suggested(trial: Any) -> Genes:
        numbers = [left[0] for left in space.allowed]
        for at, (gene, left) in enumerate(zip(space.genes, space.allowed, strict=True)):
            if space.active(tuple(numbers))[at]:  # depths come before their layers
                numbers[at] = trial.suggest_categorical(gene.name, list(left))
        return space.canonical(tuple(numbers))

    def objective(trial: Any) -> float:
        genes, before = suggested(trial), len(scored.known)
        scored.add([genes])
        if len(scored.known) == before:
            raise optuna.TrialPruned
        return scored.known[genes]

    def enqueue(genes: Genes) -> None:
        named = zip(space.genes, genes, space.active(genes), strict=True)
        study.enqueue_trial({gene.name: number for gene, number, counts in named if counts})

    for genes in start:
        enqueue(genes)
    idle = 0
    while scored.left:
        if idle >= PATIENCE:
            fresh = _drawn(lambda: space.draw(rng), scored, 1, TRIES * scored.left)
            if not fresh:
                break
            enqueue(fresh[0])
        before = len(scored.known)
        study.optimize(objective, n_trials=1)
        idle = 0 if len(scored.known) > before else idle + 1
    return scored.found(DRAWN_OUT)


SEARCHERS: dict[str, Callable[..., Found]] = {"evolution": evolution, "random": at_random, "optuna": with_optuna}


def check_searchers(names: Sequence[str]) -> None:
    """Raise Unsupported for an unknown searcher, and for one whose package is missing."""
    unknown = [name for name in names if name not in SEARCHERS]
    if unknown or not names:
        raise Unsupported(f"searchers {', '.join(names) or 'none'}", supported=", ".join(SEARCHERS))
    if "optuna" in names:
        _optuna()


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise Unsupported(
            "the searcher optuna without the package", supported="pip install 'regard[search]'", nearest="evolution"
        ) from None
    return optuna


def _drawn(draw: Callable[[], Genes], scored: Scored, count: int, tries: int | None = None) -> list[Genes]:
    """Up to `count` new networks that fit the budget; fewer if the limit of draws is reached, `TRIES` for each network
    when None."""
    found: dict[Genes, None] = {}
    for _ in range(TRIES * count if tries is None else tries):
        if len(found) >= count:
            break
        genes = draw()
        if genes not in found and genes not in scored.known and scored.fits(genes):
            found[genes] = None
    return list(found)
