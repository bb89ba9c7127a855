"""The settings of an architecture search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from regard.contract import Unsupported, at_least, one_of
from regard.measurement.budget import Budget
from regard.models.frames import FRAMES
from regard.models.variants import Variant
from regard.tasks import Task
from regard.training import PRECISIONS
from regard.workbench.advice.layer_work import check_device
from regard.workbench.comparison.settings import CompareSettings
from regard.workbench.search.costs import NetworkBudget
from regard.workbench.search.searchers import check_searchers


@dataclass(frozen=True)
class SearchSettings:
    """Settings of an architecture search.

    Attributes:
        budget: the highest cost that a network may have.
        steps: training steps for the supernet, each on four networks.
        learning_rate: learning rate of all training.
        batch_tokens: tokens per training step.
        networks: number of networks evaluated with the supernet's weights, from which the ranker learns.
        rounds: number of rounds in which they are drawn; after each except the last, the less important genes are
            fixed.
        keep: share of the genes that stay open after a round.
        searchers: names in :data:`regard.workbench.search.searchers.SEARCHERS`.
        evaluations: number of networks that each searcher scores.
        finalists: number of each searcher's best networks that are evaluated with the supernet's weights.
        retrain_steps: training steps for the chosen networks from scratch; 0 for no retraining.
        seeds: number of training runs for each chosen network.
        seed: seed of the supernet, the draws and the first run.
        share: whether the mechanisms in a layer share their projections.
        frame: a name in :data:`regard.models.frames.FRAMES`.
        precision, device: for training and timing.
        plugins: plugins that define the task or mechanisms, for the commands that use what was found.
    """

    budget: NetworkBudget
    steps: int = 2000
    learning_rate: float = 3e-3
    batch_tokens: int = 4096
    networks: int = 60
    rounds: int = 2
    keep: float = 0.6
    searchers: tuple[str, ...] = ("evolution", "random")
    evaluations: int = 1000
    finalists: int = 8
    retrain_steps: int = 1500
    seeds: int = 3
    seed: int = 0
    share: bool = True
    frame: str = "bare"
    precision: str = "float32"
    device: str = "cpu"
    plugins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch_tokens", 1), ("networks", 10), ("rounds", 1), ("evaluations", 1)):
            at_least(name, getattr(self, name), low)
        for name, low in (("finalists", 1), ("retrain_steps", 0), ("seeds", 1), ("seed", 0)):
            at_least(name, getattr(self, name), low)
        if not self.learning_rate > 0:
            raise Unsupported(f"learning_rate={self.learning_rate}", supported="a positive rate", nearest="0.003")
        if not 0 < self.keep <= 1:
            raise Unsupported(f"keep={self.keep}", supported="a share of the genes, above 0 and up to 1", nearest="0.6")
        if self.networks < 5 * self.rounds:
            raise Unsupported(f"{self.networks} networks in {self.rounds} rounds", supported="five or more a round")
        one_of("frame", self.frame, FRAMES)
        one_of("precision", self.precision, PRECISIONS)
        check_searchers(self.searchers)
        check_device(self.device)

    def models(self, task: Task, mechanisms: Sequence[Variant]) -> CompareSettings:
        """The settings with which a comparison of these mechanisms on a task would build its models."""
        return CompareSettings(
            tuple(mechanisms),
            Budget("steps", float(self.steps)),
            seeds=1,
            first_seed=self.seed,
            frames=(self.frame,),
            batch_tokens=self.batch_tokens,
            rates=(self.learning_rate,),
            lengths=(task.length,),
            precision=self.precision,
            device=self.device,
        )
