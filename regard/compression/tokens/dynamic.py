r"""DynamicViT: small predictors choose the patches that a vision transformer keeps, always the same number.

Rao et al., arXiv 2106.02034. Before some blocks a predictor reads the patches x (B, N, C) and the mask of those that
are still kept, d (B, N), and returns log-probabilities of keeping and dropping each:

    z = gelu(W LN(x)),   g = sum_j d_j z_j[C/2:] / sum_j d_j,   log p = log_softmax(MLP([z_i[:C/2], g]))

At inference the patches with the largest p_keep are kept, a fixed share of the initial patches at each of these stages.
In training none is removed: d is drawn by a hard Gumbel-softmax, times the previous d, with the gradient of the soft
one (straight through); and attention counts a dropped key only for its own query, with l the scores and N tokens:

    A_ij = (exp(l_ij - max l_i) m_ij + eps / N) / (sum_k exp(l_ik - max l_i) m_ik + eps),   m_ij = d_j, m_ii = 1, eps = 1e-6

The loss, with the original model as the teacher and S stages, is

    CE + 2 / S sum_s mean (mean_j d_sj - share_s)^2 + 0.5 KL(teacher, model) + 0.5 mean over patches kept (x - x_teacher)^2

The direction of the divergence follows the authors' code, KL(teacher, model) = sum_c p_c (log p_c - log q_c) with p the
teacher's classes; the formula in the paper names the model first. In this direction, as usual in distillation, what the
model misses is weighted by the teacher. Also from the code are the mean squared difference of tokens (its other option,
a divergence between features, is left out), and that every row of a batch keeps the same number of patches.

A head that averages patches averages those that are kept, in training weighted by d, so that its gradient reaches the
predictors that way, too. In TNT, predictors read the sentences, and the words of a patch leave with its sentence.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.compression.tokens.phases import Batches, Phase, run_phases
from regard.compression.tokens.schedules import quarters
from regard.compression.tokens.trained import ChoosingTransformer
from regard.contract import Unsupported
from regard.core.precision import wide
from regard.layers.linear import make_linear
from regard.layers.norms import LayerNorm

if TYPE_CHECKING:
    from jaxtyping import Float, Int

EPS = 1e-6
"""Added to the sum of a row of masked attention."""
RELEASED = {"in_conv.0": "norm", "in_conv.1": "inner", "out_conv.0": "outer.0", "out_conv.2": "outer.1"} | {
    "out_conv.4": "outer.2"
}
"""Names of a predictor's parts in the official code, mapped to the names here."""


class KeepPredictor(nn.Module):
    """Log-probabilities of keeping and of dropping each patch.

    Args:
        dim: width of the patches, divisible by 4.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 4 or dim % 4:
            raise Unsupported(f"a predictor of width {dim}", supported="a width that 4 divides")
        self.norm = LayerNorm(dim, eps=1e-5)
        self.inner = make_linear(dim, dim, bias=True)
        widths = (dim, dim // 2, dim // 4, 2)
        self.outer = nn.ModuleList(make_linear(a, b, bias=True) for a, b in itertools.pairwise(widths))
        for linear in (self.inner, *self.outer):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Float[Tensor, "b n c"], kept: Float[Tensor, "b n"]) -> Float[Tensor, "b n 2"]:
        """Two log-probabilities for each patch; `kept` is 1 for patches that are still kept."""
        local, others = F.gelu(self.inner(self.norm(x))).chunk(2, -1)
        weight = kept.to(x.dtype)[..., None]
        whole = (others * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=0.5)
        x = torch.cat([local, whole.expand_as(local)], -1)
        first, second, last = self.outer
        return wide(last(F.gelu(second(F.gelu(first(x)))))).log_softmax(-1)


@dataclass(frozen=True)
class Pruned:
    """The result of a pass in which all patches were computed.

    Attributes:
        logits: (B, K).
        features: features of the patches after the last norm (B, N, C).
        decisions: for each stage, 1 for the patches that stay (B, N).
    """

    logits: Float[Tensor, "b k"]
    features: Float[Tensor, "b n c"]
    decisions: list[Float[Tensor, "b n"]]


class DynamicTransformer(ChoosingTransformer):
    """A vision transformer with a predictor before some of its blocks.

    Args:
        model: :class:`regard.models.vision.vit.VisionTransformer` or :class:`regard.models.vision.tnt.TNT` with softmax
            attention, also in a mixture of heads, without positions that add to its scores; or timm's `VisionTransformer`
            of plain blocks. The head reads a class token or averages the patches. It is shared, not copied.
        keep: share of the initial patches that is left after each stage; a single number is raised to the first,
            second, third power and so on.
        blocks: numbers of the blocks, from 0, before which patches are removed; at a quarter, half and three quarters
            of the depth when None.

    Raises:
        Unsupported: for other models, and for invalid shares and blocks.
    """

    method, choosers = "dynamicvit", "predictors"

    def __init__(
        self, model: nn.Module, keep: float | Sequence[float] = 0.7, blocks: Sequence[int] | None = None
    ) -> None:
        super().__init__(model)
        self.host.check_softmax()
        depth = len(self.host.blocks)
        stages = quarters(depth) if blocks is None else sorted(set(blocks))
        if not stages or not all(0 <= stage < depth for stage in stages):
            raise Unsupported(f"blocks={blocks} of a model with {depth}", supported=f"0 to {depth - 1}")
        self.stages = stages
        self.shares = keep
        self.predictors = nn.ModuleList(KeepPredictor(self.host.width) for _ in stages)

    @property
    def options(self) -> dict[str, Any]:
        return {"keep": self.shares, "blocks": self.stages}

    @property
    def shares(self) -> list[float]:
        """Shares of the initial patches left after each stage; can be set at any time, like `keep`."""
        return self._shares

    @shares.setter
    def shares(self, keep: float | Sequence[float]) -> None:
        shares = (
            [keep ** (i + 1) for i in range(len(self.stages))] if isinstance(keep, int | float) else [*map(float, keep)]
        )
        if len(shares) != len(self.stages) or not all(0 < share <= 1 for share in shares):
            raise Unsupported(
                f"keep={keep} at {len(self.stages)} stages", supported="a share for each, above 0 and at most 1"
            )
        if shares != sorted(shares, reverse=True):
            raise Unsupported(f"keep={keep}, which rises", supported="shares of the first patches, none above the last")
        self._shares = shares

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        return self.forward_dropping(x)[0]

    def forward_dropping(
        self, images: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b k"], list[Int[Tensor, "b m"]]]:
        """Logits, and the indices of the patches that each stage kept, in ascending order."""
        (x, context), before = self.host.embed(images), self.host.protected
        first = x.shape[1] - before
        places, left = torch.arange(x.shape[1], device=x.device).expand(len(x), -1), []
        for number, block in enumerate(self.host.blocks):
            if number in self.stages:
                stage = self.stages.index(number)
                patches = self.host.vectors(x)[:, before:]
                scores = self.predictors[stage](patches, torch.ones_like(places[:, before:]))[..., 0]
                chosen = scores.topk(self.count(stage, first), dim=1).indices.sort(1).values
                chosen = F.pad(chosen + before, (before, 0))
                chosen[:, :before] = places[:, :before]
                x, places = x.gather(1, chosen[..., None].expand(-1, -1, x.shape[2])), places.gather(1, chosen)
                left.append(places[:, before:] - before)
            whole = x.shape[1] == before + first
            x = self.host.run([block], x, context, places=None if whole else places)
        self.keep(x, torch.ones_like(places, dtype=torch.bool), places, before + first)
        return self.host.logits(self.host.norm(x)), left

    def count(self, stage: int, first: int) -> int:
        """Number of patches that a stage keeps of `first` initial ones; at least one."""
        return max(1, math.floor(first * self.shares[stage] + 1e-6))

    def forward_masked(
        self, images: Float[Tensor, "b c h w"], *, sampled: bool = True, generator: torch.Generator | None = None
    ) -> Pruned:
        """Compute all patches, under random decisions, or under those of :meth:`forward` if not `sampled`.

        Args:
            images: (B, C, H, W).
            sampled: whether each patch's decision is drawn independently; only then do gradients reach the predictors.
            generator: source of random draws.
        """
        (x, context), before = self.host.embed(images), self.host.protected
        kept = x.new_ones(x.shape[0], x.shape[1] - before)
        decisions: list[Tensor] = []
        for number, block in enumerate(self.host.blocks):
            if number in self.stages:
                stage = self.stages.index(number)
                found = self.predictors[stage](self.host.vectors(x)[:, before:], kept)
                if sampled:
                    kept = draw(found, generator).to(x.dtype) * kept
                else:
                    scores = torch.where(kept > 0, found[..., 0], -torch.inf)
                    chosen = scores.topk(self.count(stage, kept.shape[1]), dim=1).indices
                    kept = torch.zeros_like(kept).scatter(1, chosen, 1.0)
                decisions.append(kept)
            policy = wide(F.pad(kept, (before, 0), value=1.0))
            x = self.host.run_under(block, x, context, partial(softmax_under, policy=policy))
        features = self.host.norm(x)
        logits = self.host.logits(features, F.pad(kept, (before, 0), value=1.0))
        return Pruned(logits, features[:, before:], decisions)

    def translate(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights of the official code's `VisionTransformerDiffPruning`."""
        found, backbone = dict[str, Tensor](), dict[str, Tensor]()
        for name, value in weights.items():
            if not name.startswith("score_predictor."):
                backbone[name] = value
                continue
            _, stage, part = name.split(".", 2)
            layer, _, kind = part.rpartition(".")
            found[f"{stage}.{RELEASED.get(layer, layer)}.{kind}"] = value
        return backbone, found


def draw(log_probabilities: Float[Tensor, "b n 2"], generator: torch.Generator | None = None) -> Float[Tensor, "b n"]:
    """1 if the first of two is drawn, else 0; with the soft draw's gradient (arXiv 1611.01144, at temperature 1)."""
    soft = (log_probabilities + gumbel(log_probabilities, generator)).softmax(-1)[..., 0]
    hard = (soft >= 0.5).to(soft.dtype)
    return hard - soft.detach() + soft


def gumbel(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Random draws from the standard Gumbel distribution."""
    return -torch.empty_like(like).exponential_(generator=generator).log()


def softmax_under(scores: Float[Tensor, "b h n n"], policy: Float[Tensor, "b n"]) -> Float[Tensor, "b h n n"]:
    """Attention weights under a policy: a key counts if its policy is 1, and always for its own query."""
    n = scores.shape[-1]
    own = torch.eye(n, dtype=policy.dtype, device=policy.device)
    counts = policy[:, None, None] * (1 - own) + own
    each = (scores - scores.amax(-1, keepdim=True)).exp() * counts
    return (each + EPS / n) / (each.sum(-1, keepdim=True) + EPS)


@dataclass(frozen=True)
class LossWeights:
    """Weights of the parts of :func:`dynamic_loss`.

    Attributes:
        task: weight of the cross entropy.
        ratio: weight of the squared difference of shares.
        logits: weight of the divergence from the teacher's classes.
        tokens: weight of the squared difference from the teacher's patches.
    """

    task: float = 1.0
    ratio: float = 2.0
    logits: float = 0.5
    tokens: float = 0.5


def dynamic_loss(
    pruned: Pruned,
    labels: Int[Tensor, " b"],
    shares: Sequence[float],
    teacher_logits: Float[Tensor, "b k"],
    teacher_features: Float[Tensor, "b n c"],
    weights: LossWeights = LossWeights(),
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The weighted sum, and its unweighted parts by the names of the weights; see the module.

    Args:
        pruned: from :meth:`DynamicTransformer.forward_masked`.
        labels: classes.
        shares: target share of each stage.
        teacher_logits: logits of the original model.
        teacher_features: its patches after the last norm.
        weights: weights of the parts.
    """
    ratios = [(made.mean(1) - share).square().mean() for made, share in zip(pruned.decisions, shares, strict=True)]
    kept = (pruned.decisions[-1].detach() > 0.5)[..., None]
    apart = torch.where(kept, pruned.features - teacher_features, 0).square().sum()
    chances = F.log_softmax(pruned.logits, -1), F.log_softmax(teacher_logits, -1)
    parts = {
        "task": F.cross_entropy(pruned.logits, labels),
        "ratio": torch.stack(ratios).mean(),
        "logits": F.kl_div(*chances, reduction="batchmean", log_target=True),
        "tokens": apart / (kept.sum() * pruned.features.shape[-1]).clamp(min=1),
    }
    named = asdict(weights)
    return torch.stack([named[name] * part for name, part in parts.items()]).sum(), parts


@dataclass(frozen=True)
class DynamicStep:
    """A step of :func:`train_dynamic`: its loss, the loss's unweighted parts, and the share kept by the last stage."""

    step: int
    loss: float
    parts: Mapping[str, float]
    kept: float


def train_dynamic(
    model: DynamicTransformer,
    batches: Batches,
    *,
    steps: int,
    predictor_rate: float = 1e-3,
    block_rate: float = 1e-4,
    weights: LossWeights = LossWeights(),
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    on_step: Callable[[DynamicStep], None] = lambda step: None,
) -> None:
    """Train predictors and blocks together, in place, with the initial model as the teacher.

    The same call, with the same initial model, resumes from `checkpoint` and ends with the same weights. Losses of layers
    (a mixture's balance) are not part of it.

    Args:
        model: built around a trained vision transformer.
        batches: images and classes of each step, counted from 0.
        steps: number of Adam steps, with a cosine schedule.
        predictor_rate, block_rate: learning rates of the predictors, and of all other weights.
        weights: weights of the parts of the loss.
        seed: seed of random draws.
        checkpoint, checkpoint_every: a file, and the number of steps between saves.
        on_step: called after each step.

    Raises:
        Unsupported: for a checkpoint of another run, and a loss that is not finite.
    """
    teacher = copy.deepcopy(model.model).eval().requires_grad_(False)

    def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            features = teacher.forward_features(images)
            logits = teacher.forward_head(features)
        pruned = model.forward_masked(images)
        patches = features[:, model.host.protected :]
        total, parts = dynamic_loss(pruned, labels, model.shares, logits, patches, weights)
        told = {name: part.item() for name, part in parts.items()}
        return total, told | {"kept": pruned.decisions[-1].mean().item()}

    def tell(_: int, step: int, total: float, told: Mapping[str, float]) -> None:
        parts = {name: value for name, value in told.items() if name != "kept"}
        on_step(DynamicStep(step, total, parts, told["kept"]))

    groups = [(list(model.predictors.parameters()), predictor_rate), (list(model.model.parameters()), block_rate)]
    run_phases(
        model,
        [Phase("predictors and blocks", groups, steps, loss, schedule="cosine")],
        batches,
        settings={"shares": model.shares, "stages": model.stages, "weights": asdict(weights)},
        seed=seed,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        on_step=tell,
    )
