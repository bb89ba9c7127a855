"""Compares searchers at the same number of evaluations: how near each comes to the best network that any has found.

python benchmarks/searchers.py                # evolution, random and, if installed, optuna; --json for programs
python benchmarks/searchers.py --seeds 10 --evaluations 50,200,800

The space is the default one of `regard search` (language models of two to four layers), with a budget at the 40th percentile
of its FLOPs. The score is a ranker learned from 60 networks with synthetic losses: a random value for each choice of each gene,
and one for each pair of mechanisms in neighbouring layers, so that no gene can be chosen independently. Each seed draws other
values. Regret is the best known score minus the one found, in standard deviations of the scores of random networks within the
budget.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import random
import statistics
import time
from typing import Any

import numpy as np

from regard.models.variants import read_variants
from regard.tasks import create_task
from regard.workbench.search.costs import CostTable, NetworkBudget, flops
from regard.workbench.search.predictor import Predictor
from regard.workbench.search.searchers import SEARCHERS
from regard.workbench.search.settings import SearchSettings
from regard.workbench.search.space import Choices, Genes, Space

SAMPLE, LEARNED, PERCENTILE = 400, 60, 0.4


def losses(space: Space, networks: list[Genes], seed: int) -> list[float]:
    """Synthetic losses: sums of random values of the choices and of the pairs of neighbouring layers' mechanisms."""
    rng = np.random.default_rng(seed)
    worth = [rng.standard_normal(len(gene.choices)) for gene in space.genes]
    pairs = rng.standard_normal((len(space.choices.names),) * 2)
    found = []
    for genes in networks:
        active = space.active(genes)
        own = sum(float(worth[i][n]) for i, (n, counts) in enumerate(zip(genes, active, strict=True)) if counts)
        kinds = [
            n for n, gene, counts in zip(genes, space.genes, active, strict=True) if counts and gene.kind == "mechanism"
        ]
        found.append(own + sum(float(pairs[a, b]) for a, b in itertools.pairwise(kinds)))
    return found


def one_seed(
    space: Space, table: CostTable, names: list[str], evaluations: list[int], seed: int
) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    sample = [space.draw(rng) for _ in range(SAMPLE)]
    limit = float(np.quantile([table(genes) for genes in sample], PERCENTILE))
    learned = list(dict.fromkeys(sample))[:LEARNED]
    ranker = Predictor(space, seed=seed).fit(learned, losses(space, learned, seed))
    spread = float(np.std(ranker.score([genes for genes in sample if table(genes) <= limit])))
    rows = []
    for count in evaluations:
        for name in names:
            started = time.thread_time()
            found = SEARCHERS[name](space, ranker.score, lambda genes: table(genes) <= limit, count, seed)
            rows.append(
                {
                    "seed": seed,
                    "evaluations": count,
                    "searcher": name,
                    "scored": found.scored,
                    "best": found.best[0][1],
                    "seconds": time.thread_time() - started,
                }
            )
    best = max(row["best"] for row in rows)
    return [{**row, "regret": (best - row["best"]) / spread} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--evaluations", default="50,100,200,400")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    evaluations = [int(part) for part in given.evaluations.split(",")]
    names = [name for name in SEARCHERS if name != "optuna" or importlib.util.find_spec("optuna")]
    task, variants = create_task("recall", evaluation_items=8), tuple(read_variants("softmax,cosformer"))
    space = Space(task, Choices(variants), SearchSettings(NetworkBudget("flops", 1.0)).models(task, variants))
    table = CostTable.of(space, lambda networks: flops(space, networks))
    rows = [row for seed in range(given.seeds) for row in one_seed(space, table, names, evaluations, seed)]
    if given.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{space.size:,} networks, {given.seeds} seeds; regret as mean ± standard error, CPU seconds as median")
    for count in evaluations:
        for name in names:
            own = [row for row in rows if row["evaluations"] == count and row["searcher"] == name]
            regret = [row["regret"] for row in own]
            error = statistics.stdev(regret) / len(regret) ** 0.5 if len(regret) > 1 else float("nan")
            seconds = statistics.median(row["seconds"] for row in own)
            scored = statistics.median(row["scored"] for row in own)
            print(
                f"{count:6} {name:10} {statistics.fmean(regret):6.3f} ± {error:.3f}   {scored:5.0f} scored   {seconds:.2f} s"
            )


if __name__ == "__main__":
    main()
