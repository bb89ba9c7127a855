"""Predicts which of two networks is better, learned from a few evaluated ones: RankNAS (Hu et al., arXiv 2109.07383).

A scalar score g of a network's features is learned such that P(a is better than b) = sigmoid(g(a) - g(b)): the loss is
the logistic loss over all ordered pairs of the evaluated networks. A search needs only the order, which is easier to
learn than the loss itself; learning the loss with the same g is the baseline (``kind="regression"``). Here g is a
linear function plus a small network with one hidden layer, averaged over a few members; the paper uses gradient-boosted
trees.

Features: a one-hot encoding of each gene (zero for silent genes), and for each stack the share of its layers that use
each mechanism.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from regard.contract import one_of
from regard.workbench.search.space import Genes, Space

KINDS = ("ranker", "regression")
Numbers = Sequence[float] | np.ndarray
HIDDEN, STEPS, RATE, DECAY, MEMBERS = 24, 200, 0.02, 0.02, 3


def features(space: Space, networks: Sequence[Genes]) -> np.ndarray:
    """One row of features per network, float32."""
    genes = np.asarray(networks)  # (networks, genes)
    depths = {stack.name: space.at(stack.depth) for stack in space.stacks}
    layers = {name: np.asarray(space.genes[at].choices)[genes[:, at]] for name, at in depths.items()}
    shares = {stack.name: np.zeros((len(genes), len(space.choices.mechanisms))) for stack in space.stacks}
    columns = []
    for at, gene in enumerate(space.genes):
        chosen = genes[:, at, None] == np.arange(len(gene.choices))
        if gene.layer >= 0:
            chosen &= gene.layer < layers[gene.stack][:, None]
        if gene.kind == "mechanism":
            shares[gene.stack] += chosen / layers[gene.stack][:, None]
        columns.append(chosen)
    return np.concatenate([*columns, *shares.values()], axis=1).astype(np.float32)


class Predictor:
    """Scores networks; higher is better.

    Args:
        space: the space of the networks.
        kind: ``ranker``, or ``regression`` on the losses.
        seed: seed of the initial weights.
    """

    def __init__(self, space: Space, kind: str = "ranker", seed: int = 0) -> None:
        one_of("kind", kind, KINDS)
        self.space, self.kind, self.seed = space, kind, seed

    def fit(self, networks: Sequence[Genes], losses: Sequence[float]) -> Predictor:
        """Learn from networks and their losses (lower is better)."""
        learned, self.mean, self.spread = _learned(
            features(self.space, networks), np.asarray(losses), [np.arange(len(networks))], self.kind, self.seed
        )
        (self.members,) = learned
        return self

    def score(self, networks: Sequence[Genes]) -> np.ndarray:
        """One score per network, float64."""
        return _told(self.members, features(self.space, networks), self.mean, self.spread)

    def probability(self, first: Genes, second: Genes) -> float:
        """The probability that the first network is better than the second."""
        a, b = self.score([first, second])
        return float(1 / (1 + np.exp(b - a)))


Weights = tuple[Tensor, Tensor, Tensor, Tensor]
"""Weights of some members: linear (K, F), up (K, F, H), its bias (K, 1, H), down (K, H)."""


def _learned(
    x: np.ndarray, losses: np.ndarray, subsets: Sequence[np.ndarray], kind: str, seed: int
) -> tuple[list[Weights], np.ndarray, np.ndarray]:
    """Members for each subset of the networks, all trained at once, and the mean and spread used to scale features."""
    mean, spread = x.mean(0), x.std(0) + 1e-3
    scaled = torch.from_numpy(((x - mean) / spread).astype(np.float32))
    count, width = len(subsets) * MEMBERS, x.shape[1]
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(count, width, HIDDEN, generator=generator) / width**0.5
    weights = (torch.zeros(count, width), up, torch.zeros(count, 1, HIDDEN), torch.zeros(count, HIDDEN))
    for weight in weights:
        weight.requires_grad_()
    y, within = torch.from_numpy(losses.astype(np.float64)), torch.zeros(count, len(losses))
    targets = torch.zeros_like(within)
    for k, subset in enumerate(subsets):
        members = slice(k * MEMBERS, (k + 1) * MEMBERS)
        within[members, subset] = 1.0
        part = y[subset]
        targets[members] = (-(y - part.mean()) / part.std(correction=0).clamp(min=1e-12)).float()
    better = (y[:, None] < y[None]).float()  # row better than column
    pairs = within[:, :, None] * within[:, None] * better
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=DECAY)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        scores = _scores(weights, scaled)
        if kind == "ranker":
            each = F.softplus(scores[:, None] - scores[:, :, None]) * pairs
            loss = (each.sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)).sum()
        else:
            loss = ((scores - targets).square() * within).sum(1).div(within.sum(1)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    linear, up, bias, down = (weight.detach() for weight in weights)
    each_subset = [slice(k * MEMBERS, (k + 1) * MEMBERS) for k in range(len(subsets))]
    return [(linear[m], up[m], bias[m], down[m]) for m in each_subset], mean, spread


def _scores(weights: Weights, x: Tensor) -> Tensor:
    """g of each member: a linear function plus one hidden layer, (K, n)."""
    linear, up, bias, down = weights
    return linear @ x.T + (torch.tanh(x @ up + bias) @ down[..., None]).squeeze(-1)


def _told(members: Weights, x: np.ndarray, mean: np.ndarray, spread: np.ndarray) -> np.ndarray:
    scaled = torch.from_numpy(((x - mean) / spread).astype(np.float32))
    return _scores(members, scaled).double().mean(0).numpy()


def pair_accuracy(scores: Numbers, losses: Numbers) -> float:
    """Share of pairs with different losses that the scores order correctly; ties count half. nan without such pairs."""
    told, order = _pairs(scores, losses)
    return float(((told == order) + 0.5 * (told == 0)).mean()) if len(order) else float("nan")


def kendall_tau(scores: Numbers, losses: Numbers) -> float:
    """Concordant minus discordant pairs, as a share of the pairs of networks with different losses; nan without pairs."""
    told, order = _pairs(scores, losses)
    return float((told * order).mean()) if len(order) else float("nan")


def _pairs(scores: Numbers, losses: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """Signs for which network in each pair is better, by scores and by losses."""
    s, y = np.asarray(scores, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    i, j = np.triu_indices(len(y), 1)
    order = np.sign(y[j] - y[i])
    counts = order != 0
    return np.sign(s[i] - s[j])[counts], order[counts]


@dataclass(frozen=True)
class Judged:
    """How well a predictor orders held-out networks, by cross-validation.

    Attributes:
        tau, tau_error: Kendall's tau among held-out networks, mean over the folds and standard error.
        accuracy: share of pairs ordered correctly.
        importance: for each gene, how much the accuracy falls if the gene is shuffled among the held-out networks.
    """

    tau: float
    tau_error: float
    accuracy: float
    importance: dict[str, float]


def judge(
    space: Space,
    networks: Sequence[Genes],
    losses: Sequence[float],
    kind: str = "ranker",
    *,
    folds: int = 5,
    shuffles: int = 3,
    seed: int = 0,
) -> Judged:
    """Cross-validate: for each fold, learn from the others and order it. Folds without two networks of different losses
    do not count; nan without any fold."""
    rng = np.random.default_rng(seed)
    order, y, x = rng.permutation(len(networks)), np.asarray(losses, dtype=np.float64), features(space, networks)
    parts = [(order[fold::folds], np.delete(order, np.s_[fold::folds])) for fold in range(folds)]
    parts = [(held, rest) for held, rest in parts if len(set(y[held])) > 1 and len(rest) > 1]
    learned, mean, spread = _learned(x, y, [rest for _, rest in parts], kind, seed) if parts else ([], x[:1], x[:1])
    taus, accuracies = [], []
    drops: dict[str, list[float]] = {gene.name: [] for gene in space.genes}
    for (held, _), members in zip(parts, learned, strict=True):
        shown = [networks[i] for i in held]
        scores = _told(members, x[held], mean, spread)
        taus.append(kendall_tau(scores, y[held]))
        accuracies.append(pair_accuracy(scores, y[held]))
        for at, gene in enumerate(space.genes):
            if len(space.allowed[at]) < 2:
                continue
            mixed = [
                space.nearest((*genes[:at], shown[k][at], *genes[at + 1 :]))
                for _ in range(shuffles)
                for genes, k in zip(shown, rng.permutation(len(shown)), strict=True)
            ]
            told = _told(members, features(space, mixed), mean, spread).reshape(shuffles, -1)
            drops[gene.name] += [accuracies[-1] - pair_accuracy(scores, y[held]) for scores in told]
    count = len(taus)
    return Judged(
        float(np.mean(taus)) if taus else float("nan"),
        float(np.std(taus, ddof=1) / np.sqrt(count)) if count > 1 else float("nan"),
        float(np.mean(accuracies)) if accuracies else float("nan"),
        {name: float(np.mean(values)) for name, values in drops.items() if values},
    )


def prune(space: Space, predictor: Predictor, importance: dict[str, float], keep: int, seed: int = 0) -> Space:
    """The space with only the `keep` most important genes left open; each other gene is fixed at the choice that scores
    best on average over networks drawn from the space."""
    rng = random.Random(seed)
    drawn = [space.draw(rng) for _ in range(200)]
    ranked = sorted(importance, key=lambda name: -importance[name])
    fixed = {}
    for name in ranked[keep:]:
        at = space.at(name)
        means = {
            choice: float(predictor.score([space.nearest((*g[:at], choice, *g[at + 1 :])) for g in drawn]).mean())
            for choice in space.allowed[at]
        }
        fixed[name] = (max(means, key=lambda choice: means[choice]),)
    return space.restricted(fixed)
