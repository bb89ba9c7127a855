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

Score = Callable[[Sequence[Genes]], np.ndarray]
Fits = Callable[[Genes], bool]


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        best: networks and their scores, best first, without duplicates.
        scored: how many networks were scored.
    """

    best: list[tuple[Genes, float]]
    scored: int


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

    def found(self) -> Found:
        """All scored networks, best first."""
        return Found(sorted(self.known.items(), key=lambda item: (-item[1], item[0])), len(self.known))


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
    return scored.found()


def at_random(
    space: Space, score: Score, fits: Fits, evaluations: int, seed: int, start: Sequence[Genes] = ()
) -> Found:
    """Networks drawn uniformly."""
    rng, scored = random.Random(seed), Scored(score, fits, evaluations)
    scored.add([*start, *_drawn(lambda: space.draw(rng), scored, evaluations)])
    return scored.found()


def with_optuna(
    space: Space, score: Score, fits: Fits, evaluations: int, seed: int, start: Sequence[Genes] = ()
) -> Found:
    """Optuna's sampler, with one categorical parameter per active gene; networks beyond the budget are pruned trials.

    Raises:
        Unsupported: if optuna is not installed.
    """
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    scored = Scored(score, fits, evaluations)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))

    def suggested(trial: Any) -> Genes:
        numbers = [left[0] for left in space.allowed]
        for at, (gene, left) in enumerate(zip(space.genes, space.allowed, strict=True)):
            if space.active(tuple(numbers))[at]:  # depths come before their layers
                numbers[at] = trial.suggest_categorical(gene.name, list(left))
        return space.canonical(tuple(numbers))

    def objective(trial: Any) -> float:
        genes = suggested(trial)
        scored.add([genes])
        if genes not in scored.known:
            raise optuna.TrialPruned
        return scored.known[genes]

    for genes in start:
        named = zip(space.genes, genes, space.active(genes), strict=True)
        study.enqueue_trial({gene.name: number for gene, number, counts in named if counts})
    for _ in range(2 * evaluations):  # pruned and repeated trials use up no scores
        if not scored.left:
            break
        study.optimize(objective, n_trials=1)
    return scored.found()


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


def _drawn(draw: Callable[[], Genes], scored: Scored, count: int) -> list[Genes]:
    """Up to `count` new networks that fit the budget; fewer if the limit of draws is reached."""
    found: dict[Genes, None] = {}
    for _ in range(TRIES * count):
        if len(found) >= count:
            break
        genes = draw()
        if genes not in found and genes not in scored.known and scored.fits(genes):
            found[genes] = None
    return list(found)
